"""Static int8: activations of ONNX models in eight bits, as ONNX Runtime and OpenVINO read and run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import to_onnx
from torch import Tensor, nn

import tdpass
from tdpass.errors import TdpassError
from tdpass.models.abilities import Range
from tdpass.planner.calibrations import BINS, CALIBRATIONS, Histogram

STATIC = "fold-batchnorm,quantize,quantize-activations,verify"


class Net(nn.Module):
    """Convolutions, a sum of two branches and a linear layer over two axes, and one over three."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.third = nn.Conv2d(12, 12, 3, padding=1)
        self.mix = nn.Linear(12, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = torch.relu(self.third(torch.relu(self.second(h))) + h)
        h = torch.relu(self.mix(h.flatten(2).transpose(1, 2)))
        return self.fc(h.mean(1))


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def exported(net: Net) -> onnx.ModelProto:
    return to_onnx(net, images(2))


def compressed(model: object, pipeline: str = STATIC, data: Tensor | None = None) -> tdpass.Artifact:
    return tdpass.compress(model, None, images() if data is None else data, pipeline=pipeline, cache=False)


def executed(path: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".optimized.onnx")), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize("calibration", CALIBRATIONS.names())
def test_onnx_runtime_and_openvino_run_integers_and_answer_alike(
    calibration: str, net: Net, exported: onnx.ModelProto, tmp_path: Path
) -> None:
    artifact = compressed(
        exported, STATIC.replace("activations", f"activations{{calibration={calibration}}}")
    )
    artifact.save(tmp_path / "it.onnx")
    onnx.checker.check_model(str(tmp_path / "it.onnx"))
    exact, session = net(images()).detach().numpy(), onnxruntime.InferenceSession(str(tmp_path / "it.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: images().numpy()})[0]
    scale = float(np.abs(exact).max())
    assert float(np.abs(found - exact).max()) < 0.05 * scale
    operators = executed(tmp_path / "it.onnx")
    assert operators.count("QLinearConv") == 3
    assert "QLinearAdd" in operators
    assert "Conv" not in operators
    assert operators.count("Relu") == 1  # of the tokens, which are added up as floating-point numbers
    assert artifact.report.final.bytes == artifact.plan.planned.bytes
    openvino = pytest.importorskip("openvino")
    run = openvino.Core().compile_model(str(tmp_path / "it.onnx"), "CPU")
    theirs = run(images().numpy())[0]
    assert float(np.abs(theirs - exact).max()) < 0.05 * scale


class Pooled(nn.Module):
    """Two linear layers around what is added up over some axes of what the first makes."""

    def __init__(self, pool: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.pool, self.last = nn.Linear(24, 32), pool, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.first(x)))


POOLS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mean of tokens": (lambda h: h.mean(1), 32),
    "sum of tokens": (lambda h: h.sum(1), 32),
    "mean of channels": (lambda h: h.mean(-1), 8),
    "mean of laid out tokens": (lambda h: h.transpose(1, 2).mean(-1), 32),
    "mean of some tokens": (lambda h: torch.cat([h[:, :3], h[:, 4:]], 1).mean(1), 32),
    "mean of heads": (lambda h: h.unflatten(2, (4, 8)).mean(2).flatten(1), 64),
    "mean of a map": (lambda h: h.transpose(1, 2).unflatten(2, (4, 2)).mean((2, 3)), 32),
}


@pytest.mark.parametrize("name", POOLS)
def test_what_adds_up_integer_activations_is_right_in_both_runtimes(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    net, x = Pooled(*POOLS[name]).eval(), torch.randn(16, 8, 24, generator=torch.Generator().manual_seed(3))
    path = tmp_path / "it.onnx"
    compressed(to_onnx(net, x), data=x).save(path)
    assert sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node) >= 2
    exact, session = net(x).detach().numpy(), onnxruntime.InferenceSession(str(path))
    theirs = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found in (session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], theirs(x.numpy())[0]):
        assert float(np.abs(found - exact).max()) < 0.05 * float(np.abs(exact).max())


