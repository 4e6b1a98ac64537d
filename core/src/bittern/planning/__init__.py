"""Who gets what, and why."""

from bittern.planning.build import build_plan, slots_of

__all__ = ["build_plan", "slots_of"]
