"""Groups written by hand, and the form in which groups are compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracing_zoo.physics import GroupLike

__all__ = ["Axis", "AxisMember", "Shape", "at", "axis", "missing", "shapes_of", "whole"]

Shape = tuple[int, frozenset[tuple[str, int, int]]]


@dataclass(frozen=True)
class AxisMember:
    """A member, as the trace has them."""

    module: str
    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Axis:
    """A group, as the trace has them."""

    size: int
    members: tuple[AxisMember, ...]
    sortable: bool = True
    normalized_by: tuple[str, ...] = ()


def at(name: str, dim: int, layout: str = "n", *, start: int = 0) -> tuple[str, int, str, int]:
    """Say where an axis is: ``at("o.weight", 1, "n 3 7")`` is the slowest of 3 axes of columns."""
    return name, dim, layout, start


def whole(*names: str) -> list[tuple[str, int, str, int]]:
    """Members that are the axis and nothing else: ``whole("up.weight:0", "up.bias:0")``."""
    return [at(name, int(dim)) for name, _, dim in (n.rpartition(":") for n in names)]


def axis(
    size: int, members: Iterable[tuple[str, int, str, int]], *, norms: tuple[str, ...] = ()
) -> Axis:
    """Build a group of ``size``; slices of one dimension of one tensor become one member."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    for name, dim, layout, start in members:
        sizes = [size if word == "n" else int(word) for word in layout.split()]
        rows = torch.arange(math.prod(sizes)).view(sizes)
        rows = rows.movedim(layout.split().index("n"), 0).reshape(size, -1)
        found.setdefault((name, dim), []).append(rows + start)
    return Axis(
        size,
        tuple(
            AxisMember(*_split(name), dim, torch.cat(rows, 1))
            for (name, dim), rows in found.items()
        ),
        normalized_by=norms,
    )


def _split(name: str) -> tuple[str, str]:
    module, _, tensor = name.rpartition(".")
    return module, tensor


# --- comparison -----------------------------------------------------------------------------------


def shapes_of(model: nn.Module, groups: Iterable[GroupLike]) -> Counter[Shape]:
    """Return each group as its size and its members: tensor, dimension, rows per coordinate.

    A tied tensor goes by its first name, slices of one dimension are added up, and groups of one
    coordinate are left out: there is nothing to permute or to remove.
    """
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    found: Counter[Shape] = Counter()
    for group in groups:
        rows: dict[tuple[str, int], set[int]] = {}
        for member in group.members:
            name = names[f"{member.module}.{member.tensor}".lstrip(".")]
            tensor = model.get_parameter(name) if _is_parameter(model, name) else None
            ndim = tensor.ndim if tensor is not None else model.get_buffer(name).ndim
            rows.setdefault((name, member.dim % ndim), set()).update(
                torch.as_tensor(member.index)[0].tolist()
            )
        if group.size > 1:
            found[group.size, frozenset((n, d, len(r)) for (n, d), r in rows.items())] += 1
    return found


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, tensor = name.rpartition(".")
    return tensor in model.get_submodule(module)._parameters


def missing(expected: Counter[Shape], found: Counter[Shape]) -> list[str]:
    """Return the expected groups that were not found, with the nearest that was, in words."""
    lost = list((expected - found).elements())
    extra = list((found - expected).elements())
    lines = []
    for size, members in lost:
        near = max(extra, key=lambda g: len(g[1] & members), default=None)
        if near is None or not near[1] & members:
            lines.append(f"no group of {size}: {_words(members)}")
        else:
            lines.append(
                f"group of {size}, found as {near[0]}: "
                f"lacks {_words(members - near[1])}; has too much: {_words(near[1] - members)}"
            )
    return lines


def _words(members: Iterable[tuple[str, int, int]]) -> str:
    return ", ".join(sorted(f"{n} dim {d} ({k} a piece)" for n, d, k in members)) or "nothing"
