"""Core's rules for subclasses of torch.nn's layers that have a forward of their own, as data."""

from __future__ import annotations

from typing import Any

from bittern.builtin.modules import INPUT, OUTPUT, WEIGHT
from bittern.records import ModuleRule, Slot

__all__ = ["SUBCLASS_RULES"]


def _proven(module: Any) -> bool | str:
    from bittern.nn.subclass import refusal

    return refusal(module)


def _rule(target: str, *slots: Slot) -> ModuleRule:
    return ModuleRule(
        target=f"torch.nn.modules.{target}",
        quantized="bittern.nn.subclass:QuantSubclass",
        slots=(WEIGHT, *slots),
        subclass_forward=True,
        predicate=_proven,
        priority=-1,
    )


SUBCLASS_RULES: tuple[ModuleRule, ...] = (
    _rule("linear:Linear", INPUT, OUTPUT),
    *(
        _rule(
            f"conv:Conv{n}d",
            Slot("input", channel_axis=-1 - n),
            Slot("output", channel_axis=-1 - n),
        )
        for n in (1, 2, 3)
    ),
)
