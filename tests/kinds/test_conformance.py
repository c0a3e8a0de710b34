"""What every registered layer kind promises, on its own examples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.formats.geometry import apply_dense
from tdpass.formats.layer import dense_cost
from tdpass.kinds import KINDS, is_layer_call, kind_of, kind_of_module, plain_module, plain_site
from tdpass.ops import TorchOps
from tdpass.products import counting
from tdpass.site import Site
from tdpass.tape import record

EXAMPLES = [site for kind in KINDS for site in kind.examples()]
each_example = pytest.mark.parametrize("site", EXAMPLES, ids=[site.name for site in EXAMPLES])


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers every time."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(x: Tensor, weight: Tensor, site: Site) -> Tensor:
    """The dense layer in eager torch."""
    return apply_dense(TorchOps(), x, weight, None, site)


@each_example
def test_rows_times_weight_is_the_layer(site: Site) -> None:
    kind = kind_of(site)
    x, weight = normal(*kind.sample(site, 2)), normal(*site.shape, seed=1)
    rows, y = kind.rows(x, site), dense(x, weight, site)
    parts = zip(rows.chunk(site.groups, 1), weight.flatten(1).chunk(site.groups), strict=True)
    torch.testing.assert_close(
        torch.cat([part @ own.T for part, own in parts], 1), kind.output_rows(y, site), rtol=1e-9, atol=1e-9
    )
    some = kind.rows(x, site, 3, torch.Generator().manual_seed(3))
    assert some.shape == (min(3, len(rows)), rows.shape[1])
    assert all(bool((row == rows).all(1).any()) for row in some)


@each_example
def test_a_recorded_call_tells_the_extents(site: Site) -> None:
    kind = kind_of(site)
    x, weight = normal(*kind.sample(site, 2)), normal(*site.shape, seed=1)
    tape = record(lambda: dense(x, weight, site), (x,), {id(weight): site.name}, samples=2, held=(weight,))
    ((index,),) = tape.site_calls.values()
    extent, times = kind.call(site, *tape.calls[index].shapes)
    assert kind.extents(extent, times // 2) == site.extents
    assert is_layer_call(tape.calls[index].func)


@each_example
def test_dense_cost_is_that_of_a_real_call(site: Site) -> None:
    x, weight = normal(*kind_of(site).sample(site, 1)), normal(*site.shape, seed=1)
    with counting() as counter:
        dense(x, weight, site)
    assert dense_cost(site).macs == counter.macs
    assert dense_cost(site).params == weight.numel()


@each_example
def test_a_typical_extent_is_one_that_the_layer_can_meet(site: Site) -> None:
    kind = kind_of(site)
    (read, made) = kind.typical(site)
    assert len(read) == len(made) == max(1, site.axes)
    assert min(*read, *made) >= 1


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2), (5, 4, 3, 2, 1)])
def test_the_plainest_layer_of_a_weight_is_a_site_and_a_module(shape: tuple[int, ...]) -> None:
    module = plain_module(shape)
    kind = kind_of_module(module)
    assert kind is not None
    assert kind.site(module, "layer") == plain_site("layer", shape)
    assert kind_of(plain_site("layer", shape)) is kind


@pytest.mark.parametrize(
    "site",
    [
        Site("l", "linear", (5, 4)),
        Site("a", "conv", (5, 4, 3), (2,), ((1, 0),), (1,)),
        Site("b", "conv", (5, 4, 3, 2), (1, 2), ((1, 1), (0, 2)), (2, 1)),
        Site("c", "conv", (5, 4, 2, 1, 3), (1, 1, 1), ((0, 1), (0, 0), (1, 1)), (1, 1, 2)),
    ],
    ids=lambda site: f"{site.kind}{len(site.kernel)}",
)
def test_patches_times_weight_is_the_layer(site: Site) -> None:
    x = torch.randn(3, 7, 4) if site.kind == "linear" else torch.randn(3, 4, *(9, 8, 7)[: len(site.kernel)])
    weight = torch.randn(site.shape)
    padded = F.pad(x, [size for pair in reversed(site.padding) for size in pair])
    if site.kind == "linear":
        y = F.linear(x, weight)
    else:
        y = (F.conv1d, F.conv2d, F.conv3d)[len(site.kernel) - 1](
            padded, weight, None, site.stride, 0, site.dilation
        )
    rows = kind_of(site).rows(x, site)
    assert torch.allclose(rows @ weight.flatten(1).T, kind_of(site).output_rows(y, site), atol=1e-5)
    assert torch.equal(
        kind_of(site).rows(x[0], site), rows[: len(rows) // 3]
    )  # one sample without an axis of its own
    assert torch.equal(
        kind_of(site).output_rows(y[0], site), kind_of(site).output_rows(y, site)[: len(rows) // 3]
    )
    some = kind_of(site).rows(x, site, 5, torch.Generator().manual_seed(3))
    assert some.shape == (5, rows.shape[1])
    assert all(bool((row == rows).all(1).any()) for row in some)
