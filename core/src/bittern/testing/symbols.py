"""What rules about the dimensions of modules owe their users: that they fit and are true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.records import SymbolRule
from bittern.registry import ClassTable, Match, resolve, target_of
from bittern.testing.base import Conformance, check, given_cases, named
from bittern.testing.compare import assert_bit_identical
from bittern.testing.permutations import assert_close, move, shuffled
from bittern.tracing import Symbol, SymInfo, SymMap

__all__ = ["SymbolCase", "SymbolConformance", "check_target"]


@dataclass(frozen=True)
class SymbolCase:
    """One module whose dimensions a plugin knows.

    Attributes:
        name: The test id.
        make: Builds the module, in float32; called under a fixed seed.
        inputs: Makes the positional arguments of one call from a generator, with a batch
            dimension, so that what the symbols say can be tried; ``None`` where it cannot run.
    """

    name: str
    _: KW_ONLY
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Any, ...]] | None = None


class SymbolConformance(Conformance):
    """Symbol rules: what ``register_symbols`` says of a module fits its tensors and is true."""

    def cases(self) -> Sequence[SymbolCase]:
        """Return a case for every class that has a rule."""
        return ()

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[tuple[str, Any]]]:
        """Make one test of every case."""
        return {"case": named(given_cases(cls))}

    # --- rules ---

    def test_symbol_targets_resolve(self) -> None:
        """Protects users from a rule that is silently dead since the framework moved a class."""
        self.subject().need_loaded()
        for rule in self._rules():
            check_target(rule.target, self.subject().label)

    def test_symbol_functions_resolve(self) -> None:
        """Protects users from an ImportError in the middle of a trace."""
        self.subject().need_loaded()
        for rule in self._rules():
            function = resolve(rule.symbols, plugin=self.subject().label)
            check(callable(function), f"{rule.symbols} cannot be called")

    def test_every_symbol_rule_has_a_case(self) -> None:
        """Protects users from rules that nobody ever ran."""
        rules = self._rules()
        check(rules, "the plugin registers no symbols")
        made = [_made(case) for _, case in self.parameters()["case"]]
        classes = {target_of(base) for module in made for base in type(module).__mro__}
        untested = [rule.target for rule in rules if rule.target not in classes]
        check(not untested, f"no case is a {', '.join(untested)}")

    # --- one module ---

    def test_a_symbol_rule_takes_the_module(self, case: SymbolCase) -> None:
        """Protects users from a rule that its own class does not match."""
        self._match(_made(case))

    def test_the_symbols_function_answers(self, case: SymbolCase) -> None:
        """Protects users from a trace that fails at a class that has a rule.

        The function returns a ``SymInfo`` and only looks: parameters and attributes of the module
        stay as they are, and it says the same again.
        """
        module = _made(case)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        attributes = set(vars(module))
        function = resolve(self._match(module).symbols, plugin=self.subject().label)
        first, second = function(module), function(module)
        kind = type(first).__name__
        check(isinstance(first, SymInfo), f"the function returns a {kind}, no SymInfo")
        check(repr(first) == repr(second), "the function says something else the second time")
        check(set(vars(module)) == attributes, "the function changes the module's attributes")
        after = {name: p.detach() for name, p in module.named_parameters()}
        assert_bit_identical(before, after, what="parameters")

    def test_the_trace_uses_the_symbols(self, case: SymbolCase) -> None:
        """Protects users from a rule that another one hides: the trace must know the module."""
        module = _made(case)
        self._match(module)
        table = self.toolkit().registry.symbols
        found = table.find(module)
        check(
            isinstance(found, Match) and found.plugin == self.subject().label,
            f"the symbols of a {type(module).__qualname__} are taken from another plugin",
        )
        check(module in SymMap(module, table), "SymMap does not take the module")

    def test_symbols_fit_the_tensors(self, case: SymbolCase) -> None:
        """Protects users from pruning the wrong dimension, or half of one.

        Every width has a size, the tensors that it names have dimensions of that size or a
        multiple, and every parameter of the module belongs to a symbol: what no symbol names would
        keep its shape while the module changes.
        """
        module, info = self._info(case)
        wrong: list[str] = []
        for name, symbol in info:
            if symbol.size is None and (symbol.is_cross_layer or symbol.tensors):
                wrong.append(f"{name} has no size: give size=, the module has no integer {name}")
                continue
            for tensor, dims in symbol.tensors.items():
                shape = _shape(module, tensor)
                for dim in dims if shape is not None else ():
                    assert shape is not None
                    fits = dim < len(shape) and symbol.size and shape[dim] % symbol.size == 0
                    if not fits:
                        wrong.append(
                            f"{name} has size {symbol.size}, which dimension {dim} of {tensor} "
                            f"{list(shape)} has not"
                        )
        held = {name for _, symbol in info for name in symbol.tensors}
        wrong += [
            f"no symbol names {name} {list(p.shape)}: give tensors="
            for name, p in module.named_parameters(recurse=False)
            if name not in held and p.numel() > 1
        ]
        check(not wrong, "; ".join(wrong))

    def test_symbols_are_true(self, case: SymbolCase) -> None:
        """Protects users from a model that computes something else after pruning or sorting.

        The dimensions that symbols name have their sizes, and reordering the coordinates of a
        sortable symbol in the module's tensors and inputs reorders the output, or nothing.
        """
        module, info = self._info(case)
        if case.inputs is None:
            pytest.skip("the case gives no inputs")
        module.eval()
        given = case.inputs(torch.Generator().manual_seed(0))
        with torch.no_grad():
            output = _first(module(*given))
        _check_sizes(info, given, output)
        for symbols in _tied(info):
            _check_reordering(module, info, symbols, given, output)

    # --- helpers ---

    def _rules(self) -> list[SymbolRule]:
        return self.subject().call("register_symbols")

    def _match(self, module: nn.Module) -> SymbolRule:
        self.subject().need_loaded()
        label = self.subject().label
        table: ClassTable[SymbolRule] = ClassTable([(r, label, False) for r in self._rules()])
        found = table.find(module)
        check(isinstance(found, Match), f"no rule takes a {type(module).__qualname__}")
        assert isinstance(found, Match)
        rule: SymbolRule = found.rule
        return rule

    def _info(self, case: SymbolCase) -> tuple[nn.Module, SymInfo]:
        """Return the module and its symbols; skips where another test says that there are none."""
        module = _made(case)
        function = resolve(self._match(module).symbols, plugin=self.subject().label)
        info = function(module)
        if not isinstance(info, SymInfo):
            pytest.skip("the function returns no SymInfo")
        info.bind(module)
        return module, info


def check_target(target: str, label: str) -> None:
    """Fail unless a target names the module that defines a class."""
    cls = resolve(target, plugin=label)
    check(isinstance(cls, type), f"the target {target!r} is no class")
    own = target_of(cls)
    check(own == target, f"the target {target!r} names a re-export; write {own!r}")


def _made(case: SymbolCase) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.make()


def _shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the shape of a tensor; ``None`` where this module has none, as a bias left out."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return tuple(found.shape) if isinstance(found, Tensor) else None


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else output
    check(isinstance(found, Tensor), f"the module returns a {type(found).__name__}, no tensor")
    assert isinstance(found, Tensor)
    return found


def _tied(info: SymInfo) -> list[list[tuple[str, Symbol]]]:
    """Return the symbols that are one, those that may be reordered."""
    by_root: dict[Symbol, list[tuple[str, Symbol]]] = {}
    for name, symbol in info:
        if symbol.is_sortable and not symbol.parts and (symbol.is_cross_layer or symbol.tensors):
            by_root.setdefault(symbol.root, []).append((name, symbol))
    return list(by_root.values())


def _dim(name: str, symbol: Symbol, tensor: Tensor, what: str) -> int:
    """Return the dimension of a tensor that a symbol names."""
    rank = tensor.dim()
    dims = {d % rank for d in symbol.elastic_dims if -rank <= d < rank}
    said = sorted(symbol.elastic_dims)
    check(len(dims) == 1, f"elastic_dims {said} of {name} name no one dimension of {what}")
    return dims.pop()


def _check_sizes(info: SymInfo, given: tuple[Any, ...], output: Tensor) -> None:
    for name, symbol in info:
        places = []
        if symbol.is_outgoing:
            places.append((output, "the output", symbol.repeats))
        elif symbol.is_incoming and symbol.argument < len(given):
            places.append((given[symbol.argument], f"argument {symbol.argument}", 1))
        for tensor, what, repeats in places:
            if not isinstance(tensor, Tensor) or symbol.size is None:
                continue
            dim = _dim(name, symbol, tensor, what)
            check(
                tensor.shape[dim] == symbol.size * repeats,
                f"{name} is {symbol.size}, and dimension {dim} of {what} is {tensor.shape[dim]}",
            )


def _check_reordering(
    module: nn.Module,
    info: SymInfo,
    symbols: list[tuple[str, Symbol]],
    given: tuple[Any, ...],
    output: Tensor,
) -> None:
    size = symbols[0][1].size
    if size is None or size < 2:
        return
    order = shuffled(size)
    state = {name: t.detach().clone() for name, t in module.state_dict(keep_vars=True).items()}
    arguments, expected = list(given), output
    for name, symbol in symbols:
        for tensor, dims in symbol.tensors.items():
            for dim in dims if tensor in state else ():
                state[tensor] = move(state[tensor], dim, _blocks(order, state[tensor].shape[dim]))
        if symbol.is_outgoing:
            dim = _dim(name, symbol, output, "the output")
            expected = move(output, dim, _blocks(order, output.shape[dim]))
        elif symbol.is_incoming and symbol.argument < len(given):
            tensor_in = given[symbol.argument]
            if isinstance(tensor_in, Tensor):
                dim = _dim(name, symbol, tensor_in, f"argument {symbol.argument}")
                arguments[symbol.argument] = move(tensor_in, dim, order)
                if info.is_shape_preserving:
                    expected = move(output, dim, order)
    with torch.no_grad():
        found = _first(torch.func.functional_call(module, state, tuple(arguments)))
    names = " and ".join(name for name, _ in symbols)
    assert_close(expected, found, what=f"after reordering {names} it computes something else")


def _blocks(order: Tensor, length: int) -> Tensor:
    """Return the order of a dimension that holds blocks of ``order``'s size."""
    size = len(order)
    return torch.cat([order + start for start in range(0, length, size)])
