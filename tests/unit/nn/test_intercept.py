"""An intercept sees its own forward, in its own thread, and nothing after it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bittern.nn.intercept import MATMULS, Call, Intercept, Marks, Place, looking, sealed, variants


class Doubling(Intercept):
    """Doubles the left side of products and remembers them."""

    watched = frozenset(MATMULS)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def seen(self, call: Call) -> Any:
        self.count += 1
        left, _ = MATMULS[call.func]
        return call.put(left, call.get(left) * 2).run()


EYE = torch.eye(2)


# --- calls ----------------------------------------------------------------------------------------


def test_an_argument_is_found_and_replaced_by_place_or_name() -> None:
    place = Place(1, ("other", "mat2"))
    by_place = Call(torch.matmul, (EYE, EYE * 2), {})
    by_name = Call(torch.matmul, (EYE,), {"other": EYE * 2})

    for call in (by_place, by_name):
        assert torch.equal(call.get(place), EYE * 2)
        assert torch.equal(call.put(place, EYE * 3).run(), EYE * 3)
        assert torch.equal(call.run(), EYE * 2)
    assert by_place.get(Place(2, ("out",))) is None
    assert by_place.get(Place(2, ("out",)), 5) == 5


def test_every_form_of_a_function_is_a_variant() -> None:
    assert {torch.softmax, torch.Tensor.softmax, F.softmax} <= set(variants("softmax"))
    assert variants("no such function") == ()


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: a @ b,
        torch.matmul,
        torch.mm,
        lambda a, b: torch.matmul(input=a, other=b),
        lambda a, b: torch.mm(a, mat2=b),
        lambda a, b: a.matmul(b),
        lambda a, b: a.mm(b),
        lambda a, b: torch.bmm(a[None], b[None])[0],
        lambda a, b: a[None].bmm(mat2=b[None])[0],
        lambda a, b: torch.addmm(torch.zeros(2), a, b),
        lambda a, b: torch.zeros(2, 2).addmm(a, b),
        lambda a, b: torch.baddbmm(torch.zeros(1, 1, 2), a[None], b[None])[0],
        lambda a, b: torch.baddbmm(torch.zeros(1, 1, 2), batch1=a[None], batch2=b[None])[0],
    ],
)
def test_every_way_to_write_a_product_is_seen(product: Callable[..., Tensor]) -> None:
    with looking(Doubling()) as _:
        found = product(EYE, EYE)
    assert torch.equal(found, 2 * EYE)


# --- where it looks -------------------------------------------------------------------------------


def test_it_ends_with_its_block_and_with_an_exception() -> None:
    mode = Doubling()
    with pytest.raises(ZeroDivisionError), looking(mode):
        raise ZeroDivisionError
    assert torch.equal(EYE @ EYE, EYE)
    with looking(mode):
        pass
    assert torch.equal(EYE @ EYE, EYE)
    assert mode.count == 0


def test_only_the_innermost_looks_and_the_outer_one_looks_again_afterwards() -> None:
    outer, inner = Doubling(), Doubling()
    with looking(outer):
        assert torch.equal(EYE @ EYE, 2 * EYE)
        with looking(inner):
            assert torch.equal(EYE @ EYE, 2 * EYE)
        with pytest.raises(ZeroDivisionError), looking(inner):
            raise ZeroDivisionError
        assert torch.equal(EYE @ EYE, 2 * EYE)
        with sealed():
            assert torch.equal(EYE @ EYE, EYE)
        assert torch.equal(EYE @ EYE, 2 * EYE)
    assert (outer.count, inner.count) == (3, 1)


def test_what_it_calls_itself_is_not_seen_again() -> None:
    class Cubing(Doubling):
        def seen(self, call: Call) -> Any:
            super().seen(call)
            return call.run() @ call.run()

    mode = Cubing()
    with looking(mode):
        assert torch.equal(2 * EYE @ EYE, 4 * EYE)
    assert mode.count == 1


def test_other_modes_still_see_everything() -> None:
    names: list[str] = []

    class Listening(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Listening(), looking(Doubling()):
        EYE @ EYE
    assert names == ["mul", "matmul"]


def test_other_threads_are_left_alone() -> None:
    """Several threads run their forwards at once; each sees its own products, all of them."""
    barrier = threading.Barrier(3)
    counts: dict[int, int] = {}
    plain: list[Tensor] = []

    def run(index: int) -> None:
        mode = Doubling()
        with looking(mode):
            for _ in range(index + 1):
                barrier.wait(10)
                EYE @ EYE
            for _ in range(2 - index):
                barrier.wait(10)
        counts[index] = mode.count

    def bare() -> None:
        for _ in range(3):
            barrier.wait(10)
            plain.append(EYE @ EYE)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    threads.append(threading.Thread(target=bare))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {0: 1, 1: 2}
    assert all(torch.equal(found, EYE) for found in plain)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_with_and_without_gradients(guard: Callable[[], Any]) -> None:
    x = EYE.clone().requires_grad_()
    with guard(), looking(Doubling()):
        found = x @ EYE
    assert torch.equal(found, 2 * EYE)
    if found.requires_grad:
        found.sum().backward()
        assert torch.equal(x.grad, torch.full((2, 2), 2.0))


# --- marks ----------------------------------------------------------------------------------------


def test_a_mark_is_on_one_tensor_and_not_on_its_equals() -> None:
    marks = Marks()
    assert not marks
    x = torch.ones(2)
    marks.add(x, (1, 2))
    assert marks
    assert marks.get(x) == (1, 2)
    assert marks.get(torch.ones(2)) is None
    assert marks.get(x.view(2)) is None
    assert marks.get("no tensor") is None


def test_marks_of_tensors_that_are_gone_are_dropped() -> None:
    marks = Marks()
    kept = torch.ones(1)
    marks.add(kept, (0,))
    for i in range(100):
        marks.add(torch.ones(1), (i,))
    assert len(marks._items) < 12
    assert marks.get(kept) == (0,)
