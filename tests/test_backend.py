"""`torch.compile(..., backend="tdpass")`: results, recompiles, and weights that change under it."""

from __future__ import annotations

import copy
import gc
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn, optim

import tdpass
from tdpass.dynamo.backend import Options, tdpass_backend
from tdpass.errors import UsageError
from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.formats.base import offered_formats
from tdpass.fusing import choose
from tdpass.fusing.spec import ChainCall, ChainSpec
from tdpass.fusing.torch_calls import in_torch
from tdpass.kernels.stage import Stage
from tdpass.layers.derived import DERIVED
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.site import Site

FUSE_ALL = {"inner": "eager", "measure": False}
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lru_cache.*"),
]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The operators called by each graph that the backend makes; one entry per compilation."""
    graphs: list[list[str]] = []

    def inner(module: Any, examples: Any) -> Callable[..., Any]:
        del examples
        graphs.append([str(node.target) for node in module.graph.nodes if node.op.startswith("call")])
        return module.forward

    monkeypatch.setitem(tdpass.dynamo.backend._INNER, "eager", inner)
    return graphs


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="tdpass", options={**FUSE_ALL, **options})


def fused(graphs: list[list[str]]) -> list[int]:
    """How many fused operators each graph has."""
    return [sum(name.startswith("tdpass.") for name in graph) for graph in graphs]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a, b, atol=tolerance * float(b.float().abs().max()), rtol=0)
    )


class Low(nn.Module):
    """A low-rank convolution with batch-norm, residual sum and activation, then a low-rank head."""

    def __init__(self, width: int = 16, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first, self.core, self.last = (
            nn.Conv2d(width, 4, 1, bias=False),
            nn.Conv2d(4, 6, 3, padding=1, bias=False),
            nn.Conv2d(6, width, 1),
        )
        self.norm = nn.BatchNorm2d(width)
        self.down, self.up = nn.Linear(width, 3, bias=False), nn.Linear(3, 10)
        self.activation = activation
        self.norm.running_mean.normal_(0, 0.3)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.activation(self.norm(self.last(self.core(self.first(x)))) + x)
        return self.up(self.down(x.mean((2, 3))))


@pytest.fixture
def low() -> Low:
    return Low().eval()


CLAMPS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.hardtanh,
    nn.Hardtanh(-0.5, 0.125),
    lambda x: x.clamp(0, 6),
    lambda x: x.clamp(max=0.5),
    lambda x: torch.clamp_min(x, -0.25),
    lambda x: x.clip(0.5, -0.5),
)


def cut_by_tensors(x: Tensor) -> Tensor:
    return x.clamp(max=x.mean())


LEFT = {torch.tanh: "tanh", cut_by_tensors: "clamp"}


@pytest.mark.parametrize(
    "activation",
    [F.relu, F.silu, F.gelu, torch.relu, F.relu6, nn.ReLU6(), nn.Hardtanh(0, 6), *CLAMPS, *LEFT],
)
@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_a_chain_with_its_epilogue_is_one_operator(
    activation: Callable[[Tensor], Tensor], channels_last: bool, seen: list[list[str]]
) -> None:
    model, x = Low(activation=activation).eval(), torch.randn(2, 3, 9, 7)
    assert close(compiled(model, channels_last=channels_last)(x), model(x))
    assert fused(seen) == [2]
    left = " ".join(seen[0])
    assert "batch_norm" not in left
    named = ("tanh", "hardtanh", "relu6", "clamp", "clamp_min", "clip")
    assert {name for name in named if name in left.split()} == (
        {LEFT[activation]} if activation in LEFT else set()
    )


CONV = Site("w", "conv", (12, 16, 3, 3), (2, 1), ((1, 1), (0, 2)), (1, 1), extents=(((9, 8), (5, 8)),))
LINE = Site("w", "conv", (12, 16, 5), (1,), ((2, 2),), (1,), extents=(((9,), (9,)),))
FULL = Site("w", "linear", (24, 36), extents=(((3,), (3,)),))
CASES = [
    (name, site) for name in offered_formats() for site in (CONV, LINE, FULL) if FORMATS.get(name).fits(site)
]


class OneLayer(nn.Module):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.pads = [size for pair in reversed(site.padding) for size in pair]
        cls = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}[len(site.kernel)]
        geometry = (
            {}
            if not site.kernel
            else {"kernel_size": site.kernel, "stride": site.stride, "dilation": site.dilation}
        )
        self.layer: nn.Module = cls(site.i, site.o, **geometry)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(F.pad(x, self.pads)))


@pytest.mark.parametrize(("name", "site"), CASES, ids=[f"{name}-{len(site.kernel)}d" for name, site in CASES])
@torch.no_grad()
def test_a_planned_layer_of_every_format_computes_what_its_factors_do(
    name: str, site: Site, seen: list[list[str]]
) -> None:
    fmt, model = FORMATS.get(name), OneLayer(site).eval()
    rank = fmt.ranks(site)[len(fmt.ranks(site)) // 4]
    weight = model.layer.weight
    layer = Layer(site, Form(name, rank), fmt.factorize(weight, site, rank), model.layer.bias).to(
        torch.float32
    )
    x = torch.randn(2, site.i, *site.extents[0][0]) if site.kernel else torch.randn(2, 5, site.i)
    choice = tdpass.planner.rank_plan.Choice(
        "layer", tuple(weight.shape), Form(name, rank), tdpass.Cost(), tdpass.Cost()
    )
    plan = tdpass.RankPlan((choice,), tdpass.Cost())
    assert close(compiled(model, plan=plan)(x), torch.relu(layer(x)), 1e-4)
    from tdpass.formats.lowering import lower

    lowered = lower(layer)
    assert fused(seen) == [int(lowered is not None and len(lowered.stages) > 1)]


@torch.no_grad()
def test_products_and_biases_written_by_hand_are_a_chain(seen: list[list[str]]) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(shape)) for shape in ((12, 3), (3, 8), (8,)))

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x @ self.a @ self.b + self.c)

    model, x = Products(), torch.randn(5, 7, 12)
    assert close(compiled(model)(x), model(x))
    assert fused(seen) == [1]
    assert len(seen[0]) == 1


@torch.no_grad()
def test_what_is_not_a_chain_is_left_alone(seen: list[list[str]]) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8, bias=index == 0) for index in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.tanh(self.b(self.a(x)))  # a bias between them
            y = self.c(x)
            return self.d(y), y  # the intermediate is read twice

    model, x = Apart(), torch.randn(3, 8)
    for ours, theirs in zip(compiled(model)(x), model(x), strict=True):
        assert torch.equal(ours, theirs)
    assert fused(seen) == [0]


@torch.no_grad()
def test_a_chain_does_not_move_past_a_change_in_place(seen: list[list[str]]) -> None:
    class Mutating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 3, bias=False), nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.b(self.a(x))
            x.add_(1)
            return y + x

    model, x = Mutating(), torch.randn(3, 8)
    assert close(compiled(model)(x), model(x))
    assert fused(seen) == [1]


@torch.no_grad()
def test_two_low_rank_layers_in_a_row_are_two_operators(seen: list[list[str]]) -> None:
    model = nn.Sequential(
        *(nn.Linear(i, o, bias=False) for i, o in ((16, 4), (4, 16), (16, 4), (4, 16)))
    ).eval()
    x = torch.randn(3, 16)
    assert close(compiled(model)(x), model(x))
    assert fused(seen) == [2]


class TwoBranches(nn.Module):
    """A sum of two low-rank layers: either could take it in."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Conv2d(8, 3, 1, bias=False), nn.Conv2d(3, 9, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x) + self.right(x))


