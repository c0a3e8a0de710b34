"""DynamicQuantizeLSTM: left right, and made an LSTM again when asked.

Also what int8 in dynamic ranges makes of an LSTM.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_onnx_recurrent import Case

import tdpass
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel

quantization = pytest.importorskip("onnxruntime.quantization")
PIPELINE = "quantize,quantize-activations{calibration=dynamic}"
CASES = {
    "forward": Case("LSTM"),
    "both-states": Case("LSTM", direction="bidirectional", states=True),
    "reverse-no-bias": Case("LSTM", direction="reverse", bias=False),
    "lengths": Case("LSTM", lengths=True),
}


def answers(model: onnx.ModelProto, case: Case) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, case.feed()), strict=True))


def near(found: dict[str, np.ndarray], exact: dict[str, np.ndarray], share: float) -> bool:
    return all(np.abs(found[name] - exact[name]).max() <= share * np.abs(exact[name]).max() for name in exact)


def op_types(model: onnx.ModelProto) -> list[str]:
    return [each.op_type for each in model.graph.node]


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["forward", "both-states"])
def test_what_onnx_runtime_quantized_is_declined_and_becomes_an_lstm_when_asked(
    name: str, per_channel: bool, kind: str, tmp_path: Path
) -> None:
    case = CASES[name]
    onnx.save(case.proto(), tmp_path / "dense.onnx")
    given, made = tmp_path / "dense.onnx", tmp_path / "quantized.onnx"
    weights = quantization.QuantType[kind]
    quantization.quantize_dynamic(given, made, per_channel=per_channel, weight_type=weights)
    quantized = onnx.load(made)
    assert "DynamicQuantizeLSTM" in op_types(quantized)
    declined = OnnxModel.open(quantized).declined()
    assert set(declined.values()) == {next(iter(declined.values()))}
    assert all("the weight is quantized" in why for why in declined.values())
    plain = tdpass.dequantize(quantized)
    assert isinstance(plain, onnx.ModelProto)
    assert "LSTM" in op_types(plain)
    assert "DynamicQuantizeLSTM" not in op_types(plain)
    exact = answers(case.proto(), case)
    assert near(answers(plain, case), exact, 0.05)
    assert len(OnnxModel.open(plain).sites()) == 2 * case.directions


@pytest.mark.parametrize("name", CASES)
def test_int8_in_dynamic_ranges_is_one_node_that_onnx_runtime_runs(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    data = {key: torch.from_numpy(array) for key, array in case.feed().items()}
    exact = answers(case.proto(), case)
    made = tdpass.compress(case.proto(), None, [Batch((), data)], pipeline=PIPELINE, cache=False).model
    assert isinstance(made, onnx.ModelProto)
    assert "DynamicQuantizeLSTM" in op_types(made)
    assert "Scan" not in op_types(made)
    assert near(answers(made, case), exact, 0.05)
    again = OnnxModel.open(made)
    assert again.params() == OnnxModel.open(case.proto()).params()
    assert near(answers(tdpass.dequantize(made), case), exact, 0.05)


def test_other_cells_stay_as_they_were_written() -> None:
    case = Case("GRU", attributes=(("linear_before_reset", 1),))
    data = {key: torch.from_numpy(array) for key, array in case.feed().items()}
    made = tdpass.compress(case.proto(), None, [Batch((), data)], pipeline=PIPELINE, cache=False).model
    assert "Scan" in op_types(made)
    assert near(answers(made, case), answers(case.proto(), case), 0.05)
