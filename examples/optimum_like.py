"""A class that loads a model of transformers and makes it smaller on the way, as libraries around the hub do.

python examples/optimum_like.py FOLDER_OR_NAME lines.txt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

import tdpass
import tdpass.hugging_face  # registers the factored layers with transformers


class CompressedModelForSequenceClassification:
    """`from_pretrained` as transformers has it, with a budget: compressed once, then loaded as saved."""

    @classmethod
    def from_pretrained(
        cls, name: str, *, budget: object = None, data: object = None, cache: str = "compressed"
    ) -> Any:
        """The smaller model: made from `name` with the budget on the first call, then read from `cache`."""
        folder = Path(cache)
        if not (folder / "config.json").exists():
            dense = AutoModelForSequenceClassification.from_pretrained(name).eval()
            artifact = tdpass.compress(dense, budget, data, effort="fast")
            tdpass.hugging_face.save_pretrained(artifact, folder, base=name)
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def main(name: str, lines: str) -> None:
    """Compress to 60 % of the parameters, and count what is left."""
    model = CompressedModelForSequenceClassification.from_pretrained(
        name, budget={"params": 0.6}, data=tdpass.Raw(lines, processor=name)
    )
    print(sum(parameter.numel() for parameter in model.parameters()), "parameters")


if __name__ == "__main__":
    main(*sys.argv[1:3])
