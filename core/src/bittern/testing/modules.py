"""What the rule of a module class owes the users of that class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bittern.testing.base import given_cases, named
from bittern.testing.module_cases import ModuleCase
from bittern.testing.module_state import ModuleState

__all__ = ["ModuleConformance"]


class ModuleConformance(ModuleState):
    """Module rules: one test per standard test and case.

    ``cases`` gives the modules, as a method or a class attribute. Each is built, converted, run,
    saved and restored on its own and inside a small model. Other processes import the test class
    to build its cases, so it must be at the top of its module.
    """

    def cases(self) -> Sequence[ModuleCase]:
        """Return the cases; one for every class and every way it is used."""
        return ()

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every case."""
        return {"case": named(given_cases(cls))}
