"""The trace: runs a model once on example inputs and says which of its tensors belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bittern.errors import TraceError
from bittern.records import Coverage, Fold, Group, LeafRule, SymbolRule
from bittern.registry import ClassTable, Match, OpTable
from bittern.tracing.coverage import find_coverage, guard_branches
from bittern.tracing.explain import explain
from bittern.tracing.flow import Flow, OpGraph
from bittern.tracing.flow.record import record
from bittern.tracing.folds import find_folds
from bittern.tracing.groups import collect_groups, settle_cuts
from bittern.tracing.sealed import sealed_flow
from bittern.tracing.shared import find_shared_inputs
from bittern.tracing.symbolic import GraphCollection, SymMap, analyze_symbols, recursive_trace

__all__ = ["Trace", "run_trace"]


@dataclass(frozen=True, eq=False)
class Trace:
    """What a model's tensors have to do with each other.

    Attributes:
        model: The traced model.
        flow: The axes of every tensor of the run; for plugins and the curious.
        leaf_rules: What the symbolic tracer must not enter.
        symbol_rules: Which dimensions module classes have.
    """

    model: nn.Module
    flow: Flow
    leaf_rules: ClassTable[LeafRule]
    symbol_rules: ClassTable[SymbolRule]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The dimensions that must change together, with the place of every coordinate."""
        return collect_groups(self.flow)

    @cached_property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """The modules, or weights, that multiply the very same tensor."""
        return find_shared_inputs(self.flow.graph)

    @cached_property
    def foldable(self) -> tuple[Fold, ...]:
        """The producers that can take over a scale of their consumers' inputs."""
        return find_folds(self.flow)

    def within(self, inside: Callable[[str], bool]) -> Trace:
        """Return the trace with only the folds and shared inputs that lie in a part of the model.

        Args:
            inside: Whether a module, given by its path, belongs to the part.
        """
        part = replace(self)
        vars(part)["foldable"] = tuple(
            fold
            for fold in self.foldable
            if all(inside(member.module) for member in (*fold.scaled, *fold.divided))
        )
        vars(part)["shared_inputs"] = tuple(
            group for group in self.shared_inputs if all(map(inside, group))
        )
        return part

    @cached_property
    def coverage(self) -> Coverage:
        """How much of the model was analysed, and where it stopped and why."""
        return find_coverage(self.flow, self.model)

    @cached_property
    def graphs(self) -> GraphCollection:
        """The `torch.fx` graphs of the modules that can be traced symbolically."""
        return recursive_trace(self.model, leaves=self.leaf_rules)

    @cached_property
    def symbols(self) -> SymMap:
        """The symbols of the modules, linked as far as symbolic tracing gets."""
        return analyze_symbols(self.model, rules=self.symbol_rules, leaves=self.leaf_rules)

    def explain(self, name: str) -> str:
        """Say in words what belongs to a module or tensor, and why.

        Args:
            name: Path of a module, or full name of a parameter.

        Raises:
            TraceError: The model has nothing of that name.
        """
        return explain(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, index maps as lists."""
        from bittern.tracing.output import to_dict

        return to_dict(self)

    def to_tree(self) -> str:
        """Return the weight-bearing modules as a tree, with what their dimensions are made of."""
        from bittern.tracing.tree import to_tree

        return to_tree(self)

    def to_dot(self) -> str:
        """Return the weights, shared inputs, folds and groups as a graph in DOT."""
        from bittern.tracing.output import to_dot

        return to_dot(self)


def run_trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    ops: OpTable,
    leaves: ClassTable[LeafRule],
    symbols: ClassTable[SymbolRule],
) -> Trace:
    """Trace a model.

    Args:
        model: Any model, on any device, the meta device included. It is left as it was.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        ops: Rules for operators.
        leaves: Modules that are not looked into.
        symbols: Rules for the dimensions of module classes.

    Raises:
        TraceError: Not a single operator ran, or a parameter is not initialized.
    """
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise TraceError(
                f"the parameter {name} is not initialized",
                hint="run the model once on real inputs: lazy modules take their sizes from them",
            )

    def leaf(module: nn.Module) -> str:
        match = leaves.find(module)
        return (match.rule.reason or "a leaf") if isinstance(match, Match) else ""

    graph = _record(model, args, kwargs, ops.knows, leaf)
    if not graph.nodes and graph.failure:
        raise TraceError(
            f"the model cannot run with the example inputs: {graph.failure}",
            where=graph.failed_in or None,
            hint="give example_inputs as a tuple of positional or a dict of keyword arguments",
        )
    flow = Flow(graph, ops, sealed_flow(model, symbols))
    flow.run()
    settle_cuts(flow)
    guard_branches(flow, model)
    return Trace(model, flow, leaves, symbols)


def _record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    knows: Callable[[str], bool],
    leaf: Callable[[nn.Module], str],
) -> OpGraph:
    """Record shapes only; where that does not suffice, and the weights are there, run for real."""
    fake = record(model, args, kwargs, knows=knows, leaf=leaf)
    if not fake.failure or any(tensor.is_meta for tensor in _held(model)):
        return fake
    real = record(model, args, kwargs, knows=knows, leaf=leaf, fake=False)
    if not real.failure or len(real.nodes) > len(fake.nodes):
        return real
    if len(real.nodes) == len(fake.nodes):
        fake.failure = real.failure  # the same place, in words that are not about fake tensors
    return fake


def _held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
