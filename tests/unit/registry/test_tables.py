"""Named tables, kernels, targets: provenance, choice, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import permutations
from types import ModuleType
from typing import Any

import pytest
import torch

from bittern.errors import ExportError, PluginConflictError, PluginError, RecipeError
from bittern.records import KernelRule, NumberFormat, RecipeSource
from bittern.registry import KernelTable, NamedTable, nearest, resolve
from bittern.toolkit import Toolkit

CPU = torch.device("cpu")


def source(name: str, text: str = "") -> RecipeSource:
    return RecipeSource(name=name, description=text)


# --- named tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations([("core", True), ("alpha 1.0", False)])))
def test_a_plugins_record_goes_before_cores(order: Any) -> None:
    table = NamedTable("recipe", [(source("x", p), p, c) for p, c in order], error=RecipeError)

    assert table.plugin("x") == "alpha 1.0"
    assert table.get("x").description == "alpha 1.0"


def test_two_plugins_of_one_name_conflict_only_when_the_name_is_used() -> None:
    items = [(source("x"), "b 2", False), (source("x"), "a 1", False), (source("y"), "a 1", False)]
    table = NamedTable("recipe", items, error=RecipeError)

    assert list(table) == ["x", "y"]
    assert table.get("y").name == "y"
    with pytest.raises(PluginConflictError, match="a 1 and b 2 both register the recipe 'x'"):
        table.get("x")
    with pytest.raises(PluginConflictError):
        table.plugin("x")


def test_an_unknown_name_is_an_error_of_the_tables_kind_with_the_nearest() -> None:
    table = NamedTable("export format", [(source("safetensors"), "core", True)], error=ExportError)
    with pytest.raises(ExportError, match="unknown export format 'safetensor'") as caught:
        table.get("safetensor")

    assert caught.value.hint == "did you mean 'safetensors'? known: safetensors"
    assert "safetensor" not in table
    assert "safetensors" in table


def test_an_empty_table_says_so() -> None:
    table: NamedTable[RecipeSource] = NamedTable("recipe", [], error=RecipeError)
    with pytest.raises(RecipeError) as caught:
        table.get("x")
    assert caught.value.hint == "none is known"


def test_nearest_ranks_by_likeness() -> None:
    assert nearest("INT8", ["fp8", "int8", "int4"]) == ["int8"]
    assert nearest("int8", ["fp8", "int8", "int4"], count=2) == ["int8", "int4"]
    assert nearest("x", [], count=3) == []


def test_a_plugins_format_replaces_cores_in_recipes(
    make_plugin: Callable[..., ModuleType], toolkit_with: Callable[..., Toolkit]
) -> None:
    narrow = NumberFormat(
        name="int8",
        bits=8,
        codec="bittern.numerics.integers:IntCodec",
        params={"bits": 8, "narrow": True},
    )
    toolkit = toolkit_with(make_plugin("alpha", register_formats=lambda: [narrow]))

    assert toolkit.registry.formats.get("int8") is narrow
    assert toolkit.registry.formats.plugin("int8") == "bittern-alpha 1.0"


# --- kernels --------------------------------------------------------------------------------------


def first() -> None: ...
def second() -> None: ...
def third() -> None: ...


FUNCTIONS = {"first": first, "second": second, "third": third}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module with the kernels."""
    import sys

    module = ModuleType("kernels_of_a_test")
    module.__dict__.update(FUNCTIONS)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def kernel(module: str, name: str, **options: Any) -> KernelRule:
    given = {"op": "fake_quantize", "device": "cpu", "formats": ("int8",), **options}
    return KernelRule(impl=f"{module}:{name}", **given)


@pytest.mark.parametrize(
    ("options", "asked", "fits"),
    [
        ({}, ("fake_quantize", "int8", CPU, torch.float32), True),
        ({}, ("fake_quantize", "int8", CPU, torch.bfloat16), True),
        ({}, ("fake_quantize", "int8", CPU, torch.float64), False),
        ({"dtypes": ("float64",)}, ("fake_quantize", "int8", CPU, torch.float64), True),
        ({}, ("fake_quantize", "int4", CPU, torch.float32), False),
        ({"formats": ("fp8", "int4")}, ("fake_quantize", "int4", CPU, torch.float32), True),
        ({}, ("amax", "int8", CPU, torch.float32), False),
        ({}, ("fake_quantize", "int8", torch.device("meta"), torch.float32), False),
        ({"device": "meta"}, ("fake_quantize", "int8", torch.device("meta"), torch.float32), True),
        ({"capability": (0, 0)}, ("fake_quantize", "int8", CPU, torch.float32), True),
        ({"capability": (9, 0)}, ("fake_quantize", "int8", CPU, torch.float32), False),
    ],
)
def test_a_kernel_is_chosen_by_op_format_device_dtype_and_capability(
    options: dict[str, Any], asked: Any, kernels: str, *, fits: bool
) -> None:
    table = KernelTable([(kernel(kernels, "first", **options), "p 1", False)])

    assert table.find(*asked) is (first if fits else None)
    assert table.find(*asked) is (first if fits else None)  # and again, from memory


def test_without_kernels_the_reference_is_used() -> None:
    assert KernelTable().find("fake_quantize", "int8", CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([("first", {}, "a", False), ("second", {"priority": 1}, "b", False)], second),
        ([("first", {}, "core", True), ("second", {}, "z", False)], second),
        ([("first", {"priority": 1}, "core", True), ("second", {}, "z", False)], first),
        ([("first", {}, "b", False), ("second", {}, "a", False)], second),
        ([("second", {}, "a", False), ("first", {}, "a", False)], first),
    ],
)
def test_priority_then_plugin_over_core_then_the_name_decides(
    items: Any, expected: Callable[[], None], kernels: str
) -> None:
    for order in permutations(items):
        table = KernelTable([(kernel(kernels, n, **o), p, c) for n, o, p, c in order])
        assert table.find("fake_quantize", "int8", CPU, torch.float32) is expected


def test_a_kernel_is_imported_only_when_it_is_needed(kernels: str) -> None:
    items = [
        (kernel("no_such_module", "x", formats=("fp8",)), "alpha 1.0", False),
        (kernel(kernels, "third"), "beta 1.0", False),
    ]
    table = KernelTable(items)

    assert table.find("fake_quantize", "int8", CPU, torch.float32) is third
    with pytest.raises(PluginError, match=r"plugin alpha 1\.0: the target 'no_such_module:x'"):
        table.find("fake_quantize", "fp8", CPU, torch.float32)


def test_copies_of_a_model_share_its_kernels() -> None:
    table = KernelTable()
    assert copy.deepcopy({"kernels": table})["kernels"] is table


# --- targets --------------------------------------------------------------------------------------


def test_a_target_is_imported() -> None:
    assert resolve("torch.nn.modules.linear:Linear") is torch.nn.Linear
    assert resolve("torch.nn.modules.linear:Linear.forward") is torch.nn.Linear.forward


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.nn.Linear", "is not a target"),
        (":Linear", "is not a target"),
        ("torch.nn:", "is not a target"),
        ("", "is not a target"),
        ("no_such_module:X", "does not resolve"),
        ("torch.nn:NoSuchClass", "does not resolve"),
        ("torch.nn:Linear.no_such_attribute", "does not resolve"),
    ],
)
def test_a_bad_target_names_the_plugin(target: str, message: str) -> None:
    with pytest.raises(PluginError, match=message) as caught:
        resolve(target, plugin="alpha 1.0")
    assert caught.value.what.startswith("plugin alpha 1.0: ")
    assert caught.value.hint
