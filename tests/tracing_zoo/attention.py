"""nn.MultiheadAttention, written so that it can be cut.

The original takes the sizes of its queries, keys and values from its input, so that no head can be
taken out. This one takes them from its tensors and computes the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Unpacked", "unpack"]


class Unpacked(nn.MultiheadAttention):
    """Takes the place of the class of a module; needs ``_parts`` and ``scale`` (see ``unpack``)."""

    _parts: tuple[int, ...]
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        assert self.batch_first
        assert options.get("key_padding_mask") is None
        assert options.get("attn_mask") is None
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(self._parts)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        sizes = [len(w) for w in weights]
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        heads = [
            F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]
        mixed = (heads[0] @ heads[1].transpose(-1, -2) * self.scale).softmax(-1) @ heads[2]
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def unpack(model: nn.Module) -> nn.Module:
    """Turn every nn.MultiheadAttention of ``model`` into an equal one that can be cut."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = Unpacked
            module._parts = (module.embed_dim,) * 3
            module.scale = (module.embed_dim // module.num_heads) ** -0.5
    return model
