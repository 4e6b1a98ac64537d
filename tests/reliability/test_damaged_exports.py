"""Exports and other people's models that are damaged: `bittern inspect` and `bittern verify`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from damage import PLACES, byte_damage, header_damage, json_damage, text_damage
from torch import Tensor, nn

from bittern.cli.checkpoints import describe
from bittern.cli.main import make_cli
from bittern.errors import BitternError, VerificationError
from bittern.records import ModelAdapter
from bittern.toolkit import Toolkit

RECORD, CONFIG, TENSORS = "bittern.json", "config.json", "model.safetensors"
ODD: list[Any] = [None, -1, 1e308, "../x\x00\x1b[31m", [], [[]], {}, {"x": {"x": 1}}]
SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "int", "strategy": "token"},
            }
        },
    },
}


class TokenModel(nn.Module):
    """The least that has a probe."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(input_ids)))


@pytest.fixture(scope="module")
def export(
    tmp_path_factory: pytest.TempPathFactory,
    make_plugin: Callable[..., Any],
    toolkit_with: Callable[..., Toolkit],
) -> dict[str, bytes]:
    """The files of an export with a probe, and a config beside them."""
    adapter = ModelAdapter(vocab_size=8, causal=True, logits=lambda output: output)
    plugin = make_plugin("adapter", resolve_model_adapter=lambda model: adapter)
    path = tmp_path_factory.mktemp("export") / "out"
    torch.manual_seed(0)
    model, kit = TokenModel().eval(), toolkit_with(plugin)
    ids = torch.randint(0, 8, (2, 6), generator=torch.Generator().manual_seed(0))
    kit.quantize(model, "int8", data=[ids])
    kit.export(model, path, data=[ids])
    (path / CONFIG).write_text(json.dumps(SETTINGS))
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def put(export: dict[str, bytes], tmp_path: Path) -> Callable[..., Path]:
    """Writes the export with one file changed."""

    def write(name: str | None = None, data: bytes = b"", *, without: str = "") -> Path:
        path = tmp_path / "out"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for other, whole in export.items():
            if other != without:
                (path / other).write_bytes(data if other == name else whole)
        return path

    return write


def judged(toolkit: Toolkit, path: Path) -> str:
    """Return what verifying says: it never calls a damaged export sound."""
    try:
        return "sound" if toolkit.verify(path).ok else "unsound"
    except BitternError:
        return "refused"


def looked_at(path: Path) -> str:
    """Return whether a directory can be described, as JSON."""
    try:
        json.dumps(describe(path))
    except BitternError:
        return "refused"
    return "described"


def documents(export: dict[str, bytes], name: str, odd: list[Any]) -> Iterator[tuple[str, bytes]]:
    for label, data in json_damage(json.loads(export[name]), odd):
        yield label, json.dumps(data).encode()


def test_every_value_of_a_record_may_be_wrong(
    export: dict[str, bytes],
    put: Callable[..., Path],
    toolkit: Toolkit,
    no_hang: Callable[[], None],
) -> None:
    found: Counter[str] = Counter()
    for _, data in documents(export, RECORD, ODD):
        no_hang()
        path = put(RECORD, data)
        found[judged(toolkit, path)] += 1
        found[looked_at(path)] += 1
    assert found["refused"] > 500
    assert found["unsound"] > 20


def test_every_value_of_a_config_may_be_wrong(
    export: dict[str, bytes],
    put: Callable[..., Path],
    toolkit: Toolkit,
    no_hang: Callable[[], None],
) -> None:
    for label, data in documents(export, CONFIG, ODD):
        no_hang()
        path = put(CONFIG, data, without=RECORD)
        assert judged(toolkit, path) == "refused", label  # nobody here knows its format
        looked_at(path)


def test_damaged_tensors_are_never_called_sound(
    export: dict[str, bytes],
    put: Callable[..., Path],
    toolkit: Toolkit,
    no_hang: Callable[[], None],
) -> None:
    whole = export[TENSORS]
    cases = [*header_damage(whole), *byte_damage(whole, 200)]
    sound = []
    for label, data in cases:
        no_hang()
        path = put(TENSORS, data)
        if judged(toolkit, path) == "sound":
            sound.append(label)
        looked_at(path)
    assert len(cases) > 500
    # what a header may say besides is no damage
    assert all("bit" in label or "metadata" in label for label in sound), sound
    assert len(sound) < 10


@pytest.mark.parametrize("name", [RECORD, CONFIG])
def test_text_that_is_no_json(
    name: str,
    export: dict[str, bytes],
    put: Callable[..., Path],
    toolkit: Toolkit,
    no_hang: Callable[[], None],
) -> None:
    lenient = {"NaN", "Infinity", "too large a number", "a key twice"}  # what Python writes
    for label, data in text_damage(export[name]):
        no_hang()
        path = put(name, data, without=RECORD if name == CONFIG else "")
        assert judged(toolkit, path) == "refused", label
        if name == RECORD or label not in lenient:
            assert looked_at(path) == "refused", label


@pytest.mark.parametrize("name", [RECORD, CONFIG, TENSORS])
def test_what_is_no_file_is_not_waited_for(
    name: str, put: Callable[..., Path], toolkit: Toolkit, no_hang: Callable[[], None]
) -> None:
    for label, place in list(PLACES.items())[1:-1]:
        no_hang()
        path = put(without=RECORD if name == CONFIG else "")
        place(path / name)
        assert judged(toolkit, path) in ("refused", "unsound"), label
        assert looked_at(path) == "refused", label


def test_a_record_that_is_a_link_out_of_the_export_is_refused(
    put: Callable[..., Path], toolkit: Toolkit
) -> None:
    path = put()
    PLACES["a link out of the directory"](path / RECORD)
    with pytest.raises(VerificationError, match="link out of its directory"):
        toolkit.verify(path)


def some(cases: Iterable[tuple[str, bytes]], every: int) -> list[tuple[str, bytes]]:
    return list(cases)[::every]


def test_the_command_line_has_one_sentence_for_each(
    export: dict[str, bytes], put: Callable[..., Path], no_hang: Callable[[], None]
) -> None:
    """Exit code 1 is a bug of ours; 2 is an error that the user can read."""
    odd = ["[red]\x1b[31m\ud800", {"[/]": ["[/b]"]}]
    runner, cli = CliRunner(), make_cli()
    cases = [(RECORD, *case) for case in some(documents(export, RECORD, odd), 12)]
    cases += [(CONFIG, *case) for case in documents(export, CONFIG, odd)]
    cases += [(CONFIG, *case) for case in text_damage(export[CONFIG])]
    cases += [(TENSORS, *case) for case in some(header_damage(export[TENSORS]), 16)]
    for number, (name, label, data) in enumerate(cases):
        no_hang()
        words = ["inspect", str(put(name, data, without=RECORD if name == CONFIG else ""))]
        done = runner.invoke(cli, [*words, "--json"] if number % 2 else words)
        assert done.exit_code in (0, 2), f"{name}, {label}: {done.output}"
        assert "Traceback" not in done.output, label
