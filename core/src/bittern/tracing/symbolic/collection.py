"""The graphs of a model: its own, and those of what is inside modules that cannot be traced."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from bittern.records import LeafRule
from bittern.registry import ClassTable
from bittern.tracing.preserve import unchanged
from bittern.tracing.symbolic.tracer import RobustTracer

__all__ = ["GraphCollection", "collect", "recursive_trace"]


class GraphCollection:
    """Graphs by the module they are of, and what became of the other modules.

    Args:
        graphs: Graphs by module.
        tracer: The tracer that made them.
    """

    def __init__(self, graphs: dict[nn.Module, fx.Graph], tracer: RobustTracer) -> None:
        self._graphs = graphs
        self._tracer = tracer

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, module: object) -> bool:
        return module in self._graphs

    def __getitem__(self, module: nn.Module) -> fx.Graph:
        return self._graphs[module]

    def is_failed(self, module: nn.Module) -> bool:
        """Return whether the module's ``forward`` could not be traced."""
        return self._tracer.is_failed(module)

    def failure_msg(self, module: nn.Module) -> str | None:
        """Return why the module could not be traced, or ``None``."""
        return self._tracer.failure_msg(module)

    @property
    def failed(self) -> tuple[nn.Module, ...]:
        """The modules that could not be traced."""
        return self._tracer.failed

    def is_unvisited(self, module: nn.Module) -> bool:
        """Return whether the module was never called."""
        return self._tracer.is_unvisited(module)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a ``call_module`` node of any of the graphs calls."""
        return self._tracer.module_of(node)

    @property
    def reached_into(self) -> set[nn.Module]:
        """Modules that one that cannot be traced calls past its children.

        Their graphs, if they are inside those of the children, do not show all that they read.
        """
        return {module for module in self._tracer.reached_into if module not in self._graphs}

    def calls_of(self, module: nn.Module) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """Return the first argument and the result of every call, where they are single tensors."""
        return tuple(self._tracer.spans.get(module, ()))

    def unpacked(self, node: fx.Node) -> int | None:
        """Return into how many names ``forward`` unpacks a node's value, or ``None``."""
        return self._tracer.unpacked.get(node)


def recursive_trace(
    model: nn.Module,
    concrete_args: Mapping[str, Any] | None = None,
    *,
    leaves: ClassTable[LeafRule] | None = None,
    is_leaf: Callable[[nn.Module], bool] | None = None,
) -> GraphCollection:
    """Trace a model, and what is inside the modules that cannot be traced.

    Such a module is one node of its parent's graph, and each of its children has a graph of its
    own. The model is left as it was.

    Args:
        model: The model; on any device, also ``meta``.
        concrete_args: Values of arguments of the model's ``forward``. Arguments with a default
            that is no tensor have this default.
        leaves: Rules about classes that must not be entered, beside torch's own layers.
        is_leaf: Further modules that must not be entered.

    Returns:
        The graphs. Nothing raises because a module cannot be traced.
    """
    tracer = RobustTracer(leaves=leaves, is_leaf=is_leaf)
    return collect(model, tracer, concrete_args)


def collect(
    model: nn.Module, tracer: RobustTracer, concrete_args: Mapping[str, Any] | None = None
) -> GraphCollection:
    """Do what `recursive_trace` does, with a given tracer."""
    graphs: dict[nn.Module, fx.Graph] = {}
    queue, seen, opened = deque([model]), {model}, 0
    with unchanged(model):
        while queue:
            module = queue.popleft()
            inside: list[nn.Module] = []
            if type(module).forward is nn.Module.forward:
                inside.append(module)  # a list of modules has no graph
            else:
                graphs[module] = tracer.trace(module, concrete_args if module is model else None)
            failed = tracer.failed
            inside.extend(failed[opened:])
            opened = len(failed)
            for parent in inside:
                for child in parent.children():
                    if child not in seen:
                        seen.add(child)
                        queue.append(child)
    return GraphCollection(graphs, tracer)
