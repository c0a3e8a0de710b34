"""Checkpoints: written whole or not at all, checked before they are used."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tdpass.documents import Document, register_document
from tdpass.errors import TrainingError
from tdpass.files import room_for
from tdpass.training.pieces import read_pieces, read_table, write_pieces
from tdpass.training.placement import world

KEPT = 2
_MANIFEST_FILE = "manifest.json"
_HINT = "train from the beginning in another folder"
_MANIFEST = register_document(
    Document("list of the parts of a checkpoint", dict[str, str], TrainingError, _HINT)
)
_FACTS = register_document(
    Document("state of a training run", dict[str, Any], TrainingError, _HINT, finite=False)
)


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write `folder/step-N`: each process's tensors as safetensors, its `facts` (JSON values) beside them.

    All processes call it.  The folder appears under its name only when it is complete; the last two are kept.
    Raises `WriteError` when the disk is full.
    """
    rank, size = world()
    final, temporary = folder / f"step-{step:09d}", folder / f".step-{step:09d}.part"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.part"):  # by a run that was killed: one run at a time has a folder
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
    _barrier(size)
    try:
        with room_for(final):
            write_pieces(temporary, tensors)
            (temporary / f"facts-{rank}.json").write_text(_FACTS.text(dict(facts)), encoding="utf-8")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _barrier(size)
    if rank == 0:
        with room_for(final):
            sums = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
            (temporary / _MANIFEST_FILE).write_text(_MANIFEST.text(sums), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in _found(folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier(size)
    return final


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a line for each newer one that is damaged.

    Raises `TrainingError` where there are some but none is whole.
    """
    complaints: list[str] = []
    for path in reversed(_found(folder)):
        fault = _fault(path)
        if fault is None:
            return path, complaints
        complaints.append(f"checkpoint {path} is damaged ({fault}); it is passed over")
    if complaints:
        raise TrainingError(
            f"no checkpoint in {folder} can be used: {'; '.join(complaints)}; train from the beginning in "
            "another folder"
        )
    return None, complaints


def read_facts(path: Path) -> dict[str, Any]:
    """What this process wrote beside the tensors; the first process's where there were fewer."""
    own = path / f"facts-{world()[0]}.json"
    return _FACTS.load(own if own.exists() else path / "facts-0.json")


def tensors_in(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor in a checkpoint."""
    return read_table(path)


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place, each laid out as it is, from a checkpoint of any number of processes.

    Raises `TrainingError`.
    """
    stored = tensors_in(path)
    wrong = [
        name
        for name, tensor in tensors.items()
        if name not in stored or stored[name][0] != tuple(tensor.shape)
    ]
    if wrong:
        shape = tuple(tensors[wrong[0]].shape)
        raise TrainingError(
            f"checkpoint {path} holds no {wrong[0]!r} of shape {shape}; use the model, method and optimizer "
            "it was written with"
        )
    read_pieces(path, tensors)


def random_state(own: Iterable[torch.Generator] = ()) -> dict[str, Any]:
    """The state of torch's, Python's and numpy's generators, and of others, as JSON values."""
    # loaders that draw from it are to be repeatable too
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": _text(torch.get_rng_state()),
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "own": [_text(generator.get_state()) for generator in own],
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: Mapping[str, Any], own: Iterable[torch.Generator] = ()) -> None:
    """Put the generators back, the others in the order in which they were given.

    Raises `TrainingError` where the data has more or fewer of its own than it had.
    """
    held, kept = list(own), state.get("own", ())
    if len(held) != len(kept):
        raise TrainingError(
            f"the data draws from {len(held)} generators of its own, that of the checkpoint from {len(kept)}; "
            "resume with the data that the run began with, or train from the beginning in another folder"
        )
    for generator, text in zip(held, kept, strict=True):
        generator.set_state(_bytes(text))
    torch.set_rng_state(_bytes(state["torch"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _fault(path: Path) -> str | None:
    if (path / ".metadata").exists():
        return "an earlier version wrote it, with a pickle that could run code in it and is not read"
    try:
        sums = _MANIFEST.load(path / _MANIFEST_FILE)
        if not {"facts-0.json", "tensors-0.safetensors"} <= sums.keys() or any(
            Path(name).name != name for name in sums
        ):
            return f"{_MANIFEST_FILE} does not name its parts"
        for name, expected in sums.items():
            if _digest(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "blake2b").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.blake2b(file.read()).hexdigest()
        )


def _barrier(size: int) -> None:
    if size > 1:
        dist.barrier()
