"""`OnnxModel` as the passes use it: every way in and out, replacing, biases, batch-norms, counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import model_of, network, node, positive, same, svd, weight
from torch import Tensor

from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models.base import Batch
from tdpass.models.onnx.model import OnnxModel
from tdpass.site import Site

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = Batch((X,))


def whole(weight: Tensor) -> dict[str, Tensor]:
    """The one factor of the format that keeps a weight as it is."""
    (name,) = FORMATS.get("dense").shapes(Site("", "linear", (1, 1)), ())
    return {name: weight}


def as_path(tmp_path: Path) -> Path:
    onnx.save(network(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def as_graphsurgeon(_: Path) -> Any:
    return pytest.importorskip("onnx_graphsurgeon").import_onnx(network())


SOURCES = {
    "path": (as_path, ir.Model),
    "text_path": (lambda tmp_path: str(as_path(tmp_path)), ir.Model),
    "proto": (lambda _: network(), onnx.ModelProto),
    "ir": (lambda _: ir.from_proto(network()), ir.Model),
    "graphsurgeon": (as_graphsurgeon, None),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_goes_in_comes_out(kind: str, tmp_path: Path) -> None:
    make, returned = SOURCES[kind]
    source = make(tmp_path)
    wanted = OnnxModel.open(network()).run(BATCH)
    model = OnnxModel.open(source)
    assert [site.name for site in model.sites()] == ["conv", "fc"]
    assert same(model.run(BATCH), wanted)
    model.replace("fc", svd(model, "fc", 5))
    result = model.unwrap()
    assert isinstance(result, returned or type(source))
    again = OnnxModel.open(result)
    assert [site.name for site in again.sites()] == ["conv", "fc.v", "fc.u"]
    assert same(again.run(BATCH), wanted)
    untouched = OnnxModel.open(source)
    assert [site.name for site in untouched.sites()] == ["conv", "fc"]


def test_everything_else_is_kept() -> None:
    proto = network()
    model = OnnxModel.open(proto)
    model.replace("fc", svd(model, "fc", 2))
    result = model.unwrap()
    assert [(entry.key, entry.value) for entry in result.metadata_props] == [("author", "someone")]
    assert (result.doc_string, result.graph.doc_string, result.producer_name) == (
        "a model",
        "a graph",
        "a producer",
    )
    kept = next(n for n in result.graph.node if n.op_type == "Relu")
    assert (kept.doc_string, kept.metadata_props[0].value) == ("a node", "somewhere")
    assert result.opset_import == proto.opset_import
    assert result.ir_version == proto.ir_version
    assert result.graph.input == proto.graph.input
    assert result.graph.output == proto.graph.output
    names = {name for n in result.graph.node for name in (*n.input, *n.output)}
    assert {value.name for value in result.graph.value_info} <= names
    assert {tensor.name for tensor in result.graph.initializer} <= names


def test_replacing_again_leaves_no_trace() -> None:
    model = OnnxModel.open(network())
    model.replace("fc", svd(model, "fc", 2))
    first = model.run(BATCH)
    model.replace("fc", svd(model, "fc", 5))
    assert not same(model.run(BATCH), first)
    assert same(model.run(BATCH), OnnxModel.open(network()).run(BATCH))
    once = OnnxModel.open(network())
    once.replace("fc", svd(once, "fc", 5))
    assert model.unwrap() == once.unwrap()
    layer = model.layer("fc")
    assert layer is not None
    assert layer.rank == (5,)
    assert model.layer("conv") is None
    assert torch.equal(model.weight("fc"), once.weight("fc"))


def test_clone_is_independent() -> None:
    model = OnnxModel.open(network())
    model.observe(BATCH)
    twin = model.clone()
    twin.replace("fc", svd(twin, "fc", 1))
    twin.fold_batchnorm()
    assert model.layer("fc") is None
    assert model.bias("conv") is None
    assert same(model.run(BATCH), OnnxModel.open(network()).run(BATCH))
    assert [site.extents for site in twin.sites()] == [site.extents for site in model.sites()]


def test_wrong_replacements_are_refused() -> None:
    model = OnnxModel.open(network())
    layer = svd(model, "fc", 2)
    with pytest.raises(PlanError, match=r"no site 'nothing'.*conv, fc"):
        model.replace("nothing", layer)
    with pytest.raises(PlanError, match="but site 'conv' is"):
        model.replace("conv", layer)
    with pytest.raises(PlanError, match=r"'svd 3' wants"):
        model.replace("fc", Layer(layer.site, Form("svd", (3,)), layer.factors))
    with pytest.raises(PlanError, match="bias of shape"):
        model.replace("fc", Layer(layer.site, Form("svd", (2,)), layer.factors, torch.zeros(4)))


def test_layer_bias_replaces_the_bias() -> None:
    model = OnnxModel.open(network())
    wanted = model.run(BATCH)["y"] + 1
    bias = model.bias("fc")
    assert bias is not None
    model.replace("fc", svd(model, "fc", 5, bias + 1))
    assert torch.equal(model.bias("fc"), bias)
    assert torch.equal(model.layer("fc").bias, bias + 1)
    assert torch.allclose(model.run(BATCH)["y"], wanted, atol=1e-5)
    assert torch.allclose(model.record(BATCH).play().finish()["y"], wanted, atol=1e-5)


STATISTICS = {"g": positive(4), "s": weight(4), "m": weight(4), "v": positive(4)}
NORM_CASES = {
    "conv": (
        [node("Conv", "x w", "h"), node("BatchNormalization", "h g s m v")],
        {"w": weight(4, 3, 3, 3)},
        ("N", 3, 5, 5),
    ),
    "conv_bias": (
        [node("Conv", "x w b", "h"), node("BatchNormalization", "h g s m v", "n"), node("Relu", "n")],
        {"w": weight(4, 3, 3, 3), "b": weight(4)},
        ("N", 3, 5, 5),
    ),
    "shared_bias": (
        [
            node("Conv", "x w b", "h"),
            node("BatchNormalization", "h g s m v", "n"),
            node("Reshape", "b f", "c"),
            node("Mul", "n c"),
        ],
        {"w": weight(4, 3, 3, 3), "b": weight(4), "f": np.array([1, 4, 1, 1])},
        ("N", 3, 5, 5),
    ),
    "gemm_without_c": (
        [node("Gemm", "x w", "h"), node("BatchNormalization", "h g s m v")],
        {"w": weight(6, 4)},
        ("N", 6),
    ),
    "gemm": (
        [node("Gemm", "x w b", "h", alpha=2.0, beta=3.0), node("BatchNormalization", "h g s m v")],
        {"w": weight(6, 4), "b": weight(4)},
        ("N", 6),
    ),
    "matmul": (
        [node("MatMul", "x w", "h"), node("BatchNormalization", "h g s m v")],
        {"w": weight(6, 4)},
        ("N", 6),
    ),
    "matmul_add": (
        [node("MatMul", "x w", "h"), node("Add", "h b", "a"), node("BatchNormalization", "a g s m v")],
        {"w": weight(6, 4), "b": weight(4)},
        ("N", 6),
    ),
    "constant_node": (
        [
            node("Constant", "", "w", value=numpy_helper.from_array(weight(4, 3, 1, 1))),
            node("Conv", "x w", "h"),
            node("BatchNormalization", "h g s m v"),
        ],
        {},
        ("N", 3, 5, 5),
    ),
}


@pytest.mark.parametrize("name", NORM_CASES)
def test_batchnorm_is_folded(name: str) -> None:
    nodes, constants, x = NORM_CASES[name]
    proto = model_of(nodes, {**constants, **STATISTICS}, x)
    fed = Batch((torch.randn([2 if isinstance(size, str) else size for size in x]),))
    model = OnnxModel.open(proto)
    wanted = model.run(fed)
    (site,) = model.sites()
    assert model.fold_batchnorm() == [site.name]
    assert model.fold_batchnorm() == []
    model.check()
    assert same(model.run(fed), wanted)
    assert "BatchNormalization" not in {n.op_type for n in model.unwrap().graph.node}
    assert [(s.name, s.shape, s.bias) for s in model.sites()] == [(site.name, site.shape, True)]
    assert model.params() == site.weights + site.o * (2 if name == "shared_bias" else 1)
    assert [value.name for value in model.unwrap().graph.output] == ["y"]


UNFOLDED = {
    "two_readers": (
        [node("Conv", "x w", "h"), node("BatchNormalization", "h g s m v", "n"), node("Add", "n h")],
        ("N", 3, 5, 5),
        ("y",),
    ),
    "is_output": (
        [node("Conv", "x w", "h"), node("BatchNormalization", "h g s m v")],
        ("N", 3, 5, 5),
        ("y", "h"),
    ),
    "computed_statistics": (
        [node("Conv", "x w", "h"), node("Relu", "m", "r"), node("BatchNormalization", "h g s r v")],
        ("N", 3, 5, 5),
        ("y",),
    ),
    "used_twice": (
        [
            node("Conv", "x w", "h"),
            node("Conv", "x w", "k"),
            node("BatchNormalization", "h g s m v", "n"),
            node("Add", "n k"),
        ],
        ("N", 3, 5, 5),
        ("y",),
    ),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_batchnorm_that_is_not_the_only_reader_stays(name: str) -> None:
    nodes, x, outputs = UNFOLDED[name]
    model = OnnxModel.open(model_of(nodes, {"w": weight(4, 3, 3, 3), **STATISTICS}, x, outputs))
    before = model.unwrap()
    assert model.fold_batchnorm() == []
    assert model.unwrap() == before


def test_batchnorm_is_recalibrated_and_that_is_undone() -> None:
    model = OnnxModel.open(network())
    before = model.run(BATCH)
    batches = [Batch((torch.randn(8, 3, 8, 8) * 3 + 1,)) for _ in range(3)]
    undo = model.recalibrate_batchnorm(batches)
    assert undo is not None
    outputs = [
        torch.nn.functional.conv2d(batch.args[0], model.weight("conv"), stride=2, padding=1)
        .transpose(0, 1)
        .flatten(1)
        for batch in batches
    ]
    constants = ir.from_proto(model.unwrap()).graph.initializers
    for name, wanted in (
        ("bn.mean", torch.stack([y.mean(1) for y in outputs]).mean(0)),
        ("bn.var", torch.stack([y.var(1) for y in outputs]).mean(0)),
    ):
        assert torch.allclose(
            torch.from_numpy(constants[name].const_value.numpy().copy()), wanted, rtol=1e-4, atol=1e-5
        )
    assert not same(model.run(BATCH), before)
    undo()
    assert same(model.run(BATCH), before)
    assert model.fold_batchnorm() == ["conv"]
    assert model.recalibrate_batchnorm(batches) is None


def test_example_comes_from_the_declared_inputs_or_the_last_observation() -> None:
    model = OnnxModel.open(network())
    example = model.example()
    assert example is not None
    assert [tuple(tensor.shape) for tensor in example.args] == [(2, 3, 8, 8)]
    assert model.macs() == 0
    model.observe(BATCH)
    assert torch.equal(model.example().args[0], X[:2])
    assert model.macs() == sum(site.weights * site.out_positions for site in model.sites())
    assert OnnxModel.open(model_of([node("Gemm", "x w")], {"w": weight(6, 4)}, ("N", "S"))).example() is None
    fixed = model_of(
        [node("Cast", "x", "f", to=TensorProto.FLOAT), node("MatMul", "f w")], {"w": weight(6, 4)}, (3, 6)
    )
    fixed.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    tokens = OnnxModel.open(fixed).example()
    assert tokens is not None
    assert torch.equal(tokens.args[0], torch.ones(3, 6, dtype=torch.int64))


def test_extents_of_pads_that_differ_from_side_to_side() -> None:
    proto = model_of(
        [node("Conv", "x w", pads=[0, 1, 2, 2], strides=[2, 1])], {"w": weight(4, 3, 3, 3)}, ("N", 3, 8, 7)
    )
    model = OnnxModel.open(proto, Batch((torch.randn(3, 3, 8, 7),)))
    assert model.sites()[0].extents == (((8, 7), (4, 8)),)


def test_observing_counts_positions_per_sample() -> None:
    model = OnnxModel.open(network())
    assert not any(site.seen for site in model.sites())
    model.observe(BATCH)
    extents = {site.name: site.extents for site in model.sites()}
    assert extents == {"conv": (((8, 8), (4, 4)),), "fc": (((1,), (1,)),)}
    assert {site.name: site.extents for site in OnnxModel.open(network(), BATCH).sites()} == extents
    assert model.macs() == sum(site.weights * site.out_positions for site in model.sites())
    model.replace("fc", svd(model, "fc", 2))
    model.observe(BATCH)
    assert {site.name: site.extents for site in model.sites()} == extents


def test_parameters_are_counted_once_and_statistics_not_at_all() -> None:
    model = OnnxModel.open(network())
    assert model.params() == 6 * 27 + 6 + 6 + 30 + 5
    assert model.bytes() == 4 * model.params()
    model.replace("fc", svd(model, "fc", 2))
    assert model.params() == 6 * 27 + 6 + 6 + 2 * (5 + 6) + 5
    shared = OnnxModel.open(
        model_of([node("MatMul", "x w", "h"), node("MatMul", "h w")], {"w": weight(4, 4)}, ("N", 4))
    )
    assert shared.params() == 16


def test_channels_removed_between_two_layers_are_removed_in_the_graph() -> None:
    nodes = [
        node("Conv", "x a.weight a.bias", "h", pads=[1, 1, 1, 1]),
        node("Relu", "h", "r"),
        node("Conv", "r b.weight"),
    ]
    w, b, v = weight(6, 3, 3, 3), weight(6), weight(4, 6, 1, 1)
    w[[1, 4]], b[[1, 4]] = 0, 0
    model = OnnxModel.open(model_of(nodes, {"a.weight": w, "a.bias": b, "b.weight": v}, ("N", 3, 5, 5)))
    fed = Batch((torch.randn(2, 3, 5, 5),))
    wanted = model.run(fed)
    first, second = model.sites()
    kept = torch.tensor([0, 2, 3, 5])
    makes, reads = Form("dense", (), outputs=4), Form("dense", (), inputs=4)
    model.replace(
        "a", Layer(makes.on(first), makes, whole(model.weight("a")[kept]), torch.from_numpy(b)[kept])
    )
    model.replace("b", Layer(reads.on(second), reads, whole(model.weight("b")[:, kept])))
    model.check()
    assert same(model.run(fed), wanted)
    assert model.params() == 4 * 27 + 4 + 16


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_branch_that_ends_in_a_constant_is_dropped(order: tuple[str, str]) -> None:
    nodes = [
        node("Conv", "x stem.weight", "s"),
        node("Conv", "s a.weight", "h"),
        node("Relu", "h", "r"),
        node("Conv", "r b.weight b.bias", "k"),
        node("Add", "s k"),
    ]
    constants = {
        "stem.weight": weight(3, 3, 1, 1),
        "a.weight": weight(5, 3, 1, 1),
        "b.weight": np.zeros((3, 5, 1, 1), np.float32),
        "b.bias": weight(3),
    }
    model = OnnxModel.open(model_of(nodes, constants, ("N", 3, 5, 5)))
    fed = Batch((torch.randn(2, 3, 5, 5),))
    wanted = model.run(fed)
    sites, nothing = {site.name: site for site in model.sites()}, Form("dense", (), inputs=0)
    layers = {
        "a": Layer(sites["a"], DENSE, whole(model.weight("a"))),
        "b": Layer(nothing.on(sites["b"]), nothing, {}, model.bias("b")),
    }
    for name in order:
        model.replace(name, layers[name])
    model.check()
    assert same(model.run(fed), wanted)
    assert same(model.record(fed).play().finish(), wanted)
    assert model.params() == 9 + 3


def test_unread_constants_go_in_subgraphs_too() -> None:
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(weight(1), "one"), numpy_helper.from_array(weight(9), "unread")]
    inner = helper.make_graph([node("Add", "h one", "b")], "inner", [], [out], constants)
    nodes = [node("Gemm", "x w", "h"), node("If", "c", "y", then_branch=inner, else_branch=inner)]
    nodes[1].attribute[1].g.node[0].output[0] = nodes[1].attribute[1].g.output[0].name = "b2"
    proto = model_of(nodes, {"w": weight(6, 4), "c": np.array(True), "dead": weight(3, 3)}, ("N", 6))
    model = OnnxModel.open(proto)
    model.replace("w", svd(model, "w", 2))
    model.check()
    graph = ir.from_proto(model.unwrap()).graph
    assert "dead" not in graph.initializers
    assert [set(subgraph.initializers) for subgraph in graph.subgraphs()] == [{"one"}, {"one"}]
    assert model.run(Batch((torch.randn(2, 6),)))["y"].shape == (2, 4)
