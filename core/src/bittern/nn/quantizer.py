"""TensorQuantizer: the one place where a tensor of a model is fake-quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from bittern.errors import NumericsError
from bittern.nn.observer import Observer
from bittern.numerics import Scales, amax, codec_of, fake_quantize, scales_from_amax
from bittern.numerics.autograd import straight_through
from bittern.records import QuantizerSpec
from bittern.registry import KernelTable

__all__ = ["TensorQuantizer"]


class TensorQuantizer(nn.Module):
    """Fake-quantizes one tensor of a module: its weight, its input, its output.

    A static quantizer needs an ``amax`` from calibration; a dynamic one computes it from each
    tensor. While ``observer`` is set, the quantizer only looks: tensors pass unchanged. A disabled
    quantizer, and a static one without ``amax``, pass tensors unchanged, the very same object.

    The buffers are not persistent: a converted model keeps the ``state_dict`` keys of the original.

    Args:
        spec: Format, granularity, static or dynamic.
        name: ``"module.path.slot"``, for errors.
        tensor: Name of the parameter it quantizes; ``None`` for activations.
        kernels: Fast implementations; ``None`` uses the reference.

    Attributes:
        enabled: Whether tensors are quantized.
        observer: Collects statistics while calibration runs.
        amax: Largest magnitude that is represented, float32, in the granularity's shape.
    """

    amax: Tensor | None
    scale: Tensor | None

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
        self.observer: Observer | None = None
        codec_of(spec.format)  # a format that does not resolve fails here, not in a forward pass
        self.register_buffer("amax", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer knows its scale, or needs none beforehand."""
        return self.spec.dynamic or self.amax is not None

    def set_amax(self, value: Tensor) -> None:
        """Set the range and derive the scale from it.

        Args:
            value: Non-negative and finite, in the granularity's shape.

        Raises:
            NumericsError: ``value`` is negative, NaN or Inf.
        """
        value = value.detach().float().clone()
        if not bool((torch.isfinite(value) & (value >= 0)).all()):
            raise NumericsError(
                "amax must be finite and not negative",
                where=self.name or None,
                hint="look for NaN or Inf in the weights or the calibration data",
            )
        self.amax = value
        self.scale = scales_from_amax(value, self.spec).scale

    def calibrate_on(self, x: Tensor) -> None:
        """Take the range of ``x`` itself, as weights do."""
        self.set_amax(amax(x.detach(), self.spec.granularity))

    @property
    def scales(self) -> Scales | None:
        """The static scales; ``None`` for dynamic quantizers and before calibration."""
        return None if self.spec.dynamic or self.scale is None else Scales(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized, in its own dtype."""
        if self.observer is not None:
            self.observer.observe(x)
            return x
        if not self.enabled or not self.calibrated:
            return x
        if torch.is_grad_enabled() and x.requires_grad:
            clip = None if self.spec.dynamic else self.amax
            return straight_through(x, clip, self.spec, self._round)
        return self._round(x)

    def _round(self, x: Tensor) -> Tensor:
        # torch.compile gets the reference: it fuses that itself, and looks into no kernel
        if self.kernels is not None and not torch.compiler.is_compiling():
            kernel = self.kernels.find("fake_quantize", self.spec.format.name, x.device, x.dtype)
            if kernel is not None:
                result: Tensor | None = kernel(x, self.spec, self.scales)
                if result is not None:  # None: not for this shape
                    return result
        try:
            return fake_quantize(x, self.spec, self.scales)
        except NumericsError as error:
            raise NumericsError(error.what, where=self.name or None, hint=error.hint) from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but stay float32: a scale in half precision gives other codes."""
        before = {name: self._buffers[name] for name in ("amax", "scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Say format, granularity and state in one line."""
        state = "observing" if self.observer is not None else ""
        state = state or ("off" if not self.enabled else "")
        state = state or ("" if self.calibrated else "not calibrated")
        parts = [str(self.spec)]
        if self.amax is not None and self.amax.numel() == 1:
            parts.append(f"amax={self.amax.item():.4g}")
        return ", ".join([*parts, state] if state else parts)
