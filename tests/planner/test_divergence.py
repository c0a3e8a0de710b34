"""What is compared: measures recognised from a network's answers, fitted once over all data."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.planner.divergence import Divergence, FittedDivergence, Outputs

SAMPLES = 96


def _logits(*shape: int, seed: int = 0) -> Tensor:
    """Scores of classes that compete: one is well above the others, and their sum stays the same."""
    generator = torch.Generator().manual_seed(seed)
    winner = torch.randint(shape[-1], shape[:-1], generator=generator)
    scores = torch.randn(shape, generator=generator) + 6 * F.one_hot(winner, shape[-1])
    return scores - scores.mean(-1, keepdim=True)


def _boxes(*shape: int, seed: int = 0) -> Tensor:
    return 320 * torch.rand(*shape, 4, generator=torch.Generator().manual_seed(seed))


def _detections(*shape: int) -> Tensor:
    """Boxes in pixels and scores in [0, 1] side by side."""
    return torch.cat([_boxes(*shape), _logits(*shape, 10).sigmoid()], -1)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


RECOGNISED = {
    "scores": (_logits(SAMPLES, 10), "kl"),
    "untrained scores": (0.1 * _normal(SAMPLES, 10), "kl"),
    "log-probabilities": (_logits(SAMPLES, 10).log_softmax(-1), "kl"),
    "probabilities": (_logits(SAMPLES, 10).softmax(-1), "kl_probabilities"),
    "pixel classes": (_logits(SAMPLES, 4, 5, 7).softmax(-1).movedim(-1, 1), "kl_probabilities"),
    "half-precision probabilities": (_logits(SAMPLES, 10).softmax(-1).half(), "kl_probabilities"),
    "events": (_logits(SAMPLES, 10).sigmoid(), "kl_bernoulli"),
    "one event": (_logits(SAMPLES, 2)[:, :1].sigmoid(), "kl_bernoulli"),
    "embeddings": (F.normalize(_normal(SAMPLES, 32), dim=-1), "cosine"),
    "tags": (_logits(SAMPLES, 7, 5), "kl"),
    "tokens": (_logits(SAMPLES // 8, 6, 400) + 10 * _normal(SAMPLES // 8, 6, 1), "kl"),
    "features": (_normal(SAMPLES, 7, 32), "mse"),
    "series": (_normal(SAMPLES, 7, 1), "mse"),
    "boxes": (_boxes(SAMPLES), "mse"),
    "boxes of anchors": (_boxes(SAMPLES, 6), "mse"),
    "fractions": (0.2 + 0.6 * _boxes(SAMPLES) / 320, "kl"),
    "detections": (_detections(SAMPLES), "mse"),
    "detections of anchors": (_detections(SAMPLES, 6), "mse"),
    "image": (_normal(SAMPLES, 3, 8, 8), "mse"),
    "one number": (_normal(SAMPLES), "mse"),
}


def _fit(*calls: Outputs, wish: Divergence | None = None) -> FittedDivergence:
    return (wish or Divergence()).fit(calls)


@pytest.mark.parametrize("kind", RECOGNISED)
def test_what_an_output_is_shows_in_its_values(kind: str) -> None:
    values, name = RECOGNISED[kind]
    assert str(_fit({"output": values})) == name
    assert str(_fit(*({"output": part} for part in values.split(1)))) == name


@pytest.mark.parametrize("kind", RECOGNISED)
def test_neither_calls_nor_order_change_a_divergence(kind: str) -> None:
    reference, name = RECOGNISED[kind]
    reference = reference.float()
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(5))
    output = reference + 0.1 * noise
    output = output.clamp(0, 1) if name.startswith("kl_") else output
    shuffled = torch.randperm(len(reference), generator=torch.Generator().manual_seed(6))

    def value(calls: Sequence[Tensor]) -> float:
        fitted = Divergence(name).fit([{"output": reference[call]} for call in calls])
        return fitted.mean(({"output": reference[call]}, {"output": output[call]}) for call in calls)

    every = torch.arange(len(reference))
    whole = value([every])
    assert whole > 0
    for calls in (every.split(1), every.split(64), shuffled.split(7)):
        assert value(calls) == pytest.approx(whole, rel=1e-9)
