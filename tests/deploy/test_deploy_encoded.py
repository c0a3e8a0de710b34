"""Deployed models of encoded layers: packed constants alone, bytes between integer chains.

They give the same numbers elsewhere.
"""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import tdpass
from tdpass.fusing import choose
from tdpass.fusing.choose import PLAIN, Calls, choosing
from tdpass.kernels import build, native
from tdpass.layers.factorized import Factorized
from tdpass.layers.integer_chain import IntegerChain
from tdpass.models.base import Batch
from tdpass.models.torch.fused.deployable import (
    FusedLayer,
    PackedLevels,
    PackedSparse,
    PackedWeights,
    export_program,
    fused,
)
from tdpass.models.torch.fused.fuse import chosen_operators
from tdpass.timings import TimingTable

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())

ANYWHERE = {
    "tdpass.conv_chain_int8.default",
    "tdpass.linear_chain_int8.default",
    "tdpass.linear_chain.default",
}
ANYWHERE |= {"tdpass.conv_chain.default", "tdpass.weight_only_linear.default"}
ANYWHERE |= {"tdpass.level_conv2d.default", "tdpass.sparse_conv2d.default", "tdpass.sparse_linear.default"}
INTEGERS = "quantize,quantize-activations{calibration=minmax}"


class Net(nn.Module):
    """A stem with a max-pool, a residual block, and a head of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 1),
        )
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        h = torch.relu(self.b(torch.relu(self.a(h))) + h)
        return self.down(torch.relu(self.up(nn.functional.adaptive_avg_pool2d(h, 2).flatten(1))))


def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def encoded(steps: str) -> nn.Module:
    torch.manual_seed(0)
    model = tdpass.compress(Net().eval(), None, images(), pipeline=steps).model
    assert isinstance(model, nn.Module)
    return model


def operators(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose layers are one operator each wherever one serves, unmeasured."""
    with choosing(measure=False):
        return chosen_operators(copy.deepcopy(model), Batch((x,)), lambda _name, _why: None)


@pytest.mark.parametrize(
    ("steps", "kinds", "apart"),
    [
        (INTEGERS, {IntegerChain: 5}, 3e-2),
        (f"{INTEGERS},fuse-kernels{{measure=false}}", {IntegerChain: 5}, 3e-2),
        ("quantize{numbers=bfloat16}", {FusedLayer: 5}, 1e-5),
        ("quantize{numbers=int4/32}", {PackedWeights: 2}, 1e-5),
        ("sparsify{support=unstructured/30%}", {PackedSparse: 5}, 1e-5),
        ("quantize{numbers=levels16}", {PackedLevels: 3, PackedWeights: 2}, 1e-5),
    ],
)
@torch.no_grad()
def test_what_is_exported_calls_operators_that_need_no_python(
    steps: str, kinds: dict[type[nn.Module], int], apart: float, tmp_path: Path
) -> None:
    model, x = encoded(steps), images()
    network, layers = fused(operators(model, images()))
    found = [type(part) for part in network.modules()]
    assert {kind: found.count(kind) for kind in kinds} == kinds
    assert layers == sum(kinds.values())
    program = export_program(network, Batch((x[:2],)), dynamic_batch=True)
    called = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("tdpass.")]
    assert set(called) <= ANYWHERE
    assert len(called) == layers
    wanted, answer = model(x), program.module()(x)
    torch.testing.assert_close(answer, wanted, rtol=0, atol=apart * float(wanted.abs().max()))
    torch.export.save(program, tmp_path / "net.pt2")
    assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(x), answer)


@torch.no_grad()
def test_bytes_are_handed_over_in_an_exported_program() -> None:
    network = fused(operators(encoded(INTEGERS), images()))[0]
    program = export_program(network, Batch((images()[:2],)), dynamic_batch=True)
    bytes_made = [
        str(node.target)
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].dtype == torch.uint8
        and node.op == "call_function"
    ]
    assert bytes_made == [
        "tdpass.conv_chain_int8.default",
        "quantized.max_pool2d.default",
        "tdpass.conv_chain_int8.default",
        "tdpass.linear_chain_int8.default",
    ]
    assert not any("relu" in str(node.target) for node in program.graph.nodes)


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("slower", [PLAIN, "as one operator"])
@pytest.mark.parametrize(
    ("steps", "packed"),
    [
        (INTEGERS, IntegerChain),
        ("quantize{numbers=bfloat16}", FusedLayer),
        ("quantize{numbers=int4/32}", PackedWeights),
        pytest.param("sparsify{support=unstructured/30%}", PackedSparse, marks=pytest.mark.slow),
        ("plan{macs=0.6},factorize", FusedLayer),
    ],
)
@torch.no_grad()
def test_no_layer_is_packed_in_the_form_measured_slower(
    slower: str, steps: str, packed: type[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One way of every layer takes twice as long, by planted times; bytes that are handed on save nothing."""

    def seconds(calls: Calls, threads: int) -> dict[str, float]:
        del threads
        return {way: 2e-6 if (way == PLAIN) == (slower == PLAIN) else 1e-6 for way in calls}

    def keep(network: nn.Module, example: Batch, dynamic_batch: bool) -> ExportedProgram:
        programs.append(export_program(network, example, dynamic_batch))
        networks.append(network)
        return programs[0]

    networks: list[nn.Module] = []
    programs: list[ExportedProgram] = []
    deploying = importlib.import_module("tdpass.deploy")
    monkeypatch.setattr(choose, "seconds_of", seconds)
    monkeypatch.setattr(choose, "times_kept", lambda: TimingTable(None))
    monkeypatch.setattr(deploying, "export_program", keep)
    monkeypatch.setattr(deploying, "compile_package", lambda program, path: None)
    model, x = encoded(steps), images()[:2]
    layers = {name for name, part in model.named_modules() if isinstance(part, Factorized)}
    done = tdpass.deploy(model, x, tmp_path / "net.pt2")
    kept = {name for name in layers if type(networks[0].get_submodule(name)) is Factorized}
    measured = {name for name in layers if " us as " in done.declined.get(name, " us as ")}
    called = [str(node.target) for node in programs[0].graph.nodes if str(node.target).startswith("tdpass.")]
    assert measured
    assert kept == set(done.declined)
    assert done.fused == len(called) == len(layers - kept)
    if slower == PLAIN:
        assert {type(networks[0].get_submodule(name)) for name in measured} == {packed}
    else:
        assert kept == layers


_ELSEWHERE = """
import sys, torch, tdpass
run, (x, wanted) = tdpass.load_deployed(sys.argv[1]), torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(run(x), wanted)
"""


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
@torch.no_grad()
def test_a_fresh_process_gives_the_same_numbers(tmp_path: Path) -> None:
    model, x = encoded(INTEGERS), images()[:2]
    with choosing(measure=False):
        done = tdpass.deploy(model, x, tmp_path / "net.pt2")
    assert done.fused == 5
    program = export_program(fused(operators(model, x))[0], Batch((x,)), dynamic_batch=False)
    torch.save((x, program.module()(x)), tmp_path / "answer.pt")
    words = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "net.pt2"), str(tmp_path / "answer.pt")]
    run = subprocess.run(words, env=os.environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
