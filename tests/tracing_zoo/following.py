"""Cutting rows out of a model's tensors, and letting the modules' attributes follow.

Classes of torch know their sizes from their tensors. Any other module that owns a member, or has
one below it, is searched for numbers that were sizes of what has been cut: the size of a cut
dimension, the number of coordinates, a number of heads. This needs models whose sizes differ from
each other, which the zoo takes care of; it is no way to prune a model of real life.

Where it is not clear, there are three modes to be tried: numbers follow that are one of the sizes;
multiples of them that are called a width do so too (all keys' width); or none does (a hidden size
that happens to be that of all heads).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tracing_zoo.attention import Unpacked, unpack
from tracing_zoo.physics import GroupLike, Part, parts_of

__all__ = ["HEAD_WIDTH", "MODES", "Cut", "Mode"]

COUNT = re.compile(r"(^|_)(n|num|heads?|groups?)(_|$)")
Mode = Literal["sizes", "widths", "none"]
MODES: tuple[Mode, ...] = ("sizes", "widths", "none")
HEAD_WIDTH = re.compile(r"(?<!all_)head_([a-z]_)?(dim|size)|dim_head|d_kv|rotary_n?dim")
WIDTH = re.compile(rf"{HEAD_WIDTH.pattern}|(hidden|head)_size|embed|width|_dim$")


class Cut:
    """A copy of a model without some coordinates of a group, or of several groups by one part.

    Attributes:
        model: The copy.
        kept: For every tensor name, the rows that are left of each dimension that was cut.
    """

    def __init__(
        self, model: nn.Module, cuts: Sequence[tuple[GroupLike, Tensor]], mode: Mode = "sizes"
    ) -> None:
        self.model = unpack(copy.deepcopy(model))
        group, coordinates = cuts[0]
        self._mode = mode
        self.before, self.after = group.size, group.size - len(coordinates)
        self.kept: dict[str, dict[int, Tensor]] = {}
        parts = [(part, gone) for group, gone in cuts for part in parts_of(self.model, group)]
        self._sizes = self._cut(parts)
        names = [name for part, _ in parts for name in part.names]
        for path in _paths(self.model, names):
            module = self.model.get_submodule(path)
            if not _follow_tensors(module, self.kept, path) and mode != "none":
                self._follow(module)

    def _cut(self, parts: list[tuple[Part, Tensor]]) -> dict[int, int]:
        """Cut every tensor once, whatever the number of its dimensions and slices in the groups."""
        stay: dict[int, dict[int, Tensor]] = {}
        for part, gone in parts:
            rows = stay.setdefault(id(part.tensor), {})
            default = torch.ones(part.tensor.shape[part.dim], dtype=torch.bool)
            rows.setdefault(part.dim, default)[part.index[gone].flatten()] = False
        sizes: dict[int, int] = {}
        for tensor in {id(part.tensor): part.tensor for part, _ in parts}.values():
            rows = {dim: mask.nonzero().flatten() for dim, mask in stay[id(tensor)].items()}
            new = tensor.detach()
            for dim, left in rows.items():
                sizes[tensor.shape[dim]] = len(left)
                new = new.index_select(dim, left)
            for module, name, path in _owners(self.model, tensor):
                keep = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
                setattr(module, name, keep)
                self.kept[path] = rows
        return sizes

    def _follow(self, module: nn.Module) -> None:
        self._follow_numbers(module)
        config = getattr(module, "config", None)
        if config is not None:
            own = copy.copy(config)
            self._follow_numbers(own)
            module.config = own

    def _follow_numbers(self, owner: Any) -> None:
        found = dict(vars(owner))
        widths = {v for k, v in found.items() if WIDTH.search(k) and isinstance(v, int)}
        for name, value in found.items():
            if name.startswith("_") or name == "layer_idx":
                continue
            if isinstance(value, list | tuple) and all(type(v) is int for v in value):
                new: Any = type(value)(self._sizes.get(v, v) for v in value)
            elif type(value) is int:
                new = self._number(name, value, counts=self.before not in widths)
            else:
                continue
            if new != value:
                setattr(owner, name, new)

    def _number(self, name: str, value: int, *, counts: bool) -> int:
        counted = counts and COUNT.search(name) and not WIDTH.search(name)
        counted = counted or HEAD_WIDTH.search(name)
        if value % self.before == 0 and (
            counted or (self._mode == "widths" and WIDTH.search(name))
        ):
            return value * self.after // self.before
        if value == self.before:
            return self.after
        return self._sizes.get(value, value)


def _owners(model: nn.Module, tensor: Tensor) -> Iterator[tuple[nn.Module, str, str]]:
    for path, module in list(model.named_modules()):
        for name, own in [*module._parameters.items(), *module._buffers.items()]:
            if own is tensor:
                yield module, name, f"{path}.{name}".lstrip(".")


def _paths(model: nn.Module, names: list[str]) -> list[str]:
    """Return the modules from each owner up to the smallest one that holds all of them."""
    owners = [name.rpartition(".")[0].split(".") for name in names]
    common = 0
    while all(len(o) > common for o in owners) and len({o[common] for o in owners}) == 1:
        common += 1
    found = {".".join(o[:n]): None for o in owners for n in range(len(o), common - 1, -1)}
    if common == 0:
        found[""] = None
    modules = dict(model.named_modules(remove_duplicate=False))
    return [path for path in found if path in modules]


def _follow_tensors(module: nn.Module, kept: dict[str, dict[int, Tensor]], path: str) -> bool:
    """Set the sizes of a class of torch from its tensors; say whether it is one."""
    weight = getattr(module, "weight", None)
    rows = kept.get(f"{path}.weight".lstrip("."), {})
    rows = rows or kept.get(f"{path}.parametrizations.weight.original1", {})  # weight norm
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        blocks = _blocks(rows.get(0), module.num_channels, module.num_groups)
        module.num_groups, module.num_channels = blocks, len(weight)
    elif isinstance(module, _NormBase):
        module.num_features = len(weight if weight is not None else module.running_mean)
    elif isinstance(module, _ConvNd):
        grouped = 0  # Both kinds of convolution have their groups in dimension 0.
        module.groups = _blocks(rows.get(grouped), _length(module), module.groups)
        out, inp = weight.shape[0], weight.shape[1] * module.groups
        if isinstance(module, _ConvTransposeNd):
            inp, out = out, inp
        module.out_channels, module.in_channels = out, inp
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.RNNBase):
        module.input_size = module.weight_ih_l0.shape[1]
        module.hidden_size = module.weight_hh_l0.shape[1]
    elif isinstance(module, Unpacked):
        rows = kept.get(f"{path}.in_proj_weight".lstrip("."), {}).get(0)
        if rows is not None:
            ends = torch.tensor(module._parts).cumsum(0)
            counts = torch.bincount(torch.bucketize(rows, ends, right=True), minlength=3)
            module._parts = tuple(counts.tolist())
        return False
    elif type(module).__name__ == "Conv1D":  # transformers: a linear with its weight transposed
        module.nx, module.nf = weight.shape
    else:
        return False
    return True


def _length(conv: _ConvNd) -> int:
    return conv.in_channels if isinstance(conv, _ConvTransposeNd) else conv.out_channels


def _blocks(rows: Tensor | None, length: int, count: int) -> int:
    """Return how many of ``count`` blocks of rows are left; all, if blocks became smaller."""
    if rows is None:
        return count
    left = torch.bincount(rows // (length // count), minlength=count)
    return int((left > 0).sum()) if set(left.tolist()) <= {0, length // count} else count
