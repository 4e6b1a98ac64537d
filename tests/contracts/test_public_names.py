"""Public names resolve and are documented; so is every hook, argument by argument."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest

import bittern
from bittern.hooks import specs
from bittern.hooks.specs import RETURNS

HOOKS = {
    name: function
    for name, function in vars(specs).items()
    if inspect.isfunction(function) and hasattr(function, "bittern_spec")
}


# --- the package ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bittern.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(bittern, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", value)
        return
    text = inspect.getdoc(value)
    assert text
    assert text[0].isupper() or text.startswith("``"), f"{name}: {text.splitlines()[0]}"


def test_the_list_of_public_names_is_sorted_and_complete() -> None:
    assert sorted(bittern.__all__) == bittern.__all__
    homes = {name for names in bittern._HOMES.values() for name in names}
    assert homes == set(bittern.__all__) - {"__version__"}
    assert set(bittern.__all__) <= set(dir(bittern))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        bittern.quantise  # noqa: B018


def test_importing_every_package_hides_no_public_function() -> None:
    """`bittern.plan` stays a function whatever subpackage is imported."""
    for module in pkgutil.iter_modules(bittern.__path__):
        assert module.name not in bittern.__all__, f"bittern.{module.name} hides a function"


PACKAGES = [
    module.name
    for module in pkgutil.walk_packages(bittern.__path__, "bittern.")
    if not re.search(r"\.(cli|testing)(\.|$)", module.name)
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_in_all_exists_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public}"


STEPS = ["auto_quantize", "calibrate", "evaluate", "export", "plan", "quantize", "verify"]


@pytest.mark.parametrize("name", STEPS)
def test_every_public_function_documents_every_argument(name: str) -> None:
    function = getattr(bittern, name)
    assert set(sections(function)["Args"]) == set(inspect.signature(function).parameters)


# --- hooks ----------------------------------------------------------------------------------------


def sections(function: Any) -> dict[str, dict[str, str]]:
    """Return the sections of a Google docstring: ``{"Args": {name: text}}``."""
    found: dict[str, dict[str, str]] = {}
    current = ""
    for line in (inspect.getdoc(function) or "").splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            current = line[:-1]
            found[current] = {}
        elif current and (match := re.match(r"    (\w+): (.+)", line)):
            found[current][match[1]] = match[2]
        elif current and re.match(r"    \S", line):
            found[current][""] = line.strip()
    return found


def test_hooks_that_return_records_are_hooks() -> None:
    assert len(HOOKS) > 15
    assert set(RETURNS) == {n for n in HOOKS if n.startswith(("register_", "discover_"))} - {
        "register_commands"
    }


@pytest.mark.parametrize("name", HOOKS)
def test_a_hooks_docstring_begins_with_a_sentence(name: str) -> None:
    first = (HOOKS[name].__doc__ or "").splitlines()[0]
    assert first
    assert first[0].isupper()
    assert first.endswith(".")


@pytest.mark.parametrize("name", HOOKS)
def test_a_hooks_docstring_names_exactly_its_arguments(name: str) -> None:
    arguments = list(inspect.signature(HOOKS[name]).parameters)
    documented = sections(HOOKS[name]).get("Args", {})

    assert list(documented) == arguments
    assert all(documented.values())


@pytest.mark.parametrize("name", HOOKS)
def test_a_hooks_docstring_says_what_it_returns_if_it_does(name: str) -> None:
    returns = HOOKS[name].__annotations__["return"]
    assert ("Returns" in sections(HOOKS[name])) is (returns != "None")


@pytest.mark.parametrize("name", HOOKS)
def test_a_hooks_kind_follows_from_its_name(name: str) -> None:
    first = HOOKS[name].bittern_spec["firstresult"]
    assert first is name.startswith(("resolve_", "run_"))
    assert name.split("_", maxsplit=1)[0] in {
        "register",
        "resolve",
        "discover",
        "before",
        "after",
        "run",
    }


@pytest.mark.parametrize("name", HOOKS)
def test_an_argument_is_seen_by_plugins(name: str) -> None:
    """pluggy hands implementations positional arguments only: it drops keyword-only ones."""
    from bittern.builtin import hooks as builtin
    from bittern.hooks.discovery import PluginOptions
    from bittern.hooks.manager import PluginManager

    manager = PluginManager(PluginOptions(), builtin=builtin, records=())
    caller = getattr(manager._pm.hook, name)
    assert list(caller.spec.argnames) == list(inspect.signature(HOOKS[name]).parameters)
