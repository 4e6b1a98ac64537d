"""Calling hooks: order, first answers, wrong records, failures that name their plugin, traces."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from bittern.builtin import hooks as builtin
from bittern.errors import BitternError, DataError, PluginError
from bittern.hooks import hookimpl
from bittern.hooks.discovery import PluginOptions, PluginRecord
from bittern.hooks.manager import PluginManager
from bittern.records import DataConfig, LoadConfig, NumberFormat, Plan, RecipeSource
from bittern.toolkit import Toolkit

MakePlugin = Callable[..., ModuleType]
ToolkitWith = Callable[..., Toolkit]


def number_format(name: str) -> NumberFormat:
    return NumberFormat(name=name, bits=8, codec="bittern.numerics.integers:IntCodec")


def wrapping(name: str, function: Callable[..., Any], *, old: bool = False) -> ModuleType:
    """Return a plugin whose one hook wraps the others'."""
    module = ModuleType(name)
    marked = hookimpl(hookwrapper=True) if old else hookimpl(wrapper=True)
    module.run_calibration = marked(function)  # type: ignore[attr-defined]
    return module


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")])
def test_the_order_of_calls_does_not_depend_on_the_order_of_loading(
    order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    calls: list[str] = []
    records = []
    for name in order:
        module = ModuleType(f"ordered_{name}")

        def after_convert(model: Any, name: str = name) -> None:
            calls.append(name)

        def register_formats(name: str = name) -> list[NumberFormat]:
            return [number_format(f"of-{name}")]

        module.after_convert = hookimpl(after_convert)  # type: ignore[attr-defined]
        module.register_formats = hookimpl(register_formats)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        records.append(
            PluginRecord(name=name, distribution=f"x-{name}", version="1", entry=module.__name__)
        )
    manager = PluginManager(PluginOptions(), builtin=builtin, records=records)

    manager.notify("after_convert", model=nn.Identity(), plan=None)
    assert calls == ["a", "b", "c"]
    manager.notify_each("after_convert", model=nn.Identity(), plan=None)
    assert calls == ["a", "b", "c"] * 2
    names = [item.name for item, _, _ in manager.collect("register_formats")]
    assert names[-3:] == ["of-a", "of-b", "of-c"]
    assert set(names[:-3]) == {item.name for item in builtin.register_formats()}


def test_collect_says_who_registered_what(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    toolkit = toolkit_with(make_plugin("alpha", register_formats=lambda: [number_format("x")]))
    found = {
        item.name: (label, is_core)
        for item, label, is_core in toolkit.plugins.collect("register_formats")
    }

    assert found["int8"] == ("bittern", True)
    assert found["x"] == ("bittern-alpha 1.0", False)


@pytest.mark.parametrize(
    "returned",
    [
        lambda: number_format("x"),
        lambda: [number_format("x")],
        lambda: (number_format("x"),),
        lambda: (number_format(name) for name in ("x",)),
    ],
)
def test_records_may_come_alone_or_in_any_iterable(
    returned: Callable[[], Any], make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    assert "x" in toolkit_with(make_plugin("alpha", register_formats=returned)).registry.formats


def test_a_hook_may_be_a_generator(make_plugin: MakePlugin, toolkit_with: ToolkitWith) -> None:
    def register_formats() -> Iterator[NumberFormat]:
        yield number_format("x")
        yield number_format("y")

    formats = toolkit_with(make_plugin("alpha", register_formats=register_formats)).registry.formats
    assert {"x", "y"} <= set(formats)


def test_none_registers_nothing(make_plugin: MakePlugin, toolkit_with: ToolkitWith) -> None:
    toolkit = toolkit_with(make_plugin("alpha", register_formats=lambda: None))
    assert sorted(toolkit.registry.formats) == sorted(Toolkit(block=["*"]).registry.formats)


@pytest.mark.parametrize(
    "wrong", [[RecipeSource(name="x")], ["int8"], {"int8": 1}, [None], [number_format("x"), 7], 7]
)
def test_another_kind_of_record_is_an_error_that_names_the_plugin(
    wrong: Any, make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    toolkit = toolkit_with(make_plugin("alpha", register_formats=lambda: wrong))
    with pytest.raises(
        PluginError, match=r"plugin bittern-alpha 1\.0 returned a \w+ from"
    ) as caught:
        list(toolkit.registry.formats)
    assert "must return NumberFormat records" in caught.value.what


def test_register_hooks_are_called_once_per_toolkit(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    calls: list[int] = []

    def register_formats() -> list[NumberFormat]:
        calls.append(1)
        return []

    toolkit = toolkit_with(make_plugin("alpha", register_formats=register_formats))
    assert not calls, "called before anybody asked"
    for _ in range(3):
        toolkit.plan(nn.Sequential(nn.Linear(2, 2)), "int8")
    assert len(calls) == 1


# --- first answers --------------------------------------------------------------------------------


def test_the_first_answer_that_is_not_none_wins(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    asked: list[str] = []

    def answering(name: str, answer: Any) -> ModuleType:
        def resolve_model(source: str, config: LoadConfig) -> Any:
            asked.append(name)
            return answer

        return make_plugin(name, resolve_model=resolve_model)

    model = nn.Linear(2, 2)
    # the last registered is asked first: the manager registers in reverse
    toolkit = toolkit_with(
        answering("c", nn.Linear(3, 3)), answering("b", model), answering("a", None)
    )

    assert toolkit.load("x") is model
    assert asked == ["a", "b"]


def test_arguments_are_opt_in(make_plugin: MakePlugin, toolkit_with: ToolkitWith) -> None:
    model = nn.Linear(2, 2)
    toolkit = toolkit_with(make_plugin("alpha", resolve_model=lambda: model))

    assert toolkit.load("x") is model


def test_data_that_is_no_path_is_asked_of_nobody(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    def resolve_calibration_data(source: str, config: DataConfig) -> list[str]:
        return [source, str(config.samples)]

    toolkit = toolkit_with(make_plugin("alpha", resolve_calibration_data=resolve_calibration_data))
    model, batches = nn.Linear(2, 2), [1, 2]

    assert toolkit.data(batches, model) is batches
    assert toolkit.data("a.txt", model, DataConfig(samples=3)) == ["a.txt", "3"]


def test_what_no_plugin_takes_is_an_error_that_says_what_to_install(toolkit: Toolkit) -> None:
    from bittern.errors import ModelError

    with pytest.raises(ModelError) as model:
        toolkit.load("some/model")
    assert "bittern-huggingface" in (model.value.hint or "")
    with pytest.raises(DataError) as data:
        toolkit.data("a.txt", nn.Linear(2, 2))
    assert "bittern-huggingface" in (data.value.hint or "")


# --- failures -------------------------------------------------------------------------------------


def failing(*_: Any) -> Any:
    raise KeyError("lost")


HOOKS: list[tuple[str, Callable[[Toolkit], object]]] = [
    ("register_formats", lambda t: list(t.registry.formats)),
    ("register_modules", lambda t: t.registry.modules),
    ("register_recipes", lambda t: list(t.registry.recipes)),
    ("discover_modules", lambda t: t.plan(nn.Sequential(nn.Linear(2, 2)), "int8")),
    ("resolve_model", lambda t: t.load("x")),
    ("resolve_model_adapter", lambda t: t.plan(nn.Linear(2, 2), "int8")),
    ("after_convert", lambda t: t.quantize(nn.Sequential(nn.Linear(2, 2)), "int4")),
]


@pytest.mark.parametrize(("hook", "use"), HOOKS, ids=[hook for hook, _ in HOOKS])
def test_a_hook_that_raises_names_distribution_version_and_hook_and_chains_the_cause(
    hook: str,
    use: Callable[[Toolkit], object],
    make_plugin: MakePlugin,
    toolkit_with: ToolkitWith,
) -> None:
    def raising() -> Any:
        raise KeyError("lost")

    toolkit = toolkit_with(make_plugin("alpha", **{hook: raising}))
    with pytest.raises(PluginError) as caught:
        use(toolkit)

    assert caught.value.what == f"plugin bittern-alpha 1.0 failed in hook {hook}: KeyError: 'lost'"
    assert "BITTERN_DISABLE_PLUGINS=alpha" in (caught.value.hint or "")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_generator_that_raises_midway_is_attributed(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    def register_formats() -> Iterator[NumberFormat]:
        yield number_format("x")
        raise KeyError("lost")

    toolkit = toolkit_with(make_plugin("alpha", register_formats=register_formats))
    with pytest.raises(PluginError, match="failed in hook register_formats"):
        list(toolkit.registry.formats)


def test_an_error_meant_for_the_user_passes_as_it_is(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    error = DataError("no rows", where="a.txt")

    def resolve_calibration_data() -> Any:
        raise error

    toolkit = toolkit_with(make_plugin("alpha", resolve_calibration_data=resolve_calibration_data))
    with pytest.raises(DataError) as caught:
        toolkit.data("a.txt", nn.Linear(2, 2))
    assert caught.value is error


def test_an_interrupt_passes_as_it_is(make_plugin: MakePlugin, toolkit_with: ToolkitWith) -> None:
    def resolve_model() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toolkit_with(make_plugin("alpha", resolve_model=resolve_model)).load("x")


def test_notify_each_goes_on_after_a_failure_and_says_whose_it_was(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith
) -> None:
    calls: list[str] = []

    def broken(model: Any) -> None:
        calls.append("broken")
        raise KeyError("lost")

    plugins = toolkit_with(
        make_plugin("late", after_convert=lambda model: calls.append("late")),
        make_plugin("alpha", after_convert=broken),
    ).plugins
    ((label, error),) = plugins.notify_each("after_convert", model=nn.Identity(), plan=None)

    assert calls == ["broken", "late"]
    assert label == "bittern-alpha 1.0"
    assert isinstance(error, PluginError)


# --- wrappers -------------------------------------------------------------------------------------


def run(toolkit: Toolkit, forward: Callable[[], Any]) -> Any:
    plan = Plan(recipe="r", entries=(), skipped={})
    return toolkit.plugins.first("run_calibration", model=None, plan=plan, forward=forward)


@pytest.mark.parametrize("old", [False, True], ids=["wrapper", "hookwrapper"])
def test_a_wrapper_runs_around_cores_own_calibration(
    toolkit_with: ToolkitWith, *, old: bool
) -> None:
    calls: list[str] = []

    def around(model: Any) -> Generator[None, Any, Any]:
        calls.append("before")
        result = yield
        calls.append("after")
        return result

    def forward() -> int:
        calls.append("forward")
        return 7

    assert run(toolkit_with(wrapping("alpha", around, old=old)), forward) == 7
    assert calls == ["before", "forward", "after"]


def test_a_wrapper_may_change_the_result(toolkit_with: ToolkitWith) -> None:
    def around() -> Generator[None, int, int]:
        return (yield) + 1

    assert run(toolkit_with(wrapping("alpha", around)), lambda: 7) == 8


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_wrapper_that_raises_is_attributed(where: str, toolkit_with: ToolkitWith) -> None:
    def around() -> Generator[None, Any, Any]:
        if where == "before":
            raise KeyError("lost")
        result = yield
        if where == "after":
            raise KeyError("lost")
        return result

    with pytest.raises(PluginError, match=r"bittern-alpha 1\.0 failed in hook run_cal") as caught:
        run(toolkit_with(wrapping("alpha", around)), lambda: 7)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("handling", ["none", "finally", "reraise"])
@pytest.mark.parametrize("kind", [ValueError, DataError, KeyboardInterrupt])
def test_what_fails_inside_is_not_blamed_on_the_wrapper(
    handling: str, kind: type[BaseException], toolkit_with: ToolkitWith
) -> None:
    cleaned: list[int] = []

    def plain() -> Generator[None, Any, Any]:
        return (yield)

    def tidy() -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            cleaned.append(1)

    def again() -> Generator[None, Any, Any]:
        try:
            return (yield)
        except BaseException:
            raise

    error, cause = kind("inner"), OSError("the reason")

    def forward() -> int:
        raise error from cause

    around = {"none": plain, "finally": tidy, "reraise": again}[handling]
    with pytest.raises(kind) as caught:
        run(toolkit_with(wrapping("alpha", around)), forward)

    assert caught.value is error
    assert caught.value.__cause__ is cause
    assert cleaned == ([1] if handling == "finally" else [])


def test_a_wrapper_may_handle_what_fails_inside(toolkit_with: ToolkitWith) -> None:
    def around() -> Generator[None, Any, Any]:
        try:
            return (yield)
        except ValueError:
            return 3

    def forward() -> int:
        raise ValueError

    assert run(toolkit_with(wrapping("alpha", around)), forward) == 3


def test_a_wrapper_that_fails_while_handling_is_attributed_with_its_own_cause(
    toolkit_with: ToolkitWith,
) -> None:
    def around() -> Generator[None, Any, Any]:
        try:
            yield
        except ValueError:
            raise KeyError("lost") from None

    def forward() -> int:
        raise ValueError("inner")

    with pytest.raises(PluginError, match="KeyError: 'lost'") as caught:
        run(toolkit_with(wrapping("alpha", around)), forward)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_a_wrapper_meant_for_the_user_keeps_its_own_cause(
    toolkit_with: ToolkitWith,
) -> None:
    cause = OSError("the reason")

    def around() -> Generator[None, Any, Any]:
        raise BitternError("no amp here") from cause
        yield

    with pytest.raises(BitternError, match="no amp here") as caught:
        run(toolkit_with(wrapping("alpha", around)), lambda: 1)
    assert caught.value.__cause__ is cause


def test_a_wrapper_that_yields_twice_is_attributed(toolkit_with: ToolkitWith) -> None:
    def around() -> Generator[None, Any, Any]:
        yield
        yield

    with pytest.raises(PluginError, match=r"bittern-alpha 1\.0 .*the wrapper yielded twice"):
        run(toolkit_with(wrapping("alpha", around)), lambda: 1)


def test_any_hook_with_one_result_can_be_wrapped(toolkit_with: ToolkitWith) -> None:
    model = nn.Linear(2, 2)
    module = ModuleType("alpha")

    def resolve_model() -> Generator[None, Any, Any]:
        result = yield
        return result if result is not None else model

    module.resolve_model = hookimpl(wrapper=True)(resolve_model)  # type: ignore[attr-defined]
    assert toolkit_with(module).load("x") is model


@pytest.mark.parametrize("returned", [None, "many", [1]])
def test_a_calibration_that_returns_no_count_is_an_error(
    returned: Any, toolkit_with: ToolkitWith
) -> None:
    def around() -> Generator[None, Any, Any]:
        yield
        return returned

    import torch

    with pytest.raises(PluginError, match="instead of the number of batches"):
        toolkit_with(wrapping("alpha", around)).quantize(
            nn.Sequential(nn.Linear(2, 2)), "int8", [torch.ones(1, 2)]
        )


# --- traces ---------------------------------------------------------------------------------------


def test_a_trace_shows_every_call_on_stderr_and_big_arguments_by_type(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    file = tmp_path / "traced.py"
    file.write_text(
        "from bittern.hooks import hookimpl\n"
        "@hookimpl\n"
        "def resolve_model_adapter(model):\n"
        "    return None\n"
        "@hookimpl\n"
        "def resolve_model(source):\n"
        "    raise KeyError(source)\n"
        "@hookimpl(wrapper=True)\n"
        "def run_calibration(plan):\n"
        "    return (yield)\n"
    )
    plugins = PluginManager(
        PluginOptions(trace=True, files=(str(file),)), builtin=builtin, records=()
    )
    sys.modules.pop("bittern_file_traced")
    plugins.first("resolve_model_adapter", model=nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(PluginError):
        plugins.first("resolve_model", source="x", config=None)
    plugins.first("run_calibration", model=None, plan=None, forward=lambda: 1)

    times = re.compile(r" \[\d+\.\d\d ms\]")
    lines = capsys.readouterr().err.splitlines()
    assert all(times.search(line) for line in lines if not line.endswith("wraps"))
    assert [times.sub("", line) for line in lines] == [
        "resolve_model_adapter(model=<Sequential>) <- traced: None",
        "resolve_model(source='x') <- traced: raised PluginError",
        "run_calibration(plan=None) <- traced: wraps",
        "run_calibration(model=None, plan=None, forward=<partial>) <- bittern: 1",
        "run_calibration(plan=None) <- traced: wrapped, 1",
    ]


def test_nothing_is_traced_unasked(
    make_plugin: MakePlugin, toolkit_with: ToolkitWith, capsys: pytest.CaptureFixture[str]
) -> None:
    list(toolkit_with(make_plugin("alpha", register_formats=lambda: [])).registry.formats)
    assert capsys.readouterr().err == ""
