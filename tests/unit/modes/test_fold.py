"""Folding changes no output; unfolding gives every bit of the originals back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.convert import modes_of, revert
from bittern.errors import CheckpointError, ModelError, PlanError
from bittern.evaluation import folded_weights
from bittern.modes.fold import unfold
from bittern.nn import named_quantizers
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
SameBits = Callable[[Tensor, Tensor], bool]

RECIPES = ["int8", "int4", "fp8", "nvfp4", "mxfp6", "nf4", "w4a8"]
ROTATED = {"format": "int4", "rotate": {}}


def snapshot(model: nn.Module) -> dict[str, tuple[int, int, Tensor]]:
    """Return identity, place and content of every parameter."""
    named = model.named_parameters()
    return {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in named}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, int, Tensor]]) -> None:
    for name, parameter in model.named_parameters():
        identity, place, content = before[name]
        assert (id(parameter), parameter.data_ptr()) == (identity, place), name
        assert torch.equal(parameter, content), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_keep_their_bits_and_unfolding_is_exact(
    recipe: str,
    make_lm: Make,
    toolkit: Toolkit,
    token_batches: list[Tensor],
    same_bits: SameBits,
) -> None:
    model = make_lm(width=64)
    toolkit.quantize(model, recipe, token_batches)
    before = snapshot(model)
    with torch.no_grad():
        expected = model(token_batches[0])
        applied = toolkit.apply_mode(model, "fold", {"keep": True})
        assert same_bits(model(token_batches[0]), expected)
        assert not torch.equal(model.layers[0].o.weight, before["layers.0.o.weight"][2])
        assert "layers.0.o.weight" in applied.metadata["folded"]
        unfold(model)
        assert_untouched(model, before)
        assert same_bits(model(token_batches[0]), expected)
    assert [mode.name for mode in modes_of(model)] == ["quantize"]


def test_a_rotation_of_the_weight_is_folded_away(toolkit: Toolkit, same_bits: SameBits) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    plain = model(x)
    toolkit.quantize(model, {"rules": [{"match": "*", "weight": ROTATED, "input": ROTATED}]}, [x])
    expected = model(x)
    toolkit.apply_mode(model, "fold")
    quantizer = model[0].quantizer("weight")
    assert quantizer(model[0].weight) is model[0].weight  # the rotation is done no more
    assert same_bits(model(x), expected)
    revert(model)  # the input is not rotated any longer, so the weight must not be
    torch.testing.assert_close(model(x), plain, atol=0.6, rtol=0)


def test_originals_that_were_not_kept_are_an_error(make_mlp: Make, toolkit: Toolkit) -> None:
    model = make_mlp()
    with pytest.raises(PlanError, match="not folded"):
        unfold(model)
    with pytest.raises(PlanError, match="no weight to fold"):
        toolkit.apply_mode(model, "fold")
    toolkit.quantize(model, "int8-weight-only")
    toolkit.apply_mode(model, "fold")
    x = torch.randn(2, 8)
    expected, before = model(x), snapshot(model)
    with pytest.raises(ModelError, match=r"2 folded weights were not kept: up\.weight"):
        unfold(model)
    assert_untouched(model, before)
    assert torch.equal(model(x), expected)
    assert [mode.name for mode in modes_of(model)] == ["quantize", "fold"]


def test_unfolding_follows_a_model_that_moved_to_another_dtype(
    make_mlp: Make, toolkit: Toolkit
) -> None:
    model = make_mlp()
    original = model.up.weight.detach().clone()
    toolkit.quantize(model, "int8-weight-only")
    toolkit.apply_mode(model, "fold", {"keep": True})
    model.to(torch.bfloat16)
    unfold(model)
    assert torch.equal(model.up.weight, original.bfloat16())


def test_copies_are_folded_and_unfolded_on_their_own(make_mlp: Make, toolkit: Toolkit) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int4")
    original = model.up.weight.detach().clone()
    toolkit.apply_mode(model, "fold", {"keep": True})
    there = copy.deepcopy(model)
    unfold(there)
    assert torch.equal(there.up.weight, original)
    assert not torch.equal(model.up.weight, original)


def test_a_tied_weight_is_folded_for_all_its_readers_or_for_none(
    make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor], same_bits: SameBits
) -> None:
    one = {"format": "int8", "granularity": "tensor"}
    for embed, together in ((one, True), ("int4", False), (None, False)):
        model = make_lm(tied=True)
        rules = [{"match": "head", "weight": one}, {"match": "embed", "weight": embed}]
        toolkit.quantize(model, {"rules": [{"match": "*.o", "weight": "int8"}, *rules]})
        with torch.no_grad():
            expected = model(token_batches[0])
            applied = toolkit.apply_mode(model, "fold", {"keep": True})
            assert same_bits(model(token_batches[0]), expected)
            assert ("head.weight" in applied.metadata["folded"]) == together
            assert ("head.weight" in applied.metadata["left"]) != together
            unfold(model)
            assert torch.equal(model.head.weight, make_lm(tied=True).head.weight)
        assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("weight", ["int8", ROTATED], ids=["plain", "rotated"])
def test_a_folded_model_is_saved_and_restored_folded(
    weight: Any, toolkit: Toolkit, same_bits: SameBits, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    fresh = copy.deepcopy(model)
    rule = {"match": "*", "weight": weight, "input": weight if weight == ROTATED else None}
    toolkit.quantize(model, {"rules": [rule]}, [x])
    toolkit.apply_mode(model, "fold", {"keep": True})
    toolkit.save(model, tmp_path / "state")
    toolkit.restore(fresh, tmp_path / "state")
    assert same_bits(fresh(x), model(x))
    assert fresh[0].quantizer("weight").folded
    with pytest.raises(ModelError, match="not kept"):  # they were not saved
        unfold(fresh)


def test_a_restore_that_fails_leaves_a_folded_model_folded(
    make_mlp: Make, toolkit: Toolkit, same_bits: SameBits, tmp_path: Path
) -> None:
    model, other, x = make_mlp(), make_mlp(hidden=12), torch.randn(2, 8)
    toolkit.quantize(other, "int4")
    toolkit.save(other, tmp_path / "other")
    toolkit.quantize(model, "int4")
    toolkit.apply_mode(model, "fold", {"keep": True})
    expected, before = model(x), snapshot(model)
    with pytest.raises(CheckpointError):
        toolkit.restore(model, tmp_path / "other")
    assert_untouched(model, before)
    assert same_bits(model(x), expected)
    unfold(model)
    assert torch.equal(model.up.weight, make_mlp().up.weight)


# --- for the duration of a block ------------------------------------------------------------------


def test_a_fold_for_a_while_ends_with_the_block_and_with_an_exception(
    make_mlp: Make, toolkit: Toolkit, same_bits: SameBits
) -> None:
    model, x = make_mlp(), torch.randn(2, 8)
    toolkit.quantize(model, {"rules": [{"match": {"class": "Linear"}, "weight": ROTATED}]})
    before, expected = snapshot(model), model(x)

    def work(switch_off: bool) -> None:
        with folded_weights(model) as switch:
            assert same_bits(model(x), expected)
            switch(not switch_off)
            raise KeyboardInterrupt

    for off in (False, True):
        with pytest.raises(KeyboardInterrupt):
            work(off)
        assert_untouched(model, before)
        assert same_bits(model(x), expected)
        assert all(q.enabled and not q.folded for _, q in named_quantizers(model))


def test_a_fold_for_a_while_leaves_a_folded_model_alone(make_mlp: Make, toolkit: Toolkit) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int4")
    toolkit.apply_mode(model, "fold", {"keep": True})
    before = snapshot(model)
    with folded_weights(model):
        assert_untouched(model, before)
    assert all(q.folded for n, q in named_quantizers(model) if n.endswith("weight"))
    unfold(model)
    assert torch.equal(model.up.weight, make_mlp().up.weight)
