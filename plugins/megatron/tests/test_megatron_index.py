"""The index of a checkpoint is looked at before it is unpickled."""

from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from bittern.errors import CheckpointError
from bittern_megatron.index import check_index, named_in


class Evil:
    """What calls a function when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def write(folder: Path, data: bytes) -> Path:
    (folder / ".metadata").write_bytes(data)
    return folder


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_calls_a_function_is_refused(protocol: int, tmp_path: Path) -> None:
    index = Metadata(state_dict_metadata={}, planner_data=Evil())
    folder = write(tmp_path, pickle.dumps(index, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"would call (posix|nt)\.system"):
        check_index(folder)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_an_index_of_torch_is_taken(protocol: int, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    state = {"weight": torch.zeros(3, dtype=torch.bfloat16), "scale": torch.tensor(1.0)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(plain), no_dist=True)
    check_index(plain)
    index = dcp.FileSystemReader(plain).read_metadata()
    check_index(write(tmp_path, pickle.dumps(index, protocol=protocol)))


def test_a_dotted_name_does_not_pass_for_a_class(tmp_path: Path) -> None:
    # Protocol 4 looks up "OrderedDict.fromkeys" by its dots, and so it would any function.
    data = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    assert pickle.loads(data)({}) is not None
    with pytest.raises(CheckpointError, match=r"OrderedDict\.fromkeys"):
        check_index(write(tmp_path, data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle at all",
        pickle.dumps({"a": 1})[:-3],
        # the module's name is left on the stack from before something else
        b"\x80\x04\x8c\x05torch\x8c\x04SizeN0\x93.",
        # a name that only the memo knows, put there by an operation that pushed no text
        b"\x80\x04N\x94\x8c\x04Size\x94h\x00h\x01\x93.",
        b"\x80\x02cos\nsystem\n(S'true'\nio.".replace(
            b"cos\nsystem\n(S'true'\ni", b"(ios\nsystem\n"
        ),
    ],
    ids=["empty", "text", "cut", "popped", "memo", "inst"],
)
def test_what_is_no_plain_index_is_damaged(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        check_index(write(tmp_path, data))


def test_no_index_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        check_index(tmp_path)


def test_an_index_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        check_index(tmp_path)


def test_the_memo_is_followed() -> None:
    data = pickle.dumps([torch.Size([1]), torch.Size([2])], protocol=4)
    assert any(opcode.name == "BINGET" for opcode, _, _ in pickletools.genops(data))
    assert named_in(data) == {"torch Size"}
