"""The recorder: which operators a model calls on which tensors, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bittern.tracing.flow import OpGraph
from bittern.tracing.flow.record import record
from tracing_flow import TABLE


def recorded(model: nn.Module, *args: Any, fake: bool = True, **options: Any) -> OpGraph:
    knows = options.pop("knows", TABLE.knows)
    return record(model, args, {}, knows=knows, fake=fake, **options)


def ops(graph: OpGraph) -> list[str]:
    return [node.op.split(".")[1] for node in graph.nodes]


class Calling(nn.Module):
    """Calls a function with itself and its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("memory", torch.zeros(3))

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


BOTH = pytest.mark.parametrize("fake", [True, False], ids=["fake", "real"])

# --- what was called ------------------------------------------------------------------------------


@BOTH
def test_operators_name_the_module_that_called_them(fake: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    graph = recorded(model, torch.ones(5, 4), fake=fake)
    assert [(n.module, n.op) for n in graph.nodes] == [
        ("0", "aten.linear.default"),
        ("1.0", "aten.relu.default"),
        ("1.1", "aten.linear.default"),
    ]
    assert graph.modules == {"", "0", "1", "1.0", "1.1"}
    assert graph.fake is fake


@BOTH
def test_tensors_are_known_by_where_they_come_from(fake: bool) -> None:
    outside = torch.ones(3)
    graph = recorded(
        Calling(lambda m, x: F.linear(x, m.weight) + m.memory + outside),
        torch.ones(2, 3),
        fake=fake,
    )
    kinds = [[(v.kind, v.name) for v in node.inputs()] for node in graph.nodes]
    assert kinds == [
        [("input", "input 0"), ("parameter", "weight")],
        [("activation", ""), ("buffer", "memory")],
        [("activation", ""), ("constant", "a constant")],
    ]
    assert [v.learned for v in graph.outputs] == [True]
    assert graph.outputs[0].producer is graph.nodes[-1]


def test_a_module_called_twice_is_there_twice() -> None:
    layer = nn.Linear(3, 3)
    graph = recorded(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(2, 3))
    assert [n.module for n in graph.nodes] == ["0", "1", "0"]
    assert len({id(n.tensor(1)) for n in graph.nodes if "linear" in n.op}) == 1


def test_a_module_that_the_model_does_not_hold_is_named_after_its_caller() -> None:
    loose = [nn.Linear(3, 3)]
    graph = recorded(Calling(lambda m, x: loose[0](x)), torch.ones(2, 3))
    assert graph.nodes[0].module == ".?"


def test_tied_parameters_are_one_value_with_all_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    both = nn.Sequential(model["embed"], model["head"])
    graph = recorded(both, torch.tensor([1, 2]))
    assert graph.nodes[0].tensor(0) is graph.nodes[1].tensor(1)
    assert graph.names == {"0.weight": ("0.weight", "1.weight")}
    assert graph.read("0.weight")


def test_composites_are_taken_apart_only_where_nobody_knows_them() -> None:
    model = Calling(lambda m, x: F.silu(torch.tensordot(x, m.weight, 1)))
    assert ops(recorded(model, torch.ones(2, 3)))[-1] == "silu"
    assert "tensordot" not in ops(recorded(model, torch.ones(2, 3)))
    whole = recorded(model, torch.ones(2, 3), knows=lambda op: True)
    assert ops(whole) == ["tensordot", "silu"]
    linear = recorded(nn.Linear(3, 2), torch.ones(2, 3), knows=lambda op: False)
    assert "linear" not in ops(linear)
    assert {"t", "addmm"} <= set(ops(linear))


def test_fused_encoder_layers_are_seen_in_their_parts() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = ops(recorded(layer, torch.ones(2, 3, 8)))
    assert "scaled_dot_product_attention" in found
    assert found.count("layer_norm") == 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_leaf_is_one_operator_of_all_that_it_reads() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    graph = recorded(
        model,
        torch.ones(2, 3),
        leaf=lambda m: (
            "closed"
            if type(m) is nn.Sequential and len(m) == 2 and isinstance(m[1], nn.ReLU)
            else ""
        ),
    )
    assert [(n.op, n.module) for n in graph.nodes] == [
        ("aten.linear.default", "0"),
        ("module.Sequential", "1"),
    ]
    assert {v.name for v in graph.nodes[1].inputs() if v.stored} == {"1.0.weight", "1.0.bias"}
    assert graph.outputs[0].producer is graph.nodes[1]


@BOTH
@pytest.mark.parametrize("value", ["dict", "dataclass", "nested"])
def test_outputs_are_found_in_whatever_holds_them(value: str, fake: bool) -> None:
    @dataclass
    class Output:
        logits: Tensor
        rest: Any = None

    made: dict[str, Callable[[Tensor], Any]] = {
        "dict": lambda x: {"logits": x, "loss": None},
        "dataclass": Output,
        "nested": lambda x: [1, (Output(x, {"again": x}), "text")],
    }
    graph = recorded(Calling(lambda m, x: made[value](x @ m.weight)), torch.ones(2, 3), fake=fake)
    assert {v.shape for v in graph.outputs} == {(2, 3)}


# --- values ---------------------------------------------------------------------------------------


def test_a_fake_run_ends_where_the_model_looks_at_values_and_a_real_one_does_not() -> None:
    model = Calling(lambda m, x: x @ m.weight if x.sum() > 0 else x)
    graph = recorded(model, torch.ones(2, 3))
    assert graph.failure
    assert not graph.outputs
    graph = recorded(model, torch.ones(2, 3), fake=False)
    assert not graph.failure
    assert graph.branches == {"": False}
    assert ops(graph)[-1] == "matmul"


def test_a_decision_on_what_was_learned_is_noted_as_such() -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool((x > 0).all()) else -x

    graph = recorded(nn.Sequential(nn.Linear(3, 3), Deciding()), torch.ones(2, 3), fake=False)
    assert graph.branches == {"1": True}


def test_an_exception_ends_the_graph_where_it_was_raised() -> None:
    def fail(model: nn.Module, x: Tensor) -> Tensor:
        torch.relu(x)
        raise ValueError("no further")

    model = nn.Sequential(nn.Linear(3, 3), Calling(fail), nn.Linear(3, 3))
    graph = recorded(model, torch.ones(2, 3))
    assert graph.failure == "ValueError: no further"
    assert graph.failed_in == "1"
    assert ops(graph) == ["linear", "relu"]
    assert any(value.producer is graph.nodes[0] for value in graph.waiting)


# --- devices --------------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_runs() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    graph = recorded(model, torch.ones(2, 3))
    assert not graph.failure
    assert [v.shape for v in graph.outputs] == [(2, 4)]
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_a_model_on_several_devices_runs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, device="meta"), nn.Linear(5, 2))
    graph = recorded(model, torch.ones(2, 3))
    assert not graph.failure
    assert len(graph.nodes) == 3


