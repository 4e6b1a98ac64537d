"""What a manifest names: quantized weights of a live model, and plugins."""

from __future__ import annotations

from shlex import quote

from torch import nn

from bittern.convert import LiveNames
from bittern.errors import CheckpointError
from bittern.nn.weights import Reader, readers_of

__all__ = ["how_to_get", "readers_named"]


def readers_named(model: nn.Module, names: object, *, what: str) -> list[Reader]:
    """Return those who read the weights of these names.

    Args:
        model: A converted model.
        names: Full names of parameters, as a manifest has them.
        what: What they are said to be, for errors.

    Raises:
        CheckpointError: It is no list of names, or a name is that of no quantized weight.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"malformed list of {what} weights: {str(names)[:80]}",
            hint="copy or download the whole directory again",
        )
    readers = {r.name: r for r in readers_of(model) if r.tensor in r.module._parameters}
    live = LiveNames(model)
    found = [live.live(name) for name in names]
    missing = [name for name in found if name not in readers]
    if missing:
        raise CheckpointError(
            f"its {what} weight {missing[0]!r} is none that this model quantizes",
            hint="restore into a model of the same architecture",
        )
    return [readers[name] for name in found]


def how_to_get(plugin: str, *, same: bool = False) -> str:
    """Return how a plugin is loaded, by its label: ``"name version"``, or the path of a file.

    Args:
        plugin: The label.
        same: Whether it has to be this very version.

    A stranger may have written the label: it is quoted for a shell.
    """
    if plugin.endswith(".py"):
        return (
            f"load that file: bt.Toolkit(files=[{plugin!r}]), or bittern --plugin {quote(plugin)}"
        )
    name, _, version = plugin.partition(" ")
    return f"pip install {quote(f'{name}=={version}' if same and version else name)}"
