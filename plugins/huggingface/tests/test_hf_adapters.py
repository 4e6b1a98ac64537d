"""peft on a quantized model (QLoRA): training, state, merging; accelerate around one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bittern as bt
from bittern.errors import CheckpointError, ExportError, PlanError
from bittern.nn import original_class
from bittern.nn.linear import QuantLinear

peft = pytest.importorskip("peft")

from bittern_huggingface.merging import merge_adapters  # noqa: E402 - it needs peft
from bittern_huggingface.training import QuantizationCallback  # noqa: E402

IDS = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0))
DOWN = "model.layers.1.mlp.down_proj"


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config).eval()


def quantized(recipe: str = "int8") -> Any:
    found = model()
    bt.quantize(found, recipe, [{"input_ids": IDS[:4]}])
    return found


def wrapped(base: nn.Module, targets: Any = ("q_proj", "down_proj")) -> Any:
    targets = targets if isinstance(targets, str) else list(targets)
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets)).eval()


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    found: Tensor = network(input_ids=IDS).logits
    return found


def trained(network: Any) -> Any:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 1.0)
    for _ in range(3):
        network(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


def test_adapters_are_put_around_quantized_layers_which_stay_so() -> None:
    base = quantized()
    expected = logits(base)
    network = wrapped(base, "all-linear")
    layer = network.base_model.model.get_submodule(DOWN)
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert isinstance(layer.base_layer, QuantLinear)
    assert original_class(layer.base_layer) is nn.Linear
    assert torch.equal(logits(network), expected)
    assert [mode.name for mode in bt.modes_of(network)] == ["quantize"]


def test_only_adapters_are_trained() -> None:
    network = wrapped(quantized())
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    first = float(network(input_ids=IDS, labels=IDS).loss.detach())
    trained(network)
    assert float(network(input_ids=IDS, labels=IDS).loss.detach()) < first
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_adapters_are_trained_beside_packed_weights() -> None:
    base = quantized("int4")
    bt.apply_mode(base, "compress")
    network = trained(wrapped(base))
    assert not torch.equal(logits(network), logits(quantized("int4")))
    with pytest.raises(PlanError, match="packed"):
        merge_adapters(network)


def test_a_model_with_adapters_is_restored_into_one_with_adapters(tmp_path: Path) -> None:
    network = trained(wrapped(quantized()))
    bt.save(network, tmp_path / "state")
    fresh = wrapped(model())
    bt.restore(fresh, tmp_path / "state")
    assert torch.equal(logits(fresh), logits(network))
    with pytest.raises(CheckpointError, match="lora_A"):
        bt.restore(model(), tmp_path / "state")


def test_base_and_adapters_are_kept_apart_as_peft_does(tmp_path: Path) -> None:
    base = quantized()
    bt.save(base, tmp_path / "base")
    network = trained(wrapped(base))
    network.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(bt.load(str(tmp_path / "base")), tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval()), logits(network))


@pytest.mark.parametrize("recipe", ["int8", "nvfp4"])
def test_merged_weights_are_quantized_in_ranges_of_their_own(recipe: str) -> None:
    base = quantized(recipe)
    network = trained(wrapped(base))
    layer = network.base_model.model.get_submodule(DOWN)
    total = layer.base_layer.weight.detach() + layer.get_delta_weight("default")
    kept = layer.base_layer.quantizer("input").state()
    logits(network)  # fills the caches of frozen weights
    merged = merge_adapters(network)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert [mode.name for mode in bt.modes_of(merged)] == ["quantize"]

    reference = model()
    reference.load_state_dict(merged.state_dict())
    bt.quantize(reference, recipe, [{"input_ids": IDS[:4]}])
    down, expected = merged.get_submodule(DOWN), reference.get_submodule(DOWN)
    assert torch.equal(down.weight, total)
    found = down.quantizer("weight")(down.weight)
    assert torch.equal(found, expected.quantizer("weight")(total))
    for name, value in down.quantizer("input").state().items():
        assert torch.equal(value, kept[name])
    for name, module in merged.named_modules():
        if isinstance(module, QuantLinear) and not name.endswith("down_proj"):
            weight = reference.get_submodule(name).weight
            quantizer = reference.get_submodule(name).quantizer("weight")
            assert torch.equal(module.quantizer("weight")(module.weight), quantizer(weight)), name


def test_adapters_of_experts_are_trained_restored_and_merged(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            num_local_experts=4,
        )
        return transformers.MixtralForCausalLM(config).eval()

    def adapted(base: Any) -> Any:
        torch.manual_seed(1)
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names)
        return peft.get_peft_model(base, config).eval()

    base = make()
    bt.quantize(base, "int8", [{"input_ids": IDS[:4]}])
    expected = logits(base)
    network = adapted(base)
    assert torch.equal(logits(network), expected)
    trained(network)
    assert not torch.equal(logits(network), expected)

    bt.save(network, tmp_path / "state")
    fresh = adapted(make())
    bt.restore(fresh, tmp_path / "state")
    assert torch.equal(logits(fresh), logits(network))

    merged = merge_adapters(network)
    reference = make()
    reference.load_state_dict(merged.state_dict())
    bt.quantize(reference, "int8", [{"input_ids": IDS[:4]}])
    ours, theirs = (m.model.layers[0].mlp.experts for m in (merged, reference))
    for slot in ("gate_up_proj", "down_proj"):
        weight = getattr(theirs, slot)
        assert torch.equal(
            ours.quantizer(slot)(getattr(ours, slot)), theirs.quantizer(slot)(weight)
        )


def test_a_merged_model_is_saved_and_loaded(tmp_path: Path) -> None:
    merged = merge_adapters(trained(wrapped(quantized())))
    bt.save(merged, tmp_path / "state")
    assert torch.equal(logits(bt.load(str(tmp_path / "state"))), logits(merged))


def test_a_reverted_model_is_merged_as_peft_does() -> None:
    network = trained(wrapped(quantized()))
    layer = network.base_model.model.get_submodule(DOWN)
    total = layer.base_layer.weight.detach() + layer.get_delta_weight("default")
    bt.revert(network)
    assert bt.modes_of(network) == ()
    merged = network.merge_and_unload()
    assert torch.equal(merged.get_submodule(DOWN).weight, total)
    assert type(merged.get_submodule(DOWN)) is nn.Linear


def test_an_export_with_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="merge adapters"):
        bt.export(wrapped(quantized()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_a_trainer_resumes_adapters_and_learned_ranges(packed: bool, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def run(path: Path, resume: Path | None) -> Any:
        base = quantized()
        if packed:
            bt.apply_mode(base, "compress")
        network = wrapped(base)
        args = transformers.TrainingArguments(
            str(path),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        ranges = bt.train_ranges(network, weights="fixed", activations="learned")
        callback = QuantizationCallback(ranges, resume_from=resume)
        trainer = transformers.Trainer(network, args, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return network.eval()

    whole = run(tmp_path / "whole", None)
    assert (tmp_path / "whole/checkpoint-2/adapter_model.safetensors").is_file()
    resumed = run(tmp_path / "again", tmp_path / "whole/checkpoint-2")
    assert torch.equal(logits(resumed), logits(whole))


def test_accelerate_keeps_the_stack_and_its_states_load(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    base = quantized()
    network = accelerator.prepare(base)
    expected = logits(network)
    assert [mode.name for mode in bt.modes_of(network)] == ["quantize"]
    accelerator.save_state(str(tmp_path / "accelerate"))
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
        base.get_submodule(DOWN).weight.mul_(2)
    accelerator.load_state(str(tmp_path / "accelerate"))
    assert torch.equal(logits(network), expected)
    bt.save(network, tmp_path / "state")
    assert torch.equal(logits(bt.load(str(tmp_path / "state"))), expected)


def test_prompts_around_a_model_are_refused_and_not_lost(tmp_path: Path) -> None:
    model = quantized()
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(model, prompts)
    with pytest.raises(CheckpointError, match=r"prompt_encoder\.default\.\S+ belongs to the Peft"):
        bt.save(wrapped, tmp_path / "state")
    bt.save(wrapped, tmp_path / "beside", state_only=True)
    bt.save(model, tmp_path / "state")
