"""The eighteen behaviours that users of such a trace know, with the exact symbols expected."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bittern.tracing.symbolic import Analyzer, RobustTracer, analyze_symbols, match_dims

from .helpers import check_widths, followers, searchable


class Chain(nn.Module):
    """Runs a function of its own modules."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding="same", **options)


IMAGE = torch.randn(2, 3, 8, 8)


def test_each_output_of_a_linear_chain_is_tied_to_the_next_input():
    sizes = (3, 8, 16, 16, 16, 1)
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])
    symbols = analyze_symbols(model)
    assert followers(symbols) == {f"{i}.out_features": {f"{i + 1}.in_features"} for i in range(4)}
    assert symbols.get_symbol(model[4], "out_features").is_constant
    assert check_widths(model, symbols, torch.randn(2, 3)) == 4


def test_a_residual_addition_makes_one_width():
    model = Chain(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 4))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"a.out_channels": {"b.out_channels", "c.in_channels"}}
    assert check_widths(model, symbols, IMAGE) == 1


def _tangled(m, x, add):
    out0 = m.c0(x)
    out1 = m.c1(x)
    out2 = m.c2(x)
    out3 = m.c3(x)
    a = add(out2, out3)
    b = add(out1, out2)
    c = add(out0, out3)
    return m.end(a + b + c)


def _add_out(a, b):
    out = torch.empty_like(a)
    torch.add(a, b, out=out)
    return out


@pytest.mark.parametrize(
    "add",
    [lambda a, b: a + b, torch.add, _add_out, lambda a, b: a.clone().add_(b)],
    ids=["operator", "function", "out", "in place"],
)
def test_several_additions_all_merge_onto_the_first_layer(add):
    modules = {f"c{i}": conv(3, 8) for i in range(4)}
    model = Chain(lambda m, x: _tangled(m, x, add), **modules, end=conv(8, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "c0.out_channels": {*(f"c{i}.out_channels" for i in (1, 2, 3)), "end.in_channels"}
    }
    assert check_widths(model, symbols, IMAGE) == 1


def test_a_sum_over_everything_makes_all_that_are_tied_constant():
    modules = {f"c{i}": conv(3, 8) for i in range(4)}
    model = Chain(lambda m, x: _tangled(m, x, torch.add) + m.c1(x).sum(), **modules, end=conv(8, 2))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "sum" in symbols.get_symbol(model.c0, "out_channels").reason


def test_a_slice_of_the_channels_is_a_boundary():
    model = Chain(lambda m, x: m.b(m.a(x)[:, :8, :-1, :-1]), a=conv(3, 16), b=conv(8, 16))
    symbols = analyze_symbols(model)
    names = {name for name, _ in symbols.named_symbols(searchable=True)}
    assert names == {"a.kernel_size", "b.kernel_size"}
    assert "takes a part of the width" in symbols.get_symbol(model.a, "out_channels").reason


def test_two_layers_added_in_both_orders_are_tied_once():
    model = Chain(
        lambda m, x: m.c((p := m.a(x)) + (q := m.b(x))) + m.c(q - p),
        a=conv(3, 8),
        b=conv(3, 8),
        c=conv(8, 4),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"a.out_channels": {"b.out_channels", "c.in_channels"}}


def test_a_block_that_is_called_twice_ties_both_of_its_producers():
    block = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))
    model = Chain(
        lambda m, x: m.end(m.block(m.a(x)) * m.block(m.b(x))),
        a=conv(3, 8),
        b=conv(3, 8),
        block=block,
        end=conv(8, 1),
    )
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "a.out_channels": {"b.out_channels", "block.0.in_channels"},
        "block.0.out_channels": {"block.1.num_features", "end.in_channels"},
    }
    assert check_widths(model, symbols, IMAGE) == 2


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True)])
def test_a_norm_follows_the_convolution(norm):
    model = nn.Sequential(conv(3, 8), norm(8), conv(8, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"0.out_channels": {"1.num_features", "2.in_channels"}}
    assert check_widths(model, symbols, IMAGE) == 1


def test_a_group_norm_keeps_the_order_of_the_channels():
    model = nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"0.out_channels": {"1.num_channels", "2.in_channels"}}
    assert not symbols.get_symbol(model[0], "out_channels").is_sortable


