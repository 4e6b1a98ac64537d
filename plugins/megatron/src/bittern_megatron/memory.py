"""Megatron-Core's shared memory, after a trace.

Attention computes into buffers that all layers of a process share. A trace runs the model on shapes
alone, and may leave buffers behind that have a shape and no memory.
"""

from __future__ import annotations

from megatron.core import parallel_state
from torch import Tensor

__all__ = ["forget_traced"]


def forget_traced() -> None:
    """Drop shared buffers without memory; Megatron makes new ones when it needs them."""
    if not parallel_state.is_initialized():
        return
    buffers = parallel_state.get_global_memory_buffer().buffer
    for key in [key for key, value in buffers.items() if type(value) is not Tensor]:
        del buffers[key]
