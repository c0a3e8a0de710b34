"""Linear layers of small cores run as one operator: the same answers, chosen by measured times, saved as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.fusing.choose import PLAIN
from tdpass.kernels import native
from tdpass.layers.contracted import Contracted
from tdpass.layers.factorized import Factorized
from tdpass.models.torch.fused import as_operator
from tdpass.models.torch.fused.deployable import fused
from tdpass.targets import open_target
from tdpass.targets.layers import make_layer

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
CORES = ("tensor_train", "tensor_ring", "block_term")
UNMEASURED = "fuse-kernels{measure=false}"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24, bias=False)).eval()


def rows() -> Tensor:
    return torch.randn(5, 48, generator=torch.Generator().manual_seed(1))


def made(name: str, last: str = UNMEASURED) -> tdpass.Artifact:
    pipeline = f"plan,factorize,{last}"
    return tdpass.compress(net(), {"params": 0.5}, rows(), pipeline=pipeline, formats=[name], cache=False)


@pytest.mark.parametrize("name", CORES)
def test_it_answers_as_the_layer_follows_its_cores_and_is_saved_as_it(name: str, tmp_path: Path) -> None:
    plain, artifact = made(name, "verify").model, made(name)
    small = artifact.model
    calls = [part for part in small if isinstance(part, Contracted)]
    assert calls
    with torch.no_grad():
        torch.testing.assert_close(small(rows()), plain(rows()), rtol=1e-4, atol=1e-5)
        before = small(rows())
        next(calls[0].parameters()).mul_(2.0)
        assert not torch.allclose(small(rows()), before)
        next(calls[0].parameters()).div_(2.0)
    assert small.state_dict().keys() == plain.state_dict().keys()
    artifact.save(tmp_path / "net.safetensors")
    loaded = tdpass.load(tmp_path / "net.safetensors", net())
    torch.testing.assert_close(loaded(rows()), plain(rows()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CORES)
def test_it_trains_exports_and_compiles_as_the_layer_that_it_is(name: str) -> None:
    model = made(name).model
    model(rows()).sum().backward()
    assert all(part.grad is not None for part in model.parameters())
    with torch.no_grad():
        exported = torch.export.export(model, (rows(),)).module()
        torch.testing.assert_close(exported(rows()), model(rows()), rtol=1e-4, atol=1e-5)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(rows()), model(rows()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CORES)
def test_a_deployed_program_calls_the_operator_on_packed_cores(name: str) -> None:
    model = made(name).model
    twin, count = fused(model)
    assert count == sum(isinstance(part, Contracted) for part in model)
    program = torch.export.export(twin, (rows(),))
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("tdpass.tensor_chain.default") == count
    with torch.no_grad():
        torch.testing.assert_close(program.module()(rows()), model(rows()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("seconds", "chosen"), [(1e-6, True), (1e-3, False)])
def test_it_is_chosen_where_it_is_measured_to_be_faster(
    seconds: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(layer: Factorized, one: Contracted, like: Tensor) -> dict[str, float]:
        return {PLAIN: 1e-4, one.operator: seconds}

    monkeypatch.setattr(as_operator, "_times", times)
    artifact = made("tensor_train", "fuse-kernels")
    assert any(isinstance(part, Contracted) for part in artifact.model) == chosen


def test_the_target_prices_the_module_that_is_deployed() -> None:
    opened = made("tensor_train", "verify").opened
    target = open_target("cpu", "torch")
    runtime = next(each for each in target.runtimes if each.name == "kernels-channels")
    site = next(site for site in opened.sites() if opened.layer(site.name) is not None)
    call = runtime.prepare(make_layer(site, opened.layer(site.name).form, torch.float32), 1, 1)
    assert isinstance(call.func, Contracted)
