"""AWQ: scales input channels so that those which matter most are rounded least.

Multiplying column ``j`` of a weight by ``s[j]`` and dividing channel ``j`` of its input by it
leaves the product as it is, but moves rounding errors between columns (Lin et al., AWQ, MLSys
2024). ``s`` is ``x^a / w^(1 - a)`` of the root mean square ``x`` of the channel and the mean
magnitude ``w`` of the column within its groups; ``a`` is tried on a grid. What rounding costs
follows from the Gram matrix ``H`` of the inputs, ``tr(D H D^T)`` with ``D = Q(W s) / s - W``, so
one data pass serves the whole grid. Where inputs are rounded as well, what that costs is measured
on a sample of tokens. The device is not waited for while the grid is tried.

Division by ``s`` goes into what makes the input, where the trace finds that; else into a pre-scale
of the input quantizer, where there is one. Then the range of every group is searched (`weighted`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.coverage import note_grams
from bittern.calibration.gram import Gram, observe_grams, outer, planned_weights, product
from bittern.calibration.max import run_max
from bittern.calibration.moves import move
from bittern.calibration.sample import TokenSample, gathered
from bittern.calibration.weighted import search_range
from bittern.errors import CalibrationError
from bittern.nn import QuantModule, TensorQuantizer
from bittern.numerics import fake_quantize, measure
from bittern.numerics.layout import as_blocks, expand_scale, from_blocks
from bittern.records import Fold, Plan

__all__ = ["run_awq"]

log = logging.getLogger("bittern.calibration")

_LIMIT = 1e4  # of the reference implementations


def run_awq(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    scale: bool = True,
    clip: bool = True,
    pre_scale: bool = True,
    steps: int = 10,
    tokens: int = 512,
) -> None:
    """Scale the input channels of linears and search the ranges of all weights.

    Static activations are calibrated at max afterwards. A weight that no data reaches keeps its
    scale and its largest magnitude as its range.

    Args:
        model: The converted model; its weights change, its unquantized function does not.
        plan: Its plan.
        forward: Runs the data.
        context: Services; gives the trace.
        scale: Whether to scale channels.
        clip: Whether to search ranges; at max otherwise.
        pre_scale: Whether inputs that no producer can scale are scaled by their quantizer.
        steps: Exponents that are tried besides 0.
        tokens: How many tokens are kept to see what rounding the inputs costs.

    Raises:
        CalibrationError: There is no data, an option is out of range, or NaN or Inf was met.
    """
    if forward is None:
        raise CalibrationError("awq needs calibration data", hint="give data (--data FILE)")
    for name, value in (("steps", steps), ("tokens", tokens)):
        if value < 1:
            raise CalibrationError(f"awq's {name} is {value}", hint="give at least 1")
    weights = planned_weights(model, plan)
    with _sampled(model, weights, context, limit=tokens) as samples:
        grams = observe_grams(model, plan, forward, context, quantized=False)
    note_grams(context, grams)
    tokens_of = gathered(samples)
    divisors: dict[str, Tensor] = {}
    if scale:
        searched = {n: _Weight.of(model, n, q, grams, tokens_of) for n, q in weights.items()}
        known = {name: weight for name, weight in searched.items() if weight is not None}
        for group in _groups(model, known, context, pre_scale=pre_scale):
            factor = _best_factor(group, context, steps=steps)
            _apply(model, group, factor, context)
            divisors |= {weight.name: group.wide(weight, factor) for weight in group.weights}
    run_max(model, plan, forward, context)
    for name, quantizer in weights.items() if clip else ():
        if name in grams:
            module = model.get_submodule(name.rpartition(".")[0])
            gram = grams[name] if name not in divisors else _divided(grams[name], divisors[name])
            search_range(module, quantizer, gram, context)


@dataclass(frozen=True)
class _Weight:
    """A matrix whose columns can be scaled.

    Attributes:
        name: Path of its quantizer.
        module: Its module.
        quantizer: Its quantizer.
        gram: What it is multiplied with.
        tokens: By how many of them.
        sample: Some rows of that, if they are rounded, and their quantizer.
    """

    name: str
    module: QuantModule
    quantizer: TensorQuantizer
    gram: Gram
    tokens: int
    sample: tuple[Tensor | None, TensorQuantizer] | None

    @staticmethod
    def of(
        model: nn.Module,
        name: str,
        quantizer: TensorQuantizer,
        grams: Mapping[str, Gram],
        tokens: Mapping[str, Tensor | None],
    ) -> _Weight | None:
        """Return the weight, if it is a plain matrix that data reached."""
        path, gram = name.rpartition(".")[0], grams.get(name)
        module = model.get_submodule(path)
        assert isinstance(module, QuantModule)
        reads = module.quantizer("input")
        if gram is None or gram.layout.parts != 1:
            return None
        count = int(gram.tokens)
        rank = getattr(module, quantizer.tensor or "").dim()
        moved = any(q is not None and _moved(q) for q in (quantizer, reads))
        if not count or rank != 2 or moved or quantizer.spec.constant_amax is not None:
            return None
        seen = None if reads is None else (tokens[path], reads)
        return _Weight(name, module, quantizer, gram, count, seen)

    def reads_like(self, other: _Weight) -> bool:
        """Return whether another weight of its group reads the same rows, rounded alike."""
        if self.sample is None or other.sample is None:
            return False
        (rows, reads), (theirs, quantizer) = self.sample, other.sample
        alike = rows is not None and theirs is not None and rows.shape == theirs.shape
        return alike and self.gram.matrix is other.gram.matrix and reads.spec == quantizer.spec


@dataclass(frozen=True)
class _Group:
    """Weights that read one tensor, whose channels get one scale.

    Attributes:
        weights: The weights.
        index: Name of a weight to the input features of each coordinate, ``(coordinates, k)``.
        fold: Where the scale goes; ``None`` for pre-scales.
    """

    weights: tuple[_Weight, ...]
    index: Mapping[str, Tensor]
    fold: Fold | None

    @staticmethod
    def of(weights: Sequence[_Weight], index: Mapping[str, Tensor], fold: Fold | None) -> _Group:
        """Return the group; its indices lie beside the statistics."""
        near = {w.name: index[w.name].to(w.gram.matrix.device) for w in weights}
        return _Group(tuple(weights), near, fold)

    def wide(self, weight: _Weight, factor: Tensor) -> Tensor:
        """Return a factor per coordinate as one per input feature."""
        index = self.index[weight.name].to(factor.device)
        found = factor.new_ones(weight.gram.layout.inputs)
        found[index] = factor[:, None].expand(index.shape)
        return found

    def narrow(self, weight: _Weight, values: Tensor) -> Tensor:
        """Return the means over the input features of each coordinate."""
        return values[self.index[weight.name].to(values.device)].mean(1)


def _moved(quantizer: TensorQuantizer) -> bool:
    """Return whether a tensor is not rounded in the channels it comes in."""
    return quantizer.spec.rotation is not None or quantizer.spec.affine is not None


@contextmanager
def _sampled(
    model: nn.Module,
    weights: Collection[str],
    context: CalibrationContext,
    *,
    limit: int,
) -> Iterator[dict[str, TokenSample]]:
    """Keep some tokens of every input that is quantized, by module."""
    found: dict[str, TokenSample] = {}
    watched = []
    for path in dict.fromkeys(name.rpartition(".")[0] for name in weights):
        quantizer = context.quantizer(model, path, "input")
        if quantizer is not None:
            found[path] = TokenSample(context.shared, limit=limit)
            quantizer.observer = found[path]
            watched.append(quantizer)
    try:
        yield found
    finally:
        for quantizer in watched:
            quantizer.observer = None


def _groups(
    model: nn.Module,
    weights: Mapping[str, _Weight],
    context: CalibrationContext,
    *,
    pre_scale: bool,
) -> Iterator[_Group]:
    """Yield what gets a scale of its own; no weight twice."""
    trace = context.trace()
    named = {f"{w.name.rpartition('.')[0]}.{w.quantizer.tensor}": w for w in weights.values()}
    taken: set[str] = set()
    for fold in trace.foldable if trace is not None else ():
        members = {f"{member.module}.{member.tensor}": member for member in fold.divided}
        read = [named[name] for name in members if name in named]
        if len(read) == len(fold.divided) and not taken & {w.name for w in read}:
            taken |= {w.name for w in read}
            index = {w.name: m.index for w, m in zip(read, members.values(), strict=True)}
            yield _Group.of(read, index, fold)
    shared = {path: group for group in (trace.shared_inputs if trace else ()) for path in group}
    left: list[str] = []
    for name, weight in weights.items():
        if name in taken:
            continue
        path = name.rpartition(".")[0]
        beside = set(shared.get(path, (path,)))
        read = [w for n, w in weights.items() if n not in taken and n.rpartition(".")[0] in beside]
        taken |= {w.name for w in read}
        if pre_scale and all(w.sample is not None for w in read):
            columns = torch.arange(weight.gram.layout.inputs)[:, None]
            yield _Group.of(read, {w.name: columns for w in read}, None)
        else:
            left += [w.name.rpartition(".")[0] for w in read]
    if left:
        log.info("not scaled, for want of a producer: %s", ", ".join(left))


@torch.no_grad()
def _best_factor(group: _Group, context: CalibrationContext, *, steps: int) -> Tensor:
    """Return the factor of the grid with the least error of the outputs, one per coordinate."""
    first = group.weights[0]
    inputs = group.narrow(first, first.gram.matrix[0].diagonal() / first.tokens).sqrt()
    with ExitStack() as stack:
        for weight in group.weights:
            stack.enter_context(context.access(weight.module, write=False))
        columns = [_column_sizes(weight, group).to(inputs.device) for weight in group.weights]
        sizes = torch.stack(columns).mean(0)
        factors = [torch.ones_like(inputs)]
        factors += [_factor(inputs, sizes, step / steps) for step in range(steps + 1)]
        errors = torch.stack([_error(group, factor) for factor in factors])
    best = errors.argmin()
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: factor %d of %d", first.name, int(best), len(factors))
    return torch.stack(factors).index_select(0, best[None])[0]


def _factor(inputs: Tensor, sizes: Tensor, alpha: float) -> Tensor:
    """Return ``x^a / w^(1 - a)``, around 1."""
    usable = (inputs > 0) & (sizes > 0)
    exponent = alpha * inputs.log2() - (1 - alpha) * sizes.log2()
    high = torch.where(usable, exponent, -torch.inf).amax()
    low = torch.where(usable, exponent, torch.inf).amin()
    middle = (high + low) / 2  # NaN where nothing is usable
    found = torch.exp2(torch.where(usable, exponent - middle, 0))
    return found.clamp(1 / _LIMIT, _LIMIT)


def _column_sizes(weight: _Weight, group: _Group) -> Tensor:
    """Return the mean magnitude of the columns, in units of the largest of their groups."""
    tensor, granularity = _tensor(weight), weight.quantizer.spec.granularity
    largest = expand_scale(measure(tensor, weight.quantizer.spec).amax, granularity)
    share = as_blocks(tensor.abs(), granularity) / largest.clamp_min(torch.finfo().tiny)
    share = weight.gram.layout.matrices(from_blocks(share, granularity, tensor.shape))[0]
    return group.narrow(weight, share.mean(0))


def _error(group: _Group, factor: Tensor) -> Tensor:
    """Return what rounding the weights and the inputs costs at a factor, per token.

    ``tr(D H D^T)`` is the sum over ``D^T D * H``, and half of a symmetric product needs no work.
    """
    total = torch.zeros((), device=factor.device)
    moves: list[tuple[_Weight, Tensor]] = []
    for weight, wide, rounded in _rounded(group, factor):
        rows, reads = weight.sample if weight.sample is not None else (None, None)
        if rows is not None and reads is not None:
            moved = next((known for other, known in moves if weight.reads_like(other)), None)
            if moved is None:  # q, k and v read the same rows
                scaled = rows / wide
                moved = _operand(fake_quantize(scaled, reads.spec).sub_(scaled).t())
                moves.append((weight, moved))
            total = total + product(moved, _operand(rounded.t())).square_().sum() / len(rows)
        change = (rounded / wide).sub_(weight.gram.layout.matrices(_tensor(weight))[0])
        spent = outer(_operand(change))[0].mul_(weight.gram.matrix[0]).sum()
        total = total + spent / weight.tokens
    return total


def _operand(errors: Tensor) -> Tensor:
    """Return a matrix as a GPU multiplies it fast; sums are in float32 everywhere.

    Rounding the errors to 8 bits changes what they add up to by 1e-6 to 1e-4 of it, measured
    against float64; the factors that are compared differ by far more.
    """
    return (errors.bfloat16() if errors.device.type == "cuda" else errors).unsqueeze(0)


def _rounded(group: _Group, factor: Tensor) -> Iterator[tuple[_Weight, Tensor, Tensor]]:
    """Yield each weight, its factor by input feature, and its rounded scaled matrix."""
    scaled = []
    for weight in group.weights:
        layout, wide, tensor = weight.gram.layout, group.wide(weight, factor), _tensor(weight)
        scaled.append((weight, wide, layout.weight(layout.matrices(tensor) * wide, tensor.shape)))
    whole = None
    if all(weight.quantizer.codec.two_level for weight in group.weights):  # as engines fuse them
        whole = torch.stack([tensor.abs().amax() for _, _, tensor in scaled]).amax()
    for weight, wide, tensor in scaled:
        weight.quantizer.calibrate_on(tensor, global_amax=whole, check=False)
        yield weight, wide, weight.gram.layout.matrices(weight.quantizer(tensor))[0]


def _tensor(weight: _Weight) -> Tensor:
    found: Tensor = getattr(weight.module, weight.quantizer.tensor or "")
    return found.detach().float()


@torch.no_grad()
def _apply(model: nn.Module, group: _Group, factor: Tensor, context: CalibrationContext) -> None:
    """Scale the weights, and what they read the other way round."""
    if bool((factor == 1).all()):
        return
    if group.fold is not None:
        for member in (*group.fold.scaled, *group.fold.divided):
            module = model.get_submodule(member.module)
            with context.access(module, write=True):
                context.remember(module, member.tensor)
        move(model, group.fold, factor, context)
        return
    for weight in group.weights:
        wide, layout = group.wide(weight, factor), weight.gram.layout
        with context.access(weight.module, write=True):
            context.remember(weight.module, weight.quantizer.tensor or "")
            tensor = getattr(weight.module, weight.quantizer.tensor or "")
            tensor.copy_(layout.weight(layout.matrices(tensor.float()) * wide, tensor.shape))
        reads = weight.module.quantizer("input")
        assert reads is not None
        before = None if reads.transforms is None else reads.transforms.pre_scale
        context.undo.append(partial(reads.set_pre_scale, before))
        reads.set_pre_scale(1 / wide if before is None else before / wide)


def _divided(gram: Gram, wide: Tensor) -> Gram:
    """Return the Gram matrix of inputs that are divided by a factor."""
    return replace(gram, matrix=gram.matrix / wide / wide[:, None])
