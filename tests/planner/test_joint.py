"""Options that cover several sites."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx_nets import model_of, node, weight
from torch import Tensor, nn

import tdpass
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.divergence import Divergence
from tdpass.planner.joint import joint_options
from tdpass.planner.joint.pairs import find_pairs
from tdpass.planner.sensitivity import Sweep


def test_a_plan_that_takes_an_option_counts_its_loss(residual: nn.Module, images: Tensor) -> None:
    model = open_model(residual, Batch((images,)))
    tapes = [model.record(Batch((images,)))]
    divergence = Divergence()
    fitted = divergence.fit([divergence.outputs(tape.play().finish()) for tape in tapes])
    sites = {site.name: site for site in model.sites()}
    options = joint_options(
        sites, model.weight, model.bias, tapes, Sweep(tapes, fitted, 64), lambda what, done, of: None
    )
    assert any(len(option.parts) == 2 for option in options)
    for option in options:
        assert option.loss > 0
        assert sum(part.loss for part in option.parts.values()) == pytest.approx(option.loss)


LAYERS = {
    "conv1d": lambda: nn.Conv1d(8, 8, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "linear": lambda: nn.Linear(8, 8),
}
# the sizes of one sample, all 8 as the channels are, and whether the first layer's channels are what the
# second sums over
PAIRS = [
    ("conv1d", "conv1d", (8, 8), True),
    ("conv1d", "linear", (8, 8), False),
    ("linear", "conv1d", (8, 8), False),
    ("linear", "linear", (8, 8), True),
    ("conv2d", "conv2d", (8, 8, 8), True),
    ("conv2d", "linear", (8, 8, 8), False),
    ("linear", "conv2d", (8, 8, 8), False),
]


@pytest.mark.parametrize("frontend", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("first", "second", "size", "meet"), PAIRS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_channels_between_layers_are_told_by_their_axis(
    first: str, second: str, size: tuple[int, ...], meet: bool, frontend: str
) -> None:
    network = nn.Sequential(LAYERS[first](), nn.ReLU(), LAYERS[second]()).eval()
    batch = Batch((torch.randn(8, *size),))
    model = open_model(_as_onnx(first, second, size) if frontend == "onnx" else network, batch)
    pairs = find_pairs([model.record(batch)], {site.name: site for site in model.sites()})
    assert pairs == ([("0", "2")] if meet else [])


def _as_onnx(first: str, second: str, size: tuple[int, ...]) -> onnx.ModelProto:
    shapes = [LAYERS[kind]().weight.shape for kind in (first, second)]
    kinds = ["MatMul" if kind == "linear" else "Conv" for kind in (first, second)]
    pads = [{} if kind == "MatMul" else {"pads": [1] * 2 * (len(size) - 1)} for kind in kinds]
    nodes = [
        node(kinds[0], "x 0.weight", "h", **pads[0]),
        node("Relu", "h", "r"),
        node(kinds[1], "r 2.weight", **pads[1]),
    ]
    return model_of(nodes, {"0.weight": weight(*shapes[0]), "2.weight": weight(*shapes[1])}, ("N", *size))


def test_an_image_without_an_axis_of_samples_has_its_channels_first() -> None:
    network = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    model = open_model(
        network, Batch((torch.randn(8, 8, 8),))
    )  # to the second layer, one image whose channels are the first one's samples
    assert (
        find_pairs(
            [model.record(Batch((torch.randn(8, 8, 8),)))], {site.name: site for site in model.sites()}
        )
        == []
    )


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [pair[:3] for pair in PAIRS if not pair[3]],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_whose_channels_are_as_many_as_their_positions_are_compressed(
    first: str, second: str, size: tuple[int, ...]
) -> None:
    network = nn.Sequential(LAYERS[first](), nn.ReLU(), LAYERS[second]()).eval()
    x = torch.randn(32, *size)
    artifact = tdpass.compress(network, {"params": 0.7}, x, cache=False, effort="fast")
    assert artifact.report.final.params <= 0.7 * artifact.report.original.params
    measured = tdpass.verify(network, artifact.model, x)
    assert measured["relative_difference"] == pytest.approx(
        artifact.report.checks["relative_difference"], rel=1e-3
    )
