"""slice-residual: transformers with fewer channels, exact at full width, planned, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn
from transformers_small import NETS, WIDTH, Vision, answer, bert, encoder, llama, notes, tied_llama, vision

import tdpass
from tdpass.errors import BudgetError, PlanError, UsageError
from tdpass.layers.sliced_norm import SlicedNorm

QUIET = {"progress": False, "cache": False}


def _sliced(
    net: nn.Module, x: object, options: str = "keep=0.75", **more: object
) -> tdpass.Artifact[nn.Module]:
    pipeline = f"slice-residual{{{options}}},verify"
    return tdpass.compress(net, data=x, pipeline=pipeline, strict=False, **QUIET, **more)


@pytest.mark.parametrize("name", NETS)
def test_at_full_width_the_answer_is_the_same_up_to_rounding(name: str) -> None:
    net, x = NETS[name]()
    artifact = _sliced(net, x, "keep=1.0")
    assert artifact.report.passes[0].changed, notes(artifact)
    assert any(isinstance(part, SlicedNorm) for part in artifact.model.modules())
    assert not any(isinstance(part, nn.LayerNorm | nn.RMSNorm) for part in artifact.model.modules())
    reference = answer(net, x)
    torch.testing.assert_close(
        answer(artifact.model, x), reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()) + 1e-6
    )


@pytest.mark.parametrize("name", NETS)
def test_a_stream_is_as_narrow_as_asked_and_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    net, x = NETS[name]()
    artifact = _sliced(net, x)
    assert {norm.shape.reads for norm in artifact.model.modules() if isinstance(norm, SlicedNorm)} <= {11, 12}
    assert artifact.report.final.params < 0.9 * artifact.report.original.params
    assert artifact.report.final.macs < artifact.report.original.macs
    artifact.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", copy.deepcopy(net))
    assert torch.equal(answer(loaded, x), answer(artifact.model, x))


def test_before_norms_no_layer_is_added() -> None:
    net, x = vision()
    sliced = _sliced(net, x).model
    layers = [part for part in sliced.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    assert len(layers) == len([part for part in net.modules() if isinstance(part, nn.Linear | nn.Conv2d)])


def test_after_norms_an_adapter_leads_to_the_coordinates_of_the_next_sum() -> None:
    net, x = encoder()
    sliced = _sliced(net, x).model
    norms = [part for part in sliced.modules() if isinstance(part, SlicedNorm)]
    assert [norm.shape.writes for norm in norms] == [12, 12, 12, 0]  # the last feeds a linear layer alone


def test_a_table_that_is_tied_to_the_head_stays_tied() -> None:
    net, x = tied_llama()
    sliced = _sliced(net, x).model
    assert sliced.get_input_embeddings().weight is sliced.lm_head.weight  # type: ignore[operator,union-attr]
    assert sliced.lm_head.weight.shape[1] == 12  # type: ignore[union-attr]


def test_directions_that_hold_nothing_are_left_out_without_loss() -> None:
    net, x = vision()
    with torch.no_grad():
        span = torch.linalg.qr(torch.randn(WIDTH, 10))[0]
        span -= span.mean(0)
        onto = span @ torch.linalg.pinv(span)
        for layer in (net.patches, *(part for block in net.blocks for part in (block.proj, block.fc2))):
            layer.weight.copy_((onto @ layer.weight.flatten(1)).reshape(layer.weight.shape))
            layer.bias.copy_(onto @ layer.bias)  # type: ignore[union-attr,operator]
        for constant in (net.token, net.positions):
            constant.copy_(constant @ onto)  # type: ignore[operator,union-attr]
    artifact = _sliced(net, x, "keep=0.625")
    torch.testing.assert_close(answer(artifact.model, x), answer(net, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("measure", ["params", "macs", "bytes"])
def test_a_budget_is_met_with_the_widest_streams_that_do(measure: str) -> None:
    net, x = vision()
    artifact = _sliced(net, x, f"{measure}=0.7")
    share = artifact.report.final.get(measure) / artifact.report.original.get(measure)
    assert 0.7 - 2 / WIDTH < share <= 0.7


def test_a_budget_that_no_width_meets_names_the_smallest() -> None:
    net, x = vision()
    with pytest.raises(BudgetError, match="the smallest that can is"):
        _sliced(net, x, "params=0.01")
    with pytest.raises(UsageError, match="no share"):
        _sliced(net, x, "keep=0.0")


def test_what_is_left_is_planned_and_factored_under_one_budget() -> None:
    net, x = vision()
    pipeline = "slice-residual{keep=0.75},plan,factorize,correct-bias,refit,verify"
    artifact = tdpass.compress(
        net, {"params": 0.6}, x, pipeline=pipeline, formats=["svd"], strict=False, **QUIET
    )  # type: ignore[arg-type]
    assert artifact.report.final.params <= 0.6 * artifact.report.original.params
    assert any(choice.format == "svd" for choice in artifact.plan)
    assert all(
        max(choice.shape) <= 3 * WIDTH and 12 in choice.shape
        for choice in artifact.plan
        if choice.format == "svd"
    )


def test_without_data_and_after_factors_it_says_why_it_does_nothing() -> None:
    net, x = vision()
    without = tdpass.compress(net, pipeline="slice-residual", example_inputs=x, **QUIET)
    assert "no calibration data" in notes(without)
    late = "plan{params=0.8},factorize,slice-residual"
    after = tdpass.compress(net, data=x, pipeline=late, formats=["svd"], strict=False, **QUIET)
    assert "replaced already" in " ".join(after.report.passes[2].notes)


class _Scaled(Vision):
    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) * torch.arange(1.0, WIDTH + 1)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x).mean(1))
        return y


class _Returned(Vision):
    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class _Hardcoded(Vision):
    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).reshape(len(x), WIDTH, 4).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x).mean(1))
        return y


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (_Scaled, "goes through mul"),
        (_Returned, "the model returns it"),
        (_Hardcoded, "does not run in fewer"),
    ],
)
def test_a_stream_that_cannot_turn_is_left_with_the_reason(net: type[Vision], reason: str) -> None:
    made, x = net().eval(), torch.randn(8, 3, 8, 8)
    artifact = _sliced(made, x)
    assert reason in notes(artifact)
    assert torch.equal(answer(artifact.model, x), answer(made, x))


def test_a_file_of_a_sliced_model_fits_no_other_class(tmp_path: Path) -> None:
    net, x = vision()
    _sliced(net, x).save(tmp_path / "small.safetensors")
    other, _ = NETS["encoder"]()
    with pytest.raises(PlanError, match="load it on the class it was made from"):
        tdpass.load(tmp_path / "small.safetensors", other)


def test_states_that_are_returned_come_back_in_the_coordinates_of_the_model() -> None:
    net, x = bert()
    artifact = _sliced(net, x)
    assert answer(artifact.model, x).shape == answer(net, x).shape
    cosine = torch.cosine_similarity(answer(artifact.model, x), answer(net, x), dim=-1)
    assert float(cosine.mean()) > 0.9


def test_norms_spelled_out_in_several_calls_are_found() -> None:
    net, x = llama()
    sliced = _sliced(net, x, "keep=0.5").model
    assert not [part for part in sliced.modules() if type(part).__name__ == "LlamaRMSNorm"]


ON_ONNX = ("encoder", "encoder_norm_first", "llama")


@pytest.mark.parametrize(
    "name", [pytest.param("encoder_norm_first"), *(pytest.param(n, marks=pytest.mark.slow) for n in ON_ONNX)]
)
def test_onnx_models_are_sliced_to_the_same_answers(name: str, tmp_path: Path) -> None:
    net, x = NETS[name]()
    exported = _exported(net, x)
    data = {key: value.numpy() for key, value in x.items()} if isinstance(x, dict) else x
    whole = tdpass.compress(exported, data=data, pipeline="slice-residual{keep=1.0},verify", **QUIET)
    torch.testing.assert_close(_run(whole.model, x), answer(net, x), rtol=1e-4, atol=1e-5)
    small = tdpass.compress(exported, data=data, pipeline="slice-residual{keep=0.75},verify", **QUIET)
    torch.testing.assert_close(_run(small.model, x), answer(_sliced(net, x).model, x), rtol=1e-3, atol=1e-4)
    assert small.report.final.params < 0.9 * small.report.original.params
    small.save(tmp_path / "small.onnx")
    torch.testing.assert_close(_run(onnx.load(tmp_path / "small.onnx"), x), _run(small.model, x))


def _exported(net: nn.Module, x: object) -> onnx.ModelProto:
    if not isinstance(x, dict):
        return to_onnx(net, x)  # type: ignore[arg-type]
    batch = {key: {0: torch.export.Dim("batch")} for key in x}
    few = {key: value[:2] for key, value in x.items()}
    program = torch.onnx.export(net, (), kwargs=few, dynamo=True, verbose=False, dynamic_shapes=batch)
    assert program is not None
    return program.model_proto


def _run(model: onnx.ModelProto, x: object) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = list(x.values()) if isinstance(x, dict) else [x]
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])
