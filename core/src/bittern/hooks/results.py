"""What each hook may return, checked where the plugin that returned it is known.

A wrong answer would otherwise surface as an AttributeError deep in core, without anybody's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bittern import records
from bittern.hooks import specs

__all__ = ["WrongResultError", "checked"]

MODULE = ("torch.nn.modules.module", "Module")


class WrongResultError(TypeError):
    """A hook returned something else than its specification says.

    Attributes:
        got: ``"returned a dict from register_modules, which must return ModuleRule records"``.
        hint: What to return.
    """

    def __init__(self, got: str, hint: str) -> None:
        super().__init__(got)
        self.got = got
        self.hint = hint


@dataclass(frozen=True)
class _Answer:
    """What a ``resolve_*`` or ``run_*`` hook answers."""

    what: str
    holds: Callable[[Any], bool]


def _is_module(value: Any) -> bool:
    """Whether it is an ``nn.Module``, without importing torch."""
    return any((cls.__module__, cls.__name__) == MODULE for cls in type(value).__mro__)


def _is_data(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


ANSWERS: Mapping[str, _Answer] = {
    "resolve_model": _Answer("an nn.Module", _is_module),
    "resolve_model_adapter": _Answer(
        "a bittern.records.ModelAdapter", lambda value: isinstance(value, records.ModelAdapter)
    ),
    "resolve_weight_access": _Answer(
        "a context manager", lambda v: hasattr(v, "__enter__") and hasattr(v, "__exit__")
    ),
    "resolve_parallel_state": _Answer(
        "a bittern.records.ParallelState", lambda value: isinstance(value, records.ParallelState)
    ),
    "resolve_calibration_data": _Answer("an iterable of batches", _is_data),
    "resolve_checkpoint_io": _Answer(
        "a bittern.records.CheckpointIO", lambda value: isinstance(value, records.CheckpointIO)
    ),
    "run_calibration": _Answer("the number of batches", lambda value: isinstance(value, int)),
}


def checked(hook: str, result: Any, *, wrapper: bool = False) -> Any:
    """Return the result of an implementation as its callers get it.

    Records come as a list, so that a lazy iterable fails here and not in the middle of a plan.

    Args:
        hook: The hook's name.
        result: What the implementation returned.
        wrapper: Whether it is a wrapper's, which for ``run_*`` hooks must not be ``None``.

    Raises:
        WrongResultError: It is of another type.
    """
    if hook in specs.RETURNS:
        return None if result is None else _records(hook, result)
    answer = ANSWERS.get(hook)
    if answer is None or (result is None and not (wrapper and hook.startswith("run_"))):
        return result
    if not answer.holds(result):
        shown = repr(result)
        shown = shown if len(shown) <= 40 else f"a {type(result).__name__}"
        hint = "let a wrapper return what `yield` gave it" if wrapper else f"return {answer.what}"
        hint += "" if hook.startswith("run_") else ", or None for what is not for this plugin"
        raise WrongResultError(f"returned {shown} from {hook} instead of {answer.what}", hint)
    return result


def _records(hook: str, result: Any) -> list[Any]:
    name = specs.RETURNS[hook]
    kind = getattr(records, name)
    alone = isinstance(result, kind) or not isinstance(result, Iterable)
    items = [result] if alone else list(result)
    for item in items:
        if not isinstance(item, kind):
            raise WrongResultError(
                f"returned a {type(item).__name__} from {hook}, which must return {name} records",
                f"return a list of bittern.records.{name}",
            )
    return items
