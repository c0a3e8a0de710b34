"""Query, key and value as layers of their own, against torch's attention.

Also through `compress`, files and exports.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn

import tdpass
from tdpass.errors import UnsupportedError, UsageError
from tdpass.form import Form
from tdpass.formats.base import FORMATS, offered_formats
from tdpass.formats.layer import Layer
from tdpass.layers.attention import OpenAttention
from tdpass.models import Factorized, Model, open_attention, open_model
from tdpass.models.base import Batch
from tdpass.site import Site

E = 16
PROJECTIONS = ("query", "key", "value", "out_proj")
FORMS = [
    name
    for name in offered_formats()
    if FORMATS.get(name).fits(Site("", "linear", (8, 8))) and FORMATS.get(name).exact_at_full_rank
]
WAYS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "of each head": {"average_attn_weights": False},
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False},
    "added": {"attn_mask": torch.linspace(-1, 1, 25).reshape(5, 5)},
    "of every head": {
        "attn_mask": torch.linspace(-1, 1, 3 * 4 * 25).reshape(12, 5, 5),
        "need_weights": False,
    },
    "padded": {
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    },
    "padded by numbers": {
        "key_padding_mask": torch.tensor([[0.0] * 5, [0.0] * 3 + [-9.0] * 2, [0.5] * 5]),
        "need_weights": False,
    },
}


def attention(**how: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(E, 4, **how).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def encoder(**how: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 4, 24, batch_first=True, **how)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not how.get("norm_first", False)).eval()


class Packed(nn.Module):
    """A head over attention whose three projections are one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(E, 3 * E), nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))


def full_rank(model: Model, name: str = "svd") -> Model:
    for site in model.sites():
        fmt = FORMATS.get(name)
        rank = fmt.ranks(site)[-1]
        factors = fmt.factorize(model.weight(site.name), site, rank)
        model.replace(
            site.name, Layer(site, Form(name, rank), factors, model.bias(site.name)).to(torch.float32)
        )
    return model


def same(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "how",
    [{"batch_first": True}, {}, {"batch_first": True, "bias": False}],
    ids=["batch first", "positions first", "no bias"],
)
def test_it_answers_as_torch_does(how: dict[str, Any], way: str) -> None:
    dense = attention(**how)
    opened = open_attention(dense)
    assert isinstance(opened, OpenAttention)
    assert {name for name, _ in opened.named_children()} == set(PROJECTIONS)
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in dense.parameters())
    x, y, z = torch.randn(3, 3, 5, E).transpose(1, 1 if how.get("batch_first") else 2)
    with torch.no_grad():
        for ours, theirs in zip(opened(x, y, z, **WAYS[way]), dense(x, y, z, **WAYS[way]), strict=True):
            same(ours, theirs)


def test_a_single_sample_and_keys_of_another_width_answer_as_torch_does() -> None:
    dense = attention(kdim=6, vdim=9, batch_first=True)
    opened, given = open_attention(dense), (torch.randn(5, E), torch.randn(7, 6), torch.randn(7, 9))
    with torch.no_grad():
        for ours, theirs in zip(opened(*given), dense(*given), strict=True):
            same(ours, theirs)


def test_gradients_are_those_of_the_slices() -> None:
    dense = attention(batch_first=True)
    opened, x = open_attention(dense), torch.randn(2, 5, E)
    for module in (dense, opened):
        module(x, x, x)[0].square().sum().backward()
    assert dense.in_proj_weight.grad is not None
    for name, part in zip(PROJECTIONS, dense.in_proj_weight.grad.chunk(3), strict=False):
        same(getattr(opened, name).weight.grad, part)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the path of the dense encoder
