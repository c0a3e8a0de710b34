"""Factored layers are used as torch lets any module be used.

Their factors are computed by others, transforms go through them, tracers write them down, hooks watch them.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune

from tdpass.form import Form
from tdpass.formats import FORMATS
from tdpass.formats.base import offered_formats
from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.kernels import native
from tdpass.layers.contracted import Contracted
from tdpass.layers.embedding_bag import open_embedding_bags
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused
from tdpass.site import Site
from tdpass.targets.layers import layer_of as made_up

SITES = (
    Site("linear", "linear", (24, 36)),
    Site("conv", "conv", (12, 16, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
)
FORMS = [(name, site) for name in offered_formats() for site in SITES if FORMATS.get(name).fits(site)]
needs_kernels = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


def layer_of(name: str, site: Site, seed: int = 0) -> Factorized:
    draw = torch.Generator().manual_seed(seed)
    fmt = FORMATS.get(name)
    rank = fmt.ranks(site)[-1]
    weight = torch.randn(site.shape, dtype=torch.float64, generator=draw)
    factors = fmt.decompose(weight, site, Metric(groups=site.groups)).factors(rank)
    layer = Layer(site, Form(name, rank), {key: value.float() for key, value in factors.items()})
    return Factorized(layer, nn.Parameter(torch.randn(site.o, generator=draw))).eval()


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def called_as(kind: type[Factorized], name: str, site: Site, seed: int = 0) -> Factorized:
    layer = layer_of(name, site, seed)
    return kind.of(layer) if kind in {Fused, Contracted} else layer  # type: ignore[attr-defined, no-any-return]


def inputs(site: Site, *lead: int) -> Tensor:
    size = (*(lead or (3,)), site.i, *([6] * site.axes))
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


USES = [
    pytest.param(kind, name, site, id=f"{kind.__name__}-{name}-{site.kind}")
    for kind, name, site in (
        (Factorized, "svd", SITES[0]),
        (Fused, "svd", SITES[0]),
        (Fused, "tucker2", SITES[1]),
        (Contracted, "tensor_train", SITES[0]),
    )
]
each_use = pytest.mark.parametrize(("kind", "name", "site"), USES)


class Shifted(nn.Module):
    """A weight and what is learned beside it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones_like(weight) / 8)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.shift


def shift(layer: nn.Module, name: str) -> None:
    parametrize.register_parametrization(layer, name, Shifted(getattr(layer, name)))


def mask(layer: nn.Module, name: str) -> None:
    prune.l1_unstructured(layer, name, 0.5)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("compute", [shift, mask])
@pytest.mark.parametrize(("name", "site"), FORMS)
def test_a_factor_may_be_computed(name: str, site: Site, compute: Callable[[nn.Module, str], None]) -> None:
    layer, x = layer_of(name, site), inputs(site)
    stored = layer.factors()
    part = next(key for key, value in stored.items() if isinstance(value, nn.Parameter))
    for made in (layer, Fused.of(copy.deepcopy(layer))):
        compute(made, part)
        expected = Factorized(
            Layer(site, made.form, {**stored, part: getattr(made, part).detach()}), made.bias
        )
        with torch.no_grad():
            torch.testing.assert_close(made(x), expected(x), rtol=1e-4, atol=1e-4)
            assert not torch.equal(expected(x), Factorized(made.layer(), None)(x))
        assert made.layer().factors.keys() == stored.keys()
        made(x).sum().backward()
        learned = [value for key, value in made.named_parameters() if key.startswith(("parametr", part))]
        assert learned
        assert all(value.grad is not None for value in learned)


@needs_kernels
@each_use
def test_it_is_mapped_over_a_batch_of_inputs(kind: type[Factorized], name: str, site: Site) -> None:
    layer, many = called_as(kind, name, site), inputs(site, 2, 3)
    with torch.no_grad():
        each = torch.stack([layer_of(name, site)(one) for one in many])
        torch.testing.assert_close(torch.func.vmap(layer)(many), each, rtol=1e-4, atol=1e-4)


