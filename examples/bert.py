"""A BERT from a configuration: compressed, saved as transformers saves, loaded by `from_pretrained`.

pip install transformers
python examples/bert.py
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

import tdpass
import tdpass.hugging_face  # registers the factored layers with transformers


def main() -> None:
    """Compress to 60 % of the parameters, and compare what is loaded."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    tokens = torch.randint(0, 500, (32, 24))
    data = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    artifact = tdpass.compress(model, {"params": 0.6}, data, effort="fast")
    tdpass.hugging_face.save_pretrained(artifact, "bert")
    loaded = BertForSequenceClassification.from_pretrained("bert").eval()
    with torch.no_grad():
        gap = (loaded(**data).logits - artifact.model(**data).logits).abs().max()
    print(repr(artifact))
    print("loaded, largest difference", float(gap))


if __name__ == "__main__":
    main()
