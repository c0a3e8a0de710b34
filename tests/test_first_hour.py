"""What a stranger does in the first hour with tdpass works from a wheel, without a compiler."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_step_of_the_first_hour_works(tmp_path: Path) -> None:
    packages = {"FIRST_HOUR_PACKAGES": sysconfig.get_paths()["purelib"]}
    script = [str(ROOT / "tests" / "first_hour.sh"), str(tmp_path)]
    run = subprocess.run(
        script, capture_output=True, text=True, check=False, env=os.environ | packages, cwd=tmp_path
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "wheel_in_an_empty_environment" in run.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_sound_python(path: Path) -> None:
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
