"""`tdpass deploy` and `tdpass doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tdpass.cli import main
from tdpass.kernels import build


@pytest.fixture(autouse=True)
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deploy_net.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(6, 4), "
        "torch.nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_deploy_names_what_it_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    words = ["deploy", "deploy_net:make", "--input", "1x6", "--dynamic-batch", "-o", "net.onnx", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "deploy_net:make",
        "files": ["net.onnx"],
        "fused": 0,
        "declined": {},
        "notes": [],
    }
    assert main(["deploy", "net.onnx", "-o", "copy.onnx"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "wrote copy.onnx"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["deploy_net:make", "-o", "net.bin"], 2, "must end in .pt2 or .onnx"),
        (["deploy_net:make", "-o", "net.pt2"], 1, "give --input"),
        (["deploy_net:make", "deploy_net:make", "-o", "net.pt2"], 2, "2 models are given"),
    ],
)
def test_deploy_refuses_in_one_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", *words]) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_doctor_lists_everything_without_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDPASS_KERNELS", str(tmp_path / "kernels"))
    main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert {"conv_chain", "linear_chain"} <= {row["name"] for row in document["operators"]}
    assert document["instruction_set"] in build.TARGETS
    assert document["packages"]["torch"]
    assert [library["name"] for library in document["libraries"]] == ["kernels", "binding", "onnxruntime"]
    assert not document["libraries"][1]["there"]
    assert any("not built yet" in line or "no C++ compiler" in line for line in document["advice"])
    assert not (tmp_path / "kernels").exists()


def test_doctor_says_what_to_do_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDPASS_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert main(["doctor"]) == 0
    assert "install g++ or clang, or set CXX" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "--build"]) == 1


def test_doctor_refuses_an_instruction_set_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDPASS_ISA", "mmx")
    assert main(["doctor"]) == 1
    assert "'mmx' cannot be used here" in " ".join(capsys.readouterr().out.split())
