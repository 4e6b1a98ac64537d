"""Parameters that a ``forward`` reads by itself: layer scales, position embeddings, tied heads.

A dimension of a parameter is a width like any other: what it meets element by element is tied to
it. A parameter of a module with symbols has that module's symbols, so that nothing can use the
weight of a layer unseen.
"""

from __future__ import annotations

from torch import Tensor, nn

from bittern.tracing.symbolic.symbols import Layout, Symbol
from bittern.tracing.symbolic.symmap import SymMap
from bittern.tracing.symbolic.values import Axis, Dim

__all__ = ["ParameterSymbols"]


class ParameterSymbols:
    """The symbols of parameters and buffers that graphs read.

    Args:
        symbols: The symbols of the modules.
    """

    def __init__(self, symbols: SymMap) -> None:
        self._symbols = symbols
        self._found: dict[tuple[int, int], tuple[nn.Module, str, Symbol]] = {}

    def dims(self, owner: nn.Module, name: str, tensor: Tensor) -> dict[int, Dim]:
        """Return the dimensions of a parameter or buffer of ``owner``."""
        own = name in owner._parameters or name in owner._buffers
        return {
            dim: self._dim(owner, name, tensor, dim) if own and size != 1 else size
            for dim, size in enumerate(tensor.shape)
        }

    def _dim(self, owner: nn.Module, name: str, tensor: Tensor, dim: int) -> Dim:
        size = tensor.shape[dim]
        info = self._symbols.info(owner)
        if info is not None and self._symbols.is_leaf(owner):
            for _, symbol in info:
                if dim in symbol.tensors.get(name, ()) and symbol.size:
                    blocks = size // symbol.size
                    return Axis((symbol,), Layout("outer", blocks) if blocks > 1 else None)
            return size
        key = (id(tensor), dim)
        if key not in self._found:
            self._found[key] = (owner, name, Symbol(size=size, tensors={name: dim}))
        return Axis((self._found[key][2],))

    def close(self) -> None:
        """Add those that follow a layer's width to the map; the others are constant."""
        for (_, dim), (owner, name, symbol) in self._found.items():
            follows = any(leaf.is_declared_searchable for leaf in symbol.leaves)
            if follows and not symbol.is_constant and self._symbols.knows(owner):
                self._symbols.set_symbol(owner, f"{name}_dim{dim}", symbol)
            else:
                symbol.disable(f"`{name}` has a size that no layer decides")
