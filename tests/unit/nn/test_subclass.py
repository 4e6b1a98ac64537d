"""Linear layers and convolutions with a forward of their own: proven, quantized, or refused."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.unit.nn.reference import TENSOR, WEIGHT, int8
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from bittern.errors import PlanError
from bittern.nn import quantizers_off, restore_class
from bittern.nn.weightreads import why_not_proven
from bittern.toolkit import Toolkit

IN, OUT = 6, 4
DYNAMIC = {**TENSOR, "dynamic": True}


# --- proven ---------------------------------------------------------------------------------------


class Falcon(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.weight.T
        if self.bias is None:
            return hidden
        return hidden + self.bias


class Scaled(nn.Linear):
    factor = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias) * self.factor


class Above(Scaled):
    """Two forwards, one above the other, and a method between them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))

    def after(self, x: Tensor) -> Tensor:
        return x + self.weight.shape[0] if self.weight.requires_grad else x + 4


class Lora(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.down = nn.Linear(IN, 2, bias=False)
        self.up = nn.Parameter(torch.ones(OUT, 2))
        self.act = F.silu

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found + self.act(self.down(x)) @ self.up.T


class Keywords(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, bias=self.bias, weight=self.weight)


class Added(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.transpose(0, 1)) + x.mm(torch.t(self.weight))


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x.matmul(torch.transpose(self.weight, -1, -2)), self.bias


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Relu(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias).relu()


LINEARS = [Falcon, Scaled, Above, Lora, Keywords, Added, Transposed, Pair]
CONVS = [Causal, Same, Relu]


def made(cls: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if issubclass(cls, nn.Linear):
        return cls(IN, OUT), torch.randn(3, IN)
    dims = 1 + CONVS.index(cls)
    return cls(2, 3, 3), torch.randn(2, 2, *[6] * dims)


def first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def recipe(**specs: Any) -> dict[str, Any]:
    return {"rules": [{"match": "layer.inner", **specs}]}


def holding(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layer": nn.ModuleDict({"inner": module})})


@torch.no_grad()
@pytest.mark.parametrize("cls", [*LINEARS, *CONVS])
def test_what_is_proven_computes_with_the_rounded_weight_and_input(
    cls: type[nn.Module], toolkit: Toolkit, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    module, x = made(cls)
    assert why_not_proven(module) is None
    exact = first(module(x))
    model = holding(module)
    toolkit.quantize(model, recipe(weight=WEIGHT))
    only_weight = first(module(x))
    with quantizers_off(model):
        assert same_bits(first(module(x)), exact)
    restore_class(module)
    kept = module.weight.data
    module.weight.data = int8(kept, 0)
    torch.testing.assert_close(only_weight, first(module(x)))
    assert float((only_weight - exact).abs().max()) > 1e-5

    module.weight.data = kept
    toolkit.quantize(model, recipe(weight=WEIGHT, input=DYNAMIC, output=DYNAMIC))
    found = first(module(x))
    restore_class(module)
    module.weight.data = int8(kept, 0)
    if cls is not Lora:  # whose other branch reads the exact input
        torch.testing.assert_close(found, int8(first(module(int8(x)))))


@torch.no_grad()
def test_a_branch_beside_the_weight_reads_the_exact_input(toolkit: Toolkit) -> None:
    module, x = made(Lora)
    toolkit.quantize(holding(module), recipe(weight=WEIGHT, input=DYNAMIC))
    base = F.linear(int8(x), int8(module.weight, 0), module.bias)
    branch = F.silu(F.linear(x, module.down.weight)) @ module.up.T
    torch.testing.assert_close(module(x), base + branch)


@pytest.mark.parametrize("cls", [Falcon, Lora, Added, Same])
def test_gradients_reach_weight_and_input(cls: type[nn.Module], toolkit: Toolkit) -> None:
    module, x = made(cls)
    toolkit.quantize(holding(module), recipe(weight=WEIGHT, input=DYNAMIC))
    x.requires_grad_()
    module(x).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("cls", [Falcon, Lora, Same])
def test_it_compiles_without_a_break(cls: type[nn.Module], toolkit: Toolkit) -> None:
    module, x = made(cls)
    toolkit.quantize(holding(module), recipe(weight=WEIGHT, input=DYNAMIC))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_an_export_reads_it_like_a_linear_layer(toolkit: Toolkit, tmp_path: Path) -> None:
    module, _ = made(Falcon)
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict(module.state_dict())
    files = []
    for name, inner in (("own", module), ("plain", plain)):
        model = holding(inner)
        toolkit.quantize(model, recipe(weight=WEIGHT))
        toolkit.export(model, tmp_path / name, format="safetensors")
        files.append(load_file(tmp_path / name / "model.safetensors"))
    own, expected = files
    assert own.keys() == expected.keys()
    assert own["layer.inner.weight"].dtype == torch.int8
    assert all(torch.equal(own[name], expected[name]) for name in own)


# --- refused --------------------------------------------------------------------------------------


class Changed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2)


class Named(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return x @ w.T


class Square(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Left(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.T).T


class AsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.weight, x).T


class Reflecting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(self, "weight").T  # noqa: B009


class Inside(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self._parameters["weight"].sum()


class Handed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return helper(self, x)


def helper(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight)


class Hidden(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.extra()

    def extra(self) -> Tensor:
        return self.weight.sum()


class Walks(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + sum(p.sum() for p in self.parameters())


class Later(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        def product() -> Tensor:
            return F.linear(x, self.weight)

        return product()


class Never(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Decorated(nn.Linear):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Getter(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Writes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight = nn.Parameter(x)
        return F.linear(x, self.weight)


class Shadowed(nn.Linear):
    """Calls something else by the name of the function."""

    def forward(self, x: Tensor, linear: Any = torch.add) -> Tensor:
        return linear(x, self.weight)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean()
        return self._conv_forward(x, weight, self.bias)


class OwnConvolution(nn.Conv2d):
    """Its convolution is not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight.abs(), bias)


class Checkpointed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Recomputed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.product, x, use_reentrant=False)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Deferred(Recomputed):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.product(y * 1), x, use_reentrant=False)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Changed, "no product with an activation: return F.linear(x, self.weight * 2)"),
        (Named, "no product with an activation: w = self.weight"),
        (Square, "no product with an activation: return x @ self.weight"),
        (Left, "no product with an activation: return (self.weight @ x.T).T"),
        (AsInput, "no product with an activation: return F.linear(self.weight, x).T"),
        (Reflecting, "uses getattr"),
        (Checkpointed, "hands on forward, which may run at another time"),
        (Recomputed, "hands on product, which may run at another time"),
        (Deferred, "hands on product, which may run at another time"),
        (Inside, "reads _parameters"),
        (Handed, "hands on the whole object"),
        (Hidden, "no product with an activation: return self.weight.sum()"),
        (Walks, "it uses parameters of torch's own classes"),
        (Later, "no product with an activation: return F.linear(x, self.weight)"),
        (Never, "it never reads the weight"),
        (Decorated, "its forward is decorated"),
        (Getter, "its class defines __getattr__"),
        (Writes, "no product with an activation: self.weight = nn.Parameter(x)"),
        (Shadowed, "no product with an activation: return linear(x, self.weight)"),
        (Standardized, "no product with an activation: weight = self.weight"),
        (OwnConvolution, "no product with an activation"),
    ],
)
def test_what_is_not_proven_is_refused_with_the_reason(
    cls: type[nn.Module], reason: str, toolkit: Toolkit
) -> None:
    module = cls(4, 4, 1) if issubclass(cls, nn.Conv2d) else cls(4, 4)
    assert reason in (why_not_proven(module) or "")
    plan = toolkit.plan(nn.ModuleDict({"own": module, "plain": nn.Linear(4, 4)}), "int8")
    assert plan.modules == ("plain",)
    if isinstance(module, nn.Linear):
        assert reason in plan.skipped["own"]
        assert f"{cls.__name__} overrides forward of Linear" in plan.skipped["own"]


def test_a_second_name_of_the_weight_is_refused() -> None:
    module, _ = made(Falcon)
    module.twin = module.weight
    assert "under another name, twin" in (why_not_proven(module) or "")


def test_a_function_of_the_object_that_may_hold_it_is_refused() -> None:
    module, _ = made(Lora)
    module.act = lambda x: x + module.weight.sum()
    assert "it calls act, a function of this object" in (why_not_proven(module) or "")


def test_a_computed_weight_is_refused() -> None:
    module, _ = made(Falcon)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    assert why_not_proven(module) is not None


def test_a_class_without_a_source_is_refused() -> None:
    namespace: dict[str, Any] = {}
    text = "def forward(self, x):\n    return x @ self.weight.T\n"
    exec(compile(text, "<nowhere>", "exec"), namespace)
    cls = types.new_class("Made", (nn.Linear,), {}, lambda body: body.update(namespace))
    assert "the source of its forward is not to be had" in (why_not_proven(cls(4, 4)) or "")


def test_a_forward_that_ends_without_the_weight_is_an_error(toolkit: Toolkit) -> None:
    class Sometimes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else F.linear(x, self.weight)

    module = Sometimes(4, 4)
    toolkit.quantize(holding(module), recipe(weight=WEIGHT))
    module(torch.ones(2, 4))
    with pytest.raises(PlanError, match=r"^layer\.inner: its forward ended without a product"):
        module(torch.ones(1, 4))
