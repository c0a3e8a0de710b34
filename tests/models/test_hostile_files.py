"""Files that ask for too much are refused in one line before anything is allocated; odd ones are served."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import REFUSED, SERVED, chain, loop, model, product, unknown_rank
from mutations import damaged_bytes
from onnx import helper, numpy_helper

from tdpass.errors import InvalidModelError, TdpassError, UsageError
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel

pytestmark = pytest.mark.timeout(280)
FAST, THOROUGH = 200, 3_000
LARGE = ("a chain of 100,000 nodes", "100,000 unused initializers")


def named(files: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in files]


def look_at(path: Path) -> OnnxModel:
    """What `tdpass inspect` does with a file."""
    opened = OnnxModel.open(path)
    opened.check_weights()
    assert opened.declined() is not None
    assert all(torch.isfinite(opened.weight(site.name)).all() for site in opened.sites())
    return opened


@pytest.mark.parametrize("name", named(REFUSED))
def test_a_hostile_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    write, says = REFUSED[name]
    path = write(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TdpassError, match=says) as caught:
        look_at(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert any(sign in str(caught.value) for sign in ";:")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", named(SERVED))
def test_an_odd_file_is_served(name: str, tmp_path: Path) -> None:
    assert [site.name for site in look_at(SERVED[name](tmp_path)).sites()] == ["w"]


@pytest.mark.parametrize(("given", "made"), [(True, False), (False, True), (True, True)])
def test_what_has_no_rank_runs_on_any_that_fits(given: bool, made: bool, tmp_path: Path) -> None:
    opened = OnnxModel.open(unknown_rank(given=given, made=made))
    x = torch.randn(3, 8)
    weight = opened.weight("w")
    opened.observe(Batch((x,)))
    torch.testing.assert_close(opened.run(Batch((x,)))["y"], x @ weight.T)
    opened.check()
    opened.save(tmp_path / "m.onnx", {})
    assert OnnxModel.open(tmp_path / "m.onnx").signature() == opened.signature()


def test_a_loop_whose_end_is_not_seen_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDPASS_LOOP_SECONDS", "0.3")
    endless, batch = OnnxModel.open(loop("computed")), Batch((torch.ones(1, 8),))
    for use in (endless.run, endless.observe):
        with pytest.raises(InvalidModelError, match=r"did not end within 0\.3 seconds"):
            use(batch)
    assert OnnxModel.open(loop(limit=10)).run(batch)["y"].shape == (1, 8)
    monkeypatch.setenv("TDPASS_LOOP_SECONDS", "soon")
    with pytest.raises(UsageError, match="TDPASS_LOOP_SECONDS='soon' is no time"):
        endless.run(batch)


def test_how_many_nodes_are_too_many_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDPASS_MOST_NODES", "20")
    with pytest.raises(TdpassError, match="has 21 nodes; supported are 20"):
        OnnxModel.open(chain(21))
    assert OnnxModel.open(chain(20)).sites()
    monkeypatch.setenv("TDPASS_MOST_NODES", "many")
    with pytest.raises(UsageError, match="TDPASS_MOST_NODES='many' is no number of nodes"):
        OnnxModel.open(chain(2))


def test_infinite_constants_that_hide_positions_are_no_fault() -> None:
    mask = numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, -np.inf, -np.inf], np.float32), "mask")
    nodes = [
        product("h"),
        helper.make_node("Add", ["h", "mask"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"]),
    ]
    OnnxModel.open(model(nodes, [*model([product()]).graph.initializer, mask])).check()


@pytest.mark.parametrize("count", [FAST, pytest.param(THOROUGH, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["functions that double a little", "a loop of ten rounds", "a grouped convolution"]
)
def test_a_damaged_file_ends_in_success_or_one_clear_error(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDPASS_LOOP_SECONDS", "0.3")
    path = SERVED[name](tmp_path)
    whole, refused = path.read_bytes(), 0
    for broken in damaged_bytes(whole, count, seed=1):
        path.write_bytes(broken)
        try:
            opened = look_at(path)
            example = opened.example()
            if example is not None:
                opened.observe(example)
        except TdpassError:
            refused += 1
    assert refused > count // 4  # most damage is found


def test_all_that_fuzzing_found_ends_in_success_or_one_clear_error(tmp_path: Path) -> None:
    corpus = sorted((Path(__file__).parents[1] / "corpus" / "onnx").iterdir())
    assert len(corpus) > 30
    for place in corpus:
        path = tmp_path / "m.onnx"
        path.write_bytes(place.read_bytes())
        with suppress(TdpassError):
            look_at(path)
    path.write_bytes((corpus[0].parent / "a_name_that_is_no_text").read_bytes())
    with pytest.raises(InvalidModelError, match="is no UTF-8 text"):
        look_at(path)
