"""The quantized classes of the plugin pass the kit for module rules."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from bittern.testing import ModuleCase, ModuleConformance

HIDDEN, INNER, COUNT = 16, 16, 4


def randomized(module: nn.Module) -> nn.Module:
    """Fill parameters that transformers leaves uninitialized."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT
    )
    config._experts_implementation = "grouped_mm"
    return randomized(MixtralExperts(config))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT
    )
    config._experts_implementation = "batched_mm"
    return randomized(GptOssExperts(config))


def llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT
    )
    return randomized(Llama4TextExperts(config))


def routed(generator: torch.Generator) -> tuple[Any, ...]:
    tokens = torch.randn(24, HIDDEN, generator=generator)
    scores = torch.rand(24, COUNT, generator=generator)
    weights, index = scores.topk(2, dim=-1)
    return tokens, index, weights


def rows(generator: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(COUNT * 6, HIDDEN, generator=generator),)


class TestModules(ModuleConformance):
    plugin = "huggingface"

    def cases(self) -> list[ModuleCase]:
        return [
            ModuleCase(
                "conv1d",
                make=lambda: randomized(Conv1D(24, 16)),
                inputs=lambda g: (torch.randn(3, 5, 16, generator=g),),
                experts=True,
            ),
            ModuleCase("mixtral-experts", make=mixtral, inputs=routed, experts=True),
            ModuleCase("gpt-oss-experts", make=gpt_oss, inputs=routed),
            ModuleCase("llama4-experts", make=llama4, inputs=rows),
        ]
