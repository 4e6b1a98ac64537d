"""Builds the wheels of core and every plugin and uses them in a clean virtual environment.

The environment first holds core with core's own dependencies, no framework; then the plugins are
installed on top. Needs the package index, as every installation does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = {"bittern": ROOT, **{p.name: p for p in sorted((ROOT / "plugins").iterdir())}}
CONSTRAINTS = ROOT / "constraints.txt"

CORE_ALONE = """
import json, sys, tempfile
from pathlib import Path
import torch
from torch import nn
import bittern as bt

torch.manual_seed(0)
found = {"plugins": [r.name for r in bt.Toolkit().plugins.records]}
mlp = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
cnn = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(32, 10),
)
inputs = {"mlp": (mlp, torch.randn(64, 256)), "cnn": (cnn, torch.randn(16, 3, 12, 12))}
for name, (model, x) in inputs.items():
    y = model(x).argmax(-1)
    data = [(x, y)]
    result = bt.quantize(model, "int8", data=data)
    evaluation = bt.evaluate(model, data)
    with tempfile.TemporaryDirectory() as folder:
        report = bt.export(model, Path(folder) / "out")
        result.report.to_json(Path(folder) / "report.json")
        entries = json.loads((Path(folder) / "report.json").read_text())["entries"]
    found[name] = {
        "modules": len(result.plan.modules), "accuracy": evaluation.accuracy,
        "reference": evaluation.reference_accuracy, "sqnr": evaluation.output_sqnr_db,
        "files": sorted(report.files), "entries": len(entries),
    }
found["frameworks"] = [m for m in ("transformers", "accelerate", "triton") if m in sys.modules]
print(json.dumps(found))
"""


def run(*command: object, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("BITTERN_", "PYTHON"))}
    process = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for name, project in PROJECTS.items():
        run(
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            folder / name,
            project,
        )
    return {name: next((folder / name).glob("*.whl")) for name in PROJECTS}


@pytest.mark.parametrize("name", list(PROJECTS))
def test_a_wheel_holds_its_package_and_nothing_else(name: str, wheels: dict[str, Path]) -> None:
    package = "bittern" if name == "bittern" else f"bittern_{name}"
    with zipfile.ZipFile(wheels[name]) as wheel:
        names = wheel.namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {package}
    assert f"{package}/py.typed" in names
    shipped = [n for n in names if not n.startswith("bittern/cli/template/")]  # of a new plugin
    assert not any("tests/" in n for n in shipped)
    source = PROJECTS[name] / ("core/src" if name == "bittern" else "src") / package
    kept = {p.relative_to(source).as_posix() for p in source.rglob("*.*") if p.is_file()}
    kept = {k for k in kept if "__pycache__" not in k}
    assert kept == {n.removeprefix(f"{package}/") for n in names if n.startswith(f"{package}/")}
    assert wheels[name].stat().st_size < 4_000_000


def test_the_wheels_work_in_a_clean_environment(wheels: dict[str, Path], tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS)

    run(*pip, wheels["bittern"])
    found = json.loads(run(python, "-c", CORE_ALONE, cwd=tmp_path).splitlines()[-1])
    assert found["plugins"] == []
    assert found["frameworks"] == []
    for name, count in (("mlp", 2), ("cnn", 3)):
        assert found[name]["modules"] == count
        assert found[name]["entries"] == 2 * count
        assert found[name]["sqnr"] > 25
        assert found[name]["reference"] == 1
        assert found[name]["accuracy"] > 0.9
        assert found[name]["files"] == ["bittern.json", "model.safetensors"]
    code = "import importlib.util as u; print(u.find_spec('transformers'))"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "None"

    run(*pip, *(wheels[name] for name in PROJECTS if name != "bittern"))
    bittern = venv / "bin" / "bittern"
    records = json.loads(run(bittern, "plugins", "list", "--json", cwd=tmp_path))["plugins"]
    statuses = {record["name"]: record["status"] for record in records}
    assert statuses == {
        "huggingface": "target-missing",
        "kernels": "loaded",
        "megatron": "target-missing",
    }
    assert "bittern-huggingface[target]" in run(bittern, "doctor", cwd=tmp_path)

    run(*pip, *(f"{wheels[name]}[target]" for name in ("huggingface", "megatron")))
    records = json.loads(run(bittern, "plugins", "list", "--json", cwd=tmp_path))["plugins"]
    assert {record["status"] for record in records} == {"loaded"}
    arguments = ("demo", "--recipe", "int4", "--json")
    (row,) = json.loads(run(bittern, *arguments, cwd=tmp_path))["recipes"]
    assert row["perplexity_reloaded"] == pytest.approx(row["perplexity_after"], rel=1e-4)
