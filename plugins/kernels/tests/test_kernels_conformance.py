"""The plugin passes the conformance kit."""

from __future__ import annotations

import pytest

from bittern.testing import KernelConformance, PluginConformance
from bittern_kernels import cpu


class TestPlugin(PluginConformance):
    plugin = "kernels"


class TestKernels(KernelConformance):
    plugin = "kernels"

    @pytest.fixture(autouse=True)
    def every_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Small tensors take the kernel too, in several chunks."""
        sizes = dict.fromkeys(cpu.SMALLEST, 1)
        monkeypatch.setattr(cpu, "SMALLEST", sizes)
        monkeypatch.setattr(cpu, "SMALLEST_FLOAT32", sizes)
        monkeypatch.setattr(cpu, "SMALLEST_OF_ALL", 1)
        monkeypatch.setattr(cpu, "CHUNK", 256)


class TestKernelsAsTheyAre(KernelConformance):
    """With its own thresholds, under which most tensors here are left to the reference."""

    plugin = "kernels"
    examples = 5
