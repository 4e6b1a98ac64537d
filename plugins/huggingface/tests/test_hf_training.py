"""A real Trainer, a tiny model, few steps: ranges, checkpoints, resuming, a teacher."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import bittern as bt
from bittern.errors import CheckpointError
from bittern.nn import named_quantizers, quantizer_keys
from bittern.testing import run_distributed
from bittern.training import Distillation, RangeTraining, train_ranges
from bittern_huggingface.adapter import make_adapter
from bittern_huggingface.training import QuantizationCallback, QuantizationTrainer

pytest.importorskip("accelerate", reason="the Trainer needs it")

IDS = torch.randint(0, 128, (16, 16), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def quantized(recipe: str = "int8") -> Any:
    found = model()
    bt.quantize(found, recipe, [{"input_ids": IDS[:4]}])
    return found.train()


def arguments(path: Path, **changes: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return transformers.TrainingArguments(str(path), **{**settings, **changes})


def state(network: nn.Module) -> dict[str, Tensor]:
    found = {
        f"{name}/{local}": value.clone()
        for name, quantizer in named_quantizers(network)
        for local, value in quantizer.state().items()
    }
    return found | {n: p.detach().clone() for n, p in network.named_parameters()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def ranges_of(network: nn.Module, activations: str) -> RangeTraining:
    kinds: dict[str, Any] = {"activations": activations}
    kinds["weights"] = "learned" if activations == "learned" else "follow"
    return train_ranges(network, decay=0.5, **kinds)


@pytest.mark.parametrize("activations", ["ema", "learned"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(activations: str, tmp_path: Path) -> None:
    whole = quantized()
    ranges = ranges_of(whole, activations)
    before = state(whole)
    QuantizationTrainer(whole, arguments(tmp_path), train_dataset=ROWS, ranges=ranges).train()
    after = state(whole)
    assert any(not torch.equal(before[n], after[n]) for n in before if n.endswith("input/amax"))

    again = quantized()
    trainer = QuantizationTrainer(
        again,
        arguments(tmp_path / "other"),
        train_dataset=ROWS,
        ranges=ranges_of(again, activations),
        resume_from=tmp_path / "checkpoint-2",
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state(again), after)


def test_the_trained_model_is_loaded_from_what_the_trainer_wrote(tmp_path: Path) -> None:
    network = quantized()
    callback = QuantizationCallback(ranges_of(network, "ema"))
    trainer = transformers.Trainer(
        network, arguments(tmp_path), train_dataset=ROWS, callbacks=[callback]
    )
    trainer.train()
    trainer.save_model()
    loaded = bt.load(str(tmp_path))
    assert torch.equal(loaded(IDS).logits, network.eval()(IDS).logits)
    assert [mode.name for mode in bt.modes_of(loaded)] == ["quantize"]
    assert bt.load(str(tmp_path / "checkpoint-2"))(IDS).logits.shape == (16, 16, 128)


def test_learned_ranges_have_a_group_without_weight_decay_and_stay_out_of_the_weights(
    tmp_path: Path,
) -> None:
    network = quantized()
    ranges = ranges_of(network, "learned")
    trainer = QuantizationTrainer(
        network, arguments(tmp_path), train_dataset=ROWS, ranges=ranges, range_learning_rate=1e-3
    )
    groups = trainer.create_optimizer().param_groups
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in ranges.parameters()}
    assert (groups[-1]["weight_decay"], groups[-1]["lr"]) == (0.0, 1e-3)
    every = [id(p) for group in groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in network.parameters())
    trainer.train()
    assert not any("quantizer" in n for n in load_file(tmp_path / "checkpoint-2/model.safetensors"))
    assert not quantizer_keys(network), "static again at the end"
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-2", output_loading_info=True
    )
    assert not info["unexpected_keys"]


def test_the_best_checkpoint_comes_back_with_its_ranges(tmp_path: Path) -> None:
    network = quantized()
    args = arguments(
        tmp_path,
        learning_rate=3.0,  # every step makes it worse: the first checkpoint is the best
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    ranges = ranges_of(network, "ema")
    trainer = QuantizationTrainer(
        network, args, train_dataset=ROWS, eval_dataset=ROWS, ranges=ranges
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    other = "checkpoint-4" if best.endswith("checkpoint-2") else "checkpoint-2"
    saved = load_file(Path(best) / "bittern" / "state.safetensors")
    not_saved = load_file(tmp_path / other / "bittern" / "state.safetensors")
    key = "bittern.quantizers/model.layers.1.mlp.down_proj.input/amax"
    assert not torch.equal(saved[key], not_saved[key])
    down = network.model.layers[1].mlp.down_proj
    assert torch.equal(down.quantizer("input").amax, saved[key])


def test_a_student_learns_from_its_teacher(tmp_path: Path) -> None:
    network = quantized("nvfp4")
    teacher = model().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)

    def distance() -> float:
        with torch.no_grad():
            return float((network(IDS).logits - teacher(IDS).logits).pow(2).mean())

    before = distance()
    frozen = copy.deepcopy(teacher.state_dict())
    adapter = make_adapter(network)
    with Distillation(network, teacher, hidden="blocks", adapter=adapter) as distillation:
        trainer = QuantizationTrainer(
            network,
            arguments(tmp_path, max_steps=12, save_strategy="no", learning_rate=1e-3),
            train_dataset=ROWS,
            eval_dataset=ROWS,
            ranges=train_ranges(network),
            distillation=distillation,
        )
        with torch.no_grad():
            expected = float(network(IDS, labels=IDS).loss)
        task = trainer.evaluate()["eval_loss"]
        trainer.train()
    assert distance() < 0.7 * before
    assert task == pytest.approx(expected, rel=1e-4), "evaluation reports the task's loss"
    assert_same(teacher.state_dict(), frozen)


def test_accumulated_micro_batches_weigh_as_one_batch(tmp_path: Path) -> None:
    found = []
    for size, steps in ((8, 1), (4, 2)):
        network = quantized("int8-weight-only")
        with Distillation(network, model().eval()) as distillation:
            args = arguments(
                tmp_path,
                max_steps=1,
                save_strategy="no",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                optim="sgd",
                learning_rate=1.0,
                max_grad_norm=0.0,
            )
            QuantizationTrainer(
                network, args, train_dataset=ROWS, distillation=distillation
            ).train()
        found.append(network.lm_head.weight.detach() - model().lm_head.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-7)


def test_a_checkpoint_without_our_state_is_refused(tmp_path: Path) -> None:
    network = quantized()
    QuantizationTrainer(network, arguments(tmp_path, max_steps=2), train_dataset=ROWS).train()
    shutil.rmtree(tmp_path / "checkpoint-2" / "bittern")
    trainer = QuantizationTrainer(network, arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(CheckpointError, match="no state of quantizers"):
        trainer.train(resume_from_checkpoint=True)


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    for name, rate in (("one", 1e-2), ("two", 2e-2)):
        args = arguments(tmp_path / name, max_steps=2, learning_rate=rate)
        QuantizationTrainer(quantized(), args, train_dataset=ROWS).train()
    trainer = QuantizationTrainer(quantized(), arguments(tmp_path / "one"), train_dataset=ROWS)
    with pytest.raises(CheckpointError, match="saved beside"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "two/checkpoint-2"))


def test_a_run_may_take_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    for _ in range(2):
        network = quantized()
        trainer = QuantizationTrainer(network, arguments(tmp_path), train_dataset=ROWS)
        trainer.train()
    trainer.save_model()
    assert torch.equal(bt.load(str(tmp_path))(IDS).logits, network.eval()(IDS).logits)


def test_a_checkpoint_of_other_quantizers_is_refused(tmp_path: Path) -> None:
    QuantizationTrainer(
        quantized("fp8"), arguments(tmp_path, max_steps=2), train_dataset=ROWS
    ).train()
    trainer = QuantizationTrainer(quantized("int8"), arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(CheckpointError, match="quantized otherwise"):
        trainer.train(resume_from_checkpoint=True)


def train_on_ranks(rank: int, world: int, path: str, batch: int) -> dict[str, Tensor]:
    """Train with distillation on ``world`` ranks; return weights and ranges at the end."""
    if world > 1:  # what torchrun says; the processes have met already, so no address is used
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        }
    network = quantized()
    with bt.distill(network, model().eval()) as distillation:
        QuantizationTrainer(
            network,
            arguments(
                Path(path),
                max_steps=2,
                per_device_train_batch_size=batch,
                optim="sgd",
                learning_rate=0.5,
                max_grad_norm=0.0,
                ddp_backend="gloo" if world > 1 else None,
            ),
            train_dataset=ROWS,
            ranges=ranges_of(network, "ema"),
            distillation=distillation,
        ).train()
    return state(network)


@pytest.mark.heavy  # two processes import transformers
def test_two_ranks_train_as_one_with_their_batches_together(tmp_path: Path) -> None:
    (first, second) = run_distributed(train_on_ranks, str(tmp_path / "two"), 4)
    assert_same(first, second)
    assert (tmp_path / "two/checkpoint-2/bittern/manifest.json").is_file()
    whole = train_on_ranks(0, 1, str(tmp_path / "one"), 8)
    for name, value in whole.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5, msg=name)
