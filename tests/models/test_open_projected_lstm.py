"""An `nn.LSTM` with `proj_size` opened: the products of the gates and the projection are sites."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.errors import InvalidModelError
from tdpass.layers.factorized import Factorized
from tdpass.models import OpenLSTM, open_model

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
HOW = ({}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True, "bias": False})


class Reader(nn.Module):
    """The last answer of a projected layer, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 16, 2, batch_first=True, proj_size=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(ours: tuple, theirs: tuple) -> None:
    (y, (h, c)), (wanted, (last, cell)) = ours, theirs
    torch.testing.assert_close((y, h, c), (wanted, last, cell), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_it_is_the_dense_layer(how: dict, grad: bool) -> None:
    dense = nn.LSTM(5, 7, proj_size=3, **how)
    layer, x = OpenLSTM(copy.deepcopy(dense)), torch.randn(2, 4, 5)
    batch = 2 if how.get("batch_first") else 4
    layers = how.get("num_layers", 1) * (1 + how.get("bidirectional", False))
    states = (torch.randn(layers, batch, 3), torch.randn(layers, batch, 7))
    with torch.set_grad_enabled(grad):
        for given in (None, states):
            close(layer(x, given), dense(x, given))
        close(layer(x[0]), dense(x[0]))
    with torch.no_grad():
        program = torch.export.export(layer, (x, states), strict=False).module()
        close(program(x, states), dense(x, states))


def test_gradients_are_those_of_the_dense_layer() -> None:
    dense = nn.LSTM(5, 7, proj_size=3)
    layer, x = OpenLSTM(copy.deepcopy(dense)), torch.randn(3, 2, 5)
    for module in (layer, dense):
        module(x)[0].square().sum().backward()
    torch.testing.assert_close(layer.project_l0.weight.grad, dense.weight_hr_l0.grad)
    torch.testing.assert_close(layer.hidden_l0.weight.grad, dense.weight_hh_l0.grad)


def test_a_bias_on_the_projection_is_added() -> None:
    layer, x = OpenLSTM(nn.LSTM(5, 7, proj_size=3)), torch.randn(3, 2, 5)
    layer.project_l0.bias = nn.Parameter(torch.ones(3))
    gates = layer.input_l0(x[:1]) + layer.hidden_l0.bias
    i, _, g, o = gates.chunk(4, -1)
    wanted = layer.project_l0(o.sigmoid() * (i.sigmoid() * g.tanh()).tanh())
    torch.testing.assert_close(layer(x[:1])[0], wanted)


def compressed(data: Tensor) -> tuple[tdpass.CompressionResult, nn.Module]:
    opened = tdpass.open_recurrent(Reader()).eval()
    result = tdpass.compress(opened, {"params": 0.5}, data, cache=False, effort="fast", progress=False)
    assert isinstance(result.model, Reader)
    return result, result.model


def test_its_products_are_sites_and_their_factors_saved_and_loaded(tmp_path: Path) -> None:
    data, parts = torch.randn(8, 4, 6), ("input", "hidden", "project")
    model = open_model(tdpass.open_recurrent(Reader()).eval(), data)
    assert {site.name for site in model.sites()} == {
        "head", *(f"rnn.{part}_l{level}" for part in parts for level in (0, 1))
    }  # fmt: skip
    gates = 64 * (6 + 8) + 64 * (8 + 8)
    assert model.macs() == 4 * (gates + 2 * 16 * 8) + 8 * 4
    result, small = compressed(data)
    assert result.report.final.params <= 0.5 * result.report.original.params
    assert any(isinstance(module, Factorized) for module in small.rnn.children())
    result.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", tdpass.open_recurrent(Reader().eval()))
    with torch.no_grad():
        torch.testing.assert_close(loaded(data), small(data))


@pytest.mark.slow
def test_its_export_answers_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    data = torch.randn(8, 4, 6)
    _, small = compressed(data)
    torch.onnx.export(small, (data,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: data.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), small(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("states", [False, True])
def test_the_export_that_loses_projections_is_refused_with_what_to_do(states: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 8, proj_size=4)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.layer(x)
            return y if states else y[0]

    program = torch.onnx.export(Net().eval(), (torch.randn(5, 2, 6),), dynamo=True, verbose=False)
    assert program is not None
    with pytest.raises(InvalidModelError, match=r"proj_size.*tdpass\.open_recurrent\(model\)"):
        open_model(program.model_proto)