def test_a_sum_of_two_chains_belongs_to_one_of_them(seen: list[list[str]]) -> None:
    model, x = TwoBranches().eval(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        assert close(compiled(model)(x), model(x))
    assert fused(seen) == [2]


@torch.no_grad()
def test_dynamic_batches_recompile_a_few_times_only(low: Low, seen: list[list[str]]) -> None:
    run = compiled(low)
    for size in (2, 3, 6, 5, 9, 17, 4, 16, 1):
        x = torch.randn(size, 3, 9, 7)
        assert close(run(x), low(x))
    assert len(seen) <= 4
    assert set(fused(seen)) == {2}


@torch.no_grad()
def test_edited_loaded_replaced_and_swapped_weights_are_seen_without_recompiling(
    low: Low, seen: list[list[str]]
) -> None:
    run, x, other = compiled(low), torch.randn(2, 3, 9, 7), Low().eval()

    def same() -> bool:
        return close(run(x), low(x))

    assert same()
    low.core.weight.mul_(1.5)
    assert same()
    low.norm.running_var.mul_(2)
    low.norm.bias.add_(1)
    assert same()
    low.load_state_dict(other.state_dict())
    assert same()
    low.last.weight = nn.Parameter(torch.randn_like(low.last.weight))
    assert same()
    low.up.weight.data = torch.randn_like(low.up.weight)
    assert same()
    low.down.weight.data.copy_(torch.randn_like(low.down.weight))
    assert not same()
    tdpass.invalidate(low)
    assert same()
    assert fused(seen) == [2]  # one compilation


@pytest.mark.parametrize(
    ("optimizer", "way"),
    [
        (optim.SGD, "fused"),
        (optim.Adam, "fused"),
        (optim.AdamW, "fused"),
        (optim.Adagrad, "fused"),
        (optim.SGD, "foreach"),
        (optim.SGD, "plain"),
    ],
)
def test_steps_of_every_optimizer_are_seen(low: Low, optimizer: Any, way: str) -> None:
    run, x = compiled(low), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        assert close(run(x), low(x))
    steps = optimizer(low.parameters(), lr=0.05, fused=way == "fused", foreach=way == "foreach")
    for _ in range(2):
        low(x).square().mean().backward()
        steps.step()
    with torch.no_grad():
        assert close(run(x), low(x))


def test_a_fused_step_is_seen_by_fused_layers() -> None:
    site = Site("layer", "linear", (24, 16))
    layer = Layer(site, Form("svd", (4,)), FORMATS.get("svd").factorize(torch.randn(24, 16), site, (4,)))
    module = Fused.of(Factorized(layer.to(torch.float32), None))
    x = torch.randn(5, 16)
    with torch.no_grad():
        module(x)
    steps = optim.SGD(module.parameters(), lr=0.5, fused=True)
    module(x).square().mean().backward()
    steps.step()
    with torch.no_grad():
        assert close(module(x), module.layer()(x))


@torch.no_grad()
def test_models_of_a_class_with_other_constants_share_a_backend(seen: list[list[str]]) -> None:
    for eps, slope in ((1e-5, 0.1), (1e-3, 0.2), (0.5, 0.3)):
        low = Low(activation=lambda x, slope=slope: F.leaky_relu(x, slope)).eval()
        low.norm.eps = eps
        x = torch.randn(2, 3, 9, 7)
        assert close(compiled(low)(x), low(x))
    assert all(count > 0 for count in fused(seen))


@torch.no_grad()
def test_instances_of_a_class_share_a_graph_and_not_their_weights(seen: list[list[str]]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 3, bias=False), nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.b(self.a(x)))

    blocks, x = [Block() for _ in range(4)], torch.randn(3, 8)
    for block in blocks:
        assert close(compiled(block)(x), block(x))
    assert close(compiled(blocks[0])(x), blocks[0](x))
    assert len(seen) <= 2


