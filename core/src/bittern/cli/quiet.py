"""Keeps other people's progress bars, log lines and warnings out of our output.

Nothing is redirected, so an error of theirs is still seen. ``BITTERN_DEBUG=1`` leaves all of it on.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from bittern.cli.context import warn

__all__ = ["plugin_warnings", "quiet_libraries"]

# Read by the libraries when they are imported; what the user has set stays.
ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "LOGURU_LEVEL": "ERROR",  # compressed_tensors
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
LOGGERS = ("accelerate", "datasets", "httpx", "huggingface_hub", "torch", "transformers", "urllib3")
OURS = "bittern"


def quiet_libraries() -> None:
    """Quieten libraries that are not imported yet; for this process and those it starts."""
    if os.environ.get("BITTERN_DEBUG", "") not in ("", "0"):
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class _PluginWarnings(logging.Handler):
    """Shows what the plugin loader has to say; everything else of ours is in the reports."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record on stderr."""
        if record.levelno >= logging.WARNING and record.name.startswith(f"{OURS}.plugins"):
            warn(record.getMessage())


@contextmanager
def plugin_warnings() -> Iterator[None]:
    """Show warnings about plugins on stderr within the block."""
    logger, handler = logging.getLogger(OURS), _PluginWarnings()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
