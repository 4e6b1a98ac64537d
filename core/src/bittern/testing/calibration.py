"""What a calibration algorithm owes its users."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.calibration.workdir import read_changes
from bittern.errors import CalibrationError
from bittern.nn import named_quantizers, quantizers_off
from bittern.records import Algorithm
from bittern.report import Result
from bittern.testing.base import Conformance, check, given_cases, named, once
from bittern.testing.compare import assert_bit_identical
from bittern.testing.module_cases import amaxes, attempt
from bittern.testing.processes import run_distributed
from bittern.testing.references import Reference, reference_to

__all__ = ["AlgorithmCase", "AlgorithmConformance"]

WEIGHTS = {"match": {"class": "Linear"}, "weight": "int8"}
STATIC = {**WEIGHTS, "input": {"format": "int8", "granularity": "tensor"}}
WIDTH = 16


@dataclass(frozen=True)
class AlgorithmCase:
    """One algorithm as a recipe would run it.

    Attributes:
        name: The algorithm's name, and the test id.
        options: Its options.
        pipeline: The recipe's ``algorithm:``, where it does not set every scale by itself; the
            algorithm alone by default.
        rules: The recipe's rules for a model of two `nn.Linear`; int8 weights and static int8
            inputs by default.
        max_loss: The largest squared error of the output, as a multiple of max calibration's.
        tolerance: Largest relative difference of the ranges between two processes and one; sums
            over the data differ in their last bits, maxima do not.
    """

    name: str
    _: KW_ONLY
    options: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Sequence[Any] = ()
    rules: Sequence[Mapping[str, Any]] = (STATIC,)
    max_loss: float = 1.1
    tolerance: float = 0.0

    def recipe(self, rules: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return the recipe that runs it."""
        steps = list(self.pipeline) or [{"name": self.name, "options": dict(self.options)}]
        return {
            "name": f"conformance-{self.name}",
            "rules": [dict(rule) for rule in (self.rules if rules is None else rules)],
            "algorithm": steps,
        }


class Net(nn.Module):
    """Two linears, some channels of the input far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(rows, WIDTH)``."""
        output: Tensor = self.down(torch.relu(self.up(x)))
        return output


