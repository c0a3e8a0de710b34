"""Where tests run Triton kernels: on a CUDA device, or interpreted on CPU in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tdpass.kernels import gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if gpu.available() and not INTERPRETED else "cpu"
ROOT = Path(__file__).parents[2]
TRITON = find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")
runs_kernels = pytest.mark.skipif(
    not TRITON or not (INTERPRETED or DEVICE == "cuda"),
    reason="no CUDA device; the interpreted run covers it",
)
on_device = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
starts_interpreted = pytest.mark.skipif(not TRITON or INTERPRETED, reason="this is the interpreted run")
compiles = pytest.mark.skipif(
    not TRITON or INTERPRETED or DEVICE == "cuda", reason="compiled and run elsewhere"
)


def run_interpreted(tests: str) -> None:
    """Run these tests once more, the kernels interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def tile(**values: int) -> dict[str, int]:
    return {"programs": 2, "m": 16, "n": 16, "k": 16, "warps": 4, "stages": 2, **values}
