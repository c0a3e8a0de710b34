"""Embeddings, alone and tied to the head: one factorization for all readers, and what it costs.

Both front ends are tested.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import tdpass
from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.formats.base import FORMATS, Format
from tdpass.formats.layer import Layer
from tdpass.layers.factorized import Factorized
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.ops import TorchOps
from tdpass.site import Site

ROWS, WIDTH = 120, 24
TABLE = Site("words", "linear", (12, 8), table=True, lookups=5)
IDS = torch.randint(0, ROWS, (32, 5), generator=torch.Generator().manual_seed(1))


class Reader(nn.Module):
    """Reads words, mixes them, and with `tied` answers by the table that it reads from."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.words(x))))


def as_onnx(module: Reader) -> onnx.ModelProto:
    """The same network as exporters write it: a head that is tied reads a copy of the table."""
    held = {name: tensor.detach().numpy() for name, tensor in module.named_parameters(remove_duplicate=False)}
    tied = module.head.weight is module.words.weight
    name = "head.weight" if tied else "words.weight"
    constants = {
        name: held["words.weight"], "mix.weight": held["mix.weight"].T, "mix.bias": held["mix.bias"],
        ("val_0" if tied else "head.weight"): held["head.weight"].T,
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", [name, "x"], ["rows"]),
        helper.make_node("MatMul", ["rows", "mix.weight"], ["product"]),
        helper.make_node("Add", ["product", "mix.bias"], ["mixed"]),
        helper.make_node("Tanh", ["mixed"], ["h"]),
        helper.make_node("MatMul", ["h", "val_0" if tied else "head.weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.INT64, ["n", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, ROWS])],
        [numpy_helper.from_array(array.copy(), label) for label, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def compressed(model: Any, budget: Any, **options: Any) -> tdpass.Artifact[Any]:
    return tdpass.compress(model, budget, data=IDS, effort="fast", progress=False, cache=False, **options)


def answer(model: onnx.ModelProto) -> Tensor:
    found = open_model(model).run(Batch((IDS,)))
    assert isinstance(found, dict)
    return next(iter(found.values()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "alone"])
def test_the_same_plan_on_both_front_ends_costs_and_answers_alike(tied: bool) -> None:
    dense = Reader(tied=tied).eval()
    torch_side = compressed(copy.deepcopy(dense), {"params": 0.5})
    onnx_side = compressed(as_onnx(dense), {"params": 0.5})
    planned = [[(made.site, made.form) for made in side.plan.choices] for side in (onnx_side, torch_side)]
    assert planned[0] == planned[1]
    assert ("head" if tied else "words") in {choice.site for choice in torch_side.plan.choices}
    for ours, theirs in ((onnx_side.report.original, torch_side.report.original),
                         (onnx_side.report.final, torch_side.report.final)):  # fmt: skip
        assert (ours.params, ours.macs) == (theirs.params, theirs.macs)
    carried = tdpass.compress(as_onnx(dense), plan=torch_side.plan, data=IDS, progress=False, cache=False)
    torch.testing.assert_close(answer(carried.model), torch_side.model(IDS), rtol=1e-4, atol=1e-4)


def test_a_tied_table_is_one_site_whose_factors_all_readers_share(tmp_path: Path) -> None:
    small = compressed(Reader(tied=True).eval(), {"params": 0.4})
    words, head = small.model.words, small.model.head
    assert isinstance(words, Factorized)
    assert isinstance(head, Factorized)
    assert words.u is head.u
    assert words.v is head.v
    assert sum(parameter.numel() for parameter in small.model.parameters()) == small.report.final.params
    small.save(tmp_path / "small.safetensors")
    again = tdpass.load(tmp_path / "small.safetensors", Reader(tied=True))
    assert again.words.u is again.head.u
    torch.testing.assert_close(again(IDS), small.model(IDS), rtol=0, atol=0)


def test_factors_of_a_tied_table_are_stored_once_in_an_onnx_file() -> None:
    small = compressed(as_onnx(Reader(tied=True)), {"params": 0.4})
    sizes = [numpy_helper.to_array(tensor).size for tensor in small.model.graph.initializer]
    assert sum(sizes) == small.report.final.params
    assert "val_0" not in {tensor.name for tensor in small.model.graph.initializer}


@pytest.mark.parametrize("made", [lambda: Reader(tied=False).eval(), lambda: as_onnx(Reader(tied=False))])
def test_a_table_stays_as_it_is_where_only_multiply_adds_are_bounded(made: Any) -> None:
    plan = compressed(made(), {"macs": 0.6}).plan
    assert {choice.site: str(choice.form) for choice in plan.choices}["words"] == "dense"


def test_rows_cost_multiply_adds_only_once_they_are_factored() -> None:
    site = Site("words", "linear", (ROWS, WIDTH), table=True, lookups=5)
    svd, dense = FORMATS.get("svd"), FORMATS.get("dense")
    assert (dense.cost(site, ()).params, dense.cost(site, ()).macs) == (ROWS * WIDTH, 0)
    assert (svd.cost(site, (3,)).params, svd.cost(site, (3,)).macs) == (3 * (ROWS + WIDTH), 5 * 3 * WIDTH)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.fits(TABLE)], ids=lambda fmt: fmt.name)
def test_every_format_that_fits_a_table_gives_the_rows_of_what_it_stands_for(fmt: Format) -> None:
    weight = torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(2)).double()
    rank = fmt.ranks(TABLE)[0]
    layer = Layer(TABLE, Form(fmt.name, rank), fmt.factorize(weight, TABLE, rank))
    numbers = torch.tensor([[3, 0], [11, 3]])
    torch.testing.assert_close(layer(numbers), layer.reconstruct()[numbers])


def test_a_format_without_rows_says_so() -> None:
    fmt = FORMATS.get("tensor_train")
    assert not fmt.fits(TABLE)
    with pytest.raises(PlanError, match="single rows of table 'words'"):
        fmt.rows(TorchOps(), torch.tensor([0]), {}, TABLE, (1,))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("stored", "error"),
    [("quantize{numbers=int8}", 0.02), ("quantize{numbers=levels16}", 0.2), ("sparsify{support=2:4}", 0.4)],
)
def test_a_table_answers_in_the_type_of_its_model(
    stored: str, error: float, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    dense = Reader(tied=tied).to(dtype).eval()
    small = compressed(dense, None, pipeline=f"{stored},verify", strict=False)
    rows, exact = small.model.words(IDS).detach(), dense.words(IDS).detach().double()
    assert rows.dtype is dtype
    assert torch.equal(rows, small.model.words.weight[IDS])
    assert 0 < float((rows.double() - exact).norm()) < error * float(exact.norm())
    small.save(tmp_path / "small.safetensors")
    again = tdpass.load(tmp_path / "small.safetensors", Reader(tied=tied).to(dtype))
    assert torch.equal(again(IDS), small.model(IDS))
    for other in (torch.float32, torch.bfloat16, torch.float64):
        moved = copy.deepcopy(again).to(other)
        assert moved(IDS).dtype is other
        torch.testing.assert_close(moved.words(IDS).double(), rows.double(), rtol=0.02, atol=0.02)
