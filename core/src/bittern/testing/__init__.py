"""The conformance kit: what a plugin has to do, as tests that its author inherits.

    from bittern.testing import ModuleCase, ModuleConformance, PluginConformance

    class TestPlugin(PluginConformance):
        plugin = "mything"

    class TestModules(ModuleConformance):
        plugin = "mything"

        def cases(self):
            return [ModuleCase("linear", make=lambda: MyLinear(32, 16),
                               inputs=lambda g: (torch.randn(4, 32, generator=g),))]

There is no pytest plugin: who does not import the kit does not meet it. It needs the extra
``bittern[testing]`` and is as old as the core it is shipped with.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bittern.testing.base import Conformance
    from bittern.testing.calibration import AlgorithmCase, AlgorithmConformance
    from bittern.testing.compare import assert_bit_identical, assert_sqnr, sqnr
    from bittern.testing.export import ExportCase, ExporterConformance
    from bittern.testing.formats import FormatConformance
    from bittern.testing.frameworks import FakeFramework, fake_framework
    from bittern.testing.harness import PluginHarness, hooks_module
    from bittern.testing.kernels import KernelConformance
    from bittern.testing.modes import ModeCase, ModeConformance
    from bittern.testing.module_cases import ModuleCase
    from bittern.testing.modules import ModuleConformance
    from bittern.testing.pickles import no_pickle
    from bittern.testing.plugin import PluginConformance
    from bittern.testing.processes import ChildFailedError, run_distributed, run_fresh
    from bittern.testing.recorder import HookCall, HookRecorder
    from bittern.testing.symbols import SymbolCase, SymbolConformance
    from bittern.testing.traces import LeafCase, OpCase, TraceConformance

__all__ = [
    "AlgorithmCase",
    "AlgorithmConformance",
    "ChildFailedError",
    "Conformance",
    "ExportCase",
    "ExporterConformance",
    "FakeFramework",
    "FormatConformance",
    "HookCall",
    "HookRecorder",
    "KernelConformance",
    "LeafCase",
    "ModeCase",
    "ModeConformance",
    "ModuleCase",
    "ModuleConformance",
    "OpCase",
    "PluginConformance",
    "PluginHarness",
    "SymbolCase",
    "SymbolConformance",
    "TraceConformance",
    "assert_bit_identical",
    "assert_sqnr",
    "fake_framework",
    "hooks_module",
    "no_pickle",
    "run_distributed",
    "run_fresh",
    "sqnr",
]

_HOMES = {
    "base": ("Conformance",),
    "calibration": ("AlgorithmCase", "AlgorithmConformance"),
    "compare": ("assert_bit_identical", "assert_sqnr", "sqnr"),
    "export": ("ExportCase", "ExporterConformance"),
    "formats": ("FormatConformance",),
    "frameworks": ("FakeFramework", "fake_framework"),
    "harness": ("PluginHarness", "hooks_module"),
    "kernels": ("KernelConformance",),
    "modes": ("ModeCase", "ModeConformance"),
    "module_cases": ("ModuleCase",),
    "modules": ("ModuleConformance",),
    "pickles": ("no_pickle",),
    "plugin": ("PluginConformance",),
    "processes": ("ChildFailedError", "run_distributed", "run_fresh"),
    "recorder": ("HookCall", "HookRecorder"),
    "symbols": ("SymbolCase", "SymbolConformance"),
    "traces": ("LeafCase", "OpCase", "TraceConformance"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
