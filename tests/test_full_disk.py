"""A disk that is full: one line that names the file, and nothing left that is not whole."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tdpass
from tdpass.cli import main
from tdpass.report import Report

NET = (
    "import torch\nfrom torch import nn\n\ndef make():\n    torch.manual_seed(0)\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))\n"
)
RECIPE = """
model: full_net:make
data: digits
example: [1, 1, 8, 8]
method: {admm-tt: {budget: {params: 0.5}, format: svd, rounds: 1}}
"""
PLANNED = ["--budget", "macs=0.6", "--effort", "fast"]
COMPRESS = [
    "compress",
    "full_net:make",
    "--input",
    "2x1x8x8",
    "--no-strict",
    "-o",
    "small.safetensors",
    *PLANNED,
]


@contextmanager
def room_for_files_of(size: int) -> Iterator[None]:
    """No file can become larger, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full_net.py").write_text(NET)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    weight = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 64), ("y", 32))
    ]
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    graph = helper.make_graph([node], "net", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), "net.onnx")


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize(
    ("words", "size", "named", "kept"),
    [
        (COMPRESS, 100, "small.safetensors", set()),
        (COMPRESS, 4000, "small.safetensors", {"small.plan.json"}),
        (["compress", "net.onnx", "--no-strict", *PLANNED, "-o", "small.onnx"], 100, "trace", set()),
        (["plan", "full_net:make", "--budget", "params=0.6", "-o", "plan.json"], 100, "plan.json", set()),
        (["plan", "net.onnx", *PLANNED, "-o", "plan.json"], 100, "trace", set()),
        (["map", "full_net:make", "--target", "admm_32x32", "-o", "map.json"], 100, "map.safetensors", set()),
        (["train", "own.yaml", "--init", "full_net:make"], 100, "own.yaml", set()),
        (
            ["train", "recipe.yaml", "--folder", "run"],
            4000,
            "run/method/step-",
            {"run/run.json", "run/recipe.json", "run/log.csv"},
        ),
    ],
    ids=lambda value: "_".join(value[:2]) if isinstance(value, list) else None,
)
def test_every_verb_says_so_in_one_line_and_leaves_no_half_file(
    words: list[str], size: int, named: str, kept: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files()
    with room_for_files_of(size):
        assert main([*words, "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tdpass: error: cannot write ")
    assert named in line.split(": no space is left there")[0]
    assert files() - before == kept


def test_a_report_on_a_full_disk_leaves_the_page_that_was_there(capsys: pytest.CaptureFixture[str]) -> None:
    Report(model="net").save("net.report.json")
    Path("net.report.html").write_text("before")
    with room_for_files_of(1000):
        assert main(["report", "net.report.json", "--quiet"]) == 1
    assert "cannot write net.report.html: no space is left" in capsys.readouterr().err
    assert Path("net.report.html").read_text() == "before"


def test_the_plan_that_is_kept_is_gone_on_from(capsys: pytest.CaptureFixture[str]) -> None:
    with room_for_files_of(4000):
        assert main(COMPRESS) == 1
    assert "the plan is kept in small.plan.json; go on from it with --plan" in capsys.readouterr().err
    planned = tdpass.load_plan("small.plan.json")
    again = [*COMPRESS[: -len(PLANNED)], "--plan", "small.plan.json", "--force", "--quiet"]
    assert main(again) == 0
    chosen = {choice.site: (choice.format, choice.rank) for choice in tdpass.load_plan("small.plan.json")}
    assert chosen == {choice.site: (choice.format, choice.rank) for choice in planned}
