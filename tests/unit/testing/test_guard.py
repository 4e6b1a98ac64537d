"""No standard test can be dropped unnoticed, and the guard itself cannot be replaced."""

from __future__ import annotations

from typing import Any

import pytest

from bittern.testing import Conformance, TraceConformance

HEAD = """
import plover, pytest, torch
from bittern.testing import AlgorithmConformance, ModuleConformance, TraceConformance
from bittern.testing import LeafCase, OpCase

class TestTrace(TraceConformance):
    plugin = "plover"
    cases = CASES
"""
CASES = """(
        LeafCase("leaf", make=lambda: plover.Scaled(6, 4), inputs=lambda g: (torch.ones(3, 6),)),
        OpCase("op", call=torch.nn.functional.linear,
               inputs=lambda g: (torch.randn(3, 6, generator=g), torch.randn(4, 6, generator=g))),
    )"""
TRACE = HEAD.replace("CASES", CASES)
EMPTY = HEAD.replace("CASES", "()")
GUARD = "test_no_standard_test_was_dropped"


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


@pytest.mark.parametrize(
    "body",
    [
        "test_op_names_resolve = None",
        "def test_op_names_resolve(self): pass",
        "@pytest.mark.xfail\ndef test_op_names_resolve(self): pass",
        "@pytest.mark.xfail(reason='')\ndef test_op_names_resolve(self): pass",
        "@pytest.mark.filterwarnings('ignore')\ndef test_op_names_resolve(self): pass",
    ],
    ids=["deleted", "replaced", "xfail", "empty-reason", "other-mark"],
)
def test_a_dropped_test_is_named(body: str, run_kit: Any) -> None:
    outcomes = run_kit(tests=TRACE + indented(body))

    assert outcomes.failed() == {GUARD}
    message = outcomes.messages[f"TestTrace::{GUARD}"]
    assert "test_op_names_resolve" in message
    assert "xfail(reason=" in message


def test_a_mixin_that_replaces_a_test_is_noticed(run_kit: Any) -> None:
    mixin = "class Mixin:\n    def test_op_names_resolve(self): pass\n"
    source = TRACE.replace("class TestTrace(", mixin + "class TestTrace(Mixin, ")

    assert run_kit(tests=source).failed() == {GUARD}


@pytest.mark.parametrize(
    "mark",
    ["xfail(reason='not yet')", "skip(reason='not here')", "skip('not here')"],
)
def test_a_declared_exception_is_fine(mark: str, run_kit: Any) -> None:
    body = f"@pytest.mark.{mark}\ndef test_op_names_resolve(self): raise AssertionError"
    outcomes = run_kit(tests=TRACE + indented(body))

    assert outcomes.failed() == set()
    assert outcomes.by_test["TestTrace::test_op_names_resolve"] in ("xfailed", "skipped")
    assert outcomes.by_test[f"TestTrace::{GUARD}"] == "passed"


def test_a_class_without_cases_is_noticed(run_kit: Any) -> None:
    source = EMPTY.replace("TestTrace(TraceConformance)", "TestModules(ModuleConformance)")
    outcomes = run_kit(tests=source)

    assert outcomes.failed() == {GUARD}
    assert "no case" in outcomes.messages[f"TestModules::{GUARD}"]


def test_two_cases_of_one_name_are_refused(run_kit: Any) -> None:
    source = EMPTY.replace("TestTrace(TraceConformance)", "TestMax(AlgorithmConformance)")
    source += indented(
        "def cases(self):\n"
        "    from bittern.testing import AlgorithmCase\n"
        "    return [AlgorithmCase('max'), AlgorithmCase('max')]"
    )

    assert "several cases called max" in run_kit(tests=source).messages["collection"]


@pytest.mark.parametrize("name", [GUARD, "pytest_generate_tests"])
def test_the_guard_cannot_be_replaced(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        type("TestTrace", (TraceConformance,), {name: lambda self: None})


def test_the_guard_cannot_be_replaced_by_a_mixin_either() -> None:
    mixin = type("Mixin", (), {GUARD: lambda self: None})
    with pytest.raises(TypeError, match="standard tests whole"):
        type("TestTrace", (mixin, TraceConformance), {})


def test_a_class_that_names_no_plugin_says_so() -> None:
    with pytest.raises(AssertionError, match='plugin = "name"'):
        type("TestNothing", (Conformance,), {}).subject()


def test_a_plugin_that_is_not_installed_is_named() -> None:
    cls: Any = type("TestNothing", (Conformance,), {"plugin": "no-such-plugin"})
    with pytest.raises(AssertionError, match="no-such-plugin"):
        cls.subject()
