"""Networks of several widths and ranks: what shrinks together, what a switch and a setting are."""

from __future__ import annotations

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from tdpass.errors import BudgetError, InvalidModelError, PlanError, UsageError
from tdpass.layers.adaptive import Adaptive, AdaptiveNorm, dial_of, hold_bits
from tdpass.layers.factorized import Factorized
from tdpass.layers.upper_bits import Codes
from tdpass.methods import ChannelAdaptive, Controller
from tdpass.models.torch.sites.adapting import adaptation_of
from tdpass.training.batches import Batches
from tdpass.zoo import digits_net, resnet20

WIDTHS = (0.25, 0.5, 0.75, 1.0)


class Joined(nn.Module):
    """A residual sum, a depthwise convolution, a gate, and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.hidden, self.out = nn.Linear(8 * 4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = x + self.second(self.depthwise(x)) * torch.sigmoid(self.gate(x))
        return self.out(torch.relu(self.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1))))


class Concatenated(nn.Module):
    """What is concatenated keeps its channels, what is behind it may lose some."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.both, self.out = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(10, 8, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.both(torch.cat([torch.relu(self.one(x)), self.two(x)], 1))))


class Padded(nn.Module):
    """A shortcut that pads by numbers that are written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 8, 1)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.out(
            torch.relu(self.norm(self.body(torch.relu(self.inner(x)))) + F.pad(x, (0, 0, 0, 0, 2, 2)))
        )


class Viewed(nn.Module):
    """Code that relies on the channels of one layer, between layers that may have fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.viewed = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.last, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.viewed(torch.relu(self.first(x)))).view(-1, 8, 8, 8)
        return self.out(torch.relu(self.last(x)))


