"""What a plugin author says about a module class, and how the kit builds and runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.nn import QuantModule, named_quantizers
from bittern.planning import slots_of
from bittern.records import ModuleRule, Slot
from bittern.registry import Match
from bittern.report import Result
from bittern.testing.base import check
from bittern.testing.compare import tensors_of
from bittern.toolkit import Toolkit

__all__ = ["Batch", "Bench", "Holder", "ModuleCase", "call", "gradients"]

# Positional arguments, or keyword arguments.
Batch = tuple[Any, ...] | Mapping[str, Any]
PATH = "inner"
COARSE = {"format": "int4", "granularity": "tensor"}


@dataclass(frozen=True)
class ModuleCase:
    """One module that a plugin's rule takes.

    Attributes:
        name: The test id.
        make: Builds the module, in float32; called under a fixed seed.
        inputs: Makes one batch from a generator: a tuple of positional arguments, or a mapping of
            keyword arguments. The numbers should differ from call to call.
        min_sqnr: The least signal to noise ratio of the quantized output, in dB. The default
            fits one layer with every slot in int8.
        formats: Slot to recipe spec where int8 is not what the slot is for, as
            ``{"weight": "fp8"}``.
        experts: Whether the module may get no tokens, as one expert of many does.
        differentiable: Whether the original has gradients.
        device: Where it runs.
    """

    name: str
    _: KW_ONLY
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Batch]
    min_sqnr: float = 20.0
    formats: Mapping[str, Any] = field(default_factory=dict)
    experts: bool = False
    differentiable: bool = True
    device: str = "cpu"


class Holder(nn.Module):
    """A model with the module under test at ``inner``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        return self.inner(*args, **kwargs)


