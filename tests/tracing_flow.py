"""What the flow engine claims about one call of an operator, and whether running it agrees.

All tensors of a call are made parameters and buffers of a small module, so nothing holds their
axes in place but the rules. A leaf that a rule leaves free is a claim: permute its coordinates in
all inputs, and the outputs are permuted the same way; take coordinates away, and what remains is as
if they were zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from bittern.registry import OpTable
from bittern.tracing.flow import Axes, Axis, Flow, Kind, OpGraph, positions
from bittern.tracing.flow.record import record
from bittern.tracing.operators import op_rules

__all__ = ["TABLE", "Call", "Claims", "claims", "near", "removal_errors", "violations"]

TABLE = OpTable([(rule, "bittern", True) for rule in op_rules()])

Place = tuple[int, int, Tensor]  # which tensor, which dimension, the rows of every coordinate


@dataclass(frozen=True)
class _Slot:
    name: str


class Call(nn.Module):
    """One call, whose tensors are parameters, or buffers where they are no real numbers.

    Args:
        function: What is called; it may write into its arguments.
        args: Its arguments, tensors in lists or dicts included.
        kwargs: Its keyword arguments.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._function = function
        self._names: dict[int, str] = {}
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._alive = leaves
        self._leaves = [self._keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def _keep(self, tensor: Tensor) -> _Slot:
        name = self._names.get(id(tensor))
        if name is None:
            name = self._names[id(tensor)] = f"t{len(self._names)}"
            tensor = tensor.detach()
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        return _Slot(name)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in the order in which the call has them."""
        return [getattr(self, name) for name in self._names.values()]

    def forward(self) -> Any:
        return self._call(self.tensors)

    def _call(self, tensors: Sequence[Tensor]) -> Any:
        known = dict(zip(self._names.values(), tensors, strict=True))
        leaves = [known[x.name] if isinstance(x, _Slot) else x for x in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self._function(*args, **kwargs)

    def run(self, tensors: Sequence[Tensor] | None = None, *, seed: int = 0) -> list[Tensor]:
        """Return the tensors that the call returns for ``tensors``, which stay as they are."""
        given = [t.detach().clone() for t in (self.tensors if tensors is None else tensors)]
        torch.manual_seed(seed)
        with torch.no_grad():
            made = self._call(given)
        return [t.clone() for t in pytree.tree_leaves(made) if isinstance(t, Tensor)]


@dataclass(eq=False)
class Claims:
    """What the flow says about a call.

    Attributes:
        graph: The operators of the call.
        flow: The flow.
        inputs: The axes of its tensors.
        outputs: The axes of what it returns.
    """

    graph: OpGraph
    flow: Flow
    inputs: list[Axes]
    outputs: list[Axes]
    _letters: dict[Axis, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Write ``ab, cb -> ac``: a letter is a free leaf, ``~`` behind it says that statistics are
        computed over it, ``!`` is fixed, ``()`` has no dimension."""
        sides = (", ".join(map(self._tensor, side)) for side in (self.inputs, self.outputs))
        return " -> ".join(sides)

    def _tensor(self, axes: Axes) -> str:
        return "".join(map(self._axis, axes)) or "()"

    def _axis(self, axis: Axis) -> str:
        axis = axis.find()
        if axis.kind is Kind.LEAF:
            if axis.mark.fixed or not axis.size:
                return "!"
            if axis.size == 1:
                return "1"
            letter = self._letters.setdefault(axis, chr(ord("a") + len(self._letters)))
            return letter + "~" * bool(axis.mark.normalized)
        if axis.kind is Kind.SUM:
            parts = "+".join(self._axis(term) for term in axis.terms())
        else:
            parts = "".join(self._axis(factor) for factor in axis.factors())
        return "!" if set(parts) <= {"!", "+"} else f"({parts})"

    def free(self) -> dict[Axis, tuple[list[Place], list[Place]]]:
        """Return every free leaf: where it is, in inputs and in outputs."""
        found: dict[Axis, tuple[list[Place], list[Place]]] = {}
        for side, tensors in enumerate((self.inputs, self.outputs)):
            for which, axes in enumerate(tensors):
                for dim, axis in enumerate(axes):
                    for leaf, rows in positions(axis).items():
                        place = (which, dim, torch.from_numpy(rows))
                        found.setdefault(leaf, ([], []))[side].append(place)
        return {
            leaf: places
            for leaf, places in found.items()
            if leaf.size > 1 and not leaf.mark.fixed and leaf.mark.sortable
        }


def claims(call: Call, *, fake: bool = True, table: OpTable = TABLE) -> Claims:
    """Record a call, in shapes if that is possible, and carry axes through it."""
    graph = record(call, (), {}, knows=table.knows, fake=fake)
    if graph.failure and fake:
        graph = record(call, (), {}, knows=table.knows, fake=False)
    outputs, graph.outputs = graph.outputs, []  # the dimensions of outputs are held by nobody here
    flow = Flow(graph, table)
    flow.run()
    names = [f"t{i}" for i in range(len(call.tensors))]
    inputs = [flow.of(graph.stored[name]) for name in names]
    return Claims(graph, flow, inputs, [flow.of(value) for value in outputs])


def violations(call: Call, found: Claims, *, seed: int = 0) -> list[str]:
    """Return what running the call says against the claims."""
    before = call.run()
    wrong = [
        f"output {i} has the shape {list(t.shape)}, not {axes}"
        for i, (t, axes) in enumerate(zip(before, found.outputs, strict=True))
        if tuple(axis.size for axis in axes) != tuple(t.shape)
    ]
    generator = Generator().manual_seed(seed)
    for leaf, (ins, outs) in found.free().items():
        for order in _orders(leaf.size, generator):
            after = call.run(_permuted(call.tensors, ins, order))
            expected = _permuted(before, outs, order)
            differ = [
                i for i, (a, b) in enumerate(zip(after, expected, strict=True)) if not near(a, b)
            ]
            if differ:
                wrong.append(
                    f"{_where(ins)} -> {_where(outs)} may not be permuted: output {differ}"
                )
                break
    return wrong


def removal_errors(call: Call, found: Claims, *, seed: int = 0) -> tuple[list[str], int]:
    """Take half of the coordinates of every free leaf away that nobody computes statistics over.

    Returns:
        What differs from the call with these coordinates zeroed; how many leaves could not be tried
        (a call that names sizes does not run with others).
    """
    wrong: list[str] = []
    untried = 0
    generator = Generator().manual_seed(seed)
    for leaf, (ins, outs) in found.free().items():
        if not _removable(leaf, ins, call):
            continue
        gone = torch.randperm(leaf.size, generator=generator)[: leaf.size // 2]
        try:
            small = call.run(_without(call.tensors, ins, gone))
        except (RuntimeError, ValueError, IndexError):
            untried += 1
            continue
        zeroed = _without(call.run(_zeroed(call.tensors, ins, gone)), outs, gone)
        if [t.shape for t in small] != [t.shape for t in zeroed]:
            untried += 1
        elif not all(map(near, small, zeroed)):
            wrong.append(f"{_where(ins)} -> {_where(outs)} may not be removed")
    return wrong, untried


def _removable(leaf: Axis, ins: list[Place], call: Call) -> bool:
    numbers = all(call.tensors[which].is_floating_point() for which, _, _ in ins)
    return bool(ins) and numbers and leaf.size > 2 and not leaf.mark.normalized


def near(a: Tensor, b: Tensor) -> bool:
    """Return whether two results are the same but for the order of additions."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    fine = torch.finfo(a.dtype).eps * 2**12
    return torch.allclose(a, b, rtol=fine, atol=fine * max(scale, 1e-30), equal_nan=True)


def _orders(size: int, generator: Generator) -> Iterator[Tensor]:
    """Yield a cycle of all coordinates and a swap of two."""
    path = torch.randperm(size, generator=generator)
    around = torch.empty(size, dtype=torch.long)
    around[path] = path.roll(1)
    yield around
    if size > 2:
        swap = torch.arange(size)
        swap[path[:2]] = path[:2].flip(0)
        yield swap


def _permuted(tensors: Sequence[Tensor], places: list[Place], order: Tensor) -> list[Tensor]:
    made = list(tensors)
    for which, dim, rows in places:
        source = torch.arange(made[which].shape[dim])
        source[rows.flatten()] = rows[order].flatten()
        made[which] = made[which].index_select(dim, source)
    return made


def _without(tensors: Sequence[Tensor], places: list[Place], gone: Tensor) -> list[Tensor]:
    # Every place counts in the tensor as it was: collect what stays per dimension, then take it.
    stays: dict[tuple[int, int], Tensor] = {}
    for which, dim, rows in places:
        keep = stays.setdefault(
            (which, dim), torch.ones(tensors[which].shape[dim], dtype=torch.bool)
        )
        keep[rows[gone].flatten()] = False
    made = list(tensors)
    for (which, dim), keep in stays.items():
        made[which] = made[which].index_select(dim, keep.nonzero().flatten())
    return made


def _zeroed(tensors: Sequence[Tensor], places: list[Place], gone: Tensor) -> list[Tensor]:
    made = list(tensors)
    for which, dim, rows in places:
        made[which] = made[which].index_fill(dim, rows[gone].flatten(), 0)
    return made


def _where(places: list[Place]) -> str:
    return ", ".join(f"{which}[dim {dim}]" for which, dim, _ in places) or "nothing"


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call and what is claimed about it.

    Attributes:
        name: What is shown.
        call: The call.
        claims: Everything that the flow must say, as `Claims` writes it.
    """

    name: str
    call: Call
    claims: str


def case(name: str, claims: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Case:
    """Make a case; what follows ``function`` are its arguments."""
    return Case(name, Call(function, *args, **kwargs), claims)


def prove(case: Case) -> None:
    """Check that the flow claims what it should, and that running the call agrees.

    Raises:
        AssertionError: It does not.
    """
    for fake in (True, False):
        found = claims(case.call, fake=fake)
        assert not found.graph.failure
        assert not found.flow.barriers
        assert str(found) == case.claims
        assert not violations(case.call, found)
    assert not removal_errors(case.call, found)[0]


def real(*shape: int) -> Tensor:
    """Return numbers; no two are the same, none is zero."""
    return torch.empty(shape, dtype=torch.float64).uniform_(0.2, 1, generator=_dice)


def below(high: int, *shape: int) -> Tensor:
    """Return integers from 0 on, below ``high``."""
    return torch.randint(high, shape, generator=_dice)


def truth(*shape: int) -> Tensor:
    """Return truth values."""
    return torch.rand(shape, generator=_dice) < 0.5


_dice = Generator().manual_seed(0)
