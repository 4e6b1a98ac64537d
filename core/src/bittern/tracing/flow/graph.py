"""The operator graph of one run: which operator read and made which tensor, in which module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OpGraph", "OpNode", "Value", "values_in"]


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of the run.

    Attributes:
        shape: Its shape.
        kind: ``"parameter"``, ``"buffer"``, ``"input"``, ``"constant"`` or ``"activation"``.
        name: Full name of a parameter or buffer; where an input or constant comes from.
        floating: Whether its elements are floating-point or complex numbers.
        boolean: Whether its elements are truth values.
        dtype: Name of its dtype.
        learned: Whether a parameter had a part in it.
        producer: The node that made it.
        users: The nodes that read it.
    """

    shape: tuple[int, ...]
    kind: str = "activation"
    name: str = ""
    floating: bool = True
    boolean: bool = False
    dtype: str = ""
    learned: bool = False
    producer: OpNode | None = None
    users: list[OpNode] = field(default_factory=list)

    @property
    def stored(self) -> bool:
        """Whether it belongs to the model."""
        return self.kind in ("parameter", "buffer")

    def __repr__(self) -> str:
        return f"{self.name or self.kind}{list(self.shape)}"


@dataclass(eq=False, slots=True)
class OpNode:
    """One operator call.

    Attributes:
        op: Qualified name, for example ``"aten.linear.default"``.
        args: Positional arguments; tensors are `Value`, lists of tensors lists of them.
        kwargs: Keyword arguments.
        outputs: The tensors it returned, in order; ``None`` where it returned something else.
        module: Path of the module that was running.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value | None, ...]
    module: str

    def inputs(self) -> Iterator[Value]:
        """Yield the tensors among the arguments."""
        yield from values_in(self.args)
        if self.kwargs:
            yield from values_in(tuple(self.kwargs.values()))

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument, given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def tensor(self, position: int) -> Value:
        """Return a positional tensor argument.

        Raises:
            TypeError: It is no tensor.
        """
        found = self.args[position]
        if not isinstance(found, Value):
            raise TypeError(f"{self.op}: argument {position} is no tensor")
        return found

    @property
    def out(self) -> Value:
        """The first tensor that was returned."""
        for value in self.outputs:
            if value is not None:
                return value
        raise TypeError(f"{self.op} returned no tensor")

    def __repr__(self) -> str:
        return f"{self.module or 'model'}: {self.op}"


def values_in(items: Any) -> Iterator[Value]:
    """Yield the tensors of nested lists and tuples."""
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, list | tuple):
            yield from values_in(item)


@dataclass(eq=False)
class OpGraph:
    """Everything that one run of a model did.

    Attributes:
        nodes: In order of execution.
        stored: The parameters and buffers that were read, by name.
        names: All names of a parameter that several modules share, by its first one.
        inputs: The example inputs.
        outputs: The tensors that the model returned.
        modules: Paths of the modules that ran.
        failure: Why the run ended early, ``""`` if it did not.
        unfinished: Paths of the modules that were running then, the innermost first.
        waiting: The tensors that were still held then: what was to be done with them is not known.
        branches: Modules that looked at the value of a tensor, which may decide what they do, and
            whether a parameter had a part in that value.
        sealed: Modules that were not looked into, and why.
        fake: Whether the run computed shapes only.
    """

    nodes: list[OpNode] = field(default_factory=list)
    stored: dict[str, Value] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    failure: str = ""
    unfinished: tuple[str, ...] = ()
    waiting: list[Value] = field(default_factory=list)
    branches: dict[str, bool] = field(default_factory=dict)
    sealed: dict[str, str] = field(default_factory=dict)
    fake: bool = True

    @property
    def failed_in(self) -> str:
        """Path of the innermost module that was running when the run ended early."""
        return self.unfinished[0] if self.unfinished else ""

    def find(self, name: str) -> Value | None:
        """Return a parameter or buffer that was read, by any of its names."""
        value = self.stored.get(name)
        if value is None:
            first = next((n for n, names in self.names.items() if name in names), None)
            value = self.stored.get(first) if first is not None else None
        return value if value is not None and value.users else None

    def read(self, name: str) -> bool:
        """Return whether a parameter or buffer was read, by any of its names."""
        return self.find(name) is not None
