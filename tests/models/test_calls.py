"""Data as calls of a model: a sample is what the model answers by itself, wherever its axis lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import node, weight
from torch import Tensor, nn
from torch.export import Dim

import tdpass
from tdpass.cli import main
from tdpass.data import calls_of
from tdpass.errors import InvalidModelError, UsageError
from tdpass.models import Batch, Model, open_model

Size = int | str | None
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
STATE = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(2))


def graph(
    nodes: list[onnx.NodeProto], constants: Mapping[str, np.ndarray], inputs: Mapping[str, tuple[Size, ...]],
    outputs: Mapping[str, tuple[Size, ...]], types: Mapping[str, int] = {},
) -> onnx.ModelProto:  # fmt: skip
    """A model of these nodes; inputs and outputs are float where `types` says nothing."""

    def infos(values: Mapping[str, tuple[Size, ...]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape)
            for name, shape in values.items()
        ]

    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def recurrent(n: Size) -> onnx.ModelProto:
    """One step of a small recurrent net: x [n, 16], state [2, n, 12] and a sample rate.

    Answers y [n, 5] and the next state.
    """
    rng = np.random.default_rng(0)
    constants = {
        "w": weight(16, 12, rng=rng),
        "u": weight(12, 12, rng=rng),
        "v": weight(12, 5, rng=rng),
        "first": np.array([0], np.int64),
        "khz": np.array(16000.0, np.float32),
        "axes": np.array([0], np.int64),
    }
    nodes = [
        node("Cast", "rate", "r", to=TensorProto.FLOAT),
        node("Div", "r khz", "scale"),
        node("Mul", "x scale", "scaled"),
        node("Gather", "state first", "h0", axis=0),
        node("Squeeze", "h0 axes", "h"),
        node("MatMul", "scaled w", "a"),
        node("MatMul", "h u", "b"),
        node("Add", "a b", "s"),
        node("Tanh", "s", "t"),
        node("MatMul", "t v", "y"),
        node("Unsqueeze", "t axes", "t0"),
        node("Concat", "t0 t0", "next", axis=0),
    ]
    inputs: dict[str, tuple[Size, ...]] = {"x": (n, 16), "state": (2, n, 12), "rate": ()}
    return graph(nodes, constants, inputs, {"y": (n, 5), "next": (2, n, 12)}, {"rate": TensorProto.INT64})


def image_net(n: Size, height: Size = 8, classes: int = 5) -> onnx.ModelProto:
    nodes = [
        node("Conv", "x c", "h", pads=[1, 1, 1, 1]), node("Relu", "h", "r"),
        node("GlobalAveragePool", "r", "p"), node("Flatten", "p", "f"), node("MatMul", "f w"),
    ]  # fmt: skip
    rng = np.random.default_rng(3)
    return graph(
        nodes,
        {"c": weight(8, 3, 3, 3, rng=rng), "w": weight(8, classes, rng=rng)},
        {"x": (n, 3, height, height)},
        {"y": (n, classes)},
    )


def time_first(n: Size, steps: Size) -> onnx.ModelProto:
    """x [n, steps, 8] to scores [steps, n, 6], the batch on another axis of the output."""
    rng = np.random.default_rng(4)
    nodes = [
        node("MatMul", "x w", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r v", "s"),
        node("Transpose", "s", "y", perm=[1, 0, 2]),
    ]
    return graph(
        nodes,
        {"w": weight(8, 16, rng=rng), "v": weight(16, 6, rng=rng)},
        {"x": (n, steps, 8)},
        {"y": (steps, n, 6)},
    )


def sizes(model: object, data: object, samples: int = 512) -> list[int]:
    return [call.size for call in calls_of(open_model(model), data, samples)[0]]


def answers(model: Model, calls: list[Batch], name: str, axis: int = 0) -> Tensor:
    return torch.cat([model.run(call)[name] for call in calls], axis)  # type: ignore[index]


@pytest.mark.parametrize("n", ["n", "anything", None, -1])
def test_samples_lie_along_any_axis_that_the_model_leaves_open(n: Size) -> None:
    model = open_model(recurrent(n))
    (call,), notes = calls_of(model, {"x": X, "state": STATE, "rate": 16000})
    assert (call.size, call.sample_axes, notes) == (8, (0, 1, None), [])
    assert model.record(call).batch_size == 8
    model.observe(call)
    assert model.macs() == 16 * 12 + 12 * 12 + 12 * 5


@pytest.mark.parametrize(
    "rate", [16000, np.int64(16000), torch.tensor(16000), torch.full((8,), 16000), np.int32(16000)]
)
def test_a_fixed_batch_of_one_is_called_once_per_sample(rate: object) -> None:
    dynamic, fixed = open_model(recurrent("n")), open_model(recurrent(1))
    data = {"x": X.numpy(), "state": STATE.numpy(), "rate": rate}
    calls, _ = calls_of(fixed, data)
    assert [(call.size, call.divisible) for call in calls] == [(1, False)] * 8
    together = dynamic.run(Batch((X, STATE, torch.tensor(16000))))
    for name, axis in (("y", 0), ("next", 1)):
        assert torch.allclose(answers(fixed, calls, name, axis), together[name], atol=1e-5)


def test_a_scalar_that_differs_between_samples_makes_calls_of_one() -> None:
    model = open_model(recurrent("n"))
    calls, _ = calls_of(model, {"x": X, "state": STATE, "rate": torch.arange(1, 9) * 1000})
    assert [int(call.kwargs["rate"]) for call in calls] == list(range(1000, 9000, 1000))
    assert all(
        torch.equal(call.kwargs["state"], STATE[:, index : index + 1]) for index, call in enumerate(calls)
    )


@pytest.mark.parametrize("n", ["n", 1])
def test_an_iterable_of_single_samples_is_put_together_where_the_model_allows_it(n: Size) -> None:
    items = [{"x": X[i].numpy(), "state": STATE[:, i].numpy(), "rate": 8000} for i in range(8)]
    calls, _ = calls_of(open_model(recurrent(n)), items)
    assert [call.size for call in calls] == ([8] if n == "n" else [1] * 8)
    assert torch.equal(torch.cat([call.kwargs["state"] for call in calls], 1), STATE)


def test_whole_calls_stacked_along_an_axis_more_are_taken_apart() -> None:
    stacked = {"x": X[:, None], "state": STATE.permute(1, 0, 2)[:, :, None], "rate": np.full(8, 16000)}
    calls, _ = calls_of(open_model(recurrent(1)), stacked)
    assert torch.equal(torch.cat([call.kwargs["state"] for call in calls], 1), STATE)


def test_outputs_may_hold_the_batch_along_another_axis() -> None:
    x = torch.randn(6, 7, 8)
    for n, expected in (("n", [6]), (1, [1] * 6), (2, [2] * 3)):
        model = open_model(time_first(n, "t"))
        calls, _ = calls_of(model, x)
        assert [call.size for call in calls] == expected
        assert torch.allclose(
            answers(model, calls, "y", 1), open_model(time_first("n", "t")).run(Batch((x,)))["y"], atol=1e-5
        )  # type: ignore[index]


@pytest.mark.parametrize("axis", [True, False])
def test_an_open_length_beside_a_fixed_batch_holds_no_samples(axis: bool) -> None:
    lengths = [torch.randn(*((1,) if axis else ()), steps, 8) for steps in (7, 9, 7)]
    model = open_model(time_first(1, "t"))
    calls, notes = calls_of(model, lengths)
    assert [(call.size, call.args[0].shape[1]) for call in calls] == [(1, 7), (1, 9), (1, 7)]
    assert notes == []
    model.observe(calls[0])
    assert model.macs() == 7 * (8 * 16 + 16 * 6)


@pytest.mark.parametrize("axis", [True, False], ids=["with the axis of samples", "without"])
def test_samples_of_different_sizes_are_batched_by_size(axis: bool) -> None:
    images = [torch.randn(*((1,) if axis else ()), 3, side, side) for side in (8, 10, 8, 9, 10, 8)]
    calls, _ = calls_of(open_model(image_net("n", "s")), images)
    assert sorted((call.size, call.args[0].shape[-1]) for call in calls) == [(1, 9), (2, 10), (3, 8)]
    assert sizes(image_net(1, "s"), images) == [1] * 6


def test_no_more_samples_are_taken_than_asked_for() -> None:
    images = torch.randn(150, 3, 8, 8)
    assert sizes(image_net("n"), images) == [64, 64, 22]
    assert sizes(image_net("n"), images, 70) == [64, 6]
    assert sizes(image_net("n"), (image for image in images), 70) == [64, 6]
    assert sizes(image_net(1), images, 5) == [1] * 5
    assert sizes(image_net(4), images, 10) == [4, 4]
    assert sizes(image_net(4), images, 3) == [4]


class Tagger(nn.Module):
    """Tokens and a mask to scores per token; takes labels it does not need where `labels` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.head(
            torch.relu(self.hidden(x if attention_mask is None else x * attention_mask[..., None]))
        )


