"""Weights that are a choice among forms.

The mixture is that of the outputs, and the logits learn what is asked of them.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.formats import FORMATS
from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.site import Site
from tdpass.training.choices import Choices, Draw
from tdpass.training.parametrized import parametrized, with_parametrizations
from tdpass.training.rank_search import Answers, Approach, Prices, RankSearch, judged
from tdpass.training.schedules import Constant

CONV = Site("0", "conv", (12, 8, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
FORMS = tuple(
    map(
        Form.parse,
        (
            "tucker2 3x2",
            "tucker2 8x4",
            "tucker2 4x8",
            "spatial_svd 5",
            "spatial_svd 9",
            "channel_svd 4",
            "input_svd 3",
        ),
    )
)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(CONV.shape, generator=GENERATOR)


class Call:
    """One call of a model."""

    def __init__(self, x: Tensor) -> None:
        self.args, self.kwargs = (x,), dict[str, Tensor]()


def held() -> tuple[Choices, tuple[Tensor, ...]]:
    choices = Choices(CONV, FORMS, Metric())
    return choices, choices.right_inverse(WEIGHT)


def test_the_mixed_weight_is_the_layer_whose_output_is_the_mixed_output() -> None:
    choices, parts = held()
    shares = torch.softmax(torch.randn(len(FORMS) + 1, generator=GENERATOR), 0)
    x = torch.randn(2, 8, 6, 6, generator=GENERATOR)
    outputs = []
    for index, share in enumerate(shares):
        outputs.append(share * F.conv2d(x, choices.one(index, *parts), padding=1))
    torch.testing.assert_close(
        F.conv2d(x, choices.mixed(shares, *parts), padding=1),
        torch.stack(outputs).sum(0),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("index", range(1, len(FORMS) + 1))
def test_every_candidate_is_its_form(index: int) -> None:
    choices, parts = held()
    form = choices.forms[index]
    stack = next(stack for stack in choices.stacks if stack.format == form.format)
    own = dict(zip(stack.names, choices._by_stack(parts[1:])[choices.stacks.index(stack)], strict=True))
    shapes = FORMATS.get(form.format).shapes(CONV, form.rank)
    factors = {name: own[name][tuple(map(slice, shape))] for name, shape in shapes.items()}
    x = torch.randn(1, 8, 6, 6, generator=GENERATOR)
    expected = Layer(CONV, form, factors)(x)
    torch.testing.assert_close(
        F.conv2d(x, choices.one(index, *parts), padding=1), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["svd", "channel_svd", "input_svd", "spatial_svd"])
def test_leading_factors_begin_as_the_best_of_their_rank(name: str) -> None:
    site = Site("l", "linear", (9, 14)) if name == "svd" else CONV
    weight = torch.randn(site.shape, generator=GENERATOR)
    choices = Choices(site, [Form(name, (rank,)) for rank in (1, 3, 5)], Metric())
    parts = choices.right_inverse(weight)
    for index, rank in enumerate((1, 3, 5), start=1):
        best = FORMATS.get(name).reconstruct(FORMATS.get(name).factorize(weight, site, (rank,)), site).float()
        torch.testing.assert_close(choices.one(index, *parts), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["channel_svd 4", "input_svd 3", "spatial_svd 9", "tucker2 8x6"])
def test_factors_begin_at_equal_norms_whatever_they_are_fitted_in(text: str) -> None:
    form = Form.parse(text)
    basis = torch.linalg.qr(torch.randn(72, 72, generator=GENERATOR, dtype=torch.float64)).Q
    metric = Metric(inputs=basis * torch.logspace(-6, 2, 72, dtype=torch.float64) @ basis.T)
    choices = Choices(CONV, [form], metric)
    _, *factors = choices.right_inverse(WEIGHT)
    norms = torch.stack([factor.norm() for factor in factors])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    fmt = FORMATS.get(form.format)
    made = fmt.reconstruct(fmt.factorize(WEIGHT, CONV, form.rank, metric), CONV).float()
    torch.testing.assert_close(choices.one(1, WEIGHT, *factors), made, rtol=1e-4, atol=1e-4)


def test_ranks_that_no_factor_holds_together_are_refused() -> None:
    site = Site("l", "linear", (16, 16))
    with pytest.raises(PlanError, match="lie in several factors"):
        Choices(site, [Form("tensor_ring", (2, 2, 2, 2))], Metric())


def test_what_decides_is_the_draw_the_most_probable_or_the_chosen_form() -> None:
    choices, parts = held()
    torch.testing.assert_close(choices(*parts), WEIGHT)
    logits = torch.zeros(len(FORMS) + 1)
    logits[3] = 1.0
    choices.draw = Draw(nn.Parameter(logits), torch.zeros_like(logits), 0.5)
    torch.testing.assert_close(choices(*parts), choices.mixed(torch.softmax(logits / 0.5, 0), *parts))
    assert not choices(*parts).requires_grad
    choices.draw.live = True
    assert choices(*parts).requires_grad
    choices.eval()
    torch.testing.assert_close(choices(*parts), choices.one(3, *parts))
    choices.chosen = 1
    torch.testing.assert_close(choices.train()(*parts), choices.one(1, *parts))


def network(forms: tuple[Form, ...] = FORMS) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return with_parametrizations(model, {"0": partial(Choices, CONV, forms, Metric())})


def search(
    net: nn.Module, goal: float, penalty: float, answers: Answers | None, steps: int, every: int = 1
) -> Tensor:
    """The shares of the forms after so many steps, whose weights do not move."""
    layers = parametrized(net, ["0"])
    choices = layers["0"].made_by
    assert isinstance(choices, Choices)
    costs = torch.linspace(1.0, 0.1, len(choices.forms))
    torch.manual_seed(1)
    begins = {"0": torch.zeros(len(choices.forms))}
    term = RankSearch(
        net,
        {"0": choices},
        begins,
        Prices({"0": costs}, goal),
        Constant(1.0),
        rate=0.1,
        penalty=penalty,
        every=every,
        answers=answers,
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    for _ in range(steps):
        optimizer.step()
        with torch.no_grad():
            term.after_step(optimizer)
    return torch.softmax(term.parameters["0"].detach(), 0)


def test_a_price_draws_to_the_cheapest_form_and_a_goal_to_its_cost() -> None:
    assert int(search(network(), 0.0, 1.0, None, 60).argmax()) == len(FORMS)
    shares = search(network(), 0.6, 1.0, None, 150)
    assert float(shares @ torch.linspace(1.0, 0.1, len(FORMS) + 1)) == pytest.approx(0.6, abs=0.02)
    assert torch.equal(
        search(network(), 0.0, 1.0, None, 10, every=0), torch.full((len(FORMS) + 1,), 1 / (len(FORMS) + 1))
    )


def test_the_dense_answers_draw_to_the_form_that_gives_them() -> None:
    net = network((Form.parse("tucker2 1x1"),))
    x = torch.randn(16, 8, 6, 6, generator=GENERATOR) + 2 * torch.randn(16, 8, 1, 1, generator=GENERATOR)
    with torch.no_grad():
        net[4].weight.mul_(10)
        answers = Answers([Call(x)], [net(x)])
    statistics = net[1].running_mean.clone()
    shares = search(net, 0.0, 0.0, answers, 60)
    assert shares[0] > 0.9  # dense, which is what answered
    assert torch.equal(net[1].running_mean, statistics)
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_network_is_judged_on_the_statistics_of_what_it_reads() -> None:
    net = network().eval()
    x = torch.randn(16, 8, 6, 6, generator=GENERATOR) * 5 + 3
    with torch.no_grad(), judged(net):
        y = net[:2](x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    assert not any(module.training for module in net.modules())
    assert net[1].track_running_stats


def test_candidates_are_drawn_to_the_output_of_the_original_layer() -> None:
    inputs = torch.randn(400, 72, generator=GENERATOR) * torch.logspace(0, -2, 72)
    metric = Metric(inputs.T @ inputs)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False))
    net = with_parametrizations(model, {"0": partial(Choices, CONV, FORMS, metric)})
    layers = parametrized(net, ["0"])
    original = {"0": model[0].weight.detach().clone()}
    with torch.no_grad():
        for part in layers["0"].originals:
            part.add_(0.05 * torch.randn(part.shape, generator=GENERATOR))
    choices = layers["0"].made_by
    assert isinstance(choices, Choices)
    choices.draw = Draw(nn.Parameter(torch.zeros(len(choices.forms))), torch.zeros(len(choices.forms)))
    term, before = Approach(layers, original, 1.0), Approach(layers, original, 1.0).distances("0")
    answers = F.linear(inputs, (choices.one(2, *layers["0"].originals) - original["0"]).flatten(1))
    size = F.linear(inputs, original["0"].flatten(1)).square().sum()
    torch.testing.assert_close(before[2], answers.detach().square().sum() / size, rtol=1e-3, atol=0)
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(300):
        for part in layers["0"].originals:
            part.grad = torch.zeros_like(part)
        with torch.no_grad():
            term.before_step(optimizer)
        optimizer.step()
    after = term.distances("0")
    assert torch.all(after < before)
    assert after[0] < 0.3 * before[0]


@pytest.mark.parametrize("goal", [0.0, 0.3, 0.6, 0.95])
def test_a_search_begins_at_the_budget_with_the_forms_that_lose_least(goal: float) -> None:
    costs = {"a": torch.tensor([0.6, 0.3, 0.15, 0.03]), "b": torch.tensor([0.4, 0.2, 0.1, 0.02])}
    distances = {"a": torch.tensor([0.0, 0.05, 0.2, 0.9]), "b": torch.tensor([0.0, 0.4, 0.6, 1.0])}
    prices = Prices(costs, goal)
    price = prices.meeting(distances) if goal else 0.0
    begins = prices.logits(distances, price)
    shares = {name: torch.softmax(logits, 0) for name, logits in begins.items()}
    expected = sum(float(shares[name] @ costs[name]) for name in costs)
    most = sum(float(torch.softmax(-10 * distances[name], 0) @ costs[name]) for name in costs)
    assert expected == pytest.approx(min(goal or 1.0, most), abs=1e-3)
    if goal == 0.6:
        assert shares["b"][0] > shares["a"][0]  # the layer that loses more by being factored
    for name, worth in prices.worth(begins, price).items():
        torch.testing.assert_close(worth, -10 * distances[name])