@torch.no_grad()
def test_entries_die_with_their_weights() -> None:
    low = Low().eval()
    run = compiled(low)
    run(torch.randn(2, 3, 9, 7))
    assert len(DERIVED) > 0
    low.core.weight = nn.Parameter(torch.randn_like(low.core.weight))
    run(torch.randn(2, 3, 9, 7))
    count = len(DERIVED)
    del run, low
    torch._dynamo.reset()
    gc.collect()
    assert len(DERIVED) < count
    assert len(DERIVED) == 0


@torch.no_grad()
def test_tied_weights_and_graph_breaks(seen: list[list[str]]) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 3, bias=False), nn.Linear(3, 8)
            self.c = nn.Linear(3, 8)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            torch._dynamo.graph_break()
            return self.c(self.a(torch.relu(x)))

    model, x = Broken(), torch.randn(3, 8)
    assert close(compiled(model)(x), model(x))
    assert fused(seen) == [1, 1]
    model.b.weight.add_(1)
    assert close(compiled(model)(x), model(x))


@torch.no_grad()
def test_autocast_keeps_its_types(low: Low, seen: list[list[str]]) -> None:
    x = torch.randn(2, 3, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(compiled(low)(x), low(x), 4e-2)
    assert fused(seen)[0] >= 1


def test_inference_mode_and_weights_made_in_it(low: Low) -> None:
    x = torch.randn(2, 3, 9, 7)
    with torch.inference_mode():
        assert close(compiled(low)(x), low(x))
        born = Low().eval()
        assert close(compiled(born)(x), born(x))


def test_a_graph_that_computes_gradients_is_exact_and_says_so(
    low: Low, seen: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 3, 9, 7)
    with caplog.at_level(logging.WARNING, "tdpass.backend"):
        y = compiled(low)(x)
    assert torch.equal(y, low(x))
    y.sum().backward()
    assert low.core.weight.grad is not None
    assert fused(seen) == [0]
    assert len(caplog.records) == 1


@torch.no_grad()
def test_views_and_output_layouts_survive(seen: list[list[str]]) -> None:
    class Images(nn.Module):
        def __init__(self, *, view: bool) -> None:
            super().__init__()
            self.low, self.view = (
                nn.Sequential(nn.Conv2d(8, 3, 1, bias=False), nn.Conv2d(3, 8, 3, padding=1)),
                view,
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.low(x)
            return y.view(len(x), -1) if self.view else y

    x = torch.randn(2, 8, 5, 6)
    for view in (True, False):
        model = Images(view=view).eval()
        y = compiled(model)(x)
        assert close(y, model(x))
        assert y.is_contiguous()
    assert fused(seen) == [1, 1]


@torch.no_grad()
def test_a_budget_plans_on_the_weights_of_the_graph(
    residual: nn.Module, images: Tensor, seen: list[list[str]]
) -> None:
    y = compiled(residual, budget={"params": 0.5})(images)
    assert not close(y, residual(images))
    assert bool(torch.isfinite(y).all())
    assert fused(seen)[0] >= 1


@torch.no_grad()
def test_a_plan_and_its_file_make_what_compress_makes(
    residual: nn.Module, images: Tensor, folder: Path
) -> None:
    artifact = tdpass.compress(
        residual, {"macs": 0.5}, example_inputs=images[:2], pipeline="plan{joint=false},factorize"
    )
    artifact.plan.save(folder / "plan.json")
    assert isinstance(artifact.model, nn.Module)
    for plan in (artifact.plan, str(folder / "plan.json")):
        torch._dynamo.reset()
        assert close(compiled(copy.deepcopy(residual), plan=plan)(images), artifact.model(images), 1e-4)


@torch.no_grad()
def test_factors_follow_the_weight(residual: nn.Module, images: Tensor, seen: list[list[str]]) -> None:
    plan = tdpass.make_plan(residual, {"params": 0.5}).plan
    run = compiled(residual, plan=plan)
    before = run(images)
    residual.first.weight.mul_(-1)
    residual.second.weight.mul_(2)
    assert not close(run(images), before)
    again = torch.compile(copy.deepcopy(residual), backend="tdpass", options={**FUSE_ALL, "plan": plan})
    assert close(run(images), again(images), 1e-4)


@pytest.mark.parametrize("bad", [{"inner": "tvm"}, {"measure": 1}, {"budgets": {}}])
def test_options_that_are_not_known_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"option"):
        Options.of(bad)


def test_it_is_registered_by_name_and_in_the_packaging() -> None:
    assert "tdpass" in torch.compiler.list_backends()
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'tdpass = "tdpass.dynamo.backend:tdpass_backend"' in text
    assert callable(tdpass_backend)
    command = (
        "import tdpass, torch; tdpass.dynamo.backend.register(); "
        "assert 'tdpass' in torch.compiler.list_backends()"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


REGISTERED_LATER = """
import sys, tdpass
name = "torch._dynamo.backends.registry"
sys.modules.pop(name, None)
tdpass.dynamo.backend.entry_points = lambda group: []
tdpass.dynamo.backend.register()
tdpass.dynamo.backend.register()
assert name not in sys.modules
import torch._dynamo.backends.registry as registry
assert registry._COMPILER_FNS["tdpass"] is tdpass.dynamo.backend.tdpass_backend
assert registry.__spec__.loader is registry.__loader__ and type(registry.__loader__).__module__ != "tdpass.backend"
assert not any(isinstance(finder, tdpass.dynamo.backend._OnImport) for finder in sys.meta_path)
tdpass.dynamo.backend.register()
"""


def test_torch_is_left_to_import_its_registry() -> None:
    subprocess.run([sys.executable, "-c", REGISTERED_LATER], check=True)


@torch.no_grad()
def test_measured_choices_are_remembered_on_disk(
    low: Low, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("TDPASS_CACHE", str(folder))
    call = ChainCall(ChainSpec((Stage(8, 4), Stage(4, 8)), 2), (2, 8, 5, 5))
    first = choose.choose([in_torch(call)])
    assert first.plain > 0
    choose._table_in.cache_clear()
    monkeypatch.setattr(choose, "seconds_of", lambda *_: pytest.fail("measured again"))
    assert choose.choose([in_torch(call)]) == first


@torch.no_grad()
def test_measured_compilation_answers_the_same(low: Low) -> None:
    x = torch.randn(2, 3, 9, 7)
    assert close(compiled(low, measure=True)(x), low(x))


@pytest.mark.slow
@torch.no_grad()
def test_inductor_takes_the_rest(low: Low) -> None:
    run = torch.compile(low, backend="tdpass", options={"measure": False})
    for size in (2, 3, 6, 1):
        x = torch.randn(size, 3, 9, 7)
        assert close(run(x), low(x))
    low.core.weight.mul_(2)
    assert close(run(x), low(x))


@pytest.mark.slow
@torch.no_grad()
def test_inductor_on_a_compressed_model(residual: nn.Module, images: Tensor) -> None:
    model = tdpass.compress(residual, {"macs": 0.4}, images).model
    assert isinstance(model, nn.Module)
    opened = open_model(copy.deepcopy(model), Batch((images,)))
    opened.fuse(print, lambda name, reason: None)
    for module in (model, opened.unwrap()):
        torch._dynamo.reset()
        assert close(torch.compile(module, backend="tdpass")(images), model(images))