@pytest.mark.parametrize(
    "form",
    [
        "dense int8",
        "dense int8/tensor",
        "dense int8/zero",
        "dense int4",
        "svd 4 int8",
        "dense levels16",
        "dense rows/50%",
    ],
)
@pytest.mark.parametrize("opset", [13, 21])
def test_openvino_reads_what_weights_are_stored_as(form: str, opset: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    weights = torch.randn(10, 16, generator=torch.Generator().manual_seed(2)).numpy()
    make = helper.make_node
    nodes = [
        make("Gemm", ["x", "fc.weight"], ["h"], transB=1),
        make("Relu", ["h"], ["r"]),
        make("MatMul", ["r", "out.weight"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(weights, "fc.weight"),
        numpy_helper.from_array(weights[:, :8].copy(), "out.weight"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 16), ("y", 8))
    )
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    model = tdpass.open_model(proto)
    for site in model.sites():
        wanted = tdpass.form.Form.parse(form)
        factors = tdpass.formats.FORMATS.get(wanted.format).factorize(
            model.weight(site.name), site, wanted.rank
        )
        plain = tdpass.formats.Layer(site, tdpass.form.Form(wanted.format, wanted.rank), factors).to(
            torch.float32
        )
        model.replace(site.name, plain.stored(wanted))
    model.save(tmp_path / "it.onnx", {})
    given = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    (ours,) = model.run(tdpass.models.base.Batch((given,))).values()
    theirs = openvino.Core().compile_model(
        str(tmp_path / "it.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )(given.numpy())[0]
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-5)


def test_sensitive_layers_keep_their_activations(exported: onnx.ModelProto) -> None:
    every, most = (
        compressed(exported, STATIC.replace("activations", f"activations{{keep={share}}}"))
        for share in (0.0, 0.4)
    )
    declined = [
        name for name, reason in most.report.declined.items() if "activations stay as they are" in reason
    ]
    assert len(declined) == 2
    assert most.report.checks["divergence"] < every.report.checks["divergence"]


def test_low_rank_and_integers_run_together(net: Net, exported: onnx.ModelProto, tmp_path: Path) -> None:
    pipeline = "fold-batchnorm,plan{macs=0.6},factorize,refit,quantize,quantize-activations,verify"
    artifact = tdpass.compress(
        exported,
        None,
        images(),
        pipeline=pipeline,
        cache=False,
        effort="fast",
        formats=["channel_svd", "tucker2", "svd"],
    )
    artifact.save(tmp_path / "it.onnx")
    assert executed(tmp_path / "it.onnx").count("QLinearConv") > 3
    assert artifact.report.final.macs <= 0.6 * artifact.report.original.macs


def test_a_quantized_model_given_again_is_left_as_it_is(exported: onnx.ModelProto) -> None:
    once = compressed(exported)
    again = compressed(once.model)
    first, second = (
        onnx.load_from_string(artifact.model.SerializeToString()).graph for artifact in (once, again)
    )
    assert [node.op_type for node in first.node] == [node.op_type for node in second.node]
    assert {held.name: held.raw_data for held in first.initializer} == {
        held.name: held.raw_data for held in second.initializer
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [(torch.full((8, 3, 8, 8), torch.nan), "NaN"), (torch.zeros(8, 4, 8, 8), "x")],
)
def test_bad_calibration_data_is_one_clear_error(
    data: Tensor, message: str, exported: onnx.ModelProto
) -> None:
    with pytest.raises(TdpassError, match=message):
        compressed(exported, data=data)


def test_activations_that_are_always_zero_or_constant_are_served(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.fill_(-1.0)  # all zero behind the activation
        model.second.bias.fill_(0.5)
    artifact = compressed(to_onnx(model, images(2)))
    (found,) = tdpass.open_model(artifact.model).run(tdpass.models.base.Batch((images(),))).values()
    exact = model(images()).detach()
    assert float((found - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_old_opsets_say_what_to_do() -> None:
    weight = numpy_helper.from_array(torch.randn(6, 4).numpy(), "fc.weight")
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 4), ("y", 6))
    )
    bias = numpy_helper.from_array(np.zeros(6, np.float32), "fc.bias")
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], transB=1)],
        "g",
        [x],
        [y],
        [weight, bias],
    )
    old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    with pytest.raises(
        TdpassError,
        match="opset 11, in which DequantizeLinear takes no scale per channel; convert it to opset 13",
    ):
        compressed(old, data=torch.randn(16, 4))


@pytest.mark.parametrize("name", CALIBRATIONS.names())
def test_ranges_cover_what_counts(name: str) -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    values[:4] = (60.0, -60.0, 55.0, -55.0)
    seen = Histogram(float(values.min()), float(values.max()), np.zeros(BINS))
    seen.add(values)
    found = Range(*CALIBRATIONS.get(name)(seen))

    def error(kept: Range) -> float:
        codes = np.clip(np.rint(values[4:] / kept.scale) + kept.zero, 0, 255)
        return float((((codes - kept.zero) * kept.scale - values[4:]) ** 2).mean())

    whole = Range(seen.low, seen.high)
    assert error(found) <= error(whole) * (1 + 1e-9)
    if name != "minmax":
        assert error(found) < 0.6 * error(whole)
    one_sided = Histogram(
        0.0, 4.0, np.histogram(np.abs(values[4:]), bins=BINS, range=(0.0, 4.0))[0].astype(float)
    )
    assert CALIBRATIONS.get(name)(one_sided)[0] == 0.0
