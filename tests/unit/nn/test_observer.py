"""Observers: shared inputs once, writes noticed, bad batches named, nothing else touched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import CalibrationError
from bittern.nn.extremes import Extremes
from bittern.nn.observer import MaxObserver, SharedInputs
from bittern.numerics import amax
from bittern.records import Granularity, PerChannel, PerTensor
from bittern.toolkit import Toolkit


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], str]]:
    """The shape and granularity of every reduction an observer makes."""
    calls: list[tuple[tuple[int, ...], str]] = []

    def counted(x: Tensor, granularity: Granularity) -> Tensor:
        calls.append((tuple(x.shape), str(granularity)))
        return amax(x, granularity)

    monkeypatch.setattr(sys.modules["bittern.nn.extremes"], "amax", counted)
    return calls


# --- shared inputs --------------------------------------------------------------------------------


def test_a_tensor_read_by_three_modules_is_reduced_once(
    make_lm: Callable[..., nn.Module],
    toolkit: Toolkit,
    token_batches: list[Tensor],
    reductions: list[Any],
) -> None:
    model = make_lm(depth=2)
    rule = {"match": {"class": "Linear"}, "input": "int8"}
    toolkit.quantize(model, {"rules": [rule]}, token_batches)

    per_layer = 2  # the input of q, k and v, and that of o
    assert len(reductions) == (2 * per_layer + 1) * len(token_batches)  # and that of the head


def test_another_granularity_of_the_same_tensor_is_another_reduction(
    reductions: list[Any],
) -> None:
    shared, x = SharedInputs(), torch.randn(3, 4)
    for _ in range(2):
        shared.amax(x, PerTensor())
        shared.amax(x, PerChannel(-1))

    assert len(reductions) == 2


@pytest.mark.parametrize("write", ["whole", "view", "base"])
def test_a_write_between_two_readers_is_noticed(write: str, reductions: list[Any]) -> None:
    base = torch.ones(2, 4)
    x = base[0]
    shared = SharedInputs()
    assert shared.amax(x, PerTensor()).item() == 1
    {"whole": x, "view": x[1:], "base": base}[write].mul_(3)

    assert shared.amax(x, PerTensor()).item() == 3
    assert len(reductions) == 2


def test_equal_tensors_are_not_taken_for_the_same(reductions: list[Any]) -> None:
    shared = SharedInputs()
    x = torch.ones(3)
    shared.amax(x, PerTensor())
    shared.amax(x.clone(), PerTensor())
    shared.amax(x[:], PerTensor())

    assert len(reductions) == 3


def test_a_tensor_in_the_place_of_a_freed_one_is_not_taken_for_it() -> None:
    shared = SharedInputs()
    for value in range(1, 50):
        assert shared.amax(torch.full((3,), float(value)), PerTensor()).item() == value


def test_only_a_few_tensors_are_remembered_and_none_is_kept_alive() -> None:
    import weakref

    shared = SharedInputs(remember=4)
    held = [torch.randn(3) for _ in range(100)]
    for x in held:
        shared.amax(x, PerTensor())
    watch = weakref.ref(held[-1])
    del x, held

    assert len(shared._seen) == 4
    assert watch() is None


def test_inference_tensors_are_reduced_anew_since_they_count_no_writes(
    reductions: list[Any],
) -> None:
    shared = SharedInputs()
    with torch.inference_mode():
        x = torch.ones(3)
        assert shared.amax(x, PerTensor()).item() == 1
        x.mul_(5)
        assert shared.amax(x, PerTensor()).item() == 5

    assert len(reductions) == 2


def test_calibration_works_under_inference_mode(
    make_mlp: Callable[..., nn.Module], toolkit: Toolkit, batches: list[Tensor]
) -> None:
    def run(model: nn.Module) -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch.clone())

    one, other = make_mlp(), make_mlp()
    toolkit.quantize(one, "int8", run)
    toolkit.quantize(other, "int8", batches)
    for name in ("up", "down"):
        mine, theirs = (m.get_submodule(f"{name}.input_quantizer").amax for m in (one, other))
        assert torch.equal(mine, theirs)
        assert not mine.is_inference()

    one(batches[0]).sum().backward()  # outside, they are ordinary tensors


# --- the running maximum --------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1)], ids=str)
def test_the_result_is_the_maximum_over_all_tensors(granularity: Granularity) -> None:
    tensors = [torch.randn(4, 3) for _ in range(6)]
    observer = MaxObserver(Extremes(granularity), SharedInputs())
    for x in tensors:
        observer.observe(x)

    assert torch.equal(observer.result(), amax(torch.cat(tensors), granularity))


def test_empty_tensors_count_for_nothing() -> None:
    observer = MaxObserver(Extremes(PerTensor()), SharedInputs())
    observer.observe(torch.empty(0, 4))
    assert observer.result() is None
    assert observer.first_bad_batch() is None

    observer.observe(torch.tensor([2.0]))
    observer.observe(torch.empty(0, 4))
    assert observer.result().item() == 2
    assert observer.first_bad_batch() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("batch", [0, 2, 4])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1)], ids=str)
def test_the_first_bad_batch_is_named_however_often_a_module_runs_per_batch(
    bad: float, calls: int, batch: int, granularity: Granularity
) -> None:
    shared = SharedInputs()
    observer = MaxObserver(Extremes(granularity), shared)
    for index in range(5):
        shared.batch = index
        for call in range(calls):
            x = torch.ones(2, 3)
            if index >= batch and call == calls - 1:
                x[1, 1] = bad
            observer.observe(x)
            observer.observe(torch.empty(0, 3))

    assert observer.first_bad_batch() == batch


def test_good_batches_have_no_bad_one() -> None:
    observer = MaxObserver(Extremes(PerTensor()), SharedInputs())
    observer.observe(torch.zeros(3))
    observer.observe(torch.full((3,), 3e38))

    assert observer.first_bad_batch() is None


def test_inputs_without_common_scales_are_refused_by_name() -> None:
    observer = MaxObserver(Extremes(PerChannel(0)), SharedInputs(), name="up.input")
    observer.observe(torch.ones(4, 3))
    observer.observe(torch.ones(4, 5))
    with pytest.raises(CalibrationError, match=r"up\.input: .*\(4, 1\) and \(3, 1\)"):
        observer.observe(torch.ones(3, 3))


class Looping(nn.Module):
    """Calls one linear three times per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.step(x)
        return x


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["list", "function"])
def test_calibration_names_the_module_and_the_batch(
    bad: float, kind: str, toolkit: Toolkit
) -> None:
    batches = [torch.randn(2, 4) for _ in range(6)]
    batches[4][1, 2] = bad

    def run(model: nn.Module) -> None:
        for batch in batches:
            model(batch)

    data = batches if kind == "list" else run
    with pytest.raises(CalibrationError, match=r"step\.input: .*NaN or Inf in batch 4"):
        toolkit.quantize(Looping(), "int8", data)
