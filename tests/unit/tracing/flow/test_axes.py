"""The algebra of axes: whatever meets, what it says may move together may.

An axis claims permutations: one of every free leaf, carried to the dimension by `positions`. After
any sequence of operations the claims have to agree with all relations that were made: two unified
dimensions move alike, a product moves as its factors do, a sum as its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bittern.tracing.flow import Axis, positions, product, total, unify
from bittern.tracing.flow.axes import split_product, split_sum

Order = NDArray[np.int64]
Claim = Callable[[Axis], Order]

SIZES = st.sampled_from([0, 1, 2, 2, 3, 3, 4, 5, 6, 8, 12])


def _outer(orders: Sequence[Order]) -> Order:
    """How a product moves: coordinate (i, j) comes from (order[i], order[j])."""
    made = np.zeros(1, dtype=np.int64)
    for order in orders:
        made = (made[:, None] * len(order) + order[None, :]).reshape(-1)
    return made


def _behind(orders: Sequence[Order]) -> Order:
    """How a sum moves: every term within its place."""
    starts = np.cumsum([0, *map(len, orders)])
    return np.concatenate(
        [np.zeros(0, dtype=np.int64), *(o + s for o, s in zip(orders, starts[:-1], strict=True))]
    )


class World:
    """Some axes, and all relations that were made between them."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.relations: list[tuple[Axis, Sequence[Axis], Callable[[Sequence[Order]], Order]]] = []
        self.sizes: list[tuple[Axis, int]] = []

    def add(self, axis: Axis, size: int) -> Axis:
        assert axis.size == size
        self.axes.append(axis)
        self.sizes.append((axis, size))
        return axis

    def step(self, data: st.DataObject) -> None:
        kind = data.draw(
            st.sampled_from(["leaf", "product", "total", "unify", "factors", "terms", "fix"])
        )
        if kind == "leaf" or not self.axes:
            size = data.draw(SIZES)
            self.add(Axis(size), size)
            return
        pick = st.sampled_from(self.axes)
        if kind == "product":
            parts = data.draw(st.lists(pick, min_size=1, max_size=3))
            size = prod(part.size for part in parts)
            if size <= 144:
                self.relations.append((self.add(product(parts), size), parts, _outer))
        elif kind == "total":
            parts = data.draw(st.lists(pick, min_size=1, max_size=3))
            size = sum(part.size for part in parts)
            self.relations.append((self.add(total(parts), size), parts, _behind))
        elif kind == "unify":
            one = data.draw(pick)
            two = data.draw(st.sampled_from([a for a in self.axes if a.size == one.size]))
            fits = unify(one, two)
            self.relations.append((one, (two,), _outer))
            if not fits:
                assert all(leaf.mark.fixed for axis in (one, two) for leaf in axis.leaves())
        elif kind == "factors":
            axis = data.draw(pick)
            sizes = data.draw(st.sampled_from(_factorings(axis.size)))
            self._parts(axis, split_product(axis, sizes), sizes, _outer)
        elif kind == "terms":
            axis = data.draw(pick)
            cuts = sorted(data.draw(st.lists(st.integers(0, axis.size), max_size=3)))
            sizes = [int(n) for n in np.diff([0, *cuts, axis.size]) if n]
            self._parts(axis, split_sum(axis, sizes), sizes, _behind)
        else:
            data.draw(pick).fix("fixed")

    def _parts(
        self,
        axis: Axis,
        parts: list[Axis] | None,
        sizes: Sequence[int],
        how: Callable[[Sequence[Order]], Order],
    ) -> None:
        if parts is None:  # whoever asks fixes it then
            return
        assert len(parts) == len(sizes)
        for part, size in zip(parts, sizes, strict=True):
            self.add(part, size)
        self.relations.append((axis, parts, how))

    def check(self, seed: int) -> None:
        dice = np.random.default_rng(seed)
        every = {axis: positions(axis) for axis in dict.fromkeys(self.axes)}
        orders: dict[Axis, Order] = {}
        for axis, size in self.sizes:
            assert axis.find().size == size
            covered = np.zeros(size, dtype=bool)
            for leaf, rows in every[axis].items():
                assert rows.shape[0] == leaf.size
                assert len(np.unique(rows)) == rows.size
                assert not rows.size or 0 <= rows.min() <= rows.max() < size
                covered[rows.ravel()] = True
                fixed = bool(leaf.mark.fixed)
                orders.setdefault(
                    leaf, np.arange(leaf.size) if fixed else dice.permutation(leaf.size)
                )
            assert covered.all() or any(leaf.mark.fixed for leaf in axis.leaves())

        def claim(axis: Axis) -> Order:
            order = np.arange(axis.size)
            for leaf, rows in every[axis].items():
                order[rows.ravel()] = order[rows[orders[leaf]].ravel()]
            return order

        for axis, parts, how in self.relations:
            assert np.array_equal(claim(axis), how([claim(part) for part in parts]))


