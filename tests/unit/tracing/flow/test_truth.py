"""Every operator of torch's own database: what the flow claims about its samples holds.

No rule may fail, no free dimension may be one that permuting disproves. The heavy run tries many
samples, also in place, and with ``out=`` a view of another tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracing_flow import Call, claims, near, violations

UNINITIALISED = {"empty", "empty_like", "empty_permuted", "empty_strided"}
UNINITIALISED |= {"new_empty", "new_empty_strided"}

# Operators without a rule, of which a barrier is right: training, storage, other layouts.
BARRIERS = {"_batch_norm_with_update", "_softmax_backward_data", "max_pool2d_with_indices_backward"}
BARRIERS |= {"native_dropout_backward", "_chunk_cat", "allclose", "hash_tensor", "segment_reduce"}
BARRIERS |= {"as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter"}
BARRIERS |= {"resize_", "resize_as_", "_sparse_mm_reduce_impl"}
BARRIERS |= {"_unsafe_masked_index", "_unsafe_masked_index_put_accumulate"}
BARRIERS |= {f"_histogramdd_{how}" for how in ("bin_edges", "from_bin_cts", "from_bin_tensors")}
BARRIERS |= {f"_linear_cross_entropy_batch_chunked{how}" for how in ("", "_no_reduction")}

PARTS = 16


def _database(part: int) -> list[Any]:
    """Return a part of the operators; importing them takes seconds."""
    from torch.testing._internal import common_methods_invocations as database

    # Some samples seed themselves, which would hide that they are random.
    database.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    return list(database.op_db[part::PARTS])


def _samples(op: Any, count: int) -> Iterator[Any]:
    supported = op.supported_dtypes("cpu")
    order = (torch.float64, torch.float32, torch.int64, torch.bool, torch.complex128)
    dtype = next((d for d in order if d in supported), None)
    if dtype is not None:
        torch.manual_seed(0)
        yield from islice(op.sample_inputs("cpu", dtype), count)


def _calls(op: Any, sample: Any, *, every: bool) -> Iterator[tuple[str, Call]]:
    """Yield the call of a sample, on request in every way that the operator has."""
    args = (sample.input, *sample.args)
    yield "", Call(op.op, *args, **sample.kwargs)
    if not every:
        return
    if op.inplace_variant is not None:
        yield " in place", Call(_on_a_copy(op.inplace_variant), *args, **sample.kwargs)
    if op.supports_out and "out" not in sample.kwargs:
        into = _into_views(op.op, args, sample.kwargs)
        yield from [(" out", Call(into, *args, **sample.kwargs))] if into is not None else []


def _on_a_copy(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: op(x.clone(), *args, **kwargs)


def _into_views(op: Callable[..., Any], args: Any, kwargs: Any) -> Callable[..., Any] | None:
    """Return a function that lets an operator write into a view, and returns the whole."""
    made, spec = pytree.tree_flatten(op(*args, **kwargs))
    if not made or not all(isinstance(t, Tensor) for t in made):
        return None

    def call(*args: Any, **kwargs: Any) -> list[Tensor]:
        wholes = [torch.zeros(t.shape, dtype=t.dtype) for t in made]
        op(*args, **kwargs, out=pytree.tree_unflatten([t[...] for t in wholes], spec))
        return wholes

    return call


def _settled(call: Call) -> bool:
    """Whether the call runs, and gives the same each time."""
    try:
        one, *others = (call.run(seed=seed) for seed in range(4))
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, NotImplementedError):
        return False  # no CPU kernel, a layout without strides, no such variant for this sample
    return all(t.layout is torch.strided for t in one) and all(
        len(one) == len(two) and all(map(near, one, two)) for two in others
    )


def _right(barrier: str) -> bool:
    """Whether a barrier is no bug of a rule, and no rule that is missing."""
    if barrier.startswith("there is no rule for"):
        return barrier.split(".")[1] in BARRIERS
    return barrier.endswith("writes without saying what")


def _findings(call: Call, *, fake: bool) -> list[str]:
    found = claims(call, fake=fake)
    if found.graph.failure:
        return [f"the run failed: {found.graph.failure}"]
    joined = "; ".join(found.flow.barriers.values())
    wrong = [reason for reason in joined.split("; ") if reason and not _right(reason)]
    return wrong + violations(call, found)


def _tried(part: int, *, samples: int, every: bool) -> tuple[list[str], int]:
    wrong: list[str] = []
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in _database(part):
            if op.name in UNINITIALISED:
                continue
            for k, sample in enumerate(_samples(op, samples)):
                try:
                    calls = list(_calls(op, sample, every=every))
                except (RuntimeError, TypeError, AssertionError, NotImplementedError):
                    continue
                for how, call in calls:
                    if not _settled(call):
                        continue
                    count += 1
                    name = f"{op.full_name}{how}, sample {k}"
                    for fake in (True, False) if every else (True,):
                        wrong += [f"{name}: {w}" for w in _findings(call, fake=fake)]
    return wrong, count


@pytest.mark.parametrize("part", range(PARTS))
def test_no_operator_disproves_a_claim(part: int) -> None:
    wrong, count = _tried(part, samples=1, every=False)
    assert not wrong, "\n".join(wrong)
    assert count > 25


@pytest.mark.heavy
@pytest.mark.parametrize("part", range(PARTS))
def test_no_sample_of_an_operator_disproves_a_claim(part: int) -> None:
    wrong, _ = _tried(part, samples=20, every=True)
    assert not wrong, "\n".join(wrong)
