"""Exit codes of all verbs: 2 for words that are wrong by themselves, 1 where what they name does not work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tdpass import errors
from tdpass.cli import _VERBS, _parser, main
from tdpass.cli.values import CommandLineError

NAMES = [module.__name__.rpartition(".")[2].partition("_")[0] for module in _VERBS]
# options that take any text: what they name is looked for when the verb runs
FREE = {
    *("against", "data", "exclude", "folder", "include", "init", "overridable"),
    *("plan", "processor", "recipe", "report", "report_dir"),
}
GIVEN = {"shell": "bash", "report": "none.json"}
ENDINGS = {"compress": ".safetensors", "deploy": ".pt2", "map": ".json"}
MORE = {
    "plan": ["--budget", "params=0.5"],
    "compress": ["--budget", "params=0.5"],
    "train": ["none.yaml", "--folder", "run"],
}
ERRORS = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, errors.TdpassError)
]


def verbs() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def actions(verb: str) -> Iterator[argparse.Action]:
    for action in verbs()[verb]._actions:
        if action.nargs != 0:  # those take no value
            yield action


def words(verb: str, model: str = "zoo:digits_net") -> list[str]:
    """A command that nothing is wrong with, whether or not what it names is there."""
    found = [verb]
    for action in actions(verb):
        if action.required and action.option_strings:
            found += [action.option_strings[0], f"out{ENDINGS[verb]}"]
        elif action.required:
            found.append(GIVEN.get(action.dest, model))
    return [*found, *MORE.get(verb, [])]


def takes_model(verb: str) -> bool:
    return "zoo:digits_net" in words(verb)


@pytest.fixture(autouse=True)
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def failing(module: ModuleType, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> int:
        raise error

    monkeypatch.setattr(module, "run", run)


def test_every_verb_is_here() -> None:
    assert list(verbs()) == NAMES


@pytest.mark.parametrize("verb", NAMES)
def test_a_word_that_means_nothing_is_the_command_lines_fault(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(verb), "--no-such-option"]) == 2
    assert f"--no-such-option; see `tdpass {verb} --help`" in capsys.readouterr().err


@pytest.mark.parametrize("verb", NAMES)
def test_a_value_that_no_option_allows_is_the_command_lines_fault(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in actions(verb):
        if action.dest in FREE:
            assert action.type in (None, Path)
            assert action.choices is None
            continue
        option = action.option_strings[-1:]
        assert main([*words(verb), *option, "?!"] if option else [verb, "?!"]) == 2, action.dest
        (said,) = capsys.readouterr().err.splitlines()
        assert not option or any(word in said for word in action.option_strings)


@pytest.mark.parametrize("verb", [verb for verb in NAMES if takes_model(verb)])
@pytest.mark.parametrize("model", ["none.onnx", "none.pt2", "zoo:nothing", "no_such_module:make"])
def test_a_model_that_is_not_there_is_no_fault_of_the_command_line(
    verb: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = Path(model).suffix or ENDINGS.get(verb, "")
    said = [word.replace("out.safetensors", f"out{ending}") for word in words(verb, model)]
    assert main(said) == 1, capsys.readouterr().err
    assert capsys.readouterr().err.startswith("tdpass: error: ")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("command", [["report", "none.json"], words("train"), ["inspect", "zoo:digits_net"]])
def test_a_file_that_is_not_there_is_no_fault_of_the_command_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "none.npz"] if command[0] == "inspect" else []
    assert main([*command, *data]) == 1
    assert "none." in capsys.readouterr().err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("verb", NAMES)
def test_codes_of_what_a_verb_raises(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = _VERBS[NAMES.index(verb)]
    expected = {
        **dict.fromkeys([*ERRORS, OSError, MemoryError], 1),
        CommandLineError: 2,
        KeyboardInterrupt: 130,
        ZeroDivisionError: 70,
        RuntimeError: 70,
    }
    for kind, code in expected.items():
        failing(module, kind("no good"), monkeypatch)
        assert main(words(verb)) == code, kind
        assert "Traceback" not in capsys.readouterr().err


def test_help_says_what_the_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out.partition("exit codes:")[2].split()
    assert [word for word in said if word.isdigit()] == ["0", "1", "2", "3", "70", "130"]
