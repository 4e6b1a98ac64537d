"""Follows tensors through operators that only rename, move or cast them."""

from __future__ import annotations

from collections.abc import Iterator

from bittern.tracing.flow import OpNode, Value, values_in

__all__ = [
    "MOVES",
    "RENAMES",
    "contraction",
    "derived",
    "owner",
    "root",
    "source",
    "stem",
]

# The result is the same tensor: its elements, in the same order.
RENAMES = frozenset(
    [
        "to",
        "_to_copy",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "lift_fresh",
        "dropout",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "_unsafe_view",
        "view_as",
        "reshape_as",
        "unsqueeze",
        "squeeze",
        "type_as",
        "feature_dropout",
    ]
)
# The result holds elements of the tensor at other places.
MOVES = RENAMES | frozenset(
    [
        "permute",
        "transpose",
        "t",
        "mT",
        "numpy_T",
        "swapaxes",
        "movedim",
        "moveaxis",
        "expand",
        "expand_as",
        "broadcast_to",
    ]
)
# The result holds some of the tensor's elements.
_PARTS = frozenset(
    [
        "select",
        "index",
        "index_select",
        "slice",
        "narrow",
        "split",
        "split_with_sizes",
        "tensor_split",
        "chunk",
        "unbind",
    ]
)

# Which arguments an operator multiplies and sums: (activation, weight).
_CONTRACTIONS = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "conv1d": (0, 1),
    "conv2d": (0, 1),
    "conv3d": (0, 1),
    "conv_transpose1d": (0, 1),
    "conv_transpose2d": (0, 1),
    "conv_transpose3d": (0, 1),
    "convolution": (0, 1),
    "_convolution": (0, 1),
    "_grouped_mm": (0, 1),
}


def stem(op: str) -> str:
    """Return an operator's plain name: ``"add"`` for ``"aten.add_.Tensor"``."""
    parts = op.split(".")
    name = parts[1] if len(parts) > 1 else op
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


def root(value: Value) -> Value:
    """Return the tensor that ``value`` is another name of: views and no-op casts undone."""
    while value.producer is not None and stem(value.producer.op) in RENAMES:
        before = next(values_in(value.producer.args), None)
        if before is None or before.dtype != value.dtype or _numel(before) != _numel(value):
            break
        value = before
    return value


def _numel(value: Value) -> int:
    count = 1
    for size in value.shape:
        count *= size
    return count


def source(value: Value) -> Value | None:
    """Return the parameter that ``value`` is, or is a moved, cast or indexed part of."""
    while not value.stored:
        node = value.producer
        if node is None or stem(node.op) not in MOVES | _PARTS:
            return None
        before = next(values_in(node.args), None)
        if before is None:
            return None
        value = before
    return value


def derived(value: Value) -> Iterator[Value]:
    """Yield ``value`` and everything that is only another name, place or cast of it."""
    yield value
    for node in value.users:
        if stem(node.op) in MOVES and next(values_in(node.args), None) is value:
            for made in node.outputs:
                if made is not None:
                    yield from derived(made)


def contraction(node: OpNode) -> tuple[Value, Value] | None:
    """Return the activation and the parameter that a node multiplies and sums.

    Returns:
        ``None`` for other nodes, and where it cannot be told which one is the weight.
    """
    name = stem(node.op)
    if name == "einsum":
        pair = node.args[1]
        if len(pair) != 2:
            return None
        left, right = pair
    elif name in _CONTRACTIONS:
        first, second = _CONTRACTIONS[name]
        left, right = node.args[first], node.args[second]
    elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        params = next(a for a in node.args[1:] if isinstance(a, list) and len(a) > 1)
        left, right = node.args[0], params[0]
    else:
        return None
    if not isinstance(left, Value) or not isinstance(right, Value):
        return None
    sources = source(left), source(right)
    says = name == "linear" or name.startswith("conv")  # which one is the weight
    if sources[1] is not None and (sources[0] is None or says):
        return left, sources[1]
    if sources[0] is not None and sources[1] is None:
        return right, sources[0]
    return None


def owner(name: str) -> str:
    """Return how a weight is called among modules: its module, or its own name.

    ``layers.0.q_proj.weight`` is the module ``layers.0.q_proj``; of a module with several weights
    (fused experts, ``in_proj_weight``) it is the tensor that counts.
    """
    module, _, tensor = name.rpartition(".")
    return module if tensor == "weight" else name
