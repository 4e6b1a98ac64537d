"""How much a model suffers when one group of its modules is quantized: three measures.

Each function takes one batch through a converted and calibrated model and returns, by group, a sum
and the count it is to be divided by when all batches are through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bittern.errors import CalibrationError, RecipeError
from bittern.records import ModelAdapter
from bittern.registry import nearest
from bittern.runtime import Batch, evaluating
from bittern.search.groups import DecisionGroup
from bittern.search.losses import LossFunction, distance, loss_of
from bittern.search.watch import only, watching

__all__ = ["METHODS", "Probe", "Sums", "measure_of"]

Sums = dict[str, tuple[float, float]]  # name of a group to a sum and its count


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a measure works with.

    Attributes:
        model: The converted model.
        groups: The groups it is about: those that the running candidate quantizes.
        adapter: What the model's framework knows.
        loss: The loss of the measure ``gradient``; ``None`` takes `loss_of`.
    """

    model: nn.Module
    groups: Sequence[DecisionGroup]
    adapter: ModelAdapter
    loss: LossFunction | None = None

    @property
    def owners(self) -> dict[str, str]:
        """Path of a module to look at to the name of its group."""
        return {path: group.name for group in self.groups for path in group.outermost}

    @property
    def watched(self) -> dict[str, tuple[str, ...]]:
        """Path of a module to look at to those that quantize when it is run again."""
        return {path: inner for g in self.groups for path, inner in g.outermost.items()}


def by_gradient(probe: Probe, batch: Batch, index: int) -> Sums:
    """Return the second-order estimate of the loss that rounding costs, in nats per prediction.

    Half of ``(g . d)^2``, where ``d`` is what rounding does to a module's output at one position
    and ``g`` the gradient of the loss by that output: the loss's second-order term, with the Fisher
    information in the place of the Hessian (as in Optimal Brain Surgeon and its descendants).
    """
    model, owners = probe.model, probe.owners
    sums: dict[str, list[Tensor]] = {path: [] for path in owners}

    def then(path: str, own: Tensor, rounded: Tensor) -> Tensor:
        difference = (rounded - own).detach()
        # A clone, since what comes next may write into it, which a leaf does not allow.
        tracked = own if own.requires_grad else own.detach().requires_grad_().clone()

        def arrived(gradient: Tensor) -> None:
            product = gradient.float() * difference.float()
            along = product.sum(_features(product, model.get_submodule(path)))
            sums[path].append(along.double().square().sum() / 2)

        tracked.register_hook(arrived)  # type: ignore[no-untyped-call]
        sums[path].append(torch.zeros((), dtype=torch.float64, device=own.device))
        return tracked

    with evaluating(model), torch.enable_grad(), watching(model, probe.watched, then):
        output = batch.run(model)
        if probe.loss is not None:
            loss, count = probe.loss(output, batch), float(batch.rows)
        else:
            loss, predictions = loss_of(output, batch, probe.adapter, index=index)
            count = float(predictions)
        if not loss.requires_grad:
            raise CalibrationError(
                "the loss does not depend on any module that could be quantized",
                hint='let it be computed from the model\'s output; or use method="kl" or "layer"',
            )
        loss.backward()  # type: ignore[no-untyped-call]
    return _by_group(owners, {p: (_total(parts), count) for p, parts in sums.items() if parts})


def by_divergence(probe: Probe, batch: Batch, index: int) -> Sums:
    """Return the divergence of the whole model's predictions with one group quantized, in nats."""
    model, adapter = probe.model, probe.adapter
    seen: set[str] = set()
    found: Sums = {}
    with evaluating(model):
        with _noticing(model, probe.owners, seen), only(model, ()):
            truth = batch.run(model)
        for group in probe.groups:
            if seen.isdisjoint(group.members):
                continue
            with only(model, group.members):
                output = batch.run(model)
            lost, keep = distance(truth, output, batch, adapter)
            total = torch.where(keep, lost, 0.0).double().sum()
            found[group.name] = (float(total), float(keep.sum()))
    return found


def by_layer(probe: Probe, batch: Batch, index: int) -> Sums:
    """Return the squared error of a group's outputs over their squared size: needs no labels."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in probe.owners}

    def then(path: str, own: Tensor, rounded: Tensor) -> Tensor:
        error = (rounded.float() - own.float()).double().square().sum()
        parts[path].append((error, own.float().double().square().sum()))
        return own

    with evaluating(probe.model), watching(probe.model, probe.watched, then):
        batch.run(probe.model)
    sums = {
        path: (_total([error for error, _ in seen]), _total([size for _, size in seen]))
        for path, seen in parts.items()
        if seen
    }
    return _by_group(probe.owners, sums, together=True)


def _features(output: Tensor, module: nn.Module) -> int:
    """Return the axis of a module's output whose elements are one position's."""
    return 1 if isinstance(module, _ConvNd) and output.dim() > 2 else -1


def _total(parts: Sequence[Tensor]) -> float:
    return float(torch.stack(list(parts)).sum())


def _by_group(
    owners: Mapping[str, str], sums: Mapping[str, tuple[float, float]], *, together: bool = False
) -> Sums:
    """Add the sums of modules up; their counts too where each has one of its own."""
    found: Sums = {}
    for path, (total, count) in sums.items():
        before, known = found.get(owners[path], (0.0, 0.0))
        found[owners[path]] = (before + total, known + count if together else count)
    return found


@contextmanager
def _noticing(model: nn.Module, modules: Iterable[str], seen: set[str]) -> Iterator[None]:
    """Note which modules run."""
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: seen.add(path))
        for path in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Measure = Callable[[Probe, Batch, int], Sums]
METHODS: Mapping[str, Measure] = {"gradient": by_gradient, "kl": by_divergence, "layer": by_layer}


def measure_of(method: str) -> Measure:
    """Return the measure of a name.

    Raises:
        RecipeError: There is none.
    """
    if method not in METHODS:
        near = nearest(method, list(METHODS))
        raise RecipeError(
            f"there is no way to search called {method!r}",
            hint=f"did you mean {near[0]!r}? there are {', '.join(METHODS)}" if near else None,
        )
    return METHODS[method]
