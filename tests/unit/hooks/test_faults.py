"""Faults planted in real distributions: each has its status and reason, and costs no other."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from bittern.builtin import hooks as builtin
from bittern.errors import PluginConflictError, PluginError
from bittern.hooks.discovery import GROUP, PluginOptions, PluginRecord, Status, discover
from bittern.hooks.manager import PluginManager
from bittern.toolkit import Toolkit

Install = Callable[..., str]
Manager = Callable[..., PluginManager]

RULE = """
from bittern.hooks import hookimpl
from bittern.records import ModuleRule, Slot

@hookimpl
def register_modules():
    weight = Slot("weight", kind="weight", tensor="weight")
    return [ModuleRule(target={target!r}, quantized="bittern.nn.linear:QuantLinear",
                       slots=(weight,))]
"""
LINEAR = "torch.nn.modules.linear:Linear"
BILINEAR = "torch.nn.modules.linear:Bilinear"
FORMATS = """
from bittern.hooks import hookimpl

@hookimpl
def register_formats():
    raise KeyError("lost")
"""


def statuses(manager: PluginManager) -> dict[str, Status]:
    return {record.distribution: record.status for record in manager.records}


def info(site: Path, name: str) -> Path:
    return site / f"{name}-1.2.3.dist-info"


# --- everything at once ---------------------------------------------------------------------------


def test_every_fault_has_its_status_and_the_healthy_plugins_still_work(
    install: Install, manager: Manager
) -> None:
    install("sound")
    install("at-import", "raise RuntimeError('torn')")
    install("leaving", "import sys\nsys.exit(3)")
    install("twin-b", entry="twin")
    install("twin-a", entry="twin")
    install("lost", "raise RuntimeError", requires=("no-such-framework>=2; extra == 'target'",))
    install("old-target", "raise RuntimeError", requires=("numpy<1; extra == 'target'",))
    install("too-new", "raise RuntimeError", requires=("bittern>=99",))
    install("in-a-hook", FORMATS.replace("register_formats", "after_convert"))
    install("claims-one", RULE.format(target=LINEAR))
    install("claims-two", RULE.format(target=LINEAR))
    install("other-args", FORMATS.replace("def register_formats()", "def after_export(weather)"))
    plugins = manager()

    assert statuses(plugins) == {
        "sound": Status.LOADED,
        "at-import": Status.FAILED,
        "leaving": Status.FAILED,
        "twin-a": Status.LOADED,
        "twin-b": Status.DUPLICATE,
        "lost": Status.TARGET_MISSING,
        "old-target": Status.TARGET_INCOMPATIBLE,
        "too-new": Status.CORE_INCOMPATIBLE,
        "in-a-hook": Status.LOADED,
        "claims-one": Status.LOADED,
        "claims-two": Status.LOADED,
        "other-args": Status.FAILED,
    }
    assert all(r.reason for r in plugins.records if r.status is not Status.LOADED)

    toolkit = Toolkit(manager=plugins)
    embedding = nn.Sequential(nn.Embedding(8, 4))
    recipe = {"rules": [{"match": "0", "weight": {"format": "sound", "granularity": "tensor"}}]}
    assert toolkit.plan(embedding, recipe).entries[0].format == "sound"
    with pytest.raises(PluginConflictError) as conflict:
        toolkit.plan(nn.Sequential(nn.Linear(4, 4)), "int8")
    assert "claims-one 1.2.3 and claims-two 1.2.3 both claim" in str(conflict.value)
    with pytest.raises(PluginError, match=r"plugin in-a-hook 1\.2\.3 failed in hook after_convert"):
        toolkit.quantize(embedding, recipe)
    assert type(embedding[0]) is nn.Embedding


def test_a_plugin_that_raises_in_a_register_hook_is_named_and_can_be_left_out(
    install: Install, manager: Manager
) -> None:
    install("sound")
    install("alpha", FORMATS)
    with pytest.raises(PluginError, match=r"plugin alpha 1\.2\.3 failed in hook") as caught:
        list(Toolkit(manager=manager()).registry.formats)
    assert "BITTERN_DISABLE_PLUGINS=alpha" in (caught.value.hint or "")
    assert "sound" in Toolkit(manager=manager(block=("alpha",))).registry.formats


def test_the_api_chooses_plugins_as_the_command_line_does(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("alpha")
    install("beta")
    install("torn", "raise RuntimeError('torn')")
    file = tmp_path / "loose.py"
    file.write_text(FORMATS.replace('raise KeyError("lost")', "return []"))
    toolkit = Toolkit(plugins=["alpha", "beta"], files=[file], strict=True, trace=True)
    active = [r.name for r in toolkit.plugins.records if r.active]
    assert active == ["alpha", "beta", "loose"]
    list(toolkit.registry.formats)
    shown = capsys.readouterr().err
    assert "register_formats() <- loose: []" in shown
    assert "register_formats() <- alpha: [NumberFormat(name='alpha'" in shown
    sys.modules.pop("bittern_file_loose")
    with pytest.raises(PluginError, match=r"plugin beta 1\.2\.3 is blocked"):
        Toolkit(plugins=["alpha", "beta"], block=["beta"])
    with pytest.raises(PluginError, match=r"plugin torn 1\.2\.3 is failed: RuntimeError: torn"):
        Toolkit(strict=True)


# --- metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries", [f"[{GROUP}]\nalpha alpha_hooks\n", f"[{GROUP}]\nalpha = alpha_hooks\n[torn\nx\n"]
)
def test_an_entry_point_file_that_cannot_be_parsed_costs_nobody_else_anything(
    entries: str, install: Install, site: Path
) -> None:
    install("alpha")
    install("sound")
    (info(site, "alpha") / "entry_points.txt").write_text(entries)
    records = {r.distribution: r for r in discover()}

    assert records["sound"].status is Status.FOUND
    assert records["alpha"].status is Status.FAILED
    assert records["alpha"].reason.startswith("its metadata cannot be read: ")
    assert records["alpha"].remedy == "pip install --force-reinstall alpha"


def test_broken_distributions_of_other_people_are_not_our_business(
    install: Install, site: Path
) -> None:
    install("sound")
    for name, entries in (("bytes", b"[x]\n\xff = y\n"), ("torn", b"[console_scripts]\nx y\n[")):
        install(name)
        (info(site, name) / "entry_points.txt").write_bytes(entries)
        (info(site, name) / "METADATA").write_bytes(b"Name: \xff\n")
    mine = [r.distribution for r in discover() if r.distribution in ("sound", "bytes", "torn")]
    assert mine == ["sound"]


@pytest.mark.parametrize("value", ["alpha_hooks:plugin", "!!!", "alpha hooks", "alpha-hooks", "a."])
def test_an_entry_point_that_names_no_module_says_what_to_write(
    value: str, install: Install, site: Path
) -> None:
    install("alpha")
    (info(site, "alpha") / "entry_points.txt").write_text(f"[{GROUP}]\nalpha = {value}\n")
    (record,) = (r for r in discover() if r.distribution == "alpha")

    assert record.status is Status.FAILED
    assert 'as in alpha = "package.hooks"' in record.reason
    assert repr(value) in record.reason


def test_extras_of_an_entry_point_are_no_part_of_the_module(install: Install, site: Path) -> None:
    install("alpha")
    (info(site, "alpha") / "entry_points.txt").write_text(f"[{GROUP}]\nalpha = alpha_hooks [x]\n")
    (record,) = (r for r in discover() if r.distribution == "alpha")
    assert (record.entry, record.status) == ("alpha_hooks", Status.FOUND)


def test_two_distributions_that_name_one_module_are_duplicates(
    install: Install, site: Path
) -> None:
    install("alpha")
    install("beta")
    (info(site, "beta") / "entry_points.txt").write_text(f"[{GROUP}]\nbeta = alpha_hooks\n")
    records = [r for r in discover() if r.distribution in ("alpha", "beta")]
    plugins = PluginManager(PluginOptions(), builtin=builtin, records=records)

    assert statuses(plugins) == {"alpha": Status.LOADED, "beta": Status.DUPLICATE}
    (record,) = (r for r in plugins.records if r.name == "beta")
    assert record.reason == "alpha 1.2.3 names the module alpha_hooks too and was taken"


# --- hooks modules --------------------------------------------------------------------------------


def test_a_probe_imports_nothing_of_the_framework(
    install: Install, manager: Manager, site: Path
) -> None:
    """Looking for ``a.b`` with find_spec imports ``a``, which may take seconds, or raise."""
    package = site / "wing_framework" / "inner"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "fused.py").touch()
    install("alpha", "target_modules = ('wing_framework.inner.fused', 'os.path', 'json.decoder')")
    install("beta", "target_modules = ('wing_framework.inner.lost',)")
    install("gamma", "target_modules = 'wing_framework.inner'")

    assert statuses(manager()) == {
        "alpha": Status.LOADED,
        "beta": Status.TARGET_MISSING,
        "gamma": Status.LOADED,
    }
    assert "wing_framework" not in sys.modules


def test_a_plugin_without_any_hook_says_so(install: Install, manager: Manager) -> None:
    install("alpha", "def register_formats():\n    return []\n")
    (record,) = manager().records
    assert record.status is Status.LOADED
    assert record.reason == "alpha_hooks has no function decorated with bittern.hooks.hookimpl"


def test_an_unknown_hook_that_is_marked_optional_is_no_ailment(
    install: Install, manager: Manager
) -> None:
    install(
        "alpha",
        "from bittern.hooks import hookimpl\n"
        "@hookimpl(optionalhook=True)\n"
        "def register_holograms():\n    return []\n",
    )
    (record,) = manager().records
    assert (record.status, record.hooks) == (Status.LOADED, ())


@pytest.mark.parametrize(
    ("name", "meant"),
    [("register_module", " (did you mean register_modules?)"), ("make_coffee", "")],
)
def test_a_misspelled_hook_names_the_nearest(
    name: str, meant: str, install: Install, manager: Manager
) -> None:
    install("alpha", FORMATS.replace("register_formats", name))
    (record,) = manager().records
    assert record.status is Status.PARTIAL
    assert record.reason == f"this version of bittern has no hook {name}{meant}"


def test_a_wrapper_that_is_no_generator_fails_in_one_line(
    install: Install, manager: Manager
) -> None:
    install("alpha", FORMATS.replace("@hookimpl", "@hookimpl(wrapper=True)"))
    (record,) = manager().records
    assert record.status is Status.FAILED
    assert "is not a generator function" in record.reason
    assert "\n" not in record.reason


def test_a_required_plugin_of_two_with_its_name_is_judged_by_the_one_that_is_not_blocked(
    install: Install, manager: Manager
) -> None:
    install("twin-a", entry="twin")
    install("twin-b", "raise RuntimeError('torn')", entry="twin")
    with pytest.raises(PluginError, match=r"plugin twin-b 1\.2\.3 is failed: RuntimeError: torn"):
        manager(block=("twin-a",), required=("twin",))


def test_a_plugin_uninstalled_since_it_was_found_is_a_failure_of_its_own(
    install: Install, found: Callable[[], list[PluginRecord]], site: Path
) -> None:
    install("alpha")
    install("sound")
    records = found()
    (site / "alpha_hooks.py").unlink()
    shutil.rmtree(info(site, "alpha"))
    plugins = PluginManager(PluginOptions(), builtin=builtin, records=records)
    assert statuses(plugins) == {"alpha": Status.FAILED, "sound": Status.LOADED}


# --- records --------------------------------------------------------------------------------------

MADE = """
from bittern.hooks import hookimpl
from bittern.records import *

