"""``bittern plugins``: statuses, hooks, details."""

import pytest

from bittern.hooks import specs

EXPORTS = """
@hookimpl
def register_exporters():
    return []
"""


@pytest.fixture
def every_status(install, monkeypatch, installed):
    """Install one plugin of each status."""
    install("good", EXPORTS)
    install("ill", "raise RuntimeError('broken wing')")
    install("half", "@hookimpl\ndef register_unicorns():\n    return []\n")
    install("lost", requires=("no-such-framework>=1; extra == 'target'",))
    install("old", requires=("click>=999; extra == 'target'",))
    install("new", requires=("bittern>=99",))
    install("off")
    install("twin", distribution="bittern-twin-a")
    install("twin", distribution="bittern-twin-b")
    monkeypatch.setenv("BITTERN_DISABLE_PLUGINS", f"{installed},off")


def statuses(outcome, installed):
    real = installed.split(",")
    return {(p["name"], p["status"]) for p in outcome.json["plugins"] if p["name"] not in real}


@pytest.mark.usefixtures("every_status")
def test_list_shows_every_status_with_reason_and_remedy(bittern, installed):
    found = bittern("plugins", "list", "--json")
    assert found.code == 0
    assert statuses(found, installed) == {
        ("good", "loaded"),
        ("ill", "failed"),
        ("half", "partial"),
        ("lost", "target-missing"),
        ("old", "target-incompatible"),
        ("new", "core-incompatible"),
        ("off", "blocked"),
        ("twin", "loaded"),
        ("twin", "duplicate"),
    }
    done = bittern("plugins", "list")
    assert done.code == 0
    assert "pip install 'bittern-lost[target]'" in done.out
    assert "register_unicorns" in done.out
    assert "pip uninstall bittern-twin-b" in done.out
    assert "broken wing" in done.err  # the loader's one-line warning


def test_list_of_nothing(bittern, monkeypatch):
    from bittern.hooks import manager

    monkeypatch.setattr(manager, "discover", list)
    assert bittern("plugins", "list", "--json").json == {"plugins": []}
    assert "no plugin is installed" in bittern("plugins", "list").out


def test_all_shows_core_too(bittern):
    names = [p["name"] for p in bittern("plugins", "list", "--all", "--json").json["plugins"]]
    assert names[0] == "bittern"
    hooks = bittern("plugins", "show", "bittern", "--json").json["hooks"]
    assert "register_formats" in hooks


def test_hook_filters_and_names_the_nearest(bittern, install):
    install("good", EXPORTS)
    found = bittern("plugins", "list", "--hook", "register_exporters", "--json").json["plugins"]
    assert [p["name"] for p in found] == ["good"]
    assert "no plugin implements" in bittern("plugins", "list", "--hook", "after_export").out
    done = bittern("plugins", "list", "--hook", "register_exporter", "--json")
    assert done.code == 2
    assert "'register_exporters'" in done.json["hint"]


def test_requirements_are_lines_for_pip(bittern, install, toy_bittern):
    install("good")
    assert "bittern-good==1.2" in bittern("plugins", "list", "--requirements").out.splitlines()
    lines = toy_bittern("plugins", "list", "--requirements", "--json").json["requirements"]
    assert "bittern-good==1.2" in lines
    assert not any("toy" in line for line in lines)  # a file is nothing that pip installs


def test_show_has_the_traceback_of_a_failure(bittern, install):
    install("ill", "raise RuntimeError('broken wing')")
    done = bittern("plugins", "show", "ill")
    assert done.code == 0
    assert "RuntimeError: broken wing" in done.out
    assert "Traceback" in done.out
    found = bittern("plugins", "show", "bittern-ill", "--json").json
    assert found["status"] == "failed"
    assert found["entry"].startswith("fake_")


def test_show_of_an_unpackaged_plugin(toy_bittern, toy):
    found = toy_bittern("plugins", "show", "toy", "--json").json
    assert found["distribution"] == str(toy)
    assert "resolve_model" in found["hooks"]


def test_show_of_twins_shows_both(bittern, install):
    install("twin", distribution="bittern-twin-a")
    install("twin", distribution="bittern-twin-b")
    found = bittern("plugins", "show", "twin", "--json").json["plugins"]
    assert [p["status"] for p in found] == ["loaded", "duplicate"]


def test_show_of_an_unknown_plugin(bittern):
    done = bittern("plugins", "show", "bitter", "--json")
    assert done.code == 2
    assert "'bittern'" in done.json["hint"]


def test_hooks_come_from_the_specifications(bittern, install):
    install("good", EXPORTS)
    hooks = {h["name"]: h for h in bittern("plugins", "hooks", "--json").json["hooks"]}
    assert set(specs.RETURNS) <= set(hooks)
    model = hooks["resolve_model"]
    assert model["kind"] == "first answer"
    assert model["arguments"] == {"source": "str", "config": "LoadConfig", "toolkit": "Any"}
    assert model["returns"] == "nn.Module | None"
    assert model["summary"] == "Load the model that a command line or a user names."
    assert hooks["resolve_parallel_state"]["reserved"]
    assert not hooks["register_formats"]["reserved"]
    assert all(h["kind"] and h["summary"].endswith(".") for h in hooks.values())
    assert "bittern-good 1.2" in hooks["register_exporters"]["plugins"]
    done = bittern("plugins", "hooks")
    assert "resolve_model(source, config, toolkit)" in done.out


def test_a_required_plugin_that_is_missing_does_not_hide_the_list(bittern, monkeypatch):
    monkeypatch.setenv("BITTERN_PLUGINS", "unicorn")
    done = bittern("plugins", "list", "--json")
    assert done.code == 0
    assert "'unicorn' is not installed" in done.err
    assert bittern("recipes", "--json").code == 2
