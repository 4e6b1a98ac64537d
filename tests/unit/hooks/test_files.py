"""Unpackaged plugins: several of one name, one given twice, broken ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bittern.builtin import hooks as builtin
from bittern.errors import PluginError
from bittern.hooks.discovery import PluginOptions, Status
from bittern.hooks.manager import PluginManager
from bittern.registry import resolve
from bittern.toolkit import Toolkit

SOURCE = """
from bittern.hooks import hookimpl
from bittern.records import Algorithm

def run(model, plan, forward, context):
    return {name!r}

@hookimpl
def register_algorithms():
    return [Algorithm(name={name!r}, run=f"{{__name__}}:run")]
"""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("bittern_file_"):
            del sys.modules[name]


def write(folder: Path, name: str, *, stem: str = "local") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{stem}.py"
    file.write_text(SOURCE.format(name=name))
    return file


def test_two_files_of_one_name_are_two_plugins_and_each_runs_its_own_code(tmp_path: Path) -> None:
    files = [write(tmp_path / "a", "one"), write(tmp_path / "b", "two")]
    toolkit = Toolkit(block=["*"], files=files)

    mine = [r for r in toolkit.plugins.records if r.name == "local"]
    assert [r.status for r in mine] == [Status.LOADED] * 2
    assert len({r.entry for r in mine}) == 2
    for name, file in zip(("one", "two"), files, strict=True):
        algorithms = toolkit.registry.algorithms
        assert algorithms.plugin(name) == str(file)
        assert resolve(algorithms.get(name).run)(None, None, None, None) == name


def test_a_later_toolkit_does_not_take_the_module_of_an_earlier_one(tmp_path: Path) -> None:
    first = Toolkit(block=["*"], files=[write(tmp_path / "a", "one")])
    Toolkit(block=["*"], files=[write(tmp_path / "b", "two")])

    assert resolve(first.registry.algorithms.get("one").run)(None, None, None, None) == "one"


def test_a_file_given_twice_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "one")
    monkeypatch.chdir(tmp_path)
    toolkit = Toolkit(block=["*"], files=[file, "local.py", "./local.py"])
    assert [r.name for r in toolkit.plugins.records if r.active] == ["local"]


def test_a_broken_file_leaves_no_half_module(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('broken')")
    with pytest.raises(PluginError, match="could not be loaded: RuntimeError: broken"):
        Toolkit(block=["*"], files=[file])
    assert not [name for name in sys.modules if name.startswith("bittern_file_broken")]


def test_a_report_on_plugins_shows_a_broken_file_with_its_traceback(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('broken')")
    manager = PluginManager(
        PluginOptions(files=(str(file),), required=("gamma",), strict=True),
        builtin=builtin,
        records=(),
        lenient=True,
    )
    (record,) = manager.records
    assert record.status is Status.FAILED
    assert "broken.py" in record.traceback
    assert record.remedy == ""  # pip cannot mend a file
