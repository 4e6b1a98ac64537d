"""What a quantizer does around rounding: pre-scale, low-rank branch, rotation, bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from bittern.errors import NumericsError
from bittern.nn.lowrank import LowRank
from bittern.numerics.rotation import rotate
from bittern.records import Affine, Rotation

__all__ = ["Transforms", "bias_of", "check_axes", "keep_dtype"]

BUFFERS = ("pre_scale", "matrix", "bias")
FACTORS = ("low_rank.left", "low_rank.right")


class Transforms(nn.Module):
    """Pre-scale, rotation and bias of a quantizer, in float32, and the low-rank branch of a weight.

    Pre-scale and rotation are half of a change that leaves the model's function as it was (the
    weight holds the inverse, or is rotated alike), so they are done by a disabled quantizer as
    well. Not so a rotation that is undone after rounding, and a bias: alone, they do nothing. Of a
    weight with a low-rank branch only the rest is rounded; the module adds the branch
    (`bittern.nn.lowrank`), and neither is done by a disabled quantizer.

    Args:
        rotation: The rotation, if any.
        affine: The bias, if any.
    """

    pre_scale: Tensor | None
    matrix: Tensor | None
    bias: Tensor | None
    low_rank: LowRank | None

    def __init__(self, rotation: Rotation | None, affine: Affine | None) -> None:
        super().__init__()
        self.rotation = rotation
        self.affine = affine
        for name in BUFFERS:
            self.register_buffer(name, None, persistent=False)
        self.low_rank = None

    def set_pre_scale(self, value: Tensor | None) -> None:
        """Set what tensors are multiplied by."""
        self.pre_scale = None if value is None else value.detach().float().clone()

    def set_rotation(self, matrix: Tensor) -> None:
        """Set the matrix of a given rotation.

        Raises:
            NumericsError: No matrix is asked for, or it is not orthogonal.
        """
        if self.rotation is None or self.rotation.kind != "given":
            raise NumericsError(
                "the spec asks for no given rotation", hint="rotate: {kind: given} in the recipe"
            )
        matrix = matrix.detach().float().clone()
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise NumericsError(f"a rotation is a square matrix, not {tuple(matrix.shape)}")
        unit = torch.eye(len(matrix), device=matrix.device)
        if not torch.allclose(matrix @ matrix.mT, unit, atol=1e-4):
            raise NumericsError(
                "the matrix is not orthogonal: rotating back would not undo it",
                hint="take the Q of torch.linalg.qr, or a Hadamard matrix over sqrt(n)",
            )
        self.matrix = matrix

    def set_bias(self, value: Tensor) -> None:
        """Set the static bias."""
        self.bias = value.detach().float().clone()

    def prepare(self, x: Tensor, *, learn: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return ``x`` (float32) as it will be rounded, and the bias that was taken off.

        Args:
            x: The tensor.
            learn: Take the static bias from this very tensor.

        Raises:
            NumericsError: The static bias is for tensors with another number of dimensions.
        """
        x = self._moved(x)
        if self.affine is None:
            return x, None
        if self.affine.dynamic:
            bias = bias_of(x, self.affine)
            return x - bias, bias
        if learn:
            self.set_bias(bias_of(x, self.affine))
        if self.bias is None:
            return x, None
        if self.bias.dim() != x.dim():
            raise NumericsError(
                f"its bias is for tensors with {self.bias.dim()} dimensions, not {x.dim()}",
                hint="calibrate with data of this shape, or make the bias dynamic",
            )
        return x - self.bias, self.bias

    def restore(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return what was rounded, without bias and rotation that only rounding was to see."""
        if bias is not None:
            x = x + bias
        if self.rotation is not None and self.rotation.back:
            x = rotate(x, self.rotation, self.matrix, inverse=True)
        return x

    def passed(self, x: Tensor) -> Tensor:
        """Return ``x`` as a disabled quantizer passes it on."""
        undone = self.rotation is not None and self.rotation.back
        if self.pre_scale is None and (self.rotation is None or undone):
            return x
        wide = x.float()
        if self.pre_scale is not None:
            wide = wide * self.pre_scale
        if self.rotation is not None and not undone:
            wide = rotate(wide, self.rotation, self.matrix)
        return wide.to(x.dtype)

    def unpacked(self, x: Tensor) -> Tensor:
        """Return what `restore` makes of a packed weight: its codes are of what was prepared."""
        return self.restore(x.to(torch.float32).dequantize(), self.bias).to(x.dtype)

    def undone(self, x: Tensor) -> Tensor:
        """Return a tensor as it was before pre-scale, low-rank branch and rotation."""
        wide = x.float()
        if self.rotation is not None and not self.rotation.back:
            wide = rotate(wide, self.rotation, self.matrix, inverse=True)
        if self.low_rank is not None:
            wide = wide + self.low_rank.product()
        if self.pre_scale is not None:
            wide = wide / self.pre_scale
        return wide.to(x.dtype)

    def _moved(self, x: Tensor) -> Tensor:
        if self.pre_scale is not None:
            x = x * self.pre_scale
        if self.low_rank is not None:
            x = x - self.low_rank.product()
        return x if self.rotation is None else rotate(x, self.rotation, self.matrix)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors, by name."""
        found = {name: value for name in BUFFERS if (value := getattr(self, name)) is not None}
        if self.low_rank is not None:
            found |= dict(zip(FACTORS, (self.low_rank.left, self.low_rank.right), strict=True))
        return found

    def load(self, name: str, value: Tensor) -> None:
        """Take one tensor of `state`.

        Raises:
            NumericsError: The name is unknown.
        """
        if name in FACTORS:
            if self.low_rank is None:
                empty = value.new_empty(0, 0)
                self.low_rank = LowRank(empty, empty)
            setattr(self.low_rank, name.removeprefix("low_rank."), value.detach().clone())
            return
        if name not in BUFFERS:
            raise NumericsError(f"a quantizer has no state {name!r}")
        setattr(self, name, value.detach().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but stay float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtype(self, before)
        return self

    def extra_repr(self) -> str:
        """Name what is done."""
        parts = ["pre-scale"] if self.pre_scale is not None else []
        parts += [str(self.rotation)] if self.rotation is not None else []
        parts += [f"bias {self.affine}"] if self.affine is not None else []
        return ", ".join(parts)


def keep_dtype(module: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """Give buffers that moved the dtype from before: a scale in half precision is another one.

    Args:
        module: The module after the move.
        before: Its buffers before, by name.
    """
    for name, value in before.items():
        moved = module._buffers.get(name)
        if value is not None and moved is not None and moved.dtype != value.dtype:
            module._buffers[name] = value.to(moved.device)


def bias_of(x: Tensor, affine: Affine) -> Tensor:
    """Return the bias of a tensor, reduced dimensions kept as 1.

    Args:
        x: Float32.
        affine: Axes that are kept, and how the others are reduced.

    Raises:
        NumericsError: The tensor has too few dimensions.
    """
    check_axes(x.dim(), affine)
    keep = {axis % x.dim() for axis in affine.axes}
    dims = tuple(dim for dim in range(x.dim()) if dim not in keep)
    if not dims:
        return x.clone()
    if affine.method == "mean":
        return x.mean(dim=dims, keepdim=True)
    return x.amax(dim=dims, keepdim=True) / 2 + x.amin(dim=dims, keepdim=True) / 2


def check_axes(rank: int, affine: Affine) -> None:
    """Raise unless a tensor with ``rank`` dimensions has the axes of a bias.

    Raises:
        NumericsError: It has not.
    """
    if any(axis >= rank or axis < -rank for axis in affine.axes):
        raise NumericsError(
            f"a tensor with {rank} dimensions has no axes {affine.axes} to vary a bias along",
            hint="give axes that it has: -1 is the last one",
        )
