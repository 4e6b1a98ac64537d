"""Runs a model once and records the operators it calls, with the module that called them.

The run computes shapes only (fake tensors), so it costs no memory and works for models on the meta
device; where a model looks at values, which fake tensors do not have, it is run once more for real.

In inference mode the dispatcher hands over composite operators (``linear``, ``einsum``,
``scaled_dot_product_attention``) whole. Those without a rule are taken apart, here and then, into
the operators they are made of.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bittern.errors import BitternError
from bittern.tracing.flow.graph import OpGraph, OpNode, Value
from bittern.tracing.preserve import unchanged
from bittern.tracing.shards import unshard

__all__ = ["record"]

CPU = torch.device("cpu")
ATTRIBUTE = "_bittern_value"
READS_VALUES = frozenset(
    {"aten._local_scalar_dense.default", "aten.equal.default", "aten.is_nonzero.default"}
)
SILENT = frozenset({"aten.detach.default", "prim.device.default"})

Knows = Callable[[str], bool]


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    knows: Knows,
    leaf: Callable[[nn.Module], str] = lambda module: "",
    fake: bool = True,
) -> OpGraph:
    """Run ``model`` and return what it did.

    Args:
        model: Any model; its parameters, buffers, attributes and mode are as before afterwards.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        knows: Whether there is a rule for an operator; what has none is decomposed if it can be.
        leaf: Why a module is not to be looked into, ``""`` for the others.
        fake: Whether to compute shapes only.

    Returns:
        The graph, up to where the run ended: early where the model raised, or looked at values
        that a fake run does not have.
    """
    graph = OpGraph(fake=fake)
    with (
        unchanged(model),
        _whole(),
        _quiet(),
        torch.inference_mode(),
        contextlib.ExitStack() as stack,
    ):
        unshard(model)  # `unchanged` puts it back, and the mode
        for module in model.modules():
            module.__dict__["training"] = False
        mode = stack.enter_context(FakeTensorMode()) if fake else None
        recorder = _Recorder(model, graph, knows, leaf, mode)
        stack.enter_context(recorder.provenance())
        args = tuple(recorder.take(value, f"input {i}") for i, value in enumerate(args))
        kwargs = {name: recorder.take(value, name) for name, value in kwargs.items()}
        try:
            with recorder:
                outputs = model(*args, **kwargs)
        except BitternError:  # a rule that does not resolve, two that claim one operator
            raise
        except Exception as error:
            graph.failure = f"{type(error).__name__}: {error}"
            graph.unfinished = tuple(recorder.unwound)
            graph.waiting.extend(recorder.held())  # the traceback still holds what frames held
        else:
            graph.outputs.extend(v for t in _tensors(outputs) if (v := recorder.known(t)))
    return graph


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Keep torch from fusing whole encoder layers into one operator, of which nothing is seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging what ends a fake run: the graph says it, and a real run follows."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator below autograd; keeps who called it and what it read and made."""

    def __init__(
        self,
        model: nn.Module,
        graph: OpGraph,
        knows: Knows,
        leaf: Callable[[nn.Module], str],
        mode: FakeTensorMode | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph
        self._knows = knows
        self._leaf = leaf
        self._mode = mode
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stored: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # an id means nothing once its object is gone
        self._twins: dict[int, Tensor] = {}
        self._stack: list[tuple[str, nn.Module]] = []
        self._names: dict[Any, tuple[str, bool]] = {}
        self._inside_leaf = 0
        self._leaf_reads: dict[Value, None] = {}
        self._made: list[tuple[weakref.ref[Tensor], Value]] = []
        self.unwound: list[str] = []  # modules that ended without an output, nothing done since
        for kind, named in (
            ("parameter", model.named_parameters()),
            ("buffer", model.named_buffers()),
        ):
            for name, tensor in named:
                self._store(name, tensor, kind)

        first = {id(tensor): name for name, tensor in model.named_parameters()}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            if name != first[id(tensor)]:
                known = graph.names.get(first[id(tensor)], (first[id(tensor)],))
                graph.names[first[id(tensor)]] = (*known, name)

    # --- tensors ---

    def _store(self, name: str, tensor: Tensor, kind: str) -> Value:
        known = self._graph.stored.get(name)
        value = known if known is not None else _value(tensor, kind, name)
        self._stored[id(tensor)] = value
        self._alive.append(tensor)
        self._graph.stored[name] = value
        return value

    def take(self, tree: Any, name: str) -> Any:
        """Return example inputs as tensors of this run, known as inputs."""
        if isinstance(tree, Tensor):
            if id(tree) in self._stored:
                return tree
            if self._mode is not None:
                fresh: Tensor = self._fake(tree)
            else:
                fresh = _copy(tree)  # the model may write into it
            value = _value(tree, "input", name)
            setattr(fresh, ATTRIBUTE, value)
            self._graph.inputs.append(value)
            return fresh
        if type(tree) in (list, tuple):
            return type(tree)(self.take(item, name) for item in tree)
        if type(tree) is dict:
            return {key: self.take(item, f"{name}.{key}") for key, item in tree.items()}
        return tree

    def _fake(self, tensor: Tensor) -> Tensor:
        assert self._mode is not None
        # Not an inference tensor: views of one cannot be made by fake kernels.
        with _disable_current_modes(), torch.inference_mode(False):
            meta = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            return FakeTensor(self._mode, meta, CPU)

    def known(self, tensor: Tensor) -> Value:
        """Return the value of a tensor; one that nobody made here is a constant."""
        found: Value | None = self._stored.get(id(tensor))
        if found is None:
            found = getattr(tensor, ATTRIBUTE, None)
        if found is None:
            found = self._moved(tensor)
        if found is None:  # somebody else's tensor: no mark is left on it
            found = self._stored[id(tensor)] = _value(tensor, "constant", "a constant")
            self._alive.append(tensor)
        return found

    def held(self) -> Iterator[Value]:
        """Yield the values whose tensors somebody still holds."""
        for reference, value in self._made:
            if reference() is not None:
                yield value

    def _moved(self, tensor: Tensor) -> Value | None:
        """Find a parameter that was replaced during the run (offloaded weights are)."""
        for path, module in reversed(self._stack):
            for own in (module._parameters, module._buffers):
                for name, held in own.items():
                    if held is tensor:
                        kind = "parameter" if own is module._parameters else "buffer"
                        return self._store(f"{path}.{name}" if path else name, tensor, kind)
        return None

    def _twin(self, tensor: Tensor) -> Tensor:
        """Return the fake stand-in of a real tensor."""
        twin = self._twins.get(id(tensor))
        if twin is None:
            value = self.known(tensor)
            twin = self._twins[id(tensor)] = self._fake(tensor)
            self._alive.append(tensor)
            setattr(twin, ATTRIBUTE, value)
        return twin

    def _swap(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return item if isinstance(item, FakeTensor) else self._twin(item)
        if isinstance(item, list | tuple):
            return type(item)(self._swap(i) for i in item)
        if isinstance(item, torch.device):
            return CPU
        return item

    def _spare(self, item: Any, *, written: bool) -> Any:
        """Return a copy of what a real run may overwrite.

        Parameters, when an operator is about to write or make a view that may be written; buffers
        and other tensors of the model, which are small, at once.
        """
        known = self._stored.get(id(item)) if isinstance(item, Tensor) else None
        if known is None or (known.kind == "parameter" and not written):
            return item
        twin = self._twins.get(id(item))
        if twin is None:
            twin = self._twins[id(item)] = _copy(item)
            setattr(twin, ATTRIBUTE, known)
        return twin

    def _values(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.known(item)
        if isinstance(item, Value):
            return item
        if isinstance(item, list | tuple):
            return [self._values(i) for i in item]
        return item

    # --- operators ---

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.unwound.clear()
        entry = self._names.get(func)
        if entry is None:
            name = str(func)
            takes_apart = not self._knows(name) and _composite(func)
            entry = self._names[func] = (name, takes_apart)
        name, takes_apart = entry
        if self._mode is not None:
            args = tuple([self._swap(a) for a in args])
            kwargs = {k: self._swap(v) for k, v in kwargs.items()}
        else:
            written = func._schema.is_mutable or func.is_view
            args = tuple([self._spare(a, written=written) for a in args])
            kwargs = {k: self._spare(v, written=written) for k, v in kwargs.items()}
        if takes_apart and not self._inside_leaf:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if self._inside_leaf:
            self._note_reads(args, kwargs)
        made = self._run(func, name, args, kwargs)
        if name in READS_VALUES:
            path = self._stack[-1][0] if self._stack else ""
            learned = any(self.known(a).learned for a in args if isinstance(a, Tensor))
            self._graph.branches[path] = self._graph.branches.get(path, False) or learned
        elif not self._inside_leaf and name not in SILENT:
            self._note(name, args, kwargs, made)
        elif name in SILENT and isinstance(made, Tensor):
            setattr(made, ATTRIBUTE, self.known(args[0]))
        return made

    def _note_reads(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember which tensors from outside a leaf module reads."""
        for tensor in _tensors([*args, *kwargs.values()]):
            found = self._stored.get(id(tensor)) or getattr(tensor, ATTRIBUTE, None)
            if found is not None:
                self._leaf_reads[found] = None

    def _run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._mode is None or name != "aten._grouped_mm.default":
            return func(*args, **kwargs)
        # Its own shape rule takes what a GPU takes: bfloat16, sizes of multiples of eight.
        a, b = args[:2]
        if a.dim() == b.dim() == 2:
            return func(*args, **kwargs)
        lead = b.shape[:-2] if a.dim() == b.dim() == 3 else ()
        return a.new_empty((*lead, a.shape[-2], b.shape[-1]))

    def _note(self, name: str, args: Any, kwargs: Any, made: Any) -> None:
        node = OpNode(
            name,
            tuple([self._values(a) for a in args]),
            {k: self._values(v) for k, v in kwargs.items()},
            (),
            self._stack[-1][0] if self._stack else "",
        )
        learned = any(value.learned for value in node.inputs())
        outputs: list[Value | None] = []
        for item in made if isinstance(made, list | tuple) else (made,):
            if not isinstance(item, Tensor):
                outputs.append(None)
                continue
            value = _value(item, "activation", "")
            value.producer, value.learned = node, learned
            if id(item) not in self._stored:
                setattr(item, ATTRIBUTE, value)
                self._made.append((weakref.ref(item), value))
            outputs.append(value)
        node.outputs = tuple(outputs)
        for value in node.inputs():
            value.users.append(node)
        self._graph.nodes.append(node)

    # --- modules ---

    @contextlib.contextmanager
    def provenance(self) -> Iterator[None]:
        """Follow which module runs, without touching the modules."""

        def enter(module: nn.Module, args: Any) -> None:
            path = self._paths.get(id(module))
            if path is None:
                path = f"{self._stack[-1][0]}.?" if self._stack else "?"
            self._stack.append((path, module))
            self._graph.modules.add(path)
            if self._inside_leaf or self._leaf(module):
                self._inside_leaf += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self._stack or self._stack[-1][1] is not module:
                return
            path, _ = self._stack.pop()
            if output is None:
                self.unwound.append(path)
            else:
                self.unwound.clear()
            if self._inside_leaf:
                self._inside_leaf -= 1
                if not self._inside_leaf:
                    self._note_leaf(path, module, args, output)

        handles = (
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_leaf(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Record a module that is not looked into as one operator.

        Its arguments are the tensors among the positional arguments and whatever else it read; its
        keyword arguments are its parameters and buffers.
        """
        positional = [item if isinstance(item, Tensor) else None for item in args]
        direct = {id(self.known(item)) for item in positional if item is not None}
        own = dict((*module.named_parameters(), *module.named_buffers()))
        held = {id(self.known(tensor)) for tensor in own.values()}
        others = [v for v in self._leaf_reads if id(v) not in direct | held]
        self._leaf_reads.clear()
        op = f"module.{type(module).__qualname__}"
        self._stack.append((path, module))
        self._note(op, (positional, others), own, list(_tensors(output)))
        self._stack.pop()
        self._graph.sealed[path] = self._leaf(module)


def _copy(tensor: Tensor) -> Tensor:
    # Not an inference tensor: some views of one cannot be made.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _composite(func: Any) -> bool:
    """Whether an operator is made of others and can be taken apart."""
    try:
        return bool(
            func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        )
    except (AttributeError, RuntimeError):
        return False


def _value(tensor: Tensor, kind: str, name: str) -> Value:
    return Value(
        tuple(tensor.shape),
        kind=kind,
        name=name,
        floating=tensor.is_floating_point() or tensor.is_complex(),
        boolean=tensor.dtype is torch.bool,
        dtype=str(tensor.dtype),
        learned=kind == "parameter",
    )


def _tensors(tree: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors in anything: containers, dataclasses, objects with attributes."""
    if isinstance(tree, Tensor):
        yield tree
        return
    seen = seen if seen is not None else set()
    if isinstance(tree, nn.Module | type | str | int | float) or id(tree) in seen:
        return
    seen.add(id(tree))
    items: Any = ()
    if isinstance(tree, Mapping):
        items = tree.values()
    elif isinstance(tree, list | tuple | set | frozenset):
        items = tree
    elif hasattr(tree, "__dict__"):
        items = vars(tree).values()
    elif hasattr(tree, "__dataclass_fields__"):  # one with slots
        items = (getattr(tree, name, None) for name in tree.__dataclass_fields__)
    for item in list(items):
        yield from _tensors(item, seen)
