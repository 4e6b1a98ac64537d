"""What a fast kernel owes its users: nothing but speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bittern.errors import BitternError, NumericsError
from bittern.numerics import Range, Scales, fake_quantize, measure, scales_for
from bittern.records import (
    Granularity,
    KernelRule,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)
from bittern.registry import resolve
from bittern.testing.base import Conformance, check
from bittern.testing.compare import assert_bit_identical
from bittern.testing.values import adversarial, explore, layouts, shapes, tensors

__all__ = ["KernelConformance", "KernelUnderTest"]

Reference = Callable[[Tensor, QuantizerSpec, Scales | None], Tensor]


@dataclass(frozen=True)
class KernelUnderTest:
    """One format of one kernel rule."""

    rule: KernelRule
    format: str

    @property
    def name(self) -> str:
        """The test id."""
        return f"{self.rule.impl.rpartition('.')[2]}-{self.rule.device}-{self.format}"


class KernelConformance(Conformance):
    """Kernels: the bits of core's reference, over shapes, dtypes, granularities and values.

    Every rule that this machine can run is tested in every format it claims. A kernel may answer
    ``None``, and the reference takes over; where it does so for small tensors, lower its threshold
    in a fixture of the subclass, or little is tested.

    Attributes:
        granularities: What is tried.
        examples: How many tensors Hypothesis makes per format and granularity.
        large: A shape that is worth a kernel.
    """

    granularities: ClassVar[Sequence[Granularity]] = (
        PerTensor(),
        PerChannel(0),
        PerToken(),
        PerGroup(16),
        PerBlock(8, 8),
    )
    examples: ClassVar[int] = 40
    large: ClassVar[tuple[int, int]] = (1024, 2048)

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every rule and format."""
        rules: list[KernelRule] = cls.subject().call("register_kernels")
        return {
            "kernel": [
                (
                    f"{rule.impl.rpartition('.')[2]}-{rule.device}-{name}",
                    KernelUnderTest(rule, name),
                )
                for rule in rules
                for name in rule.formats
            ]
        }

    @classmethod
    def references(cls) -> Mapping[str, Reference]:
        """Return operation to reference, which takes ``(x, spec, scales)``."""
        return {"fake_quantize": fake_quantize}

    # --- the tests ---

    def test_kernel_rule_is_well_formed(self, kernel: KernelUnderTest) -> None:
        """Protects users from a kernel that is never chosen, for a misspelt format or dtype."""
        self._spec(kernel, PerTensor())
        for name in kernel.rule.dtypes:
            check(isinstance(getattr(torch, name, None), torch.dtype), f"no torch dtype {name!r}")
        torch.device(kernel.rule.device)

    def test_kernel_takes_what_it_claims(self, kernel: KernelUnderTest) -> None:
        """Protects users from a kernel that always declines, and tests that therefore pass."""
        function, device = self._usable(kernel)
        taken = []
        for dtype in self._dtypes(kernel):
            x = torch.randn(self.large, generator=torch.Generator().manual_seed(0))
            found = function(x.to(dtype).to(device), self._spec(kernel, PerTensor()), None)
            taken.append(found is not None)
        check(any(taken), f"it declines every tensor of shape {self.large}, whatever the dtype")

    def test_kernel_equals_the_reference(self, kernel: KernelUnderTest) -> None:
        """Protects users from numbers that depend on which plugin is installed. Dynamic scales."""
        for granularity in self.granularities:
            self._explore(kernel, granularity, lambda x, spec: [None])

    def test_kernel_equals_the_reference_with_static_scales(self, kernel: KernelUnderTest) -> None:
        """Protects users from other numbers after calibration, where values clip."""
        for granularity in self.granularities:
            self._explore(kernel, granularity, _static)

    def test_kernel_on_adversarial_values(self, kernel: KernelUnderTest) -> None:
        """Protects users at ties, subnormals, signed zeros and the largest numbers."""
        for dtype in self._dtypes(kernel):
            for what, x in adversarial(dtype):
                for granularity in self.granularities:
                    spec = self._spec(kernel, granularity)
                    unit = _with_scales(x, spec, torch.ones_like)
                    for scales in (None, unit, *_static(x, spec)):
                        self._compare(kernel, x, spec, scales, what)

    def test_kernel_on_empty_tensors(self, kernel: KernelUnderTest) -> None:
        """Protects users of experts that get no tokens."""
        for dtype in self._dtypes(kernel):
            for shape in ((0,), (0, 16), (4, 0)):
                for granularity in (PerTensor(), PerToken()):
                    spec = self._spec(kernel, granularity)
                    self._compare(kernel, torch.empty(shape, dtype=dtype), spec, None, str(shape))

    def test_kernel_on_strided_tensors(self, kernel: KernelUnderTest) -> None:
        """Protects users whose tensors are views, which kernels love to misread."""
        for dtype in self._dtypes(kernel):
            for what, x in layouts(dtype):
                for granularity in self.granularities:
                    spec = self._spec(kernel, granularity)
                    for scales in (None, *_static(x, spec)):
                        self._compare(kernel, x, spec, scales, what)

    def test_kernel_propagates_nan_and_inf(self, kernel: KernelUnderTest) -> None:
        """Protects users from a NaN that a kernel turns into a harmless-looking number."""
        for dtype in self._dtypes(kernel):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
            for value in (float("nan"), float("inf"), -float("inf")):
                broken = x.clone()
                broken[2, 5] = value
                for granularity in self.granularities:
                    spec = self._spec(kernel, granularity)
                    for scales in (None, *_static(x, spec)):
                        self._compare(kernel, broken, spec, scales, str(value))

    def test_kernel_result_is_a_tensor_of_its_own(self, kernel: KernelUnderTest) -> None:
        """Protects users whose input would change, at once or with the next write to the output."""
        function, device = self._usable(kernel)
        spec = self._spec(kernel, PerTensor())
        for dtype in self._dtypes(kernel):
            x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
            before = x.clone()
            found = function(x, spec, None)
            if found is not None:
                found.fill_(7.0)
                assert_bit_identical(before, x, what="input after a write into the output")

    def test_kernel_is_deterministic(self, kernel: KernelUnderTest) -> None:
        """Protects users who must be able to compute the same again."""
        function, device = self._usable(kernel)
        for dtype in self._dtypes(kernel):
            x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
            x = x.to(dtype).to(device)
            for granularity in self.granularities:
                spec = self._spec(kernel, granularity)
                first, second = function(x, spec, None), function(x, spec, None)
                assert_bit_identical(first, second, what=f"output of two runs, {spec}")

    # --- helpers ---

    def _usable(self, kernel: KernelUnderTest) -> tuple[Callable[..., Tensor | None], torch.device]:
        """Return the kernel's function and device; skips where this machine cannot run it."""
        self.subject().need_loaded()
        rule = kernel.rule
        if rule.op not in self.references():
            pytest.skip(f"core has no reference of the operation {rule.op!r} to compare with")
        device = torch.device(rule.device)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                pytest.skip("it needs an NVIDIA GPU")
            if rule.capability is not None and torch.cuda.get_device_capability() < rule.capability:
                pytest.skip(f"it needs CUDA capability {rule.capability}")
        elif device.type != "cpu" and not hasattr(torch, device.type):
            pytest.skip(f"this torch has no device {device.type!r}")
        function: Callable[..., Tensor | None] = resolve(rule.impl, plugin=self.subject().label)
        return function, device

    def _dtypes(self, kernel: KernelUnderTest) -> list[torch.dtype]:
        return [getattr(torch, name) for name in kernel.rule.dtypes]

    def _spec(self, kernel: KernelUnderTest, granularity: Granularity) -> QuantizerSpec:
        try:
            number_format = self.toolkit().registry.formats.get(kernel.format)
        except BitternError as error:
            raise AssertionError(f"the rule of {kernel.rule.impl}: {error}") from error
        return QuantizerSpec(number_format, granularity)

    def _explore(
        self,
        kernel: KernelUnderTest,
        granularity: Granularity,
        scales: Callable[[Tensor, QuantizerSpec], Sequence[Scales | None]],
    ) -> None:
        spec = self._spec(kernel, granularity)
        self._usable(kernel)
        made = tensors(dtypes=self._dtypes(kernel), shape=shapes(granularity))

        def judge(x: Tensor) -> None:
            for given in scales(x, spec):
                self._compare(kernel, x, spec, given, "Hypothesis")

        explore(st.one_of(made), judge, examples=self.examples)

    def _compare(
        self,
        kernel: KernelUnderTest,
        x: Tensor,
        spec: QuantizerSpec,
        scales: Scales | None,
        what: str,
    ) -> None:
        """Assert that kernel and reference agree, and that the input stays as it is."""
        __tracebackhide__ = True
        function, device = self._usable(kernel)
        reference = self.references()[kernel.rule.op]
        try:
            expected = reference(x, spec, scales)
        except NumericsError:
            return  # this tensor has no such granularity
        there = x.to(device)
        before = there.clone()
        given = None if scales is None else _moved(scales, device)
        found = function(there, spec, given)
        kind = f"{what}, {tuple(x.shape)} {x.dtype}, {spec}, scales {_words(scales)}"
        assert_bit_identical(before, there, what=f"input ({kind})")
        if found is not None:
            assert_bit_identical(expected, found.to("cpu"), what=f"output ({kind})", any_nan=True)


