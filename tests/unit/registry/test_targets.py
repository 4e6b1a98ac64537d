"""String targets: what they name, whose fault it is when that fails, and which are dead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from bittern.errors import DataError, ExportError, PluginError
from bittern.records import Algorithm, Exporter, ModuleRule, NumberFormat, Slot
from bittern.registry import resolve
from bittern.registry.targets import bound, why_dead
from bittern.testing import fake_framework
from bittern.toolkit import Toolkit

MakePlugin = Callable[..., ModuleType]
ToolkitWith = Callable[..., Toolkit]

SOURCE = """
def lost(*args, **options):
    raise KeyError("lost")

def user(*args):
    from bittern.errors import ExportError
    raise ExportError("the engine has no fp8")

def full(*args):
    raise OSError(28, "No space left on device")

def nothing(*args):
    return None

def through(model, plan, forward, context, *, times=1):
    for _ in range(times):
        forward()

class Wing:
    class Feather:
        pass
"""


@pytest.fixture
def framework() -> Iterator[None]:
    files = {"__init__.py": SOURCE, "torn.py": "raise RuntimeError('no such driver')"}
    with fake_framework("wing_targets", files):
        yield


# --- resolving ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("framework")
def test_a_module_that_raises_at_import_is_the_plugins_error() -> None:
    with pytest.raises(PluginError) as caught:
        resolve("wing_targets.torn:Linear", plugin="alpha 1.0")
    expected = (
        "plugin alpha 1.0: wing_targets.torn cannot be imported: RuntimeError: no such driver"
    )
    assert caught.value.what == expected
    assert "bittern doctor" in (caught.value.hint or "")


# --- calling --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("framework")
def test_what_a_named_function_does_wrong_has_the_plugins_name() -> None:
    with pytest.raises(PluginError) as caught:
        bound("wing_targets:lost", plugin="alpha 1.0")()
    expected = "plugin alpha 1.0 failed in wing_targets:lost: KeyError: 'lost'"
    assert caught.value.what == expected
    assert isinstance(caught.value.__cause__, KeyError)
    assert "BITTERN_DISABLE_PLUGINS=alpha" in (caught.value.hint or "")

    with pytest.raises(ExportError) as meant:
        bound("wing_targets:user", plugin="alpha 1.0")()
    assert meant.value.plugin == "alpha 1.0"


@pytest.mark.usefixtures("framework")
def test_the_disk_and_the_users_own_functions_are_not_the_plugins_fault() -> None:
    with pytest.raises(OSError, match="No space left"):
        bound("wing_targets:full", plugin="alpha 1.0")()

    def forward() -> None:
        raise ValueError("bad batch")

    def told() -> None:
        raise DataError("no rows")

    run = bound("wing_targets:through", plugin="alpha 1.0")
    with pytest.raises(ValueError, match="bad batch"):
        run(None, None, forward, None)
    with pytest.raises(DataError) as caught:
        run(None, None, told, None)
    assert caught.value.plugin is None


@pytest.mark.usefixtures("framework")
def test_a_wrong_result_names_the_function_and_what_it_must_return() -> None:
    with pytest.raises(PluginError) as caught:
        bound("wing_targets:nothing", plugin="alpha 1.0", returns=ModuleRule)()
    what = "plugin alpha 1.0: wing_targets:nothing returned a NoneType instead of a ModuleRule"
    assert caught.value.what == what
    assert caught.value.hint == "return a bittern.records.modules:ModuleRule"


@pytest.mark.usefixtures("framework")
def test_a_named_function_keeps_its_signature_and_cores_own_come_as_they_are() -> None:
    run = bound("wing_targets:through", plugin="alpha 1.0")
    assert list(inspect.signature(run).parameters)[-1] == "times"
    assert bound("bittern.registry.targets:resolve", plugin="bittern") is resolve


# --- the steps that call them ---------------------------------------------------------------------


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


LOST = "plugin bittern-alpha 1.0 failed in wing_targets:lost: KeyError: 'lost'"


@pytest.mark.usefixtures("framework")
@pytest.mark.parametrize("field", ["write", "verify", "check", "accepts"])
def test_a_failing_exporter_is_named(
    field: str, make_plugin: MakePlugin, toolkit_with: ToolkitWith, tmp_path: Any
) -> None:
    fields = {"write": "bittern.exporting.plain:write_plain", field: "wing_targets:lost"}
    exporter = Exporter(name="wing", **fields)
    toolkit = toolkit_with(make_plugin("alpha", register_exporters=lambda: [exporter]))
    quantized = toolkit.quantize(model(), "int8-weight-only").model
    with pytest.raises(PluginError) as caught:
        toolkit.export(quantized, tmp_path / "out", format="wing")
    assert caught.value.what == LOST
    assert (tmp_path / "out").exists() == (field == "verify")


@pytest.mark.usefixtures("framework")
@pytest.mark.parametrize("field", ["write", "verify"])
def test_an_exporter_that_returns_nothing_is_named(
    field: str, make_plugin: MakePlugin, toolkit_with: ToolkitWith, tmp_path: Any
) -> None:
    fields = {"write": "bittern.exporting.plain:write_plain", field: "wing_targets:nothing"}
    exporter = Exporter(name="wing", **fields)
    toolkit = toolkit_with(make_plugin("alpha", register_exporters=lambda: [exporter]))
    quantized = toolkit.quantize(model(), "int8-weight-only").model
    with pytest.raises(PluginError, match="wing_targets:nothing returned a NoneType"):
        toolkit.export(quantized, tmp_path / "out", format="wing")


@pytest.mark.usefixtures("framework")
def test_a_failing_algorithm_is_named_and_the_model_is_what_it_was(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    algorithms = [
        Algorithm(name="lost", run="wing_targets:lost"),
        Algorithm(name="through", run="wing_targets:through", needs=frozenset({"data"})),
    ]
    toolkit = toolkit_with(make_plugin("alpha", register_algorithms=lambda: algorithms))
    rule = {"match": "0", "weight": "int8", "input": "int8"}
    net = model()
    with pytest.raises(PluginError) as caught:
        toolkit.quantize(net, {"rules": [rule], "algorithm": "lost"})
    assert caught.value.what == LOST
    assert type(net[0]) is nn.Linear

    def data() -> Iterator[Any]:
        yield torch.ones(1, 4)
        raise ZeroDivisionError("in the user's data")

    with pytest.raises(ZeroDivisionError):
        toolkit.quantize(net, {"rules": [rule], "algorithm": "through"}, data())


@pytest.mark.usefixtures("framework")
@pytest.mark.parametrize(
    ("codec", "what"),
    [
        ("wing_nowhere:Codec", "plugin bittern-alpha 1.0: the target 'wing_nowhere:Codec' does"),
        ("wing_targets:lost", LOST),
    ],
)
def test_a_format_whose_codec_cannot_be_made_names_its_plugin_when_it_is_planned(
    codec: str, what: str, make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    formats = [NumberFormat(name="wing", bits=8, codec=codec)]
    toolkit = toolkit_with(make_plugin("alpha", register_formats=lambda: formats))
    with pytest.raises(PluginError) as caught:
        toolkit.plan(model(), {"rules": [{"match": "0", "weight": "wing"}]})
    assert caught.value.what.startswith(what)


def test_a_predicate_that_raises_is_named(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    rules = [
        ModuleRule(
            target="torch.nn.modules.linear:Linear",
            quantized="bittern.nn.linear:QuantLinear",
            slots=(Slot("input"),),
            predicate=lambda module: module.heads > 1,
        )
    ]
    toolkit = toolkit_with(make_plugin("alpha", register_modules=lambda: rules))
    with pytest.raises(PluginError) as caught:
        toolkit.plan(model(), "int8")
    assert caught.value.what.startswith(
        "plugin bittern-alpha 1.0: the predicate of its rule for torch.nn.modules.linear:Linear "
        "failed on a Linear: AttributeError: "
    )


# --- dead targets ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("framework")
@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("torch.nn.modules.linear:Linear", ""),
        ("torch.nn:Linear", "the class is defined as 'torch.nn.modules.linear:Linear'"),
        ("torch.nn.modules.linear:Line", "torch.nn.modules.linear has no Line"),
        ("torch.nn.modules.linear:Linear.Inner", "torch.nn.modules.linear has no Linear.Inner"),
        ("torch.nn.functional:linear", "linear is no class"),
        ("wing_targets:Wing.Feather", ""),
        ("wing_not_installed:Linear", ""),
        ("*", ""),
    ],
)
def test_a_target_that_no_class_can_have_is_known_without_an_import(target: str, why: str) -> None:
    import wing_targets  # noqa: F401

    assert why_dead(target) == why
