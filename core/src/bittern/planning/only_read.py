"""Finds layers whose weight their parent reads itself, so that their forward never runs.

The mixers of state-space models hand the weights of a convolution and of a linear layer to their
scan. A quantizer in such a layer would meet no tensor: it would be quantized in name only.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from bittern.nn import original_class

__all__ = ["only_read"]

WEIGHT = "weight"
# These methods fill weights, and do not compute with them.
SETUP = ("__init__", "_init_weights", "reset_parameters")
# What can be asked of a weight without using its numbers.
FACTS = ("data_ptr", "device", "dim", "dtype", "ndim", "numel", "requires_grad", "shape", "size")


def only_read(parent: nn.Module, name: str) -> bool:
    """Whether a module reads the weight of a child and, as its source shows, never calls it.

    Args:
        parent: A module, converted or not.
        name: Name of its child. Any use of the child but for its weight and bias, and the name as
            a string, counts as a call: what is not plain is left to run.
    """
    kind: Any = original_class(parent)  # mypy takes a class for unhashable
    return _only_reads(kind, name)


@cache
def _only_reads(cls: Any, name: str) -> bool:
    methods = {method: set(_names(method.__code__)) for method in _methods(cls)}
    if not any({name, WEIGHT} <= names for names in methods.values()):
        return False
    read = False
    for method, names in methods.items():
        if name not in names:
            continue
        body = _parsed(method)
        if body is None:
            return False  # without the source nothing is known
        uses = _Uses(name)
        for statement in body:
            uses.visit(statement)
        if uses.used:
            return False
        read = read or (uses.read and method.__name__ not in SETUP)
    return read


def _methods(cls: type) -> Iterator[FunctionType]:
    """Yield the methods of a class, of its bases outside of torch too."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != "torch":
            for method in vars(base).values():
                if isinstance(method, FunctionType):
                    yield inspect.unwrap(method)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names and strings in a function, and in the functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)


def _parsed(function: FunctionType) -> list[ast.stmt] | None:
    """Return the statements of a function, without its decorators."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0].body if isinstance(tree.body[0], ast.FunctionDef) else None


class _Uses(ast.NodeVisitor):
    """Tells whether a method reads the weight of a child, and whether it uses it otherwise."""

    def __init__(self, name: str) -> None:
        self.read = False
        self.used = False
        self._name = name

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Look at ``self.child``, ``self.child.weight`` and ``self.child.weight.dtype``."""
        if node.attr in FACTS and self._is_weight(node.value):
            return
        if self._is_weight(node):
            self.read = True
        elif node.attr == "bias" and self._is_child(node.value):
            return
        elif self._is_child(node):
            self.used = self.used or isinstance(node.ctx, ast.Load)
        else:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Take a child's name as a use: it may be given to `getattr`."""
        self.used = self.used or node.value == self._name

    def _is_child(self, node: ast.expr) -> bool:
        if not isinstance(node, ast.Attribute) or node.attr != self._name:
            return False
        return isinstance(node.value, ast.Name) and node.value.id == "self"

    def _is_weight(self, node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Attribute) and node.attr == WEIGHT and self._is_child(node.value)
        )