def test_a_device_that_the_model_asks_for_is_no_obstacle() -> None:
    model = Calling(
        lambda m, x: (x.to("meta") @ m.weight.to("meta")) + torch.zeros(3, device="meta")
    )
    assert not recorded(model, torch.ones(2, 3)).failure


# --- what is left behind --------------------------------------------------------------------------


def _add(model: Any, x: Tensor) -> Tensor:
    model.memory.add_(1)
    return x + model.memory


def _view(model: Any, x: Tensor) -> Tensor:
    model.memory[1:].fill_(7)
    return x + model.memory


def _parameter(model: Any, x: Tensor) -> Tensor:
    model.weight.mul_(2)
    return x @ model.weight


def _row(model: Any, x: Tensor) -> Tensor:
    model.weight[0].fill_(7)
    return x @ model.weight


def _out(model: Any, x: Tensor) -> Tensor:
    torch.add(model.memory, 1, out=model.memory)
    return x + model.memory


@BOTH
@pytest.mark.parametrize(
    "write", [_add, _view, _parameter, _row, _out], ids=lambda w: w.__name__[1:]
)
def test_writes_do_not_reach_the_model(write: Callable[..., Tensor], fake: bool) -> None:
    model, given = Calling(write), torch.ones(2, 3)
    graph = recorded(model, given, fake=fake)
    assert not graph.failure
    assert torch.equal(model.memory, torch.zeros(3))
    assert torch.equal(model.weight, torch.ones(3, 3))
    assert torch.equal(given, torch.ones(2, 3))


@BOTH
def test_what_was_written_is_read_again(fake: bool) -> None:
    graph = recorded(Calling(_add), torch.ones(2, 3), fake=fake)
    assert {v.name for v in graph.nodes[-1].inputs() if v.stored} <= {"memory"}
    assert graph.read("memory")


@BOTH
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
def test_mode_attributes_and_random_state_are_as_before(fake: bool, fails: bool) -> None:
    def change(model: Any, x: Tensor) -> Tensor:
        assert not model.training
        model.count += 1
        model.seen.append(x)
        model.new = x
        noise = torch.rand(3)
        if fails:
            raise RuntimeError("after all")
        return x + noise

    model = nn.Sequential(Calling(change)).train()
    model[0].count, model[0].seen = 0, []
    before, state = set(vars(model[0])), torch.get_rng_state()
    graph = recorded(model, torch.ones(2, 3), fake=fake)
    assert bool(graph.failure) is fails
    assert model.training
    assert model[0].training
    assert (model[0].count, model[0].seen) == (0, [])
    assert set(vars(model[0])) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_inference_mode_enabled()
    assert model[0].weight.requires_grad
    assert not vars(model[0].weight)


def test_hooks_of_the_recorder_are_gone_afterwards() -> None:
    from torch.nn.modules import module

    before = len(module._global_forward_pre_hooks), len(module._global_forward_hooks)
    recorded(nn.Linear(3, 3), torch.ones(2, 3))
    assert (len(module._global_forward_pre_hooks), len(module._global_forward_hooks)) == before


def test_the_model_learns_as_before() -> None:
    model = nn.Linear(3, 2)
    recorded(model, torch.ones(2, 3))
    model(torch.ones(2, 3)).sum().backward()
    assert model.weight.grad is not None
