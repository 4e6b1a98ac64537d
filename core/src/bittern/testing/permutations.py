"""Reordering coordinates, and saying whether two results are the same but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.testing.base import check

__all__ = ["assert_close", "move", "shuffled"]


def shuffled(size: int) -> Tensor:
    """Return an order of ``size`` coordinates that is neither sorted nor a rotation, if it can be.

    Args:
        size: At least 2.
    """
    generator = torch.Generator().manual_seed(size)
    for _ in range(100):
        order = torch.randperm(size, generator=generator)
        steps = (order.roll(-1) - order) % size
        if not (steps == steps[0]).all():
            return order
    return torch.arange(size).flip(0)  # two or three coordinates


def move(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    """Return ``tensor`` with coordinate ``order[i]`` of a dimension at ``i``."""
    return tensor.detach().index_select(dim, order.to(tensor.device))


def assert_close(expected: Tensor, found: Tensor, *, what: str, tolerance: float = 1e-4) -> None:
    """Fail unless two tensors are the same but for the order of summation.

    Args:
        expected: What is right.
        found: What was computed.
        what: What it means if they differ.
        tolerance: Largest difference, relative to the largest magnitude.

    Raises:
        AssertionError: They differ.
    """
    __tracebackhide__ = True
    check(
        expected.shape == found.shape,
        f"{what}: shapes {list(expected.shape)} and {list(found.shape)}",
    )
    if expected.dtype != found.dtype or not (expected.is_floating_point() or expected.is_complex()):
        check(torch.equal(expected, found), what)
        return
    finite = expected.isfinite()
    scale = float(expected[finite].abs().max()) if finite.any() else 1.0
    same = torch.isclose(expected, found, rtol=0.0, atol=tolerance * scale, equal_nan=True)
    if not same.all():
        off = float((expected - found).abs().nan_to_num().max())
        check(False, f"{what} (off by {off:.3g}, the values reach {scale:.3g})")