class Grouped(nn.Module):
    """Grouped layers, and a depthwise one that makes two channels of each, keep theirs; others may lose some."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4)
        self.between, self.twice = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 8, 3, stride=2, groups=4)
        self.last, self.out = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x))))
        x = torch.relu(self.twice(torch.relu(self.between(x))))
        return self.out(torch.relu(self.last(x)))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NETS: dict[str, tuple[Any, Tensor]] = {
    "joined": (Joined, IMAGES),
    "concatenated": (Concatenated, IMAGES),
    "padded": (Padded, IMAGES),
    "viewed": (Viewed, IMAGES),
    "grouped": (Grouped, IMAGES),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        ),
        torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3)),
    ),
    "digits": (digits_net, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))),
    "resnet20": (resnet20, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))),
}
GRIDS = {
    "widths": {"widths": WIDTHS},
    "ranks": {"widths": [1.0], "ranks": [0.25, 0.5, 1.0]},
    "both": {"widths": [0.5, 1.0], "ranks": [0.5, 1.0]},
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    build, x = NETS[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model, x


def adaptive(name: str, **options: Any) -> tuple[nn.Module, ChannelAdaptive, Tensor]:
    model, x = network(name)
    method = ChannelAdaptive(**options)
    return method.prepare(model, x).eval(), method, x


def channels(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    found = adaptation_of(model)
    assert found is not None
    return {
        name: [(i.count, o.count) for i, o in zip(form.inputs, form.outputs, strict=True)]
        for name, form in found.layers.items()
    }


@pytest.mark.parametrize("name", NETS)
def test_at_full_width_nothing_changes_and_what_was_given_stays(name: str) -> None:
    model, x = network(name)
    before = copy.deepcopy(model.state_dict())
    wide = ChannelAdaptive(widths=WIDTHS).prepare(model, x).eval()
    torch.testing.assert_close(wide(x), model(x), rtol=0, atol=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NETS)
def test_every_setting_is_the_ordinary_model_that_it_stands_for(name: str, grid: str) -> None:
    model, _, x = adaptive(name, **GRIDS[grid])
    found = adaptation_of(model)
    assert found is not None
    sizes = []
    for width in found.widths:
        for rank in found.ranks:
            tdpass.set_width(model, width)
            tdpass.set_rank(model, rank)
            plain = tdpass.ordinary(model, width, rank)
            assert not any(isinstance(module, Adaptive | AdaptiveNorm) for module in plain.modules())
            torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
            sizes.append(sum(parameter.numel() for parameter in plain.parameters()))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_channels_shrink_together_as_the_run_joins_them() -> None:
    halves = {name: channels(adaptive(name, widths=[0.5, 1.0])[0]) for name in NETS}
    assert {name: counts[0] for name, counts in halves["joined"].items()} == {
        "stem": (3, 4), "depthwise": (4, 4), "gate": (4, 4), "hidden": (16, 6), "out": (6, 3),
    }  # fmt: skip
    assert {name: counts[0] for name, counts in halves["concatenated"].items()} == {
        "one": (3, 4),
        "two": (3, 6),
        "both": (10, 4),
        "out": (4, 2),
    }
    assert {name: counts[0] for name, counts in halves["padded"].items()} == {
        "stem": (3, 4), "inner": (4, 4), "body": (4, 8), "out": (8, 2),
    }  # fmt: skip
    assert {name: counts[0] for name, counts in halves["grouped"].items()} == {
        "stem": (3, 8), "grouped": (8, 12), "between": (12, 4), "twice": (4, 8), "last": (8, 4), "out": (4, 2),
    }  # fmt: skip
    assert halves["resnet20"]["layer2.0.conv1"][0] == (8, 16)
    assert halves["resnet20"]["layer3.2.conv2"][0] == (32, 32)
    assert halves["resnet20"]["linear"][0] == (32, 10)


def test_code_that_relies_on_channels_keeps_those_alone() -> None:
    model, method, _ = adaptive("viewed", widths=[0.5, 1.0])
    assert channels(model) == {
        "first": [(3, 4), (3, 8)],
        "viewed": [(4, 8), (8, 8)],
        "last": [(8, 4), (8, 8)],
        "out": [(4, 2), (8, 2)],
    }
    assert set(method.why) == {"viewed", "out"}
    assert "does not run with fewer" in method.why["viewed"]


@pytest.mark.parametrize("grad", [False, True])
def test_an_encoder_layer_runs_narrow_with_and_without_gradients(grad: bool) -> None:
    model, _, x = adaptive("encoder", widths=[0.5, 1.0])
    assert channels(model)["layers.0.linear1"] == [(8, 8), (8, 16)]
    tdpass.set_width(model, 0.5)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), tdpass.ordinary(model, 0.5)(x), rtol=1e-5, atol=1e-5)


def test_a_narrow_network_is_the_whole_one_with_other_channels_at_zero() -> None:
    model, x = network("resnet20")
    narrow = tdpass.ordinary(ChannelAdaptive(widths=[0.5, 1.0]).prepare(model, x), 0.5).eval()
    masked = copy.deepcopy(model)
    for module in masked.modules():
        if isinstance(module, nn.Conv2d):
            o, i = module.weight.shape[:2]
            mask = torch.zeros_like(module.weight)
            mask[o // 4 : o // 4 + o // 2, slice(None) if i == 3 else slice(i // 4, i // 4 + i // 2)] = 1
            module.weight.data *= mask
        if isinstance(module, nn.BatchNorm2d):
            c = module.num_features
            keep = torch.zeros(c)
            keep[c // 4 : c // 4 + c // 2] = 1
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.mul_(keep)
        if isinstance(module, nn.Linear):
            module.weight.data[:, :16] = 0
            module.weight.data[:, 48:] = 0
    torch.testing.assert_close(narrow(x), masked(x), rtol=1e-4, atol=1e-5)


def test_a_switch_is_quick_and_copies_nothing() -> None:
    model, _, x = adaptive("resnet20", widths=WIDTHS)
    held = {name: value.data_ptr() for name, value in model.state_dict().items()}
    wide = model(x)
    start = time.perf_counter()
    for _ in range(100):
        tdpass.set_width(model, 0.25)
    assert (time.perf_counter() - start) / 100 < 1e-3
    assert not torch.equal(model(x), wide)
    tdpass.set_width(model, 1.0)
    assert torch.equal(model(x), wide)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == held
    twin = copy.deepcopy(model)
    tdpass.set_width(twin, 0.25)
    assert torch.equal(model(x), wide)


def test_a_step_runs_the_whole_network_the_narrowest_and_some_others() -> None:
    model, method, x = adaptive("digits", widths=WIDTHS, random=1, distill=1.0)
    method.bind(model)
    seen = []

    def forward(inputs: Tensor) -> Tensor:
        seen.append(dial_of(model).place)
        return model(inputs)

    losses = list(method.passes(forward, x, lambda scores: F.cross_entropy(scores, torch.tensor([1, 2, 3]))))
    assert seen[:2] == [3, 0]
    assert seen[2] in {1, 2}
    assert len(losses) == 3
    assert dial_of(model).place == 3
    tdpass.set_width(model, 0.25)
    narrow = model(x)
    tdpass.set_width(model, 1.0)
    apart = F.kl_div(narrow.log_softmax(-1), model(x).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(losses[1], apart)
    torch.testing.assert_close(losses[0], F.cross_entropy(model(x), torch.tensor([1, 2, 3])))


def digits() -> Batches:
    images = torch.randn(192, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = (images[:, :, :4].mean((1, 2, 3)) > images[:, :, 4:].mean((1, 2, 3))).long()
    return Batches(images, labels, 32)


@pytest.fixture(scope="module")
def artifact() -> tdpass.Artifact:
    torch.manual_seed(0)
    method = {"channel-adaptive": {"widths": [0.25, 1.0], "ranks": [0.5, 1.0], "rounds": 8}}
    images = digits().inputs
    options: dict[str, Any] = {
        "settings": {"lr": 0.05},
        "example_inputs": images[:2],
        "calibration": images,
        "control": False,
        "test": right,
    }
    return tdpass.train(digits_net(classes=2), digits(), method, **options)


def right(model: nn.Module) -> float:
    return 100 * float((model(digits().inputs).argmax(1) == digits().targets).float().mean())


def test_every_setting_learns_and_is_scored(artifact: tdpass.Artifact) -> None:
    scores = {name: value for name, value in artifact.report.checks.items() if name.startswith("score_width")}
    assert set(scores) == {
        f"score_width_{width}_rank_{rank}" for width in ("0.25", "1") for rank in ("0.5", "1")
    }
    assert min(scores.values()) > 75
    counts = [
        artifact.report.checks[f"macs_width_{width}_rank_{rank}"]
        for width in ("0.25", "1")
        for rank in ("0.5", "1")
    ]
    assert counts == sorted(set(counts))


def test_statistics_are_those_of_each_setting(artifact: tdpass.Artifact) -> None:
    model = copy.deepcopy(artifact.model).eval()
    assert isinstance(model, nn.Module)
    for width, rank in ((0.25, 0.5), (1.0, 1.0)):
        plain = tdpass.ordinary(model, width, rank)
        read = plain.stem[0](digits().inputs)
        torch.testing.assert_close(plain.stem[1].running_mean, read.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_one_file_holds_all_settings(artifact: tdpass.Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "model.safetensors")
    loaded, x = tdpass.load(tmp_path / "model.safetensors", digits_net(classes=2)).eval(), digits().inputs
    for width in (0.25, 1.0):
        for rank in (0.5, 1.0):
            for model in (loaded, artifact.model):
                tdpass.set_width(model, width)
                tdpass.set_rank(model, rank)
            assert torch.equal(loaded(x), artifact.model(x))
    other = digits_net(classes=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanError, match="the class it was made from"):
        tdpass.load(tmp_path / "model.safetensors", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert not any(isinstance(module, Adaptive) for module in other.modules())
    (tmp_path / "model.safetensors").write_bytes(
        (tmp_path / "model.safetensors").read_bytes()[:-8] + b"damaged!"
    )
    with pytest.raises(InvalidModelError):
        tdpass.load(tmp_path / "model.safetensors", digits_net(classes=2))


def test_a_width_is_exported_like_any_model(artifact: tdpass.Artifact, tmp_path: Path) -> None:
    x = digits().inputs
    for width in (0.25, 1.0):
        plain = tdpass.ordinary(artifact.model, width).eval()
        torch.onnx.export(plain, (x,), tmp_path / f"{width}.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / f"{width}.onnx")
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(answer), plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ranks", [[1.0], [0.5, 1.0]], ids=["dense", "factored"])
def test_every_setting_is_stored_in_8_or_16_bits_like_any_model(ranks: list[float]) -> None:
    model, _, x = adaptive("digits", widths=[0.5, 1.0], ranks=ranks)
    for width, rank in itertools.product((0.5, 1.0), ranks):
        plain = tdpass.ordinary(model, width, rank).eval()
        for numbers, share, apart in (("int8", 0.35, 0.05), ("int16", 0.55, 1e-3), ("float16", 0.55, 0.01)):
            stored = tdpass.compress(plain, pipeline=f"quantize{{numbers={numbers}}}", example_inputs=x)
            assert stored.report.final.bytes < share * stored.report.original.bytes
            assert len(stored.plan.choices) == 6
            assert (stored.model.eval()(x) - plain(x)).norm() < apart * plain(x).norm()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(), (8,)], ids=["floats", "int8"])
def test_one_onnx_file_holds_all_settings_and_an_input_selects(bits: tuple[int, ...], tmp_path: Path) -> None:
    model, _, x = adaptive("digits", widths=[0.5, 1.0], ranks=[0.5, 1.0])
    for norm in model.modules():
        if isinstance(norm, AdaptiveNorm):  # statistics of its own for each setting
            for place in range(4):
                nn.init.normal_(norm.get_buffer(f"mean{place}"), std=0.1)
    if bits:
        hold_bits(model, bits)
    tdpass.deploy(model, x, tmp_path / "all.onnx", dynamic_batch=True)
    tdpass.deploy(tdpass.ordinary(model, 1.0), x, tmp_path / "whole.onnx", dynamic_batch=True)
    found = onnx.load(tmp_path / "all.onnx")
    (settings,) = (json.loads(entry.value) for entry in found.metadata_props)
    assert settings == [{"width": width, "rank": rank} for width in (0.5, 1.0) for rank in (0.5, 1.0)]
    size, whole = weights_in(found.graph), weights_in(onnx.load(tmp_path / "whole.onnx").graph)
    assert size < 1.15 * whole
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx")
    assert [each.name for each in session.get_inputs()][-1] == "setting"
    images, first = torch.cat([x, x]), session.get_inputs()[0].name
    for number, setting in enumerate([*settings, settings[-1]]):
        (answer,) = session.run(None, {first: images.numpy(), "setting": np.array(number)})
        wanted = tdpass.ordinary(model, setting["width"], setting["rank"])(images)
        torch.testing.assert_close(torch.from_numpy(answer), wanted, rtol=1e-3, atol=1e-4)


def weights_in(graph: onnx.GraphProto) -> int:
    """Bytes of all weights of a graph and of those in it."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return sum(len(tensor.SerializeToString()) for tensor in graph.initializer) + sum(map(weights_in, inner))


