"""Who gets what, and why."""

from bittern.planning.build import build_plan, slots_of
from bittern.planning.specs import with_options

__all__ = ["build_plan", "slots_of", "with_options"]