def _moved(scales: Scales, device: torch.device) -> Scales:
    zero, upper = scales.zero_point, scales.global_scale
    return Scales(
        scales.scale.to(device),
        zero_point=None if zero is None else zero.to(device),
        global_scale=None if upper is None else upper.to(device),
    )


def _static(x: Tensor, spec: QuantizerSpec) -> list[Scales | None]:
    """Return scales that fit, and scales that clip."""
    return [_with_scales(x, spec, lambda v: v), _with_scales(x, spec, lambda v: v * 0.3)]


def _with_scales(
    x: Tensor, spec: QuantizerSpec, change: Callable[[Tensor], Tensor]
) -> Scales | None:
    """Return the scales of a changed range; ``None`` where the shape has no such granularity."""
    largest = torch.finfo(torch.float32).max
    try:
        found = measure(x.nan_to_num(1.0, 1.0, -1.0), spec)
        low = None if found.amin is None else -change(-found.amin).clamp_max(largest)
        upper = None if found.global_amax is None else change(found.global_amax).clamp_max(largest)
        changed = Range(change(found.amax).clamp_max(largest), amin=low, global_amax=upper)
        return scales_for(changed, spec)
    except NumericsError:
        return None


def _words(scales: Scales | None) -> str:
    if scales is None:
        return "from the tensor"
    flat = scales.scale.flatten()
    return f"{float(flat[0]):.4g}" if flat.numel() == 1 else f"of shape {tuple(scales.scale.shape)}"
