"""Batches: every form they come in, the vocabulary, devices, functions of the user."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from bittern.errors import DataError, ModelError
from bittern.records import ModelAdapter
from bittern.runtime import SILENT, call_forward, evaluating, length_of, prepare
from bittern.runtime.access import resident

PLAIN = ModelAdapter()
X = torch.randn(3, 4)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Echo(nn.Module):
    """Returns what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@pytest.mark.parametrize(
    ("raw", "args", "kwargs", "targets", "rows"),
    [
        (X, (X,), {}, (), 3),
        ((X, IDS), (X,), {}, (IDS,), 3),
        ([X, IDS, X], (X,), {}, (IDS, X), 3),
        ((X,), (X,), {}, (), 3),
        ({"x": X}, (), {"x": X}, (), 3),
        ({"x": X, "labels": IDS}, (), {"x": X}, (IDS,), 3),
        (UserDict({"input_ids": IDS, "x": X}), (), {"input_ids": IDS, "x": X}, (), 2),
        ("text", ("text",), {}, (), 1),
        (torch.tensor(3.0), (torch.tensor(3.0),), {}, (), 1),
    ],
    ids=["tensor", "pair", "list", "single", "mapping", "labels", "userdict", "string", "scalar"],
)
def test_a_batch_is_run_as_its_form_says(
    raw: Any, args: Any, kwargs: Any, targets: Any, rows: int
) -> None:
    batch = prepare(raw, Echo(), PLAIN, index=0)
    got_args, got_kwargs = batch.run(Echo())

    assert len(got_args) == len(args)
    assert all(a is b or torch.equal(a, b) for a, b in zip(got_args, args, strict=True))
    assert got_kwargs.keys() == kwargs.keys()
    assert all(got_kwargs[k] is kwargs[k] for k in kwargs)
    assert [t is u for t, u in zip(batch.targets, targets, strict=True)] == [True] * len(targets)
    assert batch.rows == rows


def test_a_mask_of_who_attends_to_whom_says_nothing_about_padding() -> None:
    mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).triu(1)
    batch = prepare({"input_ids": IDS, "attention_mask": mask}, Echo(), PLAIN, index=0)
    assert batch.mask is None
    assert batch.kwargs["attention_mask"] is mask


def test_ids_and_mask_are_found() -> None:
    mask = torch.ones_like(IDS)
    mapping = prepare({"input_ids": IDS, "attention_mask": mask}, Echo(), PLAIN, index=0)
    assert mapping.ids is IDS
    assert mapping.mask is mask
    assert prepare(IDS, Echo(), PLAIN, index=0).ids is IDS
    assert prepare((IDS, X), Echo(), PLAIN, index=0).ids is IDS
    assert prepare(X, Echo(), PLAIN, index=0).ids is None
    assert prepare({"x": X}, Echo(), PLAIN, index=0).ids is None


def test_the_adapters_arguments_are_added_and_the_batchs_win() -> None:
    adapter = ModelAdapter(call_kwargs={"use_cache": False, "x": 1})
    _, kwargs = prepare({"x": 2}, Echo(), adapter, index=0).run(Echo())

    assert kwargs == {"x": 2, "use_cache": False}


@pytest.mark.parametrize("raw", [(), [], torch.empty(0, 4), {"x": torch.empty(0)}], ids=str)
def test_an_empty_batch_is_refused_by_its_number(raw: Any) -> None:
    with pytest.raises(DataError, match="batch 7 is empty"):
        prepare(raw, Echo(), PLAIN, index=7)


@pytest.mark.parametrize(("bad", "shown"), [(-1, -1), (10, 10), (99, 99)])
@pytest.mark.parametrize("form", ["tensor", "pair", "mapping"])
def test_token_ids_beyond_the_vocabulary_are_refused(bad: int, shown: int, form: str) -> None:
    ids = torch.tensor([[0, 9, bad]])
    raw = {"tensor": ids, "pair": (ids, X), "mapping": {"input_ids": ids}}[form]
    adapter = ModelAdapter(vocab_size=10)

    message = f"batch 3 holds the token id {shown}, the vocabulary ends at 9"
    with pytest.raises(DataError, match=message):
        prepare(raw, Echo(), adapter, index=3)
    prepare(torch.tensor([[0, 9]]), Echo(), adapter, index=3)
    prepare(X, Echo(), adapter, index=3)


def test_nested_values_keep_their_kinds_on_the_way_to_the_device() -> None:
    Pair = namedtuple("Pair", ["a", "b"])
    raw = {"x": X, "b": [X, (X,)], "c": {"d": X}, "e": Pair(X, 2), "f": None}
    kwargs = prepare(raw, Echo(), PLAIN, index=0).kwargs

    assert [type(v) for v in kwargs["b"]] == [torch.Tensor, tuple]
    assert kwargs["c"]["d"] is X
    assert isinstance(kwargs["e"], Pair)
    assert kwargs["e"].b == 2
    assert kwargs["f"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_everything_moves_to_the_models_device() -> None:
    raw = {"input_ids": IDS, "b": [X, (X,)], "labels": IDS, "attention_mask": IDS}
    batch = prepare(raw, Echo().cuda(), PLAIN, index=0)

    assert batch.ids is not None
    assert batch.mask is not None
    for tensor in (batch.ids, batch.mask, batch.targets[0], batch.kwargs["b"][1][0]):
        assert tensor.device.type == "cuda"


def test_a_model_without_parameters_takes_batches_as_they_are() -> None:
    assert prepare(X, nn.ReLU(), PLAIN, index=0).args[0] is X


# --- functions of the user ------------------------------------------------------------------------


class Runner:
    """A callable object."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, model: nn.Module) -> None:
        self.seen.append(model)


def test_a_function_gets_the_model_or_nothing() -> None:
    model, seen = Echo(), []
    runner = Runner()
    call_forward(lambda m: seen.append((m, 1)), model)
    call_forward(lambda: seen.append("none"), model)
    call_forward(lambda m=1: seen.append(m), model)
    call_forward(lambda *all: seen.append(all), model)
    call_forward(seen.append, model)
    call_forward(runner, model)

    assert seen == [(model, 1), "none", 1, (model,), model]
    assert runner.seen == [model]


def test_a_function_of_more_arguments_is_refused() -> None:
    with pytest.raises(DataError, match="takes 2 arguments"):
        call_forward(lambda a, b: None, Echo())


@pytest.mark.parametrize(
    ("data", "expected"), [([1, 2], 2), (iter([1]), None), ((x for x in [1]), None), (print, None)]
)
def test_a_length_is_known_or_not(data: Any, expected: int | None) -> None:
    assert length_of(data) == expected


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_every_modules_mode_comes_back(*, fails: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))
    model.train()
    model[1][0].eval()
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def work() -> None:
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            work()
    else:
        work()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.is_grad_enabled()


def test_meta_weights_are_refused_by_name() -> None:
    layer = nn.Linear(2, 2)
    with resident(layer, write=False):
        pass
    with (
        pytest.raises(
            ModelError, match="layer: the weight 'weight' of a Linear is on the meta"
        ) as c,
        resident(layer.to("meta"), write=False, path="layer"),
    ):
        pass
    assert "bittern-accelerate" in (c.value.hint or "")


def test_silent_progress_yields_everything() -> None:
    assert list(SILENT.track([1, 2], "x", total=2)) == [1, 2]
