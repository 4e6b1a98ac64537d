"""What ranges do in training, when they do it, and what must go on working."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bittern.errors import BitternError, CalibrationError, NumericsError, TrainingError
from bittern.nn import named_quantizers
from bittern.numerics import fake_quantize
from bittern.toolkit import Toolkit
from bittern.training import RangeTraining, train_ranges


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that other tests compiled is in the way, and nothing stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


KINDS = [("fixed", "fixed"), ("follow", "ema"), ("learned", "learned")]


@pytest.fixture
def make_trained(
    make_mlp: Callable[..., nn.Module], toolkit: Toolkit, batches: list[Tensor]
) -> Callable[..., tuple[Any, RangeTraining]]:
    """Makes a quantized MLP in training mode, and what keeps its ranges."""

    def make(recipe: Any = "int8", **options: Any) -> tuple[Any, RangeTraining]:
        model = make_mlp(width=8, hidden=32)
        toolkit.quantize(model, recipe, batches)
        return model.train(), train_ranges(model, **options)

    return make


def ranges_of(model: nn.Module) -> dict[str, Tensor]:
    found = {name: q.range for name, q in named_quantizers(model)}
    return {name: values.amax.clone() for name, values in found.items() if values is not None}


def descend(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


# --- what each word means -------------------------------------------------------------------------


def test_fixed_ranges_stay_as_calibrated(make_trained: Any, batches: list[Tensor]) -> None:
    model, training = make_trained(weights="fixed", activations="fixed")
    before = ranges_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        descend(model, 5 * x, optimizer)
        training.step()
    training.finish()
    assert all(torch.equal(value, before[name]) for name, value in ranges_of(model).items())


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int4", "nvfp4", "mxfp8", "w4a8"])
def test_ranges_that_follow_are_those_of_a_fresh_calibration(
    recipe: str, make_trained: Any, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model, training = make_trained(recipe, weights="follow", activations="fixed")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    descend(model, batches[0], optimizer)
    training.step()

    fresh = copy.deepcopy(model)
    names = [name for name, _ in named_quantizers(fresh)]
    for module in (fresh.up, fresh.down):
        module.weight_quantizer.calibrate_on(module.weight)
    theirs = dict(named_quantizers(fresh))
    changed = 0
    for name, quantizer in named_quantizers(model):
        if ".weight" not in name or quantizer.scales is None:
            continue
        other = theirs[name].scales
        assert other is not None
        assert torch.equal(quantizer.scales.step, other.step)
        changed += 1
    assert changed >= 2
    assert names


def test_unchanged_weights_keep_their_ranges_to_the_bit(
    make_trained: Any, same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    model, training = make_trained("nvfp4", weights="follow")
    before = {name: q.state() for name, q in named_quantizers(model)}
    training.step()
    for name, quantizer in named_quantizers(model):
        for key, value in quantizer.state().items():
            assert same_bits(value, before[name][key])


def test_a_clip_that_calibration_chose_is_kept(make_trained: Any) -> None:
    model, training = make_trained(
        {"extends": "int4", "algorithm": "mse"}, weights="follow", activations="fixed"
    )
    before = ranges_of(model)
    largest = model.up.weight.detach().abs().amax(1, keepdim=True)
    assert not torch.equal(before["up.weight"], largest)
    with torch.no_grad():
        model.up.weight.mul_(3)
    training.step()
    torch.testing.assert_close(ranges_of(model)["up.weight"], 3 * before["up.weight"])


def test_weights_with_one_global_scale_keep_one(
    make_lm: Callable[..., Any], toolkit: Toolkit, token_batches: list[Tensor]
) -> None:
    model = make_lm()
    toolkit.quantize(model, "nvfp4", token_batches)
    training = train_ranges(model, weights="follow")
    block = model.layers[0]
    with torch.no_grad():
        block.k.weight[0, 0] = 7.0
    training.step()
    for linear in (block.q, block.k, block.v):
        assert float(linear.weight_quantizer.global_amax) == 7.0
        whole = linear.weight_quantizer.global_scale
        assert torch.equal(whole, block.k.weight_quantizer.global_scale)
    assert float(block.o.weight_quantizer.global_amax) < 7.0


def test_a_running_mean_is_that_of_the_batches(make_trained: Any, batches: list[Tensor]) -> None:
    model, training = make_trained(activations="ema", decay=0.9)
    expected = float(ranges_of(model)["up.input"])
    for factor, x in zip((1.0, 4.0, 0.2), batches, strict=True):
        model(factor * x)
        training.step()
        expected = 0.9 * expected + 0.1 * float((factor * x).abs().max())
        assert float(ranges_of(model)["up.input"]) == pytest.approx(expected, rel=1e-6)
    quantizer = model.up.input_quantizer
    assert torch.equal(
        quantizer(batches[0]), fake_quantize(batches[0], quantizer.spec, quantizer.scales)
    )


def test_the_global_scale_of_blocks_runs_along(make_trained: Any, batches: list[Tensor]) -> None:
    model, training = make_trained("nvfp4", activations="ema", decay=0.5)
    quantizer = model.up.input_quantizer
    before = float(quantizer.global_amax)
    model(3 * batches[0])
    training.step()
    wanted = 0.5 * before + 0.5 * float((3 * batches[0]).abs().max())
    assert float(quantizer.global_amax) == pytest.approx(wanted, rel=1e-6)


def test_both_ends_of_an_asymmetric_range_run_along(
    make_trained: Any, batches: list[Tensor]
) -> None:
    rule = {"match": {"class": "Linear"}, "weight": "int8", "input": "int8-asym"}
    model, training = make_trained(
        {"extends": "base", "rules": [rule], "algorithm": "max"}, activations="ema", decay=0.5
    )
    quantizer = model.up.input_quantizer
    low, high = float(quantizer.amin), float(quantizer.amax)
    x = batches[0] + 1
    model(x)
    training.step()
    assert float(quantizer.amax) == pytest.approx((high + float(x.max())) / 2, rel=1e-6)
    assert float(quantizer.amin) == pytest.approx((low + float(x.min())) / 2, rel=1e-6)


def test_learned_ranges_are_trained_and_become_static(
    make_trained: Any, batches: list[Tensor]
) -> None:
    model, training = make_trained(weights="learned", activations="learned")
    before = ranges_of(model)
    learned = list(training.parameters())
    assert len(learned) == 4
    groups = training.parameter_groups(0.01)
    assert [g["lr"] for g in groups] == [
        pytest.approx(0.01 * float(p.detach().mean())) for p in learned
    ]
    descend(model, batches[0], torch.optim.Adam(groups))
    training.step()
    after = ranges_of(model)
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    expected = model.eval()(batches[0]).detach()

    training.finish()
    assert list(training.parameters()) == []
    assert not any("quantizer" in name for name in model.state_dict())
    assert torch.equal(model(batches[0]), expected)


def test_a_pattern_says_otherwise(make_trained: Any) -> None:
    model, training = make_trained(
        ranges={"up.*": "fixed", "*.input": "ema", "down.input": "fixed"}
    )
    assert training.behavior == {
        "up.weight": "fixed",
        "up.input": "ema",
        "down.weight": "follow",
        "down.input": "fixed",
    }
    assert "1 follow" in repr(training)
    assert model.down.input_quantizer.tracker is None


# --- when they change -----------------------------------------------------------------------------


def test_freezing_keeps_ranges_while_weights_move(make_trained: Any, batches: list[Tensor]) -> None:
    model, training = make_trained(
        ranges={"up.*": "learned"}, weights="follow", activations="ema", decay=0.5
    )
    training.freeze()
    before = ranges_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        descend(model, 5 * x, optimizer)
        training.step()
    training.finish()
    after = ranges_of(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_finishing_takes_the_final_weights(make_trained: Any) -> None:
    model, training = make_trained(weights="follow")
    with torch.no_grad():
        model.up.weight.mul_(2)
    training.finish()
    training.finish()
    largest = model.up.weight.detach().abs().amax(1, keepdim=True)
    assert torch.equal(ranges_of(model)["up.weight"], largest)
    with pytest.raises(TrainingError, match="training is finished"):
        training.step()


def test_evaluation_leaves_no_trace(make_trained: Any, batches: list[Tensor]) -> None:
    model, training = make_trained(activations="ema", decay=0.5)
    before = ranges_of(model)
    model.eval()(100 * batches[0])
    training.step()
    assert all(torch.equal(value, before[name]) for name, value in ranges_of(model).items())


def test_a_batch_that_overflows_does_not_spoil_the_mean(
    make_trained: Any, batches: list[Tensor]
) -> None:
    model, training = make_trained(activations="ema")
    before = ranges_of(model)["up.input"]
    x = batches[0].clone()
    x[0, 0] = float("inf")
    model(x)
    training.step()
    assert torch.equal(ranges_of(model)["up.input"], before)


def test_micro_batches_count_as_one_batch(make_trained: Any, batches: list[Tensor]) -> None:
    (one, first), (several, second) = (
        make_trained(activations="ema"),
        make_trained(activations="ema"),
    )
    one(torch.cat(batches))
    for x in batches:
        several(x)
    first.step()
    second.step()
    found, wanted = ranges_of(several), ranges_of(one)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
    assert torch.equal(found["up.input"], wanted["up.input"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("weights", "activations"), KINDS)
def test_activation_checkpointing_changes_nothing(
    weights: str, activations: str, *, reentrant: bool, make_trained: Any, batches: list[Tensor]
) -> None:
    results = []
    for recompute in (False, True):
        model, training = make_trained(weights=weights, activations=activations, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        grads: list[Tensor] = []
        for batch in batches:
            x = (2 * batch).requires_grad_()  # the reentrant variant wants a gradient at the input
            found = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
            optimizer.zero_grad()
            found.square().sum().backward()
            grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            training.step()
        results.append((grads, list(ranges_of(model).values())))
    (plain, plain_ranges), (again, again_ranges) = results
    assert len(plain) == len(again) >= 18
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain_ranges, again_ranges, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("weights", "activations"), KINDS)
def test_compiled_training_is_eager_training(
    weights: str, activations: str, make_trained: Any, batches: list[Tensor]
) -> None:
    results = []
    for compiled in (False, True):
        model, training = make_trained(weights=weights, activations=activations, decay=0.5)
        run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        grads: list[Tensor] = []
        for index, x in enumerate(batches):
            with torch._dynamo.config.patch(error_on_recompile=index > 0):
                optimizer.zero_grad()
                run(2 * x).square().sum().backward()
            grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            training.step()
        results.append((grads, list(ranges_of(model).values())))
    (plain, plain_ranges), (again, again_ranges) = results
    assert len(plain) == len(again) >= 18
    assert all(bool(g.any()) for g in again)
    for a, b in zip([*plain, *plain_ranges], [*again, *again_ranges], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- what must go on working ----------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "activations"), KINDS)
def test_a_model_in_training_can_be_copied_and_saved(
    weights: str,
    activations: str,
    *,
    make_trained: Any,
    make_mlp: Any,
    toolkit: Toolkit,
    batches: list[Tensor],
    tmp_path: Any,
) -> None:
    model, training = make_trained(weights=weights, activations=activations)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    descend(model, batches[0], optimizer)
    training.step()
    expected = model(batches[0]).detach()
    clone = copy.deepcopy(model)
    toolkit.save(model, tmp_path / "state")
    again = make_mlp(width=8, hidden=32)
    toolkit.restore(again, tmp_path / "state")
    for other in (clone, again):
        assert torch.equal(other(batches[0]), expected)
    kept = {name: q.learned is not None for name, q in named_quantizers(again)}
    assert set(kept.values()) == {weights == "learned"}
    assert [q.learned is not None for _, q in named_quantizers(clone)] == list(kept.values())
    train_ranges(again, weights=weights, activations=activations).step()  # and it trains on


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": "ema"}, TrainingError, "weight up.weight cannot be 'ema'"),
        ({"activations": "follow"}, TrainingError, "activation up.input cannot be 'follow'"),
        ({"decay": 1.0}, TrainingError, "decay is 1.0"),
        ({"ranges": {"layers.*": "ema"}}, TrainingError, r"no quantizer is called 'layers.\*'"),
    ],
)
def test_mistakes_are_named(
    options: Any, error: type[BitternError], words: str, make_trained: Any
) -> None:
    with pytest.raises(error, match=words):
        make_trained(**options)


def test_a_model_without_quantizers_is_refused(make_mlp: Any) -> None:
    with pytest.raises(TrainingError, match="has no quantizers"):
        train_ranges(make_mlp())


def test_what_was_not_calibrated_is_refused(make_mlp: Any, toolkit: Toolkit) -> None:
    model = make_mlp()
    toolkit.convert(model, toolkit.plan(model, "int8"))
    with pytest.raises(CalibrationError, match="range is not known yet"):
        train_ranges(model)


def test_a_refused_range_leaves_the_model_as_it_was(make_trained: Any) -> None:
    rule = {"match": "down", "weight": "nvfp4"}
    recipe = {"extends": "int8", "rules": [rule]}
    with pytest.raises(NumericsError, match=r"down.weight: ranges of nvfp4 cannot be learned"):
        make_trained(recipe, weights="learned")
    model, _ = make_trained(recipe)
    with pytest.raises(NumericsError):
        train_ranges(model, weights="learned")
    assert all(q.learned is None for _, q in named_quantizers(model))


def test_a_spoiled_weight_is_named_at_the_end(make_trained: Any) -> None:
    model, training = make_trained()
    with torch.no_grad():
        model.down.weight[0, 0] = float("nan")
    training.step()
    with pytest.raises(NumericsError, match=r"down.weight: amax must be finite"):
        training.finish()
