"""What the tests of the symbolic path share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bittern.tracing.symbolic import Symbol, SymMap, index_map


def searchable(symbols: SymMap) -> set[str]:
    """Names of the searchable widths: kernel sizes and depths left out."""
    return {
        name
        for name, symbol in symbols.named_symbols(searchable=True)
        if symbol.is_outgoing and not symbol.parts
    }


def followers(symbols: SymMap) -> dict[str, set[str]]:
    """Every searchable width, with the symbols that follow it, also as one part of several."""
    names = {symbol: name for name, symbol in symbols.named_symbols()}
    found: dict[str, set[str]] = {name: set() for name in searchable(symbols)}
    for name, symbol in symbols.named_symbols():
        for leaf in symbol.leaves:
            if leaf is not symbol and names.get(leaf) in found:
                found[names[leaf]].add(name)
    return found


def permuted(model: nn.Module, symbols: SymMap, root: Symbol, order: Tensor) -> nn.Module:
    """A copy of the model in which the coordinates of a width are in another order, everywhere."""
    changed = copy.deepcopy(model)
    done: set[tuple[int, int]] = set()
    for module, by_name in symbols.items():
        path = symbols.name_of(module)
        for symbol in by_name.values():
            rows = index_map(symbol).get(root) if root in symbol.leaves else None
            if rows is None:
                continue
            for tensor_name, dims in symbol.tensors.items():
                owner, _, attribute = f"{path}.{tensor_name}".strip(".").rpartition(".")
                tensor = getattr(changed.get_submodule(owner), attribute, None)
                for dim in dims if tensor is not None else ():
                    if (id(tensor), dim) not in done:
                        done.add((id(tensor), dim))
                        _permute(tensor, dim, rows, order, width=symbol.size or 0)
    assert done
    return changed


def _permute(tensor: Tensor, dim: int, rows: Tensor, order: Tensor, *, width: int) -> None:
    source = torch.arange(tensor.shape[dim])
    for block in range(0, tensor.shape[dim], width):
        source[block + rows.flatten()] = block + rows[order].flatten()
    with torch.no_grad():
        tensor.copy_(tensor.index_select(dim, source))


def check_permutations(model: nn.Module, symbols: SymMap, *inputs: Tensor) -> int:
    """Permute every searchable, sortable width on its own; the outputs stay. Return how many."""
    model = model.eval()
    count = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        expected = model(*inputs)
        for name, root in symbols.named_symbols(searchable=True):
            if not root.is_outgoing or root.parts or not root.is_sortable:
                continue
            assert root.size
            order = torch.arange(root.size).roll(1)
            changed = permuted(model, symbols, root, order)
            torch.testing.assert_close(
                changed(*inputs), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
            count += 1
    return count
