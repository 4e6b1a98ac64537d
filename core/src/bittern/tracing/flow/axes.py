"""Axes: what the dimensions of tensors are made of, and what happens when two of them meet.

A dimension is an `Axis`. An axis is a leaf, a product (``heads x head_dim``, outer first) or a sum
(a concatenation). Operators relate axes: elementwise arithmetic makes two axes one (`unify`), a
view takes a product apart (`split_product`), a chunk takes a sum apart (`split_sum`). A leaf gets
its structure in place, so everything that holds it learns of it: that is how a head count that
only appears in an attention's ``view`` reaches the rows of its projection's weight.

Two axes that are unified are one from then on (a union-find over first-order terms). What cannot be
related exactly is *fixed*, with the reason: its coordinates may not be moved or removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import pairwise
from math import gcd, prod

__all__ = ["Axis", "Kind", "Mark", "product", "split_product", "split_sum", "total", "unify"]


class Kind(IntEnum):
    """What an axis is made of."""

    LEAF = 0
    PRODUCT = 1
    SUM = 2


class Mark:
    """What is known about a leaf.

    Attributes:
        fixed: Why coordinates may not be moved or removed, ``""`` if they may.
        barrier: Whether that is because the analysis gave up there.
        sortable: Whether coordinates may be permuted.
        normalized: Who computes statistics over the axis; removing coordinates changes them.
    """

    __slots__ = ("barrier", "fixed", "normalized", "sortable")

    def __init__(self, fixed: str = "", *, barrier: bool = False, sortable: bool = True) -> None:
        self.fixed = fixed
        self.barrier = barrier
        self.sortable = sortable
        self.normalized: dict[str, None] = {}

    def copy(self) -> Mark:
        """Return an independent mark that says the same."""
        twin = Mark(self.fixed, barrier=self.barrier, sortable=self.sortable)
        twin.normalized = dict(self.normalized)
        return twin


class Axis:
    """One dimension, or a part of one.

    Attributes:
        size: Number of coordinates.
        kind: Leaf, product or sum.
        parts: Factors, outer first, or terms, first one first.
        mark: What is known about it; meaningful on leaves only.
        cuts: Positions at which a literal slice cut it: removing coordinates would shift them.
    """

    __slots__ = ("_link", "cuts", "kind", "mark", "parts", "size")

    def __init__(
        self, size: int, kind: Kind = Kind.LEAF, parts: Sequence[Axis] = (), fixed: str = ""
    ) -> None:
        self.size = size
        self.kind = kind
        self.parts: tuple[Axis, ...] = tuple(parts)
        self.mark = Mark(fixed)
        self.cuts: dict[int, str] | None = None
        self._link: Axis | None = None

    def find(self) -> Axis:
        """Return the axis that this one has become."""
        if self._link is None:
            return self
        root = self._link
        while root._link is not None:
            root = root._link
        step: Axis = self
        while step._link is not None and step._link is not root:
            step._link, step = root, step._link
        return root

    def factors(self) -> tuple[Axis, ...]:
        """Return the factors that are not products themselves, outer first; units left out."""
        axis = self.find()
        if axis.kind is not Kind.PRODUCT:
            return (axis,) if axis.size != 1 else ()
        return tuple(f for part in axis.parts for f in part.factors())

    def terms(self) -> tuple[Axis, ...]:
        """Return the terms that are not sums themselves, in order."""
        axis = self.find()
        if axis.kind is not Kind.SUM:
            return (axis,)
        return tuple(t for part in axis.parts for t in part.terms())

    def leaves(self) -> Iterator[Axis]:
        """Yield the leaves in order, each once: in deep models the same parts return very often."""
        seen: set[Axis] = set()
        waiting: list[Axis] = [self]
        while waiting:
            axis = waiting.pop().find()
            if axis in seen:
                continue
            seen.add(axis)
            if axis.kind is Kind.LEAF:
                yield axis
            else:
                waiting.extend(reversed(axis.parts))

    def fix(self, reason: str, *, barrier: bool = False) -> None:
        """Forbid that coordinates are moved or removed; the first reason stays."""
        for leaf in self.leaves():
            if not leaf.mark.fixed:
                leaf.mark.fixed = reason
                leaf.mark.barrier = barrier

    def unsort(self) -> None:
        """Forbid that coordinates are permuted."""
        for leaf in self.leaves():
            leaf.mark.sortable = False

    def normalize(self, who: str) -> None:
        """Note that ``who`` computes statistics over the axis."""
        for leaf in self.leaves():
            leaf.mark.normalized[who] = None

    def cut(self, position: int, reason: str) -> None:
        """Note a literal slice at ``position``."""
        axis = self.find()
        axis.cuts = axis.cuts or {}
        axis.cuts.setdefault(position, reason)

    def _structure(self, kind: Kind, parts: Sequence[Axis]) -> None:
        """Give a leaf its structure; the parts inherit what was known about it."""
        for part in parts:
            _inherit(part, self.mark)
        self.kind = kind
        self.parts = tuple(parts)

    def __repr__(self) -> str:
        axis = self.find()
        if axis.kind is Kind.LEAF:
            return f"{axis.size}{'!' if axis.mark.fixed else ''}"
        sign = "x" if axis.kind is Kind.PRODUCT else "+"
        return f"({f' {sign} '.join(map(repr, axis.parts))})"


def _inherit(axis: Axis, mark: Mark) -> None:
    if mark.fixed:
        axis.fix(mark.fixed, barrier=mark.barrier)
    if not mark.sortable:
        axis.unsort()
    for who in mark.normalized:
        axis.normalize(who)


def product(parts: Iterable[Axis]) -> Axis:
    """Return the axis whose coordinates are those of ``parts``, the first one outermost."""
    factors = [f for part in parts for f in part.factors()]
    if len(factors) == 1:
        return factors[0]
    if not factors:
        return Axis(1)
    return Axis(prod(f.size for f in factors), Kind.PRODUCT, factors)


def total(parts: Iterable[Axis]) -> Axis:
    """Return the concatenation of ``parts``."""
    terms = [t for part in parts if part.find().size for t in part.terms()]
    if len(terms) == 1:
        return terms[0]
    if not terms:
        return Axis(0)
    return Axis(sum(t.size for t in terms), Kind.SUM, terms)


def split_product(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Take an axis apart into factors of the given sizes, outer first.

    Returns:
        The factors, or ``None`` where the axis has no such structure.
    """
    if prod(sizes) != axis.size or not axis.size:
        return None
    rest = list(axis.factors())
    found: list[Axis] = []
    for size in reversed(sizes):
        taken: list[Axis] = []
        need = size
        while need > 1:
            if not rest:
                return None
            factor = rest.pop().find()
            if factor.kind is Kind.PRODUCT:  # it got its structure while we were at it
                rest.extend(factor.factors())
                continue
            if need % factor.size == 0:
                taken.append(factor)
                need //= factor.size
            elif factor.size % need == 0:
                halves = _halve(factor, factor.size // need, need)
                if halves is None:
                    return None
                rest.append(halves[0])
                taken.append(halves[1])
                need = 1
            else:
                return None
        found.append(product(reversed(taken)))
    return found[::-1]


def _halve(axis: Axis, outer: int, inner: int) -> tuple[Axis, Axis] | None:
    """Take a leaf or a sum apart into ``outer`` x ``inner``."""
    if axis.kind is Kind.LEAF:
        first, second = Axis(outer), Axis(inner)
        axis._structure(Kind.PRODUCT, (first, second))
        return first, second
    outers: list[Axis] = []
    common: Axis | None = None
    for term in axis.terms():
        if term.size % inner:
            return None
        halves = split_product(term, (term.size // inner, inner))
        if halves is None:
            return None
        outers.append(halves[0] if halves[0].size > 1 else Axis(1))
        if common is None:
            common = halves[1]
        elif not unify(common, halves[1]):
            return None
    assert common is not None
    return total(outers), common


def split_sum(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Take an axis apart into consecutive parts of the given sizes.

    Returns:
        The parts, or ``None`` where a cut would go through the middle of a structure.
    """
    axis = axis.find()
    sizes = [size for size in sizes if size]
    if sum(sizes) != axis.size:
        return None
    if len(sizes) <= 1:
        return [axis] if sizes else []
    if axis.kind is Kind.LEAF:
        parts = [Axis(size) for size in sizes]
        axis._structure(Kind.SUM, parts)
        return parts
    if axis.kind is Kind.PRODUCT:
        first, *others = axis.factors()
        inner = prod(o.size for o in others)
        if any(size % inner for size in sizes):
            return None
        heads = split_sum(first, [size // inner for size in sizes])
        return None if heads is None else [product((head, *others)) for head in heads]
    queue = list(axis.terms())[::-1]
    found = []
    for size in sizes:
        taken: list[Axis] = []
        need = size
        while need:
            if not queue:
                return None
            term = queue.pop().find()
            if term.kind is Kind.SUM:
                queue.extend(reversed(term.terms()))
                continue
            if term.size > need:
                halves = split_sum(term, (need, term.size - need))
                if halves is None:
                    return None
                queue.append(halves[1])
                term = halves[0]
            taken.append(term)
            need -= term.size
        found.append(total(taken))
    return found


def unify(one: Axis, two: Axis) -> bool:
    """Make two axes one: their coordinates belong together, in order.

    Returns:
        Whether their structures fit. Where they do not, both are fixed.
    """
    a, b = one.find(), two.find()
    if a is b:
        return True
    if a.size != b.size:
        return _misfit(a, b)
    if a.size <= 1:
        return True
    if a.kind is not Kind.LEAF and b.kind is Kind.LEAF:
        a, b = b, a
    if a.kind is Kind.LEAF:
        if b.kind is Kind.LEAF and len(a.mark.normalized) > len(b.mark.normalized):
            a, b = b, a  # the long list stays where it is: a stream has a norm in every block
        _inherit(b, a.mark)
        fits = True
    elif a.kind is Kind.PRODUCT and b.kind is Kind.PRODUCT:
        fits = _unify_products(a, b)
    elif a.kind is Kind.SUM and b.kind is Kind.SUM:
        fits = _unify_sums(a, b)
    else:
        fits = _unify_mixed(*((a, b) if a.kind is Kind.PRODUCT else (b, a)))
    if not fits:
        return _misfit(a, b)
    a, b = a.find(), b.find()
    if a is not b:
        a._link = b
        for position, reason in (a.cuts or {}).items():
            b.cut(position, reason)
    return True


def _unify_products(a: Axis, b: Axis) -> bool:
    left, right = list(a.factors()), list(b.factors())
    while left and right:
        x, y = left.pop().find(), right.pop().find()
        if x.kind is Kind.PRODUCT:
            left.extend(x.factors())
            right.append(y)
            continue
        if y.kind is Kind.PRODUCT:
            right.extend(y.factors())
            left.append(x)
            continue
        if x is y:
            continue
        if x.size != y.size:
            common = gcd(x.size, y.size)
            if common == 1:
                return False
            for factor, stack in ((x, left), (y, right)):
                if factor.size == common:
                    stack.append(factor)
                    continue
                halves = _halve(factor, factor.size // common, common)
                if halves is None:
                    return False
                stack.extend(halves)
            continue
        if not unify(x, y):
            return False
    return not left and not right


def _unify_all(pairs: Iterable[tuple[Axis, Axis]]) -> bool:
    """Unify every pair, also after one that does not fit."""
    fits = True
    for x, y in pairs:
        fits &= unify(x, y)
    return fits


def _unify_sums(a: Axis, b: Axis) -> bool:
    positions: set[int] = set()
    for axis in (a, b):
        at = 0
        for term in axis.terms():
            at += term.size
            positions.add(at)
    edges = [0, *sorted(positions)]
    sizes = [stop - start for start, stop in pairwise(edges)]
    left, right = split_sum(a, sizes), split_sum(b, sizes)
    if left is None or right is None:
        return False
    return _unify_all(zip(left, right, strict=True))


def _unify_mixed(a: Axis, b: Axis) -> bool:
    """Unify a product with a sum."""
    sizes = [term.size for term in b.terms()]
    parts = split_sum(a, sizes)
    if parts is not None:
        return _unify_all(zip(parts, b.terms(), strict=True))
    factors = split_product(b, [factor.size for factor in a.factors()])
    if factors is None:
        return False
    return _unify_all(zip(a.factors(), factors, strict=True))


def _misfit(a: Axis, b: Axis) -> bool:
    for axis in (a, b):
        axis.fix(f"dimensions of different structure meet: {a!r} and {b!r}", barrier=True)
    return False
