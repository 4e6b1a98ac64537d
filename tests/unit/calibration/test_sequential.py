"""Steps that run block by block: which blocks, on which inputs, and what is off meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.calibration.blocks import find_chains, find_parts
from bittern.calibration.replay import Replay, find_ways
from bittern.errors import CalibrationError
from bittern.nn import named_quantizers
from bittern.records import Algorithm, ModelAdapter
from bittern.runtime import prepare
from bittern.toolkit import Toolkit

WIDTH = 8
SEEN: list[Any] = []
Run = Callable[[nn.Module, Any], list[Any]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 16),
            nn.Linear(16, WIDTH),
        )

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        y = x + self.down(self.up(self.norm(x)).relu())
        return (y if scale is None else y * scale, None)


class Writing(Block):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        x += self.down(self.up(self.norm(x)).relu())
        return (x, None)


class Model(nn.Module):
    """A stem, blocks with an argument of the model's own, a head."""

    def __init__(self, kind: type[Block] = Block, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(-1, keepdim=True)
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, scale)[0]
        found: Tensor = self.head(x)
        return found


class Skipping(Model):
    """The last block reads what the first one made, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.layers[0](self.stem(x))[0]
        x = self.layers[1](x)[0]
        x = self.layers[2](x + 3 * first)[0]
        found: Tensor = self.head(x)
        return found


class Twice(Model):
    """Every block runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in [*self.layers, *self.layers]:
            x = layer(x)[0]
        found: Tensor = self.head(x)
        return found


class Routed(Model):
    """Some batches, known by their first number, skip the middle block or leave early."""

    def __init__(self, skips: float = 0.0, leaves: float = 0.0) -> None:
        super().__init__(depth=4)
        self.skips, self.leaves = skips, leaves

    def forward(self, x: Tensor) -> Tensor:
        first = float(x[0, 0])
        x = self.layers[0](self.stem(x))[0]
        if first != self.skips:
            x = self.layers[1](x)[0]
        if first != self.leaves:
            x = self.layers[3](self.layers[2](x)[0])[0]
        found: Tensor = self.head(x)
        return found


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 4) for _ in range(count)]


def build(kind: type[Model] = Model, *args: Any) -> Model:
    torch.manual_seed(0)
    return kind(*args).eval()


def algorithms() -> list[Algorithm]:
    needs = frozenset({"hessian", "original"})
    return [Algorithm(name="look", run=f"{__name__}:look", needs=needs, sequential=True)]


def look(model: nn.Module, plan: Any, forward: Any, context: Any) -> None:
    """Quantize the weights of a part at max, and note what there was to see."""
    from bittern.calibration.max import run_max

    inputs: list[Tensor] = []
    module = model.get_submodule(plan.entries[0].module)
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    passes = forward()
    handle.remove()
    block = context.block
    SEEN.append(
        {
            "modules": plan.modules,
            "passes": passes,
            "inputs": inputs,
            "block": None if block is None else block.name,
            "original": block and [block.original(i)[0].clone() for i in range(block.batches)],
        }
    )
    run_max(model, plan, None, context)


@pytest.fixture
def run(make_plugin: Callable[..., ModuleType], toolkit_with: Callable[..., Toolkit]) -> Run:
    """Quantize a model by `look`, and return what it noted."""

    def quantize(model: nn.Module, data: Any) -> list[Any]:
        SEEN.clear()
        recipe = {"rules": [{"match": "*", "weight": "int4"}], "algorithm": "look"}
        toolkit = toolkit_with(make_plugin("alpha", register_algorithms=algorithms))
        bt.quantize(model, recipe, data, toolkit=toolkit)
        return list(SEEN)

    return quantize


def test_parts_come_in_order_and_hold_every_planned_module(run: Run) -> None:
    found = run(build(), batches())
    assert [(f["block"], f["modules"]) for f in found] == [
        (None, ("stem",)),
        *((f"layers.{i}", (f"layers.{i}.up", f"layers.{i}.down")) for i in range(3)),
        (None, ("head",)),
    ]
    assert [f["passes"] for f in found] == [3] * 5


@pytest.mark.parametrize("kind", [Model, Skipping, Twice])
def test_blocks_see_what_the_quantized_model_computes(kind: type[Model], run: Run) -> None:
    model, data = build(kind), batches()
    found = run(model, data)
    seen: dict[str, list[Tensor]] = {}
    for name in ("layers.0.up", "layers.1.up", "layers.2.up", "head"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        for x in data:
            model(x)
    for f in found[1:]:
        name = f["modules"][0]
        first = seen[name][: len(f["inputs"])] if kind is not Twice else seen[name][::2]
        given = f["inputs"] if kind is not Twice else f["inputs"][::2]
        for a, b in zip(given, first, strict=True):
            if name == "layers.0.up" or kind is not Twice:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [Model, Skipping, Twice])
