"""Core's own operator rules, as names: which function of `rules` answers for which operator.

Torch-free, so that `bittern.builtin` can register them without importing anything.
"""

from __future__ import annotations

from bittern.records import OpRule

__all__ = ["op_rules"]

_HERE = "bittern.tracing.flow.rules"

_IDENTITY = """
to _to_copy clone contiguous detach alias lift lift_fresh lift_fresh_copy type_as dropout
feature_dropout alpha_dropout feature_alpha_dropout native_dropout requires_grad_ rename zero_ fill
fill_ uniform_ normal_ _conj conj resolve_conj resolve_neg positive cpu cuda float double half
bfloat16 view_as_real_copy _reshape_alias set_ random_ bernoulli_ exponential_ trunc_normal_
celu_ _shape_as_tensor data _to_dense to_dense
""".split()

_ELEMENTWISE = """
abs absolute acos acosh add addcdiv addcmul angle arccos arcsin arctan asin asinh atan atan2 atanh
arctan2 bitwise_and bitwise_not bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift ceil
celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide elu eq erf erfc
erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac ge gelu greater
greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot imag isclose isfinite
isinf isnan isneginf isposinf isreal ldexp le leaky_relu lerp less less_equal lgamma log log10
log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal polar pow rad2deg
real reciprocal relu relu6 remainder round rrelu rrelu_with_noise rsqrt rsub selu sgn sigmoid sign
signbit silu sin sinc sinh softplus softshrink sqrt square sub subtract tan tanh threshold
true_divide trunc view_as where xlogy __and__ __or__ __xor__ __lshift__ __rshift__ nextafter complex
_fake_quantize_learnable_per_tensor_affine fake_quantize_per_tensor_affine
fake_quantize_per_tensor_affine_cachemask special_expit special_erf special_xlogy
special_log1p special_expm1 log_sigmoid_forward bernoulli
""".split()

_RESHAPE = """
view reshape flatten unflatten _unsafe_view view_as reshape_as ravel _reshape_copy
""".split()

_RULES: dict[str, tuple[str, dict[str, object]]] = {}


def _add(function: str, names: str, **options: object) -> None:
    for name in names.split():
        _RULES[name] = (function, options)


