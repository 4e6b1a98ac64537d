"""What this plugin registers. Importing it loads neither torch nor a kernel."""

from __future__ import annotations

from bittern.hooks import hookimpl
from bittern.records import KernelRule

__all__ = ["register_kernels"]

# Block formats are missing on purpose: compiled, they are not faster than core.
FORMATS = (
    *(f"int{bits}" for bits in range(2, 9)),
    "int4-asym",
    "int8-asym",
    "fp8",
    "fp8-e5m2",
)


@hookimpl
def register_kernels() -> list[KernelRule]:
    """The backend ``compile``: fake quantization on the CPU through torch.compile."""
    return [
        KernelRule(
            op="fake_quantize",
            impl="bittern_kernels.compiled:fake_quantize",
            device="cpu",
            formats=FORMATS,
            backend="compile",
        )
    ]
