"""Looks at a plugin from a clean process: what its import costs, drags in, and changes.

Run as ``python -P -m bittern.testing.probe imports|patches HOOKS``; answers in JSON. It must not
import anything itself that a plugin might be blamed for.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

__all__ = ["main"]


def imports(hooks: str) -> dict[str, Any]:
    """Return milliseconds and modules of the import, and modules after the register hooks ran."""
    import bittern.hooks

    del bittern
    start = time.perf_counter()
    module = importlib.import_module(hooks)
    milliseconds = (time.perf_counter() - start) * 1e3
    after_import = _top_level()
    _register(module)
    after_register = _top_level()
    torch = sys.modules.get("torch")
    return {
        "milliseconds": milliseconds,
        "after_import": after_import,
        "after_register": after_register,
        "cuda": torch is not None and _cuda(torch),
    }


def patches(hooks: str) -> dict[str, Any]:
    """Return which functions of torch have another identity after the plugin was imported."""
    import torch

    owners: list[tuple[str, Any, tuple[str, ...]]] = [
        ("torch", torch, ("matmul", "load", "save", "compile", "einsum")),
        ("torch.Tensor", torch.Tensor, ("__matmul__", "to", "detach", "__torch_function__")),
        (
            "torch.nn.functional",
            torch.nn.functional,
            ("linear", "embedding", "conv2d", "softmax", "scaled_dot_product_attention"),
        ),
        (
            "torch.nn.Module",
            torch.nn.Module,
            ("__call__", "__setattr__", "__getattr__", "to", "load_state_dict", "state_dict"),
        ),
        *(
            (f"torch.nn.{n}", getattr(torch.nn, n), ("forward", "__init__", "__call__"))
            for n in ("Linear", "Embedding", "Conv2d", "LayerNorm", "MultiheadAttention")
        ),
    ]
    before = [(n, o, a, getattr(o, a)) for n, o, names in owners for a in names]
    module = importlib.import_module(hooks)
    for text in _register(module):
        try:
            importlib.import_module(text.partition(":")[0])
        except Exception:  # whether it resolves is another test's business
            continue
    changed = [f"{n}.{a}" for n, o, a, value in before if not _same(getattr(o, a), value)]
    return {"changed": changed, "cuda": _cuda(torch)}


def _same(a: Any, b: Any) -> bool:
    return a is b or (hasattr(a, "__func__") and a.__func__ is getattr(b, "__func__", None))


def _cuda(torch: Any) -> bool:
    return bool(torch.cuda.is_initialized())


def _top_level() -> list[str]:
    return sorted({name.partition(".")[0] for name in sys.modules})


def _register(module: Any) -> list[str]:
    """Call the register hooks; return the import strings of what they registered."""
    found: list[str] = []
    for name in dir(module):
        value: Any = getattr(module, name, None)
        options = getattr(value, "bittern_impl", None)
        hook = (options.get("specname") or name) if isinstance(options, dict) else ""
        if hook == "register_commands":
            import click

            value(cli=click.Group("bittern"))
        elif hook.startswith("register_"):
            for record in value() or ():
                names = [n for n in getattr(record, "__dataclass_fields__", ()) if n != "target"]
                texts = [getattr(record, n) for n in names]
                found += [t for t in texts if isinstance(t, str) and _is_import(t)]
    return found


def _is_import(text: str) -> bool:
    module, colon, name = text.partition(":")
    return bool(colon) and all(p.isidentifier() for p in [*module.split("."), *name.split(".")])


def main(question: str, hooks: str) -> None:
    """Answer one question on stdout."""
    answer = {"imports": imports, "patches": patches}[question](hooks)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
