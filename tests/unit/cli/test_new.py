"""``bittern plugins new``: a whole plugin, or one clear error and nothing at all."""

from __future__ import annotations

import ast
import tomllib

import pytest

from bittern.cli import scaffold
from bittern.cli.scaffold import render
from bittern.cli.scaffold import scaffold as named


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_plugin_is_written_and_the_next_steps_are_shown(bittern, tmp_path):
    done = bittern("plugins", "new", "heron")
    assert (done.code, done.err) == (0, "")
    folder = tmp_path / "bittern-heron"
    assert (folder / "src" / "bittern_heron" / "hooks.py").is_file()
    assert (folder / "src" / "bittern_heron" / "py.typed").is_file()
    assert (folder / "framework" / "src" / "heron_framework" / "layers.py").is_file()
    assert "pip install -e framework -e '.[target,test]'" in done.out
    assert "cd bittern-heron" in done.out


def test_json_says_what_was_written(bittern, tmp_path):
    found = bittern("plugins", "new", "grey-heron", "--output", "a/b", "--json").json
    assert (found["name"], found["distribution"]) == ("grey-heron", "bittern-grey-heron")
    assert (found["package"], found["path"]) == ("bittern_grey_heron", "a/b")
    written = {p.relative_to(tmp_path / "a/b").as_posix() for p in (tmp_path / "a/b").rglob("*.*")}
    assert {f for f in found["files"] if "." in f} == {w for w in written if "." in w}
    assert sorted(found["files"]) == found["files"]


def test_the_project_says_what_it_needs():
    project = tomllib.loads(render(named("heron"))["pyproject.toml"])["project"]
    assert project["entry-points"]["bittern.plugins"] == {"heron": "bittern_heron.hooks"}
    assert project["optional-dependencies"]["target"] == ["heron-framework>=1"]
    (core,) = project["dependencies"]
    assert core.startswith("bittern>=")
    assert ",<" in core


@pytest.mark.parametrize(
    ("version", "wanted"), [("0.1.0", ">=0.1,<0.2"), ("1.10.2.dev3", ">=1.10,<1.11")]
)
def test_the_plugin_is_for_this_minor_version_of_core(monkeypatch, version, wanted):
    monkeypatch.setattr(scaffold, "__version__", version)
    assert named("heron").values()["core"] == wanted


def test_a_given_framework_is_not_made_up(bittern, tmp_path):
    target = "Wing.nn>=2,<3"
    done = bittern("plugins", "new", "wing", "--target", target)
    assert done.code == 0
    folder = tmp_path / "bittern-wing"
    assert not (folder / "framework").exists()
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["target"] == [target]
    assert 'LINEAR = "Wing_nn.layers:Linear"' in (folder / "src/bittern_wing/hooks.py").read_text()
    assert "put the real ones" in (folder / "README.md").read_text()


@pytest.mark.parametrize("target", [None, "wing>=2"])
def test_every_placeholder_is_filled_and_every_file_is_python(target):
    for name, content in render(named("grey-heron", target)).items():
        assert "${" not in content, name
        assert "PACKAGE" not in name
        assert "FRAMEWORK" not in name
        if name.endswith(".py"):
            ast.parse(content, name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Heron", "small letters"),
        ("grey_heron", "small letters"),
        ("grey--heron", "small letters"),
        ("-heron", ""),
        ("heron-", "small letters"),
        ("9heron", "small letters"),
        ("../heron", "small letters"),
        ("héron", "small letters"),
        ("", "small letters"),
        ("bittern", "leave out bittern"),
        ("bittern-heron", "'heron' becomes the distribution bittern-heron"),
    ],
)
def test_a_bad_name_is_one_error_and_nothing_is_written(bittern, tmp_path, name, hint):
    done = bittern("plugins", "new", "--json", "--", name)
    assert done.code == 2
    assert done.json["error"] == "PluginError"
    assert hint in done.json["hint"]
    assert len([line for line in done.err.splitlines() if line.startswith("error")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bad_target_is_one_error_and_nothing_is_written(bittern, tmp_path):
    done = bittern("plugins", "new", "heron", "--target", "no good !!", "--json")
    assert done.code == 2
    assert "is no requirement" in done.json["what"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["folder", "file"])
def test_what_is_there_already_is_not_touched(bittern, tmp_path, there):
    path = tmp_path / "bittern-heron"
    if there == "folder":
        path.mkdir()
        path = path / "precious"
    path.write_text("mine")
    done = bittern("plugins", "new", "heron", "--json")
    assert done.code == 2
    assert done.json["error"] == "OutputError"
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["bittern-heron"]


def test_an_interruption_leaves_nothing(bittern, tmp_path, monkeypatch):
    class Stop(dict):
        def items(self):
            yield "pyproject.toml", "half"
            raise KeyboardInterrupt

    monkeypatch.setattr(scaffold, "render", lambda plugin: Stop())
    assert bittern("plugins", "new", "heron").code == 130
    assert list(tmp_path.iterdir()) == []
