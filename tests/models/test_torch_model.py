"""Torch models by module surgery."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.errors import InvalidModelError, PlanError
from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.models import Factorized, open_model
from tdpass.models.base import Batch, Model


def _full_rank(model: Model, name: str) -> Layer:
    """The site in a format of full rank, which changes nothing."""
    (site,) = (site for site in model.sites() if site.name == name)
    fmt = FORMATS.get("svd" if site.kind == "linear" else "channel_svd")
    rank = fmt.ranks(site)[-1]
    return Layer(
        site, Form(fmt.name, rank), fmt.factorize(model.weight(name), site, rank), model.bias(name)
    ).to(torch.float32)


@pytest.mark.parametrize("name", ["residual", "odd"])
def test_full_rank_replacement_changes_nothing(
    name: str, images: Tensor, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(name)
    with torch.no_grad():
        before = module(images)
    model = open_model(copy.deepcopy(module), Batch((images,)))
    for site in model.sites():
        model.replace(site.name, _full_rank(model, site.name))
    with torch.no_grad():
        assert torch.allclose(model.unwrap()(images), before, atol=1e-4 * float(before.abs().max()))


def test_layers_of_every_kind_are_sites(odd: nn.Module, images: Tensor) -> None:
    model = open_model(odd, Batch((images,)))
    assert [site.name for site in model.sites()] == [
        "circular",
        "same",
        "strided",
        "grouped",
        "reused",
        "transposed",
        "head",
    ]
    assert model.declined() == {}


class Patches(nn.Module):
    """As vision transformers begin: a token before the patches, and a place for each of them."""

    def __init__(self, *place: int) -> None:
        super().__init__()
        self.token, self.place = nn.Parameter(torch.ones(1, 1, 6)), nn.Parameter(torch.ones(place))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place)


@pytest.mark.parametrize(
    ("place", "said"), [((1, 1, 6), None), ((6,), None), ((1, 3, 6), "torch.export"), ((2, 3, 6), "several")]
)
def test_only_what_may_be_a_matrix_is_said_to_be_left_alone(place: tuple[int, ...], said: str | None) -> None:
    model = open_model(Patches(*place), Batch((torch.ones(2, 2, 6),)))
    assert [site.name for site in model.sites()] == ["head"]
    assert list(model.declined()) == ([""] if said else [])
    assert (said or "") in "".join(model.declined().values())


def test_attention_parametrized_custom_and_unused_layers_are_declined() -> None:
    class Custom(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.custom = Custom(8, 8)
            self.unused = nn.Linear(8, 8)
            self.memory = nn.GRU(8, 8, batch_first=True)
            self.used = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.custom(self.memory(self.normed(self.attention(x, x, x)[0]))[0]))

    model = open_model(Many().eval(), Batch((torch.randn(2, 3, 8),)))
    assert [site.name for site in model.sites()] == ["used"]
    reasons = model.declined()
    assert "tdpass.open_recurrent" in reasons["memory"]
    assert "attention" in reasons["attention.out_proj"]
    assert "parametrized" in reasons["normed"]
    assert "overrides forward" in reasons["custom"]
    assert "not called" in reasons["unused"]


def test_reused_modules_stay_one_and_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, t: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.embed(t))))

    module, tokens = Tied().eval(), torch.randint(0, 9, (4, 5))
    with torch.no_grad():
        before = module(tokens)
    model = open_model(module, Batch((tokens,)))
    found = [(site.name, len(site.extents), site.lookups) for site in model.sites()]
    assert found == [("head", 1, 5), ("a", 2, 0)]
    model.replace("a", _full_rank(model, "a"))
    assert isinstance(module.a, Factorized)
    assert isinstance(module.b, Factorized)
    assert module.a.u is module.b.u
    assert module.a.bias is not module.b.bias
    with torch.no_grad():
        assert torch.allclose(module(tokens), before, atol=1e-5)


def test_batch_norm_folds_exactly_and_only_where_it_may(residual: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        before = residual(images)
    model = open_model(residual, Batch((images,)))
    assert list(model.fold_batchnorm()) == ["stem"]
    assert list(model.fold_batchnorm()) == []
    with torch.no_grad():
        assert torch.allclose(residual(images), before, atol=1e-5 * float(before.abs().max()))


def test_the_result_trains_exports_compiles_and_copies(residual: nn.Module, images: Tensor) -> None:
    module = tdpass.compress(residual, {"macs": 0.5}, images, cache=False).model
    assert isinstance(module, nn.Module)
    with torch.no_grad():
        expected = module(images)
        assert torch.equal(copy.deepcopy(module)(images), expected)
        assert torch.allclose(
            torch.compile(module, backend="aot_eager", fullgraph=True)(images), expected, atol=1e-5
        )
        exported = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        assert torch.allclose(exported.module()(images[:7]), expected[:7], atol=1e-5)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    module(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(module(images), expected)


def test_transformer_layers_that_read_weights_still_work() -> None:
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    before = module(x)
    model = open_model(module, Batch((x,)))
    for name in ("linear1", "linear2"):
        model.replace(name, _full_rank(model, name))
    assert torch.allclose(module(x), before, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(module(x), before, atol=1e-4)


def test_a_layer_that_does_not_fit_is_refused(residual: nn.Module, encoder: nn.Module) -> None:
    model = open_model(residual)
    with pytest.raises(PlanError, match="no site 'nowhere'"):
        model.weight("nowhere")
    with pytest.raises(PlanError, match="cannot replace site"):
        model.replace("head", _full_rank(open_model(encoder), "up"))


def test_weights_that_are_not_finite_are_refused(residual: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        residual.stem.weight[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(InvalidModelError, match=r"stem\.weight"):
        tdpass.compress(residual, {"macs": 0.5}, images)


def test_a_buffer_that_is_not_a_number_is_named_and_an_infinite_mask_is_none_of_it() -> None:
    net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8)).eval()
    net.register_buffer("mask", torch.full((3, 3), -torch.inf))
    tdpass.compress(net, {"params": 0.9}, torch.randn(16, 12), cache=False, formats=["svd"])
    net[1].running_var[2] = float("nan")  # type: ignore[index]
    with pytest.raises(InvalidModelError, match=r"buffer '1\.running_var'"):
        tdpass.compress(net, {"params": 0.9}, torch.randn(16, 12), cache=False, formats=["svd"])


def test_data_that_does_not_fit_is_refused(residual: nn.Module) -> None:
    with pytest.raises(InvalidModelError, match="does not run on the given data"):
        tdpass.compress(residual, {"macs": 0.5}, torch.randn(4, 7))


@pytest.fixture
def saved(residual: nn.Module, images: Tensor, tmp_path: Path) -> tuple[Path, Tensor]:
    artifact = tdpass.compress(residual, {"macs": 0.5}, images)
    artifact.save(tmp_path / "small.safetensors")
    assert isinstance(artifact.model, nn.Module)
    with torch.no_grad():
        return tmp_path / "small.safetensors", artifact.model(images)


def test_saved_and_loaded_is_the_same(
    saved: tuple[Path, Tensor], residual: nn.Module, images: Tensor
) -> None:
    path, expected = saved
    loaded = tdpass.load(path, type(residual)().eval())
    with torch.no_grad():
        assert torch.equal(loaded(images), expected)
    assert tdpass.load_plan(path).choices


def test_loading_on_another_class_is_refused_and_changes_nothing(
    saved: tuple[Path, Tensor], encoder: nn.Module
) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(PlanError, match="class it was made from"):
        tdpass.load(saved[0], encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def _tampered(path: Path, change: dict[str, object]) -> Path:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    structure = json.loads(header["__metadata__"]["tdpass.structure"])
    structure["layers"][0].update(change)
    header["__metadata__"]["tdpass.structure"] = json.dumps(structure)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"rank": [10**9]},
        {"rank": [0]},
        {"rank": ["a"]},
        {"format": "nonsense"},
        {"paths": ["elsewhere"]},
        {"paths": []},
    ],
)
def test_a_tampered_structure_is_refused_before_anything_is_allocated(
    saved: tuple[Path, Tensor], residual: nn.Module, change: dict[str, object]
) -> None:
    path = _tampered(saved[0], change)
    with pytest.raises(tdpass.TdpassError):
        tdpass.load(path, type(residual)())


def test_damaged_files_are_refused(saved: tuple[Path, Tensor], residual: nn.Module, tmp_path: Path) -> None:
    whole = saved[0].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("cut", "empty", "missing"):
        with pytest.raises(InvalidModelError):
            tdpass.load(tmp_path / f"{name}.safetensors", type(residual)())
