"""SVDQuant: a low-rank branch beside each weight takes what is hardest to round.

Of a weight ``W`` only the rest ``W - B A`` is quantized; the branch of rank 32 is computed in full
precision, on inputs that are not rounded (Li et al., SVDQuant, ICLR 2025, section 4). What rounding
costs is, per element of the rest, in proportion to its size and to that of the input it multiplies,
whether the error is the weight's or the input's. So the branch is the best approximation of ``W``
with its columns multiplied by ``sqrt(mean x_j^2)``: the truncated singular value decomposition of
that, divided by the same afterwards. The paper takes that of ``W`` itself, after smoothing, which
has scaled the columns in part.

Then the branch also makes up for the rounding it can see. With the rounded rest ``Q`` fixed, the
outputs are closest to the original ones where ``B A`` is the best approximation of ``W - Q`` in the
metric of the inputs' Gram matrix (the alternation of LoftQ, Li et al., ICLR 2024, weighted); with
``B A`` fixed, ``Q`` is ``W - B A``, rounded. A round that makes the outputs worse is not taken.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.gram import Gram, observe_grams
from bittern.calibration.max import run_max
from bittern.calibration.search import best_range, multipliers
from bittern.errors import CalibrationError
from bittern.nn import QuantModule, TensorQuantizer
from bittern.nn.lowrank import LowRank
from bittern.records import Plan, PlanEntry

__all__ = ["Metric", "factors", "run_svdquant"]

log = logging.getLogger("bittern.calibration")

_SMALLEST = 1e-4  # what an input weighs at least, as a share of the mean
_SPARE, _STEPS = 16, 6  # of the subspace iteration
_DAMP = 0.01  # the same of every direction


@dataclass(frozen=True, eq=False)
class Metric:
    """How much errors of a matrix ``(outputs, inputs)`` count: ``|E root|^2``, float64.

    Attributes:
        root: Shape ``(inputs, inputs)``.
        inverse: Its inverse.
    """

    root: Tensor
    inverse: Tensor


def run_svdquant(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    rank: int = 32,
    rounds: int = 8,
    search: bool = True,
) -> None:
    """Give planned linear layers a low-rank branch, and set all ranges to the largest magnitudes.

    A smoothing step may come before. Layers without a branch in their forward pass, those with
    weights of a stack of experts among them, are quantized as they are.

    Args:
        model: The converted model; its parameters stay as they are.
        plan: Its plan.
        forward: Runs the data.
        context: Services.
        rank: Columns of the branch; a matrix with fewer rows or columns gets as many.
        rounds: How often the branch is fitted to the rounded weight.
        search: Whether to search the ranges of the rest for the least rounding error; at max
            otherwise.

    Raises:
        CalibrationError: ``rank`` or ``rounds`` is out of range, there is no data; or NaN or Inf
            was met, names the module.
    """
    _check("rank", rank, least=1)
    _check("rounds", rounds, least=0)
    if forward is None:
        raise CalibrationError(
            "svdquant needs data: it weighs the columns of weights by their inputs",
            hint="give calibration data (--data FILE)",
        )
    entries = {entry.path: entry for entry in plan.entries if _branched(model, entry)}
    modules = {entry.module for entry in entries.values()}
    grams = observe_grams(model, plan, forward, context, modules=modules, quantized=False)
    metrics: dict[int, tuple[Metric, Metric]] = {}
    for path, entry in entries.items():
        gram = grams.get(path)
        if gram is None or int(gram.tokens.sum()) == 0:
            log.warning("%s has no low-rank branch: no data reached it", path)
            continue
        if id(gram.matrix) not in metrics:  # q, k and v share one
            metrics[id(gram.matrix)] = _metrics(gram)
        _add(
            model,
            entry,
            metrics[id(gram.matrix)],
            context,
            rank=int(rank),
            rounds=int(rounds),
            search=search,
        )
    left = sorted({e.module for e in plan.entries if e.kind == "weight"} - modules)
    if left:
        log.info("without a low-rank branch, for want of a place: %s", ", ".join(left))
    run_max(model, plan, forward, context)  # weights that read one tensor share a global scale
    for entry in entries.values() if search else ():
        module = model.get_submodule(entry.module)
        assert isinstance(module, QuantModule)
        quantizer = module.quantizer(entry.slot)
        assert quantizer is not None
        with context.access(module, write=False):
            _search(quantizer, getattr(module, entry.tensor or "").detach())


@torch.no_grad()
def _search(quantizer: TensorQuantizer, weight: Tensor) -> None:
    """Give the rest of a weight the ranges with the least rounding error; they are at max."""
    spec, largest, transforms = quantizer.spec, quantizer.range, quantizer.transforms
    fixed = spec.dynamic or spec.constant_amax is not None or spec.then is not None
    if fixed or quantizer.codec.fitted or largest is None or transforms is None:
        return
    rest, _ = transforms.prepare(weight.float())
    quantizer.set_range(best_range(rest, largest, spec, candidates=multipliers(spec, octaves=1)))


def _check(name: str, value: float, *, least: int) -> None:
    if value < least or value != int(value):
        raise CalibrationError(
            f"{name} is {value}", hint=f"choose a whole number of at least {least}"
        )


def _branched(model: nn.Module, entry: PlanEntry) -> bool:
    """Return whether a planned weight can have a branch."""
    module = model.get_submodule(entry.module)
    if entry.slot != "weight" or not isinstance(module, QuantModule) or not module.branched:
        return False
    spec = entry.spec
    return spec.rotation is None and spec.affine is None and not spec.stacked


def _metrics(gram: Gram) -> tuple[Metric, Metric]:
    """Return the metric of errors that know nothing of each other, and that of any errors."""
    matrix = gram.matrix[0].double() / gram.tokens[0].to(gram.matrix.device)
    sizes = matrix.diagonal()
    floor = sizes.mean() * _SMALLEST
    if not bool(floor > 0):  # inputs that are all 0
        unit = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
        return Metric(unit, unit), Metric(unit, unit)
    apart = sizes.clamp_min(floor).sqrt()
    values, vectors = torch.linalg.eigh(matrix)
    scales = values.clamp_min(0).add(sizes.mean() * _DAMP).sqrt()
    return (
        Metric(apart.diag(), (1 / apart).diag()),
        Metric(vectors * scales, (vectors / scales).t()),
    )


def factors(matrix: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors ``B, A`` of the best approximation of a matrix in a metric.

    By Eckart and Young the truncated decomposition of ``matrix @ root``, taken back.

    Args:
        matrix: Shape ``(outputs, inputs)``.
        metric: The metric.
        rank: How many columns ``B`` has, at most the matrix's rank.

    Returns:
        Float64, ``(outputs, rank)`` and ``(rank, inputs)``, of like magnitude.
    """
    u, values, vt = _leading(matrix.double() @ metric.root, rank)
    kept = values.sqrt()
    return u * kept, kept[:, None] * (vt @ metric.inverse)


