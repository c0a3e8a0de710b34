"""Pictures: by timm's or transformers' own preparation of a model, else as networks of ImageNet read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tdpass.images import SUFFIXES, opened, photographs
from tdpass.optional import is_installed, optional
from tdpass.raw.base import RawKind, Reader, register_raw_kind, spread


@register_raw_kind
class Pictures(RawKind):
    """Image files, read by Pillow."""

    name = "pictures"
    what = "image processor"
    suffixes = SUFFIXES
    feature = "Image"

    def read(self, path: Path, reader: Reader, most: int) -> object:
        if path.is_dir() and not _has_own(reader):
            return photographs(path, reader.sample, most)
        return self.made(list(opened(spread(self.files(path), most))), reader)

    def made(self, column: Sequence[Any], reader: Reader) -> object:
        pictures = [picture.convert("RGB") for picture in column]
        if _is_timm(reader):
            data: Any = optional("timm.data", "timm", "the preparation of timm's models")
            transform = data.create_transform(**data.resolve_data_config({}, model=reader.module))
            return torch.stack([transform(picture) for picture in pictures])
        processor = reader.hugging_face("AutoImageProcessor", self.what)
        made: Mapping[str, Any] = processor(pictures, return_tensors="pt")
        return dict(made)


def _is_timm(reader: Reader) -> bool:
    return reader.processor is None and hasattr(reader.module, "pretrained_cfg") and is_installed("timm")


def _has_own(reader: Reader) -> bool:
    return bool(reader.processor or getattr(reader.config, "name_or_path", "")) or _is_timm(reader)
