"""Names functions and classes so that another process finds them, test modules included."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Reference", "reference_to"]


@dataclass(frozen=True)
class Reference:
    """Where a function or class is defined.

    Attributes:
        module: Name of its module.
        qualname: Its qualified name in the module.
        file: The module's file, for a module that cannot be imported by name: pytest's
            ``importlib`` mode gives test modules names that only pytest knows.
    """

    module: str
    qualname: str
    file: str

    def resolve(self) -> Any:
        """Import what the reference names."""
        found: Any = self._module()
        for part in self.qualname.split("."):
            found = getattr(found, part)
        return found

    def _module(self) -> ModuleType:
        if self.module in sys.modules:
            return sys.modules[self.module]
        try:
            spec = importlib.util.find_spec(self.module)
        except ImportError:
            spec = None
        if spec is not None and spec.origin and Path(spec.origin).samefile(self.file):
            return importlib.import_module(self.module)
        spec = importlib.util.spec_from_file_location(self.module, self.file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{self.file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.module] = module
        spec.loader.exec_module(module)
        return module


def reference_to(value: Any) -> Reference:
    """Return the reference to a function or class of module level.

    Raises:
        TypeError: Another process cannot find it: a lambda, a nested function, ``__main__``.
    """
    module = sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)
    name = value.__qualname__
    if module is None or file is None or module.__name__ == "__main__" or "<" in name:
        raise TypeError(
            f"another process cannot find {name} of {value.__module__}; "
            "define it at the top of an importable module"
        )
    return Reference(module.__name__, name, str(Path(file).resolve()))
