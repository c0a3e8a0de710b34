"""Projected and selected channels: where they can be, what is lost, the same on both front ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from onnx_nets import to_onnx
from selection import mostly_slow
from torch import Tensor, nn

import tdpass
from tdpass.errors import BudgetError, UsageError
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.divergence import Divergence
from tdpass.planner.joint import JOINT_CHANGES, Network
from tdpass.planner.joint.paths import find_paths, runs_of
from tdpass.planner.joint.project_channels import NARROWINGS
from tdpass.planner.moments import stream_metrics

HOWS = sorted(NARROWINGS)


class LeNet(nn.Module):
    """Convolutions, pooling, flattened positions and linear layers: one run of four."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, bias=False)
        self.third, self.last = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.first(x)), 2)
        x = torch.flatten(F.avg_pool2d(torch.relu(self.second(x)), 2), 1)
        return self.last(torch.relu(self.third(x)))


def lenet() -> LeNet:
    torch.manual_seed(0)
    return LeNet().eval()


def images() -> Tensor:
    return torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def network_of(module: nn.Module, x: Tensor) -> Network:
    model = open_model(module, Batch((x,)))
    tapes, sites = [model.record(Batch((x,)))], {site.name: site for site in model.sites()}
    wish = Divergence("mse")
    fitted = wish.fit([wish.outputs(tape.play().finish()) for tape in tapes])
    metrics = {site.name: metric for site, metric in stream_metrics(tapes, list(sites.values()), fitted)}
    return Network(sites, model.weight, model.bias, tapes, metrics)


def errors(module: nn.Module, x: Tensor, share: float) -> dict[str, float]:
    """The relative error of what the last layer answers, by how channels were narrowed."""
    network, found = network_of(module, x), {}
    with torch.no_grad():
        expected = module(x)
    for how, cls in NARROWINGS.items():
        change = cls((share,))
        (group,) = change.find(network.tapes, network.sites)
        (variant,) = change.variants(group, network)
        answer = network.tapes[0].play().fork(dict(variant.layers)).finish()
        found[how] = float((answer - expected).norm() / (expected - expected.mean(0)).norm())
    return found


def test_a_run_goes_through_pools_and_flattened_positions() -> None:
    network = network_of(lenet(), images())
    paths, reasons = find_paths(network.tapes, network.sites)
    assert [(path.first, path.second, path.spread) for path in paths] == [
        ("first", "second", 1),
        ("second", "third", 4),
        ("third", "last", 1),
    ]
    assert [len(run) for run in runs_of(paths)] == [3]
    assert reasons == {"last": "the model returns its output"}
    x = torch.randn(3, 5, 12, 12)
    assert torch.equal(paths[0].between(x), F.max_pool2d(torch.relu(x), 2))


class Averaged(nn.Module):
    """Two convolutions and a mean over these axes before the last layer."""

    def __init__(self, width: int, *dims: int, keep: bool = False) -> None:
        super().__init__()
        self.dims, self.keep = dims, keep
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean(self.dims, keepdim=self.keep)
        return self.last(x.flatten(1))


@pytest.mark.parametrize(("dims", "keep"), [((2, 3), False), ((-1, -2), True)])
def test_a_run_goes_through_means_over_positions(dims: tuple[int, ...], keep: bool) -> None:
    torch.manual_seed(0)
    net = Averaged(8, *dims, keep=keep).eval()
    with torch.no_grad():
        for layer in (net.first, net.second):  # half of the channels hold nothing
            layer.weight[::2], layer.bias[::2] = 0.0, 0.0
    x = torch.randn(16, 3, 6, 6)
    paths = find_paths(network_of(net, x).tapes, network_of(net, x).sites)[0]
    assert [(path.first, path.second, path.spread) for path in paths] == [
        ("first", "second", 1), ("second", "last", 1),
    ]  # fmt: skip
    found = errors(net, x, 0.5)
    assert max(found[how] for how in ("learned", "norm", "taylor")) < 0.05 < found["principal"]


def test_a_mean_over_channels_ends_a_run() -> None:
    net, x = Averaged(36, 1).eval(), torch.randn(4, 3, 6, 6)
    paths, reasons = find_paths(network_of(net, x).tapes, network_of(net, x).sites)
    assert [path.first for path in paths] == ["first"]
    assert "mean, where channels may meet" in reasons["second"]


class Tangled(nn.Module):
    """Layers that no channel can leave."""

    def __init__(self) -> None:
        super().__init__()
        self.normed, self.norm, self.summed = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.joined, self.deep, self.twice = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)
        self.before, self.depthwise, self.after = (
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.Conv2d(4, 4, 1),
        )
        self.viewed, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.normed(x)))
        x = self.summed(x) + x
        x = self.deep(torch.cat((self.joined(x), x), 1))
        x = self.twice(x)
        x = torch.relu(x) * torch.sigmoid(x)
        x = self.after(self.depthwise(self.before(x)))
        return self.head(self.viewed(x).transpose(1, 3).mean((1, 2)))


def test_a_budget_out_of_reach_says_why_channels_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(256, 3)
    )
    with pytest.raises(
        BudgetError, match="those of '0' as a batch-norm follows it; put fold-batchnorm before"
    ):
        tdpass.compress(net.eval(), data=images(), pipeline="project-channels{macs=0.3}", progress=False)


