"""The trace as plain data and as a picture (DOT)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bittern.tracing.chains import owner

if TYPE_CHECKING:
    from bittern.records import Member
    from bittern.tracing.trace import Trace

__all__ = ["to_dict", "to_dot"]


def to_dict(trace: Trace) -> dict[str, Any]:
    """Return groups, shared inputs, folds and coverage as plain data."""
    coverage = trace.coverage
    return {
        "groups": [
            {
                "size": group.size,
                "sortable": group.sortable,
                "normalized_by": list(group.normalized_by),
                "members": [_member(member) for member in group.members],
            }
            for group in trace.groups
        ],
        "shared_inputs": [list(group) for group in trace.shared_inputs],
        "foldable": [
            {
                "producer": fold.producer,
                "tensor": fold.tensor,
                "dim": fold.dim,
                "consumers": list(fold.consumers),
                "reason": fold.reason,
                "scaled": [_member(member) for member in fold.scaled],
                "divided": [_member(member) for member in fold.divided],
            }
            for fold in trace.foldable
        ],
        "coverage": {
            "analysed": list(coverage.analysed),
            "barriers": dict(coverage.barriers),
            "fraction": coverage.fraction,
        },
    }


def _member(member: Member) -> dict[str, Any]:
    return {
        "module": member.module,
        "tensor": member.tensor,
        "dim": member.dim,
        "index": member.index.tolist(),
    }


def to_dot(trace: Trace) -> str:
    """Return a graph in DOT: weights as boxes, shared inputs and folds as edges.

    A shared input is a point with an edge to each reader; a fold is a dashed edge from producer to
    consumer; weights of one group have dotted edges between neighbours.
    """
    lines = ["digraph trace {", "  rankdir=LR;", '  node [shape=box, fontname="sans-serif"];']
    names: dict[str, None] = {}
    edges: list[str] = []
    for i, group in enumerate(trace.shared_inputs):
        edges.append(f'  "input {i}" [shape=point, xlabel="shared input"];')
        for name in group:
            names[name] = None
            edges.append(f'  "input {i}" -> {_quoted(name)};')
    for fold in trace.foldable:
        names[fold.producer] = None
        for consumer in fold.consumers:
            names[consumer] = None
            edges.append(
                f'  {_quoted(fold.producer)} -> {_quoted(consumer)} [style=dashed, label="fold"];'
            )
    for coupled in trace.groups:
        every = list(
            dict.fromkeys(
                owner(f"{m.module}.{m.tensor}" if m.module else m.tensor) for m in coupled.members
            )
        )
        names.update(dict.fromkeys(every))
        for one, two in pairwise(every):
            edges.append(
                f"  {_quoted(one)} -> {_quoted(two)} "
                f'[dir=none, style=dotted, label="{coupled.size}"];'
            )
    lines.extend(f"  {_quoted(name)};" for name in names)
    return "\n".join([*lines, *edges, "}"]) + "\n"


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
