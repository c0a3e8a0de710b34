"""Simulated arrays: ideal ones answer as the mapped weights do.

Each fault is held to what it is in numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from training_run import network, trained_by

import tdpass
from tdpass.crossbars import Devices, chip, map_model, simulate, simulated
from tdpass.crossbars.devices import behind_wires
from tdpass.errors import UsageError
from tdpass.methods import Crossbar
from tdpass.targets.crossbar import CrossbarArray

ADMM = replace(CrossbarArray.load("admm_32x32"), rows=16, columns=12, rows_at_once=8)
X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
IDEAL = Devices(converters=False)


def far(answer: torch.Tensor, exact: torch.Tensor) -> float:
    return float((answer - exact).detach().norm() / exact.detach().norm())


def with_mapped_weights(net: nn.Module, array: CrossbarArray) -> nn.Module:
    mapped, made = map_model(net, array), network()
    made.load_state_dict(net.state_dict())
    with torch.no_grad():
        for matrix in mapped.map.matrices:
            weight = made.get_submodule(matrix.site).weight
            weight.copy_(mapped.matrix(matrix).T.reshape(weight.shape))
    return made


@pytest.mark.parametrize(
    "array",
    [ADMM, replace(ADMM, weight_bits=5), replace(ADMM, slices="columns", cell_bits=3)],
    ids=["9 bits", "5 bits", "adjacent"],
)
def test_ideal_arrays_answer_as_their_weights_do(array: CrossbarArray) -> None:
    net = network()
    made = simulated(net, map_model(net, array), IDEAL)
    torch.testing.assert_close(made(X), with_mapped_weights(net, array)(X), rtol=1e-4, atol=1e-5)
    assert torch.equal(net(X), network()(X))  # the model is as it was


def test_fragments_are_added_up_with_their_signs() -> None:
    method = Crossbar(keep=900, array="forms", admm=2, retrain=0, fix=1, rho=0.5)
    artifact = trained_by(method)
    made = simulated(artifact.model, map_model(artifact.model, method.machine), IDEAL)
    torch.testing.assert_close(made(X), artifact.model(X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("formats", [["tucker2", "svd"], ["cp", "svd"], ["tensor_train"], ["block_term"]])
def test_factored_layers_are_simulated_product_by_product(formats: list[str]) -> None:
    made = tdpass.compress(
        network(), {"params": 0.6}, formats=formats, example_inputs=X[:1], cache=False, strict=False
    ).model
    fine = replace(ADMM, weight_bits=9, least_siemens=1e-9)
    answer = simulated(made, map_model(made, fine, example_inputs=X[:1]), IDEAL, example_inputs=X[:1])(X)
    assert far(answer, made(X)) < 0.05


def test_more_bits_of_converters_come_nearer() -> None:
    net = network()
    exact = with_mapped_weights(net, ADMM)(X)
    errors = []
    for bits in (4, 6, 8, 12):
        array = replace(ADMM, adc_bits=bits, input_bits=bits)
        errors.append(far(simulated(net, map_model(net, array))(X), exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < errors[0]


def test_conductances_vary_log_normally_and_absent_cells_stay_absent() -> None:
    siemens = torch.full((4, 100, 100), 5e-7)
    siemens[:, :, ::2] = 0
    made = Devices(variation=0.2).programmed(siemens, ADMM, 0)
    there = made[siemens > 0]
    assert not made[siemens == 0].any()
    assert float((there / 5e-7).log().mean()) == pytest.approx(0.0, abs=0.005)
    assert float((there / 5e-7).log().std()) == pytest.approx(0.2, rel=0.02)
    assert torch.equal(Devices(variation=0.2).programmed(siemens, ADMM, 0), made)
    assert not torch.equal(Devices(variation=0.2).programmed(siemens, ADMM, 1), made)


def test_stuck_cells_are_at_the_ends_of_their_range() -> None:
    siemens = torch.full((2, 200, 100), 5e-7)
    made = Devices(stuck_on=0.1, stuck_off=0.05).programmed(siemens, ADMM, 0)
    shares = [float(torch.isclose(made, torch.tensor(value)).float().mean()) for value in (1e-6, 1e-7, 5e-7)]
    assert shares == pytest.approx([0.1, 0.05, 0.85], abs=0.01)
    for wrong in ({"variation": -0.1}, {"stuck_on": 0.6, "stuck_off": 0.6}):
        with pytest.raises(UsageError, match="shares within 1"):
            Devices(**wrong)  # type: ignore[arg-type]


def currents(siemens: np.ndarray, volts: np.ndarray, ohms: float) -> np.ndarray:
    """The currents out of the columns, by Kirchhoff's laws at every crossing of a row with a column."""
    rows, columns = siemens.shape
    size, wire = rows * columns, 1 / ohms
    system, known = np.zeros((2 * size, 2 * size)), np.zeros(2 * size)

    def link(a: int, b: int, g: float) -> None:
        system[a, a] += g
        system[b, b] += g
        system[a, b] -= g
        system[b, a] -= g

    for i, j in np.ndindex(rows, columns):
        row, column = i * columns + j, size + i * columns + j
        link(row, column, siemens[i, j])
        if j == 0:
            system[row, row] += wire
            known[row] += wire * volts[i]
        else:
            link(row, row - 1, wire)
        if i == rows - 1:
            system[column, column] += wire
        else:
            link(column, column + columns, wire)
    found = np.linalg.solve(system, known)
    return found[size + (rows - 1) * columns :] * wire


