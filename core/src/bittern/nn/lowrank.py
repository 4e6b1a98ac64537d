"""A low-rank branch beside a quantized weight: it holds in full precision what is hardest to round.

``W x = Q(W - L R) x + L (R x)``, with ``L`` and ``R`` of few columns and rows (Li et al., SVDQuant,
ICLR 2025, section 4). The branch is a part of the weight's quantizer, which rounds ``W - L R``; the
parameter stays ``W``. So a quantizer that is switched off gives the original function, bit for bit,
reverting leaves the original weight, and the ``state_dict`` keeps its keys. A folded weight holds
``Q(W - L R)``, a packed one its codes: the branch goes on beside them, since it sees its input
before that is rounded.

The branch is not trained. Its tensors have the dtype of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from bittern.errors import NumericsError
from bittern.nn.packed import PackedWeight

if TYPE_CHECKING:  # modules know of quantizers, which know of branches
    from bittern.nn.module import QuantModule

__all__ = ["LowRank", "branch_of", "with_branch"]


class LowRank(nn.Module):
    """Two factors of a matrix.

    Args:
        left: Shape ``(rows, rank)``: ``B`` of a linear layer.
        right: Shape ``(rank, columns)``: its ``A``.

    Raises:
        NumericsError: They are no matrices, their ranks differ, or they hold NaN or Inf.
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise NumericsError(
                f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} have no product",
                hint="give (rows, rank) and (rank, columns)",
            )
        if not bool(left.isfinite().all() & right.isfinite().all()):
            raise NumericsError("a factor of a low-rank branch holds NaN or Inf")
        self.register_buffer("left", left.detach().clone(), persistent=False)
        self.register_buffer("right", right.detach().clone(), persistent=False)

    @property
    def rank(self) -> int:
        """Number of columns of the left factor."""
        return self.left.shape[1]

    def product(self) -> Tensor:
        """Return the product of the factors, float32, ``(rows, columns)``."""
        return self.left.float() @ self.right.float()

    def forward(self, x: Tensor, *, inputs_first: bool = False) -> Tensor:
        """Return ``x`` times the product, ``(..., outputs)``.

        Args:
            x: Shape ``(..., inputs)``.
            inputs_first: Whether the rows of the product are the inputs, not the outputs.
        """
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        return x @ left @ right if inputs_first else F.linear(F.linear(x, right), left)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"rank {self.rank}, {self.left.shape[0]} x {self.right.shape[1]}"


def branch_of(module: QuantModule, slot: str = "weight") -> LowRank | None:
    """Return the branch that belongs to what the quantizer of a weight gives out just now.

    Args:
        module: A converted module.
        slot: The weight's slot.

    Returns:
        ``None`` where there is none, or where the quantizer passes the weight as it is.
    """
    quantizer = module.quantizer(slot)
    if quantizer is None or quantizer.transforms is None:
        return None
    branch = quantizer.transforms.low_rank
    if branch is None or quantizer.folded:
        return branch
    if isinstance(module._parameters.get(quantizer.tensor or ""), PackedWeight):
        return branch
    rounds = quantizer.enabled and quantizer.observer is None and quantizer.calibrated
    return branch if rounds else None


def with_branch(
    module: QuantModule, x: Tensor, output: Tensor, *, inputs_first: bool = False
) -> Tensor:
    """Return the output of a linear layer, and what the branch of its weight adds.

    Args:
        module: The layer, with the slots ``weight`` and ``input``.
        x: Its input, before the quantizer; the pre-scale of that is applied.
        output: What the quantized operands gave, before the quantizer of the output.
        inputs_first: Whether the weight is ``(inputs, outputs)``.
    """
    quantizer: Any = module._modules.get("weight_quantizer")
    if quantizer is None or quantizer._simple:  # cheap: most layers have no branch
        return output
    branch = branch_of(module)
    if branch is None:
        return output
    reads = module.quantizer("input")
    if reads is not None and reads.transforms is not None:
        scale = reads.transforms.pre_scale
        if scale is not None:
            x = (x.float() * scale).to(x.dtype)
    added: Tensor = branch(x, inputs_first=inputs_first)
    return output + added.reshape(output.shape)
