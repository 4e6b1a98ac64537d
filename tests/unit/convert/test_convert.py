"""Applying a plan: the right model, all or nothing, again and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from bittern.convert import convert, plan_of, remember, revert
from bittern.errors import PlanError, PluginError
from bittern.nn import QuantModule, named_quant_modules, named_quantizers
from bittern.records import ModuleRule
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]


def quantized(model: nn.Module) -> list[str]:
    return [name for name, _ in named_quant_modules(model)]


def test_a_plan_is_applied_and_kept(make_mlp: Make, toolkit: Toolkit) -> None:
    model = make_mlp()
    plan = toolkit.plan(model, "int8")
    convert(model, plan, toolkit.registry)

    assert quantized(model) == ["up", "down"]
    assert plan_of(model) is plan
    quantizers = dict(named_quantizers(model))
    assert {e.path: e.spec for e in plan.entries} == {n: q.spec for n, q in quantizers.items()}
    assert {n: q.name for n, q in quantizers.items()} == {n: n for n in quantizers}
    assert {n: q.tensor for n, q in quantizers.items() if q.tensor} == {
        "up.weight": "weight",
        "down.weight": "weight",
    }
    assert not any(q.calibrated for q in quantizers.values())


def test_a_plan_can_be_made_first_and_applied_later(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    plan = toolkit.plan(model, "int8")
    result = toolkit.quantize(model, plan, batches)

    assert result.plan is plan
    assert result.model is model


def test_an_unquantized_model_has_no_plan(make_mlp: Make) -> None:
    with pytest.raises(PlanError, match="not quantized"):
        plan_of(make_mlp())


def test_converting_again_replaces_the_first_plan(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    toolkit.quantize(model, {"rules": [{"match": "down", "weight": "fp8"}]})

    assert quantized(model) == ["down"]
    assert type(model.up) is nn.Linear
    assert [n for n, _ in named_quantizers(model)] == ["down.weight"]


def test_a_plan_of_another_model_is_refused_and_changes_nothing(
    make_mlp: Make, make_lm: Make, toolkit: Toolkit
) -> None:
    model = make_lm()
    with pytest.raises(PlanError, match="names 'up', which this model does not have"):
        convert(model, toolkit.plan(make_mlp(), "int8"), toolkit.registry)
    assert not quantized(model)


def test_a_plan_of_a_model_with_other_classes_is_refused(toolkit: Toolkit) -> None:
    plan = toolkit.plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "int8")
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    with pytest.raises(
        PlanError, match=r"1: the plan takes it for a .*:Linear, and it is a Conv1d"
    ):
        convert(model, plan, toolkit.registry)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("no_such_module:X", PluginError, "does not resolve"),
        ("torch.nn:Linear", PlanError, "is no QuantModule"),
        ("torch.nn.functional:linear", PlanError, "is no QuantModule"),
    ],
)
def test_a_wrong_class_of_a_plugin_is_found_before_any_module_changes(
    target: str, error: type[Exception], message: str, make_mlp: Make, toolkit: Toolkit
) -> None:
    model = make_mlp()
    plan = toolkit.plan(model, "int8")
    broken = replace(plan, classes={**plan.classes, "down": target})
    with pytest.raises(error, match=message):
        convert(model, broken, toolkit.registry)
    assert type(model.up) is nn.Linear
    with pytest.raises(PlanError):
        plan_of(model)


def test_what_a_module_has_where_a_quantizer_belongs_is_not_replaced(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    own = model.down.input_quantizer = nn.Identity()
    with pytest.raises(PlanError, match="down: it has something of its own under the name input_q"):
        toolkit.quantize(model, "int8", batches)
    assert model.down.input_quantizer is own
    assert type(model.up) is nn.Linear

    del model.down.input_quantizer
    for _ in range(2):  # the quantizers of an earlier plan are in nobody's way
        toolkit.quantize(model, "int8", batches)
    assert isinstance(model.down, QuantModule)


def test_a_refused_plan_leaves_an_earlier_conversion_alone(
    make_mlp: Make, make_lm: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    plan = toolkit.quantize(model, "int8", batches).plan
    with pytest.raises(PlanError):
        convert(model, toolkit.plan(make_lm(), "int8"), toolkit.registry)
    assert plan_of(model) is plan


def test_what_is_converted_can_be_undone_to_what_was_before(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    undo_all = remember(model)
    plan = toolkit.quantize(model, "int8", batches).plan
    before = dict(named_quantizers(model))
    undo_second = remember(model)
    toolkit.quantize(model, {"rules": [{"match": "down", "weight": "fp8"}]})

    undo_second()
    assert plan_of(model) is plan
    after = dict(named_quantizers(model))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)

    undo_all()
    assert not quantized(model)
    assert type(model.up) is nn.Linear


def test_reverting_twice_is_reverting_once(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    revert(model)
    revert(model)
    assert type(model.up) is nn.Linear


class QuantScale(QuantModule):
    """A plugin's quantized module."""

    gain: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.quantize("gain", self.gain)


class Scale(nn.Module):
    """A module of somebody else's framework."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_plugins_module_class_with_a_slot_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: Callable[..., Toolkit],
    same_bits: Callable[[Tensor, Tensor], bool],
) -> None:
    from bittern.numerics import fake_quantize
    from bittern.records import Slot
    from bittern.registry import target_of

    module = ModuleType("modules_of_a_test")
    module.QuantScale = QuantScale  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rule = ModuleRule(
        target=target_of(Scale),
        quantized="modules_of_a_test:QuantScale",
        slots=(Slot("gain", kind="weight", tensor="gain"),),
    )
    toolkit = toolkit_with(make_plugin("alpha", register_modules=lambda: [rule]))
    model = nn.Sequential(Scale())
    recipe = {"rules": [{"match": "*", "slots": {"gain": {"format": "int8", "size": 4}}}]}
    result = toolkit.quantize(model, recipe)

    (entry,) = result.plan.entries
    assert (entry.plugin, entry.parameter) == ("bittern-alpha 1.0", "0.gain")
    x = torch.randn(3, 8)
    expected = x * fake_quantize(model[0].gain.detach(), entry.spec)
    assert same_bits(model(x).detach(), expected)
