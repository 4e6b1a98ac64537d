"""The loss against a teacher: its terms, which positions count, and where gradients go."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bittern.errors import DataError, ModelError, TrainingError
from bittern.nn import named_quantizers
from bittern.records import ModelAdapter
from bittern.toolkit import Toolkit
from bittern.training import Distillation, train_ranges

BLOCKS = ("layers.0", "layers.1")


@pytest.fixture
def pair(
    make_lm: Callable[..., Any], toolkit: Toolkit, token_batches: list[Tensor]
) -> tuple[Any, Any]:
    """A quantized student and its teacher."""
    teacher = make_lm()
    student = copy.deepcopy(teacher)
    toolkit.quantize(student, "int4", token_batches)
    return student.train(), teacher.train()


def logits_of_both(student: nn.Module, teacher: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return student(ids), teacher(ids)


def divergence(q: Tensor, p: Tensor, temperature: float = 1.0) -> Tensor:
    """The definition, per position, in float64."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (p, q))
    return (p * (p / q).log()).sum(-1) * temperature**2


# --- terms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_are_compared_by_their_divergence(
    temperature: float, pair: Any, token_batches: list[Tensor]
) -> None:
    distillation = Distillation(*pair, temperature=temperature)
    loss = distillation.loss(token_batches[0])
    wanted = divergence(*logits_of_both(*pair, token_batches[0]), temperature).mean()
    assert float(wanted) > 1e-5
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-3)


def test_hidden_states_are_compared_relative_to_the_teachers(
    pair: Any, token_batches: list[Tensor]
) -> None:
    student, teacher = pair
    wanted = []
    for path in BLOCKS:
        states: list[Tensor] = []
        for model in (student, teacher):
            module = model.get_submodule(path)
            handle = module.register_forward_hook(lambda _m, _a, out, s=states: s.append(out))
            model(token_batches[0])
            handle.remove()
        mine, other = (s.detach().double() for s in states)
        wanted.append(float((mine - other).square().sum() / other.square().sum()))
    with Distillation(student, teacher, hidden=BLOCKS, logits_weight=0) as distillation:
        loss = distillation.loss(token_batches[0])
    assert min(wanted) > 1e-6
    assert float(loss.detach()) == pytest.approx(sum(wanted) / 2, rel=1e-3)


