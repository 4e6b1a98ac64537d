"""The groups of hand-made models, derived by hand: all there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tracing_zoo.groups import Axis, at, axis, whole

__all__ = ["EXPECTED"]

NORM = ("weight", "bias", "running_mean", "running_var")


def conv(*paths: str) -> list[str]:
    """Convolution 0 and batch norm 1 of each path, as producers."""
    return [f"{p}.0.weight:0" for p in paths] + [f"{p}.1.{t}:0" for p in paths for t in NORM]


def batch_norm(*paths: str) -> list[str]:
    return [f"{path}.{tensor}:0" for path in paths for tensor in NORM]


def affine(*paths: str) -> list[str]:
    return [f"{path}.{tensor}:0" for path in paths for tensor in ("weight", "bias")]


def resnet() -> list[Axis]:
    one, two = "block1.", "block2."
    return [
        axis(8, whole(
            *conv("stem"), f"{one}conv1.weight:1", f"{one}conv2.weight:0", *batch_norm(f"{one}bn2"),
            f"{two}conv1.weight:1", f"{two}down.0.weight:1",
        )),
        axis(8, whole(f"{one}conv1.weight:0", *batch_norm(f"{one}bn1"), f"{one}conv2.weight:1")),
        axis(12, whole(f"{two}conv1.weight:0", *batch_norm(f"{two}bn1"), f"{two}conv2.weight:1")),
        axis(12, whole(
            f"{two}conv2.weight:0", *batch_norm(f"{two}bn2"), f"{two}down.0.weight:0",
            f"{two}down.0.bias:0", *batch_norm(f"{two}down.1"), "head.2.weight:1",
        )),
    ]  # fmt: skip


def mobilenet() -> list[Axis]:
    return [
        axis(8, whole(*conv("0", "1.project", "2.project"), "1.expand.0.weight:1",
                      "2.expand.0.weight:1", "3.2.weight:1")),
        *(
            axis(n, whole(*conv(f"{i}.expand", f"{i}.depthwise"), f"{i}.project.0.weight:1"))
            for i, n in ((1, 20), (2, 14))
        ),
    ]  # fmt: skip


def flattened() -> list[Axis]:
    return [
        axis(6, [*whole(*affine("0")), at("4.weight", 1, "n 16")]),
        axis(10, whole(*affine("4"), "6.weight:1")),
    ]


def densenet() -> list[Axis]:
    def readers(*norms: tuple[str, str, int, int]) -> list[tuple[str, int, str, int]]:
        return [
            member
            for norm, weight, start, _ in norms
            for member in (
                *(at(f"{norm}.{t}", 0, start=start) for t in NORM),
                at(weight, 1, start=start),
            )
        ]

    first, second = ("1.norm", "1.conv.weight"), ("2.norm", "2.conv.weight")
    third, last = ("5.norm", "5.conv.weight"), ("6", "8.2.weight")

    def transition(start: int) -> list[tuple[str, int, str, int]]:
        return [at("3.0.weight", 1, start=start)]

    return [
        axis(8, [*whole(*affine("0")), *readers((*first, 0, 0), (*second, 0, 0)), *transition(0)]),
        axis(6, [*whole("1.conv.weight:0"), *readers((*second, 8, 0)), *transition(8)]),
        axis(4, [*whole("2.conv.weight:0"), *transition(14)]),
        axis(10, [*whole(*conv("3")), *readers((*third, 0, 0), (*last, 0, 0))]),
        axis(6, [*whole("5.conv.weight:0"), *readers((*last, 10, 0))]),
    ]


def group_norm() -> list[Axis]:
    def members(layout: str) -> list[tuple[str, int, str, int]]:
        rows = [at(f"{i}.{t}", 0, layout) for i in (0, 1) for t in ("weight", "bias")]
        return [*rows, at("3.weight", 1, layout)]

    return [
        axis(4, members("n 3")),
        axis(3, members("4 n"), norms=("1",)),
        axis(10, whole(*affine("3", "4"), "5.weight:0", "6.2.weight:1")),
    ]


def shuffle() -> list[Axis]:
    """Two grouped convolutions, of 3 and 2 groups, 30 channels (3, 2, 5) between them."""

    def first(layout: str) -> list[tuple[str, int, str, int]]:
        return [
            at("first.0.weight", 0, layout),
            *(at(f"first.1.{t}", 0, layout) for t in NORM),
        ]

    def block(path: str, layout: str) -> list[tuple[str, int, str, int]]:
        return [at(f"{path}.0.weight", 0, layout), *(at(f"{path}.1.{t}", 0, layout) for t in NORM)]

    return [
        axis(3, [*block("stem", "n 4"), *first("n 2 5"), at("second.0.weight", 1, "5 n")]),
        axis(4, [*block("stem", "3 n"), at("first.0.weight", 1, "n")]),
        axis(2, [*first("3 n 5"), *block("second", "n 4"), at("head.2.weight", 1, "n 4")]),
        axis(5, [*first("3 2 n"), at("second.0.weight", 1, "n 3")]),
        axis(4, [*block("second", "2 n"), at("head.2.weight", 1, "2 n")]),
    ]


def decoder(order: tuple[int, ...] = (0, 1), *, tied: bool = False) -> list[Axis]:
    """Pre-norm blocks: 12 query heads on 4 key heads of 5, values of 7."""
    norms = tuple(f"{n}.{i}" for i in order for n in ("norm1", "norm2"))
    residual = ["embed.weight:1", "norm.weight:0", "norm.bias:0"]
    residual += [] if tied else ["head.weight:1"]
    groups: list[Axis] = []
    for i in order:
        a, m = f"attention.{i}", f"mlp.{i}"
        residual += [f"norm1.{i}.weight:0", f"norm2.{i}.weight:0", f"norm2.{i}.bias:0"]
        residual += [f"{a}.{p}.weight:1" for p in "qkv"] + affine(f"{a}.o", f"{m}.down")
        residual += [f"{m}.gate.weight:1", f"{m}.up.weight:1"]

        def rows(path: str, layout: str, a: str = a) -> list[tuple[str, int, str, int]]:
            return [at(f"{a}.{path}.{t}", 0, layout) for t in ("weight", "bias")]

        o = f"{a}.o.weight"
        groups += [
            axis(4, [*rows("q", "n 3 5"), *rows("k", "n 5"), *rows("v", "n 7"), at(o, 1, "n 3 7")]),
            axis(3, [*rows("q", "4 n 5"), at(o, 1, "4 n 7")]),
            axis(5, [*rows("q", "12 n"), *rows("k", "4 n")]),
            axis(7, [*rows("v", "4 n"), at(o, 1, "12 n")]),
            axis(22, whole(*affine(f"{m}.gate", f"{m}.up"), f"{m}.down.weight:1")),
        ]
    return [axis(18, whole(*residual), norms=("norm", *norms)), *groups]


def torch_encoder() -> list[Axis]:
    """Post-norm blocks on packed projections: 4 heads of 6.

    The packed projection is viewed as ``3 x 4 x 6``: q, k and v keep one head size.
    """
    residual, norms, groups = ["embed.weight:1", "head.weight:1"], [], []
    for i in (0, 1):
        layer = f"encoder.layers.{i}"
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
        residual += affine(f"{layer}.self_attn.out_proj", f"{layer}.linear2", *norms[-2:])
        residual += [f"{layer}.self_attn.in_proj_weight:1", f"{layer}.linear1.weight:1"]

        def packed(layout: str, *starts: int, layer: str = layer) -> list:
            names = [f"{layer}.self_attn.in_proj_{t}" for t in ("weight", "bias")]
            return [at(name, 0, layout, start=start) for name in names for start in starts]

        o = f"{layer}.self_attn.out_proj.weight"
        groups += [
            axis(4, [*packed("n 6", 0, 24, 48), at(o, 1, "n 6")]),
            axis(6, [*packed("4 n", 0, 24, 48), at(o, 1, "4 n")]),
            axis(22, whole(*affine(f"{layer}.linear1"), f"{layer}.linear2.weight:1")),
        ]
    return [axis(24, whole(*residual), norms=tuple(norms)), *groups]


def fused() -> list[Axis]:
    def rows(layout: str, *starts: int) -> list[tuple[str, int, str, int]]:
        return [at(f"qkv.{t}", 0, layout, start=s) for t in ("weight", "bias") for s in starts]

    return [
        axis(18, whole("embed.weight:1", *affine("norm1", "norm2", "o", "down"), "qkv.weight:1",
                       "gate_up.weight:1", "head.weight:1"), norms=("norm1", "norm2")),
        axis(4, [*rows("n 6", 0, 24, 48), at("o.weight", 1, "n 6")]),
        axis(6, [*rows("4 n", 0, 24, 48), at("o.weight", 1, "4 n")]),  # viewed as 3 x 4 x 6
        axis(22, [*(at(f"gate_up.{t}", 0, start=s) for t in ("weight", "bias") for s in (0, 22)),
                  at("down.weight", 1)]),
    ]  # fmt: skip


def recurrent(gates: int) -> list[Axis]:
    def cell(path: str, hidden: str, suffix: str = "") -> list[tuple[str, int, str, int]]:
        rows = [at(f"{path}.{t}_l0{suffix}", 0, hidden)
                for t in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip
        return [*rows, at(f"{path}.weight_hh_l0{suffix}", 1)]

    return [
        axis(10, whole("embed.weight:1", "first.weight_ih_l0:1")),
        axis(14, [*cell("first", f"{gates} n"),
                  *whole("second.weight_ih_l0:1", "second.weight_ih_l0_reverse:1")]),
        # Both directions keep their states in one tensor, so they keep one hidden size.
        axis(12, [*cell("second", f"{gates} n"), *cell("second", f"{gates} n", "_reverse"),
                  at("head.weight", 1), at("head.weight", 1, start=12)]),
    ]  # fmt: skip


EXPECTED: Mapping[str, Callable[[], list[Axis]]] = {
    "resnet": resnet,
    "mobilenet_v2": mobilenet,
    "flattened": flattened,
    "densenet": densenet,
    "group_norm": group_norm,
    "shufflenet_v1": shuffle,
    "decoder": decoder,
    "tied": lambda: decoder(tied=True),
    "repeated": lambda: decoder((0,)),
    "torch_encoder": torch_encoder,
    "fused": fused,
    "lstm": lambda: recurrent(4),
    "gru": lambda: recurrent(3),
    "twice": lambda: [axis(10, whole(*affine("inp", "again"), "again.weight:1", "out.weight:1"))],
}
