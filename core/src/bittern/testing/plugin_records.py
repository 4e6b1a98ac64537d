"""The part of `PluginConformance` about what the register hooks return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from bittern.errors import BitternError, PluginError
from bittern.hooks import specs
from bittern.records import RecipeSource
from bittern.registry import ANY, resolve, target_of
from bittern.testing.base import Conformance, check
from bittern.testing.subject import CORE_HOOKS, TARGETED, Subject, subject_of

__all__ = ["PluginRecords"]

NAMED = (
    "register_formats",
    "register_algorithms",
    "register_modes",
    "register_exporters",
    "register_recipes",
)
CODEC = ("max_value", "storage", "scales", "round_", "store", "load")


class PluginRecords(Conformance):
    """Records are right, pure, resolvable, and quarrel with nobody.

    Attributes:
        shadows: Names of formats, recipes, algorithms and exporters of core that the plugin
            replaces on purpose, with the reason.
    """

    shadows: ClassVar[Mapping[str, str]] = {}

    def test_register_hooks_return_their_records(self) -> None:
        """Protects users from an error in a plan that names a plugin they never heard of."""
        for hook, wanted in specs.RETURNS.items():
            if hook.startswith("register_"):
                for item in self.subject().call(hook):
                    check(
                        type(item).__name__ == wanted and hasattr(item, "__dataclass_fields__"),
                        f"{hook} returns a {type(item).__name__}; it must return {wanted} records",
                    )

    def test_register_hooks_are_pure(self) -> None:
        """Protects users of two Toolkits in one process from getting two different plugins."""
        for hook in specs.RETURNS:
            if hook.startswith("register_"):
                first, second = self.subject().call(hook), self.subject().call(hook)
                check(
                    first == second,
                    f"{hook} returns something else when it is called again (functions made in "
                    "the hook, as a lambda predicate, are not equal: define them in the module)",
                )

    def test_targets_resolve(self) -> None:
        """Protects users from a rule that is silently dead since the framework moved a class.

        A target names the module that defines the class; a re-export would never match.
        """
        self._need_framework()
        for target in self.subject().targets():
            if target == ANY:
                continue
            cls = _resolved(target, self.subject())
            check(isinstance(cls, type), f"the target {target!r} is no class")
            check(
                target_of(cls) == target,
                f"the target {target!r} names a re-export; write {target_of(cls)!r}",
            )

    def test_open_targets_have_predicates(self) -> None:
        """Protects users from a rule for everything."""
        for hook, record in self.subject().records():
            if hook in TARGETED and record.target == ANY:
                check(
                    getattr(record, "predicate", None) is not None,
                    f'a rule of {hook} with the target "{ANY}" has no predicate',
                )

    def test_import_strings_resolve(self) -> None:
        """Protects users from an ImportError after an hour of calibration."""
        self._need_framework()
        for _, _, text in self.subject().imports():
            _resolved(text, self.subject())

    def test_quantized_classes_are_quant_modules(self) -> None:
        """Protects users from a conversion that core has to refuse."""
        self._need_framework()
        from bittern.nn import QuantModule

        for rule in self.subject().call("register_modules"):
            if rule.quantized is None:
                check(rule.reason, f"the rule that refuses {rule.target} gives no reason")
                continue
            cls = _found(rule.quantized, self.subject())
            check(
                cls is None or (isinstance(cls, type) and issubclass(cls, QuantModule)),
                f"{rule.quantized} is no subclass of bittern.nn.QuantModule",
            )
            names = [slot.name for slot in rule.slots]
            check(names or rule.slots_from, f"the rule for {rule.target} has no slots")
            check(len(set(names)) == len(names), f"the rule for {rule.target} has a slot twice")

    def test_codec_factories_give_codecs(self) -> None:
        """Protects users from a format that fails in its first forward pass."""
        self._need_framework()
        for number_format in self.subject().call("register_formats"):
            factory = _found(number_format.codec, self.subject())
            if factory is None:
                continue
            codec = factory(**number_format.params)
            missing = [name for name in CODEC if not hasattr(codec, name)]
            check(
                not missing,
                f"the codec of {number_format.name!r} lacks {', '.join(missing)}; see "
                "bittern.numerics.Codec",
            )

    def test_functions_take_what_they_are_given(self) -> None:
        """Protects users from a TypeError deep inside a run."""
        self._need_framework()
        arguments = {
            ("register_algorithms", "run"): ("model", "plan", "forward", "context"),
            ("register_modes", "convert"): ("model", "config", "context"),
            ("register_modes", "restore"): ("model", "config", "metadata", "context"),
            ("register_modes", "metadata"): ("model",),
            ("register_exporters", "write"): ("model", "path", "context"),
            ("register_exporters", "verify"): ("path", "record"),
            ("register_exporters", "check"): ("model", "context"),
            ("register_exporters", "accepts"): ("model",),
            ("register_kernels", "impl"): ("x", "spec", "scales"),
            ("register_symbols", "symbols"): ("module",),
        }
        for hook, name, text in self.subject().imports():
            function = _found(text, self.subject())
            if function is None:
                continue
            check(callable(function), f"{text} ({name} of {hook}) cannot be called")
            given = arguments.get((hook, name))
            if given is None or (hook == "register_kernels" and not _is_reference(self, text)):
                continue
            try:
                inspect.signature(function).bind(*given)
            except TypeError as error:
                raise AssertionError(
                    f"{text} is called with ({', '.join(given)}): {error}"
                ) from error

    def test_records_do_not_conflict(self) -> None:
        """Protects users from a PluginConflictError within one plugin."""
        seen: dict[tuple[Any, ...], Any] = {}
        for hook, record in self.subject().records():
            for key in _keys(hook, record):
                other = seen.setdefault((hook, *key), record)
                both = [getattr(r, "predicate", None) for r in (other, record)]
                check(
                    other is record or all(both),
                    f"two records of {hook} claim {', '.join(map(str, key))}; give one of them a "
                    "higher priority, or another name",
                )

    def test_names_do_not_shadow_core(self) -> None:
        """Protects users from an ``int8`` that means something else on another machine."""
        if self.subject().is_core:
            pytest.skip("these are core's names")
        core = subject_of("", CORE_HOOKS)
        for hook in NAMED:
            taken = {record.name for record in core.call(hook)}
            for record in self.subject().call(hook):
                check(
                    record.name not in taken or self.shadows.get(record.name),
                    f"{record.name!r} of {hook} replaces core's; rename it, or say why: "
                    f'shadows = {{"{record.name}": "..."}}',
                )

    def test_recipes_are_whole(self) -> None:
        """Protects users from a recipe that is listed and cannot be used."""
        sources: list[RecipeSource] = self.subject().call("register_recipes")
        if not sources:
            return
        toolkit = self.toolkit()
        for source in sources:
            try:
                recipe = toolkit.recipe(source.name)  # schema, extends, requires
                for rule in recipe.rules:
                    for spec in rule.specs().values():
                        if spec is not None:
                            toolkit.registry.formats.get(spec.format)
                for step in recipe.algorithm:
                    toolkit.registry.algorithms.get(step.name)
            except BitternError as error:
                raise AssertionError(f"the recipe {source.name!r}: {error}") from error

    def _need_framework(self) -> None:
        subject = self.subject()
        if subject.target_absent:
            pytest.skip(f"{subject.record.reason}; {subject.record.remedy}")


def _resolved(text: str, subject: Subject) -> Any:
    try:
        return resolve(text, plugin=subject.label)
    except PluginError as error:
        raise AssertionError(str(error)) from error


def _found(text: str, subject: Subject) -> Any:
    """Return what an import string names, or ``None``: that it must resolve is one test's job."""
    try:
        return resolve(text, plugin=subject.label)
    except PluginError:
        return None


def _is_reference(owner: PluginRecords, text: str) -> bool:
    """Whether a kernel implements an operation whose reference takes ``(x, spec, scales)``."""
    rules = owner.subject().call("register_kernels")
    return any(rule.impl == text and rule.op == "fake_quantize" for rule in rules)


def _keys(hook: str, record: Any) -> list[tuple[Any, ...]]:
    """Return what a record claims for itself alone."""
    if hook in NAMED:
        return [(record.name,)]
    if hook in TARGETED:
        return [(record.target, record.priority)]
    if hook == "register_trace_ops":
        return [(record.op, record.priority)]
    if hook == "register_kernels":
        rest = (record.device, record.capability, record.priority)
        return [(record.op, f, d, *rest) for f in record.formats for d in record.dtypes]
    return []
