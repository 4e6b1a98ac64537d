"""Running models sharply, reaching their tensors, and the permutation test.

A group claims that its coordinates may be put in another order, if every member follows: nothing
may change in the output. If one member is left behind, the output has to change, or that member was
never coupled to the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = [
    "SAME",
    "GroupLike",
    "MemberLike",
    "Part",
    "Subject",
    "Tape",
    "distance",
    "exchanged",
    "forgotten",
    "parts_of",
    "permutation_error",
    "run",
    "sharply",
    "tensor_of",
]

SAME = 1e-9  # relative to the largest output; float64 noise is a million times smaller


class MemberLike(Protocol):
    """One tensor dimension of a group."""

    @property
    def module(self) -> str: ...
    @property
    def tensor(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def index(self) -> Tensor: ...


class GroupLike(Protocol):
    """Dimensions that claim to belong together."""

    @property
    def size(self) -> int: ...
    @property
    def sortable(self) -> bool: ...
    @property
    def members(self) -> tuple[Any, ...]: ...
    @property
    def normalized_by(self) -> tuple[str, ...]: ...


class Tape:
    """The scales of attention: they come from the sizes of heads, and stay if heads get smaller."""

    def __init__(self, scales: Iterable[float] = ()) -> None:
        self._given, self._seen = list(scales), []

    def scale(self, query: Tensor) -> float:
        """Return the scale of the next attention."""
        place = len(self._seen)
        known = self._given[place] if place < len(self._given) else query.shape[-1] ** -0.5
        self._seen.append(known)
        return known

    def rewound(self) -> Tape:
        """Return a tape that gives the same scales again."""
        return Tape(self._seen)


class Sharp(TorchFunctionMode):
    """Computes in float64 what a model insists to compute in float32, as many norms do."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = {name: _wide(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.float:
            func = Tensor.double
        elif func is F.scaled_dot_product_attention and options.get("scale") is None:
            options["scale"] = self._tape.scale(args[0] if args else options["query"])
        elif func in {F.grouped_mm, torch._grouped_mm}:
            func = _grouped_mm
        return func(*(_wide(a) for a in args), **options)


def _grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """Multiply as torch's function does, but in float64: expert e has the rows up to offs[e]."""
    rows = x.tensor_split(offs.tolist())
    # What is behind the last expert belongs to none.
    known = [r @ w for r, w in zip(rows, weight, strict=False)]
    return torch.cat([*known, x.new_zeros(len(rows[-1]), weight.shape[-1])])


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def sharply(tape: Tape | None = None) -> Iterator[None]:
    """Compute in float64, without gradients and without torch's fused encoder layers."""
    fast, default = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), Sharp(tape or Tape()):
            yield
    finally:
        torch.set_default_dtype(default)
        torch.backends.mha.set_fastpath_enabled(fast)


