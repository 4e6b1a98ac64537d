"""What the records that plugins make check about themselves.

A record is made inside a hook, so what it raises is shown with the plugin's name. Found later, a
class where a string belongs would be a rule that never matches, without a word.
"""

from __future__ import annotations

__all__ = ["check_class_name", "check_import_strings", "check_items", "check_priority"]

ANY = "*"


def check_import_strings(record: object, *fields: str) -> None:
    """Raise unless the fields hold ``"package.module:name"``, ``"*"`` or ``None``.

    Raises:
        TypeError: One is no string.
        ValueError: One is malformed.
    """
    for field in fields:
        value = getattr(record, field)
        if value is None or value == ANY:
            continue
        what = f"{type(record).__name__}.{field}"
        if not isinstance(value, str):
            name = getattr(value, "__qualname__", "Name")
            right = f"{getattr(value, '__module__', 'package.module')}:{name}"
            raise TypeError(f"{what} must be a string; write {right!r}, not the object")
        module, _, name = value.partition(":")
        if not module or not name:
            raise ValueError(f'{what} is {value!r}; write "package.module:name"')


def check_class_name(record: object, field: str) -> None:
    """Raise unless a field holds the bare name of a class, or ``None``.

    Raises:
        TypeError: It is no string.
        ValueError: It is no name, as ``"torch.nn:Linear"``.
    """
    value = getattr(record, field)
    if value is None:
        return
    what = f"{type(record).__name__}.{field}"
    if not isinstance(value, str):
        name = getattr(value, "__name__", "Linear")
        raise TypeError(f"{what} must be a string; write {name!r}, not the object")
    if not value.isidentifier():
        raise ValueError(f'{what} is {value!r}; write the name of a class alone, as "Linear"')


def check_priority(record: object) -> None:
    """Raise unless the priority can be compared.

    Raises:
        TypeError: It is no integer.
    """
    value = getattr(record, "priority", None)
    if not isinstance(value, int):
        raise TypeError(f"{type(record).__name__}.priority must be an int, not {value!r}")


def check_items(record: object, field: str, kind: type) -> None:
    """Raise unless a field is a tuple or list of ``kind``.

    Raises:
        TypeError: It is something else.
    """
    value = getattr(record, field)
    if not isinstance(value, tuple | list) or not all(isinstance(item, kind) for item in value):
        what = f"{type(record).__name__}.{field}"
        raise TypeError(f"{what} must be a tuple of {kind.__name__}, not {value!r}")
