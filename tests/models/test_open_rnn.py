"""Open recurrent layers against torch's own, dense and factored, on every way they can run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import tdpass
from tdpass.errors import UnsupportedError, UsageError
from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.formats.base import offered_formats
from tdpass.kernels import native
from tdpass.layers.recurrent import OpenRNN
from tdpass.models import Factorized, OpenGRU, OpenLSTM, open_model
from tdpass.models.base import Batch
from tdpass.site import Site

PAIRS = [pytest.param(nn.LSTM, OpenLSTM, id="lstm"), pytest.param(nn.GRU, OpenGRU, id="gru")]
FORMS = [name for name in offered_formats() if FORMATS.get(name).fits(Site("", "linear", (8, 8)))]
needs_kernels = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


def flat(result: tuple) -> list[Tensor]:
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def by_steps(layer: nn.Module, *args: object) -> tuple:
    """The call as it runs when it is recorded."""
    with torch.no_grad(), torch.overrides.BaseTorchFunctionMode():
        return layer(*args)


def same(ours: tuple, theirs: tuple, tolerance: float = 1e-5) -> None:
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=tolerance)


def factored(layer: OpenRNN, name: str, rank: int = 1, *, only: str = "") -> tuple[OpenRNN, nn.Module]:
    """The layer with its sites in that format, and the dense layer with the same weights."""
    model = open_model(copy.deepcopy(layer))
    how = (layer.num_layers, layer.bias, layer.batch_first, layer.dropout, layer.bidirectional)
    dense = layer.kind(layer.input_size, layer.hidden_size, *how).train(layer.training)
    weights = {"input": "weight_ih", "hidden": "weight_hh"}
    for site in model.sites():
        fmt = FORMATS.get(name)
        if site.name.startswith(only):
            chosen = fmt.ranks(site)[min(len(fmt.ranks(site)) - 1, rank)]
            factors = fmt.factorize(model.weight(site.name), site, chosen)
            model.replace(
                site.name, Layer(site, Form(name, chosen), factors, model.bias(site.name)).to(torch.float32)
            )
        part, _, suffix = site.name.partition("_")
        held = model.layer(site.name)
        with torch.no_grad():
            getattr(dense, f"{weights[part]}_{suffix}").copy_(
                model.weight(site.name) if held is None else held.reconstruct()
            )
            if layer.bias:
                getattr(dense, f"{weights[part].replace('weight', 'bias')}_{suffix}").copy_(
                    model.bias(site.name)
                )
    opened = model.unwrap()
    assert isinstance(opened, OpenRNN)
    return opened, dense


class Classifier(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.rnn = kind(12, 24, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.head(self.rnn(torch.relu(self.embed(x)))[0][:, -1])


@pytest.mark.parametrize(("kind", "opened"), PAIRS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_is_the_dense_layer(kind: type, opened: type, bidirectional: bool, batch_first: bool) -> None:
    dense = kind(11, 17, 2, bias=batch_first, batch_first=batch_first, bidirectional=bidirectional).eval()
    layer = opened(dense)
    for x in (torch.randn(3, 7, 11), torch.randn(3, 1, 11), torch.randn(1, 7, 11), torch.randn(7, 11)):
        wanted = dense(x)
        same(layer(x), wanted)
        same(by_steps(layer, x), wanted)
        with torch.no_grad():
            same(layer(x), wanted)
            same(layer(x, wanted[1]), dense(x, wanted[1]))
        same(by_steps(layer, x, wanted[1]), dense(x, wanted[1]))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("only", ["", "input", "hidden"])
@pytest.mark.parametrize(("kind", "opened"), PAIRS)
def test_factors_stand_for_their_weight_on_every_way(kind: type, opened: type, name: str, only: str) -> None:
    layer, dense = factored(
        opened(kind(12, 20, 2, batch_first=True, bidirectional=True).eval()), name, only=only
    )
    assert {type(module) for path, module in layer.named_children() if path.startswith(only)} == {Factorized}
    for samples in (1, 3):
        x = torch.randn(samples, 5, 12)
        wanted = dense(x)
        same(layer(x), wanted)
        same(by_steps(layer, x), wanted)
        with torch.no_grad():
            same(layer(x), wanted)


@needs_kernels
def test_the_quicker_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []

    def watch(name: str) -> Callable[..., object]:
        plain = getattr(OpenRNN, name)
        return lambda self, *args: (ways.append(name), plain(self, *args))[1]

    for name in ("_by_operators", "_by_steps"):
        monkeypatch.setattr(OpenRNN, name, watch(name))
    lstm, gru = OpenLSTM(nn.LSTM(16, 16).eval()), OpenGRU(nn.GRU(16, 16).eval())
    small, _ = factored(lstm, "svd")
    one, many = torch.randn(4, 1, 16), torch.randn(4, 8, 16)
    with torch.no_grad():
        for layer, x, way in (
            (lstm, one, ["_by_operators"]),
            (lstm, many, []),
            (small, many, ["_by_operators"]),
            (gru, many, ["_by_operators"]),
        ):
            ways.clear()
            layer(x)
            assert ways == way
            ways.clear()
            layer.double()(x.double())
            layer.float()
            assert ways == []
    ways.clear()
    small(many)
    assert ways == []
    calls: list[object] = []
    small.hidden_l0.register_forward_hook(lambda *args: calls.append(args))
    small(many)
    assert (ways, len(calls)) == (["_by_steps"], 4)


@pytest.mark.parametrize(("kind", "opened"), PAIRS)
def test_it_trains_and_the_fused_layer_follows(kind: type, opened: type) -> None:
    layer, _ = factored(opened(kind(4, 6)), "svd", only="hidden")
    x = torch.randn(5, 1, 4)
    with torch.no_grad():
        before = layer(x)[0]
    layer(x)[0].square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters()
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.sub_(0.1 * parameter.grad)
        after = layer(x)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, layer(x)[0].detach(), rtol=1e-4, atol=1e-5)


def test_a_bias_on_some_layers_only_is_that_of_all() -> None:
    layer = OpenLSTM(nn.LSTM(5, 7, bias=False).eval())
    layer.hidden_l0.bias = nn.Parameter(torch.randn(28))
    x = torch.randn(4, 1, 5)
    same(layer(x), by_steps(layer, x))
    with torch.no_grad():
        same(layer(x), by_steps(layer, x))


def test_dropout_between_layers_is_that_of_training() -> None:
    dense = nn.GRU(5, 7, 2, dropout=0.5)
    layer, x = OpenGRU(dense), torch.randn(4, 3, 5)
    torch.manual_seed(1)
    wanted = dense(x)
    torch.manual_seed(1)
    same(layer(x), wanted)
    assert not torch.equal(by_steps(layer, x)[0], by_steps(layer, x)[0])


def test_it_can_be_copied_and_its_state_loaded() -> None:
    layer, other = (factored(OpenLSTM(nn.LSTM(4, 6, 2)), "svd")[0] for _ in range(2))
    x = torch.randn(5, 1, 4)
    with torch.no_grad():
        wanted, _ = layer(x), other(x)
        other.load_state_dict(layer.state_dict())
        for twin in (other, copy.deepcopy(layer)):
            torch.testing.assert_close(twin(x)[0], wanted[0])


def test_a_model_is_opened_as_a_copy_with_the_same_parameters() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LSTM(6, 8, batch_first=True)
            self.again = self.first
            self.plain = nn.RNN(8, 8, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(
                nn.GRU(8, 6, batch_first=True), "weight_hh_l0"
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.normed(self.plain(self.again(self.first(x)[0][..., :6])[0])[0])[0]

    model, x = Many().eval(), torch.randn(2, 3, 6)
    model.first.weight_hh_l0.requires_grad_(False)
    opened = tdpass.open_recurrent(model)
    assert type(model.first) is nn.LSTM
    assert isinstance(opened, Many)
    assert opened.first is opened.again
    assert not opened.first.hidden_l0.weight.requires_grad
    assert torch.equal(opened.first.input_l0.weight, model.first.weight_ih_l0)
    assert not opened.first.training
    with torch.no_grad():
        torch.testing.assert_close(opened(x), model(x), rtol=0, atol=1e-6)
    seen = open_model(opened, x)
    assert {site.name: site.out_positions for site in seen.sites()} == {
        "first.input_l0": 6,
        "first.hidden_l0": 6,
        "plain.input_l0": 3,
        "plain.hidden_l0": 3,
    }
    reasons = seen.declined()
    assert "parametrized" in reasons["normed"]
    assert "open_recurrent" in open_model(model).declined()["first"]
    assert isinstance(tdpass.open_recurrent(nn.GRU(3, 4)), OpenGRU)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_classifier_is_compressed_saved_loaded_and_exported(kind: type, tmp_path: Path) -> None:
    opened = tdpass.open_recurrent(Classifier(kind)).eval()
    data = torch.randn(24, 4, 6)
    model = open_model(opened, data)
    gates = 4 if kind is nn.LSTM else 3
    assert model.macs() == 4 * (6 * 12 + gates * 24 * (12 + 3 * 24)) + 4 * 24
    result = tdpass.compress(
        opened, {"params": 0.5}, data, formats=FORMS if kind is nn.LSTM else ["svd"], cache=False
    )
    small = result.model
    assert isinstance(small, Classifier)
    assert result.report.final.params <= 0.5 * result.report.original.params
    assert any(isinstance(module, Factorized) for module in small.rnn.children())
    with torch.no_grad():
        wanted = small(data)
    again = tdpass.compress(
        opened, plan=tdpass.RankPlan.from_json(result.plan.to_json()), data=data, cache=False
    ).model
    with torch.no_grad():
        torch.testing.assert_close(again(data), wanted)
    result.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", tdpass.open_recurrent(Classifier(kind)).eval())
    with torch.no_grad():
        torch.testing.assert_close(loaded(data), wanted)
    program = torch.export.export(small, (data[:2],))
    torch.testing.assert_close(program.module()(data[:2]), wanted[:2], rtol=1e-4, atol=1e-5)


def test_onnx_export_holds_the_factors(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    layer, _ = factored(OpenLSTM(nn.LSTM(8, 12, batch_first=True).eval()), "svd")
    x = torch.randn(2, 3, 8)
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    proto = onnx.load(tmp_path / "layer.onnx")
    assert not any(node.op_type == "LSTM" for node in proto.graph.node)
    (y, *_) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), layer(x)[0], rtol=1e-4, atol=1e-5)


def test_compiled_code_calls_it_as_it_is() -> None:
    model, x = tdpass.open_recurrent(Classifier()).eval(), torch.randn(1, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_fusing_leaves_it_as_it_computes() -> None:
    layer, _ = factored(OpenLSTM(nn.LSTM(8, 12, batch_first=True).eval()), "svd")
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        wanted = layer(x)
        model = open_model(layer, Batch((x,)))
        model.fuse(lambda text: None, lambda name, reason: None)
        same(model.unwrap()(x), wanted)  # type: ignore[operator]


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nn\.GRU"):
        OpenGRU(nn.LSTM(8, 8))
    with pytest.raises(UsageError, match="not a str"):
        tdpass.open_recurrent("model")  # type: ignore[arg-type]
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 8), torch.randn(2, 8)])
    with pytest.raises(UnsupportedError, match="PackedSequence"):
        OpenGRU(nn.GRU(8, 8))(packed)
