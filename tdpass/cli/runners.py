"""Ways to run a whole model on this machine, each as a call without arguments."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tdpass.cli.sources import Source
from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.base import Batch
from tdpass.models.torch.exported_program import load_program
from tdpass.models.torch.modules.module_values import input_types
from tdpass.targets.runtimes.openvino import open_graph, open_request

RUNTIMES = ("onnxruntime", "openvino", "eager", "inductor")
_ELEMENT_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True)
class Runner:
    """A model in a runtime."""

    model: str
    runtime: str
    call: Callable[[], object]


def runners(source: Source, batch: Batch, threads: int, wanted: tuple[str, ...]) -> Iterator[Runner]:
    """The runtimes among `wanted` that fit the model and are installed.

    Raises `InvalidModelError` when one cannot run it.
    """
    if source.suffix == ".onnx":
        if "onnxruntime" in wanted:
            yield _tried(source, "onnxruntime", lambda: _onnxruntime(source.text, batch, threads))
        if "openvino" in wanted and importlib.util.find_spec("openvino") is not None:
            yield _tried(source, "openvino", lambda: _openvino(source.text, batch, threads))
        return
    torch.set_num_threads(threads)
    if "eager" in wanted:
        yield _tried(source, "eager", lambda: _torch(source, batch, compiled=False))
    if "inductor" in wanted:
        yield _tried(source, "inductor", lambda: _torch(source, batch, compiled=True))


def example_batch(source: Source, size: int | None) -> Batch | None:
    """Inputs that the model itself describes, `size` samples where it leaves that open.

    None where it says nothing.
    """
    if source.suffix == ".pt2":
        given = load_program(Path(source.text)).example_inputs
        return None if given is None else Batch(tuple(given[0]), dict(given[1]))
    if source.suffix != ".onnx":
        return None
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    from tdpass.targets.sessions.onnx import open_session  # noqa: PLC0415 - loads ONNX Runtime

    for value in open_session(source.text, 1).get_inputs():
        shape = [
            size or 1 if index == 0 and not isinstance(extent, int) else extent
            for index, extent in enumerate(value.shape)
        ]
        dtype = _ELEMENT_TYPES.get(value.type)
        if dtype is None or not all(isinstance(extent, int) for extent in shape):
            raise UsageError(
                f"input {value.name!r} of {source.name} has shape {value.shape} and type {value.type}; say "
                "what to run with --input or --data"
            )
        tensors.append(
            torch.randn(shape, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.zeros(shape, dtype=dtype)
        )
    return Batch(tuple(tensors))


def _tried(source: Source, runtime: str, make: Callable[[], Callable[[], object]]) -> Runner:
    try:
        call = make()
        call()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidModelError(
            f"{runtime} cannot run {source.name}: {reason}; choose runtimes with --runtime, inputs with "
            "--input or --data"
        ) from error
    return Runner(source.name, runtime, call)


def _named(names: list[str], batch: Batch) -> dict[str, Tensor]:
    free = [name for name in names if name not in batch.kwargs]
    return {
        **dict(zip(free, batch.args, strict=False)),
        **{name: tensor for name, tensor in batch.kwargs.items() if name in names},
    }


def _onnxruntime(path: str, batch: Batch, threads: int) -> Callable[[], object]:
    from tdpass.targets.sessions.onnx import bound, open_session  # noqa: PLC0415 - loads ONNX Runtime

    session = open_session(path, threads)
    return bound(session, _named([value.name for value in session.get_inputs()], batch))


def _openvino(path: str, batch: Batch, threads: int) -> Callable[[], object]:
    graph = open_graph(path)
    infer: Callable[[], object] = open_request(
        graph, _named([value.get_any_name() for value in graph.inputs], batch), threads
    ).infer
    return infer


def _torch(source: Source, batch: Batch, compiled: bool) -> Callable[[], object]:
    model = source.load()
    module = model if isinstance(model, nn.Module) else load_program(Path(source.text)).module()
    run: Callable[..., object] = torch.compile(module, options={"freezing": True}) if compiled else module
    types = input_types(module, batch)
    placed = batch.map(
        lambda tensor: tensor.to(types[0]) if len(types) == 1 and tensor.is_floating_point() else tensor
    )

    def call() -> object:
        with torch.no_grad():
            return run(*placed.args, **placed.kwargs)

    return call
