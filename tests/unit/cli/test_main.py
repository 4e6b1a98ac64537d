"""The root group: lean, lazy, open to plugins, and closed to their mistakes."""

import json
from importlib import import_module

import click
import pytest

from bittern._version import __version__
from bittern.cli.main import COMMANDS, make_cli

LEAN = """
import json, sys
from bittern.cli.main import main
try:
    main()
except SystemExit as stop:
    code = stop.code
heavy = "torch numpy pydantic rich yaml safetensors transformers".split()
print(json.dumps([code, [m for m in heavy if m in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize("everything", [False, True], ids=["core", "as-installed"])
@pytest.mark.parametrize("args", [("--help",), ("--version",), ("-h",)])
def test_help_imports_nothing_heavy(python, args, everything):
    env = {"BITTERN_DISABLE_PLUGINS": ""} if everything else {}
    done = python(LEAN, *args, **env)
    code, heavy = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert heavy == []
    assert done.stdout


@pytest.mark.parametrize("args", [("plugins", "list", "--json"), ("plugins", "hooks", "--json")])
def test_commands_about_plugins_do_without_torch(python, args):
    done = python(LEAN, *args)
    code, heavy = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert not {"torch", "numpy", "pydantic", "rich"} & set(heavy)
    json.loads(done.stdout)


def test_help_of_the_root_lists_every_command(bittern):
    done = bittern("--help")
    assert done.code == 0
    assert done.err == ""
    for name, (_, summary) in COMMANDS.items():
        assert f"{name} " in done.out
        assert summary in done.out


def test_version(bittern):
    assert bittern("--version").out.strip() == f"bittern {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_in_the_table_is_the_commands_own(name):
    module, _, attribute = COMMANDS[name][0].partition(":")
    command = getattr(import_module(module), attribute)
    assert command.name == name
    assert command.help.splitlines()[0] == COMMANDS[name][1]


def leaves(command: click.Command, path: tuple[str, ...]):
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from leaves(child, (*path, name))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_an_example_and_help_for_every_option(bittern, name):
    root = make_cli()
    command = root.get_command(click.Context(root), name)
    for path, found in leaves(command, (name,)):
        assert found.help, path
        assert "Example" in (found.epilog or ""), path
        for param in found.params:
            assert not isinstance(param, click.Option) or param.help, (path, param.name)
        done = bittern(*path, "--help")
        assert done.code == 0
        assert "Example" in done.out


def test_unknown_command_names_the_nearest_and_exits_2(bittern):
    done = bittern("quantise")
    assert done.code == 2
    assert "'quantize'" in done.err
    assert done.out == ""


def test_usage_error_exits_2_and_is_json_when_asked(bittern):
    assert bittern("plan").code == 2
    done = bittern("plan", "--json")
    assert done.code == 2
    assert done.json["error"] == "MissingParameter"
    assert "MODEL" in done.err


# --- commands of plugins ---


def test_plugin_command_is_in_the_help_and_runs(toy_bittern):
    assert "Say hello." in toy_bittern("--help").out
    assert "crash" not in toy_bittern("--help").out  # hidden
    done = toy_bittern("hello")
    assert (done.code, done.out) == (0, "hello fp8\n")
    assert "int8" in toy_bittern("hello", "--json").json["formats"]


def test_plugin_file_counts_for_help_wherever_it_stands(bittern, toy):
    assert "Say hello." in bittern("--help", "--plugin", toy).out


def test_plugin_commands_do_not_leak_into_the_next_run(bittern, toy_bittern):
    assert toy_bittern("hello").code == 0
    assert bittern("hello").code == 2


BROKEN = """
@hookimpl
def register_commands(cli):
    @cli.command()
    def before():
        "Registered before the failure."
    raise ValueError("two\\nlines")
"""
GOOD = """
import click

@hookimpl
def register_commands(cli):
    @cli.command()
    def useful():
        "Of use."
        click.echo("done")
