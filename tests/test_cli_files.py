"""What the command line does to files, and what it says.

Nothing is lost, and everything is named, in its own words.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tdpass
from tdpass.cli import main
from tdpass.cli.arguments import as_options
from tdpass.errors import DifferenceError, UsageError, WriteError
from tdpass.files import check_writable, folder_beside, replacing
from tdpass.report import Report

NET = (
    "import torch\nfrom torch import nn\n\ndef make():\n    torch.manual_seed(0)\n"
    "    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))\n"
)
OTHER = "def other():\n    return make()\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files_net.py").write_text(NET + "\n\n" + OTHER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32))


WORDS = [
    "--budget",
    "macs=0.6",
    "--data",
    "data.npz",
    "--effort",
    "fast",
    "--no-strict",
    "-o",
    "small.safetensors",
]


def compressed(model: str, *more: str) -> int:
    return main(["compress", f"files_net:{model}", *WORDS, *more])


def test_the_files_of_another_model_are_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert compressed("make", "--quiet") == 0
    before = {path.name: path.read_bytes() for path in Path().glob("small*")}
    assert len(before) == 4
    assert compressed("other", "--quiet") == 1
    said = capsys.readouterr().err
    assert all(name in said for name in (*before, "files_net:make", "--force"))
    assert {path.name: path.read_bytes() for path in Path().glob("small*")} == before
    assert compressed("make", "--quiet") == 0
    assert compressed("other", "--quiet", "--force") == 0
    assert Report.load("small.report.json").model == "files_net:other"
    Path("small.report.json").write_text("no report")
    assert compressed("other", "--quiet") == 1


def test_plan_and_report_are_there_where_what_was_saved_does_not_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise DifferenceError("what was saved does not load")

    monkeypatch.setattr(tdpass.Artifact, "save", damaged)
    assert compressed("make", "--quiet") == 1
    assert "what was saved does not load" in capsys.readouterr().err
    assert {path.name for path in Path().glob("small*")} == {
        "small.plan.json",
        "small.report.json",
        "small.report.html",
    }


def test_places_that_cannot_be_written_are_found_before_planning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*_: object, **__: object) -> None:
        raise AssertionError("planning began")

    monkeypatch.setattr(tdpass, "compress", planned)
    monkeypatch.setattr(tdpass, "make_plan", planned)
    Path("small.plan.json").mkdir()
    assert compressed("make") == 1
    assert "small.plan.json: it is a folder" in capsys.readouterr().err
    Path("plan.json").mkdir()
    assert main(["plan", "files_net:make", "--budget", "params=0.5", "-o", "plan.json"]) == 1
    assert "it is a folder" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot write"):
        check_writable(Path("missing/model.onnx"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError('I/O error: "No space left on device (os error 28)"'),
        OSError("400000 requested and 306700 written"),
    ],
)
@pytest.mark.parametrize("way", [replacing, folder_beside])
def test_a_full_disk_is_one_error_and_leaves_what_was_there(
    error: Exception, way: object, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("before")
    with pytest.raises(WriteError, match="no space is left"), way(path):
        raise error
    assert path.read_text() == "before"
    assert [place.name for place in tmp_path.iterdir() if ".part" in place.name] == []
    with pytest.raises(ValueError, match="another"), way(path):
        raise ValueError("another")


def test_a_full_disk_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["plan", "files_net:make", "--budget", "params=0.5", "-o", "plan.json", "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tdpass: error: cannot write plan.json: no space is left")


def test_data_beside_an_onnx_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import files_net

    monkeypatch.setattr("tdpass.models.onnx.model.EXTERNAL_ABOVE", 100)
    monkeypatch.setattr("tdpass.models.onnx.files.file._INLINE_BELOW", 10)
    torch.onnx.export(
        files_net.make().eval(),
        (torch.zeros(2, 24),),
        "net.onnx",
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    words = [
        "compress",
        "net.onnx",
        "--budget",
        "params=0.6",
        "--effort",
        "fast",
        "--no-strict",
        "-o",
        "small.onnx",
        "--json",
    ]
    assert main(words) == 0
    named = json.loads(capsys.readouterr().out)["files"].values()
    assert {str(path) for path in Path().glob("small*")} == set(named)
    assert any(name.endswith(".data") for name in named)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "nothing to run on; pass data= or example_inputs= (--data, --input)",
            "nothing to run on; give --data or --input",
        ),
        ("at a time; pass batch=4 (--batch 4)", "at a time; give --batch 4"),
        ("take it as it is with strict=False (--no-strict)", "take it as it is with --no-strict"),
        ("pass target='systolic:gemmini' (--target systolic:gemmini)", "give --target systolic:gemmini"),
        ("the model (torch) stays", "the model (torch) stays"),
    ],
)
def test_messages_name_options_of_the_command_line(said: str, shown: str) -> None:
    assert as_options(said) == shown


def noisy() -> nn.Module:
    warnings.warn("noise of a library", FutureWarning, stacklevel=1)
    logging.getLogger("torch.export").warning("noise in a log")
    return nn.Linear(4, 4)


def test_nothing_of_other_libraries_stands_before_a_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    level = logging.getLogger("torch").level
    assert main(["inspect", "tests.test_cli_files:noisy", "--input", "1x4"]) == 0
    assert "noise" not in "".join(capsys.readouterr())
    assert logging.getLogger("torch").level == level


@pytest.mark.slow
def test_verify_opens_every_kind_of_file(capsys: pytest.CaptureFixture[str]) -> None:
    import files_net

    net = files_net.make().eval()
    torch.onnx.export(
        net,
        (torch.zeros(2, 24),),
        "net.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("n")},),
    )
    torch.export.save(torch.export.export(net, (torch.zeros(2, 24),)), "net.pt2")
    assert compressed("make", "--quiet") == 0
    shape = ["--input", "2x24", "--tolerance", "10", "--quiet"]
    assert (
        main(
            [
                "deploy",
                "files_net:make",
                "small.safetensors",
                "--input",
                "2x24",
                "-o",
                "deployed.pt2",
                "--quiet",
            ]
        )
        == 0
    )
    for file in ("small.safetensors", "net.onnx", "net.pt2"):
        assert main(["verify", "files_net:make", file, *shape]) == 0
    assert main(["verify", "files_net:make", "deployed.pt2", *shape]) == 1
    assert "--trust" in capsys.readouterr().err
    assert main(["verify", "files_net:make", "deployed.pt2", "--trust", *shape]) == 0
