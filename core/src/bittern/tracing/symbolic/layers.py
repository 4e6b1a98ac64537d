"""The symbols of torch's own layers.

Every function maps a live module to its `SymInfo`; `rules.py` says which class it is for.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bittern.tracing.symbolic.symbols import Symbol, SymDepth, SymInfo

__all__ = [
    "attention_symbols",
    "batch_norm_symbols",
    "bilinear_symbols",
    "conv_symbols",
    "embedding_symbols",
    "group_norm_symbols",
    "last_dim_norm_symbols",
    "linear_symbols",
    "prelu_symbols",
    "recurrent_symbols",
    "sequential_symbols",
    "transposed_conv_symbols",
]

INCOMING = Symbol.CLType.INCOMING
OUTGOING = Symbol.CLType.OUTGOING
GATES = {"LSTM": 4, "GRU": 3}


def linear_symbols(module: nn.Linear) -> SymInfo:
    """``in_features`` and ``out_features``, the last dimension of ``(*, features)``."""
    return SymInfo(
        kept_dims="other",
        in_features=Symbol(cl_type=INCOMING, elastic_dims={-1}, tensors={"weight": 1}),
        out_features=Symbol(
            is_searchable=True,
            cl_type=OUTGOING,
            elastic_dims={-1},
            tensors={"weight": 0, "bias": 0},
        ),
    )


def bilinear_symbols(module: nn.Bilinear) -> SymInfo:
    """``in1_features``, ``in2_features`` of the two arguments, ``out_features``."""
    return SymInfo(
        kept_dims="other",
        in1_features=Symbol(cl_type=INCOMING, elastic_dims={-1}, tensors={"weight": 1}),
        in2_features=Symbol(cl_type=INCOMING, elastic_dims={-1}, argument=1, tensors={"weight": 2}),
        out_features=Symbol(
            is_searchable=True,
            cl_type=OUTGOING,
            elastic_dims={-1},
            tensors={"weight": 0, "bias": 0},
        ),
    )


def conv_symbols(module: nn.Module) -> SymInfo:
    """Channels of ``(N, C, *)`` and the kernel size; see `_convolution` for groups."""
    return _convolution(module, in_dim=1, out_dim=0)


def transposed_conv_symbols(module: nn.Module) -> SymInfo:
    """As `conv_symbols`; the weight is ``(in, out / groups, *kernel)``."""
    return _convolution(module, in_dim=0, out_dim=1)


def _convolution(module: Any, *, in_dim: int, out_dim: int) -> SymInfo:
    """With groups, input and output channels are the same symbol, or do not change.

    One weight row per group cannot be told apart from its group's others by channel, so only
    depthwise channels can be reordered.
    """
    dims = {1, -1 - len(module.kernel_size)}
    grouped = module.groups > 1
    tied = grouped and module.in_channels == module.out_channels
    depthwise = tied and module.in_channels == module.groups
    sortable = not grouped or depthwise
    incoming = Symbol(
        cl_type=INCOMING,
        elastic_dims=dims,
        is_sortable=sortable,
        tensors={} if grouped else {"weight": in_dim},
    )
    outgoing = Symbol(
        is_searchable=True,
        cl_type=OUTGOING,
        elastic_dims=dims,
        is_sortable=sortable,
        tensors={"weight": 0 if grouped else out_dim, "bias": 0},
    )
    if tied:
        outgoing.link_to(incoming)
    elif grouped:
        for symbol in (incoming, outgoing):
            symbol.disable(
                f"{module.groups} groups from {module.in_channels} to {module.out_channels} "
                "channels: each group has its own"
            )
    return SymInfo(
        kept_dims="leading",
        in_channels=incoming,
        out_channels=outgoing,
        kernel_size=Symbol(is_searchable=True),
    )


def batch_norm_symbols(module: Any) -> SymInfo:
    """``num_features``, dimension 1 of ``(N, C, *)``; batch and instance norms."""
    ranks = {"1d": 1, "2d": 2, "3d": 3}
    kind = next((base.__name__ for base in type(module).__mro__ if base.__name__[-2:] in ranks), "")
    rank = ranks.get(kind[-2:])
    # A BatchNorm1d takes (N, C) too, a SyncBatchNorm anything.
    fixed = rank is not None and (rank > 1 or kind.startswith(("Instance", "LazyInstance")))
    return SymInfo(
        is_shape_preserving=True,
        num_features=Symbol(
            cl_type=INCOMING,
            elastic_dims={1, -1 - rank} if fixed and rank is not None else {1},
            tensors={"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0},
        ),
    )


def group_norm_symbols(module: nn.GroupNorm) -> SymInfo:
    """``num_channels`` of ``(N, C, *)``; a channel cannot leave its group."""
    return SymInfo(
        is_shape_preserving=True,
        num_channels=Symbol(
            cl_type=INCOMING,
            elastic_dims={1},
            is_sortable=module.num_groups in (1, module.num_channels),
            tensors={"weight": 0, "bias": 0},
        ),
    )


def last_dim_norm_symbols(module: Any) -> SymInfo:
    """``num_features``, the last dimension; layer and RMS norms."""
    last = len(module.normalized_shape) - 1
    return SymInfo(
        is_shape_preserving=True,
        num_features=Symbol(
            cl_type=INCOMING,
            elastic_dims={-1},
            size=module.normalized_shape[-1],
            tensors={"weight": last, "bias": last},
        ),
    )


def embedding_symbols(module: Any) -> SymInfo:
    """``embedding_dim``, the last dimension of what comes out; the vocabulary is the data's."""
    vocabulary = Symbol(tensors={"weight": 0})
    vocabulary.disable("the vocabulary is given by the data")
    return SymInfo(
        num_embeddings=vocabulary,
        embedding_dim=Symbol(
            is_searchable=True,
            cl_type=OUTGOING,
            elastic_dims={1, -1} if isinstance(module, nn.EmbeddingBag) else {-1},
            tensors={"weight": 1},
        ),
    )


