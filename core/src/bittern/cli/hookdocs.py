"""What the hook specifications say about themselves: the reference of ``bittern plugins hooks``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

__all__ = ["HookDoc", "hook_docs"]

KINDS = {
    "register": "collected",
    "discover": "collected",
    "resolve": "first answer",
    "before": "notification",
    "after": "notification",
    "run": "first result, may be wrapped",
}


@dataclass(frozen=True)
class HookDoc:
    """One hook.

    Attributes:
        name: The hook's name, what an implementation is called.
        kind: What becomes of the implementations' results; follows from the prefix.
        arguments: Name to annotation.
        returns: Annotation of the result.
        summary: First line of its docstring.
        reserved: Whether this version does not call it yet.
    """

    name: str
    kind: str
    arguments: dict[str, str]
    returns: str
    summary: str
    reserved: bool

    @property
    def signature(self) -> str:
        """``name(argument, ...)``."""
        return f"{self.name}({', '.join(self.arguments)})"


def hook_docs() -> list[HookDoc]:
    """Return every hook, in the order of `bittern.hooks.specs`."""
    from bittern.hooks import specs
    from bittern.hooks.markers import PROJECT

    found = []
    for name, function in vars(specs).items():
        if not inspect.isfunction(function) or not hasattr(function, f"{PROJECT}_spec"):
            continue
        signature = inspect.signature(function)
        text = inspect.getdoc(function) or ""
        summary = text.partition("\n\n")[0].replace("\n", " ")
        found.append(
            HookDoc(
                name=name,
                kind=KINDS.get(name.partition("_")[0], ""),
                arguments={p.name: str(p.annotation) for p in signature.parameters.values()},
                returns=str(signature.return_annotation),
                summary=summary.removesuffix(" Reserved."),
                reserved=summary.endswith("Reserved."),
            )
        )
    return found
