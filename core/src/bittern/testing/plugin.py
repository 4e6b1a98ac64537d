"""What every plugin owes its users, whatever it registers."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bittern.hooks import specs
from bittern.hooks.discovery import GROUP, PluginOptions, Status
from bittern.hooks.markers import PROJECT
from bittern.testing.base import check
from bittern.testing.plugin_records import PluginRecords
from bittern.testing.subject import Subject

__all__ = ["PluginConformance"]

MILLISECONDS = 200
HEAVY = ("torch", "transformers", "triton", "accelerate", "megatron", "transformer_engine", "apex")


class PluginConformance(PluginRecords):
    """A plugin loads fast, registers what holds, and harms nobody."""

    # --- the import ---

    def test_hooks_module_imports_fast(self) -> None:
        """Protects users of ``bittern --help`` from waiting for a plugin they do not use.

        The best of several imports in clean processes, beyond ``import bittern.hooks``. This is
        the only limit in seconds of the whole kit.
        """
        entry = self.subject().candidate.entry
        best = min(_imports(entry, attempt)["milliseconds"] for attempt in range(3))
        for attempt in range(3, 9):  # a busy machine is no fault of the plugin
            if best < MILLISECONDS:
                break
            best = min(best, _imports(entry, attempt)["milliseconds"])
        check(
            best < MILLISECONDS,
            f"importing {entry} takes {best:.0f} ms, {MILLISECONDS} are allowed; import inside "
            f"the hooks' functions (python -X importtime -c 'import {entry}' shows what is slow)",
        )

    def test_hooks_module_imports_no_framework(self) -> None:
        """Protects users from paying for a framework that the model at hand does not use."""
        found = self._heavy("after_import")
        check(
            not found,
            f"importing {self.subject().candidate.entry} imports {', '.join(found)}; name classes "
            "by strings, and import inside the functions",
        )

    def test_register_hooks_import_no_framework(self) -> None:
        """Protects users from a Toolkit whose first use imports every framework there is."""
        already = self._heavy("after_import")  # the test above says so
        found = [name for name in self._heavy("after_register") if name not in already]
        check(
            not found,
            f"the register hooks of {self.subject().candidate.entry} import {', '.join(found)}; "
            'return strings ("package.module:name"), which core resolves on first use',
        )

    def test_import_does_not_initialise_cuda(self) -> None:
        """Protects users who fork workers, or choose a device, after importing bittern."""
        entry = self.subject().candidate.entry
        check(
            not (_imports(entry, 0)["cuda"] or _patches(entry)["cuda"]),
            f"importing {entry} initialises CUDA; ask for devices inside the functions",
        )

    def test_import_leaves_torch_unpatched(self) -> None:
        """Protects everybody else in the process from a torch that somebody changed."""
        changed = _patches(self.subject().candidate.entry)["changed"]
        check(
            not changed,
            f"importing the plugin replaces {', '.join(changed)}; change nothing at import",
        )

    # --- loading ---

    def test_plugin_is_loaded(self) -> None:
        """Protects users from a plugin that is installed and silently does nothing."""
        subject = self.subject()
        if subject.is_core:
            return
        if subject.target_absent:
            pytest.skip(f"{subject.record.reason}; {subject.record.remedy}")
        check(
            subject.record.status is Status.LOADED,
            f"{subject.label} is {subject.record.status}: {subject.record.reason}\n"
            f"{subject.record.traceback}",
        )

    def test_plugin_implements_a_hook(self) -> None:
        """Protects users from a plugin whose functions nobody calls, for want of @hookimpl."""
        subject = self.subject()
        check(
            subject.implementations,
            f"{subject.candidate.entry} has no hook implementation; decorate its functions with "
            "bittern.hooks.hookimpl",
        )

    def test_hook_implementations_fit_their_specs(self) -> None:
        """Protects users from a plugin that this core refuses to load, or loads in part."""
        problems = []
        for hook, function in self.subject().implementations.items():
            spec = getattr(specs, hook, None)
            if getattr(spec, f"{PROJECT}_spec", None) is None or spec is None:
                problems.append(f"there is no hook {hook}")
                continue
            known = list(inspect.signature(spec).parameters)
            for name, parameter in inspect.signature(function).parameters.items():
                if name not in known:
                    problems.append(f"{hook} has no argument {name!r}, it has {known}")
                elif parameter.kind is parameter.KEYWORD_ONLY:
                    problems.append(f"{hook}: {name!r} is keyword-only and would not be given")
        check(not problems, "; ".join(problems))

    def test_blocking_it_leaves_a_working_toolkit(self) -> None:
        """Protects users whose way out of a plugin's bug is BITTERN_DISABLE_PLUGINS."""
        from torch import nn

        from bittern.toolkit import Toolkit

        subject = self.subject()
        if subject.is_core:
            pytest.skip("core cannot be blocked")
        name = subject.candidate.name
        manager = subject.manager(PluginOptions(block=(name,)))
        status = manager.records[0].status
        check(status is Status.BLOCKED, f"blocked by the name {name!r}, the plugin is {status}")
        model = nn.Sequential(nn.Linear(4, 4))
        result = Toolkit(manager=manager).quantize(model, "int8-weight-only")
        found = {entry.plugin for entry in result.plan.entries}
        check(found == {"bittern"}, f"without the plugin, rules of {found} are used")

    # --- commands ---

    def test_commands_have_help(self) -> None:
        """Protects users from commands of which ``bittern --help`` says nothing."""
        bare = [path for path, command in _commands(self.subject()) if not _helped(command)]
        check(not bare, f"no help text: {', '.join(bare)}; write a docstring or help=")

    def test_commands_replace_none(self) -> None:
        """Protects users from ``bittern quantize`` that is another program's."""
        from bittern.cli.main import COMMANDS, make_cli
        from bittern.errors import PluginConflictError

        implementation = self.subject().implementations.get("register_commands")
        if implementation is None:
            return
        cli = make_cli()
        try:
            implementation(cli=cli)
        except PluginConflictError as error:
            raise AssertionError(f"{error.what}; rename the command") from error
        taken = sorted(COMMANDS.keys() & cli.commands.keys())
        check(not taken, f"the plugin replaces core's {', '.join(taken)}")

    # --- the distribution ---

    def test_distribution_has_an_entry_point(self) -> None:
        """Protects users from a plugin that pip installs and bittern does not find."""
        import importlib.metadata

        record = self._installed().candidate
        entries = importlib.metadata.distribution(record.distribution).entry_points
        found = sorted({e.value for e in entries.select(group=GROUP, name=record.name)})
        check(
            found == [record.entry],
            f"the entry point {record.name!r} of {record.distribution} names {found}",
        )
        check(
            ":" not in record.entry,
            f'the entry point must name a module ("package.hooks"), not {record.entry!r}',
        )

    def test_distribution_requires_bittern(self) -> None:
        """Protects users from a plugin and a core that do not know each other."""
        names = {canonicalize_name(r.name) for r in _requirements(self._installed())}
        check("bittern" in names, 'the dependencies lack bittern; write "bittern>=X.Y,<X.Z"')

    def test_framework_is_an_optional_extra(self) -> None:
        """Protects users from a framework that pip installs, or moves, without being asked.

        The framework belongs into the extra ``target``, which is checked when the plugin is
        loaded; one that PyPI does not have is named in ``target_modules`` of the hooks module.
        """
        subject = self._installed()
        extra = {canonicalize_name(Requirement(r).name) for r in subject.candidate.requirements}
        hard = {canonicalize_name(r.name) for r in _requirements(subject)}
        both = sorted(extra & hard - {"torch"})
        check(not both, f"{', '.join(both)} is in the extra target and a hard dependency too")
        probes = {m.partition(".")[0] for m in getattr(subject.module, "target_modules", ())}
        for package in sorted(_frameworks(subject) - probes):
            providers = _providers(package)
            check(
                not providers & hard,
                f"{package} is a hard dependency; move it to the extra target",
            )
            check(
                providers & extra,
                f"the rules name classes of {package}, which the extra target does not; write "
                f'target = ["{package}>=..."], or target_modules = ("{package}",) in the hooks',
            )

    # --- helpers ---

    def _installed(self) -> Subject:
        subject = self.subject()
        if not subject.installed:
            pytest.skip(f"{subject.candidate.entry} is not tested as an installed distribution")
        return subject

    def _heavy(self, when: str) -> list[str]:
        subject = self.subject()
        names = {*HEAVY, *_frameworks(subject)}
        names |= {m.partition(".")[0] for m in getattr(subject.module, "target_modules", ())}
        for text in subject.candidate.requirements:
            wanted = canonicalize_name(Requirement(text).name)
            names |= {p for p in _distributions() if wanted in _providers(p)}
        return sorted(names & set(_imports(subject.candidate.entry, 0)[when]))


