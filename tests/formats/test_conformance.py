"""What every registered format promises, on every kind of site that it fits."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.formats import FORMATS, Decomposition, Factors, Metric, Rank
from tdpass.formats.geometry import apply_dense
from tdpass.formats.layer import Layer, storage_of
from tdpass.formats.pivoted import LEAD
from tdpass.formats.steps import apply_steps, steps_of
from tdpass.kinds import KINDS, kind_of
from tdpass.layers.factorized import Factorized
from tdpass.ops import TorchOps
from tdpass.site import Site

# Alternating least squares may end in a poorer local optimum at a larger rank, by so much of the weight's
# norm.
LOCAL_OPTIMUM = 0.02

SITES = tuple(site for kind in KINDS for site in kind.examples())
EXTRA_RANKS: dict[str, list[Rank]] = {"tensor_train": [(2, 3, 2), (2, 3, 3, 2), (2, 4, 5, 5, 4, 2)]}
CHAINS = ("svd", "channel_svd", "input_svd", "spatial_svd", "tucker2")
METRICS = ("plain", "full", "diagonal")
CASES = [(name, site) for name in FORMATS.names() for site in SITES if FORMATS.get(name).fits(site)]
each_case = pytest.mark.parametrize(
    ("name", "site"), CASES, ids=[f"{name}-{site.name}" for name, site in CASES]
)
# how a weight is decomposed depends on its shape and groups alone, not on how its layer moves
APART = {(site.shape, site.groups): site for site in reversed(SITES)}
UNLIKE = [(name, site) for name, site in CASES if APART[site.shape, site.groups] is site]
EXACT_CASES = [(name, site) for name, site in UNLIKE if FORMATS.get(name).exact_at_full_rank]


def in_each_metric(cases: list[tuple[str, Site]]) -> pytest.MarkDecorator:
    """Every case in the full metric, the first of each format and layer kind in all; the others are slow."""
    first = {(name, site.kind): site for name, site in reversed(cases)}
    return pytest.mark.parametrize(
        ("name", "site", "kind"),
        [
            pytest.param(
                name,
                site,
                kind,
                id=f"{name}-{site.name}-{kind}",
                marks=() if kind == "full" or first[name, site.kind] is site else pytest.mark.slow,
            )
            for name, site in cases
            for kind in METRICS
        ],
    )


def normal(*shape: int, seed: int) -> Tensor:
    """The same normal numbers every time."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@functools.cache
def weight_of(site: Site) -> Tensor:
    """A weight whose spectra decay in every mode, as trained ones do."""
    weight = normal(*site.shape, seed=site.weights)
    for axis, size in enumerate(site.shape):
        mixing = (
            torch.linalg.qr(normal(size, size, seed=axis))[0]
            * torch.arange(1, size + 1, dtype=torch.float64) ** -0.7
        )
        weight = torch.tensordot(weight, mixing, dims=([axis], [1])).movedim(-1, axis)
    return weight


@functools.cache
def metric_of(site: Site, kind: str) -> Metric:
    """A metric with correlated inputs, one of them dead, from fewer samples than it has dimensions.

    Or its diagonal; per group.
    """
    each = [_metric_of_group(site, kind, group) for group in range(site.groups)]
    if site.groups == 1 or kind == "plain":
        return each[0] if site.groups == 1 else Metric(groups=site.groups)
    return Metric(
        torch.stack([own.inputs for own in each]),
        None if kind == "diagonal" else torch.stack([own.outputs for own in each]),
        groups=site.groups,
    )