@torch.no_grad()
def _add(
    model: nn.Module,
    entry: PlanEntry,
    metrics: tuple[Metric, Metric],
    context: CalibrationContext,
    *,
    rank: int,
    rounds: int,
    search: bool,
) -> None:
    """Give one layer its branch."""
    module = model.get_submodule(entry.module)
    assert isinstance(module, QuantModule)
    quantizer = module.quantizer(entry.slot)
    assert quantizer is not None
    before = None if quantizer.transforms is None else quantizer.transforms.low_rank
    context.undo.append(partial(quantizer.set_low_rank, before))
    slot = entry.slot_rule
    inputs_first = slot is not None and slot.group_axis % 2 == 0
    apart, whole = metrics
    with context.access(module, write=False):
        parameter: Tensor = getattr(module, entry.tensor or "").detach()
        quantizer.set_low_rank(None)
        wide = parameter.float()
        assert quantizer.transforms is not None
        goal = _turned(quantizer.transforms.passed(wide), inputs_first).double()

        def put(b: Tensor, a: Tensor) -> Tensor:
            """Set a branch, and return what the whole weight misses by."""
            left, right = (a.t(), b.t()) if inputs_first else (b, a)
            quantizer.set_low_rank(LowRank(left.to(parameter), right.to(parameter)))
            quantizer.calibrate_on(parameter)
            if search:
                _search(quantizer, parameter)
            rest = _turned(quantizer(wide), inputs_first).double()
            return goal - rest - b @ a

        kept = factors(goal, apart, rank)
        missing = put(*kept)
        first = least = float((missing @ whole.root).square().sum())
        for _ in range(rounds):
            b, a = kept
            other = factors(missing + b @ a, whole, rank)
            found = put(*other)
            cost = float((found @ whole.root).square().sum())
            if cost >= least:
                put(*kept)
                break
            kept, missing, least = other, found, cost
    log.debug("%s: fitting leaves %.3f of the error", entry.path, least / first if first else 1.0)


def _turned(matrix: Tensor, inputs_first: bool) -> Tensor:
    return matrix.t() if inputs_first else matrix


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and values, by subspace iteration where that is cheaper.

    Halko, Martinsson and Tropp, Finding Structure with Randomness, 2011, algorithm 4.4; the start
    is the same every time.
    """
    width = rank + _SPARE
    if min(matrix.shape) <= 2 * width:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], values[:rank], vt[:rank]
    start = torch.randn(
        matrix.shape[1], width, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)
    )
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    u, values, vt = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], values[:rank], vt[:rank]
