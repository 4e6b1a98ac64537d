"""The kit's helpers: comparing, exchanging values, making frameworks, refusing pickle."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import bittern.testing
from bittern.testing import (
    assert_bit_identical,
    assert_sqnr,
    fake_framework,
    no_pickle,
    sqnr,
)
from bittern.testing.exchange import read_value, write_value

# --- the package ----------------------------------------------------------------------------------


def test_the_package_loads_nothing_by_itself() -> None:
    code = (
        "import sys, bittern.testing\n"
        "print([m for m in ('torch', 'pytest', 'hypothesis', 'pluggy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert sorted(bittern.testing.__all__) == list(bittern.testing.__all__)
    for name in bittern.testing.__all__:
        assert getattr(bittern.testing, name).__name__ == name
        assert name in dir(bittern.testing)
    with pytest.raises(AttributeError, match="no_such_name"):
        bittern.testing.no_such_name  # noqa: B018


# --- bits -----------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    name: str = "x"


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, float("nan"), -0.0]),
        torch.tensor(2.0),
        torch.empty(0, 3),
        torch.ones(1, 4).expand(3, 4),
        torch.arange(6).reshape(2, 3).T,
        torch.ones(3, dtype=torch.bfloat16).requires_grad_(),
        torch.tensor([True, False]),
        {"a": [torch.ones(2), (None, 1, 2.5)]},
        Output(torch.ones(2)),
        math.nan,
    ],
    ids=str,
)
def test_equal_values_are_bit_identical(value: object) -> None:
    assert_bit_identical(value, value)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), r"value: 1 of 1 .* at \(0,\): 0.0 \(0x0000"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0)),
            r"at \(1, 2\): 0.0 \(0x00000000\) against 1.0 \(0x3f800000\)",
        ),
        (torch.ones(2), torch.ones(2).double(), "dtype torch.float32 against torch.float64"),
        (torch.ones(2), torch.ones(1, 2), r"shape \(2,\) against \(1, 2\)"),
        ({"a": [torch.ones(1)]}, {"a": [torch.zeros(1)]}, r"value\['a'\]\[0\]: 1 of 1"),
        (Output(torch.ones(1)), Output(torch.ones(1), "y"), "value.name: 'x' against 'y'"),
        ((1, 2), [1, 2], "a tuple against a list"),
        ((1, 2), (1, 2, 3), "2 items against 3"),
        ({"a": 1}, {"b": 1}, "keys"),
        (1.0, 1, "float against a int"),
        (0.0, -0.0, "0.0 against -0.0"),
    ],
    ids=lambda v: "",
)
def test_the_first_difference_is_named(a: object, b: object, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_bit_identical(a, b)


def test_nan_payloads_count_unless_they_do_not() -> None:
    a = torch.tensor([0x7FC00000, 0x3F800000], dtype=torch.int32).view(torch.float32)
    b = torch.tensor([0x7FC00001, 0x3F800000], dtype=torch.int32).view(torch.float32)

    assert_bit_identical(a, b, any_nan=True)
    with pytest.raises(AssertionError, match="nan"):
        assert_bit_identical(a, b)
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_bit_identical(a, torch.tensor([math.nan, 2.0]), any_nan=True)


# --- signal to noise ------------------------------------------------------------------------------


def test_sqnr_in_decibels() -> None:
    x = torch.ones(100)

    assert assert_sqnr(x, x * 1.1, 19.9) == pytest.approx(20.0, abs=1e-4)
    assert sqnr({"a": x}, {"a": x}) == math.inf
    with pytest.raises(AssertionError, match=r"the SQNR is 20.0 dB, at least 30 dB are wanted"):
        assert_sqnr(x, x * 1.1, 30)
    with pytest.raises(AssertionError, match="nan"):
        assert_sqnr(x, x * math.nan, 0)
    with pytest.raises(AssertionError, match="shapes"):
        sqnr(x, x[:5])


# --- values between processes ---------------------------------------------------------------------


def test_values_survive_the_exchange(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    value = {
        "tensors": [shared, shared[1:3], torch.tensor(1.5), torch.empty(0)],
        "plain": (None, True, 3, 2.5, "text", tmp_path),
        "nested": {"a": ({"b": []},)},
        "half": torch.ones(2, dtype=torch.bfloat16).as_strided((2,), (1,)),
    }
    write_value(tmp_path, "value", value)

    assert_bit_identical(value, read_value(tmp_path, "value"))


@pytest.mark.parametrize("value", [object(), {1: 2}, [lambda: None]], ids=["object", "key", "code"])
def test_other_values_are_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_value(tmp_path, "value", value)


# --- pickle ---------------------------------------------------------------------------------------


def test_pickle_raises_inside_and_works_outside(tmp_path: Path) -> None:
    with no_pickle():
        for function in (pickle.dumps, lambda v: torch.save(v, tmp_path / "x"), pickle.loads):
            with pytest.raises(AssertionError, match="safetensors"):
                function(b"1")

    assert pickle.loads(pickle.dumps([1])) == [1]
    torch.save([1], tmp_path / "x")


# --- frameworks -----------------------------------------------------------------------------------


def test_a_fake_framework_comes_and_goes() -> None:
    path = list(sys.path)
    files = {"__init__.py": "x = 1", "deep/__init__.py": "", "deep/layers.py": "class Layer: pass"}
    with fake_framework("grebe", files, version="2.3") as framework:
        assert not framework.imported
        assert importlib.metadata.version("grebe") == "2.3"
        assert importlib.import_module("grebe.deep.layers").Layer.__name__ == "Layer"
        assert framework.imported

    assert sys.path == path
    assert not [name for name in sys.modules if name.startswith("grebe")]
    assert not framework.path.exists()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("grebe")


def test_a_fake_framework_does_not_hide_a_real_one() -> None:
    with pytest.raises(ValueError, match="torch"), fake_framework("torch"):
        pass


def test_a_fake_framework_goes_after_an_error_too() -> None:
    def fail() -> None:
        with fake_framework("grebe", "raise RuntimeError('broken')"):
            importlib.import_module("grebe")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            fail()