def call(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch."""
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


class Bench:
    """Builds, plans, quantizes and runs one case.

    Args:
        case: The case.
        toolkit: Core and the plugin.
    """

    def __init__(self, case: ModuleCase, toolkit: Toolkit) -> None:
        self.case = case
        self.toolkit = toolkit
        if case.device.startswith("cuda") and not torch.cuda.is_available():
            pytest.skip(f"the case {case.name} needs an NVIDIA GPU")

    # --- building ---

    def module(self, *, seed: int = 0) -> nn.Module:
        """Return a fresh module in eval mode; the global generator stays as it was."""
        devices = range(torch.cuda.device_count()) if self.case.device != "cpu" else ()
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)
            return self.case.make().to(self.case.device).eval()

    def holder(self, *, seed: int = 0) -> Holder:
        """Return a fresh model with the module at ``inner``."""
        return Holder(self.module(seed=seed)).eval()

    def batch(self, *, seed: int = 0) -> Batch:
        """Return the batch of a seed."""
        generator = torch.Generator().manual_seed(seed)
        found: Batch = mapped(self.case.inputs(generator), lambda t: t.to(self.case.device))
        return found

    def batches(self, count: int = 2) -> list[Batch]:
        """Return several batches."""
        return [self.batch(seed=seed) for seed in range(count)]

    # --- planning ---

    def rule(self, module: nn.Module | None = None) -> ModuleRule:
        """Return the rule that takes the module.

        Raises:
            AssertionError: There is none, or it refuses the module.
        """
        return self._match(module if module is not None else self.module()).rule

    def slots(self) -> tuple[Slot, ...]:
        """Return the slots of the module."""
        module = self.module()
        return slots_of(self._match(module), module)

    def _match(self, module: nn.Module) -> Match[ModuleRule]:
        table = self.toolkit.registry.modules.extended(
            self.toolkit.plugins.collect("discover_modules", model=Holder(module))
        )
        found = table.find(module)
        check(
            isinstance(found, Match),
            f"no rule takes a {type(module).__qualname__}: "
            f"{getattr(found, 'reason', '') or 'no plugin has one for its class'}",
        )
        assert isinstance(found, Match)
        check(found.rule.quantized is not None, f"its rule refuses it: {found.rule.reason}")
        return found

    def recipe(self, *paths: str, spec: Any = None) -> dict[str, Any]:
        """Return a recipe that quantizes every slot of the modules at ``paths``.

        Args:
            paths: Module paths; ``inner`` by default.
            spec: The spec of every slot; int8, activations per tensor, by default.
        """
        slots = {slot.name: spec if spec is not None else self._spec(slot) for slot in self.slots()}
        rules = [{"match": path, "slots": slots} for path in paths or (PATH,)]
        return {"name": "conformance", "rules": rules}

    def _spec(self, slot: Slot) -> Any:
        given = self.case.formats.get(slot.name)
        if given is not None:
            return given
        return "int8" if slot.kind == "weight" else {"format": "int8", "granularity": "tensor"}

    # --- running ---

    def quantize(
        self, model: nn.Module, batches: list[Batch] | None = None, *, spec: Any = None
    ) -> Result:
        """Quantize ``model``, the module under test at ``inner``, with every slot on."""
        return self.run(model, self.recipe(spec=spec), batches)

    def run(
        self, model: nn.Module, recipe: dict[str, Any], batches: list[Batch] | None = None
    ) -> Result:
        """Quantize ``model`` by ``recipe``."""
        given = batches if batches is not None else self.batches()

        def data(model: nn.Module) -> None:
            for batch in given:
                call(model, batch)

        return self.toolkit.quantize(model, recipe, data)

    def quantized(self, *, spec: Any = None) -> Holder:
        """Return a fresh model, quantized and calibrated on the case's batches."""
        holder = self.holder()
        self.quantize(holder, spec=spec)
        return holder

    @torch.no_grad()
    def output(self, model: nn.Module, *, seed: int = 0) -> Any:
        """Return what ``model`` makes of a batch, as tensors that nobody else holds."""
        return [tensor.clone() for tensor in tensors_of(call(model, self.batch(seed=seed)))]

    def inner(self, holder: nn.Module) -> QuantModule:
        """Return the converted module.

        Raises:
            AssertionError: It was not converted.
        """
        module = holder.get_submodule(PATH)
        check(isinstance(module, QuantModule), f"the {type(module).__name__} was not converted")
        assert isinstance(module, QuantModule)
        return module


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested structure with ``function`` applied to its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def floating(batch: Batch) -> list[Tensor]:
    """Return the floating-point tensors of a batch."""
    return [tensor for tensor in tensors_of(batch) if tensor.is_floating_point()]


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor | None]:
    """Return the gradients of the sum of squares of the outputs, by parameter and input."""

    def leaf(tensor: Tensor) -> Tensor:
        fresh = tensor.detach().clone()
        return fresh.requires_grad_() if tensor.is_floating_point() else fresh

    given = mapped(batch, leaf)
    model.zero_grad(set_to_none=True)
    outputs = [t for t in tensors_of(call(model, given)) if t.requires_grad]
    check(outputs, "no output depends on anything that has a gradient")
    total = torch.stack([output.float().square().sum() for output in outputs]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    found = {f"input {i}": t.grad for i, t in enumerate(floating(given))}
    found |= {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    dense = torch.strided
    return {n: g if g is None or g.layout is dense else g.to_dense() for n, g in found.items()}


def amaxes(model: nn.Module) -> dict[str, Tensor]:
    """Return the range of every quantizer that has one."""
    return {n: q.amax.clone() for n, q in named_quantizers(model) if q.amax is not None}


def only(model: nn.Module, slot: str | None) -> None:
    """Switch every quantizer off but those of ``slot``."""
    for name, quantizer in named_quantizers(model):
        quantizer.enabled = name.rpartition(".")[2] == slot


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the result and ``None``, or ``None`` and why there is none."""
    try:
        return function(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def each(cases: list[ModuleCase], toolkit: Toolkit) -> Iterator[tuple[str, Bench]]:
    """Yield name and bench of the cases that can run on this machine."""
    for case in cases:
        if not case.device.startswith("cuda") or torch.cuda.is_available():
            yield case.name, Bench(case, toolkit)
