"""Tracing a model whose weights lie in shards: shapes suffice, so no process asks another."""

from __future__ import annotations

import torch
from torch import nn

from bittern.runtime.access import is_sharded

__all__ = ["unshard"]


def unshard(model: nn.Module) -> None:
    """Give a model whole weights without values in place of DTensors, and take their hooks off.

    The hooks of ``fully_shard`` and ``parallelize_module`` would gather weights from all ranks, and
    find none of their own. Call it where `bittern.tracing.preserve.unchanged` puts all of it back.
    """
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter):
                key = id(parameter)  # tied weights stay one
                if key not in memo:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    memo[key] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = memo[key]
    if not memo:
        return
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).startswith("torch.distributed."):
                    del hooks[number]
