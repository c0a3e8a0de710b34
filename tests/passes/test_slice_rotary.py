"""slice-heads: queries and keys that a rotary embedding turns lose pairs of channels, with their angles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn
from torch.nn import functional as F

import tdpass
from tdpass.planner.heads.selection import Selection, fitting

QUIET = {"progress": False, "cache": False, "strict": False}
HEADS, HEAD, WIDTH, POSITIONS = 4, 8, 32, 6
PAIRS = HEAD // 2


def _halves(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (torch.cat([each, each], -1) for each in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin


def _pairs(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (each.repeat_interleave(2, -1) for each in (angles.cos(), angles.sin()))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


TURNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"halves": _halves, "pairs": _pairs}


def channels(turn: str, pairs: Sequence[int], turned: int = HEAD) -> list[int]:
    """Where pairs lie in a head."""
    if turn == "pairs":
        return [2 * pair + at for pair in pairs for at in (0, 1)]
    return [pair + at for at in (0, turned // 2) for pair in pairs]


class Angles(nn.Module):
    """As in Hugging Face's language models: from frequencies that no file holds."""

    def __init__(self, pairs: int = PAIRS) -> None:
        super().__init__()
        frequencies = 2.0 ** -torch.arange(float(pairs))
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.outer(torch.arange(x.shape[1]).float(), self.inv_freq.float())


