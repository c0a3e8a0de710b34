"""Recurrent networks in single precision, bfloat16 and bytes.

`python -m benchmarks.bench_models --dtype fp32,bf16,int8 --nets lstm gru` times them.

Two layers of 512 units, 100 steps; dense, with both products of every layer of rank 128 as plain layers
(`chain`: in ONNX a Scan, or what its runtime makes of that), and by the operators of this package (`fused`).
In bytes weights are int8 and each product finds the range of what it reads: `DynamicQuantizeLSTM` as
onnxruntime's own tool makes it (of a GRU it makes nothing), torch's dynamic quantization, int8 weights in
OpenVINO, and of low rank `low_rank_lstm_int8` or `low_rank_gru_int8`.  The operators have no form in bfloat16.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import onnx
import torch
from torch import nn

import tdpass
from benchmarks.model_dtypes import Candidate, in_runtimes, rows_of_candidates
from benchmarks.nets import Recurrent, exported
from benchmarks.results import Value
from tdpass.clock import threads_of_torch
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import dense_cost
from tdpass.models import open_model
from tdpass.models.base import Model
from tdpass.planner.rank_plan import Choice, RankPlan

KINDS: dict[str, type[nn.LSTM | nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}
STEPS, WIDTH, RANK = 100, 512, 128
INTEGERS = "quantize,quantize-activations{calibration=dynamic}"
M = TypeVar("M", nn.Module, onnx.ModelProto)


def low_rank(model: Model) -> RankPlan:
    """Every product of a model that was divided at the same rank."""
    svd, form = FORMATS.get("svd"), Form("svd", (RANK,))
    choices = tuple(
        Choice(site.name, site.shape, form, svd.cost(site, (RANK,)), dense_cost(site))
        for site in model.sites()
    )
    return RankPlan(choices, sum((choice.dense for choice in choices), tdpass.Cost()))


class _Forms:
    """One network dense and of low rank, as a module and as an ONNX model, and what becomes of these."""

    def __init__(self, kind: str, batch: int, threads: int) -> None:
        self.dense, self.threads = Recurrent(WIDTH, KINDS[kind]).eval(), threads
        self.x = torch.randn(batch, STEPS, WIDTH, generator=torch.Generator().manual_seed(0))
        opened = tdpass.open_recurrent(self.dense)
        self.plan = low_rank(open_model(opened, self.x))
        self.small = self.made(opened, "factorize")
        self.onnx = exported(self.dense, self.x)

    def made(self, model: M, pipeline: str) -> M:
        """What a pipeline makes of a model by the plan."""
        compressed = tdpass.compress(
            copy.deepcopy(model), plan=self.plan, pipeline=pipeline, example_inputs=self.x, strict=False
        )
        return compressed.model

    def run(self, shape: str, model: nn.Module | onnx.ModelProto, *names: str) -> Iterator[Candidate]:
        """A model in these runtimes."""
        opened = open_model(model, self.x if isinstance(model, nn.Module) else None)
        yield from in_runtimes(names, opened, shape, self.x.to(_dtype(model)), self.threads)

    def fp32(self) -> Iterator[Candidate]:
        """All in single precision."""
        yield from self.run("dense", self.dense, "eager", "inductor")
        yield from self.run("dense", self.onnx, "onnxruntime", "openvino")
        yield from self.run("chain", self.made(self.onnx, "divide,factorize"), "onnxruntime", "openvino")
        yield from self.run("fused", self.small, "eager")
        yield from self.run("fused", self.made(self.onnx, "divide,factorize,fuse-kernels"), "onnxruntime")

    def bf16(self) -> Iterator[Candidate]:
        """All in bfloat16, where there is a way."""
        yield from self.run("dense", copy.deepcopy(self.dense).bfloat16(), "eager")
        yield from self.run("dense", self.onnx, "openvino_default")
        yield from self.run("chain", self.made(self.onnx, "divide,factorize"), "openvino_default")

    def int8(self) -> Iterator[Candidate]:
        """Weights of int8, what they read rounded in every call."""
        yield from self.run("dense", _by_torch(self.dense), "eager")
        quantized = _by_onnxruntime(self.onnx)
        if any(node.op_type == "DynamicQuantizeLSTM" for node in quantized.graph.node):
            yield from self.run("dense", quantized, "onnxruntime")
        yield from self.run("dense", self.made(self.onnx, "quantize"), "openvino_default")
        for shape, last in (("chain", ""), ("fused", ",fuse-kernels")):
            made = self.made(self.onnx, f"divide,factorize,{INTEGERS}{last}")
            yield from self.run(shape, made, "onnxruntime")
        yield from self.run("fused", self.made(self.small, f"{INTEGERS},fuse-kernels"), "eager")


def rows_of(
    kind: str, batch: int, threads: int, dtypes: tuple[str, ...], rounds: int
) -> list[dict[str, Value]]:
    """Times and errors of one network in these types, all in one process and in turn."""
    with threads_of_torch(threads), torch.no_grad():
        forms = _Forms(kind, batch, threads)
        exact, low = forms.dense(forms.x), forms.small(forms.x)
        found = [(dtype, each) for dtype in dtypes for each in getattr(forms, dtype)()]
        head = {"net": kind, "batch": batch, "threads": threads}
        return rows_of_candidates(head, found, exact, low, forms.plan, rounds)


def _dtype(model: nn.Module | onnx.ModelProto) -> torch.dtype:
    held = list(model.parameters()) if isinstance(model, nn.Module) else []
    return held[0].dtype if held else torch.float32


def _by_torch(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that this will move to another package
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.LSTM, nn.GRU}, dtype=torch.qint8
        )
    return quantized


def _by_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import quant_pre_process, quantize_dynamic

    with TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        onnx.save(model, given)
        quant_pre_process(given, given)
        quantize_dynamic(given, made, per_channel=True)
        return onnx.load(made)
