"""What is found, what becomes of it, and why: with real distributions on disk."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import bittern
from bittern.errors import PluginError
from bittern.hooks.discovery import PluginOptions, PluginRecord, Status
from bittern.hooks.manager import PluginManager
from bittern.toolkit import Toolkit

Install = Callable[..., str]
Found = Callable[[], list[PluginRecord]]
Manager = Callable[..., PluginManager]


def record_of(manager: PluginManager, distribution: str) -> PluginRecord:
    (record,) = (r for r in manager.records if r.distribution == distribution)
    return record


# --- discovery ------------------------------------------------------------------------------------


def test_nothing_is_imported_by_looking(install: Install, found: Found) -> None:
    install("alpha", "raise RuntimeError('imported')")
    (record,) = found()

    assert (record.name, record.distribution, record.version) == ("alpha", "alpha", "1.2.3")
    assert record.entry == "alpha_hooks"
    assert record.status is Status.FOUND
    assert record.label == "alpha 1.2.3"
    assert "alpha_hooks" not in sys.modules


@pytest.mark.parametrize("order", [("dist-info", "egg-info"), ("egg-info", "dist-info")])
def test_an_egg_info_beside_a_dist_info_counts_once(
    order: tuple[str, str], install: Install, found: Found, manager: Manager
) -> None:
    for kind in order:
        install("alpha-plugin", entry="alpha", kind=kind)

    assert [record.distribution for record in found()] == ["alpha-plugin"]
    assert [record.status for record in manager().records] == [Status.LOADED]


def test_one_distribution_spelled_in_two_ways_counts_once(install: Install, found: Found) -> None:
    install("alpha-plugin", entry="alpha", version="1.0")
    install("alpha_plugin", entry="alpha", version="1.1")

    assert len(found()) == 1


def test_a_distribution_without_metadata_does_no_harm(install: Install, manager: Manager) -> None:
    install("alpha", metadata=False)
    install("beta")

    records = {record.name: record.status for record in manager().records}
    assert records["beta"] is Status.LOADED
    assert "alpha" in records


def test_the_order_is_by_name(install: Install, found: Found) -> None:
    for name in ("zulu", "alpha", "mike"):
        install(name)

    assert [record.name for record in found()] == ["alpha", "mike", "zulu"]


# --- statuses -------------------------------------------------------------------------------------


def test_a_healthy_plugin_is_loaded_and_says_what_it_implements(
    install: Install, manager: Manager
) -> None:
    install("alpha")
    plugins = manager()
    record = record_of(plugins, "alpha")

    assert record.status is Status.LOADED
    assert record.active
    assert record.hooks == ("register_formats",)
    assert record.milliseconds > 0
    names = [(item.name, label) for item, label, _ in plugins.collect("register_formats")]
    assert ("alpha", "alpha 1.2.3") in names


def test_a_plugin_that_raises_at_import_fails_alone(
    install: Install, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    install("alpha", "raise RuntimeError('no such luck')")
    install("beta")
    with caplog.at_level(logging.WARNING, "bittern.plugins"):
        plugins = manager()
    record = record_of(plugins, "alpha")

    assert record.status is Status.FAILED
    assert not record.active
    assert record.reason == "RuntimeError: no such luck"
    assert "alpha_hooks.py" in record.traceback
    assert "pip install" in record.remedy
    assert "alpha 1.2.3 failed to load" in caplog.text
    assert record_of(plugins, "beta").status is Status.LOADED


def test_a_plugin_whose_module_is_missing_fails(install: Install, found: Found, site: Path) -> None:
    install("alpha")
    records = found()
    (site / "alpha_hooks.py").unlink()
    plugins = PluginManager(PluginOptions(), records=records)

    assert record_of(plugins, "alpha").status is Status.FAILED
    assert "ModuleNotFoundError" in record_of(plugins, "alpha").reason


def test_two_plugins_of_one_name_load_the_first_by_distribution(
    install: Install, manager: Manager
) -> None:
    install("zulu-same", entry="same")
    install("alpha-same", entry="same", version="9")
    plugins = manager()

    assert record_of(plugins, "alpha-same").status is Status.LOADED
    duplicate = record_of(plugins, "zulu-same")
    assert duplicate.status is Status.DUPLICATE
    assert duplicate.reason == "alpha-same 9 has the name 'same' too and was taken"
    assert duplicate.remedy.startswith("pip uninstall zulu-same")


@pytest.mark.parametrize("options", [{"block": ("alpha-same",)}, {"allow": ("zulu-same",)}])
def test_a_duplicate_takes_over_when_the_other_is_left_out(
    options: dict[str, tuple[str, ...]], install: Install, manager: Manager
) -> None:
    install("zulu-same", entry="same")
    install("alpha-same", entry="same")
    plugins = manager(**options, required=("zulu-same",))

    assert record_of(plugins, "zulu-same").status is Status.LOADED
    assert record_of(plugins, "alpha-same").status is Status.BLOCKED


def test_a_plugin_for_another_core_is_not_imported(install: Install, manager: Manager) -> None:
    install("alpha", "raise RuntimeError", requires=("bittern>=99",))
    record = record_of(manager(), "alpha")

    assert record.status is Status.CORE_INCOMPATIBLE
    assert record.reason == f"needs bittern>=99, but bittern {bittern.__version__} is installed"
    assert record.remedy == "pip install -U bittern alpha"


def test_the_version_of_core_is_that_of_the_code_not_of_its_metadata(
    install: Install, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata of an editable install stay at the version it was installed with."""
    monkeypatch.setattr("bittern.hooks.compat.__version__", "99.5")
    install("alpha", requires=("bittern>=99",))

    assert record_of(manager(), "alpha").status is Status.LOADED


