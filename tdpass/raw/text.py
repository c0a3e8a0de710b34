"""Text: a line a sample, by the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdpass.errors import InvalidModelError, UsageError
from tdpass.raw.base import RawKind, Reader, register_raw_kind, spread

_LONGEST = 512


@register_raw_kind
class Text(RawKind):
    """Text files: lines that are not empty are samples, of at most 512 tokens or the model's positions."""

    name = "text"
    what = "tokenizer"
    suffixes = frozenset({".txt", ".text", ".md"})
    feature = "Value"

    def read(self, path: Path, reader: Reader, most: int) -> object:
        lines: list[str] = []
        for file in self.files(path):
            try:
                lines += [line for line in file.read_text("utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidModelError(f"cannot read the text {file}: {error}; give UTF-8") from None
        if not lines:
            raise UsageError(f"{path} holds no line of text; give a sample a line")
        return self.made(spread(lines, most), reader)

    def made(self, column: Sequence[Any], reader: Reader) -> object:
        tokenizer = reader.hugging_face("AutoTokenizer", self.what)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        positions = getattr(reader.config, "max_position_embeddings", None) or _LONGEST
        made = tokenizer(
            list(column),
            padding=True,
            truncation=True,
            max_length=min(_LONGEST, positions, tokenizer.model_max_length),
            return_tensors="pt",
        )
        data = dict(made)
        if getattr(reader.config, "is_encoder_decoder", False):
            data["decoder_input_ids"] = data["input_ids"]
        return data
