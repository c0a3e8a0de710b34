"""Layers that read integers: static and dynamic ranges, torch and ONNX, compiled, exported, saved."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn

import tdpass
from tdpass.errors import PlanError, TdpassError
from tdpass.form import Form
from tdpass.formats.base import offered_formats
from tdpass.formats.integers import rounded
from tdpass.formats.layer import Layer
from tdpass.layers.factorized import Factorized
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.calibrations import CALIBRATIONS
from tdpass.site import Site

STATIC = "quantize,quantize-activations{{calibration={}}},verify"
DYNAMIC = STATIC.format("dynamic")


class Net(nn.Module):
    """Convolutions, a residual sum, and linear layers over two and three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.mix = nn.Linear(12, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = torch.relu(self.second(h) + h)
        h = torch.relu(self.mix(h.flatten(2).transpose(1, 2)))
        return self.fc(h.mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def compressed(model: object, pipeline: str, data: Tensor | None = None) -> tdpass.Artifact:
    return tdpass.compress(model, None, images() if data is None else data, pipeline=pipeline, cache=False)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).detach().norm() / exact.detach().norm())


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    return to_onnx(net(), images(2))


@pytest.mark.parametrize("calibration", [*CALIBRATIONS.names(), "dynamic"])
def test_every_calibration_serves_torch_modules_that_save_load_and_export(
    calibration: str, tmp_path: Path
) -> None:
    module, x = net(), images()
    artifact = compressed(module, STATIC.format(calibration))
    how = {part.form.activations for part in artifact.model.modules() if isinstance(part, Factorized)}
    assert how == ({"dynamic", ""} if calibration == "dynamic" else {"static"})
    answer = artifact.model(x)
    assert 1e-4 < error(answer, module(x)) < 0.02
    artifact.save(tmp_path / "net.safetensors")
    assert torch.equal(tdpass.load(tmp_path / "net.safetensors", net())(x), answer)
    assert torch.equal(torch.export.export(artifact.model, (x,)).module()(x), answer)
    assert artifact.report.final.bytes == artifact.plan.planned.bytes


