"""Networks of well-known shapes with random weights, for measuring time alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn

from tdpass import zoo
from tdpass.zoo.transformer import encoder


class Recurrent(nn.Module):
    """An LSTM or GRU of two layers, batch first."""

    def __init__(self, width: int = 512, kind: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.layers = kind(width, width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs `[n, steps, width]`."""
        y: Tensor = self.layers(x)[0]
        return y


@dataclass(frozen=True)
class Net:
    """A network, its input, and how its layers are factored: format by kernel size, and the cut in macs."""

    name: str
    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    batches: tuple[int, ...]
    formats: dict[int, str]
    cut: float
    grid: int
    exclude: tuple[str, ...] = ()

    def input(self, batch: int) -> Tensor:
        """Random input."""
        return torch.randn(batch, *self.sample, generator=torch.Generator().manual_seed(0))


def exported(module: nn.Module, x: Tensor, open_batch: bool = False) -> onnx.ModelProto:
    """The module as an ONNX model for that input, or for any number of such samples."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter that gives every size as it is
        axes = {"x": {0: "n"}} if open_batch else None
        torch.onnx.export(
            module, (x,), file, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes
        )
    return onnx.load_from_string(file.getvalue())


def _randomized(module: nn.Module) -> nn.Module:
    """Batch-norms with statistics that are not the identity, evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
            part.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
    return module.eval()


NETS = {
    net.name: net
    for net in (
        Net(
            "resnet18",
            lambda: _randomized(zoo.resnet18()),
            (3, 224, 224),
            (1, 8),
            {3: "tucker2"},
            2.88,
            16,
            ("stem.*",),
        ),
        Net(
            "resnet50",
            lambda: _randomized(zoo.resnet50()),
            (3, 224, 224),
            (1,),
            {3: "tucker2", 1: "channel_svd"},
            2.89,
            16,
            ("stem.*",),
        ),
        Net(
            "resnet20",
            lambda: _randomized(zoo.resnet20()),
            (3, 32, 32),
            (1, 64),
            {3: "tucker2"},
            2.66,
            8,
            ("conv1",),
        ),
        Net("encoder", lambda: encoder(384, 12, 6).eval(), (128, 384), (1, 8), {0: "svd"}, 3.13, 16),
    )
}