class Table(nn.Module):
    """Of as many positions as there are."""

    def __init__(self, pairs: int = PAIRS) -> None:
        super().__init__()
        self.register_buffer("angles", Angles(pairs)(torch.empty(1, 2 * POSITIONS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.angles[: x.shape[1]]  # type: ignore[index]


class Attention(nn.Module):
    def __init__(self, turn: str, kv: int = HEADS, rotary_dim: int = HEAD) -> None:
        super().__init__()
        self.head_dim, self.kv, self.rotary_dim, self.turn = HEAD, kv, rotary_dim, TURNS[turn]
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv * HEAD) for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k = (self._turned(each, angles) for each in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv != HEADS)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _turned(self, x: Tensor, angles: Tensor) -> Tensor:
        if self.rotary_dim == self.head_dim:
            return self.turn(x, angles)
        return torch.cat([self.turn(x[..., : self.rotary_dim], angles), x[..., self.rotary_dim :]], -1)


class Net(nn.Module):
    """Attentions one after the other; those that share angles have one module for them."""

    def __init__(
        self,
        turn: str,
        angles: Callable[[int], nn.Module],
        *,
        layers: int = 1,
        shared: bool = True,
        **options: int,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = angles(options.get("rotary_dim", HEAD) // 2)
        self.angles = nn.ModuleList(made if shared else copy.deepcopy(made) for _ in range(layers))
        self.layers = nn.ModuleList(Attention(turn, **options) for _ in range(layers))
        self.out = nn.Linear(WIDTH, 5)
        for layer in self.layers.modules():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=2.0)

    def forward(self, x: Tensor) -> Tensor:
        for angles, layer in zip(self.angles, self.layers, strict=True):
            x = layer(x, angles(x))
        return self.out(x)  # type: ignore[no-any-return]


def idle(net: Net, layer: int, left: Sequence[int], scale: float = 0.0) -> None:
    """Let keys hold nothing, or little, but in these channels of a head, and values only in as many."""
    attention: Any = net.layers[layer]
    little = torch.full((HEAD,), scale).index_fill(0, torch.tensor(left), 1.0)
    mixing = torch.randn(HEAD, len(left)) @ torch.randn(len(left), HEAD) / HEAD**0.5
    with torch.no_grad():
        for key in (attention.k.weight, attention.k.bias):
            key.unflatten(0, (-1, HEAD)).mul_(little.view(-1, *[1] * (key.dim() - 1)))
        for value in (attention.v.weight, attention.v.bias):
            value.copy_(torch.einsum("ij,hj...->hi...", mixing, value.unflatten(0, (-1, HEAD))).flatten(0, 1))


def data() -> Tensor:
    return torch.randn(24, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1))


def answer(model: object, x: Tensor) -> Tensor:
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return model.eval()(x)  # type: ignore[no-any-return]
    session = onnxruntime.InferenceSession(model.SerializeToString())  # type: ignore[attr-defined]
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def sliced(model: object, options: str = "keep=0.5") -> tdpass.Artifact[Any]:
    return tdpass.compress(model, data=data(), pipeline=f"slice-heads{{{options}}}", **QUIET)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("turn", "angles", "kv"),
    [*product(TURNS, (Angles, Table), (HEADS,)), ("halves", Angles, 2), ("pairs", Table, 2)],
)
def test_pairs_that_add_nothing_go_with_their_angles(
    turn: str, angles: type[nn.Module], kv: int, tmp_path: Path
) -> None:
    net = Net(turn, angles, kv=kv)
    idle(net, 0, channels(turn, (1, 2)))
    artifact = sliced(net)
    small: Any = artifact.model
    assert small.layers[0].head_dim == small.layers[0].rotary_dim == 4
    for name in ("q", "k"):
        kept = getattr(net.layers[0], name).bias.unflatten(0, (-1, HEAD))[:, sorted(channels(turn, (1, 2)))]
        scale = 2**-0.5 if name == "q" else 1.0  # the model's own follows the width
        torch.testing.assert_close(getattr(small.layers[0], name).bias, scale * kept.flatten())
    whole, left = (next(model.angles[0].buffers()) for model in (net, small))
    assert torch.equal(left, whole[..., 1:3])
    torch.testing.assert_close(answer(small, data()), answer(net, data()), rtol=1e-3, atol=1e-4)
    longer = torch.randn(2, 2 * POSITIONS, WIDTH)
    torch.testing.assert_close(answer(small, longer), answer(net, longer), rtol=1e-3, atol=1e-4)
    artifact.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", Net(turn, angles, kv=kv))
    assert torch.equal(answer(loaded, data()), answer(small, data()))


@pytest.mark.parametrize(
    ("turn", "rotary_dim"),
    [
        ("halves", HEAD),
        *(pytest.param(turn, 4, marks=pytest.mark.slow) for turn in TURNS),
        pytest.param("pairs", HEAD, marks=pytest.mark.slow),
    ],
)
def test_so_they_do_in_onnx_graphs(turn: str, rotary_dim: int) -> None:
    net = Net(turn, Angles, kv=2, rotary_dim=rotary_dim)
    left = channels(turn, (1, 2)) if rotary_dim == HEAD else [*channels(turn, (1,), rotary_dim), 4, 7]
    idle(net, 0, left)
    artifact = sliced(to_onnx(net.eval(), data()))
    assert "queries, keys and values of 1 attentions keep 0.5" in artifact.report.passes[0].notes[0]
    assert artifact.report.final.macs < artifact.report.original.macs
    torch.testing.assert_close(answer(artifact.model, data()), answer(net, data()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("turn", TURNS)
def test_channels_that_are_not_turned_are_chosen_beside_pairs(turn: str) -> None:
    net = Net(turn, Angles, rotary_dim=4)
    idle(net, 0, [*channels(turn, (1,), 4), 4, 7])
    small: Any = sliced(net).model
    assert (small.layers[0].head_dim, small.layers[0].rotary_dim) == (4, 2)
    assert torch.equal(small.angles[0].inv_freq, net.angles[0].inv_freq[1:])  # type: ignore[index]
    torch.testing.assert_close(answer(small, data()), answer(net, data()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_layers_that_share_angles_share_the_choice(shared: bool) -> None:
    net = Net("halves", Angles, layers=2, shared=shared)
    for layer, pairs in enumerate(((0, 1), (1, 2))):
        idle(net, layer, channels("halves", pairs), scale=0.3)
    small: Any = sliced(net, "keep=0.25").model if shared else sliced(net).model
    whole = net.angles[0].inv_freq
    found = [angles.inv_freq.tolist() for angles in small.angles]
    assert found == ([whole[[1]].tolist()] * 2 if shared else [whole[:2].tolist(), whole[1:3].tolist()])  # type: ignore[index]


def test_an_odd_number_of_channels_is_rounded_to_whole_pairs() -> None:
    small: Any = sliced(Net("pairs", Angles), "keep=0.6").model
    assert small.layers[0].head_dim == 4
    assert [layer.weight.shape[0] for layer in (small.layers[0].q, small.layers[0].v)] == [4 * HEADS] * 2


class Normed(Attention):
    """Every head is normed before it is turned, so that no channel stays apart."""

    def _turned(self, x: Tensor, angles: Tensor) -> Tensor:
        return super()._turned(F.normalize(x, dim=-1), angles)


class Given(Net):
    """Angles are an input of the model."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:  # type: ignore[override]
        return self.out(self.layers[0](x, angles))  # type: ignore[no-any-return]


def test_what_cannot_lose_pairs_stays_and_says_why() -> None:
    normed = Net("halves", Angles)
    normed.layers[0].__class__ = Normed
    dynamic = Net("halves", Angles)
    dynamic.angles[0].rope_type = "dynamic"  # type: ignore[assignment]
    reasons = (
        (normed, "where channels differ"),
        (dynamic, "its table anew for longer inputs"),
        (Net("halves", Angles, kv=1), "where channels differ"),  # all channels of the layer are one head
    )
    for net, reason in reasons:
        artifact = sliced(net)
        assert reason in artifact.report.declined["layers.0.q"]
        assert torch.equal(answer(artifact.model, data()), answer(net, data()))
    given, angles = Given("halves", Angles), Angles()(data()).expand(24, 1, POSITIONS, PAIRS)
    artifact = tdpass.compress(given, data=(data(), angles), pipeline="slice-heads", **QUIET)  # type: ignore[arg-type]
    assert "where channels differ" in artifact.report.declined["layers.0.q"]


def test_the_sets_of_most_energy_of_that_many_channels_stay() -> None:
    generator = torch.Generator().manual_seed(3)
    for sets in (((0, 2), (1, 3), (4,), (5,), (6,)), ((0, 3), (1, 4), (2, 5)), ((0, 1, 2), (3,), (4, 5))):
        energies = tuple(torch.rand(len(sets), generator=generator).tolist())
        chosen = Selection(sets, energies)
        every = [each for size in range(1, len(sets) + 1) for each in combinations(range(len(sets)), size)]
        sizes = {each: sum(len(sets[place]) for place in each) for each in every}
        for count in range(1, sum(map(len, sets)) + 1):
            fits = fitting(count, [sets])
            assert fits == max(
                (size for size in sizes.values() if size <= count), default=min(sizes.values())
            )
            best = max(
                (each for each in every if sizes[each] == fits),
                key=lambda each: sum(energies[p] for p in each),
            )
            assert chosen.places(fits) == best
            assert len(chosen.channels(fits)) == fits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Phi", "Cohere"])
def test_language_models_lose_pairs(name: str, tmp_path: Path) -> None:
    import transformers

    def made() -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=32, vocab_size=40, use_cache=False, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()  # type: ignore[no-any-return]

    net, x = made(), {"input_ids": torch.randint(0, 40, (8, 7))}
    artifact: Any = tdpass.compress(net, data=x, pipeline="slice-heads{keep=0.5}", **QUIET)
    assert not artifact.report.declined
    layer = artifact.model.model.layers[0].self_attn
    assert (layer.head_dim, layer.q_proj.out_features, layer.k_proj.out_features) == (4, 16, 8)
    artifact.save(tmp_path / "small.safetensors")
    loaded: Any = tdpass.load(tmp_path / "small.safetensors", made())
    with torch.no_grad():
        assert torch.equal(loaded(**x).logits, artifact.model(**x).logits)