def run(*args):
    pass

class Wing:
    pass

@hookimpl
def {hook}():
    return [{record}]
"""
WRONG = [
    (
        "register_modules",
        "ModuleRule(target=Wing, quantized='a:B')",
        "TypeError: ModuleRule.target must be a string; write 'alpha_hooks:Wing', not the object",
    ),
    (
        "register_modules",
        "ModuleRule(target='a.B', quantized='a:B')",
        "ValueError: ModuleRule.target is 'a.B'; write \"package.module:name\"",
    ),
    (
        "register_modules",
        "ModuleRule(target='a:B', quantized=Wing)",
        "TypeError: ModuleRule.quantized must be a string; write 'alpha_hooks:Wing'",
    ),
    (
        "register_modules",
        "ModuleRule(target='a:B', quantized='a:B', slots=('weight',))",
        "TypeError: ModuleRule.slots must be a tuple of Slot, not ('weight',)",
    ),
    (
        "register_modules",
        "ModuleRule(target='a:B', quantized='a:B', priority='high')",
        "TypeError: ModuleRule.priority must be an int, not 'high'",
    ),
    (
        "register_modules",
        "ModuleRule(target='a:B', quantized='a:B', like='torch.nn:Linear')",
        "ValueError: ModuleRule.like is 'torch.nn:Linear'; write the name of a class alone",
    ),
    (
        "register_modules",
        "ModuleRule(target='a:B', quantized='a:B', like=Wing)",
        "TypeError: ModuleRule.like must be a string; write 'Wing', not the object",
    ),
    (
        "register_formats",
        "NumberFormat(name='x', bits=8, codec=run)",
        "TypeError: NumberFormat.codec must be a string; write 'alpha_hooks:run'",
    ),
    ("register_algorithms", "Algorithm(name='x', run=run)", "TypeError: Algorithm.run must be a"),
    (
        "register_exporters",
        "Exporter(name='x', write='run')",
        "ValueError: Exporter.write is",
    ),
    (
        "register_kernels",
        "KernelRule(op='x', impl=run, device='cpu', formats=())",
        "TypeError: KernelRule.impl must be a string; write 'alpha_hooks:run'",
    ),
    ("register_modules", "ModuleRule(target='a:B')", "TypeError: "),
]


@pytest.mark.parametrize(("hook", "record", "reason"), WRONG, ids=[r for _, r, _ in WRONG])
def test_a_record_that_cannot_work_names_plugin_hook_field_and_what_to_write(
    hook: str, record: str, reason: str, install: Install, manager: Manager
) -> None:
    install("alpha", MADE.format(hook=hook, record=record))
    with pytest.raises(PluginError) as caught:
        list(manager().collect(hook))
    assert caught.value.what.startswith(f"plugin alpha 1.2.3 failed in hook {hook}: {reason}")
