"""Percentile, entropy and mse calibration: ranges from histograms of the activations.

As in max calibration the data pass runs the unquantized model, a tensor that several modules read
is counted once, ranks add up what they saw, and inputs that are one tensor get one range. What has
no histogram (asymmetric formats, formats of two levels, ranges per group or per expert) is
calibrated by max, in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from bittern.calibration.bias import calibrate_biases
from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.coverage import note_saturation
from bittern.calibration.estimators import (
    check_percentile,
    entropy_amax,
    mse_amax,
    percentile_amax,
)
from bittern.calibration.histogram import BINS, Histogram, check_bins
from bittern.calibration.max import activations_at_max, run_max, static_activations
from bittern.calibration.observe import observe_histograms
from bittern.calibration.search import Error, best_range, multipliers, searchable, squared
from bittern.calibration.shared import share_ranges
from bittern.errors import CalibrationError, PluginError
from bittern.nn import TensorQuantizer
from bittern.numerics import codec_of
from bittern.records import PerChannel, PerTensor, Plan, QuantizerSpec
from bittern.registry.targets import resolve

__all__ = ["run_entropy", "run_mse", "run_percentile"]

Estimate = Callable[[Histogram, QuantizerSpec], Tensor]

_OCTAVES = 2  # mse looks down to 1/4 of a weight's largest magnitude


def run_percentile(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    p: float = 99.99,
    skip_zeros: bool = False,
    bins: int = BINS,
) -> None:
    """Set the ranges of static activations to a percentile of their magnitudes.

    Weights keep the largest magnitude as their range.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data; ``None`` when there is none.
        context: Services.
        p: The percentile, above 0 and up to 100.
        skip_zeros: Leave out exact zeros.
        bins: Bins of each histogram, see `bittern.calibration.histogram.histogram_of`.

    Raises:
        CalibrationError: ``p`` or ``bins`` is out of range; or NaN or Inf in a weight or an
            activation, names the module and the batch.
    """
    check_percentile(p)
    check_bins(bins)
    run_max(model, plan, None, context)
    if forward is not None and plan.needs_data:
        estimate = partial(percentile_amax, p=p, skip_zeros=skip_zeros)
        _activations(model, forward, context, lambda h, _: estimate(h), bins=bins)


def run_entropy(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    bins: int = 4 * BINS,
) -> None:
    """Set the ranges of static activations to those that lose the least information.

    Weights keep the largest magnitude as their range.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data; ``None`` when there is none.
        context: Services.
        bins: Bins of each histogram, see `bittern.calibration.histogram.histogram_of`.

    Raises:
        CalibrationError: ``bins`` is out of range; or NaN or Inf in a weight or an activation,
            names the module and the batch.
    """
    check_bins(bins)
    run_max(model, plan, None, context)
    if forward is not None and plan.needs_data:
        _activations(model, forward, context, entropy_amax, bins=bins)


def run_mse(
    model: nn.Module,
    plan: Plan,
    forward: Forward | None,
    context: CalibrationContext,
    *,
    weights: bool = True,
    activations: bool = True,
    bins: int = BINS,
    error: str | Error | None = None,
) -> None:
    """Set the ranges of weights and static activations to those with the least rounding error.

    Args:
        model: The converted model.
        plan: Its plan.
        forward: Runs the data; ``None`` when there is none.
        context: Services.
        weights: Whether to search ranges of weights, one per scale; at max otherwise.
        activations: Whether to search ranges of static activations; at max otherwise.
        bins: Bins of each histogram, see `bittern.calibration.histogram.histogram_of`.
        error: ``"package.module:function"`` of the rounded and the original tensor that returns
            what rounding costs, per element and not negative; the square of the difference by
            default. It gets float32 tensors, divided by a power of two.

    Raises:
        CalibrationError: ``bins`` is out of range, or ``error`` names no function; or NaN or Inf
            in a weight or an activation, names the module and the batch.
    """
    check_bins(bins)
    cost = _error(error)
    run_max(model, plan, None, context)
    if weights:
        _weights(model, context, cost)
    if forward is not None and plan.needs_data:
        if activations:
            _activations(model, forward, context, partial(mse_amax, error=cost), bins=bins)
        else:
            activations_at_max(model, static_activations(model, context), forward, context)


def _activations(
    model: nn.Module,
    forward: Forward,
    context: CalibrationContext,
    estimate: Estimate,
    *,
    bins: int,
) -> None:
    static = static_activations(model, context)
    calibrate_biases(model, forward, context)
    counted = {name: q for name, q in static.items() if _has_histogram(q)}
    if counted:
        for name, found in observe_histograms(model, counted, forward, context, bins=bins).items():
            if found is not None:
                amax = estimate(found, counted[name].spec)
                counted[name].set_amax(amax)
                note_saturation(context, name, found, amax)
        share_ranges(model, context)
    others = {name: q for name, q in static.items() if name not in counted}
    if others:
        activations_at_max(model, others, forward, context, biases=False)


def _has_histogram(quantizer: TensorQuantizer) -> bool:
    """Return whether a histogram of magnitudes says all that the range has to follow."""
    spec = quantizer.spec
    codec = codec_of(spec.format)
    one = isinstance(spec.granularity, PerTensor | PerChannel) and not spec.stacked
    return one and not (codec.asymmetric or codec.two_level or codec.fitted)


def _weights(model: nn.Module, context: CalibrationContext, error: Error) -> None:
    """Search the ranges of all weights; they are at max."""
    for _, module in context.modules(model):
        searched = [q for q in module.slots().values() if q.tensor is not None and searchable(q)]
        if not searched:
            continue
        with context.access(module, write=False):
            for quantizer in searched:
                weight = getattr(module, quantizer.tensor or "").detach()
                largest, spec = quantizer.range, quantizer.spec  # with the global scale it shares
                assert largest is not None
                candidates = multipliers(spec, octaves=_OCTAVES)
                found = best_range(weight, largest, spec, candidates=candidates, error=error)
                quantizer.set_range(found, weight)


def _error(error: str | Error | None) -> Error:
    if error is None:
        return squared
    if isinstance(error, str):
        try:
            error = resolve(error, plugin="of the recipe")
        except PluginError as problem:
            raise CalibrationError(
                f"mse's error function {error!r} does not resolve",
                hint='write "package.module:function" of something that can be imported',
            ) from problem
    if not callable(error):
        raise CalibrationError(
            f"mse's error must be a function, not {type(error).__name__}",
            hint="a function of the rounded and the original tensor: the cost of each element",
        )
    return error
