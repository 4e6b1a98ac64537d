"""What a number format owes its users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from bittern.errors import NumericsError
from bittern.numerics import (
    Quantized,
    Range,
    Scales,
    codec_of,
    dequantize,
    fake_quantize,
    measure,
    quantize,
    scale_shape,
    scales_for,
)
from bittern.records import (
    Granularity,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizerSpec,
)
from bittern.testing.base import Conformance, check
from bittern.testing.compare import assert_bit_identical
from bittern.testing.values import adversarial, explore, shapes, tensors

__all__ = ["FormatConformance"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FormatConformance(Conformance):
    """Number formats: the law of core's numerics, in every granularity the format defaults to.

    Formats of two levels, asymmetric, unsigned and fitted ones are tried with the scales they have:
    both ends of a range, a global scale, numbers that are not negative.

    Attributes:
        granularities: Further granularities to try; only groups and blocks where a format has no
            other scales (``NumberFormat.block_only``).
        examples: How many tensors Hypothesis makes per test, format and granularity.
    """

    granularities: ClassVar[Sequence[Granularity]] = (PerTensor(),)
    examples: ClassVar[int] = 40

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every format and granularity."""
        found: dict[str, QuantizerSpec] = {}
        formats: list[NumberFormat] = cls.subject().call("register_formats")
        for item in formats:
            defaults = (item.weight_granularity, item.input_granularity)
            for granularity in (*defaults, *cls.granularities):
                if item.block_only and not isinstance(granularity, PerGroup | PerBlock):
                    continue
                spec = QuantizerSpec(item, granularity)
                found[f"{item.name}-{granularity}"] = spec
        return {"spec": list(found.items())}

    # --- the tests ---

    def test_fake_quantize_is_dequantize_of_quantize(self, spec: QuantizerSpec) -> None:
        """Protects users from evaluating other numbers than those that are exported: the law."""

        def judge(x: Tensor) -> None:
            for scales in (None, self._scales(x, spec), self._scales(x, spec, 0.3)):
                expected = dequantize(quantize(x, spec, scales))
                assert_bit_identical(expected, fake_quantize(x, spec, scales), what=_kind(x, spec))

        self._explore(spec, judge)
        for dtype in DTYPES:
            for _, x in adversarial(dtype):
                judge(_allowed(x, spec))

    def test_zeros_stay_zeros(self, spec: QuantizerSpec) -> None:
        """Protects users from padding, and experts without tokens, that become NaN."""
        for dtype in DTYPES:
            x = torch.zeros(8, 64, dtype=dtype)
            assert_bit_identical(x, fake_quantize(x, spec), what=f"zeros in {dtype}")
            mixed = torch.cat([x, torch.ones_like(x)])
            found = fake_quantize(mixed, spec)
            check(not bool(found[:8].any()), "zeros beside other numbers are no zeros any more")

    def test_codes_are_in_range(self, spec: QuantizerSpec) -> None:
        """Protects users from a packed file in which a code spills into its neighbour."""
        codec, seen = codec_of(spec.format), set[bytes]()
        width = torch.empty(0, dtype=codec.storage).element_size() * 8
        check(width >= spec.format.bits, f"{codec.storage} cannot hold {spec.format.bits} bits")

        def judge(x: Tensor) -> None:
            packed = quantize(x, spec, self._scales(x, spec, 0.3))
            check(packed.codes.dtype == codec.storage, f"codes are {packed.codes.dtype}")
            check(packed.codes.shape == x.shape, f"codes have the shape {packed.codes.shape}")
            rows = packed.codes.contiguous().view(torch.uint8).reshape(-1, width // 8)
            seen.update(map(bytes, np.unique(rows.numpy(), axis=0).tolist()))
            low, high = (float(value) for value in torch.aminmax(codec.load(packed.codes)))
            ends = f"{codec.min_value:g} and {codec.max_value:g}"
            check(
                codec.min_value <= low <= high <= codec.max_value,
                f"codes stand for {low:g} to {high:g}, the grid ends at {ends}",
            )

        self._explore(spec, judge)
        check(
            len(seen) <= 2**spec.format.bits,
            f"{len(seen)} different codes were seen, {spec.format.bits} bits hold "
            f"{2**spec.format.bits}",
        )

    def test_codes_survive_storage(self, spec: QuantizerSpec) -> None:
        """Protects users from a format whose stored codes mean something else when read."""
        codec = codec_of(spec.format)

        def judge(x: Tensor) -> None:
            codes = quantize(x, spec).codes
            again = codec.store(codec.load(codes))
            assert_bit_identical(codes, again, what="codes, loaded and stored")

        self._explore(spec, judge)

    def test_quantizing_twice_changes_nothing(self, spec: QuantizerSpec) -> None:
        """Protects users who quantize a checkpoint that was quantized before."""

        def judge(x: Tensor) -> None:
            scales = self._scales(x, spec)
            once = fake_quantize(x, spec, scales)
            if bool(once.isfinite().all()):
                twice = fake_quantize(once, spec, scales)
                assert_bit_identical(once, twice, what=_kind(x, spec))

        self._explore(spec, judge, dtypes=(torch.float32,), tame=True)

    def test_rounding_is_monotone(self, spec: QuantizerSpec) -> None:
        """Protects users from a larger number that becomes a smaller one."""

        def judge(x: Tensor) -> None:
            ordered = x.flatten().sort().values.reshape(x.shape)  # which has one scale
            found = fake_quantize(ordered, spec)
            steps = found.flatten().diff()
            check(bool((steps >= 0).all()), f"not monotone: {ordered.tolist()} -> {found.tolist()}")

        self._explore(spec, judge, shape=_one_scale(spec.granularity))

    def test_rounding_is_to_the_nearest(self, spec: QuantizerSpec) -> None:
        """Protects users from errors twice as large as the grid's, as truncation makes them."""
        x = torch.linspace(-1, 1, 4096).reshape(-1, 64)
        x = _allowed(x, spec)
        ones = torch.ones(scale_shape(x.shape, spec.granularity))  # one grid for all
        found = fake_quantize(x, spec, scales_for(_range(ones, spec), spec))
        grid = torch.tensor(sorted(set(found.flatten().tolist())))
        nearest = (x.flatten()[:, None] - grid).abs().min(dim=1).values
        excess = (found - x).abs().flatten() - nearest
        worst = int(excess.argmax())
        check(
            float(excess[worst]) <= 1e-6,
            f"{float(x.flatten()[worst]):.6g} becomes {float(found.flatten()[worst]):.6g}, and a "
            f"value of the grid is only {float(nearest[worst]):.3g} away",
        )

    def test_shape_and_dtype_stay(self, spec: QuantizerSpec) -> None:
        """Protects users from a bfloat16 model that turns into float32 on the way."""

        def judge(x: Tensor) -> None:
            found = fake_quantize(x, spec)
            check(found.shape == x.shape, f"{tuple(x.shape)} became {tuple(found.shape)}")
            check(found.dtype == x.dtype, f"{x.dtype} became {found.dtype}")
            check(found is not x, "the input itself is returned")

        self._explore(spec, judge)
        for shape in ((0, 64), (4, 0)):
            empty = fake_quantize(torch.empty(shape), spec)
            check(tuple(empty.shape) == shape, f"an empty {shape} became {tuple(empty.shape)}")

    def test_values_beyond_the_range_saturate(self, spec: QuantizerSpec) -> None:
        """Protects users from an outlier that wraps around, or becomes NaN."""
        x = _allowed(torch.linspace(-1, 1, 64).repeat(8, 1), spec)
        scales = self._scales(x, spec)
        found = fake_quantize(x * 1e6, spec, scales)
        check(bool(found.isfinite().all()), "values beyond the range become NaN or Inf")
        check(bool((found.sign() == x.sign()).all()), "values beyond the range change their sign")
        codec = codec_of(spec.format)
        extent = torch.tensor([codec.min_value, codec.max_value])
        if scales.zero_point is not None:
            extent = extent - scales.zero_point.flatten()[0]
        largest, limit = float(found.abs().max()), float(extent.abs().max() * scales.step.max())
        check(largest <= limit, f"a grid that ends at {limit:.3g} gives {largest:.3g}")
        check(largest >= 0.5, f"a range of 1 saturates at {largest:.3g}")

    def test_nan_propagates_and_is_not_packed(self, spec: QuantizerSpec) -> None:
        """Protects users from a NaN that becomes a number, on the way or on disk."""
        x = _allowed(torch.linspace(-1, 1, 64).repeat(8, 1), spec)
        scales = self._scales(x, spec)
        x[2, 5] = float("nan")
        found = fake_quantize(x, spec, scales)
        check(bool(found[2, 5].isnan()), f"NaN becomes {float(found[2, 5])}")
        try:
            quantize(x, spec, scales)
        except NumericsError:
            return
        raise AssertionError("quantize packs NaN, for which there is no code")

    def test_effective_bits_count_everything(self, spec: QuantizerSpec) -> None:
        """Protects users from a promise of four bits that takes five on disk."""
        for shape in ((64, 256), (8, 16, 128)):
            packed: Quantized = quantize(torch.ones(shape), spec)
            numel = packed.codes.numel()
            parts = packed.scales
            stored = spec.format.bits * numel + spec.format.scale_bits * parts.scale.numel()
            if parts.zero_point is not None:
                stored += spec.format.zero_point_bits * parts.zero_point.numel()
            if parts.global_scale is not None:
                stored += spec.format.tensor_bits * parts.global_scale.numel()
            promised = spec.bits_per_element(shape) * numel
            check(
                abs(promised - stored) <= 64,  # one further scale per tensor
                f"{shape}: {promised / numel:.4f} bits per element are promised, "
                f"{stored / numel:.4f} are stored",
            )

    # --- helpers ---

    def _scales(self, x: Tensor, spec: QuantizerSpec, factor: float = 1.0) -> Scales:
        found = measure(x, spec)
        amin, whole = (
            None if part is None else part * factor for part in (found.amin, found.global_amax)
        )
        return scales_for(Range(found.amax * factor, amin, whole), spec, x)

    def _explore(
        self,
        spec: QuantizerSpec,
        judge: Callable[[Tensor], None],
        *,
        dtypes: Sequence[torch.dtype] = DTYPES,
        shape: tuple[int, ...] | None = None,
        tame: bool = False,
    ) -> None:
        """Run ``judge`` over tensors; ``tame`` ones have scales that are normal numbers."""
        self.subject().need_loaded()
        wanted = shapes(spec.granularity) if shape is None else st.just(shape)
        made = tensors(dtypes=dtypes, shape=wanted, finite=True)
        made = made.map(lambda x: _allowed(_tamed(x) if tame else x, spec))
        explore(made, judge, examples=self.examples)


def _one_scale(granularity: Granularity) -> tuple[int, ...]:
    """Return a shape whose elements share one scale."""
    match granularity:
        case PerGroup(size=size, axis=axis) if axis not in (-1, 1):
            return (min(size, 64), 1)
        case PerGroup(size=size):
            return (1, min(size, 64))
        case PerBlock(rows=rows, cols=cols):
            return (min(rows, 8), min(cols, 64))
        case PerChannel(axes=axes):
            rank = max(2, *(axis + 1 if axis >= 0 else -axis for axis in axes))
            keep = {axis % rank for axis in axes}
            return tuple(1 if dim in keep else 64 for dim in range(rank))
    return (1, 64)


def _range(ones: Tensor, spec: QuantizerSpec) -> Range:
    """Return the range from -1 to 1, or from 0, for every scale."""
    return Range(ones, amin=-ones if codec_of(spec.format).asymmetric else None)


def _allowed(x: Tensor, spec: QuantizerSpec) -> Tensor:
    """Return what an unsigned format takes, too."""
    return x if codec_of(spec.format).signed else x.abs()


def _tamed(x: Tensor) -> Tensor:
    """Return numbers whose scales are far from the smallest: a subnormal scale has few digits."""
    return torch.where(x.abs() < 2.0**-60, 2.0**-60, x)


def _kind(x: Tensor, spec: QuantizerSpec) -> str:
    return f"{tuple(x.shape)} {x.dtype}, {spec}"
