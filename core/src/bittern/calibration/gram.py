"""Second-order statistics: the Gram matrices of what weights are multiplied with.

For a weight ``W`` that multiplies the inputs ``x_1 .. x_n``, ``H = sum x x^T`` says what every
change of it costs: the outputs move by ``tr(dW H dW^T)`` in sum of squares, for any ``dW``. One
data pass is enough for all algorithms that weigh errors so, whatever they try.

While the data runs nothing waits for the device: which tensors are the same is known from where
they come from, not from their numbers.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.products import MatrixLayout, Product, watch_products
from bittern.calibration.reduce import agree, reduce_sum
from bittern.errors import CalibrationError
from bittern.nn import QuantModule, TensorQuantizer, switched_off
from bittern.nn.observer import SharedInputs
from bittern.records import Plan

__all__ = ["Gram", "observe_grams", "outer", "planned_weights", "product"]

_SPLIT = {"cuda": 2048}  # inputs up to which a product of two matrices is one; else 256
_NARROW = (torch.bfloat16, torch.float16)  # products of two such numbers are exact in float32
_RECENT = 2  # tensors that may be multiplied again: q, k and v run close together


@dataclass(frozen=True, eq=False)
class Gram:
    """What a weight was multiplied with, summed up.

    Weights that read one tensor share one matrix, the very same object.

    Attributes:
        matrix: ``sum x x^T``, float32, ``(parts, inputs, inputs)``.
        tokens: How many ``x`` there were, int64, ``(parts,)``.
        layout: Which elements of the weight each of the inputs multiplies.
    """

    matrix: Tensor
    tokens: Tensor
    layout: MatrixLayout


def planned_weights(
    model: nn.Module, plan: Plan, modules: Collection[str] | None = None
) -> dict[str, TensorQuantizer]:
    """Return the weight quantizers of a plan, by their paths.

    Args:
        model: The converted model.
        plan: The plan.
        modules: Paths of the modules to keep; all by default.
    """
    found = {}
    for entry in plan.entries:
        if entry.kind == "weight" and (modules is None or entry.module in modules):
            module = model.get_submodule(entry.module)
            quantizer = module.quantizer(entry.slot) if isinstance(module, QuantModule) else None
            if quantizer is not None:
                found[entry.path] = quantizer
    return found


def observe_grams(
    model: nn.Module,
    plan: Plan,
    forward: Forward,
    context: CalibrationContext,
    *,
    modules: Collection[str] | None = None,
    quantized: bool = True,
) -> dict[str, Gram]:
    """Run the data and return the Gram matrix of every planned weight.

    The weights that are watched are not quantized in this pass.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data.
        context: Services.
        modules: Paths of the modules to watch; all of the plan by default.
        quantized: Whether inputs are as their quantizers make them, those that are calibrated.

    Returns:
        Path of the weight's quantizer to the sums over all batches and ranks, in the order of
        execution. A weight that no product of two matrices read is missing.

    Raises:
        CalibrationError: NaN or Inf in an input, names the quantizer; or a rank failed.
    """
    weights = planned_weights(model, plan, modules)
    copies = _Copies(context.shared)
    sums = _Sums(copies)
    problem: Exception | None = None
    inputs = [q for _, q in context.quantizers(model) if q.tensor is None]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if not quantized:
            stack.enter_context(switched_off(inputs))
        stack.enter_context(copies.watched(inputs))
        stack.enter_context(watch_products(weights, sums.add))
        forward()
    sums.close()
    bad = sums.first_bad()
    if bad is not None:
        problem = CalibrationError(
            "what the weight is multiplied with holds NaN or Inf, or its squares do",
            where=bad,
            hint="run the data through the unquantized model in a wider dtype "
            "(--dtype float32), or find the batch and leave it out",
        )
    return _reduced(sums, problem)


@dataclass(eq=False)
class _Total:
    """The sum of those weights that met the same inputs so far."""

    matrix: Tensor
    tokens: Tensor
    names: set[str]


@dataclass(eq=False)
class _Input:
    """A tensor that was multiplied just now, and all that it was multiplied with."""

    x: Tensor
    where: tuple[object, ...]
    how: tuple[object, ...]
    matrix: Tensor
    tokens: Tensor
    names: set[str]


class _Copies:
    """Knows which tensors are copies of one tensor, rounded alike, without a look at their numbers.

    The quantizers of q, k and v make equal copies of their common input. What it takes for granted
    is only that rounding is a function. Where modules copy a tensor by other means, its copies
    count as different: that costs time, and changes nothing.

    Args:
        shared: Knows which tensor is the same as a moment ago.
    """

    def __init__(self, shared: SharedInputs) -> None:
        self._shared = shared
        self._made: deque[tuple[weakref.ref[Tensor], object, TensorQuantizer]] = deque(maxlen=8)
        self._alike: dict[frozenset[TensorQuantizer], bool] = {}

    @contextmanager
    def watched(self, quantizers: Iterable[TensorQuantizer]) -> Iterator[None]:
        """Note what these quantizers make of what."""
        handles = [quantizer.register_forward_hook(self._note) for quantizer in quantizers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Return whether two tensors were made of the same one in the same way."""
        first, second = self._maker(one), self._maker(other)
        if first is None or second is None or first[0] is not second[0]:
            return False
        pair = frozenset((first[1], second[1]))
        if pair not in self._alike:  # looks at their scales, once
            self._alike[pair] = _round_alike(first[1], second[1])
        return self._alike[pair]

    def _note(self, quantizer: nn.Module, args: tuple[Any, ...], made: Tensor) -> None:
        assert isinstance(quantizer, TensorQuantizer)
        if made is not args[0]:
            source = self._shared.once(args[0], "source", object)
            self._made.append((weakref.ref(made), source, quantizer))

    def _maker(self, x: Tensor) -> tuple[object, TensorQuantizer] | None:
        return next(((s, q) for made, s, q in self._made if made() is x), None)


