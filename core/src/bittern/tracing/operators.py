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
feature_dropout alpha_dropout feature_alpha_dropout native_dropout requires_grad_ zero_ fill
_conj conj conj_physical _conj_physical resolve_conj resolve_neg positive cpu cuda
_to_dense to_dense
"""

_ELEMENTWISE = """
abs absolute acos acosh add addcdiv addcmul angle arccos arcsin arctan asin asinh atan atan2 atanh
arctan2 bitwise_and bitwise_not bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift ceil
celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide elu eq erf erfc
erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac frexp gcd ge gelu
greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac
imag isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le leaky_relu lerp less
less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not
logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply mvlgamma nan_to_num ne
neg negative not_equal polar polygamma pow rad2deg real reciprocal relu relu6 remainder round rrelu
rrelu_with_noise rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
sqrt square sub subtract tan tanh threshold true_divide trunc where xlogy __and__ __or__ __xor__
__lshift__ __rshift__ nextafter complex _fake_quantize_learnable_per_tensor_affine
fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask log_sigmoid_forward
special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr
special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py special_zeta
special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
special_chebyshev_polynomial_w special_shifted_chebyshev_polynomial_t
special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
special_shifted_chebyshev_polynomial_w special_hermite_polynomial_h special_hermite_polynomial_he
special_laguerre_polynomial_l special_legendre_polynomial_p
"""

_RESHAPE = """
view reshape flatten unflatten _unsafe_view view_as reshape_as ravel _reshape_copy _reshape_alias
"""

_NUMBERED = """
nonzero nonzero_static nonzero_numpy argwhere bincount histc one_hot searchsorted bucketize unique
_unique2 unique_consecutive unique_dim isin _shape_as_tensor where.default histogram
"""

_PICKED = """
masked_select take put nll_loss_forward nll_loss2d_forward multi_margin_loss _ctc_loss
multilabel_margin_loss_forward
"""

_RANDOM = """
normal multinomial bernoulli uniform_ normal_ random_ exponential_ cauchy_ log_normal_ geometric_
"""

_SOLVED = """
inv inv_ex cholesky cholesky_ex qr svd eigh eig det solve_ex slogdet lu lu_factor lu_factor_ex
lu_solve matrix_exp pinv householder_product ldl_factor_ex ldl_solve lstsq eigvals check_errors
"""


def _rules() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield ``(function, names of operators, options)``."""
    yield from _elements()
    yield from _shapes()
    yield from _sums()
    yield from _lookups()
    yield from _layers()
    yield from _unmoved()


def _elements() -> Iterator[tuple[str, str, dict[str, object]]]:
    yield "elementwise:identity", _IDENTITY, {}
    yield "elementwise:elementwise", _ELEMENTWISE, {}
    yield "elementwise:elementwise", "min.other min.out max.other max.out", {}
    yield "elementwise:copy", "copy copy_", {}
    yield "elementwise:prelu", "prelu", {}
    yield "elementwise:elementwise", "_prelu_kernel", {}
    channels = "fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask"
    channels += " _fake_quantize_learnable_per_channel_affine"
    yield "elementwise:per_channel", channels, {}
    yield "elementwise:glu", "glu", {}
    yield "elementwise:complex_view", "view_as_complex", {}
    yield "elementwise:real_view", "view_as_real", {}
    yield "elementwise:masked_scatter", "masked_scatter", {}


