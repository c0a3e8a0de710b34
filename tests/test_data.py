"""Calibration data of many kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tdpass.data import as_batches
from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.base import Batch

X = torch.arange(40.0).reshape(10, 4)


@pytest.mark.parametrize(
    "data",
    [X, X.numpy(), X.double().numpy(), (X,), (X, torch.arange(10)), [X[:5], X[5:]], DataLoader(TensorDataset(X, torch.arange(10)), batch_size=5), Batch((X,))],
)
def test_every_kind_gives_the_same_samples(data: object) -> None:
    batches = as_batches(data, samples=8, batch_size=3)
    assert all(batch.size <= 3 for batch in batches)
    assert torch.equal(torch.cat([batch.args[0] for batch in batches]), X[:8])
    assert all(len(batch.args) == 1 for batch in batches)


def test_named_and_positional_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", ids=np.arange(6).reshape(3, 2), mask=np.ones((3, 2)))
    (named,) = as_batches(tmp_path / "named.npz")
    assert set(named.kwargs) == {"ids", "mask"}
    assert named.kwargs["ids"].dtype == torch.int64
    np.savez(tmp_path / "positional.npz", np.ones((3, 2)))
    assert len(as_batches(str(tmp_path / "positional.npz"))[0].args) == 1
    np.save(tmp_path / "one.npy", np.ones((3, 2)))
    assert as_batches(tmp_path / "one.npy")[0].size == 3


@pytest.mark.parametrize("data", [3, "no-such.txt", [], {"a": X, "b": X[:3]}, np.array(["a"]), [object()], torch.tensor(3.0)])
def test_other_things_are_usage_errors(data: object) -> None:
    with pytest.raises(UsageError):
        as_batches(data)


def test_damaged_files_and_values_are_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    for path in (tmp_path / "bad.npz", tmp_path / "none.npz"):
        with pytest.raises(InvalidModelError):
            as_batches(path)
    with pytest.raises(InvalidModelError, match="NaN"):
        as_batches(torch.tensor([[1.0], [float("nan")]]))
