"""Core's own export: decoded by hand, verified, and every planted fault found."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bittern.errors import BitternError, ExportError, OutputError, PlanError
from bittern.exporting import ExportRecord, checksum
from bittern.nn import named_quant_modules
from bittern.records import Exporter, ExportReport, ModelAdapter
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]
SameBits = Callable[[Tensor, Tensor], bool]
ToolkitWith = Callable[..., Toolkit]

Spread = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]

FILE = "model.safetensors"


def parse(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Read a safetensors file by its specification, without the library."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    body = raw[8 + size :]
    return {
        name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Decode fp8 e4m3 by its definition."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - 7)
    return sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def decode(
    file: Path, name: str, groups: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
) -> Any:
    """Return float32 weights from the file: codes times scales, nothing of ours involved."""
    tensors = parse(file)
    kind, shape, data = tensors[name]
    if kind == "I8":
        values = np.frombuffer(data, np.int8).astype(np.float32)
    else:
        assert kind == "F8_E4M3"
        values = e4m3(np.frombuffer(data, np.uint8)).astype(np.float32)
    scale_kind, scale_shape, scale_data = tensors[f"{name}_scale"]
    assert scale_kind == "F32"
    scale = np.frombuffer(scale_data, np.float32).reshape(scale_shape)
    return torch.from_numpy(values.reshape(shape) * groups(scale, tuple(shape)))


def broadcast(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(scale, shape)


def in_groups(size: int) -> Spread:
    return lambda scale, shape: np.repeat(scale, size, -1)[..., : shape[-1]]


def in_blocks(rows: int, cols: int) -> Spread:
    def spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.repeat(np.repeat(scale, rows, -2), cols, -1)[..., : shape[-2], : shape[-1]]

    return spread


# --- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "groups"),
    [
        ({"format": "int8", "granularity": "channel"}, broadcast),
        ({"format": "int8", "granularity": "tensor"}, broadcast),
        ({"format": "int4", "size": 5}, in_groups(5)),
        ({"format": "int4", "size": 128}, in_groups(128)),
        ({"format": "int4", "rows": 3, "cols": 5}, in_blocks(3, 5)),
        ({"format": "fp8", "granularity": "tensor"}, broadcast),
        ({"format": "fp8", "granularity": "channel"}, broadcast),
        ({"format": "fp8", "size": 4}, in_groups(4)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_files_decode_to_what_was_simulated_bit_for_bit(
    *,
    weight: dict[str, Any],
    groups: Any,
    dtype: torch.dtype,
    make_mlp: Make,
    toolkit: Toolkit,
    tmp_path: Path,
    same_bits: SameBits,
) -> None:
    model = make_mlp().to(dtype)
    original = copy.deepcopy(model.state_dict())
    toolkit.quantize(model, {"rules": [{"match": {"class": "Linear"}, "weight": weight}]})
    report = toolkit.export(model, tmp_path / "out")

    for name in ("up", "down"):
        module = model.get_submodule(name)
        simulated = module.quantizer("weight")(module.weight.detach())
        decoded = decode(tmp_path / "out" / FILE, f"{name}.weight", groups)
        assert same_bits(decoded.to(dtype), simulated)
    assert report.quantized == 2
    names = parse(tmp_path / "out" / FILE)
    quantized = {"up.weight", "down.weight"}
    assert set(names) == set(original) | {f"{n}_scale" for n in quantized}
    for name in set(original) - quantized:
        data = original[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert names[name][2] == data


def test_static_activation_scales_are_stored(exported: tuple[Any, Path]) -> None:
    model, path = exported
    tensors = parse(path / FILE)
    for name in ("up", "down"):
        kind, shape, data = tensors[f"{name}.input_scale"]
        assert (kind, shape) == ("F32", [])
        expected = model.get_submodule(name).quantizer("input").scale
        assert struct.unpack("<f", data)[0] == expected.item()


def test_a_report_says_what_was_written(exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    model, path = exported
    report = toolkit.export(model, path.with_name("again"))

    assert report.path == str(path.with_name("again"))
    assert report.format == "safetensors"
    assert report.files == {f.name: f.stat().st_size for f in path.with_name("again").iterdir()}
    assert set(report.files) == {FILE, "bittern.json"}
    assert report.tensors == len(parse(path / FILE)) == 10
    assert report.bytes == sum(report.files.values())


def test_the_record_holds_the_plan_and_checksums(exported: tuple[Any, Path]) -> None:
    import bittern

    model, path = exported
    record = json.loads((path / "bittern.json").read_text())

    assert (record["format"], record["recipe"], record["schema"]) == ("safetensors", "int8", 1)
    assert record["bittern"] == bittern.__version__
    assert [(e["module"], e["slot"], e["granularity"]) for e in record["entries"]] == [
        ("up", "weight", "channel"),
        ("up", "input", "tensor"),
        ("down", "weight", "channel"),
        ("down", "input", "tensor"),
    ]
    assert record["skipped"] == {"norm": "no recipe rule names it"}
    assert set(record["tensors"]) == set(parse(path / FILE))
    simulated = model.up.quantizer("weight")(model.up.weight.detach())
    assert record["weights"]["up.weight"] == checksum(simulated)
    assert record["probe"] is None
    assert ExportRecord.read(path) is not None


def test_a_model_inside_of_a_wrapper_is_refused(
    exported: tuple[Any, Path], toolkit: Toolkit, tmp_path: Path
) -> None:
    wrapped: Any = torch.compile(exported[0])
    with pytest.raises(ExportError, match="the model that it wraps"):
        toolkit.export(wrapped, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_exporting_changes_nothing_in_the_model(
    exported: tuple[Any, Path], same_bits: SameBits, batches: list[Tensor], toolkit: Toolkit
) -> None:
    model, path = exported
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = model(batches[0])
    toolkit.export(model, path.with_name("again"))

    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())
    assert same_bits(model(batches[0]), expected)
    assert [n for n, _ in named_quant_modules(model)] == ["up", "down"]


def test_two_exports_of_one_model_are_the_same_bytes(
    exported: tuple[Any, Path], toolkit: Toolkit
) -> None:
    model, path = exported
    toolkit.export(model, path.with_name("again"))
    for name in (FILE, "bittern.json"):
        assert (path / name).read_bytes() == (path.with_name("again") / name).read_bytes()


# --- shared and odd tensors -----------------------------------------------------------------------


def test_a_tied_weight_that_stays_as_it_is_is_stored_once(
    make_lm: Make, toolkit: Toolkit, tmp_path: Path
) -> None:
    model = make_lm(tied=True)
    toolkit.quantize(model, {"rules": [{"match": "layers.*.q", "weight": "int8"}]})
    toolkit.export(model, tmp_path / "out")
    names = set(parse(tmp_path / "out" / FILE))

    assert "embed.weight" in names
    assert "head.weight" not in names


def test_a_tied_weight_that_one_reader_quantizes_is_stored_both_ways(
    make_lm: Make, toolkit: Toolkit, tmp_path: Path
) -> None:
    model = make_lm(tied=True)
    toolkit.quantize(model, {"rules": [{"match": "head", "weight": "int8"}]})
    toolkit.export(model, tmp_path / "out")
    tensors = parse(tmp_path / "out" / FILE)

    assert tensors["head.weight"][0] == "I8"
    assert tensors["embed.weight"][0] == "F32"


def test_a_module_under_two_names_is_stored_under_the_first(
    toolkit: Toolkit, tmp_path: Path
) -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    toolkit.quantize(model, "int8-weight-only")
    toolkit.export(model, tmp_path / "out")

    assert set(parse(tmp_path / "out" / FILE)) == {"0.weight", "0.weight_scale", "0.bias"}


class Views(nn.Module):
    """Tensors that share memory without being the same."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        base = torch.arange(16.0).reshape(4, 4)
        self.register_buffer("base", base)
        self.register_buffer("turned", base.t())
        self.register_buffer("part", base[:2])
        self.register_buffer("bits", base.view(torch.int32))
        self.register_buffer("same", base[:])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("one", torch.tensor(2.0).expand(1))
        self.register_buffer("wide", torch.ones(1).expand(3))
        self.register_buffer("flag", torch.tensor(data=True))


