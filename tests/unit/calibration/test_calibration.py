"""Max calibration: brute force, every form of data, no needless pass, nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bittern.errors import BitternError, CalibrationError, DataError, ExportError, RecipeError
from bittern.nn import QuantModule, named_quantizers
from bittern.records import Algorithm, ModelAdapter
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
ToolkitWith = Callable[..., Toolkit]


def ranges(model: nn.Module) -> dict[str, Tensor]:
    return {name: q.amax for name, q in named_quantizers(model) if q.amax is not None}


class Touchy:
    """Data that must not be looked at."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the data was touched")

    def __len__(self) -> int:
        raise AssertionError("the data was touched")


# --- the ranges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_ranges_are_the_maxima_over_all_batches(
    granularity: str, make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    seen: dict[str, list[Tensor]] = {"up": [], "down": []}
    for name, inputs in seen.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    expected = {name: torch.cat(inputs).abs() for name, inputs in seen.items()}

    spec = {"format": "int8", "granularity": granularity}
    rule = {"match": {"class": "Linear"}, "weight": spec, "input": spec}
    toolkit.quantize(model, {"rules": [rule]}, batches)

    found = ranges(model)
    for name in ("up", "down"):
        weight = model.get_submodule(name).weight.detach().abs()
        if granularity == "tensor":
            assert torch.equal(found[f"{name}.input"], expected[name].max())
            assert torch.equal(found[f"{name}.weight"], weight.max())
        else:
            assert torch.equal(found[f"{name}.input"], expected[name].amax(0, keepdim=True))
            assert torch.equal(found[f"{name}.weight"], weight.amax(1, keepdim=True))


