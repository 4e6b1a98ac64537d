"""Ranges that are fit to be set: finite, of the right sign, copies in float32; or to be learned."""

from __future__ import annotations

import torch

from bittern.errors import NumericsError
from bittern.numerics import Range, codec_of
from bittern.numerics.autograd import is_learnable
from bittern.records import QuantizerSpec

__all__ = ["check_learnable", "checked_range"]


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


def check_learnable(spec: QuantizerSpec, *, known: bool, where: str | None) -> None:
    """Raise unless a range can be a parameter that training learns.

    Args:
        spec: Format, static or dynamic.
        known: Whether there is one range, found by calibration.
        where: Name of the quantizer, for errors.

    Raises:
        NumericsError: The range is dynamic or not known, or has no gradient.
    """
    if not known or spec.dynamic:
        raise NumericsError(
            "only a calibrated static range can be learned, and none of experts",
            where=where,
            hint="calibrate it first, with max",
        )
    if not is_learnable(spec):
        raise NumericsError(
            f"ranges of {spec.format.name} cannot be learned: rounding to its scales has no slope",
            where=where,
            hint="let them follow the weights, or the mean of the activations (ema)",
        )
