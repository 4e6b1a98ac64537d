"""The part of `ModuleConformance` about what a quantized module computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bittern.errors import CalibrationError
from bittern.nn import QuantModule, named_quantizers, quantizers_off
from bittern.testing.base import check
from bittern.testing.compare import assert_bit_identical, assert_sqnr, sqnr, tensors_of
from bittern.testing.module_cases import (
    COARSE,
    PATH,
    Bench,
    Holder,
    ModuleCase,
    amaxes,
    attempt,
    call,
    floating,
    gradients,
    mapped,
    only,
)
from bittern.testing.module_structure import ModuleStructure

__all__ = ["ModuleNumbers"]


class ModuleNumbers(ModuleStructure):
    """Off is the original, on is close to it, every slot counts, gradients flow."""

    def test_without_quantizers_it_computes_the_original(self, case: ModuleCase) -> None:
        """Protects users from a quantized class that forgets a detail of the original's forward.

        With its quantizers off, the output has the very bits of the original's.
        """
        bench = self.bench(case)
        holder = bench.holder()
        expected = bench.output(holder)
        bench.quantize(holder)
        with quantizers_off(holder):
            assert_bit_identical(expected, bench.output(holder), what="output, quantizers off")

    def test_the_quantized_output_is_close(self, case: ModuleCase) -> None:
        """Protects users from a layer that is quantized in name only, or to noise."""
        bench = self.bench(case)
        holder = bench.holder()
        expected = bench.output(holder)
        bench.quantize(holder)
        found = bench.output(holder)
        check(
            sqnr(expected, found) != float("inf"),
            "the quantized output equals the original's; no quantizer has an effect",
        )
        assert_sqnr(expected, found, case.min_sqnr)

    def test_every_slot_has_an_effect(self, case: ModuleCase) -> None:
        """Protects users from a slot that the plan lists and the forward pass ignores."""
        bench = self.bench(case)
        holder = bench.quantized(spec=COARSE)
        only(holder, None)
        expected = bench.output(holder)
        idle = []
        for slot in bench.slots():
            only(holder, slot.name)
            if sqnr(expected, bench.output(holder)) == float("inf"):
                idle.append(slot.name)
        check(
            not idle,
            f"int4 in the slot {', '.join(idle)} changes nothing; does the forward pass call "
            f"self.quantize({', '.join(map(repr, idle))}, ...)?",
        )

    def test_static_ranges_are_the_largest_magnitudes(self, case: ModuleCase) -> None:
        """Protects users from clipping: what a slot saw in calibration fits its range."""
        bench = self.bench(case)
        spec = {"format": "int8", "granularity": "tensor"}
        holder = bench.quantized(spec=spec)
        largest: dict[str, Tensor] = {}
        handles = []
        for name, quantizer in named_quantizers(holder):

            def see(_: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                if args[0].numel():
                    value = args[0].detach().abs().amax().float()
                    largest[name] = torch.maximum(largest.get(name, value), value)

            handles.append(quantizer.register_forward_pre_hook(see))
        with quantizers_off(holder), torch.no_grad():
            for batch in bench.batches():
                call(holder, batch)
        for handle in handles:
            handle.remove()
        for name, value in largest.items():
            amax = dict(named_quantizers(holder))[name].amax
            check(amax is not None, f"{name} was calibrated with data and has no range")
            assert_bit_identical(value, amax, what=f"amax of {name}")

    def test_bfloat16(self, case: ModuleCase) -> None:
        """Protects users who cast after calibration: ranges stay as they are, in float32."""
        bench = self.bench(case)
        batch = mapped(bench.batch(), lambda t: t.bfloat16() if t.is_floating_point() else t)
        plain = bench.holder().to(torch.bfloat16)
        with torch.no_grad():
            expected, why = attempt(lambda: call(plain, batch))
        if why is not None:
            pytest.skip(f"the original does not run in bfloat16: {why}")
        holder = bench.quantized()
        before = amaxes(holder)
        holder.to(torch.bfloat16)
        with torch.no_grad():
            found = call(holder, batch)
        assert_bit_identical(before, amaxes(holder), what="amax in bfloat16")
        for ours, theirs in zip(_flat(found), _flat(expected), strict=True):
            check(ours.dtype == theirs.dtype, f"its output is {ours.dtype}, not {theirs.dtype}")
            check(bool(ours.isfinite().all()), "its output in bfloat16 holds NaN or Inf")
        holder.to(torch.float32)
        assert_bit_identical(before, amaxes(holder), what="amax after the round through bfloat16")

    def test_gradients_reach_weights_and_inputs(self, case: ModuleCase) -> None:
        """Protects users who fine-tune a quantized model (QAT)."""
        bench = self._with_gradients(case)
        expected = gradients(bench.holder(), bench.batch())
        found = gradients(bench.quantized(), bench.batch())
        missing = [n for n, g in expected.items() if g is not None and found.get(n) is None]
        check(not missing, f"no gradient reaches {', '.join(missing)}; is something detached?")
        for name, gradient in found.items():
            original = expected[name]
            if gradient is not None and original is not None:
                check(bool(gradient.isfinite().all()), f"the gradient of {name} holds NaN or Inf")
                dead = not bool(gradient.any()) and bool(original.any())
                check(not dead, f"the gradient of {name} is zero everywhere")

    def test_gradients_without_quantizers_are_the_originals(self, case: ModuleCase) -> None:
        """Protects users who compare training with and without quantization."""
        bench = self._with_gradients(case)
        expected = gradients(bench.holder(), bench.batch())
        holder = bench.quantized()
        with quantizers_off(holder):
            assert_bit_identical(expected, gradients(holder, bench.batch()), what="gradients")

    def test_quantization_is_deterministic(self, case: ModuleCase) -> None:
        """Protects users who must be able to make the same model again."""
        bench = self.bench(case)
        first, second = bench.quantized(), bench.quantized()
        assert_bit_identical(amaxes(first), amaxes(second), what="amax")
        assert_bit_identical(bench.output(first), bench.output(second), what="output")
        assert_bit_identical(bench.output(first), bench.output(first), what="output, run again")

    def test_calibration_leaves_the_weights_alone(self, case: ModuleCase) -> None:
        """Protects users from a forward pass that writes into its parameters.

        Unless the original's does, as that of an embedding with ``max_norm``.
        """
        bench = self.bench(case)
        original, holder = bench.holder(), bench.holder()
        with torch.no_grad():
            for batch in bench.batches():
                call(original, batch)
        bench.quantize(holder)
        before, after = (
            {name: p.detach() for name, p in model.named_parameters()}
            for model in (original, holder)
        )
        assert_bit_identical(before, after, what="parameters")

    def test_nan_in_calibration_names_the_module(self, case: ModuleCase) -> None:
        """Protects users from a search for the one batch, or layer, that is broken."""
        bench = self.bench(case)
        bad = mapped(bench.batch(seed=1), _with_nan)
        static = [s for s in bench.slots() if s.kind == "activation"]
        holder = bench.holder()
        if not floating(bad) or not static:
            self._nan_in_a_weight(bench, holder)
            return
        try:
            bench.quantize(holder, [bench.batch(seed=0), bad])
        except CalibrationError as error:
            check(
                (error.where or "").startswith(f"{PATH}."),
                f"the error names {error.where!r} instead of the module: {error}",
            )
            check("batch 1" in error.what, f"the error does not name the batch: {error}")
        else:
            raise AssertionError("NaN in the calibration data went unnoticed")
        check(not isinstance(holder.inner, QuantModule), "the model is left half quantized")

    # --- helpers ---

    def _with_gradients(self, case: ModuleCase) -> Bench:
        if not case.differentiable:
            pytest.skip("the case says that it has no gradients")
        return self.bench(case)

    @staticmethod
    def _nan_in_a_weight(bench: Bench, holder: Holder) -> None:
        """Without floating inputs, a weight is what can be broken."""
        names = [s.tensor or s.name for s in bench.slots() if s.kind == "weight"]
        tensors = [getattr(holder.inner, name, None) for name in names]
        broken = next((t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), None)
        if broken is None:
            pytest.skip("it has neither floating inputs with a static slot nor weights")
        with torch.no_grad():
            broken.view(-1)[0] = float("nan")
        try:
            bench.quantize(holder)
        except CalibrationError as error:
            named = (error.where or "").startswith(f"{PATH}.")
            check(named, f"the error names {error.where!r} instead of the module: {error}")
        else:
            raise AssertionError("NaN in a weight went unnoticed")


def _with_nan(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    broken = tensor.clone()
    broken.view(-1)[-1] = float("nan")
    return broken


def _flat(value: object) -> list[Tensor]:
    return [t for t in tensors_of(value) if t.is_floating_point()]
