"""What the class swap keeps: objects, names, keys, hooks, bits; and that it can be undone."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from bittern.nn import (
    QuantModule,
    named_quant_modules,
    named_quantizers,
    original_class,
    quantizers_off,
)
from bittern.numerics import fake_quantize
from bittern.records import KernelRule
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
SameBits = Callable[[Tensor, Tensor], bool]

EVERYTHING = {
    "rules": [
        {
            "match": {"class": ["Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"]},
            "weight": "int4",
            "input": "int8",
            "output": "int8",
        }
    ]
}


class Zoo(nn.Module):
    """Every class that core quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12, padding_idx=0)
        self.one = nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular")
        self.two = nn.Conv2d(1, 4, 3, stride=2, groups=1)
        self.three = nn.Conv3d(1, 2, 2, dilation=1, bias=False)
        self.out = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)  # (b, 6, 12)
        y = self.one(x)  # (b, 4, 12)
        z = self.two(y[:, None])  # (b, 4, 1, 5)
        w = self.three(torch.stack([y, y], 1)[:, None])  # (b, 2, 1, 3, 11)
        return self.out(y) + z.mean() + w.mean()


@pytest.fixture
def zoo() -> Zoo:
    torch.manual_seed(0)
    return Zoo().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))


def test_every_shipped_class_is_quantized_and_changes_the_output(
    zoo: Zoo, ids: Tensor, toolkit: Toolkit
) -> None:
    with torch.no_grad():
        before = zoo(ids)
        toolkit.quantize(zoo, EVERYTHING, [ids])
        after = zoo(ids)

    assert [name for name, _ in named_quant_modules(zoo)] == ["table", "one", "two", "three", "out"]
    assert not torch.equal(before, after)
    assert torch.allclose(before, after, atol=0.5)


@pytest.mark.parametrize(
    ("name", "slot"),
    [("table", "weight"), ("table", "output")]
    + [(n, s) for n in ("one", "two", "three", "out") for s in ("weight", "input", "output")],
)
def test_every_slot_of_every_class_is_on_the_forward_path(
    name: str, slot: str, zoo: Zoo, ids: Tensor, toolkit: Toolkit
) -> None:
    spec = {"format": "int4", "granularity": "tensor"}
    with torch.no_grad():
        before = zoo(ids)
        toolkit.quantize(zoo, {"rules": [{"match": name, slot: spec}]}, [ids])

        assert not torch.equal(zoo(ids), before)


def test_parameters_names_and_keys_stay_the_very_same(zoo: Zoo, toolkit: Toolkit, ids: Tensor):
    parameters = dict(zoo.named_parameters())
    modules = dict(zoo.named_modules())
    keys = list(zoo.state_dict())

    toolkit.quantize(zoo, EVERYTHING, [ids])

    after = dict(zoo.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert list(zoo.state_dict()) == keys
    assert all(zoo.get_submodule(path) is module for path, module in modules.items())
    assert isinstance(zoo.out, nn.Linear)
    assert isinstance(zoo.out, QuantModule)


def test_the_original_checkpoint_loads_strictly(zoo: Zoo, toolkit: Toolkit, ids: Tensor) -> None:
    checkpoint = copy.deepcopy(zoo.state_dict())
    toolkit.quantize(zoo, EVERYTHING, [ids])
    with torch.no_grad():
        for parameter in zoo.parameters():
            parameter.zero_()

    result = zoo.load_state_dict(checkpoint, strict=True)

    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(value, checkpoint[name]) for name, value in zoo.state_dict().items())


def test_a_state_dict_can_be_saved_and_loaded(zoo: Zoo, toolkit: Toolkit, ids: Tensor) -> None:
    toolkit.quantize(zoo, EVERYTHING, [ids])
    file = io.BytesIO()
    torch.save(zoo.state_dict(), file)
    file.seek(0)

    Zoo().load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_tied_weights_stay_tied(make_lm: Make, toolkit: Toolkit) -> None:
    model: Any = make_lm(tied=True)
    toolkit.quantize(
        model, {"rules": [{"match": {"class": ["Linear", "Embedding"]}, "weight": "int8"}]}
    )

    assert model.head.weight is model.embed.weight
    assert len(list(named_quantizers(model))) == 10