class _Sums:
    """Adds up Gram matrices; one for all weights that read the same tensors.

    Args:
        copies: Knows which tensors are copies of one.

    Attributes:
        layouts: Name to layout, in the order of execution.
        totals: Name to sum.
    """

    def __init__(self, copies: _Copies) -> None:
        self._copies = copies
        self.layouts: dict[str, MatrixLayout] = {}
        self.totals: dict[str, _Total] = {}
        self._recent: list[_Input] = []

    def add(self, product: Product) -> None:
        """Take in a product."""
        name, layout = product.name, product.layout
        self.layouts.setdefault(name, layout)
        if layout.parts > 1 and (product.part is not None or product.ends is not None):
            self._add_parts(product)
            return
        x, how = product.operand, (layout.parts, layout.inputs, *product.how)
        where = _place(x)
        known = next((r for r in self._recent if self._same(r, x, where, how, name)), None)
        if known is None:
            rows = product.rows()
            rows = rows if rows.dim() == 3 else rows.unsqueeze(0)
            tokens = torch.full((len(rows),), rows.shape[1], dtype=torch.int64)
            known = _Input(x, where, how, outer(rows), tokens, set())
            self._recent.append(known)
            if len(self._recent) > _RECENT:
                self._settle(self._recent.pop(0))
        known.names.add(name)

    def close(self) -> None:
        """Add what is left."""
        while self._recent:
            self._settle(self._recent.pop(0))

    def first_bad(self) -> str | None:
        """Return the first weight whose sum holds NaN or Inf; waits once per device."""
        totals = list({id(total): total for total in self.totals.values()}.values())
        squares = [total.matrix.diagonal(dim1=-2, dim2=-1).sum() for total in totals]
        bad: set[int] = set()
        for device in {square.device for square in squares}:
            here = [i for i, square in enumerate(squares) if square.device == device]
            finite = torch.stack([squares[i] for i in here]).isfinite().tolist()
            bad |= {id(totals[i]) for i, good in zip(here, finite, strict=True) if not good}
        return next((name for name, total in self.totals.items() if id(total) in bad), None)

    def _same(
        self,
        known: _Input,
        x: Tensor,
        where: tuple[object, ...],
        how: tuple[object, ...],
        name: str,
    ) -> bool:
        """Return whether a tensor was just multiplied in the same way, by another weight."""
        if name in known.names or known.how != how:
            return False
        return known.where == where or self._copies.same(known.x, x)

    def _settle(self, done: _Input) -> None:
        """Add the Gram matrix of a tensor to the sums of the weights that read it."""
        new = {name for name in done.names if name not in self.totals}
        if new:
            total = _Total(done.matrix, done.tokens, new)
            self.totals |= dict.fromkeys(new, total)
        for known in {id(t): t for n in done.names - new for t in (self.totals[n],)}.values():
            total = known
            if not known.names <= done.names:  # some of them did not read this tensor
                total = _Total(known.matrix.clone(), known.tokens, known.names & done.names)
                known.names -= total.names
                self.totals |= dict.fromkeys(total.names, total)
            total.matrix += done.matrix
            total.tokens = total.tokens + done.tokens

    def _add_parts(self, product: Product) -> None:
        """Add the rows of single experts."""
        layout, rows = product.layout, product.rows().float()
        total = self.totals.get(product.name)
        if total is None:
            shape = (layout.parts, layout.inputs, layout.inputs)
            tokens = torch.zeros(layout.parts, dtype=torch.int64)
            total = _Total(rows.new_zeros(shape), tokens, {product.name})
            self.totals[product.name] = total
        if product.part is not None:
            ends = {product.part: (0, len(rows))}
        else:
            assert product.ends is not None
            stops = product.ends.tolist()
            ends = dict(enumerate(zip([0, *stops[:-1]], stops, strict=True)))
        for part, (start, stop) in ends.items():
            if stop > start:
                own = rows[start:stop]
                total.matrix[part].addmm_(own.t(), own)
                total.tokens[part] += stop - start


