"""Attention found in the forward of any module: its operands, and errors where it is not found."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.unit.nn.reference import TENSOR, int8
from torch import Tensor, nn

from bittern.errors import PlanError
from bittern.hooks import hookimpl
from bittern.nn import MatMul, ScaledDotProductAttention, quantizers_off
from bittern.nn.attention import attend
from bittern.records import ATTENTION_SLOTS, ModuleRule
from bittern.toolkit import Toolkit

B, H, L, S, D = 2, 4, 5, 6, 8
DYNAMIC = {**TENSOR, "dynamic": True}
TOKEN = {"format": "int8", "granularity": "token"}


class Attention(nn.Module):
    """Base of the forms below: what a rule targets."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        raise NotImplementedError


class Sdpa(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Operators(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / math.sqrt(D), -1) @ v


class Functions(Attention):
    """As many models write it: float32 inside, a mask, dropout, in place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * (1 / math.sqrt(D))
        scores += torch.zeros(scores.shape[-2:])
        scores = scores.masked_fill(torch.zeros_like(scores, dtype=torch.bool), -1e9)
        p = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(p, 0.1, self.training), v)


class Batched(Attention):
    """Heads in the batch, the mask as the summand of the product."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        summand = torch.zeros(1, 1, k.shape[1])
        scores = torch.baddbmm(summand, q, k.mT, beta=0.5, alpha=1 / math.sqrt(D))
        return torch.bmm(scores.softmax(dim=2), v).view(B, H, -1, D)


class Sink(Attention):
    """One more column that takes part in the softmax and in nothing else."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.matmul(k.mT).div(math.sqrt(D))
        sink = torch.full((*scores.shape[:-1], 1), -math.inf)
        combined = torch.cat([scores, sink], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        return torch.softmax(combined, -1)[..., :-1] @ v


class Clipped(Attention):
    """Scores from below, by the elementwise form of a function that also reduces."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.max(q @ k.mT / math.sqrt(D), torch.tensor(-1e9))
        return torch.softmax(torch.min(scores, torch.tensor(1e9)), -1) @ v


class Turned(Attention):
    """Values first: the transposed product."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (v.mT @ torch.softmax(q @ k.mT / math.sqrt(D), -1).mT).mT


class Layered(Attention):
    """Linear layers around it, one of them by hand; returns the probabilities too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D, bias=False)
        self.outer = nn.Parameter(torch.eye(D))
        nn.init.eye_(self.inner.weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(self.inner(q) @ (k @ self.outer).mT / math.sqrt(D), -1)
        return p @ v @ self.outer.T, p


FORMS = [Sdpa, Operators, Functions, Batched, Sink, Clipped, Turned, Layered]


@hookimpl
def register_modules() -> list[ModuleRule]:
    return [
        ModuleRule(
            target=f"{__name__}:Attention",
            quantized="bittern.nn.attention:QuantAttention",
            slots=ATTENTION_SLOTS,
            subclass_forward=True,
        )
    ]


@pytest.fixture(scope="module")
def kit(toolkit_with: Callable[..., Toolkit], make_plugin: Callable[..., Any]) -> Toolkit:
    return toolkit_with(make_plugin("alpha", register_modules=register_modules))


def qkv(*, keys: int = S) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, L, D), torch.randn(B, H, keys, D), torch.randn(B, H, keys, D)


def first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def quantized(kit: Toolkit, module: nn.Module, *slots: str, spec: Any = None) -> nn.Module:
    """Return the module after conversion; every slot is dynamic, so no data is needed."""
    specs = dict.fromkeys(slots, spec or DYNAMIC)
    model = nn.ModuleDict({"layer": nn.ModuleDict({"attn": module})}).eval()
    kit.quantize(model, {"rules": [{"match": "layer.attn", "slots": specs}]})
    return module


