"""The kinds of nodes, in the order in which they are tried; what is of none is a boundary."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from bittern.tracing.symbolic.concat import concat
from bittern.tracing.symbolic.dependencies import NodeProcessor, Step
from bittern.tracing.symbolic.elementwise import elementwise
from bittern.tracing.symbolic.indexing import indexing
from bittern.tracing.symbolic.modules import SymbolModuleProcessor
from bittern.tracing.symbolic.reshape import reshape
from bittern.tracing.symbolic.spatial import spatial
from bittern.tracing.symbolic.values import Shape, axes_of

__all__ = ["EndProcessor", "SimpleModuleProcessor", "builtin_processors"]


class EndProcessor(NodeProcessor):
    """Where a graph begins and ends, and the parameters it reads."""

    def matches(self, step: Step) -> bool:
        """Take inputs, parameters and the output."""
        return step.node.op in ("placeholder", "get_attr", "output")

    def process(self, step: Step) -> Any:
        """Make what leaves the graph constant."""
        outside = " a module that cannot be traced" if step.walk.path else ""
        if step.node.op == "output":
            what = f"{step.walk.path} returns it to" if step.walk.path else "the model returns it"
            step.walk.linker.block(axes_of(step.args), what + outside)
            return None
        name = f"{step.walk.path}.{step.target}" if step.walk.path else str(step.target)
        if step.node.op == "placeholder":
            origin = f"the input `{name}`" + (f" from{outside}" if outside else "")
            return Shape(step.node.name, origin=origin)
        path, _, attribute = str(step.target).rpartition(".")
        assert step.walk.root is not None
        owner = step.walk.root.get_submodule(path)
        found = getattr(owner, attribute, None)
        if not isinstance(found, Tensor):
            return Shape(step.node.name, origin=f"`{name}`")
        dims = step.walk.parameters.dims(owner, attribute, found)
        return Shape(step.node.name, found.dim(), dims, f"`{name}`")


class SimpleModuleProcessor(NodeProcessor):
    """A module that says it keeps the shape, and has no symbols that others meet."""

    def matches(self, step: Step) -> bool:
        """Take shape-preserving modules without cross-layer symbols."""
        return isinstance(step.target, nn.Module) and step.walk.symbols.is_shape_preserving(
            step.target
        )

    def process(self, step: Step) -> Any:
        """Hand on the shape."""
        first = step.first
        return first if isinstance(first, Shape) else step.boundary()


@cache
def builtin_processors() -> tuple[NodeProcessor, ...]:
    """Return core's kinds of nodes; names of operations are looked up once per process."""
    return (
        EndProcessor(),
        SymbolModuleProcessor(),
        SimpleModuleProcessor(),
        elementwise(),
        indexing(),
        spatial(),
        concat(),
        reshape(),
    )
