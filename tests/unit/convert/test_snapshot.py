"""What comes back when a change of a model is undone."""

from __future__ import annotations

import torch
from torch import nn

from bittern.convert import remember


def test_structure_flags_and_the_generator_come_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = model
    second.bias.requires_grad_(False)
    undo = remember(model)
    expected = torch.rand(3)

    undo()
    model[0] = nn.Linear(4, 2)
    model.eval()
    second.weight.requires_grad_(False)
    second.bias.requires_grad_(True)
    model.register_forward_hook(lambda module, args, output: output * 2)
    undo()

    assert list(model) == [first, second]
    assert model.training
    assert second.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert not model._forward_hooks
    assert torch.equal(torch.rand(3), expected)
