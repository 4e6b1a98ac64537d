"""Other people's noise stays out of stdout and stderr, their errors do not."""

import json

NOISY = """
import json, logging, os, sys, warnings
import bittern.cli.main as cli

sys.argv = ["bittern", "--version"]
try:
    cli.main()
except SystemExit:
    pass
warnings.warn("a warning of a library")
logging.getLogger("transformers").warning("a log line of a library")
logging.getLogger("transformers").error("an error of a library")
print(json.dumps({k: os.environ.get(k) for k in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY")}))
"""


def test_warnings_and_log_lines_are_off_and_errors_on(python):
    done = python(NOISY)
    assert done.stderr == "an error of a library\n"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def test_what_the_user_set_stays(python):
    found = json.loads(python(NOISY, TQDM_DISABLE="0").stdout.splitlines()[-1])
    assert found["TQDM_DISABLE"] == "0"


def test_debug_leaves_it_all_on(python):
    done = python(NOISY, BITTERN_DEBUG="1")
    assert "a warning of a library" in done.stderr
    assert "a log line of a library" in done.stderr


def test_reports_of_core_do_not_come_twice(bittern, caplog):
    import logging

    from bittern.cli.quiet import plugin_warnings

    with plugin_warnings():
        logging.getLogger("bittern.calibration").warning("in the report already")
    assert bittern("--version").err == ""
    assert not [h for h in logging.getLogger("bittern").handlers if "Plugin" in type(h).__name__]
