"""What the tests of the symbolic path share: names of widths, and the physical checks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bittern.tracing.symbolic import Symbol, SymMap, index_map

Change = tuple[nn.Module, str, int, Tensor]


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


def members(symbols: SymMap, root: Symbol) -> list[tuple[str, str, Symbol]]:
    """Module path, name and symbol of everything that has the width."""
    return [
        (symbols.name_of(module), name, symbol)
        for module, by_name in symbols.items()
        for name, symbol in by_name.items()
        if root in symbol.leaves
    ]


def reordered(
    model: nn.Module,
    found: list[tuple[str, str, Symbol]],
    root: Symbol,
    order: Tensor,
) -> nn.Module:
    """A copy of the model whose coordinates of a width are ``order``, in all of its tensors.

    ``order`` may leave coordinates out: the model is then narrower.
    """
    changed = copy.deepcopy(model)
    done: set[tuple[int, int]] = set()
    for path, name, symbol in found:
        module = changed.get_submodule(path)
        rows = index_map(symbol)[root]
        total = symbol.size or 0
        kept = torch.arange(total)
        kept[rows.flatten()] = -1
        kept[rows[: len(order)].flatten()] = rows[order].flatten()
        kept = kept[kept >= 0]
        for tensor_name, dims in symbol.tensors.items():
            owner, _, attribute = tensor_name.rpartition(".")
            holder = module.get_submodule(owner)
            tensor = getattr(holder, attribute, None)
            for dim in dims if tensor is not None else ():
                if (id(tensor), dim) in done:
                    continue
                starts = torch.arange(0, tensor.shape[dim], total)
                index = (starts[:, None] + kept).flatten()
                tensor.data = tensor.data.index_select(dim, index)
                done.add((id(tensor), dim))
        if len(kept) < total:
            _tell(module, name, len(kept))
    return changed


def _tell(module: nn.Module, name: str, size: int) -> None:
    """Let a module know its new width where its forward reads it."""
    if isinstance(getattr(module, name, None), int):
        setattr(module, name, size)
    if getattr(module, "groups", 1) > 1:
        module.groups = size
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (*module.normalized_shape[:-1], size)


def check_widths(model: nn.Module, symbols: SymMap, *inputs: Tensor, all_used: bool = True) -> int:
    """Check every searchable, sortable width physically; return how many there are.

    In another order, in all tensors that are tied, the outputs stay; with one of them left as it
    was they do not (if all modules are used). With coordinates taken away everywhere the model
    still runs.
    """
    model = model.eval()
    count = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        expected = model(*inputs)
        for name, root in symbols.named_symbols(searchable=True):
            if not root.is_outgoing or root.parts or not root.is_sortable:
                continue
            assert root.size
            found = members(symbols, root)
            order = torch.arange(root.size).roll(1)
            output = reordered(model, found, root, order)(*inputs)
            torch.testing.assert_close(
                output, expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
            if root.size > 1:
                for one in found if all_used else ():
                    if _alone(model, one):
                        rest = [other for other in found if other is not one]
                        output = reordered(model, rest, root, order)(*inputs)
                        assert not torch.allclose(output, expected, rtol=1e-5, atol=1e-6), (
                            f"{name} is tied to {one[0]}.{one[1]}, which does not need it"
                        )
                if not any(isinstance(m, nn.RNNBase) for m in model.modules()):
                    narrow = reordered(model, found, root, torch.arange(1, root.size))
                    assert narrow(*inputs).shape == expected.shape
            count += 1
    return count


def _alone(model: nn.Module, member: tuple[str, str, Symbol]) -> bool:
    """Whether the symbol has tensors that no other module has too."""
    path, _, symbol = member
    own = dict(model.get_submodule(path).named_parameters())
    shared = [p for _, p in model.named_parameters(remove_duplicate=False)]
    present = [own[name] for name in symbol.tensors if name in own]
    return bool(present) and all(sum(p is q for q in shared) == 1 for p in present)
