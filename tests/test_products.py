"""Multiply-adds, against torch's own counter, formulas and the sizes in an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from counts import torch_macs
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import tdpass
from tdpass.models import Batch, open_model
from tdpass.products import counting

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
HEADS = X.reshape(3, 5, 2, 4).transpose(1, 2)
IMAGE = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(8, 3), (X,)),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (IMAGE,)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (IMAGE,)),
    "image without a batch": (lambda: nn.Conv2d(4, 6, 3), (IMAGE[0],)),
    "lstm": (lambda: nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True), (X,)),
    "gru": (lambda: nn.GRU(8, 4, bidirectional=True), (X,)),
    "rnn": (lambda: nn.RNN(8, 4), (X,)),
    "lstm cell": (lambda: nn.LSTMCell(8, 4), (X[0],)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (X, X, X)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (X,)),
    "script": (lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 6))), (X,)),
}
FUNCTIONS: dict[str, tuple[Callable[[], object], int]] = {
    "matmul": (lambda: X @ X.mT, 3 * 5 * 5 * 8),
    "einsum": (lambda: torch.einsum("bti,oi->bto", X, X[0]), 3 * 5 * 5 * 8),
    "tensordot": (lambda: torch.tensordot(X, X, dims=([2], [2])), 15 * 15 * 8),
    "addmm": (lambda: torch.addmm(X[0], X[0] @ X[0].T, X[0]), 2 * 5 * 5 * 8),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(3, 5, 5), X, X.mT), 3 * 5 * 5 * 8),
    "addbmm": (lambda: torch.addbmm(torch.zeros(5, 5), X, X.mT), 3 * 5 * 5 * 8),
    "vector": (lambda: F.linear(X[0, 0], X[0]), 5 * 8),
    "dot": (lambda: X[0, 0] @ X[0, 1], 8),
    "attention": (lambda: F.scaled_dot_product_attention(HEADS, HEADS, HEADS), 3 * 2 * 5 * 5 * 8),
    "bilinear": (lambda: F.bilinear(X, X, torch.ones(3, 8, 8)), 15 * 3 * 8 * 8),
    "under vmap": (lambda: torch.vmap(lambda v: v @ v.T)(X), 3 * 5 * 5 * 8),
    "element by element": (lambda: X * X + X, 0),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", MODULES)
def test_modules_count_as_torchs_counter_has_it(name: str) -> None:
    make, inputs = MODULES[name]
    module = make().eval()
    with counting() as counter:
        module(*inputs)
    assert counter.counted().macs == torch_macs(lambda: module(*inputs)) > 0
    assert counter.counted().unseen == ()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_count_what_their_sizes_say(name: str) -> None:
    run, expected = FUNCTIONS[name]
    with counting() as counter:
        run()
    assert counter.counted().macs == expected


def test_operators_of_others_are_named() -> None:
    @torch.library.custom_op("costs::product", mutates_args=())
    def product(x: Tensor) -> Tensor:
        return x @ x.mT

    with counting() as counter:
        product(X)
    assert counter.counted().unseen == ("costs.product",)


class Frames(nn.Module):
    """Frames of a clip as images, two clips side by side, and a vector of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 16)
        self.tail = nn.Linear(16, 16)
        self.bank = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(torch.cat([x, x.flip(1)]).flatten(0, 1)).mean((2, 3))
        left, right = self.head(frames).relu().reshape(2, len(x), -1, 16).mean(2)
        return self.tail(left) + self.tail(right) + self.bank(x.mean().expand(16))


def test_extents_and_totals_are_per_sample_however_samples_are_folded() -> None:
    clips = torch.randn(4, 3, 4, 9, 9)
    model = open_model(Frames().eval(), clips)
    sites = {site.name: site for site in model.sites()}
    per_sample = {name: (site.samples, site.weights * site.out_positions) for name, site in sites.items()}
    assert per_sample == {
        "conv": (1, 2 * 3 * 49 * 216),
        "head": (1, 2 * 3 * 96),
        "tail": (1, 2 * 256),
        "bank": (4, 256),
    }
    assert model.macs() == round(torch_macs(lambda: model.run(Batch((clips,)))) / 4)
    assert model.macs() == sum(tdpass.formats.layer.dense_cost(site).macs for site in model.sites())


