"""`OnnxModel` on disk: saving, external data, factors that wait in temporary files."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_nets import large_network, node, same, svd, weight

from tdpass.models.base import Batch
from tdpass.models.onnx.files import storage
from tdpass.models.onnx.files.storage import release_pages
from tdpass.models.onnx.model import OnnxModel


def test_saving_inline_and_reading_back(tmp_path: Path) -> None:
    model = OnnxModel.open(large_network())
    model.replace("a", svd(model, "a", 20))
    model.save(tmp_path / "out.onnx", {"plan": "{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    fed = Batch((torch.randn(2, 3, 64),))
    again = OnnxModel.open(tmp_path / "out.onnx")
    assert same(again.run(fed), model.run(fed))
    assert onnx.load(tmp_path / "out.onnx").metadata_props[0].key == "plan"


def test_external_data_stays_external_in_another_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    onnx.save(
        large_network(),
        source / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    model = OnnxModel.open(source / "m.onnx")
    model.replace("a", svd(model, "a", 20))
    fed = Batch((torch.randn(2, 3, 64),))
    wanted = model.run(fed)
    model.save(target / "m.onnx", {})
    assert sorted(path.name for path in target.iterdir()) == ["m.onnx", "m.onnx.data"]
    onnx.checker.check_model(str(target / "m.onnx"), full_check=True)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    (source / "weights.bin").unlink()
    assert same(OnnxModel.open(target / "m.onnx").run(fed), wanted)
    assert same(model.run(fed), wanted)


def test_saving_over_the_source_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    OnnxModel.open(large_network()).save(path, {})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    fed = Batch((torch.randn(2, 3, 64),))
    model, untouched = OnnxModel.open(path), OnnxModel.open(path)
    wanted = untouched.run(fed)
    for rank in (40, 20, 64):
        model.replace("a", svd(model, "a", rank))
        model.save(path, {})
        assert len(list(tmp_path.iterdir())) == 2
        assert same(OnnxModel.open(path).run(fed), model.run(fed))
    assert same(model.run(fed), wanted)
    untouched.save(tmp_path / "copy.onnx", {})
    assert same(OnnxModel.open(tmp_path / "copy.onnx").run(fed), wanted)


def test_saving_in_place_keeps_a_file_that_a_given_ir_model_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(large_network(), path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    source = ir.load(path)
    model = OnnxModel.open(source)
    model.replace("a", svd(model, "a", 20))
    model.save(path, {})
    assert np.array_equal(
        source.graph.initializers["b.weight"].const_value.numpy(), model.weight("b").T.numpy()
    )


def test_a_weight_on_disk_is_read_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(large_network(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    model = OnnxModel.open(path)
    (tmp_path / "m.data").write_bytes(b"\0" * (tmp_path / "m.data").stat().st_size)
    assert float(model.weight("a").abs().sum()) == 0


@pytest.fixture
def spilling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for temporary files, which every replaced factor goes to."""
    folder = tmp_path / "spilled"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr("tdpass.models.onnx.files.spill.HELD_BYTES", 0)
    return folder


