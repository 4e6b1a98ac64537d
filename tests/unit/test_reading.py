"""Files that anybody may have written: content, or one error of the caller's kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import PLACES
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bittern import reading
from bittern.errors import CheckpointError, ModelError
from bittern.reading import (
    load_tensors,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    tensor_headers,
)


def parsed(text: str | bytes, *, strict: bool = True) -> Any:
    data = text.encode() if isinstance(text, str) else text
    return parse_json(data, error=CheckpointError, where="here", strict=strict)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes("é".encode())
    assert read_bytes(file, error=ModelError, limit=2) == "é".encode()
    assert read_text(file, error=ModelError, limit=2, within=tmp_path) == "é"


@pytest.mark.parametrize("place", list(PLACES)[1:])
def test_what_is_no_file_is_one_error(place: str, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    PLACES[place](file)
    for read in (read_json, load_tensors, tensor_headers):
        with pytest.raises(ModelError) as caught:
            read(file, error=ModelError)
        assert caught.value.where == str(file)


def test_no_more_is_read_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"xyz")
    assert read_bytes(tmp_path / "a", error=ModelError, limit=3) == b"xyz"
    with pytest.raises(ModelError, match="is larger than"):
        read_bytes(tmp_path / "a", error=ModelError, limit=2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_files_that_hide_their_size_have_the_same_limit() -> None:
    with pytest.raises(ModelError, match="is larger than"):
        read_bytes(Path("/proc/self/status"), error=ModelError, limit=10)


def test_a_path_that_is_none_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        read_bytes(tmp_path / "a\x00b", error=ModelError, limit=10)
    with pytest.raises(ModelError):
        read_bytes(tmp_path / ("a" * 5000), error=ModelError, limit=10)


def test_a_hint_is_for_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_bytes(tmp_path / "a", error=ModelError, limit=10, hint="look elsewhere")
    assert caught.value.hint == "look elsewhere"


# --- links ----------------------------------------------------------------------------------------


def link(file: Path, target: Path | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target)
    return file


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A hub's cache, a file outside of it, and a link to the cache."""
    for name in ("cache/blobs/01", "outside/01", "cache/snapshots/r/real"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    link(tmp_path / "linked", tmp_path / "cache" / "snapshots" / "r")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("a", "real"),
        ("a", "../../blobs/01"),
        ("deep/a", "../../../blobs/01"),
        ("deep/a", "../real"),
    ],
)
def test_links_within_a_directory_and_its_cache_are_followed(
    name: str, target: str, layout: Path
) -> None:
    directory = layout / "cache" / "snapshots" / "r"
    link(directory / name, target)
    for within in (directory, layout / "linked"):
        assert read_bytes(within / name, error=ModelError, limit=9, within=within) == b"x"


@pytest.mark.parametrize(
    "target", ["../../../outside/01", "../../blobs/../../outside/01", "/etc/hostname"]
)
def test_links_that_lead_out_are_refused(target: str, layout: Path) -> None:
    directory = layout / "cache" / "snapshots" / "r"
    file = link(directory / "a", target)
    if not file.exists():
        pytest.skip("this system has no such file")
    with pytest.raises(ModelError, match="is a link out of its directory"):
        read_bytes(file, error=ModelError, limit=1000, within=directory)


def test_a_directory_called_blobs_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "01").write_bytes(b"x")
    file = link(tmp_path / "state" / "rev" / "a", "../../blobs/01")
    with pytest.raises(ModelError, match="is a link out"):
        read_bytes(file, error=ModelError, limit=9, within=file.parent)


# --- JSON -----------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(plain, st.booleans())
def test_what_python_writes_is_read(data: Any, ascii: bool) -> None:
    assert parsed(json.dumps(data, ensure_ascii=ascii).encode("utf-8", "surrogatepass")) == data


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "too large"),
        ("18446744073709551616", "more than 64 bits"),
        ("-9223372036854775809", "more than 64 bits"),
        ("9" * 5000, "more than 64 bits"),
        ('{"a": 1, "a": 1}', "'a' is there twice"),
        ('{"x": [{"b": 1, "c": 2, "b": 3}]}', "'b' is there twice"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('"\\ud800"', "half a surrogate pair"),
        ('{"\\udc00": 1}', "half a surrogate pair"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("[" + "[]," * 3_000_000 + "1]", "more values"),
    ],
)
def test_what_we_do_not_write_is_one_error(text: str | bytes, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        parsed(text)
    assert caught.value.where == "here"


def test_whole_surrogate_pairs_and_escaped_backslashes_are_text() -> None:
    assert parsed('["\\ud83d\\ude00", "\\\\ud800"]') == ["😀", "\\ud800"]


def test_other_peoples_files_may_hold_what_python_writes() -> None:
    assert parsed('{"a": Infinity, "a": -Infinity}', strict=False) == {"a": float("-inf")}
    for text in ("{", "[" * 200_000, '"\\ud800"', "9" * 5000):
        with pytest.raises(CheckpointError):
            parsed(text, strict=False)


# --- tensors --------------------------------------------------------------------------------------


def test_tensors_and_their_headers_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int8)}
    save_file(tensors, tmp_path / "a")
    found = load_tensors(tmp_path / "a", error=ModelError, within=tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    headers = tensor_headers(tmp_path / "a", error=ModelError)
    assert {(h.name, h.dtype, h.shape) for h in headers} == {
        ("a", "F32", (2, 3)),
        ("b", "I8", (3,)),
    }


@pytest.mark.parametrize("limit", ["HEADER_TENSORS", "HEADER_COMMAS"])
def test_a_header_of_too_many_tensors_is_refused_before_it_is_parsed(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({f"t{i}": torch.zeros(0) for i in range(20)}, tmp_path / "a")
    assert len(tensor_headers(tmp_path / "a", error=ModelError)) == 20
    monkeypatch.setattr(reading, limit, 15)
    for read in (tensor_headers, load_tensors):
        with pytest.raises(ModelError, match="more tensors than a model has"):
            read(tmp_path / "a", error=ModelError)
