"""Nothing that we read or write is a pickle, and nothing we read runs.

A pickle runs code when it is loaded. Every way to load one, and to run text, raises here while all
kinds of files are written and read.
"""

from __future__ import annotations

import builtins
import json
import marshal
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from bittern.cli.checkpoints import describe
from bittern.cli.main import make_cli
from bittern.exporting import ExportRecord
from bittern.records import ModelAdapter
from bittern.toolkit import Toolkit


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(input_ids)))


def build(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 16, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kit(make_plugin: Callable[..., Any], toolkit_with: Callable[..., Toolkit]) -> Toolkit:
    adapter = ModelAdapter(vocab_size=16, causal=True, logits=lambda output: output)
    return toolkit_with(make_plugin("adapter", resolve_model_adapter=lambda model: adapter))


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading a pickle raises, whoever does it; so does running text, when we do it."""

    def refuse(*_: object, **__: object) -> None:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        raise AssertionError(f"{caller} loaded or wrote a pickle")

    def unless_imported(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("importlib"):  # Python unmarshals the code of modules
                refuse()
            return original(*args, **options)

        return call

    def ours(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            assert not caller.startswith("bittern"), f"{caller} ran text"
            return original(*args, **options)

        return call

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
        if hasattr(sys.modules["_pickle"], name):
            monkeypatch.setattr(sys.modules["_pickle"], name, refuse)
    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(marshal, name, unless_imported(getattr(marshal, name)))
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, ours(getattr(builtins, name)))
    yield
    monkeypatch.undo()


def test_the_trap_works(forbidden: None) -> None:
    for call in (pickle.loads, torch.load, marshal.loads, pickle.Unpickler):
        with pytest.raises(AssertionError, match="pickle"):
            call(b"")  # type: ignore[operator]


RECIPES = [
    "int8",
    "fp8",
    "nvfp4",
    "mxfp4",
    "int4",
    pytest.param("w4a8", marks=pytest.mark.heavy),
    pytest.param("nf4", marks=pytest.mark.heavy),
]


def build_quantized(kit: Toolkit, recipe: str, ids: Tensor) -> Model:
    model = build()
    kit.quantize(model, recipe, data=[ids])
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_states_are_saved_and_restored_without_pickle(
    recipe: str, kit: Toolkit, ids: Tensor, tmp_path: Path, forbidden: None
) -> None:
    model = build_quantized(kit, recipe, ids)
    for options in ({}, {"state_only": True}):
        path = tmp_path / f"state{len(options)}"
        kit.save(model, path, **options)
        fresh = build() if options else build(5)
        kit.restore(fresh, path)
        assert torch.equal(fresh(ids), model(ids))


def test_exports_are_written_verified_and_inspected_without_pickle(
    kit: Toolkit, ids: Tensor, tmp_path: Path, forbidden: None
) -> None:
    path = tmp_path / "out"
    kit.export(build_quantized(kit, "int8", ids), path, data=[ids])
    assert kit.verify(path).ok
    record = ExportRecord.read(path)
    assert record is not None
    assert record.probe is not None
    assert describe(path)["kind"] == "bittern export"
    assert CliRunner().invoke(make_cli(), ["inspect", str(path)]).exit_code == 0


def test_recipes_are_read_without_running_them(
    kit: Toolkit, tmp_path: Path, forbidden: None
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: base\nrules:\n  - match: {class: Linear}\n    weight: int8\n")
    assert kit.recipe(file, ["algorithm=max"]).name == "mine"


def test_pickles_beside_a_model_are_named_and_not_read(
    kit: Toolkit, tmp_path: Path, forbidden: None
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "it ran",))

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "x"}))
    for name in ("pytorch_model.bin", "model.pt", "a.pth"):
        (model / name).write_bytes(_pickled(Trap()))
    assert describe(model)["pickled"] == ["a.pth", "model.pt", "pytorch_model.bin"]
    assert not (tmp_path / "it ran").exists()


def _pickled(value: object) -> bytes:
    """Pickle with the functions of Python's own implementation, which the trap leaves alone."""
    import io

    file = io.BytesIO()
    pickle._Pickler(file).dump(value)  # type: ignore[attr-defined]
    return file.getvalue()
