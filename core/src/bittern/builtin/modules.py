"""Core's rules for the layers of torch.nn, as data; those for attention are in `attention`.

Norms, pools and activations have no weight worth quantizing. They are quantized only where a recipe
names them: ``match: "*"`` is about the layers that have one.
"""

from __future__ import annotations

from bittern.records import ModuleRule, Slot

__all__ = ["INPUT", "MODULE_RULES", "OUTPUT", "WEIGHT"]

INPUT = Slot("input", channel_axis=-1)
OUTPUT = Slot("output", channel_axis=-1)
WEIGHT = Slot("weight", kind="weight", tensor="weight", channel_axis=0)

ACTIVATIONS = [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "Sigmoid",
    "SiLU",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]
POOLS = ("MaxPool", "AvgPool", "LPPool", "AdaptiveMaxPool", "AdaptiveAvgPool")


def _spatial(dimensions: int) -> tuple[Slot, Slot]:
    """Return input and output of shape ``(batch, channels, *)``, the batch left out or not."""
    axis = -1 - dimensions
    return Slot("input", channel_axis=axis), Slot("output", channel_axis=axis)


def _in_out(target: str, slots: tuple[Slot, ...] = (INPUT, OUTPUT)) -> ModuleRule:
    return ModuleRule(
        target=f"torch.nn.modules.{target}",
        quantized="bittern.nn.in_out:QuantInOut",
        slots=slots,
        by_name=True,
    )


CHANNELS_SECOND = (Slot("input", channel_axis=1), Slot("output", channel_axis=1))

MODULE_RULES: tuple[ModuleRule, ...] = (
    ModuleRule(
        target="torch.nn.modules.linear:Linear",
        quantized="bittern.nn.linear:QuantLinear",
        slots=(WEIGHT, INPUT, OUTPUT),
    ),
    ModuleRule(
        target="torch.nn.modules.linear:Bilinear",
        quantized="bittern.nn.linear:QuantBilinear",
        slots=(
            WEIGHT,
            Slot("input1", channel_axis=-1, role="input"),
            Slot("input2", channel_axis=-1, role="input"),
            OUTPUT,
        ),
    ),
    ModuleRule(
        target="torch.nn.modules.sparse:Embedding",
        quantized="bittern.nn.embedding:QuantEmbedding",
        slots=(WEIGHT, OUTPUT),
    ),
    ModuleRule(
        target="torch.nn.modules.sparse:EmbeddingBag",
        quantized="bittern.nn.embedding:QuantEmbeddingBag",
        slots=(WEIGHT, OUTPUT),
    ),
    *(
        ModuleRule(
            target=f"torch.nn.modules.conv:Conv{n}d",
            quantized=f"bittern.nn.conv:QuantConv{n}d",
            slots=(WEIGHT, *_spatial(n)),
        )
        for n in (1, 2, 3)
    ),
    *(
        ModuleRule(
            target=f"torch.nn.modules.conv:ConvTranspose{n}d",
            quantized=f"bittern.nn.conv:QuantConvTranspose{n}d",
            slots_from="bittern.nn.conv:transposed_slots",
        )
        for n in (1, 2, 3)
    ),
    *(
        ModuleRule(
            target=f"torch.nn.modules.rnn:{name}",
            quantized="bittern.nn.recurrent:QuantRecurrent",
            slots_from="bittern.nn.recurrent:recurrent_slots",
        )
        for name in ("RNN", "LSTM", "GRU")
    ),
    *(_in_out(f"batchnorm:BatchNorm{n}d", CHANNELS_SECOND) for n in (1, 2, 3)),
    _in_out("batchnorm:SyncBatchNorm", CHANNELS_SECOND),
    *(_in_out(f"instancenorm:InstanceNorm{n}d", _spatial(n)) for n in (1, 2, 3)),
    _in_out("normalization:GroupNorm", CHANNELS_SECOND),
    _in_out("normalization:LocalResponseNorm", CHANNELS_SECOND),
    _in_out("normalization:LayerNorm"),
    _in_out("normalization:RMSNorm"),
    *(_in_out(f"pooling:{name}{n}d", _spatial(n)) for name in POOLS for n in (1, 2, 3)),
    *(_in_out(f"activation:{name}") for name in ACTIVATIONS),
)
