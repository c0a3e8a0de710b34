"""Layers whose factors are stored in number types of their own.

They are counted to the byte, saved, and the same in torch and ONNX.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_nets import model_of
from safetensors import safe_open
from selection import mostly_slow
from torch import Tensor, nn

import tdpass
import tdpass.passes.plan
from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats import FORMATS, Layer
from tdpass.formats.base import offered_formats
from tdpass.formats.layer import check_form, cost_of
from tdpass.formats.metric import Metric
from tdpass.layers.factorized import Factorized
from tdpass.layers.float_chain import FloatChain
from tdpass.layers.recurrent import OpenLSTM
from tdpass.layers.weight_only import WeightOnly
from tdpass.models import open_model
from tdpass.models.base import Batch, Model
from tdpass.models.torch.model import TorchModel
from tdpass.models.torch.saving.state import load_module, save_module
from tdpass.numbers import numbers_named
from tdpass.packing import SUFFIX
from tdpass.planner.candidates import SiteFits
from tdpass.planner.rank_plan import Choice
from tdpass.targets.layers import make_layer

TEXTS = [
    "int8",
    "int8/tensor",
    "int8/zero",
    "int16",
    "int4",
    "int4/zero",
    "levels16",
    "float16",
    "bfloat16",
    "float8_e4m3",
]
NAMES = ("dense", *offered_formats())
EACH = [(name, text) for name in NAMES for text in TEXTS]
PACKED = [
    "dense int4",
    "dense int4/4",
    "dense levels5",
    "dense int4 2:4",
    "dense levels16 blocks2x2/25%",
    "svd 4 int4 unstructured/40%",
    "svd_residual 4 float16,float16,int4/8",
    "svd_residual 2 float32 all,all,unstructured/5%",
]
IN_INT8 = "fold-batchnorm,plan{numbers=int8},factorize,correct-bias,refit,recalibrate-batchnorm,verify"


class Net(nn.Module):
    """A convolution, and linear layers over two and over three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.tokens = nn.Linear(64, 12, bias=False)
        self.fc = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x)).flatten(2)
        return self.fc(torch.relu(self.tokens(h)).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inputs() -> Tensor:
    return torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(1))


