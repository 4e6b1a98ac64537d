"""``bittern doctor``: what is an ailment and what is not."""

import platform
import sys
from pathlib import Path

import pytest
import torch


def test_well(bittern):
    done = bittern("doctor")
    assert (done.code, done.err) == (0, "")
    assert "all is well" in done.out
    found = bittern("doctor", "--json").json
    assert found["ok"] is True
    assert found["python"] == platform.python_version()
    assert found["torch"]["version"] == torch.__version__
    assert found["problems"] == []


@pytest.mark.parametrize(
    "case",
    [
        ("raise RuntimeError('x')", (), "failed", "pip install -U bittern-sick"),
        ("@hookimpl\ndef register_unicorns(): ...", (), "partial", "pip install -U bittern"),
        ("", ("bittern>=99",), "core-incompatible", "pip install -U bittern bittern-sick"),
        (
            "",
            ("click>=999; extra == 'target'",),
            "target-incompatible",
            "pip install 'bittern-sick[target]'",
        ),
    ],
)
def test_ailments_exit_1_with_the_line_that_mends(bittern, install, case):
    source, requires, status, mend = case
    install("sick", source, requires=requires)
    done = bittern("doctor")
    assert done.code == 1
    assert status in done.out
    assert mend in done.out
    found = bittern("doctor", "--json")
    assert found.code == 1
    assert found.json["ok"] is False
    (problem,) = found.json["problems"]
    assert mend in problem


def test_duplicates_exit_1(bittern, install):
    install("twin", distribution="bittern-twin-a")
    install("twin", distribution="bittern-twin-b")
    done = bittern("doctor")
    assert done.code == 1
    assert "pip uninstall bittern-twin-b" in done.out


def test_missing_targets_and_blocked_plugins_are_information(bittern, install, monkeypatch):
    install("lost", requires=("no-such-framework>=1; extra == 'target'",))
    done = bittern("doctor")
    assert done.code == 0
    assert "target-missing" in done.out
    assert "pip install 'bittern-lost[target]'" in done.out
    monkeypatch.setenv("BITTERN_DISABLE_PLUGINS", "*")
    done = bittern("doctor")
    assert done.code == 0
    assert "blocked" in done.out


def test_a_required_plugin_that_does_not_load_is_an_ailment_and_the_rest_still_shows(
    bittern, monkeypatch
):
    monkeypatch.setenv("BITTERN_PLUGINS", "unicorn")
    found = bittern("doctor", "--json")
    assert found.code == 1
    assert "'unicorn' is not installed" in found.json["problems"][0]
    assert found.json["torch"]["version"]


def test_a_torch_that_does_not_import_is_an_ailment(bittern, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = bittern("doctor", "--json")
    assert found.code == 1
    assert "torch cannot be imported" in found.json["problems"][0]


RULE = """
from bittern.records import ModuleRule

@hookimpl
def register_modules():
    return [ModuleRule(target={target!r}, quantized=None)]
"""


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("torch.nn:Linear", "the class is defined as 'torch.nn.modules.linear:Linear'"),
        ("torch.nn.modules.linear:Wing", "does not resolve"),
        ("wing_driver:Wing", "wing_driver cannot be imported: OSError: no libwing.so"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_ailment(bittern, install, target, why):
    site = install("sick", RULE.format(target=target))
    Path(site, "wing_driver.py").write_text("raise OSError('no libwing.so')")
    found = bittern("doctor", "--json")
    assert found.code == 1
    (problem,) = found.json["problems"]
    assert "bittern-sick 1.2" in problem
    assert why in problem


def test_a_rule_that_resolves_is_none(bittern, install):
    install("well", RULE.format(target="torch.nn.modules.linear:Linear"))
    assert bittern("doctor").code == 0


def test_a_plugin_that_fails_when_asked_for_its_rules_is_an_ailment(bittern, install):
    install("sick", "@hookimpl\ndef register_modules():\n    raise KeyError('lost')\n")
    (problem,) = bittern("doctor", "--json").json["problems"]
    assert problem == "plugin bittern-sick 1.2 failed in hook register_modules: KeyError: 'lost'"


def test_the_environment_that_decides_about_plugins_is_shown(bittern, monkeypatch):
    monkeypatch.setenv("BITTERN_STRICT_PLUGINS", "0")
    assert bittern("doctor", "--json").json["environment"]["BITTERN_STRICT_PLUGINS"] == "0"
    assert "BITTERN_STRICT_PLUGINS=0" in bittern("doctor").out
