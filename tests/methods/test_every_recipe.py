"""Every training recipe runs to its end on tdpass's digits, for as few steps as it can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tdpass
from tdpass.datasets import open_dataset
from tdpass.methods.recipe import Recipe, names
from tdpass.zoo import NETS

_ROUNDS = frozenset(
    {
        "rounds",
        "prune",
        "retrain",
        "quantize",
        "fix",
        "admm",
        "warm",
        "search",
        "tune",
        "factored",
        "sparsify",
    }
)


def _short(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method with few of what it counts."""
    return {name: min(value, 2) if name in _ROUNDS else value for name, value in options.items()}


def _shortened(name: str) -> Recipe:
    recipe = Recipe.load(name).with_data("digits")
    method = recipe.method
    if isinstance(method, Mapping):
        method = {key: _short(options) for key, options in method.items()}
    elif method is not None:
        method = method.replace("plan{", "plan{effort=fast,")
    return replace(
        recipe,
        method=method,
        pretrain=int(recipe.trained or bool(recipe.pretrain)),
        finetune=min(recipe.finetune, 1),
        rounds_per_epoch=min(recipe.rounds_per_epoch, 2),
        control=False,
        batch=512,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", names())
def test_a_recipe_trains_on_digits(name: str, tmp_path: Path) -> None:
    recipe = _shortened(name)
    artifact: tdpass.Artifact[Any] = recipe.run(tmp_path)
    report = artifact.report
    assert report.training
    assert all(row.loss == row.loss and abs(row.loss) < 1e6 for row in report.training)
    norms = 0.01 * report.original.params  # widths have batch-norms of their own
    assert report.final.params <= report.original.params + norms
    answers = artifact.model(torch.rand(3, *open_dataset("digits", NETS.get(recipe.model).sample).sample))
    assert bool(torch.isfinite(answers).all())
    artifact.save(tmp_path / "model.safetensors")
    assert (tmp_path / "log.csv").read_text().count("\n") == 1 + len(report.training)