def test_the_task_is_the_next_token(
    pair: Any, token_batches: list[Tensor], lm_adapter: ModelAdapter
) -> None:
    ids = token_batches[0]
    distillation = Distillation(*pair, logits_weight=0, task_weight=1, adapter=lm_adapter)
    logits, _ = logits_of_both(*pair, ids)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(distillation.loss(ids).detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_terms_are_weighted_and_kept_by_name(pair: Any, token_batches: list[Tensor]) -> None:
    with Distillation(
        *pair, hidden=BLOCKS, logits_weight=2, hidden_weight=3, task_weight=5
    ) as distillation:
        loss = distillation.loss(token_batches[0])
    parts = {name: float(value) for name, value in distillation.parts.items()}
    total = 2 * parts["logits"] + 3 * parts["hidden"] + 5 * parts["task"]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    assert not any(value.requires_grad for value in distillation.parts.values())


def test_an_unchanged_model_has_nothing_to_learn(
    make_lm: Callable[..., Any], token_batches: list[Tensor]
) -> None:
    with Distillation(make_lm(), make_lm(), hidden=BLOCKS) as distillation:
        assert float(distillation.loss(token_batches[0]).detach()) == pytest.approx(0, abs=1e-6)


# --- what counts ----------------------------------------------------------------------------------


def test_padding_does_not_count(pair: Any, token_batches: list[Tensor]) -> None:
    ids = token_batches[0]
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    wanted = divergence(*logits_of_both(*pair, ids))[mask != 0].mean()
    with Distillation(*pair, hidden=BLOCKS) as distillation:
        distillation.loss({"input_ids": ids, "attention_mask": mask})
        first = dict(distillation.parts)
        other = torch.where(mask == 0, (ids + 1) % 32, ids)  # the models look ahead at nothing
        distillation.loss({"input_ids": other, "attention_mask": mask})
    assert float(first["logits"]) == pytest.approx(float(wanted), rel=1e-3)
    for name, value in distillation.parts.items():
        assert float(value) == pytest.approx(float(first[name]), rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_ignored_labels_do_not_count(
    *, causal: bool, pair: Any, token_batches: list[Tensor]
) -> None:
    ids = token_batches[0]
    labels = ids.clone()
    labels[:, :5] = -100  # a prompt
    values = divergence(*logits_of_both(*pair, ids))
    logits, _ = logits_of_both(*pair, ids)
    # a causal model predicts the label of position 5 at position 4
    counted = values[:, 4:-1] if causal else values[:, 5:]
    right = logits[:, 4:-1] if causal else logits[:, 5:]
    task = F.cross_entropy(right.flatten(0, 1), labels[:, 5:].flatten())
    distillation = Distillation(*pair, task_weight=1, adapter=ModelAdapter(causal=causal))
    distillation.loss({"input_ids": ids, "labels": labels})
    assert float(distillation.parts["logits"]) == pytest.approx(float(counted.mean()), rel=1e-3)
    assert float(distillation.parts["task"]) == pytest.approx(float(task), rel=1e-5)


def test_masked_classes_of_the_teacher_give_no_nan() -> None:
    class Masked(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            found = super().forward(input)
            return torch.cat([found[..., :-1], torch.full_like(found[..., :1], -math.inf)], -1)

    torch.manual_seed(0)
    student, teacher = Masked(4, 5), Masked(4, 5)
    loss = Distillation(student, teacher).loss(torch.randn(3, 4))
    loss.backward()
    assert float(loss.detach()) > 0
    assert student.weight.grad is not None
    assert bool(student.weight.grad.isfinite().all())


def test_a_batch_without_a_counted_position_is_worth_nothing(
    pair: Any, token_batches: list[Tensor], lm_adapter: ModelAdapter
) -> None:
    ids = token_batches[0]
    labels = torch.full_like(ids, -100)
    distillation = Distillation(*pair, task_weight=1, adapter=lm_adapter)
    loss = distillation.loss({"input_ids": ids, "labels": labels})
    loss.backward()
    assert float(loss.detach()) == 0


def test_outputs_with_logits_and_arguments_of_the_framework_are_known(pair: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, *, use_cache: bool) -> Any:
            assert use_cache is False
            return SimpleNamespace(scores=self.inner(input_ids))

    adapter = ModelAdapter(call_kwargs={"use_cache": False}, logits=lambda out: out.scores)
    student, teacher = pair
    ids = torch.arange(12).reshape(1, 12)
    found = Distillation(Wrapped(student), Wrapped(teacher), adapter=adapter).loss(
        {"input_ids": ids}
    )
    wanted = Distillation(student, teacher).loss(ids)
    assert torch.equal(found, wanted)


# --- gradients ------------------------------------------------------------------------------------


def test_only_the_student_learns(pair: Any, token_batches: list[Tensor]) -> None:
    student, teacher = pair
    teacher.layers[0].eval()
    with Distillation(student, teacher, hidden=BLOCKS) as distillation:
        distillation.loss(token_batches[0]).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())
    assert teacher.training
    assert not teacher.layers[0].training  # every module is in the mode that it was in


def test_training_lowers_the_loss(
    make_lm: Callable[..., Any], toolkit: Toolkit, token_batches: list[Tensor]
) -> None:
    student, teacher = make_lm(), make_lm()
    rule = {"match": {"class": "Linear"}, "weight": "int2"}
    toolkit.quantize(student, {"extends": "base", "rules": [rule], "algorithm": "max"})
    ranges = train_ranges(student, weights="follow")
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-4)
    losses = []
    with Distillation(student, teacher, hidden=BLOCKS) as distillation:
        for step in range(40):
            loss = distillation.loss(token_batches[step % 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ranges.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


def test_hidden_states_of_checkpointed_blocks_have_gradients(
    pair: Any, token_batches: list[Tensor]
) -> None:
    student, teacher = pair
    grads = []
    for reentrant in (None, False, True):
        model = copy.deepcopy(student)
        if reentrant is not None:
            checkpointed(model, reentrant=reentrant)
        with Distillation(model, teacher, hidden=BLOCKS) as distillation:
            distillation.loss(token_batches[0]).backward()
        grads.append([p.grad for p in model.parameters()])
    plain, *others = grads
    for other in others:
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_hidden_states_that_checkpointing_cut_off_are_refused(
    pair: Any, token_batches: list[Tensor]
) -> None:
    student, teacher = pair
    checkpointed(student, reentrant=True)
    with (
        Distillation(student, teacher, hidden=["layers.0.o"]) as distillation,
        pytest.raises(ModelError, match=r"(?s)layers.0.o: .* no gradient.*use_reentrant=False"),
    ):
        distillation.loss(token_batches[0])


def checkpointed(model: Any, *, reentrant: bool) -> None:
    """Run the blocks again in the backward pass, hooks included, as transformers does."""

    for layer in model.layers:
        run = type(layer).__call__

        def call(self: nn.Module, x: Tensor, run: Any = run) -> Any:
            return checkpoint(lambda t: run(self, t), x, use_reentrant=reentrant)

        layer.__class__ = type("Checkpointed", (type(layer),), {"__call__": call})


# --- hooks ----------------------------------------------------------------------------------------


def test_nothing_is_kept_outside_of_the_loss_nor_after_it(
    pair: Any, token_batches: list[Tensor]
) -> None:
    student, teacher = pair
    with Distillation(student, teacher, hidden=BLOCKS) as distillation:
        distillation.loss(token_batches[0])
        student(token_batches[0])
        assert distillation._ours._found == {}
        assert distillation._theirs._found == {}
    assert all(not m._forward_hooks for model in pair for m in model.modules())
    assert len(list(named_quantizers(student))) > 0


def test_names_inside_wrappers_are_found(pair: Any, token_batches: list[Tensor]) -> None:
    student, teacher = pair
    compiled: Any = torch.compile(student, backend="eager")
    wanted = Distillation(student, teacher, hidden=BLOCKS, logits_weight=0)
    expected = float(wanted.loss(token_batches[0]).detach())
    wanted.close()
    assert "_orig_mod.layers.0" in dict(compiled.named_modules())
    with torch.compiler.set_stance("force_eager"):
        found = Distillation(compiled, teacher, hidden=BLOCKS, logits_weight=0)
        assert float(found.loss(token_batches[0]).detach()) == pytest.approx(expected)


def test_modules_may_have_other_names_in_the_teacher(
    pair: Any, token_batches: list[Tensor]
) -> None:
    student, teacher = pair
    with Distillation(student, teacher, hidden=[("layers.0", "layers.1")]) as distillation:
        distillation.loss(token_batches[0])
        crossed = float(distillation.parts["hidden"])
    with Distillation(student, teacher, hidden="layers.0") as distillation:
        distillation.loss(token_batches[0])
    assert crossed > 2 * float(distillation.parts["hidden"])


def test_the_framework_may_know_the_blocks(pair: Any, token_batches: list[Tensor]) -> None:
    adapter = ModelAdapter(blocks=BLOCKS)
    with Distillation(*pair, hidden="blocks", adapter=adapter) as distillation:
        distillation.loss(token_batches[0])
        found = distillation.parts["hidden"]
    with Distillation(*pair, hidden=BLOCKS) as distillation:
        distillation.loss(token_batches[0])
    assert torch.equal(found, distillation.parts["hidden"])


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hidden": ["layers.9"]}, ModelError, "no module 'layers.9'"),
        ({"hidden": "blocks"}, TrainingError, "no plugin knows the blocks"),
        ({"temperature": 0.0}, TrainingError, "the temperature is 0.0"),
        ({"logits_weight": 0.0}, TrainingError, "nothing to learn"),
    ],
)
def test_mistakes_are_named(options: Any, error: type[Exception], words: str, pair: Any) -> None:
    with pytest.raises(error, match=words):
        Distillation(*pair, **options)


def test_outputs_of_other_shapes_are_refused(pair: Any, make_lm: Callable[..., Any]) -> None:
    student, _ = pair
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(DataError, match="they must have one vocabulary"):
        Distillation(student, make_lm(vocab=40)).loss(ids)
    with pytest.raises(DataError, match="compare modules of one width"):
        Distillation(student, make_lm(width=8), hidden=BLOCKS).loss(ids)
