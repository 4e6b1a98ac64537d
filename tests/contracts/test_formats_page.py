"""The page about number formats lists every one of core, with the bits it takes."""

from __future__ import annotations

import re
from pathlib import Path

from bittern.builtin.formats import FORMATS
from bittern.records import QuantizerSpec


def test_every_format_is_listed_with_its_granularity_and_bits(root: Path) -> None:
    page = (root / "docs/reference/formats.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if re.match(r"\| `", line)
    ]
    listed = [(row[0].strip("`"), row[3], row[4]) for row in rows]

    expected = []
    for item in FORMATS:
        granularity = item.weight_granularity
        bits = QuantizerSpec(item, granularity).bits_per_element((4096, 4096))
        words = str(granularity).replace("[", " ").strip("]")
        expected.append((item.name, words, f"{bits:.2f}"))
    assert listed == expected
