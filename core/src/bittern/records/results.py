"""What evaluation, export and verification return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "CalibrationSummary",
    "Evaluation",
    "ExportReport",
    "Finding",
    "LayerError",
    "Verification",
]


@dataclass(frozen=True, kw_only=True)
class CalibrationSummary:
    """What calibration saw.

    Attributes:
        batches: Batches of data that went through the model; 0 when none were needed.
        seconds: Wall-clock seconds, conversion not included.
        uncalibrated: ``"path.slot"`` of static quantizers that saw no data.
        borrowed: Those of them that were given the largest range of quantizers like them, because
            the user allows it.
        data: Fingerprint of the batches, ``""`` where a function ran the model or no data was
            needed.
        unseen_experts: ``"path.slot"`` to the experts that no token went through. Their activations
            have the largest range of the others, their weights were calibrated without data.
        saturation: ``"path.slot"`` of static activations to the share of the data beyond their
            range, where a search chose it; at max there is none.
    """

    batches: int = 0
    seconds: float = 0.0
    uncalibrated: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()
    data: str = ""
    unseen_experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    saturation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Output error of one quantized module on the same input, quantizers on against off.

    Attributes:
        module: Dotted path.
        sqnr_db: ``10 log10(sum(y^2) / sum((y_q - y)^2))``; ``inf`` where nothing was lost.
    """

    module: str
    sqnr_db: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good a model is, and what quantization cost it.

    Attributes:
        perplexity: ``exp`` of the mean next-token cross-entropy; ``None`` without token data.
        tokens: Predicted tokens.
        accuracy: Share of right top-1 classes; ``None`` without class labels.
        samples: Rows of data.
        reference_perplexity: Perplexity with every quantizer off; ``None`` for a plain model.
        reference_accuracy: Accuracy with every quantizer off.
        kl: Mean KL(reference || quantized) of the output distributions, in nats.
        output_sqnr_db: SQNR of the model's outputs against the quantizers off.
        layers: Per-module output error, the worst first.
        seconds: Wall-clock seconds.
    """

    perplexity: float | None = None
    tokens: int = 0
    accuracy: float | None = None
    samples: int = 0
    reference_perplexity: float | None = None
    reference_accuracy: float | None = None
    kl: float | None = None
    output_sqnr_db: float | None = None
    layers: tuple[LayerError, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an exporter wrote.

    Attributes:
        path: The directory.
        format: Name of the exporter.
        files: File name to bytes.
        tensors: Number of tensors written.
        quantized: Number of quantized weights among them.
    """

    path: str
    format: str
    files: Mapping[str, int] = field(default_factory=dict)
    tensors: int = 0
    quantized: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a checkpoint."""

    tensor_or_field: str
    problem: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The verdict about a checkpoint.

    Attributes:
        ok: Whether nothing was found.
        path: The checkpoint.
        client: Who loaded it.
        findings: What is wrong.
        checks: What was compared, in words, with the measured values.
        perplexity: Perplexity in the client on the recorded probe.
        reference_perplexity: Perplexity of the fake-quantized model on the same probe.
    """

    ok: bool
    path: str
    client: str
    findings: tuple[Finding, ...] = ()
    checks: tuple[str, ...] = ()
    perplexity: float | None = None
    reference_perplexity: float | None = None