def graph(module: Net, opset: int = 17) -> onnx.ModelProto:
    """The same network as an exporter writes it."""
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "conv.weight", "conv.bias"], ["c"], pads=[1, 1, 1, 1]),
        make("Relu", ["c"], ["r"]),
        make("Reshape", ["r", "whole"], ["t"]),
        make("MatMul", ["t", "tokens.weight"], ["m"]),
        make("Relu", ["m"], ["s"]),
        make("Flatten", ["s"], ["f"]),
        make("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    state["tokens.weight"] = np.ascontiguousarray(state["tokens.weight"].T)
    state["whole"] = np.array([0, 8, 64])
    return model_of(nodes, state, ("N", 6, 8, 8), opset=opset)


def middle(name: str, site) -> tuple[int, ...]:
    ranks = FORMATS.get(name).ranks(site)
    return ranks[len(ranks) // 2]


def put(model: Model, name: str, text: str) -> list[Layer]:
    """Store every site that the format fits in that number type."""
    layers = []
    for site in model.sites():
        if not FORMATS.get(name).fits(site):
            continue
        form = Form(name, middle(name, site), (text,))
        factors = FORMATS.get(name).factorize(model.weight(site.name), site, form.rank)
        plain = Layer(site, Form(name, form.rank), factors, model.bias(site.name)).to(torch.float32)
        layers.append(plain.stored(form))
        model.replace(site.name, layers[-1])
    return layers


def run(model: Model) -> Tensor:
    found = model.run(Batch((inputs(),)))
    return found["y"] if isinstance(found, dict) else found


@pytest.mark.parametrize(("name", "text"), mostly_slow(EACH, [*EACH[: len(TEXTS)], *EACH[:: len(TEXTS)]]))
def test_a_torch_model_counts_runs_saves_and_loads_what_it_stores(
    name: str, text: str, tmp_path: Path
) -> None:
    model = open_model(net())
    assert isinstance(model, TorchModel)
    before = {site.name: cost_of(site, DENSE) for site in model.sites()}
    params, size = model.params(), model.bytes()
    layers = put(model, name, text)
    after = {layer.site.name: cost_of(layer.site, layer.form) for layer in layers}
    assert model.params() == params + sum(cost.params - before[site].params for site, cost in after.items())
    assert model.bytes() == size + sum(cost.bytes - before[site].bytes for site, cost in after.items())
    for layer in layers:
        assert sum(part.nbytes for part in layer.factors.values()) == cost_of(layer.site, layer.form).bytes
        again = model.layer(layer.site.name)
        assert again is not None
        assert again.form == layer.form
        assert torch.equal(again.reconstruct(), layer.reconstruct())
    save_module(model.module, tmp_path / "net.safetensors", {})
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        held = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118 - it is no dict
    packed = any(key.endswith(SUFFIX) for key in held)
    assert sum(held.values()) < model.bytes() if packed else sum(held.values()) == model.bytes()
    loaded = load_module(tmp_path / "net.safetensors", net())
    assert torch.equal(loaded(inputs()), model.module(inputs()))
    exported = torch.export.export(model.module, (inputs(),)).module()
    assert torch.equal(exported(inputs()), model.module(inputs()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_onnx_runtime_answers_as_torch_does_from_as_many_bytes(name: str, text: str) -> None:
    module = net()
    opset = max(17, numbers_named(text).opset)
    torch_side, onnx_side = open_model(copy.deepcopy(module)), open_model(graph(module, opset))
    put(torch_side, name, text)
    put(onnx_side, name, text)
    ours, theirs = run(torch_side), run(onnx_side)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (onnx_side.params(), onnx_side.bytes()) == (torch_side.params(), torch_side.bytes())


@pytest.mark.parametrize("opset", [11, 12, 13, 19, 21])
@pytest.mark.parametrize("text", ["int8", "int8/tensor", "int8/zero", "int8/3", "int8/tensor/zero"])
def test_every_opset_reads_integers(opset: int, text: str, tmp_path: Path) -> None:
    module = net()
    torch_side, onnx_side = open_model(copy.deepcopy(module)), open_model(graph(module, opset))
    layout = "int8/8" if text == "int8/3" else text
    for model in (torch_side, onnx_side):
        for site in model.sites():
            own = "int8/3" if text == "int8/3" and site.name != "tokens" else layout
            plain = Layer(site, DENSE, {"kernel": model.weight(site.name)}, model.bias(site.name))
            model.replace(site.name, plain.stored(Form("dense", (), (own,))))
    onnx_side.save(tmp_path / "net.onnx", {})
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": inputs().numpy()})[0])
    torch.testing.assert_close(found, run(torch_side), rtol=1e-4, atol=1e-5)
    proto = onnx.load(tmp_path / "net.onnx")
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("DequantizeLinear") == (3 if opset >= 13 else 0)
    assert ("Transpose" in operators) == ("/8" in layout)  # groups run along what is transposed
    stored = {held.name: held.data_type for held in proto.graph.initializer}
    assert stored["conv.kernel"] == stored["tokens.kernel"] == stored["fc.kernel"] == TensorProto.INT8


def in_form(model: Model, numbers: str, support: str) -> list[Layer]:
    """Store every site that the support divides in that form."""
    layers = []
    for site in model.sites():
        form = Form("dense", (), tuple(filter(None, [numbers])), support)
        try:
            check_form(site, form)
        except PlanError:
            continue
        plain = Layer(site, DENSE, {"kernel": model.weight(site.name)}, model.bias(site.name))
        layers.append(plain.stored(form))
        model.replace(site.name, layers[-1])
    return layers


@pytest.mark.parametrize(
    "support", ["2:4", "unstructured/30%", "unstructured/7", "rows/3", "columns/25%", "blocks2x2/25%"]
)
@pytest.mark.parametrize("numbers", ["", "float16", "int8", "int16", "int4", "levels16"])
def test_supports_are_counted_to_the_byte_saved_and_alike_on_both_front_ends(
    support: str, numbers: str, tmp_path: Path
) -> None:
    module = net()
    model, onnx_side = open_model(copy.deepcopy(module)), open_model(graph(module))
    assert isinstance(model, TorchModel)
    before = {site.name: cost_of(site, DENSE) for site in model.sites()}
    params, size = model.params(), model.bytes()
    layers = in_form(model, numbers, support)
    assert layers
    in_form(onnx_side, numbers, support)
    costs = {layer.site.name: cost_of(layer.site, layer.form) for layer in layers}
    assert model.params() == params + sum(cost.params - before[site].params for site, cost in costs.items())
    assert model.bytes() == size + sum(cost.bytes - before[site].bytes for site, cost in costs.items())
    assert (onnx_side.params(), onnx_side.bytes()) == (model.params(), model.bytes())
    for layer in layers:
        assert sum(part.nbytes for part in layer.factors.values()) == cost_of(layer.site, layer.form).bytes
        assert int(layer.reconstruct().count_nonzero()) <= cost_of(layer.site, layer.form).params
    torch.testing.assert_close(run(onnx_side), run(model), rtol=1e-4, atol=1e-5)
    save_module(model.module, tmp_path / "net.safetensors", {})
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        held = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118 - it is no dict
    assert sum(held.values()) <= model.bytes() + 64 * sum(
        key.endswith(SUFFIX) for key in held
    )  # what a block says of itself
    loaded = load_module(tmp_path / "net.safetensors", net())
    assert torch.equal(loaded(inputs()), model.module(inputs()))
    if numbers == "int4":
        exported = torch.export.export(model.module, (inputs(),)).module()
        assert torch.equal(exported(inputs()), model.module(inputs()))


@pytest.mark.parametrize("opset", [11, 13, 21])
@pytest.mark.parametrize("form", PACKED)
def test_every_opset_reads_packed_numbers_and_supports(opset: int, form: str, tmp_path: Path) -> None:
    module = net()
    wanted = Form.parse(form)
    torch_side, onnx_side = open_model(copy.deepcopy(module)), open_model(graph(module, opset))
    for model in (torch_side, onnx_side):
        site = next(site for site in model.sites() if site.name == "fc")
        factors = FORMATS.get(wanted.format).factorize(model.weight("fc"), site, wanted.rank)
        plain = Layer(site, Form(wanted.format, wanted.rank), factors, model.bias("fc")).to(torch.float32)
        model.replace("fc", plain.stored(wanted))
    assert onnx_side.bytes() == torch_side.bytes()
    onnx_side.save(tmp_path / "net.onnx", {})
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": inputs().numpy()})[0])
    torch.testing.assert_close(found, run(torch_side), rtol=1e-4, atol=1e-5)
    types = {held.data_type for held in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert (TensorProto.INT4 in types) == (opset >= 21 and "int4" in form)


@pytest.mark.parametrize("opset", [19, 21])
@pytest.mark.parametrize("form", ["dense float8_e4m3", "svd 4 float8_e4m3/tensor", "dense float8_e4m3/8 2:4"])
def test_onnx_holds_the_very_bytes_of_eight_bit_floats(form: str, opset: int, tmp_path: Path) -> None:
    module, wanted = net(), Form.parse(form)
    model = open_model(graph(module, opset))
    site = next(site for site in model.sites() if site.name == "fc")
    factors = FORMATS.get(wanted.format).factorize(model.weight("fc"), site, wanted.rank)
    layer = Layer(site, Form(wanted.format, wanted.rank), factors, model.bias("fc")).to(torch.float32)
    stored = layer.stored(wanted)
    model.replace("fc", stored)
    model.save(tmp_path / "net.onnx", {})
    held = {
        initializer.name: initializer.raw_data
        for initializer in onnx.load(tmp_path / "net.onnx").graph.initializer
        if initializer.data_type == TensorProto.FLOAT8E4M3FN
    }
    codes = {
        f"fc.{name}": bytes(part.flatten().view(torch.uint8).tolist())
        for name, part in stored.factors.items()
        if part.dtype is torch.float8_e4m3fn
    }
    assert sorted(held.values()) == sorted(codes.values())
    torch.testing.assert_close(run(open_model(tmp_path / "net.onnx")), run(model))


@pytest.mark.parametrize("how", ["quantize{numbers=float8_e4m3}", "plan{bytes=0.9,numbers=float8_e4m3}"])
def test_an_opset_that_does_not_read_eight_bit_floats_declines_them_with_the_reason(how: str) -> None:
    artifact = tdpass.compress(graph(net(), 17), data=inputs(), pipeline=f"{how},verify", cache=False)
    assert not any(choice.form.numbers for choice in artifact.plan or ())
    assert "from opset 19 on, and the model has 17" in artifact.report.to_json()


@pytest.mark.parametrize(
    ("name", "takes"), [("dense", {WeightOnly}), ("svd", set())], ids=["whole", "factored"]
)
def test_eight_bit_floats_on_a_cpu_are_for_whole_matrices_and_the_others_say_so(
    name: str, takes: set[type]
) -> None:
    site = next(site for site in open_model(net()).sites() if not site.axes)
    layer = make_layer(site, Form(name, middle(name, site), ("float8_e4m3",)), torch.float32)
    for operator in (WeightOnly, FloatChain):
        why = operator.why_not(layer)
        assert why == "" if operator in takes else f"'{layer.form}'" in why
    module, x = Factorized(layer, None).eval(), torch.randn(3, site.i)
    whole = (layer.reconstruct() @ x.T).T
    torch.testing.assert_close(module(x), whole, rtol=1e-4, atol=1e-5)


def test_an_old_opset_refuses_what_it_cannot_read_with_what_to_do() -> None:
    with pytest.raises(PlanError, match="from opset 11 on, and the model has 9; store int8, or convert it"):
        put(open_model(graph(net(), 9)), "dense", "int4")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form("dense", (), support="5:7"), "does not divide a factor of shape"),
        (Form("dense", (), support="rows/13"), "keeps 13 of the 12"),
        (Form("dense", (), support="half"), "support 'half' is not understood"),
        (Form("dense", (), ("int8/zero",), "2:4"), "leave out '/zero' beside a support"),
        (Form("svd", (2,), (), "2:4,2:4,2:4"), "3 supports for the factors"),
        (Form("svd", (2,), ("int8", "int8", "int8")), "3 number types for the factors"),
        (Form("svd", (2,), ("int9",)), "unknown number type 'int9'"),
        (Form("dense", (1,), ("int8",)), "rank"),
    ],
)
def test_a_form_that_cannot_be_is_refused(form: Form, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_form(open_model(net()).sites()[1], form)


def test_each_factor_may_have_a_type_of_its_own() -> None:
    model = open_model(net())
    site = next(site for site in model.sites() if site.name == "fc")
    factors = FORMATS.get("svd").factorize(model.weight("fc"), site, (4,))
    layer = (
        Layer(site, Form("svd", (4,)), factors)
        .to(torch.float32)
        .stored(Form("svd", (4,), ("int8", "bfloat16")))
    )
    first, second = FORMATS.get("svd").shapes(site, (4,)).values()
    assert cost_of(site, layer.form).bytes == first[0] * first[1] + 4 * first[0] + 2 * second[0] * second[1]


def test_a_budget_on_bytes_is_met_with_int8_at_less_loss_than_by_ranks_alone(tmp_path: Path) -> None:
    module, x = net(), inputs()
    artifact = tdpass.compress(module, {"bytes": 0.3}, x, cache=False, pipeline=IN_INT8)
    limit = 0.3 * artifact.report.original.bytes
    assert artifact.plan.planned.bytes <= artifact.report.final.bytes <= limit
    assert any(choice.form.numbers == ("int8",) for choice in artifact.plan)
    artifact.save(tmp_path / "net.safetensors")
    assert tdpass.load_plan(tmp_path / "net.safetensors") == artifact.plan
    loaded = tdpass.load(tmp_path / "net.safetensors", net())
    assert torch.equal(loaded(x), artifact.model(x))

    onnx_side = tdpass.compress(graph(module), plan=artifact.plan, data=x, pipeline="factorize")
    torch_side = tdpass.compress(module, plan=artifact.plan, data=x, pipeline="factorize")
    assert onnx_side.report.final.bytes == torch_side.report.final.bytes
    torch.testing.assert_close(run(open_model(onnx_side.model)), torch_side.model(x), rtol=1e-4, atol=1e-5)

    by_rank = tdpass.compress(module, {"bytes": 0.3}, x, cache=False)
    assert artifact.report.checks["divergence"] < 0.1 * by_rank.report.checks["divergence"]


@pytest.mark.parametrize("budget", [{"params": 0.6}, {"macs": 0.6}])
def test_number_types_are_for_budgets_on_bytes(budget: dict[str, float]) -> None:
    artifact = tdpass.compress(net(), budget, inputs(), cache=False, effort="fast", pipeline=IN_INT8)
    assert not any(choice.form.numbers for choice in artifact.plan)


def test_number_types_are_offered_where_they_are_asked_for() -> None:
    artifact = tdpass.compress(net(), {"bytes": 0.6}, inputs(), cache=False, effort="fast")
    assert not any(choice.form.numbers for choice in artifact.plan)
    with pytest.raises(tdpass.TdpassError, match="int9"):
        tdpass.make_plan(net(), {"bytes": 0.6}, inputs(), cache=False, pipeline="plan{numbers=int9}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exported_programs_and_recurrent_layers_store_integers_too(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    module, x = net().to(dtype), inputs().to(dtype)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    small = tdpass.compress(program, {"bytes": 0.3}, x, cache=False, effort="fast", pipeline=IN_INT8)
    assert any(choice.form.numbers for choice in small.plan)
    assert small.report.final.bytes <= 0.3 * small.report.original.bytes
    small.save(tmp_path / "net.pt2")
    read = torch.export.load(tmp_path / "net.pt2").module()
    wanted = module(x).detach()
    torch.testing.assert_close(read(x).detach(), wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))

    torch.manual_seed(0)
    layer, steps = (
        OpenLSTM(nn.LSTM(16, 24, batch_first=True)).to(dtype).eval(),
        torch.randn(4, 5, 16, dtype=dtype),
    )
    model = open_model(copy.deepcopy(layer))
    assert isinstance(model, TorchModel)
    put(model, "svd", "int8")
    dense = copy.deepcopy(layer)
    twin = open_model(dense)
    for site in twin.sites():
        held = model.layer(site.name)
        assert held is not None
        twin.replace(
            site.name, Layer(site, Form("dense", (), ()), {"kernel": held.reconstruct()}, held.bias).to(dtype)
        )
    torch.testing.assert_close(model.module(steps)[0], dense(steps)[0], rtol=1e-4, atol=1e-5)


def test_a_compiled_graph_keeps_the_weights_of_a_plan_that_stores_integers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, x = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(3, 24)
    site = open_model(copy.deepcopy(module)).sites()[0]
    form = Form("dense", (), ("int8",))
    choice = Choice(site.name, site.shape, form, cost_of(site, form), cost_of(site, DENSE))
    with torch.no_grad():
        found = torch.compile(
            module, backend="tdpass", options={"plan": tdpass.RankPlan((choice,), tdpass.Cost())}
        )(x)
        torch.testing.assert_close(found, module(x))
    assert "a compiled graph keeps the weights as they are" in caplog.text


@pytest.mark.parametrize(
    "text", [text if "float8" in text else pytest.param(text, marks=pytest.mark.slow) for text in TEXTS]
)
def test_what_torch_exports_of_a_convolution_of_these_numbers_runs(text: str) -> None:
    """ONNX Runtime casts what it cannot reshape; what is a constant there is folded, a convolution's is not."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(16, 16, 3)).eval(), torch.randn(1, 16, 5, 5)
    model = open_model(net, Batch((x,)))
    (site,) = model.sites()
    fits = SiteFits(site, model.weight("0"), model.bias("0"), Metric(), None)
    model.replace("0", fits.layer(Form.parse(f"dense {text}")))
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False, opset_version=20)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (made,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(made), net(x), rtol=1e-4, atol=1e-5)
