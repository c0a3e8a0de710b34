"""The main job end to end, on both front ends."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx_nets import to_onnx
from selection import mostly_slow
from torch import Tensor, nn

import tdpass
from tdpass.errors import BudgetError, PlanError, UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.base import offered_formats


def _outputs(artifact: tdpass.Artifact, x: Tensor) -> Tensor:
    (output,) = tdpass.Divergence().outputs(artifact.opened.run(tdpass.Batch((x,)))).values()
    return output


MODELS = [("residual", "images", 0.5), ("odd", "images", 0.8), ("encoder", "tokens", 0.5)]


@pytest.mark.parametrize("with_data", [True, False], ids=["data", "weights"])
@pytest.mark.parametrize(("name", "inputs", "share"), mostly_slow(MODELS, MODELS[1:2]))
def test_one_plan_gives_the_same_network_on_torch_and_onnx(
    name: str, inputs: str, share: float, with_data: bool, request: pytest.FixtureRequest
) -> None:
    module, x = request.getfixturevalue(name), request.getfixturevalue(inputs)
    data = x if with_data else None
    torch_side = tdpass.compress(module, {"macs": share}, data, example_inputs=x)
    assert any(not choice.kept_dense for choice in torch_side.plan)
    onnx_side = tdpass.compress(
        to_onnx(module, x),
        plan=tdpass.RankPlan.from_json(torch_side.plan.to_json()),
        data=data,
        example_inputs=x,
    )
    ours, theirs = _outputs(torch_side, x), _outputs(onnx_side, x)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-4
    assert [(c.format, c.rank) for c in onnx_side.plan if not c.kept_dense] == [
        (c.format, c.rank) for c in torch_side.plan if not c.kept_dense
    ]


@pytest.mark.parametrize(("name", "inputs", "share"), mostly_slow(MODELS, MODELS[:1]))
def test_a_plan_made_on_onnx_applies_to_torch(
    name: str, inputs: str, share: float, request: pytest.FixtureRequest
) -> None:
    module, x = request.getfixturevalue(name), request.getfixturevalue(inputs)
    onnx_side = tdpass.compress(to_onnx(module, x), {"macs": share}, x)
    torch_side = tdpass.compress(module, plan=onnx_side.plan, data=x)
    ours, theirs = _outputs(torch_side, x), _outputs(onnx_side, x)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-4


@pytest.mark.parametrize("name", mostly_slow(offered_formats(), ["svd", "tucker2", "tensor_train"]))
def test_every_format_gives_the_same_network_on_torch_and_onnx(
    name: str, residual: nn.Module, images: Tensor
) -> None:
    try:
        torch_side = tdpass.compress(residual, {"macs": 0.7}, images, formats=[name])
    except BudgetError:
        pytest.skip(f"{name} alone cannot reach the budget")
    onnx_side = tdpass.compress(to_onnx(residual, images), plan=torch_side.plan, data=images)
    ours, theirs = _outputs(torch_side, images), _outputs(onnx_side, images)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-4


@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
@pytest.mark.parametrize("share", [0.8, 0.4])
def test_the_budget_is_met_and_nothing_is_made_bigger(
    measure: str, share: float, residual: nn.Module, images: Tensor
) -> None:
    artifact = tdpass.compress(residual, {measure: share}, images)
    assert artifact.plan.planned.get(measure) <= share * artifact.report.original.get(measure)
    for choice in artifact.plan:
        assert choice.cost.params <= choice.dense.params
        assert choice.cost.macs <= choice.dense.macs
        assert choice.reason
    assert artifact.report.checks["samples"] == 48
    assert artifact.report.final.macs == artifact.plan.planned.macs


def test_the_original_is_left_untouched(residual: nn.Module, images: Tensor) -> None:
    before = {name: value.clone() for name, value in residual.state_dict().items()}
    tdpass.compress(residual, {"macs": 0.5}, images)
    assert all(torch.equal(value, before[name]) for name, value in residual.state_dict().items())


def test_what_goes_in_comes_out(residual: nn.Module, images: Tensor, tmp_path: Path) -> None:
    gs = pytest.importorskip("onnx_graphsurgeon")
    proto = to_onnx(residual, images)
    onnx.save(proto, tmp_path / "model.onnx")
    kinds = {
        onnx.ModelProto: proto,
        onnx_ir.Model: onnx_ir.from_proto(proto),
        gs.Graph: gs.import_onnx(proto),
        nn.Module: residual,
        torch.fx.GraphModule: torch.fx.symbolic_trace(residual),
    }
    for kind, model in kinds.items():
        assert isinstance(tdpass.compress(model, {"params": 0.7}).model, kind)
    assert isinstance(tdpass.compress(str(tmp_path / "model.onnx"), {"params": 0.7}).model, onnx_ir.Model)


def test_include_and_exclude(residual: nn.Module, images: Tensor) -> None:
    artifact = tdpass.compress(residual, {"macs": 0.8}, images, exclude=["stem", "hea?"])
    assert {choice.site for choice in artifact.plan} == {"first", "second"}
    assert artifact.report.declined["stem"] == "excluded by name"
    with pytest.raises(UsageError, match="no site is left"):
        tdpass.compress(residual, {"macs": 0.8}, images, include=["nothing*"])
    with pytest.raises(UsageError, match="0: mode='max' is no sum of rows"):
        tdpass.compress(nn.Sequential(nn.EmbeddingBag(30, 20, mode="max")), {"params": 0.8})


def test_a_single_budget_bounds_what_can_be_counted(residual: nn.Module, images: Tensor) -> None:
    assert tdpass.make_plan(residual, 0.5, images).report.budget == "macs=0.5"
    assert tdpass.make_plan(residual, "40%").report.budget == "params=0.4"


def test_max_error_alone_and_with_a_budget(residual: nn.Module, images: Tensor) -> None:
    artifact = tdpass.compress(residual, {"max_error": 0.05}, images)
    assert all(choice.error <= 0.05 for choice in artifact.plan)
    assert artifact.plan.planned.macs < artifact.plan.original.macs
    with pytest.raises(BudgetError, match="smallest reachable plan"):
        tdpass.compress(residual, {"macs": 0.05, "max_error": 0.01}, images)


def test_an_impossible_budget_names_the_smallest_reachable_one(residual: nn.Module, images: Tensor) -> None:
    with pytest.raises(BudgetError, match=r"below the smallest reachable plan \(([\d,]+)") as caught:
        tdpass.compress(residual, {"params": "20B"}, images)
    least = int(str(caught.value).split("plan (")[1].split(",  ")[0].split(", of")[0].replace(",", ""))
    assert tdpass.compress(residual, {"params": f"{least}B"}, images).plan.planned.params <= least


def test_a_budget_on_macs_needs_to_see_the_model(residual: nn.Module, images: Tensor) -> None:
    with pytest.raises(BudgetError, match="example_inputs"):
        tdpass.compress(residual, {"macs": 0.5})
    assert tdpass.compress(residual, {"macs": 0.5}, example_inputs=images).plan.planned.macs > 0


def test_a_second_budget_comes_from_the_cache(residual: nn.Module, images: Tensor, tmp_path: Path) -> None:
    said: list[str] = []
    tdpass.make_plan(residual, {"macs": 0.6}, images, cache=tmp_path)
    second = tdpass.make_plan(
        residual, {"macs": 0.5}, images, cache=tmp_path, progress=lambda what, done, of: said.append(what)
    )
    assert set(said) <= {"recording runs of the model"}, "everything but the knapsack is known"
    fresh = tdpass.make_plan(residual, {"macs": 0.5}, images, cache=False)
    assert [(c.format, c.rank) for c in second.plan] == [(c.format, c.rank) for c in fresh.plan]


def test_plans_that_do_not_fit_are_refused(
    residual: nn.Module, encoder: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    plan = tdpass.make_plan(residual, {"macs": 0.5}, images).plan
    with pytest.raises(PlanError, match="which this model does not have"):
        tdpass.compress(encoder, plan=plan)
    (tmp_path / "bad.json").write_text('{"version": 1, "choices": [{"site": "x", "rank": [-1]}]}')
    for name in ("bad.json", "missing.json"):
        with pytest.raises(PlanError):
            tdpass.compress(residual, plan=tmp_path / name)
    with pytest.raises(PlanError, match="no plan"):
        tdpass.compress(residual, data=images, pipeline="factorize")


def test_a_fit_goes_on_from_factors_that_fit_the_plan(residual: nn.Module, images: Tensor) -> None:
    planned = tdpass.make_plan(residual, {"params": 0.5}, images, formats=["cp"]).plan
    once = tdpass.compress(residual, data=images, plan=planned, pipeline="factorize")
    start = {
        name: dict(layer.factors)
        for name in (c.site for c in planned if not c.kept_dense)
        if (layer := once.opened.layer(name)) is not None
    }
    assert start
    again = tdpass.compress(residual, data=images, plan=planned, start=start, pipeline="factorize")
    before, after = (
        tdpass.verify(residual, artifact.model, images)["divergence"] for artifact in (once, again)
    )
    assert after <= 1.05 * before
    site = next(iter(start))
    with pytest.raises(PlanError, match=f"start has factors .* for site '{site}', the plan has"):
        tdpass.compress(residual, data=images, plan=planned, start={site: {"a": torch.zeros(3)}})
    with pytest.raises(PlanError, match=r"start has factors .* for site 'nowhere', the plan has none"):
        tdpass.compress(residual, data=images, plan=planned, start={"nowhere": start[site]})


def test_damage_in_a_plan_file_is_found(residual: nn.Module, images: Tensor) -> None:
    plan = tdpass.make_plan(residual, {"macs": 0.5}, images).plan
    changed = next(choice for choice in plan if not choice.kept_dense)
    broken = tdpass.RankPlan.from_json(plan.to_json().replace(f'"{changed.format}"', '"nonsense"'))
    with pytest.raises(UsageError, match="unknown format 'nonsense'"):
        tdpass.compress(residual, plan=broken, data=images)


def test_everything_is_written_to_a_folder(residual: nn.Module, images: Tensor, tmp_path: Path) -> None:
    artifact = tdpass.compress(residual, {"macs": 0.5}, images)
    paths = artifact.save_all(tmp_path / "out")
    assert [path.name for path in paths] == ["model.safetensors", "plan.json", "report.json", "report.html"]
    assert tdpass.RankPlan.load(paths[1]) == artifact.plan
    assert tdpass.Report.load(paths[2]) == artifact.report
    assert not list((tmp_path / "out").glob("*.part"))


def test_verify_compares_any_two_models(residual: nn.Module, images: Tensor) -> None:
    checks = tdpass.verify(residual, to_onnx(residual, images), images)
    assert checks["relative_difference"] < 1e-5
    assert checks["same_class"] == 1
    assert np.isfinite(list(checks.values())).all()


def test_pruned_pairs_and_dropped_branches_are_carried_out_on_both_sides(
    residual: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    artifact = tdpass.make_plan(residual, {"macs": 0.9}, images)
    joint = tdpass.compress(residual, {"macs": 0.35}, images, pipeline="fold-batchnorm,plan,factorize")
    assert joint.plan.planned.macs <= 0.35 * joint.plan.original.macs
    for format_name, ranks, channels in (
        ("pruned", ((6, 12), (12, 6)), (0, 2, 3, 5, 7, 11)),
        ("constant", ((), ()), ()),
    ):
        plan = _with(artifact.plan, format_name, ranks, channels)
        torch_side = tdpass.compress(residual, plan=plan, data=images)
        onnx_side = tdpass.compress(to_onnx(residual, images), plan=plan, data=images)
        ours, theirs = _outputs(torch_side, images), _outputs(onnx_side, images)
        assert float((ours - theirs).norm() / ours.norm()) < 1e-4
        assert torch_side.report.final.params < torch_side.report.original.params
        torch_side.save(tmp_path / "small.safetensors")
        loaded = tdpass.load(tmp_path / "small.safetensors", type(residual)().eval())
        with torch.no_grad():
            assert torch.equal(loaded(images), ours)


def _with(
    plan: tdpass.RankPlan,
    format_name: str,
    ranks: tuple[tuple[int, ...], tuple[int, ...]],
    channels: tuple[int, ...],
) -> tdpass.RankPlan:
    from dataclasses import replace

    both = dict(zip(("first", "second"), ranks, strict=True))
    choices = tuple(
        replace(choice, form=Form(format_name, both[choice.site]), channels=channels)
        if choice.site in both
        else replace(choice, form=DENSE)
        for choice in plan
    )
    return replace(plan, choices=choices)


def test_a_hugging_face_encoder(tokens: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
    }
    module = transformers.BertModel(transformers.BertConfig(max_position_embeddings=16, **sizes)).eval()
    data = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    artifact = tdpass.compress(module, {"params": 0.8}, data, formats=["svd"])
    assert sum(not choice.kept_dense for choice in artifact.plan) > 3
    tables = {choice.site for choice in artifact.plan if "embeddings." in choice.site}
    assert "embeddings.word_embeddings" in tables
    assert isinstance(artifact.model, transformers.BertModel)
    before = module(**data).last_hidden_state
    after = artifact.model(**data).last_hidden_state
    assert float((before - after).detach().norm() / before.detach().norm()) < 0.5


def test_the_torch_result_exports_to_the_same_onnx(residual: nn.Module, images: Tensor) -> None:
    artifact = tdpass.compress(residual, {"macs": 0.5}, images)
    assert isinstance(artifact.model, nn.Module)
    checks = tdpass.verify(artifact.model, to_onnx(artifact.model, images), images)
    assert checks["relative_difference"] < 1e-5


def test_a_model_with_a_fixed_batch_size_is_calibrated_at_that_size(
    residual: nn.Module, images: Tensor
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(residual, (images[:4],), dynamo=True, verbose=False)
    assert program is not None
    artifact = tdpass.compress(program.model_proto, {"macs": 0.6}, images, formats=["channel_svd", "svd"])
    assert artifact.report.checks["samples"] == 48
    with pytest.raises(UsageError, match="exactly 4 samples"):
        tdpass.compress(program.model_proto, {"macs": 0.6}, images[:3])


def test_the_import_leaves_out_what_takes_seconds() -> None:
    heavy = ("torch._dynamo", "torch._inductor", "transformers", "onnxscript", "openvino", "rich.markdown")
    found = f"[name for name in {heavy!r} if name in sys.modules]"
    program = f"import sys, tdpass; sys.exit(' '.join({found}) or None)"
    call = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (call.returncode, call.stderr) == (0, "")