def test_statistics_are_those_of_the_unquantized_model(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    one, other = make_mlp(), make_mlp()
    toolkit.quantize(one, "int8", batches)
    first = ranges(one)
    toolkit.calibrate(one, toolkit.plan(one, "int8"), batches)  # quantizers are on by now
    toolkit.quantize(other, "int8", batches)

    for name, value in ranges(other).items():
        assert torch.equal(value, first[name])
        assert torch.equal(value, ranges(one)[name])


def test_calibrating_again_takes_the_new_data(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    import bittern

    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    before = {name: value.clone() for name, value in ranges(model).items()}
    summary = bittern.calibrate(model, [batches[0] * 10], toolkit=toolkit)

    assert summary.batches == 1
    assert torch.equal(ranges(model)["up.input"], batches[0].abs().max() * 10)
    assert torch.equal(ranges(model)["up.weight"], before["up.weight"])


def test_an_output_slot_is_calibrated_on_outputs(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    with torch.no_grad():
        expected = max(float(model.up(b).abs().max()) for b in batches)
    toolkit.quantize(model, {"rules": [{"match": "up", "output": "int8"}]}, batches)

    assert ranges(model)["up.output"].item() == expected


# --- forms of data --------------------------------------------------------------------------------


def forms(batches: list[Tensor]) -> dict[str, Any]:
    labels = torch.zeros(len(batches[0]) * len(batches))
    size = len(batches[0])

    def with_model(model: nn.Module) -> None:
        for batch in batches:
            model(batch)

    return {
        "list": batches,
        "tuple": tuple(batches),
        "generator": (b for b in batches),
        "iterator": iter(batches),
        "pairs": [(b, torch.zeros(5)) for b in batches],
        "lists": [[b, torch.zeros(5)] for b in batches],
        "mappings": [{"x": b} for b in batches],
        "labelled": [{"x": b, "labels": torch.zeros(5)} for b in batches],
        "loader": DataLoader(TensorDataset(torch.cat(batches), labels), batch_size=size),
        "function": with_model,
        "whole": [torch.cat(batches)],
    }


@pytest.mark.parametrize("form", forms([torch.zeros(1, 1)]))
def test_every_form_of_data_gives_the_same_ranges(
    form: str, make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    reference, model = make_mlp(), make_mlp()
    toolkit.quantize(reference, "int8", batches)
    result = toolkit.quantize(model, "int8", forms(batches)[form])

    assert result.report.calibration.batches == (1 if form == "whole" else len(batches))
    expected = ranges(reference)
    assert all(torch.equal(value, expected[name]) for name, value in ranges(model).items())


def test_a_function_without_arguments_runs_the_model_it_knows(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    result = toolkit.quantize(model, "int8", lambda: [model(b) for b in batches])

    assert ranges(model)["up.input"].item() == float(torch.cat(batches).abs().max())
    assert result.report.calibration.batches == 3


def test_a_used_up_iterator_is_an_error_that_says_so(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    data = iter(batches)
    toolkit.quantize(make_mlp(), "int8", data)
    with pytest.raises(DataError, match="holds no batch") as caught:
        toolkit.quantize(make_mlp(), "int8", data)
    assert "used up" in (caught.value.hint or "")


@pytest.mark.parametrize("recipe", ["int8-weight-only", "int4", "fp8-dynamic"])
def test_no_data_is_touched_where_none_is_needed(
    recipe: str, make_mlp: Make, toolkit: Toolkit
) -> None:
    runs: list[int] = []
    model = make_mlp()
    model.register_forward_hook(lambda *_: runs.append(1))
    result = toolkit.quantize(model, recipe, Touchy())

    assert result.report.calibration.batches == 0
    assert not runs
    assert all(q.calibrated for _, q in named_quantizers(model))


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_missing_data_is_an_error_before_any_work(
    recipe: str, make_mlp: Make, toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was reduced")

    monkeypatch.setattr(sys.modules["bittern.calibration.max"], "run_max", refuse)
    with pytest.raises(CalibrationError, match=r"needs calibration data \(up\.input is static\)"):
        toolkit.quantize(make_mlp(), recipe)


def test_token_ids_beyond_the_vocabulary_are_refused(
    make_lm: Make,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: ToolkitWith,
    lm_adapter: ModelAdapter,
) -> None:
    toolkit = toolkit_with(make_plugin("alpha", resolve_model_adapter=lambda: lm_adapter))
    data = [torch.tensor([[1, 2]]), torch.tensor([[1, 32]])]
    with pytest.raises(DataError, match="batch 1 holds the token id 32, the vocabulary ends at 31"):
        toolkit.quantize(make_lm(), "int8", data)


# --- what is left as it was -----------------------------------------------------------------------


class Trap(nn.Module):
    """Raises in the second batch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.calls = 0
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return x


def state(model: nn.Module) -> Any:
    return (
        {n: (type(m), m.training, list(m._modules)) for n, m in model.named_modules()},
        {n: (p.requires_grad, id(p), p.detach().clone()) for n, p in model.named_parameters()},
        hasattr(model, "_bittern_plan"),
        {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()},
    )


def assert_same_state(model: nn.Module, before: Any) -> None:
    modules, parameters, planned, hooks = state(model)
    assert modules == before[0]
    assert planned == before[2]
    assert hooks == before[3]
    assert parameters.keys() == before[1].keys()
    for name, (grad, identity, value) in parameters.items():
        assert (grad, identity) == before[1][name][:2]
        assert torch.equal(value, before[1][name][2])


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), DataError("y")], ids=repr)
@pytest.mark.parametrize("kind", ["list", "function"])
def test_a_failing_quantization_leaves_the_model_as_it_was(
    error: BaseException, kind: str, toolkit: Toolkit
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Trap(error), nn.Dropout(), nn.Linear(4, 4))
    model.train()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    before = state(model)
    batches = [torch.randn(2, 4) for _ in range(3)]

    def run(m: nn.Module) -> None:
        for batch in batches:
            m(batch)

    with pytest.raises(type(error)) as caught:
        toolkit.quantize(model, "int8", batches if kind == "list" else run)

    assert caught.value is error
    assert_same_state(model, before)


def test_a_failing_hook_leaves_the_model_as_it_was(
    make_mlp: Make,
    batches: list[Tensor],
    make_plugin: Callable[..., ModuleType],
    toolkit_with: ToolkitWith,
) -> None:
    def after_convert(model: nn.Module) -> None:
        assert any(isinstance(m, QuantModule) for m in model.modules())
        raise KeyError

    model = make_mlp()
    before = state(model)
    with pytest.raises(BitternError, match="failed in hook after_convert"):
        toolkit_with(make_plugin("alpha", after_convert=after_convert)).quantize(
            model, "int8", batches
        )
    assert_same_state(model, before)


def test_a_quantized_model_that_fails_to_be_quantized_anew_keeps_its_quantizers(
    make_mlp: Make,
    toolkit: Toolkit,
    batches: list[Tensor],
    same_bits: Callable[[Tensor, Tensor], bool],
) -> None:
    from bittern.convert import plan_of

    model = make_mlp()
    first = toolkit.quantize(model, "int8", batches)
    with torch.no_grad():
        expected = model(batches[0])
    with pytest.raises(DataError):
        toolkit.quantize(model, "fp8", [])

    assert plan_of(model) is first.plan
    assert all(q.spec.format.name == "int8" for _, q in named_quantizers(model))
    assert same_bits(model(batches[0]).detach(), expected)


def test_modes_and_gradients_are_as_before_afterwards(
    toolkit: Toolkit,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.train()
    model[3].eval()
    model[3].weight.requires_grad_(False)
    statistics = model[2].running_mean.clone()
    toolkit.quantize(model, "int8", [torch.randn(3, 4)])

    assert [m.training for m in (model, *model[:3])] == [True] * 4
    assert not model[3].training
    assert not model[3].weight.requires_grad
    assert torch.equal(model[2].running_mean, statistics), "the data pass trained the model"
    assert torch.is_grad_enabled()


# --- errors in weights and activations ------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_weight_is_named(bad: float, make_mlp: Make, toolkit: Toolkit) -> None:
    model = make_mlp()
    before = state(model)
    with torch.no_grad():
        model.down.weight[1, 2] = bad
    with pytest.raises(CalibrationError, match=r"down\.weight: the weight holds NaN or Inf"):
        toolkit.quantize(model, "int8-weight-only")
    assert state(model)[0] == before[0]


def test_a_weight_of_a_dtype_that_cannot_be_quantized_is_named_as_such(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(RecipeError, match=r"0\.weight: cannot quantize a .*float8_e4m3fn"):
        toolkit.quantize(model, "int8-weight-only")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_name_the_first_module_that_saw_them(
    bad: float, make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    batches[1][0, 0] = bad
    with pytest.raises(CalibrationError, match=r"up\.input: the activations hold NaN or Inf in b"):
        toolkit.quantize(make_mlp(), "int8", batches)


class Branching(nn.Module):
    """Never takes its second branch."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.taken(x)


def test_a_quantizer_that_saw_nothing_is_reported_and_refused_at_export(
    toolkit: Toolkit, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Branching()
    result = toolkit.quantize(model, "int8", [torch.randn(2, 4)])

    assert result.report.calibration.uncalibrated == ("never.input",)
    assert "never.input saw no data and stays unquantized" in caplog.text
    with pytest.raises(ExportError, match=r"1 quantizers saw no data: never\.input"):
        toolkit.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- algorithms -----------------------------------------------------------------------------------


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """An importable module of algorithms, and what they were given."""
    calls: dict[str, list[Any]] = {"strict": [], "loose": []}

    def strict(model: Any, plan: Any, forward: Any, context: Any, *, alpha: float = 0.5) -> None:
        calls["strict"].append((forward() if forward is not None else None, alpha))

    def loose(model: Any, plan: Any, forward: Any, context: Any, **options: Any) -> None:
        calls["loose"].append((forward is not None, options))

    module = ModuleType("algorithms_of_a_test")
    module.__dict__.update(strict=strict, loose=loose)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture
def extended(
    make_plugin: Callable[..., ModuleType], toolkit_with: ToolkitWith
) -> Callable[..., Toolkit]:
    def make(*needs: str) -> Toolkit:
        items = [
            Algorithm(name=n, run=f"algorithms_of_a_test:{n}", needs=frozenset(needs))
            for n in ("strict", "loose")
        ]
        return toolkit_with(make_plugin("alpha", register_algorithms=lambda: items))

    return make


WEIGHTS = {"match": {"class": "Linear"}, "weight": "int8"}
BOTH = {**WEIGHTS, "input": "int8"}


def test_steps_run_left_to_right_each_with_its_own_pass(
    make_mlp: Make, batches: list[Tensor], extended: Any, algorithms: dict[str, list[Any]]
) -> None:
    recipe = {"rules": [BOTH], "algorithm": [{"strict": {"alpha": 0.25}}, "max", "strict"]}
    result = extended("data").quantize(make_mlp(), recipe, batches)

    assert algorithms["strict"] == [(3, 0.25), (3, 0.5)]
    assert result.report.calibration.batches == 3
    assert result.report.calibration.uncalibrated == ()


@pytest.mark.parametrize(
    ("step", "message", "hint"),
    [
        ({"strict": {"beta": 1}}, "'strict' has no option 'beta'", "it has alpha"),
        ({"max": {"percentile": 99}}, "'max' has no option 'percentile'", "it has share"),
        ({"max": {"share": "no"}}, "'share' of the algorithm 'max' is 'no'", "write true or false"),
        ({"smooth": {"alpha": "half"}}, "'alpha' of .* 'smooth' is 'half'", "write a number"),
    ],
)
def test_a_wrong_option_is_an_error_before_the_first_pass(
    *,
    step: Any,
    message: str,
    hint: str,
    make_mlp: Make,
    extended: Any,
    algorithms: dict[str, list[Any]],
) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        extended().quantize(make_mlp(), {"rules": [BOTH], "algorithm": ["max", step]}, Touchy())
    assert str(caught.value.hint).startswith(hint)


@pytest.mark.usefixtures("algorithms")
def test_an_algorithm_may_take_any_option(
    make_mlp: Make, extended: Any, algorithms: dict[str, list[Any]]
) -> None:
    recipe = {"rules": [WEIGHTS], "algorithm": ["max", {"loose": {"anything": 1}}]}
    extended().quantize(make_mlp(), recipe)

    assert algorithms["loose"] == [(False, {"anything": 1})]


@pytest.mark.usefixtures("algorithms")
def test_what_needs_more_than_data_needs_data_even_for_weights_alone(
    make_mlp: Make, batches: list[Tensor], extended: Any, algorithms: dict[str, list[Any]]
) -> None:
    toolkit = extended("hessian")
    recipe = {"rules": [WEIGHTS], "algorithm": ["max", "loose"]}
    with pytest.raises(CalibrationError, match=r"needs calibration data \(for max, loose\)"):
        toolkit.quantize(make_mlp(), recipe)
    toolkit.quantize(make_mlp(), recipe, batches)

    assert algorithms["loose"] == [(True, {})]


def test_an_algorithm_that_does_not_resolve_names_its_plugin(make_mlp: Make, extended: Any) -> None:
    model = make_mlp()
    with pytest.raises(BitternError, match=r"plugin bittern-alpha 1\.0: the target 'algorithms_of"):
        extended().quantize(model, {"rules": [WEIGHTS], "algorithm": "strict"})
    assert type(model.up) is nn.Linear


def test_without_an_algorithm_nothing_is_calibrated(make_mlp: Make, toolkit: Toolkit) -> None:
    result = toolkit.quantize(make_mlp(), {"rules": [WEIGHTS], "algorithm": []})
    assert result.report.calibration.uncalibrated == ("up.weight", "down.weight")


def test_a_plugin_wraps_the_data_pass(
    make_mlp: Make, batches: list[Tensor], toolkit_with: ToolkitWith
) -> None:
    from bittern.hooks import hookimpl

    seen: list[Any] = []
    module = ModuleType("alpha")

    def run_calibration(model: nn.Module, plan: Any) -> Any:
        seen.append((plan.recipe, all(not q.enabled for _, q in named_quantizers(model))))
        count = yield
        seen.append(count)
        return count

    module.run_calibration = hookimpl(wrapper=True)(run_calibration)  # type: ignore[attr-defined]
    toolkit_with(module).quantize(make_mlp(), "int8", batches)

    assert seen == [("int8", True), 3]
