"""Names in files of what wrappers hold, and of children that are only called as theirs are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from bittern.convert import LiveNames, unwrapped, wrappers


class Holder(nn.Module):
    """A model whose only child is called as the child of a wrapper is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(4, 4))


def compiled(model: nn.Module) -> nn.Module:
    found: Any = torch.compile(model, backend="eager")
    return found


WRAPPERS = {
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "averaged, compiled, checkpointed": lambda m: AveragedModel(compiled(checkpoint_wrapper(m))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_every_name_goes_to_its_name_in_files_and_back(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model[1][0] = wrap(model[1][0])  # inside, too
    wrapped = wrap(model)
    names = LiveNames(wrapped)
    inner = dict(wrapped.named_modules())
    expected = {"", "0", "1", "1.0"}

    assert {names.saved(name) for name in inner} == expected
    assert isinstance(inner[names.live("1.0")], nn.Linear)
    assert inner[names.live("")] is unwrapped(wrapped) is model or "averaged" not in str(wrap)
    for name in expected:
        assert names.saved(names.live(name)) == name
        assert names.saved(names.live(f"{name}.weight".lstrip("."))) == f"{name}.weight".lstrip(".")


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_of_tensors_lead_to_keys_of_the_state_dict(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model[1][0] = wrap(model[1][0])
    wrapped = wrap(model)
    keys = wrapped.state_dict().keys()
    names = LiveNames(wrapped, keys)

    for name in ("0.weight", "1.0.bias"):
        assert names.live(name) in keys
        assert names.saved(names.live(name)) == name


@pytest.mark.parametrize("name", ["module", "_orig_mod", "base_layer", "base_model", "model"])
def test_children_of_a_model_keep_their_names(name: str) -> None:
    model = Holder(name)
    names = LiveNames(model)

    assert unwrapped(model) is model
    assert names.saved(f"{name}.weight") == names.live(f"{name}.weight") == f"{name}.weight"
    averaged = AveragedModel(model)
    names = LiveNames(averaged)
    assert [type(m) for m in wrappers(averaged)] == [AveragedModel, Holder]
    assert names.saved(f"module.{name}.weight") == f"{name}.weight"
    assert names.live(f"{name}.weight") == f"module.{name}.weight"


def test_a_container_with_a_child_called_module_is_no_wrapper() -> None:
    model = nn.ModuleDict({"module": nn.Linear(4, 4)})
    assert unwrapped(model) is model
    assert LiveNames(model).saved("module.weight") == "module.weight"


def test_tensors_of_wrappers_in_each_other_are_not_taken_for_one() -> None:
    wrapped = AveragedModel(AveragedModel(nn.Linear(4, 4)))
    names = LiveNames(wrapped, wrapped.state_dict())
    saved = {names.saved(name): name for name in wrapped.state_dict()}
    assert set(saved) == {"weight", "bias", "n_averaged", "module.n_averaged"}
    assert {names.live(name) for name in saved} == set(wrapped.state_dict())
