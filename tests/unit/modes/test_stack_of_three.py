"""Stacks of modes of two other distributions and ours: saved, replayed, and refused."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bittern.convert import modes_of, revert
from bittern.errors import CheckpointError, PlanError, PluginError
from bittern.hooks.discovery import GROUP
from bittern.modes.names import how_to_get
from bittern.nn import named_quantizers
from bittern.testing.site import Site
from bittern.toolkit import Toolkit

PRUNE = '''
"""Narrows the Linears of a Sequential: structure, which a state's tensors have to fit into."""

from dataclasses import dataclass

import bittern as bt
from bittern.nn import QuantModule
from bittern.records import Mode


@dataclass(frozen=True)
class Config:
    keep: float = 0.5

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError("keep is a share")


@bt.hookimpl
def register_modes():
    return [
        Mode(
            name="prune",
            convert="third_prune:convert",
            restore="third_prune:restore",
            config="third_prune:Config",
        )
    ]


def convert(model, config, context):
    first, last = model[0], model[2]
    count = int(first.out_features * config.keep)
    if config.keep == 0.25:
        model[0] = None
        raise RuntimeError("half way")
    rows = first.weight.detach().norm(dim=1).topk(count).indices.sort().values
    with_rows(first, first.weight.detach()[rows], first.bias.detach()[rows])
    with_rows(last, last.weight.detach()[:, rows], last.bias.detach())
    for layer in (first, last):
        if isinstance(layer, QuantModule):  # quantized before: the rows have other scales now
            layer.quantizer("weight").calibrate_on(layer.weight)
    return {"width": count}


def restore(model, config, metadata, context):
    count = metadata["width"]
    with_rows(model[0], model[0].weight.detach()[:count], model[0].bias.detach()[:count])
    with_rows(model[2], model[2].weight.detach()[:, :count], model[2].bias.detach())


def with_rows(layer, weight, bias):
    from torch import nn

    layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    layer.out_features, layer.in_features = weight.shape
'''

SCALE = '''
"""Adds a buffer to a model, whose value changes after the mode was applied."""

import bittern as bt
import torch
from bittern.records import Mode


@bt.hookimpl
def register_modes():
    return [
        Mode(
            name=name,
            convert="third_scale:convert",
            restore="third_scale:restore",
            metadata="third_scale:metadata",
            next_modes=following,
            exclusive=name == "scale-once",
        )
        for name, following in (
            ("scale", None),
            ("scale-once", None),
            ("scale-last", frozenset()),
            ("scale-then", frozenset({"quantize"})),
        )
    ]


def convert(model, config, context):
    restore(model, config, {}, context)
    model.gain.fill_(0.75)
    return {"at": "conversion", "calls": 0}


def restore(model, config, metadata, context):
    model.register_buffer("gain", torch.zeros(()))
    model.register_forward_hook(lambda module, args, output: output * module.gain)
    if metadata:
        return lambda: setattr(model, "found_after_loading", float(model.gain))


def metadata(model):
    return {"calls": getattr(model, "calls", 0)}
