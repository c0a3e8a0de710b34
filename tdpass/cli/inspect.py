"""tdpass inspect: what could be replaced, what it costs, and where factoring starts to pay."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from dataclasses import asdict

from rich.text import Text

from tdpass.cli.arguments import Verbs, add_data, add_model, add_torch, add_verb, data
from tdpass.cli.output import Output
from tdpass.cli.sources import read_source
from tdpass.cli.values import inputs
from tdpass.cost import Cost
from tdpass.data import calls_of
from tdpass.errors import TdpassError
from tdpass.form import DENSE, Rank
from tdpass.formats import FORMATS
from tdpass.formats.base import Format
from tdpass.formats.layer import cost_of, dense_cost
from tdpass.measures import counted
from tdpass.models import open_model
from tdpass.site import Site
from tdpass.terminal import InspectRow, inspect_table, refusals
from tdpass.views import summary
from tdpass.views.tables import Part, heading
from tdpass.views.units import human, share

_COMMON = ("svd", "spatial_svd", "channel_svd", "tucker2")


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(
        verbs, "inspect", run, "list the sites of a model and their costs", "tdpass inspect model.onnx"
    )
    add_model(parser)
    add_data(parser)
    add_torch(parser)
    parser.add_argument(
        "--format",
        metavar="NAME",
        choices=FORMATS.names(),
        action="append",
        default=[],
        help="formats to compare with dense; may be repeated",
    )


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Open the model and list it; nothing is changed."""
    source = read_source(arguments.model, arguments.weights, arguments.trust)
    formats = [
        FORMATS.get(name) for name in arguments.format or [name for name in _COMMON if name in FORMATS]
    ]
    example = inputs(arguments.input)
    model = open_model(source.load(), example)
    model.check_weights()
    if arguments.data is not None:
        model.observe(calls_of(model, data(arguments), 1)[0][0])
    elif example is None and (own := model.example()) is not None:
        with suppress(TdpassError):  # what it declares need not be enough to run on
            model.observe(own)
    forms = {
        site: DENSE if (layer := model.layer(site.name)) is None else layer.form for site in model.sites()
    }
    rows = [
        InspectRow(site, cost_of(site, form), _paying(site, formats), form) for site, form in forms.items()
    ]
    shown = [fmt.name for fmt in formats if arguments.format or any(fmt.name in row.paying for row in rows)]
    counted = model.count()
    whole = Cost(model.params(), counted.per_sample, model.bytes())
    inside = sum((row.cost for row in rows), Cost())
    declined = model.declined()

    def view(width: int | None) -> list[Part]:
        parts: list[Part] = (
            [*inspect_table(rows, whole, shown, width)]
            if rows
            else [Text("no site: nothing in this model can be factored")]
        )
        parts += refusals(summary.by_reason(declined), width)
        parts += ["", heading(f"{source.name} ({model.frontend})")]
        parts += [
            Text(
                f"the weights of {len(rows)} sites are {_part(inside, whole, 'params')} parameters, "
                f"{_part(inside, whole, 'bytes', 'B')}"
            )
        ]
        known = (
            f"{_part(inside, whole, 'macs')} MACs per sample"
            if whole.macs
            else "MACs unknown; give --input or --data to count them"
        )
        parts += [Text(known)]
        parts += [Text(f"not counted, as what it computes cannot be seen: {name}") for name in counted.unseen]
        if shown and rows:
            parts += [
                Text(
                    "Columns named after a format: the largest rank that costs fewer parameters and MACs "
                    "than the dense layer"
                )
            ]
        return parts

    sites = [
        {
            **asdict(row.site),
            "dense": _counted(dense_cost(row.site)),
            "form": str(row.form),
            "seen": row.site.seen,
            "largest_paying_rank": {name: list(rank) for name, rank in row.paying.items()},
        }
        for row in rows
    ]
    document = {
        "model": source.text,
        "frontend": model.frontend,
        **_counted(whole),
        "in_sites": _counted(inside),
        "sites": sites,
    }
    out.show({**document, "declined": dict(declined)}, view)
    return 0


def _part(inside: Cost, whole: Cost, measure: str, unit: str = "") -> str:
    """How much of one measure lies in the sites."""
    here, all_of_it = inside.get(measure), whole.get(measure)
    return f"{human(here, unit)} of {human(all_of_it, unit)} ({share(here, all_of_it)})"


def _counted(cost: Cost) -> dict[str, float]:
    """The measures that need no machine to run on."""
    return {measure: cost.get(measure) for measure in counted()}


def _paying(site: Site, formats: list[Format]) -> dict[str, Rank]:
    """The largest rank of each format that fits, where one costs less than dense."""
    found = {fmt.name: _largest_paying(fmt, site) for fmt in formats if fmt.fits(site)}
    return {name: rank for name, rank in found.items() if rank is not None}


def _largest_paying(fmt: Format, site: Site) -> Rank | None:
    dense = dense_cost(site)

    def pays(rank: Rank) -> bool:
        cost = fmt.cost(site, rank)
        return cost.params < dense.params and (not dense.macs or cost.macs < dense.macs)

    candidates = [rank for rank in fmt.ranks(site) if pays(rank)]
    if not candidates:
        return None
    best = max(candidates, key=math.prod)
    if len(best) == 1:
        # candidates are a grid; the cost of a single rank grows steadily, so the exact limit lies right above
        top = fmt.ranks(site)[-1][0]
        while best[0] < top and pays((best[0] + 1,)):
            best = (best[0] + 1,)
    return best