def outer(rows: Tensor) -> Tensor:
    """Return ``sum x x^T`` in float32, no half of it computed twice.

    On a GPU rows of half precision are multiplied as they are, ten times as fast as in float32:
    the products are exact, and the sums are those of float32 either way.

    Args:
        rows: Floating, ``(parts, tokens, inputs)``.

    Returns:
        Float32, ``(parts, inputs, inputs)``.
    """
    if rows.dtype not in _NARROW or rows.device.type != "cuda":
        rows = rows.float()
    inputs = rows.shape[-1]
    if inputs <= _SPLIT.get(rows.device.type, 256):
        return product(rows, rows)
    found = torch.empty(len(rows), inputs, inputs, device=rows.device)
    half = inputs // 2
    left, right = rows[..., :half], rows[..., half:]
    found[:, :half, :half], found[:, half:, half:] = outer(left), outer(right)
    found[:, :half, half:] = product(left, right)
    found[:, half:, :half] = found[:, :half, half:].transpose(1, 2)
    return found


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left^T right`` in float32, part by part.

    Args:
        left: Float32, or half precision on a GPU, ``(parts, rows, n)``.
        right: Of the same dtype, ``(parts, rows, m)``.
    """
    if left.dtype is torch.float32:
        return left.transpose(1, 2) @ right
    return torch.bmm(left.transpose(1, 2), right, out_dtype=torch.float32)


def _place(x: Tensor) -> tuple[object, ...]:
    """Return what tells a tensor that is held from all others, and from itself after a write."""
    version = None if x.is_inference() else x._version
    start = x.data_ptr() if type(x) is Tensor else id(x)  # wrappers have no memory of their own
    return start, x.shape, x.stride(), x.dtype, x.device, version


def _round_alike(one: TensorQuantizer, other: TensorQuantizer) -> bool:
    """Return whether two quantizers make the same of the same tensor."""
    if one.spec != other.spec or one.enabled != other.enabled or one.per_expert:
        return False
    for own, theirs in zip(one.chain(), other.chain(), strict=True):
        left, right = own.state(), theirs.state()
        if left.keys() != right.keys():
            return False
        if not all(_equal(value, right[name]) for name, value in left.items()):
            return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


def _reduced(sums: _Sums, problem: Exception | None) -> dict[str, Gram]:
    """Return the sums over all ranks."""
    owners = {name: min(total.names) for name, total in sums.totals.items()}
    said = {name: (layout, owners.get(name)) for name, layout in sums.layouts.items()}
    gathered = agree(problem, said)
    layouts: dict[str, MatrixLayout] = {}
    for theirs in gathered:
        for name, (layout, _) in theirs.items():
            layouts.setdefault(name, layout)
    device = next((t.matrix.device for t in sums.totals.values()), torch.device("cpu"))
    kinds: dict[tuple[str | None, ...], Gram] = {}
    found = {}
    for name, layout in layouts.items():
        kind = tuple(theirs.get(name, (None, None))[1] for theirs in gathered)
        if kind not in kinds:
            total = sums.totals.get(name)
            if total is None:
                shape = (layout.parts, layout.inputs, layout.inputs)
                matrix = torch.zeros(shape, device=device)
                total = _Total(matrix, torch.zeros(layout.parts, dtype=torch.int64), {name})
            both = reduce_sum({"matrix": total.matrix, "tokens": total.tokens})
            kinds[kind] = Gram(both["matrix"], both["tokens"], layout)
        shared = kinds[kind]
        found[name] = Gram(shared.matrix, shared.tokens, layout)
    return found