def test_what_is_no_run_is_declined_with_the_reason() -> None:
    torch.manual_seed(0)
    network = network_of(Tangled().eval(), torch.randn(8, 3, 6, 6))
    paths, reasons = find_paths(network.tapes, network.sites)
    assert [(path.first, path.second) for path in paths] == [("deep", "twice"), ("after", "viewed")]
    assert "put fold-batchnorm before" in reasons["normed"]
    assert "enters a sum" in reasons["summed"]
    assert "concatenated" in reasons["joined"]
    assert reasons["twice"] == "2 calls read its output"
    assert reasons["before"] == "depthwise is grouped"
    assert reasons["depthwise"] == "depthwise is grouped"
    assert "transpose" in reasons["viewed"]
    assert reasons["head"] == "the model returns its output"


def test_a_linear_run_of_few_directions_loses_nothing_by_mixtures() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 5)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.randn(12, 3) @ torch.randn(3, 10))
    found = errors(module, torch.randn(200, 10), 0.25)
    assert found["principal"] < 1e-3
    assert found["learned"] < 1e-3
    assert errors(module, torch.randn(200, 10), 0.15)["principal"] > 0.05


def test_learned_mixtures_lose_less_than_selections() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6)).eval()
    found = errors(module, torch.randn(512, 8, generator=torch.Generator().manual_seed(2)), 0.5)
    assert found["learned"] < 0.95 * min(found[how] for how in HOWS if how != "learned")


def test_copies_of_channels_cost_nothing_to_leave_out() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        for tensor in (module[0].weight, module[0].bias):
            tensor[8:] = tensor[:8]
    assert errors(module, torch.randn(200, 6), 0.5)["learned"] < 5e-3


@pytest.mark.parametrize("how", mostly_slow(HOWS, ["learned", "norm"]))
@pytest.mark.parametrize("frontend", ["torch", "onnx"])
def test_the_pass_narrows_layers_alike_on_both_front_ends(
    how: str, frontend: str, residual: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    source = residual if frontend == "torch" else to_onnx(residual, x[:2])
    steps = f"fold-batchnorm,project-channels{{how={how},keep=0.5}},verify"
    made = tdpass.compress(source, data=x, pipeline=steps, strict=False)
    forms = {choice.site: str(choice.form) for choice in made.plan if not choice.kept_dense}
    assert sorted(forms.values()) == ["dense in 6", "dense out 6"]
    assert made.report.final.macs == made.plan.planned.macs < made.report.original.macs
    assert made.report.final.params == made.plan.planned.params
    assert {choice.joint for choice in made.plan if not choice.kept_dense} == {NARROWINGS[how].name}
    assert any("enters a sum" in reason for reason in made.report.declined.values())
    made.plan.save(tmp_path / "plan.json")
    again = tdpass.compress(
        source,
        plan=tdpass.RankPlan.load(tmp_path / "plan.json"),
        data=x,
        pipeline="fold-batchnorm,factorize,verify",
        strict=False,
    )
    assert again.report.checks["divergence"] == pytest.approx(
        made.report.checks["divergence"], rel=1e-3, abs=1e-6
    )


def test_a_run_of_several_joints_is_narrowed_at_all_of_them() -> None:
    made = tdpass.compress(lenet(), data=images(), pipeline="project-channels{keep=0.5},verify", strict=False)
    assert [str(choice.form) for choice in made.plan] == [
        "dense out 3",
        "dense in 3 out 4",
        "dense in 16 out 8",
        "dense in 8",
    ]
    assert isinstance(made.model, nn.Module)
    assert tuple(made.model(images()).shape) == (64, 4)
    assert made.report.final.macs == made.plan.planned.macs


def test_a_budget_divides_the_shares_and_more_may_follow(residual: nn.Module) -> None:
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    made = tdpass.compress(
        residual, data=x, pipeline="fold-batchnorm,project-channels{macs=0.8},verify", strict=False
    )
    assert made.report.final.macs <= 0.8 * made.report.original.macs
    both = tdpass.compress(
        residual,
        {"macs": 0.6},
        x,
        pipeline="fold-batchnorm,project-channels{keep=0.5},plan,factorize,verify",
        strict=False,
    )
    assert both.report.final.macs <= 0.6 * both.report.original.macs
    assert both.report.final.macs == both.plan.planned.macs
    assert both.report.final.params == both.plan.planned.params
    assert {choice.joint for choice in both.plan} >= {"", "project-channels"}
    assert [row.site for row in both.report.sites] == [choice.site for choice in both.plan]
    again = tdpass.compress(
        residual, plan=both.plan, data=x, pipeline="fold-batchnorm,factorize,verify", strict=False
    )
    assert again.report.final.params == both.report.final.params
    assert again.report.checks["divergence"] == pytest.approx(
        both.report.checks["divergence"], rel=1e-2, abs=1e-6
    )
    with pytest.raises(BudgetError):
        tdpass.compress(residual, data=x, pipeline="fold-batchnorm,project-channels{macs=0.01}")


def test_bad_options_say_what_is_allowed(residual: nn.Module) -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(UsageError, match=r"how='cleverly'.*one of learned"):
        tdpass.compress(residual, data=x, pipeline="project-channels{how=cleverly}")
    with pytest.raises(UsageError, match=r"keep=1.5 is no share"):
        tdpass.compress(residual, data=x, pipeline="project-channels{keep=1.5}")


def test_planning_does_not_try_it_unless_asked() -> None:
    offered = {change.name for change in JOINT_CHANGES if change.offered}
    assert offered == {"drop-branch", "drop-heads", "narrow-heads", "prune-channels", "prune-gated"}
