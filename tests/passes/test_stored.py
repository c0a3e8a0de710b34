"""quantize and sparsify: on both front ends, alone and after factorize, to the byte.

They are nearer than rounding one by one.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn

import tdpass
from tdpass.cost import Cost
from tdpass.errors import TdpassError
from tdpass.form import DENSE
from tdpass.formats.layer import cost_of
from tdpass.models import open_model

FACTORED = "plan{macs=0.5,joint=false},factorize,"
FORMATS_TRIED = ("svd", "channel_svd", "spatial_svd", "tucker2")
PRUNED = "sparsify{rounding=nearest}"
STEPS = [
    "quantize", "quantize{numbers=int4}", "sparsify{support=unstructured/50%}",
    "sparsify{support=columns/75%},quantize{numbers=int4}",
]  # fmt: skip


@pytest.fixture(scope="module")
def exported() -> dict[str, onnx.ModelProto]:
    """The network, exported once."""
    return {}


def models(residual: nn.Module, images: Tensor, exported: dict[str, onnx.ModelProto]) -> list[object]:
    if not exported:
        exported["residual"] = to_onnx(residual, images[:2])
    return [residual, exported["residual"]]


def made(model: object, images: Tensor | None, pipeline: str) -> tdpass.Artifact:
    return tdpass.compress(
        model,
        None,
        images,
        pipeline=f"fold-batchnorm,{pipeline}",
        cache=False,
        effort="fast",
        formats=FORMATS_TRIED,
    )


@pytest.mark.parametrize("before", ["", FACTORED])
@pytest.mark.parametrize("step", STEPS)
def test_bytes_answers_and_plan_agree_on_both_front_ends(
    step: str, before: str, residual: nn.Module, images: Tensor, exported: dict[str, onnx.ModelProto]
) -> None:
    found = [made(model, images, before + step) for model in models(residual, images, exported)]
    for artifact in found:
        result = open_model(artifact.model)
        assert artifact.report.final.bytes == artifact.plan.planned.bytes == result.bytes()
        assert artifact.report.final.params == artifact.plan.planned.params == result.params()
        assert artifact.report.final.bytes < 0.75 * artifact.report.original.bytes
        assert all(choice.form.encoded or choice.site in artifact.report.declined for choice in artifact.plan)
    assert found[0].report.final.bytes == found[1].report.final.bytes
    assert [choice.form for choice in found[0].plan] == [choice.form for choice in found[1].plan]
    plain = made(
        residual,
        images,
        before + step.replace("}", ",rounding=nearest}")
        if "{" in step
        else f"{before}{step}{{rounding=nearest}}",
    )
    apart = [tdpass.verify(residual, each.model, images)["divergence"] for each in (found[0], plain)]
    assert apart[0] < 0.8 * apart[1]


def test_they_leave_what_is_stored_so_already_and_what_is_excluded(
    residual: nn.Module, images: Tensor
) -> None:
    once, twice = (
        made(residual, images, pipeline) for pipeline in ("quantize", "quantize,quantize{numbers=int4}")
    )
    assert [choice.form for choice in once.plan] == [choice.form for choice in twice.plan]
    assert twice.report.passes[-1].notes == ("no site changes",)
    names = [choice.site for choice in once.plan]
    part = tdpass.compress(residual, None, images, pipeline="quantize", cache=False, exclude=[names[0]])
    assert part.plan.get(names[0]).form == DENSE
    assert all(choice.form.numbers for choice in part.plan if choice.site != names[0])


def test_what_a_form_does_not_divide_is_declined_with_the_reason(residual: nn.Module) -> None:
    artifact = made(residual, None, "quantize{numbers=int4/64}")
    sites = {site.name: site for site in open_model(residual).sites()}
    divided = [name for name, site in sites.items() if site.weights // site.o % 64 == 0]
    assert sorted(choice.site for choice in artifact.plan if choice.form.numbers) == sorted(divided)
    assert all("does not divide" in artifact.report.declined[name] for name in sites if name not in divided)


def test_half_precision_stays_half() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).half().eval()
    artifact = made(model, None, "sparsify{support=2:4}")
    assert [str(choice.form) for choice in artifact.plan] == ["dense float16 2:4"] * 2
    expected = sum(
        (
            cost_of(site, choice.form)
            for site, choice in zip(open_model(model).sites(), artifact.plan, strict=True)
        ),
        Cost(),
    )
    assert artifact.report.final.bytes == expected.bytes + 2 * (24 + 8)
    assert int(artifact.model[0].weight.count_nonzero()) == 16 * 24 // 2


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("quantize{numbers=int9}", "unknown number type 'int9'"),
        ("sparsify{support=half}", "support 'half' is not understood"),
        ("sparsify{support=4:2}", "keeps everything"),
        ("quantize{rounding=best}", "option rounding='best' of pass 'quantize' must be of type"),
    ],
)
def test_wrong_options_are_one_clear_error(step: str, message: str, residual: nn.Module) -> None:
    with pytest.raises(TdpassError, match=message):
        made(residual, None, step)


@pytest.mark.parametrize(("sparsity", "changed"), [("0.4", {"0", "2"}), ("0.9", set()), ("never", set())])
def test_a_sparse_layer_is_made_only_above_its_break_even(
    sparsity: str, changed: set[str], tmp_path: Path
) -> None:
    (tmp_path / "machine.yaml").write_text(f"- {{kind: linear, sparsity: {sparsity}}}\n")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    step = f"sparsify{{support=unstructured/50%,break_even=table:{tmp_path / 'machine.yaml'}}}"
    artifact = tdpass.compress(module, None, torch.randn(32, 16), pipeline=step, cache=False)
    assert {choice.site for choice in artifact.plan if choice.form.support} == changed
    words = "with no share of zeros" if sparsity == "never" else "from 90% zeros on"
    declined = [why for why in artifact.report.declined.values() if words in why]
    assert len(declined) == 2 - len(changed)


def test_rows_and_columns_break_even_at_once(tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_text("- {kind: linear, sparsity: never}\n")
    module = nn.Sequential(nn.Linear(16, 24)).eval()
    step = f"sparsify{{support=rows/50%,break_even=table:{tmp_path / 'machine.yaml'}}}"
    artifact = tdpass.compress(module, None, torch.randn(32, 16), pipeline=step, cache=False)
    assert [str(choice.form) for choice in artifact.plan] == ["dense rows/50%"]


@pytest.mark.parametrize("step", ["quantize{numbers=int8}", "quantize{numbers=int4}"])
@pytest.mark.parametrize("copies", [1, 32])
def test_a_single_sample_is_told_from_inputs_that_vary(copies: int, step: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    many = torch.randn(256, 24, generator=torch.Generator().manual_seed(1))
    made_of = (None, many[:1].repeat(copies, 1))
    alone, with_one = (
        float((made(net, data, step).model(many) - net(many)).detach().norm()) for data in made_of
    )
    assert with_one < 4 * alone  # a bias that makes up for one sample is off for others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pruned_weights_of_any_model_can_be_quantized(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False)).to(dtype).eval()
    x = torch.randn(32, 32).to(dtype)
    both, pruned = (
        tdpass.compress(net, data=x, pipeline=steps, progress=False, strict=False)
        for steps in (f"{PRUNED},quantize{{numbers=int8,rounding=nearest}}", PRUNED)
    )
    assert [str(choice.form) for choice in both.plan] == ["dense int8 2:4"] * 2
    assert both.report.final.bytes < 0.75 * pruned.report.final.bytes
    assert both.model(x).dtype == dtype
    gap = (both.model(x).double() - pruned.model(x).double()).norm() / pruned.model(x).double().norm()
    assert gap < 0.05
