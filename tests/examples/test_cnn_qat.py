"""The CNN example: folding and int8 cost nothing, few bits cost a lot, training brings it back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROW = re.compile(r"^(W\dA\d) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def table(root: Path) -> dict[str, tuple[float, float, float]]:
    """Recipe to accuracy in percent: of the float model, quantized, and trained while quantized."""
    pytest.importorskip("sklearn", reason="pip install scikit-learn")
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "cnn_qat.py"), "--epochs", "3"],
        env={**os.environ, "BITTERN_DISABLE_PLUGINS": "*"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: (float(before), float(ptq), float(qat))
        for name, before, ptq, qat in ROW.findall(done.stdout)
    }


def test_every_recipe_has_a_row(table: dict[str, tuple[float, float, float]]) -> None:
    assert list(table) == ["W8A8", "W3A3", "W2A4"]


def test_the_net_learns_before_it_is_quantized(
    table: dict[str, tuple[float, float, float]],
) -> None:
    assert {before > 97 for before, _, _ in table.values()} == {True}


def test_eight_bits_cost_next_to_nothing(table: dict[str, tuple[float, float, float]]) -> None:
    before, quantized, trained = table["W8A8"]
    assert abs(quantized - before) < 0.6
    assert trained > before - 3


@pytest.mark.parametrize("name", ["W3A3", "W2A4"])
def test_training_regains_most_of_what_few_bits_cost(
    name: str, table: dict[str, tuple[float, float, float]]
) -> None:
    before, quantized, trained = table[name]
    assert quantized < before - 1.5
    assert trained > quantized + 1
    assert trained > 96


def test_two_bits_are_unusable_without_training(
    table: dict[str, tuple[float, float, float]],
) -> None:
    _, quantized, trained = table["W2A4"]
    assert 20 < quantized < 92
    assert trained > quantized + 5
