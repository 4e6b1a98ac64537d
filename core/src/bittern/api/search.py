"""Find which part of a model gets which recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.toolkit import Toolkit, toolkit_or_default

if TYPE_CHECKING:
    from torch import nn

    from bittern.config import RecipeLike
    from bittern.records import DataConfig
    from bittern.runtime import Data, Progress
    from bittern.search import Latency, LossFunction, SearchResult

__all__ = ["auto_quantize"]


def auto_quantize(
    model: nn.Module,
    candidates: Sequence[RecipeLike] | Mapping[str, RecipeLike],
    data: Data | str | Path,
    *,
    bits: float | None = None,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    latency: Latency | None = None,
    method: str = "gradient",
    loss: LossFunction | None = None,
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    together: Sequence[str] = (),
    algorithm: Any = None,
    score_batches: int | None = None,
    scores: str | Path | None = None,
    points: int = 25,
    apply: bool = True,
    config: DataConfig | None = None,
    progress: Progress | None = None,
    toolkit: Toolkit | None = None,
) -> SearchResult:
    """Find which part of a model gets which recipe, and quantize the model so, in place.

    Modules that multiply one tensor (q, k and v; gate and up), as the trace finds them, and those
    that hold one parameter get one recipe together; every other module gets its own. For each such
    group it is measured what each candidate costs the model, and the least sum of these scores
    within the limits is found by an integer linear program.

    Args:
        model: Any PyTorch model that is not quantized yet. Memory meanwhile holds two copies of its
            tensors more; with ``method="gradient"`` also the activations of one batch.
        candidates: Recipes that a part may get, or names to recipes. To stay as it is, ``"none"``,
            is always one more choice.
        data: Batches, which are held in memory, or a path that a plugin reads. They calibrate every
            candidate, and sensitivity is measured on them.
        bits: At most this mean number of stored bits per element, scales included, of the weights
            that some candidate quantizes and that are not excluded.
        max_bytes: At most this many bytes of the whole model.
        max_seconds: At most this sum of latencies.
        latency: Module path to choice to seconds, ``"none"`` included; or a function of both.
        method: ``"gradient"``: the second-order estimate of the loss, from gradients and what
            quantization does to each output. ``"kl"``: the divergence of the whole model's
            predictions with only one group quantized, the most exact and slowest. ``"layer"``: the
            relative squared error of a group's outputs, the fastest.
        loss: For ``"gradient"``: a function of the model's output and the `bittern.runtime.Batch`
            that returns the sum of the losses. By default cross-entropy, against the batch's class
            labels where it has some, else against classes (tokens) that the model itself predicts.
        exclude: Globs of modules that stay as they are and do not count as weights.
        keep: Globs of modules that stay as they are, with their groups, and count.
        together: Globs of modules that get one choice per block, beside what the trace finds: an
            engine that runs all experts of a layer at once wants ``["*.experts.*"]``.
        algorithm: Calibration steps, as in a recipe; by default the candidates' own.
        score_batches: On how many batches sensitivity is measured, the first ones; all by default.
        scores: A file that keeps what was measured. A search that was killed goes on from there;
            one about another model, other data or candidates is refused.
        points: How many limits to try for the front.
        apply: Whether the model is quantized by what was found.
        config: How a path is read.
        progress: Shows where long work is.
        toolkit: Plugins to use; all that are installed by default.

    Returns:
        Choices, scores, what else could have been chosen, and the recipe.

    Raises:
        PlanError: The limits cannot be kept (it names what can be reached); or ``scores`` is of
            another search.
        BitternError: Bad candidates, data or weights; the model is then what it was.
    """
    from bittern.runtime import SILENT

    return toolkit_or_default(toolkit).auto_quantize(
        model,
        candidates,
        data,
        config=config,
        bits=bits,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        latency=latency,
        method=method,
        loss=loss,
        exclude=exclude,
        keep=keep,
        together=together,
        algorithm=algorithm,
        score_batches=score_batches,
        scores=scores,
        points=points,
        apply=apply,
        progress=progress if progress is not None else SILENT,
    )
