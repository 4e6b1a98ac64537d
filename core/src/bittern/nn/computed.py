"""Weights that a module computes from other parameters (``torch.nn.utils.parametrize``).

Such a module has a class of its own with a property per computed weight, and conversion swaps that
class like any other: the quantized forward reads the property, so it quantizes what was computed.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bittern.errors import ModelError
from bittern.nn.module import QuantModule, class_without
from bittern.runtime import evaluating

__all__ = ["check_unchanged", "sources_of", "weight_of"]

HOME = "parametrizations"


def weight_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter, or computed weight, of a module, and change nothing.

    A computed weight is computed in eval mode: in training, spectral normalization goes one step
    further with every look at it.

    Args:
        module: The module.
        name: Name of the weight; the answer is ``None`` where there is no such tensor.
    """
    if is_parametrized(module, name):
        with evaluating(module.get_submodule(f"{HOME}.{name}")):
            found = getattr(module, name)
    else:
        found = getattr(module, name, None)
    return found if isinstance(found, Tensor) else None


def sources_of(path: str, name: str) -> str:
    """Return the path of the module that holds what a computed weight is computed from.

    Args:
        path: Path of the module with the weight.
        name: Name of the weight.
    """
    return f"{path}.{HOME}.{name}" if path else f"{HOME}.{name}"


def check_unchanged(module: QuantModule, *, where: str) -> None:
    """Refuse to give a module its class back when something changed the class meanwhile.

    A class that a framework put on top of ours is fine: it is built again on the original one.

    Args:
        module: A converted module.
        where: Its path.

    Raises:
        ModelError: A further parametrization was registered after conversion, for which the class
            from before has no place; or a class was put on top that cannot be built again.
    """
    try:
        own = class_without(module)
    except TypeError as error:
        raise ModelError(
            f"its class was changed to {type(module).__qualname__} after it was quantized, and "
            f"cannot be taken back: {error}",
            where=where or None,
            hint="undo that first, or start from a fresh model",
        ) from error
    late = [name for name in getattr(module, HOME, ()) if not hasattr(own, name)]
    if late:
        raise ModelError(
            f"its {late[0]} was parametrized after it was quantized, and cannot stay so without",
            where=where or None,
            hint="call torch.nn.utils.parametrize.remove_parametrizations on it first; or "
            "parametrize the model before it is quantized",
        )
