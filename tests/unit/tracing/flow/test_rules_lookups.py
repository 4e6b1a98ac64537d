"""What looks up, scatters, reduces, and works element by element: exactly the claims that hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tracing_flow import Case, below, case, prove, real, truth

aten = torch.ops.aten


def _put(x: Tensor, value: Tensor, *ids: Any) -> Tensor:
    x[ids] = value
    return x


def _outer_mask(x: Tensor, mask: Tensor, y: Tensor) -> Tensor:
    return x.masked_scatter(mask[..., None].expand_as(x), y)


MASK = torch.tensor([True, False, True])
NONE = slice(None)

LOOKUPS = [
    case("embedding", "ab, !c -> abc", F.embedding, below(5, 2, 3), real(5, 4)),
    case(
        "embedding of limited norm",
        "!!, !a~ -> !!a~",
        F.embedding,
        below(5, 2, 3),
        real(5, 4),
        max_norm=0.5,
    ),
    case("embedding_bag", "!!, !a -> !a", F.embedding_bag, below(5, 3, 4), real(5, 6)),
    case(
        "embedding_bag at offsets",
        "!, !a, ! -> !a",
        F.embedding_bag,
        below(5, 4),
        real(5, 6),
        torch.tensor([0, 1]),
    ),
    case(
        "embedding_bag, weighted",
        "!!, !a, !! -> !a",
        F.embedding_bag,
        below(5, 3, 4),
        real(5, 6),
        per_sample_weights=real(3, 4),
        mode="sum",
    ),
    case("index", "!a, b -> ba", lambda x, i: x[i], real(5, 4), below(5, 3)),
    case(
        "index of two",
        "!!a, b1, 1c -> bca",
        lambda x, i, j: x[i, j],
        real(5, 4, 6),
        below(5, 3, 1),
        below(4, 1, 2),
    ),
    case("index behind", "a!b, cd -> acdb", lambda x, i: x[:, i], real(3, 5, 4), below(5, 2, 6)),
    case(
        "index apart",
        "!a!, b, b -> ba",
        lambda x, i, j: x[i, :, j],
        real(5, 4, 6),
        below(5, 3),
        below(6, 3),
    ),
    case("index by a number", "a!, () -> a", lambda x, i: x[:, i], real(3, 5), torch.tensor(2)),
    case("index by a mask", "!a, ! -> !a", lambda x, i: x[i], real(3, 4), MASK),
    case("index by a mask behind", "a!b, ! -> a!b", lambda x, i: x[:, i], real(4, 3, 5), MASK),
    case("index by a wide mask", "!!a, !! -> !a", lambda x, i: x[i], real(3, 4, 5), truth(3, 4)),
    case(
        "index by mask and number",
        "!!, !, ! -> !",
        lambda x, m, i: x[m, i],
        real(3, 4),
        MASK,
        below(4, 2),
    ),
    case("index_put", "!a, !a, ! -> !a", _put, real(5, 4), real(2, 4), torch.tensor([1, 3])),
    case("index_put one value", "!a, (), ! -> !a", _put, real(5, 4), real(), torch.tensor([1, 3])),
    case(
        "index_put behind",
        "a!, a!, ! -> a!",
        _put,
        real(3, 5),
        real(3, 2),
        NONE,
        torch.tensor([1, 3]),
    ),
    case("index_put a row", "!a, a, ! -> !a", _put, real(5, 4), real(4), torch.tensor([1, 3])),
    case("index_put by a mask", "!a, !a, ! -> !a", _put, real(3, 4), real(2, 4), MASK),
    case(
        "index_put between",
        "a!b, a!b, ! -> a!b",
        _put,
        real(2, 5, 4),
        real(2, 2, 4),
        NONE,
        torch.tensor([1, 3]),
    ),
    case(
        "index_put apart",
        "!a!, !a, !, ! -> !a!",
        _put,
        real(5, 4, 6),
        real(2, 4),
        torch.tensor([1, 3]),
        NONE,
        torch.tensor([0, 5]),
    ),
    case("index_select", "!a, b -> ba", torch.index_select, real(5, 4), 0, below(5, 3)),
    case("index_select of a number", "(), 1 -> ()", torch.index_select, real(), 0, below(1, 1)),
    case("gather", "!a, ba -> ba", torch.gather, real(5, 4), 0, below(5, 3, 4)),
    case("gather a part", "!!, a! -> a!", torch.gather, real(5, 4), 0, below(5, 3, 2)),
    case("gather numbers", "(), () -> ()", torch.gather, real(), 0, torch.tensor(0)),
    case("take_along_dim", "a!, ab -> ab", torch.take_along_dim, real(5, 4), below(4, 5, 2), 1),
    case(
        "scatter",
        "a!, a!, a! -> a!",
        torch.scatter,
        real(5, 4),
        1,
        torch.tensor([[2, 0]] * 5),
        real(5, 2),
    ),
    case("scatter one value", "a!, a! -> a!", torch.scatter, real(5, 4), 1, below(4, 5, 2), 3.0),
    case(
        "scatter_add",
        "!a, !a, !a -> !a",
        torch.scatter_add,
        real(5, 4),
        0,
        below(5, 3, 4),
        real(3, 4),
    ),
    case(
        "scatter a part",
        "!!, !!, !! -> !!",
        torch.scatter_add,
        real(5, 4),
        0,
        below(5, 3, 2),
        real(3, 4),
    ),
    case(
        "scatter_reduce",
        "!a, !a, !a -> !a",
        torch.scatter_reduce,
        real(5, 4),
        0,
        below(5, 3, 4),
        real(3, 4),
        "amax",
    ),
    case("index_add", "!a, !, !a -> !a", torch.index_add, real(5, 4), 0, below(5, 3), real(3, 4)),
    case(
        "index_copy",
        "!a, !, !a -> !a",
        torch.index_copy,
        real(5, 4),
        0,
        torch.tensor([2, 0]),
        real(2, 4),
    ),
    case("index_fill", "a!, ! -> a!", torch.index_fill, real(5, 4), -1, torch.tensor([2, 0]), 1.0),
    case(
        "index_reduce",
        "!a, !, !a -> !a",
        torch.index_reduce,
        real(5, 4),
        0,
        below(5, 3),
        real(3, 4),
        "amax",
    ),
    case(
        "masked_scatter", "!!, !!, ! -> !!", torch.masked_scatter, real(3, 4), truth(3, 4), real(12)
    ),
    case(
        "masked_scatter of rows",
        "!!a, !!, !a -> !!a",
        _outer_mask,
        real(2, 3, 4),
        truth(2, 3),
        real(6, 4),
    ),
    case("masked_select", "!!, !! -> !", torch.masked_select, real(3, 4), truth(3, 4)),
    case("take", "!!, ! -> !", torch.take, real(3, 4), below(12, 5)),
    case("where of one", "! -> !", torch.where, truth(5)),
    case("nonzero", "!! -> !!", torch.nonzero, truth(3, 4)),
    case("one_hot", "! -> !!", F.one_hot, below(4, 3), 4),
    case("bucketize", "!, ! -> !", torch.bucketize, real(4), real(5).sort().values),
    case("bincount", "! -> !", torch.bincount, below(4, 6)),
    case("unique", "! -> !", torch.unique, below(4, 6)),
]

REDUCTIONS = [
    case("sum", "ab -> ()", torch.sum, real(3, 4)),
    case("sum over one", "abc -> ac", torch.sum, real(3, 4, 5), -2),
    case("sum kept", "abc -> 1b1", torch.sum, real(3, 4, 5), (0, 2), keepdim=True),
    case("sum of a number", "() -> ()", torch.sum, real(), 0),
    case("sum over nothing", "a! -> a", torch.sum, real(3, 0), 1),
    case("sum as another dtype", "ab -> ()", torch.sum, real(3, 4), dtype=torch.float32),
    case("mean", "ab~ -> a", torch.mean, real(3, 4), -1),
    case("mean of all, kept", "a~b~ -> 11", lambda x: x.mean((0, 1), keepdim=True), real(3, 4)),
    case("var", "ab~ -> a", torch.var, real(3, 4), 1),
    case("var of all, biased", "a~b~ -> ()", torch.var, real(3, 4), False),
    case("std_mean", "a~b -> 1b, 1b", torch.std_mean, real(3, 4), 0, keepdim=True),
    case("amax", "ab~ -> a", torch.amax, real(3, 4), 1),
    case("aminmax", "ab~ -> a, a", torch.aminmax, real(3, 4), dim=1),
    case("norm", "ab~ -> a", torch.linalg.vector_norm, real(3, 4), 2, 1),
    case("norm of all", "a~b~ -> ()", torch.norm, real(3, 4)),
    case("norm along", "a~b -> 1b", torch.norm, real(3, 4), 2.0, 0, keepdim=True),
    case("logsumexp", "ab~ -> a", torch.logsumexp, real(3, 4), 1),
    case("prod", "ab~ -> a", torch.prod, real(3, 4), 1),
    case("all", "ab~ -> a", torch.all, truth(3, 4), 1),
    case("any", "ab -> ()", torch.any, truth(3, 4)),
    case("count_nonzero", "ab -> a", torch.count_nonzero, real(3, 4), 1),
    case("max", "a~b~ -> ()", torch.max, real(3, 4)),
    case("max along", "a! -> a, a", torch.max, real(3, 4), 1),
    case("argmax", "!a -> a", torch.argmax, real(3, 4), 0),
    case("argmax of all", "!! -> ()", torch.argmax, real(3, 4)),
    case("median", "a! -> a1, a1", torch.median, real(3, 5), 1, keepdim=True),
    case("mode", "a! -> a, a", torch.mode, real(3, 5)),
    case("cumsum", "a! -> a!", torch.cumsum, real(3, 4), 1),
    case("cumsum of a number", "() -> ()", torch.cumsum, real(), 0),
    case("cummax", "a! -> a!, a!", torch.cummax, real(3, 4), -1),
    case("diff", "(1+1+1)a -> (1+1)a", torch.diff, real(3, 4), dim=0),
    case("sort", "a! -> a!, a!", torch.sort, real(3, 4)),
    case("sort of a number", "() -> (), ()", torch.sort, real(), 0),
    case("argsort", "!a -> !a", torch.argsort, real(3, 4), 0, True),
    case("topk", "a! -> a!, a!", torch.topk, real(3, 4), 2),
    case("topk along", "!a -> !a, !a", torch.topk, real(3, 4), 2, 0),
    case("kthvalue", "a! -> a, a", torch.kthvalue, real(3, 4), 2),
    case("renorm", "ab~ -> ab~", torch.renorm, real(3, 4), 2, 0, 0.5),
    case("mse_loss", "a~b~, a~b~ -> ()", F.mse_loss, real(3, 4), real(3, 4)),
    case(
        "mse_loss, unreduced", "ab, ab -> ab", F.mse_loss, real(3, 4), real(3, 4), reduction="none"
    ),
    case(
        "bce",
        "a~b~, a~b~, b~ -> ()",
        F.binary_cross_entropy_with_logits,
        real(3, 4),
        real(3, 4),
        pos_weight=real(4),
    ),
    case("cross_entropy", "!!, ! -> ()", F.cross_entropy, real(3, 4), below(4, 3)),
]

ELEMENTWISE = [
    case("add", "ab, ab -> ab", torch.add, real(3, 4), real(3, 4)),
    case("add, broadcast", "a1, b -> ab", torch.add, real(3, 1), real(4)),
    case("add, broadcast the other way", "a, bc1 -> bca", torch.add, real(4), real(2, 3, 1)),
    case("add a number", "ab -> ab", torch.add, real(3, 4), 2),
    case("add a tensor of one", "ab, 11 -> ab", torch.add, real(3, 4), real(1, 1)),
    case("add nothing", "!a, a -> !a", torch.add, real(0, 4), real(4)),
    case("add to itself turned", "aa -> aa", lambda x: x + x.t(), real(3, 3)),
    case("add in place", "ab, b -> ab", lambda x, y: x.add_(y), real(3, 4), real(4)),
    case(
        "add out",
        "ab, b -> ab",
        lambda x, y: torch.add(x, y, out=x.new_zeros(0)),
        real(3, 4),
        real(4),
    ),
    case("subtract from a number", "ab -> ab", lambda x: 1 - x, real(3, 4)),
    case("power", "a -> a", torch.pow, 2.0, real(3)),
    case("matrix times scale", "ab, a1 -> ab", torch.mul, real(3, 4), real(3, 1)),
    case("addcmul", "ab, b, a1 -> ab", torch.addcmul, real(3, 4), real(4), real(3, 1)),
    case("where", "a1, b, ab -> ab", torch.where, truth(3, 1), real(4), real(3, 4)),
    case(
        "where of numbers", "ab, b -> ab", lambda m, x: torch.where(m, x, 0.0), truth(3, 4), real(4)
    ),
    case("masked_fill", "abc, b1 -> abc", torch.masked_fill, real(2, 3, 4), truth(3, 1), 0.0),
    case(
        "masked_fill in place",
        "ab, b -> ab",
        lambda x, m: x.masked_fill_(m, 1.0),
        real(3, 4),
        truth(4),
    ),
    case("clamp by tensors", "ab, b, a1 -> ab", torch.clamp, real(3, 4), real(4), real(3, 1)),
    case("maximum", "ab, b -> ab", torch.maximum, real(3, 4), real(4)),
    case("max of two", "ab, b -> ab", torch.max, real(3, 4), real(4)),
    case("compare", "a1, b -> ab", torch.gt, real(3, 1), real(4)),
    case("complex", "a, a -> a", torch.complex, real(3), real(3)),
    case("polar", "ab, b -> ab", torch.polar, real(3, 4), real(4)),
    case("frexp", "ab -> ab, ab", torch.frexp, real(3, 4)),
    case("gelu", "ab -> ab", F.gelu, real(3, 4)),
    case("silu in place", "ab -> ab", lambda x: F.silu(x, inplace=True), real(3, 4)),
    case("dropout", "ab -> ab", F.dropout, real(3, 4), training=False),
    case("prelu", "abc, b -> abc", F.prelu, real(3, 4, 5), real(4)),
    case("prelu, one slope", "ab, 1 -> ab", F.prelu, real(3, 4), real(1)),
    case("prelu of features", "ab, 1b -> ab", aten._prelu_kernel, real(3, 4), real(1, 4)),
    case("lerp", "ab, b, a1 -> ab", torch.lerp, real(3, 4), real(4), real(3, 1)),
    case("cast", "ab, c -> ab", lambda x, y: x.float().type_as(y), real(3, 4), real(2)),
    case("clone", "ab -> ab", lambda x: x.clone().contiguous().detach(), real(3, 4)),
    case("copy", "ab, b -> ab", lambda x, y: x.copy_(y), real(3, 4), real(4)),
    case("fill by a tensor", "ab, () -> ab", lambda x, y: x.fill_(y), real(3, 4), real()),
    case(
        "meshgrid",
        "a, b -> ac, db",
        lambda x, y: torch.meshgrid(x, y, indexing="ij"),
        real(3),
        real(4),
    ),
    case(
        "fake quantize",
        "ab, b, b -> ab",
        torch.fake_quantize_per_channel_affine,
        real(3, 4).float(),
        real(4).float(),
        torch.zeros(4),
        1,
        -8,
        7,
    ),
    case("zeros_like", "ab -> ab", torch.zeros_like, real(3, 4)),
    case("new_ones", "a -> bc", lambda x: x.new_ones(3, 4), real(2)),
    case("full", "a -> ba", lambda x: torch.full((3, 4), 2.0) + x, real(4)),
    case("arange", "a! -> a!", lambda x: torch.arange(4) * x, real(3, 4)),
    case("eye", "!! -> !!", lambda x: torch.eye(3) + x, real(3, 3)),
]

EVERY = [*LOOKUPS, *REDUCTIONS, *ELEMENTWISE]


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_exactly_what_holds_is_claimed(one: Case) -> None:
    prove(one)
