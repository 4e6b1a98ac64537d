"""What a framework plugin says about a live model, its weights, its data and its processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CheckpointIO", "DataConfig", "LoadConfig", "ModelAdapter", "ParallelState"]


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How `resolve_model` should load a model.

    Attributes:
        dtype: ``"auto"`` (float32 on a CPU, the checkpoint's own elsewhere) or a torch dtype name.
        device: Device to load to, ``"auto"`` for a GPU when there is one; ``"disk"`` for models
            larger than memory: the weights of a block are in memory while it runs.
    """

    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How `resolve_calibration_data` should read data.

    Attributes:
        samples: Number of rows at most; ``None`` takes all.
        seq_len: Tokens per row; ``None`` keeps the data's or the model's own length.
        batch_size: Rows per batch.
        seed: Seed of any sampling.
    """

    samples: int | None = None
    seq_len: int | None = None
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelAdapter:
    """What only the model's framework knows about it.

    Attributes:
        blocks: Paths of the repeated blocks, in order of execution.
        roles: Module path to role (``head``, ``router``, ``embedding``, ``norm``, ``tower``);
            recipes match roles.
        dtype: Name of the dtype that tensors which stay as they are have on disk, where that is
            not the dtype in memory.
        causal: Whether each position predicts the next token, which is what perplexity measures;
            ``None`` lets the shapes decide.
        quantized_by: Who quantized the model already, ``None`` for a plain model.
        vocab_size: Number of token ids the model takes, ``None`` where it takes none.
        example_inputs: Makes keyword arguments that run the model once.
        logits: Takes the model's output to its logits, ``(batch, tokens, vocab)``.
        call_kwargs: Keyword arguments for every call, such as ``use_cache=False``.
        tied: Groups of parameter names that share storage.
        experts: Module path of fused experts to their layout.
    """

    blocks: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    causal: bool | None = None
    quantized_by: str | None = None
    vocab_size: int | None = None
    example_inputs: Callable[[], Mapping[str, Any]] | None = None
    logits: Callable[[Any], Any] | None = None
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    experts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ParallelState:
    """Which process groups hold parts of a module's tensors.

    Attributes:
        reduce_groups: Process groups over which statistics of activations are reduced.
        weight_group: Group over which the weight is sharded, ``None`` when it is whole.
        shard_axis: Axis of the weight that is sharded.
    """

    reduce_groups: tuple[Any, ...] = ()
    weight_group: Any = None
    shard_axis: int | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointIO:
    """How a framework saves and loads a model's own tensors, beside our manifest.

    Attributes:
        name: Written to the manifest; the same name has to be there to restore.
        save: Called as ``save(model, tensors, path)``; it writes the model's own tensors, and
            ``tensors``, what the quantizers found out by name, into the directory ``path``. Every
            rank calls it.
        load: Called as ``load(model, path)`` with the converted model; it reads and checks, and
            returns what ``save`` was given as ``tensors``, and a function that fills the model's
            own tensors. Core calls that when nothing is left that could be refused, so that a
            restore that fails leaves the model as it was.
    """

    name: str
    save: Callable[[Any, Mapping[str, Any], Any], None]
    load: Callable[[Any, Any], tuple[Mapping[str, Any], Callable[[], object]]]
