"""Nothing in a data pass waits for the device: what is counted are the operators that would.

On a GPU a look at a number waits for all work that was queued before. The model here takes floats,
so that the check of token ids, on the side of the data, has nothing to look at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bittern.calibration.context import CalibrationContext
from bittern.calibration.gram import observe_grams
from bittern.nn.observer import SharedInputs
from bittern.toolkit import Toolkit

WIDTH = 16
WAITING = {
    torch.ops.aten._local_scalar_dense,  # item, bool, int, float
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether the host has to know a result of an operator: a mask's length is one."""
    if func.overloadpacket in INDEXING:
        return any(index is not None and index.dtype is torch.bool for index in args[1])
    return func.overloadpacket in WAITING


class Looks(TorchDispatchMode):
    """Counts the operators whose result the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count, and run."""
        if waits(func, args):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def looks() -> Iterator[Counter[str]]:
    with Looks() as mode:
        yield mode.found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.out((self.q(h) * self.k(h)).tanh() + self.v(h))


def count(toolkit: Toolkit, recipe: Any, *, batches: int, blocks: int = 2) -> Counter[str]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks))).eval()
    data = [torch.randn(2, 5, WIDTH) for _ in range(batches)]
    with looks() as found:
        toolkit.quantize(model, recipe, data)
    return found


def test_the_counter_sees_what_waits() -> None:
    x = torch.ones(3)
    waiting: list[Callable[[], object]] = [
        x.sum().item,
        lambda: bool(x.sum() > 0),
        lambda: torch.equal(x, x.clone()),
        lambda: x[x > 0],
    ]
    for look in waiting:
        with looks() as found:
            look()
        assert found, look
    with looks() as found:
        torch.where(x > 0, x, 0).amax().add_(1)
    assert not found


SMOOTHED: dict[str, Any] = {
    "extends": "int8",
    "algorithm": [{"smooth": {"alpha": 0.5}}, "max"],
}
GROUPED = {"format": "int4", "granularity": "group", "size": 8}


def scaled(**slots: Any) -> dict[str, Any]:
    rules = [{"match": {"class": "Linear"}, "weight": GROUPED, **slots}]
    return {"extends": "base", "rules": rules, "algorithm": {"awq": {}}}


@pytest.mark.parametrize(
    "recipe",
    ["int8", "fp8", "nvfp4", SMOOTHED, "int8-smoothquant"],
    ids=["int8", "fp8", "nvfp4", "smooth and max", "int8-smoothquant"],
)
def test_no_batch_is_waited_for(recipe: Any, toolkit: Toolkit) -> None:
    assert count(toolkit, recipe, batches=2) == count(toolkit, recipe, batches=6)


def test_awq_waits_as_often_for_20_exponents_as_for_2(toolkit: Toolkit) -> None:
    few, many = scaled(input="nvfp4"), scaled(input="nvfp4")
    few["algorithm"], many["algorithm"] = {"awq": {"steps": 1}}, {"awq": {"steps": 19}}
    two, twenty = (count(toolkit, recipe, batches=2) for recipe in (few, many))
    assert abs(two.total() - twenty.total()) <= 8  # what is moved depends on the choice
    assert two.total() <= 8 * 20  # weights and inputs


@pytest.mark.parametrize("slots", [{}, {"input": "int8"}], ids=["weights", "and inputs"])
def test_gram_matrices_are_summed_up_without_waiting(
    slots: dict[str, Any], toolkit: Toolkit
) -> None:
    rules = [{"match": {"class": "Linear"}, "weight": "int8", **slots}]

    def waiting(batches: int) -> Counter[str]:
        torch.manual_seed(0)
        model, data = Block().eval(), [torch.randn(2, 5, WIDTH) for _ in range(batches)]
        plan = toolkit.quantize(model, {"extends": "base", "rules": rules}, data).plan
        access: Any = lambda module, *, write: nullcontext()  # noqa: E731
        context = CalibrationContext(shared=SharedInputs(), access=access)
        with looks() as found:
            observe_grams(model, plan, lambda: len([model(x) for x in data]), context)
        return found

    assert waiting(2) == waiting(6)
