"""The blocks of a model, in order: what sequential calibration goes through.

A block is one of many alike: a decoder layer, a stage of a network of convolutions. Adapters name
them; without one they are the outermost lists whose children have one class. Everything that is
planned and in no block makes up two more parts, before the first block and after the last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from bittern.nn import original_class
from bittern.records import ModelAdapter, Plan

__all__ = ["Part", "block_of", "find_chains", "find_parts"]


@dataclass(frozen=True)
class Part:
    """A part of a model that is calibrated at once.

    Attributes:
        name: Path of the block; of what is in no block, ``""``.
        modules: Paths of its planned modules.
    """

    name: str
    modules: tuple[str, ...]


def find_chains(model: nn.Module, adapter: ModelAdapter) -> tuple[tuple[str, ...], ...]:
    """Return the paths of the blocks: a chain for every list of them, in the model's order.

    Args:
        model: Any model.
        adapter: What its framework knows.
    """
    if adapter.blocks:
        chains: dict[str, list[str]] = {}
        for path in adapter.blocks:
            chains.setdefault(path.rpartition(".")[0], []).append(path)
        return tuple(map(tuple, chains.values()))
    return tuple(_lists(model, ""))


def find_parts(
    plan: Plan, chains: Sequence[Sequence[str]], *, early: Collection[str]
) -> tuple[Part, ...]:
    """Return the parts of a model that hold planned modules, in order.

    Args:
        plan: Who is quantized.
        chains: The blocks, from `find_chains`.
        early: Those modules in no block that run before the first block.
    """
    blocks = [path for chain in chains for path in chain]
    before: list[str] = []
    after: list[str] = []
    inside: dict[str, list[str]] = {path: [] for path in blocks}
    for path in plan.modules:
        block = block_of(path, chains)
        if block is not None:
            inside[block].append(path)
        else:
            (before if path in early else after).append(path)
    parts = [Part("", tuple(before)), *(Part(name, tuple(found)) for name, found in inside.items())]
    return tuple(part for part in (*parts, Part("", tuple(after))) if part.modules)


def block_of(path: str, chains: Sequence[Sequence[str]]) -> str | None:
    """Return the block that a module is in, ``None`` for what is in none."""
    blocks = {name for chain in chains for name in chain}
    while path and path not in blocks:
        path = path.rpartition(".")[0]
    return path or None


def _lists(module: nn.Module, path: str) -> Iterator[tuple[str, ...]]:
    """Yield the outermost lists of two or more children of one class that have weights."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        children = list(child.children())
        kinds = {original_class(c) for c in children}
        listed = isinstance(child, nn.ModuleList | nn.Sequential)
        alike = len(children) > 1 and len(kinds) == 1
        if listed and alike and all(any(True for _ in c.children()) for c in children):
            yield tuple(f"{inner}.{key}" for key, _ in child.named_children())
        else:
            yield from _lists(child, inner)
