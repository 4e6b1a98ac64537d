"""Gets torch.fx graphs out of models that torch.fx alone refuses.

torch.fx gives up on the whole model when one module cannot be traced. Here that module becomes a
leaf of its parent's graph, in the same pass: what it had added to the graph is taken back and the
trace goes on. Its children are then traced on their own (see `collection.recursive_trace`).
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute, ParameterProxy, TraceError

from bittern.records import LeafRule
from bittern.registry import ClassTable, Match

__all__ = ["RobustTracer"]


_UNPACK = dis.opmap["UNPACK_SEQUENCE"]


class _Proxy(fx.Proxy):
    """Notes into how many names it is unpacked: ``b, t, c = x.shape`` says that ``x`` has three."""

    def __getattr__(self, k: str) -> Attribute:
        return _Attribute(self, k)

    def __iter__(self) -> Iterator[fx.Proxy]:
        frame = sys._getframe(1)
        code = frame.f_code.co_code
        if code[frame.f_lasti] != _UNPACK:
            raise TraceError("the number of elements of a traced value is not known")
        count = code[frame.f_lasti + 1]
        assert isinstance(self.tracer, RobustTracer)
        self.tracer.unpacked[self.node] = count
        return (self[i] for i in range(count))  # type: ignore[index]


class _Attribute(Attribute, _Proxy):
    """An attribute of a traced value, ``x.shape``."""


class RobustTracer(fx.Tracer):
    """A torch.fx tracer that carries on where a module cannot be traced.

    What it finds out about modules (visited, failed) adds up over all its traces.

    Args:
        leaves: Further classes that must not be entered; torch's own single layers never are.
        is_leaf: Further modules that must not be entered.
        skip: Modules that hand on their first argument instead of running.

    Attributes:
        unpacked: Nodes to the number of names that ``forward`` unpacks them into.
        spans: Modules to the first argument and the result of every call, where both are tensors.
        reached_into: Modules that one that failed called past its own children.
    """

    def __init__(
        self,
        *,
        leaves: ClassTable[LeafRule] | None = None,
        is_leaf: Callable[[nn.Module], bool] | None = None,
        skip: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__(param_shapes_constant=True)
        # A buffer that forward counts up must not really count up.
        self.proxy_buffer_attributes = True
        self._leaves = leaves
        self._is_leaf = is_leaf
        self._skip = frozenset(skip)
        self._behind_skipped = {inner for block in self._skip for inner in block.modules()}
        self._failures: dict[nn.Module, str] = {}
        self._visited: set[nn.Module] = set()
        self._calls: dict[fx.Node, nn.Module] = {}
        self.unpacked: dict[fx.Node, int] = {}
        self.spans: dict[nn.Module, list[tuple[fx.Node, fx.Node]]] = {}
        self.reached_into: set[nn.Module] = set()
        self._running: list[tuple[nn.Module, list[nn.Module]]] = []
        self._names: dict[int, str] = {}
        self._parameter_proxies: dict[str, fx.Proxy] = {}

    # What is known about modules

    def is_failed(self, module: nn.Module) -> bool:
        """Return whether the module's ``forward`` could not be traced."""
        return module in self._failures

    def failure_msg(self, module: nn.Module) -> str | None:
        """Return why the module could not be traced, or ``None``."""
        return self._failures.get(module)

    @property
    def failed(self) -> tuple[nn.Module, ...]:
        """The modules that could not be traced, in the order in which they were found."""
        return tuple(self._failures)

    def is_unvisited(self, module: nn.Module) -> bool:
        """Return whether the module was never called in any trace."""
        return module not in self._visited

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a ``call_module`` node calls."""
        return self._calls.get(node)

    # Tracing

    def trace(
        self,
        root: nn.Module | Callable[..., Any],
        concrete_args: Mapping[str, Any] | None = None,
    ) -> fx.Graph:
        """Trace ``root``.

        Args:
            root: The module.
            concrete_args: Values of arguments of ``forward`` that are not traced; tensors among
                them are. Arguments with a default that is no tensor have this default.

        Returns:
            The graph; of a root that cannot or must not be entered, one that only calls it: the
            target ``""``.
        """
        assert isinstance(root, nn.Module)
        self._visited.add(root)
        if self.is_failed(root) or self.is_leaf_module(root, ""):
            return self._leaf_graph(root)
        self._names = {
            id(tensor): name
            for named in (root.named_buffers(), root.named_parameters())
            for name, tensor in named
        }
        self._running = [(root, [])]
        try:
            return super().trace(root, None if concrete_args is None else dict(concrete_args))
        except Exception as error:
            self._fail(root, error, called=self._running[0][1])
            return self._leaf_graph(root)
        finally:
            self._running = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether ``m`` must not be entered."""
        if self.is_failed(m) or (self._is_leaf is not None and self._is_leaf(m)):
            return True
        if self._leaves is not None and isinstance(self._leaves.find(m), Match):
            return True
        # torch's transformer layers are made of layers, the others are not.
        composite = type(m).__module__ == "torch.nn.modules.transformer"
        return not composite and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Enter ``m``; if that fails, undo what it did to the graph and call it as a leaf."""
        self._visited.add(m)
        if self._running:
            self._running[-1][1].append(m)
        if m in self._skip and args:
            return args[0]
        if m in self._behind_skipped:
            raise TraceError("a block that is left out is used from outside")
        before = next(iter(reversed(self.graph.nodes)), None)
        stack = dict(self.module_stack)
        self._running.append((m, []))
        try:
            returned = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self._fail(m, error, called=self._running[-1][1])
            self._undo(before)
            self.module_stack.clear()
            self.module_stack.update(stack)
            returned = super().call_module(m, forward, args, kwargs)
        finally:
            self._running.pop()
        if isinstance(returned, fx.Proxy):
            node = returned.node
            if args and isinstance(args[0], fx.Proxy):
                self.spans.setdefault(m, []).append((args[0].node, node))
            if node.op == "call_module" and node not in self._calls:
                self._calls[node] = m
        return returned

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make a placeholder for every argument that has no concrete value.

        torch.fx would record an assertion for every concrete value, and warn about some.
        """
        given = dict(concrete_args) if isinstance(concrete_args, dict) else {}
        args: list[Any] = [self.root]
        kwargs: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value = given.get(name, parameter.default)
            if value is parameter.empty or isinstance(value, torch.Tensor):
                value = self.create_proxy("placeholder", name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[name] = value
            else:
                args.append(value)

        def call() -> Any:
            return root_fn(*args, **kwargs)

        return call, []

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return a proxy for a parameter or buffer.

        torch.fx searches all parameters of the model at every access, which is quadratic.
        """
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        self._parameter_proxies = parameter_proxy_cache
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr",
                name,
                (),
                {},
                proxy_factory_fn=lambda node: ParameterProxy(
                    self, node, name, cast(nn.Parameter, attr_val)
                ),
            )
        return parameter_proxy_cache[name]

    def _undo(self, before: fx.Node | None) -> None:
        """Take the nodes after ``before`` out of the graph."""
        after = list(takewhile(lambda node: node is not before, reversed(self.graph.nodes)))
        for node in after:
            self._calls.pop(node, None)
            self.graph.erase_node(node)
        gone = set(after)
        for name in [name for name, p in self._parameter_proxies.items() if p.node in gone]:
            del self._parameter_proxies[name]

    def _fail(self, module: nn.Module, error: Exception, *, called: list[nn.Module]) -> None:
        children = set(module.children())
        self.reached_into.update(inner for inner in called if inner not in children)
        lines = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        self._failures.setdefault(module, message)

    def _leaf_graph(self, root: nn.Module) -> fx.Graph:
        graph = fx.Graph()
        arguments = [
            graph.placeholder(name)
            for name, parameter in inspect.signature(root.forward).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        call = graph.create_node("call_module", "", tuple(arguments))
        self._calls[call] = root
        graph.output(call)
        return graph
