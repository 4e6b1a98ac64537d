"""Proves from its source that a forward uses its weight in products with an activation only.

A subclass of `nn.Linear` or `nn.Conv2d` with a forward of its own can be quantized without knowing
what else it does, provided that every read of ``self.weight`` is an operand of such a product. The
proof reads the source of the forward and of every method of the class that it can reach, and takes
anything that it does not know for a reason to refuse.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType, MethodType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from bittern.nn.module import original_class

__all__ = ["why_not_proven"]


@dataclass(frozen=True)
class _Family:
    """A base class, and what multiplies its weight.

    Attributes:
        base: The class.
        functions: Functions that take the weight as their second argument, or by its name.
        methods: Methods of the base that do.
        transposed: Functions of a matrix product, and where the transposed weight stands.
    """

    base: type[nn.Module]
    functions: tuple[Any, ...]
    methods: tuple[str, ...] = ()
    transposed: tuple[tuple[Any, int], ...] = ()


_PRODUCTS = ((torch.matmul, 1), (torch.mm, 1), (torch.addmm, 2))
_FAMILIES = (
    _Family(nn.Linear, (F.linear,), transposed=_PRODUCTS),
    _Family(nn.Conv1d, (F.conv1d,), ("_conv_forward",)),
    _Family(nn.Conv2d, (F.conv2d,), ("_conv_forward",)),
    _Family(nn.Conv3d, (F.conv3d,), ("_conv_forward",)),
)

_METHOD_PRODUCTS = ("matmul", "mm")
# What can be asked of a weight without using its numbers.
_FACTS = ("device", "dtype", "shape", "ndim", "requires_grad", "is_cuda", "is_meta", "layout")
_FACT_CALLS = ("size", "dim", "numel", "element_size", "is_floating_point", "get_device")
_SWAPS = (["0", "1"], ["1", "0"], ["-1", "-2"], ["-2", "-1"])
_INSIDE = ("_parameters", "_modules", "_buffers")  # where a module keeps what it has
_REFLECTING = ("vars", "getattr", "setattr", "locals", "eval", "exec", "__class__")


def why_not_proven(module: nn.Module) -> str | None:
    """Return why a module's forward is not known to only multiply by its weight.

    Args:
        module: An instance of a subclass of `nn.Linear` or `nn.Conv1d` to `nn.Conv3d`.

    Returns:
        A clause such as ``"line 12 of its forward reads the weight in ..."``; ``None`` where it is
        proven.
    """
    cls = original_class(module)
    family = next((f for f in _FAMILIES if issubclass(cls, f.base)), None)
    if family is None:
        return "it is no linear layer and no convolution"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter"
    holders: list[Any] = [*module._parameters.items(), *vars(module).items()]
    for name, value in holders:
        if value is weight and name != "weight":
            return f"it has its weight under another name, {name}, too"
    kind: Any = cls  # mypy takes a class for unhashable
    reason, used = _read_class(kind, family)
    if reason:
        return reason
    for name in used:
        value = vars(module).get(name)
        bound = isinstance(value, MethodType) or getattr(value, "__closure__", None) is not None
        if isinstance(value, MethodType | FunctionType) and bound:
            return f"it calls {name}, a function of this object that may reach the weight"
    return None


@cache
def _read_class(cls: Any, family: Any) -> tuple[str, frozenset[str]]:
    """Return why a class is refused, or nothing, and the attributes of the object that it uses."""
    try:
        reader = _ClassReader(cls, family)
        reader.read_method("forward", cls.__mro__)
        if not reader.products:
            reader.refuse("it never reads the weight")
    except _RefusedError as refusal:
        return str(refusal), frozenset()
    return "", frozenset(reader.attributes)


class _RefusedError(Exception):
    """Something was met that the proof does not know."""


class _ClassReader:
    """Reads the methods that a forward can reach.

    Args:
        cls: The class of the module.
        family: What it derives from.
    """

    def __init__(self, cls: type, family: _Family) -> None:
        self.cls = cls
        self.family = family
        self.products = 0
        self.attributes: set[str] = set()
        self._seen: set[Any] = set()
        for name in ("__getattr__", "__getattribute__", "weight"):
            if any(name in vars(base) for base in self.below(cls.__mro__)):
                self.refuse(f"its class defines {name}")

    def below(self, mro: tuple[type, ...]) -> tuple[type, ...]:
        """Return the classes of ``mro`` before the base, which torch does not define."""
        known = (self.family.base, *self.family.base.__mro__)
        return tuple(base for base in mro if base not in known)

    def is_torchs(self, method: str) -> bool:
        """Whether a method is one of the family, as torch defines it."""
        own = any(method in vars(base) for base in self.below(self.cls.__mro__))
        return method in self.family.methods and not own

    def refuse(self, why: str) -> NoReturn:
        """Give up."""
        raise _RefusedError(why)

    def read_method(self, name: str, mro: tuple[type, ...]) -> None:
        """Read the first definition of a method or property in ``mro``."""
        for owner in self.below(mro):
            found = vars(owner).get(name)
            if found is None:
                continue
            if isinstance(found, property):
                found = found.fget
            if isinstance(found, staticmethod):
                return  # it is not handed the object
            if not isinstance(found, FunctionType):
                self.refuse(f"its {name} is a {type(found).__name__}, not a plain method")
            self._read_function(found, owner)
            return
        if name == "forward":  # of nn.Linear itself
            self.products += 1
        elif name not in self.family.methods:
            self.refuse(f"it uses {name} of torch's own classes, which may reach the weight")

    def _read_function(self, function: FunctionType, owner: type) -> None:
        if function in self._seen:
            return
        self._seen.add(function)
        try:
            source = textwrap.dedent(inspect.getsource(function))
            tree = ast.parse(source).body[0]
        except (OSError, TypeError, SyntaxError, IndexError):
            tree = None
        if not isinstance(tree, ast.FunctionDef):
            self.refuse(f"the source of its {function.__name__} is not to be had")
        if tree.name != function.__name__ or tree.decorator_list:
            self.refuse(f"its {function.__name__} is decorated, or not the function in its file")
        _FunctionReader(self, function, owner, tree).read()


class _FunctionReader:
    """Reads one method.

    Args:
        owner: The reader of the class.
        function: The method.
        cls: The class that defines it.
        tree: Its syntax tree.
    """

    def __init__(
        self, owner: _ClassReader, function: FunctionType, cls: type, tree: ast.FunctionDef
    ) -> None:
        self._owner = owner
        self._function = function
        self._cls = cls
        self._tree = tree
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self._self = arguments[0].arg if arguments else ""
        self._parents = {
            child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }

    def read(self) -> None:
        """Read every use of the object."""
        if not self._self:
            self._refuse(self._tree, "takes no self")
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.Name):
                continue
            if node.id in _REFLECTING:
                self._refuse(node, f"uses {node.id}")
            if node.id == "super":
                self._super(node)
            elif node.id == self._self:
                self._use(node)

    def _refuse(self, node: Any, what: str) -> NoReturn:
        line = self._function.__code__.co_firstlineno + getattr(node, "lineno", 1) - 1
        self._owner.refuse(f"line {line} of its file {what}")

    def _use(self, node: ast.Name) -> None:
        parent = self._parents[node]
        if isinstance(parent, ast.Call) and self._is_super(parent.func):
            return
        if not isinstance(parent, ast.Attribute):
            self._refuse(node, "hands on the whole object, or gives it another name")
        name = parent.attr
        if name == "weight":
            self._weight(parent)
        elif name.startswith("__") or name in _INSIDE:
            self._refuse(node, f"reads {name}")
        else:
            self._attribute(name, parent)

    def _attribute(self, name: str, node: ast.Attribute) -> None:
        found = inspect.getattr_static(self._owner.cls, name, None)
        if found is None:
            self._owner.attributes.add(name)
        elif callable(found) or isinstance(found, property | staticmethod | classmethod):
            if not isinstance(node.ctx, ast.Load):
                self._refuse(node, f"assigns {name}")
            self._owner.read_method(name, self._owner.cls.__mro__)
            if not isinstance(found, property | staticmethod):
                self._check_called(node)

    def _super(self, node: ast.Name) -> None:
        call = self._parents[node]
        attribute = self._parents.get(call)
        if not isinstance(call, ast.Call) or not isinstance(attribute, ast.Attribute):
            self._refuse(node, "uses super() for more than a method")
        self._check_called(attribute)
        start: Any = self._resolve(call.args[0]) if call.args else self._cls
        mro = self._owner.cls.__mro__
        if start not in mro:
            self._refuse(node, "calls super of a class that is not its own")
        self._owner.read_method(attribute.attr, mro[mro.index(start) + 1 :])

    def _check_called(self, method: ast.Attribute) -> None:
        """Refuse a method that is handed on, as to activation checkpointing, not called here."""
        call = self._parents[method]
        if not (isinstance(call, ast.Call) and call.func is method) or self._nested(method):
            self._refuse(method, f"hands on {method.attr}, which may run at another time")

    def _weight(self, node: ast.Attribute) -> None:
        """Take one read of the weight, or refuse."""
        if isinstance(node.ctx, ast.Load) and not self._nested(node):
            if self._is_fact(node):
                return
            if self._is_operand(node) or self._is_transposed_operand(node):
                self._owner.products += 1
                return
        statement: ast.AST = node
        while not isinstance(statement, ast.stmt):
            statement = self._parents[statement]
        text = ast.unparse(statement).partition("\n")[0]
        self._refuse(node, f"has the weight in no product with an activation: {text}")

    def _nested(self, node: ast.AST) -> bool:
        """Whether a node is in a function that may run at another time."""
        parents: Iterator[ast.AST] = self._above(node)
        functions = ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef | ast.GeneratorExp
        return any(isinstance(p, functions) for p in parents if p is not self._tree)

    def _above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self._parents:
            node = self._parents[node]
            yield node

    def _is_fact(self, node: ast.Attribute) -> bool:
        parent = self._parents[node]
        if isinstance(parent, ast.Compare):
            others = [parent.left, *parent.comparators]
            none = any(isinstance(o, ast.Constant) and o.value is None for o in others)
            return none and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
        if not isinstance(parent, ast.Attribute):
            return False
        call = self._parents[parent]
        called = isinstance(call, ast.Call) and call.func is parent
        return parent.attr in (_FACT_CALLS if called else _FACTS)

    def _is_operand(self, node: ast.AST) -> bool:
        """Whether a node is the weight argument of a linear function or a convolution."""
        call, place = self._argument(node)
        if call is None or place not in {1, "weight"}:
            return False
        target = call.func
        if isinstance(target, ast.Attribute) and self._is_self(target.value):
            return self._owner.is_torchs(target.attr)
        return _among(self._resolve(target), self._owner.family.functions)

    def _is_transposed_operand(self, node: ast.AST) -> bool:
        """Whether a node is a weight that is transposed, and then the right side of a product."""
        turned = self._transposed(node)
        if turned is None or not self._owner.family.transposed:
            return False
        parent = self._parents[turned]
        if isinstance(parent, ast.BinOp):
            return isinstance(parent.op, ast.MatMult) and parent.right is turned
        call, place = self._argument(turned)
        if call is None:
            return False
        known = self._resolve(call.func)
        for function, position in self._owner.family.transposed:
            if known is function:
                return place == position
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        return known is None and method in _METHOD_PRODUCTS and place == 0

    def _transposed(self, node: ast.AST) -> ast.AST | None:
        """Return the expression that transposes a node, ``None`` where there is none."""
        parent = self._parents[node]
        if isinstance(parent, ast.Attribute):
            outer = self._parents[parent]
            if isinstance(outer, ast.Call) and outer.func is parent:
                return outer if _swaps(parent.attr, outer.args, outer.keywords) else None
            return parent if parent.attr in {"T", "mT"} else None
        call, place = self._argument(node)
        if call is None or place != 0:
            return None
        known = self._resolve(call.func)
        name = "t" if known is torch.t else "transpose" if known is torch.transpose else ""
        return call if _swaps(name, call.args[1:], call.keywords) else None

    def _argument(self, node: ast.AST) -> tuple[ast.Call | None, int | str | None]:
        """Return the call that takes a node as an argument, and the argument's place or name."""
        parent = self._parents[node]
        if isinstance(parent, ast.keyword):
            call = self._parents[parent]
            return (call, parent.arg) if isinstance(call, ast.Call) else (None, None)
        if isinstance(parent, ast.Call) and node in parent.args:
            before = parent.args[: parent.args.index(node)]
            if not any(isinstance(item, ast.Starred) for item in before):
                return parent, len(before)
        return None, None

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self._self

    def _is_super(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == "super"

    def _resolve(self, node: ast.AST) -> Any:
        """Return what a dotted name of the module stands for, ``None`` for anything else."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        code = self._function.__code__
        local = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        if not isinstance(node, ast.Name) or node.id in local:
            return None
        found = self._function.__globals__.get(node.id)
        for name in reversed(names):
            found = getattr(found, name, None)
        return found


def _among(value: Any, known: tuple[Callable[..., Any], ...]) -> bool:
    return any(value is item for item in known)


def _swaps(method: str, args: list[ast.expr], keywords: list[ast.keyword]) -> bool:
    """Whether a method with these arguments transposes a matrix."""
    if method == "t":
        return not args and not keywords
    texts = [ast.unparse(arg) for arg in args]
    return method == "transpose" and not keywords and texts in _SWAPS