@pytest.mark.parametrize(("groups", "sortable"), [(8, True), (4, False)])
def test_the_output_of_a_grouped_convolution_follows_its_input(groups, sortable):
    model = nn.Sequential(conv(3, 8), conv(8, 8, groups=groups), conv(8, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "0.out_channels": {"1.in_channels", "1.out_channels", "2.in_channels"}
    }
    assert symbols.get_symbol(model[0], "out_channels").is_sortable is sortable
    assert check_widths(model, symbols, IMAGE) == sortable


def test_a_grouped_convolution_that_widens_is_a_boundary():
    model = nn.Sequential(conv(3, 8), conv(8, 16, groups=4), conv(16, 2))
    symbols = analyze_symbols(model)
    assert searchable(symbols) == set()
    assert "4 groups from 8 to 16" in symbols.get_symbol(model[0], "out_channels").reason


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(conv(8, 8), conv(8, 8))

    def forward(self, x):
        x = self.inside(x)
        return x * 2 if x.sum() > 0 else x


def test_a_module_with_data_dependent_branches_is_a_barrier_and_its_children_are_analysed():
    model = nn.Sequential(conv(3, 8), conv(8, 8), Branching(), conv(8, 8), conv(8, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {
        "0.out_channels": {"1.in_channels"},
        "2.inside.0.out_channels": {"2.inside.1.in_channels"},
        "3.out_channels": {"4.in_channels"},
    }
    assert check_widths(model, symbols, IMAGE) == 3


def test_a_module_that_is_never_called_is_constant_and_named_in_a_warning():
    model = Chain(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=conv(8, 2), unused=conv(3, 8))
    with pytest.warns(UserWarning, match="never called.*unused"):
        symbols = analyze_symbols(model)
    assert searchable(symbols) == {"a.out_channels"}
    assert symbols.get_symbol(model.unused, "in_channels").reason == "unused is never called"
    assert symbols.get_symbol(model.unused, "kernel_size").is_searchable


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 2)

    def forward(self, x, flag=False, mask=None):
        if flag or mask is not None:
            return self.b(self.a(x).flatten())
        return self.b(self.a(x))


def test_an_argument_with_a_default_has_it():
    assert searchable(analyze_symbols(Flagged())) == {"a.out_channels"}
    assert searchable(analyze_symbols(Flagged(), {"flag": True})) == set()


def test_what_reads_a_concatenation_is_searchable_as_long_as_a_part_is():
    model = Chain(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 8), c=conv(12, 2)
    )
    symbols = analyze_symbols(model)
    a, b = (symbols.get_symbol(module, "out_channels") for module in (model.a, model.b))
    reads = symbols.get_symbol(model.c, "in_channels")
    assert reads.parts == (a, b)
    assert check_widths(model, symbols, IMAGE) == 2
    a.disable()
    assert reads.is_searchable
    b.disable()
    assert reads.is_constant


def test_outputs_that_are_concatenated_and_added_are_tied_and_leave_nothing_in_the_model():
    model = Chain(
        lambda m, x: m.c(torch.cat([o1 := m.a(x), o2 := m.b(x)], 1)) + m.d(o1 + o2),
        a=conv(3, 8),
        b=conv(3, 8),
        c=conv(16, 4),
        d=conv(8, 4),
    )
    symbols = analyze_symbols(model)
    assert len(symbols) == 4
    assert [name for name, _ in model.named_children()] == ["a", "b", "c", "d"]
    root = symbols.get_symbol(model.a, "out_channels")
    assert symbols.get_symbol(model.c, "in_channels").parts == (root, root)
    assert followers(symbols)["a.out_channels"] == {
        "b.out_channels",
        "c.in_channels",
        "d.in_channels",
    }
    assert check_widths(model, symbols, IMAGE) == 1


class Residual(nn.Module):
    def __init__(self, width, cache=None):
        super().__init__()
        self.lin, self.norm, self.cache = nn.Linear(width, width), nn.LayerNorm(width), cache

    def forward(self, x):
        x = x + F.relu(self.norm(self.lin(x)))
        if self.cache is not None:
            self.cache[id(self)] = x
        return x


def _depth(model):
    return analyze_symbols(model).get_symbol(model.get_submodule("1"), "depth")


def test_residual_blocks_of_a_sequential_can_be_left_out():
    blocks = nn.Sequential(*[Residual(4) for _ in range(5)])
    model = nn.Sequential(nn.Linear(4, 4), blocks, nn.Linear(4, 1))
    assert _depth(model).skippable == (0, 1, 2, 3, 4)
    assert _depth(model).min_depth == 0


def test_plain_layers_of_a_sequential_cannot_be_left_out():
    blocks = nn.Sequential(Residual(4), nn.Linear(4, 4), Residual(4), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), blocks, nn.Linear(4, 1))
    assert _depth(model).skippable == (0, 2)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 1))
    assert _depth(plain).is_constant


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = {}
        self.add_module("1", nn.Sequential(*[Residual(4, self.cache) for _ in range(4)]))

    def forward(self, x):
        self.cache.clear()
        blocks = self.get_submodule("1")
        x = blocks(x)
        for i in (0, 1, 3):
            x = x + self.cache[id(blocks[i])]
        return x


def test_a_block_whose_absence_raises_cannot_be_left_out():
    model = Remembering()
    assert _depth(model).skippable == (2,)
    assert model.cache == {}


