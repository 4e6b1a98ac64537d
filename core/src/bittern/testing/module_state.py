"""The part of `ModuleConformance` about other processes: saved, restored, exported, distributed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bittern.exporting.plain import TENSORS
from bittern.nn import named_quant_modules, named_quantizers
from bittern.numerics import Quantized, Scales, dequantize
from bittern.testing.base import check, given_cases, once
from bittern.testing.compare import assert_bit_identical
from bittern.testing.module_cases import (
    Batch,
    Bench,
    ModuleCase,
    amaxes,
    attempt,
    call,
    each,
    mapped,
)
from bittern.testing.module_numbers import ModuleNumbers
from bittern.testing.pickles import no_pickle
from bittern.testing.processes import run_distributed, run_fresh
from bittern.testing.references import Reference, reference_to

__all__ = ["ModuleState"]

EXPORT = "safetensors"
BATCHES = 4  # shared out between the processes


class ModuleState(ModuleNumbers):
    """What is saved comes back, what is split comes together, what is unused is reported."""

    def test_save_and_restore_in_a_fresh_process(self, case: ModuleCase) -> None:
        """Protects users who quantize today and serve tomorrow: same bits, and no pickle.

        The state is restored into a module made with another seed, in a process that has only
        imported the test class. A test class that another process cannot import is restored in
        this one.
        """
        self.bench(case)  # skips what cannot run here
        saved, found = once(type(self), "restored", lambda: _restored(type(self)))
        expected, why = saved[case.name]
        check(why is None, f"bt.save fails: {why}")
        check("error" not in found[case.name], f"bt.restore fails: {found[case.name].get('error')}")
        assert_bit_identical(expected, found[case.name], what="restored")

    def test_two_processes_calibrate_like_one(self, case: ModuleCase) -> None:
        """Protects users of torchrun: ranges are those of all the data, on every rank."""
        bench = self.bench(case)
        if not _reachable(type(self)):
            pytest.skip("another process cannot import this test class")
        holder = bench.holder()
        bench.quantize(holder, bench.batches(BATCHES))
        expected = amaxes(holder)
        ranks = once(type(self), "distributed", lambda: _distributed(type(self)))
        for rank, found in enumerate(ranks):
            result = found[case.name]
            check("error" not in result, f"rank {rank}: {result.get('error')}")
            assert_bit_identical(expected, result, what=f"amax on rank {rank}")

    def test_an_unused_expert_is_reported(self, case: ModuleCase) -> None:
        """Protects users of mixtures of experts from experts that were never calibrated.

        Only for cases with ``experts=True``: one module gets tokens, its twin none.
        """
        if not case.experts:
            pytest.skip("the case says that it always gets tokens")
        bench = self.bench(case)
        model = _Experts(bench.module(), bench.module(seed=1)).eval()
        result = bench.run(model, bench.recipe("used", "idle"))
        summary = result.report.calibration
        assert summary is not None
        reported = set(summary.uncalibrated)
        empty = {name for name, q in named_quantizers(model) if not q.calibrated}
        check(reported == empty, f"reported are {sorted(reported)}, without data {sorted(empty)}")
        if any(slot.kind == "activation" for slot in bench.slots()):
            names = sorted(name for name in reported if name.startswith("idle."))
            check(names, "an expert without tokens was given ranges that no data supports")
        wrong = sorted(name for name in reported if not name.startswith("idle."))
        check(not wrong, f"the expert with tokens was not calibrated: {', '.join(wrong)}")
        with torch.no_grad():
            output = bench.output(model.idle)
        finite = all(bool(t.isfinite().all()) for t in output if t.is_floating_point())
        check(finite, "the uncalibrated expert computes NaN or Inf")

    def test_a_plain_export_decodes_to_memory(self, case: ModuleCase, tmp_path: Path) -> None:
        """Protects users from a file with other weights than those that were evaluated."""
        bench = self.bench(case)
        if not any(slot.kind == "weight" for slot in bench.slots()):
            pytest.skip("it has no weight slot")
        holder = bench.quantized()
        bench.toolkit.export(holder, tmp_path / "out", format=EXPORT)
        tensors = load_file(tmp_path / "out" / TENSORS)
        for path, module in named_quant_modules(holder):
            for slot, quantizer in module.slots().items():
                if quantizer.tensor is None:
                    if quantizer.scale is not None:
                        scale = tensors[f"{path}.{slot}_scale"]
                        assert_bit_identical(quantizer.scale, scale, what=f"scale of {path}.{slot}")
                    continue
                name = f"{path}.{quantizer.tensor}"
                weight = getattr(module, quantizer.tensor).detach()
                scales = Scales(tensors[f"{name}_scale"])
                read = Quantized(tensors[name], scales, quantizer.spec, weight.dtype)
                with torch.no_grad():
                    expected = quantizer(weight)
                assert_bit_identical(expected.cpu(), dequantize(read), what=name)


class _Experts(nn.Module):
    """Two experts, all tokens routed to the first."""

    def __init__(self, used: nn.Module, idle: nn.Module) -> None:
        super().__init__()
        self.used = used
        self.idle = idle

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch: Batch = kwargs or args
        call(self.idle, mapped(batch, lambda t: t[:0] if t.dim() else t))
        return call(self.used, batch)


# --- in other processes ---------------------------------------------------------------------------


def _reachable(owner: type[Any]) -> bool:
    try:
        reference_to(owner)
    except TypeError:
        return False
    return True


def _state(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """Return everything that must come back: output, weights, ranges, classes."""
    weights = {n: v for n, v in model.state_dict().items() if isinstance(v, Tensor)}
    classes = [[path, type(m).__qualname__] for path, m in named_quant_modules(model)]
    specs = {name: str(q.spec) for name, q in named_quantizers(model)}
    output = bench.output(model)
    everything = {"output": output, "weights": weights, "amax": amaxes(model)}
    return {**mapped(everything, lambda t: t.cpu()), "classes": classes, "specs": specs}


def _restored(owner: type[Any]) -> tuple[dict[str, tuple[Any, str | None]], Mapping[str, Any]]:
    """Save every case here, restore it there; return both sides by case."""
    import bittern as bt

    with tempfile.TemporaryDirectory(prefix="bittern-restore-") as name:
        saved = {}
        for index, (key, bench) in enumerate(each(given_cases(owner), owner.toolkit())):
            path = Path(name) / str(index)

            def save(bench: Bench = bench, path: Path = path) -> dict[str, Any]:
                model = bench.quantized()
                with no_pickle():
                    bt.save(model, path, toolkit=bench.toolkit)
                return _state(bench, model)

            saved[key] = attempt(save)
        if _reachable(owner):
            return saved, run_fresh(_restore_all, asdict(reference_to(owner)), name)
        return saved, _restore(owner, Path(name))


def _restore_all(owner: dict[str, str], folder: str) -> dict[str, Any]:
    return _restore(Reference(**owner).resolve(), Path(folder))


def _restore(owner: type[Any], folder: Path) -> dict[str, Any]:
    import bittern as bt

    found: dict[str, Any] = {}
    for index, (key, bench) in enumerate(each(given_cases(owner), owner.toolkit())):
        path = folder / str(index)

        def restore(bench: Bench = bench, path: Path = path) -> dict[str, Any]:
            model = bench.holder(seed=1)
            with no_pickle():
                bt.restore(model, path, toolkit=bench.toolkit)
            return _state(bench, model)

        result, why = attempt(restore)
        found[key] = result if why is None else {"error": why}
    return found


def _distributed(owner: type[Any]) -> list[Any]:
    return run_distributed(_calibrate_all, asdict(reference_to(owner)), world=2)


def _calibrate_all(rank: int, world: int, owner: dict[str, str]) -> dict[str, Any]:
    cls = Reference(**owner).resolve()
    found: dict[str, Any] = {}
    for key, bench in each(given_cases(cls), cls.toolkit()):

        def calibrate(bench: Bench = bench) -> dict[str, Tensor]:
            model = bench.holder()
            bench.quantize(model, bench.batches(BATCHES)[rank::world])
            return {name: amax.cpu() for name, amax in amaxes(model).items()}

        result, why = attempt(calibrate)
        found[key] = result if why is None else {"error": why}
    return found
