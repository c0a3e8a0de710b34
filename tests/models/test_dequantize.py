"""Models that are quantized already: recognised and left right, or made floating-point when asked."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx_nets import to_onnx
from torch import Tensor, nn
from typing_extensions import Self

import tdpass
from tdpass.errors import TdpassError, UnsupportedError, UsageError
from tdpass.models import open_model
from tdpass.models.base import Batch

quantization = pytest.importorskip("onnxruntime.quantization")
FORMATS = ("QDQ", "QOperator")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = F.max_pool2d(torch.relu(self.second(h) + h), 4)
        return self.out(torch.relu(self.fc(h.flatten(1))))


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """The network as onnxruntime.quantization writes it, in both of its ways."""
    folder = tmp_path_factory.mktemp("quantized")
    onnx.save(to_onnx(net(), images(2)), folder / "net.onnx")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"x": part.numpy()} for part in images().split(2)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    made = {}
    for name in FORMATS:
        quantization.quantize_static(
            str(folder / "net.onnx"),
            str(folder / f"{name}.onnx"),
            Reader(),
            quant_format=getattr(quantization.QuantFormat, name),
            per_channel=name == "QDQ",
        )
        made[name] = onnx.load(folder / f"{name}.onnx")
    return made


def answer(model: onnx.ModelProto, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (value,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_onnx_model_becomes_one_of_numbers(
    name: str, quantized: dict[str, onnx.ModelProto]
) -> None:
    given = quantized[name]
    assert len(open_model(given).sites()) == 4
    made = tdpass.dequantize(given)
    onnx.checker.check_model(made)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in made.graph.node}
    assert not any(node.op_type.startswith("QLinear") for node in made.graph.node)
    assert len(open_model(made).sites()) == 4
    x, scale = images(), float(net()(images()).detach().abs().max())
    assert float((answer(made, x) - net()(x)).detach().abs().max()) < 0.03 * scale
    assert float((answer(made, x) - answer(given, x)).abs().max()) < 0.05 * scale
    assert given.SerializeToString() == quantized[name].SerializeToString()


SCALES = {"xs": np.float32(0.02), "ws": np.float32(0.01), "ys": np.float32(0.05)}
ZEROS = {"xz": np.uint8(120), "wz": np.int8(0), "yz": np.uint8(128)}
ALONE = {
    "QLinearConv": ("q xs xz w ws wz ys yz", "", (8, 6, 3, 3), (2, 6, 7, 7)),
    "QLinearMatMul": ("q xs xz w ws wz ys yz", "", (6, 8), (5, 6)),
    "QGemm": ("q xs xz w ws wz  ys yz", "com.microsoft", (6, 8), (5, 6)),
    "ConvInteger": ("q w xz wz", "", (8, 6, 3, 3), (2, 6, 7, 7)),
    "MatMulInteger": ("q w xz wz", "", (6, 8), (5, 6)),
}


def of_one_operator(name: str) -> tuple[onnx.ModelProto, Tensor]:
    """An operator of integers between numbers, and what it is called with."""
    inputs, domain, shape, size = ALONE[name]
    draw = np.random.default_rng(0)
    constants = {**SCALES, **ZEROS, "w": draw.integers(-90, 90, shape, np.int8)}
    make, last = onnx.helper.make_node, ["c", "ys", "yz"]
    middle = make(name, inputs.split(" "), ["c"], domain=domain)
    end = make("DequantizeLinear", last, ["y"])
    if "Integer" in name:
        end = make("Cast", ["c"], ["y"], to=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph(
        [make("QuantizeLinear", ["x", "xs", "xz"], ["q"]), middle, end],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, size)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()],
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    return model, torch.from_numpy(draw.uniform(-1, 1, size).astype(np.float32))


@pytest.mark.parametrize("name", [name for name in ALONE if "Integer" in name])
def test_a_weight_of_an_operator_of_integers_stays_and_the_reason_names_what_helps(name: str) -> None:
    model, _ = of_one_operator(name)
    (reason,) = open_model(model).declined().values()
    with pytest.raises(TdpassError, match="the weight is quantized"):
        tdpass.compress(model, {"params": 0.5}, cache=False)
    assert "makes no numbers of; compress the floating-point model, then quantize it" in reason


@pytest.mark.parametrize("name", [name for name in ALONE if "Integer" not in name])
def test_an_operator_of_integers_is_made_one_of_numbers(name: str) -> None:
    model, x = of_one_operator(name)
    made = tdpass.dequantize(model)
    (site,) = open_model(made).sites()
    assert site.shape == ((8, 6, 3, 3) if name == "QLinearConv" else (8, 6))
    assert not open_model(made).declined()
    given = answer(model, x)
    torch.testing.assert_close(answer(made, x), given, rtol=0, atol=0.03 * float(given.abs().max()))


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_factored_and_quantized_anew(
    name: str, quantized: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    artifact = tdpass.compress(
        tdpass.dequantize(quantized[name]),
        {"macs": 0.8},
        images(2),
        pipeline="plan,factorize,quantize,quantize-activations,verify",
        effort="fast",
        formats=["svd", "channel_svd"],
        cache=False,
        strict=False,
    )
    artifact.save(tmp_path / "it.onnx")
    assert artifact.report.final.macs <= 0.8 * artifact.report.original.macs
    stored = {held.data_type for held in onnx.load(tmp_path / "it.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in stored


def test_ranges_that_cut_at_zero_still_do() -> None:
    """A Relu that was left out since the range begins at zero."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(64, 6)
    ours = tdpass.compress(
        to_onnx(module, x[:2]), None, x, pipeline="quantize,quantize-activations", cache=False
    )
    assert "Relu" not in {node.op_type for node in ours.model.graph.node}
    made = tdpass.dequantize(ours.model)
    found = answer(made, x)
    assert float((found - module(x)).detach().abs().max()) < 0.02 * float(module(x).detach().abs().max())
    assert {site.shape for site in open_model(made).sites()} == {(8, 6), (3, 8)}


