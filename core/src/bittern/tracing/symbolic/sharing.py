"""Ties symbols of modules that share a parameter: one tensor cannot have two widths."""

from __future__ import annotations

from torch import nn

from bittern.tracing.symbolic.linking import Linker
from bittern.tracing.symbolic.symbols import Symbol
from bittern.tracing.symbolic.symmap import SymMap
from bittern.tracing.symbolic.values import Axis

__all__ = ["tie_shared_parameters"]


def tie_shared_parameters(model: nn.Module, symbols: SymMap, linker: Linker) -> None:
    """Tie the symbols of dimensions of parameters that several modules have.

    A dimension that one of them has no symbol for is constant.

    Args:
        model: The model.
        symbols: The symbols of its modules; they are changed.
        linker: Ties them.
    """
    owners: dict[int, list[tuple[nn.Module, str, str, int]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            where = (module, name, f"{path}.{name}" if path else name, parameter.dim())
            owners.setdefault(id(parameter), []).append(where)
    for places in owners.values():
        if len(places) == 1:
            continue
        names = " and ".join(place[2] for place in places)
        for dim in range(places[0][3]):
            found = [_symbol(symbols, module, name, dim) for module, name, _, _ in places]
            axes = [Axis((symbol,)) for symbol in found if symbol is not None]
            if len(axes) < len(found):
                linker.block(axes, f"{names} are one parameter, and not all owners are known")
            elif len(axes) > 1:
                linker.join(axes, f"{names} are one parameter")


def _symbol(symbols: SymMap, module: nn.Module, name: str, dim: int) -> Symbol | None:
    info = symbols.info(module)
    for _, symbol in info or ():
        if dim in symbol.tensors.get(name, ()):
            return symbol
    return None