def by_hand(q: Tensor, k: Tensor, v: Tensor, on: str) -> Tensor:
    q, k, v = (int8(x) if name in on else x for name, x in (("q", q), ("k", k), ("v", v)))
    p = torch.softmax(torch.einsum("bhld,bhsd->bhls", q, k) / math.sqrt(D), -1)
    p = int8(p) if "p" in on else p
    return torch.einsum("bhls,bhsd->bhld", p, v)


# --- found ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("slots", ["q", "k", "v", "p", "qkvp"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_quantizes_its_operands(
    form: type[Attention], slots: str, kit: Toolkit, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    module, inputs = form().eval(), qkv()
    exact = first(module(*inputs))
    quantized(kit, module, *slots)

    found = first(module(*inputs))
    torch.testing.assert_close(found, by_hand(*inputs, slots))
    assert float((found - exact).abs().max()) > 1e-4
    with quantizers_off(module):
        assert same_bits(first(module(*inputs)), exact)


@torch.no_grad()
@pytest.mark.parametrize("form", [Operators, Batched, Turned])
def test_rows_are_tokens_whichever_way_a_product_reads_them(
    form: type[Attention], kit: Toolkit
) -> None:
    inputs = qkv()
    expected = quantized(kit, Sdpa(), *"qkvp", spec=TOKEN)(*inputs)
    found = quantized(kit, form(), *"qkvp", spec=TOKEN)(*inputs)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_output_is_what_the_module_returns_or_the_first_of_it(kit: Toolkit) -> None:
    inputs = qkv()
    single = quantized(kit, Operators(), "output")(*inputs)
    output, p = quantized(kit, Layered(), "output")(*inputs)
    torch.testing.assert_close(single, int8(by_hand(*inputs, "")))
    torch.testing.assert_close(output, int8(by_hand(*inputs, "")))
    torch.testing.assert_close(p.sum(-1), torch.ones(B, H, L))


def test_static_ranges_are_those_of_the_operands(kit: Toolkit) -> None:
    q, k, v = qkv()
    model = nn.ModuleDict({"a": Functions()}).eval()
    rule = {"match": "a", "slots": dict.fromkeys("qkvp", TENSOR)}
    kit.quantize(model, {"rules": [rule]}, lambda model: model["a"](q, k, v))

    p = torch.softmax(q @ k.mT / math.sqrt(D), -1)
    for slot, x in zip("qkvp", (q, k, v, p), strict=True):
        torch.testing.assert_close(model["a"].quantizer(slot).amax, x.abs().max())


def turned(x: Tensor) -> Tensor:
    """Turn pairs of features by their position, as rotary embeddings do."""
    angles = torch.arange(x.shape[-2], dtype=torch.float)[:, None] @ torch.ones(1, D // 2)
    angles = torch.cat([angles, angles], -1)
    left, right = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()


class Rotary(Operators):
    """Computes its rotary embedding itself."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(turned(q), turned(k), v)


@torch.no_grad()
def test_the_product_of_positions_and_frequencies_is_none_of_scores(kit: Toolkit) -> None:
    q, k, v = qkv()
    found = quantized(kit, Rotary(), *"qkvp")(q, k, v)
    torch.testing.assert_close(found, by_hand(turned(q), turned(k), v, "qkvp"))


class Twice(Attention):
    """Two attentions in one forward, as of a text and of an image."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Sdpa.forward(self, q, k, v) + Operators.forward(self, q, k, v)


ORDER = torch.arange(S).expand(H, B, L, S)


class Biased(Attention):
    """Two products of one softmax, as of contents and of positions."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores += (q @ k.flip(-2).mT).transpose(0, 1).gather(-1, ORDER).transpose(0, 1)
        return torch.softmax(scores, -1) @ v


@torch.no_grad()
def test_several_attentions_of_one_forward_share_their_quantizers(kit: Toolkit) -> None:
    inputs = qkv()
    found = quantized(kit, Twice(), *"qkvp")(*inputs)
    torch.testing.assert_close(found, 2 * by_hand(*inputs, "qkvp"))

    q, k, v = (int8(x) for x in inputs)
    expected = int8(torch.softmax(q @ k.mT + q @ k.flip(-2).mT, -1)) @ v
    torch.testing.assert_close(quantized(kit, Biased(), *"qkvp")(*inputs), expected)


class Outer(Attention):
    """An attention around another one, which is converted too or not."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Operators()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn(q, k, v)


@torch.no_grad()
def test_what_a_converted_child_does_is_the_childs_affair(kit: Toolkit) -> None:
    inputs = qkv()
    model = nn.ModuleDict({"a": Outer()})
    rules = [{"match": "a.attn", "slots": dict.fromkeys("qk", DYNAMIC)}]
    kit.quantize(model, {"rules": rules})
    torch.testing.assert_close(model["a"](*inputs), by_hand(*inputs, "qk"))
    kit.quantize(model, {"rules": [{"match": "a", "slots": {"v": DYNAMIC}}]})
    torch.testing.assert_close(model["a"](*inputs), by_hand(*inputs, "v"))
    kit.quantize(model, {"rules": [*rules, {"match": "a", "slots": {"v": DYNAMIC}}]})
    with pytest.raises(PlanError, match=r"^a: its forward ended and v of its attention"):
        model["a"](*inputs)


@torch.no_grad()
@pytest.mark.parametrize("form", [Sdpa, Functions])
@pytest.mark.parametrize("grad", [True, False])
def test_it_compiles_without_a_break(form: type[Attention], grad: bool, kit: Toolkit) -> None:
    module, inputs = quantized(kit, form(), *"qkvp"), qkv()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(*inputs), module(*inputs))


