"""Torch models by name, and their weights from files."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tdpass
from tdpass.cli import main
from tdpass.errors import InvalidModelError, TdpassError, UsageError
from tdpass.sources import MODULE_SOURCES, is_module, load_weights, module_of


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


class Known(nn.Sequential):
    """What the stand-ins of libraries make; remembers how it was asked for."""

    def __init__(self, **asked: object) -> None:
        super().__init__(*net())
        self.asked = asked


def timm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    library = ModuleType("timm")
    library.__dict__.update(
        is_model=lambda name: name == "net",
        list_models=lambda: ["net"],
        create_model=lambda name, **asked: Known(**asked),
    )
    monkeypatch.setitem(sys.modules, "timm", library)
    return {"pretrained": True}


def torchvision(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    library = ModuleType("torchvision.models")
    library.__dict__.update(list_models=lambda: ["net"], get_model=lambda name, **asked: Known(**asked))
    monkeypatch.setitem(sys.modules, "torchvision.models", library)
    return {"weights": "DEFAULT"}


def hugging_face(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    class Net(Known):
        @classmethod
        def from_pretrained(cls, name: str) -> Net:
            return cls(fetched=name)

    library = ModuleType("transformers")
    config = SimpleNamespace(architectures=["Net"])
    library.__dict__.update(
        AutoConfig=SimpleNamespace(from_pretrained=lambda name: config), AutoModel=None, Net=Net
    )
    monkeypatch.setitem(sys.modules, "transformers", library)
    return {"fetched": "net"}


STAND_INS = {"timm": timm, "torchvision": torchvision, "hf": hugging_face}


@pytest.mark.parametrize("name", [name for name in MODULE_SOURCES.names() if name != "zoo"])
def test_sources_make_models_with_their_published_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = STAND_INS[name](monkeypatch)
    assert is_module(f"{name}:net")
    made = module_of(f"{name}:net")
    assert isinstance(made, Known)
    assert made.asked == asked
    assert "fetched" not in asked or isinstance(made, Known)


@pytest.mark.parametrize("name", [name for name in MODULE_SOURCES.names() if name not in ("zoo", "hf")])
def test_weights_of_ones_own_leave_the_published_ones_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    STAND_INS[name](monkeypatch)
    made = module_of(f"{name}:net", pretrained=False)
    assert isinstance(made, Known)
    assert set(made.asked.values()) <= {False, None}
    with pytest.raises(UsageError, match="has no model 'nat'"):
        module_of(f"{name}:nat")


def test_a_bert_from_its_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    made = module_of(f"hf:{tmp_path}")
    assert type(made).__name__ == "BertForSequenceClassification"
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in model.state_dict().items())
    fresh = module_of(f"hf:{tmp_path}", pretrained=False)
    assert not torch.equal(next(fresh.parameters()), next(model.parameters()))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("timm:resnet50", UsageError, "pip install timm"),
        ("torchvision:resnet18", UsageError, "pip install torchvision"),
        ("zoo:lenet", UsageError, r"did you mean 'lenet5'\?"),
        ("zoo:lenet5:many", UsageError, "no number of classes"),
        ("zoo:lenet5:", UsageError, "no number of classes"),
        ("zoo:lenet5:999999999999", UsageError, "1 to 1,000,000"),
        ("nowhere:net", UsageError, "cannot import 'nowhere'"),
        ("hf:/no/such/folder", UsageError, "there is no folder /no/such/folder"),
        ("hf:./small", UsageError, r"there is no folder \./small"),
        ("hf:runs/one/small", UsageError, "there is no folder runs/one/small"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_clear_error(
    text: str, error: type[TdpassError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    if text.startswith("hf:"):
        pytest.importorskip("transformers")
    with pytest.raises(error, match=message):
        module_of(text)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("inside", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_read_wherever_a_training_script_put_them(
    suffix: str, inside: str, prefix: str, tmp_path: Path
) -> None:
    source, path = net(), tmp_path / f"weights{suffix}"
    state = {prefix + name: value for name, value in source.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({inside: state, "epoch": 3} if inside else state, path)
    made = net()
    load_weights(made, path)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in source.state_dict().items())


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def test_files_that_are_no_state_dict_are_refused_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net(), tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps(Harmful(), protocol=2))
    said = {
        "whole": "could run code",
        "list": "holds no state dict",
        "other": "do not fit the model",
        "damaged": "is damaged",
        "harmful": "could run code",
        "missing": "cannot read",
    }
    for name, message in said.items():
        with pytest.raises(InvalidModelError, match=message):
            load_weights(net(), tmp_path / f"{name}.pth")
    assert not (tmp_path / "harm").exists()
    with pytest.raises(UsageError, match="not a file of weights"):
        load_weights(net(), tmp_path / "weights.h5")


def test_the_command_line_takes_sources_and_state_dicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timm(monkeypatch)
    torch.save(net().state_dict(), tmp_path / "weights.pth")
    words = ["timm:net", "--weights", str(tmp_path / "weights.pth"), "--input", "1x12", "--json"]
    assert main(["inspect", *words]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 2
    small = tmp_path / "small.safetensors"
    assert main(["compress", *words, "--budget", "params=0.8", "--no-strict", "-o", str(small)]) == 0
    capsys.readouterr()
    assert main(["verify", "timm:net", str(small), "--input", "4x12", "--tolerance", "10"]) == 0


def test_an_artifact_of_a_published_model_loads_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timm(monkeypatch)
    torch.save(net().state_dict(), tmp_path / "weights.pth")
    small = tmp_path / "small.safetensors"
    words = ["--weights", str(tmp_path / "weights.pth"), "--input", "1x12", "--quiet"]
    assert (
        main(["compress", "timm:net", *words, "--budget", "params=0.8", "--no-strict", "-o", str(small)]) == 0
    )
    loaded, given = tdpass.load(small), tdpass.load(small, net()).eval()
    assert not any(inner.training for inner in loaded.modules())
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), given(x))
    assert sum(parameter.numel() for parameter in loaded.parameters()) <= 0.8 * sum(
        parameter.numel() for parameter in net().parameters()
    )
    assert main(["verify", str(small), str(small), "--input", "4x12", "--quiet"]) == 0


def test_an_artifact_of_ones_own_model_needs_it_and_calls_nothing(tmp_path: Path) -> None:
    made = tdpass.compress(net(), {"params": 0.8}, progress=False, strict=False)
    made.report.model = "os:getcwd"
    made.save(tmp_path / "own.safetensors")
    with pytest.raises(
        UsageError, match=r"give the dense model: tdpass.load\('.*own.safetensors', DenseClass\(\)\)"
    ):
        tdpass.load(tmp_path / "own.safetensors")


@pytest.mark.parametrize(("suffix", "how"), [(".onnx", "onnx.load"), (".pt2", "torch.export.load")])
def test_files_that_load_by_themselves_are_no_damaged_artifacts(
    suffix: str, how: str, tmp_path: Path
) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"\x08\x08")
    with pytest.raises(UsageError, match=f"loads by itself, with {how}"):
        tdpass.load(path)
