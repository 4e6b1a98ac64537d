"""What calibration saw too little of: experts without tokens, tensors beyond their ranges."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.calibration.gram import Gram
from bittern.calibration.histogram import Histogram
from bittern.calibration.shared import union
from bittern.nn import TensorQuantizer, named_quantizers, original_class

__all__ = ["borrow_ranges", "note_experts", "note_grams", "note_saturation"]

log = logging.getLogger("bittern.calibration")


def note_experts(
    context: CalibrationContext, name: str, seen: Tensor, *, instead: str = ""
) -> None:
    """Note which experts no token went through.

    Args:
        context: Keeps it for the report.
        name: Name of the quantizer.
        seen: Whether each expert saw one, ``(experts,)``.
        instead: What is done without, for the log.
    """
    missing = tuple(int(index) for index in (~seen.bool()).nonzero().flatten())
    if missing:
        context.unseen_experts[name] = missing
        some = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        what = f"{len(missing)} of {len(seen)} experts saw no token: {some}"
        log.warning("%s: %s%s", name, what, f"; {instead}" if instead else "")


def note_grams(context: CalibrationContext, grams: Mapping[str, Gram]) -> None:
    """Note the experts whose weights no token was multiplied with.

    Args:
        context: Keeps it for the report.
        grams: Name of the weight's quantizer to its statistics.
    """
    for name, gram in grams.items():
        if len(gram.tokens) > 1:
            instead = "their weights are quantized as without data"
            note_experts(context, name, gram.tokens > 0, instead=instead)


def note_saturation(
    context: CalibrationContext, name: str, histogram: Histogram, amax: Tensor
) -> None:
    """Note which share of what was seen lies beyond the range, but for one bin.

    Args:
        context: Keeps it for the report.
        name: Name of the quantizer.
        histogram: What it saw.
        amax: Its range, in the granularity's shape.
    """
    lower = histogram.edges[:, :-1]  # of all bins but that of the zeros
    beyond = histogram.counts[:, 1:][lower >= amax.reshape(-1, 1).to(lower.device)].sum()
    total = histogram.counts.sum()
    context.saturation[name] = int(beyond) / max(int(total), 1)


def borrow_ranges(model: nn.Module) -> tuple[str, ...]:
    """Give activation quantizers that saw no data the largest range of those like them.

    Those are in modules of one class and the same shapes whose paths differ in the last number, as
    those of experts do, and have the same spec. Where none of them saw data, nothing is done.

    Args:
        model: A converted model, after calibration.

    Returns:
        Names of the quantizers that were given a range.
    """
    modules = dict(model.named_modules())
    kinds: dict[object, list[tuple[str, TensorQuantizer]]] = {}
    for name, quantizer in named_quantizers(model):
        path, _, slot = name.rpartition(".")
        if quantizer.tensor is None and not quantizer.spec.dynamic and path in modules:
            kind = (_family(path), slot, repr(quantizer.spec), _shapes(modules[path]))
            kinds.setdefault(kind, []).append((name, quantizer))
    borrowed = []
    for alike in kinds.values():
        known = [q.range for _, q in alike if q.range is not None]
        for name, quantizer in alike if known else ():
            if not quantizer.calibrated and quantizer.then is None:
                quantizer.set_range(union(known[0], known))
                borrowed.append(name)
                log.warning(
                    "%s saw no data; it gets the largest range of %d others", name, len(known)
                )
    return tuple(borrowed)


def _family(path: str) -> tuple[str, ...]:
    """Return a path without its last number."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    return tuple("*" if i == last else part for i, part in enumerate(parts))


def _shapes(module: nn.Module) -> object:
    own = module.named_parameters(recurse=False)
    return original_class(module), tuple((name, tuple(p.shape)) for name, p in own)
