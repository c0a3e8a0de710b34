"""slice-heads: narrower attention heads, the function of the whole model with channels at zero, saved."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn
from torch.nn import functional as F
from transformers_small import NETS, WIDTH, answer, bert, encoder, llama, notes, vision

import tdpass
from tdpass.errors import BudgetError, PlanError, UsageError
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.heads import find_bonds

QUIET = {"progress": False, "cache": False}
HEADS = 4


class Attention(nn.Module):
    """Separate query, key and value layers; `kv` heads of keys and values, scores spelled out or fused."""

    def __init__(self, *, kv: int = HEADS, fused: bool = False, turned: bool = False) -> None:
        super().__init__()
        self.head_dim, self.kv, self.fused, self.turned = WIDTH // HEADS, kv, fused, turned
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv * self.head_dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if self.turned:
            q, k = (y * torch.cos(torch.arange(self.head_dim) * 1.0) for y in (q, k))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (y.repeat_interleave(HEADS // self.kv, 1) for y in (k, v))
            y = (q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attention(**options: object) -> tuple[nn.Module, Tensor]:
    """An attention of random weights, and data for it."""
    torch.manual_seed(0)
    return nn.Sequential(Attention(**options), nn.Linear(WIDTH, 3)).eval(), torch.randn(24, 5, WIDTH)  # type: ignore[arg-type]


def low_rank(net: nn.Module, rank: int) -> None:
    """Let heads hold something in so many channels only; keys that are turned, in the first ones."""
    with torch.no_grad():
        for layer in (net[0].k, net[0].v):  # type: ignore[index]
            mixing = torch.randn(net[0].head_dim, rank) @ torch.randn(rank, net[0].head_dim)  # type: ignore[index]
            if net[0].turned and layer is net[0].k:  # type: ignore[index]
                mixing = torch.diag((torch.arange(net[0].head_dim) < rank).float())  # type: ignore[index]
            for tensor in (layer.weight, layer.bias):
                rows = tensor.unflatten(0, (-1, net[0].head_dim))  # type: ignore[index]
                tensor.copy_(torch.einsum("ij,hj...->hi...", mixing, rows).flatten(0, 1))


def sliced(net: object, x: object, options: str = "keep=0.5") -> tdpass.Artifact[nn.Module]:
    return tdpass.compress(net, data=x, pipeline=f"slice-heads{{{options}}},verify", strict=False, **QUIET)  # type: ignore[arg-type]


WAYS = [{}, {"fused": True}, {"kv": 2, "fused": True}, {"kv": 1, "fused": True}]


@pytest.mark.parametrize("options", WAYS)
def test_channels_that_heads_do_not_use_go_without_loss(options: dict[str, object], tmp_path: Path) -> None:
    net, x = attention(**options)
    low_rank(net, 2)
    artifact = sliced(net, x)
    assert "queries, keys and values of 1" in notes(artifact)
    small, kv = artifact.model[0], int(options.get("kv", HEADS))  # type: ignore[index,call-overload]
    assert [tuple(layer.weight.shape) for layer in (small.q, small.k, small.v, small.o)] == [  # type: ignore[union-attr]
        (2 * HEADS, WIDTH), (2 * kv, WIDTH), (2 * kv, WIDTH), (WIDTH, 2 * HEADS),
    ]  # fmt: skip
    torch.testing.assert_close(answer(artifact.model, x), answer(net, x), rtol=1e-3, atol=1e-4)
    assert artifact.report.final.macs < artifact.report.original.macs
    artifact.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", copy.deepcopy(net))
    assert torch.equal(answer(loaded, x), answer(artifact.model, x))
    with pytest.raises(PlanError, match="load it on the class it was made from"):
        tdpass.load(
            tmp_path / "small.safetensors", nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
        )


@pytest.mark.parametrize("keep", [0.75, 0.25])
def test_mixtures_lose_less_than_as_many_channels_that_were_there(keep: float) -> None:
    net, x = attention()
    count = round(keep * net[0].head_dim)  # type: ignore[index,operator]
    cut = copy.deepcopy(net)
    with torch.no_grad():
        for layer in (cut[0].k, cut[0].v):  # type: ignore[index,union-attr]
            for tensor in (layer.weight, layer.bias):  # type: ignore[union-attr]
                tensor.unflatten(0, (HEADS, -1))[:, count:] = 0  # type: ignore[operator,union-attr]
    artifact = sliced(net, x, f"keep={keep}")
    assert artifact.model[0].head_dim == count  # type: ignore[index]
    lost = [(answer(model, x) - answer(net, x)).norm() for model in (artifact.model, cut)]
    assert lost[0] < 0.9 * lost[1]


def test_a_budget_is_met_with_the_widest_heads_that_do() -> None:
    net, x = attention()
    artifact = sliced(net, x, "params=0.7")
    assert artifact.report.final.params <= 0.7 * artifact.report.original.params
    wider = sliced(net, x, f"keep={(artifact.model[0].head_dim + 1) / net[0].head_dim}")  # type: ignore[index,operator]
    assert wider.report.final.params > 0.7 * artifact.report.original.params
    with pytest.raises(BudgetError, match="cannot be met by slicing heads; the smallest that can is"):
        sliced(net, x, "params=0.01")
    with pytest.raises(UsageError, match="no share"):
        sliced(net, x, "keep=0.0")


def test_queries_and_keys_that_are_turned_keep_their_channels_and_say_why() -> None:
    net, x = attention(turned=True)
    artifact = sliced(net, x)
    assert "goes through mul, where channels differ" in artifact.report.declined["0.q"]
    assert "values do not run in narrower heads" in notes(artifact)  # one attribute is the width of all three
    assert torch.equal(answer(artifact.model, x), answer(net, x))


def test_a_module_that_writes_the_width_of_its_heads_keeps_it_and_says_why() -> None:
    net, x = vision()
    artifact = sliced(net, x)
    assert "do not run in narrower heads" in notes(artifact)
    assert "pass example_inputs" not in notes(artifact)
    assert torch.equal(answer(artifact.model, x), answer(net, x))
    plain, rows = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3)),
        torch.randn(8, WIDTH),
    )
    assert "no attention was found" in notes(sliced(plain, rows))


@pytest.mark.parametrize("make", [encoder, pytest.param(bert, marks=pytest.mark.slow)])
def test_modules_of_libraries_are_sliced_and_planned(make: object, tmp_path: Path) -> None:
    net, x = make()  # type: ignore[operator]
    artifact = sliced(net, x, "keep=0.75")
    assert "queries, keys and values of 2 attentions keep 0.75 of the 8 channels" in notes(artifact)
    assert float((answer(artifact.model, x) - answer(net, x)).abs().max()) < 0.05
    artifact.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", copy.deepcopy(net))
    assert torch.equal(answer(loaded, x), answer(artifact.model, x))


def test_what_is_left_is_planned_and_factored() -> None:
    net, x = attention()
    steps = "slice-residual{keep=0.75},slice-heads{keep=0.75},plan,factorize,refit,verify"
    artifact = tdpass.compress(
        net, {"params": 0.6}, x, pipeline=steps, formats=["svd"], strict=False, **QUIET
    )  # type: ignore[arg-type]
    assert artifact.report.final.params <= 0.6 * artifact.report.original.params
    assert any(choice.format == "svd" for choice in artifact.plan)


def run(model: onnx.ModelProto, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("turned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_models_are_sliced_to_the_same_answers(turned: bool, tmp_path: Path) -> None:
    net, x = attention(turned=turned)
    low_rank(net, 2)
    artifact = sliced(to_onnx(net, x), x)
    assert "queries, keys and values of 1" in notes(artifact)  # a constant of the graph is what turns them
    torch.testing.assert_close(run(artifact.model, x), answer(net, x), rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
    fewer = 2 * WIDTH * WIDTH + 3 * WIDTH // 2  # half the rows and biases of q, k, v, half the columns of o
    assert artifact.report.final.params == artifact.report.original.params - fewer
    artifact.save(tmp_path / "small.onnx")
    torch.testing.assert_close(run(onnx.load(tmp_path / "small.onnx"), x), run(artifact.model, x))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, encoder, llama])
def test_exports_of_library_modules_are_sliced(make: object) -> None:
    net, x = make()  # type: ignore[operator]
    few = {key: value[:2] for key, value in x.items()} if isinstance(x, dict) else None
    if few is None:
        exported = to_onnx(net, x)
    else:
        shapes = {key: {0: torch.export.Dim("batch")} for key in few}
        program = torch.onnx.export(net, (), kwargs=few, dynamo=True, verbose=False, dynamic_shapes=shapes)
        assert program is not None
        exported = program.model_proto
    data = next(iter(x.values())) if isinstance(x, dict) else x
    artifact = sliced(exported, data.numpy(), "keep=0.75")
    assert "of 2 attentions keep 0.75 of the 8 channels" in notes(artifact)
    assert float((run(artifact.model, data) - answer(net, x)).abs().max()) < 0.05  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "encoder", "vision"])
def test_bonds_name_the_layers_that_meet(name: str) -> None:
    net, x = NETS[name]()
    batch = Batch((), x) if isinstance(x, dict) else Batch((x,), {})  # type: ignore[arg-type]
    bonds = find_bonds(open_model(net, batch).record(batch.part(0, 2))).found
    assert [bond.scores for bond in bonds] == [True, False] * 2
    assert all(bond.width == WIDTH // 2 and bond.right.reads is not bond.scores for bond in bonds)
    assert all(len(bond.groups) == 2 and not bonds[0].right.reads for bond in bonds)