@pytest.mark.parametrize(
    "requirement",
    [
        "bittern>=0.1",
        "bittern",
        "bittern>=99; python_version < '3.0'",
        "bittern>=99; extra == 'other'",
        "not-a-valid requirement !!",
        "no-such-distribution-anywhere>=4",
        "no-such-distribution-anywhere>=4; extra == 'other'",
    ],
)
def test_requirements_that_are_met_or_not_ours_do_not_matter(
    requirement: str, install: Install, manager: Manager
) -> None:
    install("alpha", requires=(requirement,))
    assert record_of(manager(), "alpha").status is Status.LOADED


def test_a_missing_target_is_no_failure(install: Install, manager: Manager) -> None:
    install("alpha", "raise RuntimeError", requires=('no-such-framework>=2; extra == "target"',))
    record = record_of(manager(), "alpha")

    assert record.status is Status.TARGET_MISSING
    assert record.requirements == ("no-such-framework>=2",)
    assert record.reason == "needs no-such-framework>=2, which is not installed"
    assert record.remedy == "pip install 'alpha[target]'"


def test_a_target_of_another_version_is_incompatible(install: Install, manager: Manager) -> None:
    install("alpha", "raise RuntimeError", requires=('numpy<1; extra == "target"',))
    record = record_of(manager(), "alpha")

    assert record.status is Status.TARGET_INCOMPATIBLE
    assert record.reason.startswith("needs numpy<1, but ")


def test_a_target_that_fits_lets_the_plugin_load(install: Install, manager: Manager) -> None:
    install("alpha", requires=('numpy>=1; extra == "target"',))
    assert record_of(manager(), "alpha").status is Status.LOADED


@pytest.mark.parametrize("target", ["no_such_module", "no_such_module.inner", "sys.inner"])
def test_a_target_module_that_cannot_be_imported_is_missing(
    target: str, install: Install, manager: Manager
) -> None:
    install("alpha", f"target_modules = ('{target}',)\n")
    record = record_of(manager(), "alpha")

    assert record.status is Status.TARGET_MISSING
    assert record.reason == f"the module {target} cannot be imported"
    assert not record.hooks


