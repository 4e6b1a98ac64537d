"""Quantized experts: the layers that hold the weights of all experts in one parameter each.

Scales are per expert. A weight of shape ``(experts, out, in)`` has them for each of its matrices;
an activation, whose rows were routed to experts, has a range for the rows of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bittern.nn import Experts, QuantModule
from bittern.nn.intercept import active_slots
from bittern.records import Slot

__all__ = ["QuantBatchedExperts", "QuantExperts", "batched_slots", "expert_slots"]

Forward = Callable[..., Tensor]
# What classes without the attributes of `use_experts_implementation` are.
PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "_is_expert_parallel": True,
}


def expert_slots(module: nn.Module) -> tuple[Slot, ...]:
    """Return the slots of experts with two stacked weights, as the module says they lie.

    Args:
        module: Has ``gate_up_proj`` (or ``up_proj``, where it has no gate) and ``down_proj``.
    """
    return _slots(_up(module), transposed=bool(_said(module, "is_transposed")))


def batched_slots(module: nn.Module) -> tuple[Slot, ...]:
    """Return the slots of `QuantBatchedExperts`."""
    return _slots("gate_up_proj", transposed=True)


def _slots(up: str, *, transposed: bool) -> tuple[Slot, ...]:
    out, into = (2, 1) if transposed else (1, 2)

    def weight(name: str) -> Slot:
        return Slot(
            name, kind="weight", tensor=name, channel_axis=out, group_axis=into, stacked=True
        )

    def rows(name: str) -> Slot:
        return Slot(name, channel_axis=-1, role="input", stacked=True)

    return (weight(up), weight("down_proj"), rows(_input_of(up)), rows("down_input"))


def _up(module: nn.Module) -> str:
    return "gate_up_proj" if _said(module, "has_gate") else "up_proj"


def _input_of(weight: str) -> str:
    return weight.removesuffix("proj") + "input"


def _said(module: nn.Module, name: str) -> Any:
    return getattr(module, name, PLAIN.get(name))


class QuantExperts(QuantModule):
    """Mixin for experts that transformers calls with tokens, expert indices and weights.

    Slots: the weights ``gate_up_proj`` (``up_proj`` without a gate) and ``down_proj``; their inputs
    ``gate_up_input`` (``up_input``) and ``down_input``. Biases, the gate with its activation, and a
    norm after the experts stay the module's own.

    Without an active quantizer the module runs the implementation that its config selects. With
    one it runs that of transformers for grouped products (for batched ones, if these are selected)
    on quantized operands: tokens sorted by expert, the weights of the router applied last.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the weighted sum of what a token's experts make of it, shape of the tokens.

        Args:
            args: As the original's: tokens ``(tokens, hidden)``; the experts of every token, int64
                ``(tokens, k)``; their weights ``(tokens, k)``.
            kwargs: The same by the original's names.
        """
        slots = (up := _up(self), "down_proj", _input_of(up), "down_input")
        if not active_slots(self, slots):
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        tokens, index, weights = self._given(args, kwargs)
        chosen, count = index.shape[-1], self.down_proj.shape[0]
        flat, order = index.reshape(-1).sort(stable=True)
        rows = tokens[order // chosen]
        if _said(self, "_is_expert_parallel"):  # rows of experts that other processes hold
            rows = rows.masked_fill((flat >= count).unsqueeze(-1), 0)
        experts = Experts(flat.clamp(max=count - 1), count)
        rows = self.quantize(_input_of(up), rows, experts)
        ones = torch.ones_like(flat, dtype=rows.dtype).unsqueeze(-1)
        found = self._implementation()(_Operands(self, experts), rows, flat.unsqueeze(-1), ones)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        weighted = found[back].view(*index.shape, found.shape[-1]) * weights.unsqueeze(-1)
        return weighted.sum(1).to(tokens.dtype)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return tokens, index and weights, which have other names in every class."""
        if not kwargs:
            return args
        names = list(inspect.signature(self.original_class.forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return tuple(given[name] for name in names)

    def _implementation(self) -> Forward:
        """Return the implementation that runs quantized operands.

        The others (the loop of the class, fused kernels) show no row before the down projection.
        """
        config: Any = getattr(self, "config", None)
        selected = getattr(config, "_experts_implementation", None)
        found: Forward = ALL_EXPERTS_FUNCTIONS[
            "batched_mm" if selected == "batched_mm" else "grouped_mm"
        ]
        return found


class _Operands:
    """What an implementation reads of experts, with quantized weights and gated rows."""

    def __init__(self, module: QuantModule, experts: Experts) -> None:
        self._module = module
        self._experts = experts
        for name in (_up(module), "down_proj"):
            setattr(self, name, module.quantize(name, getattr(module, name)))

    def __getattr__(self, name: str) -> Any:
        if name == "num_experts":
            return self._experts.count
        found = getattr(self._module, name, None)
        return PLAIN.get(name) if found is None else found

    def _apply_gate(self, x: Tensor) -> Tensor:
        return self._rows(self._module._apply_gate(x))

    def act_fn(self, x: Tensor) -> Tensor:
        """Return the activation of experts without a gate."""
        return self._rows(self._module.act_fn(x))

    def _rows(self, x: Tensor) -> Tensor:
        return self._module.quantize("down_input", x, self._experts)


class QuantBatchedExperts(QuantModule):
    """Mixin for experts that all get the same number of rows, as those of Llama 4.

    Slots as `QuantExperts`. Rows: ``(experts * tokens, hidden)``, the first expert's first.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return what every expert makes of its rows, shape of the rows."""
        if not active_slots(self, ("gate_up_proj", "down_proj", "gate_up_input", "down_input")):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        up, down = self.gate_up_proj, self.down_proj
        count, hidden, _ = up.shape
        rows = hidden_states.reshape(-1, hidden)
        index = torch.arange(count, device=rows.device).repeat_interleave(len(rows) // count)
        experts = Experts(index, count)

        def product(x: Tensor, weight: Tensor) -> Tensor:
            return torch.bmm(x.view(count, -1, x.shape[-1]), weight).flatten(0, 1)

        rows = self.quantize("gate_up_input", rows, experts)
        both = product(rows, self.quantize("gate_up_proj", up))
        gate, raised = both.chunk(2, dim=-1)
        inner = self.quantize("down_input", raised * self.act_fn(gate), experts)
        return product(inner, self.quantize("down_proj", down))