class Recurrent(nn.Module):
    """A recurrent layer that stays, between layers that are factored."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.LSTM(32, 8), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))[0])


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "frames": (Frames, torch.randn(4, 3, 4, 9, 9)),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), nn.Linear(16, 16)),
        torch.randn(4, 6, 16),
    ),
    "recurrent": (Recurrent, torch.randn(4, 6, 16)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_report_agrees_with_an_independent_count_of_both_models(name: str) -> None:
    make, data = NETS[name]
    torch.manual_seed(0)
    dense = make().eval()
    result = tdpass.compress(
        dense, {"macs": 0.8}, example_inputs=data, formats=["svd", "channel_svd"], cache=False
    )
    before, after = (
        torch_macs(lambda model=model: model(data)) / len(data) for model in (dense, result.model)
    )
    assert (result.report.original.macs, result.report.final.macs) == (round(before), round(after))
    assert after <= 0.8 * before
    assert result.report.final.params == sum(p.numel() for p in result.model.parameters())


def _onnx(
    nodes: list[onnx.NodeProto],
    weights: Mapping[str, Any],
    sizes: tuple[int, ...],
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *sizes])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8, functions=functions)


def _w(*sizes: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=sizes).astype(np.float32)


def _loop() -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("h", "h2")]
    flag = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("c", "c2")]
    step = [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("MatMul", ["h", "w"], ["h2"])]
    body = helper.make_graph(
        step,
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), flag[0], value[0]],
        [flag[1], value[1]],
    )
    return _onnx(
        [helper.make_node("Loop", ["k", "", "x"], ["y"], body=body)], {"w": _w(8, 8), "k": np.int64(5)}, (8,)
    )


def _function() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["m"]),
        helper.make_node("Gemm", ["m", "w"], ["b"], transB=1),
    ]
    inner = helper.make_function("local", "Twice", ["a", "w"], ["b"], nodes, [helper.make_opsetid("", 17)])
    return _onnx(
        [helper.make_node("Twice", ["x", "w"], ["y"], domain="local")], {"w": _w(8, 8)}, (8,), (inner,)
    )


def _quantized() -> onnx.ModelProto:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    return _onnx(nodes, {"w": np.ones((8, 6), np.int8)}, (8,))


def _lstm() -> onnx.ModelProto:
    node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], hidden_size=4, direction="bidirectional")
    return _onnx([node], {"w": _w(2, 16, 8), "r": _w(2, 16, 4), "b": _w(2, 32)}, (5, 8))


GRAPHS: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[int, ...], int]] = {
    "gemm": (
        lambda: _onnx(
            [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)], {"w": _w(6, 8), "b": _w(6)}, (8,)
        ),
        (8,),
        48,
    ),
    "grouped": (
        lambda: _onnx(
            [helper.make_node("Conv", ["x", "w"], ["y"], group=2)], {"w": _w(6, 2, 3, 3)}, (4, 9, 9)
        ),
        (4, 9, 9),
        49 * 6 * 18,
    ),
    "transposed": (
        lambda: _onnx(
            [helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2)], {"w": _w(4, 3, 3, 3)}, (4, 9, 9)
        ),
        (4, 9, 9),
        81 * 4 * 27,
    ),
    "einsum": (
        lambda: _onnx(
            [helper.make_node("Einsum", ["x", "w"], ["y"], equation="nti,oi->nto")], {"w": _w(6, 8)}, (5, 8)
        ),
        (5, 8),
        5 * 48,
    ),
    "lstm": (_lstm, (5, 8), 2 * 5 * 16 * 12),
    "loop": (_loop, (8,), 5 * 64),
    "function": (_function, (8,), 2 * 64),
    "quantized": (_quantized, (8,), 48),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_onnx_nodes_count_as_often_as_they_run(name: str) -> None:
    make, sizes, expected = GRAPHS[name]
    batch = Batch((torch.randn(3, *sizes),))
    counted = open_model(make()).count(batch)
    assert counted.macs == 3 * expected
    assert counted.unseen == ()


def test_an_onnx_result_counts_what_its_nodes_do() -> None:
    weights = {"w1": _w(8, 32), "w2": _w(32, 8), "w": _w(1, 16, 8), "r": _w(1, 16, 4)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["d", "w", "r"], ["e"], hidden_size=4),
        helper.make_node("Transpose", ["e"], ["y"], perm=[2, 0, 1, 3]),
    ]
    result = tdpass.compress(_onnx(nodes, weights, (5, 8)), {"macs": 0.8}, torch.randn(6, 5, 8), cache=False)
    original = 5 * (2 * 256 + 16 * 12)
    assert result.report.original.macs == original
    assert result.report.final.macs <= 0.8 * original
    kept = [
        initializer
        for initializer in result.model.graph.initializer
        if initializer.data_type == TensorProto.FLOAT
    ]
    recurrent = sum(int(np.prod(initializer.dims)) for initializer in kept if len(initializer.dims) == 3)
    assert result.report.final.macs == 5 * (
        sum(int(np.prod(i.dims)) for i in kept if len(i.dims) == 2) + recurrent
    )


@pytest.mark.parametrize("given", ["another size", "no data"])
def test_a_plan_is_priced_anew_for_the_model_it_is_carried_out_on(given: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    made = {"another size": {"example_inputs": torch.randn(1, 3, 24, 24)}, "no data": {}}[given]
    plan = tdpass.make_plan(model, {"params": 0.5}, formats=["channel_svd"], cache=False, **made).plan
    images = torch.randn(2, 3, 8, 8)
    result = tdpass.compress(model, plan=plan, example_inputs=images, cache=False)
    before, after = (torch_macs(lambda m=m: m(images)) // 2 for m in (model, result.model))
    assert (result.report.original.macs, result.report.final.macs) == (before, after)
    rows = result.report.sites
    assert (sum(row.before.macs for row in rows), sum(row.after.macs for row in rows)) == (before, after)
    assert result.plan.planned.macs == after
    assert tdpass.compress(model, plan=plan, cache=False).report.final.macs == 0
