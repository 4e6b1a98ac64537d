"""What this plugin registers. Importing it loads neither torch nor a kernel."""

from __future__ import annotations

from bittern.hooks import hookimpl
from bittern.records import KernelRule

__all__ = ["register_kernels"]


@hookimpl
def register_kernels() -> list[KernelRule]:
    """Fake quantization on the CPU: int8, int4, fp8."""
    return [
        KernelRule(
            op="fake_quantize",
            impl="bittern_kernels.cpu:fake_quantize",
            device="cpu",
            formats=("int8", "int4", "fp8"),
        )
    ]
