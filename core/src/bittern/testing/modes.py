"""What a mode owes its users: it is applied, saved, replayed elsewhere, and stacked with others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.convert import modes_of
from bittern.errors import PlanError
from bittern.testing.base import Conformance, check, given_cases, named, once
from bittern.testing.compare import assert_bit_identical
from bittern.testing.pickles import no_pickle
from bittern.testing.processes import run_fresh
from bittern.testing.references import Reference, reference_to

__all__ = ["ModeCase", "ModeConformance"]

RECIPE = {
    "name": "conformance-mode",
    "rules": [{"match": {"class": "Linear"}, "weight": "int8"}],
    "strict": False,
}


@dataclass(frozen=True)
class ModeCase:
    """One mode as a user would apply it.

    Attributes:
        name: The test id, and the mode's name.
        mode: The mode's name, where the case is called something else.
        options: Its options.
        make: Makes a model in eval mode, each time the same architecture; the weights differ with
            the seed of torch's generator.
        inputs: Makes the model's positional arguments.
        data: Makes batches for modes that need data.
        before: Modes that come first, as ``(name, options)``.
        quantizable: Whether the model is quantized before and after the mode, where the mode lets
            others follow.
    """

    name: str
    _: KW_ONLY
    mode: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[], nn.Module] = lambda: nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)
    )
    inputs: Callable[[torch.Generator], tuple[Any, ...]] = lambda generator: (
        torch.randn(4, 16, generator=generator),
    )
    data: Callable[[], Any] | None = None
    before: Sequence[tuple[str, Mapping[str, Any]]] = ()
    quantizable: bool = True

    @property
    def target(self) -> str:
        """Name of the mode."""
        return self.mode or self.name

    def model(self, *, seed: int = 0) -> nn.Module:
        """Return a fresh model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().eval()

    def output(self, model: nn.Module) -> Any:
        """Return what the model computes."""
        with torch.no_grad():
            return model(*self.inputs(torch.Generator().manual_seed(7)))


class ModeConformance(Conformance):
    """Modes, each applied to a small model, saved, and replayed on a fresh one."""

    def cases(self) -> Sequence[ModeCase]:
        """Return the cases; every mode of the plugin without options by default."""
        return [ModeCase(mode.name) for mode in self.subject().call("register_modes")]

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every case."""
        return {"case": named(given_cases(cls))}

    # --- the tests ---

    def test_it_is_on_the_stack(self, case: ModeCase) -> None:
        """Protects users from a change of their model that nothing tells of."""
        model = self._applied(case)
        found = modes_of(model)[-1]
        check(found.name == case.target, f"the stack ends with {found.name!r}")

    def test_the_stack_survives_a_copy(self, case: ModeCase) -> None:
        """Protects users who keep a copy, as an average of weights does."""
        model = self._applied(case)
        twin = copy.deepcopy(model)
        check(modes_of(twin) == modes_of(model), f"the copy's stack is {modes_of(twin)}")
        assert_bit_identical(case.output(model), case.output(twin), what="output of the copy")

    def test_unknown_options_are_refused(self, case: ModeCase) -> None:
        """Protects users from options that are misspelled and ignored."""
        model = self._prepared(case)
        expected = case.output(model)
        with pytest.raises(PlanError, match="no_such_option"):
            self._apply(model, case.target, {**case.options, "no_such_option": 1}, case)
        assert_bit_identical(expected, case.output(model), what="output after the error")

    def test_restore_makes_the_same_model(self, case: ModeCase, tmp_path: Path) -> None:
        """Protects users from a checkpoint that comes back as something else; without pickle."""
        model = self._applied(case)
        with no_pickle():
            self.toolkit().save(model, tmp_path / "state")
            fresh = case.model(seed=1)
            self.toolkit().restore(fresh, tmp_path / "state")
        assert_bit_identical(case.output(model), case.output(fresh), what="output")
        assert_bit_identical(_tensors(model), _tensors(fresh), what="state_dict")
        check(_named(fresh) == _named(model), f"the stack is {_named(fresh)}")

    def test_restore_in_a_fresh_process(self, case: ModeCase, tmp_path: Path) -> None:
        """Protects users who load tomorrow what they saved today."""
        try:
            reference = asdict(reference_to(type(self)))
        except TypeError:
            pytest.skip("another process cannot import this test class")
        model = self._applied(case)
        self.toolkit().save(model, tmp_path / "state")
        found = run_fresh(_restored, reference, case.name, str(tmp_path / "state"))
        assert_bit_identical(case.output(model), found, what="output in a fresh process")

    def test_what_was_restored_can_be_saved_again(self, case: ModeCase, tmp_path: Path) -> None:
        """Protects users whose work goes through many hands."""
        model = self._applied(case)
        self.toolkit().save(model, tmp_path / "one")
        fresh = case.model(seed=1)
        self.toolkit().restore(fresh, tmp_path / "one")
        self.toolkit().save(fresh, tmp_path / "two")
        for name in ("manifest.json", "state.safetensors"):
            one, two = ((tmp_path / d / name).read_bytes() for d in ("one", "two"))
            check(one == two, f"{name} differs after a restore")

    def test_it_stacks_with_quantization(self, case: ModeCase, tmp_path: Path) -> None:
        """Protects users who quantize what the mode made."""
        mode = self.toolkit().registry.modes.get(case.target)
        follows = mode.next_modes
        if not case.quantizable or (follows is not None and "quantize" not in follows):
            pytest.skip("the case, or the mode, says that quantization does not follow")
        model = self._applied(case)
        self.toolkit().apply_mode(model, "quantize", {"recipe": RECIPE})
        check(_named(model)[-1] == "quantize", f"the stack is {_named(model)}")
        self.toolkit().save(model, tmp_path / "state")
        fresh = case.model(seed=1)
        self.toolkit().restore(fresh, tmp_path / "state")
        assert_bit_identical(case.output(model), case.output(fresh), what="output")
        check(_named(fresh) == _named(model), f"the stack is {_named(fresh)}")

    # --- helpers ---

    def _apply(
        self, model: nn.Module, name: str, options: Mapping[str, Any], case: ModeCase
    ) -> None:
        data = None if case.data is None else case.data()
        self.toolkit().apply_mode(model, name, options, data=data)

    def _prepared(self, case: ModeCase) -> nn.Module:
        model = case.model()
        for name, options in case.before:
            self._apply(model, name, options, case)
        return model

    def _applied(self, case: ModeCase) -> nn.Module:
        model = self._prepared(case)
        self._apply(model, case.target, case.options, case)
        return model


def _named(model: nn.Module) -> list[str]:
    return [mode.name for mode in modes_of(model)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def _restored(owner: dict[str, str], name: str, path: str) -> Any:
    cls = Reference(**owner).resolve()
    case = dict(once(cls, "parameters", cls.parameters)["case"])[name]
    model = case.model(seed=1)
    cls.toolkit().restore(model, path)
    return case.output(model)
