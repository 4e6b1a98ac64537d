"""Every kind of codec under torch.compile, torch.func and autograd: the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bittern.builtin.formats import FORMATS
from bittern.numerics import codec_of, fake_quantize
from bittern.records import PerGroup, PerTensor, QuantizerSpec

SameBits = Callable[[Tensor, Tensor], bool]

BY_NAME = {item.name: item for item in FORMATS}
KINDS = ["int4", "uint8", "int8-asym", "fp8", "nvfp4", "nvfp4-four-over-six", "mxfp6", "mxint8"]
KINDS.append("nf4")


def spec(name: str) -> QuantizerSpec:
    found = BY_NAME[name]
    return QuantizerSpec(found, PerGroup(16) if found.block_only else PerTensor())


def data(name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    return (x if codec_of(BY_NAME[name]).signed else x.abs()).to(dtype)


@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_call_is_one_graph_with_the_same_result(name: str, same_bits: SameBits) -> None:
    torch.compiler.reset()
    kind, x = spec(name), data(name)
    compiled = torch.compile(
        lambda values: fake_quantize(values, kind), backend="eager", fullgraph=True
    )

    assert same_bits(compiled(x), fake_quantize(x, kind))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", [name for name in KINDS if codec_of(BY_NAME[name]).signed])
def test_vmap_over_rows_gives_what_rows_give_alone(name: str, same_bits: SameBits) -> None:
    kind, x = spec(name), data(name, torch.float32)
    together = torch.vmap(lambda row: fake_quantize(row, kind))(x)

    assert same_bits(together, torch.stack([fake_quantize(row, kind) for row in x]))


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_that_requires_grad_has_the_same_result(name: str, same_bits: SameBits) -> None:
    kind, x = spec(name), data(name, torch.float32)
    found = fake_quantize(x.clone().requires_grad_(), kind)

    assert same_bits(found.detach(), fake_quantize(x, kind))
