"""Systolic arrays against zigzag-dse, which searches loop orders and overlaps: extra `simulators`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tdpass.targets.systolic import SystolicArray
from tdpass.targets.workload import Product

zigzag = pytest.importorskip("zigzag")
pytestmark = pytest.mark.slow

# (input channels, output channels, output extent, kernel extent), among them both halves of a factored layer.
SHAPES = [(64, 64, 56, 3), (128, 128, 28, 3), (256, 256, 14, 3), (32, 128, 28, 1), (256, 64, 14, 1)]


def _layer(before: int, after: int, extent: int, kernel: int) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.zeros((after, before, kernel, kernel), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[kernel // 2] * 4, kernel_shape=[kernel] * 2)
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, extent, extent])
        for name, channels in (("x", before), ("y", after))
    ]
    graph = helper.make_graph([node], "layer", values[:1], values[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def _found(model: onnx.ModelProto, folder: Path) -> float:
    from zigzag.api import get_hardware_performance_zigzag

    inputs = Path(zigzag.__file__).parent / "inputs"
    _, cycles, _ = get_hardware_performance_zigzag(
        model,
        str(inputs / "hardware" / "tpu_like.yaml"),
        str(inputs / "mapping" / "tpu_like.yaml"),
        dump_folder=str(folder),
        lpf_limit=4,
        loma_show_progress_bar=False,
    )
    return float(cycles)


@pytest.mark.filterwarnings("ignore")
def test_cycles_are_near_those_that_a_search_finds_and_order_layers_alike(tmp_path: Path) -> None:
    array = SystolicArray.load("tpu_like")
    ours, theirs = [], []
    for before, after, extent, kernel in SHAPES:
        pixels = extent * extent
        product = Product(pixels, before * kernel**2, after, 1, before * pixels, after * pixels)
        ours.append(array.cycles(product))
        theirs.append(_found(_layer(before, after, extent, kernel), tmp_path))
    assert ours == pytest.approx(theirs, rel=0.2)
