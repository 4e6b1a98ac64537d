"""What a choice costs: stored bits and bytes, scales included, and measured seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bittern.errors import PlanError
from bittern.nn.computed import sources_of
from bittern.records import PlanEntry
from bittern.search.candidates import AS_IS, Candidates
from bittern.search.groups import DecisionGroup

__all__ = ["Cost", "Latency", "Ledger"]

Latency = Mapping[str, Mapping[str, float]] | Callable[[str, str], float]


@dataclass(frozen=True)
class Cost:
    """What one choice for one group costs.

    Attributes:
        bits: Stored bits of its weights.
        bytes: What it adds to the model's bytes.
        seconds: Its measured latency; 0 where none was given.
    """

    bits: int
    bytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class _Weight:
    """One weight that some candidate quantizes.

    Attributes:
        key: What tells it from others; that of a tied weight is the same at every place.
        elements: Number of elements.
        bits: Stored bits per element as it is.
        bytes: Stored bytes as it is.
        read_elsewhere: Whether somebody outside of the search reads it, so that it stays in the
            file as it is.
    """

    key: int | str
    elements: int
    bits: int
    bytes: int
    read_elsewhere: bool


class Ledger:
    """Knows what every choice costs, counted as `bittern.records.Plan.bytes_after` counts.

    Args:
        model: The model.
        candidates: What may be chosen.
        modules: The modules there is a choice for.
        dtype: Name of the dtype that floating-point tensors have on disk, where that is not the
            one in memory.
        latency: Module path to candidate (or ``"none"``) to seconds, or a function of both.

    Attributes:
        base: Bytes of everything there is no choice about.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        modules: Iterable[str],
        *,
        dtype: str | None = None,
        latency: Latency | None = None,
    ) -> None:
        self._candidates = {one.name: one for one in candidates.every}
        self._latency = latency
        self._width = getattr(torch, dtype).itemsize if dtype is not None else None
        self._weights: dict[str, dict[str, _Weight]] = {}  # by module and name of the tensor
        self._collect(model, candidates, tuple(modules))

    def _collect(self, model: nn.Module, candidates: Candidates, modules: tuple[str, ...]) -> None:
        live = dict(model.named_modules(remove_duplicate=False))
        tensors = {
            (path, entry.tensor): entry.shape
            for one in candidates.every
            for path in modules
            for entry in one.entries.get(path, {}).values()
            if entry.tensor is not None and entry.shape is not None
        }
        places = {(id(live[path]), tensor) for path, tensor in tensors}
        everything: dict[int, int] = {}
        outside: set[int] = set()
        homes = [sources_of(path, tensor) for path, tensor in tensors]
        computed = tuple(f"{home}." for home in homes if home in live)
        sources: dict[str, int] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            size = everything[id(tensor)] = tensor.numel() * self._item(tensor)
            path, _, local = name.rpartition(".")
            source = next((s for s in computed if name.startswith(s)), None)
            if source is not None:
                sources[source] = sources.get(source, 0) + size
            elif (id(live.get(path)), local) not in places:
                outside.add(id(tensor))
        self.base = sum(size for key, size in everything.items() if key in outside)
        for (path, tensor), shape in tensors.items():
            source = f"{sources_of(path, tensor)}."
            elements = math.prod(shape)
            found = getattr(live[path], tensor) if source not in computed else None
            item = self._item(found) if found is not None else self._width or 4
            self._weights.setdefault(path, {})[tensor] = _Weight(
                key=id(found) if found is not None else source,
                elements=elements,
                bits=8 * item,
                bytes=sources[source] if found is None else elements * item,
                read_elsewhere=found is not None and id(found) in outside,
            )

    def _item(self, tensor: Tensor) -> int:
        known = self._width is not None and tensor.is_floating_point()
        return self._width if known and self._width is not None else tensor.element_size()

    def elements(self, group: DecisionGroup) -> int:
        """Return how many elements the weights of a group have."""
        return sum({w.key: w.elements for w in self._of(group).values()}.values())

    def cost(self, group: DecisionGroup, choice: str) -> Cost:
        """Return what a choice costs.

        Raises:
            PlanError: A latency is missing or no number of seconds.
        """
        kept: dict[int | str, _Weight] = {}
        stored: dict[tuple[int | str, str], int] = {}
        entries = {} if choice == AS_IS else self._candidates[choice].entries
        for (path, tensor), weight in self._of(group).items():
            entry = _of_tensor(entries.get(path, {}), tensor)
            if entry is None or entry.shape is None:
                kept[weight.key] = weight
            else:
                bits = entry.spec.bits_per_element(entry.shape) * weight.elements
                stored[weight.key, str(entry.spec)] = round(bits)
        as_is = [weight for weight in kept.values() if not weight.read_elsewhere]
        return Cost(
            bits=sum(w.bits * w.elements for w in kept.values()) + sum(stored.values()),
            bytes=sum(w.bytes for w in as_is) + sum(-(-bits // 8) for bits in stored.values()),
            seconds=sum(self._seconds(path, choice) for path in group.members),
        )

    def _of(self, group: DecisionGroup) -> dict[tuple[str, str], _Weight]:
        return {
            (path, tensor): weight
            for path in group.members
            for tensor, weight in self._weights.get(path, {}).items()
        }

    def _seconds(self, path: str, choice: str) -> float:
        if self._latency is None:
            return 0.0
        if isinstance(self._latency, Mapping):
            found = self._latency.get(path, {}).get(choice)
        else:
            found = self._latency(path, choice)
        if not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
            raise PlanError(
                f"its latency with {choice!r} is {found!r}",
                where=path,
                hint="give seconds for every module and candidate, and for 'none'",
            )
        return float(found)


def _of_tensor(slots: Mapping[str, PlanEntry], tensor: str) -> PlanEntry | None:
    return next((entry for entry in slots.values() if entry.tensor == tensor), None)
