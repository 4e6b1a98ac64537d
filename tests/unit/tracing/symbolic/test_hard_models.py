"""Models on which tracers without shapes give up: views, flattening, permutations, sharing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bittern.tracing.symbolic import Layout, analyze_symbols

from .helpers import check_widths, followers, searchable
from .test_acceptance import IMAGE, Chain, conv


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.flatten(2).flatten(1),
    ],
)
def test_flattened_channels_reach_the_linear_as_consecutive_features(flatten):
    model = Chain(
        lambda m, x: m.lin(flatten(F.relu(m.norm(m.a(x))))),
        a=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        lin=nn.Linear(8 * 64, 5),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"a.out_channels": {"norm.num_features", "lin.in_features"}}
    assert symbols.get_symbol(model.lin, "in_features").layout == Layout("inner", 64)
    assert check_widths(model, symbols, IMAGE) == 1


def test_channels_last_reach_the_linear_as_strided_features():
    model = Chain(
        lambda m, x: m.lin(m.a(x).permute(0, 2, 3, 1).flatten(1)),
        a=conv(3, 8),
        lin=nn.Linear(8 * 64, 5),
    )
    symbols = analyze_symbols(model)
    assert symbols.get_symbol(model.lin, "in_features").layout == Layout("outer", 64)
    assert check_widths(model, symbols, IMAGE) == 1


def test_concatenated_channels_stay_apart_when_flattened():
    model = Chain(
        lambda m, x: m.lin(torch.cat([m.a(x), m.b(x), m.a(x)], 1).flatten(1)),
        a=conv(3, 4),
        b=conv(3, 6),
        lin=nn.Linear(14 * 64, 5),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "a.out_channels": {"lin.in_features"},
        "b.out_channels": {"lin.in_features"},
    }
    assert check_widths(model, symbols, IMAGE) == 2


def test_a_norm_after_flattening_follows_too():
    model = nn.Sequential(conv(3, 8), nn.Flatten(), nn.BatchNorm1d(512), nn.Linear(512, 4))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"0.out_channels": {"2.num_features", "3.in_features"}}
    assert check_widths(model, symbols, IMAGE) == 1


@pytest.mark.parametrize(
    ("view", "why"),
    [
        (lambda x: x.view(-1, 512), "where the width goes"),
        (lambda x: x.view(x.size(0), 8, -1).mean(2), "fixes the width to 8"),
        (lambda x: x.flatten(), "both sides"),
        (lambda x: x.flatten(1)[:, ::2], "part of the width"),
        (lambda x: x.view(x.size(0), 2, 4, 8, 8).mean((2, 3, 4)), "fixes the width to 2"),
    ],
)
def test_a_view_that_fixes_or_hides_the_width_is_a_boundary(view, why):
    model = Chain(lambda m, x: m.lin(view(m.a(x))), a=conv(3, 8), lin=nn.Linear(8, 5))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert why in symbols.get_symbol(model.a, "out_channels").reason


def test_a_permutation_to_channels_last_and_back_is_followed():
    def run(m, x):
        x = m.a(x).permute(0, 2, 3, 1)
        x = m.lin2(F.gelu(m.lin1(m.norm(x))))
        return m.b(x.permute(0, 3, 1, 2))

    model = Chain(
        run,
        a=conv(3, 8),
        norm=nn.LayerNorm(8),
        lin1=nn.Linear(8, 16),
        lin2=nn.Linear(16, 6),
        b=conv(6, 2),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "a.out_channels": {"norm.num_features", "lin1.in_features"},
        "lin1.out_features": {"lin2.in_features"},
        "lin2.out_features": {"b.in_channels"},
    }
    assert check_widths(model, symbols, IMAGE) == 3


def test_patches_become_tokens():
    model = Chain(
        lambda m, x: m.head(m.norm(m.patch(x).flatten(2).transpose(1, 2)).mean(1)),
        patch=nn.Conv2d(3, 8, 4, 4),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"patch.out_channels": {"norm.num_features", "head.in_features"}}
    assert check_widths(model, symbols, IMAGE) == 1


def test_a_layer_over_another_dimension_is_a_boundary():
    model = nn.Sequential(conv(3, 8), nn.Linear(8, 8), conv(8, 2))
    model(IMAGE)
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "another dimension" in symbols.get_symbol(model[0], "out_channels").reason


def _shuffle(x, groups):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def test_a_channel_shuffle_is_a_boundary():
    model = Chain(lambda m, x: m.b(_shuffle(m.a(x), 2)), a=conv(3, 8), b=conv(8, 2))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "computes with the width" in symbols.get_symbol(model.a, "out_channels").reason


@pytest.mark.parametrize("kind", ["conv", "linear", "names"])
def test_squeeze_and_excite_is_one_width(kind):
    def run(m, x):
        x = m.a(x)
        if kind == "conv":
            s = m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1))))
        elif kind == "linear":
            s = x.mean((2, 3))
            s = m.up(F.relu(m.down(s)))[:, :, None, None]
        else:
            b, c, _, _ = x.size()
            s = F.adaptive_avg_pool2d(x, 1).view(b, c)
            s = m.up(F.relu(m.down(s))).view(b, c, 1, 1)
        return m.b(x * s.sigmoid())

    layer = conv if kind == "conv" else nn.Linear
    size = {"kernel": 1} if kind == "conv" else {}
    model = Chain(run, a=conv(3, 8), down=layer(8, 4, **size), up=layer(4, 8, **size), b=conv(8, 2))
    symbols = analyze_symbols(model)
    last = "channels" if kind == "conv" else "features"
    assert followers(symbols) == {
        "a.out_channels": {f"down.in_{last}", f"up.out_{last}", "b.in_channels"},
        f"down.out_{last}": {f"up.in_{last}"},
    }
    assert check_widths(model, symbols, IMAGE) == 2


def test_a_single_channel_that_is_repeated_stays_single():
    model = Chain(
        lambda m, x: m.b((y := m.a(x)) * m.gate(y).sigmoid()),
        a=conv(3, 8),
        gate=conv(8, 1),
        b=conv(8, 2),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"a.out_channels": {"gate.in_channels", "b.in_channels"}}
    assert "repeats its one channel" in symbols.get_symbol(model.gate, "out_channels").reason


def test_dense_connections_tie_every_layer_to_all_before_it():
    def run(m, x):
        features = [m.c0(x)]
        for i in (1, 2, 3):
            layer = m.get_submodule(f"c{i}")
            features.append(layer(m.get_submodule(f"n{i}")(torch.cat(features, 1))))
        return m.head(torch.cat(features, 1).mean((2, 3)))

    model = Chain(
        run,
        **{f"c{i}": conv(3 if not i else 4 + 2 * i, 4 if not i else 2) for i in range(4)},
        **{"n1": nn.BatchNorm2d(6)},
        **{"n2": nn.BatchNorm2d(8), "n3": nn.BatchNorm2d(10)},
        head=nn.Linear(10, 3),
    )
    # Right sizes: 4, then 4 + 2, 4 + 2 + 2, ...
    for i, width in ((1, 4), (2, 6), (3, 8)):
        model.add_module(f"c{i}", conv(width, 2))
        model.add_module(f"n{i}", nn.BatchNorm2d(width))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == {f"c{i}.out_channels" for i in range(4)}
    assert len(symbols.get_symbol(model.head, "in_features").parts) == 4
    assert check_widths(model, symbols, IMAGE) == 4


def test_concatenations_that_meet_piece_by_piece_are_tied_piece_by_piece():
    def run(m, x):
        left = torch.cat([m.a(x), m.b(x)], 1)
        return m.end(left + torch.cat([m.c(x), m.d(x)], 1))

    widths = {"a": 4, "b": 6, "c": 4, "d": 6}
    model = Chain(run, **{n: conv(3, w) for n, w in widths.items()}, end=conv(10, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "a.out_channels": {"c.out_channels", "end.in_channels"},
        "b.out_channels": {"d.out_channels", "end.in_channels"},
    }
    assert check_widths(model, symbols, IMAGE) == 2
    model.c, model.d = conv(3, 6), conv(3, 4)
    assert searchable(analyze_symbols(model)) == set()


def test_a_layer_added_to_a_concatenation_becomes_one():
    model = Chain(
        lambda m, x: m.d(m.c(x) + torch.cat([m.a(x), m.b(x)], 1)),
        a=conv(3, 4),
        b=conv(3, 6),
        c=conv(3, 10),
        d=conv(10, 2),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "a.out_channels": {"c.out_channels", "d.in_channels"},
        "b.out_channels": {"c.out_channels", "d.in_channels"},
    }
    assert check_widths(model, symbols, IMAGE) == 2


def test_a_concatenation_with_what_is_no_layer_is_a_boundary():
    model = Chain(lambda m, x: m.b(torch.cat([m.a(x), x], 1)), a=conv(3, 4), b=conv(7, 2))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "concatenates" in symbols.get_symbol(model.a, "out_channels").reason


def test_a_unet_joins_both_ways():
    def run(m, x):
        high = F.relu(m.down1(x))
        low = F.relu(m.down2(F.max_pool2d(high, 2)))
        return m.end(torch.cat([m.up(low), high], 1))

    model = Chain(
        run,
        down1=conv(3, 4),
        down2=conv(4, 8),
        up=nn.ConvTranspose2d(8, 6, 2, 2),
        end=conv(10, 2),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "down1.out_channels": {"down2.in_channels", "end.in_channels"},
        "down2.out_channels": {"up.in_channels"},
        "up.out_channels": {"end.in_channels"},
    }
    assert check_widths(model, symbols, IMAGE) == 3


def test_modules_with_the_same_parameter_have_the_same_widths():
    model = Chain(
        lambda m, x: m.d(F.relu(m.b(F.relu(m.a(x)))) + m.c(x)),
        a=nn.Linear(3, 8),
        b=nn.Linear(8, 8),
        c=nn.Linear(3, 8),
        d=nn.Linear(8, 2),
    )
    model.c.weight = model.a.weight
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "a.out_features": {"c.out_features", "b.in_features", "b.out_features", "d.in_features"}
    }
    assert check_widths(model, symbols, torch.randn(2, 3)) == 1


def test_a_head_tied_to_the_embedding_has_its_width():
    model = Chain(
        lambda m, x: m.head(m.proj(m.embed(x))),
        embed=nn.Embedding(11, 8),
        proj=nn.Linear(8, 8),
        head=nn.Linear(8, 11, bias=False),
    )
    model.head.weight = model.embed.weight
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "embed.embedding_dim": {"proj.in_features", "proj.out_features", "head.in_features"}
    }
    assert check_widths(model, symbols, torch.tensor([[1, 2, 3]])) == 1


class Holding(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x


def test_a_parameter_that_an_unknown_module_has_too_is_constant():
    a = nn.Linear(3, 8)
    model = nn.Sequential(a, Holding(a.weight), nn.Linear(8, 2))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "not all owners" in symbols.get_symbol(a, "out_features").reason


def test_a_module_called_with_different_widths_ties_them():
    model = Chain(
        lambda m, x: m.shared(m.a(x)) + m.shared(m.b(x)),
        a=nn.Linear(3, 8),
        b=nn.Linear(3, 8),
        shared=nn.Linear(8, 4),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"a.out_features": {"b.out_features", "shared.in_features"}}
    assert check_widths(model, symbols, torch.randn(2, 3)) == 1


def test_a_module_also_called_with_the_input_makes_its_producer_constant():
    model = Chain(
        lambda m, x: m.shared(x) + m.shared(m.a(x)), a=nn.Linear(8, 8), shared=nn.Linear(8, 4)
    )
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "the input `x`" in symbols.get_symbol(model.a, "out_features").reason


class LayerScale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return x * self.gamma


def test_a_parameter_that_meets_a_width_has_it():
    model = Chain(
        lambda m, x: m.b(m.scale(m.a(x)) + m.bias),
        a=conv(3, 8),
        scale=LayerScale(8, 1, 1),
        b=conv(8, 2),
    )
    model.bias = nn.Parameter(torch.ones(1, 8, 8, 8))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "a.out_channels": {"scale.gamma_dim0", "bias_dim1", "b.in_channels"}
    }
    assert len(list(symbols.named_symbols(free=True))) == 0
    assert check_widths(model, symbols, IMAGE) == 1


def test_a_parameter_of_another_size_or_place_is_a_boundary():
    model = nn.Sequential(conv(3, 8), LayerScale(8), conv(8, 2))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == {"0.out_channels"}
    assert check_widths(model, symbols, IMAGE) == 1
    model = nn.Sequential(nn.Linear(3, 8), LayerScale(8), nn.AvgPool1d(2), nn.Linear(4, 2))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert not any("gamma" in name for name, _ in symbols.named_symbols())


def test_a_weight_that_is_used_past_its_layer_makes_the_layer_constant():
    model = Chain(
        lambda m, x: F.linear(m.b(m.a(x)), m.c.weight) + m.d(m.c(m.e(x))),
        a=nn.Linear(3, 8),
        b=nn.Linear(8, 4),
        c=nn.Linear(4, 8),
        d=nn.Linear(8, 8),
        e=nn.Linear(3, 4),
    )
    symbols = analyze_symbols(model)
    assert searchable(symbols) == {"a.out_features"}
    assert "`linear`" in symbols.get_symbol(model.c, "in_features").reason


def test_a_penalty_on_a_weight_is_a_boundary():
    model = Chain(lambda m, x: m.b(m.a(x)) + m.a.weight.sum(), a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    assert searchable(analyze_symbols(model)) == set()


def test_pieces_along_another_dimension_keep_the_width():
    model = Chain(
        lambda m, x: m.b(torch.cat(m.a(x).chunk(2, dim=2), dim=3)), a=conv(3, 8), b=conv(8, 2)
    )
    symbols = analyze_symbols(model)
    assert searchable(symbols) == {"a.out_channels"}
    assert check_widths(model, symbols, IMAGE) == 1
    model.function = lambda m, x: m.b(torch.cat(m.a(x).chunk(2, dim=1)[::-1], dim=1))
    assert searchable(analyze_symbols(model)) == set()


def test_the_widths_of_a_gated_mlp_and_its_residual_stream():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gate, self.up = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(8, 16)
            self.down = nn.Linear(16, 8)

        def forward(self, x):
            h = self.norm(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    model = nn.Sequential(nn.Embedding(11, 8), Block(), Block(), nn.RMSNorm(8), nn.Linear(8, 11))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == {
        "0.embedding_dim",
        "1.gate.out_features",
        "2.gate.out_features",
    }
    assert check_widths(model, symbols, torch.tensor([[1, 5, 7]])) == 3


def _tokens(function, **modules):
    return Chain(
        function, embed=nn.Embedding(11, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, 3), **modules
    )


@pytest.mark.parametrize(
    ("function", "followed"),
    [
        (lambda m, x: m.head(m.norm(m.embed(x)).mean(-2)), True),
        (lambda m, x: m.head(m.norm(m.embed(x)).mean(-2, keepdim=True)), True),
        (lambda m, x: m.head(m.norm(m.embed(x)).mean(1)), False),
        (lambda m, x: m.head(m.norm(m.embed(x))[..., :]), True),
        (lambda m, x: m.head(m.norm(m.embed(x))[:, 0]), False),
        (lambda m, x: m.head(m.norm(m.embed(x)).permute(1, 0, 2)), True),
        (lambda m, x: m.head(m.norm(m.embed(x)).transpose(0, 1)), False),
        (lambda m, x: m.head(m.norm(m.embed(x)).transpose(-2, -3)), True),
        (lambda m, x: m.head(m.norm(m.embed(x)).unsqueeze(0)), True),
        (lambda m, x: m.head(torch.stack([m.norm(m.embed(x))])), False),
    ],
)
def test_positions_are_understood_only_if_they_do_not_depend_on_the_rank(function, followed):
    model = _tokens(function)
    symbols = analyze_symbols(model)
    assert searchable(symbols) == ({"embed.embedding_dim"} if followed else set())
    assert check_widths(model, symbols, torch.tensor([[1, 2, 3]])) == followed


def test_unpacking_the_sizes_tells_the_rank():
    def run(m, x):
        x = m.norm(m.embed(x))
        b, t, _ = x.shape
        heads = m.q(x).view(b, t, 2, -1).transpose(1, 2)
        return m.head(x[:, 0] + x.mean(1)) + heads.sum()

    model = _tokens(run, q=nn.Linear(8, 8))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "embed.embedding_dim": {"norm.num_features", "q.in_features", "head.in_features"}
    }
    assert check_widths(model, symbols, torch.tensor([[1, 2, 3]])) == 1


def test_every_operation_that_writes_elsewhere_is_seen():
    def run(m, x):
        y = m.a(x)
        target = torch.empty_like(m.b(x))
        torch.sigmoid(y, out=target)
        return m.end(target)

    model = Chain(run, a=conv(3, 8), b=conv(3, 8), end=conv(8, 2))
    assert followers(analyze_symbols(model)) == {
        "a.out_channels": {"b.out_channels", "end.in_channels"}
    }

    def cat(m, x):
        target = torch.empty_like(m.b(x))
        torch.cat([m.a(x)], 1, out=target)
        return m.end(target)

    model.function = cat
    assert searchable(analyze_symbols(model)) == set()


def test_pooling_that_returns_indices_is_a_boundary():
    model = Chain(
        lambda m, x: m.b(m.pool(m.a(x))[0]),
        a=conv(3, 8),
        pool=nn.MaxPool2d(2, return_indices=True),
        b=conv(8, 2),
    )
    assert searchable(analyze_symbols(model)) == set()


def test_a_module_that_is_reached_past_its_parent_from_an_untraceable_one_is_constant():
    class Reaching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

        def forward(self, x):
            x = self.inside(x) + self.inside[1](x)
            return x if x.sum() > 0 else -x

    model = Reaching()
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "cannot be traced" in symbols.get_symbol(model.inside[1], "in_features").reason


def test_a_depthwise_layer_after_flattening_has_the_channels_in_its_own_tensors():
    model = Chain(
        lambda m, x: m.head(m.deep(m.a(x).flatten(1)[:, :, None]).mean(2)),
        a=conv(3, 4),
        deep=nn.Conv1d(256, 256, 1, groups=256),
        head=nn.Linear(256, 3),
    )
    symbols = analyze_symbols(model)
    assert symbols.get_symbol(model.deep, "out_channels").layout == Layout("inner", 64)
    assert check_widths(model, symbols, IMAGE) == 1


def test_a_width_in_front_of_what_is_averaged_moves_to_the_end():
    model = _tokens(lambda m, x: m.head(m.norm(m.embed(x)).transpose(-1, -2).mean(-1)))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == {"embed.embedding_dim"}
    assert check_widths(model, symbols, torch.tensor([[1, 2, 3]])) == 1


def test_a_layer_that_reads_flattened_and_plain_features_is_a_boundary():
    model = Chain(
        lambda m, x: m.lin(m.a(x).flatten(1)) + m.lin(m.b(x.flatten(1))),
        a=conv(3, 4),
        b=nn.Linear(192, 256),
        lin=nn.Linear(256, 3),
    )
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "differently arranged" in symbols.get_symbol(model.b, "out_features").reason
