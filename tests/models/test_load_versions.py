"""Artifacts on classes that were built without storage, and artifacts of versions that are not known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tdpass
from tdpass.errors import InvalidModelError

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution that is folded into, a shared layer, buffers, and a head."""

    def __init__(self, *, aside: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.head = nn.Linear(16, 10)
        self.register_buffer("scale", torch.tensor(2.0))
        if aside:
            self.register_buffer("aside", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.again(torch.relu(self.first(x))))) * self.scale


PIPELINES = {
    "factored": "fold-batchnorm,plan,factorize",
    "quantized": "plan,factorize,quantize{numbers=int8}",
    "sparse": "fold-batchnorm,sparsify{support=2:4},quantize{numbers=int8}",
}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made(X)  # statistics that are not the usual ones
    return made.eval()


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_it_loads_on_a_class_without_storage(net: Net, pipeline: str, tmp_path: Path) -> None:
    budget = {"params": 0.6} if "plan" in pipeline else None
    small = tdpass.compress(net, budget, X, pipeline=pipeline, effort="fast", progress=False)
    small.save(tmp_path / "small.safetensors")
    with torch.device("meta"):
        empty = Net().eval()
    loaded = tdpass.load(tmp_path / "small.safetensors", empty)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.again is loaded.first
    with torch.no_grad():
        assert torch.equal(loaded(X), small.model(X))


def test_a_buffer_that_no_file_holds_is_named_before_anything_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = tdpass.compress(Net(aside=True).eval(), {"params": 0.6}, X, effort="fast", progress=False)
    small.save(tmp_path / "small.safetensors")
    with torch.device("meta"):
        empty = Net(aside=True).eval()
    with pytest.raises(InvalidModelError, match=r"'aside' is on the meta device.*outside torch\.device"):
        tdpass.load(tmp_path / "small.safetensors", empty)
    assert type(empty.first) is nn.Linear
    empty.aside = torch.ones(3)
    with torch.no_grad():
        assert torch.equal(tdpass.load(tmp_path / "small.safetensors", empty)(X), small.model(X))


@pytest.mark.parametrize("more", [{}, {"layouts": [1]}])
def test_a_version_that_is_not_known_is_refused_with_those_that_are(
    net: Net, more: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "small.safetensors"
    tdpass.compress(net, {"params": 0.6}, X, effort="fast", progress=False).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    structure = json.loads(metadata["tdpass.structure"])
    metadata["tdpass.structure"] = json.dumps({**structure, "version": 7, **more})
    del metadata["tdpass.digest"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(
        InvalidModelError, match=r"is of version 7, and this tdpass \(.*\) reads 1 to 2; load it with"
    ):
        tdpass.load(path, Net())