def exported(module: nn.Module, *args: Tensor, dynamic: Any) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), args, dynamic_shapes=dynamic)


def test_named_values_that_the_model_does_not_take_are_left_out_with_a_note() -> None:
    tokens = torch.randint(0, 30, (6, 9))
    data = {
        "input_ids": tokens,
        "attention_mask": torch.ones(6, 9, dtype=torch.int64),
        "labels": torch.zeros(6),
        "text": ["a"] * 6,
    }
    calls, notes = calls_of(open_model(Tagger().eval()), data)
    assert [set(call.kwargs) for call in calls] == [{"input_ids", "attention_mask"}]
    assert [note.split("'")[1] for note in notes] == ["labels", "text"]
    report = tdpass.compress(Tagger().eval(), {"params": 0.9}, data, formats=["svd"]).report
    assert set(notes) <= set(report.notes)


def test_single_samples_of_a_module_are_put_together_too() -> None:
    items = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}, {"input_ids": [6, 7, 8]}]
    calls, _ = calls_of(open_model(Conv()), [torch.randn(3, 8, 8) for _ in range(5)])
    assert [tuple(call.args[0].shape) for call in calls] == [(5, 3, 8, 8)]
    assert sum(call.size for call in calls_of(open_model(Tagger().eval()), items)[0]) in (3, 8)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((-2, -1)))


