"""A quantized class must be called as the class it takes the place of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from bittern.errors import PluginError
from bittern.nn import QuantModule
from bittern.records import ModuleRule, Slot
from bittern.registry import target_of
from bittern.toolkit import Toolkit


def module(forward: Callable[..., Any]) -> type[nn.Module]:
    return type("Wing", (nn.Linear,), {"forward": forward, "__module__": "wing_signatures"})


def quantized(**body: Any) -> type[nn.Module]:
    return type("QuantWing", (QuantModule,), {**body, "__module__": "wing_signatures"})


OWN: dict[str, Callable[..., Any]] = {
    "x": lambda self, x: x,
    "x, mask": lambda self, x, mask: x,
    "x, mask=None": lambda self, x, mask=None: x,
    "x, *, mask": lambda self, x, *, mask: x,
    "*args": lambda self, *args: args,
    "**options": lambda self, **options: options,
    "*args, **options": lambda self, *args, **options: args,
    "y": lambda self, y: y,
}


@pytest.fixture
def fits(make_plugin: Any, toolkit_with: Any) -> Iterator[Callable[..., None]]:
    """Converts a model with a class of one forward by a rule with another."""
    home = ModuleType("wing_signatures")
    sys.modules[home.__name__] = home

    def convert(own: type[nn.Module], new: type[nn.Module]) -> None:
        home.Wing, home.QuantWing = own, new  # type: ignore[attr-defined]
        rule = ModuleRule(
            target=target_of(own), quantized="wing_signatures:QuantWing", slots=(Slot("input"),)
        )
        toolkit: Toolkit = toolkit_with(make_plugin("alpha", register_modules=lambda: [rule]))
        model = nn.Sequential(own(2, 2))
        toolkit.convert(model, toolkit.plan(model, {"rules": [{"match": "0", "input": "int8"}]}))

    yield convert
    del sys.modules[home.__name__]


@pytest.mark.parametrize(
    ("own", "new"),
    [
        ("x", "x"),
        ("x", "y"),
        ("x", "x, mask=None"),
        ("x, mask=None", "x"),  # the mask may never be given
        ("x, mask", "x, mask=None"),
        ("x, mask", "*args"),
        ("x, *, mask", "*args, **options"),
        ("*args", "x"),
        ("*args, **options", "x, mask"),
    ],
)
def test_what_can_be_called_alike_is_converted(
    own: str, new: str, fits: Callable[..., None]
) -> None:
    fits(module(OWN[own]), quantized(forward=OWN[new]))


@pytest.mark.parametrize(
    ("own", "new"),
    [
        ("x, mask", "x"),
        ("x", "x, mask"),
        ("x, *, mask", "x"),
        ("x", "x, *, mask"),
        ("x, *, mask", "*args"),
        ("x", "**options"),
    ],
)
def test_a_class_that_changed_its_forward_names_the_plugin_and_both_signatures(
    own: str, new: str, fits: Callable[..., None]
) -> None:
    with pytest.raises(PluginError) as caught:
        fits(module(OWN[own]), quantized(forward=OWN[new]))
    assert caught.value.what == (
        f"plugin bittern-alpha 1.0: QuantWing.forward({new}) is not called as "
        f"Wing.forward({own}); Wing was changed since the plugin was made"
    )
    assert caught.value.where == "0"
    assert (caught.value.hint or "").startswith("pip install -U bittern-alpha, or the version")


def test_a_quantized_class_need_not_have_a_forward(fits: Callable[..., None]) -> None:
    fits(module(OWN["x, mask"]), quantized(attend=lambda self: None))