def _factorings(size: int) -> list[list[int]]:
    if not size:
        return [[0]]
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return [[n, m, size // n // m] for n in divisors for m in divisors if size // n % m == 0]


@given(data=st.data())
def test_whatever_meets_moves_alike(data: st.DataObject) -> None:
    world = World()
    for _ in range(data.draw(st.integers(4, 16))):
        world.step(data)
    world.check(seed=0)


# --- what has to stay free ------------------------------------------------------------------------


def _free(*axes: Axis) -> bool:
    for axis in axes:
        positions(axis)
    return not any(leaf.mark.fixed for axis in axes for leaf in axis.leaves())


def test_leaves_become_one() -> None:
    a, b, c = Axis(4), Axis(4), Axis(4)
    assert unify(a, b)
    assert unify(b, c)
    assert a.find() is c.find()
    assert _free(a)


def test_a_leaf_learns_the_structure_of_what_it_meets() -> None:
    heads, dim, weight = Axis(3), Axis(4), Axis(12)
    assert unify(weight, product((heads, dim)))
    assert [f.find() for f in weight.factors()] == [heads, dim]
    rows = positions(weight)
    assert rows[heads].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert rows[dim].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_a_split_reaches_all_that_was_unified_before() -> None:
    one, two = Axis(12), Axis(12)
    unify(one, two)
    parts = split_product(one, (3, 4))
    assert parts is not None
    assert [f.find() for f in two.factors()] == [p.find() for p in parts]


def test_factors_of_other_sizes_are_refined() -> None:
    a, b = product((Axis(4), Axis(6))), product((Axis(8), Axis(3)))
    assert unify(a, b)
    assert [f.size for f in a.factors()] == [4, 2, 3]
    assert _free(a, b)


def test_terms_of_other_sizes_are_refined() -> None:
    a, b = total((Axis(3), Axis(5))), total((Axis(4), Axis(4)))
    assert unify(a, b)
    assert [t.size for t in a.terms()] == [3, 1, 4]
    assert _free(a, b)


def test_a_fused_projection_of_heads_is_taken_apart() -> None:
    whole = Axis(36)
    parts = split_sum(whole, (12, 12, 12))
    assert parts is not None
    q, k = (split_product(part, (3, 4)) for part in parts[:2])
    assert q is not None
    assert k is not None
    assert unify(q[0], k[0])
    assert positions(whole)[q[0].find()].shape == (3, 8)
    assert _free(whole)


def test_a_concatenation_is_viewed_in_heads_where_its_seams_allow() -> None:
    a, b = Axis(8), Axis(12)
    parts = split_product(total((a, b)), (5, 4))
    assert parts is not None
    assert [t.size for t in parts[0].terms()] == [2, 3]
    assert a.factors()[1].find() is b.factors()[1].find()
    assert _free(a, b)


def test_a_cut_through_heads_keeps_them() -> None:
    heads, dim = Axis(6), Axis(4)
    parts = split_sum(product((heads, dim)), (8, 16))
    assert parts is not None
    assert [t.size for t in heads.terms()] == [2, 4]
    assert parts[0].factors()[1].find() is dim
    assert _free(heads, dim)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (product((Axis(2), Axis(3))), product((Axis(3), Axis(2)))),
        (product((Axis(2), Axis(3))), total((Axis(1), Axis(5)))),
        (Axis(4), Axis(6)),
    ],
    ids=["factors", "factors and terms", "sizes"],
)
def test_what_does_not_fit_is_fixed(one: Axis, two: Axis) -> None:
    assert not unify(one, two)
    assert all(leaf.mark.fixed and leaf.mark.barrier for a in (one, two) for leaf in a.leaves())


@pytest.mark.parametrize("sizes", [(5,), (3, 5), (8, 0)])
def test_there_are_no_factors_of_other_sizes(sizes: tuple[int, ...]) -> None:
    axis = Axis(12)
    assert split_product(axis, sizes) is None
    assert _free(axis)


@pytest.mark.parametrize("sizes", [(5,), (3, 10), ()])
def test_there_are_no_terms_of_other_sizes(sizes: tuple[int, ...]) -> None:
    axis = Axis(12)
    assert split_sum(axis, sizes) is None
    assert _free(axis)


def test_an_axis_that_meets_itself_in_a_product_is_fixed() -> None:
    axis = Axis(3)
    assert positions(product((axis, axis))) == {}
    assert axis.mark.fixed


def test_an_axis_may_occur_twice_in_a_sum() -> None:
    axis = Axis(3)
    assert positions(total((axis, axis)))[axis].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert _free(axis)


def test_marks_reach_the_parts_and_whoever_is_unified() -> None:
    axis, other = Axis(12), Axis(12)
    axis.normalize("norm")
    axis.unsort()
    parts = split_product(axis, (3, 4))
    unify(other, axis)
    assert parts is not None
    assert all(p.mark.normalized and not p.mark.sortable for p in parts)
    parts[0].fix("first")
    other.fix("second")
    assert [leaf.mark.fixed for leaf in axis.leaves()] == ["first", "second"]


def test_cuts_are_kept_when_axes_become_one() -> None:
    a, b = Axis(4), total((Axis(2), Axis(2)))
    a.cut(2, "here")
    unify(a, b)
    assert b.find().cuts == {2: "here"}
