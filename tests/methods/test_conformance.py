"""What every registered training method promises, in a loop of one's own and in `tdpass.train`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdpass
from tdpass.constraints.in_format import InFormat
from tdpass.errors import TdpassError, TrainingError, UsageError
from tdpass.methods import METHODS, AdmmTT, make_method
from tdpass.methods.factored import FactoredByAdmm
from tdpass.methods.stages import Run, Stage, Stages, finished, pretrained
from tdpass.training.batches import Batches

ROUNDS = 6
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "admm-tt": [
        {"budget": {"params": 0.4}, "rounds": ROUNDS, "rho": 0.5},
        {"budget": {"macs": 0.6}, "format": "tucker2", "rounds": ROUNDS, "rho": 0.5},
        {"ranks": {"conv2": [4, 4], "fc": {"svd": [3]}}, "format": "tucker2", "rounds": ROUNDS, "rho": 0.5},
        {"ranks": {"fc": [3, 3, 3, 3]}, "format": "tensor_ring", "rounds": ROUNDS, "rho": 0.5},
        {"start": {"params": 0.5}, "rounds": ROUNDS, "rho": 0.5},
        {"budget": {"params": 0.4}, "cuts": 4, "rounds": ROUNDS, "rho": 0.5},
    ],
    "batude": [
        {"budget": {"macs": 0.5}, "rounds": ROUNDS, "stable": 2, "rho": 0.5},
        {
            "budget": {"params": 0.7},
            "rounds": ROUNDS,
            "stable": 1,
            "rho": 0.5,
            "exclude": ["fc"],
            "metric": "fisher",
        },
    ],
    "cascaded-projection": [
        {"width": 0.5, "rounds": ROUNDS, "gamma": 0.1},
        {"width": 0.6, "rounds": ROUNDS, "start": "norm", "train_weights": True},
        {"width": 0.5, "rounds": ROUNDS, "gamma": 0.0, "start": "median", "exclude": ["fc", "out"]},
    ],
    "channel-adaptive": [
        {"widths": [0.5, 1.0], "rounds": ROUNDS},
        {
            "widths": [0.25, 0.5, 1.0],
            "ranks": [0.5, 1.0],
            "rounds": ROUNDS,
            "random": 1,
            "distill": 0.5,
            "exclude": ["out"],
        },
    ],
    "haloc": [
        {"penalty": 2.0, "warm": 1, "search": 3, "tune": 2},
        {"budget": {"macs": 0.5}, "warm": 1, "search": 3, "tune": 2, "ranks": 4},
        {
            "budget": {"params": 0.6},
            "warm": 0,
            "search": 6,
            "tune": 0,
            "formats": ["spatial_svd", "svd"],
            "exclude": ["out"],
        },
        {"penalty": 1.0, "target": "systolic:gemmini", "warm": 0, "search": 4, "tune": 2, "ranks": 3},
    ],
    "lc": [
        {"penalty": 2.0, "rounds": ROUNDS, "rho": 0.5},
        {"budget": {"macs": 0.5}, "rounds": ROUNDS, "rho": 0.5},
        {
            "budget": {"params": 0.6},
            "penalty": 0.1,
            "format": "spatial_svd",
            "rounds": ROUNDS,
            "rho": 0.5,
            "exclude": ["out"],
        },
    ],
    "svd-training": [
        {"energy": 0.1, "sparse": 0.1, "sparsify": 4, "tune": 2},
        {
            "energy": 0.1,
            "sparse": 0.05,
            "sparsify": 3,
            "tune": 2,
            "factored": 1,
            "format": "spatial_svd",
            "sparsity": "hoyer-square",
            "exclude": ["out"],
        },
        {"budget": {"macs": 0.6}, "sparsity": "l1", "sparsify": 4, "tune": 2},
    ],
    "crossbar": [
        {"keep": 700, "admm": 3, "retrain": 1, "fix": 2, "rho": 0.5},
        {
            "keep": 700,
            "weight_bits": 5,
            "side": "row",
            "admm": 3,
            "retrain": 2,
            "fix": 1,
            "rho": 0.5,
            "noise": 0.1,
            "metric": "fisher",
        },
        {
            "groups": {"fc": {"filter": 0.5, "column": 0.5}, "conv*": {"channel": 0.75}},
            "array": "forms",
            "admm": 4,
            "retrain": 0,
            "fix": 2,
            "rho": 0.5,
        },
        {
            "keep": 900,
            "groups": {"*": {"column": 0.6}},
            "weight_bits": 6,
            "admm": 4,
            "retrain": 2,
            "fix": 0,
            "rho": 0.5,
            "exclude": ["out"],
        },
    ],
    "admm-nn": [
        {"keep": 400, "prune": 3, "retrain": 1, "quantize": 0, "fix": 0, "rho": 0.5},
        {
            "keep": 400,
            "bits_per_weight": 3,
            "prune": 2,
            "retrain": 1,
            "quantize": 1,
            "fix": 2,
            "rho": 0.5,
            "score": "lamp",
            "least": {"conv1": 60},
        },
        {"keep": 300, "prune": 4, "retrain": 2, "rho": 0.5, "metric": "fisher"},
        {
            "keep": 300,
            "bits_per_weight": 3,
            "prune": 3,
            "retrain": 1,
            "quantize": 0,
            "fix": 2,
            "metric": "fisher",
            "pruning": "surgery",
        },
    ],
}
UNCONSTRAINED = {"channel-adaptive"}  # weights end in no set that they are at a distance from
CASES = [
    pytest.param(name, options, id=f"{name}-{index}")
    for name, all_options in EXAMPLES.items()
    for index, options in enumerate(all_options)
]
# training takes seconds: the first example of every method is fast, its other options are slow
TRAINED = [
    pytest.param(*case.values, id=case.id, marks=() if str(case.id).endswith("-0") else pytest.mark.slow)
    for case in CASES
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1)
        self.fc = nn.Linear(64, 20)
        self.out = nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(x))
        return self.out(F.relu(self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))))


def network() -> Net:
    torch.manual_seed(3)
    return Net()


def batches() -> Batches:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(192) % 4
    images = torch.randn(192, 2, 8, 8, generator=generator) + labels[:, None, None, None] * torch.tensor(
        [0.5, -0.5]
    ).view(1, 2, 1, 1)
    return Batches(images, labels, 32)


def trained(name: str, options: dict[str, Any], model: nn.Module) -> tuple[Any, nn.Module]:
    """A method and the module it trained, which is still to be finished."""
    method, data = METHODS.get(name)(**options), batches()
    model = method.prepare(model, torch.zeros(2, 2, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method.attach(model, optimizer, every=len(data))
    for epoch in range(ROUNDS):
        data.set_epoch(epoch)
        for inputs, targets in data:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return method, model


def own_loop(name: str, options: dict[str, Any], model: nn.Module) -> tuple[Any, tdpass.Artifact]:
    method, network = trained(name, options, model)
    return method, method.finish(network)


def test_every_method_has_examples() -> None:
    assert set(EXAMPLES) == set(METHODS.names())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_method_shows_what_it_was_made_with(name: str, options: dict[str, Any]) -> None:
    made = make_method({name: options})
    shown = repr(made)
    assert shown.startswith(f"{type(made).__name__}(")
    assert all(f"{option}=" in shown for option in options)


@pytest.mark.parametrize(("name", "options"), TRAINED)
def test_a_loop_of_ones_own_ends_in_an_artifact(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    method, model = trained(name, options, network())
    method.phased.end()  # noise that a step left in the weights is taken away
    before = copy.deepcopy(model.state_dict())
    artifact = method.finish(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(model.__dict__["_forward_pre_hooks"]) == 0
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    result = artifact.model.eval()
    artifact.save(tmp_path / "model.safetensors")
    loaded = tdpass.load(tmp_path / "model.safetensors", network()).eval()
    assert torch.equal(loaded(x), result(x))
    assert tdpass.load_plan(tmp_path / "model.safetensors") == artifact.plan
    artifact.plan.save(tmp_path / "plan.json")
    assert tdpass.load_plan(tmp_path / "plan.json") == artifact.plan
    torch.onnx.export(result, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), result(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), TRAINED)
def test_the_result_keeps_its_bounds(name: str, options: dict[str, Any]) -> None:
    method, artifact = own_loop(name, options, network())
    for measure, bound in options.get("budget", {}).items():
        limit = bound * artifact.report.original.get(measure)
        assert artifact.report.final.get(measure) <= limit
        assert artifact.report.final.get(measure) > 0.6 * limit  # a budget is there to be used
    for choice in artifact.plan:
        weight = dict(artifact.model.named_modules())[choice.site].weight.detach()
        if not choice.kept_dense:
            assert choice.cost.params < choice.dense.params or "ranks" in options or choice.form.numbers
            # the projections of the first are searches, narrow layers are of no set that their sites' weights
            # are in
            if choice.format not in {"tensor_ring", "cp", "block_term"} and not choice.form.narrow:
                again = InFormat(method.sites[choice.site], choice.format, choice.rank).project(weight)
                torch.testing.assert_close(again, weight, rtol=1e-4, atol=1e-4)
        if "bits_per_weight" in options:
            level = method.levels[choice.site]
            assert weight[weight != 0].abs().unique().numel() <= level.count
    for site, least in options.get("least", {}).items():
        assert dict(artifact.model.named_modules())[site].weight.count_nonzero() >= least
    if "keep" in options:
        kept = sum(
            int(dict(artifact.model.named_modules())[choice.site].weight.count_nonzero())
            for choice in artifact.plan
        )
        slack = (
            0.8 if name == "crossbar" else 0.95
        )  # which drops whole groups, and weights that would change their sign
        assert slack * options["keep"] <= kept <= options["keep"]
    if "bits_per_weight" in options:
        bits = sum(
            level.bits * int(dict(artifact.model.named_modules())[site].weight.count_nonzero())
            for site, level in method.levels.items()
        )
        assert bits <= options["bits_per_weight"] * options["keep"]


@pytest.mark.parametrize(("name", "options"), TRAINED)
def test_train_reports_every_epoch_and_the_control(name: str, options: dict[str, Any]) -> None:
    def score(model: nn.Module) -> float:
        data = batches()
        return 100 * float((model(data.inputs).argmax(1) == data.targets).float().mean())

    model = network()
    before = copy.deepcopy(model.state_dict())
    common: dict[str, Any] = {
        "settings": {"lr": 0.05, "distill": 0.3},
        "evaluate": score,
        "test": score,
        "example_inputs": torch.zeros(2, 2, 8, 8),
    }
    tuned = 0 if METHODS.get(name).final else 1
    artifact = tdpass.train(model, batches(), {name: options}, pretrain=1, finetune=tuned, **common)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    epochs = make_method({name: options}).epochs()
    assert [row.stage for row in artifact.report.training] == ["pretrain"] + ["method"] * epochs + [
        "finetune"
    ] * tuned + ["control"] * (epochs + tuned)
    assert {"score_dense", "score_before_finetuning", "score_control", "score_final"} <= set(
        artifact.report.checks
    )
    assert artifact.report.checks["score_final"] == score(artifact.model)
    assert any(row.residuals for row in artifact.report.training) == (name not in UNCONSTRAINED)
    assert tdpass.Report(**vars(artifact.report)).to_json() == artifact.report.to_json()


@pytest.mark.parametrize(
    ("name", "options"), [case for case in TRAINED if issubclass(METHODS.get(case.values[0]), FactoredByAdmm)]
)
def test_admm_brings_weights_nearer_to_their_set(name: str, options: dict[str, Any]) -> None:
    settings = {"lr": 0.02, "schedule": {"constant": {"start": 1.0}}}
    common: dict[str, Any] = {
        "settings": settings,
        "control": False,
        "example_inputs": torch.zeros(2, 2, 8, 8),
    }
    artifact = tdpass.train(network(), batches(), {name: {**options, "rounds": 20, "rho": 0.2}}, **common)
    plain = dict(tdpass.train(network(), batches(), pretrain=20, **common).model.named_parameters())
    sites = {site.name: site for site in tdpass.open_model(network()).sites()}
    errors = []
    for choice in artifact.plan:
        if not choice.kept_dense:
            weight = plain[f"{choice.site}.weight"].detach()
            gap = weight - InFormat(sites[choice.site], choice.format, choice.rank).project(weight)
            errors.append(float(gap.norm() / weight.norm()))
    assert sum(choice.error for choice in artifact.plan) < 0.8 * sum(errors)


@pytest.mark.parametrize(("rho", "told"), [(1e-6, True), (50.0, False)])
def test_what_is_left_to_the_last_projection_is_told(rho: float, told: bool) -> None:
    notes: list[str] = []
    method = {"admm-tt": {"budget": {"params": 0.4}, "rounds": ROUNDS, "rho": rho, "decoupled": True}}
    tdpass.train(
        network(), batches(), method, settings={"lr": 0.01, "schedule": 1.0}, control=False, note=notes.append
    )
    assert any("a larger last rho" in note for note in notes) is told


def test_without_rounds_it_is_direct_factorization() -> None:
    common: dict[str, Any] = {"example_inputs": torch.zeros(2, 2, 8, 8), "control": False}
    options = {"budget": {"params": 0.4}, "rounds": 0}
    artifact = tdpass.train(network(), batches(), {"admm-tt": options}, **common)
    direct = tdpass.compress(
        network(), plan=artifact.plan, pipeline="factorize", example_inputs=common["example_inputs"]
    ).model
    assert all(
        torch.equal(value, direct.state_dict()[key]) for key, value in artifact.model.state_dict().items()
    )
    assert artifact.report.training == []
    model = network()
    with pytest.raises(UsageError, match="no rounds"):
        METHODS.get("admm-tt")(**options).attach(model, torch.optim.SGD(model.parameters(), lr=0.1), every=2)


def test_the_planner_chooses_the_start_on_calibration_data() -> None:
    data = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    options = {"start": {"macs": 0.5}, "rounds": 0}
    artifact = tdpass.train(
        network(), batches(), {"admm-tt": options}, calibration=data, control=False, example_inputs=data[:2]
    )
    planned = tdpass.make_plan(network(), {"macs": 0.5}, data, pipeline="plan{joint=false}").plan
    assert [(choice.site, choice.format, choice.rank) for choice in artifact.plan] == [
        (choice.site, choice.format, choice.rank) for choice in planned
    ]
    assert artifact.report.final.macs <= 0.5 * artifact.report.original.macs


def test_the_rounds_begin_where_the_post_training_path_ended() -> None:
    data = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    common: dict[str, Any] = {
        "calibration": data,
        "control": False,
        "example_inputs": data[:2],
        "settings": {"lr": 1e-9},
    }
    planned = tdpass.make_plan(network(), {"macs": 0.5}, data, pipeline="plan{joint=false}").plan
    restricted = [
        {"start": {"macs": 0.5}, "formats": [form, "svd"]} for form in ("tucker2", "cp", "block_term")
    ]
    fitted = [
        {"budget": {"macs": 0.5}, "format": "tucker2", "fit": True},
        {"budget": {"params": 0.4}, "cuts": 4, "fit": True},
        {"ranks": {"fc": {"tensor_ring": [3, 3, 3, 3]}}, "fit": True},
    ]
    cases: list[dict[str, Any]] = [{"start": {"macs": 0.5}}, {"start": planned}, *restricted, *fitted]
    for options in cases:
        artifact = tdpass.train(network(), batches(), {"admm-tt": {**options, "rounds": 1}}, **common)
        (row,) = artifact.report.training
        assert row.residuals
        assert max(row.residuals.values()) < 1e-3
        assert {choice.format for choice in artifact.plan if not choice.kept_dense} <= set(
            options.get("formats", tdpass.formats.FORMATS.names())
        )
    artifact = tdpass.train(
        network(), batches(), {"admm-tt": {"start": planned, "fit": False, "rounds": 1}}, **common
    )
    assert max(artifact.report.training[0].residuals.values()) > 0.1
    with pytest.raises(UsageError, match="there is none; pass calibration="):
        tdpass.train(network(), batches(), {"admm-tt": fitted[0]}, example_inputs=data[:2])
    with pytest.raises(UsageError, match="planner to choose from"):
        METHODS.get("admm-tt")(budget={"macs": 0.5}, formats=["svd"])
    with pytest.raises(UsageError, match="cuts=4 are for tensor trains"):
        METHODS.get("admm-tt")(budget={"macs": 0.5}, format="tucker2", cuts=4)


@pytest.mark.parametrize(
    "ranks",
    [{"conv2": {"cp": [9]}}, {"conv2": {"block_term": [2, 4, 4]}}, {"fc": {"tensor_ring": [3, 3, 3, 3]}}],
)
def test_what_a_search_found_while_training_is_what_comes_out(ranks: dict[str, Any]) -> None:
    model = network()
    method, artifact = own_loop(
        "admm-tt", {"ranks": ranks, "rounds": ROUNDS, "rho": 20.0, "decoupled": True}, model
    )
    for site in ranks:
        trained, made = (dict(net.named_modules())[site].weight.detach() for net in (model, artifact.model))
        assert float((trained - made).norm() / trained.norm()) <= 2 * method.residuals()[site] + 1e-3


def test_cuts_split_the_channels_of_tensor_trains() -> None:
    options = {"budget": {"params": 0.4}, "cuts": 4, "rounds": 0}
    artifact = tdpass.train(network(), batches(), {"admm-tt": options}, control=False, finetune=1)
    ranks = {choice.site: choice.rank for choice in artifact.plan if choice.format == "tensor_train"}
    assert {len(rank) for rank in ranks.values()} == {4}
    assert artifact.report.final.params <= 0.4 * artifact.report.original.params


def test_with_calibration_data_the_end_is_that_of_the_post_training_path() -> None:
    data = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 2, 8)
    options = {"budget": {"params": 0.4}, "rounds": 0}
    far = []
    for calibration in (None, data):
        made = tdpass.train(
            network(),
            batches(),
            {"admm-tt": options},
            calibration=calibration,
            control=False,
            example_inputs=data[:2],
        )
        far.append(tdpass.verify(network().eval(), made.model.eval(), data)["divergence"])
    assert far[1] < 0.8 * far[0]


def test_fine_tuning_is_refused_where_it_would_undo_the_method() -> None:
    with pytest.raises(UsageError, match="would move them"):
        tdpass.train(network(), batches(), {"admm-nn": EXAMPLES["admm-nn"][0]}, finetune=1)


@pytest.mark.parametrize("name", METHODS.names())
def test_wrong_use_is_one_clear_error(name: str) -> None:
    options, model = EXAMPLES[name][0], network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = METHODS.get(name)(**options)
    with pytest.raises(TrainingError, match="attach it before"):
        method.finish(model)
    model = method.prepare(model, torch.zeros(2, 2, 8, 8))
    with pytest.raises(UsageError, match="attach"):
        method.parameters_of(nn.Sequential())
    method.attach(model, optimizer, every=2)
    with pytest.raises(UsageError, match="attached already"):
        method.attach(model, optimizer, every=2)
    with pytest.raises(UsageError, match="no site"):
        METHODS.get(name)(**{**options, "include": ["nothing*"]}).attach(model, optimizer, every=2)
    with pytest.raises(TdpassError, match="has no option 'nonsense'; it takes: "):
        make_method({name: {**options, "nonsense": 1}})
    with pytest.raises(UsageError, match="not a str"):
        METHODS.get(name)(**options).prepare("model.onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("admm-tt", {"budget": {"params": 1e-4}}),
        ("batude", {"budget": {"macs": 1e-4}}),
        ("batude", {"budget": {"seconds": 0.5}}),
        ("batude", {"budget": {"macs": 0.5, "params": 0.5}}),
        ("lc", {"budget": {"macs": 1e-4}}),
        ("haloc", {"budget": {"macs": 1e-4}}),
        ("haloc", {"budget": {"macs": 0.5}, "target": "systolic:gemmini"}),
    ],
)
def test_impossible_budgets_are_refused_before_training(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(tdpass.BudgetError):
        METHODS.get(name)(**options).prepare(network(), torch.zeros(2, 2, 8, 8))


WRONG: list[dict[str, Any]] = [
    {"keep": 0},
    {"keep": 10, "reach": 0.0},
    {"keep": 10, "bits_per_weight": 9.0},
    {"keep": 10, "bits_per_weight": 2.0, "quantize": 0, "fix": 0},
    {"keep": 100, "least": {"conv9": 5}},
    {"keep": 10, "rates": {"fine": 2.0}},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_admm_nn_checks_its_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        METHODS.get("admm-nn")(**wrong).prepare(network())


@pytest.mark.parametrize("options", EXAMPLES["admm-nn"])
def test_a_plan_of_pruned_weights_makes_the_same_numbers_of_the_onnx_export(
    options: dict[str, Any], tmp_path: Path
) -> None:
    _, artifact = own_loop("admm-nn", options, network())
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    assert any(choice.form.support for choice in artifact.plan)
    artifact.save(tmp_path / "it.safetensors")
    assert artifact.report.stored is not None
    assert artifact.report.stored.weights == sum(
        choice.dense.params for choice in artifact.plan
    )  # no layer is left out of what is counted
    assert artifact.report.stored.survivors == sum(choice.cost.params for choice in artifact.plan)
    assert artifact.report.final.bytes < 0.5 * artifact.report.original.bytes
    dense = network().eval()
    stored = dict(artifact.model.named_modules())
    state = {
        name: stored[name.removesuffix(".weight")].weight if name.endswith(".weight") else value
        for name, value in dense.state_dict().items()
    }
    state |= {
        name: value
        for name, value in artifact.model.state_dict().items()
        if name in state and not name.endswith(".weight")
    }
    dense.load_state_dict(state)
    torch.onnx.export(dense, (x,), tmp_path / "dense.onnx", dynamo=True, verbose=False, optimize=False)
    found = tdpass.compress(tmp_path / "dense.onnx", plan=artifact.plan, pipeline="factorize", cache=False)
    assert [choice.form for choice in found.plan] == [choice.form for choice in artifact.plan]
    model = tdpass.open_model(found.model)
    assert found.report.final.bytes == artifact.report.final.bytes
    (answer,) = model.run(tdpass.models.base.Batch((x,))).values()
    torch.testing.assert_close(answer, artifact.model.eval()(x), rtol=1e-5, atol=1e-6)


def test_hardware_sends_layers_below_break_even_back_to_dense() -> None:
    class Machine:
        def break_even_sparsity(
            self, site: tdpass.models.base.Site, group: str = "weight", setting: object = None
        ) -> float | None:
            return {"conv1": None, "conv2": 0.7, "fc": 0.6, "out": 0.0}[site.name]

    method = METHODS.get("admm-nn")(keep=900, prune=1, retrain=1, hardware=Machine())
    method.prepare(network())
    assert "conv1" in method.dense
    artifact = tdpass.train(
        network(),
        batches(),
        METHODS.get("admm-nn")(keep=900, prune=2, retrain=1, hardware=Machine()),
        control=False,
    )
    modules = dict(artifact.model.named_modules())
    assert modules["conv1"].weight.count_nonzero() == 12 * 2 * 9
    assert sum(int(modules[name].weight.count_nonzero()) for name in ("conv1", "conv2", "fc", "out")) <= 900


class Widths(AdmmTT):
    """Runs the network twice a step, with all inputs and without the second channel.

    The second channel learns from the first run.
    """

    name = "widths"

    def passes(self, forward: Any, inputs: Any, loss: Any) -> Any:
        full = forward(inputs)
        yield loss(full)
        part = forward(inputs * torch.tensor([1.0, 0.0]).view(2, 1, 1))
        yield F.cross_entropy(part, full.detach().softmax(1))


def test_a_step_may_run_the_network_several_times() -> None:
    options: dict[str, Any] = {"budget": {"params": 0.4}, "rounds": 2, "rho": 0.1}
    runs, losses = [], []
    for method in (AdmmTT(**options), Widths(**options)):
        network_run = network()
        counted: list[int] = []
        network_run.register_forward_pre_hook(
            lambda module, inputs, seen=counted: seen.append(len(inputs[0])) if module.training else None
        )
        artifact = tdpass.train(network_run, batches(), method, settings={"lr": 0.05}, control=False)
        runs.append(len(counted))
        losses.append(artifact.report.training[0].loss)
    assert runs == [12, 24]
    assert 1.9 * losses[0] < losses[1] < 2.1 * losses[0]  # two cross-entropies near ln 4


class Twice(AdmmTT):
    """Trains the network it was given once more before the rounds: a stage of its own."""

    name = "twice"

    def stages(self, run: Run) -> Stages:
        dense = yield from pretrained(run)
        warm = yield Stage("warm", dense, run.settings, 2)
        trained = yield Stage("method", self.prepare(warm), run.settings, self.epochs(), self.bind)
        return (yield from finished(run, warm, self.finish(trained), 2 + self.epochs()))


def test_stages_are_the_methods_own(tmp_path: Path) -> None:
    method: dict[str, Any] = {"budget": {"params": 0.4}, "rounds": 2, "rho": 0.1}
    artifact = tdpass.train(
        network(), batches(), Twice(**method), settings={"lr": 0.05}, finetune=1, folder=tmp_path
    )
    assert [row.stage for row in artifact.report.training] == ["warm"] * 2 + ["method"] * 2 + ["finetune"] + [
        "control"
    ] * 5
    again = tdpass.train(
        network(), batches(), Twice(**method), settings={"lr": 0.05}, finetune=1, folder=tmp_path, resume=True
    )
    assert all(
        torch.equal(value, again.model.state_dict()[name])
        for name, value in artifact.model.state_dict().items()
    )
