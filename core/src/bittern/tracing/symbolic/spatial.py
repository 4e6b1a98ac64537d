"""Pooling, padding and resizing: they change the last dimensions and keep those in front."""

from __future__ import annotations

from functools import partial
from typing import Any

from bittern.tracing.symbolic.dependencies import Step
from bittern.tracing.symbolic.names import TableProcessor, module_types, operations
from bittern.tracing.symbolic.values import Dim, Shape, Token, axes_of

__all__ = ["spatial"]

_POOLS = ("max_pool", "avg_pool", "lp_pool", "fractional_max_pool")
_ADAPTIVE = ("adaptive_avg_pool", "adaptive_max_pool")


def _resized(step: Step, *, count: int | None, sizes: tuple[Any, ...] = ()) -> Any:
    """Change the last ``count`` dimensions; ``None`` stands for all but batch and channels."""
    first = step.first
    if step.kwargs.get("return_indices") or getattr(step.target, "return_indices", False):
        return step.boundary("returns indices too")
    if not isinstance(first, Shape) or axes_of([step.args[1:], step.kwargs]):
        return step.boundary()
    if first.rank is None:
        # Images have a batch dimension, so {1} is in front of what is changed.
        kept = {p: d for p, d in first.dims.items() if p in (0, 1) or (count and p < -count)}
    else:
        spatial = first.rank - 2 if count is None else count
        kept = {p: first.at(p) for p in range(first.rank - spatial)}
    lost = [axis for position, axis in first.axes if position not in kept]
    if lost or first.loose:
        return step.boundary("changes the size of the dimension")
    dims: dict[int, Dim] = dict(kept)
    if first.rank is not None:
        for offset, position in enumerate(range(len(kept), first.rank)):
            size = sizes[offset] if offset < len(sizes) else None
            dims[position] = size if isinstance(size, int) else Token(step.node.name, position)
    return first.but(step.node.name, dims)


def _adaptive(step: Step, *, count: int) -> Any:
    module = step.target if step.node.op == "call_module" else None
    wanted = module.output_size if module is not None else step.argument(1, "output_size")
    if isinstance(wanted, int):
        wanted = (wanted,) * count
    return _resized(step, count=count, sizes=tuple(wanted) if wanted else ())


def _pad(step: Step) -> Any:
    """Padding with as many pairs as dimensions it changes, from the last on."""
    if step.node.op == "call_module":
        padding = getattr(step.target, "padding", None)
    else:
        padding = step.argument(1, "pad")
    if not isinstance(padding, tuple | list) or not all(isinstance(p, int) for p in padding):
        return step.boundary("pads by what is not known")
    changed = [i // 2 for i, amount in enumerate(padding) if amount]
    return _resized(step, count=max(changed) + 1) if changed else step.first


def spatial() -> TableProcessor:
    """Return the processor for pooling, padding and resizing."""
    groups: list[Any] = []
    for n in (1, 2, 3):
        names = [f"{name}{n}d" for name in _POOLS]
        names += [f"_{name}" for name in names]
        classes = module_types(
            f"{''.join(w.title() for w in name.split('_'))}{n}d".replace("Lp", "LP")
            for name in _POOLS
        )
        groups.append((operations(names) | classes, partial(_resized, count=n)))
        names = [f"{name}{n}d" for name in _ADAPTIVE]
        classes = module_types(
            f"{''.join(w.title() for w in name.split('_'))}{n}d" for name in _ADAPTIVE
        )
        groups.append(
            (operations([*names, *(f"_{x}" for x in names)]) | classes, partial(_adaptive, count=n))
        )
    pads = module_types(
        f"{kind}Pad{n}d"
        for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
        for n in (1, 2, 3)
    )
    groups.append((operations(["pad"]) | pads, _pad))
    resizing = module_types(["Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"])
    groups.append(
        (operations(["interpolate", "upsample"]) | resizing, partial(_resized, count=None))
    )
    return TableProcessor.of(*groups)
