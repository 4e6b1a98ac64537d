"""Collects the coupled dimensions: one group per leaf that parameters and buffers share."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bittern.records import Group, Member
from bittern.tracing.flow import Axis, Flow, Kind, Value, positions

__all__ = ["collect_groups", "settle_cuts", "stored_axes"]


def stored_axes(flow: Flow) -> Iterator[tuple[Value, int, Axis]]:
    """Yield the dimensions of all parameters and buffers that the run read."""
    for value in flow.graph.stored.values():
        if value.users:
            for dim, axis in enumerate(flow.of(value)):
                yield value, dim, axis


def settle_cuts(flow: Flow) -> None:
    """Fix what a literal slice keeps in place.

    A slice at position 8 needs the eight coordinates before it; one at -2 the two after it. Only
    where all pieces turned out to be one axis (the halves of a rotary embedding) do they shrink
    together.
    """
    seen: set[Axis] = set()
    stack = [axis.find() for _, _, axis in stored_axes(flow)]
    while stack:
        axis = stack.pop()
        if axis in seen:
            continue
        seen.add(axis)
        for position, where in (axis.cuts or {}).items():
            _settle(axis, position, where)
        stack.extend(part.find() for part in axis.parts)


def _settle(axis: Axis, position: int, where: str) -> None:
    terms = list(axis.terms())
    start = position if position > 0 else axis.size + position
    at = 0
    before: list[Axis] = []
    after: list[Axis] = []
    for term in terms:
        (before if at < start else after).append(term)
        at += term.size
    if axis.kind is not Kind.SUM:  # a cut through the outer factor of a product
        for leaf in axis.leaves():
            leaf.fix(f"it is sliced at a fixed position ({where})")
        return
    if len({id(term.find()) for term in terms}) == 1:
        return
    if [t.find() for t in before] == [t.find() for t in after]:
        return
    for term in before if position > 0 else after:
        term.fix(f"it is sliced at a fixed position ({where})")


def collect_groups(flow: Flow) -> tuple[Group, ...]:
    """Return the groups, in the order in which the model's tensors meet them."""
    members: dict[Axis, list[Member]] = {}
    weights: set[Axis] = set()  # a buffer alone is no reason to prune
    for value, dim, axis in stored_axes(flow):
        module, _, tensor = value.name.rpartition(".")
        if axis.size == 1:
            continue
        for leaf, rows in positions(axis).items():
            if not leaf.mark.fixed and leaf.size > 1:
                if value.kind == "parameter":
                    weights.add(leaf)
                members.setdefault(leaf, []).append(
                    Member(module, tensor, dim, torch.from_numpy(rows))
                )
    return tuple(
        Group(leaf.size, leaf.mark.sortable, tuple(own), tuple(leaf.mark.normalized))
        for leaf, own in members.items()
        if not leaf.mark.fixed and leaf in weights
    )
