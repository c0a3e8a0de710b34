"""What a start costs: no heavy library before its first use.

Small networks leave the machine to others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tdpass
from tdpass.clock import one_thread_if_small

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "constriction",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "PIL",
    "scipy",
    "sklearn",
    "sympy",
    "timm",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "transformers",
    "triton",
)


@pytest.mark.parametrize(
    "use",
    [
        "import tdpass",
        "import tdpass.cli; tdpass.cli.main(['doctor', '--help'])",
        "import tdpass.zoo, tdpass.datasets",
    ],
)
def test_heavy_libraries_are_imported_at_their_first_use(use: str) -> None:
    code = (
        f"import sys\ntry:\n    {use}\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(("macs", "threads"), [(0, 2), (1, 1), (1 << 22, 1), (1 << 23, 2)])
def test_small_networks_take_one_thread(macs: int, threads: int) -> None:
    torch.set_num_threads(2)
    with one_thread_if_small(macs):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_compressing_and_training_a_small_network_leave_the_threads_as_they_were() -> None:
    seen: list[int] = []

    class Net(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(x)

    def score(model: nn.Module) -> float:
        seen.append(torch.get_num_threads())
        return 1.0

    torch.set_num_threads(2)
    model, x = Net(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)), torch.randn(64, 16)
    tdpass.compress(model, {"macs": 0.6}, x, effort="fast", cache=False, strict=False)
    assert seen[-1] == 1
    data = [(x, torch.arange(64) % 4)]
    tdpass.train(
        model,
        data,
        {"admm-tt": {"budget": {"params": 0.6}, "format": "svd", "rounds": 1}},
        control=False,
        test=score,
        example_inputs=x[:1],
    )
    assert seen[-1] == 1
    assert torch.get_num_threads() == 2
