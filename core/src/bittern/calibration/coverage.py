"""What calibration saw too little of: experts without tokens, tensors beyond their ranges."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from bittern.calibration.context import CalibrationContext
from bittern.calibration.gram import Gram
from bittern.calibration.histogram import Histogram

__all__ = ["note_experts", "note_grams", "note_saturation"]

log = logging.getLogger("bittern.calibration")


def note_experts(context: CalibrationContext, name: str, seen: Tensor) -> None:
    """Note which experts no token went through.

    Args:
        context: Keeps it for the report.
        name: Name of the quantizer.
        seen: Whether each expert saw one, ``(experts,)``.
    """
    missing = tuple(int(index) for index in (~seen.bool()).nonzero().flatten())
    if missing:
        context.unseen_experts[name] = missing
        some = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        log.warning("%s: %d of %d experts saw no token: %s", name, len(missing), len(seen), some)


def note_grams(context: CalibrationContext, grams: Mapping[str, Gram]) -> None:
    """Note the experts whose weights no token was multiplied with.

    Args:
        context: Keeps it for the report.
        grams: Name of the weight's quantizer to its statistics.
    """
    for name, gram in grams.items():
        if len(gram.tokens) > 1:
            note_experts(context, name, gram.tokens > 0)


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