def test_a_block_that_is_read_into_from_outside_cannot_be_left_out():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("1", nn.Sequential(*[Residual(4) for _ in range(4)]))

        def forward(self, x):
            blocks = self.get_submodule("1")
            return blocks(x) + blocks[1](x) + blocks[0].lin(x) + blocks[2].lin(x)

    assert _depth(Reading()).skippable == (1, 3)


def test_batch_norm_takes_a_linear_of_the_same_size():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"0.out_features": {"1.num_features", "2.in_features"}}
    assert check_widths(model, symbols, torch.randn(4, 3)) == 1


def test_batch_norm_over_another_dimension_of_a_linear_is_a_boundary():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(5), nn.Linear(8, 2))
    model(torch.randn(4, 5, 3))
    assert searchable(analyze_symbols(model)) == set()


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        Chain(lambda m, x: F.max_pool2d(x, 2)),
        Chain(lambda m, x: F.adaptive_avg_pool2d(x, (2, 2))),
        Chain(lambda m, x: F.pad(F.interpolate(x, scale_factor=2), (1, 1))),
    ],
)
def test_pooling_beside_the_width_passes(pool):
    model = Chain(lambda m, x: m.b(m.pool(m.a(x))), a=conv(3, 8), pool=pool, b=conv(8, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"a.out_channels": {"b.in_channels"}}
    assert check_widths(model, symbols, IMAGE) == 1


def test_pooling_over_the_width_is_a_boundary():
    model = nn.Sequential(nn.Linear(3, 4), nn.AvgPool2d(2), nn.Linear(2, 4))
    assert searchable(analyze_symbols(model)) == set()


def _read_sizes(m, x):
    y = m.a(x)
    _ = y.shape[0], y.size(), y.size()[2:], y.shape[-1], y.dtype, y.device, y.shape[:1]
    return m.b(y + y.mean(dim=(2, 3), keepdim=True))


def test_reading_other_sizes_and_averaging_over_other_dimensions_passes():
    model = Chain(_read_sizes, a=conv(3, 8), b=conv(8, 2))
    symbols = analyze_symbols(model)
    assert followers(symbols) == {"a.out_channels": {"b.in_channels"}}
    assert check_widths(model, symbols, IMAGE) == 1


@pytest.mark.parametrize(
    "use",
    [lambda y: y / y.shape[1], lambda y: y - y.mean(1, keepdim=True), lambda y: y * y.size(1)],
)
def test_computing_with_the_width_or_averaging_over_it_is_a_boundary(use):
    model = Chain(lambda m, x: m.b(use(m.a(x))), a=conv(3, 8), b=conv(8, 2))
    assert searchable(analyze_symbols(model)) == set()


class SameForward(nn.Conv2d):
    pass


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_subclass_is_known_if_its_forward_is_the_same():
    model = nn.Sequential(SameForward(3, 8, 1), SameForward(8, 2, 1))
    assert searchable(analyze_symbols(model)) == {"0.out_channels"}
    model = nn.Sequential(OwnForward(3, 8, 1), nn.Conv2d(8, 2, 1))
    symbols = analyze_symbols(model)
    assert model[0] not in symbols
    assert "overrides forward" in symbols.left_out["0"]
    assert "0" in symbols.get_symbol(model[1], "in_channels").reason


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([{0, 1}], [{0}], {0: 0}),
        ([{0, 1}], [{2}], {}),
        ([{0, 1}, {2, 3}], [{2, 3}], {}),
        ([{0, 1}, {2, 3}], [{2, 3}, {1, 3}], {0: 1, 1: 0}),
        ([{0, 1}, {2, 3}], [{1, 2, 3}, {1, 3}], {0: 0, 1: 1}),
        ([{0, 1}, {2, 3}], [{0, 2}, {1, 3}], {0: 0, 1: 1}),
        ([{0, 1}, {2, 3}], [{4, 5}, {1, 3}], {}),
        ([{0, 9}, {2, 3}, {5, 6}], [{4, 5}, {1, 3}, {6}], {}),
    ],
)
def test_dimensions_are_paired_by_their_names(left, right, expected):
    assert match_dims(left, right) == expected


def test_a_failing_module_is_one_node_of_the_trace_around_it():
    graph = RobustTracer().trace(nn.Sequential(Branching()), {"input": torch.randn(1, 8, 4, 4)})
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_the_analyzer_names_the_symbols_of_a_module_and_every_reason():
    model = nn.Sequential(conv(3, 8), conv(8, 2))
    analyzer = Analyzer(model)
    assert {n for n, _ in analyzer.named_cross_layer_symbols(model[0])} == {
        "in_channels",
        "out_channels",
    }
    assert [n for n, _ in analyzer.named_searchable_out_symbols(model[0])] == ["out_channels"]
    assert list(analyzer.named_dangling_symbols(model[0])) == []
    assert analyzer.reasons == {
        "depth": "no block only adds to what goes in",
        "0.in_channels": "0 (Conv2d) reads the input `input`",
        "1.out_channels": "the model returns it",
    }
