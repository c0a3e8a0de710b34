"""Examples in the documentation run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tdpass
from tdpass.datasets import open_dataset
from tdpass.zoo import digits_net

ROOT = Path(__file__).resolve().parents[1]


def example(file: str, heading: str) -> str:
    """The first Python block under a heading."""
    text = (ROOT / "docs" / file).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_the_first_training_run(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(example("training.md", "A first run"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "first.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    folder, digits = tmp_path / "runs" / "digits", open_dataset("digits")
    assert {path.name for path in folder.iterdir()} >= {
        "model.safetensors",
        "plan.json",
        "report.json",
        "report.html",
        "log.csv",
    }
    small = tdpass.load(folder / "model.safetensors", digits_net()).eval()
    assert isinstance(small, torch.nn.Module)
    assert sum(parameter.numel() for parameter in small.parameters()) <= 0.31 * sum(
        parameter.numel() for parameter in digits_net().parameters()
    )
    assert digits.accuracy(small) > 95