def test_tensors_that_overlap_are_all_stored_as_they_are(toolkit: Toolkit, tmp_path: Path) -> None:
    model = Views()
    expected = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("fc.w")}
    toolkit.quantize(model, "int8-weight-only")
    toolkit.export(model, tmp_path / "out")
    tensors = parse(tmp_path / "out" / FILE)

    assert "same" not in tensors  # the very same elements as base
    expected.pop("same")
    assert set(tensors) - {"fc.weight", "fc.weight_scale"} == set(expected)
    for name, tensor in expected.items():
        assert tensors[name][1] == list(tensor.shape)
        assert tensors[name][2] == tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_a_tensor_with_the_name_of_a_scale_is_refused(
    name: str, make_mlp: Make, toolkit: Toolkit, batches: list[Tensor], tmp_path: Path
) -> None:
    model = make_mlp()
    model.up.register_buffer(name, torch.ones(3))
    toolkit.quantize(model, "int8", batches)
    with pytest.raises(ExportError, match=f"a tensor 'up.{name}' of its own"):
        toolkit.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_adapters_dtype_is_the_one_on_disk(
    make_mlp: Make,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: ToolkitWith,
    tmp_path: Path,
) -> None:
    adapter = ModelAdapter(dtype="bfloat16")
    toolkit = toolkit_with(make_plugin("alpha", resolve_model_adapter=lambda: adapter))
    model = make_mlp()
    model.register_buffer("count", torch.tensor(3))
    toolkit.quantize(model, "int8-weight-only")
    toolkit.export(model, tmp_path / "out")

    kinds = {name: kind for name, (kind, _, _) in parse(tmp_path / "out" / FILE).items()}
    assert kinds["up.bias"] == kinds["norm.weight"] == "BF16"
    assert kinds["up.weight_scale"] == "F32"
    assert kinds["count"] == "I64"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.tensor(2.0).expand(1),  # stride 0, yet contiguous
        torch.tensor(2.0).expand(0),
        torch.tensor(1.5),
        torch.ones(2, 3).t(),
        torch.ones(4)[::2],
        torch.tensor([True, False]),
        torch.ones(3).to(torch.float8_e5m2),
        torch.ones(3, dtype=torch.complex64),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_every_tensor_has_a_checksum_of_bytes_dtype_and_shape(tensor: Tensor) -> None:
    assert checksum(tensor) == checksum(tensor.clone(memory_format=torch.contiguous_format))
    assert checksum(tensor) != checksum(tensor[None])
    if tensor.numel() and tensor.dtype != torch.float8_e5m2:
        assert checksum(tensor) != checksum(~tensor if tensor.dtype == torch.bool else tensor * 2)


