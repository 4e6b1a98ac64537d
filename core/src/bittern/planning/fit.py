"""What a plan can say of a spec before any data: whether it fits, and whether it makes sense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bittern.errors import RecipeError
from bittern.nn.transforms import check_axes
from bittern.numerics import scale_shape
from bittern.numerics.rotation import block_size
from bittern.records import PlanEntry, QuantizerSpec, Rotation, Slot
from bittern.registry import KernelTable

__all__ = ["check_backend", "check_shape", "rotation_warnings"]


def check_shape(shape: Sequence[int], spec: QuantizerSpec) -> None:
    """Raise unless a weight of ``shape`` can be quantized so.

    Raises:
        NumericsError: It has too few dimensions, or columns that do not divide into the blocks
            that are to be rotated.
    """
    scale_shape(tuple(shape), spec.granularity)
    if spec.rotation is not None:
        block_size(shape[-1], spec.rotation)
    if spec.affine is not None:
        check_axes(len(shape), spec.affine)
    if spec.then is not None:
        check_shape(shape, spec.then)


def check_backend(spec: QuantizerSpec, kernels: KernelTable, *, where: str) -> None:
    """Raise unless some plugin brings the backend that a spec names.

    Raises:
        RecipeError: None does.
    """
    known = kernels.backends()
    if spec.backend is not None and spec.backend not in known:
        raise RecipeError(
            f"there is no backend {spec.backend!r}",
            where=where,
            hint=f"known are {', '.join(known) or 'none'}; register_kernels of a plugin adds one",
        )
    if spec.then is not None:
        check_backend(spec.then, kernels, where=where)


def rotation_warnings(
    path: str, entries: Sequence[PlanEntry], slots: Sequence[Slot]
) -> Iterator[str]:
    """Yield what is odd about the rotations of one module.

    Args:
        path: The module's path.
        entries: Its part of the plan.
        slots: All its slots: those without an entry are not rotated.
    """
    rotated = {e.slot: e.spec.rotation for e in entries if e.spec.rotation is not None}
    for entry in entries:
        rotation, shape = rotated.get(entry.slot), entry.shape
        if rotation is None or shape is None:
            continue
        if block_size(shape[-1], rotation) == 1:
            yield (
                f"{entry.path} has {shape[-1]} columns, and no power of two divides them: the "
                "rotation leaves it as it is"
            )
        slot = entry.slot_rule
        matrix = len(shape) == (3 if slot.stacked else 2)
        if not rotation.back and not (matrix and slot.group_axis in (-1, len(shape) - 1)):
            yield (
                f"{entry.path} is rotated along its last axis, which is not that of its input "
                "features, so the layer computes something else; write rotate: {back: true}"
            )
    seen: set[Rotation | None] = set()
    for slot in slots:
        rotation = rotated.get(slot.name)
        if slot.spoken in ("weight", "input"):
            seen.add(None if rotation is None or rotation.back else rotation)
    if len(seen) > 1:
        yield (
            f"{path or 'the model'}: weight and input are not rotated alike, so the layer computes "
            "something else, unless what is around it is rotated too; rotate both, or write "
            "rotate: {back: true}"
        )
