"""Small models of Megatron-Core, and the process groups that they need, on the CPU.

Megatron-Core asks CUDA for the current device where it makes position embeddings, masks and
gathers. `on_cpu` answers for it, in tests only.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not there
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY = 128
LENGTH = 16


def ensure_groups(tensor: int = 1, pipeline: int = 1) -> None:
    """Make Megatron's process groups, and a process group of one where there is none."""
    if not dist.is_initialized():
        parallel_state.destroy_model_parallel()  # groups of one that somebody destroyed
        if "lo" in {name for _, name in socket.if_nameindex()}:  # host names need not resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline)


def leave_groups() -> None:
    """Undo `ensure_groups` in a process of its own."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def regroup(tensor: int = 1, pipeline: int = 1) -> None:
    """Make Megatron's process groups anew."""
    parallel_state.destroy_model_parallel()
    ensure_groups(tensor, pipeline)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let Megatron-Core run without CUDA."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    try:
        yield
    finally:
        torch.cuda.current_device = before


def tensor_ranks() -> int:
    """Return the number of tensor-parallel ranks."""
    return parallel_state.get_tensor_model_parallel_world_size()


def config(**changes: Any) -> TransformerConfig:
    """Return the config of a model of two layers in float32, 64 wide."""
    given: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 128,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": tensor_ranks(),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(given | changes))


def gpt(**changes: Any) -> GPTModel:
    """Return a GPT of two layers, or this rank's stage of it, with the weights of seed 0."""
    ensure_groups()
    torch.manual_seed(0)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return GPTModel(
        config(pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32, **changes),
        get_gpt_layer_local_spec(changes.get("num_moe_experts"), normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=32,
        position_embedding_type="rope",
        pre_process=stage == 0,
        post_process=stage == stages - 1,
    ).eval()


def batch(seed: int) -> dict[str, Tensor]:
    """Return two rows of tokens with what a GPT takes beside them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator),
        "position_ids": torch.arange(LENGTH).expand(2, -1),
        "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1),
    }


def column(**changes: Any) -> ColumnParallelLinear:
    """Return a column parallel layer from 64 to 96 features."""
    ensure_groups()
    given: dict[str, Any] = {
        "bias": True,
        "init_method": nn.init.xavier_normal_,
        "config": config(),
    }
    return ColumnParallelLinear(64, 96, **(given | changes))


def row(**changes: Any) -> RowParallelLinear:
    """Return a row parallel layer from 64 to 96 features."""
    ensure_groups()
    given: dict[str, Any] = {
        "input_size": 64,
        "output_size": 96,
        "bias": True,
        "init_method": nn.init.xavier_normal_,
        "input_is_parallel": True,
        "skip_bias_add": False,
        "config": config(),
    }
    return RowParallelLinear(**(given | changes))
