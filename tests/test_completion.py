"""Completion scripts name every verb, option and recipe, and work in the shell."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from tdpass.cli import _VERBS, _parser, main
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


@pytest.mark.parametrize("shell", SHELLS)
def test_every_value_that_an_option_has_to_choose_from_is_in_the_script(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    (verbs,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    for verb, parser in verbs.choices.items():
        for action in parser._actions:
            if action.option_strings and action.choices:
                option = action.option_strings[-1]
                line = (
                    f"seen_subcommand_from {verb}' -l {option[2:]} "
                    if shell == "fish"
                    else f'"{verb} {option}")'
                )
                (said,) = (found for found in text.splitlines() if line in found)
                assert all(str(value) in said for value in action.choices)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_sound(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    path = tmp_path / "script"
    path.write_text(script(shell, capsys))
    subprocess.run([shell, "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "script"
    path.write_text(script("fish", capsys))
    for said, expected in {
        "tdpass comp": ["completion", "compress"],
        "tdpass verify --tol": ["--tolerance"],
        "tdpass plan --effort ": ["fast", "normal", "thorough"],
        "tdpass completion z": ["zsh"],
    }.items():
        ask = f"source {path}; complete -C '{said}'"
        run = subprocess.run(["fish", "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert [line.partition("\t")[0] for line in run.stdout.splitlines()] == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tdpass", "comp"], ["completion", "compress"]),
        (["tdpass", "verify", "--tol"], ["--tolerance"]),
        (["tdpass", "train", "lenet5_p"], ["lenet5_pruned"]),
        (["tdpass", "compress", "model.o"], ["model.onnx"]),
        (["tdpass", "completion", "z"], ["zsh"]),
        (["tdpass", "plan", "model.onnx", "--effort", ""], ["fast", "normal", "thorough"]),
        (["tdpass", "inspect", "model.onnx", "--format", "block_"], ["block_term"]),
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
