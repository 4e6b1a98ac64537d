"""Column-by-column rounding against dense algebra in float64 that inverts what it solves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bittern.calibration.columns import errors_of, factorize, refine_columns, round_columns

STEP = 0.25


def nearest(_: int, x: Tensor) -> Tensor:
    return (x / STEP).round() * STEP


def problem(rows: int = 64, inputs: int = 64, parts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(parts, rows, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator) / 4 + torch.eye(inputs)
    x = torch.randn(parts, 4 * inputs, inputs, generator=generator) @ mix
    return weight, x.transpose(1, 2) @ x


def damped(matrix: Tensor, share: float) -> Tensor:
    matrix = matrix.double()
    return matrix + torch.diag(matrix.diagonal() * share)


def by_least_squares(weight: Tensor, matrix: Tensor) -> Tensor:
    """Round the columns in order; after each, the later ones go where the error is least."""
    source, current = weight.double(), weight.double().clone()
    inputs = weight.shape[1]
    for j in range(inputs):
        current[:, j] = nearest(j, current[:, j])
        done, left = slice(0, j + 1), slice(j + 1, inputs)
        if j + 1 < inputs:
            error = current[:, done] - source[:, done]
            solved = error @ matrix[done, left] @ torch.linalg.inv(matrix[left, left])
            current[:, left] = source[:, left] - solved
    return current


@pytest.mark.parametrize("block", [1, 7, 64, 128])
def test_columns_are_those_of_constrained_least_squares(block: int) -> None:
    weight, matrix = problem()
    factor = factorize(matrix, damp=0.01)
    assert factor is not None
    found = round_columns(weight, factor, nearest, block=block)
    expected = by_least_squares(weight[0], damped(matrix[0], 0.01))
    # float32 decides a tie the other way now and then, and the row goes on from there
    same = (found[0].double() - expected).abs().amax(1) < 1e-5
    assert same.float().mean() > 0.9
    plain = errors_of(nearest(0, weight) - weight, matrix).sum()
    assert errors_of(found - weight, matrix).sum() < 0.5 * plain


def test_the_factors_say_what_errors_cost() -> None:
    weight, matrix = problem(5, 16)
    factor = factorize(matrix, damp=0.01)
    assert factor is not None
    whole = damped(matrix[0], 0.01)
    upper = factor.unit[0].double() * factor.cost[0].double().sqrt()
    torch.testing.assert_close(upper @ upper.t(), whole, rtol=1e-4, atol=1e-3)
    last = 1 / torch.linalg.inv(whole).diagonal()  # an error that all others make up for
    torch.testing.assert_close(factor.cost[0, 0].double(), last[0], rtol=1e-4, atol=0)
    error = weight[0].double()
    expected = (error @ matrix[0].double() * error).sum(1)
    torch.testing.assert_close(errors_of(weight, matrix)[0].double(), expected, rtol=1e-4, atol=0)


def test_parts_are_rounded_each_on_its_own() -> None:
    weight, matrix = problem(6, 12, parts=3)
    factor = factorize(matrix, damp=0.01)
    assert factor is not None
    found = round_columns(weight, factor, nearest, block=5)
    for part in range(3):
        own = factorize(matrix[part : part + 1], damp=0.01)
        assert own is not None
        alone = round_columns(weight[part : part + 1], own, nearest, block=5)
        torch.testing.assert_close(found[part], alone[0])


def test_damping_is_raised_until_a_singular_matrix_has_factors() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    factor = factorize((x.t() @ x)[None], damp=1e-9)
    assert factor is not None
    assert factor.damp > 1e-9
    assert factorize(-torch.eye(4)[None] + 2 * torch.ones(4, 4), damp=0.01) is not None
    assert factorize(torch.full((1, 4, 4), torch.nan), damp=0.01) is None


def test_an_input_that_was_always_zero_is_rounded_to_nearest() -> None:
    weight, matrix = problem(8, 10)
    matrix[:, 4] = 0
    matrix[:, :, 4] = 0
    factor = factorize(matrix, damp=0.01)
    assert factor is not None
    found = round_columns(weight, factor, nearest, block=4)
    assert torch.equal(found[..., 4], nearest(0, weight[..., 4]))
    kept = [j for j in range(10) if j != 4]
    rest = factorize(matrix[:, kept][:, :, kept], damp=0.01)
    assert rest is not None
    torch.testing.assert_close(
        found[..., kept], round_columns(weight[..., kept], rest, nearest, block=4)
    )


@pytest.mark.parametrize("block", [5, 64])
def test_refined_columns_are_the_best_that_one_change_can_reach(block: int) -> None:
    weight, matrix = problem(8, 24)
    factor = factorize(matrix, damp=0.01)
    assert factor is not None
    whole = factor.damped(matrix)
    torch.testing.assert_close(whole[0].double(), damped(matrix[0], 0.01))
    found = round_columns(weight, factor, nearest, block=8)
    costs = [errors_of(found - weight, whole)]
    for _ in range(30):
        found = refine_columns(weight, found, whole, nearest, block=block)
        costs.append(errors_of(found - weight, whole))
        assert (costs[-1] <= costs[-2] * (1 + 1e-5)).all()
    assert costs[-1].sum() < 0.95 * costs[0].sum()
    for column in range(24):
        for step in (-STEP, STEP):
            other = found.clone()
            other[..., column] += step
            assert (errors_of(other - weight, whole) >= costs[-1] * (1 - 1e-5)).all()
