"""Exported programs and functional graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import tdpass
from tdpass.data import calls_of
from tdpass.errors import InvalidModelError, UsageError
from tdpass.models import open_model


def _export(module: nn.Module, x: Tensor) -> ExportedProgram:
    return torch.export.export(module, (x,), dynamic_shapes=({0: Dim("n", min=2, max=512)},))


def test_sites_are_named_as_in_the_module(residual: nn.Module, images: Tensor) -> None:
    assert {site.name for site in open_model(_export(residual, images)).sites()} == {
        "stem",
        "first",
        "second",
        "head",
    }


def test_a_program_comes_back_as_a_program_with_its_dynamic_axes(
    residual: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    from_module = tdpass.compress(residual, {"macs": 0.5}, images)
    artifact = tdpass.compress(_export(residual, images), plan=from_module.plan, data=images)
    assert isinstance(artifact.model, ExportedProgram)
    assert isinstance(from_module.model, nn.Module)
    with torch.no_grad():
        expected = from_module.model(images[:5])
        assert torch.allclose(
            artifact.model.module()(images[:5]), expected, atol=1e-4 * float(expected.abs().max())
        )
    artifact.save(tmp_path / "small.pt2")
    with torch.no_grad():
        assert torch.allclose(
            torch.export.load(tmp_path / "small.pt2").module()(images[:3]),
            expected[:3],
            atol=1e-4 * float(expected.abs().max()),
        )
    again = open_model(tmp_path / "small.pt2")
    assert again.frontend == "torch.export"


def test_functional_layers_are_reached_through_the_program() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))
            self.matrix = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.conv2d(x, self.kernel, padding=1).mean((2, 3)), self.matrix)

    x = torch.randn(4, 8, 6, 6)
    module = Functional().eval()
    assert not open_model(module).sites()
    model = open_model(torch.export.export(module, (x,)))
    assert sorted(site.shape for site in model.sites()) == [(6, 8), (8, 8, 3, 3)]


def test_a_symbolically_traced_graph_comes_back_as_one(residual: nn.Module, images: Tensor) -> None:
    graph = torch.fx.symbolic_trace(residual)
    artifact = tdpass.compress(graph, {"params": 0.6}, images)
    assert isinstance(artifact.model, torch.fx.GraphModule)
    assert artifact.report.final.params <= 0.6 * artifact.report.original.params


def test_wrong_files_are_refused(residual: nn.Module, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"PK no")
    for name in ("bad.pt2", "missing.pt2"):
        with pytest.raises(InvalidModelError):
            open_model(tmp_path / name)
    with pytest.raises(UsageError, match=r"\.pt2"):
        tdpass.compress(_export(residual, images), {"params": 0.9}).save(tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.second = nn.Linear(12, 8)

    def forward(self, x: Tensor, state: Tensor, *, scale: Tensor) -> Tensor:
        return (self.first(x) + 2 * self.second(state)) * scale


@pytest.mark.parametrize("names", [("x", "state", "scale"), ("scale", "state", "x")])
def test_values_by_name_are_put_where_a_program_takes_them(names: tuple[str, ...]) -> None:
    net = TwoInputs().eval()
    given = {name: torch.randn(4, 8 if name == "scale" else 12) for name in ("x", "state", "scale")}
    dynamic = {name: {0: Dim("n", min=2)} for name in given}
    program = torch.export.export(
        net, (given["x"], given["state"]), {"scale": given["scale"]}, dynamic_shapes=dynamic
    )
    read, notes = calls_of(open_model(program), {name: given[name] for name in names}, 4)
    assert not notes
    assert [len(batch.args) for batch in read] == [2]
    assert torch.equal(program.module()(*read[0].args, **read[0].kwargs), net(**given))
