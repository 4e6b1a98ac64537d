"""Searches the ranges of weights for the least error of what they are multiplied with.

Rounding a weight by ``D`` moves the outputs by ``tr(D H D^T)``, with the Gram matrix ``H`` of the
inputs. For a group of inputs that share a scale the search sees the part of it that lies within the
group: the blocks of ``H`` on its diagonal. That is the clip search of AWQ (Lin et al., MLSys 2024,
section 3.2), for all tokens, at a price that does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext
from bittern.calibration.gram import Gram
from bittern.calibration.products import MatrixLayout
from bittern.calibration.search import Error, best_multiple, multipliers
from bittern.nn import TensorQuantizer
from bittern.records import PerBlock, PerGroup, QuantizerSpec

__all__ = ["gram_error", "search_range"]

_WIDEST = 128  # inputs that are taken together; what lies further off the diagonal counts as 0


def gram_error(gram: Gram, spec: QuantizerSpec, *, rank: int) -> Error:
    """Return the cost of rounding a weight, as seen in its outputs.

    Args:
        gram: What the weight is multiplied with.
        spec: How the weight is quantized.
        rank: Its number of dimensions.
    """
    width = _width(gram.layout, spec, rank)
    inputs, spare = gram.layout.inputs, -gram.layout.inputs % width
    mean = gram.matrix / gram.tokens.clamp_min(1).to(gram.matrix).reshape(-1, 1, 1)
    padded = F.pad(mean, (0, spare, 0, spare))
    count = padded.shape[-1] // width
    blocks = padded.reshape(-1, count, width, count, width).diagonal(dim1=1, dim2=3)
    blocks = blocks.permute(0, 3, 1, 2).contiguous()  # (parts, blocks, width, width)

    def error(rounded: Tensor, x: Tensor) -> Tensor:
        change = F.pad(gram.layout.matrices(rounded - x), (0, spare))
        parts = change.reshape(*change.shape[:2], count, width).transpose(1, 2)
        costs = (parts @ blocks.to(x.device)).mul_(parts).transpose(1, 2).flatten(-2)
        return gram.layout.weight(costs[..., :inputs], x.shape)

    return error


def search_range(
    module: nn.Module,
    quantizer: TensorQuantizer,
    gram: Gram,
    context: CalibrationContext,
    *,
    candidates: Sequence[float] | None = None,
) -> None:
    """Give a weight, which is at max, the range with the least error of its outputs.

    Args:
        module: The module.
        quantizer: That of its weight.
        gram: What the weight is multiplied with.
        context: Gives the weight.
        candidates: Multiples of the largest magnitude; by default those of the mse search that are
            at least a half.
    """
    values, spec = quantizer.range, quantizer.spec
    fixed = spec.dynamic or spec.constant_amax is not None or quantizer.transforms is not None
    if values is None or fixed:
        return
    candidates = multipliers(spec, octaves=1)[::2] if candidates is None else candidates
    with context.access(module, write=False):
        weight: Tensor = getattr(module, quantizer.tensor or "").detach()
        error = gram_error(gram, spec, rank=weight.dim())
        clip = best_multiple(weight, values, spec, candidates=candidates, error=error)
        quantizer.calibrate_on(weight, global_amax=values.global_amax, clip=clip)


def _width(layout: MatrixLayout, spec: QuantizerSpec, rank: int) -> int:
    """Return how many inputs are taken together: those of a group, as far as they lie in a row."""
    axis = -2 if layout.transposed else -1
    plain = rank == 2 + spec.stacked  # no kernel
    match spec.granularity:
        case PerGroup(size=size, axis=along):
            plain &= (along if along < 0 else along - rank) == axis
        case PerBlock(rows=rows, cols=cols):
            size = rows if layout.transposed else cols
        case _:
            size, plain = layout.inputs, True
    if not plain:
        return 1
    size = min(size, layout.inputs)
    if size <= _WIDEST:
        return size
    return math.gcd(size, _WIDEST) if size < layout.inputs else _WIDEST
