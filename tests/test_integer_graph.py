"""Integer chains in a graph: sums, activations and bytes between them, alike whoever records it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import tdpass
from tdpass.kernels import native
from tdpass.kernels.base import use_reference
from tdpass.kernels.grid import Grid
from tdpass.layers.integer_chain import IntegerChain
from tdpass.models.torch.fused.integer_graph import is_integer_chain, join_integers, pack_integers

pytestmark = [
    pytest.mark.skipif(bool(native.missing()), reason=native.missing()),
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lru_cache.*"),
]

STEPS = "quantize,quantize-activations{{calibration={}}},fuse-kernels{{measure=false}}"


class Images(nn.Module):
    """A stem with a max-pool, a block with a layer as shortcut, one with none, and a head that averages."""

    sample = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b, self.short = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)
        self.c, self.d = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, between: Callable[[Tensor, nn.Module], Tensor] = lambda y, _: y) -> Tensor:
        """`between` rounds what is handed over to the range that a layer reads."""
        h = between(F.max_pool2d(self.stem(x).relu(), 3, 2, 1), self.a)
        h = F.relu(self.b(between(F.relu(self.a(h)), self.b)) + between(self.short(h), None))
        h = between(h, self.c)
        h = torch.relu(self.d(between(torch.relu(self.c(h)), self.d)) + h)
        return self.head(h.mean((2, 3)))


class Signal(nn.Module):
    """One axis, in-place activations and clamps, a flattening, and two linear layers with `gelu` between."""

    sample = (4, 10)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)
        self.up, self.down = nn.Linear(60, 16), nn.Linear(16, 7)
        self.cut = nn.Hardtanh(-0.5, 0.75)

    def forward(self, x: Tensor, between: Callable[[Tensor, nn.Module], Tensor] = lambda y, _: y) -> Tensor:
        h = F.relu(self.a(x), inplace=True)
        h = self.b(between(h, self.b)).clamp_(-0.25, 0.5)
        h = between(h, self.up).flatten(1)
        return F.hardtanh(self.down(between(F.gelu(self.up(h)), self.down)), -0.125, 0.0625)


def quantized(net: nn.Module, calibration: str = "minmax") -> nn.Module:
    torch.manual_seed(0)
    made = type(net)().eval()
    data = torch.randn(16, *net.sample, generator=torch.Generator().manual_seed(1))
    model = tdpass.compress(made, None, data, pipeline=STEPS.format(calibration)).model
    assert isinstance(model, nn.Module)
    return model


def data_for(model: nn.Module) -> Tensor:
    return torch.randn(3, *model.sample, generator=torch.Generator().manual_seed(2))


def range_of(layer: IntegerChain) -> Grid:
    return Grid(*layer.get_buffer(layer._parts[2][0]).tolist())


def on_grid(y: Tensor, layer: IntegerChain | None) -> Tensor:
    """What bytes of the range that the layer reads stand for; a value that no layer reads stays as it is."""
    if layer is None:
        return y
    grid = range_of(layer)
    return grid.values(grid.codes(y))


def exported(model: nn.Module, x: Tensor) -> GraphModule:
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    return program.module()


def bytes_made(module: GraphModule) -> int:
    chains = [node for node in module.graph.nodes if is_integer_chain(node)]
    return sum(chain.kwargs.get("output_range") is not None for chain in chains)


CASES = [pytest.param(Images, 4, id="images"), pytest.param(Signal, 3, id="signal")]


@pytest.mark.parametrize(("kind", "handed"), CASES)
@torch.no_grad()
def test_bytes_between_chains_are_what_rounding_to_the_readers_range_gives(
    kind: type[nn.Module], handed: int
) -> None:
    model = quantized(kind())
    x, wanted = data_for(model), model(data_for(model), on_grid)
    module = exported(model, x)
    join_integers(module.graph)
    module.recompile()
    assert bytes_made(module) == handed
    assert torch.equal(module(x), wanted)
    with use_reference():
        assert torch.equal(module(x), wanted)
    assert pack_integers(module) == sum(isinstance(part, IntegerChain) for part in model.modules())
    assert torch.equal(module(x), wanted)
    assert not any(
        str(node.target).startswith(("aten.relu", "aten.gelu", "aten.clamp", "aten.hardtanh"))
        for node in module.graph.nodes
    )
    assert torch.equal(module(x[:2]), wanted[:2])


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(("kind", "handed"), CASES)
@torch.no_grad()
def test_the_backend_gives_the_same(
    kind: type[nn.Module], handed: int, freeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graphs = quantized(kind()), []

    def inner(module: Any, examples: Any) -> Callable[..., Any]:
        del examples
        graphs.append(module)
        return module.forward

    monkeypatch.setitem(tdpass.dynamo.backend._INNER, "eager", inner)
    x, wanted = data_for(model), model(data_for(model), on_grid)
    compiled = torch.compile(
        model, backend="tdpass", options={"inner": "eager", "freeze": freeze}, fullgraph=True
    )
    assert torch.equal(compiled(x), wanted)
    assert len(graphs) == 1
    assert bytes_made(graphs[0]) == (0 if freeze else handed)
    whole = sum("chain_int8" in str(node.target) for node in graphs[0].graph.nodes)
    assert whole == (sum(isinstance(part, IntegerChain) for part in model.modules()) if freeze else 0)
    twin = copy.deepcopy(model)
    for part in (*model.modules(), *twin.modules()):
        for name in getattr(part, "_parts", ((), (), ()))[2]:
            part.get_buffer(name)[0].mul_(1.5)
    changed = twin(x, on_grid)
    assert not torch.equal(changed, wanted)
    if freeze:
        assert torch.equal(compiled(x), wanted)
        tdpass.invalidate(model)
    assert torch.equal(compiled(x), changed)
    assert len(graphs) == 1 + freeze


@torch.no_grad()
def test_what_others_read_as_well_stays_floating_point() -> None:
    class Read(nn.Module):
        sample = (3, 6, 6)

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor, between: object = None) -> tuple[Tensor, ...]:
            h = torch.relu(self.a(x))
            k = self.b(h * 2)
            top, where = F.max_pool2d(k, 2, return_indices=True)
            return self.c(top), where, h

    model = quantized(Read())
    x = data_for(model)
    module = exported(model, x)
    join_integers(module.graph)
    module.recompile()
    assert bytes_made(module) == 0
    for found, wanted in zip(module(x), model(x), strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_rows_that_find_their_own_range_are_read_as_numbers() -> None:
    model = quantized(Signal(), "dynamic")
    x = data_for(model)
    module = exported(model, x)
    join_integers(module.graph)
    module.recompile()
    assert bytes_made(module) == 0
    torch.testing.assert_close(module(x), model(x), rtol=1e-6, atol=1e-6)
