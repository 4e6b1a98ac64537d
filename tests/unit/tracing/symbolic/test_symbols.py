"""The four states of a symbol, concatenations, and the map of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bittern.tracing.symbolic import Layout, Symbol, SymDepth, SymInfo, SymMap, index_map


def incoming(**options):
    return Symbol(cl_type=Symbol.CLType.INCOMING, elastic_dims={1}, **options)


def outgoing(**options):
    return Symbol(is_searchable=True, cl_type=Symbol.CLType.OUTGOING, elastic_dims={1}, **options)


STATES = ("is_free", "is_searchable", "is_dynamic", "is_constant")


def state(symbol):
    (found,) = [name for name in STATES if getattr(symbol, name)]
    return found


def test_a_symbol_is_in_one_state():
    out, read, other = outgoing(), incoming(), incoming()
    assert (state(out), state(read)) == ("is_searchable", "is_free")
    assert read.is_dangling
    assert not out.is_dangling
    read.link_to(out)
    other.link_to(read)
    assert state(read) == "is_dynamic"
    assert read.parent is out
    assert other.root is out
    read.disable("because")
    assert [state(symbol) for symbol in (out, read, other)] == ["is_constant"] * 3
    assert other.reason == "because"
    assert other.parent is None


def test_a_bound_symbol_cannot_be_linked():
    out, read = outgoing(), incoming()
    read.link_to(out)
    with pytest.raises(ValueError, match="bound"):
        read.link_to(outgoing())
    with pytest.raises(ValueError, match="circular"):
        out.link_to(read)
    out.disable()
    with pytest.raises(ValueError, match="bound"):
        out.link_to(outgoing())


def test_what_is_linked_to_a_constant_is_constant():
    out, read = outgoing(), incoming()
    out.disable("because")
    read.link_to(out)
    assert read.reason == "because"


def test_the_order_is_free_only_if_it_is_for_all_that_are_tied():
    out = outgoing()
    incoming().link_to(out)
    assert out.is_sortable
    incoming(is_sortable=False).link_to(out)
    assert not out.is_sortable


def test_a_concatenation_is_searchable_as_long_as_a_part_is():
    a, b, both = outgoing(), outgoing(), incoming()
    both.concatenate([a, b])
    assert state(both) == "is_searchable"
    a.disable()
    assert state(both) == "is_searchable"
    b.disable("because")
    assert state(both) == "is_constant"
    with pytest.raises(ValueError, match="bound"):
        both.concatenate([a])


def test_a_concatenation_of_concatenations_is_one():
    a, b, c, inner, outer = (outgoing() for _ in range(5))
    outer.concatenate([inner, c, a])
    inner.concatenate([a, b])
    assert outer.parts == (a, b, c, a)
    with pytest.raises(ValueError, match="part of itself"):
        a.concatenate([outer])
    outer.disable()
    assert all(symbol.is_constant for symbol in (a, b, c, inner))


def test_a_concatenation_that_keeps_its_order_fixes_that_of_its_parts():
    a = outgoing()
    incoming(is_sortable=False).concatenate([a, a])
    assert not a.is_sortable


@pytest.mark.parametrize(
    "options", [{"elastic_dims": {1}}, {"cl_type": Symbol.CLType.INCOMING, "elastic_dims": ()}]
)
def test_dimensions_belong_to_symbols_that_others_meet(options):
    with pytest.raises(ValueError, match="elastic_dims"):
        Symbol(**options)


def test_a_depth_follows_nothing_and_loses_its_blocks_when_disabled():
    depth = SymDepth(max_depth=4)
    depth.skippable = [2, 1]
    assert (depth.skippable, depth.min_depth) == ((1, 2), 2)
    with pytest.raises(ValueError, match="depth"):
        depth.link_to(outgoing())
    depth.disable()
    assert (depth.skippable, depth.min_depth) == ((), 4)


def test_the_index_map_says_which_positions_a_coordinate_has():
    a, b, read = outgoing(size=2), outgoing(size=1), incoming(size=8)
    read.concatenate([a, b, a])
    maps = index_map(read)
    assert maps[a].tolist() == [[0, 3], [1, 4]]
    assert maps[b].tolist() == [[2]]
    inner, outer = incoming(size=6), incoming(size=6)
    inner.link_to(a)
    inner.layout = Layout("inner", 3)
    assert index_map(inner)[a].tolist() == [[0, 1, 2], [3, 4, 5]]
    outer.link_to(a)
    outer.layout = Layout("outer", 3)
    assert index_map(outer)[a].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert torch.equal(index_map(a)[a], torch.tensor([[0], [1]]))


def test_the_map_of_a_model_is_looked_up_by_module_and_can_be_edited():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3))
    symbols = SymMap(model)
    assert len(symbols) == 4
    assert model[1] not in symbols
    assert dict(symbols.named_modules()) == {
        "": model,
        **{str(i): model[i] for i in (0, 2, 3)},
    }
    assert len(list(symbols.named_symbols())) == 10
    assert {n for n, _ in symbols.named_symbols(free=True)} == {
        f"{i}.in_channels" for i in (0, 2, 3)
    }
    symbols.pop(model[0])
    for symbol in symbols[model[2]].values():
        symbol.disable()
    symbols.prune()
    assert list(symbols) == [model, model[3]]
    symbols.add_sym_info(model[1], SymInfo(inplace=Symbol()))
    assert symbols.get_symbol(model[1], "inplace").is_free
    assert "1: SymInfo" in repr(symbols)


def test_a_module_speaks_for_what_is_inside_it():
    model = nn.ModuleList([nn.MultiheadAttention(4, 2)])
    assert [name for name, _ in SymMap(model).named_modules()] == ["0"]
