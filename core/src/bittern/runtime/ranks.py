"""Several processes that do one thing: all of them end well, or all of them with one error."""

from __future__ import annotations

import logging
from typing import Any

from torch import distributed as dist

from bittern.errors import BitternError

__all__ = ["agree", "alone", "is_first"]

log = logging.getLogger("bittern.ranks")


def alone() -> bool:
    """Whether this is the only process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def is_first() -> bool:
    """Whether this is the only process, or rank 0 of several."""
    return alone() or dist.get_rank() == 0


def agree(
    error: Exception | None = None, payload: Any = None, *, failure: type[BitternError]
) -> list[Any]:
    """Tell all ranks how this one fared; stop them all if one failed.

    Every rank must come here equally often; one that failed comes once more and never again.

    Args:
        error: What went wrong on this rank, if anything did.
        payload: Plain data for the others.
        failure: Kind of error to raise.

    Returns:
        The payloads by rank.

    Raises:
        BitternError: Of the kind ``failure``: a rank failed, and it names the rank and says why; or
            one is gone, or did not come within the time that the process group allows. In one
            process, ``error`` itself.
    """
    if alone():
        if error is not None:
            raise error
        return [payload]
    if error is not None:
        log.error("this rank failed, the others are told when they get here: %s", error)
    gathered: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(gathered, (_plain(error), payload))
    except RuntimeError as problem:  # gloo says that it closed, NCCL that it timed out
        raise failure(
            "another rank ended, or did not come in time",
            hint="look at what the other ranks wrote; every rank has to call this",
        ) from (error or problem)
    failed = [rank for rank, (problem, _) in enumerate(gathered) if problem is not None]
    if failed:
        what, where, hint = gathered[failed[0]][0]
        others = f" (and so did {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise failure(
            f"rank {failed[0]} of {len(gathered)} failed{others}: {what}", where=where, hint=hint
        ) from error
    return [theirs for _, theirs in gathered]


def _plain(error: Exception | None) -> tuple[str, str | None, str | None] | None:
    if error is None:
        return None
    if isinstance(error, BitternError):
        return error.what, error.where, error.hint
    return f"{type(error).__name__}: {error}", None, None
