"""The plugin loads without torch, and serves who names its backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bittern import Toolkit
from bittern.errors import NumericsError
from bittern_kernels import compiled
from bittern_kernels.hooks import FORMATS

CPU = torch.device("cpu")


def test_hooks_import_no_torch():
    code = (
        "import sys, bittern_kernels.hooks as hooks\n"
        "hooks.register_kernels()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_backend_is_found_by_name_for_every_format_and_dtype():
    table = Toolkit(plugins=["kernels"]).registry.kernels
    assert table.backends() == ("compile",)
    for name in FORMATS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = table.find("fake_quantize", name, CPU, dtype, backend="compile")
            assert found is compiled.fake_quantize


def test_nobody_gets_a_compiler_without_asking():
    table = Toolkit(plugins=["kernels"]).registry.kernels
    assert table.find("fake_quantize", "int8", CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("name", "dtype"), [("nvfp4", torch.float32), ("int8", torch.float64)], ids=str
)
def test_what_the_backend_cannot_do_is_an_error(name, dtype):
    table = Toolkit(plugins=["kernels"]).registry.kernels
    with pytest.raises(NumericsError, match="no backend 'compile' does fake_quantize in"):
        table.find("fake_quantize", name, CPU, dtype, backend="compile")
