"""A joint change is one file: once registered it is planned, written in plans and carried out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from onnx_nets import to_onnx
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tdpass
from tdpass.errors import PlanError, UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.layer import Layer
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.joint import JOINT_CHANGES, JointChange, Network, Variant, register_joint_change
from tdpass.planner.joint.base import Group
from tdpass.planner.joint.pairs import find_pairs
from tdpass.planner.rank_plan import Choice
from tdpass.site import Site
from tdpass.tape import Tape

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class _FoldChannels(JointChange):
    """Channels k and k + n/2 become one: W1 keeps their mean, W2 their sum; exact where both are equal."""

    name = "fold-channels"

    def find(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Group]:
        return [*find_pairs(tapes, sites)]

    def variants(self, group: Group, network: Network) -> Iterator[Variant]:
        yield Variant(self._folded(group, network), dict.fromkeys(group, 0.0))

    def carry_out(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, Layer]:
        return self._folded(group, network)

    def _folded(self, group: Group, network: Network) -> dict[str, Layer]:
        first, second = (network.sites[name] for name in group)
        half, bias = first.o // 2, network.bias(first.name)
        makes, reads = Form("dense", (), outputs=half), Form("dense", (), inputs=half)
        mean = network.weight(first.name).unflatten(0, (2, half)).mean(0)
        total = network.weight(second.name).unflatten(1, (2, half)).sum(1)
        return {
            first.name: Layer(
                makes.on(first),
                makes,
                {"kernel": mean},
                None if bias is None else bias.unflatten(0, (2, half)).mean(0),
            ),
            second.name: Layer(reads.on(second), reads, {"kernel": total}, network.bias(second.name)),
        }


@pytest.fixture
def fold() -> Iterator[str]:
    register_joint_change(_FoldChannels)
    yield _FoldChannels.name
    del JOINT_CHANGES._entries[_FoldChannels.name]


@pytest.fixture
def doubled() -> nn.Module:
    """A network whose 16 hidden channels are 8, each twice."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        for tensor in (network[0].weight, network[0].bias):
            tensor[8:] = tensor[:8]
    return network


def _outputs(artifact: tdpass.Artifact, x: Tensor) -> Tensor:
    answer = artifact.opened.run(Batch((x,)))
    return next(iter(answer.values())) if isinstance(answer, dict) else answer


def test_a_change_that_is_registered_is_planned_and_carried_out_on_both_sides(
    fold: str, doubled: nn.Module, tmp_path: Path
) -> None:
    made = tdpass.make_plan(doubled, {"macs": 0.5}, X, cache=False)
    assert [(choice.site, choice.joint, str(choice.form)) for choice in made.plan] == [
        ("0", fold, "dense out 8"),
        ("2", fold, "dense in 8"),
    ]
    assert made.plan.planned.macs == 0.5 * made.plan.original.macs
    assert made.plan.loss == pytest.approx(0, abs=1e-9)
    made.plan.save(tmp_path / "plan.json")
    read = tdpass.RankPlan.load(tmp_path / "plan.json")
    assert read == made.plan
    expected = doubled(X).detach()
    for model in (doubled, to_onnx(doubled, X)):
        artifact = tdpass.compress(model, plan=read, data=X)
        assert float((_outputs(artifact, X) - expected).norm() / expected.norm()) < 1e-5
        assert artifact.report.final.params == made.plan.planned.params == 6 * 8 + 8 + 8 * 4 + 4


def test_a_plan_with_a_change_that_the_model_lacks_says_so(fold: str, doubled: nn.Module) -> None:
    plan = tdpass.make_plan(doubled, {"macs": 0.5}, X, cache=False).plan
    named = plan.renamed({"0": "first", "2": "second"})

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = doubled[0], doubled[2]

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            between = self.first(x)
            return self.second(between), between

    with pytest.raises(
        PlanError, match="as part of 'fold-channels' with other sites, but this model lacks such a group"
    ):
        tdpass.compress(Twice().eval(), plan=named, data=X)
    with pytest.raises(PlanError, match="which needs to see the model running"):
        tdpass.compress(doubled, plan=plan)


