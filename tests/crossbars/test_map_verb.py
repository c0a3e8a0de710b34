"""tdpass map: the files it writes, what it shows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tdpass.cli import REFUSED, WRONG_USAGE, main
from tdpass.crossbars import load_mapped
from tdpass.targets.crossbar import CrossbarArray


def test_the_map_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "crossbar.yaml"
    own.write_text(
        CrossbarArray.presets()["admm_32x32"].read_text().replace("weight_bits: 9", "weight_bits: 5")
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32))
    words = [
        "map",
        "training_run:network",
        "--target",
        str(own),
        "-o",
        str(tmp_path / "map.json"),
        "--data",
        str(tmp_path / "x.npy"),
    ]
    assert main([*words, "--draws", "3", "--variation", "0.1", "--stuck", "0.02", "--wires", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    mapped = load_mapped(tmp_path / "map.json")
    assert mapped.map.array.weight_bits == 5
    assert found["files"] == [str(tmp_path / "map.json"), str(tmp_path / "map.safetensors")]
    assert {row["site"]: row["arrays"] for row in found["sites"]} == {"0": 2, "2": 3 * 2, "6": 2 * 2}
    assert sum(row["cells"] for row in found["sites"]) == int((mapped.state > 0).sum())
    mean, _, deviation = found["relative difference"].partition(" +- ")
    assert 0 < float(deviation) < float(mean) < 1
    assert main(words) == 0
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--target", "nowhere"], WRONG_USAGE, "admm_32x32"),
        (["--target", "crossbar:forms"], REFUSED, "both signs"),
        (["--draws", "2"], WRONG_USAGE, "give --data"),
        (["--exclude", "*"], REFUSED, "leave no site to map"),
    ],
)
def test_what_cannot_be_mapped_or_simulated_is_one_line(
    words: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["map", "training_run:network", "-o", str(tmp_path / "map.json"), *words]) == code
    assert said in capsys.readouterr().err
