"""Products of activations as modules, for models that want to name and quantize them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bittern.nn.intercept import sealed
from bittern.nn.module import QuantModule

__all__ = ["MatMul", "QuantMatMul", "ScaledDotProductAttention"]


class MatMul(nn.Module):
    """``left @ right`` as a module; quantized, it has the slots ``left``, ``right``, ``output``."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of ``(..., n, m)`` and ``(..., m, p)``, ``(..., n, p)``."""
        return left @ right


class QuantMatMul(QuantModule):
    """``Q_left(left) @ Q_right(right)``."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of the quantized operands, shape ``(..., n, p)``."""
        with sealed():
            product = self.quantize("left", left) @ self.quantize("right", right)
        return self.quantize("output", product)


class ScaledDotProductAttention(nn.Module):
    """`F.scaled_dot_product_attention` as a module; quantized, its slots are ``q k v p output``."""

    def forward(  # noqa: PLR0917 - the arguments of the original
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Return the attention, shape ``(..., heads, L, Ev)``.

        Args:
            query: ``(..., heads, L, E)``.
            key: ``(..., heads, S, E)``.
            value: ``(..., heads, S, Ev)``.
            attn_mask: As the function takes it.
            dropout_p: Probability of dropout, in training and in evaluation.
            is_causal: Whether to mask what lies above the diagonal.
            options: ``scale`` and ``enable_gqa``.
        """
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )
