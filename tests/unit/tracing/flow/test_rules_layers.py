"""Convolutions, norms and recurrent layers: exactly the claims that hold, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracing_flow import Case, case, prove, real

aten = torch.ops.aten

CONVOLUTIONS = [
    case("conv1d", "ab!, cb!, c -> ac!", F.conv1d, real(2, 4, 8), real(6, 4, 3), real(6)),
    case("conv2d", "ab!!, cb!! -> ac!!", F.conv2d, real(2, 4, 8, 8), real(6, 4, 3, 3), padding=1),
    case(
        "conv2d, same",
        "ab!!, cb!! -> ac!!",
        F.conv2d,
        real(2, 4, 8, 8),
        real(6, 4, 3, 3),
        padding="same",
    ),
    case(
        "conv3d",
        "ab!!!, cb!!!, c -> ac!!!",
        F.conv3d,
        real(2, 3, 4, 4, 4),
        real(5, 3, 2, 2, 2),
        real(5),
    ),
    case(
        "conv2d without batch",
        "a!!, ba!!, b -> b!!",
        F.conv2d,
        real(4, 8, 8),
        real(6, 4, 3, 3),
        real(6),
    ),
    case(
        "conv2d, pointwise",
        "ab11, cb!!, c -> ac!!",
        F.conv2d,
        real(2, 4, 1, 1),
        real(6, 4, 1, 1),
        real(6),
    ),
    case(
        "conv2d in groups",
        "a(bc)!!, (bd)c!!, (bd) -> a(bd)!!",
        F.conv2d,
        real(2, 12, 8, 8),
        real(15, 4, 3, 3),
        real(15),
        groups=3,
    ),
    case(
        "conv2d, depthwise",
        "ab!!, b1!!, b -> ab!!",
        F.conv2d,
        real(2, 4, 8, 8),
        real(4, 1, 3, 3),
        real(4),
        groups=4,
    ),
    case(
        "conv2d, multiplied",
        "ab!!, (bc)1!!, (bc) -> a(bc)!!",
        F.conv2d,
        real(2, 4, 8, 8),
        real(12, 1, 3, 3),
        real(12),
        groups=4,
    ),
    case(
        "conv2d of one channel",
        "a1!!, b1!!, b -> ab!!",
        F.conv2d,
        real(2, 1, 8, 8),
        real(6, 1, 3, 3),
        real(6),
    ),
    case(
        "transposed",
        "ab!!, bc!!, c -> ac!!",
        F.conv_transpose2d,
        real(2, 4, 8, 8),
        real(4, 6, 3, 3),
        real(6),
    ),
    case(
        "transposed in groups",
        "a(bc)!, (bc)d!, (bd) -> a(bd)!",
        F.conv_transpose1d,
        real(2, 12, 8),
        real(12, 4, 3),
        real(12),
        groups=3,
    ),
    case(
        "transposed, depthwise",
        "ab!!!, b1!!!, b -> ab!!!",
        F.conv_transpose3d,
        real(2, 4, 3, 3, 3),
        real(4, 1, 2, 2, 2),
        real(4),
        groups=4,
    ),
    case(
        "aten.convolution",
        "ab!, cb!, c -> ac!",
        aten.convolution,
        real(2, 4, 8),
        real(6, 4, 3),
        real(6),
        [1],
        [0],
        [1],
        False,
        [0],
        1,
    ),
    case(
        "aten.convolution, transposed",
        "ab!, bc!, c -> ac!",
        aten.convolution,
        real(2, 4, 8),
        real(4, 6, 3),
        real(6),
        [1],
        [0],
        [1],
        True,
        [0],
        1,
    ),
    case("max_pool", "ab!! -> ab!!", F.max_pool2d, real(2, 3, 8, 8), 2),
    case(
        "max_pool with indices",
        "ab!! -> ab!!, ab!!",
        F.max_pool2d,
        real(2, 3, 8, 8),
        2,
        return_indices=True,
    ),
    case("avg_pool without batch", "a!! -> a!!", F.avg_pool2d, real(3, 8, 8), 2),
    case("adaptive_avg_pool", "ab!! -> ab!!", F.adaptive_avg_pool2d, real(2, 3, 8, 8), 1),
    case("adaptive_max_pool", "ab! -> ab!", F.adaptive_max_pool1d, real(2, 3, 8), 4),
    case("lp_pool", "ab! -> ab!", F.lp_pool1d, real(2, 3, 8), 2.0, 2),
    case("nearest", "ab!! -> ab!!", F.interpolate, real(2, 3, 4, 4), scale_factor=2),
    case(
        "bilinear resize",
        "ab!! -> ab!!",
        F.interpolate,
        real(2, 3, 4, 4),
        size=(6, 6),
        mode="bilinear",
    ),
    case("linear resize", "ab! -> ab!", F.interpolate, real(2, 3, 4), size=6, mode="linear"),
    case(
        "unpool",
        "ab!, ab! -> ab!",
        F.max_unpool1d,
        real(2, 3, 4),
        torch.arange(4).expand(2, 3, 4) * 2,
        2,
    ),
    case("pixel_shuffle", "a(b!!)!! -> ab!!", F.pixel_shuffle, real(2, 12, 3, 3), 2),
    case("pixel_unshuffle", "ab!! -> a(b!!)!!", F.pixel_unshuffle, real(2, 3, 4, 4), 2),
    case("channel_shuffle", "a(bc)de -> a(cb)de", F.channel_shuffle, real(2, 12, 3, 3), 3),
    case("unfold", "ab!! -> a(b!)!", F.unfold, real(2, 3, 6, 6), 2),
    case("fold", "a(b!)! -> ab!!", F.fold, real(2, 12, 9), (4, 4), 2),
    case(
        "grid_sample",
        "ab!!, acd! -> abcd",
        F.grid_sample,
        real(2, 3, 6, 6),
        real(2, 4, 5, 2),
        align_corners=False,
    ),
]

NORMS = [
    case("layer_norm", "ab~, b~, b~ -> ab~", F.layer_norm, real(3, 4), (4,), real(4), real(4)),
    case(
        "layer_norm over two",
        "ab~c~, b~c~ -> ab~c~",
        F.layer_norm,
        real(3, 4, 5),
        (4, 5),
        real(4, 5),
    ),
    case(
        "layer_norm with statistics",
        "ab~ -> ab~, a1, a1",
        aten.native_layer_norm,
        real(3, 4),
        [4],
        None,
        None,
        1e-5,
    ),
    case("rms_norm", "ab~, b~ -> ab~", F.rms_norm, real(3, 4), (4,), real(4)),
    case(
        "group_norm",
        "a(bc~)d~, (bc~), (bc~) -> a(bc~)d~",
        F.group_norm,
        real(2, 12, 5),
        3,
        real(12),
        real(12),
    ),
    case(
        "group_norm of one group", "ab~c~, b~ -> ab~c~", F.group_norm, real(2, 12, 5), 1, real(12)
    ),
    case("group_norm of channels", "abc~, b -> abc~", F.group_norm, real(2, 4, 5), 4, real(4)),
    case(
        "group_norm with statistics",
        "a(bc~)d~, (bc~), (bc~) -> a(bc~)d~, ab, ab",
        aten.native_group_norm,
        real(2, 12, 5),
        real(12),
        real(12),
        2,
        12,
        5,
        3,
        1e-5,
    ),
    case(
        "batch_norm",
        "abc, b, b, b, b -> abc",
        F.batch_norm,
        real(3, 4, 5),
        real(4),
        real(4),
        real(4),
        real(4),
    ),
    case("batch_norm of features", "ab, b, b -> ab", F.batch_norm, real(3, 4), real(4), real(4)),
    case(
        "batch_norm of a batch",
        "a~bc~ -> a~bc~",
        F.batch_norm,
        real(3, 4, 5),
        None,
        None,
        training=True,
    ),
    case(
        "instance_norm",
        "abc~, b, b -> abc~",
        F.instance_norm,
        real(3, 4, 5),
        weight=real(4),
        bias=real(4),
    ),
    case("softmax", "ab~ -> ab~", torch.softmax, real(3, 4), -1),
    case("log_softmax of a number", "() -> ()", torch.log_softmax, real(), 0),
    case("weight_norm", "ab~c~, a11 -> ab~c~", torch._weight_norm, real(3, 4, 5), real(3, 1, 1), 0),
    case("weight_norm of columns", "a~b, 1b -> a~b", torch._weight_norm, real(3, 4), real(1, 4), 1),
    case("normalize", "ab~ -> ab~", F.normalize, real(3, 4)),
    case("local_response_norm", "a!! -> a!!", F.local_response_norm, real(2, 3, 4), 2),
]


def layers(kind: type[nn.RNNBase], size: int = 4, **options: Any) -> Any:
    """Return a function of input and states, and the weights in order."""
    module = kind(3, size, **options).double()
    names = list(dict(module.named_parameters()))

    def run(x: Tensor, states: Any, *weights: Tensor) -> Any:
        return torch.func.functional_call(
            module, dict(zip(names, weights, strict=True)), (x, states)
        )

    weights = [real(*w.shape) - 0.5 for w in module.parameters()]
    return run, weights


def recurrent(
    name: str, claims: str, kind: type[nn.RNNBase], *states: Tensor, **options: Any
) -> Case:
    run, weights = layers(kind, **options)
    given = None if not states else states if len(states) > 1 else states[0]
    return case(name, claims, run, real(5, 2, 3), given, *weights)


def packed(data: Tensor, sizes: Tensor, *weights: Tensor) -> Any:
    state = data.new_zeros(1, 3, 4)
    return torch.lstm(data, sizes, (state, state), weights, True, 1, 0.0, False, False)


def cell(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
    return torch.lstm_cell(x, (h, c), *weights)


RECURRENT = [
    recurrent("rnn", "!ab, cb, cc, c, c -> !ac, !ac", nn.RNN),
    recurrent("rnn without biases", "!ab, cb, cc -> !ac, !ac", nn.RNN, bias=False),
    recurrent(
        "gru of two layers",
        "!ab, (!c)b, (!c)c, (!c), (!c), (!c)c, (!c)c, (!c), (!c) -> !ac, !ac",
        nn.GRU,
        num_layers=2,
    ),
    recurrent(
        "gru with a state", "!ab, 1ac, (!c)b, (!c)c, (!c), (!c) -> !ac, !ac", nn.GRU, real(1, 2, 4)
    ),
    recurrent("lstm", "!ab, (!c)b, (!c)c, (!c), (!c) -> !ac, !ac, !ac", nn.LSTM),
    recurrent(
        "lstm, batch first",
        "a!b, (!c)b, (!c)c, (!c), (!c) -> a!c, !ac, !ac",
        nn.LSTM,
        batch_first=True,
    ),
    recurrent(
        "lstm, bidirectional, two layers",
        "!ab, (!c)b, (!c)c, (!c)b, (!c)c, (!c)(c+c), (!c)c, (!c)(c+c), (!c)c -> !a(c+c), !ac, !ac",
        nn.LSTM,
        num_layers=2,
        bidirectional=True,
        bias=False,
    ),
    recurrent(
        "lstm with states",
        "!ab, 1ac, 1ac, (!c)b, (!c)c, (!c), (!c) -> !ac, !ac, !ac",
        nn.LSTM,
        real(1, 2, 4),
        real(1, 2, 4),
    ),
    recurrent(
        "lstm, projected",
        "!ab, (!c)b, (!c)d, (!c), (!c), dc -> !ad, !ad, !ac",
        nn.LSTM,
        size=5,
        proj_size=4,
    ),
    recurrent(
        "lstm, projected, bidirectional",
        "!ab, (!c)b, (!c)d, dc, (!c)b, (!c)d, dc, (!c)(d+d), (!c)d, dc, (!c)(d+d), (!c)d, dc"
        " -> !a(d+d), !ad, !ac",
        nn.LSTM,
        size=5,
        proj_size=4,
        bidirectional=True,
        num_layers=2,
        bias=False,
    ),
    case(
        "lstm, packed",
        "!a, !, (!b)a, (!b)b, (!b), (!b) -> !b, !!b, !!b",
        packed,
        real(6, 3),
        torch.tensor([3, 2, 1]),
        real(16, 3),
        real(16, 4),
        real(16),
        real(16),
    ),
    case(
        "lstm cell",
        "ab, ac, ad, (d+d+d+d)b, (d+d+d+d)c -> ad, ad",
        cell,
        real(2, 3),
        real(2, 4),
        real(2, 4),
        real(16, 3),
        real(16, 4),
    ),
    case(
        "gru cell",
        "ab, ac, (c+c+c)b, (c+c+c)c, (c+c+c) -> ac",
        torch.gru_cell,
        real(2, 3),
        real(2, 4),
        real(12, 3),
        real(12, 4),
        real(12),
    ),
]

EVERY = [*CONVOLUTIONS, *NORMS, *RECURRENT]


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_exactly_what_holds_is_claimed(one: Case) -> None:
    prove(one)
