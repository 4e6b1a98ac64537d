"""Which function knows the symbols of which torch.nn class.

Plain data, so that core's hooks can return it without importing torch.
"""

from __future__ import annotations

from bittern.records import SymbolRule

__all__ = ["SYMBOL_RULES"]

_FUNCTIONS = {
    "linear": ("linear:Linear",),
    "bilinear": ("linear:Bilinear",),
    "conv": ("conv:Conv1d", "conv:Conv2d", "conv:Conv3d"),
    "transposed_conv": (
        "conv:ConvTranspose1d",
        "conv:ConvTranspose2d",
        "conv:ConvTranspose3d",
    ),
    "batch_norm": (
        "batchnorm:BatchNorm1d",
        "batchnorm:BatchNorm2d",
        "batchnorm:BatchNorm3d",
        "batchnorm:SyncBatchNorm",
        "instancenorm:InstanceNorm1d",
        "instancenorm:InstanceNorm2d",
        "instancenorm:InstanceNorm3d",
    ),
    "group_norm": ("normalization:GroupNorm",),
    "last_dim_norm": ("normalization:LayerNorm", "normalization:RMSNorm"),
    "embedding": ("sparse:Embedding", "sparse:EmbeddingBag"),
    "prelu": ("activation:PReLU",),
    "recurrent": ("rnn:RNN", "rnn:LSTM", "rnn:GRU"),
    "attention": ("activation:MultiheadAttention",),
    "sequential": ("container:Sequential",),
}

SYMBOL_RULES: tuple[SymbolRule, ...] = tuple(
    SymbolRule(
        target=f"torch.nn.modules.{target}",
        symbols=f"bittern.tracing.symbolic.layers:{function}_symbols",
    )
    for function, targets in _FUNCTIONS.items()
    for target in targets
)