BITS = (4, 8, 16)


def in_bits() -> tuple[nn.Module, Tensor, dict[tuple[float, float], Tensor]]:
    """A network of two widths, two shares of the rank and three numbers of bits.

    With it what each width and share answers without bits.
    """
    model, _, x = adaptive("digits", widths=[0.5, 1.0], ranks=[0.5, 1.0])
    exact = {
        (width, rank): tdpass.ordinary(model, width, rank)(x) for width in (0.5, 1.0) for rank in (0.5, 1.0)
    }
    hold_bits(model, BITS)
    return model, x, exact


@torch.no_grad()
def test_bits_are_a_setting_beside_width_and_rank() -> None:
    model, x, exact = in_bits()
    held = {name: value.data_ptr() for name, value in model.state_dict().items()}
    for (width, rank), wanted in exact.items():
        tdpass.set_width(model, width)
        tdpass.set_rank(model, rank)
        apart = []
        for bits, numbers in zip(BITS, ("int4", "int8", "int16"), strict=True):
            tdpass.set_bits(model, bits)
            plain = tdpass.ordinary(model, width, rank, bits)
            torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
            forms = {str(each.form) for each in plain.modules() if isinstance(each, Factorized)}
            assert {form.rpartition(" ")[2] for form in forms} == {numbers}
            apart.append(float((model(x) - wanted).norm() / wanted.norm()))
        assert apart[2] < 1e-3 < apart[0]
        assert apart[2] < apart[1] < apart[0]
        assert apart[1] < 0.05
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == held


