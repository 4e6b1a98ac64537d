"""Rules about module classes: how they are quantized, traced, and what their dimensions mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bittern.records.checks import (
    check_class_name,
    check_import_strings,
    check_items,
    check_priority,
)

__all__ = ["LeafRule", "ModuleRule", "OpRule", "Slot", "SymInfoFactory", "SymbolRule"]

SymInfoFactory = Callable[[Any], Any]


@dataclass(frozen=True)
class Slot:
    """One quantizer position of a quantized module.

    Attributes:
        name: Slot name in recipes and plans (``weight``, ``input``, ``output``, ...); the
            quantizer is the child module ``f"{name}_quantizer"``.
        kind: Whether the slot quantizes a parameter or an activation.
        tensor: Parameter name of a weight slot.
        channel_axis: Axis that ``PerChannel`` keeps.
        role: What the recipe keys ``weight``, ``input`` and ``output`` take the slot for; by
            default its name where it is one of the three, and ``weight`` for every weight. A
            module with several weights (an LSTM, experts) has one slot each, and a recipe that
            says ``weight: int8`` speaks of all of them.
        group_axis: Axis along which ``PerGroup`` divides; the input features.
        stacked: Whether the first axis stacks independent tensors (experts): each has scales of
            its own. For an activation: whether its rows belong to experts, see
            `bittern.nn.Experts`.
    """

    name: str
    kind: Literal["weight", "activation"] = "activation"
    tensor: str | None = None
    channel_axis: int = 0
    role: Literal["weight", "input", "output"] | None = None
    group_axis: int = -1
    stacked: bool = False

    @property
    def spoken(self) -> str:
        """The recipe key that speaks of the slot, besides its name."""
        if self.role is not None:
            return self.role
        return "weight" if self.kind == "weight" else self.name


@dataclass(frozen=True, kw_only=True)
class ModuleRule:
    """Says how instances of a module class are quantized.

    Attributes:
        target: ``"defining.module:Class"``, matched along the MRO without importing the framework.
        quantized: ``"package.module:Class"`` of the `bittern.nn.QuantModule` mixin that replaces
            the class in place; imported on the first match. ``None`` says that the class must not
            be converted, for the reason given.
        slots: The quantizer positions of ``quantized``.
        slots_from: ``"package.module:function"`` that returns the slots of a live module, where
            they depend on it (the layers of an LSTM); called when the plan is made.
        reason: Why the class must not be converted.
        subclass_forward: Whether the rule also takes subclasses that override ``forward``.
        priority: Decides between rules of the same closeness; higher wins.
        predicate: Optional extra test on the live module. It may return a sentence instead of
            false, which the plan then gives as the reason.
        like: Name of the class that recipes may take it for, as ``"Linear"``: what
            ``match: {class: Linear}`` says, as the shipped recipes do, then holds for it too.
        by_name: Whether only a recipe rule that names the class, the role or the path reaches it,
            as ``{class: LayerNorm}`` and ``*.norm`` do. Patterns that end in a bare ``*``
            (``*``, ``blocks.*``) pass it by, unless they switch something off: they are about
            layers with weights.
    """

    target: str
    quantized: str | None
    slots: tuple[Slot, ...] = ()
    slots_from: str | None = None
    reason: str = ""
    subclass_forward: bool = False
    priority: int = 0
    predicate: Callable[[Any], bool | str] | None = None
    like: str | None = None
    by_name: bool = False

    def __post_init__(self) -> None:
        check_import_strings(self, "target", "quantized", "slots_from")
        check_class_name(self, "like")
        check_items(self, "slots", Slot)
        check_priority(self)


@dataclass(frozen=True, kw_only=True)
class SymbolRule:
    """Says which dimensions a module class has.

    Attributes:
        target: ``"defining.module:Class"``.
        symbols: ``"package.module:function"`` that maps a live module to its ``SymInfo``.
        subclass_forward: Whether subclasses that override ``forward`` match too.
        priority: Higher wins between rules of the same closeness.
    """

    target: str
    symbols: str
    subclass_forward: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        check_import_strings(self, "target", "symbols")
        check_priority(self)


@dataclass(frozen=True, kw_only=True)
class LeafRule:
    """Names a module class that the tracer must not enter.

    Attributes:
        target: ``"defining.module:Class"``.
        reason: Shown in the coverage report.
        subclass_forward: Whether subclasses that override ``forward`` match too.
        priority: Higher wins between rules of the same closeness.
    """

    target: str
    reason: str = ""
    subclass_forward: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        check_import_strings(self, "target")
        check_priority(self)


@dataclass(frozen=True, kw_only=True)
class OpRule:
    """Says how dimensions flow through an operator of the traced graph.

    Attributes:
        op: Qualified operator name, for example ``"aten.linear.default"``.
        flow: ``"package.module:function"`` that propagates dimensions through one node.
        options: Plain options handed to ``flow``.
        priority: Higher wins.
    """

    op: str
    flow: str
    options: Mapping[str, object] = field(default_factory=dict)
    priority: int = 0

    def __post_init__(self) -> None:
        check_import_strings(self, "flow")
        check_priority(self)
