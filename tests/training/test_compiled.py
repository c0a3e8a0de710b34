"""Compiled training: the same weights as without, changed in place alike; a compiler that fails says so."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import training_run
from torch import nn

import tdpass
from tdpass.errors import TrainingError


def trained(method: Mapping[str, object], compiled: bool) -> tdpass.Artifact:
    settings = {"lr": 0.05, "distill": 0.3, "compile": compiled}
    return tdpass.train(
        training_run.network(),
        training_run.data(),
        method,
        settings=settings,
        control=False,
        example_inputs=torch.zeros(2, 1, 8, 8),
    )


def test_terms_act_on_compiled_weights() -> None:
    method = training_run.METHODS["surgery"]  # sets weights before and after every step
    eager, compiled = (trained(method, flag) for flag in (False, True))
    for (name, value), other in zip(eager.model.named_parameters(), compiled.model.parameters(), strict=True):
        assert torch.allclose(value, other, atol=1e-4), name
    assert [row.loss for row in compiled.report.training] == pytest.approx(
        [row.loss for row in eager.report.training], rel=1e-4
    )


def test_failing_compiler_is_named() -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))
    no_compiler = inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False})
    with no_compiler, pytest.raises(TrainingError, match=r"cannot be compiled .* train it without compile"):
        tdpass.train(
            model,
            training_run.data(),
            {"admm-tt": {"budget": {"params": 0.5}, "rounds": 1}},
            settings={"compile": True},
            control=False,
        )
