"""A file that says itself how its network is built: loaded without a class, and never trusted."""

from __future__ import annotations

import base64
import copy
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import tdpass
from tdpass.cli import main
from tdpass.errors import InvalidModelError, UnsupportedError, UsageError
from tdpass.models.torch.saving.program_text import PROGRAM_KEY, program_of

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Tied weights, a buffer that is not saved, and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.arange(24.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3)) + 0.01 * self.scale
        made: Tensor = self.second(torch.relu(self.first(y)))
        return made


def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _saved(path: Path, budget: dict[str, float], **options: Any) -> tdpass.Artifact[Net]:
    made = tdpass.compress(_net(), budget, X, effort="fast", progress=False, cache=False)
    made.save(path, **options)
    return made


@pytest.mark.parametrize("budget", [{"params": 0.6}, {"bytes": 0.15}], ids=["factored", "int8"])
def test_a_file_with_its_program_needs_no_class(budget: dict[str, float], tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    made = _saved(path, budget, program=True)
    loaded, by_class = tdpass.load(path), tdpass.load(path, _net())
    assert [any(inner.training for inner in made.modules()) for made in (loaded, by_class)] == [False, False]
    for x in (X, X[:1], torch.cat([X, X])):
        torch.testing.assert_close(loaded.train()(x), loaded.eval()(x))
        torch.testing.assert_close(loaded(x), made.model(x))
    torch.testing.assert_close(by_class(X), made.model(X))
    weights = sum(tensor.nbytes for tensor in load_file(path).values())
    assert path.stat().st_size < weights + 60_000  # they are in it once


def test_the_command_line_opens_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.safetensors"
    _saved(path, {"params": 0.6}, program=True)
    assert main(["verify", str(path), str(path), "--input", "4x3x8x8"]) == 0
    capsys.readouterr()
    other = tmp_path / "digits.safetensors"
    words = ["--input", "2x1x8x8", "--budget", "params=0.9", "--program", "--no-strict", "--quiet"]
    assert main(["compress", "zoo:digits_net", *words, "-o", str(other)]) == 0
    with safe_open(other, framework="pt") as file:
        assert PROGRAM_KEY in file.metadata()


def test_a_file_without_one_says_how_to_get_it(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    _saved(path, {"params": 0.6})
    with pytest.raises(UsageError, match=r"DenseClass.*program=True"):
        tdpass.load(path)


def test_a_model_that_torch_cannot_export_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if float(y.sum()) > 0 else -y

    torch.manual_seed(0)
    made = tdpass.compress(Branching().eval(), {"params": 0.9}, X, effort="fast", progress=False, cache=False)
    with pytest.raises(UnsupportedError, match="cannot export"):
        made.save(tmp_path / "small.safetensors", program=True)
    assert not list(tmp_path.iterdir())


def _repacked(text: str, change: dict[bytes, bytes]) -> str:
    held, made = zipfile.ZipFile(io.BytesIO(zlib.decompress(base64.b64decode(text)))), io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in held.namelist():
            content = held.read(name)
            for old, new in change.items():
                content = content.replace(old, new)
            archive.writestr(name, content)
    return base64.b64encode(zlib.compress(made.getvalue())).decode()


@pytest.mark.parametrize(
    "change",
    [
        {b"torch.ops.aten.linear.default": b"torch.ops.load_library"},
        {b"torch.ops.aten.relu.default": b"os.system"},
        {b'"first.bias"': b'"missing"'},
        {b'{"as_int": 24}': b'{"as_int": 25}'},
    ],
    ids=["library", "function", "name", "shape"],
)
def test_a_program_that_was_changed_is_refused(change: dict[bytes, bytes], tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    _saved(path, {"params": 0.6}, program=True)
    with safe_open(path, framework="pt") as file:
        text, state = (
            file.metadata()[PROGRAM_KEY],
            {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
            },
        )
    state["second.weight"] = state.get("second.weight", torch.zeros(1))
    with pytest.raises(InvalidModelError):
        program_of(_repacked(text, change), copy.deepcopy(state), path)


@pytest.mark.parametrize("text", ["", "no base64!", base64.b64encode(zlib.compress(b"none")).decode()])
def test_text_that_is_no_program_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="not an intact"):
        program_of(text, {}, tmp_path / "small.safetensors")