def test_originals_are_those_of_the_model_before(kind: type[Model], run: Run) -> None:
    model, data = build(kind), batches()
    plain = copy.deepcopy(model)
    outputs: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(plain.layers):
        layer.register_forward_hook(
            lambda _, __, out, index=index: outputs.setdefault(f"layers.{index}", []).append(out[0])
        )
    with torch.no_grad():
        for x in data:
            plain(x)
    for f in run(model, data):
        if f["block"]:
            for a, b in zip(f["original"], outputs[f["block"]], strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("skips", [0, 1])
@pytest.mark.parametrize("leaves", [1, 2])
def test_a_block_that_a_batch_does_not_reach_shifts_no_other_batch(
    skips: int, leaves: int, run: Run
) -> None:
    data = batches(4)
    numbers = float(data[skips][0, 0]), float(data[leaves][0, 0])
    model = build(Routed, *numbers)
    plain = copy.deepcopy(model)
    found = run(model, data)
    inputs: dict[str, list[Tensor]] = {}
    originals: dict[str, list[Tensor]] = {}
    for name in [*(f"layers.{index}" for index in range(4)), "head"]:
        up = model.get_submodule(name if name == "head" else f"{name}.up")
        up.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
        )
        plain.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: originals.setdefault(name, []).append(out[0])
        )
    with torch.no_grad():
        for x in data:
            model(x), plain(x)
    reached = {"layers.0": 4, "layers.1": 3, "layers.2": 3, "layers.3": 3, "head": 4}
    for f in found[1:]:
        name = f["block"] or "head"
        assert len(f["inputs"]) == reached[name]
        torch.testing.assert_close(f["inputs"], inputs[name])
        if f["block"]:
            assert f["passes"] == reached[name]
            torch.testing.assert_close(f["original"], originals[name])


def test_each_call_of_a_block_has_the_number_and_the_mask_of_its_batch() -> None:
    data = batches(4)
    model = build(Routed, float(data[1][0, 0]))
    prepared = [prepare(x, model, ModelAdapter(), index=i) for i, x in enumerate(data)]
    prepared = [replace(b, mask=torch.full((2, 4), i)) for i, b in enumerate(prepared)]
    chains = find_chains(model, ModelAdapter())
    replay = Replay(model, prepared, chains, find_ways(model, prepared, chains))
    replay.leave(replay.enter("layers.0"))
    block = replay.enter("layers.1")
    assert [block.batch(index) for index in range(block.batches)] == [0, 2, 3]
    assert [int(block.mask(index)[0, 0]) for index in range(block.batches)] == [0, 2, 3]


def test_blocks_that_write_into_their_input_get_it_fresh(run: Run) -> None:
    model, data = build(Model, Writing), batches()
    found = run(model, data)
    seen: list[Tensor] = []
    model.layers[2].up.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for x in data:
            model(x)
    torch.testing.assert_close(found[3]["inputs"], seen)


def test_a_model_without_blocks_is_one_part(run: Run) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    found = run(model, batches())
    assert [(f["block"], f["modules"]) for f in found] == [(None, ("0", "2"))]


def test_what_the_adapter_names_are_the_blocks() -> None:
    adapter = ModelAdapter(blocks=("layers.0", "layers.1"))
    assert find_chains(build(), adapter) == (("layers.0", "layers.1"),)
    plan = bt.plan(build(), {"rules": [{"match": "*", "weight": "int4"}]})
    parts = find_parts(plan, (("layers.0", "layers.1"),), early={"stem"})
    assert parts[-1].modules == ("layers.2.up", "layers.2.down", "head")


def test_chains_of_an_encoder_and_a_decoder_are_kept_apart() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = build().layers, build().layers

        def forward(self, x: Tensor) -> Tensor:
            memory = x.repeat(1, 2)
            for layer in self.one:
                memory = layer(memory)[0]
            y = x.flip(1).repeat(1, 2)
            for layer in self.two:
                y = layer(y + memory)[0]
            return y

    model = Both().eval()
    data = [prepare(x, model, ModelAdapter(), index=0) for x in batches()]
    chains = find_chains(model, ModelAdapter())
    assert [len(chain) for chain in chains] == [3, 3]
    ways = find_ways(model, data, chains)
    assert ways.stub
    replay = Replay(model, data, chains, ways)
    with torch.no_grad():
        for chain in chains:
            for name in chain:
                outputs = replay.leave(replay.enter(name))
        expected = [model(*batch.args) for batch in data]
    torch.testing.assert_close([out[0] for out in outputs], expected)


