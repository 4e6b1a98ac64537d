"""Shared inputs and foldable scales, as running the model shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from tracing_zoo.physics import MemberLike, Subject, sharply, tensor_of

__all__ = ["FoldLike", "fold_error", "shared_inputs", "unexpected_shares"]

# What looks up or normalises does not multiply its input by a weight.
READS_NOTHING = (
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


class FoldLike(Protocol):
    """A producer whose output channels can take over a scale of its consumers' inputs."""

    @property
    def producer(self) -> str: ...
    @property
    def tensor(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def consumers(self) -> tuple[str, ...]: ...


# --- shared inputs --------------------------------------------------------------------------------


def shared_inputs(subject: Subject) -> set[frozenset[str]]:
    """Return the modules with a matrix that read the very same numbers in memory.

    The same numbers in another shape are the same tensor, in another order they are not, nor is a
    tensor that was written to in between.
    """
    readers: dict[tuple[int, ...], set[str]] = {}
    alive: list[Tensor] = []  # or an address would be used twice

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            for tensor in tensors[: _inputs_of(module)]:
                alive.append(tensor)
                layout = () if tensor.is_contiguous() else (*tensor.shape, *tensor.stride())
                place = (tensor.data_ptr(), tensor.numel(), tensor._version, *layout)
                readers.setdefault(place, set()).add(path)

        return hook

    handles = [
        module.register_forward_pre_hook(note(path), with_kwargs=True)
        for path, module in subject.model.named_modules()
        if _reads(module)
    ]
    try:
        with sharply():
            subject.model(**subject.calls[0])
    finally:
        for handle in handles:
            handle.remove()
    return {frozenset(paths) for paths in readers.values() if len(paths) > 1}


def _reads(module: nn.Module) -> bool:
    if isinstance(module, READS_NOTHING):
        return False
    leaf = isinstance(module, nn.MultiheadAttention) or not any(module.children())
    own = module._parameters.items()
    return leaf and any(p is not None and p.ndim > 1 and "weight" in n for n, p in own)


def _inputs_of(module: nn.Module) -> int:
    """Routers and recurrences get masks and states behind their input; attention reads three."""
    return 3 if isinstance(module, nn.MultiheadAttention) else 1


def unexpected_shares(
    subject: Subject, claimed: Iterable[tuple[str, ...]]
) -> tuple[set[frozenset[str]], set[frozenset[str]]]:
    """Return what the trace missed and what it invented, among modules whose inputs are seen.

    Tensors of fused experts are no modules of their own, so no hook sees what they read.
    """
    truth = shared_inputs(subject)
    seen = {path for path, module in subject.model.named_modules() if _reads(module)}
    mine = {frozenset(path for path in paths if path in seen) for paths in claimed}
    mine = {paths for paths in mine if len(paths) > 1}
    return truth - mine, mine - truth


# --- foldable scales ------------------------------------------------------------------------------


def fold_error(subject: Subject, fold: FoldLike, *, seed: int = 0) -> float:
    """Return how much the output changes if a scale moves from the consumers to the producer.

    Random positive numbers multiply the rows of what the fold says is scaled, and divide the rows
    of what it says is divided. A fold that does not say (written by hand) scales the rows of its
    tensor and its bias, and divides columns: a consumer with more columns than there are channels
    reads them repeated, in blocks of some size, and the best size counts.
    """
    generator = Generator().manual_seed(seed)
    scaled, divided = getattr(fold, "scaled", ()), getattr(fold, "divided", ())
    if scaled:
        scale = _scales(len(scaled[0].index), generator)
        changes = (
            change
            for members, by in ((scaled, scale), (divided, 1 / scale))
            for change in _multiplied(subject.model, members, by)
        )
        return subject.changed(changes)
    producer = subject.model.get_submodule(fold.producer)
    weight = getattr(producer, fold.tensor)
    dim = fold.dim % weight.ndim
    scale = _scales(weight.shape[dim], generator)
    fixed = [(weight, weight * _along(scale, weight, dim))]
    bias = getattr(producer, "bias", None)
    if isinstance(bias, Tensor) and bias is not weight:
        fixed.append((bias, bias * scale))
    blocks = [n for n in range(1, len(scale) + 1) if len(scale) % n == 0]
    return min(
        subject.changed([*fixed, *_divided(subject.model, fold, scale, block)])
        for block in (blocks if _repeats(subject.model, fold, len(scale)) else blocks[:1])
    )


def _scales(count: int, generator: Generator) -> Tensor:
    """Return numbers far enough from 1 that a clipped activation is met."""
    return (6 * torch.rand(count, generator=generator, dtype=torch.float64) - 3).exp()


def _multiplied(
    model: nn.Module, members: Iterable[MemberLike], scale: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Multiply each tensor dimension once, however many names it has."""
    done: set[tuple[int, int, tuple[int, ...]]] = set()
    for member in members:
        tensor, index = tensor_of(model, member), torch.as_tensor(member.index)
        dim = member.dim % tensor.ndim
        key = (id(tensor), dim, tuple(index.flatten().tolist()))
        if key not in done:
            done.add(key)
            factors = torch.ones(tensor.shape[dim], dtype=tensor.dtype)
            factors[index.flatten()] = scale.repeat_interleave(index.shape[1])
            yield tensor, tensor * _along(factors, tensor, dim)


def _repeats(model: nn.Module, fold: FoldLike, channels: int) -> bool:
    return any(
        weight.shape[dim] * groups != channels
        for weight, dim, groups in _columns(model, fold, channels)
    )


def _divided(
    model: nn.Module, fold: FoldLike, scale: Tensor, block: int
) -> Iterator[tuple[Tensor, Tensor]]:
    done: set[int] = set()
    for weight, dim, groups in _columns(model, fold, len(scale)):
        if id(weight) in done:
            continue
        done.add(id(weight))
        width = weight.shape[dim] * groups
        times = width // len(scale)
        columns = scale.view(-1, block).repeat_interleave(times, 0).flatten()
        if groups == 1:
            yield weight, weight / _along(columns, weight, dim)
        else:  # Each block of output rows reads its own channels.
            rows = weight.unflatten(0, (groups, -1))
            own = columns.view(groups, 1, -1, *[1] * (weight.ndim - 2))
            yield weight, (rows / own).flatten(0, 1)


def _columns(model: nn.Module, fold: FoldLike, channels: int) -> Iterator[tuple[Tensor, int, int]]:
    """Return each consumer's weight, its input dimension, and its number of groups."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in fold.consumers:
        module = modules.get(name)
        if module is None:  # a tensor of fused experts
            path, _, tensor = name.rpartition(".")
            weight = getattr(modules[path], tensor)
            dims = [d for d in range(1, weight.ndim) if weight.shape[d] == channels]
            assert len(dims) == 1, f"{name} {tuple(weight.shape)} reads {channels} channels where?"
            yield weight, dims[0], 1
        elif isinstance(module, nn.RNNBase):
            yield from (
                (weight, 1, 1)
                for n, weight in module.named_parameters()
                if n.startswith("weight_ih_l0")
            )
        elif isinstance(module, nn.MultiheadAttention):
            yield module.in_proj_weight, 1, 1
        else:
            transposed = type(module).__name__ == "Conv1D" or getattr(module, "transposed", False)
            yield module.weight, 0 if transposed else 1, getattr(module, "groups", 1)


def _along(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    return vector.view([-1 if d == dim else 1 for d in range(like.ndim)])
