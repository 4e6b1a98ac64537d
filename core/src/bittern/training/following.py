"""Ranges of weights that follow the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bittern.nn import QuantModule, TensorQuantizer
from bittern.nn.computed import weight_of
from bittern.numerics import measure
from bittern.numerics.ranges import global_amax

__all__ = ["FollowedWeights"]


@dataclass(frozen=True)
class _Followed:
    """A weight quantizer and what calibration decided about its range.

    Attributes:
        module: Holds the weight.
        quantizer: Its quantizer.
        clip: The share of its range that is represented; ``None``: all of it.
        family: Weights of one number have one global scale; ``None``: it has its own, or none.
    """

    module: QuantModule
    quantizer: TensorQuantizer
    clip: Tensor | None
    family: int | None


class FollowedWeights:
    """Recomputes ranges of weights from their present values.

    What calibration decided stays: the share of a range that is clipped, and which weights have one
    global scale (nvfp4: those that engines fuse).

    Args:
        quantizers: Modules, and quantizers of their weights.
        access: Makes the weights of a module real.
    """

    def __init__(
        self,
        quantizers: Iterable[tuple[QuantModule, TensorQuantizer]],
        access: Callable[..., AbstractContextManager[None]],
    ) -> None:
        self._access = access
        self._followed: list[_Followed] = []
        shared: dict[tuple[float, ...], list[int]] = {}
        clips: list[Tensor | None] = []
        pairs = list(quantizers)
        for index, (module, quantizer) in enumerate(pairs):
            with access(module, write=False):
                source = _source(module, quantizer)
                clips.append(_clip(quantizer, source))
            if quantizer.codec.two_level and quantizer.global_amax is not None:
                key = tuple(quantizer.global_amax.flatten().tolist())
                shared.setdefault(key, []).append(index)
        # Two weights have the very same largest magnitude only where it is shared.
        families = {
            index: number
            for number, members in enumerate(shared.values())
            if len(members) > 1
            for index in members
        }
        for index, ((module, quantizer), clip) in enumerate(zip(pairs, clips, strict=True)):
            self._followed.append(_Followed(module, quantizer, clip, families.get(index)))

    @torch.no_grad()
    def step(self, *, check: bool = False) -> None:
        """Recompute the ranges.

        Args:
            check: Whether to look for NaN and Inf, which waits for the device.

        Raises:
            NumericsError: With ``check``, a weight holds NaN or Inf.
        """
        largest: dict[int, Tensor] = {}
        for one in self._followed:
            if one.family is None or not _trained(one):
                continue
            with self._access(one.module, write=False):
                source = _source(one.module, one.quantizer)
                value = global_amax(source, one.quantizer.spec)
            before = largest.get(one.family)
            largest[one.family] = (
                value if before is None else torch.maximum(before, value.to(before.device))
            )
        for one in self._followed:
            if not _trained(one):
                continue
            with self._access(one.module, write=False):
                weight = _weight(one.module, one.quantizer)
                whole = None if one.family is None else largest[one.family].to(weight.device)
                one.quantizer.calibrate_on(weight, global_amax=whole, clip=one.clip, check=check)


def _clip(quantizer: TensorQuantizer, source: Tensor) -> Tensor | None:
    """Return which share of the range of a weight calibration kept."""
    kept = quantizer.range
    if kept is None:
        return None
    whole = measure(source, quantizer.spec)
    if torch.equal(whole.amax, kept.amax):
        return None
    high, low = whole.amax, torch.zeros_like(whole.amax)
    share = torch.where(high > 0, kept.amax / high, torch.ones_like(high))
    if whole.amin is not None and kept.amin is not None:
        low = whole.amin
        share = torch.where((high <= 0) & (low < 0), kept.amin / low, share)
    return share


def _trained(one: _Followed) -> bool:
    """Whether a weight may have changed: a frozen one keeps its range, and its quantized copy."""
    if one.family is not None:
        return True  # its range depends on those of others
    weight = one.module._parameters.get(one.quantizer.tensor or "")
    return not (isinstance(weight, nn.Parameter) and not weight.requires_grad)


def _weight(module: QuantModule, quantizer: TensorQuantizer) -> Tensor:
    weight = weight_of(module, quantizer.tensor or "")
    assert weight is not None, quantizer.name
    return weight.detach()


def _source(module: QuantModule, quantizer: TensorQuantizer) -> Tensor:
    """Return a weight as it is rounded."""
    weight = _weight(module, quantizer)
    if quantizer.transforms is None:
        return weight
    return quantizer.transforms.prepare(weight.float())[0]
