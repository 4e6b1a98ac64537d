"""One range for what several tensor-parallel ranks hold a slice of.

Core reduces the statistics of activations over all processes, so a range per tensor is that of all
slices. Weights are measured where they are; here their ranges are made those of the whole weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.utils import get_pg_size
from torch import Tensor, nn
from torch import distributed as dist

from bittern.errors import NumericsError, PlanError
from bittern.nn import TensorQuantizer, named_quant_modules
from bittern.numerics import Range
from bittern.records import PerTensor, PerToken, QuantizerSpec
from bittern.registry import KernelTable
from bittern_megatron.linear import ParallelLinear
from bittern_megatron.shards import Shard, is_shared, straddles

__all__ = ["ShardedWeightQuantizer", "share_ranges"]

log = logging.getLogger("bittern.megatron")


class _AgreedError(NumericsError):
    """What is raised on all ranks that hold slices of one weight."""


class SharedQuantizer(TensorQuantizer):
    """Quantizes on several ranks by one range, which no rank can learn alone."""

    def learn(self) -> nn.Parameter:
        """Refuse: the gradient of the range is a sum over the ranks.

        Raises:
            NumericsError: Always.
        """
        raise NumericsError(
            "several tensor-parallel ranks round by this range, and each knows only its part of "
            "the gradient",
            where=self.name or None,
            hint="train ranges with one tensor-parallel rank; what was learned can be restored",
        )

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `state` returned; a range that was learned is a fixed one here."""
        super().load_state({name: v for name, v in state.items() if name != "learned"})


class ShardedWeightQuantizer(SharedQuantizer):
    """Quantizes one rank's slice of a weight by the range of the whole weight.

    Args:
        spec: As for every quantizer.
        group: The ranks that hold the slices; all of them calibrate at the same time.
        axis: The axis of the weight that is split.
        name: ``"module.path.slot"``.
        tensor: Name of the parameter.
        kernels: Fast implementations.
    """

    def __init__(
        self,
        spec: QuantizerSpec,
        *,
        group: Any,
        axis: int,
        name: str = "",
        tensor: str | None = None,
        kernels: KernelTable | None = None,
    ) -> None:
        self.group = None
        self._open = True  # a range that the recipe gives is everybody's
        super().__init__(spec, name=name, tensor=tensor, kernels=kernels)
        self.group = group
        self.shared = is_shared(spec.granularity, axis, 2)  # not only a global scale
        if spec.then is not None:
            self.then = ShardedWeightQuantizer(
                spec.then,
                group=group,
                axis=axis,
                name=f"{name}.then",
                tensor=tensor,
                kernels=kernels,
            )
        self._open = False

    def calibrate_on(self, x: Tensor, **options: Any) -> None:
        """Take the range of all slices, this rank's being ``x``.

        Raises:
            NumericsError: A slice holds NaN or Inf; on all ranks.
        """
        try:
            with self._opened():
                super().calibrate_on(x, **options)
        except _AgreedError:
            raise
        except NumericsError as error:  # the others wait in `set_range`
            self._agree(error, x.device)

    def set_range(self, values: Range, x: Tensor | None = None, **options: Any) -> None:
        """Set the range of all slices, this rank's being ``values``.

        Raises:
            NumericsError: An algorithm chose it by this rank's slice alone; or another rank has
                none.
        """
        if not self._open:
            raise NumericsError(
                "several ranks hold slices of this weight, and the algorithm would choose its "
                "range by one of them",
                where=self.name or None,
                hint="use algorithm: max, or quantize with one tensor-parallel rank and load that",
            )
        if self.group is not None:
            self._agree(self._problem(values), values.amax.device)
            values = self._whole(values)
        super().set_range(values, x, **options)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _agree(self, problem: NumericsError | None, device: torch.device) -> None:
        """Raise on every rank if one met a problem, before they wait for its numbers."""
        failed = torch.tensor(float(problem is not None), device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self.group)
        if problem is not None:
            raise _AgreedError(problem.what, where=problem.where, hint=problem.hint) from problem
        if bool(failed):
            raise _AgreedError(
                "the slice of another tensor-parallel rank holds NaN or Inf",
                where=self.name or None,
                hint="the checkpoint is damaged; load it again, or skip the module",
            )

    def _problem(self, values: Range) -> NumericsError | None:
        """Return what is wrong with a slice's range: a maximum over ranks may lose a NaN."""
        bounds = (values.amax, values.amin, values.global_amax)
        if all(bound is None or bool(bound.isfinite().all()) for bound in bounds):
            return None
        return NumericsError(
            "the weight holds NaN or Inf",
            where=self.name or None,
            hint="the checkpoint is damaged; load it again, or skip the module",
        )

    def _whole(self, values: Range) -> Range:
        amin, whole = values.amin, values.global_amax
        whole = None if whole is None else self._largest(whole)
        if not self.shared:
            return replace(values, global_amax=whole)
        return Range(
            self._largest(values.amax), None if amin is None else -self._largest(-amin), whole
        )

    def _largest(self, value: Tensor) -> Tensor:
        found = value.detach().float().clone()
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found


