"""Carries axes through an operator graph: an operator relates the axes of what it reads and makes.

Which relation an operator stands for is a rule (`bittern.records.OpRule`), core's own included. An
operator without a rule is a barrier: all axes that meet it are fixed, and it is reported. Nothing
is ever guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import torch

from bittern.registry import OpTable
from bittern.tracing.flow.axes import Axis, product, split_product, split_sum, unify
from bittern.tracing.flow.graph import OpGraph, OpNode, Value

__all__ = ["Axes", "Flow", "FlowRule"]

Axes = tuple[Axis, ...]
FlowRule = Callable[..., "Axes | list[Axes | None] | None"]


class Flow:
    """The axes of every tensor of a graph.

    Args:
        graph: What ran.
        table: Rules for operators.
        sealed: The rule for modules that were not looked into; ``None`` where there is none.

    Attributes:
        barriers: Module path to why the analysis stopped there.
    """

    def __init__(
        self,
        graph: OpGraph,
        table: OpTable,
        sealed: Callable[[OpNode, Flow], Axes | None] = lambda node, flow: None,
    ) -> None:
        self.graph = graph
        self._sealed = sealed
        self.barriers: dict[str, str] = {}
        self._table = table
        self._axes: dict[Value, Axes] = {}

    # --- what rules use ---

    def of(self, value: Value) -> Axes:
        """Return the axes of a tensor.

        Args:
            value: A tensor of the graph.
        """
        axes = self._axes.get(value)
        if axes is None:
            reason = "" if value.stored else f"it is {_what(value)}"
            axes = self._axes[value] = tuple(Axis(n, fixed=reason) for n in value.shape)
        return axes

    @staticmethod
    def fresh(size: int, fixed: str = "") -> Axis:
        """Return a new axis, fixed where ``fixed`` says why."""
        return Axis(size, fixed=fixed)

    def same(self, one: Axis, two: Axis) -> Axis:
        """Unify two axes and return the result; axes of size 1 give way."""
        if one.size == 1:
            return two
        if two.size != 1:
            unify(one, two)
        return one

    def together(self, every: Iterable[Axes]) -> None:
        """Unify the axes of several tensors of one shape, dimension by dimension."""
        first: Axes | None = None
        for axes in every:
            if first is None:
                first = axes
                continue
            for one, two in zip(first, axes, strict=True):
                unify(one, two)

    def broadcast(self, every: Sequence[Axes], shape: Sequence[int]) -> Axes:
        """Return the axes of a tensor of ``shape`` that an elementwise operator makes."""
        rank = len(shape)
        if len(every) == 1 and len(every[0]) == rank:
            return every[0]
        out: list[Axis] = []
        for d, size in enumerate(shape):
            found: Axis | None = None
            for axes in every:
                at = d - rank + len(axes)
                if at < 0 or axes[at].size != size or size == 1:
                    continue
                if found is None:
                    found = axes[at]
                elif found is not axes[at]:
                    unify(found, axes[at])
            out.append(found if found is not None else Axis(size))
        return tuple(out)

    def reshape(self, axes: Axes, shape: Sequence[int], where: str) -> Axes:
        """Return the axes of a view of ``shape``."""
        if 0 in shape:
            return tuple(Axis(n) for n in shape)
        ins = [a for a in axes if a.size != 1]
        out: dict[int, Axis] = {}
        outs = [(i, n) for i, n in enumerate(shape) if n != 1]
        i = j = 0
        while i < len(ins) and j < len(outs):
            left, right = ins[i].size, outs[j][1]
            i0, j0 = i, j
            i, j = i + 1, j + 1
            while left != right:
                if left < right and i < len(ins):
                    left *= ins[i].size
                    i += 1
                elif right < left and j < len(outs):
                    right *= outs[j][1]
                    j += 1
                else:
                    break
            out.update(self._rechunk(ins[i0:i], outs[j0:j], where))
        return tuple(out[k] if k in out else Axis(n) for k, n in enumerate(shape))

    def _rechunk(self, ins: list[Axis], outs: list[tuple[int, int]], where: str) -> dict[int, Axis]:
        if len(ins) == len(outs) == 1:
            return {outs[0][0]: ins[0]}
        whole = product(ins)
        if len(outs) == 1:
            return {outs[0][0]: whole}
        parts = split_product(whole, [n for _, n in outs])
        if parts is None:
            reason = f"a view takes it apart where it has no seam ({where})"
            whole.fix(reason)
            return {k: Axis(n, fixed=reason) for k, n in outs}
        return {k: part for (k, _), part in zip(outs, parts, strict=True)}

    def divide(self, axis: Axis, sizes: Sequence[int], where: str) -> list[Axis]:
        """Return consecutive parts of an axis, of the given sizes."""
        parts = split_sum(axis, sizes)
        if parts is None:
            reason = f"it is cut where it has no seam ({where})"
            axis.fix(reason)
            return [Axis(n, fixed=reason) for n in sizes]
        queue = iter(parts)
        return [next(queue) if n else Axis(0) for n in sizes]

    def factor(self, axis: Axis, sizes: Sequence[int], where: str) -> list[Axis]:
        """Return the factors of an axis, outer first."""
        parts = split_product(axis, sizes)
        if parts is None:
            reason = f"it is taken apart where it has no seam ({where})"
            axis.fix(reason)
            return [Axis(n, fixed=reason) for n in sizes]
        return parts

    @staticmethod
    def where(node: OpNode) -> str:
        """Say where a node is, for reasons."""
        op = node.op.split(".")[1] if node.op.count(".") > 1 else node.op
        return f"{op} in {node.module or 'the model'}"

    # --- the pass ---

    def run(self) -> None:
        """Carry axes through the whole graph."""
        for value in self.graph.inputs:
            self.of(value)
        for node in self.graph.nodes:
            self._step(node)
        if not self.graph.failure:
            for value in self.graph.outputs:
                for axis in self.of(value):
                    axis.fix("it is a dimension of the model's output")
            return
        where = self.graph.failed_in or "the model"
        self.barriers[self.graph.failed_in] = f"the run ended here: {self.graph.failure}"
        for value in (*self.graph.waiting, *self._unread()):
            for axis in self.of(value):
                axis.fix(f"the run ended before it was read (in {where})", barrier=True)

    def _unread(self) -> Iterator[Value]:
        """Yield parameters and buffers that what did not run any more may read, too."""
        for name, value in self.graph.stored.items():
            homes = [n.rpartition(".")[0] for n in self.graph.names.get(name, (name,))]
            done = self.graph.modules.difference(self.graph.unfinished)
            if any(home not in done for home in homes):
                yield value

    def _step(self, node: OpNode) -> None:
        made: Axes | list[Axes | None] | None
        entry = self._table.find(node.op)
        written = _written(node.op)
        leaf = node.op.startswith("module.")
        if entry is None and not leaf:
            self._barrier(node, f"there is no rule for {node.op}")
            return
        if written is None:
            self._barrier(node, f"{node.op} writes without saying what")
            return
        whose = f"the rule of {entry.plugin if entry is not None else 'the symbols'} for {node.op}"
        try:
            if entry is None:
                made = self._sealed(node, self)
                if made is None:
                    why = self.graph.sealed.get(node.module) or "a leaf"
                    self._barrier(node, f"it is not looked into: {why}")
                    return
            else:
                made = entry.flow(node, self, **entry.options)
            complaint = self._accept(node, made)
        except Exception as error:  # a rule that fails must not cost the whole trace
            self._barrier(node, f"{whose}: {type(error).__name__}: {error}")
            return
        if complaint:
            self._barrier(node, f"{whose} {complaint}")
            return
        for place, name, k in written:
            target, value = node.arg(place, name), node.outputs[k]
            # Views of what was written into see the same coordinates.
            if isinstance(target, Value) and value is not None and target.shape == value.shape:
                self.together([self.of(target), self.of(value)])

    def _accept(self, node: OpNode, made: Axes | list[Axes | None] | None) -> str:
        """Take over what a rule says about the outputs; return what is wrong with it."""
        every = made if isinstance(made, list) else [made]
        for k, value in enumerate(node.outputs):
            if value is None:
                continue
            if made is None or k >= len(every):
                return f"says nothing about output {k}"
            axes = every[k]
            if axes is None:
                axes = tuple(Axis(n, fixed="data") for n in value.shape)
            sizes = [axis.size for axis in axes]
            if sizes != list(value.shape):
                return f"gives the shape {sizes}, it is {list(value.shape)}"
            self._axes[value] = axes
        return ""

    def _barrier(self, node: OpNode, reason: str) -> None:
        known = self.barriers.setdefault(node.module, reason)
        if reason not in known:
            self.barriers[node.module] = f"{known}; {reason}"
        for value in node.inputs():
            for axis in self.of(value):
                axis.fix(reason, barrier=True)
        for made in node.outputs:
            if made is not None:
                self._axes[made] = tuple(Axis(n) for n in made.shape)
                for axis in self._axes[made]:
                    axis.fix(reason, barrier=True)


@cache
def _written(op: str) -> tuple[tuple[int, str, int], ...] | None:
    """Return which arguments an operator writes its outputs into: position, name, output.

    ``None`` for one that writes, and returns nothing.
    """
    try:
        namespace, packet, overload = op.split(".")
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        schema = found._schema
    except (AttributeError, RuntimeError, ValueError):
        return ()
    if torch.Tag.inplace_view in found.tags:  # `t_` gives another shape, it writes no elements
        return ()
    if not schema.returns and schema.is_mutable:
        return None
    homes = {
        alias: k
        for k, made in enumerate(schema.returns)
        if made.alias_info is not None
        for alias in made.alias_info.before_set
    }
    return tuple(
        (place, argument.name, homes[alias])
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for alias in argument.alias_info.before_set
        if alias in homes
    )


def _what(value: Value) -> str:
    if value.kind == "input":
        return "a dimension of the model's input"
    return "a constant" if value.kind == "constant" else "data"
