"""State dicts in files: `.safetensors`, and what `torch.save` wrote, of which only tensors are read."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tdpass.errors import InvalidModelError, UsageError

_TORCH = (".pth", ".pt", ".bin", ".ckpt")
_INSIDE = ("state_dict", "model_state_dict", "model")  # where training scripts keep it in a checkpoint
_PARALLEL = "module."


def load_weights(module: nn.Module, path: Path) -> None:
    """Put the weights of a file on a model, in place.

    Nothing is unpickled but tensors and plain values.  A state dict inside a checkpoint is found, and the
    prefix that data parallel training adds is taken off.  Raises `UsageError` for another kind of file,
    `InvalidModelError` for one that is damaged or does not fit.
    """
    check_suffix(path)
    state = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    if all(name.startswith(_PARALLEL) for name in state):
        state = {name.removeprefix(_PARALLEL): value for name, value in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InvalidModelError(
            f"the weights in {path} do not fit the model: {str(error).splitlines()[-1].strip().rstrip('.')}; "
            "name a function of your own that builds the network they are of, as package.module:factory"
        ) from None


def check_suffix(path: Path) -> None:
    """Raise `UsageError` for a name that is no file of weights."""
    if path.suffix not in (".safetensors", *_TORCH):
        raise UsageError(
            f"{path.name!r} is not a file of weights; give .safetensors, or a state dict in "
            f"{', '.join(_TORCH)}"
        )


def _safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise InvalidModelError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    except SafetensorError as error:
        raise InvalidModelError(f"{path} is damaged: {error}") from None


def _torch(path: Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InvalidModelError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    except pickle.UnpicklingError:
        told = f"{path} holds more than tensors, and loading it could run code"
        raise InvalidModelError(
            f"{told}; write the state dict alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InvalidModelError(
            f"{path} is damaged: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from None
    for key in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(value, Tensor) for value in found.values())
    ):
        raise InvalidModelError(
            f"{path} holds no state dict, a mapping of names to tensors; write one: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    return found
