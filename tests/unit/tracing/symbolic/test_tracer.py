"""Graphs of models that torch.fx refuses, and models that stay as they were."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from bittern.records import LeafRule
from bittern.registry import ClassTable
from bittern.tracing.symbolic import RobustTracer, analyze_symbols, recursive_trace


class Failing(nn.Module):
    """Fails after some valid code, around another that fails."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), inner, nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.inner(self.first(x)) * self.scale
        return x if x.sum() > 0 else self.last(x)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.failing = nn.Linear(4, 4), Failing(Failing(nn.Identity()))
        self.after = nn.Linear(4, 4)

    def forward(self, x):
        return self.after(self.failing(self.before(x)) * self.failing.scale)


def calls(graph):
    return [node.target for node in graph.nodes if node.op == "call_module"]


def test_what_a_failing_module_did_to_the_graph_is_undone():
    model = Around()
    collection = recursive_trace(model)
    graph = collection[model]
    assert calls(graph) == ["before", "failing", "after"]
    assert [n.target for n in graph.nodes if n.op == "get_attr"] == ["failing.scale"]
    graph.lint()


def test_children_of_failing_modules_have_graphs_of_their_own():
    model = Around()
    collection = recursive_trace(model)
    outer, inner = model.failing, model.failing.inner
    assert collection.failed == (inner, outer)
    assert "control flow" in collection.failure_msg(inner)
    assert collection.failure_msg(model.before) is None
    expected = [model, outer.first, inner, outer.last, inner.first, inner.inner, inner.last]
    assert set(collection) == set(expected)
    assert not any(map(collection.is_unvisited, expected))


def test_a_module_that_is_never_called_is_unvisited():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].unused = nn.Linear(4, 4)
    collection = recursive_trace(model)
    assert collection.is_unvisited(model[0].unused)
    assert not collection.is_unvisited(model[0])


def test_a_failing_root_is_a_graph_that_only_calls_it():
    model = Failing(nn.Identity())
    collection = recursive_trace(model)
    assert collection.is_failed(model)
    assert calls(collection[model]) == [""]
    assert collection.module_of(list(collection[model].nodes)[1]) is model


def test_lists_of_modules_inside_a_failing_module_are_opened():
    class Listing(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])

        def forward(self, x):
            return self.items[0](x) if x.sum() > 0 else self.items[1](x)

    model = Listing()
    assert list(recursive_trace(model)) == [model, *model.items]


def test_every_module_is_tried_once_however_many_fail():
    class Counting(nn.Module):
        tries = 0

        def forward(self, x):
            type(self).tries += 1
            return x if x.sum() > 0 else -x

    model = nn.Sequential(*[Counting() for _ in range(50)])
    recursive_trace(model)
    assert Counting.tries == 50


def test_leaves_come_from_rules():
    rule = LeafRule(target=f"{__name__}:Around", reason="not to be entered")
    table = ClassTable([(rule, "a plugin", False)])
    model = nn.Sequential(Around())
    assert calls(recursive_trace(model, leaves=table)[model]) == ["0"]


def test_arguments_without_a_default_are_traced_and_tensors_always_are():
    class Many(nn.Module):
        def forward(self, x, y, *, scale=2.0, mask=None, **rest):
            return (x + y) * scale if mask is None else x * mask

    graph = RobustTracer().trace(Many())
    assert [n.name for n in graph.nodes if n.op == "placeholder"] == ["x", "y"]
    graph = RobustTracer().trace(Many(), {"y": 3, "mask": torch.ones(2)})
    assert [n.name for n in graph.nodes if n.op == "placeholder"] == ["x", "mask"]


class Messy(nn.Module):
    """Leaves something behind wherever a module can, then fails."""

    def __init__(self):
        super().__init__()
        self.lin, self.seen, self.table, self.names = nn.Linear(4, 4), [], {}, {"a"}
        self.register_buffer("steps", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.seen.append(x)
        self.table["x"] = x
        self.names.add("b")
        self.last = self.lin(x)
        self.new = x
        self.steps.add_(1)
        self.noise = torch.rand(2)
        self.extra = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(2))
        raise RuntimeError("no")


def _state(model):
    return {
        name: {
            key: value.copy() if isinstance(value, dict | list | set) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m, nn.Linear(4, 4))])
def test_a_model_that_remembers_and_raises_is_left_as_it_was(wrap):
    model = wrap(Messy())
    before, steps = _state(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    analyze_symbols(model)
    assert _state(model) == before
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), steps.values(), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_is_left_as_it_was_when_the_trace_is_interrupted():
    class Interrupted(Messy):
        def forward(self, x):
            self.seen.append(x)
            raise KeyboardInterrupt

    model = nn.Sequential(Interrupted())
    before, call = _state(model), nn.Module.__call__
    with pytest.raises(KeyboardInterrupt):
        recursive_trace(model)
    assert _state(model) == before
    assert nn.Module.__call__ is call


def test_a_model_on_the_meta_device_is_analysed():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    symbols = analyze_symbols(model)
    assert {n for n, _ in symbols.named_symbols(searchable=True)} == {"0.out_features"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.b(self.a(self.norm(x) * self.scale).relu())


class Branch(Block):
    def forward(self, x):
        return x if x.sum() > 0 else super().forward(x)


def _work(model):
    """Python and C calls that an analysis makes."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    analyze_symbols(model)
    sys.setprofile(note)
    try:
        analyze_symbols(model)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("block", [Block, Branch])
def test_the_work_grows_with_the_number_of_blocks(block):
    few, many = (
        _work(nn.Sequential(nn.Linear(2, 4), *[block() for _ in range(n)], nn.Linear(4, 2)))
        for n in (10, 100)
    )
    assert many < 11 * few


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.known = [nn.Linear(4, 4)], nn.Linear(4, 4)

    def forward(self, x):
        return self.known(self.hidden[0](x))


class Wild(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, *xs, **options):
        return self.a(xs[0])


@pytest.mark.parametrize(
    "model",
    [
        Unregistered(),
        Wild(),
        nn.Module(),
        nn.Sequential(),
        nn.ModuleList([nn.Linear(2, 3)]),
        nn.Linear(2, 3),
        nn.TransformerEncoderLayer(8, 2, 16),
    ],
    ids=lambda model: type(model).__name__,
)
def test_nothing_is_searchable_and_nothing_raised_where_little_can_be_known(model):
    symbols = analyze_symbols(model)
    assert all(s.is_constant for _, s in symbols.named_symbols() if s.is_cross_layer)
    assert all(s.reason for _, s in symbols.named_symbols(constant=True))
    assert not list(symbols.named_symbols(free=True))