@needs_kernels
@each_use
@torch.no_grad()
def test_it_is_mapped_within_a_compiled_function(kind: type[Factorized], name: str, site: Site) -> None:
    layer, plain, many = called_as(kind, name, site), layer_of(name, site), inputs(site, 2, 3)
    each = torch.compile(torch.func.vmap(layer), backend="aot_eager", fullgraph=True)(many)
    torch.testing.assert_close(each, torch.stack(list(map(plain, many))), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []
    torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(many[0])
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert ("tdpass.factor_chain.default" in called) == (kind is Fused)


@pytest.mark.slow  # torch compiles decompositions for the first of them
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@needs_kernels
@each_use
@torch.no_grad()
def test_a_slope_goes_forward_within_a_compiled_function(
    kind: type[Factorized], name: str, site: Site
) -> None:
    layer, plain, x = called_as(kind, name, site), layer_of(name, site), inputs(site)
    slope = torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,))[1], backend="aot_eager")(x)
    torch.testing.assert_close(slope, plain(x) - plain(torch.zeros_like(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # torch compiles decompositions for the first of them
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@needs_kernels
@each_use
def test_a_slope_goes_forward_through_it(kind: type[Factorized], name: str, site: Site) -> None:
    layer, plain, x = called_as(kind, name, site).requires_grad_(False), layer_of(name, site), inputs(site)
    along = torch.ones_like(x)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, along))).tangent
    with torch.no_grad():
        wanted = plain(along) - plain(torch.zeros_like(along))
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-4)


@needs_kernels
@each_use
def test_an_ensemble_of_it_is_one_call(kind: type[Factorized], name: str, site: Site) -> None:
    layers, x = [called_as(kind, name, site, seed) for seed in range(2)], inputs(site)
    parameters, buffers = torch.func.stack_module_state(layers)  # type: ignore[arg-type]
    base = copy.deepcopy(layers[0]).to("meta")

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(base, (parameters, buffers), (x,))
        return y

    with torch.no_grad():
        together = torch.func.vmap(one)(parameters, buffers)
        torch.testing.assert_close(together, torch.stack([each(x) for each in layers]), rtol=1e-4, atol=1e-4)


def jit(layer: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]


def proxies(layer: nn.Module, x: Tensor) -> Any:
    return make_fx(layer)(x)


@needs_kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", [jit, proxies])
@each_use
def test_what_is_traced_reads_its_factors(
    kind: type[Factorized], name: str, site: Site, trace: Callable[[nn.Module, Tensor], Any]
) -> None:
    layer, x = called_as(kind, name, site), inputs(site)
    with torch.no_grad():
        layer(x)  # packs its factors
        traced = trace(layer, x)
        for factor in layer.factors().values():
            factor.mul_(2.0)
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("kind", [Fused, Contracted, nn.EmbeddingBag])
def test_hooks_are_called_as_they_were_registered(kind: type[nn.Module]) -> None:
    seen: list[str] = []
    bag = kind is nn.EmbeddingBag
    module: nn.Module = nn.EmbeddingBag(8, 4) if bag else layer_of("tensor_train", SITES[0])

    def after(_module: nn.Module, _args: Any, kwargs: dict[str, Any], y: Tensor) -> None:
        seen.append(f"after {sorted(kwargs)} {tuple(y.shape)}")

    def before(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(f"before {sorted(kwargs)}")

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)
    made = open_embedding_bags(nn.Sequential(module)) if bag else kind.of(module)  # type: ignore[attr-defined]
    x = torch.zeros(3, 2, dtype=torch.long) if bag else inputs(SITES[0])
    y = made(x)
    assert seen == ["before []", f"after [] {tuple(y.shape)}"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("name", FORMATS.names())
def test_layers_of_every_format_are_copied_and_pickled(
    name: str, again: Callable[[Factorized], Factorized]
) -> None:
    fmt = FORMATS.get(name)
    site = next(site for site in SITES if fmt.chain.fits(site))
    rank = next(iter(fmt.chain.ranks(site)))
    for numbers in ((), ("int8",)):
        layer = Factorized(made_up(site, Form(name, rank, numbers), noise), None)
        twin = again(layer)
        assert twin.format is fmt
        assert torch.equal(twin(inputs(site)), layer(inputs(site)))
