"""The plan: who is quantized how, by whose rule, and what is left alone and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from bittern.records.formats import QuantizerSpec
from bittern.records.granularity import Granularity
from bittern.records.modules import Slot

__all__ = ["Plan", "PlanEntry"]


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One quantizer: a slot of a module and how it is quantized.

    Attributes:
        module: Dotted path of the module; ``""`` is the model itself.
        slot: Name of the slot, for example ``"weight"``.
        spec: Format, granularity, static or dynamic.
        rule: Target string of the module rule that took the module.
        plugin: Who registered that rule.
        kind: ``"weight"`` or ``"activation"``.
        shape: Shape of the weight, ``None`` for activations.
        recipe_rule: Which recipe rule decided, in words.
        slot_rule: The slot as its module rule declares it.
        like: Name of the class that recipes may take the module for, if the module rule gives one.
    """

    module: str
    slot: str
    spec: QuantizerSpec
    rule: str
    plugin: str
    kind: str
    slot_rule: Slot
    shape: tuple[int, ...] | None = None
    recipe_rule: str = ""
    like: str | None = None

    @property
    def format(self) -> str:
        """Name of the number format."""
        return self.spec.format.name

    @property
    def tensor(self) -> str | None:
        """Name of the parameter that a weight slot quantizes; ``None`` for activations."""
        return (self.slot_rule.tensor or self.slot) if self.kind == "weight" else None

    @property
    def path(self) -> str:
        """``"module.slot"``, the name of the quantizer."""
        return f"{self.module}.{self.slot}" if self.module else self.slot

    @property
    def parameter(self) -> str | None:
        """Full name of the quantized parameter; ``None`` for activations."""
        if self.tensor is None:
            return None
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    @property
    def needs_data(self) -> bool:
        """Whether it is an activation's, and its range has to be found from data."""
        return self.kind == "activation" and self.spec.needs_data

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        return self.spec.granularity


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe does to a model, before anything is changed.

    Attributes:
        recipe: Name of the recipe.
        entries: One entry per quantizer, in the model's order.
        skipped: Module path to the reason it stays as it is; every module that holds weights is
            either in ``entries`` or here.
        algorithm: Names of the calibration steps, left to right, with their options.
        classes: Module path to the quantized class (``"package.module:Class"``).
        parameters: Number of parameters of the whole model.
        bytes_before: Bytes of all parameters and persistent buffers, shared storage once.
        bytes_after: The same with quantized weights stored in their formats, scales included.
        warnings: Things a user should know, such as a pattern that matched nothing.
    """

    recipe: str
    entries: tuple[PlanEntry, ...]
    skipped: Mapping[str, str]
    algorithm: tuple[tuple[str, Mapping[str, object]], ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules to quantize, each once, in the model's order."""
        return tuple(dict.fromkeys(entry.module for entry in self.entries))

    @property
    def needs_data(self) -> bool:
        """Whether an activation quantizer has to see data."""
        return any(entry.needs_data for entry in self.entries)

    @property
    def effective_bits(self) -> float:
        """Mean stored bits per element of the quantized weights, scales included."""
        bits = total = 0.0
        for entry in self.entries:
            if entry.shape is not None:
                numel = 1
                for size in entry.shape:
                    numel *= size
                bits += entry.spec.bits_per_element(entry.shape) * numel
                total += numel
        return bits / total if total else 0.0

    def part(self, modules: Collection[str]) -> Plan:
        """Return the plan of some of its modules only.

        Args:
            modules: Their paths.
        """
        return replace(
            self,
            entries=tuple(entry for entry in self.entries if entry.module in modules),
            classes={path: name for path, name in self.classes.items() if path in modules},
        )

    def by_module(self) -> dict[str, dict[str, PlanEntry]]:
        """Return ``{module: {slot: entry}}`` in the model's order."""
        table: dict[str, dict[str, PlanEntry]] = {}
        for entry in self.entries:
            table.setdefault(entry.module, {})[entry.slot] = entry
        return table