def test_one_file_of_half_the_bytes_holds_every_width_rank_and_bits(tmp_path: Path) -> None:
    method = {"channel-adaptive": {"widths": [0.5, 1.0], "ranks": [0.5, 1.0], "bits": BITS, "rounds": 1}}
    x = digits().inputs[:8]
    artifact = tdpass.train(
        digits_net(classes=2),
        digits(),
        method,
        settings={"lr": 0.01},
        example_inputs=x,
        control=False,
        test=right,
    )
    scores = {name for name in artifact.report.checks if name.startswith("score_width_1_rank_1")}
    assert scores == {f"score_width_1_rank_1{bits}" for bits in ("", "_bits_4", "_bits_8")}
    size = sum(
        parameter.nbytes
        for parameter in adaptive("digits", widths=[0.5, 1.0], ranks=[0.5, 1.0])[0].parameters()
    )
    assert artifact.report.final.bytes < 0.55 * size
    assert 0.9 * size < 4 * artifact.report.final.params < 1.1 * size
    artifact.save(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * size
    loaded, model = tdpass.load(tmp_path / "model.safetensors", digits_net(classes=2)).eval(), artifact.model
    for width, rank, bits in itertools.product((0.5, 1.0), (0.5, 1.0), BITS):
        for each in (loaded, model):
            tdpass.set_width(each, width)
            tdpass.set_rank(each, rank)
            tdpass.set_bits(each, bits)
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("most", [8, 16])
def test_upper_bits_are_the_nearest_of_fewer_bits(most: int) -> None:
    factor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.0], [1e-3], [1.0], [5.0], [1e3]]
    )
    codes = Codes.of(factor, most, 4)
    for bits in range(4, most + 1):
        upper = codes.upper(bits)
        assert int(upper.values.abs().max()) <= 2 ** (bits - 1) - 1
        step = upper.scale[:, None]
        assert bool(
            ((upper.floats(torch.float64) - factor).abs() <= (0.5 + 2.0 ** (bits - most)) * step).all()
        )
        part = codes.narrow(0, 1, 3).narrow(1, 2, 4).upper(bits)
        assert torch.equal(part.floats(torch.float32), upper.floats(torch.float32)[1:4, 2:6])


