"""Examples in the documentation run as they stand, and what it names is there."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc import ErrorDuringImport, locate

import pytest
import torch
import yaml
from pages import PAGES, ROOT, blocks

import tdpass
from tdpass.cli import _parser
from tdpass.datasets import open_dataset
from tdpass.errors import UsageError
from tdpass.zoo import digits_net

OF_OTHERS: set[str] = set()  # options of other programs
NO_OBJECTS = {"tdpass.backend", "tdpass.h", "tdpass.settings"}  # a logger, a header, a key of metadata
READERS = {
    "python": lambda text: compile(text, "example", "exec"),
    "json": json.loads,
    "yaml": yaml.safe_load,
}


def commands(page: Path) -> list[list[str]]:
    """The words of every whole `tdpass VERB ...` in the blocks of a page; those with `...` or `|` are not whole."""
    lines = "\n".join(text for language, text in blocks(page) if not language).splitlines()
    said = [re.sub(r"\s#.*|[\[\]]", "", line) for line in lines if line.startswith("tdpass ")]
    return [shlex.split(line) for line in said if not {"...", "|"} & set(line.split())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_sound(page: Path) -> None:
    for language, text in blocks(page):
        if language in READERS:
            READERS[language](f"{{{text}}}" if language == "json" and not text.startswith("{") else text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_has_words_that_the_command_line_knows(page: Path) -> None:
    for words in commands(page):
        assert isinstance(_parser().parse_args(words[1:]), argparse.Namespace), words


def test_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 11


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_and_verb_that_a_sentence_names_is_there(page: Path) -> None:
    verbs = next(
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    known = {option for verb in verbs.values() for option in verb._option_string_actions} | {"--version"}
    for verb, rest in re.findall(r"`tdpass ([a-z]+)([^`\n]*)`", page.read_text(encoding="utf-8")):
        assert verb in verbs
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest)) <= set(verbs[verb]._option_string_actions), rest
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"`(--[a-z][\w-]*)", text)) - known <= OF_OTHERS


def is_there(name: str) -> bool:
    """Whether there is such an object, or a module that needs a library which is not installed."""
    try:
        return locate(name) is not None
    except ErrorDuringImport as error:
        return isinstance(error.value, ImportError | UsageError)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_of_the_package_is_there(page: Path) -> None:
    named = set(re.findall(r"\btdpass(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named - NO_OBJECTS) if not is_there(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_to_a_file_leads_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


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
