"""Every layer of torch with a channel or feature dimension has its symbols."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from bittern.registry import resolve, target_of
from bittern.tracing.symbolic import SYMBOL_RULES, Symbol, SymInfo, SymMap, analyze_symbols

from .helpers import check_widths, followers, searchable
from .test_acceptance import Chain


def widths(module):
    """Names of the symbols with their kinds and dimensions."""
    return {
        name: (symbol.cl_type.name.lower(), set(symbol.elastic_dims), symbol.size)
        for name, symbol in SymMap(module)[module].items()
        if symbol.is_cross_layer
    }


@pytest.mark.parametrize("rule", SYMBOL_RULES, ids=lambda rule: rule.target.rpartition(":")[2])
def test_every_rule_names_a_class_and_a_function(rule):
    assert target_of(resolve(rule.target)) == rule.target
    assert callable(resolve(rule.symbols))


def conv_widths(rank):
    dims = {1, -1 - rank}
    return {"in_channels": ("incoming", dims, 4), "out_channels": ("outgoing", dims, 6)}


LAYERS = [
    (
        nn.Linear(4, 6),
        {"in_features": ("incoming", {-1}, 4), "out_features": ("outgoing", {-1}, 6)},
    ),
    (
        nn.Bilinear(4, 5, 6),
        {
            "in1_features": ("incoming", {-1}, 4),
            "in2_features": ("incoming", {-1}, 5),
            "out_features": ("outgoing", {-1}, 6),
        },
    ),
    *[(getattr(nn, f"Conv{n}d")(4, 6, 3), conv_widths(n)) for n in (1, 2, 3)],
    *[(getattr(nn, f"ConvTranspose{n}d")(4, 6, 3), conv_widths(n)) for n in (1, 2, 3)],
    (nn.BatchNorm1d(4), {"num_features": ("incoming", {1}, 4)}),
    (nn.BatchNorm2d(4), {"num_features": ("incoming", {1, -3}, 4)}),
    (nn.BatchNorm3d(4), {"num_features": ("incoming", {1, -4}, 4)}),
    (nn.SyncBatchNorm(4), {"num_features": ("incoming", {1}, 4)}),
    *[
        (getattr(nn, f"InstanceNorm{n}d")(4), {"num_features": ("incoming", {1, -1 - n}, 4)})
        for n in (1, 2, 3)
    ],
    (nn.GroupNorm(2, 4), {"num_channels": ("incoming", {1}, 4)}),
    (nn.LayerNorm(4), {"num_features": ("incoming", {-1}, 4)}),
    (nn.LayerNorm([3, 4]), {"num_features": ("incoming", {-1}, 4)}),
    (nn.RMSNorm(4), {"num_features": ("incoming", {-1}, 4)}),
    (nn.Embedding(9, 4), {"embedding_dim": ("outgoing", {-1}, 4)}),
    (nn.EmbeddingBag(9, 4), {"embedding_dim": ("outgoing", {1, -1}, 4)}),
    (nn.PReLU(4), {"num_parameters": ("incoming", {1}, 4)}),
    *[
        (
            layer(4, 6),
            {
                "input_size": ("incoming", {-1}, 4),
                "state": ("incoming", {-1}, 6),
                "hidden_size": ("outgoing", {-1}, 6),
            },
        )
        for layer in (nn.RNN, nn.LSTM, nn.GRU)
    ],
    (
        nn.MultiheadAttention(4, 2, kdim=5, vdim=6),
        {
            "embed_dim": ("incoming", {-1}, 4),
            "kdim": ("incoming", {-1}, 5),
            "vdim": ("incoming", {-1}, 6),
            "out_dim": ("outgoing", {-1}, 4),
        },
    ),
]


@pytest.mark.parametrize(("layer", "expected"), LAYERS, ids=lambda v: type(v).__name__)
def test_a_layer_has_its_widths(layer, expected):
    assert widths(layer) == expected


def test_one_parameter_for_all_channels_is_no_width():
    model = nn.Sequential(nn.Linear(2, 4), nn.PReLU(), nn.Linear(4, 2))
    assert followers(analyze_symbols(model)) == {"0.out_features": {"2.in_features"}}


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.PReLU(6), nn.Conv1d(6, 2, 1)],
        [nn.Conv1d(3, 6, 3), nn.GroupNorm(1, 6), nn.ConvTranspose1d(6, 4, 3), nn.Conv1d(4, 2, 1)],
        [nn.ConvTranspose1d(3, 6, 3), nn.ConvTranspose1d(6, 6, 3, groups=6), nn.Conv1d(6, 2, 1)],
        [nn.Linear(8, 6), nn.PReLU(3), nn.RMSNorm(6), nn.Linear(6, 2)],
    ],
)
def test_channels_of_a_chain_can_be_reordered(layers):
    model = nn.Sequential(*layers)
    symbols = analyze_symbols(model)
    expected = sum(isinstance(la, nn.Linear) or "Conv" in type(la).__name__ for la in layers) - 1
    if "groups=6" in repr(model):
        expected -= 1
    if isinstance(layers[1], nn.PReLU) and layers[1].num_parameters == 3:
        expected = 0  # its parameters are for dimension 1 of three
    assert check_widths(model, symbols, torch.randn(2, 3, 8)) == expected


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2}, {"bidirectional": True, "num_layers": 2}],
    ids=["plain", "two layers", "both directions"],
)
def test_the_hidden_size_of_a_recurrent_layer_can_be_reordered(layer, options):
    factor = 2 if options.get("bidirectional") else 1
    model = Chain(
        lambda m, x: m.head(m.rnn(m.embed(x))[0]),
        embed=nn.Embedding(11, 4),
        rnn=layer(4, 6, **options),
        head=nn.Linear(6 * factor, 3),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "embed.embedding_dim": {"rnn.input_size"},
        "rnn.hidden_size": {"rnn.state", "head.in_features"},
    }
    assert check_widths(model, symbols, torch.tensor([[1, 2], [3, 4]])) == 2


def test_a_projected_lstm_has_two_widths():
    model = Chain(
        lambda m, x: m.head(m.rnn(x)[0]),
        rnn=nn.LSTM(4, 6, num_layers=2, proj_size=5),
        head=nn.Linear(5, 3),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"rnn.proj_size": {"rnn.state", "head.in_features"}}
    assert symbols.get_symbol(model.rnn, "hidden_size").is_searchable
    assert check_widths(model, symbols, torch.randn(3, 2, 4)) == 1


def test_the_last_state_of_a_recurrent_layer_holds_its_width_somewhere():
    def run(m, x):
        out, (hidden, _) = m.rnn(x)
        return m.head(out) + m.tail(hidden)

    model = Chain(run, rnn=nn.LSTM(4, 6), head=nn.Linear(6, 3), tail=nn.Linear(6, 3))
    assert searchable(analyze_symbols(model)) == set()
    model.function = lambda m, x: m.head(m.rnn(x)[0])
    with pytest.warns(UserWarning, match="tail"):
        assert searchable(analyze_symbols(model)) == {"rnn.hidden_size"}


def test_self_attention_joins_the_residual_stream_and_keeps_its_order():
    def run(m, x):
        x = m.embed(x)
        x = x + m.attention(h := m.norm(x), h, h, need_weights=False)[0]
        return m.head(x)

    model = Chain(
        run,
        embed=nn.Embedding(11, 8),
        norm=nn.LayerNorm(8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 3),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "embed.embedding_dim": {
            "norm.num_features",
            *(f"attention.{name}" for name in ("embed_dim", "kdim", "vdim", "out_dim")),
            "head.in_features",
        }
    }
    assert not symbols.get_symbol(model.embed, "embedding_dim").is_sortable


def test_keys_and_values_of_cross_attention_have_widths_of_their_own():
    model = Chain(
        lambda m, x: m.head(m.attention(m.q(x), key=m.k(x), value=m.v(x))[0]),
        q=nn.Linear(4, 8),
        k=nn.Linear(4, 6),
        v=nn.Linear(4, 10),
        attention=nn.MultiheadAttention(8, 2, kdim=6, vdim=10),
        head=nn.Linear(8, 3),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "q.out_features": {"attention.embed_dim", "attention.out_dim", "head.in_features"},
        "k.out_features": {"attention.kdim"},
        "v.out_features": {"attention.vdim"},
    }
    assert check_widths(model, symbols, torch.randn(3, 2, 4)) == 2


def test_a_bilinear_layer_reads_two_widths():
    model = Chain(
        lambda m, x: m.head(m.both(m.a(x), m.b(x))),
        a=nn.Linear(3, 4),
        b=nn.Linear(3, 5),
        both=nn.Bilinear(4, 5, 6),
        head=nn.Linear(6, 2),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "a.out_features": {"both.in1_features"},
        "b.out_features": {"both.in2_features"},
        "both.out_features": {"head.in_features"},
    }
    assert check_widths(model, symbols, torch.randn(2, 3)) == 3


def test_a_bag_of_embeddings_feeds_a_batch_norm():
    model = nn.Sequential(nn.EmbeddingBag(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"0.embedding_dim": {"1.num_features", "2.in_features"}}
    assert check_widths(model, symbols, torch.tensor([[1, 2], [3, 4]])) == 1


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight.flip(0).flip(0)


def scale_symbols(module):
    return SymInfo(
        is_shape_preserving=True,
        width=Symbol(cl_type=Symbol.CLType.INCOMING, elastic_dims={-1}, tensors={"weight": 0}),
    )


def test_a_plugins_rule_makes_its_module_known():
    from bittern.records import SymbolRule
    from bittern.tracing.symbolic.symmap import builtin_table

    rule = SymbolRule(target=f"{__name__}:Scale", symbols=f"{__name__}:scale_symbols")
    table = builtin_table().extended([(rule, "a plugin", False)])
    model = nn.Sequential(nn.Linear(3, 4), Scale(4), nn.Linear(4, 2))
    assert searchable(analyze_symbols(model)) == set()
    symbols = analyze_symbols(model, rules=table)
    assert followers(symbols) == {"0.out_features": {"1.width", "2.in_features"}}
    assert check_widths(model, symbols, torch.randn(2, 3)) == 1


def test_the_rules_are_read_without_torch():
    code = (
        "import sys; from bittern.tracing.symbolic.rules import SYMBOL_RULES; "
        "print(len(SYMBOL_RULES), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(SYMBOL_RULES)), "False"]
