"""`--isolate`: the verb's own output and exit code, and one line where it takes too much or crashes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hostile_files import REFUSED, SERVED

import tdpass.cli.isolation
from tdpass.cli import main
from tdpass.cli.isolation import Limits
from tdpass.errors import UnsupportedError

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs limits of processes"),
    pytest.mark.timeout(280),
]
LIMITS = Limits(seconds=120, memory=4 << 30)


def instead(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the isolated process do something else once it has its limits."""
    before, run, _ = tdpass.cli.isolation._ENTRY.partition("sys.exit")
    assert run
    monkeypatch.setattr(tdpass.cli.isolation, "_ENTRY", before + code)


def test_output_and_exit_code_are_those_of_the_verb(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner").mkdir()
    sound, broken = (
        SERVED["a grouped convolution"](tmp_path),
        REFUSED["a part longer than the file"][0](tmp_path / "inner"),
    )
    assert main(["inspect", str(sound), "--json"]) == 0
    expected = json.loads(capfd.readouterr().out)
    assert main(["inspect", str(sound), "--json", "--isolate"]) == 0
    assert json.loads(capfd.readouterr().out) == expected
    assert main(["inspect", str(broken), "--isolate"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "it is cut short; the file is damaged or not ONNX" in err


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import time; time.sleep(600)", "did not end within 3 seconds"),
        ("import os; os.abort()", "was ended by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
    ],
    ids=["time", "crash", "killed"],
)
def test_what_takes_too_long_or_crashes_is_one_error(
    code: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead(code, monkeypatch)
    limits = Limits(3, LIMITS.memory) if "sleep" in code else LIMITS
    with pytest.raises(UnsupportedError, match=says):
        limits.run([])


def test_what_takes_too_much_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import tdpass.cli.inspect as verb; verb.read_source = lambda *given: bytearray(8 << 30); "
        "sys.exit(cli.main(sys.argv[3:], contained=True))"
    )
    instead(code, monkeypatch)
    assert LIMITS.run(["inspect", "m.onnx"]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "there is not enough memory for this" in err


@pytest.mark.slow
def test_nothing_of_an_ended_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = f"tdpass.files.replacing(pathlib.Path({str(tmp_path / 'out.onnx')!r}))"
    instead(
        f"import os, pathlib, time, tdpass.files; entered = {inside}; entered.__enter__(); time.sleep(600)",
        monkeypatch,
    )
    with pytest.raises(UnsupportedError):
        Limits(25, LIMITS.memory).run([], [tmp_path])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [["--isolate-memory", "much"], ["--isolate-memory", "0"], ["--isolate-seconds", "0"]]
)
def test_limits_that_are_none_are_wrong_usage(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "m.onnx", "--isolate", *option]) == 2
    assert "is no" in capsys.readouterr().err.replace("is not a whole", "is no whole")
