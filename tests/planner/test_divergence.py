"""What is compared: comparisons recognised from a network's answers, fitted once over all data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from tdpass.errors import InvalidModelError, UsageError
from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.answers import Answers
from tdpass.planner.compare import compare_outputs
from tdpass.planner.comparisons import COMPARISONS
from tdpass.planner.comparisons.mse import ScaledError
from tdpass.planner.divergence import Divergence, FittedDivergence, Outputs
from tdpass.planner.repair import divergence_of
from tdpass.planner.sensitivity import Sweep

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


@pytest.mark.parametrize("name", COMPARISONS.names())
def test_a_measure_is_zero_for_the_original_and_counts_every_row(name: str) -> None:
    reference = _logits(SAMPLES, 6, 10).softmax(-1).double()
    output = _logits(SAMPLES, 6, 10, seed=1).softmax(-1).double()
    comparison = COMPARISONS.get(name).fit(Answers("output", (reference,)))
    assert comparison.name == name
    assert float(comparison.rows(reference, reference).abs().max()) < 1e-12
    assert float(comparison.rows(reference, output).sum()) > 0
    assert comparison.rows(reference, output).shape == (comparison.count(reference),)
    assert comparison.probe(reference, torch.Generator().manual_seed(0)).shape == reference.shape


def test_errors_of_boxes_do_not_hide_those_of_scores() -> None:
    detections = _detections(SAMPLES, 6)
    fitted = _fit({"output": detections})
    nudge = torch.zeros(14)
    scores = detections[..., 4:].std()
    box, score = nudge.clone(), nudge.clone()
    box[0], score[4] = 0.1 * detections[..., 0].std(), 0.1 * detections[..., 4].std()
    losses = [
        fitted.mean([({"output": detections}, {"output": detections + error})]) for error in (box, score)
    ]
    assert scores < 1 < detections[..., 0].std()
    assert losses[0] == pytest.approx(0.01 / 14, rel=1e-2)
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)


@pytest.mark.parametrize(
    "shape", [(SAMPLES, 14), (SAMPLES, 6, 14), (SAMPLES, 14, 6), (SAMPLES, 14, 5, 4), (SAMPLES, 5, 4, 14)]
)
def test_channels_are_found_on_any_axis(shape: tuple[int, ...]) -> None:
    axis = shape.index(14)
    last = [size for place, size in enumerate(shape) if place != axis]
    values = _detections(*last).movedim(-1, axis)
    comparison = _fit({"output": values}).comparisons["output"].comparison
    other = [place for place in range(len(shape)) if place != axis]
    assert isinstance(comparison, ScaledError)
    assert comparison.axis == axis
    assert torch.allclose(comparison.scale, values.double().var(other, correction=0).sqrt(), rtol=2e-2)


def test_a_constant_channel_neither_explodes_nor_vanishes() -> None:
    values = _normal(SAMPLES, 5, 3)
    values[..., 1] = 7.0
    fitted = _fit({"output": values})
    error = torch.zeros(3)
    error[1] = 1e-3
    assert 1e-4 < fitted.mean([({"output": values}, {"output": values + error})]) < 1.0


@pytest.mark.parametrize("values", [torch.zeros(4, 3, 2), torch.full((4, 3, 2), 5.0)])
def test_a_constant_output_has_a_scale(values: Tensor) -> None:
    loss = _fit({"output": values}).mean([({"output": values}, {"output": values + 0.1})])
    assert 0 < loss < 1e3


def test_one_sample_has_a_scale_of_its_own_size() -> None:
    values = _normal(1, 4, 12)
    assert _fit({"output": values}).mean([({"output": values}, {"output": 1.1 * values})]) == pytest.approx(
        0.01, rel=0.05
    )


def test_scores_their_probabilities_and_their_logarithms_are_as_far_apart() -> None:
    reference, output = _logits(SAMPLES, 10), _logits(SAMPLES, 10) + 0.3 * _normal(SAMPLES, 10)
    expected = F.kl_div(
        output.double().log_softmax(-1),
        reference.double().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    for form in (torch.nn.Identity(), torch.nn.Softmax(-1), torch.nn.LogSoftmax(-1)):
        ours, theirs = form(reference), form(output)
        assert _fit({"output": ours}).mean([({"output": ours}, {"output": theirs})]) == pytest.approx(
            float(expected), rel=1e-4
        )


def test_gradients_of_probabilities_are_those_of_scores() -> None:
    scores = _logits(SAMPLES, 10).double().requires_grad_(True)
    gradients = []
    for form in (torch.nn.Identity(), torch.nn.Softmax(-1)):
        outputs = {"output": form(scores)}
        fitted = _fit({name: value.detach() for name, value in outputs.items()})
        probe = fitted.probe(
            {name: value.detach() for name, value in outputs.items()},
            SAMPLES,
            torch.Generator().manual_seed(0),
        )
        gradients += torch.autograd.grad(outputs["output"], scores, probe["output"])
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "kind", [kind for kind, (values, _) in RECOGNISED.items() if values.dtype == torch.float32]
)
def test_probes_are_as_long_as_the_divergence_is_curved(kind: str) -> None:
    values = RECOGNISED[kind][0].double()
    values = values[: max(4, 2000 // values[0].numel())]
    outputs = {"first": values, "second": values}
    name = RECOGNISED[kind][1]
    fitted = Divergence(name, weights={"second": 3.0}).fit([outputs])
    generator = torch.Generator().manual_seed(1)
    moved = {name: 1e-3 * _allowed(kind, value, generator) for name, value in outputs.items()}
    probes = (fitted.probe(outputs, len(values), generator) for _ in range(300))
    squares = [float(sum((probe[name] * moved[name]).sum() for name in outputs)) ** 2 for probe in probes]
    actual = fitted.mean([(outputs, {name: value + moved[name] for name, value in outputs.items()})])
    assert sum(squares) / len(squares) / 2 / len(values) == pytest.approx(actual, rel=0.3)


def _allowed(kind: str, values: Tensor, generator: torch.Generator) -> Tensor:
    """A direction in which such values may move."""
    normal = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    if kind in ("probabilities", "pixel classes"):
        axis = 1 if values.dim() == 4 else -1
        return values * (normal - (values * normal).sum(axis, keepdim=True))
    return normal * values * (1 - values) if "event" in kind else normal * values.std()


def test_every_output_counts_by_its_weight() -> None:
    reference = {"classes": _logits(SAMPLES, 10), "boxes": _boxes(SAMPLES), "label": torch.arange(SAMPLES)}
    wish = Divergence(weights={"box*": 3.0})
    outputs = wish.outputs(reference)
    assert list(outputs) == ["classes", "boxes"]
    fitted = wish.fit([outputs])
    assert str(fitted) == "kl of classes; mse of boxes"
    off = {
        "classes": outputs["classes"],
        "boxes": outputs["boxes"] + 0.1 * outputs["boxes"].std(0, correction=0),
    }
    assert fitted.mean([(outputs, off)]) == pytest.approx(0.75 * 0.01, rel=1e-3)
    probe = fitted.probe(outputs, SAMPLES, torch.Generator().manual_seed(0))
    assert all(bool((probe[name] != 0).any()) for name in outputs)
    assert str(Divergence(weights={"boxes": 0}).fit([outputs])) == "kl"
    assert str(Divergence(measures={"boxes": "cosine"}).fit([outputs])) == "kl of classes; cosine of boxes"


def test_outputs_are_named_by_their_place_in_what_is_returned() -> None:
    returned = (
        {"a": torch.zeros(2, 3), "ids": torch.arange(2)},
        [torch.zeros(2, 4), torch.zeros(2, dtype=torch.complex64)],
        None,
    )
    assert {name: tuple(value.shape) for name, value in Divergence().outputs(returned).items()} == {
        "0.a": (2, 3),
        "1.0": (2, 4),
        "1.1": (2, 2),
    }
    assert list(Divergence().outputs(torch.tensor(1.0))) == ["output"]
    second = Divergence(select=lambda outputs: outputs[1])  # type: ignore[index]
    assert list(second.outputs(returned)) == ["0", "1"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (lambda: Divergence("far"), "unknown divergence 'far'"),
        (lambda: Divergence(measures={"boxes": "far"}), "unknown divergence 'far'"),
        (lambda: Divergence(weights={"boxes": -1.0}), "the weight -1.0 of output 'boxes'"),
        (
            lambda: Divergence(weights={"boxes": 2.0}).fit([{"output": torch.zeros(2, 3)}]),
            "output 'boxes'; the model's outputs: output",
        ),
        (
            lambda: Divergence(weights={"*": 0.0}).fit([{"output": torch.zeros(2, 3)}]),
            "weights of all outputs are 0",
        ),
    ],
)
def test_a_wish_that_cannot_be_is_refused(wish: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        wish()


def test_outputs_that_do_not_correspond_are_refused() -> None:
    fitted = _fit({"output": torch.randn(4, 3)})
    for other, message in (
        ({"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}, "do not return the same outputs"),
        ({"output": torch.zeros(4, 5)}, "shapes"),
    ):
        with pytest.raises(InvalidModelError, match=message):
            fitted.mean([({"output": torch.zeros(4, 3)}, other)])
    assert fitted.mean([({"output": torch.ones(4, 3)}, {"other name": torch.ones(4, 3)})]) == 0


def test_comparisons_sum_over_calls_of_any_length_and_name_the_worst_channel() -> None:
    calls = [{"series": _normal(1, length, 3), "tags": _logits(1, length, 5)} for length in (20, 7, 33)]
    fitted = _fit(*calls)
    assert str(fitted) == "mse of series; kl of tags"
    error = torch.tensor([0.0, 0.0, 0.1])
    checks = compare_outputs(
        [(call, {"series": call["series"] + error, "tags": call["tags"].flip(-1)}) for call in calls],
        fitted,
        3,
    )
    series, tags = (torch.cat([call[name][0] for call in calls]) for name in ("series", "tags"))
    assert checks["samples"] == 3
    assert checks["relative_difference[series]"] == pytest.approx(
        float(0.1 * 60**0.5 / series.norm()), rel=1e-5
    )
    assert checks["worst_channel[series.2]"] == pytest.approx(
        0.01 / float(series[:, 2].var(correction=0)), rel=1e-3
    )
    assert (
        checks["same_class"]
        == checks["same_class[tags]"]
        == pytest.approx(float((tags.argmax(-1) == 2).double().mean()))
    )
    assert (
        checks["relative_difference"]
        == checks["relative_difference[tags]"]
        > checks["relative_difference[series]"]
    )
    assert checks["divergence"] == pytest.approx(
        (checks["divergence[series]"] + checks["divergence[tags]"]) / 2
    )


class _Head(nn.Module):
    """Two outputs, the second of which nothing but its own layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x).unflatten(1, (4, 8)), self.second(x).unflatten(1, (4, 8))


