"""TensorQuantizer: the one place where a tensor of a model is fake-quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from bittern.errors import NumericsError
from bittern.nn.checked import check_learnable, checked_range
from bittern.nn.experts import Experts, per_row, scales_per_row
from bittern.nn.extremes import Extremes
from bittern.nn.lowrank import LowRank
from bittern.nn.observer import Observer
from bittern.nn.packed import PackedWeight
from bittern.nn.rounding import round_to_format
from bittern.nn.tracking import Tracker
from bittern.nn.transforms import Transforms, keep_dtype
from bittern.nn.weightcache import WeightCache
from bittern.numerics import Range, Scales, codec_of, measure, scales_for
from bittern.numerics.autograd import learned_range, straight_through
from bittern.records import PerTensor, PerToken, QuantizerSpec
from bittern.registry import KernelTable

__all__ = ["TensorQuantizer"]

# What calibration finds out; none of it is part of a model's state_dict.
BUFFERS = ("amax", "amin", "global_amax", "scale", "zero_point", "global_scale")
LEARNED = "learned"  # in `state`, of a range that is a parameter


class TensorQuantizer(nn.Module):
    """Fake-quantizes one tensor of a module: its weight, its input, its output.

    A static quantizer needs a range from calibration; a dynamic one computes it from each tensor.
    While ``observer`` is set, the quantizer only looks: tensors pass unquantized. A disabled
    quantizer, and a static one without a range, pass tensors unchanged, the very same object
    (`transforms` apart, which belong to the model's computation).

    The order of a forward pass: pre-scale, low-rank branch (its product is taken off), rotation,
    bias, rounding, bias, rotation back, and then the second quantizer of a chain.

    The buffers are not persistent: a converted model keeps the ``state_dict`` keys of the original.

    Args:
        spec: Format, granularity, static or dynamic.
        name: ``"module.path.slot"``, for errors.
        tensor: Name of the parameter it quantizes; ``None`` for activations.
        kernels: Fast implementations; ``None`` uses the reference.

    Attributes:
        enabled: Whether tensors are quantized.
        folded: Whether the weight holds the result of all it does already: then it does nothing.
        kept: The numbers of the weight before it was folded, where they are kept.
        was_trained: Whether the weight required gradients before it was packed.
        observer: Collects statistics while calibration runs.
        tracker: Collects statistics of the tensors it quantizes in training.
        amax: Largest magnitude that is represented, float32, in the granularity's shape; one per
            expert for a stacked activation.
        amin: Smallest value that is represented, in asymmetric formats.
        global_amax: Largest magnitude of the whole tensor, in formats of two levels.
        transforms: Pre-scale, rotation and bias; ``None`` where there are none.
        then: The second quantizer of a chain (W4A8).
        block_dynamic: Whether only the global scale is static: activations in a format of two
            levels, whose block scales follow from each tensor.
        per_expert: Whether it keeps one range per expert of an activation whose rows belong to
            experts.
    """

    amax: Tensor | None
    amin: Tensor | None
    global_amax: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    global_scale: Tensor | None
    transforms: Transforms | None
    then: TensorQuantizer | None

    def __init__(
        self,
        spec: QuantizerSpec,
        *,
        name: str = "",
        tensor: str | None = None,
        kernels: KernelTable | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.tensor = tensor
        self.kernels = kernels
        self.enabled = True
        self.folded = False
        self.kept: Tensor | None = None
        self.was_trained = False
        self.observer: Observer | None = None
        self.tracker: Tracker | None = None
        self.codec = codec_of(spec.format)  # what does not resolve fails here, not in a forward
        for buffer in BUFFERS:
            self.register_buffer(buffer, None, persistent=False)
        needed = spec.rotation is not None or spec.affine is not None
        self.transforms = Transforms(spec.rotation, spec.affine) if needed else None
        then = spec.then
        self.then = None
        if then is not None:
            self.then = TensorQuantizer(then, name=f"{name}.then", tensor=tensor, kernels=kernels)
        # Attributes of the object itself: looking up a buffer or a child costs ten times as much.
        self._scales: Scales | None = None
        self._ready = spec.dynamic
        self._cache: WeightCache | None = None
        self._changes = 0
        self._simple = self.transforms is None and then is None
        static = tensor is None and not spec.dynamic
        self.block_dynamic = self.codec.two_level and static
        self.per_expert = spec.stacked and static
        self._row_spec = dataclasses.replace(spec, granularity=PerToken())  # a row, its expert's
        if spec.constant_amax is not None:
            self.set_amax(torch.tensor(float(spec.constant_amax)))

    # --- what it is ---

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer knows its scale, or needs none beforehand."""
        return self._ready and (self.then is None or self.then.calibrated)

    @property
    def scales(self) -> Scales | None:
        """The static scales; ``None`` for dynamic quantizers and before calibration."""
        learned = self.learned
        if learned is None:
            return self._scales
        # no step of training tells us, so they are derived when asked for
        return scales_for(Range(self._in_shape(learned.detach().abs())), self.spec)

    @property
    def learned(self) -> nn.Parameter | None:
        """The range as a parameter, if training learns it; of one dimension where it has none."""
        return self._parameters.get("amax")

    @property
    def extremes(self) -> Extremes:
        """The statistic from which its static range follows, by `Extremes.range_of`."""
        coarse = self.block_dynamic or self.per_expert
        granularity = PerTensor() if coarse else self.spec.granularity
        return Extremes(granularity, both=self.codec.asymmetric or not self.codec.signed)

    @property
    def range(self) -> Range | None:
        """The static range; ``None`` before calibration."""
        if self.block_dynamic:
            return None if self.global_amax is None else Range(self.global_amax)
        if self.learned is not None:
            return Range(self._in_shape(self.learned.detach().abs()))
        return None if self.amax is None else Range(self.amax, self.amin, self.global_amax)

    def chain(self) -> Iterator[TensorQuantizer]:
        """Yield this quantizer and those that follow it."""
        yield self
        if self.then is not None:
            yield from self.then.chain()

    # --- calibration ---

    def set_amax(self, value: Tensor) -> None:
        """Set the range and derive the scale from it.

        Args:
            value: Non-negative and finite, in the granularity's shape: ``()`` where only the
                global scale is static, ``(experts,)`` for a stacked activation.

        Raises:
            NumericsError: ``value`` is negative, NaN or Inf; or the format is asymmetric.
        """
        self.set_range(Range(value))

    def set_range(self, values: Range, x: Tensor | None = None, *, check: bool = True) -> None:
        """Set the range and derive the scales from it.

        Args:
            values: The range.
            x: The tensor it is the range of, for formats that choose scales by rounding errors.
            check: Whether to look at the numbers, which waits for the device.

        Raises:
            NumericsError: A bound is NaN, Inf or has the wrong sign, or one is missing.
        """
        found = checked_range(values, self.spec, where=self.name or None, check=check)
        amax, amin, whole = found.amax, found.amin, found.global_amax
        self.clear_cache()
        self._unlearn()
        if self.block_dynamic:
            self.global_amax = amax if whole is None else whole
            self.global_scale = self.codec.global_scale(self.global_amax)
        else:
            self.amax, self.amin, self.global_amax = amax, amin, whole
            if not self.spec.dynamic:  # else an algorithm may look; it changes nothing
                self._set_scales(scales_for(found, self.spec, x))
        self._ready = True

    def calibrate_on(
        self,
        x: Tensor,
        *,
        global_amax: Tensor | None = None,
        clip: Tensor | None = None,
        check: bool = True,
    ) -> None:
        """Take the range of ``x`` itself, as weights do, and that of its result down the chain.

        Args:
            x: The tensor.
            global_amax: That of all tensors that share a global scale, in formats of two levels.
            clip: The share of the range that is represented, in the granularity's shape.
            check: As for `set_range`.

        Raises:
            NumericsError: ``x`` holds NaN or Inf, or has too few dimensions.
        """
        if isinstance(x, PackedWeight):
            return  # its range is in it
        with torch.no_grad():
            x = x.detach()
            source = x
            if self.transforms is not None:
                source, _ = self.transforms.prepare(x.float(), learn=True)
            if self.spec.constant_amax is None:
                values = measure(source, self.spec)
                if global_amax is not None:
                    values = dataclasses.replace(values, global_amax=global_amax)
                if clip is not None:
                    low = None if values.amin is None else values.amin * clip
                    values = dataclasses.replace(values, amax=values.amax * clip, amin=low)
                self.set_range(values, source, check=check)
            if self.then is not None:
                self.then.calibrate_on(self._first(x), check=check)

    def observe(self, x: Tensor, experts: Experts | None = None) -> None:
        """Show a tensor to the observer, as it will be rounded."""
        assert self.observer is not None
        try:
            if self.transforms is not None:
                x, _ = self.transforms.prepare(x.detach().float())
            self.observer.observe(x, experts if self.per_expert else None)
        except NumericsError as error:
            raise self._named(error) from None

    def learn(self) -> nn.Parameter:
        """Turn the range into a parameter that training learns (`learned`), and return it.

        Raises:
            NumericsError: The quantizer is dynamic, not calibrated, or one per expert; or its range
                has no gradient: the format is asymmetric, or its scales are rounded themselves.
        """
        known = self.amax is not None or self.block_dynamic
        check_learnable(self.spec, known=known and not self.per_expert, where=self.name or None)
        self.clear_cache()
        if self.learned is None:
            assert self.amax is not None
            value = self.amax.detach().clone()
            del self._buffers["amax"]
            self.amax = nn.Parameter(value if value.dim() else value[None])  # FSDP2 shards no ()
        self._scales = None
        found = self.learned
        assert found is not None
        return found

    def give_up_range(self) -> None:
        """Forget the range for good: a packed weight holds its scales itself."""
        self.clear_cache()
        self._unlearn()
        for name in BUFFERS:
            setattr(self, name, None)
        self._scales, self._ready = None, True

    def clear_cache(self) -> None:
        """Forget the quantized copy of a frozen weight."""
        self._cache = None
        self._changes += 1

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, with a fresh look at the weight.

        What merges adapters writes through ``weight.data``, which no cache can see.
        """
        self.clear_cache()
        return super().train(mode)

    # --- state ---

    def state(self) -> dict[str, Tensor]:
        """Return everything calibration found out, by name."""
        found = {name: value for name in BUFFERS if (value := getattr(self, name)) is not None}
        if (scales := self.scales) is not None:
            found["scale"] = scales.scale
        if self.learned is not None:
            found["amax"] = self._in_shape(self.learned)
            found[LEARNED] = torch.ones((), dtype=torch.bool, device=self.learned.device)
        if self.transforms is not None:
            found |= {f"transforms.{name}": v for name, v in self.transforms.state().items()}
        return {name: value.detach() for name, value in found.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `state` returned; a range that was learned is a parameter again.

        Raises:
            NumericsError: A name is unknown.
        """
        self.clear_cache()
        self._unlearn()
        for name, value in state.items():
            if name in BUFFERS:
                self._buffers[name] = value.detach().clone()  # setattr costs ten times as much
            elif name.startswith("transforms."):
                self._transforms().load(name.removeprefix("transforms."), value)
            elif name != LEARNED:
                raise NumericsError(f"a quantizer has no state {name!r}", where=self.name or None)
        if self.scale is not None:
            self._set_scales(Scales(self.scale, self.zero_point, self.global_scale))
        self._ready = self.spec.dynamic or self.scale is not None or self.global_scale is not None
        if LEARNED in state:
            self.learn()

    def set_pre_scale(self, value: Tensor | None) -> None:
        """Multiply tensors by ``value`` before anything else, also while disabled.

        Args:
            value: Shape that broadcasts against the tensors, as ``(in_features,)``.
        """
        self._transforms().set_pre_scale(value)

    def set_low_rank(self, branch: LowRank | None) -> None:
        """Round only what a low-rank branch beside the weight leaves (`bittern.nn.lowrank`)."""
        self._transforms().low_rank = branch

    def set_rotation(self, matrix: Tensor) -> None:
        """Give the matrix of a rotation of the kind ``"given"``.

        Args:
            matrix: Orthogonal, ``(block, block)``.

        Raises:
            NumericsError: It is not orthogonal, or the spec asks for none.
        """
        try:
            self._transforms().set_rotation(matrix)
        except NumericsError as error:
            raise self._named(error) from None

    # --- forward ---

    def forward(self, x: Tensor, experts: Experts | None = None) -> Tensor:
        """Return ``x`` fake-quantized, in its own dtype.

        Args:
            x: The tensor.
            experts: Which rows belong to which expert, for stacked activations.
        """
        if self.folded:
            return x
        if type(x) is PackedWeight and self.tensor is not None:  # isinstance costs 70 ns of 1 us
            return self._unpacked(x)
        if self.observer is not None:
            self.observe(x, experts)
            return self._passed(x, experts)
        if not (self.enabled and self._ready):
            return x if self._simple else self._passed(x, experts)
        if self.tensor is not None and not torch.compiler.is_compiling():
            state = self._chain_state()
            cache = self._cache
            if cache is not None and cache.holds(x, state) and not x.requires_grad:
                return cache.value
            if WeightCache.takes(x) and all(q.learned is None for q in self.chain()):
                with torch.inference_mode(False), torch.no_grad():  # it may serve training later
                    value = self._all(x, experts)
                self._cache = WeightCache(x, value, state)
                return value
        return self._all(x, experts)

    def _passed(self, x: Tensor, experts: Experts | None) -> Tensor:
        """Return ``x`` unquantized: transforms are part of the computation, and stay."""
        if self.transforms is not None:
            x = self.transforms.passed(x)
        return x if self.then is None else self.then(x, experts)

    def _all(self, x: Tensor, experts: Experts | None) -> Tensor:
        found = self._first(x, experts)
        return found if self.then is None else self.then(found, experts)

    def _first(self, x: Tensor, experts: Experts | None = None) -> Tensor:
        try:
            if self.transforms is None:
                return self._round(x, experts)
            prepared, bias = self.transforms.prepare(x.float())
            rounded = self._round(prepared, experts)
            return self.transforms.restore(rounded, bias).to(x.dtype)
        except NumericsError as error:
            raise self._named(error) from None

    def _unpacked(self, x: PackedWeight) -> Tensor:
        found = x.dequantize() if self.transforms is None else self.transforms.unpacked(x)
        return found if self.then is None else self.then(found)

    def _round(self, x: Tensor, experts: Experts | None) -> Tensor:
        if self.tracker is not None and self.training:
            self.tracker(x, experts if self.per_expert else None)
        learned = self.learned
        if learned is not None:
            return learned_range(x, self._in_shape(learned), self.spec)
        training = torch.is_grad_enabled() and x.requires_grad
        spec, scales, whole = self.spec, self._scales, None
        if self.block_dynamic:
            whole = self.global_scale
        if self.per_expert:
            if experts is None:
                raise NumericsError(
                    "its ranges are one per expert, and nobody said whose rows these are",
                    hint="call quantize(slot, x, experts=Experts(index, count))",
                )
            if whole is not None:
                whole = per_row(whole, experts, x)
            elif scales is not None:
                spec, scales = self._row_spec, scales_per_row(scales, experts, x)
        if not training:
            return round_to_format(x, spec, scales, whole, kernels=self.kernels)
        clip = None
        if scales is not None and not spec.format.block_only and self.amax is not None:
            amax = self.amax
            if self.per_expert and experts is not None:
                amax = per_row(amax, experts, x)
            clip = Range(amax, self.amin)

        def rounded(t: Tensor) -> Tensor:
            return round_to_format(t, spec, scales, whole, kernels=self.kernels)

        return straight_through(x, clip, spec.granularity, rounded)

    def _chain_state(self) -> tuple[object, ...]:
        """Return what tells a change of the quantizers that follow; our own clears the cache."""
        if self.then is None:
            return ()
        return (self.then.enabled, self.then._changes, *self.then._chain_state())

    def _unlearn(self) -> None:
        if self.learned is not None:
            del self._parameters["amax"]
            self.register_buffer("amax", None, persistent=False)

    def _in_shape(self, learned: Tensor) -> Tensor:
        return learned.reshape(()) if isinstance(self.spec.granularity, PerTensor) else learned

    def _transforms(self) -> Transforms:
        if self.transforms is None:
            self.transforms = Transforms(self.spec.rotation, self.spec.affine)
            self._simple = False
        self.clear_cache()
        return self.transforms

    def _set_scales(self, scales: Scales) -> None:
        self._buffers.update(
            scale=scales.scale, zero_point=scales.zero_point, global_scale=scales.global_scale
        )
        self._scales = scales

    def _named(self, error: NumericsError) -> NumericsError:
        return NumericsError(error.what, where=self.name or error.where, hint=error.hint)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but stay float32: a scale in half precision gives other codes."""
        before = {name: self._buffers.get(name) for name in BUFFERS}
        wide = None if self.learned is None else self.learned.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtype(self, before)
        if wide is not None and self.learned is not None and self.learned.dtype != wide.dtype:
            self.learned.data = wide.to(self.learned.device)
        if self._scales is not None and self.scale is not None:
            self._scales = Scales(self.scale, self.zero_point, self.global_scale)
        self.clear_cache()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Let a model with learned ranges load the ``state_dict`` of one without."""
        if self.learned is not None and f"{prefix}amax" not in state_dict:
            state_dict = {**state_dict, f"{prefix}amax": self.learned.detach()}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Say format, granularity and state in one line."""
        bounds = ((name, getattr(self, name)) for name in ("amin", "amax", "global_amax"))
        parts = [f"{n}={v.item():.4g}" for n, v in bounds if v is not None and v.numel() == 1]
        parts += ["learned"] if self.learned is not None else []
        if self.observer is not None:
            parts.append("observing")
        elif not (self.enabled and self.calibrated):
            parts.append("not calibrated" if self.enabled else "off")
        return ", ".join([str(self.spec), *parts])