'''

RECIPE = {
    "name": "mixed",
    "rules": [{"match": {"class": "Linear"}, "weight": "int4", "input": "int8"}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "prune": {"keep": 0.5},
    "quantize": {"recipe": RECIPE},
    "scale": {},
}
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))


def build(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    found = Site()
    for name, source in (("third_prune", PRUNE), ("third_scale", SCALE)):
        found.add_module(name, source)
        found.add_distribution(
            name.replace("_", "-"), "1.2", entry_points={name: name}, group=GROUP, top_level=name
        )
    yield found
    found.close()


@pytest.fixture(scope="module")
def toolkit(site: Site) -> Toolkit:
    return Toolkit(plugins=["third_prune", "third_scale"])


def stacked(toolkit: Toolkit, order: tuple[str, ...]) -> nn.Sequential:
    model = build(0)
    for name in order:
        toolkit.apply_mode(model, name, OPTIONS[name], data=[X])
    return model


@pytest.mark.parametrize("order", list(itertools.permutations(OPTIONS)), ids="-".join)
def test_three_modes_in_any_order_are_saved_and_replayed(
    order: tuple[str, ...], toolkit: Toolkit, tmp_path: Path
) -> None:
    model: Any = stacked(toolkit, order)
    model.gain.fill_(0.5)
    model.calls = 7
    toolkit.save(model, tmp_path / "state")

    other: Any = build(9)
    toolkit.restore(other, tmp_path / "state")

    assert [mode.name for mode in modes_of(other)] == list(order)
    assert [dict(mode.config) for mode in modes_of(other)] == [
        dict(mode.config) for mode in modes_of(model)
    ]
    assert other[0].weight.shape == (16, 16)
    assert torch.equal(other(X), model(X))
    assert other.found_after_loading == 0.5
    scale = next(mode for mode in modes_of(other) if mode.name == "scale")
    assert dict(scale.metadata) == {"at": "conversion", "calls": 7}
    assert scale.plugin == "third-scale 1.2"
    twin = copy.deepcopy(other)
    toolkit.save(twin, tmp_path / "again")  # and once more, from the copy
    third: Any = build(4)
    toolkit.restore(third, tmp_path / "again")
    assert torch.equal(third(X), model(X))


def test_a_fresh_process_replays_the_stack(toolkit: Toolkit, site: Site, tmp_path: Path) -> None:
    model = stacked(toolkit, ("prune", "quantize", "scale"))
    toolkit.save(model, tmp_path / "state")
    torch.save(model(X).detach(), tmp_path / "expected.pt")
    code = f"""
    import sys
    sys.path.insert(0, {str(site.path)!r})
    import torch
    from torch import nn
    import bittern as bt
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    bt.restore(model, {str(tmp_path / "state")!r})
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
    assert torch.equal(model(x), expected)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_missing_plugin_is_named_with_its_pip_line(toolkit: Toolkit, tmp_path: Path) -> None:
    toolkit.save(stacked(toolkit, ("quantize", "prune", "scale")), tmp_path / "state")
    model = build(9)
    before = model(X)

    with pytest.raises(CheckpointError) as caught:
        Toolkit(plugins=["third_scale"], block=["third_prune"]).restore(model, tmp_path / "state")

    assert "the mode 'prune' of third-prune 1.2" in str(caught.value)
    assert caught.value.hint == "pip install third-prune"
    assert torch.equal(model(X), before)
    assert modes_of(model) == ()
    assert not list(named_quantizers(model))


def test_nothing_may_follow_a_mode_that_says_so(toolkit: Toolkit) -> None:
    model = build(0)
    toolkit.apply_mode(model, "scale-last")

    with pytest.raises(PlanError, match="'prune' cannot be applied after 'scale-last'") as caught:
        toolkit.apply_mode(model, "prune")
    assert "nothing follows" in str(caught.value)
    assert "revert" not in str(caught.value)  # which undoes no mode of a plugin
    assert model[0].out_features == 32


def test_only_what_a_mode_names_may_follow_it(toolkit: Toolkit) -> None:
    model = build(0)
    toolkit.apply_mode(model, "scale-then")

    with pytest.raises(PlanError, match="only quantize may follow"):
        toolkit.apply_mode(model, "prune")
    toolkit.apply_mode(model, "quantize", OPTIONS["quantize"], data=[X])
    assert [mode.name for mode in modes_of(model)] == ["scale-then", "quantize"]


def test_an_exclusive_mode_takes_its_own_place(toolkit: Toolkit) -> None:
    model = build(0)
    for name in ("scale-once", "quantize", "scale-once", "quantize", "scale", "scale"):
        toolkit.apply_mode(model, name, OPTIONS.get(name, {}), data=[X])

    names = [mode.name for mode in modes_of(model)]
    assert names == ["scale-once", "quantize", "scale", "scale"]


def test_a_mode_that_fails_half_way_leaves_the_model_as_it_was(toolkit: Toolkit) -> None:
    model = build(0)
    toolkit.apply_mode(model, "quantize", OPTIONS["quantize"], data=[X])
    before, first = model(X), model[0]

    with pytest.raises(PluginError, match="half way"):
        toolkit.apply_mode(model, "prune", {"keep": 0.25})

    assert model[0] is first
    assert torch.equal(model(X), before)
    assert [mode.name for mode in modes_of(model)] == ["quantize"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kep": 1}, "no option 'kep'"), ({"keep": 2}, "keep is a share")],
    ids=["unknown", "refused"],
)
def test_options_are_checked_before_anything_changes(
    options: dict[str, Any], message: str, toolkit: Toolkit
) -> None:
    model = build(0)
    with pytest.raises(PlanError, match=message):
        toolkit.apply_mode(model, "prune", options)
    assert model[0].out_features == 32


def test_reverting_leaves_the_modes_of_others(toolkit: Toolkit) -> None:
    model = stacked(toolkit, ("prune", "quantize", "scale"))
    revert(model)

    assert [mode.name for mode in modes_of(model)] == ["prune", "scale"]
    assert type(model[0]) is nn.Linear
    assert model[0].out_features == 16


def test_how_a_plugin_is_loaded_follows_from_its_label() -> None:
    assert how_to_get("bittern-heron 1.2") == "pip install bittern-heron"
    assert how_to_get("bittern-heron 1.2", same=True) == "pip install bittern-heron==1.2"
    assert "bt.Toolkit(files=['/a b/halves.py'])" in how_to_get("/a b/halves.py")
    assert "--plugin '/a b/halves.py'" in how_to_get("/a b/halves.py")
    assert how_to_get("x;reboot 1") == "pip install 'x;reboot'"
