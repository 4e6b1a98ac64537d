"""Asks the client: runs client.py in a fresh process, with nothing of ours in it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittern.errors import VerificationError

__all__ = ["HALF_PRECISION_TOLERANCE", "TOLERANCE", "ask_client", "perplexity_after_reload"]

# Relative perplexity. In float32 the client's own rounding is far below; half precision rounds
# at other places in the client, and a short probe shows that noise.
TOLERANCE = 0.003
HALF_PRECISION_TOLERANCE = 0.01


def ask_client(
    path: Path, input_ids: list[list[int]] | None, *, dtype: str = "float32"
) -> dict[str, Any]:
    """Load a checkpoint in a fresh process and run token ids through it.

    Args:
        path: The checkpoint.
        input_ids: Rows of token ids, or ``None`` to load only.
        dtype: Name of the dtype to load in; float32 compares without half precision's noise.

    Returns:
        client.py's answer, or ``{"error": the message it died with}``.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"input_ids": input_ids, "dtype": dtype}), encoding="utf-8")
        script = Path(__file__).with_name("client.py")
        process = subprocess.run(
            [sys.executable, str(script), str(path), str(request), str(answer)],
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode != 0 or not answer.is_file():
            return {"error": _message(process.stderr) or f"exit code {process.returncode}"}
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _message(stderr: str) -> str:
    """Return the first line of the exception at the end of a traceback, else the last line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    calls = [i for i, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[calls[-1] + 1 :] if calls else []
    message = [line for line in after if not line.startswith(" ")]
    return (message or lines[-1:] or [""])[0]


def perplexity_after_reload(path: Path, rows: Tensor, *, expected: float | None = None) -> float:
    """Return the perplexity that the client computes on rows of token ids.

    Args:
        path: The checkpoint.
        rows: ``(rows, tokens)``.
        expected: Perplexity of the model in memory on the same rows.

    Raises:
        VerificationError: The client fails, misses or ignores tensors, or is more than
            `TOLERANCE` away from ``expected``.
    """
    answer = ask_client(path, rows.tolist())
    if "error" in answer:
        raise VerificationError(f"transformers fails: {answer['error']}", where=str(path))
    for kind in ("missing", "unexpected", "mismatched"):
        if answer[kind]:
            raise VerificationError(f"{kind} in transformers: {answer[kind][:3]}", where=str(path))
    nll = torch.tensor(answer["nll"], dtype=torch.float64)
    found = math.exp(float(nll.mean()))
    if expected is not None and abs(found / expected - 1) > TOLERANCE:
        raise VerificationError(
            f"perplexity {found:.4f} in transformers, {expected:.4f} in memory", where=str(path)
        )
    return found
