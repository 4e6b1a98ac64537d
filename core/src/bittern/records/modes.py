"""Modes: the optimization steps in a model's life, and the record of one that was applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bittern.records.checks import check_import_strings

__all__ = ["AppliedMode", "Mode"]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """An optimization step that can be stacked, saved and replayed.

    What a mode changes is of two kinds: the structure of the model (classes, modules, shapes),
    which ``restore`` makes again on a fresh model, and tensors, which the saved state holds.

    Attributes:
        name: The mode's name in the manifest.
        convert: ``"package.module:function"`` called as ``convert(model, config, context)`` with a
            `bittern.modes.ModeContext`; it changes the model in place and may return a mapping of
            plain data, the metadata that ``restore`` is given.
        restore: ``"package.module:function"`` called as
            ``restore(model, config, metadata, context)`` on a fresh model; it makes the same
            structure, computing nothing. What it returns, if anything, is called when the tensors
            have been loaded.
        config: ``"package.module:Class"`` of a frozen dataclass, made with the options that the
            user gives; ``None`` where the mode has no options: ``config`` is then an empty dict.
        metadata: ``"package.module:function"`` called as ``metadata(model)`` when the model is
            saved, for what changed since; its keys take the place of those that ``convert``
            returned.
        next_modes: Names of the modes that may follow; ``None`` for any, empty for none.
        exclusive: Whether a model holds it once: applied again, it takes the earlier one's place.
        description: One line for people.
    """

    name: str
    convert: str
    restore: str
    config: str | None = None
    metadata: str | None = None
    next_modes: frozenset[str] | None = None
    exclusive: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        check_import_strings(self, "convert", "restore", "config", "metadata")


@dataclass(frozen=True, kw_only=True)
class AppliedMode:
    """A mode that was applied to a model, as plain data.

    Attributes:
        name: The mode's name.
        plugin: Label of the plugin that registered it.
        config: Its options.
        metadata: What else its ``restore`` needs.
    """

    name: str
    plugin: str
    config: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