@pytest.mark.parametrize("how", ["quantizers_off", "enabled"])
def test_without_its_quantizers_a_model_computes_what_it_did_bit_for_bit(
    how: str, zoo: Zoo, ids: Tensor, toolkit: Toolkit, same_bits: SameBits
) -> None:
    with torch.no_grad():
        before = zoo(ids)
        toolkit.quantize(zoo, EVERYTHING, [ids])
        quantized = zoo(ids)
        if how == "quantizers_off":
            with quantizers_off(zoo):
                assert same_bits(zoo(ids), before)
        else:
            for _, quantizer in named_quantizers(zoo):
                quantizer.enabled = False
            assert same_bits(zoo(ids), before)
            for _, quantizer in named_quantizers(zoo):
                quantizer.enabled = True

        assert same_bits(zoo(ids), quantized)


def test_quantizers_off_restores_what_was_on_also_after_an_exception(
    make_mlp: Make, toolkit: Toolkit
) -> None:
    model: Any = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    model.up.quantizer("weight").enabled = False

    def fail() -> None:
        with quantizers_off(model):
            assert not any(q.enabled for _, q in named_quantizers(model))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert {name: q.enabled for name, q in named_quantizers(model)} == {
        "up.weight": False,
        "down.weight": True,
    }


# --- hooks, modes, copies -------------------------------------------------------------------------


def test_hooks_from_before_the_conversion_still_run(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model: Any = make_mlp()
    calls: list[str] = []
    model.up.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.up.register_forward_hook(lambda *_: calls.append("post"))
    model.up.register_full_backward_hook(lambda *_: calls.append("backward"))
    toolkit.quantize(model, "int8", batches)
    calls.clear()

    model(batches[0].clone().requires_grad_()).sum().backward()

    assert calls == ["pre", "post", "backward"]


@pytest.mark.parametrize("training", [True, False])
def test_quantizers_take_the_training_flag_of_their_module(
    make_mlp: Make, toolkit: Toolkit, *, training: bool
) -> None:
    model = make_mlp().train(training)
    toolkit.quantize(model, "int8-weight-only")

    assert all(q.training is training for _, q in named_quantizers(model))
    model.train(not training)
    assert all(q.training is not training for _, q in named_quantizers(model))


def test_a_deep_copy_is_independent(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor], same_bits: SameBits
) -> None:
    model: Any = make_mlp()
    toolkit.quantize(model, "int8", batches)
    with torch.no_grad():
        expected = model(batches[0])
        twin: Any = copy.deepcopy(model)
        assert same_bits(twin(batches[0]), expected)
        twin.up.weight.zero_()
        twin.up.quantizer("input").set_amax(torch.tensor(0.01))

        assert same_bits(model(batches[0]), expected)
        assert not same_bits(twin(batches[0]), expected)


def test_conversion_can_be_undone_completely(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor], same_bits: SameBits
) -> None:
    import bittern

    model = make_mlp()
    expected = model(batches[0])
    before = {name: (type(m), set(vars(m)), list(m._modules)) for name, m in model.named_modules()}

    toolkit.quantize(model, "int8", batches)
    assert type(model.get_submodule("up")) is not nn.Linear
    bittern.revert(model)

    after = {name: (type(m), set(vars(m)), list(m._modules)) for name, m in model.named_modules()}
    assert after == before
    assert type(model.get_submodule("up")) is nn.Linear
    assert same_bits(model(batches[0]), expected)


def test_a_plain_model_can_be_reverted_too(make_mlp: Make) -> None:
    import bittern

    model = make_mlp()
    bittern.revert(model)
    assert type(model.get_submodule("up")) is nn.Linear


def test_the_model_itself_may_be_the_quantized_module(toolkit: Toolkit) -> None:
    model = nn.Linear(4, 3)
    result = toolkit.quantize(model, "int8", [torch.randn(2, 4)])

    assert result.plan.modules == ("",)
    assert [name for name, _ in named_quantizers(model)] == ["weight", "input"]
    assert original_class(model) is nn.Linear


# --- subclasses -----------------------------------------------------------------------------------


class Named(nn.Linear):
    """A subclass without a forward of its own."""

    def describe(self) -> str:
        return f"{self.in_features} wide"