@pytest.mark.parametrize("dynamo", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("calibration", ["mse", "dynamic"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchs_exporters_to_onnx_write_the_rounded_numbers(
    calibration: str, dynamo: bool, tmp_path: Path
) -> None:
    model, x = compressed(net(), STATIC.format(calibration)).model, images(2)
    torch.onnx.export(model, (x,), tmp_path / "it.onnx", dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    answer = model(x)
    assert error(torch.from_numpy(found), answer) < 0.1 * error(net()(x), answer)


@pytest.mark.parametrize("calibration", ["mse", "dynamic"])
@torch.no_grad()
def test_a_number_that_is_none_makes_all_that_is_made_of_it_none(calibration: str) -> None:
    model, x = compressed(net(), STATIC.format(calibration)).model, images(3)
    spoiled = x.clone()
    spoiled[1, 0, 2, 2] = torch.nan
    found, clean = model(spoiled), model(x)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[::2], clean[::2])


def test_a_compiled_model_answers_as_it_does_in_eager_torch() -> None:
    for calibration in ("minmax", "dynamic"):
        model = compressed(net(), STATIC.format(calibration)).model
        with torch.no_grad():
            found = torch.compile(model, backend="aot_eager", fullgraph=True)(images())
            torch.testing.assert_close(found, model(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("numbers", ["int8", "int8/tensor"])
def test_onnx_runtime_makes_one_operator_of_a_dynamic_product(
    numbers: str, exported: onnx.ModelProto, tmp_path: Path
) -> None:
    pipeline = DYNAMIC.replace("quantize,", f"quantize{{numbers={numbers}}},", 1)
    artifact = compressed(exported, pipeline)
    artifact.save(tmp_path / "it.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "made.onnx"), 3
    session = onnxruntime.InferenceSession(str(tmp_path / "it.onnx"), options)
    made = [node.op_type for node in onnx.load(tmp_path / "made.onnx").graph.node]
    assert made.count("DynamicQuantizeMatMul") == 2
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images().numpy()})[0])
    assert error(found, net()(images())) < 0.02
    torch_side = compressed(net(), pipeline)
    assert artifact.report.final.bytes == torch_side.report.final.bytes


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "block_term" else pytest.mark.slow)
        for name in offered_formats()
    ],
)
def test_onnx_runtime_runs_the_factors_of_every_format_in_integers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 48), nn.ReLU()).eval()
    module.append(nn.Linear(48, 32))
    x = torch.randn(8, 16, 4, 4)
    graph, steps = to_onnx(module, x[:2]), "plan{params=0.95},factorize,quantize"
    plain, artifact = (
        tdpass.compress(graph, None, x, pipeline=pipeline, formats=[name], cache=False, effort="fast")
        for pipeline in (steps, f"{steps},{STATIC.partition(',')[2].format('minmax')}")
    )
    assert any(choice.form.format == name for choice in artifact.plan)
    artifact.save(tmp_path / "it.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    (wanted,) = open_model(plain.model).run(Batch((x,))).values()
    assert 1e-5 < error(torch.from_numpy(found), wanted) < 0.05


def test_factors_read_integers_one_after_another() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    x = torch.randn(64, 64)
    steps = "plan{macs=0.6},factorize,quantize"
    alone = tdpass.compress(module, None, x, pipeline=steps, formats=["svd"], cache=False, effort="fast")
    for model in (module, to_onnx(module, x[:2])):
        found = tdpass.compress(
            model,
            None,
            x,
            pipeline=f"{steps},{DYNAMIC.partition(',')[2]}",
            formats=["svd"],
            cache=False,
            effort="fast",
        )
        (answer,) = [found.model(x)] if model is module else open_model(found.model).run(Batch((x,))).values()
        assert error(answer, alone.model(x)) < 0.02
        if model is not module:
            assert [node.op_type for node in found.model.graph.node].count("MatMulInteger") == 4


class Tied(nn.Module):
    """A table that is the last layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.middle(self.table(words)).relu())


@pytest.mark.parametrize("calibration", ["mse", "dynamic"])
@torch.no_grad()
def test_a_table_that_is_a_layer_too_is_read_by_rows_and_multiplied_in_integers(
    calibration: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, words = Tied().eval(), torch.randint(0, 20, (8, 5))
    artifact = compressed(module, STATIC.format(calibration), words)
    how = {"mse": "static"}.get(calibration, calibration)
    parts = [part for part in artifact.model.modules() if isinstance(part, Factorized)]
    assert {part.form.activations for part in parts} == {how}
    answer = artifact.model(words)
    assert 1e-4 < error(answer, module(words)) < 0.02
    artifact.save(tmp_path / "net.safetensors")
    assert torch.equal(tdpass.load(tmp_path / "net.safetensors", Tied())(words), answer)


def test_recurrent_layers_multiply_bytes_too() -> None:
    torch.manual_seed(0)
    layer = tdpass.open_recurrent(nn.Sequential(nn.LSTM(16, 24, batch_first=True))).eval()
    x = torch.randn(4, 6, 16)
    artifact = tdpass.compress(layer, None, x, pipeline=DYNAMIC, cache=False)
    parts = [part for part in artifact.model.modules() if isinstance(part, Factorized)]
    assert [part.form.activations for part in parts] == ["dynamic"] * 2
    with torch.no_grad():
        assert 0 < error(artifact.model(x)[0], layer(x)[0]) < 0.02


def test_rows_are_rounded_apart_so_that_samples_do_not_change_each_other() -> None:
    model = compressed(net(), DYNAMIC).model
    x = images(2)
    loud = torch.cat([x[:1], 100 * x[1:]])
    torch.testing.assert_close(model(loud)[:1], model(x[:1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["static", "dynamic"])
@torch.no_grad()
def test_products_of_every_small_size_are_exact(how: str) -> None:
    for outputs, inputs, rows in itertools.product((1, 2, 17), (1, 2, 3, 16), (1, 2, 17)):
        form = Form("dense", (), ("int8",), activations=how)
        reads = {"kernel_range": torch.tensor([0.5, 128.0])} if how == "static" else {}
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        parts = {"kernel": codes, "kernel_scale": torch.full((outputs,), 0.25), **reads}
        layer = Layer(Site("fc", "linear", (outputs, inputs)), form, parts)
        x = 0.5 * torch.randint(-127, 128, (rows, inputs)).float()
        x[:, 0] = 63.5  # the largest: steps of half in either way
        torch.testing.assert_close(layer(x), x @ (0.25 * codes.float()).T, rtol=1e-6, atol=0)


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    x = torch.randn(3, 7, requires_grad=True)
    rounded(x, None).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 7))


def test_the_most_sensitive_layers_keep_what_they_read() -> None:
    every, most = (compressed(net(), STATIC.format(f"mse,keep={keep}")) for keep in (0, 0.5))
    kept = [name for name, why in most.report.declined.items() if "activations stay as they are" in why]
    assert len(kept) == 2
    assert most.report.checks["divergence"] < every.report.checks["divergence"]


@pytest.mark.parametrize("calibration", ["percentile", "dynamic"])
def test_constant_activations_have_a_range(calibration: str) -> None:
    module = net()
    with torch.no_grad():
        module.first.weight.zero_()
        module.first.bias.fill_(-1.0)  # all zero behind the activation
        module.second.bias.fill_(0.5)
    artifact = compressed(module, STATIC.format(calibration))
    assert error(artifact.model(images()), module(images())) < 0.02


@pytest.mark.parametrize(
    ("data", "message"),
    [(torch.full((8, 3, 8, 8), torch.nan), "NaN"), (torch.zeros(8, 4, 8, 8), "channels")],
)
def test_bad_calibration_data_is_one_clear_error(data: Tensor, message: str) -> None:
    with pytest.raises(TdpassError, match=message):
        compressed(net(), STATIC.format("minmax"), data)


def test_what_reads_integers_already_is_left_as_it_is() -> None:
    once = compressed(net(), STATIC.format("minmax"))
    again = compressed(once.model, STATIC.format("minmax"))
    assert torch.equal(again.model(images()), once.model(images()))
    twice = compressed(net(), STATIC.format("minmax").replace(",verify", ",quantize-activations,verify"))
    assert any("integers already" in note for row in twice.report.passes for note in row.notes)


def test_weights_of_other_types_read_what_they_did() -> None:
    artifact = compressed(net(), DYNAMIC.replace("quantize,", "quantize{numbers=int4},", 1))
    assert any(
        "no layer that may has int8 weights" in note for row in artifact.report.passes for note in row.notes
    )


def test_forms_that_cannot_be_are_refused(exported: onnx.ModelProto) -> None:
    module = copy.deepcopy(net())
    site = next(site for site in open_model(module).sites() if site.name == "fc")
    with pytest.raises(PlanError, match=r"no factor of int8 with one scale"):
        tdpass.formats.layer.check_form(site, Form.parse("dense int4 dynamic"))
    model = compressed(module, STATIC.format("minmax")).model
    layer = model.fc.layer()
    other = open_model(exported)
    name = next(site.name for site in other.sites() if site.shape == (5, 16))
    layer = tdpass.formats.Layer(next(s for s in other.sites() if s.name == name), layer.form, layer.factors)
    with pytest.raises(PlanError, match="run quantize-activations on the model"):
        other.replace(name, layer)


def test_too_few_samples_are_said() -> None:
    few, enough = (compressed(net(), STATIC.format("minmax"), images(count)) for count in (4, 16))
    said = [
        [note for row in found.report.passes for note in row.notes if "ranges come from" in note]
        for found in (few, enough)
    ]
    assert said == [["ranges come from 4 samples; give 16 or more for ranges that hold"], []]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rest", ["", ",fuse-kernels{measure=false}"])
@pytest.mark.parametrize("calibration", ["minmax", "dynamic"])
@torch.no_grad()
def test_layers_that_read_integers_answer_in_half_precision(
    calibration: str, rest: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.Hardtanh(), nn.Linear(96, 10))
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    pipeline = f"quantize,quantize-activations{{calibration={calibration}}}{rest}"
    made = tdpass.compress(dense.eval(), None, x, pipeline=pipeline, cache=False, progress=False).model
    half = copy.deepcopy(made).to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert error(half.float(), made(x)) < 4 * torch.finfo(dtype).eps ** 0.75