def _shapes() -> Iterator[tuple[str, str, dict[str, object]]]:
    yield "shapes:reshape", _RESHAPE, {}
    yield "shapes:view_dtype", "view.dtype", {}
    yield "shapes:transpose", "swapaxes swapdims mT adjoint", {}
    yield "shapes:movedim", "movedim moveaxis", {}
    yield "shapes:expand", "expand_as broadcast_to", {}
    yield "shapes:repeat", "repeat tile", {}
    yield "shapes:repeat_interleave", "repeat_interleave", {}
    yield "shapes:cat", "cat concat concatenate", {}
    yield "shapes:block_diag", "block_diag", {}
    yield "shapes:stack", "stack", {}
    yield "shapes:split", "chunk tensor_split unsafe_split unsafe_chunk", {}
    yield "shapes:slice_", "narrow", {}
    yield "shapes:slice_scatter", "slice_scatter", {}
    yield "shapes:select_scatter", "select_scatter", {}
    yield "shapes:diagonal_scatter", "diagonal_scatter", {}
    yield "shapes:flip", "flip roll", {}
    yield "shapes:triangle", "tril triu", {}
    yield "shapes:diag_embed", "diag_embed", {}
    yield "shapes:pad", "constant_pad_nd", {}
    for n in (1, 2, 3):
        yield "shapes:pad", f"reflection_pad{n}d replication_pad{n}d", {}
    views = "transpose:transpose,t permute:permute unsqueeze:unsqueeze squeeze:squeeze"
    views += " expand:expand split:split,split_with_sizes unbind:unbind select:select slice_:slice"
    views += " diagonal:diagonal unfold:unfold"
    for view in views.split():
        function, _, names = view.partition(":")
        both = " ".join(f"{name} {name}_copy" for name in names.split(","))
        yield f"shapes:{function}", both, {}
    yield "shapes:slice_", "narrow_copy", {}
    yield "shapes:unfold_backward", "unfold_backward", {}
    yield "shapes:reshape", "view_copy", {}
    yield "shapes:view_dtype", "view_copy.dtype", {}
    yield "elementwise:identity", "alias_copy detach_copy", {}
    yield "elementwise:complex_view", "view_as_complex_copy", {}
    yield "elementwise:real_view", "view_as_real_copy", {}


def _sums() -> Iterator[tuple[str, str, dict[str, object]]]:
    yield "contractions:linear", "linear", {}
    yield "contractions:matmul", "matmul mm bmm mv dot vdot _int_mm", {}
    yield "contractions:addmm", "addmm baddbmm addmv addbmm", {}
    yield "contractions:addr", "addr", {}
    yield "contractions:outer", "outer ger", {}
    yield "contractions:cdist", "cdist _cdist_forward", {}
    yield "contractions:solve", "linalg_solve_triangular", {}
    yield "contractions:fft", "_fft_r2c _fft_c2r _fft_c2c", {}
    yield "contractions:cross", "linalg_cross", {}
    yield "contractions:kron", "kron", {}
    yield "contractions:bilinear", "bilinear", {}
    yield "contractions:einsum", "einsum", {}
    yield "contractions:attention", "scaled_dot_product_attention", {}
    yield "contractions:grouped_mm", "_grouped_mm", {}
    yield "reductions:reduce", "sum nansum any count_nonzero", {"statistic": False}
    means = "all mean nanmean var std var_mean std_mean amax amin logsumexp norm linalg_vector_norm"
    yield "reductions:reduce", f"{means} prod aminmax", {}
    yield "reductions:reduce", "argmax argmin max min median nanmedian mode", {"positions": True}
    yield "reductions:reduce", "max.default min.default", {}
    losses = "mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy dist"
    yield "reductions:loss", f"{losses} binary_cross_entropy_with_logits", {}
    yield "reductions:renorm", "renorm", {}
    yield "reductions:cumulative", "cumsum cumprod cummax cummin logcumsumexp", {}
    yield "reductions:ordered", "sort argsort", {"dim": 1}
    yield "reductions:ordered", "topk kthvalue", {"dim": 2}


def _lookups() -> Iterator[tuple[str, str, dict[str, object]]]:
    yield "indexing:embedding", "embedding", {}
    yield "indexing:embedding_bag", "embedding_bag _embedding_bag _embedding_bag_forward_only", {}
    yield "indexing:embedding_renorm", "embedding_renorm", {}
    yield "indexing:index", "index", {}
    yield "indexing:index_put", "index_put _index_put_impl_ _unsafe_index_put", {}
    yield "indexing:index_select", "index_select", {}
    yield "indexing:gather", "gather", {}
    yield "indexing:scatter", "scatter scatter_add scatter_reduce", {}
    yield "indexing:index_along", "index_add index_copy index_fill index_reduce", {}


