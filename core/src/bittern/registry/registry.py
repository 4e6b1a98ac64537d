"""Everything that plugins and core registered, collected once per Toolkit and per hook."""

from __future__ import annotations

from functools import cached_property

from bittern.errors import CalibrationError, ExportError, PlanError, RecipeError
from bittern.hooks.manager import PluginManager
from bittern.records import (
    Algorithm,
    Exporter,
    LeafRule,
    Mode,
    ModuleRule,
    NumberFormat,
    RecipeSource,
    SymbolRule,
)
from bittern.registry.kernels import KernelTable
from bittern.registry.modules import ClassTable
from bittern.registry.ops import OpTable
from bittern.registry.tables import NamedTable

__all__ = ["Registry"]


class Registry:
    """Tables of what the plugins registered; each hook is called on the first use of its table.

    Args:
        plugins: The loaded plugins.
    """

    def __init__(self, plugins: PluginManager) -> None:
        self._plugins = plugins

    @cached_property
    def modules(self) -> ClassTable[ModuleRule]:
        """Which module classes can be quantized."""
        return ClassTable(self._plugins.collect("register_modules"))

    @cached_property
    def symbols(self) -> ClassTable[SymbolRule]:
        """Which dimensions module classes have."""
        return ClassTable(self._plugins.collect("register_symbols"))

    @cached_property
    def leaves(self) -> ClassTable[LeafRule]:
        """Which module classes the tracer does not enter."""
        return ClassTable(self._plugins.collect("register_trace_leaves"))

    @cached_property
    def ops(self) -> OpTable:
        """How dimensions flow through operators."""
        return OpTable(self._plugins.collect("register_trace_ops"))

    @cached_property
    def formats(self) -> NamedTable[NumberFormat]:
        """Number formats by name."""
        return NamedTable("format", self._plugins.collect("register_formats"), error=RecipeError)

    @cached_property
    def algorithms(self) -> NamedTable[Algorithm]:
        """Calibration algorithms by name."""
        items = self._plugins.collect("register_algorithms")
        return NamedTable("algorithm", items, error=CalibrationError)

    @cached_property
    def modes(self) -> NamedTable[Mode]:
        """Steps that can be stacked, saved and replayed."""
        return NamedTable("mode", self._plugins.collect("register_modes"), error=PlanError)

    @cached_property
    def exporters(self) -> NamedTable[Exporter]:
        """Checkpoint formats by name."""
        items = self._plugins.collect("register_exporters")
        return NamedTable("export format", items, error=ExportError)

    @cached_property
    def recipes(self) -> NamedTable[RecipeSource]:
        """Named recipes."""
        return NamedTable("recipe", self._plugins.collect("register_recipes"), error=RecipeError)

    @cached_property
    def kernels(self) -> KernelTable:
        """Fast implementations."""
        return KernelTable(self._plugins.collect("register_kernels"))
