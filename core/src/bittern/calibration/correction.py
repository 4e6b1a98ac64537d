"""Bias correction: biases make up for the mean error that rounding leaves in outputs.

Rounding weights and inputs shifts the mean of a layer's outputs, ``E[y_q - y]``, and the layers
after it see a shift where they expect noise. A bias takes it back (Nagel et al., Data-Free
Quantization, ICCV 2019, section 4.2, with data). Every layer is compared with its own unquantized
self on the very same inputs, those of the quantized model: shifts of earlier layers are not counted
twice, and one data pass is enough.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.reduce import agree, reduce_sum
from bittern.errors import CalibrationError
from bittern.nn import QuantModule, quantizers_off
from bittern.records import Plan

__all__ = ["run_bias_correction"]

log = logging.getLogger("bittern.calibration")


def run_bias_correction(
    model: nn.Module, plan: Plan, forward: Forward | None, context: CalibrationContext
) -> None:
    """Add to every bias what rounding takes from the mean of the outputs.

    Layers without a bias are left alone. It is the last step of a recipe: ranges are known, and
    weights are as they were before rounding. (Steps that write rounded weights leave nothing to
    compare with but the rounding of inputs.)

    Args:
        model: The converted, calibrated model.
        plan: Its plan.
        forward: Runs the data.
        context: Services.

    Raises:
        CalibrationError: There is no data, or a mean is NaN or Inf.
    """
    if forward is None:
        raise CalibrationError(
            "bias correction needs calibration data", hint="give data (--data FILE)"
        )
    shifts = {path: _Shift(module) for path, module in _biased(model, plan)}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for shift in shifts.values():
            stack.enter_context(shift.watched())
        forward()
    for path, mean in _summed(shifts).items():
        module = model.get_submodule(path)
        if not bool(mean.isfinite().all()):
            raise CalibrationError(
                "the mean of the outputs is NaN or Inf",
                where=path,
                hint="calibrate ranges before, and run the data through the unquantized model",
            )
        with context.access(module, write=True), torch.no_grad():
            context.remember(module, "bias")
            bias: Tensor = module.bias  # type: ignore[assignment]
            bias.copy_(bias.double() + mean.to(bias.device))


def _biased(model: nn.Module, plan: Plan) -> Iterator[tuple[str, QuantModule]]:
    """Yield the planned layers with one weight and a bias per output channel."""
    for path in plan.modules:
        module = model.get_submodule(path)
        if not isinstance(module, QuantModule):
            continue
        weights = [q for q in module.slots().values() if q.tensor is not None]
        bias = getattr(module, "bias", None)
        if len(weights) <= 1 and isinstance(bias, nn.Parameter) and bias.dim() == 1:
            yield path, module
        else:
            log.info("%s has no bias that could be corrected", path)


class _Shift:
    """Adds up by how much rounding moves a layer's outputs.

    Args:
        module: The layer.
    """

    def __init__(self, module: QuantModule) -> None:
        self._module = module
        self._channels = int(getattr(module, "bias").shape[0])  # noqa: B009
        rank = module.weight.dim()  # type: ignore[operator]
        self._axis = -1 if rank == 2 else 1 - int(rank)  # of convolutions, before the places
        self._running = False
        self.sums = torch.zeros(self._channels + 1, dtype=torch.float64)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at every call."""
        handle = self._module.register_forward_hook(self._called, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _called(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._running or not isinstance(output, Tensor) or output.numel() == 0:
            return
        self._running = True
        try:
            with quantizers_off(self._module):
                expected = self._module(*args, **kwargs)
        finally:
            self._running = False
        lost = (expected.double() - output.double()).movedim(self._axis, -1)
        lost = lost.reshape(-1, self._channels)
        count = torch.full((1,), float(len(lost)), dtype=torch.float64, device=lost.device)
        self.sums = self.sums.to(lost.device) + torch.cat((lost.sum(0), count))


def _summed(shifts: dict[str, _Shift]) -> dict[str, Tensor]:
    """Return the mean shifts over the data of all ranks, of layers that ran."""
    agree()  # before anybody waits for sums of a rank that has none
    totals = reduce_sum({path: shift.sums for path, shift in shifts.items()})
    return {path: total[:-1] / total[-1] for path, total in totals.items() if float(total[-1])}
