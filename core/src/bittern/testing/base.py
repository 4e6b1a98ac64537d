"""What every conformance class has: the plugin under test, its cases as test ids, the guard."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from bittern.testing.subject import Subject, subject_of

if TYPE_CHECKING:
    import pytest

    from bittern.toolkit import Toolkit

__all__ = ["Conformance", "check", "dropped_tests", "given_cases", "named", "once"]

GUARD = "test_no_standard_test_was_dropped"
_FIXED = (GUARD, "pytest_generate_tests")
_ONCE = "_made_once"

T = TypeVar("T")


def check(condition: object, message: str) -> None:
    """Fail the test with ``message`` unless ``condition`` holds.

    Raises:
        AssertionError: It does not.
    """
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(message)


class Conformance:
    """Base of the conformance classes: names the plugin, makes test ids, guards the tests.

    A standard test that a plugin cannot pass is marked, not removed::

        @pytest.mark.xfail(reason="the framework has no backward pass")
        def test_gradients_reach_weights_and_inputs(self, case):
            super().test_gradients_reach_weights_and_inputs(case)

    Attributes:
        plugin: Name of the installed plugin (its entry point).
        hooks: Or its hooks module, ``"package.hooks"``, where it is not installed.
    """

    plugin: ClassVar[str] = ""
    hooks: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in _FIXED:
            if inspect.getattr_static(cls, name) is not vars(Conformance)[name]:
                raise TypeError(
                    f"{cls.__qualname__} replaces {name}, which keeps the standard tests whole; "
                    "mark the test in question with pytest.mark.xfail(reason=...) instead"
                )

    # --- what a test needs ---

    @classmethod
    def subject(cls) -> Subject:
        """Return the plugin under test."""
        return once(cls, "subject", lambda: subject_of(cls.plugin, cls.hooks))

    @classmethod
    def toolkit(cls) -> Toolkit:
        """Return a Toolkit of core and the plugin; skips where the plugin is not loaded."""
        return cls.subject().toolkit

    # --- cases ---

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Return argument name to ``(test id, value)`` pairs; one test per pair."""
        return {}

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Make one test of every case."""
        for name, items in _parameters(cls).items():
            if name in metafunc.fixturenames:
                values = [value for _, value in items]
                metafunc.parametrize(name, values, ids=[key for key, _ in items], scope="class")

    # --- the guard ---

    def test_no_standard_test_was_dropped(self) -> None:
        """Protects users from a plugin whose green tests are green because some are gone."""
        dropped = dropped_tests(type(self))
        check(
            not dropped,
            f"{type(self).__qualname__} deletes or replaces {', '.join(dropped)}; declare what "
            "does not hold with @pytest.mark.xfail(reason=...) and call super()",
        )
        empty = [name for name, items in _parameters(type(self)).items() if not items]
        check(
            not empty,
            f"{type(self).__qualname__} has no {' and no '.join(empty)}, so nothing is tested",
        )


def _parameters(cls: type[Conformance]) -> Mapping[str, Sequence[tuple[str, Any]]]:
    return once(cls, "parameters", cls.parameters)


def once(owner: type[Any], name: str, make: Callable[[], T]) -> T:
    """Return what ``make`` returned for this very class, made on the first call."""
    known: dict[str, Any] = vars(owner).get(_ONCE, {})
    if not known:
        setattr(owner, _ONCE, known)
    if name not in known:
        known[name] = make()
    found: T = known[name]
    return found


def given_cases(owner: type[Any]) -> list[Any]:
    """Return the cases that a test class gives, as a method or as a class attribute.

    Raises:
        AssertionError: Two of them have one name.
    """
    given = owner.cases if not callable(owner.cases) else owner().cases()
    cases = list(given)
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, f"{owner.__qualname__} has several cases called {', '.join(twice)}")
    return cases


def named(items: Iterable[Any]) -> list[tuple[str, Any]]:
    """Return ``(name, item)`` pairs for `Conformance.parameters`."""
    return [(item.name, item) for item in items]


def dropped_tests(cls: type[Conformance]) -> list[str]:
    """Return the standard tests that ``cls`` deletes or overrides without saying why."""
    standard: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[:2] == ["bittern", "testing"]:
            standard |= {n: f for n, f in vars(base).items() if n.startswith("test_")}
    return sorted(
        name
        for name, function in standard.items()
        if (found := inspect.getattr_static(cls, name, None)) is not function
        and not _declared(found)
    )


def _declared(function: Any) -> bool:
    """Whether a mark says why a test is expected to fail, or is left out."""
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "skip" and mark.args:
            return True
        if mark.name in ("xfail", "skip", "skipif") and mark.kwargs.get("reason"):
            return True
    return False
