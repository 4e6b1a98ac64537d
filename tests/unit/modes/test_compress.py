"""Compressing frees the memory of weights and changes no output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bittern.convert import modes_of, revert
from bittern.errors import CheckpointError, PlanError
from bittern.modes.compress import stored_bytes
from bittern.nn import TensorQuantizer, named_quantizers, quantizers_off
from bittern.nn.packed import PACKED, PackedWeight
from bittern.records import KernelRule
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
SameBits = Callable[[Tensor, Tensor], bool]

RECIPES = [
    "int8-weight-only",
    "int8",
    "int4",
    "fp8",
    "fp8-block",
    "fp8-dynamic",
    "nvfp4",
    "nvfp4a16",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "mxint8",
    "nf4",
    "w4a8",
    "int8-smoothquant",
]
WEIGHT_ONLY = ("int8-weight-only", "int4", "nvfp4a16", "nf4")


def weights(spec: Any, **more: Any) -> dict[str, Any]:
    return {"rules": [{"match": "*", "weight": spec, **more}]}


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, PackedWeight)}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_keep_their_bits_for_every_recipe(
    recipe: str,
    make_lm: Make,
    toolkit: Toolkit,
    token_batches: list[Tensor],
    tmp_path: Path,
) -> None:
    model, fresh = make_lm(width=64), make_lm(width=64)
    toolkit.quantize(model, recipe, token_batches)
    with torch.no_grad():
        expected = model(token_batches[0])
        applied = toolkit.apply_mode(model, "compress")
        assert torch.equal(model(token_batches[0]), expected)
        toolkit.save(model, tmp_path / "state")
        toolkit.restore(fresh, tmp_path / "state")
        assert torch.equal(fresh(token_batches[0]), expected)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(applied.metadata["packed"]) == packed_names(model) == packed_names(fresh)
    assert linears - {"head.weight"} <= packed_names(model)
    assert applied.metadata["left"] == {}
    assert [mode.name for mode in modes_of(fresh)] == ["quantize", "compress"]


@pytest.mark.parametrize("recipe", WEIGHT_ONLY)
def test_it_takes_the_bytes_that_the_plan_promised_and_so_do_the_files(
    recipe: str, make_lm: Make, toolkit: Toolkit, tmp_path: Path
) -> None:
    model = make_lm(width=64)
    promised = toolkit.quantize(model, recipe).plan.bytes_after
    toolkit.apply_mode(model, "compress")
    assert stored_bytes(model) == promised
    toolkit.save(model, tmp_path / "state")
    size = (tmp_path / "state" / "state.safetensors").stat().st_size
    assert promised <= size < promised + 6000  # the header, with its names


def test_nothing_keeps_the_old_weights_alive(make_mlp: Make, toolkit: Toolkit) -> None:
    import weakref

    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    model.requires_grad_(False)
    model(torch.ones(1, 8))  # fills the caches of rounded weights
    old = [weakref.ref(model.up.weight), weakref.ref(model.up.weight.untyped_storage())]
    toolkit.apply_mode(model, "compress")
    model(torch.ones(1, 8))
    assert [ref() for ref in old] == [None, None]
    assert all(q._cache is None and q.amax is None for _, q in named_quantizers(model))


# --- modules --------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


def channels_last() -> nn.Module:
    convs = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3))
    return convs.to(memory_format=torch.channels_last)


class Turned(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        found = torch.matmul(input, self.weight.t())
        return found if self.bias is None else found + self.bias


class Direct(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight) * 2


class Product(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(33, 5)), lambda: torch.randn(3, 33), 1),
    "own forwards": (
        lambda: nn.Sequential(Turned(16, 8), Direct(8, 8), Product(8, 4)),
        lambda: torch.randn(3, 16),
        3,
    ),
    "conv": (channels_last, lambda: torch.randn(2, 4, 9, 9), 2),
    "embedding": (lambda: nn.Sequential(nn.EmbeddingBag(9, 16)), lambda: torch.ones(2, 3).int(), 1),
    "lstm": (
        lambda: nn.LSTM(16, 32, 2, bidirectional=True, proj_size=8),
        lambda: torch.randn(5, 2, 16),
        12,
    ),
    "attention": (SelfAttention, lambda: torch.randn(3, 7, 32), 2),
    "three projections": (
        lambda: SelfAttention(kdim=32, vdim=32, add_bias_kv=True),
        lambda: torch.randn(3, 7, 32),
        2,
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1),
        lambda: torch.randn(3, 7, 32),
        4,
    ),
}


@pytest.mark.parametrize("inputs", [None, "int8"], ids=["weight only", "with inputs"])
@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module_keeps_its_bits(
    kind: str, inputs: str | None, toolkit: Toolkit, same_bits: SameBits
) -> None:
    torch.manual_seed(0)
    make, draw, count = MODULES[kind]
    model, x = make().eval(), draw()
    toolkit.quantize(model, weights("int8", input=inputs), [x])
    with torch.no_grad():
        expected = first(model(x))
        applied = toolkit.apply_mode(model, "compress")
        assert len(applied.metadata["packed"]) == count
        assert same_bits(first(model(x)), expected)
        assert same_bits(first(copy.deepcopy(model)(x)), expected)
        with quantizers_off(model):  # the rounded weights are all there is
            assert first(model(x)).isfinite().all()


@pytest.mark.parametrize(
    "spec",
    [
        {"format": "int4", "then": "fp8"},
        {"format": "int4", "rotate": {"back": True}},
        {"format": "int8", "affine": {"axes": [0]}},
        {"format": "int4-asym", "granularity": "group", "size": 32},
        {"format": "int8", "granularity": "block", "rows": 16, "cols": 16},
    ],
    ids=["chain", "rotation", "bias", "zero point", "blocks"],
)
def test_all_that_a_quantizer_does_around_rounding_stays(
    spec: dict[str, Any], toolkit: Toolkit, same_bits: SameBits, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    fresh = copy.deepcopy(model)
    toolkit.quantize(model, weights(spec))
    expected = model(x)
    toolkit.apply_mode(model, "compress")
    assert same_bits(model(x), expected)
    toolkit.save(model, tmp_path / "state")
    toolkit.restore(fresh, tmp_path / "state")
    assert same_bits(fresh(x), expected)


def test_a_rotation_of_both_operands_is_undone_by_reverting(toolkit: Toolkit) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    plain = model(x)
    spec = {"format": "int8", "rotate": {}}
    toolkit.quantize(model, weights(spec, input=spec), [x])
    toolkit.apply_mode(model, "compress")
    revert(model)
    assert not torch.equal(model(x), plain)
    torch.testing.assert_close(model(x), plain, atol=0.05, rtol=0)


def test_weights_in_one_piece_of_memory_do_not_keep_it(toolkit: Toolkit) -> None:
    layer = nn.Linear(64, 32)
    piece = torch.randn(32 * 64 + 32)  # as those of an RNN on a GPU
    layer.weight.data, layer.bias.data = piece[: 32 * 64].view(32, 64), piece[32 * 64 :]
    expected = layer.bias.detach().clone()
    model = nn.Sequential(layer)
    toolkit.quantize(model, "int8-weight-only")
    toolkit.apply_mode(model, "compress")
    assert layer.bias.untyped_storage().nbytes() == 32 * 4
    assert torch.equal(layer.bias, expected)


# --- what stays as it is --------------------------------------------------------------------------


def test_tied_weights_are_packed_once_or_left(
    make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor], same_bits: SameBits
) -> None:
    one = {"format": "int8", "granularity": "tensor"}
    cases: list[tuple[Any, Any, str | None]] = [
        (one, one, None),
        (one, "int4", "do not quantize it alike"),
        (one, None, "embed.weight is the same tensor, and reads it unquantized"),
    ]
    for head, embed, reason in cases:
        model = make_lm(tied=True)
        rules = [{"match": "head", "weight": head}, {"match": "embed", "weight": embed}]
        toolkit.quantize(model, {"rules": [{"match": "*.o", "weight": "int8"}, *rules]})
        with torch.no_grad():
            expected = model(token_batches[0])
            applied = toolkit.apply_mode(model, "compress")
            assert same_bits(model(token_batches[0]), expected)
        assert model.head.weight is model.embed.weight
        assert isinstance(model.head.weight, PackedWeight) == (reason is None)
        left = applied.metadata["left"]
        assert reason is None or reason in left["head.weight"]


@pytest.mark.parametrize(
    ("module", "spec", "reason"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "int8", "computed from others"),
        (lambda: nn.Embedding(9, 8, max_norm=1.0), "int8", "max_norm"),
        (
            lambda: nn.Linear(8, 8),
            {"format": "int8", "affine": {"axes": [0], "dynamic": True}},
            "computed from it in every forward",
        ),
        (lambda: nn.Linear(8, 8), {"format": "int8", "backend": "floor"}, "something else"),
        (lambda: nn.Linear(0, 8), "int8", "empty"),
    ],
    ids=["parametrized", "max_norm", "dynamic bias", "backend", "empty"],
)
def test_what_cannot_be_packed_is_left_and_named(
    module: Callable[[], nn.Module],
    spec: Any,
    reason: str,
    toolkit_with: Callable[..., Toolkit],
    make_plugin: Callable[..., Any],
) -> None:
    rule = KernelRule(
        op="fake_quantize", impl=f"{__name__}:floor", device="*", formats=("*",), backend="floor"
    )
    toolkit = toolkit_with(make_plugin("floor", register_kernels=lambda: [rule]))
    model = nn.ModuleDict({"odd": module(), "even": nn.Linear(8, 8)})
    rules = [{"match": "odd", "weight": spec}, {"match": "even", "weight": "int8"}]
    toolkit.quantize(model, {"rules": rules})
    applied = toolkit.apply_mode(model, "compress")
    assert applied.metadata["packed"] == ["even.weight"]
    assert reason in applied.metadata["left"]["odd.weight"]
    assert not isinstance(model["odd"].weight, PackedWeight)


def floor(x: Tensor, spec: Any, scales: Any, **more: Any) -> Tensor:
    """Round down: a backend with numerics of its own."""
    return (x / scales.scale).floor() * scales.scale


def test_weights_on_the_meta_device_are_left(make_mlp: Make, toolkit: Toolkit) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    model.up.to("meta")
    applied = toolkit.apply_mode(model, "compress")
    assert "meta device" in applied.metadata["left"]["up.weight"]


def test_a_model_without_quantized_weights_is_refused(make_mlp: Make, toolkit: Toolkit) -> None:
    with pytest.raises(PlanError, match="no quantized weight"):
        toolkit.apply_mode(make_mlp(), "compress")
    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    toolkit.apply_mode(model, "compress")
    with pytest.raises(PlanError):
        toolkit.apply_mode(model, "compress")
    assert [mode.name for mode in modes_of(model)] == ["quantize", "compress"]


# --- afterwards -----------------------------------------------------------------------------------


def test_adapters_beside_packed_weights_are_trained(make_mlp: Make, toolkit: Toolkit) -> None:
    """As in QLoRA: the weights are packed and frozen, gradients flow through them."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.before = nn.Linear(8, 8)
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(self.before(x))

    base = make_mlp()
    toolkit.quantize(base, "nf4")
    rounded = Adapted(copy.deepcopy(base))
    toolkit.apply_mode(base, "compress")
    packed = Adapted(base)
    packed.before.load_state_dict(rounded.before.state_dict())
    x = torch.randn(4, 8)
    for model in (rounded, packed):
        model.base.requires_grad_(False)
        model(x).square().sum().backward()
    assert packed.before.weight.grad.abs().sum() > 0
    assert torch.equal(packed.before.weight.grad, rounded.before.weight.grad)