@pytest.mark.parametrize("form", [Sdpa, Functions])
def test_gradients_are_those_of_the_rounded_operands(form: type[Attention], kit: Toolkit) -> None:
    module = quantized(kit, form(), *"qkv")
    leaves = [x.requires_grad_() for x in qkv()]
    module(*leaves).square().sum().backward()
    rounded = [int8(x).requires_grad_() for x in leaves]
    by_hand(*rounded, "").square().sum().backward()
    for leaf, other in zip(leaves, rounded, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


def test_scores_are_not_kept_alive(kit: Toolkit) -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Frees(Attention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.mT
            kept.append(weakref.ref(scores))
            scores = scores / 2
            gc.collect()
            assert kept[0]() is None
            return torch.softmax(scores, -1) @ v

    with torch.no_grad():
        quantized(kit, Frees(), *"qkvp")(*qkv())
    assert len(kept) == 1


# --- not found ------------------------------------------------------------------------------------


class Einsum(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhld,bhsd->bhls", q, k)
        return torch.softmax(scores, -1) @ v


class Linear(Attention):
    """Attention without a softmax."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.relu(q @ k.mT) @ v


class Lost(Attention):
    """Something between the product and the softmax that mixes scores."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).cumsum(-1), -1) @ v


class Crossed(Attention):
    """Keys first, and turned before the softmax: the operands would be taken for each other."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((k @ q.mT).transpose(-1, -2), -1) @ v


class Columns(Attention):
    """Keys first: the softmax runs over the other axis."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(k @ q.mT, dim=-2).mT @ v


@pytest.mark.parametrize(
    ("form", "slots", "problem"),
    [
        (Einsum, "q", r"the product of \(2, 4, 5, 6\) and \(2, 4, 6, 8\) in its forward leads to"),
        (Einsum, "vp", "ended and v, p of its attention never showed"),
        (Linear, "k", r"the product of \(2, 4, 5, 8\) and \(2, 4, 8, 6\) in its forward leads to"),
        (Linear, "v", "ended and v of its attention never showed"),
        (Lost, "qkvp", "leads to no softmax that could be followed"),
        (Crossed, "q", "leads to no softmax that could be followed"),
        (Columns, "q", "runs over axis -2"),
    ],
)
def test_what_is_not_found_is_an_error_that_names_the_module(
    form: type[Attention], slots: str, problem: str, kit: Toolkit
) -> None:
    module = quantized(kit, form(), *slots)
    with pytest.raises(PlanError, match=problem) as caught:
        module(*qkv())
    assert caught.value.where == "layer.attn"
    assert caught.value.hint
    with quantizers_off(module):
        assert module(*qkv()).shape == (B, H, L, D)


def test_an_output_that_is_no_tensor_is_an_error(kit: Toolkit) -> None:
    class Mapping(Attention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
            return {"out": F.scaled_dot_product_attention(q, k, v)}

    module = quantized(kit, Mapping(), "output")
    with pytest.raises(PlanError, match=r"^layer\.attn: its forward returns a dict"):
        module(*qkv())


# --- step by step ---------------------------------------------------------------------------------

_MASK = torch.rand(L, S, generator=torch.Generator().manual_seed(3)) > 0.5
_EMPTY = _MASK.clone()
_EMPTY[1] = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": _MASK},
        {"attn_mask": _EMPTY},
        {"attn_mask": _MASK[None, None].expand(B, 1, L, S).float()},
        {"attn_mask": torch.zeros(L, S).masked_fill(~_EMPTY, -math.inf)},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True, "scale": 2.0},
    ],
)
def test_attention_step_by_step_is_the_function_of_torch(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    if options.get("enable_gqa"):
        k, v = k[:, :2], v[:, :2]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = {**options, "attn_mask": mask.to(dtype)}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    found, p = attend(q, k, v, **options)
    assert found.dtype == p.dtype == dtype
    # torch's kernel keeps the probabilities in half precision
    tolerance = {"atol": 0.02, "rtol": 0} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **tolerance)


def test_a_causal_attention_takes_no_mask() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        attend(*qkv(), attn_mask=_MASK, is_causal=True)


@torch.no_grad()
def test_every_argument_of_the_function_survives_the_change_of_path(kit: Toolkit) -> None:
    class Everything(Attention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k[:, :2], v[:, :2]
            return F.scaled_dot_product_attention(
                q, k, value=v, attn_mask=_MASK, dropout_p=0.0, scale=0.4, enable_gqa=True
            )

    for slots in ("v", "p"):
        exact, module = Everything()(*qkv()), quantized(kit, Everything(), slots)
        torch.testing.assert_close(module(*qkv()), exact, atol=0.03, rtol=0)
        assert not torch.equal(module(*qkv()), exact)


# --- modules for users ----------------------------------------------------------------------------


@torch.no_grad()
def test_products_can_be_modules(kit: Toolkit) -> None:
    q, k, v = qkv()
    model = nn.ModuleDict({"product": MatMul(), "attention": ScaledDotProductAttention()})
    assert torch.equal(model["product"](q, k.mT), q @ k.mT)
    expected = F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.1)
    assert torch.equal(model["attention"](q, k, v, scale=0.1), expected)

    rules = [
        {"match": "product", "input": DYNAMIC, "output": DYNAMIC},
        {"match": "attention", "slots": dict.fromkeys("qkvp", DYNAMIC)},
    ]
    kit.quantize(model, {"rules": rules})
    torch.testing.assert_close(model["product"](q, k.mT), int8(int8(q) @ int8(k.mT)))
    torch.testing.assert_close(model["attention"](q, k, v), by_hand(q, k, v, "qkvp"))


def test_products_are_quantized_only_where_they_are_named(kit: Toolkit) -> None:
    model = nn.ModuleDict({"product": MatMul(), "linear": nn.Linear(4, 4)})
    everything = {"rules": [{"match": "*", "weight": "int8", "input": "int8"}]}
    assert kit.plan(model, everything).modules == ("linear",)


def test_a_kv_cache_is_one_of_keys_and_values(kit: Toolkit) -> None:
    model = nn.ModuleDict({"a": ScaledDotProductAttention(), "b": nn.Linear(4, 4)})
    plan = kit.plan(model, {"rules": [{"match": "b", "weight": "int8"}], "kv_cache": "fp8"})
    assert {(e.module, e.slot) for e in plan.entries} == {
        ("a", "k"),
        ("a", "v"),
        ("b", "weight"),
    }
