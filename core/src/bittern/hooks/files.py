"""Unpackaged plugins: a Python file on its own, given with ``--plugin``."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType

from bittern.hooks.discovery import PluginRecord

__all__ = ["file_record", "load_file"]


def file_record(path: Path) -> PluginRecord:
    """Return the record of a plugin file, before it is loaded.

    Its module is called after the file; where another file of that name is loaded already, after
    the whole path too, so that the string targets of both resolve.
    """
    entry = f"bittern_file_{path.stem}"
    other = sys.modules.get(entry)
    if other is not None and getattr(other, "__file__", None) != str(path.resolve()):
        entry += f"_{zlib.crc32(str(path.resolve()).encode()):08x}"
    return PluginRecord(name=path.stem, distribution=str(path), version="", entry=entry)


def load_file(record: PluginRecord, path: Path) -> ModuleType:
    """Import a plugin file as the module ``record.entry``.

    Raises:
        Exception: Whatever the file raises; it is then in ``sys.modules`` no more.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(record.entry, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[record.entry] = module  # its own string targets must resolve
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[record.entry]
        raise
    return module
