"""nn.RNN, nn.LSTM and nn.GRU: torch's kernel with quantized weights, or step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

import bittern
from bittern.nn import named_quantizers, quantizers_off
from bittern.toolkit import Toolkit

from .reference import TENSOR, WEIGHT, int8, with_weights

SIZE, HIDDEN = 4, 6
WEIGHTS = {"rules": [{"match": "*", "weight": WEIGHT}]}
EVERYTHING = {"rules": [{"match": "*", "weight": WEIGHT, "input": TENSOR, "output": TENSOR}]}

KINDS: dict[str, Callable[..., nn.Module]] = {
    "tanh": lambda **o: nn.RNN(SIZE, HIDDEN, **o),
    "relu": lambda **o: nn.RNN(SIZE, HIDDEN, nonlinearity="relu", **o),
    "lstm": lambda **o: nn.LSTM(SIZE, HIDDEN, **o),
    "lstm-projected": lambda **o: nn.LSTM(SIZE, HIDDEN, proj_size=3, **o),
    "gru": lambda **o: nn.GRU(SIZE, HIDDEN, **o),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first-without-bias": {"batch_first": True, "bias": False},
    "both-directions": {"bidirectional": True},
    "deep": {"num_layers": 2, "bidirectional": True, "dropout": 0.4, "batch_first": True},
}
INPUTS = ["sequence", "packed", "unbatched", "with-states"]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=OPTIONS)
def model(kind: str, request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return KINDS[kind](**OPTIONS[request.param]).eval()


def arguments(model: Any, what: str) -> tuple[Any, ...]:
    """Return the arguments of one call."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if what == "packed":
        lengths = (2, 5, 3)
        return (pack_sequence([normal(n, SIZE) for n in lengths], enforce_sorted=False),)
    if what == "unbatched":
        return (normal(5, SIZE),)
    x = normal(5, 7, SIZE)
    if what == "sequence":
        return (x,)
    layers = model.num_layers * (2 if model.bidirectional else 1)
    batch = x.shape[0 if model.batch_first else 1]
    hidden = normal(layers, batch, model.proj_size or HIDDEN)
    lstm = isinstance(model, nn.LSTM)
    return x, (hidden, normal(layers, batch, HIDDEN)) if lstm else hidden


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result, those of a packed sequence included."""
    output, states = result
    parts = list(output) if isinstance(output, PackedSequence) else [output]
    return [t for t in tree_leaves([parts, states]) if isinstance(t, Tensor)]


def run(model: Any, args: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(2)  # dropout
    with torch.no_grad():
        return tensors(model(*args))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def prepared(model: Any, axis: int | None = 0) -> Any:
    """Return torch's own layer with quantized weights."""
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    return with_weights(model, **{n: int8(getattr(model, n), axis) for n in names})


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_without_quantizers_and_with_weights_alone_it_is_torchs_layer(
    training: bool, model: Any, toolkit: Toolkit
) -> None:
    original, plain = copy.deepcopy(model).train(training), prepared(model).train(training)
    toolkit.quantize(model, WEIGHTS)
    model.train(training)

    for what in INPUTS:
        args = arguments(model, what)
        assert same(run(model, args), run(plain, args))
        with quantizers_off(model):
            assert same(run(model, args), run(original, args))
    bittern.revert(model)
    assert type(model) is type(original)
    assert same(run(model, args), run(original, args))


def test_gradients_are_those_of_the_layer_with_quantized_weights(
    model: Any, toolkit: Toolkit
) -> None:
    plain = prepared(model)
    toolkit.quantize(model, WEIGHTS)
    for layer in (model, plain):
        x = arguments(model, "sequence")[0].requires_grad_()
        layer(x)[0].square().sum().backward()

    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_learned_ranges_of_frozen_weights_get_their_gradients(kind: str, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]().requires_grad_(False)
    toolkit.quantize(model, WEIGHTS)
    learned = [quantizer.learn() for _, quantizer in named_quantizers(model)]
    model(torch.randn(5, 2, SIZE))[0].square().sum().backward()
    assert len(learned) >= 2
    assert all(value.grad is not None and value.grad.any() for value in learned)


