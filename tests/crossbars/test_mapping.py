"""Maps: weights follow from the cells of the file alone, in any format; damaged files are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_run import network, trained_by

import tdpass
from tdpass.crossbars import Mapped, load_mapped, map_model
from tdpass.crossbars.states import device_levels
from tdpass.errors import InvalidModelError, PlanError, UsageError
from tdpass.methods import Crossbar
from tdpass.targets.crossbar import CrossbarArray
from tdpass.targets.workload import as_matrices

ADMM = CrossbarArray.load("admm_32x32")
ARRAYS = {
    "pair": replace(ADMM, rows=16, columns=12),
    "five bits": replace(ADMM, weight_bits=5),
    "adjacent": replace(ADMM, rows=16, columns=12, slices="columns", cell_bits=3),
    "measured states": replace(ADMM, cell_bits=2, weight_bits=3, states=(1e-7, 2.5e-7, 7e-7, 9e-7)),
}


def sparse_network() -> nn.Module:
    net = network()
    with torch.no_grad():
        net[2].weight[:, 1] = 0
        net[2].weight[3] = 0
        net[6].weight[:, ::3] = 0
    return net


def weights_of(mapped: Mapped) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for matrix in mapped.map.matrices:
        found.setdefault(matrix.site, []).append(mapped.matrix(matrix))
    return found


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_weights_follow_from_the_cells_of_the_file(array: CrossbarArray, tmp_path: Path) -> None:
    net = sparse_network()
    mapped = map_model(net, array)
    mapped.save(tmp_path / "map.json")
    read = load_mapped(tmp_path / "map.json")
    assert read.map == mapped.map
    states = torch.tensor(device_levels(array).magnitudes, dtype=torch.float64)
    for which, (name, (matrix,)) in zip(read.map.matrices, weights_of(read).items(), strict=True):
        weight = as_matrices(net.get_submodule(name).weight.detach(), 1)[0].double()
        held = (
            torch.cat([-states.flip(0), torch.zeros(1), states]) * which.scale
        )  # what a weight may be, no cell being zero
        nearest = held[(weight[..., None] - held).abs().argmin(-1)]
        torch.testing.assert_close(matrix, nearest, rtol=1e-5, atol=2e-3 * which.scale)
        assert not matrix[weight == 0].any()
    # a cell holds one weight, in as many cells as it has digits
    numbers, filled = read.weight[read.weight >= 0], read.state[read.state > 0]
    kept = sum(int(matrix.count_nonzero()) for (matrix,) in weights_of(read).values())
    assert len(numbers) == len(filled) == kept * array.digits
    assert int(read.state.max()) <= 2**array.cell_bits


def test_what_the_method_trained_is_mapped_as_it_is(tmp_path: Path) -> None:
    for options in ({"keep": 600, "weight_bits": 5}, {"keep": 900, "array": "forms"}):
        method = Crossbar(**options, admm=2, retrain=0, fix=1, rho=0.5)  # type: ignore[arg-type]
        artifact = trained_by(method)
        artifact.save(tmp_path / "model.safetensors")
        loaded = tdpass.load(tmp_path / "model.safetensors", network())
        for name, (matrix,) in weights_of(map_model(loaded, method.machine)).items():
            torch.testing.assert_close(
                matrix.float(),
                as_matrices(loaded.get_submodule(name).weight.detach(), 1)[0],
                rtol=1e-4,
                atol=1e-6,
            )
        sets = map_model(loaded, method.machine).map.sets
        assert sets == len(artifact.report.arrays)


@pytest.mark.parametrize(
    "formats",
    [
        ["tucker2", "svd"],
        ["cp", "svd"],
        ["tensor_train"],
        ["spatial_svd", "tensor_ring"],
        ["block_term", "svd"],
    ],
)
def test_factored_layers_are_the_products_that_they_make(formats: list[str]) -> None:
    example = torch.zeros(1, 1, 8, 8)
    made = tdpass.compress(
        network(), {"params": 0.6}, formats=formats, example_inputs=example, cache=False, strict=False
    )
    mapped = map_model(made.model, ADMM, example_inputs=example)
    products = {
        matrix.site: 1 + max(m.product for m in mapped.map.matrices if m.site == matrix.site)
        for matrix in mapped.map.matrices
    }
    for choice in made.plan:
        assert (products[choice.site] > 1) is (not choice.kept_dense)


def test_fragments_of_both_signs_are_refused() -> None:
    with pytest.raises(PlanError, match="fragments with weights of both signs; train it with Crossbar"):
        map_model(network(), CrossbarArray.load("forms"))
    with pytest.raises(UsageError, match="leave no site to map"):
        map_model(network(), ADMM, include=["nothing"])
    with pytest.raises(UsageError, match="priced, not mapped"):
        map_model(network(), CrossbarArray.load("isaac"))


def test_files_that_are_damaged_or_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    map_model(network(), ADMM).save(path)
    other = tmp_path / "other.json"
    map_model(sparse_network(), ADMM).save(other)
    (tmp_path / "map.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(InvalidModelError, match="not those that it was written with"):
        load_mapped(path)
    (tmp_path / "map.safetensors").write_bytes(b"junk")
    with pytest.raises(InvalidModelError, match="cannot be read"):
        load_mapped(path)
    tree: dict[str, Any] = json.loads(other.read_text())
    tree["matrices"][0]["places"][0]["rows"] = ["first"]
    other.write_text(json.dumps(tree))
    with pytest.raises(InvalidModelError, match="is not a map of crossbar arrays"):
        load_mapped(other)
    with pytest.raises(UsageError, match=r"must end in \.json"):
        map_model(network(), ADMM).save(tmp_path / "map.npz")
