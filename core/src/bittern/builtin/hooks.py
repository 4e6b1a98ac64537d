"""Core's own rules, registered through the same hooks as any plugin's. There is no private door."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bittern.builtin.attention import ATTENTION_RULES, projections_read_elsewhere
from bittern.builtin.formats import FORMATS
from bittern.builtin.modules import MODULE_RULES
from bittern.builtin.subclasses import SUBCLASS_RULES
from bittern.hooks import hookimpl
from bittern.records import (
    Algorithm,
    Exporter,
    Mode,
    NumberFormat,
    RecipeSource,
)

if TYPE_CHECKING:
    from torch import nn

    from bittern.records import ModuleRule, OpRule, Plan, SymbolRule


@hookimpl
def register_modules() -> tuple[ModuleRule, ...]:
    """The layers of torch.nn that hold weights, and those that can quantize what goes through."""
    return (*MODULE_RULES, *ATTENTION_RULES, *SUBCLASS_RULES)


@hookimpl
def discover_modules(model: nn.Module) -> list[ModuleRule]:
    """Refuse output projections that the attention of a model may not call."""
    return projections_read_elsewhere(model)


@hookimpl
def after_convert(model: nn.Module) -> None:
    """Make the fused layers of torch.nn call their converted children."""
    from bittern.nn.fused import call_children

    call_children(model)


@hookimpl
def register_symbols() -> tuple[SymbolRule, ...]:
    """The layers of torch.nn that have a channel or feature dimension."""
    from bittern.tracing.symbolic.rules import SYMBOL_RULES

    return SYMBOL_RULES


@hookimpl
def register_trace_ops() -> list[OpRule]:
    """The operators of ATen."""
    from bittern.tracing.operators import op_rules

    return op_rules()


@hookimpl
def register_formats() -> tuple[NumberFormat, ...]:
    """Integers of 2 to 8 bits, fp8, nvfp4, the MX formats, nf4."""
    return FORMATS


@hookimpl
def register_modes() -> list[Mode]:
    """Quantize, fold, compress."""
    return [
        Mode(
            name="quantize",
            convert="bittern.modes.quantize:convert",
            restore="bittern.modes.quantize:restore",
            config="bittern.modes.quantize:QuantizeConfig",
            metadata="bittern.modes.quantize:metadata",
            exclusive=True,
            description="plan, convert and calibrate by a recipe",
        ),
        Mode(
            name="fold",
            convert="bittern.modes.fold:convert",
            restore="bittern.modes.fold:restore",
            config="bittern.modes.fold:FoldConfig",
            next_modes=frozenset(),
            exclusive=True,
            description="weights hold what their quantizers make of them",
        ),
        Mode(
            name="compress",
            convert="bittern.modes.compress:convert",
            restore="bittern.modes.compress:restore",
            metadata="bittern.modes.compress:metadata",
            next_modes=frozenset(),
            exclusive=True,
            description="quantized weights are held as codes and scales",
        ),
    ]


@hookimpl
def register_algorithms() -> list[Algorithm]:
    """Ranges, scales that move between layers, and roundings of weights."""
    return [
        Algorithm(
            name="max",
            run="bittern.calibration.max:run_max",
            needs=frozenset({"data"}),
            description="every range is the largest magnitude seen",
        ),
        Algorithm(
            name="percentile",
            run="bittern.calibration.statistics:run_percentile",
            needs=frozenset({"data"}),
            description="activations: the magnitude that 99.99 % of them do not exceed",
        ),
        Algorithm(
            name="entropy",
            run="bittern.calibration.statistics:run_entropy",
            needs=frozenset({"data"}),
            description="activations: the range that loses the least information",
        ),
        Algorithm(
            name="mse",
            run="bittern.calibration.statistics:run_mse",
            needs=frozenset({"data"}),
            description="weights and activations: the range with the least rounding error",
        ),
        Algorithm(
            name="smooth",
            run="bittern.calibration.smooth:run_smooth",
            needs=frozenset({"trace"}),
            description="SmoothQuant: moves outlier channels of activations into weights",
        ),
        Algorithm(
            name="gptq",
            run="bittern.calibration.gptq:run_gptq",
            needs=frozenset({"data", "hessian"}),
            sequential=True,
            description="weights: errors of some columns make up for those of others",
        ),
        Algorithm(
            name="equalize",
            run="bittern.calibration.equalize:run_equalize",
            description="weights: scales move between layers until columns weigh alike; no data",
        ),
        Algorithm(
            name="rotate",
            run="bittern.calibration.rotate:run_rotate",
            description="weights: rotations spread outliers over residual streams and heads",
        ),
        Algorithm(
            name="hqq",
            run="bittern.calibration.hqq:run_hqq",
            needs=frozenset({"data"}),
            description="weights: scales and zero points with the least rounding error; no data",
        ),
        Algorithm(
            name="learn-rounding",
            run="bittern.calibration.rounding:run_learn_rounding",
            needs=frozenset({"data", "hessian", "original"}),
            sequential=True,
            description="weights: rounded so that each block computes what it did",
        ),
        Algorithm(
            name="distill-rounding",
            run="bittern.calibration.distilled:run_distill_rounding",
            needs=frozenset({"data", "hessian", "original"}),
            whole=True,
            description="weights: rounded so that the model's logits are what they were",
        ),
        Algorithm(
            name="svdquant",
            run="bittern.calibration.svdquant:run_svdquant",
            needs=frozenset({"data", "hessian"}),
            description="weights: a low-rank branch in full precision holds what is hard to round",
        ),
        Algorithm(
            name="fold-batchnorm",
            run="bittern.calibration.batchnorm:run_fold_batchnorm",
            restore="bittern.calibration.batchnorm:freeze_folded",
            needs=frozenset({"trace"}),
            description="BatchNorm: its scale goes into the weight of the layer before it",
        ),
        Algorithm(
            name="awq",
            run="bittern.calibration.awq:run_awq",
            needs=frozenset({"data", "hessian", "trace"}),
            sequential=True,
            description="weights: channels that matter most are scaled up, groups are clipped",
        ),
        Algorithm(
            name="bias-correction",
            run="bittern.calibration.correction:run_bias_correction",
            needs=frozenset({"data", "hessian"}),
            sequential=True,
            description="biases: make up for what rounding takes from the mean of outputs",
        ),
    ]


@hookimpl
def register_exporters() -> list[Exporter]:
    """Core's own safetensors export."""
    return [
        Exporter(
            name="safetensors",
            write="bittern.exporting.plain:write_plain",
            verify="bittern.exporting.plain:verify_plain",
            client="safetensors",
            description="codes and scales in one safetensors file, the plan in bittern.json",
        )
    ]


