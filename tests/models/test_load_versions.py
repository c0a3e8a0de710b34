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
from tdpass.layers.factorized import Factorized
from tdpass.models.torch.saving import structure
from tdpass.numbers.base import NUMBERS

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


def zero_points_in_bytes(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors with each zero point of four bits in a byte of its own, as it was stored once."""
    made = dict(tensors)
    for path, layer in model.named_modules():
        for part, earlier in layer.storage.earlier.items() if isinstance(layer, Factorized) else ():
            packed = made.get(f"{path}.{part}")
            if packed is not None:  # it is shared with a layer that comes first, or held as numbers
                pairs = torch.stack([packed & 15, packed >> 4], 1).flatten()[: earlier.part.shape[0]]
                made[f"{path}.{part}"] = (pairs.to(torch.int8) ^ 8) - 8
    assert made.keys() == tensors.keys()
    return made


@pytest.mark.parametrize("program", [False, True])
@pytest.mark.parametrize("numbers", ["int4/zero", "int4/tensor/zero", "int4/16/zero"])
def test_zero_points_of_four_bits_that_were_stored_in_bytes_are_read(
    net: Net, numbers: str, program: bool, tmp_path: Path
) -> None:
    path = tmp_path / "small.safetensors"
    pipeline = f"fold-batchnorm,quantize{{numbers={numbers}}}"
    small = tdpass.compress(net, None, X, pipeline=pipeline, progress=False)
    small.save(path, program=program)
    with safe_open(path, framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "tdpass.digest"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    metadata["tdpass.structure"] = metadata["tdpass.structure"].replace('"version": 3', '"version": 2')
    earlier = zero_points_in_bytes(tensors, small.model)
    assert {name for name in tensors if earlier[name].dtype != tensors[name].dtype} >= {"head.kernel_zero"}
    save_file(earlier, path, metadata=metadata)
    loaded = tdpass.load(path, Net().eval())
    with torch.no_grad():
        assert torch.equal(loaded(X), small.model(X))
    assert {name: (part.shape, part.dtype) for name, part in loaded.state_dict().items()} == {
        name: (part.shape, part.dtype) for name, part in small.model.state_dict().items()
    }


def test_a_state_with_zero_points_in_bytes_is_taken(net: Net) -> None:
    model = tdpass.compress(net, None, X, pipeline="quantize{numbers=int4/zero}", progress=False).model
    held = {name: part.clone() for name, part in model.state_dict().items()}
    state = zero_points_in_bytes(held, model)
    with torch.no_grad():
        wanted = model(X)
        for part in model.state_dict().values():
            part.zero_()
        model.load_state_dict(state)
        assert torch.equal(model(X), wanted)
    assert state["head.kernel_zero"].dtype == torch.int8  # what was given stays
    wrong = {**state, "head.kernel_zero": state["head.kernel_zero"][:3]}
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.kernel_zero"):
        model.load_state_dict(wrong)


KNOWN = ["levels16" if name == "levels" else name for name in NUMBERS.names()]


@pytest.mark.parametrize("numbers", [*KNOWN, "int4/zero", "int4/16/zero", "int8/zero"])
def test_only_what_an_older_version_cannot_read_says_that_it_is_of_a_newer_one(
    numbers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pipeline, net = tmp_path / "small.safetensors", f"quantize{{numbers={numbers}}}", nn.Linear(16, 12)
    small = tdpass.compress(nn.Sequential(net), None, pipeline=pipeline, progress=False)
    small.save(path)
    monkeypatch.setattr(structure, "_LATEST", 2)
    if not (numbers.startswith("int4") and numbers.endswith("zero")):
        loaded = tdpass.load(path, nn.Sequential(nn.Linear(16, 12)))
        assert all(map(torch.equal, loaded.state_dict().values(), small.model.state_dict().values()))
        return
    said = r"written by a newer tdpass: it is of version 3, and this one \(.*\) reads 1 to 2; load it with"
    with pytest.raises(InvalidModelError, match=said):
        tdpass.load(path, nn.Sequential(nn.Linear(16, 12)))


@pytest.mark.parametrize("more", [{}, {"layouts": [1]}])
def test_a_version_that_is_not_known_is_refused_with_those_that_are(
    net: Net, more: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "small.safetensors"
    tdpass.compress(net, {"params": 0.6}, X, effort="fast", progress=False).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    found = json.loads(metadata["tdpass.structure"])
    metadata["tdpass.structure"] = json.dumps({**found, "version": 7, **more})
    del metadata["tdpass.digest"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(
        InvalidModelError,
        match=r"written by a newer tdpass: it is of version 7, and this one \(.*\) reads 1 to 3; load it with",
    ):
        tdpass.load(path, Net())
