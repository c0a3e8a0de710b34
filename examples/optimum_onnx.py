"""A BERT exported and run by optimum, with tdpass between: `ORTModel` takes the smaller file as any other.

pip install optimum-onnx onnxruntime
python examples/optimum_onnx.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import BertConfig, BertForSequenceClassification

import tdpass


def main(folder: Path = Path("optimum_bert")) -> None:
    """Export, compress to 60 % of the multiply-adds, load with optimum, and compare."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=64,
    )  # fmt: skip
    dense, small = folder / "dense", folder / "small"
    model = BertForSequenceClassification(config).eval()
    onnx_export_from_model(model, dense, task="text-classification", do_validation=False)
    tokens = torch.randint(0, 500, (32, 24))
    data = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "token_type_ids": 0 * tokens}
    artifact = tdpass.compress(dense / "model.onnx", {"macs": 0.6}, data, effort="fast")
    small.mkdir(parents=True, exist_ok=True)
    artifact.save(small / "model.onnx")
    shutil.copy(dense / "config.json", small)
    loaded = ORTModelForSequenceClassification.from_pretrained(small)
    scores = loaded(**data).logits
    print(repr(artifact))
    with torch.no_grad():
        moved = (scores - model(**data).logits).abs().max()
    print("run by optimum, scores", tuple(scores.shape), "moved by", float(moved))


if __name__ == "__main__":
    main()
