"""Every way in which a ConvTranspose node may say how much it makes, against ONNX Runtime."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import from_numpy

from tdpass.formats.geometry import apply_dense
from tdpass.models import open_model
from tdpass.ops import TorchOps

SIZE = 5
MODES = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


def attributes(mode: str) -> list[dict[str, Any]]:
    """Kernels, strides, dilations and output paddings with every kind of padding that goes with the mode."""
    found = []
    for kernel, stride, dilation, extra in itertools.product((2, 3, 4), (1, 2, 3), (1, 2), (0, 1)):
        plain = {
            "auto_pad": mode,
            "kernel_shape": [kernel],
            "strides": [stride],
            "dilations": [dilation],
            "output_padding": [extra],
        }
        if extra >= max(stride, dilation):
            continue
        paddings = [{"pads": pads} for pads in ((0, 0), (1, 0), (0, 1))] if mode == "NOTSET" else [{}]
        shapes = [{"output_shape": [SIZE * stride + more]} for more in (0, -1)]
        found += [{**plain, **choice} for choice in (*paddings, *shapes)]
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_node_is_read_as_the_runtime_computes_it_or_left_alone(mode: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, SIZE)).astype(np.float32)
    agreed = 0
    for given in attributes(mode):
        weight = rng.standard_normal((3, 2, *given["kernel_shape"])).astype(np.float32)
        graph = helper.make_graph(
            [helper.make_node("ConvTranspose", ["x", "w"], ["y"], **given)],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(weight, "w")],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            (wanted,) = session.run(None, {"x": x})
        except Exception:  # noqa: BLE001 - the runtime refuses the node, so that nothing is to be compared
            continue
        sites = open_model(proto).sites()
        if not sites:
            continue
        agreed += 1
        answered = apply_dense(
            TorchOps(), from_numpy(x), from_numpy(weight).transpose(0, 1), None, sites[0]
        ).numpy()
        np.testing.assert_allclose(answered, wanted, rtol=1e-4, atol=1e-5, err_msg=str(given))
    assert agreed >= 30
