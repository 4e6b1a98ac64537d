"""Names of modules and tensors without what wrappers put into them.

A model that was saved as it is comes back inside DDP, ``torch.compile`` or a LoRA wrapper, and the
other way round. Each of them inserts segments into the names of everything that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["LiveNames", "plain_name"]

# At the front only, since a model may have a child of that name: DDP and AveragedModel; peft.
FRONT = (("module",), ("base_model", "model"), ("_orig_mod",))
# Anywhere: torch.compile, activation checkpointing, FSDP1, peft.
INNER = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"})


def plain_name(name: str) -> str:
    """Return a dotted name without the segments of known wrappers."""
    parts = tuple(name.split("."))
    front = True
    while front:
        front = False
        for prefix in FRONT:
            if parts[: len(prefix)] == prefix:
                parts, front = parts[len(prefix) :], True
    return ".".join(part for part in parts if part not in INNER)


class LiveNames:
    """Finds what the names of a saved model are called in a live one.

    Args:
        names: Names of the live model.
        innermost: Whether the longest of several live names is meant: of a wrapper and the module
            within, that module. Otherwise several live names with the same plain name keep theirs.
    """

    def __init__(self, names: Iterable[str], *, innermost: bool = False) -> None:
        plain: dict[str, list[str]] = {}
        for name in names:
            plain.setdefault(plain_name(name), []).append(name)
        self._live = {
            key: max(found, key=len) for key, found in plain.items() if innermost or len(found) == 1
        }
        if not innermost:
            self._live |= {
                name: name for found in plain.values() if len(found) > 1 for name in found
            }
        self._plain = {live: key for key, live in self._live.items()}

    def live(self, name: str) -> str:
        """Return the live name of a saved one; the same name where there is none."""
        return self._live.get(name) or self._live.get(plain_name(name), name)

    def saved(self, name: str) -> str:
        """Return the name under which a live one is saved."""
        return self._plain.get(name, name)
