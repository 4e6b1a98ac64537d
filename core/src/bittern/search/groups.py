"""Decision groups: the modules that get one choice together."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bittern.calibration.blocks import block_of, find_chains
from bittern.errors import PluginError
from bittern.records import ModelAdapter, PlanEntry
from bittern.runtime import Batch
from bittern.search.candidates import Candidates, matching
from bittern.search.context import SearchSteps

__all__ = ["DecisionGroup", "find_groups", "group_modules"]

log = logging.getLogger("bittern.search")


@dataclass(frozen=True)
class DecisionGroup:
    """Modules that choose together.

    Attributes:
        members: Their paths, in the model's order.
    """

    members: tuple[str, ...]

    @property
    def outermost(self) -> dict[str, tuple[str, ...]]:
        """Paths of the members that are within no other, to those within them and themselves."""
        outer = [path for path in self.members if _above(path, self.members) is None]
        return {
            path: tuple(p for p in self.members if p == path or _above(p, [path]) is not None)
            for path in outer
        }

    @property
    def name(self) -> str:
        """The members in one word: ``"layers.0.{q,k,v}"``."""
        if len(self.members) == 1:
            return self.members[0]
        parts = [path.split(".") for path in self.members]
        common = 0
        while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
            common += 1
        rest = ",".join(".".join(p[common:]) for p in parts)
        return ".".join([*parts[0][:common], f"{{{rest}}}"])


def find_groups(
    model: nn.Module,
    candidates: Candidates,
    modules: Sequence[str],
    *,
    batch: Batch,
    steps: SearchSteps,
    patterns: Sequence[str] = (),
) -> tuple[tuple[DecisionGroup, ...], tuple[str, ...]]:
    """Find which modules have to choose together.

    These are the modules that multiply one tensor, as the trace says (q, k and v; gate and up):
    engines fuse them, and they have one input quantizer. And those that hold one parameter, and
    those of which one is within another (torch's attention and its output projection).

    Args:
        model: The model.
        candidates: What may be chosen.
        modules: The modules there is a choice for.
        batch: What the model is traced on.
        steps: The steps.
        patterns: Globs: what one of them means within one block chooses together as well.

    Returns:
        The groups in the model's order, and what people should know.
    """
    together: list[tuple[str, ...]] = []
    notes: tuple[str, ...] = ()
    try:
        trace = steps.trace(model, batch.args if batch.args else dict(batch.kwargs))
        together += trace.shared_inputs
    except PluginError:
        raise
    except Exception as error:  # every module can choose alone
        log.warning("the model was not traced: %s: %s", type(error).__name__, error)
        notes = (f"the model was not traced, so every module chooses alone: {error}",)
    together += _tied(model, candidates) + _nested(modules)
    together += _alike(model, modules, patterns, steps.adapter(model))
    return group_modules(modules, together), notes


def group_modules(
    modules: Sequence[str], together: Iterable[Sequence[str]]
) -> tuple[DecisionGroup, ...]:
    """Bring modules together that any of some sets names in one breath.

    Args:
        modules: Paths of modules, in the model's order.
        together: Sets of paths, or of full names of their tensors; others are passed by.
    """
    leader = {path: path for path in modules}

    def find(path: str) -> str:
        while leader[path] != path:
            path = leader[path]
        return path

    for names in together:
        known = [n if n in leader else n.rpartition(".")[0] for n in names]
        mine = [find(path) for path in known if path in leader]
        for other in mine[1:]:
            leader[find(other)] = find(mine[0])
    groups: dict[str, list[str]] = {}
    for path in modules:
        groups.setdefault(find(path), []).append(path)
    return tuple(DecisionGroup(tuple(members)) for members in groups.values())


def _alike(
    model: nn.Module, modules: Sequence[str], patterns: Sequence[str], adapter: ModelAdapter
) -> list[tuple[str, ...]]:
    """Return what the user wants to choose together, block by block."""
    chains = find_chains(model, adapter)
    found: list[tuple[str, ...]] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        mine = matching([pattern], modules)
        blocks: dict[str | None, list[str]] = {}
        for path in modules:
            if path in mine:
                blocks.setdefault(block_of(path, chains), []).append(path)
        found += map(tuple, blocks.values())
    return found


def _nested(modules: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the modules with those that they are within."""
    pairs = [(_above(path, modules), path) for path in modules]
    return [(outer, path) for outer, path in pairs if outer is not None]


def _above(path: str, modules: Collection[str]) -> str | None:
    """Return the innermost of some modules that another one is within, if there is one."""
    known = set(modules)
    while path:
        path = path.rpartition(".")[0]
        if path in known:
            return path
    return None


def _tied(model: nn.Module, candidates: Candidates) -> list[tuple[str, ...]]:
    """Return the modules that hold one parameter."""
    readers: dict[int, dict[str, None]] = {}
    live = dict(model.named_modules(remove_duplicate=False))
    for candidate in candidates.every:
        for path, slots in candidate.entries.items():
            for tensor in _tensors(slots):
                parameter = live[path]._parameters.get(tensor)
                if parameter is not None:
                    readers.setdefault(id(parameter), {})[path] = None
    return [tuple(paths) for paths in readers.values() if len(paths) > 1]


def _tensors(slots: Mapping[str, PlanEntry]) -> list[str]:
    return [entry.tensor for entry in slots.values() if entry.tensor is not None]