@hookimpl
def register_recipes() -> list[RecipeSource]:
    """The recipes in ``builtin/recipes``."""
    descriptions = {
        "base": "nothing quantized; heads and routers are skipped",
        "int8": "W8A8: int8 weights per channel, int8 activations per tensor, static",
        "int8-cnn": "W8A8 of convolutions and linears after BatchNorm folding, static",
        "int8-smoothquant": (
            "W8A8 after SmoothQuant: int8 weights per channel, activations per token"
        ),
        "int8-weight-only": "int8 weights per channel, activations as they are; needs no data",
        "int4": "int4 weights in groups of 128, activations as they are; needs no data",
        "int4-hqq": (
            "int4 weights with zero points in groups of 64, found without data; activations as "
            "they are"
        ),
        "int4-awq": "int4 weights in groups of 128 after AWQ, activations as they are",
        "fp8": "W8A8: fp8 e4m3 weights and activations per tensor, static",
        "fp8-dynamic": "fp8 e4m3 weights per channel, activations per token; needs no data",
        "fp8-block": (
            "fp8 e4m3 weights in blocks of 128 x 128, activations in groups of 128; needs no data"
        ),
        "w4a8": (
            "W4A8: int4 weights in groups of 128, held in fp8; fp8 activations per tensor, static"
        ),
        "nvfp4": ("W4A4: nvfp4 weights and activations, global scales static, blocks dynamic"),
        "nvfp4-awq": (
            "W4A4 after AWQ: nvfp4 weights and activations, global scales static, blocks dynamic"
        ),
        "w4a8-awq": (
            "W4A8 after AWQ: int4 weights in groups of 128, held in fp8; fp8 activations per tensor"
        ),
        "nvfp4a16": "nvfp4 weights, activations as they are; needs no data",
        "int4-gptq": "int4 weights in groups of 128, rounded by GPTQ, activations as they are",
        "nvfp4-gptq": "W4A4: nvfp4 weights and activations, weights rounded by GPTQ",
        "int4-best": (
            "int4 in groups of 128, rounding learned for the logits; activations as they are"
        ),
        "nvfp4a16-best": "nvfp4 weights, rounding learned for the logits; activations as they are",
        "nvfp4-best": (
            "W4A4: nvfp4 weights and activations, rounding of weights learned for the logits"
        ),
        "mxfp4-best": (
            "W4A4: mxfp4 weights and activations, rounding of weights learned for the logits"
        ),
        "nvfp4-svdquant": (
            "W4A4: nvfp4 with a low-rank branch in full precision beside each weight (SVDQuant)"
        ),
        "mxfp8": "W8A8: mxfp8 weights and activations, dynamic; needs no data",
        "mxfp6": "W6A6: mxfp6 (e3m2) weights and activations, dynamic; needs no data",
        "mxfp4": "W4A4: mxfp4 weights and activations, dynamic; needs no data",
        "mxint8": "W8A8: mxint8 weights and activations, dynamic; needs no data",
        "nf4": "nf4 weights in groups of 64 (QLoRA), activations as they are; needs no data",
    }
    return [
        RecipeSource(
            name=name,
            package="bittern.builtin",
            resource=f"recipes/{name}.yaml",
            description=description,
        )
        for name, description in descriptions.items()
    ]


@hookimpl(trylast=True)
def run_calibration(model: nn.Module, plan: Plan, forward: Callable[[], int]) -> int:
    """Run the data pass as it is."""
    return forward()
