from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bittern.cli.context import App
from bittern_huggingface.demo.command import DEMO, demo

LIMIT = 4_000_000


def test_the_shipped_model_is_small_and_its_texts_are_licensed() -> None:
    files = [f for f in DEMO.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert sum(f.stat().st_size for f in files) <= LIMIT
    assert "PSF" in (DEMO / "LICENSE.txt").read_text(encoding="utf-8")


def test_the_demo_reloads_what_it_writes(tmp_path: Path) -> None:
    arguments = ["--recipe", "int4", "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(demo, arguments, obj=App(), catch_exceptions=False)
    (row,) = json.loads(result.stdout)["recipes"]
    assert row["perplexity_reloaded"] == pytest.approx(row["perplexity_after"], rel=1e-4)
    assert 1 < row["perplexity_after"] / row["perplexity_before"] < 1.2
    assert row["bytes_after"] < row["bytes_before"]
    assert (tmp_path / "out" / "int4" / "config.json").is_file()
