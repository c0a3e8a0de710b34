"""Targets: how they are named, and what they promise of the times they give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tdpass.clock import on_cpu
from tdpass.errors import UsageError
from tdpass.form import DENSE, Form
from tdpass.models import Batch, open_model
from tdpass.site import Site
from tdpass.targets import Setting, Target, open_target
from tdpass.targets.measured import MeasuredTarget

SITE = Site(
    "conv", "conv", (16, 16, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), True, extents=(((8, 8), (8, 8)),)
)
FORMS = [DENSE, Form("tucker2", (8, 8)), Form("spatial_svd", (8,))]


def cpu(folder: Path | None = None, text: str = "cpu", frontend: str = "torch") -> MeasuredTarget:
    target = open_target(text, frontend, folder)
    assert isinstance(target, MeasuredTarget)
    return target


@pytest.mark.parametrize(
    ("text", "frontend", "runtimes"),
    [
        ("cpu", "torch", {"eager"}),
        ("cpu", "torch.export", {"eager"}),
        ("cpu:torch", "torch", {"eager"}),
        ("cpu", "onnx", {"onnxruntime"}),
        ("cpu:onnxruntime", "onnx", {"onnxruntime"}),
        ("cpu:inductor", "torch", {"inductor"}),
    ],
)
def test_a_text_names_the_runtimes(text: str, frontend: str, runtimes: set[str]) -> None:
    assert runtimes <= {runtime.name for runtime in cpu(None, text, frontend).runtimes}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu", "known: cpu, crossbar, cuda, pim, systolic"),
        ("cpu:nonsense", "known: eager, inductor"),
        ("cpu:cuda_eager", "known: eager, inductor"),
        ("cpu:", "after the colon"),
        ("", "known: cpu, crossbar, cuda, pim, systolic"),
        (3, "not a text"),
    ],
)
def test_an_unknown_target_lists_the_known_ones(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        open_target(text, "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error() -> None:
    with pytest.raises(UsageError, match="needs a CUDA device"):
        open_target("cuda", "torch")


def test_a_runtime_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="'openvino' is not installed"):
        open_target("cpu:openvino", "onnx")


@pytest.mark.parametrize(("text", "frontend"), [("cpu", "torch"), ("cpu", "onnx")])
@pytest.mark.parametrize("threads", [1, 2])
def test_times_are_positive_and_name_their_kernel(text: str, frontend: str, threads: int) -> None:
    target = cpu(None, text, frontend)
    timings = target.time(SITE, FORMS, Setting(2, threads))
    assert all(0 < timing.seconds < 1 for timing in timings)
    assert {timing.kernel for timing in timings} <= {runtime.name for runtime in target.runtimes}
    assert target.seconds(SITE, DENSE, 2, threads) == timings[0].seconds
    assert torch.get_num_threads() == 1


def test_what_is_known_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cpu(tmp_path).time(SITE, FORMS[1:], Setting())
    second = cpu(tmp_path)
    monkeypatch.setattr(MeasuredTarget, "_measure", lambda *_: pytest.fail("measured again"))
    assert second.time(replace(SITE, name="another"), FORMS[1:], Setting()) == first


def test_calls_of_a_site_add_up(tmp_path: Path) -> None:
    target = cpu(tmp_path)
    small = ((4, 4), (4, 4))
    alone = [target.seconds(replace(SITE, extents=(extent,)), DENSE) for extent in (SITE.extents[0], small)]
    assert target.seconds(replace(SITE, extents=(*SITE.extents, small, small)), DENSE) == pytest.approx(
        alone[0] + 2 * alone[1]
    )


class Scripted(MeasuredTarget):
    """A clock that goes by a script: each call of `clock` runs at its own speed."""

    name = "scripted"
    device = "a script"

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> Target:
        raise NotImplementedError

    def clock(self, calls, threads, rounds):
        self.slowness = getattr(self, "slowness", 0.5) * 2
        return [self.slowness * (n + 1) for n in range(len(calls))]


def test_later_times_are_put_on_the_scale_of_the_first() -> None:
    target = Scripted(cpu().runtimes[:1], None)
    assert [timing.seconds for timing in target.time(SITE, FORMS[1:2], Setting())] == [2.0]
    assert [timing.seconds for timing in target.time(SITE, [DENSE, FORMS[2]], Setting())] == [1.0, 2.0]
    assert [timing.seconds for timing in target.time(SITE, FORMS[1:], Setting(), careful=True)] == [2.0, 3.0]


def test_whole_models_are_timed_on_the_scale_of_a_layer(residual: nn.Module, images: Tensor) -> None:
    target = Scripted(cpu().runtimes[:1], None)
    target.time(SITE, [DENSE], Setting())
    model = open_model(residual)
    assert target.time_models([model, model], Batch((images[:1],)), Setting(), SITE) == pytest.approx(
        [1 / 3, 2 / 3]
    )
    assert target.time_models([model], Batch((images[:1],)), Setting()) == [4.0]


def test_a_layer_that_no_runtime_serves_takes_forever() -> None:
    target = cpu(None, "cpu", "onnx")
    (timing,) = target.time(SITE, [DENSE], Setting(dtype=torch.bfloat16))
    assert timing.seconds == float("inf")
    assert timing.kernel == ""


def test_a_site_that_was_not_seen_cannot_be_timed() -> None:
    with pytest.raises(UsageError, match="not seen running"):
        cpu().time(replace(SITE, extents=()), [DENSE], Setting())


def test_a_torch_model_does_not_run_in_onnxruntime(residual: nn.Module, images: Tensor) -> None:
    with pytest.raises(UsageError, match="does not run in onnxruntime"):
        cpu(None, "cpu:onnxruntime").time_models([open_model(residual)], Batch((images,)), Setting())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_clock_gives_one_time_per_call(threads: int) -> None:
    x = torch.randn(200, 200)
    times = on_cpu([lambda: x + 1, lambda: x @ x], threads, 3)
    assert len(times) == 2
    assert min(times) > 0
