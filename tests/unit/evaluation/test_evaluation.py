"""Evaluation against loops written by hand; and what it leaves as it was."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import DataError
from bittern.evaluation import folded_weights, in_float32, logits_of, token_nll
from bittern.evaluation.metrics import Divergence, NextToken, Sqnr, TopOne
from bittern.evaluation.run import run_evaluation
from bittern.nn import QuantModule, named_quantizers, quantizers_off
from bittern.records import ModelAdapter, ModuleRule, Slot
from bittern.registry import target_of
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
SameBits = Callable[[Tensor, Tensor], bool]
PLAIN = ModelAdapter()


def losses(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> list[float]:
    """Return the next-token losses, one softmax at a time."""
    found = []
    for r, row in enumerate(ids):
        logits = model(ids)[r].detach().double()
        for t in range(len(row) - 1):
            if mask is not None and not (mask[r, t] and mask[r, t + 1]):
                continue
            exponentials = logits[t].exp()
            found.append(-math.log(float(exponentials[row[t + 1]] / exponentials.sum())))
    return found


def perplexity(found: list[float]) -> float:
    return math.exp(sum(found) / len(found))


# --- perplexity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "labelled"])
def test_perplexity_is_that_of_a_loop(
    form: str, make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor]
) -> None:
    model = make_lm()
    data = {
        "tensor": token_batches,
        "tuple": [(b,) for b in token_batches],
        "mapping": [{"input_ids": b} for b in token_batches],
        "labelled": [{"input_ids": b, "labels": b} for b in token_batches],
    }[form]
    found = toolkit.evaluate(model, data)
    with torch.no_grad():
        expected = [loss for batch in token_batches for loss in losses(model, batch)]

    assert found.perplexity == pytest.approx(perplexity(expected), rel=1e-5)
    assert found.tokens == len(expected) == 2 * 3 * 11
    assert found.samples == 6
    assert found.accuracy is None
    assert found.seconds > 0


def test_a_plain_model_has_no_reference(
    make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor]
) -> None:
    found = toolkit.evaluate(make_lm(), token_batches)

    assert found.perplexity is not None
    assert found.reference_perplexity is None
    assert found.reference_accuracy is None
    assert found.kl is None
    assert found.output_sqnr_db is None
    assert found.layers == ()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_masked_tokens_do_not_count(
    dtype: torch.dtype, make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor]
) -> None:
    model, ids = make_lm(), token_batches[0]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    mask[1, -3:] = 0  # on the right
    mask[2, 5] = 0  # a hole: neither predicted nor predicting
    found = toolkit.evaluate(model, [{"input_ids": ids, "attention_mask": mask.to(dtype)}])
    with torch.no_grad():
        expected = losses(model, ids, mask)

    assert found.tokens == len(expected) == 7 + 8 + 9
    assert found.perplexity == pytest.approx(perplexity(expected), rel=1e-5)


def test_a_masked_token_may_be_impossible() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = -torch.inf  # the model never predicts the padding
    tally = NextToken()
    tally.add(logits, torch.tensor([[0, 1, 2]]), torch.tensor([[1, 1, 0]]))

    assert tally.perplexity == pytest.approx(4)


def test_tokens_are_counted_beyond_the_integers_of_float32() -> None:
    tally = NextToken()
    tally._count = torch.tensor(2**24)
    tally._sum = torch.tensor(0.0, dtype=torch.float64)
    tally.add(torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), None)

    assert tally.tokens == 2**24 + 1


def test_an_infinite_perplexity_is_inf_and_no_tokens_is_none() -> None:
    tally = NextToken()
    assert tally.perplexity is None
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1] = -1e30
    tally.add(logits, torch.tensor([[0, 1]]), None)
    assert tally.perplexity == math.inf


def test_token_losses_are_cross_entropies_in_float32() -> None:
    logits = torch.randn(2, 5, 7).bfloat16()
    ids = torch.randint(0, 7, (2, 5))
    found = token_nll(logits, ids)

    log_p = logits.double().log_softmax(-1)
    expected = torch.stack([-log_p[r, range(4), ids[r, 1:]] for r in range(2)])
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("causal", [None, True])
def test_perplexity_is_measured_unless_the_adapter_says_no(
    causal: bool | None, make_lm: Make, token_batches: list[Tensor]
) -> None:
    model = make_lm()
    yes = run_evaluation(model, token_batches, adapter=ModelAdapter(causal=causal))
    no = run_evaluation(model, token_batches, adapter=ModelAdapter(causal=False))

    assert yes.perplexity is not None
    assert no.perplexity is None


# --- accuracy -------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_right_classes(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    with torch.no_grad():
        classes = [model(b).argmax(-1) for b in batches]
    classes[0][:2] = (classes[0][:2] + 1) % 4  # two wrong ones
    classes[1][0] = -100  # does not count
    found = toolkit.evaluate(model, list(zip(batches, classes, strict=True)))

    assert found.accuracy == pytest.approx(12 / 14)
    assert found.samples == 15
    assert found.perplexity is None


@pytest.mark.parametrize(
    "target", [torch.randn(5), torch.randn(5, 4), "text"], ids=["regression", "soft", "text"]
)
def test_other_targets_give_no_accuracy(
    target: Any, make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    found = toolkit.evaluate(make_mlp(), [(batches[0], target)])
    assert found.accuracy is None
    assert found.samples == 5


class Tagger(nn.Module):
    """A class per token: not a language model, though its shapes look like one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_classes_of_tokens_are_no_tokens(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model, ids = Tagger(), torch.tensor([[5, 50, 99, 7]])
    with torch.no_grad():
        labels = model(ids).argmax(-1)
    labels[0, 0] = (labels[0, 0] + 1) % 3
    found = toolkit.evaluate(model, [(ids, labels)])

    assert found.perplexity is None
    assert found.accuracy == 0.75


def test_no_labels_at_all_is_no_accuracy() -> None:
    tally = TopOne()
    assert tally.accuracy is None
    tally.add(torch.randn(2, 3), torch.tensor([-100, -100]))
    assert tally.accuracy is None


# --- divergence and noise -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (2, 4, 7), (2, 3, 4, 7)])
def test_divergence_is_the_mean_of_p_log_p_by_q(shape: tuple[int, ...]) -> None:
    reference, quantized = torch.randn(shape), torch.randn(shape)
    tally = Divergence()
    assert tally.mean is None
    tally.add(reference, quantized)
    tally.add(reference * 2, quantized)

    p = torch.cat([reference, reference * 2]).double().softmax(-1)
    q = torch.cat([quantized, quantized]).double().softmax(-1)
    assert tally.mean == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_divergence_of_masked_classes_is_finite() -> None:
    reference = torch.tensor([[1.0, 2.0, -torch.inf]])
    quantized = torch.tensor([[1.5, 2.0, -torch.inf]])
    tally = Divergence()
    tally.add(reference, quantized)
    plain = Divergence()
    plain.add(reference[:, :2], quantized[:, :2])

    assert tally.mean == pytest.approx(plain.mean)


def test_divergence_of_equals_is_zero_and_never_negative() -> None:
    x = torch.randn(5, 1000)
    tally = Divergence()
    tally.add(x, x)
    assert tally.mean == 0


def test_noise_is_ten_log10_of_the_energies() -> None:
    tally = Sqnr()
    assert tally.db is None
    y, noise = torch.randn(3, 5), torch.randn(3, 5) * 0.01
    tally.add(y, y + noise)
    tally.add(y * 3, y * 3)

    signal = float((y.double() ** 2).sum() * 10)
    error = float((((y + noise) - y).double() ** 2).sum())
    assert tally.db == pytest.approx(10 * math.log10(signal / error), abs=1e-4)


@pytest.mark.parametrize(
    ("reference", "quantized", "db"),
    [
        ([1.0], [1.0], math.inf),
        ([0.0], [0.0], math.inf),
        ([0.0], [1.0], -math.inf),
        ([1.0], [2.0], 0.0),
    ],
)
def test_noise_at_its_edges(reference: list[float], quantized: list[float], db: float) -> None:
    tally = Sqnr()
    tally.add(torch.tensor(reference), torch.tensor(quantized))
    assert tally.db == db


# --- a quantized model against itself -------------------------------------------------------------


def test_the_reference_is_the_model_with_its_quantizers_off(
    make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor]
) -> None:
    plain, model = make_lm(), make_lm()
    toolkit.quantize(model, "int8", token_batches)
    found = toolkit.evaluate(model, token_batches)
    with torch.no_grad():
        ours = torch.cat([model(b) for b in token_batches]).double()
        theirs = torch.cat([plain(b) for b in token_batches]).double()

    before = toolkit.evaluate(plain, token_batches)
    assert found.reference_perplexity == before.perplexity
    assert found.perplexity != before.perplexity
    expected = [loss for batch in token_batches for loss in losses(model, batch)]
    assert found.perplexity == pytest.approx(perplexity(expected), rel=1e-5)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    sqnr = 10 * math.log10(float((theirs**2).sum() / ((ours - theirs) ** 2).sum()))
    assert found.output_sqnr_db == pytest.approx(sqnr, abs=1e-3)


