"""The structure of a module as text: its exported program without the weights.

The weights are in the file that carries it.
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tdpass.errors import UnsupportedError
from tdpass.models.batch import Batch
from tdpass.models.torch.modules.copying import copied
from tdpass.models.torch.saving.program_archive import broken, checked_archive

PROGRAM_KEY = "tdpass.program"
_WEIGHTS = "/data/weights/"
_TABLE = "/data/weights/model_weights_config.json"
_LARGEST = 1 << 30


def program_text(module: nn.Module, call: Batch) -> str:
    """The program of the module in evaluation mode, for calls such as that with any number of samples.

    Whole numbers, such as tokens, may be more or fewer along every axis.  Raises `UnsupportedError` where
    torch cannot export it.
    """
    plain = copied(module, {})
    for part in plain.modules():
        part.training = False
    _own_storage(plain)
    try:
        program = torch.export.export(
            plain, call.args, dict(call.kwargs), dynamic_shapes=_open_axes(plain, call), strict=False
        )
        written = io.BytesIO()
        torch.export.save(program, written)
    except Exception as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedError(
            f"torch cannot export the model as a program ({said}); save it without program=True, and load it "
            "on its dense class"
        ) from error
    with zipfile.ZipFile(written) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not _is_weight(name)}
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return base64.b64encode(zlib.compress(held.getvalue(), 9)).decode()


def program_of(text: str, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The module that `program_text` described, with the weights by name.

    Nothing that the text says is run unchecked. Raises `InvalidModelError` where the text is damaged, would
    run code, or names weights that are not there.
    """
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), _LARGEST)
        with zipfile.ZipFile(io.BytesIO(unpacked)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        table = next(content for name, content in members.items() if name.endswith(_TABLE))
        members |= dict(_weights(json.loads(table)["config"], state, next(iter(members)).partition("/")[0]))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        StopIteration,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise broken(path, error) from None
    archive_of_all = checked_archive(members, path)
    try:
        program: ExportedProgram = torch.export.load(archive_of_all)
        made = program.module()
    except Exception as error:  # noqa: BLE001 - a damaged archive fails in any of a dozen ways
        raise broken(path, error) from None
    assert isinstance(made, nn.Module)
    for refused in ("train", "eval"):
        vars(made).pop(
            refused, None
        )  # torch puts an error in their place, though both modes are the same here
    return made


def _is_weight(name: str) -> bool:
    return _WEIGHTS in name and not name.endswith(_TABLE)


def _weights(table: Mapping[str, Any], state: Mapping[str, Tensor], root: str) -> Iterator[tuple[str, bytes]]:
    for name, entry in table.items():
        held, sizes = state.get(name), [size["as_int"] for size in entry["tensor_meta"]["sizes"]]
        if held is None or list(held.shape) != sizes:
            found = "missing" if held is None else f"of shape {tuple(held.shape)}"
            raise ValueError(f"its weight {name!r} is {found}, the program wants {tuple(sizes)}")
        if entry["use_pickle"]:
            raise ValueError(f"its weight {name!r} is no plain tensor")
        content = held.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield f"{root}{_WEIGHTS}{entry['path_name']}", content


def _own_storage(module: nn.Module) -> None:
    """Give every tensor memory of its own, in the order of its axes, as files hold it."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for tensor in tensors.values():
        tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


def _open(tensor: Tensor, sample_axis: int | None) -> Iterable[int]:
    """Axes that may have another size: those of samples, and all of ids and masks."""
    if not tensor.is_floating_point():
        return range(tensor.dim())
    return () if sample_axis is None else (sample_axis,)


def _open_axes(module: nn.Module, call: Batch) -> dict[str, Any] | tuple[Any, ...]:
    axes = [
        dict.fromkeys(_open(tensor, axis), Dim.AUTO)
        for tensor, axis in zip(call.tensors, call.sample_axes, strict=True)
    ]
    given = len(call.args)
    if not call.kwargs:
        return tuple(axes)
    names = _argument_names(module)[:given]
    return {
        **dict(zip(names, axes[:given], strict=True)),
        **dict(zip(call.kwargs, axes[given:], strict=True)),
    }


def _argument_names(module: nn.Module) -> list[str]:
    code = module.forward.__code__
    return list(code.co_varnames[1 : code.co_argcount])