@pytest.mark.parametrize("how", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
def test_encoders_answer_as_before_and_every_projection_is_a_site(how: dict[str, Any]) -> None:
    dense = encoder(**how)
    before = copy.deepcopy(dense.state_dict())
    opened, x = open_attention(dense), torch.randn(3, 5, E)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad():
        same(opened(x), dense(x))
        kept = ~padding
        same(opened(x, src_key_padding_mask=padding)[kept], dense(x, src_key_padding_mask=padding)[kept])
    model = open_model(opened, Batch((x,)))
    assert {f"layers.{k}.self_attn.{name}" for k in (0, 1) for name in PROJECTIONS} < {
        site.name for site in model.sites()
    }
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert "pass 'divide'" in open_model(dense, Batch((x,))).declined()["layers.0.self_attn"]


@pytest.mark.parametrize("name", FORMS)
def test_full_rank_changes_nothing(name: str) -> None:
    dense, x = encoder(), torch.randn(3, 5, E)
    model = full_rank(open_model(open_attention(dense), Batch((x,))), name)
    assert {site.name for site in model.sites()} >= {"layers.1.self_attn.key"}
    with torch.no_grad():
        answer = model.run(Batch((x,)))
        assert isinstance(answer, Tensor)
        same(answer, dense(x))


def test_a_budget_is_kept_the_file_loads_and_the_export_answers_alike(tmp_path: Path) -> None:
    x = torch.randn(24, 5, E)
    module = open_attention(encoder())
    for name, parameter in module.named_parameters():
        if name.endswith(("query.weight", "key.weight")):  # of low rank, as trained ones are
            u, s, v = torch.linalg.svd(parameter.detach())
            parameter.data = (u * s * 0.3 ** torch.arange(E)) @ v
    opened = open_model(module, Batch((x,)))
    artifact = tdpass.compress(module, {"macs": 0.8}, x, divergence="mse", effort="fast", cache=False)
    assert isinstance(artifact.model, nn.Module)
    assert artifact.report.final.macs <= 0.8 * artifact.report.original.macs == 0.8 * opened.macs()
    changed = [choice.site for choice in artifact.plan if not choice.kept_dense]
    assert any(name.endswith(("query", "key")) for name in changed)
    assert not any(choice.site.endswith("in_proj") for choice in artifact.plan)
    artifact.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", open_attention(encoder()))
    assert any(isinstance(part, Factorized) for part in loaded.modules())
    with torch.no_grad():
        same(loaded(x), artifact.model(x))
        program = torch.export.export(artifact.model, (x,))
        same(program.module()(x), artifact.model(x))


@pytest.mark.parametrize(
    "make",
    [lambda: open_attention(encoder()), lambda: open_attention(Packed().eval(), fused=["qkv"])],
    ids=["encoder", "packed"],
)
def test_an_onnx_export_has_a_site_for_each_and_answers_alike(make: Callable[[], nn.Module]) -> None:
    module, x = make(), torch.randn(4, 5, E)
    model = full_rank(open_model(to_onnx(module, x)))
    shapes = [site.shape for site in model.sites()]
    assert shapes.count((E, E)) >= 3
    assert (3 * E, E) not in shapes
    proto = io.BytesIO()
    built = model.unwrap()
    assert isinstance(built, onnx.ModelProto)
    onnx.save(built, proto)
    session = onnxruntime.InferenceSession(proto.getvalue(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        same(torch.from_numpy(answer), module(x))


def test_a_linear_layer_of_three_projections_is_opened_when_asked() -> None:
    torch.manual_seed(0)
    dense, x = Packed().eval(), torch.randn(3, 5, E)
    opened = open_attention(dense, fused=["*kv"])
    assert {site.name for site in open_model(opened).sites()} == {"qkv.0", "qkv.1", "qkv.2", "head"}
    assert {site.name for site in open_model(open_attention(dense)).sites()} == {"qkv", "head"}
    assert open_model(opened, Batch((x,))).macs() == open_model(dense, Batch((x,))).macs()
    with torch.no_grad():
        same(opened(x), dense(x))
    with pytest.raises(UsageError, match=r"fused='k\*' fits no nn\.Linear"):
        open_attention(dense, fused=["qkv", "k*"])
    with pytest.raises(UsageError, match=r"open_attention takes an nn\.Module, not a dict"):
        open_attention({})  # type: ignore[arg-type]


def test_what_is_held_twice_stays_one_and_hooks_stay() -> None:
    twice, calls = attention(batch_first=True), list[str]()
    twice.register_forward_hook(lambda *_: calls.append("called"))
    opened = open_attention(nn.ModuleList([twice, twice]))
    assert opened[0] is opened[1]  # type: ignore[index]
    opened[0](*[torch.randn(1, 2, E)] * 3)  # type: ignore[index]
    assert calls == ["called"]


@pytest.mark.parametrize("how", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_with_keys_of_its_own_stays_and_says_why(how: dict[str, Any]) -> None:
    dense = attention(**how)
    assert type(open_attention(nn.Sequential(dense))[0]) is nn.MultiheadAttention  # type: ignore[index]
    assert "keys of its own" in open_model(nn.Sequential(dense)).declined()["0"]
    with pytest.raises(UnsupportedError, match="keys of its own"):
        OpenAttention(dense)