def test_an_unknown_hook_makes_a_plugin_partial_and_the_rest_works(
    install: Install, manager: Manager
) -> None:
    install(
        "alpha",
        """
        from bittern.hooks import hookimpl

        @hookimpl
        def register_holograms():
            return []

        @hookimpl
        def register_formats():
            return []
        """,
    )
    record = record_of(manager(), "alpha")

    assert record.status is Status.PARTIAL
    assert record.active
    assert record.hooks == ("register_formats",)
    assert record.reason == "this version of bittern has no hook register_holograms"
    assert record.remedy == "pip install -U bittern"


def test_an_unknown_argument_fails_the_plugin_as_a_whole(
    install: Install, manager: Manager
) -> None:
    install(
        "alpha",
        """
        from bittern.hooks import hookimpl
        from bittern.records import NumberFormat

        @hookimpl
        def after_convert(model, plan, weather):
            raise AssertionError

        @hookimpl
        def register_formats():
            raise AssertionError
        """,
    )
    plugins = manager()
    record = record_of(plugins, "alpha")

    assert record.status is Status.FAILED
    assert record.reason == "the hook after_convert has no argument 'weather', it has model, plan"
    assert "PluginValidationError" in record.traceback
    list(plugins.collect("register_formats"))  # none of its hooks is called
    plugins.notify("after_convert", model=nn.Identity(), plan=None)
    assert plugins.implementations("after_convert") == ("bittern",)


# --- allow, block, strict, required ---------------------------------------------------------------


def statuses(manager: PluginManager) -> dict[str, Status]:
    return {record.distribution: record.status for record in manager.records}


@pytest.mark.parametrize("name", ["alpha", "bittern-alpha", "Bittern_Alpha", "*"])
def test_a_plugin_is_blocked_by_name_or_distribution(
    name: str, install: Install, manager: Manager
) -> None:
    install("bittern-alpha", "raise RuntimeError", entry="alpha")
    record = record_of(manager(block=(name,)), "bittern-alpha")

    assert record.status is Status.BLOCKED
    assert record.reason == "blocked by name"


def test_only_allowed_plugins_are_loaded(install: Install, manager: Manager) -> None:
    install("alpha")
    install("beta", "raise RuntimeError")

    assert statuses(manager(allow=("alpha",))) == {"alpha": Status.LOADED, "beta": Status.BLOCKED}
    assert set(statuses(manager(allow=())).values()) == {Status.BLOCKED}


def test_strict_raises_for_any_plugin_that_does_not_load(
    install: Install, manager: Manager
) -> None:
    install("alpha")
    manager(strict=True)
    install("beta", "raise RuntimeError('broken')")
    with pytest.raises(PluginError, match=r"plugin beta 1\.2\.3 is failed: RuntimeError: broken"):
        manager(strict=True)
    manager(strict=True, block=("beta",))


@pytest.mark.parametrize(
    ("requires", "source", "status"),
    [
        (("bittern>=99",), "", "core-incompatible"),
        (("no-such-framework; extra == 'target'",), "", "target-missing"),
        ((), "raise RuntimeError", "failed"),
        (
            (),
            "from bittern.hooks import hookimpl\n@hookimpl\ndef register_x():\n    pass\n",
            "partial",
        ),
    ],
)
def test_a_required_plugin_must_load_whole(
    requires: tuple[str, ...], source: str, status: str, install: Install, manager: Manager
) -> None:
    install("alpha", source, requires=requires)
    manager()
    with pytest.raises(PluginError, match=f"plugin alpha 1.2.3 is {status}") as caught:
        manager(required=("alpha",))
    assert caught.value.hint
    with pytest.raises(PluginError, match=f"is {status}"):
        manager().require(["alpha"])


def test_a_plugin_that_is_not_installed_names_the_pip_line(manager: Manager) -> None:
    with pytest.raises(PluginError, match="'gamma' is not installed") as caught:
        manager(required=("gamma",))
    assert caught.value.hint == "pip install bittern-gamma"


