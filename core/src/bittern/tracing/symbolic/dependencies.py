"""Walks a graph and ties the symbols of the modules it calls.

Every node is one kind (`processors.py`), tried in order; what is of no known kind is a boundary:
the widths that go in become constant, and nothing is known about what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from bittern.tracing.symbolic.collection import GraphCollection
from bittern.tracing.symbolic.linking import Linker
from bittern.tracing.symbolic.parameters import ParameterSymbols
from bittern.tracing.symbolic.symmap import SymMap
from bittern.tracing.symbolic.values import Axis, Shape, axes_of

__all__ = ["GraphDependencyProcessor", "NodeProcessor", "Step"]


class Step:
    """One node while it is processed.

    Attributes:
        node: The node.
        target: The module, function or method name that it calls.
        args: The known values of its arguments.
        kwargs: The same by name.
        walk: What the whole walk shares.
    """

    __slots__ = ("args", "kwargs", "node", "target", "walk")

    def __init__(self, node: fx.Node, walk: GraphDependencyProcessor) -> None:
        self.node = node
        self.walk = walk
        self.target: Any = (
            walk.collection.module_of(node) if node.op == "call_module" else node.target
        )
        self.args = walk.look_up(node.args)
        self.kwargs = walk.look_up(node.kwargs) if node.kwargs else {}

    @property
    def where(self) -> str:
        """The node's name and the module whose ``forward`` has it, for reasons."""
        if isinstance(self.target, nn.Module):
            name = self.walk.symbols.name_of(self.target)
            return f"{name} ({type(self.target).__name__})" if name else type(self.target).__name__
        name = getattr(self.node.target, "__name__", str(self.node.target))
        stack = self.node.meta.get("nn_module_stack")
        scope = next(reversed(stack.values()))[0] if stack else ""
        owner = self.walk.path
        path = ".".join(part for part in (owner, scope) if part)
        return f"`{name}` in {path}" if path else f"`{name}`"

    @property
    def first(self) -> Any:
        """The value of the first argument."""
        return self.argument(0, "input")

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument's value by position or name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def boundary(self, why: str = "is not understood", *, kept: Sequence[Any] = ()) -> Shape:
        """Make every width that goes in constant, except those in ``kept``.

        Args:
            why: Completes "`view` in layer1 ...".
            kept: Values whose widths stay as they are.

        Returns:
            A shape of which nothing is known.
        """
        spared = axes_of(list(kept))
        axes = [axis for axis in axes_of([self.args, self.kwargs]) if axis not in spared]
        if axes:
            self.walk.linker.block(axes, f"{self.where} {why}")
        return Shape(self.node.name, origin=f"what {self.where} returns")

    def join(self, axes: Sequence[Axis]) -> bool:
        """Tie widths that must be equal."""
        return self.walk.linker.join(axes, self.where)


class NodeProcessor:
    """One kind of node: says whether a node is of the kind, and what it does to widths."""

    def matches(self, step: Step) -> bool:
        """Return whether the node is of this kind."""
        raise NotImplementedError

    def process(self, step: Step) -> Any:
        """Tie or block the widths that the node brings together.

        Returns:
            What is known about the node's value: a `Shape`, a nested tuple of them, or ``None``.
        """
        raise NotImplementedError


class GraphDependencyProcessor:
    """Ties the symbols of a model along all of its graphs.

    Args:
        collection: The graphs.
        symbols: The symbols of the modules; they are changed.
        processors: Kinds of nodes to try first, in order.
        builtin: The kinds to try after them.
    """

    def __init__(
        self,
        collection: GraphCollection,
        symbols: SymMap,
        *,
        processors: Iterable[NodeProcessor] = (),
        builtin: Iterable[NodeProcessor] | None = None,
    ) -> None:
        if builtin is None:
            from bittern.tracing.symbolic.processors import builtin_processors

            builtin = builtin_processors()
        self.collection = collection
        self.symbols = symbols
        self.linker = Linker()
        self.parameters = ParameterSymbols(symbols)
        self.root: nn.Module | None = None
        self.path = ""
        self.values: dict[fx.Node, Any] = {}
        self._processors = [*processors, *builtin]

    def process(self) -> None:
        """Walk all graphs."""
        for root in self.collection:
            self.root, self.path = root, self.symbols.name_of(root)
            for node in self.collection[root].nodes:
                self.values[node] = self._process(Step(node, self))
        self.parameters.close()

    def _process(self, step: Step) -> Any:
        for processor in self._processors:
            if processor.matches(step):
                return processor.process(step)
        return step.boundary()

    def look_up(self, argument: Any) -> Any:
        """Return an argument with its nodes replaced by what is known about them."""
        if isinstance(argument, fx.Node):
            return self.values.get(argument, Shape(argument.name))
        if isinstance(argument, tuple | list):
            return type(argument)(self.look_up(item) for item in argument) if argument else argument
        if isinstance(argument, dict):
            return {name: self.look_up(item) for name, item in argument.items()}
        if isinstance(argument, slice):
            parts = (argument.start, argument.stop, argument.step)
            return slice(*(self.look_up(part) for part in parts))
        return argument
