"""The documentation builds without a warning, and leaves out nothing that is public."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bittern
from bittern import records, testing
from bittern.cli.main import COMMANDS
from bittern.config.schema import AlgorithmModel, MatchModel, Recipe, RuleModel, SpecModel
from bittern.hooks import specs
from bittern.hooks.discovery import Status

SPHINX = (sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q")
HOOKS = {n: f for n, f in vars(specs).items() if hasattr(f, "bittern_spec")}


@pytest.fixture(scope="module")
def sources(root: Path) -> dict[str, str]:
    """Page to Markdown."""
    files = (p for p in (root / "docs").rglob("*.md") if "_build" not in p.parts)
    return {p.relative_to(root / "docs").as_posix(): p.read_text(encoding="utf-8") for p in files}


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as HTML; a broken link, directive or docstring is an error."""
    pytest.importorskip("furo", reason="pip install 'bittern[docs]'")
    out = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [*SPHINX, "-d", str(out / "cache"), str(root / "docs"), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def words(page: Path) -> str:
    """Return what a reader sees, without white space."""
    text = re.sub(r"<(script|style).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", "", html.unescape(re.sub(r"<[^>]+>", "", text)))


# --- hooks ----------------------------------------------------------------------------------------


def test_every_hook_is_documented_with_its_exact_signature(built: Path) -> None:
    page = words(built / "plugin-authors" / "hooks.html").replace(",)", ")")
    missing = []
    for name, function in HOOKS.items():
        signature = inspect.signature(function)
        arguments = ", ".join(f"{p.name}: {p.annotation}" for p in signature.parameters.values())
        shown = f"{name}({arguments}) → {signature.return_annotation}"
        if re.sub(r"\s+", "", shown) not in page:
            missing.append(shown)
    assert not missing


def test_every_hook_says_what_becomes_of_its_results(built: Path) -> None:
    page = (built / "plugin-authors" / "hooks.html").read_text(encoding="utf-8")
    assert page.count('class="badge"') >= len(HOOKS)


def test_every_conformance_test_says_what_it_protects_from(built: Path) -> None:
    page = words(built / "plugin-authors" / "conformance.html")
    for name in testing.__all__:
        value = getattr(testing, name)
        if inspect.isclass(value) and issubclass(value, testing.Conformance):
            for test in (t for t in dir(value) if t.startswith("test_")):
                assert test in page, f"{name}.{test}"
                assert (inspect.getdoc(getattr(value, test)) or "").startswith("Protects ")


# --- records, functions, errors -------------------------------------------------------------------


def documented(sources: dict[str, str]) -> set[str]:
    """Return the full names of what the pages document."""
    names = re.findall(
        r"^\.\. auto(?:class|function|exception|data):: (\S+)", "".join(sources.values()), re.M
    )
    assert len(names) == len(set(names)), "something is documented twice"
    kits = re.findall(r"^\.\. bittern-conformance:: (\S+)", "".join(sources.values()), re.M)
    return {*names, *(f"bittern.testing.{kit}" for kit in kits)}


def test_what_the_pages_document_exists(sources: dict[str, str]) -> None:
    for name in documented(sources):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("package", ["bittern.records", "bittern.errors", "bittern.testing"])
def test_everything_public_is_documented(package: str, sources: dict[str, str]) -> None:
    public = {f"{package}.{name}" for name in importlib.import_module(package).__all__}
    missing = sorted(public - documented(sources))
    assert not missing, (
        f"give them an autoclass, autofunction or autoexception on a page: {missing}"
    )


def test_every_name_of_the_package_is_documented(sources: dict[str, str]) -> None:
    found = {name.rpartition(".")[2] for name in documented(sources)}
    # The decorator and the version have no page of their own.
    assert set(bittern.__all__) - found == {"__version__", "hookimpl"}


def test_every_record_has_a_docstring_that_names_its_fields() -> None:
    for name in records.__all__:
        value = getattr(records, name)
        fields = getattr(value, "__dataclass_fields__", {})
        text = inspect.getdoc(value) or ""
        if fields and "Attributes:" in text:
            missing = [field for field in fields if f"    {field}: " not in text]
            assert not missing, f"{name}: {missing}"


def test_every_key_of_a_recipe_is_documented(sources: dict[str, str]) -> None:
    models = (Recipe, RuleModel, MatchModel, SpecModel, AlgorithmModel)
    keys = {field.alias or name for model in models for name, field in model.model_fields.items()}
    rows = re.findall(r"^\| (`.+?) \|", sources["reference/recipes.md"], re.M)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == keys


# --- the command line and the environment ---------------------------------------------------------


def test_every_command_is_documented(built: Path) -> None:
    page = words(built / "reference" / "command-line.html")
    assert not [name for name in COMMANDS if f"Usage:bittern{name}" not in page]


def test_every_status_is_documented(sources: dict[str, str]) -> None:
    page = sources["plugin-authors/statuses.md"]
    headings = set(re.findall(r"^## ([a-z-]+)$", page, re.M))
    # A plugin that was found gets another status before anybody sees it.
    assert headings == {str(status) for status in Status} - {"found"}


def test_every_environment_variable_is_documented(root: Path, sources: dict[str, str]) -> None:
    used: set[str] = set()
    for file in (root / "core" / "src").rglob("*.py"):
        used |= set(re.findall(r'"(BITTERN_[A-Z_]+)"', file.read_text(encoding="utf-8")))
    assert len(used) > 4
    text = "".join(sources.values())
    assert not {name for name in used if name not in text}


def test_every_switch_for_plugins_is_documented(sources: dict[str, str]) -> None:
    from bittern.cli.main import make_cli

    page = sources["plugin-authors/statuses.md"]
    switches = [option for p in make_cli().params for option in p.opts if "plugin" in option]
    assert len(switches) >= 2
    assert not [switch for switch in switches if f"`{switch}" not in page]
