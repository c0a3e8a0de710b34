"""slice-residual{bases=block}: a basis for every sum, shortcuts between them, exact, saved, exported."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import to_onnx
from torch import Tensor, nn
from transformers_small import NETS, WIDTH, Vision, answer, notes, vision, vision_rms

import tdpass
from tdpass.errors import InvalidModelError, UsageError
from tdpass.layers.sliced_norm import SlicedNorm

QUIET = {"progress": False, "cache": False}
SLOW = ("llama", "tied_llama", "vision_rms", "encoder_norm_first", "gpt2")
BEFORE = ["vision", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]  # norms come first
AFTER = ("bert", "encoder")
SUMS = {"encoder_norm_first": 3}  # nothing norms what its last sum makes


def _sliced(net: object, x: object, options: str = "keep=0.75") -> tdpass.Artifact[nn.Module]:
    pipeline = f"slice-residual{{{options}}},verify"
    return tdpass.compress(net, data=x, pipeline=pipeline, strict=False, **QUIET)  # type: ignore[arg-type]


def _shortcuts(model: nn.Module) -> list[Tensor]:
    norms = [part for part in model.modules() if isinstance(part, SlicedNorm)]
    return [norm.shortcut.weight for norm in norms if norm.shortcut is not None]  # type: ignore[misc]


@pytest.mark.parametrize("name", BEFORE)
def test_at_full_width_the_answer_is_the_same_up_to_rounding(name: str) -> None:
    net, x = NETS[name]()
    artifact = _sliced(net, x, "bases=block,keep=1.0")
    assert len(_shortcuts(artifact.model)) == SUMS.get(name, 4), notes(artifact)
    reference = answer(net, x)
    torch.testing.assert_close(
        answer(artifact.model, x), reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()) + 1e-6
    )


@pytest.mark.parametrize("name", BEFORE)
def test_a_sliced_model_comes_back_from_a_file_and_from_copies(name: str, tmp_path: Path) -> None:
    net, x = NETS[name]()
    artifact = _sliced(net, x, "bases=block,keep=0.75")
    artifact.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", copy.deepcopy(net))
    for model in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(answer(model, x), answer(artifact.model, x))


def test_numbers_and_products_of_shortcuts_are_counted() -> None:
    net, x = vision_rms()
    block, network = (_sliced(net, x, f"bases={bases},keep=0.75") for bases in ("block", "network"))
    added, tokens = 4 * 12 * 12, 5
    assert sum(weight.numel() for weight in _shortcuts(block.model)) == added
    assert block.report.final.params == network.report.final.params + added
    assert block.report.final.macs == network.report.final.macs + tokens * added


@pytest.mark.slow
@pytest.mark.parametrize("name", AFTER)
def test_where_norms_come_after_sums_every_sum_has_a_basis_already(name: str) -> None:
    net, x = NETS[name]()
    block, network = (_sliced(net, x, f"bases={bases}") for bases in ("block", "network"))
    assert "no shortcut is needed" in notes(block)
    assert torch.equal(answer(block.model, x), answer(network.model, x))


class _Planted(nn.Module):
    """Blocks that write to other directions than those that they read, and more of them than are left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(3))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)) for _ in range(2)
        )
        with torch.no_grad():
            writers = (self.first, *(block[2] for block in self.blocks))  # type: ignore[index]
            for layer, size, start in zip(writers, (1.0, 20.0, 400.0), (0, 2, 4), strict=True):
                mask = torch.zeros(WIDTH)
                mask[start : start + 11] = size
                layer.weight.mul_(mask[:, None])
                layer.bias.mul_(mask)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, block in zip(self.norms[:2], self.blocks, strict=True):
            x = block(norm(x)) + x
        return self.last(self.norms[2](x))  # type: ignore[no-any-return]


def test_on_directions_that_differ_from_block_to_block_it_loses_less() -> None:
    torch.manual_seed(0)
    net, x = _Planted().eval(), torch.randn(64, 6)
    whole = answer(net, x)
    lost = [(answer(_sliced(net, x, f"bases={b}").model, x) - whole).norm() for b in ("block", "network")]
    assert lost[0] < 0.5 * lost[1]


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))  # type: ignore[no-any-return]


