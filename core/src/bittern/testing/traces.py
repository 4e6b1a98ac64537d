"""What rules about graphs owe their users: leaves are not entered, operators do what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from bittern.records import LeafRule, OpRule
from bittern.registry import ClassTable, Match, OpTable, op_names, resolve, target_of
from bittern.testing.base import Conformance, check, given_cases, named
from bittern.testing.compare import tensors_of
from bittern.testing.permutations import assert_close, move, shuffled
from bittern.testing.symbols import check_target
from bittern.tracing import recursive_trace
from bittern.tracing.flow import Axis, Flow, OpGraph, Value, positions
from bittern.tracing.flow.record import record
from bittern.tracing.groups import settle_cuts

__all__ = ["LeafCase", "OpCase", "TraceConformance"]

T = TypeVar("T")


@dataclass(frozen=True)
class LeafCase:
    """One module that must not be entered.

    Attributes:
        name: The test id.
        make: Builds the module; called under a fixed seed.
        inputs: Makes the positional arguments of one call from a generator.
    """

    name: str
    _: KW_ONLY
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class OpCase:
    """One call of an operator whose dimensions a plugin knows.

    Dimensions of other sizes, none of them 1, show more than a square.

    Attributes:
        name: The test id.
        call: Calls the operator: takes the inputs, returns a tensor or several.
        inputs: Makes the inputs from a generator: tensors, and what else ``call`` takes.
        tolerance: Largest rounding difference, relative to the largest magnitude.
    """

    name: str
    _: KW_ONLY
    call: Callable[..., Any]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    tolerance: float = 1e-4


class TraceConformance(Conformance):
    """Trace rules: no tracer enters a leaf, and the axes that come out of an operator are true."""

    def cases(self) -> Sequence[LeafCase | OpCase]:
        """Return a case for every leaf rule and every operator rule."""
        return ()

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every case; of ``None`` where a kind has none."""
        cases = given_cases(cls)
        none: list[tuple[str, Any]] = [("none", None)]
        return {
            "leaf": named(case for case in cases if isinstance(case, LeafCase)) or none,
            "op": named(case for case in cases if isinstance(case, OpCase)) or none,
        }

    def test_the_plugin_registers_trace_rules(self) -> None:
        """Protects users from a plugin whose trace rules got lost."""
        check(self._leaves() or self._ops(), "the plugin registers no leaf and no operator")

    # --- leaves ---

    def test_leaf_targets_resolve(self) -> None:
        """Protects users from a tracer that enters what it must not, since a class was moved."""
        self._need(self._leaves())
        for rule in self._leaves():
            check_target(rule.target, self.subject().label)

    def test_leaves_have_reasons(self) -> None:
        """Protects users from a hole in the coverage report without a word why."""
        self._need(self._leaves())
        silent = [rule.target for rule in self._leaves() if not rule.reason.strip()]
        check(not silent, f"no reason is given for {', '.join(silent)}")

    def test_leaves_do_not_repeat(self) -> None:
        """Protects users from two rules of which only one counts."""
        self._need(self._leaves())
        targets = [(rule.target, rule.priority) for rule in self._leaves()]
        twice = sorted({target for target, p in targets if targets.count((target, p)) > 1})
        check(not twice, f"several leaf rules for {', '.join(twice)}")

    def test_every_leaf_rule_has_a_case(self) -> None:
        """Protects users from rules that nobody ever ran."""
        self._need(self._leaves())
        made = [_made(case) for _, case in self.parameters()["leaf"] if case is not None]
        classes = {target_of(base) for module in made for base in type(module).__mro__}
        untested = [rule.target for rule in self._leaves() if rule.target not in classes]
        check(not untested, f"no LeafCase is a {', '.join(untested)}")

    def test_recursive_trace_does_not_enter_a_leaf(self, leaf: LeafCase | None) -> None:
        """Protects users from a graph of what the rule says must not be looked into."""
        model = self._model(leaf)
        found = recursive_trace(model, leaves=self.toolkit().registry.leaves)
        module = model.get_submodule("module")
        check(not found.is_failed(module), f"it was entered: {found.failure_msg(module)}")
        calls = [node.op for node in found[model].nodes if node.op.startswith("call")]
        check(calls == ["call_module"], f"the graph shows its inside: {', '.join(calls)}")
        entered = [n for n, child in _inside(module) if not found.is_unvisited(child)]
        check(not entered, f"its children were visited: {', '.join(entered)}")

    def test_trace_does_not_enter_a_leaf(self, leaf: LeafCase | None) -> None:
        """Protects users from groups that reach through what the rule says is opaque."""
        model = self._model(leaf)
        trace = self.toolkit().trace(model, ())
        ops = [n.op for n in trace.flow.graph.nodes if f"{n.module}.".startswith("module.")]
        check(
            len(ops) == 1 and ops[0].startswith("module."),
            f"the trace shows its inside: {', '.join(ops)}",
        )
        held = [p for p in trace.coverage.barriers if f"{p}.".startswith("module.")]
        known = not trace.flow.barriers  # a rule for its operator speaks for it
        check(held or known, "the coverage report does not name it")

    # --- operators ---

    def test_op_names_resolve(self) -> None:
        """Protects users from a rule for an operator that this torch does not have.

        A name is ``"namespace.op.overload"``, or ``"namespace.op.*"`` for all overloads.
        """
        self._need(self._ops())
        missing = []
        for rule in self._ops():
            parts = rule.op.split(".")
            check(
                len(parts) == 3,
                f'{rule.op!r} is no operator; write "namespace.op.overload" or "namespace.op.*"',
            )
            found: Any = torch.ops
            for part in parts if parts[-1] != "*" else parts[:-1]:
                found = getattr(found, part, None)
            if found is None:
                missing.append(rule.op)
        check(not missing, f"torch.ops has no {', '.join(missing)}")

    def test_op_flows_resolve(self) -> None:
        """Protects users from an ImportError in the middle of a trace."""
        self._need(self._ops())
        for rule in self._ops():
            function = resolve(rule.flow, plugin=self.subject().label)
            check(callable(function), f"{rule.flow} cannot be called")

    def test_ops_do_not_repeat(self) -> None:
        """Protects users from two rules of which only one counts."""
        self._need(self._ops())
        ops = [(rule.op, rule.priority) for rule in self._ops()]
        twice = sorted({op for op, p in ops if ops.count((op, p)) > 1})
        check(not twice, f"several rules for {', '.join(twice)}")

    def test_every_op_rule_has_a_case(self) -> None:
        """Protects users from rules that nobody ever ran."""
        self._need(self._ops())
        cases = [case for _, case in self.parameters()["op"] if case is not None]
        ran = {
            name for case in cases for node in self._graph(case).nodes for name in op_names(node.op)
        }
        untested = [rule.op for rule in self._ops() if rule.op not in ran]
        check(not untested, f"no OpCase runs {', '.join(untested)}")

    def test_an_op_case_runs_an_operator_of_the_plugin(self, op: OpCase | None) -> None:
        """Protects users from a case that tests something else than its author thinks."""
        case = self._given(op)
        nodes = self._graph(case).nodes
        table: OpTable = self.toolkit().registry.ops
        ours = [
            node.op
            for node in nodes
            if (found := table.find(node.op)) is not None and found.plugin == self.subject().label
        ]
        ran = ", ".join(dict.fromkeys(node.op for node in nodes))
        check(ours, f"none of what the case runs has a rule of this plugin: {ran or 'nothing'}")

    def test_an_op_flow_gives_axes(self, op: OpCase | None) -> None:
        """Protects users from a barrier where there is a rule.

        The flow function returns one axis per dimension of the output, of that dimension's size.
        """
        flow = self._flow(self._given(op))[0]
        check(not flow.barriers, "; ".join(flow.barriers.values()))

    def test_an_op_flow_is_true(self, op: OpCase | None) -> None:
        """Protects users from pruning or sorting what does not belong together.

        Reordering the coordinates of one axis, in all inputs that have it, reorders the output
        likewise; where the output has not got it, nothing changes.
        """
        case = self._given(op)
        given = _inputs(case)
        flow, inputs, outputs = self._flow(case)
        expected = tensors_of(case.call(*_copies(given)))
        for leaf in _free(flow, [*inputs.values(), *outputs]):
            order = shuffled(leaf.size)
            shifted = [
                _moved(value, flow, inputs.get(i), leaf, order) for i, value in enumerate(given)
            ]
            found = tensors_of(case.call(*_copies(shifted)))
            where = [f"input {i} {_at(flow, v, leaf)}" for i, v in inputs.items()]
            where += [f"output {i} {_at(flow, v, leaf)}" for i, v in enumerate(outputs)]
            places = ", ".join(text for text in where if not text.endswith(" "))
            for wanted, now, value in zip(expected, found, outputs, strict=True):
                assert_close(
                    _moved(wanted, flow, value, leaf, order),
                    now,
                    what=f"the {leaf.size} coordinates of {places} do not belong together",
                    tolerance=case.tolerance,
                )

    # --- helpers ---

    def _leaves(self) -> list[LeafRule]:
        return self.subject().call("register_trace_leaves")

    def _ops(self) -> list[OpRule]:
        return self.subject().call("register_trace_ops")

    def _need(self, rules: Sequence[object]) -> None:
        self.subject().need_loaded()
        if not rules:
            pytest.skip("the plugin registers none")

    def _given(self, case: T | None) -> T:
        self.subject().need_loaded()
        if case is None:
            pytest.skip("there is no such case")
        return case

    def _model(self, leaf: LeafCase | None) -> _Call:
        case = self._given(leaf)
        module = _made(case)
        label = self.subject().label
        table: ClassTable[LeafRule] = ClassTable([(r, label, False) for r in self._leaves()])
        found = table.find(module)
        check(isinstance(found, Match), f"no leaf rule takes a {type(module).__qualname__}")
        return _Call(module, _inputs(case))

    def _graph(self, case: OpCase) -> OpGraph:
        """Run a case, its tensors as parameters, so that nothing but the rules fixes them."""
        knows = self.toolkit().registry.ops.knows
        graph = record(_Call(case.call, _inputs(case)), (), {}, knows=knows, fake=False)
        check(not graph.failure, f"the case cannot be run: {graph.failure}")
        return graph

    def _flow(self, case: OpCase) -> tuple[Flow, dict[int, Value], list[Value]]:
        graph = self._graph(case)
        outputs = list(graph.outputs)
        graph.outputs.clear()  # the flow would fix their dimensions: somebody else reads them
        flow = Flow(graph, self.toolkit().registry.ops)
        flow.run()
        settle_cuts(flow)
        inputs = {int(name.removeprefix("input")): v for name, v in graph.stored.items()}
        return flow, inputs, outputs


