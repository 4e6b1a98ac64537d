"""What this plugin registers. Importing it loads neither torch nor the framework.

Targets are strings, matched with the classes of a live model; what stands behind them is imported
when a model has such a class.
"""

from __future__ import annotations

from bittern.hooks import hookimpl
from bittern.records import (
    Exporter,
    LeafRule,
    ModuleRule,
    OpRule,
    RecipeSource,
    Slot,
    SymbolRule,
)

LINEAR = "heron_framework.layers:Linear"
DOT_PRODUCT = "heron_framework.attention:DotProduct"


@hookimpl
def register_modules() -> list[ModuleRule]:
    """The framework's linear layer, and the products of its attention."""
    return [
        ModuleRule(
            target=LINEAR,
            quantized="bittern_heron.modules:QuantLinear",
            slots=(
                Slot("weight", kind="weight", tensor="weight", channel_axis=0),
                Slot("input", channel_axis=-1),
                Slot("output", channel_axis=-1),
            ),
            like="Linear",  # what recipes say of nn.Linear, they say of it
        ),
        ModuleRule(
            target=DOT_PRODUCT,
            quantized="bittern_heron.modules:QuantDotProduct",
            slots=tuple(Slot(name, channel_axis=-1) for name in ("query", "key", "value")),
        ),
    ]


@hookimpl
def register_symbols() -> list[SymbolRule]:
    """What the dimensions of the linear layer are to the rest of a model."""
    return [SymbolRule(target=LINEAR, symbols="bittern_heron.tracing:linear_symbols")]


@hookimpl
def register_trace_leaves() -> list[LeafRule]:
    """The attention's core looks at its data, so a tracer must not enter it."""
    return [LeafRule(target=DOT_PRODUCT, reason="its kernel depends on the data")]


@hookimpl
def register_trace_ops() -> list[OpRule]:
    """The framework's own activation keeps the dimensions of what it reads."""
    return [OpRule(op="heron_framework.swish.default", flow="bittern_heron.tracing:elementwise")]


@hookimpl
def register_exporters() -> list[Exporter]:
    """The checkpoints that the framework's engine serves."""
    return [
        Exporter(
            name="heron",
            write="bittern_heron.export:write",
            verify="bittern_heron.export:verify",
            check="bittern_heron.export:check",
            accepts="bittern_heron.export:accepts",
            client="heron_framework",
            description="int8 codes and scales under the engine's names",
        )
    ]


@hookimpl
def register_recipes() -> list[RecipeSource]:
    """Everything the engine can run in int8."""
    activation = {"format": "int8", "granularity": "tensor"}
    products = {"query": activation, "key": activation, "value": activation}
    return [
        RecipeSource(
            name="heron-int8",
            description="int8 linear layers and int8 attention, static",
            data={
                "rules": [
                    {"match": {"class": "Linear"}, "weight": "int8", "input": activation},
                    {"match": {"class": "DotProduct"}, "slots": products},
                ]
            },
        )
    ]
