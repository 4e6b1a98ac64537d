"""GPTQ: weights are rounded so that the errors of some columns make up for those of others.

Column by column, each rounded from where the outputs come closest to what they were, given the
errors so far (Frantar et al., GPTQ, ICLR 2023); `bittern.calibration.columns` has the algebra. The
step runs block by block: what a block is multiplied with is what the rounded blocks before it
compute. Ranges are found first, weighed by what an error of a column costs once later columns have
made up for it, and stay: columns may then be taken in any order without a permutation to store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bittern.calibration.columns import (
    Factor,
    errors_of,
    factorize,
    refine_columns,
    round_columns,
)
from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.gram import Gram, observe_grams, planned_weights
from bittern.calibration.max import run_max
from bittern.calibration.search import best_multiple, multipliers, squared
from bittern.errors import CalibrationError
from bittern.nn import TensorQuantizer
from bittern.nn.packed import PackedWeight
from bittern.numerics import Scales, fake_quantize
from bittern.numerics.layout import as_blocks, expand_scale, from_blocks
from bittern.records import Plan

__all__ = ["run_gptq"]

log = logging.getLogger("bittern.calibration")

_SCALES = ("max", "mse")


def run_gptq(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    block: int = 128,
    damp: float = 0.01,
    act_order: bool = True,
    scales: str = "mse",
    true_sequential: bool = False,
    passes: int = 0,
    rounded: bool = True,
) -> None:
    """Round all planned weights; static activations get the largest magnitude as their range.

    Weights hold rounded numbers afterwards: their quantizers change nothing. What cannot be rounded
    so is rounded to nearest, and so is any row that would be worse off on the calibration data; the
    log says which and why.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data.
        context: Services.
        block: Columns that are brought up to date at once; only speed depends on it.
        damp: Share of its own that is added to every diagonal element of a Gram matrix, ten times
            as much as often as it takes to factor it.
        act_order: Whether the columns with the largest inputs come first; otherwise as they lie.
        scales: ``"mse"``: ranges with the least error of the outputs; ``"max"``: the largest
            magnitudes.
        true_sequential: Whether the weights of a block, too, are fitted to what the rounded ones
            before them compute; for one data pass more per tensor that weights read.
        passes: How often all columns are rounded once more, each with the others as they are. It
            lowers the error on the calibration data; perplexity did not always follow.
        rounded: Whether weights hold the rounded numbers. If not, they hold what was rounded to
            them, and quantizers still round that to the same: a step that learns rounding
            (``learn-rounding``, ``distill-rounding``) then begins where GPTQ ends, and can turn
            over what was close.

    Raises:
        CalibrationError: An option is out of range, there is no data, or NaN or Inf was met.
    """
    if scales not in _SCALES:
        raise CalibrationError(f"scales is {scales!r}", hint=f"choose {' or '.join(_SCALES)}")
    if block < 1 or passes < 0 or not 0 < damp <= 1:
        raise CalibrationError(
            f"block is {block}, passes {passes} and damp {damp}",
            hint="choose a block of at least 1, passes from 0, and damp above 0 and up to 1",
        )
    if forward is None:
        raise CalibrationError("gptq needs data", hint="give data (--data FILE)")
    run_max(model, plan, forward, context)
    grams = observe_grams(model, plan, forward, context)
    weights = planned_weights(model, plan)
    rounder = _Rounder(
        model,
        context,
        block=block,
        damp=damp,
        by_size=act_order,
        scales=scales,
        passes=passes,
        rounded=rounded,
    )
    for number, stage in enumerate(_stages(grams) if true_sequential else [list(weights)]):
        if number:
            modules = {name.rpartition(".")[0] for name in stage}
            again = observe_grams(model, plan, forward, context, modules=modules)
            grams |= {name: again[name] for name in stage if name in again}
        for name in stage:
            rounder.round(name, weights.pop(name), grams.get(name))
    for name, quantizer in weights.items():
        rounder.round(name, quantizer, None)


def _stages(grams: Mapping[str, Gram]) -> list[list[str]]:
    """Return the weights that read one tensor together, in the order of execution."""
    found: dict[int, list[str]] = {}
    for name, gram in grams.items():
        found.setdefault(id(gram.matrix), []).append(name)
    return list(found.values())


class _Rounder:
    """Rounds one weight after the other; those with one Gram matrix share its factors."""

    def __init__(
        self,
        model: nn.Module,
        context: CalibrationContext,
        *,
        block: int,
        damp: float,
        by_size: bool,
        scales: str,
        passes: int,
        rounded: bool,
    ) -> None:
        self._model, self._context = model, context
        self._block, self._damp, self._by_size, self._scales = block, damp, by_size, scales
        self._passes, self._keeps = passes, not rounded
        self._factors: tuple[Gram | None, _Order | None] = None, None  # of the last one
        self._done: dict[int, TensorQuantizer] = {}

    def round(self, name: str, quantizer: TensorQuantizer, gram: Gram | None) -> None:
        """Round a weight, to nearest where it has to be."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        reason = _reason(module, quantizer, gram)
        if not reason and gram is not None:
            with self._context.access(module, write=True), torch.no_grad():
                reason = self._rounded(name, module, quantizer, gram)
        if reason:
            log.warning("%s is rounded to nearest: %s", name, reason)

    def _rounded(self, name: str, module: nn.Module, quantizer: TensorQuantizer, gram: Gram) -> str:
        """Round a weight; return why not, nothing if it was."""
        order = self._order_of(gram)
        if order is None:
            return "the Gram matrix of its inputs has no Cholesky factor"
        parameter = getattr(module, quantizer.tensor or "")
        first = self._done.setdefault(id(parameter), quantizer)
        if first is not quantizer:
            _take_range(quantizer, parameter, first)
            return ""
        self._context.remember(module, quantizer.tensor or "")
        if self._scales == "mse":
            _search(quantizer, parameter.detach(), gram, order)
        weight = parameter.detach().float()
        found = _round(name, quantizer, weight, gram, order, block=self._block, passes=self._passes)
        parameter.copy_((found.targets if self._keeps else found.rounded).to(parameter.dtype))
        quantizer.clear_cache()
        if quantizer.then is not None:
            quantizer.then.calibrate_on(found.rounded.to(parameter.dtype))
        return ""

    def _order_of(self, gram: Gram) -> _Order | None:
        last, order = self._factors
        if last is None or last.matrix is not gram.matrix:
            order = _order(gram, damp=self._damp, by_size=self._by_size)
            self._factors = gram, order
        return order


