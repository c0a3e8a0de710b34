"""Terms that train parameters of their own: they learn.

A resumed run repeats the interrupted one bit by bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from tdpass.training.batches import Batches
from tdpass.training.learning import Learning
from tdpass.training.loop import Loop, cross_entropy


class Mixture(Learning):
    """Scores are also judged mixed with those of a matrix that the term learns."""

    def __init__(self) -> None:
        matrix = nn.Parameter(torch.zeros(3, 3))
        super().__init__({"matrix": matrix}, torch.optim.Adam([matrix], 0.05))

    def loss(self, inputs: object, outputs: object) -> Tensor | None:
        assert isinstance(outputs, Tensor)
        assert isinstance(inputs, Tensor)
        return (outputs + outputs.detach() @ self.parameters["matrix"] - inputs[:, :3]).square().mean()


def run(folder: Path, resume: bool = False) -> tuple[nn.Module, Mixture, list[float]]:
    torch.manual_seed(0)
    model, term = nn.Linear(5, 3), Mixture()
    data = Batches(torch.randn(24, 5, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    loop = Loop(
        "test", model, data, optimizer, cross_entropy(), 4, lambda progress: 1.0, terms=(term,), folder=folder
    )
    return model, term, [row.loss for row in loop.run(resume)]


def test_own_parameters_learn_and_are_resumed_bit_by_bit(tmp_path: Path) -> None:
    straight, first, losses = run(tmp_path)
    assert first.parameters["matrix"].detach().abs().min() > 0
    assert losses[-1] < losses[0]
    shutil.rmtree(max(tmp_path.glob("step-*")))
    resumed, second, again = run(tmp_path, resume=True)
    assert again == losses
    assert torch.equal(second.parameters["matrix"], first.parameters["matrix"])
    assert all(
        torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items()
    )
    for held, other in zip(first.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        assert all(torch.equal(held[key], other[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
