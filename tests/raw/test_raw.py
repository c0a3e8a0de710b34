"""Pictures, text and sound are read by the model's own processor, made here from configurations."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torch import Tensor, nn

import tdpass
from tdpass.cli import main
from tdpass.data import calls_of
from tdpass.errors import UsageError
from tdpass.models import open_model
from tdpass.raw import RAW_KINDS, Raw, raw_kind_of

transformers = pytest.importorskip("transformers")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "looked",
    "at",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=12,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Sentences, and lines that are none."""
    path = tmp_path / "lines.txt"
    path.write_text(
        "the cat sat\n\n  \na mat\nthe cat looked at the mat on the mat and sat on a mat and sat\n" * 6
    )
    return path


def test_text_goes_through_the_tokenizer_of_the_model(bert: Path, lines: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(bert).eval()
    batches, _ = calls_of(open_model(model), lines, samples=9)
    assert sum(batch.size for batch in batches) == 9
    ids = torch.cat([batch.kwargs["input_ids"] for batch in batches])
    assert ids.shape[1] == 12  # as many positions as the model has
    assert ids[0].tolist()[:5] == [WORDS.index(word) for word in ("[CLS]", "the", "cat", "sat", "[SEP]")]
    assert torch.cat([batch.kwargs["attention_mask"] for batch in batches])[0].sum() == 5
    made = tdpass.compress(model, {"params": 0.8}, lines, effort="fast", progress=False, cache=False)
    assert made.report.final.params <= 0.8 * made.report.original.params


def test_a_processor_may_be_named(bert: Path, lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.BertForSequenceClassification(transformers.BertConfig.from_pretrained(bert)).eval()
    model.config._name_or_path = ""
    with pytest.raises(UsageError, match=r"which tokenizer.*--processor"):
        calls_of(open_model(model), lines)
    batches, _ = calls_of(open_model(model), Raw(lines, str(bert)), samples=3)
    assert batches[0].kwargs["input_ids"].shape[1] <= 12
    with pytest.raises(UsageError, match="cannot be had"):
        calls_of(open_model(model), Raw(lines, str(lines.parent)))
    words = ["--data", str(lines), "--samples", "4", "--json"]
    assert main(["inspect", f"hf:{bert}", *words, "--processor", str(bert)]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] > 0


def test_pictures_go_through_the_image_processor_of_the_model(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder, pictures = tmp_path / "model", tmp_path / "pictures"
    pictures.mkdir()
    for index in range(4):
        image.new("L", (20, 30), 60 * index).save(pictures / f"{index}.png")
    processor = transformers.ViTImageProcessorPil if hasattr(transformers, "ViTImageProcessorPil") else None
    if processor is None:
        pytest.skip("this transformers has no image processor without torchvision")
    processor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(
        folder
    )
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    batches, _ = calls_of(open_model(model), pictures)
    pixels = torch.cat([batch.kwargs["pixel_values"] for batch in batches])
    assert pixels.shape == (4, 3, 8, 8)
    wanted = (torch.arange(4) * 60 / 255 - 0.5) / 0.25
    torch.testing.assert_close(pixels.mean((1, 2, 3)), wanted, rtol=1e-4, atol=1e-4)


def test_models_of_timm_are_shown_pictures_as_they_were_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (6, 6), (255, 0, 0)).save(tmp_path / "red.png")

    def prepared(size: int) -> Any:
        return lambda picture: torch.full((3, size, size), float(np.asarray(picture)[0, 0, 0]))

    library = types.ModuleType("timm.data")
    library.resolve_data_config = lambda given, model: {"size": model.pretrained_cfg["size"]}
    library.create_transform = prepared
    monkeypatch.setitem(sys.modules, "timm.data", library)
    monkeypatch.setattr("tdpass.raw.pictures.is_installed", lambda name: name == "timm")
    model = nn.Conv2d(3, 2, 3)
    model.pretrained_cfg = {"size": 5}
    (pixels,) = calls_of(open_model(model), tmp_path)[0][0].tensors
    assert torch.equal(pixels, torch.full((1, 3, 5, 5), 255.0))


def test_sound_goes_through_the_feature_extractor_at_its_rate(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=1000, do_normalize=False)
    extractor.save_pretrained(folder)
    seconds = np.arange(4000) / 2000
    wave = (np.sin(2 * np.pi * 50 * seconds) * 16000).astype(np.int16)
    wavfile.write(tmp_path / "tone.wav", 2000, np.stack([wave, wave], 1))

    class Hearing(nn.Module):
        """Reads samples of sound."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(1, 4, 8)

        def forward(self, input_values: Tensor) -> Tensor:
            made: Tensor = self.layer(input_values[:, None])
            return made

    batches, _ = calls_of(open_model(Hearing()), Raw(tmp_path / "tone.wav", str(folder)))
    (heard,) = batches[0].tensors
    assert heard.shape == (1, 2000)  # two seconds
    assert float(heard.abs().max()) == pytest.approx(16000 / 32767, rel=0.05)
    crossings = int(((heard[0, 1:] > 0) != (heard[0, :-1] > 0)).sum())
    assert crossings == pytest.approx(200, abs=3)  # 50 Hz


class _Rows:
    """Columns of a data set as the library gives them."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[column]

    def select(self, places: list[int]) -> _Rows:
        """Some of the rows."""
        chosen = {name: [values[place] for place in places] for name, values in self.columns.items()}
        return _Rows(chosen, self.features)


def test_a_data_set_of_the_hub_is_read_by_the_type_of_its_column(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = type("Value", (), {})
    label, text = value(), value()
    label.dtype, text.dtype = "int64", "string"
    rows = _Rows({"label": [0] * 30, "sentence": ["the cat sat"] * 30}, {"label": label, "sentence": text})
    library = types.ModuleType("datasets")
    library.load_dataset = lambda name: {"train": rows}
    monkeypatch.setitem(sys.modules, "datasets", library)
    model = transformers.BertForSequenceClassification.from_pretrained(bert).eval()
    batches, _ = calls_of(open_model(model), "hf:sentences", samples=10)
    assert sum(batch.size for batch in batches) == 10
    rows.features = {"label": label, "sentence": label}
    with pytest.raises(UsageError, match=r"no column of pictures.*sentence \(int64\)"):
        calls_of(open_model(model), "hf:sentences")


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, bert: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    model = transformers.BertForSequenceClassification.from_pretrained(bert).eval()
    with pytest.raises(UsageError, match="pip install datasets"):
        calls_of(open_model(model), "hf:sentences")


@pytest.mark.parametrize("kind", RAW_KINDS.names())
def test_what_a_folder_holds_most_of_decides(kind: str, tmp_path: Path) -> None:
    for index, suffix in enumerate(sorted(RAW_KINDS.get(kind).suffixes) * 3):
        (tmp_path / f"{index}{suffix}").write_text("x")
    other = next(one for one in RAW_KINDS if one.name != kind)
    (tmp_path / f"other{min(other.suffixes)}").write_text("x")
    found = raw_kind_of(tmp_path)
    assert found is not None
    assert found.name == kind
