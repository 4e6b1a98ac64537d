"""Ranges that are fit to be set: finite, of the right sign, copies in float32."""

from __future__ import annotations

import torch

from bittern.errors import NumericsError
from bittern.numerics import Range, codec_of
from bittern.records import QuantizerSpec

__all__ = ["checked_range"]


def checked_range(
    values: Range, spec: QuantizerSpec, *, where: str | None, check: bool = True
) -> Range:
    """Return a range as a quantizer keeps it: detached copies, without an end that it cannot use.

    Args:
        values: The range.
        spec: Its format may have no negative numbers: then the range keeps no ``amin``.
        where: Name of the quantizer, for errors.
        check: Whether to look at the numbers, which waits for the device.

    Raises:
        NumericsError: A bound is NaN, Inf or has the wrong sign.
    """
    low, whole = values.amin, values.global_amax
    if low is not None and not codec_of(spec.format).signed:
        if check and bool((low < 0).any()):
            raise NumericsError(
                f"{spec.format.name} holds no negative numbers, and the data does",
                where=where,
                hint="use a signed format, or an asymmetric one",
            )
        low = None
    amax, low, whole = (
        None if bound is None else bound.detach().float().clone()
        for bound in (values.amax, low, whole)
    )
    assert amax is not None
    for name, bound, problem in (
        ("amax", amax, "negative"),
        ("amin", None if low is None else -low, "positive"),
        ("global_amax", whole, "negative"),
    ):
        if check and bound is not None and not bool((torch.isfinite(bound) & (bound >= 0)).all()):
            raise NumericsError(
                f"{name} must be finite and not {problem}",
                where=where,
                hint="look for NaN or Inf in the weights or the calibration data",
            )
    return Range(amax, low, whole)