def test_the_reference_and_the_layers_can_be_left_out(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8", batches)
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    found = toolkit.evaluate(model, batches, reference=False, layers=False)

    assert len(runs) == len(batches)
    assert found.kl is None
    assert found.output_sqnr_db is None
    assert found.layers == ()


def test_layer_errors_are_measured_on_the_same_input_and_sorted(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    rules = [
        {"match": "up", "weight": "int8"},
        {"match": "down", "weight": {"format": "int4", "granularity": "tensor"}},
    ]
    toolkit.quantize(model, {"rules": rules})
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]}))
        for name, module in (("up", model.up), ("down", model.down))
    ]
    with torch.no_grad():
        model(batches[0])
    for handle in handles:
        handle.remove()
    found = toolkit.evaluate(model, batches)

    assert [layer.module for layer in found.layers] == ["down", "up"]
    for layer in found.layers:
        module = model.get_submodule(layer.module)
        with torch.no_grad():
            ours = module(inputs[layer.module])
            with quantizers_off(model):
                theirs = module(inputs[layer.module])
        expected = Sqnr()
        expected.add(theirs, ours)
        assert layer.sqnr_db == pytest.approx(expected.db, abs=1e-4)


class QuantOuter(QuantModule):
    """A quantized module with a quantized module inside, as attention plugins have."""

    inner: nn.Module
    gain: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.quantize("gain", self.gain)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.1, 3, 4))
        self.inner = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gain


