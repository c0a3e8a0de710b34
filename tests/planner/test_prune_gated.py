"""Gated MLPs in fewer channels: which are found, and what is lost.

They are the same on both front ends, saved and loaded.
"""

from __future__ import annotations

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx_nets import to_onnx
from torch import Tensor, nn
from transformers_small import llama

import tdpass
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.joint import JOINT_CHANGES

QUIET = {"progress": False, "cache": False}
WIDTH, INNER = 8, 12


class Gated(nn.Module):
    """`x + down(silu(gate(n)) * up(n))`, n the norm of x, and a head."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(WIDTH, INNER, bias=bias)
        self.down, self.head = nn.Linear(INNER, WIDTH, bias=bias), nn.Linear(WIDTH, 3)

    def inner(self, n: Tensor) -> Tensor:
        return F.silu(self.gate(n)) * self.up(n)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.inner(self.norm(x))))


class Normed(Gated):
    """The product is normalized over its channels."""

    def inner(self, n: Tensor) -> Tensor:
        return F.layer_norm(super().inner(n), (INNER,))


class Paired(Gated):
    """Neighbouring channels of the product meet."""

    def inner(self, n: Tensor) -> Tensor:
        made = super().inner(n)
        return made + made.roll(1, -1)


def net(kind: type[Gated] = Gated, *, bias: bool = True) -> Gated:
    torch.manual_seed(0)
    return kind(bias=bias).eval()


def rows() -> Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))


def groups(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[tuple[str, ...]]:
    batch = Batch(args, kwargs)
    model = open_model(module, batch)
    return JOINT_CHANGES.get("prune-gated").find(
        [model.record(batch)], {site.name: site for site in model.sites()}
    )


def test_the_layers_of_a_gated_mlp_are_found_and_no_others() -> None:
    assert groups(net(), rows()) == [("gate", "up", "down")]
    assert groups(net(Normed), rows()) == groups(net(Paired), rows()) == []
    model, x = llama()
    assert groups(model, **x) == [
        tuple(f"model.layers.{k}.mlp.{part}_proj" for part in ("gate", "up", "down")) for k in range(2)
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_channels_that_add_nothing_go_without_loss_on_both_front_ends(bias: bool, tmp_path: Path) -> None:
    module, x = net(bias=bias), rows()
    with torch.no_grad():
        module.gate.weight[1::2] = 0  # silu(0) * up is 0
        if bias:
            module.gate.bias[1::2] = 0
    steps = "project-channels{keep=0.5},verify"
    small = tdpass.compress(module, data=x, pipeline=steps, **QUIET)  # type: ignore[arg-type]
    forms = {choice.site: str(choice.form) for choice in small.plan}
    assert forms["gate"] == forms["up"] == f"dense out {INNER // 2}"
    assert forms["down"] == f"dense in {INNER // 2}"
    with torch.no_grad():
        torch.testing.assert_close(small.model(x), module(x), rtol=1e-3, atol=1e-4)
        small.save(tmp_path / "small.safetensors")
        loaded = tdpass.load(tmp_path / "small.safetensors", copy.deepcopy(module))
        assert torch.equal(loaded(x), small.model(x))
    other = tdpass.compress(to_onnx(module, x), data=x, pipeline=steps, **QUIET)  # type: ignore[arg-type]
    assert [str(choice.form) for choice in other.plan] == [str(choice.form) for choice in small.plan]
    session = onnxruntime.InferenceSession(other.model.SerializeToString())
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), module(x).detach(), rtol=1e-3, atol=1e-4)


def test_a_budget_is_met_by_narrower_gates() -> None:
    module, x = net(), rows()
    artifact = tdpass.compress(
        module, data=x, pipeline="project-channels{macs=0.7},verify", strict=False, **QUIET
    )  # type: ignore[arg-type]
    assert artifact.report.final.macs <= 0.7 * artifact.report.original.macs
    assert {choice.joint for choice in artifact.plan} == {"prune-gated", ""}
