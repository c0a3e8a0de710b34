"""Data sets: what every source gives, how images fit networks, and what is said of missing data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdpass.datasets import PARTS, SOURCES, Augment, Dataset, Examples, open_dataset
from tdpass.datasets.digits import stored
from tdpass.errors import InvalidModelError, TdpassError, UsageError

COUNT, CLASSES = 60, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(COUNT) % CLASSES


class Library(ModuleType):
    """A stand-in for a library that is not installed here."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Scores:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def in_own_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (root / "data").mkdir(parents=True)
    np.savez(root / "data" / "all.npz", pixels=np.repeat(PIXELS, 100, 0), labels=np.repeat(LABELS, 100))
    script = (
        "import numpy as np\nfrom pathlib import Path\n\ndef load(name, split):\n"
        "    found = np.load(Path(__file__).with_name('all.npz'))\n"
    )
    (root / "data" / "load.py").write_text(script + "    return found['pixels'], found['labels'], []\n")
    monkeypatch.setenv("TDPASS_DATA", str(root))
    return "cifar10"


def in_npz(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    np.savez(root / "own.npz", x_train=PIXELS, y_train=LABELS, x_test=PIXELS[:12], y_test=LABELS[:12])
    return str(root / "own.npz")


def in_image_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    image = pytest.importorskip("PIL.Image")
    for index, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        folder = root / "photos" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(folder / f"{index:03}.png")
    return str(root / "photos")


def of_torchvision(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def made(folder: str, train: bool, download: bool) -> SimpleNamespace:
        return SimpleNamespace(data=PIXELS, targets=LABELS.tolist())

    library = Library("torchvision.datasets")
    library.__dict__["Some"] = made
    monkeypatch.setitem(sys.modules, "torchvision.datasets", library)
    return "torchvision:Some"


def of_hugging_face(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    image = pytest.importorskip("PIL.Image")

    class Image:
        """A feature by this name is a column of images."""

    class ClassLabel:
        """A feature by this name is a column of classes."""

    rows = Library("rows")
    pictures = [image.fromarray(pixels) for pixels in PIXELS]
    split = {"img": pictures, "label": LABELS.tolist()}
    found = type(
        "Rows",
        (),
        {"features": {"img": Image(), "label": ClassLabel()}, "__getitem__": lambda self, name: split[name]},
    )()
    rows.__dict__["load_dataset"] = lambda name: {"train": found}
    monkeypatch.setitem(sys.modules, "datasets", rows)
    return "hf:some/set"


MADE = {
    "published": in_own_folder,
    "npz": in_npz,
    "folder": in_image_folder,
    "torchvision": of_torchvision,
    "hf": of_hugging_face,
}


@pytest.fixture(params=SOURCES.names())
def dataset(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    make = MADE.get(request.param)
    return open_dataset("digits" if make is None else make(tmp_path, monkeypatch))


def test_every_source_gives_parts_that_train_and_score(dataset: Dataset) -> None:
    assert dataset.classes in (CLASSES, 10)
    for name in PARTS:
        part = dataset.part(name)
        assert len(part.inputs) == len(part.targets) > 0
        assert part.targets.dtype == torch.int64
    batches = dataset.batches(seed=1)
    inputs, targets = next(iter(batches))
    assert inputs.shape[1:] == dataset.sample
    assert inputs.dtype == torch.float32
    assert len(batches) >= 16
    assert len(inputs) == len(targets)
    wide = dataset.inputs("training")
    assert float(wide.mean((0, 2, 3)).abs().max()) < 0.5 or dataset.name in ("cifar10", "digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), dataset.classes))
    right = (model(dataset.inputs("test")).argmax(1) == dataset.test.targets).double().mean()
    assert dataset.accuracy(model) == pytest.approx(100 * float(right))


def test_images_of_someones_own_come_out_as_they_were(dataset: Dataset) -> None:
    if dataset.name == "digits":
        pytest.skip("they are not of this test")
    known = {
        pixels.transpose(2, 0, 1).tobytes(): int(label) for pixels, label in zip(PIXELS, LABELS, strict=True)
    }
    for name in PARTS:
        part = dataset.part(name)
        assert all(
            known[image.numpy().tobytes()] == int(label)
            for image, label in zip(part.inputs[:50], part.targets[:50], strict=True)
        )


def test_the_digits_are_those_of_scikit_learn() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = load_digits(return_X_y=True)
    assert np.array_equal(stored().inputs.flatten(1).numpy(), images)
    assert np.array_equal(stored().targets.numpy(), labels)


def test_parts_are_disjoint_and_always_the_same() -> None:
    every = Examples(torch.arange(100), torch.arange(100))
    parts = every.divided(20, 30)
    assert [len(part) for part in parts] == [20, 30, 50]
    assert sorted(torch.cat([part.inputs for part in parts]).tolist()) == list(range(100))
    assert torch.equal(every.divided(20)[0].inputs, parts[0].inputs)


def test_sets_without_calibration_images_lend_the_tuning_images() -> None:
    digits = open_dataset("digits")
    assert [len(digits.part(name)) for name in PARTS] == [1181, 256, 256, 360]
    assert torch.equal(digits.calibration.inputs, digits.tuning.inputs)


@pytest.mark.parametrize("sample", [(3, 32, 32), (1, 28, 28), (3, None, None), (None, 4, 9)])
def test_images_are_fitted_to_what_a_network_reads(sample: tuple[int | None, ...]) -> None:
    digits = open_dataset("digits")
    made = digits.fitted(sample)
    assert all(wanted in (None, here) for wanted, here in zip(sample, made.sample, strict=True))
    grey = made.inputs("test").mean(1, keepdim=True)
    back = nn.functional.interpolate(grey, (8, 8), mode="bilinear", antialias=True)
    plain = digits.inputs("test")
    closeness = nn.functional.cosine_similarity(back.flatten(1), plain.flatten(1)).min()
    assert float(closeness) > (0.7 if sample[1] == 4 else 0.9)


def test_colour_becomes_grey_by_its_mean() -> None:
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    part = Examples(images, torch.tensor([0, 1]))
    made = Dataset("own", part, part, part, part, 255.0, (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)).fitted(
        (1, None, None)
    )
    expected = (images.float().mean(1, keepdim=True) / 255 - 0.4) / 0.2
    torch.testing.assert_close(made.inputs("test"), expected)


def test_moved_images_are_windows_into_the_padded_ones() -> None:
    images = torch.arange(1.0, 1 + 8 * 2 * 5 * 5).reshape(8, 2, 5, 5)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    moved = Augment(shift=2, flip=True)(images, torch.Generator().manual_seed(3))
    for image, whole in zip(moved, padded, strict=True):
        windows = [whole[:, top : top + 5, left : left + 5] for top in range(5) for left in range(5)]
        assert any(torch.equal(image, window) or torch.equal(image, window.flip(2)) for window in windows)
    assert not torch.equal(moved, images)
    assert torch.equal(Augment()(images, torch.Generator()), images)


def test_a_test_folder_is_used_where_there_is_one(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 30), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                size = (7, 6) if split == "train" else (14, 12)
                image.new("L", size, 10 * index).save(tmp_path / split / name / f"{index}.png")
    found = open_dataset(str(tmp_path))
    assert (len(found.test), found.sample, found.classes) == (8, (1, 6, 7), 2)
    assert found.test.inputs[:, 0, 0, 0].tolist() == [0, 10, 20, 30] * 2
    (tmp_path / "test" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(InvalidModelError, match=r"cannot read the image .*0\.png"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagenet", "names no data set; give one of: digits"),
        ("mnist", r"TDPASS_DATA.*--data digits"),
        ("torchvision:MNIST", "pip install torchvision"),
        ("hf:mnist", "pip install datasets"),
        ("missing.npz", "no file missing.npz"),
    ],
)
def test_missing_data_is_one_error_that_says_how_to_get_it(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDPASS_DATA", raising=False)
    for name in ("torchvision", "datasets"):
        module = "torchvision" if name == "torchvision" else "hugging_face"
        monkeypatch.setattr(f"tdpass.datasets.{module}.is_installed", lambda _: False)
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.datasets", None)
    with pytest.raises(UsageError, match=message):
        open_dataset(text)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "holds a; a data set needs two arrays"),
        ({"x": np.zeros((30, 4, 4)), "y": np.zeros(29, int)}, "are no examples"),
        ({"x": np.zeros((30, 4, 4)), "y": np.zeros(30)}, "are no examples"),
        ({"x": np.zeros((9, 4, 4)), "y": np.zeros(9, int)}, "7|8|9 examples to train on; give at least 20"),
    ],
)
def test_arrays_that_are_no_examples_are_refused(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(TdpassError, match=message):
        open_dataset(str(tmp_path / "own.npz"))


def test_inputs_that_are_no_images_are_not_resized(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=np.zeros((40, 9), np.float32), y=np.arange(40) % 2)
    found = open_dataset(str(tmp_path / "own.npz"))
    assert found.sample == (9,)
    assert found.fitted((9,)) is found
    with pytest.raises(UsageError, match="only images are resized"):
        found.fitted((1, 3, 3))
    with pytest.raises(UsageError, match="no part 'validation'"):
        found.part("validation")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda scores: scores,
        lambda scores: {"gate": scores[:, :1], "logits": scores},
        Scores,
    ],
    ids=["tensor", "mapping", "attribute"],
)
def test_scores_are_found_in_what_a_network_returns(wrapped: Callable[[Tensor], object]) -> None:
    digits = open_dataset("digits")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    net = nn.Sequential(plain, Wrapping(wrapped)).eval()
    assert digits.accuracy(net) == 100 * float(
        (plain(digits.inputs("test")).argmax(1) == digits.test.targets).double().mean()
    )


def test_a_network_without_scores_is_refused() -> None:
    with pytest.raises(UsageError, match=r"returned a dict; .* or one named 'logits'"):
        open_dataset("digits").accuracy(Wrapping(lambda scores: {"boxes": scores}))


class Wrapping(nn.Module):
    def __init__(self, wrapped: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, scores: Tensor) -> object:
        return self.wrapped(scores)
