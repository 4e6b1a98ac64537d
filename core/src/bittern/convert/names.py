"""Names of modules and tensors without what wrappers put into them.

A model that was saved as it is comes back inside DDP, ``torch.compile`` or a LoRA wrapper, and the
other way round. Each of them inserts a segment into the names of everything that it holds. Wrappers
are known by their class, so that a model may have children of its own with such names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

__all__ = ["LiveNames", "unwrapped", "wrappers"]

# The child that holds what is wrapped, to where the classes of such wrappers are defined.
HOLDERS: dict[str, tuple[str, ...]] = {
    "module": ("torch.nn.parallel.", "torch.optim.swa_utils", "megatron.core.", "deepspeed."),
    "_orig_mod": ("torch._dynamo.",),
    "_checkpoint_wrapped_module": ("torch.distributed.algorithms.",),
    "_fsdp_wrapped_module": ("torch.distributed.fsdp.",),
    "base_model": ("peft.",),
    "model": ("peft.",),
    "base_layer": ("peft.",),
}
# These wrappers leave their own segment out of the names of state_dict.
LEFT_OUT = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def wrappers(model: nn.Module) -> list[nn.Module]:
    """Return what wraps a model, the outermost first, and last the model itself."""
    found = [model]
    while (name := _holder(found[-1])) is not None:
        found.append(found[-1].get_submodule(name))
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that DDP, ``torch.compile``, ``AveragedModel``, peft and others wrap."""
    return wrappers(model)[-1]


class LiveNames:
    """Translates between the names of a live model and those that its parts have in files.

    Args:
        model: A model, or what wraps it.
        tensors: Names of its ``state_dict``, which may leave out what the names of modules have.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[str] = ()) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._inserted = {
            f"{path}.{name}" if path else name
            for path, module in modules.items()
            if (name := _holder(module)) is not None
        }
        self._inserted |= {
            ".".join(part for part in path.split(".") if part not in LEFT_OUT)
            for path in self._inserted
            if path.rpartition(".")[2] not in LEFT_OUT
        }
        self._live: dict[str, str] = {}
        self._same: frozenset[str] = frozenset()
        if self._inserted:
            for path in modules:  # what is wrapped comes after its wrapper, and counts
                self._live[self.saved(path)] = path
            names = list(tensors)
            counts = Counter(map(self.saved, names))
            # Wrappers in each other may have tensors of one name: those keep where they are.
            self._same = frozenset(name for name in names if counts[self.saved(name)] > 1)
            self._live |= {self.saved(name): name for name in names}

    def saved(self, name: str) -> str:
        """Return the name in files of a module, a tensor or a quantizer."""
        if not self._inserted or name in self._same:
            return name
        parts = name.split(".")
        return ".".join(
            part for end, part in enumerate(parts, 1) if ".".join(parts[:end]) not in self._inserted
        )

    def live(self, name: str) -> str:
        """Return the live name of what is called ``name`` in files."""
        if not self._inserted:
            return name
        head, tail = name, ""
        while head not in self._live and head:
            head, _, last = head.rpartition(".")
            tail = f".{last}{tail}"
        return (self._live.get(head, head) + tail).removeprefix(".")


def _holder(module: nn.Module) -> str | None:
    """Return the name of the child that a wrapper holds what it wraps in."""
    for name in HOLDERS.keys() & module._modules.keys():
        homes = HOLDERS[name]
        if any(f"{cls.__module__}.".startswith(homes) for cls in type(module).__mro__):
            return name
    return None
