"""Runs whose choices follow what a machine told go on to the bit where it would tell something else."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import training_run
from selection import mostly_slow

import tdpass
from tdpass.errors import UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.layer import cost_of
from tdpass.methods import METHODS
from tdpass.methods.ledger import FILE, Ledger
from tdpass.methods.tariff import Tariff
from tdpass.models import Batch, Model
from tdpass.site import Site
from tdpass.targets import Setting, Target, TimedTarget, Timing

OPTIONS: dict[str, dict[str, Any]] = {
    "haloc": {"warm": 1, "search": 2, "tune": 1, "ranks": 3},
    "batude": {"rounds": 4, "rho": 0.05},
    "lc": {"rounds": 4, "rho": 0.1},
}
Asked = dict[tuple[str, str], float]


class Moody(TimedTarget):
    """A machine elsewhere whose times are uneven, and that forgot what it `told` an earlier run."""

    name = "moody"
    here = False  # nothing is timed here in its place

    def __init__(self, told: Asked | None = None) -> None:
        super().__init__()
        self.told, self.asked = told or {}, {}

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> Target:
        return cls()

    def _seconds(self, site: Site, form: Form, how: str = "") -> float:
        mood = 7.0 if (site.name, f"{form}{how}") in self.told else 1.0
        off = random.Random(f"{site.name} {form}{how} {mood}").uniform(0.5, 1.5)
        return cost_of(site, form).macs * 1e-9 * off * mood

    def time(
        self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False
    ) -> list[Timing]:
        how = " with care" if careful else ""
        found = {f"{form}{how}": self._seconds(site, form, how) for form in forms}
        self.asked |= {(site.name, asked): seconds for asked, seconds in found.items()}
        return [Timing(seconds, "moody") for seconds in found.values()]

    def time_models(
        self, models: Sequence[Model], batch: Batch, setting: Setting, yardstick: Site | None = None
    ) -> list[float]:
        assert yardstick is not None
        scale = self._seconds(yardstick, DENSE)
        return [scale * model.params() for model in models]


class Here(Moody):
    here = True


class Summed(Moody):
    """A whole network takes what its layers do, and half as much beside them."""

    def time_models(
        self, models: Sequence[Model], batch: Batch, setting: Setting, yardstick: Site | None = None
    ) -> list[float]:
        rest = 0.5 * sum(self._seconds(site, DENSE) for site in models[0].sites())
        return [
            rest + sum(self._seconds(site, _form(model, site)) for site in model.sites()) for model in models
        ]


def _form(model: Model, site: Site) -> Form:
    layer = model.layer(site.name)
    return DENSE if layer is None else layer.form


def train(
    method: str, machine: Moody, folder: Path, stop: tuple[str, int] | None = None, resume: bool = False
) -> tdpass.Artifact:
    def seen(what: str, done: int, of: int) -> None:
        if (what, done) == stop:
            raise KeyboardInterrupt

    made = METHODS.get(method)(budget={"seconds": 0.6}, target=machine, **OPTIONS[method])
    return tdpass.train(
        training_run.network(),
        training_run.data(),
        made,
        settings={"lr": 0.05},
        finetune=1,
        control=False,
        example_inputs=torch.zeros(2, 1, 8, 8),
        folder=folder,
        resume=resume,
        checkpoint_every=3,
        progress=seen,
    )


def test_all_methods_that_ask_a_target_are_tried() -> None:
    assert OPTIONS.keys() == {
        name
        for name in METHODS.names()
        if "target" in {option.name for option in fields(METHODS.get(name))}  # type: ignore[arg-type]
    }


STOPS = [("train (method)", 8), ("train (method)", 21), ("train (finetune)", 5)]


@pytest.mark.parametrize(
    ("method", "stop"),
    mostly_slow([*product(OPTIONS, STOPS)], [("haloc", STOPS[1]), ("batude", STOPS[1]), ("lc", STOPS[2])]),
)
def test_a_run_goes_on_without_what_the_machine_remembered(
    method: str, stop: tuple[str, int], tmp_path: Path
) -> None:
    straight = train(method, Moody(), tmp_path / "straight")
    first = Moody()
    with pytest.raises(KeyboardInterrupt):
        train(method, first, tmp_path / "stopped", stop)
    later = Moody(first.asked)
    resumed = train(method, later, tmp_path / "stopped", resume=True)
    assert not later.asked.keys() & first.asked.keys()
    assert resumed.plan == straight.plan
    expected = straight.model.state_dict()
    assert resumed.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_whole_networks_are_held_against_the_prices_that_were_told(tmp_path: Path) -> None:
    """A machine that says seven times as much of a layer as before says so of the whole."""
    opened = tdpass.open_model(training_run.network(), torch.zeros(1, 1, 8, 8))
    opened.observe(opened.example())
    site, first = next(iter(opened.sites())), Here()
    ledger = Ledger(tmp_path)
    before = Tariff("seconds", first, ledger=ledger).amounts(site, [DENSE])
    ledger.keep()
    later = Tariff("seconds", Here(first.asked), ledger=Ledger(tmp_path, resume=True))
    assert later.amounts(site, [DENSE]) == before
    wholes = [
        tariff.whole(tariff.target, [opened], opened.example, site)[0].seconds
        for tariff in (Tariff("seconds", first), later)
    ]
    assert wholes[0] == pytest.approx(wholes[1])


def test_a_new_run_in_an_old_folder_asks_again(tmp_path: Path) -> None:
    first = Moody()
    train("lc", first, tmp_path)
    again = Moody(first.asked)
    train("lc", again, tmp_path)
    assert again.asked.keys() >= first.asked.keys()
    kept = json.loads((tmp_path / FILE).read_text())
    assert {
        (site, form): seconds for site, told in kept.items() for form, seconds in told.items()
    } == again.asked


def test_prices_that_cannot_be_read_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"0": {"dense": "much"}}')
    with pytest.raises(UsageError, match="not a table of prices of a training run"):
        Ledger(tmp_path, resume=True)
    assert Ledger(tmp_path).amounts(Site("0", "linear", (2, 2)), [DENSE], lambda forms: [1.0]) == [1.0]


@pytest.mark.parametrize("stop", [("train (finetune)", 1), ("train (finetune)", 7)])
def test_a_pipeline_on_a_target_goes_on_by_the_plan_it_had(stop: tuple[str, int], tmp_path: Path) -> None:
    def run(machine: Moody, folder: str, stopped: bool = False, resume: bool = False) -> tdpass.Artifact:
        def seen(what: str, done: int, of: int) -> None:
            if stopped and (what, done) == stop:
                raise KeyboardInterrupt

        return tdpass.train(
            training_run.network(),
            training_run.data(),
            "plan{seconds=0.7,joint=false},factorize",
            compression={"target": machine, "cache": False, "strict": False, "effort": "fast"},
            calibration=torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
            settings={"lr": 0.05},
            finetune=2,
            control=False,
            example_inputs=torch.zeros(2, 1, 8, 8),
            folder=tmp_path / folder,
            resume=resume,
            checkpoint_every=3,
            progress=seen,
        )

    straight, first = run(Summed(), "straight"), Summed()
    with pytest.raises(KeyboardInterrupt):
        run(first, "stopped", stopped=True)
    resumed = run(Summed(first.asked), "stopped", resume=True)
    assert any(not choice.kept_dense for choice in straight.plan)
    assert [choice.form for choice in resumed.plan] == [choice.form for choice in straight.plan]
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
