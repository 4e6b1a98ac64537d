"""Converted models can be pickled whole, as multiprocessing and torch.save do.

Bittern itself never reads a pickle.
"""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bittern.convert import plan_of, revert
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]

EVERYTHING = {"class": ["Linear", "Embedding", "Conv1d", "LSTM", "MultiheadAttention"]}


def layers() -> nn.Module:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    return nn.Sequential(nn.Embedding(9, 16), encoder, nn.Linear(16, 4)).eval()


@pytest.mark.parametrize("state", ["quantized", "fold", "compress"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_model_is_the_same(protocol: int, state: str, toolkit: Toolkit) -> None:
    model, ids = layers(), torch.tensor([[1, 2, 3]])
    toolkit.quantize(
        model, {"rules": [{"match": EVERYTHING, "weight": "int8", "input": "int8"}]}, [ids]
    )
    if state != "quantized":
        toolkit.apply_mode(model, state)
    with torch.no_grad():
        expected = model(ids)
        there = pickle.loads(pickle.dumps(model, protocol=protocol))
        assert torch.equal(there(ids), expected)
    assert [type(m) for m in there.modules()] == [type(m) for m in model.modules()]
    assert plan_of(there) == plan_of(model)
    revert(there)
    assert [type(m) for m in there.modules()] == [type(m) for m in layers().modules()]


def test_torch_saves_and_loads_it_whole(
    make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor]
) -> None:
    model, file = make_lm(), io.BytesIO()
    toolkit.quantize(model, "nvfp4", token_batches)
    torch.save(model, file)
    file.seek(0)
    there = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(there(token_batches[0]), model(token_batches[0]))


def test_a_fresh_process_makes_the_class_anew(toolkit: Toolkit, tmp_path: Path) -> None:
    model, ids = layers(), torch.tensor([[1, 2, 3]])
    toolkit.quantize(model, "int8-weight-only")
    toolkit.apply_mode(model, "compress")
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    script = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.save(model(torch.tensor([[1, 2, 3]])).detach(), sys.argv[2])\n"
    )
    arguments = [str(tmp_path / "model"), str(tmp_path / "output")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "output"), model(ids))


def test_what_torch_does_not_pickle_is_still_refused_by_torch(toolkit: Toolkit) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    toolkit.quantize(model, "int8-weight-only")
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(model)