def _metric_of_group(site: Site, kind: str, group: int) -> Metric:
    width, outputs = site.weights // site.o, site.o // site.groups
    reads = torch.relu(
        normal(max(1, width // 2), width, seed=1 + 10 * group) @ normal(width, width, seed=2) + 1
    )
    reads[:, 0] = 0
    covariance = reads.T @ reads / len(reads)
    sent = normal(2 * outputs, outputs, seed=3 + 10 * group) @ normal(outputs, outputs, seed=4)
    return {
        "plain": Metric(),
        "full": Metric(covariance, sent.T @ sent / len(sent)),
        "diagonal": Metric(covariance.diagonal()),
    }[kind]


@functools.cache
def decomposed(name: str, site: Site, kind: str) -> Decomposition:
    """The shared work of a case."""
    return FORMATS.get(name).decompose(weight_of(site), site, metric_of(site, kind))


@functools.cache
def factors_of(name: str, site: Site, kind: str, rank: Rank) -> Factors:
    """The factors of a case."""
    return decomposed(name, site, kind).factors(rank)


def error_of(name: str, site: Site, kind: str, rank: Rank, judge: str | None = None) -> float:
    """Relative error of factors found in the metric `kind`, measured in the metric `judge`."""
    built = FORMATS.get(name).reconstruct(factors_of(name, site, kind, rank), site)
    return metric_of(site, judge or kind).relative_error(weight_of(site), built)


def some_ranks(name: str, site: Site) -> list[Rank]:
    """Four candidates, cheap to expensive, for each length of rank, and the valid extra ranks."""
    offered = FORMATS.get(name).ranks(site)
    found: list[Rank] = []
    for length in sorted({len(rank) for rank in offered}):
        group = [rank for rank in offered if len(rank) == length]
        found += [group[index] for index in sorted({0, len(group) // 3, 2 * len(group) // 3, len(group) - 1})]
    return found + list(extra_ranks(name, site))


def extra_ranks(name: str, site: Site) -> Iterator[Rank]:
    """The extra ranks that the site allows."""
    for rank in EXTRA_RANKS.get(name, []):
        try:
            FORMATS.get(name).check_rank(site, rank)
        except PlanError:
            continue
        yield rank


def sample_of(site: Site, batch: int) -> Tensor:
    """Random input of a site."""
    return normal(*kind_of(site).sample(site, batch), seed=5)


def test_every_format_is_tried() -> None:
    tried = {name for name, _ in CASES}
    assert tried == {name for name in FORMATS.names() if not name.endswith(LEAD)}


@each_case
def test_factors_have_the_shapes_and_the_number_of_values_that_are_promised(name: str, site: Site) -> None:
    form = FORMATS.get(name)
    for rank in some_ranks(name, site):
        form.check_rank(site, rank)
        factors = dict(factors_of(name, site, "plain", rank))
        orders = {key: factors.pop(key) for key in form.orders(site, rank)}
        assert {key: tuple(factor.shape) for key, factor in factors.items()} == form.shapes(site, rank)
        assert all(factor.dtype == torch.float64 and factor.is_contiguous() for factor in factors.values())
        assert form.cost(site, rank).params == sum(factor.numel() for factor in factors.values())
        places = sum(order.int().nbytes for order in orders.values())
        assert form.cost(site, rank).bytes == form.cost(site, rank).params * site.itemsize + places
        assert {key: order.sort().values.tolist() for key, order in orders.items()} == {
            key: list(range(n)) for key, n in form.orders(site, rank).items()
        }


@each_case
def test_candidates_are_distinct_and_get_no_cheaper(name: str, site: Site) -> None:
    form = FORMATS.get(name)
    ranks = form.ranks(site)
    params = [form.cost(site, rank).params for rank in ranks]
    assert len(set(ranks)) == len(ranks)
    assert params == sorted(params)


@each_case
def test_apply_is_the_dense_layer_with_the_rebuilt_weight(name: str, site: Site) -> None:
    form = FORMATS.get(name)
    x, bias, ops = sample_of(site, 2), normal(site.o, seed=6), TorchOps()
    for rank in some_ranks(name, site):
        factors = factors_of(name, site, "plain", rank)
        expected = apply_dense(ops, x, form.reconstruct(factors, site), bias, site)
        torch.testing.assert_close(
            form.apply(ops, x, factors, bias, site, rank), expected, rtol=1e-9, atol=1e-9
        )
        without = form.apply(ops, x, factors, None, site, rank)
        torch.testing.assert_close(
            without, apply_dense(ops, x, form.reconstruct(factors, site), None, site), rtol=1e-9, atol=1e-9
        )


@each_case
def test_rebuilt_training_has_the_gradients_of_the_chain(name: str, site: Site) -> None:
    rank = next(iter(some_ranks(name, site)))
    factors = factors_of(name, site, "plain", rank)
    found = []
    for rebuilt in (False, True):
        module = Factorized(
            Layer(site, Form(name, rank), {key: factor.clone() for key, factor in factors.items()}),
            torch.nn.Parameter(normal(site.o, seed=6)),
        )
        module.rebuilt = rebuilt
        y = module.train()(sample_of(site, 2))
        y.backward(normal(*y.shape, seed=7))
        found.append(
            [y.detach(), *(parameter.grad for parameter in module.parameters() if parameter.requires_grad)]
        )
    for chain, dense in zip(*found, strict=True):
        torch.testing.assert_close(chain, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "site"),
    [case for case in CASES if case[1].name in ("linear", "conv2d")],
    ids=lambda value: getattr(value, "name", value),
)
def test_layers_compile_without_a_break(name: str, site: Site) -> None:
    x = sample_of(site, 2)
    for rank in {len(rank): rank for rank in some_ranks(name, site)}.values():
        module = Factorized(
            Layer(site, Form(name, rank), dict(factors_of(name, site, "plain", rank))), None
        ).train()
        for module.rebuilt in (False, True):
            torch._dynamo.reset()  # or what was compiled before counts as recompilation of this
            torch.testing.assert_close(
                torch.compile(module, backend="eager", fullgraph=True)(x), module(x), rtol=1e-9, atol=1e-9
            )


@each_case
def test_macs_are_those_of_a_real_call(name: str, site: Site) -> None:
    form = FORMATS.get(name)
    for rank in some_ranks(name, site):
        x, factors = sample_of(site, 1), factors_of(name, site, "plain", rank)
        with FlopCounterMode(display=False) as counter:
            form.apply(TorchOps(), x, factors, None, site, rank)
        assert form.macs(site, rank) == counter.get_total_flops() // 2


@in_each_metric(UNLIKE)
def test_error_falls_with_rank(name: str, site: Site, kind: str) -> None:
    tolerance = 1e-6 if FORMATS.get(name).exact_at_full_rank and kind == "plain" else LOCAL_OPTIMUM
    ranks = some_ranks(name, site)
    for low in ranks:
        for high in ranks:
            if len(low) == len(high) and low != high and all(a <= b for a, b in zip(low, high, strict=True)):
                assert error_of(name, site, kind, high) <= error_of(name, site, kind, low) + tolerance


@in_each_metric(EXACT_CASES)
def test_full_rank_is_exact(name: str, site: Site, kind: str) -> None:
    assert error_of(name, site, kind, FORMATS.get(name).ranks(site)[-1]) < 1e-7


@in_each_metric(UNLIKE)
def test_guarantee_holds(name: str, site: Site, kind: str) -> None:
    for rank in some_ranks(name, site):
        guarantee = decomposed(name, site, kind).guarantee(rank)
        if guarantee is None:
            continue
        measured = error_of(name, site, kind, rank)
        assert measured <= guarantee.value + 1e-7
        if guarantee.kind == "exact":
            assert measured**2 == pytest.approx(guarantee.value**2, abs=1e-10)


@in_each_metric(UNLIKE)
def test_the_metric_pays(name: str, site: Site, kind: str) -> None:
    for rank in some_ranks(name, site):
        assert error_of(name, site, kind, rank) <= error_of(name, site, "plain", rank, judge=kind) + 1e-8


@in_each_metric(UNLIKE)
def test_refining_goes_on_from_the_factors_it_is_given(name: str, site: Site, kind: str) -> None:
    form, rank, metric = FORMATS.get(name), some_ranks(name, site)[:2][-1], metric_of(site, kind)
    held = {key: normal(*shape, seed=len(key)) for key, shape in form.shapes(site, rank).items()}
    held |= {
        key: torch.arange(count - 1, -1, -1, dtype=torch.int32)
        for key, count in form.orders(site, rank).items()
    }
    weight = form.reconstruct(held, site)
    kept = form.refine(weight, site, rank, held, metric)
    assert metric.relative_error(weight, form.reconstruct(kept, site)) < 1e-7
    start = {
        key: factor + 0.03 * normal(*factor.shape, seed=9) if factor.is_floating_point() else factor
        for key, factor in held.items()
    }
    before = metric.relative_error(weight, form.reconstruct(start, site))
    found = form.refine(weight, site, rank, start, metric)
    assert {key: factor.shape for key, factor in found.items()} == {
        key: factor.shape for key, factor in start.items()
    }
    assert metric.relative_error(weight, form.reconstruct(found, site)) < 0.5 * before


@in_each_metric(UNLIKE)
def test_equal_inputs_give_equal_factors(name: str, site: Site, kind: str) -> None:
    rank = some_ranks(name, site)[:2][-1]
    again = FORMATS.get(name).factorize(weight_of(site), site, rank, metric_of(site, kind))
    first = factors_of(name, site, kind, rank)
    assert list(first) == list(again)
    assert all(torch.equal(first[key], again[key]) for key in first)


@in_each_metric(UNLIKE)
def test_degenerate_weights_give_finite_factors(name: str, site: Site, kind: str) -> None:
    form, rank = FORMATS.get(name), some_ranks(name, site)[-2:][0]
    # A geometric sequence is a product of geometric sequences however its axis is split, so this weight has
    # rank one in every format.
    sequences = (0.8 ** torch.arange(size, dtype=torch.float64) for size in site.shape)
    outer = functools.reduce(lambda left, right: left[..., None] * right, sequences)
    deficient = (normal(site.o, 2, seed=7) @ normal(2, site.weights // site.o, seed=8)).reshape(site.shape)
    for weight, bound in ((torch.zeros(site.shape), 0.0), (outer, 1e-5), (deficient, 1.0)):
        factors = form.factorize(weight, site, rank, metric_of(site, kind))
        assert all(bool(factor.isfinite().all()) for factor in factors.values())
        assert metric_of(site, kind).relative_error(weight, form.reconstruct(factors, site)) <= bound


@each_case
def test_a_rank_outside_the_limits_is_refused(name: str, site: Site) -> None:
    form = FORMATS.get(name)
    top = form.ranks(site)[-1]
    bad = {
        (),
        (*top, *top, *top, *top, *top, *top, *top, *top, *top, 1),
        tuple(0 for _ in top),
        tuple(math.prod(site.shape) + 1 for _ in top),
    }
    for rank in bad - {top}:
        with pytest.raises(PlanError, match=name):
            form.factorize(weight_of(site), site, rank)


@each_case
@pytest.mark.parametrize("with_bias", [False, True])
def test_steps_are_what_the_format_applies(name: str, site: Site, with_bias: bool) -> None:
    fmt = FORMATS.get(name)
    rank = fmt.ranks(site)[len(fmt.ranks(site)) // 2]
    form = Form(name, rank)
    storage = storage_of(site, form)
    steps = steps_of(site, form, storage, bias=True)
    if steps is None:
        assert name not in CHAINS or site.table or storage.orders
        return
    factors = {part: normal(*shape, seed=k) for k, (part, shape) in enumerate(storage.shapes.items())}
    x = normal(*kind_of(site).sample(site, 2), seed=9)
    bias = normal(site.o, seed=8) if with_bias else None
    expected = fmt.apply(TorchOps(), x, factors, bias, site, rank)
    assert torch.equal(apply_steps(TorchOps(), x, factors, bias, steps), expected)
