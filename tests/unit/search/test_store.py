"""Scores in a file: killed and resumed, refused when something changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bittern as bt
from bittern.errors import OutputError, PlanError
from bittern.search import SearchResult
from bittern.search.store import ScoreFile
from bittern.toolkit import Toolkit

PAUSE = 0.1 if __name__ == "__main__" else 0.0


def loss(output: Tensor, batch: Any) -> Tensor:
    """Take a while, where asked to, so that a search can be killed meanwhile."""
    time.sleep(PAUSE)
    return output.square().sum()


def search(scores: Path) -> SearchResult:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    data = list(torch.randn(80, 16).split(4))
    options: Any = {"bits": 9, "points": 2, "apply": False, "loss": loss, "scores": scores}
    tools = bt.Toolkit(block=["*"])
    return bt.auto_quantize(model, ["int4", "int8"], data, toolkit=tools, **options)


def killed(scores: Path, after: int) -> None:
    """Search in another process and kill it when some batches are behind it."""
    process = subprocess.Popen([sys.executable, __file__, str(scores)])
    try:
        for _ in range(6000):
            if scores.exists() and behind(scores) >= after:
                break
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)


def behind(scores: Path) -> int:
    done = json.loads(scores.read_text())["done"]
    return sum(state["batches"] for state in done.values())


def test_a_search_that_is_killed_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole")
    killed(tmp_path / "parts", after=23)
    assert 23 <= behind(tmp_path / "parts") < 40

    resumed = search(tmp_path / "parts")

    assert resumed == whole
    assert (tmp_path / "whole").read_text() == (tmp_path / "parts").read_text()


def test_a_finished_search_measures_nothing_again(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    calls = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        calls.append(batch)
        return output.square().sum()

    options: Any = {"loss": loss, "scores": tmp_path / "s.json", "points": 2, "apply": False}
    first = toolkit.auto_quantize(make_mlp(), ["int4", "int8"], batches, bits=14, **options)
    seen = len(calls)
    again = toolkit.auto_quantize(make_mlp(), ["int4", "int8"], batches, bits=12, **options)
    assert seen == len(calls) == 6
    assert again.scores == first.scores
    assert again.bits <= 12


@pytest.mark.parametrize("what", ["model", "data", "method", "candidates", "algorithm", "groups"])
def test_another_search_is_refused_and_it_says_what_differs(
    what: str, toolkit: Toolkit, make_mlp: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    model = make_mlp()
    options: Any = {"scores": tmp_path / "s.json", "points": 2, "apply": False, "bits": 20}
    toolkit.auto_quantize(model, ["int4", "int8"], batches, method="layer", **options)
    candidates: Any = ["int4", "int8"]
    method = "layer"
    if what == "model":
        with torch.no_grad():
            model.up.weight[0, 0] += 1
    elif what == "data":
        batches = [batch + 1 for batch in batches]
    elif what == "method":
        method = "kl"
    elif what == "candidates":
        candidates = {"int4": "int4", "int8": "int8-weight-only"}
    elif what == "algorithm":
        options["algorithm"] = "mse"
    else:
        options["exclude"] = ["down"]
    with pytest.raises(PlanError, match=rf"of another search \({what}") as caught:
        toolkit.auto_quantize(model, candidates, batches, method=method, **options)
    assert caught.value.where == str(tmp_path / "s.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": 1}', "nonsense", '{"done": {"a": 1}}'])
def test_a_file_that_holds_no_scores_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(PlanError, match="holds no scores"):
        ScoreFile(tmp_path / "s.json", {})


def test_sums_add_up_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.json"
    file = ScoreFile(path, {"a": 1})
    values = [0.1, 1e-17, 3.3333333333333335, 2.0**-1040]
    for value in values:
        file.add("c", {"g": (value, 2.0)})

    again = ScoreFile(path, {"a": 1})

    assert again.batches("c") == 4
    assert again.sums("c") == {"g": (sum(values), 8.0)}
    assert again.batches("other") == 0


def test_a_file_that_cannot_be_written_is_an_error_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="scores cannot be written"):
        ScoreFile(tmp_path / "file" / "s.json", {}).add("c", {})


if __name__ == "__main__":
    search(Path(sys.argv[1]))