class Lively(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_subclass_keeps_its_class_and_methods(toolkit: Toolkit) -> None:
    model = nn.Sequential(Named(4, 4))
    toolkit.quantize(model, "int8-weight-only")
    inner: Any = model[0]

    assert isinstance(inner, Named)
    assert isinstance(inner, QuantModule)
    assert type(inner).__name__ == "QuantNamed"
    assert inner.describe() == "4 wide"
    assert original_class(inner) is Named


class Listed(nn.Linear):
    """A class that keeps a list of its subclasses, under a name that each must give."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, label: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.known[label] = cls


class First(Listed, label="first"):
    """One of them."""


def test_a_list_that_a_class_keeps_of_its_subclasses_stays_as_it_was(toolkit: Toolkit) -> None:
    model = nn.Sequential(First(4, 4))
    toolkit.quantize(model, "int8-weight-only")

    assert isinstance(model[0], QuantModule)
    assert Listed.known == {"first": First}


def test_instances_of_one_class_share_one_quantized_class(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Named(4, 4))
    toolkit.quantize(model, "int8-weight-only")

    assert type(model[0]) is type(model[1])
    assert type(model[0]) is not type(model[2])


def test_a_module_used_twice_is_converted_once(toolkit: Toolkit) -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    result = toolkit.quantize(model, "int8-weight-only")

    assert result.plan.modules == ("0",)
    assert model[0] is model[2]
    assert isinstance(shared, QuantModule)


# --- torch features -------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("error::UserWarning:torch._dynamo")
@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8-dynamic"])
@pytest.mark.parametrize("grad", [False, True])
def test_torch_compile_takes_the_whole_model_in_one_graph(
    recipe: str,
    make_mlp: Make,
    toolkit: Toolkit,
    batches: list[Tensor],
    same_bits: SameBits,
    *,
    grad: bool,
) -> None:
    model: Any = make_mlp()
    toolkit.quantize(model, recipe, batches)
    with torch.set_grad_enabled(grad):
        expected = model(batches[0])
        compiled = torch.compile(model, backend="eager", fullgraph=True)

        assert same_bits(compiled(batches[0]), expected)
        if grad:
            expected.sum().backward()
            wanted = model.up.weight.grad.clone()
            model.up.weight.grad = None
            compiled(batches[0]).sum().backward()
            assert same_bits(model.up.weight.grad, wanted)


def eager_only(x: Tensor, spec: Any, scales: Any) -> Tensor:
    """A kernel that no compiler can look into."""
    assert not torch.compiler.is_compiling()
    torch._dynamo.graph_break()
    return fake_quantize(x, spec, scales)


@pytest.mark.usefixtures("fresh_compiler")
def test_torch_compile_takes_the_reference_where_a_kernel_is_installed(
    *,
    make_mlp: Make,
    batches: list[Tensor],
    same_bits: SameBits,
    monkeypatch: pytest.MonkeyPatch,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: Callable[..., Toolkit],
) -> None:
    holder = ModuleType("kernels_of_a_compiled_model")
    holder.eager_only = eager_only  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, holder.__name__, holder)
    rule = KernelRule(
        op="fake_quantize", impl=f"{holder.__name__}:eager_only", device="cpu", formats=("int8",)
    )
    toolkit = toolkit_with(make_plugin("fast", register_kernels=lambda: [rule]))
    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    with torch.no_grad():
        expected = model(batches[0])
        compiled = torch.compile(model, backend="eager", fullgraph=True)

        assert same_bits(compiled(batches[0]), expected)


def test_gradients_reach_weights_biases_and_inputs(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    x = batches[0].clone().requires_grad_()

    model(x).square().sum().backward()

    for tensor in (x, *model.parameters()):
        assert tensor.grad is not None
        assert bool((tensor.grad != 0).any())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_single_samples_are_those_of_one_pass_each(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    toolkit.quantize(model, "int8", [x * 0.5])

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, parameters, (row[None],))
        return found.square().sum()

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    each: Any = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, row in enumerate(x):
        model.zero_grad()
        model(row[None]).square().sum().backward()
        torch.testing.assert_close(each["0.weight"][index], model[0].weight.grad)


def test_functional_calls_differentiate_the_given_weights(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (batches[0],)).square().sum()

    found = torch.func.grad(loss)(parameters)
    model(batches[0]).square().sum().backward()

    assert all(torch.allclose(found[n], p.grad) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_change_of_dtype_leaves_ranges_and_scales_in_float32(
    dtype: torch.dtype, make_mlp: Make, toolkit: Toolkit, batches: list[Tensor], same_bits: SameBits
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8", [b * 1e-4 for b in batches])  # scales too small for float16
    before = {name: (q.amax.clone(), q.scale.clone()) for name, q in named_quantizers(model)}

    model.to(dtype)

    for name, quantizer in named_quantizers(model):
        assert same_bits(quantizer.amax, before[name][0])
        assert same_bits(quantizer.scale, before[name][1])
    output = model(batches[0].to(dtype) * 1e-4)
    assert output.dtype == dtype
    assert bool(torch.isfinite(output).all())


def test_ranges_and_scales_move_to_another_device(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    model.to("meta", dtype=torch.float16)

    for _, quantizer in named_quantizers(model):
        assert quantizer.amax.device.type == quantizer.scale.device.type == "meta"
        assert quantizer.scale.dtype == torch.float32
