"""Blocks of Python in the documentation are run, with what their reader has at hand.

A block with `...` in it is an outline, and one that names a file runs as that file.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pages import ROOT, blocks
from torch import Tensor, nn

import tdpass
from tdpass.datasets import open_dataset
from tdpass.errors import BudgetError, UsageError
from tdpass.methods import AdmmTT

READ = [ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "training.md"]
# what takes longer than a second or two
COSTLY = re.compile(
    r"\b(compress|train|simulate|finish|add_task|open_break_even|torch\.compile|onnx_ops_path)\("
)
NETS = """\
import torch
from torch import nn


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def batches(seed):
    data = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 16, generator=data), torch.randint(4, (8,), generator=data)) for _ in range(8)
    ]
"""


class Reader:
    """What a reader has: a network, its data, and what is said to be there; each made when it is used."""

    tdpass, torch, F, AdmmTT = tdpass, torch, F, AdmmTT

    def __init__(self) -> None:
        self.digits = open_dataset("digits")
        self.images: Tensor = self.digits.inputs("calibration")[:64]
        self.example = self.x = self.images[:1]

    def DenseClass(self) -> nn.Module:  # noqa: N802 - a class of the reader's
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(256, 10))

    def accuracy(self, model: nn.Module) -> float:
        return self.digits.accuracy(model, "tuning")

    accuracy_on_validation = accuracy_on_test = accuracy

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.DenseClass()

    @functools.cached_property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        return list(self.digits.batches(0, 32))[:4]

    @functools.cached_property
    def loaders(self) -> list[list[tuple[Tensor, Tensor]]]:
        return [self.loader[:2]] * 4

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.01)

    @functools.cached_property
    def artifact(self) -> tdpass.Artifact[nn.Module]:
        return tdpass.compress(self.model, pipeline="quantize{numbers=int8}", example_inputs=self.example)

    @functools.cached_property
    def site(self) -> object:
        return next(iter(tdpass.models.open_model(self.model, self.example).sites()))

    @functools.cached_property
    def options(self) -> Any:
        return pytest.importorskip("onnxruntime").SessionOptions()

    def has(self, block: str) -> dict[str, object]:
        """Those of the names in the block that the reader has."""
        names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
        return {name: getattr(self, name) for name in sorted(names) if hasattr(type(self), name)} | {
            name: value for name, value in vars(self).items() if name in names
        }

    def write_files(self) -> None:
        """Files that the pages name."""
        Path("nets.py").write_text(NETS)
        torch.onnx.export(
            self.DenseClass().eval(),
            (self.images[:2],),
            "model.onnx",
            dynamic_shapes=({0: "n"},),
            verbose=False,
        )
        (table,) = (text for language, text in blocks(READ[1]) if language == "yaml" and "kind" in text)
        Path("accelerator.yaml").write_text(table)


def cases() -> Iterator[Any]:
    for page in READ:
        for number, (language, text) in enumerate(blocks(page)):
            if language == "python" and "..." not in text:
                marks = [pytest.mark.slow] if COSTLY.search(text) or text.startswith("#") else []
                yield pytest.param(text, id=f"{page.stem}-{number}", marks=marks)


@pytest.mark.parametrize("block", list(cases()))
def test_a_block_runs_as_it_stands(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reader = Reader()
    if '.onnx"' in block or ".yaml" in block or block.startswith("#"):
        reader.write_files()
    if block.startswith("#"):
        return run_of_two(block)
    try:
        exec(compile(block, "block", "exec"), reader.has(block))
    except UsageError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))
    except BudgetError as error:  # what is faster here depends on the machine
        if 'target="cpu"' not in block:
            raise
        pytest.skip(str(error))


def run_of_two(block: str) -> None:
    """A file that says how it is started."""
    name, _, command = block.partition("\n")[0].removeprefix("# ").partition(", started by: torchrun ")
    Path(name).write_text(block)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:.", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", *command.split()]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("small.safetensors").is_file()


def test_blocks_are_found() -> None:
    found = list(cases())
    assert len(found) >= 20
    assert sum(not case.marks for case in found) >= 5