def _layers() -> Iterator[tuple[str, str, dict[str, object]]]:
    for n in (1, 2, 3):
        yield "convolutions:conv", f"conv{n}d", {}
        space = f"max_pool{n}d avg_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d"
        space += f" max_pool{n}d_with_indices _adaptive_avg_pool{n}d"
        space += f" upsample_nearest{n}d _upsample_nearest_exact{n}d"
        yield "convolutions:spatial", space, {"dims": n}
        yield "convolutions:fractional", f"fractional_max_pool{n}d", {"dims": n}
        yield "convolutions:unpool", f"max_unpool{n}d", {"dims": n}
        yield "convolutions:grid_sampler", f"grid_sampler_{n}d", {}
    yield "convolutions:conv_transpose", "conv_transpose1d conv_transpose2d conv_transpose3d", {}
    yield "convolutions:convolution", "convolution _convolution", {}
    yield "convolutions:spatial", "upsample_linear1d", {"dims": 1}
    bi = "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
    yield "convolutions:spatial", bi, {"dims": 2}
    yield "convolutions:spatial", "upsample_trilinear3d", {"dims": 3}
    yield "convolutions:channel_shuffle", "channel_shuffle native_channel_shuffle", {}
    yield "convolutions:pixel_shuffle", "pixel_shuffle", {}
    yield "convolutions:pixel_unshuffle", "pixel_unshuffle", {}
    yield "convolutions:im2col", "im2col", {}
    yield "convolutions:col2im", "col2im", {}
    norm = "batch_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit"
    yield "norms:batch_norm", norm, {}
    yield "norms:batch_norm", "instance_norm", {"first": 1}
    fixed = "_native_batch_norm_legit_no_training"
    yield "norms:batch_norm", fixed, {"computes": None}
    yield "norms:layer_norm", "layer_norm rms_norm native_layer_norm _fused_rms_norm", {}
    yield "norms:group_norm", "group_norm", {}
    yield "norms:native_group_norm", "native_group_norm", {}
    soft = "softmax log_softmax _softmax _log_softmax special_softmax _safe_softmax"
    yield "norms:softmax", soft, {}
    yield "norms:weight_norm", "_weight_norm _weight_norm_interface", {}
    yield "recurrent:recurrent", "lstm", {"gates": 4}
    yield "recurrent:recurrent", "gru", {"gates": 3}
    yield "recurrent:recurrent", "rnn_tanh rnn_relu", {"gates": 1}


def _unmoved() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield what makes tensors from nothing, and what lets no coordinate move."""
    made = "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided"
    yield "creation:uniform", f"{made} empty_permuted new_empty_strided", {}
    yield "creation:like", "zeros_like ones_like full_like empty_like", {}
    windows = "hann_window hamming_window blackman_window bartlett_window kaiser_window"
    yield (
        "creation:counted",
        f"arange linspace logspace eye tril_indices triu_indices {windows}",
        {},
    )
    some = "rand randn randint randperm rand_like randn_like randint_like"
    yield "creation:data", some, {}
    mixed = " ".join(f"linalg_{name} _linalg_{name}" for name in _SOLVED.split())
    mixed += " cholesky cholesky_inverse cholesky_solve geqrf ormqr lu_unpack triangular_solve"
    yield "closed:closed", f"{mixed} _pdist_forward", {}
    yield "closed:closed", _NUMBERED, {"why": "its positions become numbers"}
    yield "closed:closed", _PICKED, {"why": "elements of it are picked out"}
    yield "closed:closed", "trace rot90 fill_diagonal_", {"why": "its positions are compared"}
    yield "closed:closed", _RANDOM, {"why": "random numbers are drawn for it"}


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
