"""A compressed model as files that run without tdpass.

They are a package compiled ahead of time with its operators, or ONNX.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tdpass.artifact import Artifact
from tdpass.errors import InvalidModelError, KernelError, UnsupportedError, UsageError
from tdpass.files import folder_beside
from tdpass.kernels import binding, build
from tdpass.models import Batch, ExampleInputs, Model, as_example, open_model
from tdpass.models.abilities import RunsAsModule
from tdpass.models.torch.fused.deployable import (
    compile_package,
    export_onnx,
    export_program,
    fused,
    load_package,
)
from tdpass.models.torch.fused.fuse import chosen_operators
from tdpass.models.torch.sites.adapting import adaptation_of

SUFFIXES = (".pt2", ".onnx")
OPS_SUFFIX = ".tdpass_ops.so"


@dataclass(frozen=True)
class Deployment:
    """The files that were written, the model first, and how many of its layers run as fused operators.

    `declined` are the factored layers that run as they are in a package, each with its reason.
    """

    files: tuple[Path, ...]
    fused: int
    declined: Mapping[str, str] = field(default_factory=dict)


def deploy(
    model: object, example_inputs: ExampleInputs, path: Path | str, *, dynamic_batch: bool = False
) -> Deployment:
    """Write a model for a program that runs it.

    `model`: what `compress` gave back or takes; it is left untouched.  `path`: `.pt2` is a package for
    AOTInductor's loader in C++ or Python, compiled for this kind of processor, with the library of the fused
    operators beside it as `<stem>.tdpass_ops.so`: what `fuse-kernels` made operators, and the layers that are
    measured faster so on the example inputs; `.onnx` is the graph in standard operators.
    `dynamic_batch`: let the first axis of every input be of any size.  A network of several widths or ranks
    becomes one ONNX file that holds its weights once, with a last input `setting` that selects by number (the
    metadata `tdpass.settings` names the numbers); one setting alone is what `tdpass.ordinary` gives.

    Raises `KernelError` without a C++ compiler, `InvalidModelError` for a model that torch cannot export,
    `UsageError` for any other suffix or without example inputs, `UnsupportedError` for an ONNX model that
    should become a package.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise UsageError(
            f"cannot deploy to {target.name!r}; name a .pt2 file for AOTInductor, or an .onnx file"
        )
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}; make it, or name another")
    opened = open_model(model.model if isinstance(model, Artifact) else model)
    if not isinstance(opened, RunsAsModule):
        if target.suffix != opened.suffix:
            raise UnsupportedError(
                f"a model that came through {opened.frontend} cannot become {target.name!r}: AOTInductor "
                f"compiles torch models; deploy it as {opened.suffix}, or the torch model"
            )
        opened.save(target, {})
        return Deployment((target,), 0)
    layers, declined = 0, dict[str, str]()
    example = _example(opened, as_example(example_inputs), dynamic_batch)
    module = opened.inference_module()
    with folder_beside(target) as folder:
        made = folder / target.name
        if target.suffix == ".onnx" and adaptation_of(module) is not None:
            # it needs the ONNX libraries
            from tdpass.models.torch.selected_onnx import export_selected  # noqa: PLC0415

            export_selected(module, example, dynamic_batch, made)
        elif target.suffix == ".onnx":
            export_onnx(module, example, dynamic_batch, made)
        else:
            if build.compiler() is None:
                raise KernelError(
                    "compiling ahead of time takes a C++ compiler; install g++ or clang, set CXX, or deploy "
                    "to .onnx"
                )
            network, layers = fused(chosen_operators(module.cpu(), example, declined.__setitem__))
            if layers:
                shutil.copyfile(binding.build(), folder / f"{target.stem}{OPS_SUFFIX}")
            compile_package(export_program(network, example, dynamic_batch), made)
        # the package last: where it is, all that it needs is there
        written = sorted(folder.iterdir(), key=lambda file: file == made)
        return Deployment(
            tuple(file.replace(target.parent / file.name) for file in written)[::-1], layers, declined
        )


def load_deployed(path: Path | str) -> Callable[..., Any]:
    """A `.pt2` package that `deploy` wrote, as a function of the model's inputs.

    Its operators come from the library beside it, or from tdpass itself where that cannot be loaded.  Raises
    `UsageError` for another suffix, `InvalidModelError` where the package is missing or damaged.
    """
    package = Path(path)
    if package.suffix != ".pt2":
        raise UsageError(
            f"cannot load {package.name!r} as a compiled package; name a .pt2 file that tdpass.deploy "
            "wrote, or open .onnx with ONNX Runtime"
        )
    if not package.is_file():
        raise InvalidModelError(f"there is no file {package}; check the path")
    library = package.with_name(f"{package.stem}{OPS_SUFFIX}")
    if library.is_file():
        with suppress(KernelError):
            binding.load(library)
    return load_package(package)


class Deployed(nn.Module):
    """A package that `deploy` wrote, as a module; it has no parameters, and cannot be changed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._run = load_deployed(path)

    def __deepcopy__(self, memo: object) -> Deployed:
        return self

    def forward(self, *inputs: Any) -> Any:
        """What the package computes."""
        return self._run(*inputs)


def is_package(path: Path) -> bool:
    """Whether a file is a compiled package, whose loading runs code that it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("data/aotinductor/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _example(model: Model, given: Batch | None, dynamic_batch: bool) -> Batch:
    """The call that was given, which the model was seen to run on, or the one that it came with."""
    if given is not None:
        model.observe(given)
    example = given or model.example()
    if example is None:
        raise UsageError("deploying a torch model needs to see it running; pass example_inputs= (--input)")
    # torch takes an axis of one sample for a constant
    return example.resized(2) if dynamic_batch and example.size == 1 else example