def run(model: nn.Module, inputs: Mapping[str, Any], *, tape: Tape | None = None) -> list[Tensor]:
    """Return every floating-point tensor of the output."""
    with sharply(tape):
        output = model(**inputs)
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference relative to the largest value, over all outputs."""
    assert [t.shape for t in a] == [t.shape for t in b], "the outputs have other shapes"
    return max(_relative(x, y) for x, y in zip(a, b, strict=True))


def _relative(a: Tensor, b: Tensor) -> float:
    finite = a.isfinite()
    assert torch.equal(finite, b.isfinite()), "an output is not finite"
    if not finite.any():
        return 0.0
    scale = a[finite].abs().max().clamp(min=1e-30)
    return float((a[finite] - b[finite]).abs().max() / scale)


def tensor_of(model: nn.Module, member: MemberLike) -> Tensor:
    """Return the parameter or buffer that a member names."""
    found = getattr(model.get_submodule(member.module), member.tensor)
    assert isinstance(found, Tensor), f"{member.module}.{member.tensor} is no tensor"
    return found


class Subject:
    """A model, some calls of it, and what they return as long as nobody touches the model.

    Attributes:
        model: The model; as it was after every test.
        calls: Keyword arguments of each call.
        outputs: The outputs of each.
    """

    def __init__(self, model: nn.Module, *calls: Mapping[str, Any]) -> None:
        self.model, self.calls = model, calls
        self.outputs = [run(model, call) for call in calls]

    def changed(
        self, changes: Iterable[tuple[Tensor, Tensor]], *, enough: float = math.inf
    ) -> float:
        """Return how far the outputs move while tensors have other values.

        Args:
            changes: Tensors and their values; asked for one after the other, because the next may
                be another dimension or slice of the same tensor.
            enough: If one call's outputs move by more, the others are not run.
        """
        moved = 0.0
        with exchanged(changes):
            for call, before in zip(self.calls, self.outputs, strict=True):
                moved = max(moved, distance(before, run(self.model, call)))
                if moved > enough:
                    break
        return moved

    def moved(self, parts: list[Part], order: Tensor, *, enough: float = math.inf) -> float:
        """Return how far the outputs move while coordinates have another order."""
        changes = ((part.tensor, part.moved(order)) for part in parts)
        return self.changed(changes, enough=enough)


# --- members by identity --------------------------------------------------------------------------


class Part:
    """One dimension of one tensor in a group: all the members that are the same one, tied.

    Attributes:
        names: ``module.tensor`` of each.
        tensor: The tensor itself.
        dim: The dimension, not negative.
        index: ``(size, k)``.
    """

    def __init__(self, tensor: Tensor, dim: int, index: Tensor) -> None:
        self.names: list[str] = []
        self.tensor, self.dim, self.index = tensor, dim, index

    def __repr__(self) -> str:
        return f"{' = '.join(self.names)} dim {self.dim}"

    def moved(self, order: Tensor) -> Tensor:
        """Return the tensor with coordinate ``i`` taken from ``order[i]``."""
        source = torch.arange(self.tensor.shape[self.dim])
        source[self.index.flatten()] = self.index[order].flatten()
        return self.tensor.index_select(self.dim, source)

    def replaced(self, value: float | Generator) -> Tensor:
        """Return the tensor with the rows of every coordinate replaced, by a number or by noise."""
        new = self.tensor.detach().clone()
        rows = self.index.flatten()
        if isinstance(value, Generator):
            picked = new.index_select(self.dim, rows)
            noise = torch.rand(picked.shape, generator=value, dtype=picked.dtype)
            return new.index_copy_(self.dim, rows, picked * (0.5 + noise) + 0.1 * noise)
        return new.index_fill_(self.dim, rows, value)


def parts_of(model: nn.Module, group: GroupLike) -> list[Part]:
    """Return the members of a group, tied ones once.

    Raises:
        AssertionError: An index has the wrong shape, or points outside of its tensor.
    """
    parts: list[Part] = []
    for member in group.members:
        tensor = tensor_of(model, member)
        name = f"{member.module}.{member.tensor}".lstrip(".")
        dim = member.dim % tensor.ndim
        index = torch.as_tensor(member.index)
        assert index.ndim == 2, f"{name}: the index is no matrix"
        assert index.shape[0] == group.size, f"{name}: {index.shape[0]} rows of {group.size}"
        assert index.numel() == index.unique().numel(), f"{name}: a row belongs to two coordinates"
        assert 0 <= int(index.min()) <= int(index.max()) < tensor.shape[dim], f"{name}: outside"
        for part in parts:
            if part.tensor is tensor and part.dim == dim and torch.equal(part.index, index):
                break
        else:
            part = Part(tensor, dim, index)
            parts.append(part)
        part.names.append(name)
    return parts


@contextmanager
def exchanged(changes: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put other values into tensors for a while."""
    saved: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for tensor, value in changes:
                saved.append((tensor, tensor.detach().clone()))
                tensor.copy_(value)
            yield
        finally:
            for tensor, value in reversed(saved):
                tensor.copy_(value)


# --- the permutation test -------------------------------------------------------------------------


def orders(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return one random cycle, in which every coordinate moves, and a swap of two neighbours in it.

    A member whose coordinates have other names than the rest's passes with a permutation that
    commutes with the renaming. Only the identity commutes with both of these, if there are three
    coordinates or more; with two, the removal test finds it.
    """
    path = torch.randperm(size, generator=generator)
    around = torch.empty(size, dtype=torch.long)
    around[path] = path.roll(1)
    swap = torch.arange(size)
    swap[path[:2]] = path[:2].flip(0)
    return around, swap


def permutation_error(subject: Subject, group: GroupLike, *, seed: int = 0) -> float:
    """Return how much the output changes if the group's coordinates are put in another order."""
    parts = parts_of(subject.model, group)
    generator = Generator().manual_seed(seed)
    return max(subject.moved(parts, order) for order in orders(group.size, generator))


def forgotten(subject: Subject, group: GroupLike, *, seed: int = 0) -> list[str]:
    """Return the members that can stay behind unnoticed, which a true member cannot.

    The only excuse is physical: a tensor that has no influence on the output at all, whatever its
    values are (the bias of keys before a softmax, an expert that no token asks, the bias of a
    convolution before an instance norm). Then its order has none either. In a group of one member
    nothing is left behind.
    """
    generator = Generator().manual_seed(seed)
    order, _ = orders(group.size, generator)
    parts = parts_of(subject.model, group)
    if len(parts) == 1:
        return []
    return [
        repr(part)
        for part in parts
        if subject.moved([p for p in parts if p is not part], order, enough=SAME) <= SAME
        and subject.changed([(part.tensor, part.replaced(generator))], enough=SAME) > SAME
    ]
