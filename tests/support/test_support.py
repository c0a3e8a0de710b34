"""Every kind of layer through every front end.

It is a site that keeps its answers at full rank, or left with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_layers  # noqa: F401 - fills the table
import pytest
import torch
import torch_layers  # noqa: F401 - fills the table
from cells import CELLS, Cell
from page import PAGE, page
from torch import Tensor

import tdpass
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models import Model, open_model
from tdpass.models.abilities import DividesLayers, MakesPlain
from tdpass.site import Site

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
each = pytest.mark.parametrize("cell", CELLS.values(), ids=[cell.label for cell in CELLS.values()])


def full(model: Model, site: Site) -> Layer:
    """The site in two layers that hold all of it."""
    fmt = FORMATS.get("channel_svd" if site.axes else "svd")
    rank = fmt.ranks(site)[-1]
    factors = fmt.factorize(model.weight(site.name).float(), site, rank)
    return Layer(site, Form(fmt.name, rank), factors, model.bias(site.name)).to(model.weight(site.name).dtype)


def answers(returned: Any) -> list[Tensor]:
    values = returned.values() if isinstance(returned, dict) else [returned]
    return [value.double() for value in values]


def tolerance(cell: Cell) -> float:
    kinds = {tensor.dtype for tensor in cell.fed()}
    halves = kinds & {torch.float16, torch.bfloat16} or "cast" in cell.layer
    return 3e-2 if halves else 1e-4


def opened(cell: Cell) -> Model:
    """The model as `compress` goes on with it."""
    model = open_model(cell.make())
    if isinstance(model, MakesPlain):
        model.make_plain()
    model.observe(cell.batch)
    if isinstance(model, DividesLayers):
        model.divide()
    return model


@each
def test_what_is_found_is_what_the_table_says(cell: Cell) -> None:
    model = opened(cell)
    assert tuple(site.name for site in model.sites()) == cell.sites
    reasons = list(model.declined().values())
    assert bool(reasons) == bool(cell.left), reasons
    assert not cell.left or any(cell.left in reason for reason in reasons), reasons


@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell.label) for cell in CELLS.values() if cell.sites])
def test_every_site_at_full_rank_keeps_the_answers(cell: Cell) -> None:
    model = opened(cell)
    before = answers(model.run(cell.batch))
    for site in model.sites():
        model.replace(site.name, full(model, site))
    for ours, theirs in zip(answers(model.run(cell.batch)), before, strict=True):
        close = tolerance(cell)
        slack = close * (1 + float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=close, atol=slack + cell.step)
        assert int(((ours - theirs).abs() > slack).sum()) <= ours.numel() / 100


def test_the_page_of_the_table_is_current() -> None:
    path = Path(tdpass.__file__).parents[1] / "docs" / PAGE
    assert path.read_text() == page(), "write it anew: python tests/support/page.py"
