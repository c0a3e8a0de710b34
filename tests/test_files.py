"""Files are there whole or not at all, and what a killed process left beside them goes with the next one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdpass.errors import KernelError, UsageError
from tdpass.files import folder_beside, remove_stale, replacing, scratch_folder, write_text
from tdpass.kernels import build

KILLED = """
import os, signal, sys
from pathlib import Path
from tdpass.files import folder_beside, replacing, scratch_folder
scratch_folder()
with replacing(Path(sys.argv[1]) / "plan.json") as one, folder_beside(Path(sys.argv[1]) / "model.onnx") as two:
    one.write_text("half")
    (two / "model.onnx").write_text("half")
    print(one.name, two.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    (tmp_path / "plan.json").write_text("whole")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    assert len(done.stdout.split()) == 2
    assert len(list(tmp_path.iterdir())) == 4
    with folder_beside(tmp_path / "mine.onnx") as mine:
        write_text(tmp_path / "other.json", "new")
        assert mine.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "plan.json", "other.json"}
    assert (tmp_path / "plan.json").read_text() == "whole"
    assert len(list(scratch.glob("tdpass-*"))) == 1
    remove_stale(scratch)
    assert not list(scratch.glob("tdpass-*"))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    made = scratch_folder()
    assert list(scratch.glob("tdpass-*")) == [made]


def test_only_stale_temporaries_of_tdpass_are_removed(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.json") as living:
        host = living.name.split("tdpass-")[1].split("-")[0]
        kept = [
            living,
            tmp_path / ".other.Xy12.part",
            tmp_path / "tdpass-notes",
            tmp_path / f".a.tdpass-{'0' * 8}-1-new.part",
        ]
        gone = [
            tmp_path / f".a.tdpass-{host}-{2**22 + 1}-x.part",
            tmp_path / f".a.tdpass-{'0' * 8}-1-old.part",
        ]
        for path in (*kept[1:], *gone):
            path.touch()
        os.utime(gone[1], (time.time() - 2 * 86400,) * 2)
        remove_stale(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("write", [replacing, folder_beside])
def test_a_folder_that_is_not_there_is_a_usage_error(write: object, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="name a file in a folder that exists"),
        write(tmp_path / "nowhere" / "x"),
    ):  # type: ignore[operator]
        pass


def test_folders_of_code_are_made_for_the_user_alone(tmp_path: Path) -> None:
    made = build.own_folder(tmp_path / "cache" / "kernels")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert build.own_folder(made) == made
    library = made / "version" / "lib.so"
    assert build.trusted(library) == library
    build.own_folder(library.parent)
    library.write_bytes(b"")
    library.chmod(0o755)
    assert build.trusted(library) == library


@pytest.mark.parametrize("place", ["kernels", "kernels/version", "kernels/version/lib.so"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_code_that_others_may_write_is_not_loaded(place: str, mode: int, tmp_path: Path) -> None:
    library = build.own_folder(build.own_folder(tmp_path / "kernels") / "version") / "lib.so"
    library.touch(0o700)
    (tmp_path / place).chmod(0o700 | mode)
    with pytest.raises(KernelError, match=f"others may write to {tmp_path / place}"):
        build.trusted(library)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("place", ["kernels", "kernels/version", "kernels/version/lib.so"])
def test_code_of_another_user_is_not_loaded(place: str, tmp_path: Path) -> None:
    library = build.own_folder(build.own_folder(tmp_path / "kernels") / "version") / "lib.so"
    library.touch(0o700)
    os.chown(tmp_path / place, 12345, -1)
    with pytest.raises(KernelError, match="belongs to another user"):
        build.trusted(library)
