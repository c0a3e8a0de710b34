"""drop-heads and narrow-heads: joint changes that the planner weighs, on planted attentions."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn
from torch.nn import functional as F

import tdpass

HEADS, KEPT, WIDTH = 4, (0, 2, 3), 16
QUIET = {"progress": False, "cache": False}


class Attention(nn.Module):
    """Separate layers for queries, keys and values, `kv` heads of these; views by attributes."""

    def __init__(self, kv: int = HEADS) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, kv, WIDTH // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv * self.head_dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        samples, positions, _ = x.shape
        q = self.q(x).view(samples, positions, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (
            layer(x).view(samples, positions, self.num_kv_heads, self.head_dim).transpose(1, 2)
            for layer in (self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.num_heads != self.num_kv_heads)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Fixed(Attention):
    """The same with the number of its heads written into the code."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], HEADS, 4).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(y)  # type: ignore[no-any-return]


def planted(made: nn.Module, *, idle: bool = True) -> tuple[nn.Module, Tensor]:
    """An attention of full rank everywhere, the heads that are not `KEPT` read with zeros where `idle`."""
    torch.manual_seed(0)
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=2.0)
    net = nn.Sequential(made, nn.Linear(WIDTH, 5)).eval()
    with torch.no_grad():
        for head in set(range(HEADS)) - set(KEPT) if idle else ():
            made.o.weight[:, 4 * head : 4 * head + 4] = 0  # type: ignore[union-attr,operator]
    return net, torch.randn(32, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def run(model: object, x: Tensor) -> Tensor:
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]
    session = onnxruntime.InferenceSession(model.SerializeToString())  # type: ignore[attr-defined]
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_head_that_adds_nothing_is_dropped(kind: str, tmp_path: Path) -> None:
    net, x = planted(Attention())
    model = net if kind == "torch" else to_onnx(net, x)
    artifact = tdpass.compress(model, {"params": 0.8}, x, **QUIET)  # type: ignore[type-var]
    joint = {choice.site: (str(choice.form), choice.channels) for choice in artifact.plan if choice.joint}
    assert sorted(joint.values()) == sorted([*[("dense out 12", KEPT)] * 3, ("dense in 12", KEPT)])
    assert {choice.joint for choice in artifact.plan if choice.joint} == {"drop-heads"}
    assert artifact.report.final.params == artifact.report.original.params - 4 * (4 * WIDTH) - 3 * 4
    torch.testing.assert_close(run(artifact.model, x), run(net, x), rtol=1e-3, atol=1e-3)
    path = tmp_path / ("small.safetensors" if kind == "torch" else "small.onnx")
    artifact.save(path)
    if kind == "torch":
        loaded = tdpass.load(path, planted(Attention())[0])
        assert loaded[0].num_heads == len(KEPT)  # type: ignore[index]
        torch.testing.assert_close(run(loaded, x), run(artifact.model, x))


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_where_all_heads_are_needed_they_stay(kind: str) -> None:
    net, x = planted(Attention(), idle=False)
    model = net if kind == "torch" else to_onnx(net, x)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(net[0].q.weight)  # type: ignore[union-attr]
        for layer in (net[0].q, net[0].k):  # type: ignore[union-attr]
            layer.weight.copy_(u[:, :4] @ v[:4])  # type: ignore[union-attr,operator]
    model = net if kind == "torch" else to_onnx(net, x)
    plan = tdpass.make_plan(model, {"params": 0.8}, x, **QUIET).plan  # type: ignore[arg-type]
    assert not [choice for choice in plan if choice.joint]
    assert {choice.format for choice in plan} == {"svd", "dense"}


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_channels_that_no_head_uses_are_left_out(kind: str, tmp_path: Path) -> None:
    net, x = planted(Attention(), idle=False)
    with torch.no_grad():
        for layer in (net[0].k, net[0].v):  # type: ignore[index,union-attr]
            mixing = torch.randn(HEADS, 4, 2) @ torch.randn(HEADS, 2, 4)
            for tensor in (layer.weight, layer.bias):  # type: ignore[union-attr]
                rows = tensor.unflatten(0, (HEADS, 4))  # type: ignore[operator]
                mixed = torch.einsum("hij,hj...->hi...", mixing, rows)
                tensor.copy_(mixed.flatten(0, 1))  # type: ignore[operator]
    model = net if kind == "torch" else to_onnx(net, x)
    artifact = tdpass.compress(model, {"params": 0.6}, x, **QUIET)  # type: ignore[type-var]
    assert {choice.joint for choice in artifact.plan if choice.joint} == {"narrow-heads"}
    forms = [str(choice.form) for choice in artifact.plan if choice.joint]
    assert sorted(forms) == ["dense in 8", *["dense out 8"] * 3]
    torch.testing.assert_close(run(artifact.model, x), run(net, x), rtol=1e-3, atol=1e-3)


def test_heads_that_share_keys_go_together() -> None:
    net, x = planted(Attention(kv=2), idle=False)
    with torch.no_grad():
        net[0].o.weight[:, 8:] = 0  # type: ignore[index,union-attr]
    artifact = tdpass.compress(net, {"params": 0.6}, x, **QUIET)
    assert (artifact.model[0].num_heads, artifact.model[0].num_kv_heads) == (2, 1)  # type: ignore[index]
    torch.testing.assert_close(run(artifact.model, x), run(net, x), rtol=1e-3, atol=1e-3)


def test_a_plan_made_on_one_side_is_carried_out_on_the_other() -> None:
    net, x = planted(Attention())
    plan = tdpass.make_plan(net, {"params": 0.8}, x, **QUIET).plan
    artifact = tdpass.compress(to_onnx(net, x), plan=plan, data=x, **QUIET)
    torch.testing.assert_close(run(artifact.model, x), run(net, x), rtol=1e-3, atol=1e-3)


class Keeping(Attention):
    """The same, which returns its keys, as those do that go on from a cache."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.k(x).view(*x.shape[:2], self.num_kv_heads, self.head_dim)


class Wrapped(Attention):
    """The same, whose answer holds an object that a recording cannot look into."""

    def forward(self, x: Tensor) -> tuple[Tensor, object]:  # type: ignore[override]
        return super().forward(x), object()


def said(model: nn.Module, x: Tensor) -> str:
    made = tdpass.make_plan(model, {"params": 0.8}, x, **QUIET)
    assert not [choice for choice in made.plan if choice.joint]
    return "\n".join([*made.report.notes, *(note for row in made.report.passes for note in row.notes)])


def test_heads_whose_number_is_written_into_the_code_are_not_offered() -> None:
    assert "0.o: its heads stay as they are: with others the model does not run" in said(*planted(Fixed()))


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_why_heads_stay_whose_keys_are_returned_is_said(kind: str) -> None:
    net, x = planted(Keeping())
    model = net[0] if kind == "torch" else to_onnx(net[0], x)
    assert re.search(r"\bk\b.*: its heads stay as they are: the model returns it", said(model, x))


def test_why_heads_stay_where_the_answer_cannot_be_looked_into_is_said() -> None:
    net, x = planted(Wrapped())
    text = said(net[0], x)
    assert re.search("the model returns a object.*use_cache=False.*changes of heads.* left out", text)


def test_nothing_is_said_of_heads_that_are_offered() -> None:
    net, x = planted(Attention())
    row = tdpass.make_plan(net, {"params": 0.8}, x, **QUIET).report.passes[0]
    assert "its heads stay" not in " ".join(row.notes)
