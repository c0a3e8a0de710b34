"""fuse-kernels on torch models, and the module it puts in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.errors import UsageError
from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.formats.base import offered_formats
from tdpass.formats.contraction import contraction_of
from tdpass.formats.lowering import lower
from tdpass.fusing.choose import choosing
from tdpass.job import Job
from tdpass.kernels import native
from tdpass.kernels.stage import Lanes, Stage
from tdpass.layers.contracted import Contracted
from tdpass.layers.fused import Fused
from tdpass.models import Factorized, Model, open_model
from tdpass.models.base import Batch
from tdpass.models.torch.fused.deployable import fused as deployable
from tdpass.pipeline import Pipeline
from tdpass.site import Site
from tdpass.targets.runtimes import RUNTIMES

SITES = (
    Site("0", "linear", (24, 36)),
    Site("0", "conv", (12, 16, 3, 3), (2, 1), ((1, 1), (0, 0)), (1, 2)),
    Site("0", "conv", (12, 16, 5), (1,), ((2, 2),), (1,)),
    Site("0", "conv", (6, 8, 3, 3, 3), (1, 1, 1), ((1, 1),) * 3, (1, 1, 1)),
)
CASES = [(name, site) for name in offered_formats() for site in SITES if FORMATS.get(name).fits(site)]
needs_kernels = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a, b, atol=tolerance * float(b.detach().float().abs().max()), rtol=0)
    )


def dense_of(site: Site) -> nn.Module:
    if site.kind == "linear":
        return nn.Linear(site.i, site.o)
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(site.kernel) - 1]
    return cls(
        site.i,
        site.o,
        site.kernel,
        stride=site.stride,
        padding=tuple(before for before, _ in site.padding),
        dilation=site.dilation,
    )


def input_of(site: Site) -> Tensor:
    return (
        torch.randn(2, site.i, *(7 + axis for axis in range(len(site.kernel))))
        if site.kernel
        else torch.randn(2, 5, site.i)
    )


def fuse(model: Model, example: Tensor | None = None) -> tuple[bool, dict[str, str]]:
    declined: dict[str, str] = {}
    with choosing(measure=False):
        changed = model.fuse(
            lambda text: None, declined.__setitem__, None if example is None else Batch((example,))
        )
    return changed, declined


def compressed(name: str, site: Site, activation: nn.Module) -> tuple[nn.Module, Model]:
    module = nn.Sequential(dense_of(site), activation).eval()
    model = open_model(module, Batch((input_of(site),)))
    fmt = FORMATS.get(name)
    rank = fmt.ranks(model.sites()[0])[len(fmt.ranks(site)) // 2]
    layer = Layer(site, Form(name, rank), fmt.factorize(model.weight("0"), site, rank), model.bias("0"))
    model.replace("0", layer.to(torch.float32))
    return module, model


@needs_kernels
@pytest.mark.parametrize(("name", "site"), CASES, ids=[f"{name}-{len(site.kernel)}d" for name, site in CASES])
@torch.no_grad()
def test_every_format_that_lowers_is_fused_with_the_activation_after_it(name: str, site: Site) -> None:
    for activation in (nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Tanh()):
        module, model = compressed(name, site, activation)
        x = input_of(site)
        expected, names = module(x), list(module.state_dict())
        changed, declined = fuse(model, x)
        chain, cores = lower(model.layer("0")) is not None, contraction_of(model.layer("0")) is not None
        assert changed == (chain or cores)
        assert changed or "no chain" in declined["0"]
        assert close(module(x), expected)
        assert list(module.state_dict()) == names
        if changed:
            assert isinstance(module[0], Fused if chain else Contracted)
            assert isinstance(module[1], nn.Tanh if isinstance(activation, nn.Tanh) else nn.Identity)
        assert not fuse(model, x)[0]


@needs_kernels
@torch.no_grad()
def test_it_follows_its_factors_and_falls_back_where_it_must() -> None:
    module, model = compressed("tucker2", SITES[1], nn.ReLU())
    x = input_of(SITES[1])
    plain = copy.deepcopy(module)
    fuse(model)
    twin = copy.deepcopy(module)
    for change in (
        lambda m: m[0].core.mul_(2),
        lambda m: m.load_state_dict({key: value + 0.1 for key, value in plain.state_dict().items()}),
    ):
        change(module)
        change(plain)
        assert close(module(x), plain(x))
    assert not close(twin(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == plain(x).dtype
    assert close(module.double()(x.double()), plain.double()(x.double()), 1e-12)
    assert close(module.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16()), 3e-2)
    module.float(), plain.float()
    assert close(module(x[0]), plain(x[0]))
    with torch.enable_grad():
        module(x).sum().backward()
        plain(x).sum().backward()
    assert close(module[0].core.grad, plain[0].core.grad)


def called(module: nn.Module, model: Model, x: Tensor) -> Tensor:
    fuse(model)
    return module(x)


def compiled(module: nn.Module, model: Model, x: Tensor) -> Tensor:
    del model
    torch._dynamo.reset()
    return torch.compile(module, backend="tdpass", options={"inner": "eager", "measure": False})(x)


def deployed(module: nn.Module, model: Model, x: Tensor) -> Tensor:
    fuse(model)
    return deployable(module)[0](x)


def timed(module: nn.Module, model: Model, x: Tensor) -> Tensor:
    layer = model.layer("0")
    assert layer is not None
    extent = (
        (tuple(x.shape[2:]), tuple(module(x).shape[2:])) if x.dim() > 3 else ((x.shape[1],), (x.shape[1],))
    )
    call = RUNTIMES.get("kernels-channels").prepare(
        replace(layer, site=replace(layer.site, extents=(extent,))), len(x), 1
    )
    assert call is not None
    call()
    return module(x)


@needs_kernels
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("way", [called, compiled, deployed, timed])
@torch.no_grad()
def test_bfloat16_is_packed_in_pairs_where_the_machine_multiplies_pairs(
    way: Callable[[nn.Module, Model, Tensor], Tensor], pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, seen = Stage.pack, set()

    def watch(stage: Stage, weight: Tensor, lanes: Lanes) -> Tensor:
        seen.add(lanes)
        return pack(stage, weight, lanes)

    monkeypatch.setattr(native, "multiplies_pairs", lambda: pairs)
    monkeypatch.setattr(Stage, "pack", watch)
    for name, site in (("tucker2", replace(SITES[1], shape=(16, 16, 3, 3))), ("svd", SITES[0])):
        for dtype in (torch.bfloat16, torch.float32):
            seen.clear()
            module, model = compressed(name, site, nn.GELU())
            x = input_of(site).to(dtype)
            expected = module.to(dtype)(x)
            assert close(way(module, model, x), expected, 3e-2)
            assert seen == {"pairs" if pairs and dtype == torch.bfloat16 else "channels"}


@needs_kernels
def test_it_exports_and_compiles() -> None:
    for name, site in (("tucker2", SITES[1]), ("svd", SITES[0]), ("channel_svd", SITES[2])):
        torch._dynamo.reset()
        module, model = compressed(name, site, nn.GELU())
        x = input_of(site)
        with torch.no_grad():
            expected = module(x)
        fuse(model)
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        assert any("factor_chain" in str(node.target) for node in program.graph.nodes)
        with torch.no_grad():
            assert close(program.module()(x), expected)
            assert program.module()(torch.cat([x, x])).shape[0] == 4
            run = torch.compile(module, backend="aot_eager", fullgraph=True)
            assert close(run(x), expected)
            module[0].bias.add_(1)
            next(iter(module[0].factors().values())).mul_(2)
            assert close(run(x), module(x))
            run = torch.compile(module, backend="tdpass", options={"inner": "eager", "measure": False})
            assert close(run(x), module(x))


@needs_kernels
@torch.no_grad()
def test_a_fused_layer_that_is_replaced_keeps_the_activation_it_took_in() -> None:
    module, model = compressed("svd", SITES[0], nn.ReLU())
    fuse(model)
    layer = model.layer("0")
    assert layer is not None
    model.replace("0", layer)
    x = input_of(SITES[0])
    assert isinstance(module[1], nn.Identity)
    assert close(module(x), torch.relu(layer(x)))


@needs_kernels
@torch.no_grad()
def test_only_an_activation_that_nothing_else_sees_is_taken_in() -> None:
    shared = nn.Linear(36, 36)
    module = nn.Sequential(shared, nn.ReLU(), shared, nn.Tanh(), nn.Linear(36, 8), nn.GELU("tanh")).eval()
    x = torch.randn(3, 36)
    model = open_model(module, Batch((x,)))
    for site in model.sites():
        rank = (4,)
        fmt = FORMATS.get("svd")
        model.replace(
            site.name,
            Layer(
                site,
                Form("svd", rank),
                fmt.factorize(model.weight(site.name), site, rank),
                model.bias(site.name),
            ).to(torch.float32),
        )
    expected = module(x)
    assert fuse(model, x)[0]
    assert close(module(x), expected)
    assert [type(child) for child in module] == [Fused, nn.ReLU, Fused, nn.Tanh, Fused, nn.GELU]


@torch.no_grad()
def test_saved_and_loaded_it_computes_the_same(residual: nn.Module, images: Tensor, folder: Path) -> None:
    artifact = tdpass.compress(
        residual,
        {"macs": 0.5},
        images,
        pipeline="fold-batchnorm,plan,factorize,fuse-kernels{measure=false},verify",
        cache=False,
    )
    assert isinstance(artifact.model, nn.Module)
    if not native.missing():
        assert any(isinstance(child, Fused) for child in artifact.model.modules())
    artifact.save(folder / "small.safetensors")
    loaded = tdpass.load(folder / "small.safetensors", type(residual)().eval())
    assert close(loaded(images), artifact.model(images))
    assert any(isinstance(child, Factorized) for child in loaded.modules())


@torch.no_grad()
def test_measured_it_says_what_it_did(residual: nn.Module, images: Tensor) -> None:
    artifact = tdpass.compress(
        residual, {"macs": 0.5}, images, pipeline="plan,factorize,fuse-kernels", cache=False
    )
    (row,) = (row for row in artifact.report.passes if row.text.startswith("fuse-kernels"))
    fused = [child for child in artifact.model.modules() if isinstance(child, Fused)]
    assert row.changed == bool(fused)
    assert "factored layers are now one operator" in row.notes[0]


@needs_kernels
@torch.no_grad()
def test_an_exported_program_is_fused_and_saved(residual: nn.Module, images: Tensor, folder: Path) -> None:
    program = torch.export.export(
        residual, (images[:4],), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
    )
    artifact = tdpass.compress(
        program, {"macs": 0.5}, images, pipeline="plan,factorize,fuse-kernels{measure=false}", cache=False
    )
    artifact.save(folder / "small.pt2")
    loaded = torch.export.load(folder / "small.pt2")
    assert any("factor_chain" in str(node.target) for node in loaded.graph.nodes)
    plain = tdpass.compress(program, plan=artifact.plan, data=images, pipeline="factorize", cache=False)
    assert close(loaded.module()(images), plain.model.module()(images))  # type: ignore[attr-defined]


def test_options(residual: nn.Module) -> None:
    model = open_model(residual)
    with pytest.raises(UsageError, match="lanes='wide'"):
        Pipeline.parse("fuse-kernels{lanes=wide}").run(model, Job(tdpass.Report()))
    job = Job(tdpass.Report())
    assert not Pipeline.parse("fuse-kernels{lanes=pixels}").run(model, job)
    assert "no factored layer" in job.notes[0]
