"""How errors end: one message, the right code, JSON where asked for, no traceback but for bugs."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from bittern.cli.failures import explain
from bittern.errors import BitternError, DataError, OutputError


def test_bittern_error_is_one_message_with_its_hint(toy_bittern):
    done = toy_bittern("plan", "toy:x", "--recipe", "int9")
    assert done.code == 2
    assert done.out == ""
    first, second = done.err.splitlines()
    assert first == "error: unknown recipe 'int9'"
    assert second.startswith("  hint: did you mean 'int8'?")


def test_bittern_error_is_one_json_object(toy_bittern):
    done = toy_bittern("plan", "toy:x", "--recipe", "int9", "--json")
    assert done.code == 2
    assert set(done.json) == {"error", "what", "where", "hint"}
    assert done.json["error"] == "RecipeError"
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback_of_an_error(toy_bittern, monkeypatch):
    monkeypatch.setenv("BITTERN_DEBUG", "1")
    assert "Traceback" in toy_bittern("plan", "toy:x", "--recipe", "int9").err


def test_failing_hook_names_the_plugin(toy_bittern):
    done = toy_bittern("plan", "toy:bug", "--recipe", "int8")
    assert done.code == 2
    assert "toy.py failed in hook resolve_model: ValueError: a bug in the plugin" in done.err
    assert "Traceback" not in done.err


def test_unexpected_exception_says_that_it_is_a_bug_and_shows_the_traceback(toy_bittern):
    done = toy_bittern("crash", "key")
    assert done.code == 1
    lines = done.err.splitlines()
    assert "bug in bittern or in a plugin" in lines[0]
    assert lines[1].startswith("Traceback")
    assert lines[-1] == "KeyError: 'key'"


def test_unexpected_exception_is_json_too(toy_bittern):
    done = toy_bittern("crash", "key", "--json")
    assert done.code == 1
    assert done.json["error"] == "KeyError"
    assert "bug" in done.json["hint"]
    assert "Traceback" in done.err


def test_a_truncated_file_is_no_ctrl_d(toy_bittern):
    done = toy_bittern("crash", "eof")
    assert done.code == 1
    assert "EOFError" in done.err
    assert "interrupted" not in done.err


@pytest.mark.parametrize("model", ["toy:huge", "toy:gpu"])
def test_too_little_memory_is_a_clear_error(toy_bittern, model):
    done = toy_bittern("plan", model, "--recipe", "int8", "--json")
    assert done.code == 2
    assert done.json["what"] == "out of memory"
    assert "--batch-size" in done.json["hint"]


def test_a_full_disk_is_a_clear_error(toy_bittern):
    done = toy_bittern("crash", "os")
    assert done.code == 2
    assert done.err.startswith("error: /somewhere: the disk is full")


def test_ctrl_c_in_a_plugins_command(toy_bittern):
    done = toy_bittern("crash", "stop")
    assert done.code == 130
    assert done.err.strip() == "interrupted; nothing was written"


def test_explain_leaves_bugs_alone():
    known = DataError("x")
    assert explain(known) is known
    assert explain(KeyError("x")) is None
    assert explain(OSError(errno.EACCES, "no")) is None
    assert isinstance(explain(OSError(errno.ENOSPC, "full")), OutputError)
    assert isinstance(explain(MemoryError()), BitternError)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_in_a_real_process_leaves_nothing(toy, data, tmp_path):
    source, out = data("wait"), tmp_path / "deep" / "out"
    code = "from bittern.cli.main import main; main()"
    command = [sys.executable, "-c", code, "--plugin", str(toy), "quantize", "toy:x", "-r", "int8"]
    process = subprocess.Popen(
        [*command, "--data", source, "--output", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    marker = tmp_path / "wait.started"
    deadline = time.monotonic() + 60
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "interrupted; nothing was written"
    assert stdout == ""
    assert not (tmp_path / "deep").exists()
