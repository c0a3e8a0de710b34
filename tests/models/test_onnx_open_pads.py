"""Convolutions with `auto_pad` and open sizes: sites, exact whatever size comes, and left as they were."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import tdpass
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel

MODES = ("SAME_UPPER", "SAME_LOWER")
WINDOWS = [(1, 4, 2), (1, 1, 3), (1, 2, 3), (2, 3, 2), (2, 2, 2), (2, 4, 3), (2, 1, 2), (3, 3, 2), (3, 2, 3)]


def proto(axes: int, kernel: int, stride: int, mode: str, operator: str = "Conv") -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    held = {
        "w": rng.standard_normal((6, 6, *(kernel,) * axes)).astype(np.float32),
        "b": rng.standard_normal(6).astype(np.float32),
    }
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node(
            operator, ["r", "w", "b"], ["y"], name="layer", auto_pad=mode, strides=[stride] * axes
        ),
    ]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, ["N", 6, *(f"size{axis}" for axis in range(axes))])],
        [info("y", TensorProto.FLOAT, [None] * (2 + axes))], [numpy_helper.from_array(value, name) for name, value in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(axes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, 6, *(size + axis for axis in range(axes)), generator=generator) for size in (4, 5, 8)
    ]


def wanted(model: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(("window", "mode"), list(product(WINDOWS, MODES)))
def test_factors_pad_as_the_layer_did_at_every_size(
    window: tuple[int, int, int], mode: str, operator: str
) -> None:
    axes, kernel, stride = window
    if operator == "ConvTranspose" and kernel < stride:
        pytest.skip("it would make more positions than the kernel reaches, which ONNX leaves open")
    dense, sizes = proto(*window, mode, operator), images(axes)
    model = open_model(dense, Batch((sizes[0],)))
    (site,) = model.sites()
    for name in {"svd", "channel_svd", "tucker2", "cp"} & set(FORMATS.names()):
        fmt = FORMATS.get(name)
        if not (fmt.fits(site) and fmt.exact_at_full_rank):
            continue
        twin, rank = model.clone(), fmt.ranks(site)[-1]
        factors = fmt.factorize(model.weight("w"), site, rank)
        twin.replace("w", Layer(site, Form(name, rank), factors, model.bias("w")).to(torch.float32))
        onnx.checker.check_model(twin.unwrap(), full_check=True)
        for x in sizes:
            made = twin.run(Batch((x,)))
            assert isinstance(made, dict)
            torch.testing.assert_close(made["y"], wanted(dense, x), rtol=1e-4, atol=1e-4)


def test_a_layer_that_stays_dense_is_left_as_it_was() -> None:
    dense = proto(2, 3, 2, "SAME_UPPER")
    model = OnnxModel.open(dense)
    assert [site.name for site in model.sites()] == ["w"]
    kept = model.unwrap()
    assert [node.SerializeToString() for node in kept.graph.node] == [
        node.SerializeToString() for node in dense.graph.node
    ]
    assert [tensor.name for tensor in kept.graph.initializer] == ["w", "b"]


def test_compress_keeps_its_budget_on_images_of_other_sizes() -> None:
    dense, (x, *others) = proto(2, 3, 2, "SAME_LOWER"), images(2)
    small = tdpass.compress(dense, {"params": 0.7}, data=x, progress=False, cache=False, effort="fast")
    (choice,) = small.plan.choices
    assert choice.form.factored
    assert small.report.final.params <= 0.7 * small.report.original.params
    for other in others:
        assert wanted(small.model, other).shape == wanted(dense, other).shape
