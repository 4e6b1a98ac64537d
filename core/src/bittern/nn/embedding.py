"""Quantized nn.Embedding and nn.EmbeddingBag.

With ``max_norm``, torch shortens the rows that a lookup reads, in the table itself, before it
reads them. The quantized lookup does the same, and then reads the quantized table: what training
sees of the table stays what it was. The range of the table is that of the rows as they were when
they were calibrated, so that rows which become shorter later fit into it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.nn.module import QuantModule

__all__ = ["QuantEmbedding", "QuantEmbeddingBag"]


class QuantEmbedding(QuantModule, nn.Embedding):
    """Rows of the quantized table; slots ``weight``, ``output``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings of token ids, shape ``(..., embedding_dim)``."""
        weight = _shortened(self.weight, input, self.max_norm, self.norm_type)
        found = F.embedding(
            input,
            self.quantize("weight", weight),
            self.padding_idx,
            None,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        return self.quantize("output", found)


class QuantEmbeddingBag(QuantModule, nn.EmbeddingBag):
    """Sums, means or maxima of rows of the quantized table; slots ``weight``, ``output``.

    ``per_sample_weights`` stay as they are.
    """

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return one row per bag, shape ``(bags, embedding_dim)``."""
        weight = _shortened(self.weight, input, self.max_norm, self.norm_type)
        found = F.embedding_bag(
            input,
            self.quantize("weight", weight),
            offsets,
            None,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
        return self.quantize("output", found)


def _shortened(table: Tensor, ids: Tensor, max_norm: float | None, norm_type: float) -> Tensor:
    """Return ``table``, of which the rows of ``ids`` were renormalized in place."""
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(table.detach(), ids.contiguous().view(-1), max_norm, norm_type)
    return table
