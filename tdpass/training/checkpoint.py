"""Checkpoints: written whole or not at all, checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tdpass.errors import TrainingError
from tdpass.training.placement import world

KEPT = 2
_MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write `folder/step-N`: tensors by torch.distributed.checkpoint, `facts` (JSON values) of every process beside them.

    All processes call it.  The folder appears under its name only when it is complete; the last two are kept.
    """
    from torch.distributed.checkpoint import state_dict_saver  # noqa: PLC0415 - takes half a second, which only a run that keeps checkpoints needs to spend

    rank, size = world()
    final, temporary = folder / f"step-{step:09d}", folder / f".step-{step:09d}.part"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    _barrier(size)
    with _alone(size):
        state_dict_saver.save(dict(tensors), checkpoint_id=temporary, no_dist=size == 1)
    (temporary / f"facts-{rank}.json").write_text(json.dumps(dict(facts)), encoding="utf-8")
    _barrier(size)
    if rank == 0:
        sums = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
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
        raise TrainingError(f"no checkpoint in {folder} can be used: {'; '.join(complaints)}; train from the beginning in another folder")
    return None, complaints


def read_facts(path: Path) -> dict[str, Any]:
    """What this process wrote beside the tensors; the first process's where there were fewer."""
    own = path / f"facts-{world()[0]}.json"
    found: dict[str, Any] = json.loads((own if own.exists() else path / "facts-0.json").read_text(encoding="utf-8"))
    return found


def tensors_in(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor in a checkpoint."""
    from torch.distributed.checkpoint import filesystem  # noqa: PLC0415 - as above
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: PLC0415 - as above

    entries = filesystem.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place, each laid out as it is, from a checkpoint of any number of processes; raises `TrainingError`."""
    from torch.distributed.checkpoint import state_dict_loader  # noqa: PLC0415 - as above

    stored = tensors_in(path)
    wrong = [name for name, tensor in tensors.items() if name not in stored or stored[name][0] != tuple(tensor.shape)]
    if wrong:
        shape = tuple(tensors[wrong[0]].shape)
        raise TrainingError(f"checkpoint {path} holds no {wrong[0]!r} of shape {shape}; use the model, method and optimizer it was written with")
    size = world()[1]
    with _alone(size):
        state_dict_loader.load(dict(tensors), checkpoint_id=path, no_dist=size == 1)


def random_state() -> dict[str, Any]:
    """The state of torch's, Python's and numpy's generators as JSON values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  # loaders that draw from it are to be repeatable too
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back."""
    torch.set_rng_state(_bytes(state["torch"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


@contextlib.contextmanager
def _alone(size: int) -> Iterator[None]:
    """Silence for torch's remark that there is one process only: that is meant."""
    with warnings.catch_warnings():
        if size == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _fault(path: Path) -> str | None:
    try:
        sums = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _digest(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.blake2b(file.read()).hexdigest()


def _barrier(size: int) -> None:
    if size > 1:
        dist.barrier()
