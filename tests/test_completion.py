"""Completion scripts name every verb, option and recipe, and work in the shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tdpass.cli import _VERBS, main
from tdpass.cli.completion import SHELLS
from tdpass.methods.recipe import names


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_every_verb_and_recipe_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(name in text for name in names())
    assert len(_VERBS) >= 10
    for verb in ("inspect", "compress", "train", "verify", "completion"):
        assert verb in text
    assert "checkpoint-every" in text
    assert "json" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tdpass", "comp"], ["completion", "compress"]),
        (["tdpass", "verify", "--tol"], ["--tolerance"]),
        (["tdpass", "train", "lenet5_p"], ["lenet5_pruned"]),
        (["tdpass", "compress", "model.o"], ["model.onnx"]),
        (["tdpass", "completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").touch()
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _tdpass; printf "%s\\n" "${{COMPREPLY[@]}}"'
    run = subprocess.run(
        ["bash", "-c", f"{script('bash', capsys)}\n{ask}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(run.stdout.split()) == expected
