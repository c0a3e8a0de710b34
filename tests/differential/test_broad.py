"""Random ONNX graphs of everything beside plain layers: full rank changes nothing, budgets are kept."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from broad import CHANNELS, STEPS, broad, nodes_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

import tdpass
from tdpass.errors import BudgetError
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models.base import Batch, Model
from tdpass.models.onnx.model import OnnxModel
from tdpass.site import Site

MODELS = st.builds(broad, st.integers(0, 2**31), st.integers(1, 3))
FEW = settings(
    max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=60)


def data(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((STEPS, samples, CHANNELS)).astype(np.float32)


def run(proto: ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def full(model: Model, site: Site) -> Layer:
    fmt = FORMATS.get("channel_svd" if site.axes else "svd")
    rank = fmt.ranks(site)[-1]
    return Layer(
        site, Form(fmt.name, rank), fmt.factorize(model.weight(site.name), site, rank), model.bias(site.name)
    )


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    # weights that are cast keep half precision, of about three digits
    np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=5e-3 * (1 + float(np.abs(theirs).max())))


def plain_nodes(proto: ModelProto) -> dict[str, bytes]:
    """The nodes without bodies by name, as they are stored: what no replacement may touch."""
    return {
        node.name: node.SerializeToString()
        for node in proto.graph.node
        if not any(attribute.HasField("g") for attribute in node.attribute)
    }


def holds_full_rank(proto: ModelProto) -> None:
    x = data(3)
    model = OnnxModel.open(proto, Batch((torch.from_numpy(x),)))
    wanted = run(proto, x)
    recorded = model.record(Batch((torch.from_numpy(x),))).play().finish()["y"]
    close(recorded.numpy(), wanted)
    alone = any(node.op_type == "Transpose" for node in proto.graph.node)  # it may be stored as it is read
    assert alone or nodes_of(model.unwrap()) == nodes_of(proto)
    for site in model.sites():
        model.replace(site.name, full(model, site))
    model.check()
    small = model.unwrap()
    assert list(small.graph.output) == list(proto.graph.output)
    before, after = plain_nodes(proto), plain_nodes(small)
    assert {name: after[name] for name in before.keys() & after.keys()} == {
        name: before[name] for name in before.keys() & after.keys()
    }
    for seed, samples in ((0, 3), (1, 1), (2, 5)):
        fresh = data(samples, seed)
        close(run(small, fresh), run(proto, fresh))


def holds_budgets(proto: ModelProto, measure: str, share: float) -> None:
    x = data(16)
    try:
        result = tdpass.compress(
            proto, {measure: share}, x, effort="fast", progress=False, cache=False,
            pipeline="divide,plan,factorize",
        )  # fmt: skip
    except BudgetError:
        return
    before, after = result.report.original, result.report.final
    assert after.get(measure) <= share * before.get(measure) + 1e-6
    assert after.params <= before.params
    onnx.checker.check_model(result.model)
    small = run(result.model, x)
    assert small.shape == x.shape
    assert np.isfinite(small).all()
    assert (
        sum(tensor.ByteSize() for tensor in result.model.graph.initializer)
        <= 1.05 * sum(tensor.ByteSize() for tensor in proto.graph.initializer) + 4096
    )


SHARES = st.sampled_from((0.5, 0.7, 0.9))
MEASURES = st.sampled_from(("params", "macs"))


@FEW
@given(MODELS)
def test_full_rank_changes_no_answer(proto: ModelProto) -> None:
    holds_full_rank(proto)


@settings(FEW, max_examples=3)
@given(MODELS, MEASURES, SHARES)
def test_a_budget_is_kept_by_a_sound_model(proto: ModelProto, measure: str, share: float) -> None:
    holds_budgets(proto, measure, share)


@pytest.mark.slow
@MANY
@given(MODELS)
def test_full_rank_changes_no_answer_of_many(proto: ModelProto) -> None:
    holds_full_rank(proto)


@pytest.mark.slow
@MANY
@given(MODELS, MEASURES, SHARES)
def test_a_budget_is_kept_by_many(proto: ModelProto, measure: str, share: float) -> None:
    holds_budgets(proto, measure, share)
