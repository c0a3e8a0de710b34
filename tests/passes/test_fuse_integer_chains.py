"""Layers of int8 factors that read integers as one chain: the same codes, chosen by time, saved as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.errors import DifferenceError
from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.formats.base import offered_formats
from tdpass.formats.lowering import chain_of
from tdpass.fusing import choose
from tdpass.fusing.choose import PLAIN
from tdpass.kernels import native
from tdpass.kernels.base import use_reference
from tdpass.layers.factorized import Factorized, empty_layer
from tdpass.layers.integer_chain import IntegerChain
from tdpass.models.abilities import Range
from tdpass.models.torch.fused import as_operator
from tdpass.models.torch.fused.deployable import fused as deployable
from tdpass.planner.integer_activations import with_ranges
from tdpass.site import Site

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())

UNMEASURED = "fuse-kernels{measure=false},verify"
SITES = (
    Site("0", "linear", (24, 36)),
    Site("0", "conv", (16, 12, 3, 3), (2, 1), ((1, 1), (0, 0)), (1, 2)),
    Site("0", "conv", (16, 12, 5), (1,), ((2, 2),), (1,)),
)


def form_of(name: str, site: Site, how: str) -> Form:
    ranks = FORMATS.get(name).ranks(site)
    return Form(name, ranks[len(ranks) // 2], ("int8",), activations=how)


FITTING = [(name, site) for site in SITES for name in offered_formats() if FORMATS.get(name).fits(site)]
CASES = [
    pytest.param(name, site, how, id=f"{name}-{site.axes}d-{how}")
    for name, site in FITTING
    for how in ("static", "dynamic")
    if not IntegerChain.why_not(empty_layer(site, form_of(name, site, how), torch.float32))
]


SERVED = {case.values[0] for case in CASES if case.values[2] == "dynamic"}


class Net(nn.Module):
    """Convolutions and linear layers, each followed by an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(12, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular")
        self.mix = nn.Linear(24, 32)
        self.fc = nn.Linear(32, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return self.fc(torch.relu(self.mix(h.flatten(2).transpose(1, 2))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images() -> Tensor:
    return torch.randn(16, 12, 6, 6, generator=torch.Generator().manual_seed(1))


def made(
    calibration: str, last: str = UNMEASURED, formats: tuple[str, ...] = ("svd", "tucker2")
) -> tdpass.Artifact:
    steps = f"plan{{macs=0.6}},factorize,quantize,quantize-activations{{calibration={calibration}}},{last}"
    return tdpass.compress(
        net(), None, images(), pipeline=steps, formats=list(formats), cache=False, effort="fast"
    )


def input_of(site: Site) -> Tensor:
    shape = (2, site.i, *(7 + axis for axis in range(site.axes))) if site.axes else (2, 5, site.i)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def layer_of(name: str, site: Site, how: str) -> Layer:
    """A random layer of int8 factors that read integers."""
    form, generator = form_of(name, site, how), torch.Generator().manual_seed(0)
    weight = torch.randn(site.shape, generator=generator, dtype=torch.float64) / site.i**0.5
    factors = FORMATS.get(name).factorize(weight, site, form.rank)
    plain = Layer(site, Form(name, form.rank), factors, torch.randn(site.o, generator=generator))
    stored = plain.to(torch.float32).stored(replace(form, activations=""))
    layer = replace(stored, form=form)
    ranges = dict.fromkeys(layer.storage.integer_factors, Range(-3.0, 4.0))
    return with_ranges(layer, ranges) if how == "static" else layer


def bound(layer: Layer, x: Tensor) -> float:
    """How far a layer's answers may lie from the operator's where every code is one step off.

    A code is the same in both unless the number lies so near to the middle of two codes that dividing by the
    scale and multiplying with its inverse round differently; it is then the next one.  A step off in what a
    stage reads is at most the largest sum of a row of |weights| times the step in what it makes, which lands
    on its own grid up to one step more.
    """
    chain, values = chain_of(layer), layer.values(torch.float64)
    assert chain is not None
    off, largest = 0.0, float(x.abs().max())
    for name, stage in zip(chain.factors, chain.stages, strict=True):
        held = layer.factors.get(layer.storage.range_of(name))
        gain = float(values[name].reshape(stage.outputs, -1).abs().sum(1).max())
        step = largest / 127 if held is None else float(held[0])
        off = gain * (off + step)
        largest *= gain
    return off


@pytest.mark.parametrize(("name", "site", "how"), CASES)
@torch.no_grad()
def test_every_chain_answers_as_its_reference_and_as_the_layer(name: str, site: Site, how: str) -> None:
    layer = layer_of(name, site, how)
    one, x = IntegerChain.of(Factorized(layer, nn.Parameter(layer.bias))).eval(), input_of(site)
    found, plain = one(x), Factorized.forward(one, x)
    assert torch.equal(found, one.packed_call(x))
    with use_reference():
        torch.testing.assert_close(found, one(x), rtol=1e-5, atol=1e-5)
    assert float((found - plain).abs().max()) <= bound(layer, x)
    same = (found - plain).abs() <= 1e-5 * float(plain.abs().max())
    assert float(same.double().mean()) > 0.95
    half, x = one.bfloat16(), x.bfloat16()
    found, plain = half(x), Factorized.forward(half, x)
    assert found.dtype == plain.dtype == torch.bfloat16
    last_digits = torch.finfo(torch.bfloat16).eps * float(plain.abs().max())
    assert float((found - plain).abs().max()) <= bound(layer, x) + last_digits
    whole = one.double()
    assert torch.equal(whole(x.double()), Factorized.forward(whole, x.double()))


@pytest.mark.parametrize("name", [name for name, site in FITTING if site is SITES[0] and name in SERVED])
@torch.no_grad()
def test_a_row_with_a_number_that_is_none_is_none_fused_and_as_it_is(name: str) -> None:
    layer, x = layer_of(name, SITES[0], "dynamic"), input_of(SITES[0])
    one = IntegerChain.of(Factorized(layer, nn.Parameter(layer.bias))).eval()
    for answer in (one, lambda x: Factorized.forward(one, x)):
        clean = answer(x)
        spoiled = x.clone()
        spoiled[1, 3, 7] = torch.nan
        found = answer(spoiled)
        assert found[1, 3].isnan().all()
        found[1, 3] = clean[1, 3]
        assert torch.equal(found, clean)


def test_chains_of_every_number_of_axes_are_among_the_cases() -> None:
    served = {(site.axes, name, how) for name, site, how in (case.values for case in CASES)}
    wanted = {(0, "svd", "static"), (0, "svd", "dynamic"), (1, "channel_svd", "static")}
    assert wanted | {(2, name, "static") for name in ("channel_svd", "tucker2", "spatial_svd")} <= served


@pytest.mark.parametrize(
    ("calibration", "formats"),
    [
        ("minmax", ("svd", "tucker2")),
        ("dynamic", ("svd", "channel_svd")),
        pytest.param("mse", ("svd", "spatial_svd"), marks=pytest.mark.slow),
        pytest.param("kl", ("svd", "channel_svd"), marks=pytest.mark.slow),
    ],
)
def test_it_is_verified_saved_and_exported(
    calibration: str, formats: tuple[str, ...], tmp_path: Path
) -> None:
    artifact, x = made(calibration, formats=formats), images()
    kinds = {
        name: type(part) for name, part in artifact.model.named_modules() if isinstance(part, Factorized)
    }
    whole = {"mix", "fc"} if calibration == "dynamic" else {"first", "second", "mix", "fc"}
    assert {name for name, kind in kinds.items() if kind is IntegerChain} == whole
    plain = made(calibration, "verify", formats)
    assert artifact.report.checks["divergence"] == pytest.approx(plain.report.checks["divergence"], rel=1e-2)
    assert artifact.report.final == plain.report.final
    assert artifact.model.state_dict().keys() == plain.model.state_dict().keys()
    with torch.no_grad():
        answer = artifact.model(x)
    program = torch.export.export(artifact.model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert sum("integer_chain" in str(node.target) for node in program.graph.nodes) == len(whole)
    torch.testing.assert_close(program.module()(x), answer, rtol=1e-6, atol=1e-6)
    assert len(program.module()(x[:5])) == 5
    torch.export.save(program, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(again(x), answer, rtol=1e-6, atol=1e-6)
    artifact.save(tmp_path / "net.safetensors")
    assert torch.equal(tdpass.load(tmp_path / "net.safetensors", net())(x), plain.model(x))


def test_it_compiles_trains_and_follows_what_it_is_made_of() -> None:
    model, x = made("minmax").model, images()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)
        before = model(x)
        model.fc.get_buffer(f"{model.fc.lowered.factors[-1]}_scale").mul_(2)
        torch.testing.assert_close(model(x), 2 * before, rtol=1e-5, atol=1e-6)
        assert deployable(model)[1] == 4
        with torch.autocast("cpu", torch.bfloat16):
            assert bool(torch.isfinite(model(x)).all())
    x.requires_grad_()
    model(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("calibration", ["minmax", "dynamic"])
def test_an_operator_that_errs_by_more_than_a_step_of_eight_bits_is_named(
    calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = IntegerChain.packed_call
    monkeypatch.setattr(IntegerChain, "packed_call", lambda layer, x: 1.05 * right(layer, x))
    with pytest.raises(DifferenceError, match="fuse-kernels"):
        made(calibration)


@pytest.mark.parametrize(("fused", "chosen"), [(1e-6, True), (1e-3, False)])
def test_it_is_chosen_where_it_is_measured_to_be_faster(
    fused: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(layer: Factorized, one: IntegerChain, like: Tensor) -> dict[str, float]:
        assert isinstance(one, IntegerChain)
        return {PLAIN: 1e-4, one.operator: fused}

    monkeypatch.setattr(as_operator, "_times", times)
    artifact = made("minmax", "fuse-kernels")
    assert any(isinstance(part, IntegerChain) for part in artifact.model.modules()) == chosen
    said = [why for why in artifact.report.declined.values() if "us as one operator" in why]
    assert bool(said) != chosen


def test_times_are_kept_by_form_grids_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    seconds_of = choose.seconds_of

    def counted(*args: object) -> dict[str, float]:
        runs.append(1)
        return seconds_of(*args)

    monkeypatch.setattr(choose, "seconds_of", counted)
    for how in ("static", "dynamic"):
        layer = layer_of("svd", SITES[0], how)
        module = Factorized(layer, nn.Parameter(layer.bias))
        one, like = IntegerChain.of(module), torch.empty(2, 5, 36, device="meta")
        turned = torch.empty(2, 36, 5, device="meta").transpose(1, 2)
        for x in (like, turned):
            first, count = as_operator._times(module, one, x), len(runs)
            assert all(seconds > 0 for seconds in first.values())
            assert as_operator._times(module, one, x) == first
            assert len(runs) == count
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("name", "numbers", "how", "reason"),
    [
        ("svd", ("int8", "float16"), "dynamic", "no int8 with one scale"),
        ("tucker2", ("int8",), "dynamic", "no ranges"),
        ("tensor_ring", ("int8",), "static", "no chain"),
    ],
)
def test_what_the_operator_does_not_serve_says_why(
    name: str, numbers: tuple[str, ...], how: str, reason: str
) -> None:
    site = SITES[name != "svd"]
    form = Form(name, form_of(name, site, how).rank, numbers, activations=how)
    assert reason in IntegerChain.why_not(empty_layer(site, form, torch.float32))