def prelu_symbols(module: nn.PReLU) -> SymInfo:
    """``num_parameters`` of ``(N, C, *)``; one parameter for all is no symbol."""
    if module.num_parameters == 1:
        return SymInfo(is_shape_preserving=True)
    return SymInfo(
        is_shape_preserving=True,
        num_parameters=Symbol(cl_type=INCOMING, elastic_dims={1}, tensors={"weight": 0}),
    )


def recurrent_symbols(module: nn.RNNBase) -> SymInfo:
    """``input_size`` and ``hidden_size`` (or ``proj_size``), the last dimension of ``(*, size)``.

    All layers and directions have the same hidden size. A state that is passed in must have it too.
    """
    suffixes = [
        f"_l{layer}{direction}"
        for layer in range(module.num_layers)
        for direction in (("", "_reverse") if module.bidirectional else ("",))
    ]
    first = {"_l0", "_l0_reverse"}
    inputs: dict[str, int] = {f"weight_ih{suffix}": 1 for suffix in suffixes if suffix in first}
    hidden: dict[str, tuple[int, ...]] = {}
    fed_back: dict[str, tuple[int, ...]] = {}
    for suffix in suffixes:
        hidden |= {f"{name}{suffix}": (0,) for name in ("weight_hh", "bias_ih", "bias_hh")}
        hidden[f"weight_ih{suffix}"] = (0,)
        fed_back[f"weight_hh{suffix}"] = (1,)
        if suffix not in first:
            fed_back[f"weight_ih{suffix}"] = (1,)
        if module.proj_size:
            hidden[f"weight_hr{suffix}"] = (1,)
            fed_back[f"weight_hr{suffix}"] = (0,)
    if not module.proj_size:
        for name, dims in fed_back.items():
            hidden[name] = (*hidden.get(name, ()), *dims)
    outgoing = Symbol(
        is_searchable=True,
        cl_type=OUTGOING,
        elastic_dims={-1},
        repeats=2 if module.bidirectional else 1,
        tensors=fed_back if module.proj_size else hidden,
    )
    state = Symbol(cl_type=INCOMING, elastic_dims={-1}, argument=1, size=module.hidden_size)
    symbols = {
        "input_size": Symbol(cl_type=INCOMING, elastic_dims={-1}, tensors=inputs),
        "state": state,
    }
    if module.proj_size:
        state.size = module.proj_size
        symbols["proj_size"] = outgoing
        symbols["hidden_size"] = Symbol(is_searchable=True, tensors=hidden)
    else:
        symbols["hidden_size"] = outgoing
    state.link_to(outgoing)
    return SymInfo(is_shape_preserving=False, kept_dims="other", returns_tuple=True, **symbols)


def attention_symbols(module: nn.MultiheadAttention) -> SymInfo:
    """``embed_dim`` of query and output, ``kdim``, ``vdim``, the last dimension of ``(*, size)``.

    The width is also what the heads share out, so its order is fixed.
    """
    same = module._qkv_same_embed_dim
    own: dict[str, int | tuple[int, ...]] = {
        "in_proj_weight": (0, 1),
        "q_proj_weight": (0, 1),
        "k_proj_weight": 0,
        "v_proj_weight": 0,
        "in_proj_bias": 0,
        "bias_k": 2,
        "bias_v": 2,
        "out_proj.weight": (0, 1),
        "out_proj.bias": 0,
    }
    embed = Symbol(cl_type=INCOMING, elastic_dims={-1}, is_sortable=False, tensors=own)
    key, value = (
        Symbol(
            cl_type=INCOMING,
            elastic_dims={-1},
            argument=argument,
            tensors={} if same else {f"{name}_proj_weight": 1},
        )
        for argument, name in ((1, "k"), (2, "v"))
    )
    outgoing = Symbol(
        is_searchable=True, cl_type=OUTGOING, elastic_dims={-1}, size=module.embed_dim
    )
    for symbol in (key, value, outgoing) if same else (outgoing,):
        symbol.link_to(embed)
    return SymInfo(
        kept_dims="other",
        returns_tuple=True,
        embed_dim=embed,
        kdim=key,
        vdim=value,
        out_dim=outgoing,
    )


def sequential_symbols(module: nn.Sequential) -> SymInfo:
    """``depth``: how many of the blocks run."""
    return SymInfo(depth=SymDepth(max_depth=len(module)))
