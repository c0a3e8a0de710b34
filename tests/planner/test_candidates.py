"""Which ranks are tried."""

from __future__ import annotations

import pytest

from tdpass.formats import FORMATS
from tdpass.formats.layer import dense_cost
from tdpass.planner.tried_ranks import worthwhile_ranks
from tdpass.site import Site

LARGE = Site("large", "conv", (512, 512, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.mark.parametrize("name", ["cp", "block_term", "tucker2", "channel_svd"])
def test_ranks_fall_and_a_single_one_halves_the_layer(name: str) -> None:
    dense = dense_cost(LARGE).params
    costs = [FORMATS.get(name).cost(LARGE, rank).params for rank in worthwhile_ranks(LARGE, name, 8)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] < dense
    assert 1 < len(costs) <= 8
    (only,) = worthwhile_ranks(LARGE, name, 1)
    assert abs(FORMATS.get(name).cost(LARGE, only).params / dense - 0.5) < 0.05


def test_a_layer_that_nothing_makes_smaller_has_no_ranks() -> None:
    assert worthwhile_ranks(Site("tiny", "linear", (1, 1)), "svd", 1) == []


# of cores, r x r numbers are too small a share for a rank to pay that did not before
SMALL = {("tensor_ring_pivot", "linear"), ("tensor_train_pivot", "linear")}
LEAN = [name for name in FORMATS.names() if name.endswith("_pivot")]
PLACES = [
    Site("linear", "linear", (64, 96)),
    Site("conv", "conv", (32, 24, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
]


@pytest.mark.parametrize(
    ("name", "site"), [(name, site) for name in LEAN for site in PLACES if FORMATS.get(name).fits(site)]
)
def test_a_format_that_holds_nothing_twice_tries_what_its_chain_does_and_some_above(
    name: str, site: Site
) -> None:
    fmt = FORMATS.get(name)
    lean, chain = worthwhile_ranks(site, name, 12), worthwhile_ranks(site, fmt.chain.name, 12)
    spared = [rank for rank in chain if rank in set(fmt.ranks(site))]
    assert set(spared) <= set(lean)
    assert ((name, site.kind) not in SMALL) <= len(lean) - len(spared) <= 3
    costs = [fmt.cost(site, rank).params for rank in lean]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] <= FORMATS.get(fmt.chain.name).cost(site, spared[-1]).params
