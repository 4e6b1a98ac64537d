"""Quantized nn.RNN, nn.LSTM, nn.GRU.

Where only weights are quantized, torch's own fused kernel runs with the quantized weights. Where an
activation is, the layers run step by step in Python, which computes the same to rounding: quantized
are both operands of every matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from bittern.nn.intercept import is_active
from bittern.nn.module import QuantModule
from bittern.records import Slot

__all__ = ["QuantRecurrent", "recurrent_slots"]

# What one layer passes from step to step: the hidden state, and the cell state of an LSTM.
State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]
PARTS = ("input", "hidden", "proj")


def recurrent_slots(module: nn.Module) -> tuple[Slot, ...]:
    """Return the slots of a recurrent module: its weights and the inputs of their products.

    For every layer and direction, the suffix ``l0``, ``l0_reverse``, ``l1``, ...:

    - ``weight_ih_l0``, ``weight_hh_l0``, ``weight_hr_l0`` (projections): role ``weight``;
    - ``input_l0``: the sequence that ``weight_ih_l0`` multiplies, ``hidden_l0``: the state of the
      step before, which ``weight_hh_l0`` multiplies, ``proj_l0``: what ``weight_hr_l0``
      multiplies; role ``input``, as all of them are the inputs of a matrix product.

    Last comes ``output``: the sequence that the module returns. The states that it returns, and
    what the gates do element by element, stay as they are.

    Args:
        module: A live nn.RNN, nn.LSTM or nn.GRU.
    """
    weights: list[Slot] = []
    inputs: list[Slot] = []
    for layer in _layers(module):
        names = [n for n in layer.weights if n.startswith("weight")]
        weights += [Slot(name, kind="weight", tensor=name) for name in names]
        inputs += [
            Slot(f"{part}_{layer.suffix}", channel_axis=-1, role="input")
            for part, _ in zip(PARTS, names, strict=False)
        ]
    return (*weights, *inputs, Slot("output", channel_axis=-1))


@dataclass(frozen=True)
class _Layer:
    """One layer and direction.

    Attributes:
        suffix: ``l0``, ``l0_reverse``, ...
        reverse: Whether it reads the sequence from its end.
        weights: Names of its parameters.
    """

    suffix: str
    reverse: bool
    weights: tuple[str, ...]


def _layers(module: Any) -> list[_Layer]:
    """Return layers and directions in torch's order."""
    kinds = ["weight_ih", "weight_hh"]
    kinds += ["weight_hr"] if module.proj_size else []
    kinds += ["bias_ih", "bias_hh"] if module.bias else []
    return [
        _Layer(f"l{i}{end}", end != "", tuple(f"{kind}_l{i}{end}" for kind in kinds))
        for i in range(module.num_layers)
        for end in (("", "_reverse") if module.bidirectional else ("",))
    ]