class TimeFirst(nn.Module):
    """A recurrent net that reads [steps, n, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 10)
        self.head = nn.Linear(10, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class WholeBatch(nn.Module):
    """Answers that depend on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.softmax(self.body(x), 0))


class Squeezing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 10)
        self.head = nn.Linear(10, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x))).squeeze()


class OneOnly(nn.Module):
    """A net that was written for one sample in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(18, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(1, 18))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.eval()

    def forward(self, state: Tensor, x: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.inner(x * (rate / 16000)) + self.outer(state[0]))
        return torch.stack([h, state[0]]), self.head(h)


@pytest.mark.parametrize(
    ("module", "data", "expected", "axes"),
    [
        (Conv(), torch.randn(70, 3, 8, 8), [64, 6], (0,)),
        (TimeFirst(), torch.randn(5, 70, 6), [64, 6], (1,)),
        (WholeBatch(), torch.randn(70, 6), [1], (None,)),
        (Squeezing(), torch.randn(65, 6), [65], (0,)),
        (OneOnly(), torch.randn(3, 3, 6), [1, 1, 1], (0,)),
        (Stateful(), {"state": STATE, "x": X, "rate": 16000}, [8], (1, 0, None)),
        (Stateful(), (STATE[:, :2], X[:2], torch.tensor(16000)), [2], (1, 0, None)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_is_cut_where_running_it_shows_that_samples_are_apart(
    module: nn.Module, data: object, expected: list[int], axes: tuple[int | None, ...]
) -> None:
    calls, notes = calls_of(open_model(module), data)
    assert [call.size for call in calls] == expected
    assert {call.sample_axes for call in calls} == {axes}
    assert bool(notes) == isinstance(module, WholeBatch)


def test_exported_programs_say_which_sizes_are_open() -> None:
    n = Dim("n", min=2, max=512)
    dynamic = exported(Stateful(), STATE, X, torch.tensor(16000), dynamic=({1: n}, {0: n}, None))
    fixed = exported(Stateful(), STATE[:, :2], X[:2], torch.tensor(16000), dynamic=None)
    for program, expected in ((dynamic, [8]), (fixed, [2, 2, 2, 2])):
        calls, _ = calls_of(open_model(program), (STATE, X, torch.tensor(16000)))
        assert [call.size for call in calls] == expected
        assert {call.sample_axes for call in calls} == {(1, 0, None)}


@pytest.mark.parametrize("memory", ["2GiB", "1KiB"])
def test_calls_of_a_fixed_size_stay_whole_in_little_memory(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDPASS_MEMORY", memory)
    result = tdpass.compress(image_net(4), {"macs": 0.8}, torch.randn(12, 3, 8, 8), formats=["channel_svd"])
    assert result.report.checks["samples"] == (12 if memory == "2GiB" else 4)


def test_a_whole_run_on_a_recurrent_net_of_a_fixed_batch_is_as_small_as_on_a_batch() -> None:
    data = {"x": X, "state": STATE, "rate": 16000}
    results = [tdpass.compress(recurrent(n), {"macs": 0.7}, data, formats=["svd"]) for n in ("n", 1)]
    costs = [(result.report.original.macs, result.report.final.macs) for result in results]
    assert costs[0][0] == costs[1][0] == 16 * 12 + 12 * 12 + 12 * 5
    assert all(final <= 0.7 * original for original, final in costs)
    assert [result.report.checks["samples"] for result in results] == [8, 8]


@pytest.mark.parametrize(
    ("declared", "given"),
    [
        (TensorProto.FLOAT16, torch.float32), (TensorProto.FLOAT16, torch.float64),
        (TensorProto.FLOAT, torch.float16), (TensorProto.DOUBLE, torch.float32),
        (TensorProto.FLOAT, torch.float64), (TensorProto.FLOAT, torch.bfloat16),
    ],
)  # fmt: skip
def test_floats_of_another_precision_are_converted(declared: int, given: torch.dtype) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(declared)
    constants = {
        name: weight(*shape).astype(dtype)
        for name, shape in {"a": (16, 24), "c": (24,), "b": (24, 8), "d": (8,)}.items()
    }
    types = {"x": declared, "y": declared}
    proto = graph(
        [node("Gemm", "x a c", "h"), node("Relu", "h", "r"), node("Gemm", "r b d")],
        constants,
        {"x": ("n", 16)},
        {"y": ("n", 8)},
        types,
    )
    (call,), _ = calls_of(open_model(proto), X.to(given))
    assert torch.equal(call.args[0], X.to(given).to(torch.from_numpy(np.zeros(0, dtype)).dtype))
    result = tdpass.compress(
        proto, {"macs": 0.8}, X.to(given), formats=["svd"], pipeline="plan,factorize,verify"
    )
    assert 0 < result.report.final.macs <= 0.8 * result.report.original.macs == 0.8 * (16 * 24 + 24 * 8)
    assert result.report.checks["samples"] == 8


def test_whole_numbers_of_another_width_are_converted_where_they_fit() -> None:
    rng = np.random.default_rng(5)
    nodes = [node("Gather", "table ids", "e"), node("MatMul", "e w")]
    constants = {"table": weight(50, 16, rng=rng), "w": weight(16, 16, rng=rng)}
    proto = graph(nodes, constants, {"ids": ("n", "s")}, {"y": ("n", "s", 16)}, {"ids": TensorProto.INT32})
    ids = torch.randint(0, 50, (4, 7))
    for given in (torch.int64, torch.uint8, torch.int16):
        (call,), _ = calls_of(open_model(proto), ids.to(given))
        assert torch.equal(call.args[0], ids.int())
    with pytest.raises(InvalidModelError, match="int32 cannot hold"):
        calls_of(open_model(proto), ids + 2**40)
    with pytest.raises(InvalidModelError, match="whole numbers"):
        calls_of(open_model(proto), ids.float())


def test_images_of_bytes_are_an_error_that_says_what_to_do() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    for model in (image_net("n"), image_net(1), Conv()):
        with pytest.raises(InvalidModelError, match="255, then normalised"):
            calls_of(open_model(model), images)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (torch.randn(2, 3, 9, 9), r"input 'x' is \[2, 3, 9, 9\]; the model takes x: float32 \[1, 3, 8, 8\]"),
        (torch.randn(2, 1, 8, 8), r"input 'x' is \[2, 1, 8, 8\]"),
        (torch.randn(3), "the model takes x"),
        ({"y": torch.randn(1, 3, 8, 8), "z": torch.randn(1, 3, 8, 8)}, "no input 'y'"),
        ([], "empty"),
    ],
)
def test_what_does_not_fit_a_fixed_size_is_one_error(data: object, error: str) -> None:
    with pytest.raises((InvalidModelError, UsageError), match=error):
        [open_model(image_net(1)).run(call) for call in calls_of(open_model(image_net(1)), data)[0]]


@pytest.mark.parametrize("model", [image_net(1), image_net(4), image_net("n")])
def test_example_inputs_need_a_shape_but_no_matching_batch(model: onnx.ModelProto) -> None:
    for count in (1, 3, 8):
        opened = open_model(model, torch.randn(count, 3, 8, 8))
        assert all(site.seen for site in opened.sites())
        assert opened.macs() == 8 * 27 * 64 + 8 * 5


@pytest.mark.parametrize("given", [[], ["--input", "8x3x8x8"], ["--input", "1x3x8x8"]])
@pytest.mark.parametrize("n", [1, 4, "n"])
def test_inspect_counts_for_any_batch(
    n: Size, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(image_net(n), tmp_path / "model.onnx")
    assert main(["inspect", str(tmp_path / "model.onnx"), *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == 8 * 27 * 64 + 8 * 5
