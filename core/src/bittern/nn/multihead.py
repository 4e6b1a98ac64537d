"""Quantized nn.MultiheadAttention, its input projections and the operands of its products."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.errors import NumericsError
from bittern.nn.attention import attend
from bittern.nn.intercept import is_active, path_of, sealed
from bittern.nn.module import QuantModule
from bittern.records import ATTENTION_SLOTS, Slot

__all__ = ["QuantMultiheadAttention", "multihead_slots"]


def multihead_slots(module: nn.MultiheadAttention) -> tuple[Slot, ...]:
    """Return the slots of an attention: one input projection, or three where dimensions differ."""
    packed = module.in_proj_weight is not None
    names = ("in_proj",) if packed else ("q_proj", "k_proj", "v_proj")
    return (
        *(Slot(name, kind="weight", tensor=f"{name}_weight") for name in names),
        *(Slot(name, role="input", channel_axis=-1) for name in ("query", "key", "value")),
        *ATTENTION_SLOTS,
    )


class QuantMultiheadAttention(QuantModule, nn.MultiheadAttention):
    """Attention of the quantized operands, with every option of the original.

    Slots:

    - ``in_proj``, or ``q_proj``, ``k_proj``, ``v_proj`` where ``kdim`` or ``vdim`` differ;
    - ``query``, ``key``, ``value``: the three inputs. In self-attention they are one tensor, which
      gives all three the same range; in cross-attention their ranges have little in common;
    - ``q``, ``k``, ``v``, each ``(batch, heads, tokens, head_dim)``, and ``p``, the probabilities
      ``(batch, heads, queries, keys)`` after dropout: the operands of the two products. They are
      quantized only where a recipe names them;
    - ``output``.

    ``out_proj`` is a module of its own, with the rule of linear layers. The original reads its
    weight without calling it; this class calls it where it is quantized.

    While no quantizer is active the original's forward runs, its fused kernel included.
    """

    def forward(  # noqa: PLR0917 - the arguments of the original
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention and, with ``need_weights``, its probabilities.

        Shapes, dtypes and the meaning of the arguments are those of `nn.MultiheadAttention`. The
        probabilities are those before their quantization.

        Raises:
            NumericsError: The inputs are nested tensors, or a mask holds integers.
            RuntimeError: ``is_causal`` without the mask that it is a hint about.
        """
        if not self._quantizing():
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if query.is_nested or key.is_nested or value.is_nested:
            raise NumericsError(
                "nested tensors cannot be quantized",
                where=path_of(self),
                hint="pad them, and pass key_padding_mask",
            )
        for mask in (attn_mask, key_padding_mask):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise NumericsError(
                    f"a mask of {mask.dtype} says neither what is forbidden nor what is added",
                    where=path_of(self),
                    hint="pass mask.bool(), true where attention is forbidden, or a floating mask",
                )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        batched = query.dim() == 3
        with sealed():
            q, k, v = self._project(
                *(self._batch_first(x, batched=batched) for x in (query, key, value))
            )
            if key_padding_mask is not None and not batched:
                key_padding_mask = key_padding_mask.unsqueeze(0)
            # the hint replaces the mask exactly where the original lets it
            causal = is_causal and key_padding_mask is None and not need_weights
            mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k)
            dropout = self.dropout if self.training else 0.0
            p = None
            if need_weights or is_active(self.quantizer("p")):
                found, p = attend(
                    q,
                    k,
                    v,
                    mask,
                    dropout_p=dropout,
                    is_causal=causal,
                    # without weights the original calls the function, which gives 0 here
                    empty_rows=math.nan if need_weights else 0.0,
                    change=partial(self.quantize, "p"),
                )
            else:
                found = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
            found = self._out(found.transpose(1, 2).flatten(2))
        if not batched:
            found = found.squeeze(0)
        elif not self.batch_first:
            found = found.transpose(0, 1)
        found = self.quantize("output", found)
        if not need_weights or p is None:
            return found, None
        p = p.mean(1) if average_attn_weights else p
        return found, p if batched else p.squeeze(0)

    def _quantizing(self) -> bool:
        """Whether a quantizer of this module or of its output projection is active."""
        modules = [m for m in (self, self.out_proj) if isinstance(m, QuantModule)]
        return any(is_active(q) for m in modules for q in m.slots().values())

    def _batch_first(self, x: Tensor, *, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v of shape ``(batch, heads, tokens, head_dim)``, quantized."""
        packed: Tensor | None = self.in_proj_weight
        if packed is not None:
            weights = self.quantize("in_proj", packed).chunk(3)
        else:
            weights = tuple(
                self.quantize(f"{name}_proj", getattr(self, f"{name}_proj_weight"))
                for name in ("q", "k", "v")
            )
        bias: Tensor | None = self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        given = {"query": query, "key": key, "value": value}
        inputs = [self.quantize(slot, x) for slot, x in given.items()]
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        batch = q.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        heads = (
            x.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v)
        )
        return tuple(self.quantize(slot, x) for slot, x in zip("qkv", heads, strict=True))

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Return what is added to the scores, ``(batch or 1, heads or 1, queries or 1, keys)``."""
        masks = []
        if attn_mask is not None:
            mask = _added(attn_mask, q.dtype)
            masks.append(mask.view(q.shape[0], -1, *mask.shape[-2:]) if mask.dim() == 3 else mask)
        if padding is not None:
            masks.append(_added(padding, q.dtype)[:, None, None, :])
        # the columns that add_bias_kv and add_zero_attn append are open to all
        masks = [F.pad(mask, (0, k.shape[-2] - mask.shape[-1])) for mask in masks]
        return sum(masks[1:], masks[0]) if masks else None

    def _out(self, x: Tensor) -> Tensor:
        if isinstance(self.out_proj, QuantModule):
            found: Tensor = self.out_proj(x)
            return found
        # as the original does: something else may hold the weight, and be no linear layer
        return F.linear(x, self.out_proj.weight, self.out_proj.bias)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as a summand: true, which forbids attention, is minus infinity."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
