# Everything starts here; each target sets up .venv by itself.
#   make demo    quantize, export and reload the model that ships with the project
#   make test    all tests of the default run
#   make lint    ruff, mypy --strict, import-linter
#   make docs    the documentation, as docs/_build/html/index.html; a warning is an error
#   make bench   benchmarks (prints tables; asserts nothing)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLUGINS := $(wildcard plugins/*/pyproject.toml)
# Test workers share the cores: one math thread each, as many workers as cores.
WORKERS ?= auto

.PHONY: demo test lint docs bench clean

demo: $(READY)
	$(BIN)/bittern demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not heavy and not gpu and not te and not apex"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python -m sphinx -E -a -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

bench: $(READY)
	for script in startup plugins conversion calibration fake_quantize tracing restore compress; do $(BIN)/python benchmarks/$$script.py || exit 1; done

$(READY): pyproject.toml constraints.txt $(PLUGINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation \
		-e '.[test,lint,docs]' -e 'plugins/huggingface[target,data,train]' -e plugins/kernels \
		-e 'plugins/megatron[target]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
