"""Operators that multiply and sum: matrix products, linear layers, attention."""

from __future__ import annotations

from bittern.tracing.flow.axes import Axis, product
from bittern.tracing.flow.graph import OpNode, Value
from bittern.tracing.flow.propagate import Axes, Flow

__all__ = [
    "addmm",
    "addr",
    "attention",
    "bilinear",
    "cdist",
    "cross",
    "einsum",
    "fft",
    "grouped_mm",
    "kron",
    "linear",
    "matmul",
    "outer",
    "solve",
]


def linear(node: OpNode, flow: Flow) -> Axes:
    """``linear(x, weight, bias)``: ``weight`` is ``(out, in)``."""
    axes, weight = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    flow.same(axes[-1], weight[-1])
    made = (*axes[:-1], *weight[:-1])
    bias = node.arg(2, "bias")
    return flow.broadcast([made, flow.of(bias)], node.out.shape) if bias is not None else made


def matmul(node: OpNode, flow: Flow) -> Axes:
    """``matmul``, ``mm``, ``bmm``, ``mv``, ``dot`` and ``vdot``."""
    return _matmul(flow.of(node.tensor(0)), flow.of(node.tensor(1)), node, flow)


def _matmul(a: Axes, b: Axes, node: OpNode, flow: Flow) -> Axes:
    flow.same(a[-1], b[-2] if len(b) > 1 else b[-1])
    batch = len(node.out.shape) - (len(a) > 1) - (len(b) > 1)
    lead = flow.broadcast([a[:-2], b[:-2]], node.out.shape[:batch])
    rows = (a[-2],) if len(a) > 1 else ()
    columns = (b[-1],) if len(b) > 1 else ()
    return (*lead, *rows, *columns)


def addmm(node: OpNode, flow: Flow) -> Axes:
    """``addmm(bias, a, b)``, ``addmv``, ``baddbmm``, and ``addbmm``, which sums over the batch."""
    a, b = flow.of(node.tensor(1)), flow.of(node.tensor(2))
    if len(a) > len(node.out.shape) > 1:
        flow.same(a[0], b[0])
        a, b = a[1:], b[1:]
    return flow.broadcast([_matmul(a, b, node, flow), flow.of(node.tensor(0))], node.out.shape)


def addr(node: OpNode, flow: Flow) -> Axes:
    """``addr(bias, a, b)``: the outer product of two vectors."""
    made = (*flow.of(node.tensor(1)), *flow.of(node.tensor(2)))
    return flow.broadcast([made, flow.of(node.tensor(0))], node.out.shape)


def outer(node: OpNode, flow: Flow) -> Axes:
    """``outer(a, b)``."""
    return (*flow.of(node.tensor(0)), *flow.of(node.tensor(1)))


def cross(node: OpNode, flow: Flow) -> Axes:
    """``cross(a, b, dim)``: of vectors in space along ``dim``."""
    made = flow.broadcast([flow.of(node.tensor(k)) for k in (0, 1)], node.out.shape)
    made[node.arg(2, "dim", -1)].fix(f"its positions are directions ({flow.where(node)})")
    return made


def cdist(node: OpNode, flow: Flow) -> Axes:
    """``cdist(a, b)``: distances of rows."""
    a, b = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    flow.same(a[-1], b[-1])
    lead = flow.broadcast([a[:-2], b[:-2]], node.out.shape[:-2])
    return (*lead, a[-2], b[-2])


def bilinear(node: OpNode, flow: Flow) -> Axes:
    """``bilinear(x1, x2, weight, bias)``: ``weight`` is ``(out, in1, in2)``."""
    one, two, weight = (flow.of(node.tensor(k)) for k in range(3))
    flow.same(one[-1], weight[1])
    flow.same(two[-1], weight[2])
    bias = node.arg(3, "bias")
    if isinstance(bias, Value):
        flow.same(weight[0], flow.of(bias)[0])
    lead = flow.broadcast([one[:-1], two[:-1]], node.out.shape[:-1])
    return (*lead, weight[0])


def einsum(node: OpNode, flow: Flow) -> Axes:
    """``einsum(equation, tensors)``: one letter, one axis."""
    equation, tensors = node.args[0].replace(" ", ""), node.args[1]
    equation = equation.replace("...", ".")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted({c for c in left if c.isalpha() and left.count(c) == 1})
        right = "." * ("." in left) + "".join(letters)
    known: dict[str, Axis] = {}
    dots: list[Axes] = []
    for term, value in zip(terms, tensors, strict=True):
        axes = flow.of(value)
        before, _, after = term.partition(".")
        names = before + after
        extra = len(axes) - len(names)
        dots.append(axes[len(before) : len(before) + extra])
        own = (*axes[: len(before)], *axes[len(before) + extra :])
        for letter, axis in zip(names, own, strict=True):
            known[letter] = flow.same(known[letter], axis) if letter in known else axis
            if names.count(letter) > 1:
                axis.fix(f"a diagonal is taken of it ({flow.where(node)})")
    rank = max(map(len, dots))
    sizes = [max(d[k].size for d in dots if k + len(d) >= 0) for k in range(-rank, 0)]
    middle = flow.broadcast(dots, sizes)  # also where the result has no dots: they are summed
    head, dot, tail = right.partition(".")
    return (*(known[c] for c in head), *(middle if dot else ()), *(known[c] for c in tail))