def share_ranges(model: nn.Module) -> None:
    """Make the weight quantizers of sharded layers agree over the ranks.

    Raises:
        PlanError: A range would be that of one slice where the unsharded model has one of all.
    """
    uneven: list[str] = []
    for path, layer in named_quant_modules(model):
        if not isinstance(layer, ParallelLinear):
            continue
        for slot, quantizer in layer.slots().items():
            shard = layer.shard(slot)
            if quantizer.tensor is None:
                uneven += _check_activation(layer, slot, quantizer, where=path)
                if get_pg_size(layer.tp_group) > 1:
                    ours = SharedQuantizer(
                        quantizer.spec, name=quantizer.name, kernels=quantizer.kernels
                    )
                    layer.add_module(f"{slot}_quantizer", ours.train(layer.training))
            elif shard is not None and shard.size > 1:
                _check_weight(layer, quantizer, shard, where=path)
                _share(layer, slot, quantizer, shard)
    if uneven:
        log.warning(
            "%s and %d more have a scale per token and rank: each rank sees its slice of a token, "
            "so results depend on the number of tensor-parallel ranks",
            uneven[0],
            len(uneven) - 1,
        )


def _share(layer: ParallelLinear, slot: str, quantizer: TensorQuantizer, shard: Shard) -> None:
    spec = quantizer.spec
    shared = is_shared(spec.granularity, shard.axis, 2)
    if spec.dynamic or not (shared or quantizer.codec.two_level or spec.then is not None):
        return
    ours = ShardedWeightQuantizer(
        spec,
        group=layer.tp_group,
        axis=shard.axis,
        name=quantizer.name,
        tensor=quantizer.tensor,
        kernels=quantizer.kernels,
    )
    layer.add_module(f"{slot}_quantizer", ours.train(layer.training))


def _check_weight(
    layer: ParallelLinear, quantizer: TensorQuantizer, shard: Shard, *, where: str
) -> None:
    gated = where.endswith("linear_fc1") and getattr(layer.config, "gated_linear_unit", False)
    shard = replace(shard, parts=2) if gated else shard
    for link in quantizer.chain():
        spec = link.spec
        if straddles(spec, tuple(layer.weight.shape), shard):
            raise PlanError(
                f"a slice of its weight, {tuple(layer.weight.shape)} on this rank, is no whole "
                f"number of {spec.granularity}",
                where=f"{where}.weight",
                hint="use smaller groups, or fewer tensor-parallel ranks",
            )
        _check_transforms(spec, split=shard.axis == 1, where=f"{where}.weight")
        if spec.dynamic and is_shared(spec.granularity, shard.axis, 2):
            raise _one_slice(f"{where}.weight")


def _check_activation(
    layer: ParallelLinear, slot: str, quantizer: TensorQuantizer, *, where: str
) -> list[str]:
    """Return the name of the slot if its scales depend on the number of ranks."""
    shard = layer.shard(slot)
    split = shard is not None and shard.size > 1
    tokens = bool(layer.sequence_parallel)  # every rank has some of the tokens
    for link in quantizer.chain():
        spec = link.spec
        _check_transforms(spec, split=split, where=f"{where}.{slot}")
        if spec.dynamic and isinstance(spec.granularity, PerTensor) and (split or tokens):
            raise _one_slice(f"{where}.{slot}")
        if not spec.dynamic and split and not isinstance(spec.granularity, PerTensor):
            if quantizer.block_dynamic:
                continue
            raise PlanError(
                "a static range per channel is not yet calibrated over tensor-parallel ranks",
                where=f"{where}.{slot}",
                hint="use granularity: tensor",
            )
        if spec.dynamic and split and isinstance(spec.granularity, PerToken):
            return [f"{where}.{slot}"]
    return []


def _check_transforms(spec: QuantizerSpec, *, split: bool, where: str) -> None:
    if split and (spec.rotation is not None or spec.affine is not None):
        raise PlanError(
            "a rotation or bias would run along features that several ranks hold slices of",
            where=where,
            hint="leave rotate and affine out, or use one tensor-parallel rank",
        )


def _one_slice(where: str) -> PlanError:
    return PlanError(
        "a dynamic range per tensor would be that of one rank's slice",
        where=where,
        hint="make it static, or use granularity: token",
    )
