"""The public trace: what it finds, on anything, and that it leaves the model as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import TraceError
from bittern.records import LeafRule, ModelAdapter
from bittern.toolkit import Toolkit
from bittern.tracing import Trace

Make = Callable[..., nn.Module]
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
HIDDEN = (8, ("a.bias[0]", "a.weight[0]", "b.weight[1]"))


class Closed(nn.Module):
    """A linear that a plugin does not want looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Pair(nn.Module):
    """Two linears; subclasses say what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


def between(forward: Callable[[Pair, Tensor], Any]) -> Pair:
    """Return the pair with another ``forward``."""
    return type(forward.__name__, (Pair,), {"forward": forward})()


def members(trace: Trace) -> set[tuple[int, tuple[str, ...]]]:
    return {
        (g.size, tuple(sorted(f"{m.module}.{m.tensor}[{m.dim}]".lstrip(".") for m in g.members)))
        for g in trace.groups
    }


def picture(model: nn.Module) -> tuple[Any, ...]:
    """Return everything a user could notice about a model: objects, values, versions of classes."""
    return (
        [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        [{k: id(v) for k, v in vars(m).items() if k != "training"} for m in model.modules()],
        [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()],
        [(n, id(p), p.requires_grad, id(p.grad), p.tolist()) for n, p in model.named_parameters()],
        [(n, id(b), b.tolist()) for n, b in model.named_buffers()],
        torch.get_rng_state().tolist(),
        [*nn.modules.module._global_forward_hooks, *nn.modules.module._global_forward_pre_hooks],
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


# --- what is found --------------------------------------------------------------------------------


def test_a_hidden_width_is_a_group_and_what_leaves_the_model_is_none(toolkit: Toolkit) -> None:
    trace = toolkit.trace(Pair(), X)
    assert members(trace) == {HIDDEN}
    (group,) = trace.groups
    assert group.sortable
    assert all(m.index.tolist() == [[i] for i in range(8)] for m in group.members)
    assert trace.coverage.fraction == 1
    assert not trace.coverage.barriers


def test_heads_are_groups_of_rows(make_lm: Make, toolkit: Toolkit) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).view(2, 5, 4, 2).transpose(1, 2) for p in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(mixed.transpose(1, 2).reshape(2, 5, 8))

    trace = toolkit.trace(Heads(), torch.randn(2, 5, 8))
    heads = next(g for g in trace.groups if g.size == 4)
    assert {m.module for m in heads.members} == set("qkvo")
    assert heads.members[0].index.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert trace.shared_inputs == (("q", "k", "v"),)
    assert [(f.producer, f.consumers) for f in trace.foldable] == [("v", ("o",))]


@pytest.mark.parametrize(
    "inputs", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "mapping"]
)
def test_example_inputs_in_every_form(inputs: Any, toolkit: Toolkit) -> None:
    assert members(toolkit.trace(Pair(), inputs)) == {HIDDEN}


def test_the_adapter_knows_inputs_and_arguments(
    toolkit_with: Callable[..., Toolkit], make_plugin: Callable[..., Any]
) -> None:
    def forward(self: Pair, x: Tensor, *, hide: bool) -> Tensor:
        hidden = self.a(x)
        return self.b(hidden) if hide else hidden

    adapter = ModelAdapter(example_inputs=lambda: {"x": X}, call_kwargs={"hide": True})
    plugin = make_plugin("alpha", resolve_model_adapter=lambda model: adapter)
    toolkit, model = toolkit_with(plugin), between(forward)
    assert members(toolkit.trace(model)) == {HIDDEN}
    assert members(toolkit.trace(model, {"x": X, "hide": False})) == set()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_does_not_matter(dtype: torch.dtype, toolkit: Toolkit) -> None:
    assert members(toolkit.trace(Pair().to(dtype), X.to(dtype))) == {HIDDEN}


def test_nothing_is_computed_so_size_costs_nothing(toolkit: Toolkit) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 1_000_000), nn.ReLU(), nn.Linear(1_000_000, 500_000))
    (group,) = toolkit.trace(model, X).groups
    assert group.size == 1_000_000


def test_a_module_that_a_rule_calls_a_leaf_is_not_looked_into(
    toolkit_with: Callable[..., Toolkit], make_plugin: Callable[..., Any]
) -> None:
    rule = LeafRule(target=f"{Closed.__module__}:Closed", reason="it is closed")
    plugin = make_plugin("alpha", register_trace_leaves=lambda: [rule])
    model = nn.Sequential(nn.Linear(4, 4), Closed(), nn.Linear(3, 3))
    trace = toolkit_with(plugin).trace(model, X)
    assert members(trace) == set()
    assert "not looked into" in trace.coverage.barriers["1"]
    assert set(trace.coverage.analysed) == set()


def test_graphs_and_symbols_are_those_of_the_symbolic_path(toolkit: Toolkit) -> None:
    trace = toolkit.trace(Pair(), X)
    assert not trace.graphs.is_failed("")
    assert dict(trace.symbols.named_symbols())


def test_traces_do_not_know_of_each_other(toolkit: Toolkit) -> None:
    model = Pair()
    first, second = toolkit.trace(model, X), toolkit.trace(model, X)
    assert first.to_dict() == second.to_dict()
    assert set(first.flow.graph.nodes).isdisjoint(second.flow.graph.nodes)


# --- the model is left as it was ------------------------------------------------------------------


class Remembering(Pair):
    """Changes whatever a ``forward`` can change."""

    def __init__(self, error: BaseException | None = None, *, looks: bool = False) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(2, 8))
        self.table = torch.ones(8)
        self.seen: list[Any] = []
        self.error, self.looks = error, looks
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x) * self.table + torch.rand(8)
        self.last, self.new = hidden, 1
        self.seen.append(hidden)
        self.count += 1
        if self.looks and hidden.sum() > 1e9:
            return x
        if self.error is not None:
            raise self.error
        self.a.other = hidden
        return self.b(hidden)


@pytest.mark.parametrize("looks", [False, True], ids=["shapes", "for real"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_the_model_is_left_as_it_was(looks: bool, training: bool, toolkit: Toolkit) -> None:
    model = Remembering(looks=looks).train(training)
    model.a.eval()
    model.b.weight.requires_grad_(False)
    model.b.register_forward_hook(lambda *_: None)
    model.a.weight.grad = torch.ones_like(model.a.weight)
    before, x = picture(model), X.clone()
    trace = toolkit.trace(model, x)
    assert trace.flow.graph.fake is not looks
    assert picture(model) == before
    assert torch.equal(x, X)
    assert model.seen == []


@pytest.mark.parametrize("looks", [False, True], ids=["shapes", "for real"])
@pytest.mark.parametrize("error", [RuntimeError("bang"), StopIteration(), RecursionError()])
def test_the_model_is_left_as_it_was_when_it_raises(
    error: Exception, looks: bool, toolkit: Toolkit
) -> None:
    model = Remembering(error, looks=looks).train()
    before = picture(model)
    trace = toolkit.trace(model, X)
    assert picture(model) == before
    assert type(error).__name__ in trace.coverage.barriers[""]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_passes_and_leaves_the_model_as_it_was(
    error: BaseException, toolkit: Toolkit
) -> None:
    model = Remembering(error).train()
    before = picture(model)
    with pytest.raises(type(error)):
        toolkit.trace(model, X)
    assert picture(model) == before


def test_tensors_and_classes_that_were_exchanged_are_put_back(toolkit: Toolkit) -> None:
    def forward(self: Pair, x: Tensor) -> Tensor:
        self.a.weight.data = self.a.weight.data * 2
        self.b.weight = nn.Parameter(self.b.weight + 1)
        self.b.bias.requires_grad_(False)
        self.to(torch.float64)
        self.__class__ = Pair
        return self.b(self.a(x.double()))

    model = between(forward)
    before = picture(model)
    toolkit.trace(model, X)
    assert picture(model) == before


def test_example_inputs_are_not_written_into(toolkit: Toolkit) -> None:
    def forward(self: Pair, x: Tensor) -> Tensor:
        x.add_(1)
        return self.b(self.a(x)) if x.sum() < 1e9 else x

    x = X.clone()
    toolkit.trace(between(forward), x)
    assert torch.equal(x, X)


def test_a_view_of_a_buffer_can_be_written(toolkit: Toolkit) -> None:
    def forward(self: Remembering, x: Tensor) -> Tensor:
        self.cache[:1] = self.a(x)[:1]
        return self.b(self.a(x)) if x.sum() < 1e9 else x

    model = type("Caching", (Remembering,), {"forward": forward})()
    before = picture(model)
    toolkit.trace(model, X)
    assert picture(model) == before


def test_no_mark_is_left_on_tensors_that_are_plain_attributes(toolkit: Toolkit) -> None:
    model = Remembering()
    first = toolkit.trace(model, X).to_dict()
    assert not vars(model.table)
    assert toolkit.trace(model, X).to_dict() == first


class Tabulated(Pair):
    """Keeps what a method computed for a length, as rotary embeddings do."""

    @lru_cache(maxsize=4)  # noqa: B019 (what the test is about)
    def table(self, length: int) -> Tensor:
        return self.a.weight.new_ones(length)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.table(x.shape[-1]))


def test_memoized_methods_keep_no_tensors_without_values(toolkit: Toolkit) -> None:
    model = Tabulated()
    toolkit.trace(model, X)
    assert model.table(4).tolist() == [1.0] * 4


def test_a_module_that_cannot_be_compared_is_no_reason_to_stop(toolkit: Toolkit) -> None:
    """Attributes may be anything: their truth and their equality are not asked for."""

    class Touchy:
        def __bool__(self) -> bool:
            raise RuntimeError("do not ask")

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("do not compare")

        __hash__ = object.__hash__

    model = Pair()
    model.touchy = Touchy()  # type: ignore[assignment]
    model.matrix = torch.ones(2, 2)
    assert members(toolkit.trace(model, X)) == {HIDDEN}


# --- models that cannot run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (torch.randn(2, 5), "shapes cannot be multiplied"),
        ({"y": X}, "unexpected keyword"),
        ((), "missing 1 required"),
        ((X, X), "takes 2 positional"),
        ("text", "must be Tensor"),
        (3, "must be Tensor"),
        (X.numpy(), "must be Tensor"),
    ],
)
def test_a_model_that_cannot_start_says_why(inputs: Any, says: str, toolkit: Toolkit) -> None:
    with pytest.raises(TraceError, match="cannot run with the example inputs") as caught:
        toolkit.trace(Pair(), inputs)
    assert says in str(caught.value)
    assert "example_inputs" in (caught.value.hint or "")


def test_without_inputs_and_without_a_plugin_that_knows_any(toolkit: Toolkit) -> None:
    with pytest.raises(TraceError, match="no plugin knows inputs") as caught:
        toolkit.trace(Pair())
    assert "example_inputs" in (caught.value.hint or "")


def test_a_model_without_a_forward(toolkit: Toolkit) -> None:
    with pytest.raises(TraceError, match="forward"):
        toolkit.trace(nn.Module(), X)


def test_a_model_without_sizes(toolkit: Toolkit) -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3))
    with pytest.raises(TraceError, match=r"0\.weight is not initialized"):
        toolkit.trace(model, X)
    assert type(model[0]) is nn.LazyLinear


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU()], ids=["empty", "no weights"])
def test_a_model_with_nothing_to_find(model: nn.Module, toolkit: Toolkit) -> None:
    trace = toolkit.trace(model, X)
    assert (trace.groups, trace.shared_inputs, trace.foldable) == ((), (), ())
    assert trace.coverage.fraction == 1
    assert trace.to_dict()["groups"] == []
    assert trace.to_dot().startswith("digraph")


def test_what_ran_before_a_wrong_shape_is_analysed(
    toolkit: Toolkit, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(7, 3), Pair())
    trace = toolkit.trace(model, X)
    assert members(trace) == {(8, ("0.bias[0]", "0.weight[0]", "2.weight[1]"))}
    assert trace.coverage.analysed == ("0",)
    barriers = trace.coverage.barriers
    assert "shapes cannot be multiplied" in barriers["3"]
    assert "the run ended" in barriers["2"]
    assert "not reached" in barriers["4.a"]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""


# --- models that look at values -------------------------------------------------------------------


class Deciding(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(8, 3)
        self.inside = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(self.inside(x))
        return self.b(hidden) if hidden.sum() > 1e9 else self.c(hidden)


def test_a_branch_is_noted_and_what_it_may_decide_is_fixed(toolkit: Toolkit) -> None:
    trace = toolkit.trace(Deciding(), X)
    assert "another input may take another way; b did not run" in trace.coverage.barriers[""]
    inside = (6, ("inside.0.bias[0]", "inside.0.weight[0]", "inside.1.weight[1]"))
    assert members(trace) == {inside}


def test_a_branch_of_a_model_without_weights_is_analysed_as_far_as_it_goes(
    toolkit: Toolkit,
) -> None:
    trace = toolkit.trace(Deciding().to("meta"), X)
    assert "the run ended here" in trace.coverage.barriers[""]
    assert trace.coverage.analysed == ("inside.0",) or "inside.0" in trace.coverage.analysed


@pytest.mark.parametrize("take", [Tensor.tolist, Tensor.numpy], ids=["tolist", "numpy"])
def test_values_that_leave_torch_are_a_barrier(
    take: Callable[[Tensor], Any], toolkit: Toolkit
) -> None:
    def forward(self: Pair, x: Tensor) -> Tensor:
        return self.b(torch.as_tensor(take(self.a(x).detach())))

    trace = toolkit.trace(between(forward), X)
    assert members(trace) == set()
    assert "outside of torch" in trace.coverage.barriers["a"]


def test_shapes_that_depend_on_values(toolkit: Toolkit) -> None:
    def forward(self: Pair, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.b(hidden[(x[:, 0] > 0).nonzero().flatten()])

    trace = toolkit.trace(between(forward), X)
    assert members(trace) == {HIDDEN}


# --- what models return ---------------------------------------------------------------------------


@dataclass
class Answer:
    logits: Tensor
    hidden: list[Tensor]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, h: [y, (h,)],
        lambda y, h: {"y": y, "more": {"h": [h, None, 3, "text"]}},
        lambda y, h: Answer(y, [h]),
        lambda y, h: SimpleNamespace(y=y, more=SimpleNamespace(h=h)),
        lambda y, h: {1: {y, h}},
    ],
    ids=["tuples", "dicts", "dataclass", "object", "set"],
)
def test_what_is_returned_is_fixed_whatever_holds_it(
    wrap: Callable[..., Any], toolkit: Toolkit
) -> None:
    def forward(self: Pair, x: Tensor) -> Any:
        hidden = self.a(x)
        return wrap(self.b(hidden), hidden)

    trace = toolkit.trace(between(forward), X)
    assert members(trace) == set()
    assert trace.coverage.fraction == 1


def test_an_output_that_holds_itself(toolkit: Toolkit) -> None:
    def forward(self: Pair, x: Tensor) -> Any:
        out: list[Any] = [self.b(self.a(x))]
        out.append(out)
        return out

    assert members(toolkit.trace(between(forward), X)) == {HIDDEN}


def test_a_generator_has_not_run(toolkit: Toolkit) -> None:
    def forward(self: Pair, x: Tensor) -> Iterator[Tensor]:
        yield self.b(self.a(x))

    trace = toolkit.trace(between(forward), X)
    assert trace.coverage.fraction == 0
    assert trace.coverage.barriers["a"] == "it did not run with the example inputs"


# --- devices --------------------------------------------------------------------------------------


class Spread(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 3, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).to("meta"))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Pair().to("meta"), X),
        (Pair().to("meta"), X.to("meta")),
        (Pair(), X.to("meta")),
        (Spread(), X),
    ],
    ids=["model on meta", "all on meta", "inputs on meta", "two devices"],
)
def test_devices_do_not_matter(model: nn.Module, inputs: Tensor, toolkit: Toolkit) -> None:
    trace = toolkit.trace(model, inputs)
    assert members(trace) == {HIDDEN}
    assert trace.coverage.fraction == 1


# --- torch's own ways of running ------------------------------------------------------------------


def _autocast(self: Pair, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.b(self.a(x))


def _checkpoint(self: Pair, x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    out: Tensor = checkpoint(lambda x: self.b(self.a(x)), x, use_reentrant=False)
    return out


def _grad_modes(self: Pair, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = self.a(x)
    with torch.enable_grad():
        return self.b(hidden)


@pytest.mark.parametrize("forward", [_autocast, _checkpoint, _grad_modes])
def test_contexts_inside_a_forward(forward: Callable[..., Any], toolkit: Toolkit) -> None:
    assert members(toolkit.trace(between(forward), X)) == {HIDDEN}


def test_parametrized_weights(toolkit: Toolkit) -> None:
    model = Pair()
    nn.utils.parametrizations.weight_norm(model.a)
    (group,) = toolkit.trace(model, X).groups
    assert {m.module for m in group.members} == {"a", "a.parametrizations.weight", "b"}


def test_scripted_modules(toolkit: Toolkit) -> None:
    assert members(toolkit.trace(torch.jit.script(Pair()), X)) == {HIDDEN}


def test_an_operator_that_nobody_knows_is_a_barrier(toolkit: Toolkit) -> None:
    @torch.library.custom_op("bittern_test::mystery", mutates_args=())
    def mystery(x: Tensor) -> Tensor:
        return x.clone()

    mystery.register_fake(torch.empty_like)

    def forward(self: Pair, x: Tensor) -> Tensor:
        return self.b(mystery(self.a(x)))

    trace = toolkit.trace(between(forward), X)
    assert members(trace) == set()
    assert "no rule for bittern_test.mystery" in trace.coverage.barriers[""]
