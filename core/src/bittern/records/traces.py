"""What the trace finds: which tensors of a model belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Coverage", "Fold", "Group", "Member"]


@dataclass(frozen=True)
class Member:
    """One tensor dimension of a group.

    Attributes:
        module: Dotted path.
        tensor: Parameter name.
        dim: The coupled dimension.
        index: ``(size, k)``: coordinate ``i`` of the group is rows ``index[i]`` of ``dim``.
    """

    module: str
    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Group:
    """Dimensions that must change together.

    Attributes:
        size: Number of coordinates.
        sortable: Whether one permutation of the coordinates, applied to all members, changes
            nothing.
        members: The tensors' dimensions.
        normalized_by: Modules that compute statistics over the coordinates (norms, softmax,
            means): removing some is then not the same as making them zero.
    """

    size: int
    sortable: bool
    members: tuple[Member, ...]
    normalized_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fold:
    """A scale that can move from the inputs of consumers into a producer.

    Multiply the rows ``index[i]`` of every member of ``scaled`` by a positive ``s[i]``, divide the
    rows ``index[i]`` of every member of ``divided`` by it, and the model computes what it did.

    Attributes:
        producer: The module, or the tensor's full name where the module has several weights.
        tensor: Name of its parameter.
        dim: The dimension of that parameter that is scaled.
        consumers: What reads the scaled tensor, named likewise.
        reason: Why it is legal.
        scaled: The producer's dimension and those of its biases.
        divided: The consumers' dimensions, in the order of ``consumers``.
    """

    producer: str
    tensor: str
    dim: int
    consumers: tuple[str, ...]
    reason: str
    scaled: tuple[Member, ...] = ()
    divided: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """What the trace could analyse.

    Attributes:
        analysed: Module paths.
        barriers: Where the analysis stopped, and why.
        fraction: Share of the weight-bearing modules that were analysed.
    """

    analysed: tuple[str, ...] = ()
    barriers: Mapping[str, str] = field(default_factory=dict)
    fraction: float = 0.0
