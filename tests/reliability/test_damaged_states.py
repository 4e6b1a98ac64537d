"""Restoring from what a disk, a download or a stranger made of a saved state.

Nothing is loaded that is not what was saved, unless somebody also wrote checksums for it; and
whatever is in the files, there is one clear error, and the model is what it was.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import (
    PLACES,
    byte_damage,
    header_damage,
    json_damage,
    text_damage,
)

MANIFEST, TENSORS = "manifest.json", "state.safetensors"
Survive = Callable[[Any], dict[str, str]]


@pytest.fixture
def place(tmp_path: Path, state: Any) -> Callable[[str, bytes], Callable[[], Path]]:
    """Makes a directory with one file changed."""
    path = state.copy(tmp_path / "state")

    def changed(name: str, data: bytes) -> Callable[[], Path]:
        def write() -> Path:
            for other, whole in state.files.items():
                (path / other).write_bytes(data if other == name else whole)
            return path

        return write

    return changed


def unsealed(state: Any) -> dict[str, Any]:
    """Return the manifest without checksums, as somebody would who changes it on purpose."""
    data = json.loads(state.files[MANIFEST])
    del data["checksum"]
    del data["checksums"]
    return data


def test_every_value_of_the_manifest_may_be_wrong(survive: Survive, place: Any, state: Any) -> None:
    cases = [
        (label, place(MANIFEST, json.dumps(data).encode()))
        for label, data in json_damage(unsealed(state))
    ]
    outcomes = Counter(survive(cases).values())
    assert outcomes.total() == len(cases) > 1000
    assert outcomes["refused"] > len(cases) // 2, "the damage was not seen"


def test_a_changed_manifest_is_no_longer_what_was_written(
    survive: Survive, place: Any, state: Any
) -> None:
    data = json.loads(state.files[MANIFEST])
    cases = [
        (label, place(MANIFEST, json.dumps(changed).encode()))
        for label, changed in json_damage(data, ["x", 1])
        if changed != data
    ]
    kept = {label for label, found in survive(cases).items() if found != "refused"}
    assert kept == {"no checksum"}, "who takes it away, means it"


def test_text_that_is_no_manifest(survive: Survive, place: Any, state: Any) -> None:
    cases = [(label, place(MANIFEST, data)) for label, data in text_damage(state.files[MANIFEST])]
    assert set(survive(cases).values()) == {"refused"}


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_bytes_that_changed_on_their_way_are_never_loaded(
    name: str, survive: Survive, place: Any, state: Any
) -> None:
    cases = [(label, place(name, data)) for label, data in byte_damage(state.files[name], 300)]
    assert set(survive(cases).values()) <= {"refused", "same"}


@pytest.mark.parametrize("sealed", [True, False], ids=["checksums", "no checksums"])
def test_a_header_that_lies(sealed: bool, survive: Survive, place: Any, state: Any) -> None:
    write = place(TENSORS, b"")

    def unseal(data: bytes) -> Callable[[], Path]:
        def damaged() -> Path:
            path = write()
            (path / TENSORS).write_bytes(data)
            if not sealed:
                (path / MANIFEST).write_text(json.dumps(unsealed(state)))
            return path

        return damaged

    cases = [(label, unseal(data)) for label, data in header_damage(state.files[TENSORS])]
    outcomes = survive(cases)
    assert outcomes["two tensors swapped"] == ("refused" if sealed else "other")
    if sealed:
        assert set(outcomes.values()) <= {"refused", "same"}


def test_the_tensors_of_another_save_are_not_loaded(
    survive: Survive, place: Any, state: Any, make_state: Callable[..., Any]
) -> None:
    other = make_state("int8", seed=3)
    cases = [("theirs", place(TENSORS, other.files[TENSORS]))]
    cases += [("their manifest", place(MANIFEST, other.files[MANIFEST]))]
    assert set(survive(cases).values()) == {"refused"}


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_what_is_no_file_is_not_waited_for(
    name: str, survive: Survive, state: Any, tmp_path: Path
) -> None:
    def cases() -> Iterator[tuple[str, Callable[[], Path]]]:
        for label, put in PLACES.items():

            def damaged(put: Callable[[Path], object] = put) -> Path:
                path = state.copy(tmp_path / "state")
                put(path / name)
                return path

            yield label, damaged

    assert set(survive(cases()).values()) == {"refused"}


def test_the_cache_of_a_hub_is_read_through_its_links(
    survive: Survive, state: Any, tmp_path: Path
) -> None:
    """snapshots/REVISION/file is a link to blobs/HASH there."""
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = state.copy(tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs.mkdir()
    for number, name in enumerate(state.files):
        shutil.move(snapshot / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert survive([("cache", lambda: snapshot)]) == {"cache": "same"}

    (snapshot / TENSORS).unlink()
    (snapshot / TENSORS).symlink_to("../../../blobs/elsewhere")
    assert survive([("elsewhere", lambda: snapshot)]) == {"elsewhere": "refused"}


def test_a_whole_state_is_restored(survive: Survive, state: Any) -> None:
    assert survive([("whole", lambda: state.path)]) == {"whole": "same"}


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["nvfp4", "int4", "w4a8", "nf4"])
def test_manifests_of_other_recipes(
    recipe: str, survive: Survive, make_state: Callable[..., Any], tmp_path: Path
) -> None:
    other = make_state(recipe)
    path = other.copy(tmp_path / "state")

    def cases() -> Iterator[tuple[str, Callable[[], Path]]]:
        for label, data in json_damage(unsealed(other)):

            def damaged(data: Any = data) -> Path:
                (path / MANIFEST).write_text(json.dumps(data))
                return path

            yield label, damaged

    assert len(survive(cases())) > 500
