"""What a dimension of a module is to the rest of the model: the symbol and its four states.

A module says which of its dimensions meet other modules. The analysis then ties symbols of
different modules together, or finds that one cannot change, and why. The tie is a tree of parents
(a union-find), so that tying and asking stay cheap however many modules share a width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

__all__ = ["Layout", "SymDepth", "SymInfo", "Symbol"]


@dataclass(frozen=True)
class Layout:
    """How the coordinates of a dimension lie in one that is ``factor`` times as long.

    Attributes:
        kind: ``"inner"``: coordinate ``i`` holds positions ``i * factor`` to
            ``i * factor + factor - 1`` (channels flattened with what comes after them).
            ``"outer"``: it holds ``i, i + size, i + 2 * size, ...`` (something flattened in front
            of the channels, or several blocks side by side).
        factor: Positions per coordinate.
    """

    kind: Literal["inner", "outer"]
    factor: int


class Symbol:
    """One dimension-like quantity of a module.

    It is in exactly one state. *Free*: nothing is known yet. *Searchable*: it may take another
    value, and others follow. *Dynamic*: it follows its ``parent``. *Constant*: it must stay as it
    is, for the ``reason`` it carries.

    A symbol can also be the concatenation of others, its ``parts``; it is then searchable as long
    as one of its parts is, and constant when all are.

    Args:
        is_searchable: Whether it may take another value as far as its module is concerned.
        is_sortable: Whether its coordinates may be put in another order.
        cl_type: Whether it depends on what comes in, decides what goes out, or is internal.
        elastic_dims: The names of the *one* dimension of the incoming or outgoing tensor that it
            is, for example ``{1, -3}`` for the channels of an image. Counted from the front only
            if there is a batch dimension.
        size: Its value; `SymMap` reads the module's attribute of the symbol's name if left out.
        argument: Position of the argument of ``forward`` that an incoming symbol speaks about.
        repeats: How often an outgoing tensor holds it, one after the other (the two directions of
            a recurrent layer).
        tensors: Parameter or buffer name to the dimensions that it is; a dimension that is ``k``
            times as long holds ``k`` blocks of it (the gates of a recurrent layer).
        priority: Of several symbols that are tied, the one with the highest leads the others; then
            the one that runs first.
    """

    class CLType(Enum):
        """Whether a symbol meets other layers."""

        NONE = "none"
        INCOMING = "incoming"
        OUTGOING = "outgoing"

    def __init__(
        self,
        *,
        is_searchable: bool = False,
        is_sortable: bool = True,
        cl_type: CLType = CLType.NONE,
        elastic_dims: Iterable[int] = (),
        size: int | None = None,
        argument: int = 0,
        repeats: int = 1,
        tensors: Mapping[str, int | tuple[int, ...]] | None = None,
        priority: int = 0,
    ) -> None:
        self.priority = priority
        self.cl_type = cl_type
        self.elastic_dims = frozenset(elastic_dims)
        if self.is_cross_layer != bool(self.elastic_dims):
            raise ValueError(
                f"a symbol of type {cl_type.name} with elastic_dims {set(self.elastic_dims)}: "
                "incoming and outgoing symbols need elastic_dims, others have none"
            )
        self.size = size
        self.argument = argument
        self.repeats = repeats
        self.tensors = {
            name: (dims,) if isinstance(dims, int) else tuple(dims)
            for name, dims in (tensors or {}).items()
        }
        self.layout: Layout | None = None
        self._searchable = is_searchable
        self._sortable = is_sortable
        self._parent: Symbol | None = None
        self._parts: tuple[Symbol, ...] = ()
        self._reason: str | None = None

    # The tree

    @property
    def parent(self) -> Symbol | None:
        """The symbol that this one follows."""
        return None if self.is_constant else self._parent

    @property
    def root(self) -> Symbol:
        """The symbol at the end of the parents; itself where there is none."""
        root = self
        while root._parent is not None:
            root = root._parent
        step = self
        while step._parent is not None and step._parent is not root:
            step._parent, step = root, step._parent
        return root

    @property
    def parts(self) -> tuple[Symbol, ...]:
        """The symbols that it concatenates, in order, none of them a concatenation; or nothing."""
        parts = self.root._parts
        return tuple(leaf for part in parts for leaf in part.leaves)

    @property
    def leaves(self) -> tuple[Symbol, ...]:
        """Its parts, or its root: the symbols that decide its value."""
        return self.parts or (self.root,)

    def link_to(self, parent: Symbol) -> None:
        """Follow ``parent`` from now on; the parent's constraints include this symbol's.

        Raises:
            ValueError: This symbol is constant or follows another already, or is its root.
        """
        if self._parent is not None or self.is_constant or self._parts:
            raise ValueError(f"{self} is bound and cannot be linked")
        if any(leaf is self for leaf in parent.leaves):
            raise ValueError(f"{parent} follows {self}; linking them would be circular")
        if parent.is_constant:
            self.disable(parent.reason)
        elif not self._sortable:
            parent.forbid_sorting()
        self._parent = parent

    def concatenate(self, parts: Iterable[Symbol]) -> None:
        """Be the concatenation of ``parts`` from now on.

        Raises:
            ValueError: This symbol is constant or follows another already, or is among the parts.
        """
        parts = tuple(parts)
        if self._parent is not None or self.is_constant or self._parts:
            raise ValueError(f"{self} is bound and cannot be linked")
        if any(leaf is self for part in parts for leaf in part.leaves):
            raise ValueError(f"{self} cannot be a part of itself")
        self._parts = parts
        if not self._sortable:
            self.forbid_sorting()

    def disable(self, reason: str = "disabled by its user") -> None:
        """Make it constant, with everything that it follows and that follows it."""
        for leaf in (self.root, *self.leaves):
            if leaf._reason is None:
                leaf._reason = reason

    def forbid_sorting(self) -> None:
        """Keep the order of its coordinates, and of everything tied to it."""
        for leaf in (self.root, *self.leaves):
            leaf._sortable = False

    # The states

    @property
    def is_constant(self) -> bool:
        """Whether it must stay as it is."""
        return all(leaf._reason is not None for leaf in self.leaves)

    @property
    def is_searchable(self) -> bool:
        """Whether it may be given another value; what follows it is not, it changes along."""
        if self._parent is not None or self._reason is not None:
            return False
        if self._parts:
            return any(leaf._searchable and leaf._reason is None for leaf in self.leaves)
        return self._searchable

    @property
    def is_dynamic(self) -> bool:
        """Whether it follows another symbol."""
        return self.parent is not None

    @property
    def is_free(self) -> bool:
        """Whether nothing is known about it yet."""
        return not (self.is_constant or self.is_dynamic or self.is_searchable)

    @property
    def is_sortable(self) -> bool:
        """Whether its coordinates may be reordered, together with all that are tied to it."""
        return not self.is_constant and all(leaf._sortable for leaf in self.leaves)

    @property
    def reason(self) -> str:
        """Why it is constant; empty if it is not."""
        return (self.leaves[0]._reason or "") if self.is_constant else ""

    @property
    def is_declared_searchable(self) -> bool:
        """Whether it may take another value as far as its module is concerned."""
        return self._searchable

    @property
    def is_incoming(self) -> bool:
        """Whether the incoming tensor has it."""
        return self.cl_type is Symbol.CLType.INCOMING

    @property
    def is_outgoing(self) -> bool:
        """Whether the outgoing tensor has it."""
        return self.cl_type is Symbol.CLType.OUTGOING

    @property
    def is_cross_layer(self) -> bool:
        """Whether other layers meet it."""
        return self.is_incoming or self.is_outgoing

    @property
    def is_dangling(self) -> bool:
        """Whether other layers meet it and nothing is known about it yet."""
        return self.is_cross_layer and self.is_free

    def __repr__(self) -> str:
        names = ("searchable", "free", "dynamic", "constant", "incoming", "outgoing")
        words = [name for name in names if getattr(self, f"is_{name}")]
        if self.size is not None:
            words.append(f"size={self.size}")
        return f"{type(self).__name__}({', '.join(words)})"


class SymDepth(Symbol):
    """How many blocks of a sequence run; searchable over the ones that can be left out.

    Args:
        max_depth: Number of blocks.
    """

    def __init__(self, *, max_depth: int) -> None:
        super().__init__(is_searchable=True, size=max_depth)
        self.max_depth = max_depth
        self._skippable: tuple[int, ...] = ()

    @property
    def skippable(self) -> tuple[int, ...]:
        """Indices of the blocks that can be left out, in ascending order."""
        return () if self.is_constant else self._skippable

    @skippable.setter
    def skippable(self, indices: Iterable[int]) -> None:
        self._skippable = tuple(sorted(indices))

    @property
    def min_depth(self) -> int:
        """The number of blocks that must stay."""
        return self.max_depth - len(self.skippable)

    def link_to(self, parent: Symbol) -> None:
        """Refuse: a depth follows nothing."""
        raise ValueError(f"{self} is a depth and cannot follow {parent}")


class SymInfo:
    """The symbols of one module.

    Args:
        is_shape_preserving: Whether the output has the shape of the input.
        kept_dims: Which dimensions beside the symbols' own the output takes over from the first
            argument: ``"leading"`` the ones in front of them, ``"other"`` all, ``"none"``.
        returns_tuple: Whether the output is a tuple; its first element is meant then.
        symbols: The symbols by name; the name is the module's attribute where there is one.
    """

    def __init__(
        self,
        is_shape_preserving: bool = False,
        *,
        kept_dims: Literal["none", "leading", "other"] = "none",
        returns_tuple: bool = False,
        **symbols: Symbol,
    ) -> None:
        self.is_shape_preserving = is_shape_preserving
        self.kept_dims = kept_dims
        self.returns_tuple = returns_tuple
        self.symbols: dict[str, Symbol] = symbols
        self.twins: dict[Symbol, Symbol] = {}

    def __iter__(self) -> Iterator[tuple[str, Symbol]]:
        return iter(self.symbols.items())

    def bind(self, module: Any) -> None:
        """Read the sizes that were left out from ``module``; note which output follows an input."""
        for name, symbol in self:
            value = getattr(module, name, None)
            if symbol.size is None and isinstance(value, int):
                symbol.size = value
        incoming = [symbol for _, symbol in self if symbol.is_incoming]
        self.twins = {
            out: symbol
            for _, out in self
            if out.is_outgoing and out.is_dynamic
            for symbol in incoming
            if out.root is symbol.root
        }

    def __repr__(self) -> str:
        symbols = ", ".join(f"{name}={symbol}" for name, symbol in self)
        return f"SymInfo({symbols})"
