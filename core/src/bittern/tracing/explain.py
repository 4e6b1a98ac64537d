"""Says in words what the trace found about one module or tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bittern.errors import TraceError
from bittern.tracing.chains import owner
from bittern.tracing.flow import Axis, Kind, Value, positions

if TYPE_CHECKING:
    from bittern.tracing.trace import Trace

__all__ = ["describe", "explain"]

_SHOWN = 8


def explain(trace: Trace, name: str) -> str:
    """Return a few lines about a module or a parameter.

    Args:
        trace: The trace.
        name: Path of a module, ``""`` for the model itself, or full name of a parameter.

    Raises:
        TraceError: The model has nothing of that name.
    """
    named = dict(trace.model.named_modules(remove_duplicate=False))
    model = trace.model
    tensors = [
        *(n for n, _ in model.named_parameters(remove_duplicate=False)),
        *(n for n, _ in model.named_buffers(remove_duplicate=False)),
    ]
    if name in named:
        prefix = f"{name}." if name else ""
        wanted = [t for t in tensors if t.startswith(prefix) and "." not in t[len(prefix) :]]
        lines = [f"{name or 'the model'}: {type(named[name]).__name__}"]
    elif name in tensors:
        wanted, lines = [name], [name]
    else:
        from bittern.registry import nearest

        close = ", ".join(nearest(name, [*named, *tensors], count=3))
        raise TraceError(f"the model has no module or tensor {name!r}", hint=f"closest: {close}")
    for tensor in wanted:
        lines.extend(f"  {line}" for line in _tensor(trace, tensor))
    if not wanted:
        lines.append("  it has no tensors of its own; ask for its children")
    lines.extend(f"  {line}" for line in _relations(trace, name, wanted))
    barrier = trace.coverage.barriers.get(name)
    if barrier is not None:
        lines.append(f"  not analysed: {barrier}")
    return "\n".join(lines)


def _tensor(trace: Trace, name: str) -> list[str]:
    value = trace.flow.graph.find(name)
    if value is None:
        return [f"{name}: nobody read it in this run"]
    same = f", the same tensor as {value.name}" if value.name != name else ""
    lines = [f"{name} {list(value.shape)}{same}"]
    for dim, axis in enumerate(trace.flow.of(value)):
        lines.append(f"  dim {dim} = {describe(axis)}")
        for leaf, rows in positions(axis).items():
            if leaf.size > 1:
                lines.append(f"    {_leaf(trace, leaf, rows.shape[1], value, dim)}")
    return lines


def describe(axis: Axis) -> str:
    """Return what an axis is made of: ``"8 x 64"``, ``"32 + 32"``."""
    axis = axis.find()
    if axis.kind is Kind.LEAF:
        return str(axis.size)
    sign = " x " if axis.kind is Kind.PRODUCT else " + "
    parts = [describe(p) for p in (axis.factors() if axis.kind is Kind.PRODUCT else axis.terms())]
    return sign.join(f"({p})" if " + " in p and sign == " x " else p for p in parts)


def _leaf(trace: Trace, leaf: Axis, rows: int, value: Value, dim: int) -> str:
    each = f"{leaf.size} coordinates" + (f" of {rows} rows" if rows > 1 else "")
    if leaf.mark.fixed:
        return f"{each}: fixed, because {leaf.mark.fixed}"
    own = value.name.rpartition(".")
    for group in trace.groups:
        members = [(m.module, m.tensor, m.dim) for m in group.members]
        if group.size == leaf.size and (own[0], own[2], dim) in members:
            mine = next(
                m for m in group.members if (m.module, m.tensor, m.dim) == (own[0], own[2], dim)
            )
            if mine.index.shape[1] != rows:
                continue
            others = [
                f"{m.module}.{m.tensor}[{m.dim}]".lstrip(".")
                for m in group.members
                if (m.module, m.tensor, m.dim) != (own[0], own[2], dim)
            ]
            more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
            what = ", ".join(others[:_SHOWN]) + more or "nobody else"
            norm = f"; {', '.join(group.normalized_by[:3])} normalises over it" * bool(
                group.normalized_by
            )
            return f"{each}: go together with {what}{norm}"
    return f"{each}: free"


def _relations(trace: Trace, name: str, tensors: list[str]) -> list[str]:
    names = {name, *(owner(t) for t in tensors)}
    lines = []
    for group in trace.shared_inputs:
        if names & set(group):
            others = [n for n in group if n not in names]
            lines.append(f"reads the same tensor as {', '.join(others)}")
    for fold in trace.foldable:
        if fold.producer in names:
            lines.append(f"can take over an input scale of {', '.join(fold.consumers)}")
        if names & set(fold.consumers):
            lines.append(f"its input scale can be folded into {fold.producer}")
    return lines
