"""Plugins for one test: in memory, by name, and installed; and what was called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from typing import Any

import pytest
from torch import nn

from bittern.errors import PluginError
from bittern.hooks import hookimpl
from bittern.hooks.discovery import PluginOptions, PluginRecord, Status, discover
from bittern.records import NumberFormat
from bittern.testing import HookRecorder, PluginHarness, hooks_module
from bittern.toolkit import Toolkit


def number_format(name: str) -> NumberFormat:
    codec = "bittern.numerics.integers:IntCodec"
    return NumberFormat(name=name, bits=8, codec=codec, params={"bits": 8})


class Object:
    """A plugin that is an object, with state of its own."""

    def __init__(self) -> None:
        self.converted: list[Any] = []

    @hookimpl
    def after_convert(self, model: Any) -> None:
        self.converted.append(model)


HEALTHY = """
from bittern.hooks import hookimpl
from bittern.records import NumberFormat

@hookimpl
def register_formats():
    return [NumberFormat(name="teal8", bits=8, codec="bittern.numerics.integers:IntCodec",
                         params={"bits": 8})]
"""


def test_only_what_was_given_is_there() -> None:
    module = hooks_module("teal", register_formats=lambda: [number_format("teal8")])
    with PluginHarness(module) as harness:
        assert [record.label for record in harness.manager.records] == ["bittern-teal 1.0"]
        assert harness.record("teal").status is Status.LOADED
        core = Toolkit(block=["*"]).registry.formats
        assert list(harness.toolkit.registry.formats) == sorted([*core, "teal8"])
        assert harness.toolkit.registry.formats.plugin("teal8") == "bittern-teal 1.0"
    with PluginHarness(builtin=False) as harness:
        assert harness.manager.records == ()
        assert list(harness.toolkit.registry.formats) == []


def test_objects_module_names_and_records_are_plugins_too() -> None:
    thing = Object()
    record = PluginRecord(
        name="core2", distribution="x", version="2", entry="bittern_kernels.hooks"
    )
    with PluginHarness(thing, "bittern_kernels.hooks", record) as harness:
        model = nn.Sequential(nn.Linear(4, 4))
        harness.toolkit.quantize(model, "int8-weight-only")

        assert thing.converted == [model]
        labels = [record.label for record in harness.manager.records]
        assert labels == ["bittern-Object 1.0", "bittern_kernels 1.0", "x 2"]


def test_a_plugin_added_later_counts() -> None:
    with PluginHarness() as harness:
        assert harness.manager.records == ()
        harness.add(hooks_module("teal"), name="other", version="3")
        assert harness.record("other").label == "bittern-other 3"
        with pytest.raises(KeyError, match="bittern-other 3"):
            harness.record("nobody")


def test_the_environment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITTERN_DISABLE_PLUGINS", "*")
    with PluginHarness(hooks_module("teal")) as harness:
        assert harness.record("teal").status is Status.LOADED


def test_distributions_end_with_the_right_status(caplog: pytest.LogCaptureFixture) -> None:
    before = (list(sys.path), set(sys.modules), [r.label for r in discover()])
    with caplog.at_level(logging.CRITICAL, "bittern.plugins"), PluginHarness() as harness:
        harness.install("teal", HEALTHY, version="4.5")
        harness.install("broken", "raise RuntimeError('at import')")
        harness.install("second", HEALTHY, entry="teal")
        harness.install("too-new", HEALTHY, requires=["bittern>=99"])
        harness.install("absent", HEALTHY, requires=['no-such-thing>=1; extra == "target"'])
        found = {record.distribution: record.status for record in harness.manager.records}

        assert found == {
            "teal": Status.DUPLICATE,
            "second": Status.LOADED,
            "broken": Status.FAILED,
            "too-new": Status.CORE_INCOMPATIBLE,
            "absent": Status.TARGET_MISSING,
        }
        assert "teal8" in harness.toolkit.registry.formats
        assert harness.record("broken").reason == "RuntimeError: at import"
    assert list(sys.path) == before[0]
    assert [r.label for r in discover()] == before[2]
    assert not [name for name in set(sys.modules) - before[1] if "bittern_installed" in name]


def test_options_are_those_of_a_manager() -> None:
    options = PluginOptions(block=("teal",))
    with PluginHarness(hooks_module("teal"), options=options) as harness:
        assert harness.record("teal").status is Status.BLOCKED
    with (
        pytest.raises(PluginError, match="no-such"),
        PluginHarness(options=PluginOptions(required=("no-such",))) as harness,
    ):
        harness.manager.require(["no-such"])


# --- recorder -------------------------------------------------------------------------------------


def test_calls_are_recorded_with_arguments_results_and_plugin() -> None:
    module = hooks_module(
        "teal", register_formats=lambda: iter([number_format("teal8")]), after_convert=_nothing
    )
    with PluginHarness(module) as harness, HookRecorder(harness.toolkit) as calls:
        model = nn.Sequential(nn.Linear(4, 4))
        harness.toolkit.quantize(model, "int8-weight-only")

        formats = calls.calls("register_formats")
        assert [call.plugin for call in formats] == ["bittern", "bittern-teal 1.0"]
        call = calls.assert_called("after_convert", plugin="bittern-teal", model=model)
        assert call.arguments.keys() == {"model", "plan"}
        assert call.result is None
        with pytest.raises(AssertionError, match=r"(?s)not called so.*register_formats"):
            calls.assert_called("after_convert", plugin="somebody")
        with pytest.raises(AssertionError, match="was called: after_convert"):
            calls.assert_not_called("after_convert")
        calls.assert_not_called("after_export")
        calls.assert_not_called("after_convert", plugin="somebody")
        assert call in (calls.pop("after_convert"), calls.pop("after_convert"))  # core's, and this
        calls.assert_not_called("after_convert")
        calls.clear()
        assert calls.calls() == []


def _nothing(model: Any, plan: Any) -> None:
    """A hook that only takes note."""


def test_wrappers_and_errors_are_recorded() -> None:
    def run_calibration(model: Any) -> Generator[None, int, int]:
        count = yield
        return count + 1

    def after_convert(model: Any) -> None:
        raise RuntimeError("no luck")

    module = hooks_module("teal", run_calibration=hookimpl(wrapper=True)(run_calibration))
    with PluginHarness(module) as harness, HookRecorder(harness.manager) as calls:
        forward = lambda: 3  # noqa: E731
        arguments = {"model": None, "plan": None, "forward": forward}
        assert harness.manager.first("run_calibration", **arguments) == 4
        found = [(call.plugin, call.result) for call in calls.calls("run_calibration")]
        assert found == [("bittern", 3), ("bittern-teal 1.0", 4)]

    module = hooks_module("teal", after_convert=after_convert)
    with PluginHarness(module) as harness, HookRecorder(harness.manager) as calls:
        with pytest.raises(PluginError, match="no luck"):
            harness.manager.notify("after_convert", model=nn.Identity(), plan=None)
        (call,) = [c for c in calls.calls("after_convert") if c.plugin != "bittern"]
        assert isinstance(call.error, PluginError)


def test_recording_ends_with_the_block() -> None:
    with PluginHarness(hooks_module("teal", after_convert=_nothing)) as harness:
        with HookRecorder(harness.manager) as calls:
            harness.manager.notify("after_convert", model=nn.Identity(), plan=2)
        harness.manager.notify("after_convert", model=nn.Identity(), plan=2)

        assert [call.plugin for call in calls.calls()] == ["bittern-teal 1.0", "bittern"]


def test_a_weight_access_hook_may_ask_for_both_arguments() -> None:
    """Regression: ``write`` was keyword-only in the spec, so pluggy refused or starved it."""
    asked = []

    def resolve_weight_access(module: Any, write: Any) -> None:
        asked.append((module, write))

    with PluginHarness(
        hooks_module("teal", resolve_weight_access=resolve_weight_access)
    ) as harness:
        assert harness.record("teal").status is Status.LOADED
        layer = nn.Linear(2, 2)
        with harness.toolkit.access(layer, write=True):
            pass
        assert asked == [(layer, True)]
