"""Gram matrices of the inputs of weights, against plain sums in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.calibration.context import CalibrationContext
from bittern.calibration.gram import Gram, observe_grams
from bittern.errors import CalibrationError
from bittern.nn.observer import SharedInputs


def grams(model: nn.Module, data: list[Any], recipe: Any = None, **options: Any) -> dict[str, Gram]:
    recipe = recipe or {"rules": [{"match": "*", "weight": "int8"}]}
    result = bt.quantize(model.eval(), recipe, data)

    def forward() -> int:
        for x in data:
            model(x)
        return len(data)

    context = CalibrationContext(
        shared=SharedInputs(), access=lambda module, *, write: nullcontext()
    )
    return observe_grams(model, result.plan, forward, context, **options)


def outer(rows: Tensor) -> Tensor:
    rows = rows.double().flatten(0, -2)
    return rows.t() @ rows


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_linear_has_the_sum_over_all_tokens() -> None:
    data = [torch.randn(2, 5, 8), torch.randn(1, 3, 8)]
    found = grams(nn.Sequential(nn.Linear(8, 3)), data)["0.weight"]
    close(found.matrix[0], outer(data[0]) + outer(data[1]))
    assert found.tokens.tolist() == [13]
    assert found.layout.matrices(torch.zeros(3, 8)).shape == (1, 3, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.late = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) * self.k(x).sum(-1, keepdim=True)
        z: Tensor = self.o(y)
        if len(x) > 1:
            self.late(x)
        return z.sum() + self.late(x).sum()


def test_weights_that_read_one_tensor_share_one_matrix() -> None:
    data = [torch.randn(1, 8), torch.randn(3, 8)]
    found = grams(Attention(), data)
    assert list(found) == ["q.weight", "k.weight", "o.weight", "late.weight"]
    assert found["q.weight"].matrix is found["k.weight"].matrix
    assert found["q.weight"].matrix is not found["o.weight"].matrix
    close(found["q.weight"].matrix[0], outer(data[0]) + outer(data[1]))
    close(found["late.weight"].matrix[0], outer(data[0]) + 2 * outer(data[1]))
    assert found["late.weight"].tokens.tolist() == [7]


def test_inputs_are_as_their_quantizers_make_them() -> None:
    recipe = {"rules": [{"match": "*", "weight": "int8", "input": "int4"}]}
    data = [torch.randn(6, 8)]
    rounded, plain = (
        grams(nn.Sequential(nn.Linear(8, 3)), data, recipe, quantized=quantized)
        for quantized in (True, False)
    )
    scale = data[0].abs().max() / 7
    close(plain["0.weight"].matrix[0], outer(data[0]))
    close(rounded["0.weight"].matrix[0], outer((data[0] / scale).round().clamp(-8, 7) * scale))


@pytest.mark.parametrize("wider", [None, "range", "format"])
def test_equal_copies_of_one_tensor_share_one_matrix(wider: str | None) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x).sum() + self.k(2 * x if wider == "range" else x).sum()

    rules = [{"match": "*", "weight": "int8", "input": "int4"}]
    rules += [{"match": "k", "input": "int8"}] if wider == "format" else []
    data = [torch.randn(6, 8), torch.randn(3, 8)]
    found = grams(Two(), data, {"rules": rules})
    assert (found["q.weight"].matrix is found["k.weight"].matrix) == (wider is None)
    x = torch.cat(data)
    scale = x.abs().max() / 7
    rounded = [(x / scale).round().clamp(-8, 7) * scale for x in data]
    close(found["q.weight"].matrix[0], outer(torch.cat(rounded)))


def test_a_tensor_that_is_written_to_is_another_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x.clone()
            first = self.q(h).sum()
            return first + self.k(h.mul_(3)).sum()

    data = [torch.randn(6, 8)]
    found = grams(Two(), data)
    close(found["q.weight"].matrix[0], outer(data[0]))
    close(found["k.weight"].matrix[0], 9 * outer(data[0]))


def unfolded(conv: Any, x: Tensor) -> Tensor:
    """Return the rows that a convolution multiplies, read off products with single ones."""
    taps = conv.weight[0].numel()
    rows = []
    for group in range(conv.groups):
        probe = torch.zeros(taps * conv.groups, *conv.weight.shape[1:])
        own = range(group * taps, (group + 1) * taps)
        probe[list(own)] = torch.eye(taps).reshape(taps, *conv.weight.shape[1:])
        out = type(conv)._conv_forward(conv, x, probe, None)[:, list(own)]
        rows.append(out.flatten(2).transpose(1, 2).flatten(0, 1))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv1d(4, 6, 3, padding=1, dilation=2),
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2),
        lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4),
        lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv3d(2, 3, 2, stride=2),
    ],
)
def test_a_convolution_multiplies_patches(conv: Callable[[], Any]) -> None:
    layer = conv()
    x = torch.randn(2, layer.in_channels, *[6] * len(layer.kernel_size))
    rows = unfolded(layer, x)
    found = grams(nn.Sequential(layer), [x])["0.weight"]
    close(found.matrix, torch.stack([outer(part) for part in rows]))
    matrices = found.layout.matrices(layer.weight)
    product = (rows @ matrices.transpose(1, 2)).permute(0, 2, 1).reshape(layer.out_channels, 2, -1)
    expected = layer._conv_forward(x, layer.weight, None).flatten(2)
    torch.testing.assert_close(product.transpose(0, 1), expected)


def test_convolutions_of_one_input_share_only_what_is_the_same() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 3, 3), nn.Conv1d(2, 5, 3)
            self.c = nn.Conv1d(2, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).sum() + self.b(x).sum() + self.c(x).sum()

    found = grams(Two(), [torch.randn(1, 2, 7)])
    assert found["a.weight"].matrix is found["b.weight"].matrix
    assert found["c.weight"].tokens.tolist() == [7]


def test_what_no_product_reads_is_missing() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 3))
    assert list(grams(model, [torch.tensor([[1, 2]])])) == ["1.weight"]


def test_the_projections_of_attention_are_found_in_the_function_that_runs_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return found

    data = [torch.randn(2, 3, 8)]
    found = grams(Model(), data)
    gram = found["attention.in_proj"]  # the rows for q, k and v are multiplied one by one
    close(gram.matrix[0] / gram.tokens[0], outer(data[0]) / 6)


def test_nan_names_the_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    bt.quantize(model.eval(), {"rules": [{"match": "*", "weight": "int8"}]})
    with pytest.raises(CalibrationError, match=r"0\.weight.*NaN or Inf"):
        grams(nn.Sequential(nn.Linear(8, 3)), [torch.full((1, 8), torch.nan)])
