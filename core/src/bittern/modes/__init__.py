"""Modes: optimization steps that can be stacked, saved and replayed."""

from bittern.modes.apply import apply_mode, recorded, replay
from bittern.modes.context import ModeContext, Steps

__all__ = ["ModeContext", "Steps", "apply_mode", "recorded", "replay"]