def test_a_module_within_a_quantized_module_is_measured_once(
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: Callable[..., Toolkit],
) -> None:
    holder = ModuleType("outer_of_a_test")
    holder.QuantOuter = QuantOuter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, holder.__name__, holder)
    rule = ModuleRule(
        target=target_of(Outer),
        quantized="outer_of_a_test:QuantOuter",
        slots=(Slot("gain", kind="weight", tensor="gain"),),
    )
    toolkit = toolkit_with(make_plugin("alpha", register_modules=lambda: [rule]))
    inner = {"match": "inner", "weight": {"format": "int4", "granularity": "tensor"}}
    outer = {"match": "", "slots": {"gain": {"format": "int4", "granularity": "tensor"}}}
    torch.manual_seed(0)
    alone, both = Outer(), Outer()
    both.load_state_dict(alone.state_dict())
    toolkit.quantize(alone, {"rules": [inner]})
    toolkit.quantize(both, {"rules": [inner, outer]})

    expected = {e.module: e.sqnr_db for e in toolkit.evaluate(alone, batches).layers}
    found = {e.module: e.sqnr_db for e in toolkit.evaluate(both, batches).layers}
    assert found.keys() == {"", "inner"}
    assert found["inner"] == expected["inner"]


def test_layer_errors_do_not_see_what_hooks_do_to_the_output(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    before = toolkit.evaluate(model, batches).layers
    model.up.register_forward_hook(lambda _, __, output: output + 0 * output)
    after = toolkit.evaluate(model, batches).layers
    assert after == before

    model.down.register_forward_hook(lambda _, __, output: output * 100)
    assert toolkit.evaluate(model, batches).layers == before


# --- what is left as it was -----------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_leaves_weights_quantizers_hooks_and_modes_alone(
    make_lm: Make,
    toolkit: Toolkit,
    token_batches: list[Tensor],
    same_bits: SameBits,
    *,
    fails: bool,
) -> None:
    model: Any = make_lm()
    toolkit.quantize(model, "int8", token_batches)
    model.train()
    model.norm.eval()
    model.layers[0].q.quantizer("weight").enabled = False
    model.layers[1].q.quantizer("input").enabled = False
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    enabled = {n: q.enabled for n, q in named_quantizers(model)}
    training = {n: m.training for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}
    data = [*token_batches, torch.full((1, 3), 99)] if fails else token_batches

    if fails:
        with pytest.raises(IndexError):
            toolkit.evaluate(model, data)
    else:
        toolkit.evaluate(model, data)

    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert same_bits(parameter, before[name][1])
    assert {n: q.enabled for n, q in named_quantizers(model)} == enabled
    assert {n: m.training for n, m in model.named_modules()} == training
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == hooks


