"""The plugin passes the conformance kit."""

from __future__ import annotations

import pytest

from bittern.records import PerGroup, PerTensor
from bittern.testing import KernelConformance, PluginConformance
from bittern_kernels import compiled


class TestPlugin(PluginConformance):
    plugin = "kernels"


@pytest.mark.heavy
class TestKernels(KernelConformance):
    """Every row length is compiled anew: therefore granularities with one, and few examples."""

    plugin = "kernels"
    granularities = (PerTensor(), PerGroup(16))
    examples = 10

    @pytest.fixture(autouse=True)
    def every_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Small tensors are compiled too."""
        monkeypatch.setattr(compiled, "SMALLEST", 1)
