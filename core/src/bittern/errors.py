"""Every error a user can meet: what happened, where, and what to do about it."""

from __future__ import annotations

__all__ = [
    "BitternError",
    "CalibrationError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "ModelError",
    "NumericsError",
    "OutputError",
    "PlanError",
    "PluginConflictError",
    "PluginError",
    "RecipeError",
    "TraceError",
    "TrainingError",
    "VerificationError",
]


class BitternError(Exception):
    """Base of all errors that Bittern raises on purpose.

    Args:
        what: What happened, in one sentence.
        where: The module path, file or plugin it happened in.
        hint: What the user can do about it.

    Attributes:
        plugin: ``"distribution version"`` of the plugin that raised it in a hook, if one did.
    """

    plugin: str | None = None

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        if self.hint is not None:
            text += f"\n  hint: {self.hint}"
        if self.plugin is not None and self.plugin not in self.what:
            text += f"\n  plugin: {self.plugin}"
        return text

    def to_dict(self) -> dict[str, str | None]:
        """Return the error as plain data for ``--json``; with the plugin, where one raised it."""
        found = {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "hint": self.hint,
        }
        return found if self.plugin is None else {**found, "plugin": self.plugin}


class RecipeError(BitternError):
    """A recipe is unknown, malformed, or does not fit the model."""


class PlanError(BitternError):
    """The recipe and the model cannot be brought together."""


class ModelError(BitternError):
    """A model cannot be loaded or is not a model."""


class DataError(BitternError):
    """Calibration or evaluation data is missing, empty or does not fit the model."""


class NumericsError(BitternError):
    """A tensor, scale or format is outside what the number formats allow."""


class TraceError(BitternError):
    """A model cannot be traced, or the trace has nothing of a name."""


class CalibrationError(BitternError):
    """Calibration met NaN or Inf, or left a quantizer without statistics."""


class TrainingError(BitternError):
    """A quantized model cannot be trained as it was asked for."""


class CheckpointError(BitternError):
    """A saved state cannot be written, or does not fit the model it is restored into."""


class ExportError(BitternError):
    """A checkpoint cannot be written in the wanted format."""


class OutputError(BitternError):
    """The output directory cannot be used."""


class VerificationError(BitternError):
    """A written checkpoint does not do what the model in memory did."""


class PluginError(BitternError):
    """A plugin failed; the message names its distribution, version and hook."""


class PluginConflictError(PluginError):
    """Two plugins claim the same thing with the same precedence."""