def test_an_unknown_change_is_refused_with_those_that_are_known(doubled: nn.Module) -> None:
    plan = tdpass.make_plan(doubled, {"macs": 1.0}, X, cache=False).plan
    forms = {"0": Form("dense", (), outputs=8), "2": Form("dense", (), inputs=8)}
    odd = replace(
        plan,
        choices=tuple(replace(choice, form=forms[choice.site], joint="merge-channels") for choice in plan),
    )
    with pytest.raises(
        UsageError,
        match=f"unknown joint change 'merge-channels'.*; known: {', '.join(JOINT_CHANGES.names())}",
    ):
        tdpass.compress(doubled, plan=odd, data=X)


def test_a_narrow_layer_is_one_of_a_smaller_site(doubled: nn.Module) -> None:
    for model in (open_model(doubled, Batch((X,))), open_model(to_onnx(doubled, X), Batch((X,)))):
        site = next(site for site in model.sites() if site.i == 16)
        form = Form("svd", (2,), inputs=8)
        layer = Layer(form.on(site), form, {"left": torch.ones(4, 2), "right": torch.ones(2, 8)})
        with pytest.raises(PlanError, match="4, 16"):
            model.replace(site.name, replace(layer, form=Form("svd", (2,))))
        with pytest.raises(PlanError, match="it has 16 channels in"):
            model.replace(site.name, replace(layer, form=Form("svd", (2,), inputs=17)))


def test_files_of_version_1_hold_the_same_layers(residual: nn.Module, images: Tensor, tmp_path: Path) -> None:
    planned = tdpass.make_plan(residual, {"macs": 0.9}, images).plan
    kept, forms = (0, 2, 3, 5, 7, 11), {"first": Form("pruned", (6, 12)), "second": Form("pruned", (12, 6))}
    choices = [
        replace(choice, form=forms[choice.site], channels=kept, joint="prune-channels")
        if choice.site in forms
        else replace(choice, form=DENSE, channels=(), joint="")
        for choice in planned
    ]
    artifact = tdpass.compress(residual, plan=replace(planned, choices=tuple(choices)), data=images)
    artifact.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        tensors = {
            name.replace(".kernel", ".kept"): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - it is no dict
        }
        metadata = file.metadata()
    structure = json.loads(metadata["tdpass.structure"])
    for layer in structure["layers"]:
        layer |= {"format": "pruned", "rank": [layer.pop("outputs", 12), layer.pop("inputs", 12)]}
    without = {name: text for name, text in metadata.items() if name != "tdpass.digest"}
    save_file(
        tensors, tmp_path / "old.safetensors", metadata={**without, "tdpass.structure": json.dumps(structure)}
    )
    assert any(name.endswith(".kept") for name in tensors)
    loaded = tdpass.load(tmp_path / "old.safetensors", type(residual)().eval())
    with torch.no_grad():
        assert torch.equal(loaded(images), artifact.model(images))


class _Tables(nn.Module):
    """Tokens and positions are added up, and a layer's branch to them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Embedding(5, 8)
        self.layer, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]).expand_as(tokens))
        return self.out(x + self.layer(x))  # type: ignore[no-any-return]


def test_tables_that_are_added_up_are_no_branches() -> None:
    torch.manual_seed(0)
    model, x = _Tables().eval(), torch.arange(40).view(8, 5) % 20
    opened = open_model(model, Batch((x,)))
    opened.observe(Batch((x,)))
    sites = {site.name: site for site in opened.sites()}
    assert {name for name, site in sites.items() if site.table} == {"tokens", "positions"}
    assert JOINT_CHANGES.get("drop-branch").find([opened.record(Batch((x,)))], sites) == [("layer",)]
    made = tdpass.make_plan(model, {"params": 0.6}, x, progress=False, cache=False)
    assert made.plan.planned.params <= 0.6 * made.report.original.params
