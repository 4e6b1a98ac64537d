"""Core's own operator rules, as names: which function of `rules` answers for which operator.

Torch-free, so that `bittern.builtin` can register them without importing anything.
"""

from __future__ import annotations

from collections.abc import Iterator

from bittern.records import OpRule

__all__ = ["op_rules"]

_HERE = "bittern.tracing.flow.rules"

_IDENTITY = """
to _to_copy clone contiguous detach alias lift lift_fresh lift_fresh_copy type_as dropout
feature_dropout alpha_dropout feature_alpha_dropout native_dropout requires_grad_ rename zero_ fill
fill_ uniform_ normal_ _conj conj resolve_conj resolve_neg positive cpu cuda float double half
bfloat16 view_as_real_copy _reshape_alias set_ random_ bernoulli_ exponential_ trunc_normal_
celu_ _shape_as_tensor data _to_dense to_dense
"""

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
true_divide trunc where xlogy __and__ __or__ __xor__ __lshift__ __rshift__ nextafter complex
_fake_quantize_learnable_per_tensor_affine fake_quantize_per_tensor_affine
fake_quantize_per_tensor_affine_cachemask special_expit special_erf special_xlogy
special_log1p special_expm1 log_sigmoid_forward bernoulli
"""

_RESHAPE = """
view reshape flatten unflatten _unsafe_view view_as reshape_as ravel _reshape_copy
"""


def _rules() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield ``(function, names of operators, options)``."""
    yield "elementwise:identity", _IDENTITY, {}
    yield "elementwise:elementwise", _ELEMENTWISE, {}
    yield "shapes:reshape", _RESHAPE, {}
    yield "elementwise:copy", "copy copy_", {}
    yield "elementwise:prelu", "prelu _prelu_kernel", {}
    yield "elementwise:glu", "glu", {}
    yield "elementwise:complex_view", "view_as_complex", {}
    yield "elementwise:real_view", "view_as_real", {}
    yield "elementwise:masked_scatter", "masked_scatter", {}
    yield "shapes:permute", "permute", {}
    yield "shapes:transpose", "transpose swapaxes swapdims t numpy_T mT adjoint", {}
    yield "shapes:movedim", "movedim moveaxis", {}
    yield "shapes:unsqueeze", "unsqueeze", {}
    yield "shapes:squeeze", "squeeze", {}
    yield "shapes:expand", "expand expand_as broadcast_to", {}
    yield "shapes:repeat", "repeat tile", {}
    yield "shapes:repeat_interleave", "repeat_interleave", {}
    yield "shapes:cat", "cat concat concatenate", {}
    yield "shapes:stack", "stack", {}
    yield "shapes:split", "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk", {}
    yield "shapes:unbind", "unbind", {}
    yield "shapes:select", "select", {}
    yield "shapes:slice_", "slice narrow", {}
    yield "shapes:flip", "flip roll", {}
    yield "shapes:triangle", "tril triu", {}
    yield "shapes:diagonal", "diagonal", {}
    yield "shapes:pad", "constant_pad_nd", {}
    for n in (1, 2, 3):
        yield "shapes:pad", f"reflection_pad{n}d replication_pad{n}d", {}
    yield "shapes:unfold", "unfold", {}
    yield "contractions:linear", "linear", {}
    yield "contractions:matmul", "matmul mm bmm mv dot vdot inner", {}
    yield "contractions:addmm", "addmm baddbmm addmv", {}
    yield "contractions:outer", "outer ger", {}
    yield "contractions:cdist", "cdist _cdist_forward", {}
    yield "contractions:solve", "linalg_solve_triangular", {}
    mixed = "linalg_inv linalg_inv_ex linalg_cholesky linalg_cholesky_ex linalg_qr linalg_svd"
    mixed += " _linalg_svd linalg_eigh _linalg_eigh linalg_det _linalg_det linalg_solve_ex"
    mixed += " _linalg_solve_ex _fft_r2c _fft_c2r _fft_c2c col2im grid_sampler_2d grid_sampler_3d"
    yield "contractions:mixed", mixed, {}
    yield "contractions:kron", "kron", {}
    yield "contractions:bilinear", "bilinear", {}
    yield "contractions:einsum", "einsum", {}
    yield "contractions:attention", "scaled_dot_product_attention", {}
    yield "contractions:grouped_mm", "_grouped_mm", {}
    for n in (1, 2, 3):
        yield "convolutions:conv", f"conv{n}d", {}
        space = f"max_pool{n}d avg_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d"
        space += f" max_pool{n}d_with_indices _adaptive_avg_pool{n}d fractional_max_pool{n}d"
        space += f" upsample_nearest{n}d _upsample_nearest_exact{n}d max_unpool{n}d"
        yield "convolutions:spatial", space, {"dims": n}
    yield "convolutions:conv_transpose", "conv_transpose1d conv_transpose2d conv_transpose3d", {}
    yield "convolutions:convolution", "convolution _convolution", {}
    yield "convolutions:spatial", "upsample_linear1d", {"dims": 1}
    bi = "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
    yield "convolutions:spatial", bi, {"dims": 2}
    yield "convolutions:spatial", "upsample_trilinear3d", {"dims": 3}
    yield "convolutions:pixel_shuffle", "pixel_shuffle", {}
    yield "convolutions:pixel_unshuffle", "pixel_unshuffle", {}
    yield "convolutions:im2col", "im2col", {}
    yield "norms:batch_norm", "batch_norm native_batch_norm cudnn_batch_norm", {}
    yield "norms:batch_norm", "_native_batch_norm_legit_no_training instance_norm", {}
    yield "norms:layer_norm", "layer_norm rms_norm native_layer_norm _fused_rms_norm", {}
    yield "norms:group_norm", "group_norm", {}
    yield "norms:softmax", "softmax log_softmax _softmax _log_softmax special_softmax", {}
    yield "norms:weight_norm", "_weight_norm _weight_norm_interface", {}
    yield "reductions:reduce", "sum nansum all any count_nonzero", {"statistic": False}
    means = "mean nanmean var std var_mean std_mean amax amin logsumexp norm linalg_vector_norm"
    yield "reductions:reduce", f"{means} prod aminmax", {}
    yield "reductions:reduce", "argmax argmin max min median nanmedian mode", {"positions": True}
    yield "elementwise:elementwise", "min.other max.other", {}
    yield "reductions:reduce", "max.default min.default", {}
    yield "reductions:cumulative", "cumsum cumprod cummax cummin logcumsumexp diff", {}
    yield "reductions:ordered", "sort argsort", {"dim": 1}
    yield "reductions:ordered", "topk kthvalue", {"dim": 2}
    yield "indexing:embedding", "embedding", {}
    yield "indexing:embedding_bag", "embedding_bag _embedding_bag _embedding_bag_forward_only", {}
    yield "indexing:index", "index", {}
    yield "indexing:index_put", "index_put _index_put_impl_ _unsafe_index_put", {}
    yield "indexing:index_select", "index_select", {}
    yield "indexing:gather", "gather take_along_dim", {}
    yield "indexing:scatter", "scatter scatter_add scatter_reduce", {}
    yield "indexing:index_along", "index_add index_copy index_fill", {}
    places = "nonzero bincount histc one_hot searchsorted bucketize unique _unique2 isin"
    yield "indexing:positions", f"{places} unique_consecutive unique_dim nonzero_numpy argwhere", {}
    yield "recurrent:recurrent", "lstm", {"gates": 4}
    yield "recurrent:recurrent", "gru", {"gates": 3}
    yield "recurrent:recurrent", "rnn_tanh rnn_relu", {"gates": 1}
    made = "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided"
    yield "creation:uniform", f"{made} empty_permuted new_empty_strided", {}
    yield "creation:like", "zeros_like ones_like full_like empty_like", {}
    yield "creation:counted", "arange linspace logspace eye tril_indices triu_indices", {}
    some = "rand randn randint randperm normal rand_like randn_like randint_like _lift_fresh"
    yield "creation:data", f"{some} multinomial", {}


def op_rules() -> list[OpRule]:
    """Return core's rules for operators of ATen, all overloads of each."""
    return [
        OpRule(
            op=f"aten.{name}" if "." in name else f"aten.{name}.*",
            flow=f"{_HERE}.{function}",
            options=options,
        )
        for function, names, options in _rules()
        for name in names.split()
    ]
