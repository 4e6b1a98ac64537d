"""The plan, the stack of modes and the quantizers go where the model goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import bittern as bt
from bittern.convert import modes_of, plan_of, unwrapped
from bittern.errors import PlanError
from bittern.nn import named_quantizers

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A model with children called as those of wrappers are."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.base_layer = nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(rows, 16)``."""
        found: torch.Tensor = self.base_layer(self.module(x))
        return found


def quantized(seed: int = 0) -> Net:
    model = Net(seed).eval()
    bt.quantize(model, "int8", data=[X])
    return model


def half(model: nn.Module) -> nn.Module:
    return model.half().float()


def moved(model: nn.Module) -> nn.Module:
    return model.to(torch.float64).to("cpu", torch.float32)


def compiled(model: nn.Module) -> nn.Module:
    found: Any = torch.compile(model, backend="eager")
    return found


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def checkpointed_inside(model: nn.Module) -> nn.Module:
    inner: Any = unwrapped(model)
    inner.module[0] = checkpoint_wrapper(inner.module[0])
    return model


def compiled_inside(model: nn.Module) -> nn.Module:
    inner: Any = unwrapped(model)
    inner.module[0] = torch.compile(inner.module[0], backend="eager")
    return model


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "half": half,
    "to": moved,
    "compile": compiled,
    "compile in place": compiled_in_place,
    "averaged": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "checkpointed inside": checkpointed_inside,
    "compiled inside": compiled_inside,
    "ddp": DistributedDataParallel,
    "ddp, compiled": lambda m: compiled(DistributedDataParallel(m)),
    "averaged ddp": lambda m: AveragedModel(DistributedDataParallel(m)),
}
EXACT = set(WRAPS) - {"half"}  # half precision rounds the weights


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, which DDP asks for; another test may have left one."""
    if dist.is_initialized():
        yield
        return
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_it_survives(wrap: str) -> None:
    model = quantized()
    expected = model(X)
    before = {name: q.state() for name, q in named_quantizers(model)}

    wrapped = WRAPS[wrap](model).eval()

    assert [mode.name for mode in modes_of(wrapped)] == ["quantize"]
    assert plan_of(wrapped).modules == ("module.0", "base_layer")
    after = [q.state() for _, q in named_quantizers(wrapped)]
    for old, new in zip(before.values(), after, strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    if wrap in EXACT:
        assert torch.equal(wrapped(X), expected)


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_what_was_saved_plain_is_restored_into_a_wrapper(wrap: str, tmp_path: Path) -> None:
    model = quantized()
    bt.save(model, tmp_path / "state")

    other = WRAPS[wrap](Net(7).eval()).eval()
    bt.restore(other, tmp_path / "state")

    assert torch.equal(other(X), model(X))
    assert [mode.name for mode in modes_of(unwrapped(other))] == ["quantize"]


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_what_was_saved_in_a_wrapper_is_restored_plain(wrap: str, tmp_path: Path) -> None:
    wrapped = WRAPS[wrap](quantized()).eval()
    bt.save(wrapped, tmp_path / "state")

    other = Net(7).eval()
    bt.restore(other, tmp_path / "state")

    assert torch.equal(other(X), wrapped(X))


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_a_wrapper_is_quantized_and_the_model_within_saved(wrap: str, tmp_path: Path) -> None:
    wrapped = WRAPS[wrap](Net(0).eval()).eval()
    bt.quantize(wrapped, "int8", data=[X])
    inner = unwrapped(wrapped)
    expected = quantized()(X)
    if wrap in EXACT:
        assert torch.equal(wrapped(X), expected)

    bt.save(inner, tmp_path / "state")

    other = Net(7).eval()
    bt.restore(other, tmp_path / "state")
    assert torch.equal(other(X), wrapped(X))
    bt.revert(wrapped)
    assert modes_of(inner) == ()
    assert not list(named_quantizers(wrapped))


def test_what_an_average_counts_is_not_the_models(tmp_path: Path) -> None:
    averaged = AveragedModel(quantized())
    averaged.update_parameters(quantized(1))
    bt.save(averaged, tmp_path / "state")

    other = AveragedModel(Net(7))
    bt.restore(other, tmp_path / "state")

    assert int(other.n_averaged) == 0
    assert torch.equal(other.eval()(X), averaged.eval()(X))


def test_parts_with_stacks_of_their_own_are_refused() -> None:
    model = nn.Sequential(Net(0), Net(1))
    for part in model:
        bt.quantize(part, "int8-weight-only")

    with pytest.raises(PlanError, match="parts of the model were converted on their own: 0, 1"):
        modes_of(model)
    assert [mode.name for mode in modes_of(model[0])] == ["quantize"]