def attention(node: OpNode, flow: Flow) -> Axes:
    """``scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale, enable_gqa)``.

    ``q`` is ``(..., heads, L, E)``, ``k`` ``(..., kv, S, E)``, ``v`` ``(..., kv, S, V)``.
    Under ``enable_gqa`` the heads are ``kv x queries per kv head``.
    """
    q, k, v = (flow.of(node.tensor(i)) for i in range(3))
    flow.same(q[-1], k[-1])
    flow.same(k[-2], v[-2])
    k[-2].normalize(node.module or "the model")
    if node.arg(5, "is_causal", False):
        for axis in (q[-2], k[-2]):
            axis.fix(f"its positions are compared ({flow.where(node)})")
    if node.arg(6, "scale") is None:
        q[-1].normalize(node.module or "the model")  # the default scale counts its coordinates
    if len(q) > 2 and q[-3].size != k[-3].size and k[-3].size > 1:
        count = k[-3].size
        kv, _ = flow.factor(q[-3], (count, q[-3].size // count), flow.where(node))
        flow.same(kv, k[-3])
        flow.same(k[-3], v[-3])
        heads = (*flow.broadcast([q[:-3], k[:-3], v[:-3]], node.out.shape[:-3]), q[-3])
    else:
        heads = flow.broadcast([q[:-2], k[:-2], v[:-2]], node.out.shape[:-2])
    mask = node.arg(3, "attn_mask")
    if isinstance(mask, Value):
        scores = (*heads, q[-2], k[-2])
        flow.broadcast([scores, flow.of(mask)], [a.size for a in scores])
    return (*heads, q[-2], v[-1])


def grouped_mm(node: OpNode, flow: Flow) -> Axes:
    """``_grouped_mm(a, b, offsets, bias)``: every row of ``a`` (M, K) meets one ``b`` of (E, K, N).

    Also the two-dimensional forms, where the groups run along a shared dimension.
    """
    a, b = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    if len(a) == len(b) == 3:
        return _matmul(a, b, node, flow)
    if len(a) == 2 and len(b) == 3:
        flow.same(a[1], b[1])
        bias = node.arg(3, "bias")
        bound = [a[0], b[0]]
        if isinstance(bias, Value):
            *experts, columns = flow.of(bias)
            flow.same(columns, b[2])
            bound += experts
        made: Axes = (a[0], b[2])
    elif len(a) == 3:  # (E, M, K) and (K, N): columns are in groups
        flow.same(a[2], b[0])
        bound, made = [a[0], b[1]], (a[1], b[1])
    else:  # (M, K) and (K, N): what is summed over is in groups
        flow.same(a[1], b[0])
        bound = [a[1], b[0]]
        made = (Axis(node.out.shape[0], fixed="data"), a[0], b[1])
    for axis in (*bound, *(axis for value in _given(node, 2) for axis in flow.of(value))):
        axis.fix(f"an index says where groups of it end ({flow.where(node)})")
    return made


def _given(node: OpNode, *places: int) -> list[Value]:
    return [v for k in places if k < len(node.args) and isinstance(v := node.args[k], Value)]


def kron(node: OpNode, flow: Flow) -> Axes:
    """``kron(a, b)``: every coordinate of one with every one of the other."""
    a, b = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    rank = len(node.out.shape)
    a, b = ((*(Axis(1) for _ in range(rank - len(axes))), *axes) for axes in (a, b))
    return tuple(product((x, y)) for x, y in zip(a, b, strict=True))


def fft(node: OpNode, flow: Flow) -> Axes:
    """``_fft_r2c(x, dims)`` and its kin: the transformed dimensions are mixed, others stay."""
    axes = list(flow.of(node.tensor(0)))
    for d in node.args[1]:
        axes[d].fix(f"its coordinates are mixed ({flow.where(node)})")
        axes[d] = Axis(node.out.shape[d], fixed="data")
    return tuple(axes)


def solve(node: OpNode, flow: Flow) -> Axes:
    """``solve_triangular(a, b)``: columns of ``b`` stay apart, or rows where it is not ``left``."""
    a, b = flow.of(node.tensor(0)), flow.of(node.tensor(1))
    rows, columns = b[-2:]
    for axis in (*a[-2:], rows if node.kwargs.get("left", True) else columns):
        axis.fix(f"a system of equations mixes its coordinates ({flow.where(node)})")
    lead = flow.broadcast([a[:-2], b[:-2]], node.out.shape[:-2])
    return (*lead, rows, columns)
