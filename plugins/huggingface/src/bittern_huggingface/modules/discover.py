"""Rules for the experts and the attention of a live model, by what their classes are like.

Every family of transformers has classes of its own for both. They are told by what they have in
common, so that a new family needs no new rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import moe

from bittern.nn import original_class
from bittern.records import ATTENTION_SLOTS, ModuleRule
from bittern.registry import target_of

__all__ = ["attends", "decorated", "discovered_rules"]

PACKAGE = "bittern_huggingface.modules"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
ATTENTION = frozenset({"scaled_dot_product_attention", "softmax"})
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm"})


def discovered_rules(model: nn.Module) -> list[ModuleRule]:
    """Return one rule for every class of fused experts and of attention in ``model``.

    Args:
        model: A model; converted modules count as what they were.
    """
    rules: dict[type, ModuleRule] = {}
    for cls in dict.fromkeys(original_class(module) for module in model.modules()):
        experts = next(filter(decorated, cls.__mro__), None)
        if experts is not None:
            rules[experts] = ModuleRule(
                target=target_of(experts),
                quantized=f"{PACKAGE}.experts:QuantExperts",
                slots_from=f"{PACKAGE}.experts:expert_slots",
                like="Linear",
            )
        elif attends(cls):
            rules[cls] = ModuleRule(
                target=target_of(cls),
                quantized="bittern.nn.attention:QuantAttention",
                slots=ATTENTION_SLOTS,
                like="Attention",
                by_name=True,
            )
    return list(rules.values())


def decorated(cls: type) -> bool:
    """Whether a class has the ``forward`` that `use_experts_implementation` gives to experts."""
    return getattr(vars(cls).get("forward"), "__globals__", None) is vars(moe)


@cache
def attends(cls: Any) -> bool:
    """Whether a class of transformers, or for it, computes attention itself.

    It calls the attention that the config selects, or it is called an attention and one of its
    methods has a softmax or calls `scaled_dot_product_attention`. `nn.Softmax`, which gates use
    too, counts beside a product.

    Args:
        cls: The class of a module.
    """
    if issubclass(cls, PreTrainedModel):
        return False
    names = set(_names(cls))
    if INTERFACE in names:
        return True
    ours = cls.__module__.partition(".")[0] in {"transformers", "transformers_modules"}
    called = "Attention" in cls.__name__ or "Attn" in cls.__name__
    module = "Softmax" in names and not names.isdisjoint(PRODUCTS)
    return ours and called and (module or not names.isdisjoint(ATTENTION))


def _names(cls: type) -> Iterator[str]:
    """Yield the global and attribute names that the methods of a class use."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        for method in vars(base).values():
            if isinstance(method, FunctionType):
                yield from inspect.unwrap(method).__code__.co_names