class _Wrapped(nn.Module):
    """A norm in a module of its own, the sum in the one around it; what the last sum makes is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branches = nn.Linear(6, WIDTH), nn.ModuleList(_Normed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x)
        return x


def test_sums_are_led_in_the_module_that_adds_and_a_stream_that_is_returned_keeps_its_own(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    net, x = _Wrapped().eval(), torch.randn(64, 6)
    torch.testing.assert_close(answer(_sliced(net, x, "bases=block,keep=1.0").model, x), answer(net, x))
    small = _sliced(net, x, "bases=block")
    assert [tuple(weight.shape) for weight in _shortcuts(small.model)] == [(12, 12), (WIDTH, 12)]
    small.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", _Wrapped().eval())
    assert torch.equal(answer(loaded, x), answer(small.model, x))
    with pytest.raises(InvalidModelError, match="is added to nothing"):
        small.model.branches[0](torch.randn(2, 12))  # type: ignore[index,operator]


@pytest.mark.slow
def test_what_is_exported_and_compiled_answers_alike() -> None:
    net, x = vision()
    small = _sliced(net, x, "bases=block").model
    exported = torch.export.export(small, (x[:2],)).module()
    torch.testing.assert_close(exported(x[:2]), answer(small, x[:2]))
    torch.testing.assert_close(_run(to_onnx(small, x), x), answer(small, x), rtol=1e-4, atol=1e-5)
    planted = torch.randn(8, 6)
    for sliced, given in ((small, x), (_sliced(_Planted().eval(), planted, "bases=block").model, planted)):
        compiled = torch.compile(sliced, backend="eager", fullgraph=True)
        torch.testing.assert_close(answer(compiled, given), answer(sliced, given))


def test_shortcuts_are_sites_that_are_planned_and_factored() -> None:
    net, x = vision_rms()
    pipeline = "slice-residual{bases=block,keep=0.75},plan,factorize,correct-bias,refit,verify"
    artifact = tdpass.compress(
        net, {"params": 0.6}, x, pipeline=pipeline, formats=["svd"], strict=False, **QUIET
    )  # type: ignore[arg-type]
    assert artifact.report.final.params <= 0.6 * artifact.report.original.params
    assert sum("shortcut" in choice.site for choice in artifact.plan) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder_norm_first", "llama"])
def test_onnx_models_are_sliced_to_the_same_answers(name: str, tmp_path: Path) -> None:
    net, x = NETS[name]()
    if isinstance(x, dict):
        batch, few = {key: {0: torch.export.Dim("batch")} for key in x}, {k: v[:2] for k, v in x.items()}
        program = torch.onnx.export(net, (), kwargs=few, dynamo=True, verbose=False, dynamic_shapes=batch)
        assert program is not None
        exported, data = program.model_proto, next(iter(x.values()))
    else:
        exported, data = to_onnx(net, x), x  # type: ignore[arg-type]
    whole = _sliced(exported, data.numpy(), "bases=block,keep=1.0")
    torch.testing.assert_close(_run(whole.model, data), answer(net, x), rtol=1e-4, atol=1e-5)
    small = _sliced(exported, data.numpy(), "bases=block")
    there = _sliced(net, x, "bases=block")
    torch.testing.assert_close(_run(small.model, data), answer(there.model, x), rtol=1e-3, atol=1e-4)
    assert small.report.final.macs == there.report.final.macs
    network = _sliced(exported, data.numpy(), "bases=network")
    added = sum(weight.numel() for weight in _shortcuts(there.model))
    assert small.report.final.params == network.report.final.params + added
    small.save(tmp_path / "small.onnx")
    torch.testing.assert_close(_run(onnx.load(tmp_path / "small.onnx"), data), _run(small.model, data))


def test_a_kind_of_bases_that_is_not_known_is_refused_with_those_that_are() -> None:
    net, x = Vision().eval(), torch.randn(4, 3, 8, 8)
    with pytest.raises(UsageError, match=r"bases='layer' is not known.*network, block"):
        _sliced(net, x, "bases=layer")


def _run(model: object, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString())  # type: ignore[attr-defined]
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
