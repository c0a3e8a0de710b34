"""Heads whose queries and keys a rotary embedding turns: whole heads go, values alone get narrower."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn
from torch.nn import functional as F

import tdpass
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.heads import find_bonds

HEADS, KEPT, WIDTH, POSITIONS = 4, (0, 2, 3), 16, 5
QUIET = {"progress": False, "cache": False}


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def _complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(3)


def _half_of_the_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    kept, turned = x.chunk(2, -1)
    return torch.cat([kept, _halves(turned, cos[..., :1], sin[..., :1])], -1)


def _normed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _halves(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), cos, sin)


ROTARY = {each.__name__: each for each in (_halves, _pairs, _complex, _half_of_the_channels, _normed)}


class Rotary(nn.Module):
    """Attention with rotary queries and keys, `kv` heads of these; `apart`: values have a width of their own."""

    def __init__(self, kv: int = HEADS, turn: str = "_halves", *, apart: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, kv, WIDTH // HEADS
        self.turn, self.apart = ROTARY[turn], apart
        if apart:
            self.v_head_dim = self.head_dim
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv * self.head_dim) for _ in range(2))
        angles = torch.outer(torch.arange(POSITIONS) * 1.0, torch.tensor([1.0, 0.3]))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1])
        q = self.q(x).view(*shape, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(*shape, self.num_kv_heads, self.head_dim).transpose(1, 2)
        width = self.v_head_dim if self.apart else self.head_dim
        v = self.v(x).view(*shape, self.num_kv_heads, width).transpose(1, 2)
        q, k = (self.turn(y, self.cos, self.sin) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.num_heads != self.num_kv_heads)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def planted(made: Rotary, idle: tuple[int, ...] = ()) -> tuple[nn.Sequential, Tensor]:
    """Layers of full rank, of which the last reads the heads that are `idle` with zeros."""
    torch.manual_seed(0)
    net = nn.Sequential(made, nn.GELU(), nn.Linear(WIDTH, WIDTH)).eval()
    for layer in (made.q, made.k, made.v, made.o, net[2]):
        nn.init.orthogonal_(layer.weight, gain=2.0)
    with torch.no_grad():
        for head in idle:
            made.o.weight[:, 4 * head : 4 * head + 4] = 0
    return net, torch.randn(32, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1))


def run(model: object, x: Tensor) -> Tensor:
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]
    session = onnxruntime.InferenceSession(model.SerializeToString())  # type: ignore[attr-defined]
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("turn", ROTARY)
def test_pairs_that_are_turned_together_stay_in_their_heads(turn: str) -> None:
    net, x = planted(Rotary(turn=turn))
    bonds = find_bonds(open_model(net, Batch((x,), {})).record(Batch((x[:2],), {})))
    ((scores, values),) = bonds.attentions
    assert (scores.left.site, scores.right.site, scores.width) == ("0.q", "0.k", WIDTH // HEADS)
    assert scores.left.starts == scores.right.starts == tuple(range(0, WIDTH, WIDTH // HEADS))
    assert scores.turned
    assert bonds.found == (values,)


@pytest.mark.parametrize(
    ("kind", "kv", "idle", "kept", "budget"),
    [
        ("torch", 2, (2, 3), (0,), 0.66),
        pytest.param("onnx", 2, (2, 3), (0,), 0.66, marks=pytest.mark.slow),
        pytest.param("torch", HEADS, (1,), KEPT, 0.82, marks=pytest.mark.slow),
        pytest.param("onnx", HEADS, (1,), KEPT, 0.82, marks=pytest.mark.slow),
    ],
)
def test_turned_heads_that_add_nothing_are_dropped(
    kind: str, kv: int, idle: tuple[int, ...], kept: tuple[int, ...], budget: float, tmp_path: Path
) -> None:
    net, x = planted(Rotary(kv), idle)
    model = net if kind == "torch" else to_onnx(net, x)
    artifact = tdpass.compress(model, {"params": budget}, x, **QUIET)  # type: ignore[type-var]
    joint = {(choice.joint, choice.channels) for choice in artifact.plan if choice.joint}
    assert joint == {("drop-heads", kept)}
    torch.testing.assert_close(run(artifact.model, x), run(net, x), rtol=1e-3, atol=1e-3)
    path = tmp_path / ("small.safetensors" if kind == "torch" else "small.onnx")
    artifact.save(path)
    loaded = tdpass.load(path, planted(Rotary(kv))[0]) if kind == "torch" else onnx.load(path)
    torch.testing.assert_close(run(loaded, x), run(artifact.model, x))


@pytest.mark.slow
def test_turned_heads_that_all_share_one_key_stay() -> None:
    net, x = planted(Rotary(1), (0, 1))
    plan = tdpass.make_plan(net, {"params": 0.8}, x, **QUIET).plan
    assert "drop-heads" not in {choice.joint for choice in plan}


@pytest.mark.parametrize("kind", [pytest.param("torch", marks=pytest.mark.slow), "onnx"])
def test_values_of_turned_heads_are_narrower_alone(kind: str) -> None:
    net, x = planted(Rotary(apart=True))
    with torch.no_grad():
        mixing = torch.randn(HEADS, 4, 2) @ torch.randn(HEADS, 2, 4)
        for tensor in (net[0].v.weight, net[0].v.bias):  # type: ignore[union-attr]
            rows = tensor.unflatten(0, (HEADS, 4))  # type: ignore[operator]
            tensor.copy_(torch.einsum("hij,hj...->hi...", mixing, rows).flatten(0, 1))  # type: ignore[operator]
    model = net if kind == "torch" else to_onnx(net, x)
    artifact = tdpass.compress(model, {"params": 0.83}, x, **QUIET)  # type: ignore[type-var]
    joint = [(choice.site[-1], str(choice.form), choice.joint) for choice in artifact.plan if choice.joint]
    assert sorted(joint) == [("o", "dense in 8", "narrow-heads"), ("v", "dense out 8", "narrow-heads")]
    torch.testing.assert_close(run(artifact.model, x), run(net, x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_language_models_lose_heads_that_add_nothing(name: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, vocab_size=40, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    net = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                nn.init.orthogonal_(parameter)
        net.model.layers[0].self_attn.o_proj.weight[:, 16:] = 0
    x = {"input_ids": torch.randint(0, 40, (16, 7))}
    artifact = tdpass.compress(net, {"params": 0.87}, x, **QUIET)
    assert {choice.joint for choice in artifact.plan if choice.joint} == {"drop-heads"}
    with torch.no_grad():
        torch.testing.assert_close(artifact.model(**x).logits, net(**x).logits, rtol=1e-3, atol=1e-3)