class _Call(nn.Module):
    """Calls a function or module on tensors that it holds."""

    def __init__(self, function: Callable[..., Any], given: Sequence[Any]) -> None:
        super().__init__()
        self.module = function  # a submodule, where it is one
        self._given = [None if isinstance(value, Tensor) else value for value in given]
        for i, value in enumerate(given):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.register_parameter(f"input{i}", nn.Parameter(value, requires_grad=False))
            elif isinstance(value, Tensor):
                self.register_buffer(f"input{i}", value)

    def forward(self) -> Any:
        """Return what the function returns."""
        given = [getattr(self, f"input{i}", value) for i, value in enumerate(self._given)]
        return self.module(*given)


def _made(case: LeafCase) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.make().eval()


def _inputs(case: LeafCase | OpCase) -> tuple[Any, ...]:
    return case.inputs(torch.Generator().manual_seed(0))


def _inside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in module.named_modules() if child is not module)


def _copies(given: Sequence[Any]) -> list[Any]:
    """Return copies of tensors, for operators that write into what they read."""
    return [v.detach().clone() if isinstance(v, Tensor) else v for v in given]


def _free(flow: Flow, values: Sequence[Value]) -> list[Axis]:
    """Return what may be reordered."""
    leaves = {leaf: None for v in values for axis in flow.of(v) for leaf in axis.leaves()}
    return [x for x in leaves if x.size > 1 and x.mark.sortable and not x.mark.fixed]


def _moved(item: Any, flow: Flow, value: Value | None, leaf: Axis, order: Tensor) -> Any:
    """Return a tensor with the coordinates of a leaf reordered, wherever they are."""
    if value is None or not isinstance(item, Tensor):
        return item
    for dim, axis in enumerate(flow.of(value)):
        rows = positions(axis).get(leaf)
        if rows is not None:
            index = torch.arange(axis.size)
            places = torch.from_numpy(rows)
            index[places] = places[order]
            item = move(item, dim, index)
    return item


def _at(flow: Flow, value: Value, leaf: Axis) -> str:
    """Say in which dimensions of a tensor a leaf is."""
    dims = [str(d) for d, axis in enumerate(flow.of(value)) if leaf in set(axis.leaves())]
    return f"dim {' and '.join(dims)}" if dims else ""
