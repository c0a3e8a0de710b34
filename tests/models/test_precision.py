"""Models of every floating-point type, and of several.

Data is taken, results stay in the type, and they are as good as in float32.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from selection import mostly_slow
from torch import Tensor, nn

from tdpass.artifact import Artifact
from tdpass.layers.factorized import Factorized
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.verbs import compress
from tests.models.onnx_nets import node

_TYPES = (torch.float16, torch.bfloat16, torch.float64)
_STEP = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}


def _decaying(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            with torch.no_grad():
                u, s, v = torch.linalg.svd(module.weight.flatten(1), full_matrices=False)
                s = s * torch.exp(-torch.arange(len(s)) / (0.3 * len(s)))
                module.weight.copy_(((u * s) @ v).reshape(module.weight.shape))
    return model.eval()


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Linear(20, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 24, bias=False),
            nn.Linear(24, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(h + self.b(torch.relu(self.a(h))))


_NETS = {
    "bias": lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 6)),
    "no bias": lambda: nn.Sequential(nn.Linear(20, 32, bias=False), nn.ReLU(), nn.Linear(32, 6, bias=False)),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 4),
    ),
    "residual": _Residual,
}


def _net(name: str) -> nn.Module:
    torch.manual_seed(2)
    return _decaying(_NETS[name]())


def _data(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(48, 3, 5, 5, generator=generator)
        if name == "conv"
        else torch.randn(48, 20, generator=generator)
    )


def _off(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = model(x).double(), reference(x).double()
    return float((ours - theirs).norm() / theirs.norm())


@cache
def _in_float32(name: str) -> Artifact:
    return compress(_net(name), {"params": 0.7}, _data(name), cache=False)


@pytest.mark.parametrize("dtype", _TYPES, ids=str)
@pytest.mark.parametrize("name", _NETS)
def test_a_model_of_any_precision_is_compressed_as_its_float32_twin(name: str, dtype: torch.dtype) -> None:
    net, x, twin = _net(name), _data(name), _in_float32(name)
    typed = copy.deepcopy(net).to(dtype)
    made = compress(typed, plan=twin.plan, data=x, cache=False)
    assert isinstance(made.model, nn.Module)
    factored = [module for module in made.model.modules() if isinstance(module, Factorized)]
    assert factored
    assert {parameter.dtype for parameter in made.model.parameters()} == {dtype}
    expected = _off(twin.model, net, x)  # type: ignore[arg-type]
    assert _off(made.model, typed, x.to(dtype)) == pytest.approx(expected, rel=0.15, abs=2 * _STEP[dtype])


@pytest.mark.parametrize("dtype", _TYPES, ids=str)
@pytest.mark.parametrize("name", mostly_slow(["bias", "conv"], ["conv"]))
def test_a_budget_is_planned_in_any_precision(name: str, dtype: torch.dtype) -> None:
    made = compress(_net(name).to(dtype), {"params": 0.7}, _data(name), cache=False)
    assert made.plan is not None
    assert any(not choice.kept_dense for choice in made.plan)
    assert made.report.checks["divergence"] <= 2 * made.plan.loss + _STEP[dtype]


class _Mixed(nn.Module):
    """Norm and head in float32, the body in half precision."""

    def __init__(self, dtype: torch.dtype, first: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(20))
        self.body = _decaying(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24))).to(dtype)
        self.head = nn.Linear(24, 6)
        self.first, self.dtype = first, dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.body((x * self.scale).to(self.dtype) if self.first else x)
        return self.head(h.float())


@pytest.mark.parametrize("first", mostly_slow([True, False], [True]), ids=["casts itself", "wants half"])
@pytest.mark.parametrize("dtype", _TYPES, ids=str)
def test_layers_of_several_types_in_one_model(dtype: torch.dtype, first: bool) -> None:
    torch.manual_seed(2)
    net, x = _Mixed(dtype, first).eval(), _data("residual")
    made = compress(net, {"params": 0.7}, x, cache=False)
    assert isinstance(made.model, nn.Module)
    types = {
        name: module.bias.dtype
        for name, module in made.model.named_modules()
        if isinstance(module, Factorized) and module.bias is not None
    }
    assert types
    assert all(kind == (torch.float32 if name == "head" else dtype) for name, kind in types.items())
    assert _off(made.model, net, x if first else x.to(dtype)) < 0.3


def test_the_type_of_inputs_is_not_that_of_an_integer_parameter() -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.order = nn.Parameter(torch.arange(20).flip(0), requires_grad=False)
            self.net = _net("bias")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, self.order])  # type: ignore[no-any-return]

    net, x = Ordered().eval(), _data("bias")
    torch.testing.assert_close(open_model(net).run(Batch((x,))), net(x).detach())
    assert compress(net, {"params": 0.7}, x, cache=False).report.checks["relative_difference"] < 0.3


@pytest.mark.parametrize(
    ("element", "dtype"),
    [(TensorProto.FLOAT16, torch.float16), (TensorProto.DOUBLE, torch.float64)],
    ids=["half", "double"],
)
def test_an_onnx_model_of_any_precision_takes_data(element: int, dtype: torch.dtype) -> None:
    net, x = _net("bias"), _data("bias")
    tensors = {
        f"{name}.{kind}": getattr(net[int(name)], kind).detach().to(dtype).numpy()
        for name in "02"
        for kind in ("weight", "bias")
    }  # type: ignore[index]
    graph = helper.make_graph(
        [
            node("Gemm", "x 0.weight 0.bias", "a", transB=1),
            node("Relu", "a", "r"),
            node("Gemm", "r 2.weight 2.bias", "y", transB=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", element, ("N", 20))],
        [helper.make_tensor_value_info("y", element, ("N", 6))],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = compress(model, plan=_in_float32("bias").plan, data=x, cache=False)
    twin = _in_float32("bias").report.checks["relative_difference"]
    assert {tensor.data_type for tensor in made.model.graph.initializer} == {element}
    assert made.report.checks["relative_difference"] == pytest.approx(twin, rel=0.15, abs=2 * _STEP[dtype])
