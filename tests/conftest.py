"""Small models and data that many tests use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from selection import thin
from stopped_clock import stop_while_compiling
from torch import Tensor, nn

from tdpass.layers.derived import DERIVED

# Compiled once per checkout, and the operators are those in Python unless a test asks for the others.
os.environ.setdefault("TDPASS_KERNELS", str(Path(__file__).parents[1] / "build" / "kernels"))
os.environ.setdefault("TDPASS_BINDING", "python")


def pytest_configure(config: pytest.Config) -> None:
    """No test is ended because it was the first to need a kernel."""
    stop_while_compiling(config)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws while it is collected is the same in every process, or workers would disagree."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases that are chosen by name on the command line run whatever else does."""
    if not config.option.keyword and not any("::" in argument for argument in config.args):
        thin(items)


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the user's cache or on a terminal's width; each starts from the same seed."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv(
        "TDPASS_CACHE", os.environ.get("TDPASS_TEST_CACHE") or str(tmp_path_factory.getbasetemp() / "cache")
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled or derived before, nothing compiled left behind."""
    torch.compiler.reset()
    DERIVED.clear()
    yield
    torch.compiler.reset()


class Residual(nn.Module):
    """A convolution, batch-norm, and one residual block with a branch of two convolutions."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.second(torch.relu(self.first(x)))
        y += x
        return self.head(torch.relu(y).mean((2, 3)))


class Encoder(nn.Module):
    """Token embedding, a linear block with a residual sum on three axes, and a head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


class Odd(nn.Module):
    """What needs care: circular and 'same' padding, dilation, stride, reuse, grouped, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.circular = nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(16, 16, (3, 4), padding="same", dilation=(2, 1))
        self.strided = nn.Conv2d(16, 16, 5, stride=(2, 1), padding=(2, 0), bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.reused = nn.Linear(16, 16)
        self.again = self.reused
        self.transposed = nn.ConvTranspose1d(16, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.strided(torch.relu(self.same(torch.relu(self.circular(x))))))
        x = torch.relu(self.grouped(x)).flatten(2).transpose(1, 2)
        x = self.again(torch.relu(self.reused(x)))
        return self.head(torch.relu(self.transposed(x.transpose(1, 2))).mean(2))


def trained_like(model: nn.Module) -> nn.Module:
    """Give every weight a decaying spectrum and every batch-norm real statistics, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                u, s, v = torch.linalg.svd(parameter.flatten(1), full_matrices=False)
                decay = 1 / torch.arange(1, len(s) + 1, dtype=s.dtype)
                parameter.copy_(((u * s * decay * 3) @ v).reshape(parameter.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def residual() -> nn.Module:
    return trained_like(Residual())


@pytest.fixture
def encoder() -> nn.Module:
    return trained_like(Encoder())


@pytest.fixture
def odd() -> nn.Module:
    return trained_like(Odd())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 50, (32, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
