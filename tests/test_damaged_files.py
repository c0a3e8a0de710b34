"""Binary files that are damaged, cut off or lie about their sizes.

Each gives one clear error, and nothing is changed or allocated.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import damaged_bytes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tdpass
from tdpass.arrays import read_arrays
from tdpass.cli.sources import Source
from tdpass.data import as_batches
from tdpass.errors import InvalidModelError, PlanError, TdpassError, TrainingError, UsageError
from tdpass.training.checkpoint import load_checkpoint, newest_checkpoint, read_facts, save_checkpoint

FAST, THOROUGH = 60, 1500
COUNTS = pytest.mark.parametrize("count", [FAST, pytest.param(THOROUGH, marks=pytest.mark.slow)])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16))


def compressed(path: Path) -> Path:
    net = network()
    with torch.no_grad():
        net[2].weight.mul_(torch.rand(16, 16) < 0.1)
    tdpass.compress(net.eval(), {"params": 0.7}, formats=("svd",), include=("0",)).save(path)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compressed(tmp_path_factory.mktemp("saved") / "net.safetensors").read_bytes()


@COUNTS
def test_a_damaged_artifact_is_refused_and_changes_nothing(
    artifact: bytes, tmp_path: Path, count: int
) -> None:
    path, net = tmp_path / "net.safetensors", network()
    before, spared = {name: value.clone() for name, value in net.state_dict().items()}, 0
    path.write_bytes(artifact)
    expected = tdpass.load(path, network()).state_dict()
    for broken in damaged_bytes(artifact, count):
        if broken == artifact:
            continue
        path.write_bytes(broken)
        try:
            found = tdpass.load(path, network()).state_dict()
        except InvalidModelError:
            with pytest.raises(InvalidModelError):
                tdpass.load(path, net)
            with suppress(TdpassError):
                tdpass.artifact.load_plan(path)
        else:  # the damage hit what the file says of the digest, and all else is as it was
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in found.items())
            spared += 1
    assert spared <= 1 + count // 100
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    path.write_bytes(artifact)
    assert tdpass.load(path, net)(torch.ones(2, 24)).shape == (2, 16)


@COUNTS
def test_without_a_digest_damage_is_no_raw_exception(artifact: bytes, tmp_path: Path, count: int) -> None:
    """As in files of earlier versions, where wrong names, shapes and structure are still found."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(artifact)
    with safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "tdpass.digest"}
    save_file(load_file(path), path, metadata=metadata)
    old = path.read_bytes()
    assert tdpass.load(path, network()) is not None
    for broken in damaged_bytes(old, count):
        path.write_bytes(broken)
        with suppress(TdpassError):
            tdpass.load(path, network())


@pytest.mark.parametrize(
    "structure",
    [
        "[]", "{}", "null", "{", '{"version": 1}',
        '{"version": 1, "layers": [{"paths": [{}], "format": "svd", "rank": [2], "bias": true}], "folded": [], "biases": [], "aliases": {}}',
        '{"version": 1, "layers": [{"paths": [], "format": "svd", "rank": [2], "bias": true}], "folded": [], "biases": [], "aliases": {}}',
        '{"version": 1, "layers": [{"paths": ["0"], "format": "svd", "rank": [2.5], "bias": 1}], "folded": [], "biases": [], "aliases": {}}',
        '{"version": 1, "layers": [{"paths": ["0"], "format": ["svd"], "rank": [2], "bias": true}], "folded": [], "biases": [], "aliases": {}}',
        '{"version": 1, "layers": [], "folded": [], "biases": [3], "aliases": {}}',
        '{"version": 1, "layers": [], "folded": [], "biases": [], "aliases": {"a": 1}}',
    ],
)  # fmt: skip
def test_a_structure_of_wrong_types_is_refused(structure: str, tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / "net.safetensors", metadata={"tdpass.structure": structure})
    with pytest.raises(InvalidModelError, match="is not a tdpass structure"):
        tdpass.load(tmp_path / "net.safetensors", network())


def test_types_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    tdpass.compress(network().double().eval(), pipeline="").save(path)
    with pytest.raises(
        PlanError, match=r"'0\.bias' is \(16,\) float64 in the file and \(16,\) float32 in the model"
    ):
        tdpass.load(path, network())
    assert tdpass.load(path, network().double())[0].weight.dtype is torch.float64
    for wrong in (3, None, ["net.safetensors"]):
        with pytest.raises(UsageError, match="a file is named by"):
            tdpass.load(wrong, network())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"on an nn\.Module, not on a str"):
        tdpass.load(path, "net")  # type: ignore[arg-type]


@COUNTS
def test_damaged_weights_of_a_factory_are_no_raw_exception(tmp_path: Path, count: int) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(network().state_dict(), path)
    for broken in damaged_bytes(path.read_bytes(), count):
        path.write_bytes(broken)
        with suppress(TdpassError):
            Source(f"{__name__}:network", "factory", path, f"{__name__}:network").load()