def mappings() -> int:
    gc.collect()
    return len(storage._MAPPINGS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_spilled_factors_are_those_that_were_given(dtype: type, spilling: Path) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x, y = (helper.make_tensor_value_info(name, kind, ["N", size]) for name, size in (("x", 7), ("y", 9)))
    graph = helper.make_graph(
        [node("MatMul", "x a.weight")],
        "g",
        [x],
        [y],
        [numpy_helper.from_array(weight(7, 9).astype(dtype), "a.weight")],
    )
    model = OnnxModel.open(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )
    layer = svd(model, "a", 5)
    before = mappings()
    model.replace("a", layer)
    assert mappings() == before + 1
    kept = model.layer("a")
    assert kept is not None
    assert all(
        torch.equal(kept.factors[name], factor.to(model.weight("a").dtype))
        for name, factor in layer.factors.items()
    )
    assert list(spilling.iterdir()) == []


def test_a_spilled_model_runs_clones_and_saves(spilling: Path, tmp_path: Path) -> None:
    fed, before = Batch((torch.randn(2, 3, 64),)), mappings()
    held = OnnxModel.open(large_network())
    layers = {"a": svd(held, "a", 20), "b": svd(held, "b", 16)}
    model = OnnxModel.open(large_network())
    for name, layer in layers.items():
        model.replace(name, layer)
        held._layers[name] = layer.to(torch.float32)
    assert mappings() == before + 2
    wanted = held.run(fed)
    twin = model.clone()
    model.replace("b", svd(model, "b", 8))
    assert same(twin.run(fed), wanted)
    assert not same(model.run(fed), wanted)
    del model
    twin.save(tmp_path / "out.onnx", {})
    release_pages()
    assert same(twin.run(fed), wanted)
    returned = twin.unwrap()
    del twin
    assert mappings() == before
    assert isinstance(returned, onnx.ModelProto)
    onnx.checker.check_model(returned, full_check=True)
    assert list(spilling.iterdir()) == []
    assert same(OnnxModel.open(tmp_path / "out.onnx").run(fed), wanted)


def test_spilled_factors_go_with_the_model_and_not_before(spilling: Path) -> None:
    before = mappings()
    model = OnnxModel.open(large_network())
    model.replace("a", svd(model, "a", 20))
    model.replace("a", svd(model, "a", 10))
    assert mappings() == before + 1  # those of the layer that was replaced are gone
    factors = dict(model.layer("a").factors)
    del model
    assert mappings() == before + 1
    assert all(bool(torch.isfinite(factor).all()) for factor in factors.values())
    del factors
    assert mappings() == before
    assert list(spilling.iterdir()) == []


def test_a_small_model_and_a_full_disk_leave_factors_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mappings()
    model = OnnxModel.open(large_network())
    model.replace("a", svd(model, "a", 20))
    assert mappings() == before
    monkeypatch.setattr("tdpass.models.onnx.files.spill.HELD_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    model.replace("b", svd(model, "b", 16))
    assert mappings() == before
    fed = Batch((torch.randn(2, 3, 64),))
    assert model.run(fed)["y"].shape == (2, 3, 32)


def test_external_weights_read_by_a_run_are_read_again_after_their_pages_went(tmp_path: Path) -> None:
    onnx.save(
        large_network(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    model, fed = OnnxModel.open(tmp_path / "m.onnx"), Batch((torch.randn(2, 3, 64),))
    tape = model.record(fed)
    release_pages()
    assert torch.allclose(tape.play().finish()["y"], model.run(fed)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_of_more_than_two_gigabytes_is_compressed_in_little_memory(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import numpy as np, onnx, torch
        from onnx import TensorProto, helper
        import tdpass.formats
        from tdpass.formats.base import Layer
        from tdpass.models.onnx.model import OnnxModel

        folder, layers, width = Path(sys.argv[1]), 10, 8192
        info = helper.make_tensor_value_info
        nodes = [helper.make_node("MatMul", [f"h{k}", f"w{k}.weight"], [f"h{k + 1}"]) for k in range(layers)]
        tensors = []
        for k in range(layers):
            tensor = onnx.TensorProto(name=f"w{k}.weight", data_type=TensorProto.FLOAT, dims=[width, width], data_location=TensorProto.EXTERNAL)
            for key, value in {"location": "m.data", "offset": 4 * width * width * k, "length": 4 * width * width}.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
        graph = helper.make_graph(nodes, "g", [info("h0", 1, ["N", width])], [info(f"h{layers}", 1, ["N", width])], tensors)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
        with open(folder / "m.data", "wb") as data:
            data.truncate(4 * width * width * layers)  # a sparse file: zeros that take no space

        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = OnnxModel.open(folder / "m.onnx")
        for site in model.sites():
            assert model.weight(site.name).shape == site.shape
            factors = {"v": torch.zeros(64, width), "u": torch.zeros(width, 64)}
            model.replace(site.name, Layer(site, "svd", (64,), factors))
            model.check()
        model.save(folder / "out.onnx", {})
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1024
    assert OnnxModel.open(tmp_path / "out.onnx").params() == 10 * 2 * 64 * 8192