class QuantRecurrent(QuantModule):
    """Quantized nn.RNN, nn.LSTM, nn.GRU; slots of `recurrent_slots`."""

    mode: str
    batch_first: bool
    bidirectional: bool
    num_layers: int
    hidden_size: int
    proj_size: int
    dropout: float
    check_forward_args: Callable[..., None]
    permute_hidden: Callable[..., Any]
    _update_flat_weights: Callable[[], None]
    _flat_weights: list[Tensor | None]
    _flat_weights_names: list[str]

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Return ``(output, states)``, as the original does for the same arguments.

        Args:
            input: Shape ``(time, batch, input_size)``, ``(batch, time, input_size)`` with
                ``batch_first``, ``(time, input_size)`` without a batch; or packed.
            hx: The states before the first step: ``(layers, batch, hidden_size)``, for an LSTM a
                pair of them; zeros by default.
        """
        if self._steps():
            return self._stepwise(input, hx)
        with self._quantized_weights():
            found, states = super().forward(input, hx)
        if isinstance(found, PackedSequence):
            return found._replace(data=self.quantize("output", found.data)), states
        return self._output(found), states

    def _steps(self) -> bool:
        """Return whether a quantizer needs to see what torch's kernel keeps to itself."""
        return any(
            is_active(quantizer)
            for slot, quantizer in self.slots().items()
            if quantizer.tensor is None and slot != "output"
        )

    @contextmanager
    def _quantized_weights(self) -> Iterator[None]:
        """Let the original's forward find the quantized weights.

        It reads them from one list, which it makes anew where a parameter is another object than
        it was: under ``torch.func.functional_call``, and in every call for weights that are
        computed (parametrized). So the list is made now, and computed weights are kept for a while.
        """
        computed = parametrize.is_parametrized(self)
        with parametrize.cached() if computed else nullcontext():
            self._update_flat_weights()
            own = self._flat_weights
            quantized = [
                _flagged(self.quantize(name, weight), weight) if weight is not None else None
                for name, weight in zip(self._flat_weights_names, own, strict=True)
            ]
            changed = any(a is not b for a, b in zip(quantized, own, strict=True))
            try:
                if changed:
                    self._flat_weights = quantized
                yield
            finally:
                self._flat_weights = own

    def _output(self, x: Tensor) -> Tensor:
        """Quantize the returned sequence as rows, so that packed or not gives the same scales."""
        rows = x.reshape(-1, x.shape[-1])
        quantized = self.quantize("output", rows)
        return x if quantized is rows else quantized.reshape(x.shape)

    # --- step by step ---

    def _stepwise(self, input: Tensor | PackedSequence, hx: Any) -> Any:
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            states = self._states(hx, data, int(sizes[0]), sizes, order)
            rows, states = self._run(data, sizes.tolist(), states)
            packed = PackedSequence(self.quantize("output", rows), sizes, order, back)
            return packed, self.permute_hidden(self._returned(states), back)
        if input.dim() not in (2, 3):
            raise ValueError(f"expected an input of 2 or 3 dimensions, got {input.dim()}")
        batched = input.dim() == 3
        axis = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(axis)
        if hx is not None and not batched:
            hx = _each(hx, lambda state: state.unsqueeze(1))
        states = self._states(hx, x, x.shape[axis], None, None)
        x = x.transpose(0, 1) if self.batch_first else x
        time, batch, _ = x.shape
        rows, states = self._run(x.reshape(time * batch, -1), [batch] * time, states)
        rows = self.quantize("output", rows)
        output = rows.reshape(time, batch, -1)
        output = output.transpose(0, 1) if self.batch_first else output
        if batched:
            return output, self._returned(states)
        return output.squeeze(axis), _each(self._returned(states), lambda state: state.squeeze(1))

    def _states(
        self, hx: Any, x: Tensor, batch: int, sizes: Tensor | None, order: Tensor | None
    ) -> State:
        """Return the states before the first step, each ``(layers * directions, batch, size)``."""
        if hx is None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            widths = [self.proj_size or self.hidden_size]
            widths += [self.hidden_size] if self.mode == "LSTM" else []
            made = tuple(x.new_zeros(count, batch, width) for width in widths)
            hx = self._returned(made)
            self.check_forward_args(x, hx, sizes)
        else:
            self.check_forward_args(x, hx, sizes)
            hx = self.permute_hidden(hx, order)
        return tuple(hx) if self.mode == "LSTM" else (hx,)

    def _returned(self, states: State) -> Any:
        return states if self.mode == "LSTM" else states[0]

    def _run(self, rows: Tensor, sizes: Sequence[int], states: State) -> tuple[Tensor, State]:
        """Run all layers over the rows of all steps, one step after the other.

        Args:
            rows: Shape ``(steps * batch, features)``; the rows of a step lie together.
            sizes: How many rows a step has; never more than the step before.
            states: Before the first step.

        Returns:
            The rows of the last layer, and the states after each sequence's last step.
        """
        layers = _layers(self)
        width = 2 if self.bidirectional else 1
        last: list[State] = []
        for start in range(0, len(layers), width):
            outputs = []
            for index in range(start, start + width):
                first = tuple(state[index] for state in states)
                output, after = self._direction(layers[index], rows, sizes, first)
                outputs.append(output)
                last.append(after)
            rows = torch.cat(outputs, 1) if width > 1 else outputs[0]
            if self.dropout and start + width < len(layers):
                rows = F.dropout(rows, self.dropout, self.training)
        return rows, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def _direction(
        self, layer: _Layer, rows: Tensor, sizes: Sequence[int], states: State
    ) -> tuple[Tensor, State]:
        end = layer.suffix
        w = {n.removesuffix(f"_{end}"): self.quantize(n, getattr(self, n)) for n in layer.weights}
        gates = F.linear(self.quantize(f"input_{end}", rows), w["weight_ih"], w.get("bias_ih"))
        steps = torch.split(gates, list(sizes))
        outputs: list[Tensor] = [rows] * len(steps)
        cell = CELLS[self.mode]
        for t in reversed(range(len(steps))) if layer.reverse else range(len(steps)):
            now = tuple(state[: sizes[t]] for state in states)
            hidden = self.quantize(f"hidden_{end}", now[0])
            new = cell(steps[t], F.linear(hidden, w["weight_hh"], w.get("bias_hh")), now)
            if "weight_hr" in w:
                projected = F.linear(self.quantize(f"proj_{end}", new[0]), w["weight_hr"])
                new = (projected, *new[1:])
            outputs[t] = new[0]
            states = tuple(_joined(a, b) for a, b in zip(new, states, strict=True))
        return torch.cat(outputs), states


# --- one step: what torch.nn documents for RNN, LSTM and GRU ---


def _lstm(x: Tensor, h: Tensor, states: State) -> State:
    i, f, g, o = (x + h).chunk(4, 1)
    cell = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(x: Tensor, h: Tensor, states: State) -> State:
    reset_x, update_x, new_x = x.chunk(3, 1)
    reset_h, update_h, new_h = h.chunk(3, 1)
    update = torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return (new + update * (states[0] - new),)


def _tanh(x: Tensor, h: Tensor, states: State) -> State:
    return (torch.tanh(x + h),)


def _relu(x: Tensor, h: Tensor, states: State) -> State:
    return (torch.relu(x + h),)


CELLS: dict[str, Cell] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}


def _flagged(quantized: Tensor, weight: Tensor) -> Tensor:
    """Return ``quantized`` with the flag of ``weight``: matmul takes another way without it.

    Without gradients a quantized weight does not require any, and the result would differ in the
    last bit from that of a parameter with the same values.
    """
    if quantized is weight or quantized.requires_grad or not weight.requires_grad:
        return quantized  # a frozen weight with a learned range has a gradient to pass on
    return quantized.detach().requires_grad_()


def _joined(new: Tensor, old: Tensor) -> Tensor:
    """Return the states after a step: sequences that have no such step keep theirs."""
    return new if len(new) == len(old) else torch.cat([new, old[len(new) :]])


def _each(hx: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(function, hx)) if isinstance(hx, tuple | list) else function(hx)