def test_the_weights_are_the_parameters_again_after_a_call_that_fails(toolkit: Toolkit) -> None:
    model: Any = nn.GRU(SIZE, HIDDEN)
    toolkit.quantize(model, WEIGHTS)
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        model(torch.randn(5, 7, SIZE + 1))

    for weight, name in zip(model._flat_weights, model._flat_weights_names, strict=True):
        assert weight is getattr(model, name)


def test_functional_calls_quantize_the_given_weights(model: Any, toolkit: Toolkit) -> None:
    flipped = with_weights(model, **{n: p.flip(0) for n, p in model.named_parameters()})
    toolkit.quantize(model, {"rules": [{"match": "*", "weight": TENSOR}]})
    given = {n: p.detach() for n, p in flipped.named_parameters()}
    args = arguments(model, "sequence")
    with torch.no_grad():
        found = tensors(torch.func.functional_call(model, given, args))

    assert same(found, run(prepared(flipped, axis=None).requires_grad_(False), args))


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_step_by_step_it_computes_what_torchs_kernel_does(
    training: bool, model: Any, toolkit: Toolkit
) -> None:
    original = copy.deepcopy(model).train(training)
    seen: list[list[Tensor]] = []

    def look(model: Any) -> None:  # while calibration looks, nothing is quantized
        model.train(training)
        seen.extend(run(model, arguments(model, what)) for what in INPUTS)

    toolkit.quantize(model, EVERYTHING, look)

    assert len(seen) == len(INPUTS)
    for what, found in zip(INPUTS, seen, strict=True):
        for ours, theirs in zip(found, run(original, arguments(model, what)), strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def reference(model: Any, x: Tensor, *, quantized: bool) -> Tensor:
    """Return the output for ``x``, ``(time, batch, size)``: the formulas of torch's pages.

    Both operands of every product are quantized, with the ranges of an unquantized run.
    """
    ranges: dict[str, Tensor] = {}
    output = _all_layers(model, x, ranges, rounding=False)
    if not quantized:
        return output
    most = output.abs().amax()
    return int8(_all_layers(model, x, ranges, rounding=True), amax=most)


def _all_layers(model: Any, x: Tensor, ranges: dict[str, Tensor], *, rounding: bool) -> Tensor:
    for layer in range(model.num_layers):
        ends = ("", "_reverse") if model.bidirectional else ("",)
        names = [f"l{layer}{end}" for end in ends]
        x = torch.cat([_one(model, x, name, ranges, rounding=rounding) for name in names], 2)
    return x


def _one(model: Any, x: Tensor, end: str, ranges: dict[str, Tensor], *, rounding: bool) -> Tensor:
    def operand(name: str, value: Tensor) -> Tensor:
        if rounding:
            return int8(value, amax=ranges[name])
        ranges[name] = torch.maximum(ranges.get(name, torch.zeros(())), value.abs().amax())
        return value

    def weight(name: str) -> Tensor:
        value = getattr(model, f"weight_{name}_{end}")
        return int8(value, 0) if rounding else value

    x = operand(f"input_{end}", x)
    hidden = torch.zeros(x.shape[1], model.proj_size or HIDDEN)
    cell = torch.zeros(x.shape[1], HIDDEN)
    outputs = {}
    times = range(len(x))
    for t in reversed(times) if end.endswith("reverse") else times:
        a = x[t] @ weight("ih").T + getattr(model, f"bias_ih_{end}")
        b = operand(f"hidden_{end}", hidden) @ weight("hh").T + getattr(model, f"bias_hh_{end}")
        if isinstance(model, nn.LSTM):
            i, f, g, o = ((a + b)[:, k * HIDDEN : (k + 1) * HIDDEN] for k in range(4))
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            if model.proj_size:
                hidden = operand(f"proj_{end}", hidden) @ weight("hr").T
        elif isinstance(model, nn.GRU):
            (ra, za, na), (rb, zb, nb) = a.split(HIDDEN, 1), b.split(HIDDEN, 1)
            z = (za + zb).sigmoid()
            hidden = (1 - z) * (na + (ra + rb).sigmoid() * nb).tanh() + z * hidden
        else:
            hidden = (a + b).tanh() if model.nonlinearity == "tanh" else (a + b).relu()
        outputs[t] = hidden
    return torch.stack([outputs[t] for t in times])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_both_operands_of_every_product_are_quantized(
    options: dict[str, Any], kind: str, toolkit: Toolkit
) -> None:
    torch.manual_seed(0)
    model = KINDS[kind](**options).eval()
    (x,) = arguments(model, "sequence")
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], reference(model, x, quantized=False))
        expected = reference(model, x, quantized=True)
        toolkit.quantize(model, EVERYTHING, [(x,)])
        found = model(x)[0]
        with quantizers_off(model):
            unquantized = model(x)[0]

    # A value on the border between two codes may fall on either side: one step of the output.
    step = unquantized.abs().max() / 127
    assert (found - expected).abs().max() <= 1.5 * step
    assert (found - expected).abs().mean() < 0.02 * (found - unquantized).abs().mean()


