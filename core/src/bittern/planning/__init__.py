"""Who gets what, and why."""

from bittern.planning.build import build_plan

__all__ = ["build_plan"]
