"""LSTM, GRU and RNN nodes: every product is a site, as in torch, and nodes come back where they can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import svd, to_onnx
from torch import Tensor, nn

import tdpass
from tdpass.models import open_model, open_recurrent
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, SAMPLES, INPUTS, HIDDEN = 6, 3, 5, 4


@dataclass(frozen=True)
class Case:
    """A recurrent node in one of the ways in which it can be said."""

    operator: str
    direction: str = "forward"
    lengths: bool = False
    states: bool = False
    bias: bool = True
    opset: int = 17
    attributes: tuple[tuple[str, Any], ...] = ()

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    @property
    def outputs(self) -> list[str]:
        return ["y", "h", "c"][: 3 if self.operator == "LSTM" else 2]

    def proto(self, inputs: int = INPUTS, hidden: int = HIDDEN) -> onnx.ModelProto:
        rng, d, g = np.random.default_rng(2), self.directions, GATES[self.operator]
        held = {
            "W": rng.standard_normal((d, g * hidden, inputs)),
            "R": rng.standard_normal((d, g * hidden, hidden)),
        }
        if self.bias:
            held["B"] = rng.standard_normal((d, 2 * g * hidden))
        read = ["x", "W", "R", "B" if self.bias else "", "lengths" if self.lengths else ""]
        read += ["h0" if self.states else ""]
        read += ["c0"] if self.states and self.operator == "LSTM" else []
        kinds = {
            "x": (TensorProto.FLOAT, ["T", "N", inputs]),
            "lengths": (TensorProto.INT32, ["N"]),
            "h0": (TensorProto.FLOAT, [d, "N", hidden]),
            "c0": (TensorProto.FLOAT, [d, "N", hidden]),
        }
        node = helper.make_node(
            self.operator,
            read,
            self.outputs,
            name="rnn",
            hidden_size=hidden,
            direction=self.direction,
            **dict(self.attributes),
        )
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info(name, *kinds[name]) for name in kinds if name in read],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs],
            [numpy_helper.from_array((array / 2).astype(np.float32), name) for name, array in held.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def feed(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(3)
        made = {"x": rng.standard_normal((STEPS, SAMPLES, INPUTS)).astype(np.float32)}
        if self.lengths:
            made["lengths"] = np.array([STEPS, 2, 4], dtype=np.int32)
        if self.states:
            for name in ("h0", "c0") if self.operator == "LSTM" else ("h0",):
                made[name] = rng.standard_normal((self.directions, SAMPLES, HIDDEN)).astype(np.float32)
        return made

    def batch(self) -> Batch:
        return Batch((), {name: torch.from_numpy(array) for name, array in self.feed().items()})

    def opened(self) -> OnnxModel:
        return OnnxModel.open(self.proto(), self.batch())


AFTER = (("linear_before_reset", 1),)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"direction": "reverse"},
    "both": {"direction": "bidirectional"},
    "lengths": {"lengths": True, "direction": "bidirectional"},
    "states": {"states": True, "direction": "bidirectional"},
    "clip": {"attributes": (("clip", 0.3),)},
    "no_bias": {"bias": False},
    "opset_11": {"opset": 11},
    "opset_21": {"opset": 21, "lengths": True, "states": True},
}
CASES = {f"{operator}-{way}": Case(operator, **said) for operator in GATES for way, said in WAYS.items()}
CASES["GRU-after"] = Case("GRU", attributes=AFTER)
CASES["GRU-after_both"] = Case("GRU", "bidirectional", lengths=True, states=True, attributes=AFTER)
CASES["RNN-relu"] = Case("RNN", attributes=(("activations", ["Relu"]),))
QUICK = ("LSTM-lengths", "LSTM-both", "GRU-states", "GRU-after", "RNN-reverse")
each = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, case in CASES.items()
    ],
)


def run(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def close(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@each
def test_every_product_is_a_site_and_what_is_recorded_is_what_runs(case: Case) -> None:
    model = case.opened()
    parts = (
        ("input", "hidden", "hidden_new")
        if case.operator == "GRU" and case.attributes != AFTER
        else ("input", "hidden")
    )
    ends = {"forward": ("",), "reverse": ("_reverse",), "bidirectional": ("", "_reverse")}[case.direction]
    assert [site.name for site in model.sites()] == [f"rnn.{part}_l0{end}" for end in ends for part in parts]
    assert model.declined() == {}
    each_step = GATES[case.operator] * HIDDEN * (INPUTS + HIDDEN) * case.directions
    assert model.count(case.batch()).macs == STEPS * SAMPLES * each_step
    tape = model.record(case.batch())
    close([value.numpy() for value in tape.play().finish().values()], run(case.proto(), case.feed()))


@each
def test_what_is_left_dense_comes_back_as_it_was(case: Case) -> None:
    proto, made = case.proto(), case.opened().unwrap()
    assert [n.SerializeToString() for n in made.graph.node] == [
        n.SerializeToString() for n in proto.graph.node
    ]
    assert {t.SerializeToString() for t in made.graph.initializer} == {
        t.SerializeToString() for t in proto.graph.initializer
    }


@each
@pytest.mark.parametrize("part", ["input", "hidden", "rnn"])
def test_full_rank_of_some_or_all_products_changes_no_answer(case: Case, part: str) -> None:
    model = case.opened()
    for site in model.sites():
        if f".{part}" in site.name or part == "rnn":
            model.replace(site.name, svd(model, site.name, min(site.shape)))
    model.check()
    small = model.unwrap()
    close(run(small, case.feed()), run(case.proto(), case.feed()))
    kinds = {node.op_type for node in small.graph.node}
    assert (case.operator in kinds, "Scan" in kinds) == (part == "input", part != "input")
    tape = model.record(case.batch())
    close([value.numpy() for value in tape.play().finish().values()], run(small, case.feed()))


@pytest.mark.parametrize("operator", GATES)
def test_a_thinner_input_is_what_the_node_reads_and_nothing_dense_is_left(operator: str) -> None:
    case = Case(operator)
    model = OnnxModel.open(case.proto(24, 16), Batch((torch.randn(4, 2, 24),)))
    gates = GATES[operator] * 16
    dense = model.params()
    model.replace("rnn.input_l0", svd(model, "rnn.input_l0", 2))
    small = model.unwrap()
    assert dense - model.params() == gates * 24 - 2 * (gates + 24)
    assert {t.name: list(t.dims) for t in small.graph.initializer} == {
        "rnn.input_l0.v": [24, 2],
        "rnn.input_l0.w": [1, gates, 2],
        "rnn.input_l0.r": [1, gates, 16],
        "rnn.input_l0.b": [1, 2 * gates],
    }
    assert model.count().macs == 4 * 2 * (24 * 2 + 2 * gates + 16 * gates)


@pytest.mark.parametrize(
    ("attributes", "read", "reason"),
    [
        ((), "x W R B   p", "peepholes"),
        ((("input_forget", 1),), "x W R B", "coupled"),
        ((("activations", ["HardSigmoid", "Tanh", "Tanh"]),), "x W R B", "not the usual ones"),
        ((("layout", 1),), "x W R B", "axis is that of samples"),
        ((), "x W R b", "computed while it runs"),
    ],
)
def test_what_no_cell_here_computes_is_left_with_the_reason(
    attributes: tuple[tuple[str, Any], ...], read: str, reason: str
) -> None:
    case = Case("LSTM", attributes=attributes)
    proto = case.proto()
    del proto.graph.node[0].input[:]
    places = read.split(" ")
    proto.graph.node[0].input.extend([*places[:4], "", "", "", "p"] if "p" in places else places)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3 * HIDDEN), np.float32), "p"))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1), np.float32), "zero"))
    if "b" in places:
        proto.graph.node.insert(0, helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0))
        proto.graph.node.insert(1, helper.make_node("Add", ["B", "s"], ["b"]))
    model = OnnxModel.open(proto)
    assert model.sites() == []
    assert any(reason in text for text in model.declined().values()), model.declined()


class Reader(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.enc = kind(12, 16, batch_first=True, **options)
        self.fc = nn.Linear(32 if options.get("bidirectional") else 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.enc(x)[0][:, -1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"bidirectional": True}),
        pytest.param(nn.LSTM, {"num_layers": 2}, marks=pytest.mark.slow),
        pytest.param(nn.GRU, {"num_layers": 2, "bidirectional": True}, marks=pytest.mark.slow),
    ],
)
def test_one_plan_serves_the_torch_model_and_its_export(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    net, x = Reader(kind, **options).eval(), torch.randn(8, 3, 12)
    proto = to_onnx(net, x[:2])
    ours, theirs = open_model(open_recurrent(net), Batch((x,))), open_model(proto, Batch((x,)))
    assert {site.name: site.geometry() for site in ours.sites()} == {
        site.name: site.geometry() for site in theirs.sites()
    }
    for site in ours.sites():
        torch.testing.assert_close(ours.weight(site.name), theirs.weight(site.name))
    small = tdpass.compress(
        net, {"params": 0.6}, x, effort="fast", progress=False, pipeline="divide,plan,factorize"
    )
    other = tdpass.compress(proto, plan=small.plan, data=x, progress=False, pipeline="factorize")
    with torch.no_grad():
        wanted = small.model(x).numpy()
    (answer,) = run(other.model, {proto.graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(answer, wanted, rtol=1e-3, atol=1e-4)
    again = tdpass.compress(net, plan=other.plan, data=x, progress=False, pipeline="factorize")
    with torch.no_grad():
        np.testing.assert_allclose(again.model(x).numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_a_recurrent_node_in_a_branch_is_opened_there() -> None:
    case = Case("LSTM")
    inner = case.proto().graph
    del inner.input[:]
    other = helper.make_graph(
        [helper.make_node("Identity", ["zero"], ["no"])], "other",
        [], [helper.make_tensor_value_info("no", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "zero")],
    )  # fmt: skip
    del inner.output[1:]
    outer = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
            helper.make_node("Less", ["s", "most"], ["low"]),
            helper.make_node("If", ["low"], ["out"], then_branch=inner, else_branch=other),
        ],
        "outer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "N", INPUTS])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(1e9, np.float32), "most")],
    )
    proto = helper.make_model(outer, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = case.feed()
    model = OnnxModel.open(proto, case.batch())
    assert [site.name for site in model.sites()] == ["rnn.input_l0", "rnn.hidden_l0"]
    for name in ("rnn.input_l0", "rnn.hidden_l0"):
        model.replace(name, svd(model, name, 5 if "input" in name else 4))
        close(run(model.unwrap(), x), run(proto, x))


def test_steps_that_read_integers_are_recorded_again() -> None:
    proto = Case("LSTM", opset=11).proto(24, 32)
    x = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(0))
    steps = "divide,plan{params=0.6},factorize,quantize,quantize-activations{calibration=dynamic}"
    once = tdpass.compress(proto, None, [x], pipeline=steps, formats=["tensor_train"], cache=False)
    scans = [node for node in once.model.graph.node if node.op_type == "Scan"]
    (body,) = (helper.get_attribute_value(held) for held in scans[0].attribute if held.name == "body")
    assert all(len(made.type.tensor_type.shape.dim) == 2 for made in body.output)
    again = tdpass.compress(once.model, None, [x], pipeline="quantize,verify", cache=False)
    close(run(again.model, {"x": x.numpy()}), run(once.model, {"x": x.numpy()}))
