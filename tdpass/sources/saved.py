"""Artifacts that say themselves which published model they are of."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tdpass import artifact
from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.torch.saving.program_text import PROGRAM_KEY
from tdpass.models.torch.saving.state import load_program_of
from tdpass.models.torch.saving.tensor_file import read_metadata
from tdpass.sources.base import MODULE_SOURCES, module_of

_BY_THEMSELVES = {".onnx": "onnx.load or a session of ONNX Runtime", ".pt2": "torch.export.load"}


def published_model(path: Path) -> str:
    """The name of the published model that a `.safetensors` artifact was made from, as `timm:resnet50`.

    Empty where it was another, or cannot be read.
    """
    try:
        text = read_metadata(path).get(artifact.SOURCE_KEY, "")
    except InvalidModelError:
        return ""
    return text if text.partition(":")[0] in MODULE_SOURCES else ""


def holds_program(path: Path) -> bool:
    """Whether a file says itself how its network is built."""
    try:
        return PROGRAM_KEY in read_metadata(path)
    except InvalidModelError:
        return False


def load(path: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Put a saved `.safetensors` artifact on a dense model of the class it was made from, in place.

    Without a model, one is built by the name in the file, where that is of a library that tdpass knows
    (`timm:`, `torchvision:`, `hf:`, `zoo:`); functions that a file names are never called.  Else it is the
    program that `Artifact.save(path, program=True)` wrote beside the weights: a graph module for inference.
    What is built here is in evaluation mode; a model that is given stays as it is.
    Everything is checked before anything is allocated or changed: raises `InvalidModelError` for a damaged
    file, `PlanError` where names, shapes or ranks do not fit, `UsageError` where there is no model. No pickle
    is ever read.
    """
    if model is not None:
        return artifact.load(path, model)
    if Path(path).suffix in _BY_THEMSELVES:
        raise UsageError(f"{path} loads by itself, with {_BY_THEMSELVES[Path(path).suffix]}")
    read_metadata(Path(path))  # says what is wrong with a file that cannot be read
    text = published_model(Path(path))
    if text:
        return artifact.load(path, module_of(text, pretrained=False)).eval()
    made = load_program_of(Path(path))
    if made is None:
        raise UsageError(
            f"{path} does not say how its model is built; give the dense model: tdpass.load({str(path)!r}, "
            "DenseClass()), or write the file with Artifact.save(path, program=True)"
        )
    return made.eval()