def test_folded_weights_compute_the_same_bits_and_switch(
    make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor], same_bits: SameBits
) -> None:
    model = make_lm()
    with torch.no_grad():
        plain = model(token_batches[0])
        toolkit.quantize(model, "int8-weight-only")
        expected = model(token_batches[0])
        with folded_weights(model) as switch:
            assert not same_bits(model.head.weight, make_lm().head.weight)
            assert same_bits(model(token_batches[0]), expected)
            switch(False)
            assert same_bits(model(token_batches[0]), plain)
            switch(True)
            assert same_bits(model(token_batches[0]), expected)
        assert same_bits(model(token_batches[0]), expected)


def test_folded_weights_come_back_bit_for_bit_after_an_exception(
    make_lm: Make, toolkit: Toolkit, same_bits: SameBits
) -> None:
    model = make_lm()
    toolkit.quantize(model, "int4")
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}

    def work() -> None:
        with folded_weights(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert same_bits(parameter, before[name][1])
    assert all(q.enabled for _, q in named_quantizers(model))


@pytest.mark.parametrize("match", ["head", "embed", {"class": ["Linear", "Embedding"]}], ids=str)
def test_a_tied_weight_is_quantized_only_where_the_plan_says_so(
    match: Any, make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor], same_bits: SameBits
) -> None:
    model = make_lm(tied=True)
    spec = {"format": "int4", "granularity": "tensor"}
    toolkit.quantize(model, {"rules": [{"match": match, "weight": spec}]})
    with torch.no_grad():
        expected = model(token_batches[0])
        with folded_weights(model):
            assert same_bits(model(token_batches[0]), expected)


# --- outputs and data -----------------------------------------------------------------------------

LOGITS = torch.randn(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, "cache"),
        [LOGITS],
        {"logits": LOGITS, "loss": 1},
        {"hidden": LOGITS},
        SimpleNamespace(logits=LOGITS),
    ],
    ids=["tensor", "tuple", "list", "mapping", "first", "object"],
)
def test_logits_are_found_in(output: Any) -> None:
    assert logits_of(output, PLAIN) is LOGITS


@pytest.mark.parametrize(
    "output",
    [None, "text", (), {}, {"logits": 3}, (1, LOGITS)],
    ids=["none", "text", "empty tuple", "empty mapping", "no tensor", "tensor not first"],
)
def test_an_output_without_logits_is_an_error(output: Any) -> None:
    with pytest.raises(DataError, match=f"cannot find logits in a {type(output).__name__}"):
        logits_of(output, PLAIN)


def test_the_adapter_takes_the_logits_out() -> None:
    adapter = ModelAdapter(logits=lambda output: output[1])
    assert logits_of((1, LOGITS), adapter) is LOGITS


@pytest.mark.parametrize("data", [[], iter([])], ids=["list", "iterator"])
def test_no_batch_is_an_error(data: Any, make_mlp: Make, toolkit: Toolkit) -> None:
    with pytest.raises(DataError, match="holds no batch"):
        toolkit.evaluate(make_mlp(), data)


def test_no_data_is_an_error(make_mlp: Make, toolkit: Toolkit) -> None:
    with pytest.raises(DataError, match="there is no data"):
        toolkit.evaluate(make_mlp(), None)


def test_a_path_is_read_by_a_plugin(
    make_lm: Make,
    token_batches: list[Tensor],
    make_plugin: Callable[..., ModuleType],
    toolkit_with: Callable[..., Toolkit],
) -> None:
    plugin = make_plugin("alpha", resolve_calibration_data=lambda: token_batches)
    assert toolkit_with(plugin).evaluate(make_lm(), "held-out.txt").samples == 6


def test_in_float32_gives_every_half_precision_tensor_back_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail_inside() -> None:
        with in_float32(model) as dtype:
            assert dtype == "float32"
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    after = model.state_dict()
    assert all(torch.equal(before[n], t) and before[n].dtype == t.dtype for n, t in after.items())


def test_in_float32_leaves_a_model_alone_that_would_take_too_much() -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16)
    with in_float32(model, limit=100) as dtype:
        assert dtype == "bfloat16"
        assert model.weight.dtype == torch.bfloat16


def test_containers_that_only_call_their_children_are_no_layers(toolkit: Toolkit) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, batch = nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 5, 16)
    toolkit.quantize(model, "int8", [batch])
    found = {error.module for error in toolkit.evaluate(model, [batch]).layers}
    inner = {"self_attn", "self_attn.out_proj", "linear1", "linear2"}
    assert found == {f"layers.0.{name}" for name in inner}
