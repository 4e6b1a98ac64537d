"""Values between processes: JSON for what is plain, safetensors for tensors, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["read_value", "write_value"]

_KIND = "__kind__"


def write_value(folder: Path, name: str, value: object) -> None:
    """Write a value as ``name.json`` and ``name.safetensors``.

    Args:
        folder: An existing directory.
        name: Name of the files.
        value: Tensors, numbers, strings, ``None``, paths, and lists, tuples and mappings (with
            string keys) of them.

    Raises:
        TypeError: It holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encoded(value, tensors))
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text, encoding="utf-8")  # last: it says all is there


def read_value(folder: Path, name: str) -> Any:
    """Undo `write_value`."""
    data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return _decoded(data, load_file(folder / f"{name}.safetensors"))


def _encoded(value: object, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {_KIND: "tensor", "key": key}
    if isinstance(value, Path):
        return {_KIND: "path", "text": str(value)}
    if isinstance(value, list | tuple):
        items = [_encoded(item, tensors) for item in value]
        return items if isinstance(value, list) else {_KIND: "tuple", "items": items}
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"the key {wrong[0]!r} is no string, so JSON cannot hold it")
        items = [[key, _encoded(item, tensors)] for key, item in value.items()]
        return {_KIND: "mapping", "items": items}
    raise TypeError(
        f"a {type(value).__name__} cannot go to another process; "
        "give tensors, numbers, strings, paths, lists, tuples and mappings"
    )


def _decoded(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(data, list):
        return [_decoded(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    match data[_KIND]:
        case "tensor":
            return tensors[data["key"]]
        case "path":
            return Path(data["text"])
        case "tuple":
            return tuple(_decoded(item, tensors) for item in data["items"])
        case _:
            return {key: _decoded(item, tensors) for key, item in data["items"]}
