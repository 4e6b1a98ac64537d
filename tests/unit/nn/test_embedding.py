"""nn.Embedding and nn.EmbeddingBag read quantized rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bittern.nn import quantizers_off
from bittern.toolkit import Toolkit

from .reference import WEIGHT, int8, with_weights

ROWS = {"rules": [{"match": "*", "weight": WEIGHT}]}
IDS = torch.tensor([[1, 4, 2, 0], [3, 9, 9, 5]])


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_an_embedding_reads_quantized_rows_and_trains_the_rows_it_read(
    options: dict[str, Any], toolkit: Toolkit
) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(12, 5, **options)
    plain = with_weights(model, weight=int8(model.weight, 0))
    toolkit.quantize(model, ROWS)

    found, expected = model(IDS), plain(IDS)
    (found * torch.arange(5.0)).sum().backward()
    (expected * torch.arange(5.0)).sum().backward()

    assert torch.equal(found, expected)
    assert torch.equal(model.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_stay_sparse(make: Any, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    options = {"mode": "sum"} if make is nn.EmbeddingBag else {}
    model = make(12, 5, sparse=True, **options)
    plain = with_weights(model)
    toolkit.quantize(model, ROWS)

    model(IDS).sum().backward()
    plain(IDS).sum().backward()

    assert model.weight.grad.is_sparse
    assert torch.equal(model.weight.grad.to_dense(), plain.weight.grad.to_dense())


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_shortens_the_table_itself_before_the_rows_are_quantized(
    make: Any, toolkit: Toolkit
) -> None:
    torch.manual_seed(0)
    model = make(12, 5, max_norm=1.5, norm_type=1.0)
    original, before = copy.deepcopy(model), model.weight.detach().clone()
    toolkit.quantize(model, ROWS)
    with torch.no_grad():
        found = model(IDS)
        original(IDS)

    assert torch.equal(model.weight, original.weight)
    assert not torch.equal(model.weight, before)
    rows = int8(original.weight, amax=before.abs().amax(1, keepdim=True))
    expected = F.embedding(IDS, rows) if make is nn.Embedding else F.embedding_bag(IDS, rows)
    assert torch.equal(found, expected)
    with quantizers_off(model), torch.no_grad():
        assert torch.equal(model(IDS), original(IDS))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 4])
def test_a_bag_reduces_quantized_rows(mode: str, padding: int | None, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.EmbeddingBag(12, 5, mode=mode, padding_idx=padding)
    plain = with_weights(model, weight=int8(model.weight, 0))
    toolkit.quantize(model, ROWS)
    offsets = torch.tensor([0, 3, 3])
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
        assert torch.equal(model(IDS[0], offsets), plain(IDS[0], offsets))


def test_a_bag_weighs_its_samples(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.EmbeddingBag(12, 5, mode="sum", include_last_offset=True)
    plain = with_weights(model, weight=int8(model.weight, 0))
    toolkit.quantize(model, ROWS)
    offsets = torch.tensor([0, 1, 4])
    weights = torch.randn(4, requires_grad=True)

    found = model(IDS[0], offsets, per_sample_weights=weights)
    expected = plain(IDS[0], offsets, per_sample_weights=weights.detach())

    assert found.shape == (2, 5)
    assert torch.equal(found, expected)
    found.sum().backward()
    torch.testing.assert_close(weights.grad, plain.weight.detach()[IDS[0]].sum(1))
