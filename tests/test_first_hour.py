"""What a stranger does in the first hour with tdpass works from a wheel, without a compiler."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
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
    with (tmp_path / "times.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [rows[0]["step"], rows[-1]["step"]] == ["wheel_in_an_empty_environment", "all"]
    assert all(row["result"] == "ok" or row["result"].startswith("left out: ") for row in rows)


@pytest.mark.parametrize(("load", "said"), [(0.2, "a quiet machine"), (7.0, "a busy process")])
def test_times_are_kept_with_what_ran_beside_them(
    load: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)  # where benchmarks lie, which are no part of the package
    from benchmarks import first_hour, results

    monkeypatch.setattr(first_hour.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / "times.csv").write_text("step,seconds,result\ndoctor,4,ok\nnotebook,,left out: no nbclient\n")
    first_hour.keep(tmp_path / "times.csv", load, results.Table("kept.csv", first_hour.COLUMNS))
    with (tmp_path / "kept.csv").open(newline="", encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    assert [(row["step"], row["seconds"], row["result"]) for row in kept] == [
        ("doctor", "4", "ok"),
        ("notebook", "", "left out: no nbclient"),
    ]
    assert {(row["beside"], row["load"]) for row in kept} == {(said, f"{load:g}")}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.name)
def test_examples_are_sound_python(path: Path) -> None:
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


@pytest.mark.slow
def test_optimum_runs_what_was_made_of_its_export(tmp_path: Path) -> None:
    pytest.importorskip("optimum.onnxruntime")
    example = str(ROOT / "examples" / "optimum_onnx.py")
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "macs 60% of the original" in run.stdout
    assert float(run.stdout.split()[-1]) < 0.02
