"""What counters make of the operators: torch's, and that of the report, on every operator and on models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from cases import cases_of
from counts import torch_macs
from setting import arguments
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tdpass
from tdpass.kernels.base import OPS, use_reference
from tdpass.layers.factorized import Factorized
from tdpass.products import counting

Arguments = Mapping[str, Tensor]


def _stored(given: Mapping[str, Any]) -> int:
    """What sparse operators multiply a position with: references have the dense weight."""
    total = int(given["values"].numel())
    if given["u"] is not None:
        outputs = int(given["rows"].max()) + 1
        total += given["u"].shape[1] * (given["v"].shape[1] + outputs)
    return total


def _stored_by_row(given: Mapping[str, Any]) -> int:
    return _stored(given) * (given["x"].numel() // given["x"].shape[-1])


def _cells(gates: int, rank: Callable[[Arguments], int]) -> Callable[[Arguments], int]:
    """Two thin matrices a step: references multiply them with each other first."""

    def count(given: Arguments) -> int:
        (steps, batch, _), hidden = given["pre"].shape, given["h0"].shape[1]
        return steps * batch * rank(given) * (hidden + gates * hidden)

    return count


def _of_floats(given: Arguments) -> int:
    return given["u"].shape[1]


def _of_bytes(given: Arguments) -> int:
    return len(given["v_scale"])


UNLIKE_THEIR_REFERENCES: dict[str, Callable[[Arguments], int]] = {
    "sparse_linear": _stored_by_row,
    "low_rank_lstm": _cells(4, _of_floats),
    "low_rank_gru": _cells(3, _of_floats),
    "low_rank_lstm_int8": _cells(4, _of_bytes),
    "low_rank_gru_int8": _cells(3, _of_bytes),
}


@pytest.mark.parametrize("name", OPS.names())
@torch.no_grad()
def test_both_counters_say_what_the_reference_multiplies(name: str) -> None:
    op, apart = OPS.get(name), UNLIKE_THEIR_REFERENCES.get(name)
    names = [argument.name for argument in op.call._schema.arguments]
    for case in cases_of(name)[:12]:
        args = arguments(op, case, case.dtypes[0])
        with FlopCounterMode(display=False) as torchs:
            op.call(*args)
        with counting() as ours:
            op.call(*args)
        given = dict(zip(names, args, strict=False))
        if name == "sparse_conv2d":
            y = op.call(*args)
            wanted = _stored(given) * (y.numel() // y.shape[1])
        elif apart is not None:
            wanted = apart(given)
        else:
            with use_reference():
                wanted = torch_macs(lambda args=args: op.reference(*args))
        assert torchs.get_total_flops() == 2 * wanted == 2 * ours.counted().macs
        assert ours.counted().unseen == ()


class Sorts(nn.Module):
    """A layer of each sort that becomes an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, groups=32)
        self.signal, self.linear = nn.Conv1d(32, 48, 3, stride=2), nn.Linear(48, 64)
        self.recurrent, self.last = nn.GRU(64, 32, batch_first=True), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.conv(x).relu()).flatten(2)
        h = self.signal(h).relu().mT
        return self.last(self.recurrent(self.linear(h).relu())[0][:, -1])


PLAIN = "plan{params=0.5},factorize"
PIPELINES = {
    "fused chains": PLAIN,
    "small cores": "plan{params=0.7},factorize",
    "bfloat16": f"{PLAIN},quantize{{numbers=bfloat16}}",
    "integers in ranges": f"{PLAIN},quantize,quantize-activations{{calibration=mse}}",
    "integers by row": f"{PLAIN},quantize,quantize-activations{{calibration=dynamic}}",
    "few bits": "quantize{numbers=int4/16,beside=4}",
}


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=() if how == "integers in ranges" else pytest.mark.slow) for how in PIPELINES],
)
@torch.no_grad()
def test_a_deployed_model_counts_as_the_report_says(how: str) -> None:
    torch.manual_seed(0)
    dense, x = Sorts().eval(), torch.randn(2, 16, 6, 6)
    artifact = tdpass.compress(
        tdpass.open_recurrent(dense) if how == "integers by row" else dense,
        None,
        [x],
        pipeline=f"{PIPELINES[how]},fuse-kernels{{measure=false}}",
        formats=["tensor_train"] if how == "small cores" else ["svd", "channel_svd"],
        effort="fast",
        cache=False,
        progress=False,
    )
    fused = {type(part) for part in artifact.model.modules() if isinstance(part, Factorized)}
    assert fused - {Factorized}
    with FlopCounterMode(display=False) as counter:
        artifact.model(x)
    assert counter.get_total_flops() == 2 * len(x) * artifact.report.final.macs


@pytest.mark.slow
def test_torchs_counter_is_told_whichever_is_imported_first() -> None:
    code = (
        "import {}\nimport {}\nimport torch, tdpass.kernels.base as base\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert all(getattr(torch.ops.tdpass, name) in flop_registry for name in base.OPS.names())"
    )
    for order in (("tdpass", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "tdpass")):
        subprocess.run([sys.executable, "-c", code.format(*order)], check=True)
