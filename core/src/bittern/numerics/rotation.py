"""Rotations of the last axis: spread outliers over a block before quantization.

An orthogonal matrix ``R`` changes no matrix product: ``(x R) (w R)^T = x w^T``. The normalized
Walsh-Hadamard matrix is the usual one (QuaRot, arXiv:2404.00456; FlashAttention-3,
arXiv:2407.08608, section 3.3); it is symmetric, hence its own inverse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bittern.errors import NumericsError
from bittern.records import Rotation

__all__ = ["block_size", "hadamard", "rotate"]


def block_size(columns: int, rotation: Rotation) -> int:
    """Return how many columns are rotated together.

    Raises:
        NumericsError: The columns do not divide into the blocks that are asked for.
    """
    block = rotation.block
    if block is None:
        return columns & -columns if rotation.kind == "hadamard" else columns
    if columns % block:
        raise NumericsError(
            f"{columns} columns do not divide into blocks of {block} to rotate",
            hint="give a block that divides them, or none: the largest one is taken",
        )
    return block


def hadamard(x: Tensor, block: int) -> Tensor:
    """Return every ``block`` columns times the Walsh-Hadamard matrix over ``sqrt(block)``.

    Args:
        x: Shape ``(..., n)``, ``n`` a multiple of ``block``.
        block: A power of two.

    Raises:
        NumericsError: ``block`` is no power of two.
    """
    if block < 1 or block & (block - 1):
        raise NumericsError(
            f"a Hadamard rotation needs a power of two, not {block}",
            hint="give a block such as 128, or a matrix of your own",
        )
    shape = x.shape
    values = x.reshape(*shape[:-1], shape[-1] // block, block)
    half = 1
    while half < block:  # butterflies: log2(block) passes
        pairs = values.reshape(*values.shape[:-1], block // (2 * half), 2, half)
        first, second = pairs.unbind(-2)
        values = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return (values * (1.0 / math.sqrt(block))).reshape(shape)  # a product is alike everywhere


def rotate(
    x: Tensor, rotation: Rotation, matrix: Tensor | None = None, *, inverse: bool = False
) -> Tensor:
    """Return ``x R``, block by block along the last axis; with ``inverse``, ``x R^T``.

    Args:
        x: Float32, shape ``(..., n)``.
        rotation: What to do.
        matrix: ``R`` of shape ``(block, block)``, orthogonal, for the kind ``"given"``.
        inverse: Undo it.

    Raises:
        NumericsError: The shapes do not fit, or a given matrix is missing.
    """
    if rotation.kind == "hadamard":
        return hadamard(x, block_size(x.shape[-1], rotation))
    if matrix is None:
        raise NumericsError(
            "the rotation is to be given, and was not",
            hint="call set_rotation(matrix) of the quantizer",
        )
    block = matrix.shape[-1]
    if x.shape[-1] % block:
        raise NumericsError(
            f"{x.shape[-1]} columns do not divide into blocks of {block} to rotate",
            hint="give a matrix whose size divides them",
        )
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return (blocks @ (matrix.mT if inverse else matrix)).reshape(x.shape)
