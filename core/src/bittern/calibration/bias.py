"""The static biases of affine activation quantizers, found in a data pass of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.observe import observe
from bittern.calibration.reduce import reduce_max, reduce_sum
from bittern.errors import CalibrationError
from bittern.nn import Experts, TensorQuantizer
from bittern.nn.extremes import Extremes
from bittern.nn.observer import MaxObserver
from bittern.records import Affine, PerChannel

__all__ = ["calibrate_biases"]


class BiasObserver:
    """Sums up what a bias follows from: both ends of the range, and the mean in float64.

    Args:
        affine: The bias.
        context: Services.
        name: The quantizer's name, for errors.
    """

    def __init__(self, affine: Affine, context: CalibrationContext, *, name: str) -> None:
        self._axes = affine.axes
        extremes = Extremes(PerChannel(affine.axes))
        self._max = MaxObserver(extremes, context.shared, name=name)
        self.ends: Tensor | None = None  # the largest values, and minus the smallest ones
        self.total: Tensor | None = None
        self.count = 0

    @torch.no_grad()
    def observe(self, x: Tensor, experts: Experts | None = None) -> None:
        """Take in one tensor."""
        if x.numel() == 0:
            return
        self._max.observe(x)  # it knows about shapes, NaN and Inf
        keep = {axis % x.dim() for axis in self._axes}
        dims = [dim for dim in range(x.dim()) if dim not in keep]
        part = x.sum(dim=dims, keepdim=True, dtype=torch.float64) if dims else x.double()
        high, low = (x.amax(dims, True), x.amin(dims, True)) if dims else (x, x)
        ends = torch.stack((high, -low)).float()
        self.ends = ends if self.ends is None else torch.maximum(self.ends, ends)
        self.total = part if self.total is None else self.total + part
        self.count += x.numel() // part.numel()

    def first_bad_batch(self) -> int | None:
        """Return the index of the first batch with NaN or Inf."""
        return self._max.first_bad_batch()


def calibrate_biases(model: nn.Module, forward: Forward, context: CalibrationContext) -> None:
    """Run the data once and set the static biases; ranges are taken around them afterwards.

    Args:
        model: The converted model.
        forward: Runs the data.
        context: Services.

    Raises:
        CalibrationError: NaN or Inf in an activation, or the data can be run only once.
    """
    observers: dict[str, tuple[TensorQuantizer, BiasObserver]] = {}
    for name, quantizer in context.quantizers(model):
        affine = quantizer.spec.affine
        if quantizer.tensor is None and affine is not None and not affine.dynamic:
            observers[name] = (quantizer, BiasObserver(affine, context, name=quantizer.name))
    if not observers:
        return
    problem: CalibrationError | None = observe(model, observers, forward, context)
    ends = reduce_max({name: seen.ends for name, (_, seen) in observers.items()}, problem)
    totals: dict[str, Tensor] = {}
    for name, value in ends.items():
        if value is not None:  # a rank without data of its own adds nothing
            seen = observers[name][1]
            own = torch.zeros_like(value[0]) if seen.total is None else seen.total
            count = torch.tensor([float(seen.count)], dtype=torch.float64, device=own.device)
            totals[name] = torch.cat([own.double().flatten(), count])
    for name, summed in reduce_sum(totals).items():
        quantizer, value = observers[name][0], ends[name]
        affine, transforms = quantizer.spec.affine, quantizer.transforms
        assert value is not None
        assert affine is not None
        assert transforms is not None
        if affine.method == "mean":
            bias = (summed[:-1] / summed[-1]).reshape(value[0].shape)
        else:
            bias = (value[0] - value[1]) / 2
        transforms.set_bias(bias)
