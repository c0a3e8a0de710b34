"""Pipelines as text, list and YAML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

import tdpass
from tdpass.errors import PassError, UsageError
from tdpass.job import Job
from tdpass.models import open_model
from tdpass.pipeline import PASSES, Pass, Pipeline


@pytest.mark.parametrize(
    "text",
    [
        "fold-batchnorm,plan{macs=0.4},factorize,refit{ridge=0.01}",
        "verify{limit=0.5}",
        "plan{macs=120M,joint=false}",
    ],
)
def test_text_is_read_and_printed_alike(text: str) -> None:
    assert str(Pipeline.parse(text)) == text


def test_list_yaml_and_text_agree(tmp_path: Path) -> None:
    text = "fold-batchnorm,plan{macs=0.4},factorize"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pipeline:\n- fold-batchnorm\n- plan: {macs: 0.4}\n- factorize\n")
    assert (
        Pipeline.parse(recipe)
        == Pipeline.parse(text)
        == Pipeline.parse(["fold-batchnorm", {"plan": {"macs": 0.4}}, "factorize"])
    )


@pytest.mark.parametrize("name", PASSES.names())
def test_every_pass_has_a_text_form(name: str) -> None:
    step = PASSES.get(name)()
    assert step.name == name
    assert Pipeline.parse(str(step)).passes == (step,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shrink", "unknown pass 'shrink'; known:"),
        ("plan{speed=1}", "no option 'speed'; it takes"),
        ("refit{ridge=high}", "must be of type float"),
        ("plan{joint=3}", "must be of type bool"),
        ("plan{{", "cannot read the pass"),
        ([3], "is not a pass"),
        ("missing.yaml", "cannot read the recipe"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(spec: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(spec)  # type: ignore[arg-type]


def test_a_failing_pass_is_named_with_those_before_it(residual: nn.Module) -> None:
    @dataclass(frozen=True)
    class Breaks(Pass):
        name = "breaks"

        def run(self, model: tdpass.models.Model, job: Job) -> bool:
            raise ZeroDivisionError("by zero")

    job = Job(tdpass.Report())
    with pytest.raises(PassError, match="breaks failed after verify: ZeroDivisionError"):
        Pipeline.parse(["verify", Breaks()]).run(open_model(residual), job)
    assert [row.text for row in job.report.passes] == ["verify"]


def test_the_shipped_recipe_is_the_default_pipeline() -> None:
    recipe = Path(tdpass.verbs.__file__).parent / "recipes" / "post_training.yaml"
    assert Pipeline.parse(recipe) == Pipeline.parse(tdpass.verbs.PLANNED)
