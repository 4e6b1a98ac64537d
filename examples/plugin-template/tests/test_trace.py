"""What the plugin's rules let a trace find: without them the operator is a barrier."""

from __future__ import annotations

import bittern as bt
import torch

from heron_framework.model import Encoder


def test_widths_are_followed_through_the_frameworks_operator() -> None:
    model = Encoder(width=16, heads=2, depth=1).eval()
    x = torch.randn(2, 6, 16)
    known = bt.trace(model, x, toolkit=bt.Toolkit(plugins=["heron"]))
    unknown = bt.trace(model, x, toolkit=bt.Toolkit(block=["*"]))

    def coupled(trace: bt.Trace) -> set[str]:
        """Return the modules whose dimensions change with the outputs of ``up``."""
        groups = [{m.module for m in group.members} for group in trace.groups]
        return set().union(*(g for g in groups if "blocks.0.up" in g))

    assert coupled(known) == {"blocks.0.up", "blocks.0.down"}
    assert "blocks.0.down" not in coupled(unknown)
    assert not any("swish" in why for why in known.coverage.barriers.values())
    assert any("swish" in why for why in unknown.coverage.barriers.values())


def test_the_attentions_inputs_are_shared() -> None:
    model = Encoder(width=16, heads=2, depth=1).eval()
    trace = bt.trace(model, torch.randn(2, 6, 16), toolkit=bt.Toolkit(plugins=["heron"]))
    names = tuple(f"blocks.0.attention.{part}" for part in ("query", "key", "value"))
    assert names in trace.shared_inputs
