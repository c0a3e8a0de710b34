"""Graphs with quantize and dequantize nodes, as PT2E converts them, and torchao's tensors.

Left right, or made floating-point again when that is asked for.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import tdpass
from tdpass.errors import UsageError
from tdpass.models import open_model
from tdpass.models.base import Batch

decomposed = torch.ops.quantized_decomposed
SITES = ("first", "second", "fc", "out")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.fc, self.out = nn.Linear(64, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        h = F.max_pool2d(torch.relu(self.second(h) + h), 4)
        return self.out(torch.relu(self.fc(h.flatten(1))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images() -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(module: nn.Module, x: Tensor, dynamic: bool) -> GraphModule:
    """What PT2E's conversion leaves: integers under names of their own, the weights of before still held."""
    made = torch.export.export(module, (x,), strict=False).module()
    assert isinstance(made, GraphModule)
    graph, eight = made.graph, (0, 255, torch.uint8)
    for number, node in enumerate(list(graph.nodes)):
        if node.target not in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
            continue
        weight = made.get_parameter(str(node.args[1].target)).detach()
        scale = weight.flatten(1).abs().amax(1) / 127
        zero = torch.zeros_like(scale, dtype=torch.int64)
        codes = decomposed.quantize_per_channel(weight, scale, zero, 0, -128, 127, torch.int8)
        for name, held in (("_frozen", codes), ("_scale", scale), ("_zero", zero)):
            made.register_buffer(f"{name}{number}", held)
        with graph.inserting_before(node):
            parts = [graph.get_attr(f"{name}{number}") for name in ("_frozen", "_scale", "_zero")]
            whole = graph.call_function(
                decomposed.dequantize_per_channel.default, (*parts, 0, -128, 127, torch.int8)
            )
            read, way = node.args[0], "default"
            steps: tuple[object, ...] = (0.05, 128)
            if dynamic:
                found = graph.call_function(
                    decomposed.choose_qparams.tensor, (read, 0, 255, 1e-6, torch.uint8)
                )
                steps = tuple(graph.call_function(lambda pair, k: pair[k], (found, k)) for k in (0, 1))
                way = "tensor"
            taken = graph.call_function(getattr(decomposed.quantize_per_tensor, way), (read, *steps, *eight))
            given = graph.call_function(
                getattr(decomposed.dequantize_per_tensor, way), (taken, *steps, *eight)
            )
        node.args = (given, whole, *node.args[2:])
    graph.eliminate_dead_code()
    made.recompile()
    return made


def by_torchao(module: nn.Module, x: Tensor, dynamic: bool) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao")
        pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
        prepared = pt2e.prepare_pt2e(torch.export.export(module, (x,), strict=False).module(), quantizer)
        prepared(x)
        return pt2e.convert_pt2e(prepared)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("convert", [by_hand, by_torchao])
def test_a_converted_graph_is_left_right_or_made_anew(
    convert: Callable[[nn.Module, Tensor, bool], GraphModule], dynamic: bool
) -> None:
    module, x = net(), images()
    given = convert(copy.deepcopy(module), x, dynamic)
    exact, before = given(x), given.code
    model = open_model(given)
    assert not model.sites()
    assert set(model.declined()) >= set(SITES)
    for site in SITES:
        assert (
            "its weight is quantized (quantized_decomposed.dequantize_per_channel" in model.declined()[site]
        )
        assert "tdpass.dequantize(model)" in model.declined()[site]
    with pytest.raises(UsageError, match=r"no site is left to compress: .*its weight is quantized"):
        tdpass.compress(given, 0.5, x, cache=False)
    made = tdpass.dequantize(given)
    assert isinstance(made, GraphModule)
    assert given.code == before
    assert not any("quantize" in str(node.target) for node in made.graph.nodes)
    assert {site.name for site in open_model(made).sites()} == set(SITES)
    assert {name for name, held in made.named_parameters() if held.dim() > 1} == {
        f"{name}.weight" for name in SITES
    }
    scale = float(exact.detach().abs().max())
    assert float((made(x) - exact).detach().abs().max()) < 0.05 * scale
    assert float((made(x) - module(x)).detach().abs().max()) < 0.03 * scale


def test_what_was_converted_is_factored_and_quantized_anew(tmp_path: Path) -> None:
    """As an exported program, through a file."""
    module, x = net(), images()
    given = torch.export.export(by_hand(module, x, False), (x,), strict=False)
    torch.export.save(given, tmp_path / "given.pt2")
    again = tdpass.dequantize(str(tmp_path / "given.pt2"))
    assert isinstance(again, torch.export.ExportedProgram)
    artifact = tdpass.compress(
        again, {"macs": 0.8}, x, cache=False, effort="fast", formats=["svd", "channel_svd"], strict=False,
        pipeline="plan,factorize,correct-bias,quantize,quantize-activations,verify",
    )  # fmt: skip
    assert artifact.report.final.macs <= 0.8 * artifact.report.original.macs
    assert artifact.report.final.bytes < 0.3 * artifact.report.original.bytes
    forms = {str(choice.form.numbers) for choice in artifact.plan}
    assert forms == {"('int8',)"}
    found, exact = artifact.model.module()(x), given.module()(x)
    assert float((found - exact).detach().norm()) < 0.2 * float(exact.detach().norm())
    run = open_model(artifact.model).run(Batch((x,)))
    assert torch.allclose(run, found, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        "Int8WeightOnlyConfig",
        "Int8DynamicActivationInt8WeightConfig",
        "Float8WeightOnlyConfig",
        "IntxWeightOnlyConfig",
    ],
)
def test_weights_of_torchao_are_named_and_made_anew(config: str) -> None:
    module, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).eval(), torch.randn(32, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(module, getattr(torchao, config)())
        exact = module(x)
        reasons = open_model(module).declined()
        made = tdpass.dequantize(module)
    assert not open_model(module).sites()
    assert all("Tensor, which is quantized" in reason for reason in reasons.values())
    assert {type(layer.weight) for layer in (made[0], made[2])} == {nn.Parameter}
    assert float((made(x) - exact).detach().abs().max()) < 0.02 * float(exact.detach().abs().max())
    artifact = tdpass.compress(made, {"macs": 0.7}, x, cache=False, effort="fast", strict=False)
    assert artifact.report.final.macs <= 0.7 * artifact.report.original.macs
