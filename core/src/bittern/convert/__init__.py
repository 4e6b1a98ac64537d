"""Applying a plan to a model, undoing it, and the record of what was done to a model."""

from bittern.convert.apply import convert, plan_of, revert
from bittern.convert.names import LiveNames, unwrapped, wrappers
from bittern.convert.snapshot import remember
from bittern.convert.stack import amend_mode, carrier, drop_modes, modes_of, push_mode

__all__ = [
    "LiveNames",
    "amend_mode",
    "carrier",
    "convert",
    "drop_modes",
    "modes_of",
    "plan_of",
    "push_mode",
    "remember",
    "revert",
    "unwrapped",
    "wrappers",
]
