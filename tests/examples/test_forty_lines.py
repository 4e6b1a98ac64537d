"""The tutorial for plugin authors: it is short, and its test suite notices a mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = "docs/plugin-authors/forty-lines.md"
QUANTIZED = "src/bittern_egret/quantized.py"


@pytest.fixture
def plugin(root: Path, tmp_path: Path, open_page: Callable[[Path], Any]) -> Any:
    """The tutorial, followed to its end: files, and the installed distribution."""
    with open_page(root / PAGE) as session:
        session.run()
    assert (tmp_path / QUANTIZED).exists()
    return session


def test_it_is_40_lines(root: Path, read_blocks: Callable[[Path], Any]) -> None:
    files = {b.file: b.text for b in read_blocks(root / PAGE) if b.file}
    code = [files["src/bittern_egret/hooks.py"], files[QUANTIZED]]
    assert 25 <= sum(len(text.splitlines()) for text in code) <= 40


def test_the_kit_notices_a_forgotten_bias(plugin: Any) -> None:
    """The tutorial tells its reader to try this."""
    file = plugin.folder / QUANTIZED
    source = file.read_text(encoding="utf-8")
    assert " + self.bias" in source
    file.write_text(source.replace(" + self.bias", ""), encoding="utf-8")

    done = plugin.pytest("-k", "computes_the_original or gradients_reach")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_gradients_reach_weights_and_inputs" in done.stdout
