"""Wrong answers and failures of hooks: each names the plugin, the hook and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from bittern.errors import BitternError, DataError, ModelError, PluginError
from bittern.hooks import hookimpl
from bittern.records import ModelAdapter, NumberFormat, Plan
from bittern.toolkit import Toolkit

MakePlugin = Callable[..., ModuleType]
ToolkitWith = Callable[..., Toolkit]


def number_format(name: str) -> NumberFormat:
    return NumberFormat(name=name, bits=8, codec="bittern.numerics.integers:IntCodec")


# --- records --------------------------------------------------------------------------------------


class Lazy:
    """An iterable that fails when it is looked at."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[NumberFormat]:
        yield number_format("x")
        raise self.error


@pytest.mark.parametrize(
    "lazy",
    [
        lambda: Lazy(KeyError("lost")),
        lambda: Lazy(TypeError("lost")),
        lambda: map(int, ["lost"]),
    ],
)
def test_a_lazy_iterable_that_fails_when_it_is_read_is_attributed(
    lazy: Callable[[], Any], make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    toolkit = toolkit_with(make_plugin("alpha", register_formats=lazy))
    with pytest.raises(PluginError) as caught:
        list(toolkit.registry.formats)
    assert caught.value.what.startswith(
        "plugin bittern-alpha 1.0 failed in hook register_formats: "
    )
    assert type(caught.value.__cause__) in (KeyError, TypeError, ValueError)


def test_a_record_of_a_plugins_own_subclass_is_welcome(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    class Special(NumberFormat):
        pass

    special = Special(name="x", bits=8, codec="bittern.numerics.integers:IntCodec")
    toolkit = toolkit_with(make_plugin("alpha", register_formats=lambda: [special]))
    assert toolkit.registry.formats.get("x") is special


def test_a_class_that_only_has_the_name_of_a_record_is_none(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    fake = type("NumberFormat", (), {"__dataclass_fields__": {}, "name": "x"})()
    toolkit = toolkit_with(make_plugin("alpha", register_formats=lambda: [fake]))
    with pytest.raises(PluginError, match="must return NumberFormat records"):
        list(toolkit.registry.formats)


# --- answers --------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, tuple[Callable[[Toolkit], object], str]]] = [
    ("resolve_model", "weights.bin", (lambda t: t.load("x"), "an nn.Module")),
    ("resolve_model_adapter", {}, (lambda t: t.adapter(nn.Linear(2, 2)), "a bittern.records.Mod")),
    ("resolve_weight_access", 7, (lambda t: t.access(nn.Linear(2, 2), write=False), "a context")),
    ("resolve_calibration_data", 7, (lambda t: t.data("x", nn.Linear(2, 2)), "an iterable of b")),
    ("resolve_calibration_data", "x", (lambda t: t.data("x", nn.Linear(2, 2)), "an iterable of b")),
]


@pytest.mark.parametrize(("hook", "answer", "case"), WRONG)
def test_an_answer_of_another_type_names_the_plugin_and_what_to_return(
    hook: str,
    answer: Any,
    case: tuple[Callable[[Toolkit], object], str],
    make_plugin: MakePlugin,
    toolkit_with: ToolkitWith,
) -> None:
    use, wanted = case
    toolkit = toolkit_with(make_plugin("alpha", **{hook: lambda: answer}))
    with pytest.raises(PluginError) as caught:
        use(toolkit)

    expected = f"plugin bittern-alpha 1.0 returned {answer!r} from {hook} instead of {wanted}"
    assert caught.value.what.startswith(expected)
    assert (caught.value.hint or "").startswith(f"return {wanted}")
    assert (caught.value.hint or "").endswith("or None for what is not for this plugin")


def test_every_hook_that_answers_has_its_answer_checked() -> None:
    from bittern.hooks import specs
    from bittern.hooks.results import ANSWERS

    answering = {n for n in vars(specs) if n.partition("_")[0] in ("resolve", "run")}
    assert answering == set(ANSWERS)


def test_a_model_of_any_class_is_a_model_without_torch_being_asked(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    class Own(nn.Sequential):
        pass

    model = Own(nn.Linear(2, 2))
    assert toolkit_with(make_plugin("alpha", resolve_model=lambda: model)).load("x") is model


def test_a_wrapper_that_loses_the_result_is_named(toolkit_with: ToolkitWith) -> None:
    def around() -> Generator[None, Any, Any]:
        yield

    module = ModuleType("alpha")
    module.run_calibration = hookimpl(wrapper=True)(around)  # type: ignore[attr-defined]
    with pytest.raises(PluginError) as caught:
        toolkit_with(module).quantize(nn.Sequential(nn.Linear(2, 2)), "int8", [torch.ones(1, 2)])
    assert caught.value.what == (
        "plugin bittern-alpha 1.0 returned None from run_calibration instead of "
        "the number of batches"
    )
    assert caught.value.hint == "let a wrapper return what `yield` gave it"


def test_a_wrapper_that_does_not_yield_is_named(toolkit_with: ToolkitWith) -> None:
    def around() -> Generator[None, Any, Any]:
        return
        yield

    module = ModuleType("alpha")
    module.resolve_model = hookimpl(wrapper=True)(around)  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"bittern-alpha 1\.0 failed in hook resolve_model"):
        toolkit_with(module).load("x")


# --- errors meant for the user --------------------------------------------------------------------


def raising(error: Exception) -> Callable[[], Any]:
    def hook() -> Any:
        raise error

    return hook


def test_an_error_meant_for_the_user_gets_the_plugins_name(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    error = DataError("no rows", where="a.txt", hint="look into it")
    toolkit = toolkit_with(make_plugin("alpha", resolve_calibration_data=raising(error)))
    with pytest.raises(DataError) as caught:
        toolkit.data("a.txt", nn.Linear(2, 2))

    assert caught.value is error
    assert str(error) == "a.txt: no rows\n  hint: look into it\n  plugin: bittern-alpha 1.0"
    assert error.to_dict()["plugin"] == "bittern-alpha 1.0"


def test_the_plugins_name_is_not_said_twice(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    error = ModelError("bittern-alpha 1.0 cannot load this")
    with pytest.raises(ModelError) as caught:
        toolkit_with(make_plugin("alpha", resolve_model=raising(error))).load("x")
    assert str(caught.value) == "bittern-alpha 1.0 cannot load this"


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_users_error_of_a_wrapper_gets_the_wrappers_name(
    where: str, toolkit_with: ToolkitWith
) -> None:
    def around() -> Generator[None, Any, Any]:
        if where == "before":
            raise BitternError("no amp here")
        yield
        raise BitternError("no amp here")

    with pytest.raises(BitternError) as caught:
        run(toolkit_with(wrapping("alpha", around)), lambda: 1)
    assert caught.value.plugin == "bittern-alpha 1.0"


def test_an_error_that_passes_through_a_wrapper_is_not_the_wrappers(
    toolkit_with: ToolkitWith,
) -> None:
    def around() -> Generator[None, Any, Any]:
        return (yield)

    def forward() -> int:
        raise DataError("no rows")

    with pytest.raises(DataError) as caught:
        run(toolkit_with(wrapping("alpha", around)), forward)
    assert caught.value.plugin is None


def test_an_error_of_one_plugin_in_the_wrapper_of_another_is_the_first_ones(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    def around() -> Generator[None, Any, Any]:
        return (yield)

    module = ModuleType("alpha")
    module.resolve_model = hookimpl(wrapper=True)(around)  # type: ignore[attr-defined]
    beta = make_plugin("beta", resolve_model=raising(ModelError("torn")))
    with pytest.raises(ModelError) as caught:
        toolkit_with(module, beta).load("x")
    assert caught.value.plugin == "bittern-beta 1.0"


def test_a_failure_within_a_hook_of_another_plugin_is_the_inner_ones(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    inner = toolkit_with(make_plugin("beta", resolve_model=raising(KeyError("lost"))))

    def resolve_model(source: str) -> Any:
        return inner.load(source)

    outer = make_plugin("alpha", resolve_model=resolve_model)
    with pytest.raises(PluginError) as caught:
        toolkit_with(outer).load("x")
    assert caught.value.plugin == "bittern-beta 1.0"
    assert "alpha" not in str(caught.value).partition("hint")[0]


# --- what is handed to plugins --------------------------------------------------------------------


def wrapping(name: str, function: Callable[..., Any]) -> ModuleType:
    module = ModuleType(name)
    module.run_calibration = hookimpl(wrapper=True)(function)  # type: ignore[attr-defined]
    return module


def run(toolkit: Toolkit, forward: Callable[[], Any]) -> Any:
    plan = Plan(recipe="r", entries=(), skipped={})
    return toolkit.plugins.first("run_calibration", model=None, plan=plan, forward=forward)


@pytest.mark.parametrize("error", [ValueError("bad batch"), DataError("no rows")])
def test_what_fails_in_the_users_data_is_not_blamed_on_the_plugin_that_runs_it(
    error: Exception, make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    cause = OSError("the disk")

    def forward() -> int:
        raise error from cause

    plugin = make_plugin("alpha", run_calibration=lambda forward: forward())
    with pytest.raises(type(error)) as caught:
        run(toolkit_with(plugin), forward)
    assert caught.value is error
    assert caught.value.__cause__ is cause
    assert getattr(error, "plugin", None) is None


def test_what_a_plugin_makes_of_a_failure_is_its_own(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    def run_calibration(forward: Callable[[], int]) -> int:
        try:
            return forward()
        except ValueError as error:
            raise KeyError("lost") from error

    def forward() -> int:
        raise ValueError("bad batch")

    with pytest.raises(PluginError, match=r"bittern-alpha 1\.0 failed .* KeyError: 'lost'"):
        run(toolkit_with(make_plugin("alpha", run_calibration=run_calibration)), forward)


def test_the_adapter_of_a_healthy_plugin_passes(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    adapter = ModelAdapter(vocab_size=7)
    plugin = make_plugin("alpha", resolve_model_adapter=lambda: adapter)
    assert toolkit_with(plugin).adapter(nn.Linear(2, 2)) is adapter