def test_a_compiled_model_computes_the_same(
    make_lm: Make, toolkit: Toolkit, token_batches: list[Tensor]
) -> None:
    model = make_lm(width=32)
    toolkit.quantize(model, "nvfp4", token_batches)
    toolkit.apply_mode(model, "compress")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(token_batches[0]), model(token_batches[0]))


def test_half_precision_keeps_the_codes(make_mlp: Make, toolkit: Toolkit) -> None:
    model = make_mlp()
    toolkit.quantize(model, "nvfp4a16")
    toolkit.apply_mode(model, "compress")
    before = model.up.weight.dequantize()
    codes = model.up.weight.codes.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.up.weight.codes, codes)
    assert torch.equal(model.up.weight.dequantize(), before.bfloat16())
    assert model(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


def test_exports_hold_the_codes_of_a_compressed_model(make_lm: Make, toolkit: Toolkit) -> None:
    from bittern.exporting import packed_modules

    model = make_lm(width=32)
    toolkit.quantize(model, "nvfp4a16")
    before = {m.path: m.weights for m in packed_modules(model, toolkit.access)}
    toolkit.apply_mode(model, "compress")
    after = {m.path: m.weights for m in packed_modules(model, toolkit.access)}
    assert before.keys() == after.keys()
    for path, held in before.items():
        for name, quantized in held.items():
            assert torch.equal(after[path][name].codes, quantized.codes)
            assert torch.equal(after[path][name].scales.step, quantized.scales.step)


def test_it_is_not_quantized_twice_and_comes_back_when_a_restore_fails(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor], same_bits: SameBits, tmp_path: Path
) -> None:
    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    toolkit.apply_mode(model, "compress")
    expected, weight = model(batches[0]), model.up.weight
    with pytest.raises(PlanError, match="cannot be applied after 'compress'"):
        toolkit.quantize(model, "int4")
    other = make_mlp(hidden=12)
    toolkit.quantize(other, "int8-weight-only")
    toolkit.save(other, tmp_path / "other")
    with pytest.raises(CheckpointError):
        toolkit.restore(model, tmp_path / "other")
    assert model.up.weight is weight
    assert same_bits(model(batches[0]), expected)
    assert [mode.name for mode in modes_of(model)] == ["quantize", "compress"]


