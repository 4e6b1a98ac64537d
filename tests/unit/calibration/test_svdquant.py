"""SVDQuant: factors against dense algebra, and what the branch buys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.calibration.svdquant import Metric, factors
from bittern.errors import CalibrationError
from bittern.nn import QuantModule, TensorQuantizer, named_quant_modules
from bittern.toolkit import Toolkit


def recipe(**options: float) -> dict[str, Any]:
    return {"extends": "nvfp4", "algorithm": [{"svdquant": {"rank": 4, **options}}]}


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.linspace(-2, 2, 64).exp()
    return [torch.randn(40, 64, generator=generator) * sizes for _ in range(2)]


def quantizer_of(module: nn.Module) -> TensorQuantizer:
    assert isinstance(module, QuantModule)
    found = module.quantizer("weight")
    assert found is not None
    return found


@torch.no_grad()
def error(model: nn.Module, x: Tensor) -> float:
    expected = model_of()(x)
    return float((model(x) - expected).norm() / expected.norm())


# --- the factors ----------------------------------------------------------------------------------


def metric(size: int, seed: int = 0) -> tuple[Metric, Tensor]:
    """Return a metric, and the Gram matrix that it stands for."""
    x = torch.randn(3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    matrix = x.t() @ x
    root = torch.linalg.cholesky(matrix)
    return Metric(root, torch.linalg.inv(root)), matrix


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (300, 200)])
def test_no_other_factors_of_that_rank_are_closer(shape: tuple[int, int]) -> None:
    """By Eckart and Young, what is left are the singular values from the rank on."""
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    w = w @ torch.diag(torch.linspace(2, -4, shape[1], dtype=torch.float64).exp())
    own, matrix = metric(shape[1])
    b, a = factors(w, own, 3)
    missing = w - b @ a
    found = float(((missing @ matrix) * missing).sum())
    values = torch.linalg.eigvalsh(w @ matrix @ w.t()).flip(0)
    assert b.shape == (shape[0], 3)
    assert a.shape == (3, shape[1])
    assert found == pytest.approx(float(values[3:].sum()), rel=1e-6)


def test_a_rank_beyond_the_matrix_gives_all_of_it() -> None:
    w = torch.randn(5, 7, dtype=torch.float64)
    b, a = factors(w, metric(7)[0], 32)
    assert b.shape == (5, 5)
    torch.testing.assert_close(b @ a, w)


# --- the algorithm --------------------------------------------------------------------------------


def test_a_branch_lowers_the_error_and_a_wider_one_lowers_it_further(toolkit: Toolkit) -> None:
    errors = {}
    for name, chosen in {
        "none": "nvfp4",
        "4": recipe(rounds=0),
        "24": recipe(rounds=0, rank=24),
    }.items():
        model = model_of()
        toolkit.quantize(model, chosen, batches())
        errors[name] = error(model, batches()[0])
    assert errors["24"] < errors["4"] < errors["none"]


def test_fitting_to_the_rounded_weight_lowers_the_error_of_the_weights(toolkit: Toolkit) -> None:
    errors = []
    for rounds in (0, 4):
        model = model_of()
        weights = {"extends": "nvfp4a16", "algorithm": recipe(rounds=rounds)["algorithm"]}
        toolkit.quantize(model, weights, batches())
        errors.append(error(model, batches()[0]))
    assert errors[1] < errors[0]


def test_searched_ranges_lower_the_error_of_the_weights(toolkit: Toolkit) -> None:
    errors = []
    for search in (False, True):
        model = model_of()
        weights = {"extends": "nvfp4a16", "algorithm": recipe(search=search)["algorithm"]}
        toolkit.quantize(model, weights, batches())
        errors.append(error(model, batches()[0]))
    assert errors[1] < errors[0]


def test_every_branch_has_the_shape_of_its_weight_and_weights_stay(toolkit: Toolkit) -> None:
    model = model_of()
    toolkit.quantize(model, recipe(), batches())
    assert len(dict(named_quant_modules(model))) == 2
    for path, module in named_quant_modules(model):
        quantizer = quantizer_of(module)
        assert quantizer.transforms is not None
        assert quantizer.transforms.low_rank is not None
        assert quantizer.transforms.low_rank.product().shape == module.weight.shape
        assert quantizer.transforms.low_rank.rank == 4
        assert torch.equal(module.weight, model_of().get_submodule(path).weight)


def test_running_it_again_gives_the_same(toolkit: Toolkit) -> None:
    model, x = model_of(), batches()[0]
    toolkit.quantize(model, recipe(), batches())
    with torch.no_grad():
        expected = model(x)
    toolkit.quantize(model, recipe(), batches())
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_inputs_that_are_zero_do_no_harm(toolkit: Toolkit) -> None:
    model = model_of()
    toolkit.quantize(model, recipe(), [torch.zeros(8, 64)])
    with torch.no_grad():
        assert bool(model(batches()[0]).isfinite().all())


def test_layers_without_a_place_for_it_are_quantized_as_they_are(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(16, 32, 1), nn.Flatten(), nn.Linear(32, 16)).eval()
    chosen = {**recipe(), "rules": [{"match": {"class": "Conv1d"}, "weight": "int8"}]}
    toolkit.quantize(model, chosen, [torch.randn(4, 16, 1)])
    assert quantizer_of(model[0]).transforms is None
    assert quantizer_of(model[0]).calibrated
    assert quantizer_of(model[2]).transforms is not None


def test_an_error_afterwards_leaves_the_model_as_it_was(toolkit: Toolkit) -> None:
    model, x = model_of(), batches()[0]
    steps = [*recipe()["algorithm"], {"percentile": {"p": 200}}]
    with pytest.raises(CalibrationError, match="percentile"):
        toolkit.quantize(model, {**recipe(), "algorithm": steps}, batches())
    assert type(model[0]) is nn.Linear
    with torch.no_grad():
        assert torch.equal(model(x), model_of()(x))


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 1.5}, {"rounds": -1}])
def test_options_out_of_range_are_refused(options: dict[str, float], toolkit: Toolkit) -> None:
    with pytest.raises(CalibrationError, match=next(iter(options))):
        toolkit.quantize(model_of(), recipe(**options), batches())


def test_it_needs_data(toolkit: Toolkit, make_mlp: Callable[..., nn.Module]) -> None:
    weights = {"extends": "nvfp4a16", "algorithm": "svdquant"}
    with pytest.raises(CalibrationError, match="data"):
        toolkit.quantize(make_mlp(), weights)
