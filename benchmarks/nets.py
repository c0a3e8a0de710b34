"""Networks of well-known shapes with random weights, for measuring time alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar


class Residual(nn.Module):
    """A residual block: convolutions with batch-norms, each but the last with ReLU, and a shortcut."""

    def __init__(self, widths: Sequence[int], kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        # the stride is that of the (first) 3x3 convolution
        strides = [stride if k == 3 and 3 not in kernels[:place] else 1 for place, k in enumerate(kernels)]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in zip(widths, widths[1:], kernels, strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths[1:])
        changes = stride != 1 or widths[0] != widths[-1]
        self.shortcut = nn.Sequential(nn.Conv2d(widths[0], widths[-1], 1, stride, bias=False), nn.BatchNorm2d(widths[-1])) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        h = x
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(h))
            h = F.relu(h) if place + 1 < len(self.convs) else F.relu(h + self.shortcut(x))
        return h


class ResNet(nn.Module):
    """ResNet-18 or -50 for 224x224 images (He et al. 2016)."""

    def __init__(self, depths: Sequence[int], bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks, inputs = [], 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            for place in range(depth):
                outputs = 4 * width if bottleneck else width
                widths, kernels = ((inputs, width, width, outputs), (1, 3, 1)) if bottleneck else ((inputs, outputs, outputs), (3, 3))
                blocks.append(Residual(widths, kernels, 2 if stage > 0 and place == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class Layer(nn.Module):
    """A transformer encoder layer with normalization after each half (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`x[n, tokens, width]`."""
        n, tokens, width = x.shape
        q, k, v = (part(x).view(n, tokens, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = self.norm1(x + self.out(h))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Recurrent(nn.Module):
    """A two-layer LSTM, batch first."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs `[n, steps, width]`."""
        y: Tensor = self.lstm(x)[0]
        return y


@dataclass(frozen=True)
class Net:
    """A network, its input, and how its layers are factored: format by kernel size, and the wanted cut in multiply-adds."""

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
        torch.onnx.export(module, (x,), file, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
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
        Net("resnet18", lambda: _randomized(ResNet((2, 2, 2, 2), False)), (3, 224, 224), (1, 8), {3: "tucker2"}, 2.88, 16, ("stem.*",)),
        Net("resnet50", lambda: _randomized(ResNet((3, 4, 6, 3), True)), (3, 224, 224), (1,), {3: "tucker2", 1: "channel_svd"}, 2.89, 16, ("stem.*",)),
        Net("resnet20", lambda: _randomized(cifar.ResNet(3)), (3, 32, 32), (1, 64), {3: "tucker2"}, 2.66, 8, ("conv1",)),
        Net("encoder", lambda: nn.Sequential(*(Layer(384, 12) for _ in range(6))).eval(), (128, 384), (1, 8), {0: "svd"}, 3.13, 16),
    )
}