@dataclass(frozen=True, eq=False)
class _Order:
    """An order of the columns, and the factors in that order.

    Attributes:
        index: Which column comes when, ``(parts, inputs)``; ``None``: as they lie.
        matrix: The Gram matrix in that order, damped.
        factor: Its factors.
    """

    index: Tensor | None
    matrix: Tensor
    factor: Factor

    def sort(self, values: Tensor) -> Tensor:
        """Return numbers ``(parts, .., inputs)`` in this order."""
        return values if self.index is None else values.gather(-1, self._wide(values))

    def unsort(self, values: Tensor) -> Tensor:
        """Undo `sort`."""
        if self.index is None:
            return values
        return torch.empty_like(values).scatter_(-1, self._wide(values), values)

    def _wide(self, values: Tensor) -> Tensor:
        assert self.index is not None
        return (self.index if values.dim() == 2 else self.index.unsqueeze(1)).expand_as(values)


def _order(gram: Gram, *, damp: float, by_size: bool) -> _Order | None:
    """Return an order with its factors, ``None`` where there are none."""
    matrix, index = gram.matrix, None
    if by_size:
        index = matrix.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        matrix = matrix.gather(-2, index.unsqueeze(-1).expand_as(matrix))
        matrix = matrix.gather(-1, index.unsqueeze(-2).expand_as(matrix))
    factor = factorize(matrix, damp=damp)
    return None if factor is None else _Order(index, factor.damped(matrix), factor)


def _reason(module: nn.Module, quantizer: TensorQuantizer, gram: Gram | None) -> str:
    """Return why a weight has to be rounded to nearest, nothing if it has not."""
    parameter = module._parameters.get(quantizer.tensor or "")
    if parameter is None:
        return "it is no parameter but computed from others"
    if isinstance(parameter, PackedWeight):
        return "it is packed already"
    if quantizer.transforms is not None:
        return "its quantizer does more than rounding"
    if quantizer.spec.dynamic or quantizer.range is None:
        return "its scales are not static"
    if gram is None:
        return "the data did not reach it, or it is not read by a product of matrices"
    return ""