def _frameworks(subject: Subject) -> set[str]:
    """Return the packages, other than torch, whose classes the plugin's rules name."""
    packages = {target.partition(":")[0].partition(".")[0] for target in subject.targets()}
    own = subject.candidate.entry.partition(".")[0]
    return packages - {"torch", "bittern", own, "*"}


@cache
def _distributions() -> Mapping[str, list[str]]:
    import importlib.metadata

    return importlib.metadata.packages_distributions()


def _providers(package: str) -> set[str]:
    """Return the distributions that provide a package; its own name where it is not installed."""
    return {canonicalize_name(name) for name in _distributions().get(package, [package])}


def _requirements(subject: Subject) -> list[Requirement]:
    """Return what pip installs with the plugin when no extra is asked for."""
    import importlib.metadata

    texts = importlib.metadata.requires(subject.candidate.distribution) or []
    found = [Requirement(text) for text in texts]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _commands(subject: Subject) -> list[tuple[str, Any]]:
    import click

    root = click.Group("bittern")
    implementation = subject.implementations.get("register_commands")
    if implementation is not None:
        implementation(cli=root)
    found: list[tuple[str, Any]] = []
    waiting: list[tuple[str, Any]] = [(f"bittern {n}", c) for n, c in root.commands.items()]
    while waiting:
        path, command = waiting.pop()
        found.append((path, command))
        if isinstance(command, click.Group):
            waiting += [(f"{path} {n}", c) for n, c in command.commands.items()]
    return found


def _helped(command: Any) -> bool:
    return bool((command.help or "").strip() or (command.short_help or "").strip())


@cache
def _imports(entry: str, attempt: int) -> dict[str, Any]:
    return _probe("imports", entry)


@cache
def _patches(entry: str) -> dict[str, Any]:
    return _probe("patches", entry)


def _probe(question: str, entry: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bittern.testing.probe", question, entry],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    check(done.returncode == 0, f"{entry} fails in a clean process:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
