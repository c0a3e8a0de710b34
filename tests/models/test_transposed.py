"""Linear layers that store their weight as [in, out] and call addmm, as GPT-2's do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_nets import model_of, node, svd, to_onnx, weight
from torch import Tensor, nn

import tdpass
from tdpass.layers.factorized import Factorized
from tdpass.models import Batch, open_model


class Conv1D(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        low = torch.randn(inputs, 6) @ torch.randn(6, outputs) / (6 * inputs) ** 0.5
        self.weight = nn.Parameter(low + 0.02 * torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Block(nn.Module):
    """A layer up, one down, and a square one, called twice, that shares its weight with another.

    The other has its own bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.square, self.twin = (
            Conv1D(64, 24),
            Conv1D(24, 64),
            Conv1D(24, 24),
            Conv1D(24, 24),
        )
        self.twin.weight = self.square.weight
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(self.twin(torch.tanh(self.square(self.square(x)))))


@pytest.fixture
def block() -> Block:
    return Block().eval()


X = torch.randn(32, 7, 24, generator=torch.Generator().manual_seed(0))


def test_their_weights_are_those_of_a_linear_layer(block: Block) -> None:
    model = open_model(block, Batch((X,)))
    shapes = {site.name: (site.shape, site.out_positions) for site in model.sites()}
    assert shapes == {
        "up": ((64, 24), 7),
        "down": ((24, 64), 7),
        "square": ((24, 24), 21),
        "head": ((5, 24), 7),
    }
    assert model.declined() == {}
    for name in ("up", "down", "square"):
        assert torch.equal(model.weight(name), block.get_submodule(name).weight.detach().t())
    assert model.macs() == 7 * (2 * 64 * 24 + 3 * 24 * 24 + 5 * 24)


@pytest.mark.parametrize("name", ["up", "down", "square"])
def test_at_full_rank_nothing_changes(name: str, block: Block) -> None:
    model = open_model(block, Batch((X,)))
    before = block(X).detach()
    site = next(site for site in model.sites() if site.name == name)
    model.replace(name, svd(model, name, min(site.o, site.i)))
    assert isinstance(block.get_submodule(name), Factorized)
    assert torch.allclose(block(X), before, atol=1e-5)


def test_a_block_is_compressed_saved_and_loaded(block: Block, tmp_path: Path) -> None:
    artifact = tdpass.compress(block, {"macs": 0.6}, X, cache=False)
    assert sum(not choice.kept_dense for choice in artifact.plan) >= 2
    assert artifact.report.final.macs <= 0.6 * artifact.report.original.macs
    small = artifact.model
    assert isinstance(small, Block)
    assert tdpass.verify(block, small, X)["relative_difference"] == pytest.approx(
        artifact.report.checks["relative_difference"], rel=1e-3
    )
    assert artifact.report.checks["relative_difference"] < 0.1
    artifact.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", Block())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), small.eval()(X))


def test_an_exported_program_has_the_same_sites(block: Block) -> None:
    dim = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(block, (X,), dynamic_shapes=({0: dim},))
    model = open_model(program, Batch((X,)))
    assert {site.shape for site in model.sites()} == {(64, 24), (24, 64), (24, 24), (5, 24)}
    artifact = tdpass.compress(program, {"macs": 0.7}, X, cache=False)
    with torch.no_grad():
        gap = (artifact.model.module()(X) - block(X)).norm() / block(X).norm()  # type: ignore[attr-defined]
    assert float(gap) == pytest.approx(artifact.report.checks["relative_difference"], rel=1e-3)
    assert float(gap) < 0.1


def test_a_plan_serves_the_model_in_onnx(block: Block) -> None:
    block.square, block.twin = Conv1D(24, 24), Conv1D(24, 24)
    artifact = tdpass.compress(block, {"macs": 0.6}, X, cache=False)
    onnx_small = tdpass.compress(to_onnx(block, X[:2]), plan=artifact.plan, data=X)
    assert [choice.rank for choice in onnx_small.plan] == [choice.rank for choice in artifact.plan]
    assert tdpass.verify(artifact.model, onnx_small.model, X)["relative_difference"] < 1e-3


class Twice(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Rows(Conv1D):
    """Its weight is [out, in], which a square shape does not show."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("cls", [Twice, Rows])
def test_what_computes_something_else_is_left_alone(cls: type[Conv1D]) -> None:
    network = nn.Sequential(cls(24, 24), nn.Linear(24, 5)).eval()
    model = open_model(network, Batch((X,)))
    assert [site.name for site in model.sites()] == ["1"]
    assert f"{cls.__name__} holds a weight" in model.declined()["0"]


def test_several_matrices_in_one_initializer_say_what_to_do() -> None:
    proto = model_of([node("MatMul", "x w")], {"w": weight(4, 24, 16)}, (4, "N", 24))
    with pytest.raises(
        tdpass.TdpassError,
        match="no site is left to compress: w: it holds several matrices as one weight; "
        "export the model with a linear",
    ):
        tdpass.compress(proto, {"params": 0.5}, torch.randn(4, 6, 24))


class Experts(nn.Module):
    """Four layers in one parameter, taken apart as `read` says."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.up = nn.Parameter(0.2 * torch.randn(4, 16, 24))
        self.gate, self.head, self.read = nn.Linear(24, 4), nn.Linear(16, 5), read

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        gates = self.gate(x).softmax(-1)
        if self.read == "bmm":
            made = torch.bmm(x.expand(4, *x.shape), self.up.transpose(1, 2)).permute(1, 0, 2)
        elif self.read == "einsum":
            made = torch.einsum("ni,eoi->neo", x, self.up)
        else:
            made = torch.stack([nn.functional.linear(x, self.up[expert]) for expert in range(4)], 1)
        return self.head((gates[..., None] * made).sum(1))


@pytest.mark.parametrize("read", ["index", "bmm", "einsum"])
def test_experts_in_one_parameter_are_counted_and_say_what_to_do(read: str) -> None:
    network = nn.Sequential(Experts(read)).eval()
    report = tdpass.compress(network, {"params": 0.99}, X, cache=False, effort="fast").report
    assert "'up' holds several matrices as one parameter; make an nn.Linear of each" in report.declined["0"]
    assert report.original.macs == 4 * 16 * 24 + 24 * 4 + 16 * 5
    assert report.original.params == 4 * 16 * 24 + 24 * 4 + 4 + 16 * 5 + 5