def _take_range(quantizer: TensorQuantizer, weight: Tensor, first: TensorQuantizer) -> None:
    """Give a quantizer of a weight that is rounded already the range it was rounded in."""
    if quantizer.spec == first.spec and first.range is not None:
        quantizer.load_state(first.state())
    else:  # it reads the numbers that the other one rounded
        quantizer.calibrate_on(weight.detach())


def _search(quantizer: TensorQuantizer, weight: Tensor, gram: Gram, order: _Order) -> None:
    """Give a weight, which is at max, the range with the least error of the outputs."""
    values, spec, layout = quantizer.range, quantizer.spec, gram.layout
    if values is None or spec.constant_amax is not None:
        return
    cost = order.unsort(order.factor.cost)
    cost = (cost / cost.mean(-1, keepdim=True)).unsqueeze(1)
    wide = layout.weight(cost.expand(layout.matrices(weight).shape), weight.shape)
    clip = best_multiple(
        weight,
        values,
        spec,
        candidates=multipliers(spec, octaves=1)[::2],
        error=lambda rounded, x: squared(rounded, x).mul_(wide),
    )
    quantizer.calibrate_on(weight, global_amax=values.global_amax, clip=clip)


@dataclass(frozen=True, eq=False)
class _Rounded:
    """A weight, as it was rounded, and what was rounded to that; float32."""

    rounded: Tensor
    targets: Tensor


def _round(
    name: str,
    quantizer: TensorQuantizer,
    weight: Tensor,
    gram: Gram,
    order: _Order,
    *,
    block: int,
    passes: int,
) -> _Rounded:
    """Round a weight, float32."""
    spec, layout, scales = quantizer.spec, gram.layout, quantizer.scales
    assert scales is not None
    matrices = layout.matrices(weight)
    rounding = _Rounding(quantizer, scales, weight, gram, order)
    sorted_ = order.sort(matrices)
    found = round_columns(sorted_, order.factor, rounding.column, block=block)
    for _ in range(passes):
        found = refine_columns(sorted_, found, order.matrix, rounding.column, block=block)
    found, targets = order.unsort(found), order.unsort(rounding.targets)
    nearest = layout.matrices(fake_quantize(weight, spec, scales))
    errors, plain = (errors_of(x - matrices, gram.matrix) for x in (found, nearest))
    worse = ~(errors < plain)
    found = torch.where(worse.unsqueeze(-1), nearest, found)
    targets = torch.where(worse.unsqueeze(-1), matrices, targets)
    log.info(
        "%s: the squared error of its outputs is %.3g of that of rounding to nearest",
        name,
        float(torch.where(worse, plain, errors).sum() / plain.sum().clamp_min(1e-30)),
    )
    rounded = fake_quantize(layout.weight(found, weight.shape), spec, scales)
    return _Rounded(rounded, layout.weight(targets, weight.shape))


class _Rounding:
    """Rounds single columns of a weight by its format's rule, and keeps what they were."""

    def __init__(
        self, quantizer: TensorQuantizer, scales: Scales, weight: Tensor, gram: Gram, order: _Order
    ) -> None:
        granularity = quantizer.spec.granularity

        def columns(values: Tensor) -> Tensor:
            """Return one number per element of the weight, ``(inputs, parts, outputs)``."""
            shape = as_blocks(weight, granularity).shape
            wide = expand_scale(values, granularity).expand(shape)
            wide = from_blocks(wide, granularity, weight.shape).expand_as(weight)
            sorted_ = order.sort(gram.layout.matrices(wide))
            return sorted_.permute(2, 0, 1).contiguous()

        self._codec = quantizer.codec
        self._step = columns(scales.step)
        self._targets = torch.empty_like(self._step)
        self._zero = None if scales.zero_point is None else columns(scales.zero_point)

    def column(self, j: int, x: Tensor) -> Tensor:
        """Return column ``j``, rounded."""
        self._targets[j] = x
        step = self._step[j]
        values = x / step
        if self._zero is None:
            return self._codec.round_(values).mul_(step)
        zero = self._zero[j]
        return self._codec.round_(values.round_().add_(zero)).sub_(zero).mul_(step)

    @property
    def targets(self) -> Tensor:
        """What was rounded last, ``(parts, outputs, inputs)`` in their order."""
        return self._targets.permute(1, 2, 0)