def test_a_controller_chooses_bits_too() -> None:
    model, x, _ = in_bits()
    controller = Controller(model, x[:1], "pim:sot_mram")
    joules = {(each.width, each.rank, each.bits): each.cost.get("joules") for each in controller.settings}
    assert len(joules) == 12
    assert joules[1.0, 1.0, 4] < 0.6 * joules[1.0, 1.0, 8] < 0.6 * joules[1.0, 1.0, 16]
    chosen = controller.choose({"joules": 1.01 * joules[1.0, 1.0, 8] / joules[1.0, 1.0, 16]})
    assert (chosen.width, chosen.rank, chosen.bits) == (1.0, 1.0, 8)
    assert dial_of(model).bits == 8


def test_a_controller_turns_to_the_best_setting_within_a_budget(artifact: tdpass.Artifact) -> None:
    controller = Controller(artifact.model, digits().inputs[:1], "pim:sot_mram")
    joules = [setting.cost.get("joules") for setting in controller.settings]
    assert joules == sorted(joules)
    assert controller.choose({"joules": 1.0}).width == 1.0
    assert dial_of(artifact.model).place == 3
    least = controller.choose({"joules": 1.01 * joules[0] / joules[-1]})
    assert (least.width, least.rank) == (0.25, 0.5)
    assert dial_of(artifact.model).place == 0
    with pytest.raises(BudgetError, match=r"0\.25 at rank 0\.5"):
        controller.choose({"joules": 0.5 * joules[0] / joules[-1]})
    assert dial_of(artifact.model).place == 0
    scored = Controller(artifact.model, digits().inputs[:1], "pim:sot_mram", score=right)
    best = max(setting.score for setting in scored.settings if setting.score is not None)
    assert scored.choose({"joules": 1.0}).score == best


def test_what_cannot_be_is_said() -> None:
    for options in (
        {"widths": [0.5]},
        {"widths": []},
        {"widths": [1.0]},
        {"widths": [0.5, 0.5, 1.0]},
        {"ranks": [2.0, 1.0]},
        {"distill": 2.0},
        {"bits": [1, 8]},
        {"bits": [8, 8]},
        {"bits": [32]},
    ):
        with pytest.raises(UsageError, match=r"give|fit"):
            ChannelAdaptive(**options)
    with pytest.raises(UsageError, match="no layer can have fewer"):
        ChannelAdaptive().prepare(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4))
    model, x = network("joined")
    with pytest.raises(UsageError, match="example_inputs"):
        ChannelAdaptive().prepare(model)
    with pytest.raises(UsageError, match="one width"):
        tdpass.set_width(model, 0.5)
    wide = ChannelAdaptive().prepare(model, x)
    with pytest.raises(UsageError, match=r"0\.3.*0\.25, 0\.5, 0\.75, 1\.0"):
        tdpass.set_width(wide, 0.3)
    with pytest.raises(UsageError, match="share of the rank"):
        tdpass.set_rank(wide, 0.3)
    with pytest.raises(UsageError, match="number of bits of this model; it has: none"):
        tdpass.set_bits(wide, 8)
