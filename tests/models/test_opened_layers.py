"""Embedding bags and bilinear layers: opened, they compute the same, and `compress` factors them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.layers.bilinear import OpenBilinear
from tdpass.layers.embedding_bag import OpenEmbeddingBag
from tdpass.layers.factorized import Factorized
from tdpass.models import open_model

GENERATOR = torch.Generator().manual_seed(0)
IDS, LIST = (torch.randint(0, 40, size, generator=GENERATOR) for size in ((6, 5), (20,)))
STARTS = torch.tensor([0, 3, 3, 11, 20])  # the second bag is empty


def bag(**options: Any) -> nn.EmbeddingBag:
    torch.manual_seed(0)
    return nn.EmbeddingBag(40, 16, **options)


@pytest.mark.parametrize(
    ("mode", "padding", "last"),
    list(product(("sum", "mean"), (None, 0, -3, int(IDS[0, 0])), (False, True))),
)
def test_an_opened_bag_adds_as_the_dense_one_does(mode: str, padding: int | None, last: bool) -> None:
    dense = bag(mode=mode, padding_idx=padding, include_last_offset=last)
    opened = OpenEmbeddingBag(dense)
    calls: list[tuple[Tensor | None, ...]] = [(IDS,), (LIST, STARTS)]
    if mode == "sum":
        calls += [(IDS, None, torch.rand(6, 5)), (LIST, STARTS, torch.rand(20))]
    for call in calls:
        torch.testing.assert_close(opened(*call), dense(*call))
    ours, theirs = (layer(IDS).square().sum() for layer in (opened, dense))
    weight = dense.weight
    torch.testing.assert_close(*(torch.autograd.grad(value, weight)[0] for value in (ours, theirs)))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize(("numbers", "places"), [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_an_opened_bag_takes_numbers_and_offsets_of_either_type_and_ends_at_the_last(
    mode: str, numbers: torch.dtype, places: torch.dtype
) -> None:
    ids, starts = LIST.to(numbers), torch.tensor([0, 3, 3, 9], dtype=places)
    for last in (False, True):
        dense = bag(mode=mode, include_last_offset=last)
        within = ids[:9] if last else ids  # of more, torch divides by the count of all
        torch.testing.assert_close(OpenEmbeddingBag(dense)(ids, starts), dense(within, starts))


def test_an_opened_bag_runs_in_onnx_runtime() -> None:
    """As it is once its table is factored: the operators that it is exported by must be there."""
    opened = OpenEmbeddingBag(bag(padding_idx=int(LIST[1]))).eval()
    program = torch.onnx.export(opened, (LIST, STARTS), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [entry.name for entry in session.get_inputs()]
    (made,) = session.run(None, dict(zip(names, (LIST.numpy(), STARTS.numpy()), strict=True)))
    torch.testing.assert_close(torch.from_numpy(made), opened(LIST, STARTS))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(3,), (2, 5), ()])
def test_an_opened_bilinear_layer_computes_the_same(bias: bool, lead: tuple[int, ...]) -> None:
    dense = nn.Bilinear(7, 5, 4, bias=bias)
    one, other = torch.randn(*lead, 7), torch.randn(*lead, 5)
    torch.testing.assert_close(OpenBilinear(dense)(one, other), dense(one, other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"mode": "max"}, "mode='max'"), ({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse=True")],
)
def test_other_bags_stay_with_the_reason(options: dict[str, Any], reason: str) -> None:
    model = nn.Sequential(bag(**options), nn.Linear(16, 4))
    assert reason in open_model(model).declined()["0"]
    assert type(tdpass.open_embedding_bags(model)[0]) is nn.EmbeddingBag  # type: ignore[index]


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(16, 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[..., :12])


@pytest.mark.parametrize(
    ("make", "site", "fed"),
    [
        (lambda: nn.Sequential(bag(), nn.Linear(16, 4)), "0.table", IDS),
        (Paired, "layer.first", torch.randn(6, 16)),
    ],
    ids=["bag", "bilinear"],
)
def test_compress_factors_it_and_the_file_is_loaded_on_its_class(
    make: Callable[[], nn.Module], site: str, fed: Tensor, tmp_path: Path
) -> None:
    small = tdpass.compress(make(), {"params": 0.5}, data=fed, progress=False, cache=False, effort="fast")
    assert isinstance(small.model.get_submodule(site), Factorized)
    assert sum(parameter.numel() for parameter in small.model.parameters()) == small.report.final.params
    small.save(tmp_path / "small.safetensors")
    torch.testing.assert_close(tdpass.load(tmp_path / "small.safetensors", make())(fed), small.model(fed))


def test_models_are_opened_for_training() -> None:
    both = nn.ModuleList([bag(), nn.Bilinear(3, 4, 5)])
    assert isinstance(tdpass.open_embedding_bags(both)[0], OpenEmbeddingBag)  # type: ignore[index]
    assert isinstance(tdpass.open_bilinear(both)[1], OpenBilinear)  # type: ignore[index]
