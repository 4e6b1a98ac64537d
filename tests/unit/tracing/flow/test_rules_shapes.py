"""What moves, splits and joins dimensions: exactly the claims that hold, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tracing_flow import Case, case, prove, real

aten = torch.ops.aten


def _split_heads(x: Tensor) -> Tensor:
    return x.view(2, 5, 3, 4).transpose(1, 2)


def _merged_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(2, 5, 12)


def _half_turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    one, two = x[..., :half], x[..., half:]
    return torch.cat((-two, one), -1) * x


def _interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _written(change: Callable[..., object], *shape: int) -> Callable[..., Tensor]:
    """Return a function that makes zeros, changes them with its arguments, and returns them."""

    def function(*args: Any) -> Tensor:
        made = args[0].new_zeros(shape)
        change(made, *args)
        return made

    return function


def _into_slice(made: Tensor, x: Tensor) -> None:
    made[:, :4] = x


def _into_slice_twice(made: Tensor, x: Tensor, y: Tensor) -> None:
    made[:, :4] = x
    made[:, 4:].copy_(y)


def _into_position(made: Tensor, x: Tensor) -> None:
    made[1] = x


def _into_transposed(made: Tensor, x: Tensor) -> None:
    made.t().add_(x)


def _into_heads(made: Tensor, x: Tensor) -> None:
    made.view(3, 2, 4)[:, 1] += x


def _out(made: Tensor, x: Tensor, y: Tensor) -> None:
    torch.mm(x, y, out=made[:, :4])


def _out_values(made: Tensor, x: Tensor) -> None:
    torch.max(x, 1, out=(made[0], torch.zeros(3, dtype=torch.long)))


VIEWS = [
    case("view", "a(bc) -> abc", lambda x: x.view(2, 3, 4), real(2, 12)),
    case("view into heads", "ab(cd) -> acbd", _split_heads, real(2, 5, 12)),
    case("reshape out of heads", "abcd -> ac(bd)", _merged_heads, real(2, 3, 5, 4)),
    case("view with units", "ab1 -> 1a1b", lambda x: x.view(1, 3, 1, 4), real(3, 4, 1)),
    case("view across seams", "!! -> !!", lambda x: x.reshape(4, 9), real(6, 6)),
    case("view without a seam", "!! -> !!", lambda x: x.reshape(3, 2), real(2, 3)),
    case("view of a number", "() -> 11", lambda x: x.view(1, 1), real()),
    case("view to a number", "11 -> ()", lambda x: x.view(()), real(1, 1)),
    case("view of nothing", "!a -> b!", lambda x: x.reshape(4, 0), real(0, 5)),
    case(
        "view of halves",
        "a(bc), a(dc) -> a(b+d)c",
        lambda x, y: torch.cat((x, y), 1).view(2, 4, 3),
        real(2, 6),
        real(2, 6),
    ),
    case("view as bytes", "ab -> ab", lambda x: x.view(torch.int64), real(3, 4)),
    case("view as more bytes", "a! -> a!", lambda x: x.view(torch.int32), real(3, 4)),
    case("flatten", "abc -> a(bc)", torch.flatten, real(2, 3, 4), 1),
    case("unflatten", "a(bc) -> abc", lambda x: x.unflatten(1, (3, -1)), real(2, 12)),
    case("view_as", "(ab), cd -> ab", lambda x, y: x.view_as(y), real(12), real(3, 4)),
    case("ravel", "ab -> (ab)", torch.ravel, real(3, 4)),
    case("permute", "abc -> cab", lambda x: x.permute(2, 0, -2), real(3, 4, 5)),
    case("transpose", "abc -> cba", lambda x: x.transpose(-1, 0), real(3, 4, 5)),
    case("t", "ab -> ba", torch.t, real(3, 4)),
    case("t of a vector", "a -> a", torch.t, real(3)),
    case("T", "abc -> cba", lambda x: x.permute(2, 1, 0), real(3, 3, 3)),
    case("numpy T", "ab -> ba", aten.numpy_T, real(3, 4)),
    case("mT", "abc -> acb", lambda x: x.mT, real(3, 4, 5)),
    case("swapaxes", "abc -> cba", torch.swapaxes, real(3, 4, 5), 0, -1),
    case("movedim", "abc -> bca", torch.movedim, real(3, 4, 5), (0, 1), (-1, 0)),
    case("movedim of one", "abc -> bca", torch.movedim, real(3, 4, 5), 0, -1),
    case("unsqueeze", "ab -> ab1", lambda x: x.unsqueeze(-1), real(3, 4)),
    case("squeeze", "1a1b -> ab", torch.squeeze, real(1, 3, 1, 4)),
    case("squeeze one", "1a1 -> 1a", lambda x: x.squeeze(-1), real(1, 3, 1)),
    case("squeeze what is not one", "1a1 -> 1a1", lambda x: x.squeeze(1), real(1, 3, 1)),
    case("squeeze some", "1a1 -> a1", lambda x: x.squeeze((0, 1)), real(1, 3, 1)),
    case(
        "in place views", "ab -> ba", lambda x: x.clone().t_().unsqueeze_(0).squeeze_(0), real(3, 3)
    ),
    case("expand", "a1 -> bac", lambda x: x.expand(2, 3, 4), real(3, 1)),
    case("expand as", "1a, bc -> da", lambda x, y: x.expand_as(y), real(1, 3), real(4, 3)),
    case("complex", "a! -> a", torch.view_as_complex, real(3, 2)),
    case(
        "complex and back",
        "a! -> a!",
        lambda x: torch.view_as_real(torch.view_as_complex(x)),
        real(3, 2),
    ),
    case("diagonal", "!a! -> a!", torch.diagonal, real(3, 4, 5), dim1=0, dim2=2),
    case("diag_embed", "a! -> !a!", torch.diag_embed, real(3, 4), dim1=0),
    case("windows", "a! -> a!!", lambda x: x.unfold(1, 3, 2), real(4, 7)),
    case("window of a number", "() -> !", lambda x: x.unfold(0, 1, 1), real()),
]

PARTS = [
    case("slice", "a(b+c+d) -> ac", lambda x: x[:, 2:5], real(3, 7)),
    case("slice of all", "ab -> ab", lambda x: x[:, 0:9], real(3, 7)),
    case("slice of nothing", "a(b+c) -> a!", lambda x: x[:, 5:2], real(3, 7)),
    case("slice from behind", "a(b+c) -> ac", lambda x: x[:, -3:], real(3, 7)),
    case(
        "slice within heads",
        "(a(b+1)c) -> (abc)",
        lambda x: x.view(2, 3, 4)[:, :2].flatten(),
        real(24),
    ),
    case("every second", "a(b!) -> ab", lambda x: x[:, 1::2], real(3, 8)),
    case("every second but the last", "a! -> a!", lambda x: x[:, 1:7:2], real(3, 8)),
    case("every second of seven", "a! -> a!", lambda x: x[:, ::2], real(3, 7)),
    case("narrow", "a(b+c+d) -> ac", torch.narrow, real(3, 7), 1, 2, 3),
    case("narrow from behind", "a(b+c) -> ac", torch.narrow, real(3, 7), -1, -3, 3),
    case("narrow at an index", "a!, () -> a!", torch.narrow, real(3, 7), 1, torch.tensor(2), 3),
    case("select", "a! -> a", lambda x: x[:, 1], real(3, 4)),
    case("unbind", "!a -> a, a", torch.unbind, real(2, 3), 0),
    case("split", "a(b+c+1) -> ab, ac, a1", torch.split, real(3, 7), 3, 1),
    case("split by sizes", "a(b+c) -> ab, a!, ac", torch.split, real(3, 7), (2, 0, 5), 1),
    case("split into parts of one", "a(1+1) -> a1, a1", torch.split, real(3, 2), 1, 1),
    case("chunk", "(a+b)c -> ac, bc", torch.chunk, real(6, 3), 2),
    case("chunk unequally", "a(b+c+1) -> ab, ac, a1", torch.chunk, real(3, 7), 3, -1),
    case("tensor_split", "(a+b+c)d -> ad, bd, cd", torch.tensor_split, real(7, 3), 3),
    case("tensor_split at", "(a+b+c)d -> ad, bd, cd", torch.tensor_split, real(7, 3), (2, 5)),
    case("tensor_split backwards", "!a -> !a, !a, !a", torch.tensor_split, real(7, 3), (5, 2)),
    case(
        "split by an index",
        "(a+b+c)d, ! -> ad, bd, cd",
        torch.tensor_split,
        real(7, 3),
        torch.tensor([2, 5]),
    ),
    case("glu", "a(b+b) -> ab", F.glu, real(3, 8)),
    case("gated in another dimension", "(a+a)b -> ab", F.glu, real(8, 3), 0),
    case("rotary halves", "a(b+b) -> a(b+b)", _half_turned, real(5, 6)),
    case("rotary pairs", "a(b!) -> a(b!)", _interleaved, real(5, 6)),
]

JOINS = [
    case("cat", "ab, ac -> a(b+c)", torch.cat, [real(3, 4), real(3, 5)], 1),
    case("cat twice the same", "ab -> a(b+b)", lambda x: torch.cat((x, x), -1), real(3, 4)),
    case("cat with nothing", "ab, !, a! -> ab", torch.cat, [real(3, 4), real(0), real(3, 0)], 1),
    case("cat of nothing", "!, ! -> !", torch.cat, [real(0), real(0)]),
    case(
        "cat and split",
        "a, b -> a, b",
        lambda x, y: torch.cat((x, y)).split((3, 4)),
        real(3),
        real(4),
    ),
    case(
        "cat and split elsewhere",
        "(a+1), b -> a, (1+b)",
        lambda x, y: torch.cat((x, y)).split((2, 5)),
        real(3),
        real(4),
    ),
    case(
        "sum of cats",
        "a, b, (a+b) -> (a+b)",
        lambda x, y, z: torch.cat((x, y)) + z,
        real(3),
        real(4),
        real(7),
    ),
    case(
        "two cats meet",
        "a, (1+b), (a+1), b -> (a+1+b)",
        lambda a, b, c, d: torch.cat((a, b)) + torch.cat((c, d)),
        real(3),
        real(5),
        real(4),
        real(4),
    ),
    case("stack", "ab, ab -> ab!", torch.stack, [real(3, 4), real(3, 4)], -1),
    case("stack of numbers", "(), () -> !", torch.stack, [real(), real()]),
    case(
        "block_diag",
        "ab, c, de -> (a+1+d)(b+c+e)",
        torch.block_diag,
        real(3, 4),
        real(5),
        real(3, 3),
    ),
    case("pad", "ab -> a(!+b+!)", F.pad, real(3, 4), (1, 2)),
    case("pad nothing", "ab -> ab", F.pad, real(3, 4), (0, 0)),
    case(
        "pad with another value", "ab -> (a+!)(!+b+!)", F.pad, real(3, 4), (1, 2, 0, 1), value=2.0
    ),
    case("pad away", "a! -> a!", F.pad, real(3, 5), (-1, 2)),
    case("pad by reflection", "ab! -> ab!", F.pad, real(2, 3, 4), (1, 1), mode="reflect"),
    case("pad around", "ab(1+c+1) -> ab(1+1+c+1+1)", F.pad, real(2, 3, 4), (1, 1), mode="circular"),
    case("repeat", "ab -> (ca)(db)", lambda x: x.repeat(2, 3), real(3, 4)),
    case("repeat into more dimensions", "a1 -> bac", lambda x: x.repeat(2, 1, 3), real(3, 1)),
    case("tile", "ab -> a(cb)", torch.tile, real(3, 4), (2,)),
    case("repeat_interleave", "ab -> a(bc)", torch.repeat_interleave, real(3, 4), 2, 1),
    case("repeat_interleave of all", "ab -> (abc)", torch.repeat_interleave, real(3, 4), 2),
    case(
        "repeat unequally",
        "!a, ! -> !a",
        torch.repeat_interleave,
        real(3, 4),
        torch.tensor([1, 0, 2]),
        0,
    ),
    case("repeat positions", "! -> !", torch.repeat_interleave, torch.tensor([1, 0, 2])),
    case(
        "repeated heads",
        "abc -> a(bd)c",
        lambda x: x[:, :, None].expand(2, 3, 2, 4).reshape(2, 6, 4),
        real(2, 3, 4),
    ),
]

ORDER = [
    case("roll", "a! -> a!", torch.roll, real(3, 4), 1, 1),
    case("roll of all", "!! -> !!", torch.roll, real(3, 4), 1),
    case("flip", "!a -> !a", torch.flip, real(3, 4), (0,)),
    case("fliplr", "a! -> a!", torch.fliplr, real(3, 4)),
    case("rot90", "!! -> !!", torch.rot90, real(3, 4)),
    case("tril", "a!! -> a!!", torch.tril, real(3, 4, 4)),
]

WRITES = [
    case("write into a slice", "ab -> a(b+c)", _written(_into_slice, 3, 6), real(3, 4)),
    case(
        "write into two slices",
        "ab, ac -> a(b+c)",
        _written(_into_slice_twice, 3, 9),
        real(3, 4),
        real(3, 5),
    ),
    case("write one value for all", "1 -> a(b+c)", _written(_into_slice, 3, 6), real(1)),
    case("write into a position", "a -> !a", _written(_into_position, 2, 5), real(5)),
    case("write into a transposed view", "ab -> ba", _written(_into_transposed, 3, 4), real(4, 3)),
    case("write into heads", "ab -> a(!b)", _written(_into_heads, 3, 8), real(3, 4)),
    case("out", "ab, bc -> a(c+d)", _written(_out, 3, 6), real(3, 5), real(5, 4)),
    case("out of two", "a! -> !a", _written(_out_values, 2, 3), real(3, 4)),
    case(
        "slice_scatter",
        "a(1+b+1), ab -> a(1+b+1)",
        torch.slice_scatter,
        real(3, 6),
        real(3, 4),
        1,
        1,
        5,
    ),
    case("select_scatter", "!a, a -> !a", torch.select_scatter, real(3, 4), real(4), 0, 1),
    case("diagonal_scatter", "!!a, a! -> !!a", torch.diagonal_scatter, real(3, 3, 4), real(4, 3)),
]

EVERY = [*VIEWS, *PARTS, *JOINS, *ORDER, *WRITES]


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_exactly_what_holds_is_claimed(one: Case) -> None:
    prove(one)
