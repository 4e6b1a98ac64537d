"""The symbols of every module of a model, found by rule tables and looked up by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from torch import nn

from bittern.records import SymbolRule
from bittern.registry import ClassTable, Match, bound
from bittern.tracing.symbolic.rules import SYMBOL_RULES
from bittern.tracing.symbolic.symbols import Symbol, SymInfo

__all__ = ["SymMap"]


class SymMap:
    """Modules of a model to their symbols.

    Modules inside one that has cross-layer symbols are not looked at: it speaks for them.

    Args:
        model: The model; it is only looked at.
        rules: Which function knows the symbols of which class; core's own if left out.

    Raises:
        PluginError: A rule's function does not exist.
        PluginConflictError: Two plugins have a rule for the same class.
    """

    def __init__(self, model: nn.Module, rules: ClassTable[SymbolRule] | None = None) -> None:
        table = builtin_table() if rules is None else rules
        self._infos: dict[nn.Module, SymInfo] = {}
        self._names: dict[nn.Module, str] = {}
        self._left_out: dict[nn.Module, str] = {}
        found: dict[type, Callable[[nn.Module], SymInfo] | str] = {}
        self._collect(model, "", table, found)

    def _collect(
        self,
        module: nn.Module,
        name: str,
        table: ClassTable[SymbolRule],
        found: dict[type, Callable[[nn.Module], SymInfo] | str],
    ) -> None:
        if module in self._names:
            return
        self._names[module] = name
        cls: type[nn.Module] = getattr(module, "original_class", type(module))  # before conversion
        if cls not in found:
            match = table.find(module, cls)
            found[cls] = (
                bound(match.rule.symbols, plugin=match.plugin, returns=SymInfo)
                if isinstance(match, Match)
                else match.reason
            )
        function = found[cls]
        if isinstance(function, str):
            if function:
                self._left_out[module] = function
        else:
            self.add_sym_info(module, function(module))
        if not self.is_leaf(module):
            for child_name, child in module.named_children():
                self._collect(child, f"{name}.{child_name}" if name else child_name, table, found)

    def is_leaf(self, module: nn.Module) -> bool:
        """Return whether the module speaks for its inside: it has cross-layer symbols."""
        info = self._infos.get(module)
        return info is not None and any(symbol.is_cross_layer for _, symbol in info)

    @property
    def left_out(self) -> dict[str, str]:
        """Module paths to why a rule that speaks about their class does not take them."""
        return {self._names[module]: reason for module, reason in self._left_out.items()}

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, module: object) -> bool:
        return module in self._infos

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._infos)

    def __getitem__(self, module: nn.Module) -> dict[str, Symbol]:
        return self._infos[module].symbols

    def items(self) -> Iterator[tuple[nn.Module, dict[str, Symbol]]]:
        """Yield every module with its symbols by name."""
        for module, info in self._infos.items():
            yield module, info.symbols

    def info(self, module: nn.Module) -> SymInfo | None:
        """Return what is known about a module, or ``None``."""
        return self._infos.get(module)

    def knows(self, module: nn.Module) -> bool:
        """Return whether the module is one of the model, and not inside one that speaks for it."""
        return module in self._names

    def name_of(self, module: nn.Module) -> str:
        """Return the dotted path of a module; empty for the model itself."""
        return self._names.get(module, "")

    def is_shape_preserving(self, module: nn.Module) -> bool:
        """Return whether the module's output has the shape of its input."""
        info = self._infos.get(module)
        return info is not None and info.is_shape_preserving

    def add_sym_info(self, module: nn.Module, info: SymInfo) -> None:
        """Say which symbols a module has; replaces what was known."""
        info.bind(module)
        self._infos[module] = info

    def pop(self, module: nn.Module) -> dict[str, Symbol]:
        """Forget a module; return its symbols."""
        return self._infos.pop(module).symbols

    def get_symbol(self, module: nn.Module, name: str) -> Symbol:
        """Return one symbol of a module."""
        return self._infos[module].symbols[name]

    def set_symbol(self, module: nn.Module, name: str, symbol: Symbol) -> None:
        """Replace or add one symbol of a module."""
        self._infos.setdefault(module, SymInfo()).symbols[name] = symbol

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules with symbols, with their paths."""
        for module in self._infos:
            yield self._names[module], module

    def named_symbols(
        self,
        *,
        free: bool = False,
        dynamic: bool = False,
        searchable: bool = False,
        constant: bool = False,
    ) -> Iterator[tuple[str, Symbol]]:
        """Yield ``("path.symbol", symbol)`` in any of the given states; all if none is given."""
        states = [
            state
            for state, wanted in (
                ("is_free", free),
                ("is_dynamic", dynamic),
                ("is_searchable", searchable),
                ("is_constant", constant),
            )
            if wanted
        ]
        for module, info in self._infos.items():
            path = self._names[module]
            for name, symbol in info:
                if not states or any(getattr(symbol, state) for state in states):
                    yield (f"{path}.{name}" if path else name), symbol

    def prune(self) -> None:
        """Forget the modules all of whose symbols are constant."""
        self._infos = {
            module: info
            for module, info in self._infos.items()
            if not all(symbol.is_constant for _, symbol in info)
        }

    def __repr__(self) -> str:
        lines = [f"  {self._names[module]}: {info}" for module, info in self._infos.items()]
        return "\n".join(["SymMap(", *lines, ")"])


def builtin_table() -> ClassTable[SymbolRule]:
    """Return the table with core's own rules only."""
    return cast(
        "ClassTable[SymbolRule]", ClassTable([(rule, "bittern", True) for rule in SYMBOL_RULES])
    )
