"""The other end of `bittern.testing.processes`: runs one function in a process of its own.

Run as ``python -P -m bittern.testing.child FOLDER RANK``; FOLDER holds the job, and gets the
result or the traceback.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(folder: Path, rank: int) -> int:
    """Run the job as ``rank`` and return the exit code."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.path[:] = job["path"]
    try:
        from bittern.testing.exchange import write_value

        write_value(folder, f"result-{rank}", _run(folder, rank, job))
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    return 0


def _run(folder: Path, rank: int, job: dict[str, Any]) -> object:
    import torch

    from bittern.testing.exchange import read_value
    from bittern.testing.references import Reference

    torch.set_num_threads(job["threads"])  # sums depend on it, down to their bits
    function = Reference(**job["function"]).resolve()
    args = read_value(folder, "args")
    world = job["world"]
    if world is None:
        return function(*args)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=job["timeout"]),
    )
    # After an error the group is not left: the others would fail too, and maybe say so earlier.
    result = function(rank, world, *args)
    torch.distributed.barrier()  # nobody leaves while another still needs the store
    torch.distributed.destroy_process_group()
    return result


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's threads sometimes abort a process that ends the long way