"""


@pytest.mark.parametrize("good", ["aaa", "zzz"])
def test_broken_register_commands_costs_one_warning_and_nothing_else(bittern, install, good):
    install("mmm", BROKEN)
    install(good, GOOD)
    done = bittern("--help")
    assert done.code == 0
    assert "Of use." in done.out
    (line,) = done.err.splitlines()
    assert line.startswith("warning: plugin bittern-mmm 1.2 failed in hook register_commands")
    assert "two lines" in line
    assert bittern("useful").out == "done\n"
    assert bittern("before").code == 0
    assert bittern("recipes", "--json").err == ""  # core's commands do not even ask


def test_a_command_cannot_be_taken_from_core_or_from_another_plugin(bittern, install):
    install("thief", GOOD.replace("def useful", "def plan"))
    install("one", GOOD)
    install("two", GOOD.replace("Of use.", "Of no use."))
    done = bittern("--help")
    assert done.code == 0
    assert "plugin bittern-thief 1.2: the command 'plan' exists already" in done.err
    assert "the command 'useful' exists already" in done.err
    assert "Show what a recipe would do" in done.out
    assert len(done.err.splitlines()) == 2


def test_a_plugin_that_does_not_load_is_one_warning(bittern, install):
    install("ill", "raise RuntimeError('broken wing')")
    done = bittern("--help")
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert "broken wing" in line
    assert line.startswith("warning: plugin bittern-ill 1.2 failed to load")


def test_missing_plugin_file_is_an_error_but_help_still_shows(bittern, tmp_path):
    missing = tmp_path / "missing.py"
    done = bittern("--plugin", missing, "--help")
    assert done.code == 0
    assert "quantize" in done.out
    assert "missing.py" in done.err
    done = bittern("--plugin", missing, "recipes", "--json")
    assert done.code == 2
    assert done.json["error"] == "PluginError"


def test_strict_plugins_makes_a_broken_plugin_an_error(bittern, install):
    install("ill", "raise RuntimeError('broken wing')")
    assert bittern("recipes", "--json").code == 0
    done = bittern("--strict-plugins", "recipes", "--json")
    assert done.code == 2
    assert "broken wing" in done.json["what"]


# --- which plugins ---


def names(outcome):
    return {p["name"]: p["status"] for p in outcome.json["plugins"]}


def test_plugins_are_chosen_by_name(bittern, install):
    install("one", GOOD)
    install("two", "raise RuntimeError('loaded')")
    install("three")
    found = names(bittern("--plugins", "one, bittern-three", "plugins", "list", "--json"))
    assert (found["one"], found["two"], found["three"]) == ("loaded", "blocked", "loaded")
    done = bittern("--plugins", "one,unicorn", "recipes", "--json")
    assert done.code == 2
    assert "'unicorn' is not installed" in done.json["what"]
    assert names(bittern("--plugins", "", "plugins", "list", "--json"))["one"] == "blocked"


def test_the_option_goes_before_the_environment(bittern, install, monkeypatch):
    install("one", GOOD)
    install("two")
    monkeypatch.setenv("BITTERN_PLUGINS", "two")
    found = names(bittern("--plugins", "one", "plugins", "list", "--json"))
    assert (found["one"], found["two"]) == ("loaded", "blocked")


@pytest.mark.parametrize("args", [("--no-plugin", "one", "--no-plugin", "two"), ("--no-plugin=*",)])
def test_plugins_are_left_out_by_name(bittern, install, args):
    install("one", GOOD)
    install("two", "raise RuntimeError('loaded')")
    done = bittern(*args, "plugins", "list", "--json")
    assert (names(done)["one"], names(done)["two"], done.err) == ("blocked", "blocked", "")
    assert "Of use." not in bittern(*args, "--help").out
    assert bittern(*args, "useful").code == 2


def test_a_plugin_left_out_stays_out_when_another_is_missing(bittern, install):
    install("one", "raise RuntimeError('loaded')")
    done = bittern("--no-plugin", "one", "--plugins", "unicorn", "plugins", "list", "--json")
    assert done.code == 0
    assert names(done)["one"] == "blocked"
    assert "'unicorn' is not installed" in done.err


def test_calls_are_traced_when_asked(bittern, install):
    install("one", "@hookimpl\ndef register_recipes():\n    return []\n")
    assert bittern("recipes", "--json").err == ""
    done = bittern("--trace-plugins", "recipes", "--json")
    assert done.code == 0
    assert "register_recipes() <- one: []" in done.err
    assert "register_recipes() <- bittern: [RecipeSource(" in done.err


def test_a_broken_plugin_file_is_listed_with_its_traceback(bittern, tmp_path):
    file = tmp_path / "wing.py"
    file.write_text("raise RuntimeError('broken wing')")
    done = bittern("--plugin", file, "plugins", "show", "wing", "--json")
    assert done.code == 0
    assert done.json["status"] == "failed"
    assert "wing.py" in done.json["traceback"]
    assert "could not be loaded" in done.err
    assert bittern("--plugin", file, "doctor").code == 1


def test_an_error_meant_for_the_user_names_its_plugin(bittern, install):
    install(
        "one",
        """
        from bittern.errors import ModelError

        @hookimpl
        def resolve_model(source, config):
            raise ModelError("the index is torn", where=source)
        """,
    )
    done = bittern("plan", "x", "--recipe", "int8", "--json")
    assert done.code == 2
    assert done.json["plugin"] == "bittern-one 1.2"
    assert "plugin: bittern-one 1.2" in done.err