def test_a_calibration_leaves_packed_weights_alone(
    make_mlp: Make, toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    plan = toolkit.quantize(model, "int8", batches).plan
    toolkit.apply_mode(model, "compress")
    before = model.up.weight.dequantize()
    toolkit.calibrate(model, plan, [batch * 2 for batch in batches])
    assert torch.equal(model.up.weight.dequantize(), before)
    quantizers = {n: q for n, q in named_quantizers(model) if isinstance(q, TensorQuantizer)}
    assert quantizers["up.weight"].amax is None
    assert quantizers["up.input"].amax is not None


# --- damaged states -------------------------------------------------------------------------------


def test_a_state_without_a_part_or_of_another_model_is_refused(
    make_mlp: Make, toolkit: Toolkit, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    toolkit.apply_mode(model, "compress")
    toolkit.save(model, tmp_path / "state")
    with pytest.raises(CheckpointError):
        toolkit.restore(make_mlp(hidden=12), tmp_path / "state")
    file = tmp_path / "state" / "state.safetensors"
    tensors = load_file(file)
    del tensors[f"{PACKED}up.weight/scale"]
    save_file(tensors, file)
    fresh = make_mlp()
    before = fresh.state_dict()
    with pytest.raises(CheckpointError):
        toolkit.restore(fresh, tmp_path / "state")
    assert type(fresh.up) is nn.Linear
    assert all(torch.equal(fresh.state_dict()[name], t) for name, t in before.items())