def test_modules_quantized_by_torch_are_named_and_made_anew() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    x = torch.randn(32, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
        exact = given(x)
    model = open_model(given)
    assert not model.sites()
    assert set(model.declined()) == {"0", "2"}
    assert all("its weight is quantized" in reason for reason in model.declined().values())
    with pytest.raises(TdpassError, match=r"its weight is quantized .*tdpass.dequantize\(model\)"):
        tdpass.compress(given, 0.5, x, cache=False)
    made = tdpass.dequantize(given)
    assert [type(part) for part in made] == [nn.Linear, nn.ReLU, nn.Linear]
    assert float((made(x) - exact).detach().abs().max()) < 0.03 * float(exact.abs().max())
    assert tdpass.compress(made, {"params": 0.6}, x, cache=False, effort="fast").report.final.params


class Scaled(Tensor):
    """A weight as torchao holds one: integers and a scale behind the face of floating-point numbers."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Self:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        return nn.Parameter(Scaled(self.codes, self.scale), requires_grad=False)


def test_weights_of_a_class_of_their_own_are_named_and_made_anew() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval(), torch.randn(32, 16)
    codes = torch.randint(-127, 128, (24, 16), dtype=torch.int8)
    module[0].weight = nn.Parameter(Scaled(codes, torch.tensor(0.01)), requires_grad=False)
    model = open_model(module)
    assert [site.name for site in model.sites()] == ["2"]
    assert "its weight is a Scaled, which is quantized" in model.declined()["0"]
    made = tdpass.dequantize(module)
    assert torch.equal(made[0].weight, codes.float() * 0.01)
    torch.testing.assert_close(made(x), module(x))
    assert {site.name for site in open_model(made).sites()} == {"0", "2"}
    assert open_model(made).run(Batch((x,))) is not None


def test_what_cannot_be_made_anew_is_one_clear_error() -> None:
    with pytest.raises(
        UsageError, match=r"takes an nn\.Module, an exported program or an ONNX model, not a dict"
    ):
        tdpass.dequantize({})
    body = onnx.parser.parse_graph(
        "body () => (float[2] y) { c = QuantizeLinear (x, s) y = DequantizeLinear (c, s) }"
    )
    nodes = [onnx.helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body)]
    inputs = [
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2]),
        onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []),
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    scale = onnx.numpy_helper.from_array(np.float32(0.1), "s")
    graph = onnx.helper.make_graph(nodes, "g", inputs, [output], [scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(UnsupportedError, match="a branch, loop or function of the model holds integers"):
        tdpass.dequantize(model)
