"""What the models of every registered front end must keep to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Residual, trained_like
from onnx_nets import to_onnx
from torch import Tensor, nn
from torch.export import Dim

from tdpass.errors import InvalidModelError, PlanError, TdpassError, UsageError
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models import Model, open_model
from tdpass.models.abilities import (
    FoldsBatchNorm,
    FusesChains,
    RecalibratesBatchNorm,
    RunsAsGraph,
    RunsAsModule,
)
from tdpass.models.base import Batch
from tdpass.models.front_ends import FRONT_ENDS, FrontEnd, front_end_of, register_front_end
from tdpass.site import Site

X = torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(3))
# The same network as each front end takes it: a new front end is tried by a line here.
SOURCES: Mapping[str, Callable[[nn.Module], object]] = {
    "torch": lambda module: module,
    "torch.fx": torch.fx.symbolic_trace,
    "torch.export": lambda module: torch.export.export(
        module, (X,), dynamic_shapes=({0: Dim("n", min=2, max=512)},)
    ),
    "onnx": lambda module: to_onnx(module, X[:2]),
}
MACS = 100 * (12 * 27 + 2 * 12 * 108) + 5 * 12
PARAMS = (
    12 * 27 + 2 * (12 * 108 + 12) + 5 * 12 + 5 + 2 * 12
)  # the last are the scale and shift of the batch-norm


@pytest.fixture(scope="module")
def sources() -> dict[str, object]:
    torch.manual_seed(0)
    module = trained_like(Residual())
    return {name: make(module) for name, make in SOURCES.items()}


@pytest.fixture(params=FRONT_ENDS.names())
def given(request: pytest.FixtureRequest, sources: dict[str, object]) -> Model:
    """The model as it came in, which nothing may change."""
    made = open_model(sources[request.param], Batch((X,)))
    assert front_end_of(sources[request.param]).name == request.param
    return made


@pytest.fixture
def model(given: Model) -> Model:
    return given.clone()


def _layer(model: Model, site: Site, *, full: bool = True, shift: float = 0.0) -> Layer:
    fmt = FORMATS.get("svd" if not site.axes else "channel_svd")
    rank = fmt.ranks(site)[-1 if full else 0]
    weight, bias = model.weight(site.name), model.bias(site.name)
    bias = bias if not shift else (torch.zeros(site.shape[0]) if bias is None else bias) + shift
    return Layer(site, Form(fmt.name, rank), fmt.factorize(weight, site, rank), bias).to(torch.float32)


def _named(model: Model) -> dict[str, Site]:
    return {site.name: site for site in model.sites()}


def _answer(returned: object) -> Tensor:
    (value,) = returned.values() if isinstance(returned, dict) else (returned,)
    assert isinstance(value, Tensor)
    return value.detach()


def _run(model: Model, x: Tensor = X) -> Tensor:
    return _answer(model.run(Batch((x,))))


def _same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_every_front_end_is_tried_here() -> None:
    assert set(SOURCES) == set(FRONT_ENDS.names())


def test_sites_are_named_shaped_and_seen(model: Model) -> None:
    sites = _named(model)
    assert {site.shape for site in sites.values()} == {(12, 3, 3, 3), (12, 12, 3, 3), (5, 12)}
    assert len(sites) == 4
    for name, site in sites.items():
        assert site.seen, name
        assert tuple(model.weight(name).shape) == site.shape
        assert site.bias == (model.bias(name) is not None)
        assert model.layer(name) is None


def test_it_answers_alike_through_every_front_end(model: Model, sources: dict[str, object]) -> None:
    module: Any = sources["torch"]
    with torch.no_grad():
        _same(_run(model), module(X))


def test_it_counts_what_runs_and_what_is_stored(model: Model) -> None:
    assert model.macs() == model.count().per_sample == MACS
    assert model.count(Batch((X,))).macs == MACS * len(X)
    stored = PARAMS - 12 * isinstance(
        model, RunsAsGraph
    )  # torch's exporter makes the batch-norm a bias of its convolution
    assert model.params() == stored
    assert model.bytes() == 4 * stored


def test_full_rank_changes_nothing_but_what_is_stored(model: Model) -> None:
    before, params = _run(model), model.params()
    dense = {name: model.weight(name) for name in _named(model)}
    for site in model.sites():
        model.replace(site.name, _layer(model, site))
    model.check()
    _same(_run(model), before)
    assert model.params() != params
    for name, weight in dense.items():
        assert torch.equal(model.weight(name), weight)


def test_a_replaced_site_says_what_stands_there(model: Model) -> None:
    site = model.sites()[-1]
    layer = _layer(model, site, full=False, shift=0.5)
    dense = model.bias(site.name)
    model.replace(site.name, layer)
    now = model.layer(site.name)
    assert now is not None
    assert (now.form, now.site.geometry()) == (layer.form, site.geometry())
    assert layer.bias is not None
    assert now.bias is not None
    torch.testing.assert_close(now.bias, layer.bias)
    torch.testing.assert_close(now.reconstruct(), layer.reconstruct())
    kept = model.bias(site.name)
    assert kept is not None
    assert dense is not None
    assert torch.equal(kept, dense)
    assert _named(model).keys() == {other.name for other in model.sites()}


def test_a_second_replacement_leaves_no_trace_of_the_first(model: Model) -> None:
    twin = model.clone()
    site = model.sites()[0]
    model.replace(site.name, _layer(model, site, full=False, shift=1.0))
    for other in (model, twin):
        other.replace(site.name, _layer(other, site))
    _same(_run(model), _run(twin))
    assert model.params() == twin.params()


def test_a_clone_is_independent(model: Model) -> None:
    before, params = _run(model), model.params()
    twin = model.clone()
    for site in twin.sites():
        twin.replace(site.name, _layer(twin, site, full=False))
    assert not torch.allclose(_run(twin), before, rtol=1e-2)
    assert torch.equal(_run(model), before)
    assert model.params() == params
    assert all(model.layer(site.name) is None for site in model.sites())


def test_what_was_recorded_plays_what_it_runs(model: Model) -> None:
    tape = model.record(Batch((X,)))
    assert set(tape.site_calls) == set(_named(model))
    _same(_answer(tape.play().finish()), _run(model))
    first = model.sites()[0]
    model.replace(first.name, _layer(model, first))
    assert set(model.record(Batch((X,))).site_calls) == set(_named(model)) - {first.name}


def test_an_unknown_site_and_a_misfit_are_errors_that_name_them(model: Model) -> None:
    layer = _layer(model, model.sites()[0])
    for ask in (model.weight, model.bias, lambda name: model.replace(name, layer)):
        with pytest.raises(PlanError, match="no site 'nowhere'"):
            ask("nowhere")
    last, first = model.sites()[-1], model.sites()[0]
    with pytest.raises(PlanError, match=first.name.replace(".", r"\.")):
        model.replace(first.name, _layer(model, last))


def test_inputs_that_do_not_fit_are_an_error_to_act_on(model: Model) -> None:
    with pytest.raises((InvalidModelError, UsageError)):
        model.run(Batch((torch.randn(2, 7, 10, 10),)))
    assert _run(model).shape == (len(X), 5)


def test_it_is_saved_read_and_unwrapped_as_what_came_in(given: Model, model: Model, tmp_path: Path) -> None:
    for site in model.sites():
        model.replace(site.name, _layer(model, site, full=False))
    wanted, path = _run(model), tmp_path / f"small{model.suffix}"
    model.save(path, {"tdpass.plan": "said"})
    read = given.reader()(path)
    assert read is not None
    assert read.frontend == model.frontend
    _same(_run(read), wanted)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TdpassError, match=r"'other\.text'"):
        model.save(tmp_path / "other.text", {})
    made = model.unwrap()
    assert front_end_of(made).name == front_end_of(given.unwrap()).name
    _same(_run(open_model(made, Batch((X,)))), wanted)


def test_what_it_can_do_keeps_its_answers(model: Model) -> None:
    before = _run(model)
    if isinstance(model, RunsAsModule):
        module = model.inference_module()
        assert not any(part.training for part in module.modules())
        with torch.no_grad():
            _same(module(X), before)
    if isinstance(model, RunsAsGraph):
        assert [tuple(tensor.shape) for tensor in model.named_inputs(Batch((X,))).values()] == [
            tuple(X.shape)
        ]
    if isinstance(model, FoldsBatchNorm):
        model.fold_batchnorm()
        _same(_run(model), before)
    if (
        isinstance(model, RecalibratesBatchNorm)
        and (undo := model.recalibrate_batchnorm([Batch((X,))])) is not None
    ):
        undo()
        _same(_run(model), before)
    if isinstance(model, FusesChains):
        model.fuse(lambda _line: None, lambda _name, _why: None, Batch((X,)))
        _same(_run(model), before)


def test_a_front_end_cannot_take_what_another_has() -> None:
    taken = FrontEnd("again", FRONT_ENDS.get("torch").open, types=(nn.Module,))
    with pytest.raises(
        UsageError, match=r"'again' takes 'torch\.nn\.modules\.module\.Module', which 'torch' takes already"
    ):
        register_front_end(taken)
    assert "again" not in FRONT_ENDS


def test_what_no_front_end_takes_is_said_with_what_they_take(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidModelError, match=r"cannot compress a builtins\.dict; .*Module.*, or a path to \.onnx or \.pt2"
    ):
        open_model({})
    with pytest.raises(
        UsageError, match=r"cannot read 'net\.tflite' as a model; give a file that ends in \.onnx or \.pt2"
    ):
        open_model(tmp_path / "net.tflite")


def test_the_nearest_class_decides() -> None:
    class Mine(nn.Linear):
        """A class of somebody's own."""

    assert front_end_of(Mine(2, 2)).name == "torch"
    assert front_end_of(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))).name == "torch.fx"
