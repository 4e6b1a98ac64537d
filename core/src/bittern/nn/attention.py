"""Quantized attention of any module: the operands of its products, found by data flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.errors import PlanError
from bittern.nn.intercept import (
    MATMULS,
    Call,
    Intercept,
    Marks,
    Place,
    active_slots,
    is_active,
    looking,
    path_of,
    variants,
)
from bittern.nn.module import QuantModule

__all__ = ["QuantAttention", "attend"]

OPERANDS = ("q", "k", "v", "p")

_SOFTMAX = frozenset(variants("softmax"))
_SDPA = F.scaled_dot_product_attention
# What makes a tensor of scores, or of probabilities, another one of the same: every element of the
# result is one of the operand's, changed on its own, or something that was put beside them.
_ELEMENTWISE = (
    "add sub rsub mul div true_divide neg clamp clamp_min clamp_max maximum minimum tanh where "
    "masked_fill masked_scatter nan_to_num add_ sub_ mul_ div_ clamp_ tanh_ masked_fill_ dropout "
    "dropout_ max min to type float half bfloat16 double type_as clone contiguous detach"
)
_SHAPES = (
    "view reshape view_as reshape_as expand expand_as unsqueeze squeeze flatten unflatten "
    "__getitem__ narrow select split chunk unbind cat concat concatenate stack pad repeat "
    "repeat_interleave index_select gather take_along_dim roll flip triu tril"
)
# These may make the keys of scores their queries.
_TURNS = "transpose permute swapaxes swapdims movedim moveaxis t adjoint"
_GETTERS = (torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
_TURNING = frozenset({*variants(*_TURNS.split()), *_GETTERS})
_KEEPING = frozenset({*variants(*_ELEMENTWISE.split(), *_SHAPES.split()), *_TURNING})

_EXTREMES = frozenset(variants("max", "min"))

_INPUT = Place(0, ("input", "self"))
_RIGHT = Place(1, ("other",))
_DIM = Place(1, ("dim",))
_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class QuantAttention(QuantModule):
    """Mixin for a module whose forward computes attention itself; slots ``q k v p output``.

    The forward stays the module's own. Attention is found in it in two forms:

    - ``F.scaled_dot_product_attention``: ``q``, ``k`` and ``v`` are its operands; with ``p`` it is
      computed by `attend`, step by step;
    - ``matmul`` -> ``softmax`` -> ``matmul`` (also ``@``, ``bmm``, ``baddbmm``). The product of two
      activations is one of scores: ``q`` and the transposed ``k``. Its result, through elementwise
      functions, masks, slices, ``cat`` and changes of shape that leave the last axis in place, must
      reach a softmax over that axis. The result of that, through the same and dropout, is ``p``
      where it is an operand of a product, and the other operand is ``v``. Products with a
      parameter, and of a batch with one matrix, are linear layers and are left alone, and so are
      outer products, which rotary embeddings are computed by.

    A forward that ends without having shown what a slot waits for is an error, and so is a product
    taken for one of scores that led to no softmax: nothing is skipped in silence.

    Shapes: ``q`` and ``k`` ``(..., tokens, head_dim)``, whichever way a product reads them, ``v``
    ``(..., tokens, head_dim)``, ``p`` ``(..., queries, keys)``. ``output`` is what the module
    returns, or the first item of it.

    A part of the forward that runs again in the backward pass (activation checkpointing inside the
    module) is not seen there; checkpoint the module as a whole.

    Raises:
        PlanError: In the forward pass: see above; it names the module.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward makes of the quantized operands."""
        if not active_slots(self, OPERANDS):
            return quantized_output(self, super().forward(*args, **kwargs))
        flow = _Flow(self)
        with looking(flow):
            found = super().forward(*args, **kwargs)
        flow.finish()
        return quantized_output(self, found)


def quantized_output(module: QuantModule, found: Any) -> Any:
    """Return what a forward returned, its tensor, or the first of its tuple, quantized.

    Raises:
        PlanError: There is a quantizer, and nothing that it could quantize.
    """
    if not is_active(module.quantizer("output")):
        return found
    if isinstance(found, Tensor):
        return module.quantize("output", found)
    if type(found) is tuple and found and isinstance(found[0], Tensor):
        return (module.quantize("output", found[0]), *found[1:])
    raise PlanError(
        f"its forward returns a {type(found).__name__}, so there is no output to quantize",
        where=path_of(module),
        hint="switch the slot off with output: null",
    )


class _Flow(Intercept):
    """Follows scores and probabilities through one forward pass."""

    watched = frozenset({_SDPA, *MATMULS, *_SOFTMAX, *_KEEPING})

    def __init__(self, module: QuantModule) -> None:
        super().__init__()
        self._module = module
        self._met: list[str] = []
        self._scores = Marks()
        self._shares = Marks()
        self._products: list[str] = []  # every product taken for one of scores, in words
        self._reached: list[int] = []  # those that led to a softmax

    def seen(self, call: Call) -> Any:
        """Quantize the operands of a product, pass marks on."""
        if call.func in _KEEPING:
            return self._keep(call)
        if call.func in _SOFTMAX:
            return self._softmax(call)
        if call.func is _SDPA:
            return self._sdpa(call)
        return self._product(call)

    def finish(self) -> None:
        """Raise if the forward pass did not show what active slots wait for."""
        active = active_slots(self._module, OPERANDS)
        lost = [text for i, text in enumerate(self._products) if i not in self._reached]
        if lost and ("q" in active or "k" in active):
            raise PlanError(
                f"the product of {lost[0]} in its forward leads to no softmax that could be "
                "followed, so its operands are no queries and keys",
                where=path_of(self._module),
                hint="leave q and k out of the recipe, or write a QuantModule for the class that "
                "calls self.quantize",
            )
        missing = [slot for slot in active if slot not in self._met]
        if missing:
            raise PlanError(
                f"its forward ended and {', '.join(missing)} of its attention never showed: it "
                "calls neither scaled_dot_product_attention nor matmul, softmax, matmul",
                where=path_of(self._module),
                hint="leave these slots out of the recipe, or write a QuantModule for the class "
                "that calls self.quantize",
            )

    def _quantize(self, slot: str, x: Tensor) -> Tensor:
        if slot not in self._met:
            self._met.append(slot)
        return self._module.quantize(slot, x)

    def _transposed(self, slot: str, x: Tensor) -> Tensor:
        """Quantize the rows of the transposed tensor, which a product reads as columns."""
        turned = x.transpose(-2, -1)
        found = self._quantize(slot, turned)
        return x if found is turned else found.transpose(-2, -1)

    def _product(self, call: Call) -> Any:
        first, second = MATMULS[call.func]
        a, b = call.get(first), call.get(second)
        if self._shares.get(a) is not None:
            p = self._quantize("p", a)
            return call.put(first, p).put(second, self._quantize("v", b)).run()
        if self._shares.get(b) is not None:
            v = self._transposed("v", a)
            return call.put(first, v).put(second, self._transposed("p", b)).run()
        if not _both_activations(a, b) or self._scores.get(a) or self._scores.get(b):
            return call.run()
        q, k = self._quantize("q", a), self._transposed("k", b)
        result = call.put(first, q).put(second, k).run()
        self._scores.add(result, (len(self._products),))
        self._products.append(f"{tuple(a.shape)} and {tuple(b.shape)}")
        return result

    def _softmax(self, call: Call) -> Any:
        scores = call.get(_INPUT)
        products = self._scores.get(scores)
        result = call.run()
        if products is None:
            return result
        dim = call.get(_DIM)
        if dim not in (-1, scores.dim() - 1):
            raise PlanError(
                f"its softmax runs over axis {dim} of {tuple(scores.shape)}, not over the last, so "
                "which operand of the product before it is the query is not known",
                where=path_of(self._module),
                hint="write a QuantModule for the class that calls self.quantize",
            )
        self._reached.extend(products)
        self._shares.add(result, products)
        return result

    def _keep(self, call: Call) -> Any:
        result = call.run()
        if call.func in _EXTREMES and not isinstance(call.get(_RIGHT), Tensor):
            return result  # of one tensor, it is no longer all scores
        for marks in (self._scores, self._shares):
            if len(marks) == 0:
                continue
            if marks is self._scores and call.func in _TURNING and not _same_rows(call, result):
                continue
            found: list[int] = []
            for x in _tensors((*call.args, *call.kwargs.values())):
                found += marks.get(x) or ()
            if found:
                for x in _tensors((result,)):
                    marks.add(x, tuple(dict.fromkeys(found)))
        return result

    def _sdpa(self, call: Call) -> Any:
        given = {**dict(zip(_SDPA_NAMES, call.args, strict=False)), **call.kwargs}
        q = self._quantize("q", given.pop("query"))
        k = self._quantize("k", given.pop("key"))
        v = self._quantize("v", given.pop("value"))
        if not is_active(self._module.quantizer("p")):
            return call.func(q, k, v, **given)
        mask = given.pop("attn_mask", None)
        found, _ = attend(q, k, v, mask, change=lambda p: self._quantize("p", p), **given)
        return found


def _both_activations(a: Any, b: Any) -> bool:
    """Whether a product is one of two activations, and no linear layer."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or min(a.dim(), b.dim()) < 2:
        return False
    if a.dim() != b.dim() and min(a.dim(), b.dim()) == 2:
        return False
    if a.shape[-1] == 1:  # an outer product: positions and frequencies of a rotary embedding
        return False
    return not any(isinstance(x, nn.Parameter) for x in (a, b, a._base, b._base))


