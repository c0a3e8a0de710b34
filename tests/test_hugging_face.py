"""Hugging Face: a compressed model loads strictly or not at all.

Methods train in its Trainer, and the card says what was done.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tdpass
from tdpass.errors import TdpassError, UsageError
from tdpass.methods import AdmmTT
from tdpass.models.torch.saving.pretrained import METHOD
from tdpass.sources import module_of

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("tdpass.hugging_face")


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 60,
    }
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, max_position_embeddings=32)
    ).eval()


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 60,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)).eval()


TOKENS = torch.randint(0, 60, (4, 7), generator=torch.Generator().manual_seed(1))


def compressed(make: Any) -> tdpass.Artifact[Any]:
    return tdpass.compress(
        make(),
        {"params": 0.7},
        formats=["svd"],
        effort="fast",
        cache=False,
        progress=False,
        strict=False,
        exclude=["*lm_head*"],
    )


@pytest.mark.parametrize("make", [bert, llama])
def test_a_compressed_model_comes_back_as_it_was_saved(make: Any, tmp_path: Path) -> None:
    artifact = compressed(make)
    assert any(not choice.kept_dense for choice in artifact.plan)
    artifact.model.save_pretrained(tmp_path)
    loaded, said = type(artifact.model).from_pretrained(tmp_path, output_loading_info=True)
    assert said["missing_keys"] == said["unexpected_keys"] == set()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(TOKENS).logits, artifact.model.eval()(TOKENS).logits)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == sum(
        parameter.numel() for parameter in artifact.model.parameters()
    )
    loaded.save_pretrained(tmp_path / "again")
    again = type(artifact.model).from_pretrained(tmp_path / "again")
    assert torch.equal(again.eval()(TOKENS).logits, loaded(TOKENS).logits)


def test_the_model_that_came_in_stays_dense_in_its_configuration() -> None:
    model = bert()
    tdpass.compress(
        model, {"params": 0.7}, formats=["svd"], effort="fast", cache=False, progress=False, strict=False
    )
    assert getattr(model.config, "quantization_config", None) is None


def without_a_factor(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    gone = next(name for name in state if not name.endswith((".weight", ".bias")))
    save_file(
        {name: value for name, value in state.items() if name != gone},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return "and is not in the checkpoint"


def test_a_name_on_the_command_line_restores_it_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import auto

    model = compressed(bert).model.eval()
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "tdpass.hugging_face")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    restored = module_of(f"hf:{tmp_path}").eval()
    with torch.no_grad():
        assert torch.equal(restored(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def of_another_shape(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if not name.endswith((".weight", ".bias")))
    state[name] = state[name][:-1].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return r"should have shape \[\d+, \d+\] and has \[\d+, \d+\] in the checkpoint"


def of_another_class(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["structure"]["layers"][0]["paths"] = ["nowhere.dense"]
    (folder / "config.json").write_text(json.dumps(config))
    return "which is no site of this model"


@pytest.mark.parametrize("damage", [without_a_factor, of_another_shape, of_another_class])
def test_what_does_not_fit_is_refused(damage: Any, tmp_path: Path) -> None:
    compressed(bert).model.save_pretrained(tmp_path)
    with pytest.raises(TdpassError, match=damage(tmp_path)):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)


def test_the_card_says_what_was_done_and_everything_is_in_the_folder(tmp_path: Path) -> None:
    artifact = compressed(bert)
    hugging_face.save_pretrained(artifact, tmp_path, base="someone/bert", license="apache-2.0")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    assert all(
        text in card
        for text in (
            "base_model: someone/bert",
            "license: apache-2.0",
            "import tdpass.hugging_face",
            "70% of the params",
        )
    )
    assert all(choice.site in card for choice in artifact.plan)
    assert {"config.json", "model.safetensors", "plan.json", "report.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with pytest.raises(UsageError, match="no model of transformers"):
        hugging_face.save_pretrained(tdpass.compress(nn.Linear(4, 4), pipeline="", progress=False), tmp_path)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = torch.randn(24, 12, generator=torch.Generator().manual_seed(4)), torch.arange(24) % 3
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def held(artifact: tdpass.Artifact[Any] | None) -> None:
    """The artifact of a method that trained for all its rounds."""
    assert artifact is not None
    assert artifact.report.final.params <= 0.6 * artifact.report.original.params
    assert not any("of the 4 rounds" in note for note in artifact.report.notes)


def example() -> tuple[nn.Module, torch.optim.Optimizer, AdmmTT]:
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    return (
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        AdmmTT(budget={"params": 0.6}, format="svd", rounds=4, rho=0.5),
    )


def test_a_trainer_trains_with_a_method() -> None:
    model, optimizer, method = example()
    with pytest.raises(UsageError, match="unknown training method 'admm-xx'"):
        hugging_face.MethodCallback("admm-xx")
    callback, state = hugging_face.MethodCallback(method), SimpleNamespace(max_steps=12)
    callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    trained(model, optimizer)
    callback.on_train_end(None, state, None, model=model)
    held(callback.artifact)


def test_lightning_trains_with_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tdpass.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(UsageError, match="pip install lightning"):
        importlib.import_module("tdpass.lightning")
    library = ModuleType("lightning.pytorch")
    library.__dict__["Callback"] = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning.pytorch", library)
    model, optimizer, method = example()
    module = nn.ModuleDict({"net": model})
    callback = importlib.import_module("tdpass.lightning").MethodCallback(method, part="net")
    trainer = SimpleNamespace(estimated_stepping_batches=12, optimizers=[optimizer])
    misspelt = importlib.import_module("tdpass.lightning").MethodCallback(method, part="ned")
    with pytest.raises(
        UsageError, match=r"part='ned' is no module in ModuleDict \(did you mean 'net'\?\); it has: net"
    ):
        misspelt.on_train_start(trainer, module)
    callback.on_train_start(trainer, module)
    trained(model, optimizer)
    callback.on_train_end(trainer, module)
    held(callback.artifact)
    sys.modules.pop("tdpass.lightning")