def test_a_head_that_only_a_later_output_reads_has_losses() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    artifact = tdpass.make_plan(_Head().eval(), {"params": 0.6}, x, cache=False, formats=["svd"])
    ranks = {choice.site: choice.rank for choice in artifact.plan}
    assert all(choice.loss > 1e-3 for choice in artifact.plan)
    assert abs(ranks["first"][0] - ranks["second"][0]) <= 2
    assert artifact.report.divergence == "mse of 0, 1"


@pytest.mark.parametrize(
    "last", [nn.Unflatten(1, (4, 8)), nn.Identity(), nn.Softmax(-1)], ids=["mse", "kl", "probabilities"]
)
def test_losses_do_not_depend_on_how_samples_come_in_calls(last: nn.Module) -> None:
    torch.manual_seed(0)
    model = open_model(
        nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), last).eval(),
        Batch((torch.randn(2, 24),)),
    )
    odd = torch.cat([torch.randn(95, 24), 5 * torch.randn(1, 24)])
    (site, _) = model.sites()
    factors = FORMATS.get("svd").factorize(model.weight(site.name), site, (6,))
    layer = Layer(site, Form("svd", (6,)), factors, model.bias(site.name)).to(torch.float32)
    losses = []
    for calls in ([odd], odd.split(1), odd.split(64), odd.flip(0).split(64)):
        tapes = [model.record(Batch((call,))) for call in calls]
        wish = Divergence()
        fitted = wish.fit([wish.outputs(tape.play().finish()) for tape in tapes])
        losses += [
            Sweep(tapes, fitted, len(odd)).loss({site.name: layer}),
            divergence_of(tapes, {site.name: layer}, fitted),
        ]
    assert losses[0] > 1e-3
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


def test_a_plan_does_not_depend_on_how_samples_come_in_calls() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Unflatten(1, (4, 8))).eval()
    odd = torch.cat([torch.randn(95, 24), 5 * torch.randn(1, 24)])
    orders = ([odd], odd.split(1), odd.split(64), odd.flip(0).split(64))
    plans = [
        tdpass.make_plan(model, {"params": 0.5}, list(data), cache=False, formats=["svd"]).plan
        for data in orders
    ]
    for plan in plans:
        assert [choice.rank for choice in plan] == [choice.rank for choice in plans[0]]
        assert plan.loss == pytest.approx(plans[0].loss, rel=2e-2)