def test_wires_are_what_kirchhoff_says_to_the_first_order() -> None:
    draw = np.random.default_rng(0)
    siemens, volts = draw.uniform(1e-5, 1e-4, (7, 5)), draw.uniform(0, 1, 7)
    errors, drops = [], []
    for ohms in (4.0, 2.0, 1.0):
        exact = currents(siemens, volts, ohms)
        mine = volts @ behind_wires(torch.tensor(siemens), ohms).numpy()
        errors.append(float(np.abs(mine - exact).max()))
        drops.append(float(np.abs(volts @ siemens - exact).max()))
    assert errors[0] < 0.05 * drops[0]
    assert [errors[k] / errors[k + 1] for k in range(2)] == pytest.approx(
        [4, 4], rel=0.1
    )  # what is left is of second order


def test_monte_carlo_tells_mean_and_spread() -> None:
    net = network()
    mapped = map_model(net, ADMM)
    exact = net(X)

    def moved(made: nn.Module) -> float:
        return far(made(X), exact)

    still, little, much = (
        simulate(net, mapped, moved, Devices(variation=sigma), draws=4) for sigma in (0.0, 0.05, 0.3)
    )
    assert still.deviation == pytest.approx(0.0, abs=1e-12)
    assert still.mean < little.mean < much.mean
    assert little.deviation > 0
    assert len(much.scores) == 4
    assert simulate(net, mapped, moved, Devices(variation=0.3), draws=4) == much
    with pytest.raises(UsageError, match="draws=0"):
        simulate(net, mapped, moved, draws=0)


def test_what_is_not_simulated_says_so() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)
    )
    with pytest.raises(UsageError, match="pad with zeros"):
        simulated(net, map_model(net, ADMM, include=["0"]))
    made = simulated(net, map_model(net, ADMM, include=["2"]), IDEAL)
    with pytest.raises(UsageError, match="not simulated; leave their sites out"):
        made(X)
    with pytest.raises(UsageError, match="which is no site of the model"):
        simulated(nn.Sequential(nn.Linear(4, 4)), map_model(net, ADMM, include=["2"]))


@pytest.mark.parametrize(("name", "near"), [("pcm", 0.2), ("reram", 0.4), ("reram_cmo", 0.1)])
def test_measured_chips_are_those_of_aihwkit(name: str, near: float) -> None:
    pytest.importorskip("aihwkit")
    siemens = torch.linspace(1e-7, 1e-6, 16).repeat(2, 50, 1)
    siemens[:, 0] = 0
    made = Devices(chip=chip(name)).programmed(siemens, ADMM, 1)
    assert not made[:, 0].any()
    relative = (made - siemens)[:, 1:] / 1e-6
    assert 1e-4 < float(relative.std()) < near
    assert torch.equal(made, Devices(chip=chip(name)).programmed(siemens, ADMM, 1))
    state = torch.get_rng_state()
    later = Devices(chip=chip(name, seconds=86400.0)).programmed(siemens, ADMM, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(later, made)
    assert bool(((later >= 0) & later.isfinite()).all())


def test_the_log_normal_model_agrees_with_aihwkits_state_independent_one() -> None:
    custom: Callable[..., object] = pytest.importorskip(
        "aihwkit.inference.noise.custom"
    ).StateIndependentNoiseModel
    siemens = torch.full((4, 100, 100), 1e-6)
    mine = Devices(variation=0.05).programmed(siemens, ADMM, 0)
    theirs = (
        custom(g_max=1.0, prog_noise_scale=1.0, prog_coeff=[0.05]).apply_programming_noise_to_conductance(
            siemens * 1e6
        )
        * 1e-6
    )  # type: ignore[attr-defined]
    assert float(mine.std()) == pytest.approx(float(theirs.std()), rel=0.1)


def test_unknown_and_missing_chips_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="known: pcm, reram, reram_cmo"):
        chip("silicon")
    with pytest.raises(UsageError, match="seconds=-1"):
        chip("pcm", -1)

    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("tdpass.crossbars.chips.importlib.import_module", missing)
    with pytest.raises(UsageError, match=r"needs aihwkit.*pip install 'tdpass\[crossbar\]'"):
        chip("pcm")
