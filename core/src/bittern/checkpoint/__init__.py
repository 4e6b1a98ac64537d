"""Saving a quantized model's state and restoring it into a fresh model. Never pickle."""

from bittern.checkpoint.restore import restore_state
from bittern.checkpoint.save import save_state

__all__ = ["restore_state", "save_state"]