def test_data_as_a_function_is_refused(run: Run) -> None:
    with pytest.raises(CalibrationError, match="needs batches"):
        run(build(), lambda model: model(batches()[0]))


@pytest.mark.parametrize("recipe", ["int8", "nvfp4", "int8-smoothquant"])
def test_layer_by_layer_and_all_at_once_find_the_same_ranges(recipe: str) -> None:
    """Steps that look at the unquantized model look at the very same numbers."""
    whole, parts = build_wide(), build_wide()
    data = [torch.randn(4, 32) for _ in range(3)]
    bt.quantize(whole, recipe, data)
    bt.quantize(parts, recipe, data, layerwise=True)
    for (name, one), (_, other) in zip(
        named_quantizers(whole), named_quantizers(parts), strict=True
    ):
        torch.testing.assert_close(one.state(), other.state(), rtol=0, atol=0, msg=name)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("recipe", "runs", "last"),
    [
        ("int8", 1, 1),  # the pass that observes gives the outputs, too
        ("int8-smoothquant", 1, 1),
        ("int4-gptq", 2, 1),  # statistics; and outputs, where they are read
        ("int4-best", None, None),
    ],
)
@pytest.mark.parametrize("head", [False, True])
def test_a_block_runs_no_more_often_than_somebody_reads_it(
    recipe: str, runs: int | None, last: int | None, head: bool
) -> None:
    few, more = (runs_of_blocks(recipe, 5, head=head), runs_of_blocks(recipe, 7, head=head))
    if runs is None:  # learned; the last one is not run for its outputs
        assert few[0] == few[1] == few[2] + (0 if head else 5)
    else:  # besides what is tried on one batch
        expected = runs if head else last
        assert [b - a for a, b in zip(few, more, strict=True)] == [2 * runs, 2 * runs, 2 * expected]
        assert few[0] <= 5 * runs + 4


def runs_of_blocks(recipe: str, batches: int, *, head: bool) -> list[int]:
    """Return how often each block of a model runs when it is quantized."""
    model, data = build_wide(), [torch.randn(4, 32) for _ in range(batches)]
    counts = [0, 0, 0]
    for index, block in enumerate(model[1]):
        block.norm.register_forward_hook(partial(count, counts, index))
    skip = [] if head else ["2"]
    bt.quantize(model, {"extends": recipe, "skip": skip}, data, layerwise=True)
    return counts


def count(counts: list[int], index: int, *_: Any) -> None:
    counts[index] += 1


@pytest.mark.parametrize("steps", [["weigh", "max"], ["weigh", "look"], ["max", "weigh"]])
def test_the_unquantized_outputs_are_those_before_a_weight_changed(
    steps: list[str], make_plugin: Callable[..., ModuleType], toolkit_with: Callable[..., Toolkit]
) -> None:
    """Whatever comes first: a step that runs the part, or one that writes to its weights."""

    def own() -> list[Algorithm]:
        return [*algorithms(), Algorithm(name="weigh", run=f"{__name__}:weigh")]

    model, data = build(), batches()
    plain = copy.deepcopy(model)
    seen: list[Tensor] = []
    plain.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax()))
    with torch.no_grad():
        for x in data:
            plain(x)
    rules = [{"match": "*", "weight": "int8", "input": "int8"}]
    recipe = {"rules": rules, "algorithm": steps}
    if "look" in steps:
        recipe["algorithm"] = [*steps, "max"]
    toolkit = toolkit_with(make_plugin("alpha", register_algorithms=own))
    bt.quantize(model, recipe, data, toolkit=toolkit, layerwise=True)
    quantizer = dict(named_quantizers(model))["head.input"]
    assert quantizer.amax is not None
    torch.testing.assert_close(quantizer.amax.reshape(()), torch.stack(seen).amax())


def weigh(model: nn.Module, plan: Any, forward: Any, context: Any) -> None:
    """Double the weights of a block."""
    for _, module in context.modules(model) if "layers.0.up" in plan.modules else ():
        with context.access(module, write=True), torch.no_grad():
            context.remember(module, "weight")
            module.weight.mul_(2)


def build_wide() -> nn.Module:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 64)
            self.gate, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            found: Tensor = x + self.down(self.up(y) * self.gate(y).relu())
            return found

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 32), nn.Sequential(Wide(), Wide(), Wide()), nn.Linear(32, 32)
    ).eval()