def test_every_slot_of_an_activation_counts(model: Any, toolkit: Toolkit) -> None:
    args = arguments(model, "with-states")
    toolkit.quantize(model, EVERYTHING, lambda m: m(*args))
    with quantizers_off(model):
        expected = run(model, args)
        for _, quantizer in named_quantizers(model):
            quantizer.enabled = True
            found = run(model, args)
            quantizer.enabled = False

            assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) > 1e-4


def test_packed_and_padded_sequences_give_the_same(kind: str, toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model = KINDS[kind](bidirectional=True).eval()
    sequences = [torch.randn(n, SIZE) for n in (2, 5, 3)]
    toolkit.quantize(model, EVERYTHING, lambda m: [m(s) for s in sequences])
    with torch.no_grad():
        packed, _ = model(pack_sequence(sequences, enforce_sorted=False))
        for own, sequence in zip(
            torch.nn.utils.rnn.unpack_sequence(packed), sequences, strict=True
        ):
            torch.testing.assert_close(own, model(sequence)[0])


def test_gradients_flow_through_all_steps(model: Any, toolkit: Toolkit) -> None:
    x, states = arguments(model, "with-states")
    toolkit.quantize(model, EVERYTHING, lambda m: m(x, states))
    leaves = [t.requires_grad_() for t in (x, *tree_leaves(states))]
    model(x, states)[0].square().sum().backward()

    for leaf in (*leaves, *model.parameters()):
        assert bool(leaf.grad.isfinite().all())
        assert bool(leaf.grad.any())


@pytest.mark.parametrize("granularity", ["token", "channel"])
def test_other_granularities_of_activations_work(
    granularity: str, model: Any, toolkit: Toolkit
) -> None:
    spec = {"format": "int8", "granularity": granularity}
    recipe = {"rules": [{"match": "*", "input": spec, "output": spec}]}
    toolkit.quantize(model, recipe, lambda m: [m(*arguments(m, what)) for what in INPUTS])

    for what in INPUTS:
        args = arguments(model, what)
        found = run(model, args)
        with quantizers_off(model):
            expected = run(model, args)
        assert not same(found, expected)
        torch.testing.assert_close(found[0], expected[0], atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(4),), "2 or 3 dimensions"),
        ((torch.randn(5, 7, SIZE + 1),), "input_size"),
        ((torch.randn(5, 7, SIZE), torch.randn(1, 6, HIDDEN)), "hidden size"),
    ],
)
def test_wrong_arguments_are_refused(
    args: tuple[Tensor, ...], message: str, toolkit: Toolkit
) -> None:
    model = nn.GRU(SIZE, HIDDEN)
    toolkit.quantize(model, EVERYTHING, [(torch.randn(5, 7, SIZE),)])
    with pytest.raises((RuntimeError, ValueError), match=message):
        model(*args)
