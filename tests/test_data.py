"""Calibration data of many kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdpass.data import as_batches, calls_of
from tdpass.errors import InvalidModelError, UsageError
from tdpass.models import open_model
from tdpass.models.base import Batch

X = torch.arange(40.0).reshape(10, 4)


@pytest.mark.parametrize(
    "data",
    [
        X,
        X.numpy(),
        X.double().numpy(),
        (X,),
        (X, torch.arange(10)),
        [X[:5], X[5:]],
        DataLoader(TensorDataset(X, torch.arange(10)), batch_size=5),
        Batch((X,)),
    ],
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


@pytest.mark.parametrize(
    "data", [3, "no-such.txt", [], {"a": X, "b": X[:3]}, np.array(["a"]), [object()], torch.tensor(3.0)]
)
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


class Singles(torch.utils.data.Dataset):
    """Single samples by their index, each with a class."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], index % 3


def test_a_map_style_dataset_is_batches_of_its_samples() -> None:
    inputs = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))
    batches, _ = calls_of(open_model(nn.Linear(6, 4)), Singles(inputs), samples=50)
    assert torch.equal(torch.cat([batch.tensors[0] for batch in batches]), inputs[:50])


@pytest.mark.parametrize("labels", [False, True])
def test_the_only_array_is_the_only_input_whatever_it_is_called(labels: bool, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images, **({"labels": np.arange(20) % 3} if labels else {}))
    batches, notes = calls_of(open_model(nn.Linear(6, 4)), tmp_path / "data.npz")
    assert np.array_equal(batches[0].tensors[0].numpy(), images)
    assert notes == ["'images' in the data is taken for the model's only input, 'input'"]


def test_a_folder_of_images_is_what_the_model_reads(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for index in range(12):
        (tmp_path / f"class{index % 2}").mkdir(exist_ok=True)
        image.new("RGB", (9, 7), (20 * index, 0, 255)).save(
            tmp_path / f"class{index % 2}" / f"{index:02}.png"
        )
    model = open_model(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 5, 6))
    batches, _ = calls_of(model, tmp_path, samples=6)
    (images,) = batches[0].tensors
    assert images.shape == (6, 3, 5, 6)
    red = (torch.tensor([0, 4, 8, 1, 5, 9]) * 20 / 255 - 0.485) / 0.229
    torch.testing.assert_close(images[:, 0].mean((1, 2)), red, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match=r"no images; .* is a folder"):
        calls_of(open_model(nn.Linear(6, 4), torch.zeros(1, 6)), tmp_path)
    with pytest.raises(UsageError, match="holds no image"):
        calls_of(model, Path(__file__).parent / "zoo")


def test_slices_along_an_odd_axis_are_said_since_they_may_be_channels() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    calls, notes = calls_of(open_model(net), torch.randn(5, 3, 8, 8))
    assert [call.tensors[0].shape for call in calls] == 3 * [(5, 1, 8, 8)]
    (note,) = notes
    assert "does not run on the data as it is, [5, 3, 8, 8]" in note
    assert "along axis 1" in note
    assert calls_of(open_model(net), torch.randn(5, 1, 8, 8))[1] == []
