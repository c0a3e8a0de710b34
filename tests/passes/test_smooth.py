"""smooth moves ranges of activations into weights, changes no answer, and makes integers lose less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn

import tdpass
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.numbers import numbers_named
from tdpass.planner.smoothing import smoothed

WIDTH = 24
INTEGERS = "quantize,quantize-activations{calibration=minmax},verify"


class Block(nn.Module):
    """Attention and a feed-forward part behind norms, as transformers have them."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.before, self.between, self.after = norm(WIDTH), norm(WIDTH), norm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        weights = torch.softmax(self.query(h) @ self.key(h).transpose(1, 2) / WIDTH**0.5, -1)
        x = x + self.out(weights @ self.value(h))
        x = x + self.down(torch.relu(self.up(self.between(x))))
        last = self.after(x)
        return self.head(last) + last.mean(-1, keepdim=True)


def net(norm: Callable[[int], nn.Module] = nn.LayerNorm) -> Block:
    torch.manual_seed(0)
    made = Block(norm).eval()
    with torch.no_grad():  # channels far larger than the others, which trained transformers have
        for part, times in ((made.before, 40), (made.between, 50)):
            part.weight[[3, 9]] *= times
    return made


def tokens() -> Tensor:
    return torch.randn(24, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def given(frontend: str, module: nn.Module) -> object:
    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: module,
        "onnx": lambda: to_onnx(module, tokens()[:2]),
        "torch.export": lambda: torch.export.export(module, (tokens(),)),
    }
    return ways[frontend]()


def compressed(model: object, pipeline: str) -> tdpass.Artifact:
    return tdpass.compress(model, None, tokens(), pipeline=pipeline, cache=False)


def answer(model: object) -> Tensor:
    returned = open_model(model).run(Batch((tokens(),)))
    (value,) = returned.values() if isinstance(returned, dict) else (returned,)
    return value.detach()


@pytest.mark.parametrize("frontend", ["torch", "onnx", pytest.param("torch.export", marks=pytest.mark.slow)])
def test_answers_stay_and_integers_lose_less(frontend: str) -> None:
    module = net()
    smooth = compressed(given(frontend, module), "smooth")
    torch.testing.assert_close(answer(smooth.model), module(tokens()).detach(), rtol=1e-4, atol=1e-4)
    assert "smoothed 2 of 2 norms" in [note for row in smooth.report.passes for note in row.notes]
    (reason,) = (why for why in smooth.report.declined.values() if "not smoothed" in why)
    assert "read by more than dense layers" in reason
    assert smooth.report.final == smooth.report.original
    plain, better = (
        compressed(given(frontend, module), f"{steps}{INTEGERS}").report.checks["divergence"]
        for steps in ("", "smooth,")
    )
    assert better < 0.5 * plain


def test_root_mean_square_norms_are_scaled_too() -> None:
    module = net(nn.RMSNorm)
    smooth = compressed(module, "smooth")
    torch.testing.assert_close(smooth.model(tokens()), module(tokens()), rtol=1e-4, atol=1e-4)
    assert not torch.equal(smooth.model.up.weight, module.up.weight)


def test_norms_of_tensors_that_others_read_stay_as_they_are() -> None:
    module = net()
    module.between = module.before
    smooth = compressed(module, "smooth")
    assert torch.equal(smooth.model.before.weight, module.before.weight)
    assert any("also read elsewhere" in why for why in smooth.report.declined.values())


def test_layers_that_are_replaced_already_are_left_alone() -> None:
    found = compressed(net(), "quantize,smooth,verify")
    assert any("smoothed 0 of 0" in note for row in found.report.passes for note in row.notes)


def test_the_scale_is_the_one_with_which_rounding_loses_least() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(128, 16, dtype=torch.float64, generator=generator)
    weights = [torch.randn(8, 16, dtype=torch.float64, generator=generator) for _ in range(2)]
    rows[:, 5] *= 100
    found = smoothed(rows, weights, numbers_named("int8"))
    assert found is not None
    assert found.error < 0.1 * found.before
    assert int(found.scale.argmax()) == 5
    assert smoothed(torch.zeros(4, 16, dtype=torch.float64), weights, numbers_named("int8")) is None