def _fill() -> None:
    for name in _IDENTITY:
        _add("elementwise:identity", name)
    for name in _ELEMENTWISE:
        _add("elementwise:elementwise", name)
    for name in _RESHAPE:
        _add("shapes:reshape", name)
    _add("elementwise:copy", "copy copy_")
    _add("elementwise:prelu", "prelu _prelu_kernel")
    _add("elementwise:glu", "glu")
    _add("elementwise:complex_view", "view_as_complex")
    _add("elementwise:real_view", "view_as_real")
    _add("elementwise:masked_scatter", "masked_scatter")
    _add("shapes:permute", "permute")
    _add("shapes:transpose", "transpose swapaxes swapdims t numpy_T mT adjoint")
    _add("shapes:movedim", "movedim moveaxis")
    _add("shapes:unsqueeze", "unsqueeze")
    _add("shapes:squeeze", "squeeze")
    _add("shapes:expand", "expand expand_as broadcast_to")
    _add("shapes:repeat", "repeat tile")
    _add("shapes:repeat_interleave", "repeat_interleave")
    _add("shapes:cat", "cat concat concatenate")
    _add("shapes:stack", "stack")
    _add("shapes:split", "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk")
    _add("shapes:unbind", "unbind")
    _add("shapes:select", "select")
    _add("shapes:slice_", "slice narrow")
    _add("shapes:flip", "flip roll")
    _add("shapes:triangle", "tril triu")
    _add("shapes:diagonal", "diagonal")
    _add("shapes:pad", "constant_pad_nd")
    for n in (1, 2, 3):
        _add("shapes:pad", f"reflection_pad{n}d replication_pad{n}d")
    _add("shapes:unfold", "unfold")
    _add("contractions:linear", "linear")
    _add("contractions:matmul", "matmul mm bmm mv dot vdot inner")
    _add("contractions:addmm", "addmm baddbmm addmv")
    _add("contractions:outer", "outer ger")
    _add("contractions:cdist", "cdist _cdist_forward")
    _add("contractions:kron", "kron")
    _add("contractions:bilinear", "bilinear")
    _add("contractions:einsum", "einsum")
    _add("contractions:attention", "scaled_dot_product_attention")
    _add("contractions:grouped_mm", "_grouped_mm")
    for n in (1, 2, 3):
        _add("convolutions:conv", f"conv{n}d")
        space = f"max_pool{n}d avg_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d"
        space += f" max_pool{n}d_with_indices _adaptive_avg_pool{n}d fractional_max_pool{n}d"
        space += f" upsample_nearest{n}d _upsample_nearest_exact{n}d max_unpool{n}d"
        _add("convolutions:spatial", space, dims=n)
    _add("convolutions:conv_transpose", "conv_transpose1d conv_transpose2d conv_transpose3d")
    _add("convolutions:convolution", "convolution _convolution")
    _add("convolutions:spatial", "upsample_linear1d", dims=1)
    bi = "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
    _add("convolutions:spatial", bi, dims=2)
    _add("convolutions:spatial", "upsample_trilinear3d", dims=3)
    _add("convolutions:pixel_shuffle", "pixel_shuffle")
    _add("convolutions:pixel_unshuffle", "pixel_unshuffle")
    _add("convolutions:im2col", "im2col")
    _add("norms:batch_norm", "batch_norm native_batch_norm cudnn_batch_norm")
    _add("norms:batch_norm", "_native_batch_norm_legit_no_training instance_norm")
    _add("norms:layer_norm", "layer_norm rms_norm native_layer_norm _fused_rms_norm")
    _add("norms:group_norm", "group_norm")
    _add("norms:softmax", "softmax log_softmax _softmax _log_softmax special_softmax")
    _add("norms:weight_norm", "_weight_norm _weight_norm_interface")
    _add("reductions:reduce", "sum nansum all any count_nonzero", statistic=False)
    means = "mean nanmean var std var_mean std_mean amax amin logsumexp norm linalg_vector_norm"
    _add("reductions:reduce", f"{means} prod aminmax")
    _add("reductions:reduce", "argmax argmin max min median nanmedian mode", positions=True)
    _add("elementwise:elementwise", "min.other max.other")
    _add("reductions:cumulative", "cumsum cumprod cummax cummin logcumsumexp diff")
    _add("reductions:ordered", "sort argsort", dim=1)
    _add("reductions:ordered", "topk kthvalue", dim=2)
    _add("indexing:embedding", "embedding")
    _add("indexing:embedding_bag", "embedding_bag _embedding_bag _embedding_bag_forward_only")
    _add("indexing:index", "index")
    _add("indexing:index_put", "index_put _index_put_impl_ _unsafe_index_put")
    _add("indexing:index_select", "index_select")
    _add("indexing:gather", "gather take_along_dim")
    _add("indexing:scatter", "scatter scatter_add scatter_reduce")
    _add("indexing:index_along", "index_add index_copy index_fill")
    places = "nonzero bincount histc one_hot searchsorted bucketize unique _unique2 isin"
    _add("indexing:positions", f"{places} unique_consecutive unique_dim nonzero_numpy argwhere")
    _add("recurrent:recurrent", "lstm", gates=4)
    _add("recurrent:recurrent", "gru", gates=3)
    _add("recurrent:recurrent", "rnn_tanh rnn_relu", gates=1)
    made = "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided"
    _add("creation:uniform", f"{made} empty_permuted new_empty_strided")
    _add("creation:like", "zeros_like ones_like full_like empty_like")
    _add("creation:counted", "arange linspace logspace eye tril_indices triu_indices")
    some = "rand randn randint randperm normal rand_like randn_like randint_like _lift_fresh"
    _add("creation:data", f"{some} multinomial")


def op_rules() -> list[OpRule]:
    """Return core's rules for operators of ATen, all overloads of each."""
    if not _RULES:
        _fill()
    return [
        OpRule(op=f"aten.{name}" if "." in name else f"aten.{name}.*", flow=f"{_HERE}.{function}", options=options)
        for name, (function, options) in _RULES.items()
    ]