def test_a_toolkit_takes_plugins_by_name_and_leaves_out_all_others(install: Install) -> None:
    install("alpha")
    install("beta")
    toolkit = Toolkit(plugins=["alpha"])

    active = [record.name for record in toolkit.plugins.records if record.active]
    assert active == ["alpha"]
    assert "alpha" in toolkit.registry.formats
    assert "beta" not in toolkit.registry.formats
    with pytest.raises(PluginError, match="'gamma' is not installed"):
        Toolkit(plugins=["gamma"])
    with pytest.raises(PluginError, match="is blocked"):
        Toolkit(plugins=["alpha"], block=["alpha"])


def test_a_recipe_that_requires_a_plugin_gets_it_or_an_error(install: Install) -> None:
    install("alpha")
    data = {"requires": "alpha", "rules": []}

    Toolkit(plugins=["alpha"]).recipe(data)
    with pytest.raises(PluginError, match="is blocked"):
        Toolkit(block=["alpha"], plugins=[]).recipe(data)


# --- options --------------------------------------------------------------------------------------


def test_the_environment_sets_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PLUGINS", "DISABLE_PLUGINS", "STRICT_PLUGINS", "TRACE_PLUGINS"):
        monkeypatch.delenv(f"BITTERN_{name}", raising=False)
    assert PluginOptions.from_environment() == PluginOptions()

    monkeypatch.setenv("BITTERN_PLUGINS", "a, b,")
    monkeypatch.setenv("BITTERN_DISABLE_PLUGINS", "te,*")
    monkeypatch.setenv("BITTERN_STRICT_PLUGINS", "1")
    monkeypatch.setenv("BITTERN_TRACE_PLUGINS", "yes")
    assert PluginOptions.from_environment() == PluginOptions(
        allow=("a", "b"), required=("a", "b"), block=("te", "*"), strict=True, trace=True
    )


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "OFF"])
def test_a_flag_can_be_said_to_be_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITTERN_STRICT_PLUGINS", value)
    assert PluginOptions.from_environment().strict is False


def test_a_callers_options_go_on_top() -> None:
    base = PluginOptions(allow=("a",), required=("a",), block=("x",), files=("f.py",))
    merged = base.merged(plugins=["b"], block=["y"], files=[Path("g.py")], strict=True)

    assert merged.allow == merged.required == ("b",)
    assert merged.block == ("x", "y")
    assert merged.files == ("f.py", "g.py")
    assert merged.strict
    assert base.merged().allow == ("a",)
    assert base.merged(plugins=[]).allow == ()


# --- files ----------------------------------------------------------------------------------------


def test_an_unpackaged_plugin_is_loaded_and_its_own_targets_resolve(tmp_path: Path) -> None:
    file = tmp_path / "local.py"
    file.write_text(
        "from bittern.hooks import hookimpl\n"
        "from bittern.records import Algorithm\n"
        "@hookimpl\n"
        "def register_algorithms():\n"
        "    return [Algorithm(name='nop', run=f'{__name__}:nop')]\n"
        "def nop(model, plan, forward, context):\n"
        "    pass\n"
    )
    toolkit = Toolkit(block=["*"], files=[file])
    try:
        (record,) = (r for r in toolkit.plugins.records if r.name == "local")
        assert record.status is Status.LOADED
        assert record.distribution == str(file)
        assert toolkit.registry.algorithms.plugin("nop") == str(file)
        from torch import nn

        rule = {"match": "0", "weight": "int8"}
        toolkit.quantize(nn.Sequential(nn.Linear(2, 2)), {"rules": [rule], "algorithm": "nop"})
    finally:
        sys.modules.pop("bittern_file_local", None)


@pytest.mark.parametrize("content", [None, "raise RuntimeError('broken')", "def ("])
def test_an_unpackaged_plugin_that_cannot_be_loaded_is_an_error(
    content: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "broken.py"
    if content is not None:
        file.write_text(content)
    try:
        with pytest.raises(PluginError, match=r"plugin file .*broken\.py could not be loaded"):
            Toolkit(block=["*"], files=[file])
    finally:
        sys.modules.pop("bittern_file_broken", None)
