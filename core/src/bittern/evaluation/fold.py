"""Folds weights for the duration of a block, instead of rounding them on every forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from bittern.nn.folding import prepare_folds

__all__ = ["folded_weights"]


@contextmanager
def folded_weights(model: nn.Module) -> Iterator[Callable[[bool], None]]:
    """Hold rounded copies of all weights while the block runs; then all is as before, bit for bit.

    Yields:
        A switch: ``switch(True)`` runs the model with rounded weights (the start),
        ``switch(False)`` with the original ones. Weights that cannot be folded (see
        `bittern.nn.weights.quantized_weights`) are left alone, and rounded on every pass.
    """
    folds, _ = prepare_folds(model)
    links = [link for fold in folds for q in fold.weight.quantizers for link in q.chain()]
    before = [(link, link.enabled) for link in links]

    def switch(on: bool) -> None:
        for fold in folds:
            fold.on() if on else fold.off()
        for link, enabled in before:
            link.enabled = enabled and on

    try:
        switch(True)
        yield switch
    finally:
        switch(True)
        for fold in folds:
            fold.off()
