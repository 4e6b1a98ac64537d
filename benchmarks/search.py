"""What a search is worth: its mix of two recipes beside mixes made by hand, of the same size.

    python benchmarks/search.py MODEL CALIB EVAL [--bits 5.5] [--rows N] [--methods gradient,layer]

MODEL is a directory that a plugin loads, CALIB and EVAL are what it reads (.npy, .txt, .jsonl). A
mix by hand gives the larger candidate to the first blocks, the last ones, both ends, the middle, or
to every module of one kind and then the first or last blocks, until the bits are used up; the
smaller one to the rest.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator

from torch import nn

import bittern as bt
from bittern.records import DataConfig
from bittern.runtime import prepare
from bittern.search.candidates import plan_candidates
from bittern.search.cost import Ledger
from bittern.search.groups import DecisionGroup, find_groups
from bittern.search.rules import recipe_of, slots_data

tools = bt.Toolkit()


class ByHand:
    """Makes recipes that spend the bits in an order that somebody might think of."""

    def __init__(self, model: nn.Module, names: list[str], batch: object, bits: float) -> None:
        every = plan_candidates(model, names, tools)
        first = prepare(batch, model, tools.adapter(model), index=0)
        self.groups, _ = find_groups(model, every, every.modules, batch=first, steps=tools)
        self.small, self.large = every.every
        self.bits = bits
        self.ledger = Ledger(model, every, every.modules, dtype=tools.adapter(model).dtype)

    def recipe(self, order: list[DecisionGroup], name: str) -> dict[str, object]:
        """Give the larger candidate to groups in an order, as long as they fit."""
        room = self.bits * sum(map(self.ledger.elements, self.groups))
        room -= sum(self.ledger.cost(group, self.small.name).bits for group in self.groups)
        chosen = {}
        for group in order:
            more = self.ledger.cost(group, self.large.name).bits
            more -= self.ledger.cost(group, self.small.name).bits
            if more <= room:
                room -= more
                chosen[group] = self.large
        said = {
            path: slots_data(chosen.get(group, self.small).entries[path], tools.registry.formats)
            for group in self.groups
            for path in group.members
        }
        return recipe_of(said, name=name, description="", algorithm=["max"])

    def mixes(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Yield what somebody might try."""

        def block(group: DecisionGroup) -> int:
            return int((re.findall(r"\d+", group.name) or ["0"])[0])

        def kind(group: DecisionGroup) -> str:
            return group.name.rpartition(".")[2]

        last = max(map(block, self.groups))
        orders = {
            "first blocks": block,
            "last blocks": lambda g: -block(g),
            "both ends": lambda g: min(block(g), last - block(g)),
            "middle blocks": lambda g: -min(block(g), last - block(g)),
        }
        for name, key in orders.items():
            yield name, self.recipe(sorted(self.groups, key=key), name)
        for wanted in dict.fromkeys(map(kind, self.groups)):
            for rest, sign in (("first", 1), ("last", -1)):
                order = sorted(self.groups, key=lambda g: (kind(g) != wanted, sign * block(g)))
                yield f"every {wanted}, then the {rest} blocks", self.recipe(order, wanted)


def main() -> None:
    """Print one line per mix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("eval")
    parser.add_argument("--candidates", default="nvfp4,fp8")
    parser.add_argument("--bits", type=float, default=5.5)
    parser.add_argument("--methods", default="gradient,kl,layer")
    parser.add_argument("--calib-rows", type=int, default=128)
    parser.add_argument("--score-rows", type=int, default=16)
    parser.add_argument("--rows", type=int, help="evaluation rows; all by default")
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    names = args.candidates.split(",")
    model = tools.load(args.model)
    calibration = list(
        tools.data(args.calib, model, DataConfig(samples=args.calib_rows, batch_size=4))
    )
    held_out = list(tools.data(args.eval, model, DataConfig(samples=args.rows, batch_size=16)))
    plain = tools.evaluate(model, held_out, layers=False).perplexity
    print(f"unquantized: {plain:.4f}", flush=True)
    found = {}

    def line(name: str, recipe: object) -> None:
        fresh = tools.load(args.model)
        bits = tools.quantize(fresh, recipe, calibration).plan.effective_bits
        perplexity = tools.evaluate(fresh, held_out, reference=False, layers=False).perplexity
        found[name] = {"bits": bits, "percent": 100 * (perplexity / plain - 1)}
        print(f"{name}: {bits:.3f} bits, {found[name]['percent']:+.3f} %", flush=True)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:  # noqa: PTH123
                json.dump({"unquantized": plain, "mixes": found}, file, indent=1)

    for method in filter(None, args.methods.split(",")):
        rows = -(-args.score_rows // 4)
        options = {"bits": args.bits, "method": method, "score_batches": rows, "points": 2}
        result = tools.auto_quantize(model, names, calibration, apply=False, **options)
        line(f"search, {method}", result.recipe())
    for name in names:
        line(name, name)
    for name, recipe in ByHand(model, names, calibration[0], args.bits).mixes():
        line(name, recipe)


if __name__ == "__main__":
    main()
