"""What multiplies and sums: exactly the claims that hold, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tracing_flow import Case, case, claims, prove, real, removal_errors, truth

sdpa = F.scaled_dot_product_attention

PRODUCTS = [
    case("linear", "ab, cb, c -> ac", F.linear, real(4, 6), real(5, 6), real(5)),
    case("linear without bias", "abc, dc -> abd", F.linear, real(2, 4, 6), real(5, 6)),
    case("linear of a vector", "a, ba, b -> b", F.linear, real(6), real(5, 6), real(5)),
    case("linear to one number", "ab, b -> a", F.linear, real(4, 6), real(6)),
    case("linear to one feature", "ab, 1b, 1 -> a1", F.linear, real(4, 6), real(1, 6), real(1)),
    case("linear from one feature", "a1, b1, b -> ab", F.linear, real(4, 1), real(5, 1), real(5)),
    case(
        "linear with a bias for all", "ab, cb, 1 -> ac", F.linear, real(4, 6), real(5, 6), real(1)
    ),
    case(
        "linear with a bias per row",
        "ab, cb, ac -> ac",
        F.linear,
        real(4, 6),
        real(5, 6),
        real(4, 5),
    ),
    case("linear of nothing", "!a, ba, b -> !b", F.linear, real(0, 6), real(5, 6), real(5)),
    case("mm", "ab, bc -> ac", torch.mm, real(3, 4), real(4, 5)),
    case("bmm", "abc, acd -> abd", torch.bmm, real(3, 4, 5), real(3, 5, 6)),
    case(
        "matmul broadcasts both ways",
        "a1bc, dce -> adbe",
        torch.matmul,
        real(7, 1, 3, 4),
        real(5, 4, 6),
    ),
    case("matmul with a vector", "abc, c -> ab", torch.matmul, real(3, 4, 5), real(5)),
    case("vector with matmul", "a, bac -> bc", torch.matmul, real(4), real(3, 4, 5)),
    case("dot", "a, a -> ()", torch.dot, real(5), real(5)),
    case("mv", "ab, b -> a", torch.mv, real(4, 5), real(5)),
    case("inner", "ab, cb -> ac", torch.inner, real(3, 5), real(4, 5)),
    case("inner of numbers", "(), a -> a", torch.inner, real(), real(3)),
    case(
        "tensordot",
        "abc, cad -> bd",
        torch.tensordot,
        real(3, 4, 5),
        real(5, 3, 6),
        dims=([0, 2], [1, 0]),
    ),
    case("outer", "a, b -> ab", torch.outer, real(4), real(5)),
    case("addmm", "a, bc, ca -> ba", torch.addmm, real(5), real(3, 4), real(4, 5)),
    case("addmm adds columns", "a1, ab, bc -> ac", torch.addmm, real(3, 1), real(3, 4), real(4, 5)),
    case("addmv", "a, ab, b -> a", torch.addmv, real(3), real(3, 4), real(4)),
    case("addbmm", "ab, cad, cdb -> ab", torch.addbmm, real(4, 6), real(3, 4, 5), real(3, 5, 6)),
    case(
        "baddbmm",
        "a1b, acd, adb -> acb",
        torch.baddbmm,
        real(3, 1, 6),
        real(3, 4, 5),
        real(3, 5, 6),
    ),
    case("addr", "ab, a, b -> ab", torch.addr, real(4, 5), real(4), real(5)),
    case(
        "bilinear",
        "ab, ac, dbc, d -> ad",
        F.bilinear,
        real(3, 4),
        real(3, 5),
        real(6, 4, 5),
        real(6),
    ),
    case("cdist", "abc, adc -> abd", torch.cdist, real(2, 3, 4), real(2, 5, 4)),
    case("kron", "ab, cd -> (ac)(bd)", torch.kron, real(3, 4), real(5, 6)),
    case("kron of other ranks", "ab, c -> a(bc)", torch.kron, real(3, 4), real(5)),
    case("cross", "a!, 1! -> a!", torch.linalg.cross, real(4, 3), real(1, 3)),
    case(
        "solve",
        "!!, !a -> !a",
        torch.linalg.solve_triangular,
        real(3, 3).triu(),
        real(3, 4),
        upper=True,
    ),
    case(
        "solve from the right",
        "!!, a! -> a!",
        torch.linalg.solve_triangular,
        real(3, 3).triu(),
        real(4, 3),
        upper=True,
        left=False,
    ),
    case("inverse", "!! -> !!", torch.linalg.inv, torch.eye(3).double() + real(3, 3)),
    case("fft", "a! -> a!", torch.fft.fft, real(3, 8), dim=1),
    case("fft of two", "a!!b -> a!!b", torch.fft.rfft2, real(3, 6, 5, 4), dim=(1, 2)),
    case("cosine", "ab~, ab~ -> a", F.cosine_similarity, real(4, 5), real(4, 5)),
]

EINSUMS = [
    case("einsum", "ab, cb -> ac", torch.einsum, "bi,oi->bo", real(3, 4), real(5, 4)),
    case(
        "einsum of heads",
        "abcd, abed -> abce",
        torch.einsum,
        "bhld,bhmd->bhlm",
        real(2, 3, 4, 5),
        real(2, 3, 6, 5),
    ),
    case("einsum implied", "ab, ca -> cb", torch.einsum, "kj,ik", real(3, 4), real(5, 3)),
    case(
        "einsum of three",
        "a, ab, cb -> c",
        torch.einsum,
        "a,ab,cb->c",
        real(3),
        real(3, 4),
        real(5, 4),
    ),
    case("einsum takes a diagonal", "!!a -> !a", torch.einsum, "iij->ij", real(3, 3, 4)),
    case(
        "einsum with dots",
        "a1b, cdb -> acd",
        torch.einsum,
        "...i,...oi->...o",
        real(3, 1, 4),
        real(5, 6, 4),
    ),
    case("einsum moves dots", "abc -> bac", torch.einsum, "i...j->...ij", real(3, 5, 4)),
    case(
        "einsum implies dots", "abc, cd -> abd", torch.einsum, "...ij,jk", real(3, 5, 4), real(4, 6)
    ),
    case("einsum sums dots", "ab, ab -> b", torch.einsum, "...i,...i->i", real(3, 4), real(3, 4)),
    case(
        "einsum broadcasts a one", "a1, ab -> a", torch.einsum, "ij,ij->i", real(3, 1), real(3, 4)
    ),
    case("einsum with spaces", "ab, b -> a", torch.einsum, " b i , i -> b ", real(3, 4), real(4)),
]

ATTENTION = [
    case(
        "attention",
        "abcd~, abe~d~, abe~f -> abcf",
        sdpa,
        real(2, 3, 4, 5),
        real(2, 3, 6, 5),
        real(2, 3, 6, 7),
    ),
    case(
        "attention scaled",
        "abc, ad~c, ad~e -> abe",
        sdpa,
        real(3, 4, 5),
        real(3, 6, 5),
        real(3, 6, 7),
        scale=0.3,
    ),
    case("attention of one head", "ab~, c~b~, c~d -> ad", sdpa, real(4, 5), real(6, 5), real(6, 7)),
    case(
        "attention masked",
        "abcd~, abe~d~, abe~f, ce~ -> abcf",
        sdpa,
        real(2, 3, 4, 5),
        real(2, 3, 6, 5),
        real(2, 3, 6, 7),
        truth(4, 6) | truth(4, 1),
    ),
    case(
        "attention with a bias per head",
        "abcd~, abe~d~, abe~f, bce~ -> abcf",
        sdpa,
        real(2, 3, 4, 5),
        real(2, 3, 6, 5),
        real(2, 3, 6, 7),
        real(3, 4, 6),
    ),
    case(
        "attention, causal",
        "a!b~, a!b~, a!c -> a!c",
        sdpa,
        real(3, 4, 5),
        real(3, 4, 5),
        real(3, 4, 7),
        is_causal=True,
    ),
    case(
        "attention, grouped",
        "a(bc)de~, abf~e~, abf~g -> a(bc)dg",
        sdpa,
        real(2, 6, 4, 5),
        real(2, 3, 8, 5),
        real(2, 3, 8, 7),
        enable_gqa=True,
    ),
    case(
        "attention, one key head",
        "abcd~, a1e~d~, a1e~f -> abcf",
        sdpa,
        real(2, 6, 4, 5),
        real(2, 1, 8, 5),
        real(2, 1, 8, 7),
        enable_gqa=True,
    ),
    case(
        "attention, broadcast",
        "1abc~, dae~c~, dae~f -> dabf",
        sdpa,
        real(1, 3, 4, 5),
        real(2, 3, 8, 5),
        real(2, 3, 8, 7),
    ),
    case(
        "attention, grouped and broadcast",
        "1(ab)cd~, eaf~d~, eaf~g -> e(ab)cg",
        sdpa,
        real(1, 6, 4, 5),
        real(2, 3, 8, 5),
        real(2, 3, 8, 7),
        enable_gqa=True,
    ),
]


def grouped(a: Tensor, b: Tensor, ends: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return torch._grouped_mm(a, b, ends, bias=bias)


def rough(*shape: int) -> Tensor:
    return real(*shape).bfloat16()


ENDS = torch.tensor([8, 24], dtype=torch.int32)
GROUPED = [
    case("experts", "!a, !ab, ! -> !b", grouped, rough(24, 16), rough(2, 16, 32), ENDS),
    case(
        "experts in parts of columns",
        "!ab, b!, ! -> a!",
        grouped,
        rough(2, 16, 32),
        rough(32, 24),
        ENDS,
    ),
    case(
        "experts in parts of what is summed",
        "a!, !b, ! -> !ab",
        grouped,
        rough(16, 24),
        rough(24, 32),
        ENDS,
    ),
    case("experts of equal size", "abc, acd -> abd", grouped, rough(2, 8, 16), rough(2, 16, 32)),
]

EVERY = [*PRODUCTS, *EINSUMS, *ATTENTION, *GROUPED]


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_exactly_what_holds_is_claimed(one: Case) -> None:
    prove(one)


@pytest.mark.parametrize("one", [*PRODUCTS, *EINSUMS], ids=lambda one: one.name)
def test_a_product_can_lose_coordinates_of_every_free_dimension(one: Case) -> None:
    assert removal_errors(one.call, claims(one.call)) == ([], 0)