def archive(*, compressed: bool = False) -> bytes:
    file = io.BytesIO()
    arrays = {"x": np.arange(60, dtype=np.float32).reshape(10, 6), "ids": np.arange(10)}
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def one() -> bytes:
    file = io.BytesIO()
    np.save(file, np.asfortranarray(np.arange(60, dtype=np.float64).reshape(10, 6)))
    return file.getvalue()


ARRAYS: dict[str, Callable[[], bytes]] = {
    "plain.npz": archive,
    "packed.npz": lambda: archive(compressed=True),
    "one.npy": one,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_read_as_numpy_reads_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(ARRAYS[name]())
    found, expected = read_arrays(path), np.load(path)
    for key in expected.files if name.endswith("npz") else [()]:
        np.testing.assert_array_equal(found[key], expected[key], strict=True)


@pytest.mark.parametrize("name", ARRAYS)
@COUNTS
def test_damaged_arrays_are_one_clear_error(name: str, tmp_path: Path, count: int) -> None:
    path, whole = tmp_path / name, ARRAYS[name]()
    for broken in damaged_bytes(whole, 2 * count):
        path.write_bytes(broken)
        with suppress(TdpassError):
            as_batches(path)


def header(text: str) -> bytes:
    content = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        (
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
            "declares 4,000,000,000,000 bytes",
        ),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", "shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (3, ", "cannot read calibration data"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "give numbers"),
        ("{'descr': '<U9', 'fortran_order': False, 'shape': (1,), }", "give numbers"),
        ("[" * 200, "cannot read calibration data"),
    ],
)
def test_what_a_header_declares_is_held_against_the_file(declared: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(header(declared) + bytes(16))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("x.npy", header(declared) + bytes(16))
    for name in ("x.npy", "x.npz"):
        with pytest.raises(InvalidModelError, match=says):
            read_arrays(tmp_path / name)


def test_pickled_arrays_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidModelError, match="give numbers"):
        read_arrays(tmp_path / "x.npy")


def state() -> dict[str, Tensor]:
    return {
        "model.w": torch.arange(12.0).reshape(3, 4),
        "optimizer.w.step": torch.tensor(3.0),
        "term.0.mask": torch.ones(5, dtype=torch.bool),
    }


def reseal(path: Path) -> None:
    from tdpass.training.checkpoint import _digest

    sums = {part.name: _digest(part) for part in path.iterdir() if part.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("name", ["tensors-0.safetensors", "facts-0.json", "manifest.json"])
@COUNTS
def test_a_damaged_checkpoint_is_one_clear_error(name: str, tmp_path: Path, count: int) -> None:
    path = save_checkpoint(tmp_path, 1, state(), {"steps": 1, "rounds": [{"epoch": 0}]})
    whole, manifest = (path / name).read_bytes(), (path / "manifest.json").read_bytes()
    for broken in damaged_bytes(whole, count):
        (path / "manifest.json").write_bytes(manifest)
        (path / name).write_bytes(broken)
        if broken != whole and name != "manifest.json":
            with pytest.raises(TrainingError, match=name):
                newest_checkpoint(tmp_path)
            reseal(path)
        with suppress(TrainingError):
            newest_checkpoint(tmp_path)
            read_facts(path)
            load_checkpoint(path, state())


def test_a_pickle_in_a_checkpoint_is_not_read(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return exec, (f"__import__('pathlib').Path({str(tmp_path / 'marker')!r}).touch()",)

    import pickle

    path = save_checkpoint(tmp_path, 1, state(), {})
    (path / ".metadata").write_bytes(pickle.dumps(Touch()))
    reseal(path)
    with pytest.raises(TrainingError, match="an earlier version wrote it, with a pickle"):
        newest_checkpoint(tmp_path)
    with suppress(TrainingError):
        load_checkpoint(path, state())
    assert not (tmp_path / "marker").exists()


def test_boxes_of_several_processes_become_one_tensor(tmp_path: Path) -> None:
    from tdpass.training.pieces import _PIECES, Piece, read_pieces, read_table

    whole = torch.arange(35.0).reshape(5, 7)
    for rank, (rows, columns) in enumerate(
        ((slice(0, 2), slice(0, 7)), (slice(2, 5), slice(0, 4)), (slice(2, 5), slice(4, 7)))
    ):
        piece = {"w": Piece((5, 7), (rows.start, columns.start), "float32")}
        save_file(
            {"w": whole[rows, columns].clone()},
            tmp_path / f"tensors-{rank}.safetensors",
            metadata={"tdpass.pieces": _PIECES.text(piece)},
        )
    assert read_table(tmp_path) == {"w": ((5, 7), torch.float32)}
    found = torch.zeros(5, 7)
    read_pieces(tmp_path, {"w": found})
    assert torch.equal(found, whole)
    (tmp_path / "tensors-1.safetensors").unlink()
    with pytest.raises(TrainingError, match="holds 23 of the 35 numbers of 'w'"):
        read_pieces(tmp_path, {"w": found})
