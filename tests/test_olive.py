"""The pass of Olive: `olive run` compresses ONNX and transformers models as a configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tdpass.errors import UsageError
from tdpass.report import Report

pytest.importorskip("olive")
olive = pytest.importorskip("tdpass.olive")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Olive's own warnings are no errors

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "olive"


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def run(folder: Path, config: dict[str, Any]) -> Any:
    """What `olive run` does; the only model that comes out."""
    from olive.workflows import run as run_workflow

    passes = folder / "passes.json"
    assert olive.main([str(passes)]) == 0
    output = {"output_dir": str(folder / "out"), "cache_dir": str(folder / "cache")}
    return run_workflow({**config, **output}, package_config=passes).get_best_candidate()


def exported(folder: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    path = folder / "dense.onnx"
    torch.onnx.export(net.eval(), (torch.randn(1, 1, 8, 8),), path, verbose=False, external_data=False)
    return path


@pytest.mark.parametrize("source", ["data", "data_config"])
def test_an_onnx_model_keeps_its_budget_and_goes_on_to_the_next_pass(source: str, tmp_path: Path) -> None:
    import onnxruntime

    images = np.random.default_rng(0).normal(size=(32, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", input=images)
    config = example("onnx")
    config["input_model"]["model_path"] = str(exported(tmp_path))
    if source == "data":
        config["passes"]["smaller"] |= {"data": str(tmp_path / "calibration.npz"), "data_config": None}
    else:
        config["data_configs"][0]["load_dataset_config"]["params"]["input_shapes"] = [[1, 8, 8]]
    found = run(tmp_path, config)
    session = onnxruntime.InferenceSession(found.model_path, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: images[:1]})
    assert answer.shape == (1, 10)
    (report,) = (Report.load(path) for path in (tmp_path / "cache").rglob("report.json"))
    assert report.final.macs <= 0.5 * report.original.macs
    assert any(row.form.factored for row in report.sites)


def test_a_model_of_transformers_comes_back_as_one_that_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(**sizes, vocab_size=60, max_position_embeddings=32)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    workflow = example("bert")
    workflow["input_model"]["model_path"] = str(tmp_path / "dense")
    found = run(tmp_path, workflow)
    loaded = transformers.BertForSequenceClassification.from_pretrained(found.model_path)
    dense = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert loaded.num_parameters() < 0.8 * dense.num_parameters()
    report = Report.load(next((tmp_path / "cache").rglob("report.json")))
    assert report.final.params <= 0.7 * report.original.params


def test_a_model_that_is_neither_is_refused_by_name() -> None:
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    configured = olive.TdpassCompress.generate_config(
        DEFAULT_CPU_ACCELERATOR, {"budget": 0.5}, disable_search=True
    )
    with pytest.raises(UsageError, match="takes an ONNXModelHandler or HfModelHandler, not a str"):
        olive.TdpassCompress(DEFAULT_CPU_ACCELERATOR, configured)._run_for_config("model", configured, "out")