def test_a_checksum_tells_plus_from_minus_zero_and_dtypes_apart() -> None:
    zero = torch.zeros(3)
    assert checksum(zero) != checksum(-zero)
    assert checksum(zero) != checksum(zero.int())


# --- refusals -------------------------------------------------------------------------------------


def test_a_plain_model_is_refused(make_mlp: Make, toolkit: Toolkit, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not quantized"):
        toolkit.export(make_mlp(), tmp_path / "out")


def test_a_directory_in_use_is_refused(exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    model, path = exported
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(OutputError, match="not empty"):
        toolkit.export(model, path)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before


def test_a_weight_that_went_bad_since_is_refused(
    exported: tuple[Any, Path], toolkit: Toolkit
) -> None:
    model, path = exported
    with torch.no_grad():
        model.up.weight[0, 0] = torch.nan
    with pytest.raises(BitternError, match="NaN or Inf"):
        toolkit.export(model, path.with_name("again"))
    assert [p.name for p in path.parent.iterdir()] == ["out"]


def test_an_unknown_format_names_the_nearest(exported: tuple[Any, Path], toolkit: Toolkit) -> None:
    model, path = exported
    with pytest.raises(ExportError, match="unknown export format 'safetensor'"):
        toolkit.export(model, path.with_name("again"), format="safetensor")


@pytest.fixture
def exporters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import sys

    module = ModuleType("exporters_of_a_test")

    def refuse(model: Any, context: Any) -> None:
        raise ExportError(f"not {context.plan.recipe}", hint="something else")

    module.__dict__.update(
        yes=lambda model: True, no=lambda model: False, refuse=refuse, write=None
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def exporter(name: str, **options: Any) -> Exporter:
    at = "exporters_of_a_test"
    targets = {k: f"{at}:{v}" for k, v in options.items() if isinstance(v, str)}
    rest = {k: v for k, v in options.items() if not isinstance(v, str)}
    return Exporter(name=name, **{"write": f"{at}:write", **targets, **rest})


@pytest.mark.usefixtures("exporters")
def test_the_best_exporter_that_takes_the_model_is_chosen(
    make_mlp: Make, make_plugin: Callable[..., ModuleType], toolkit_with: ToolkitWith
) -> None:
    items = [exporter("high", priority=9, accepts="no"), exporter("mid", priority=5, accepts="yes")]
    toolkit = toolkit_with(make_plugin("alpha", register_exporters=lambda: items))

    assert toolkit.exporter(make_mlp()).name == "mid"
    assert toolkit.exporter(make_mlp(), "safetensors").name == "safetensors"
    with pytest.raises(ExportError, match="'high' is not for a MLP") as caught:
        toolkit.exporter(make_mlp(), "high")
    assert caught.value.hint == "formats that are: mid, safetensors"


@pytest.mark.usefixtures("exporters")
def test_a_plan_that_a_client_cannot_load_is_refused_before_any_work(
    make_mlp: Make,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: ToolkitWith,
    tmp_path: Path,
) -> None:
    items = [exporter("picky", check="refuse")]
    toolkit = toolkit_with(make_plugin("alpha", register_exporters=lambda: items))
    model = make_mlp()
    with pytest.raises(ExportError, match="not int8"):
        toolkit.check_export(model, toolkit.plan(model, "int8"), "picky")
    toolkit.quantize(model, "int8-weight-only")
    with pytest.raises(ExportError, match="not int8-weight-only"):
        toolkit.export(model, tmp_path / "out", format="picky")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "said",
    [
        ["int4", {"format": "fp8", "granularity": "tensor"}],
        {"format": "int8", "rotate": {"back": True}},
        {"format": "int8", "affine": {"axes": [0]}},
    ],
    ids=["chained", "rotated", "biased"],
)
def test_a_plan_that_no_file_can_hold_is_refused_before_any_work(
    said: Any, make_mlp: Make, toolkit: Toolkit
) -> None:
    model = make_mlp()
    plan = toolkit.plan(model, {"rules": [{"match": "up", "weight": said}]})
    with pytest.raises(ExportError, match=r"^up\.weight is chained, rotated"):
        toolkit.check_export(model, plan, "safetensors")


# --- hooks after export ---------------------------------------------------------------------------


def test_a_plugin_adds_to_the_directory_before_it_has_its_name(
    make_mlp: Make,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: ToolkitWith,
    tmp_path: Path,
) -> None:
    seen: list[Any] = []

    def after_export(report: ExportReport, path: Path) -> None:
        seen.append((report.path, set(report.files), (tmp_path / "out").exists()))
        (path / "README.md").write_text("a card")

    toolkit = toolkit_with(make_plugin("alpha", after_export=after_export))
    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    report = toolkit.export(model, tmp_path / "out")

    assert seen == [(str(tmp_path / "out"), {FILE, "bittern.json"}, False)]
    assert (tmp_path / "out" / "README.md").read_text() == "a card"
    assert report.files["README.md"] == 6


def test_a_plugin_that_fails_after_export_leaves_nothing(
    make_mlp: Make,
    make_plugin: Callable[..., ModuleType],
    toolkit_with: ToolkitWith,
    tmp_path: Path,
) -> None:
    def after_export() -> None:
        raise KeyError

    toolkit = toolkit_with(make_plugin("alpha", after_export=after_export))
    model = make_mlp()
    toolkit.quantize(model, "int8-weight-only")
    with pytest.raises(BitternError, match="failed in hook after_export"):
        toolkit.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