def _net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def _data(count: int = 4, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp2(torch.arange(WIDTH) % 5 - 2.0)
    return [torch.randn(32, WIDTH, generator=generator) * channels for _ in range(count)]


class AlgorithmConformance(Conformance):
    """Calibration algorithms, each run on a small model.

    Without ``cases``, every algorithm that the plugin registers is tested with its defaults.
    """

    def cases(self) -> Sequence[AlgorithmCase]:
        """Return the cases."""
        return [AlgorithmCase(a.name) for a in self.subject().call("register_algorithms")]

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every case."""
        return {"case": named(given_cases(cls))}

    # --- the tests ---

    def test_no_quantizer_is_left_uncalibrated(self, case: AlgorithmCase) -> None:
        """Protects users from layers that stay unquantized though their data was there."""
        _, result = self._run(case)
        left = [name for name, q in named_quantizers(result.model) if not q.calibrated]
        check(not left, f"no range was set for {', '.join(left)}")
        summary = result.report.calibration
        assert summary is not None
        check(not summary.uncalibrated, f"reported as uncalibrated: {summary.uncalibrated}")

    def test_no_observer_is_left_behind(self, case: AlgorithmCase) -> None:
        """Protects users from a model that goes on collecting statistics, or is still observing."""
        model, _ = self._run(case)
        left = [name for name, q in named_quantizers(model) if q.observer is not None]
        check(not left, f"observers stay on {', '.join(left)}")
        off = [name for name, q in named_quantizers(model) if not q.enabled]
        check(not off, f"switched off after calibration: {', '.join(off)}")

    def test_no_hook_is_left_behind(self, case: AlgorithmCase) -> None:
        """Protects users from forward passes that keep feeding a finished calibration."""
        model, _ = self._run(case)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        left = [
            n or "the model" for n, m in model.named_modules() if any(vars(m)[h] for h in hooks)
        ]
        check(not left, f"hooks stay on {', '.join(left)}")

    def test_train_mode_is_restored(self, case: AlgorithmCase) -> None:
        """Protects users who calibrate in the middle of training."""
        model = _net()
        model.up.train()
        model.down.requires_grad_(False)
        self._quantize(model, case)
        modes = {n: m.training for n, m in (("up", model.up), ("down", model.down))}
        check(modes == {"up": True, "down": False}, f"the training flags became {modes}")
        flags = [p.requires_grad for p in model.parameters()]
        check(flags == [True, True, False, False], "requires_grad of the parameters was changed")
        kept = [n for n, p in model.named_parameters() if p.grad is not None]
        check(not kept, f"gradients are left on {', '.join(kept)}")

    def test_the_global_generator_is_left_alone(self, case: AlgorithmCase) -> None:
        """Protects users whose own random numbers depend on the global generator."""
        before = torch.random.get_rng_state()
        self._run(case)
        assert_bit_identical(before, torch.random.get_rng_state(), what="torch's global generator")

    def test_calibration_is_deterministic(self, case: AlgorithmCase) -> None:
        """Protects users who must be able to make the same model again."""
        (first, _), (second, _) = self._run(case), self._run(case)
        assert_bit_identical(amaxes(first), amaxes(second), what="amax")
        assert_bit_identical(_weights(first), _weights(second), what="weights")

    def test_it_needs_data_only_if_it_says_so(self, case: AlgorithmCase) -> None:
        """Protects users from finding out that data was needed, or was not, after the wait."""
        needs = self._needs(case)
        model = _net()
        weights_only = case.recipe([WEIGHTS])
        if needs - {"data"}:
            found = _error(lambda: self.toolkit().quantize(model, weights_only, None))
            check(
                isinstance(found, CalibrationError),
                f"it needs {', '.join(sorted(needs))}, and without data the error is {found!r}",
            )
            return
        found = _error(lambda: self.toolkit().quantize(model, weights_only, _Refused()))
        check(
            found is None,
            f"it says that it needs {', '.join(sorted(needs)) or 'nothing'}, and fails with "
            f"weights alone: {found}",
        )
        if "data" in needs:
            found = _error(lambda: self.toolkit().quantize(_net(), case.recipe([STATIC]), None))
            check(
                isinstance(found, CalibrationError),
                f"static inputs without data must be a CalibrationError, not {found!r}",
            )

    def test_unknown_options_are_refused(self, case: AlgorithmCase) -> None:
        """Protects users from a mistyped option that silently does nothing."""
        recipe = case.recipe()
        recipe["algorithm"] = [
            {"name": case.name, "options": {**case.options, "no_such_option": 1}}
        ]
        found = _error(lambda: self.toolkit().quantize(_net(), recipe, _data()))
        check(
            isinstance(found, CalibrationError) and "no_such_option" in str(found),
            f"an unknown option ends with {found!r}; take options as keyword-only arguments",
        )

    def test_the_error_is_no_worse_than_that_of_max(self, case: AlgorithmCase) -> None:
        """Protects users from an algorithm that costs time and quality."""
        errors = {}
        recipes = {"max": {**case.recipe(), "algorithm": "max"}, case.name: case.recipe()}
        held_out = torch.cat(_data(2, seed=9))
        for name, recipe in recipes.items():
            model = _net()
            with torch.no_grad():
                truth = model(held_out)
                self.toolkit().quantize(model, recipe, _data())
                errors[name] = float((model(held_out) - truth).square().mean())
        limit = case.max_loss * errors["max"]
        check(
            errors[case.name] <= limit,
            f"its squared error is {errors[case.name]:.3g}, max calibration's {errors['max']:.3g}",
        )

    def test_without_quantizers_the_model_computes_the_same(self, case: AlgorithmCase) -> None:
        """Protects users who compare with the original: what moves between weights cancels out."""
        model = _net()
        x = _data(1, seed=9)[0]
        with torch.no_grad():
            expected = model(x)
            self._quantize(model, case)
            with quantizers_off(model):
                found = model(x)
        close = torch.allclose(expected, found, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        check(
            close or self._rewrites(case),
            "with the quantizers off the model computes something else; an algorithm that rounds "
            "weights itself says so with needs={'hessian', ...}",
        )

    def test_block_by_block_it_keeps_to_the_block(self, case: AlgorithmCase) -> None:
        """Protects users of work directories and models larger than memory.

        Another block's weights are on the disk by then, or have been read already.
        """
        model = nn.Sequential(nn.Sequential(_net(), _net(), _net()))
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            self.toolkit().quantize(model, case.recipe(), _data(), work_dir=work)
            for index, file in enumerate(sorted(work.glob("part-*"))):
                names = [name.removeprefix("ranges:") for name in read_changes(file)]
                others = [name for name in names if not name.startswith(f"0.{index}.")]
                check(
                    not others,
                    f"calibrating 0.{index} changed {', '.join(others)}; take the modules from "
                    "context.modules(model) and the folds from context.trace()",
                )
        left = [name for name, q in named_quantizers(model) if not q.calibrated]
        check(not left, f"no range was set for {', '.join(left)}")

    def test_two_processes_calibrate_like_one(self, case: AlgorithmCase) -> None:
        """Protects users of torchrun: the ranges are those of all the data, on every rank."""
        model, _ = self._run(case)
        expected = amaxes(model)
        try:
            reference_to(type(self))
        except TypeError:
            pytest.skip("another process cannot import this test class")
        for rank, found in enumerate(once(type(self), "ranks", lambda: _distributed(type(self)))):
            result = found[case.name]
            check("error" not in result, f"rank {rank}: {result.get('error')}")
            if case.tolerance == 0:
                assert_bit_identical(expected, result, what=f"amax on rank {rank}")
                continue
            for name, value in expected.items():
                near = torch.allclose(value, result[name], rtol=case.tolerance, atol=0)
                check(near, f"amax of {name} on rank {rank}: {result[name]} instead of {value}")

    # --- helpers ---

    def _quantize(self, model: nn.Module, case: AlgorithmCase) -> Result:
        return self.toolkit().quantize(model, case.recipe(), _data())

    def _run(self, case: AlgorithmCase) -> tuple[nn.Module, Result]:
        model = _net()
        return model, self._quantize(model, case)

    def _algorithms(self, case: AlgorithmCase) -> list[Algorithm]:
        table = self.toolkit().registry.algorithms
        plan = self.toolkit().plan(_net(), case.recipe())
        return [table.get(name) for name, _ in plan.algorithm]

    def _needs(self, case: AlgorithmCase) -> frozenset[str]:
        return frozenset().union(*(algorithm.needs for algorithm in self._algorithms(case)))

    def _rewrites(self, case: AlgorithmCase) -> bool:
        return bool(self._needs(case) - {"data"})


class _Refused:
    """Data that must not be touched."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("the data was read")


def _error(function: Any) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def _distributed(owner: type[Any]) -> list[Any]:
    return run_distributed(_calibrate_all, asdict(reference_to(owner)), world=2)


def _calibrate_all(rank: int, world: int, owner: dict[str, str]) -> dict[str, Any]:
    cls = Reference(**owner).resolve()
    found: dict[str, Any] = {}
    for name, case in cls.parameters()["case"]:

        def calibrate(case: AlgorithmCase = case) -> dict[str, Tensor]:
            model = _net()
            cls.toolkit().quantize(model, case.recipe(), _data()[rank::world])
            return amaxes(model)

        result, why = attempt(calibrate)
        found[name] = result if why is None else {"error": why}
    return found
