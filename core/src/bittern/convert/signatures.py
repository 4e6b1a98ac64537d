"""Checks that a quantized class is called as the class it takes the place of.

A framework that changes the arguments of a layer's ``forward`` would otherwise be met in the middle
of a forward pass, with a TypeError that names nobody.
"""

from __future__ import annotations

import inspect
from functools import cache
from inspect import Parameter
from typing import Any

from torch import nn

from bittern.errors import PluginError

__all__ = ["check_forward"]

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def check_forward(quantized: type[nn.Module], own: type, *, plugin: str, where: str) -> None:
    """Refuse a quantized class whose ``forward`` cannot be called as ``own``'s is.

    What is optional on either side is left alone: it may never be given.

    Args:
        quantized: The mixin of a rule.
        own: The class of the live module.
        plugin: Label of the rule's plugin.
        where: Path of the module.

    Raises:
        PluginError: An argument that one side demands is unknown to the other.
    """
    classes: tuple[Any, Any] = (quantized, own)  # mypy takes a class for unhashable
    problem = _mismatch(*classes)
    if problem:
        raise PluginError(
            f"plugin {plugin}: {problem}; {own.__qualname__} was changed since the plugin was made",
            where=where,
            hint=f"pip install -U {plugin.partition(' ')[0]}, or the version of the framework that "
            "the plugin is for",
        )


@cache
def _mismatch(quantized: Any, own: Any) -> str:
    new, old = (getattr(cls, "forward", None) for cls in (quantized, own))
    if new is old or new is None or old is None or new is nn.Module.forward:
        return ""
    try:
        given, wanted = (list(inspect.signature(f).parameters.values())[1:] for f in (old, new))
    except (TypeError, ValueError):
        return ""  # a compiled function without a signature
    text = f"{_call(quantized, wanted)} is not called as {_call(own, given)}"
    return text if _unknown(given, wanted) or _unknown(wanted, given) else ""


def _unknown(demanded: list[Parameter], known: list[Parameter]) -> bool:
    """Whether a required argument of ``demanded`` has no place among ``known``."""
    kinds = {p.kind for p in known}
    places = sum(p.kind in POSITIONAL for p in known)
    names = {p.name for p in known}
    required = [p for p in demanded if p.default is Parameter.empty]
    positional = sum(p.kind in POSITIONAL for p in required)
    if positional > places and Parameter.VAR_POSITIONAL not in kinds:
        return True
    keywords = [p.name for p in required if p.kind is Parameter.KEYWORD_ONLY]
    return not (set(keywords) <= names or Parameter.VAR_KEYWORD in kinds)


def _call(cls: type, parameters: list[Parameter]) -> str:
    bare = [p.replace(annotation=Parameter.empty) for p in parameters]
    return f"{cls.__qualname__}.forward{inspect.Signature(bare)}"
