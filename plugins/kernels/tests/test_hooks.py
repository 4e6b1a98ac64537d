"""The plugin loads without torch and its rule resolves to the kernel."""

from __future__ import annotations

import subprocess
import sys

import torch

from bittern import Toolkit
from bittern_kernels import cpu


def test_hooks_import_no_torch():
    code = (
        "import sys, bittern_kernels.hooks as hooks\n"
        "hooks.register_kernels()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_toolkit_finds_the_kernel_for_every_format_and_dtype():
    table = Toolkit(plugins=["kernels"]).registry.kernels
    for name in ("int8", "int4", "fp8"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = table.find("fake_quantize", name, torch.device("cpu"), dtype)
            assert found is cpu.fake_quantize


def test_other_formats_and_dtypes_are_left_to_the_reference():
    table = Toolkit(plugins=["kernels"]).registry.kernels
    device = torch.device("cpu")
    assert table.find("fake_quantize", "nvfp4", device, torch.float32) is None
    assert table.find("fake_quantize", "int8", device, torch.float64) is None