def _same_rows(call: Call, result: Tensor) -> bool:
    """Whether a change of axes left the last one, which is that of the keys, where it is."""
    before = call.get(_INPUT)
    same: bool = result.shape[-1] == before.shape[-1] and result.stride(-1) == before.stride(-1)
    return same


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors among arguments or results, and those in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    empty_rows: float = 0.0,
    change: Callable[[Tensor], Tensor] = lambda p: p,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, with the semantics of `F.scaled_dot_product_attention`.

    The formula and the meaning of every option are those of its documentation. Half precision is
    computed in float32, as its reference path does.

    Args:
        query: ``(..., heads, L, E)``, floating.
        key: ``(..., heads, S, E)``; fewer heads with ``enable_gqa``.
        value: ``(..., heads, S, Ev)``.
        attn_mask: Broadcast to ``(..., heads, L, S)``; boolean, true where attention is allowed, or
            floating, added to the scores.
        dropout_p: Probability that an element of the probabilities becomes 0.
        is_causal: Mask what lies above the diagonal; excludes ``attn_mask``.
        scale: Factor of the scores, ``1 / sqrt(E)`` by default.
        enable_gqa: Repeat the heads of key and value to those of the query.
        empty_rows: The probabilities of a query that may attend to nothing.
        change: Changes the probabilities before they multiply the values.

    Returns:
        The attention, ``(..., heads, L, Ev)``, in the dtype of the query, and the probabilities
        before ``change``.
    """
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        if attn_mask is not None:
            raise ValueError("is_causal and attn_mask exclude each other")
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    p = torch.softmax(scores, -1)
    if attn_mask is not None:
        p = p.masked_fill((scores == -math.inf).all(-1, keepdim=True), empty_rows)
    p = F.dropout(p, dropout_p)
    return (change(p) @ value).to(dtype), p.to(dtype)
