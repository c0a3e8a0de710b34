"""The Triton kernels against float64.

They are interpreted on CPU tensors in a process of their own, and compiled where there is a CUDA device.

The interpreter accepts what the compiler refuses, so without a device every kernel is also compiled for two
of them.
"""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_setting import (
    DEVICE,
    INTERPRETED,
    compiles,
    needs_triton,
    normal,
    on_device,
    run_interpreted,
    runs_kernels,
    starts_interpreted,
    tile,
)
from setting import ENDINGS
from torch import Tensor

from tdpass.errors import KernelError, UnsupportedError
from tdpass.kernels import gpu
from tdpass.kernels.activation import activate
from tdpass.kernels.base import IMPLEMENTATIONS, OPS
from tdpass.kernels.float8_chain import pack_weight
from tdpass.kernels.linear_chain import stages_of as layers_of
from tdpass.kernels.stage import Stage
from tdpass.kernels.tensor_chain import Step, block_program, train_program
from tdpass.ops import padded_convolution

pytestmark = pytest.mark.usefixtures("untuned")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
ONES, NONE = (1, 1), ((0, 0), (0, 0))


def assert_close(y: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    assert y.shape == reference.shape
    error = float((y.double() - reference).norm() / reference.norm().clamp_min(1e-3))
    assert error < TOLERANCE[dtype], f"relative error {error:.2e} in {dtype}"


@starts_interpreted
def test_the_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


SVD = [(1, 17, 1, 3), (5, 33, 17, 40), (3, 20, 260, 7)]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "rank", "outputs"), SVD)
@pytest.mark.parametrize("fused", [None, 0, 1])
def test_svd_linear(
    rows: int, inputs: int, rank: int, outputs: int, fused: int | None, dtype: torch.dtype
) -> None:
    from tdpass.kernels.gpu.svd_linear import svd_linear

    if fused and rank > 256:
        pytest.skip("a fused kernel holds ranks up to 256")
    x, v, u = (
        normal(2, rows, inputs, dtype=dtype),
        normal(rank, inputs, dtype=dtype, scale=inputs**-0.5),
        normal(outputs, rank, dtype=dtype, scale=rank**-0.5),
    )
    bias, residual = normal(outputs, dtype=dtype), normal(rows, outputs, dtype=dtype)
    config = None if fused is None else tile(fused=fused)
    y = svd_linear(x, v, u, bias, residual, "gelu", precision="ieee", config=config)
    assert_close(
        y,
        activate(x.double() @ v.double().T @ u.double().T + bias.double() + residual.double(), "gelu"),
        dtype,
    )


@runs_kernels
@pytest.mark.parametrize("activation", ENDINGS)
def test_every_activation_keeps_signs_and_nans(activation: str) -> None:
    from tdpass.kernels.gpu.svd_linear import svd_linear

    x = torch.linspace(-9, 9, 60, device=DEVICE).reshape(20, 3)
    x[3, 1] = math.nan
    eye = torch.eye(3, device=DEVICE)
    y = svd_linear(
        x.nan_to_num(0.0), eye, eye, None, torch.where(x.isnan(), x, 0.0), activation, precision="ieee"
    )
    assert torch.allclose(y, activate(x, activation), atol=1e-5, equal_nan=True)


@runs_kernels
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("fused", [0, 1])
def test_svd_linear_in_float8(fused: int, narrow: bool) -> None:
    from tdpass.kernels.gpu.svd_linear import Scales, svd_linear

    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this device")
    x = normal(5, 33, dtype=torch.bfloat16)
    (v, sv), (u, su) = pack_weight(normal(17, 33)), pack_weight(normal(20, 17))
    sx = x.abs().max().float() / 448 if narrow else torch.ones((), device=DEVICE)
    read = (x / sx).to(torch.float8_e4m3fn) if narrow else x
    v, u = v.view(torch.float8_e4m3fn), u.view(torch.float8_e4m3fn)
    y = svd_linear(read, v, u, scales=Scales(sx, sv, su), config=tile(fused=fused, k=32))
    wanted = (read.double() * sx) @ (v.double() * sv[:, None]).T @ (u.double() * su[:, None]).T
    assert y.dtype == torch.bfloat16
    assert_close(y, wanted, torch.bfloat16)


CONVS = [
    # i, r, s, o, size, kernel, stride, padding, dilation
    (3, 1, 1, 17, (5, 4), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    (33, 17, 3, 5, (1, 1), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    (17, 20, 18, 33, (6, 5), (3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2)),
    (5, 3, 4, 6, (6, 4), (2, 2), (2, 2), NONE, (1, 1)),
    (4, 3, 260, 5, (3, 1), (1, 1), (1, 1), NONE, (1, 1)),
]


def conv_reference(
    x: Tensor, first: Tensor | None, core: Tensor, last: Tensor | None, how: Sequence[Sequence[int]]
) -> Tensor:
    stride, padding, dilation = how
    h = x.double() if first is None else F.conv2d(x.double(), first.double())
    h = padded_convolution(h, core.double(), None, stride, padding, dilation, 1)  # type: ignore[arg-type]
    return h if last is None else F.conv2d(h, last.double())


@runs_kernels
@pytest.mark.parametrize("case", CONVS, ids=str)
@pytest.mark.parametrize("fused", [None, (0, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tucker2_conv2d(case: tuple, fused: tuple[int, int] | None, channels_last: bool) -> None:
    from tdpass.kernels.gpu.tucker2_conv2d import tucker2_conv2d

    i, r, s, o, size, kernel, stride, padding, dilation = case
    if fused and fused[1] and s > 256:
        pytest.skip("a fused last stage reads ranks up to 256")
    dtype = DTYPES[(i + channels_last + bool(fused)) % 3]
    x = normal(2, i, *size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    first, core, last = (
        normal(r, i, 1, 1, dtype=dtype, scale=i**-0.5),
        normal(s, r, *kernel, dtype=dtype),
        normal(o, s, 1, 1, dtype=dtype, scale=s**-0.5),
    )
    wanted = conv_reference(x, first, core, last, (stride, padding, dilation))
    bias, residual = normal(o, dtype=dtype), normal(*wanted.shape, dtype=dtype)
    config = tile(first=fused[0], last=fused[1]) if fused else None
    y = tucker2_conv2d(
        x,
        first,
        core,
        last,
        bias,
        residual,
        "silu",
        stride=stride,
        padding=padding,
        dilation=dilation,
        precision="ieee",
        config=config,
    )
    assert_close(y, activate(wanted + bias.double()[:, None, None] + residual.double(), "silu"), dtype)
    assert (
        y.is_contiguous(memory_format=torch.channels_last)
        if channels_last and not x.is_contiguous()
        else y.is_contiguous()
    )


@runs_kernels
@pytest.mark.parametrize("missing", ["first", "last", "both"])
def test_a_convolution_with_fewer_stages(missing: str) -> None:
    from tdpass.kernels.gpu.tucker2_conv2d import tucker2_conv2d

    x, core = normal(1, 5, 6, 7)[:, :, :, 1:], normal(6, 5, 3, 3, scale=0.1)  # not contiguous
    first = None if missing != "last" else normal(5, 5, 1, 1)
    last = None if missing != "first" else normal(7, 6, 1, 1)
    how = ((1, 2), ((1, 1), (0, 1)), (1, 1))
    y = tucker2_conv2d(x, first, core, last, stride=how[0], padding=how[1], precision="ieee")
    assert_close(y, conv_reference(x, first, core, last, how), torch.float32)


TRAINS = [((3, 5), (7, 17), (1,)), ((2, 3, 3), (3, 2, 4), (3, 5)), ((2, 3, 2, 2), (2, 2, 3, 3), (2, 3, 4))]


def train(
    outs: Sequence[int], ins: Sequence[int], bonds: Sequence[int], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    ends = (1, *bonds, 1)
    cores = [
        normal(ends[k], o, i, ends[k + 1], dtype=dtype, scale=(i * ends[k]) ** -0.5)
        for k, (o, i) in enumerate(zip(outs, ins, strict=True))
    ]
    whole = cores[0].double()
    for core in cores[1:]:
        whole = torch.einsum("poir,rabs->poaibs", whole, core.double())
        whole = whole.flatten(1, 2).flatten(2, 3)
    return cores, whole[0, :, :, 0]


@runs_kernels
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRAINS, ids=str)
def test_tt_linear(case: tuple, dtype: torch.dtype, rows: int) -> None:
    from tdpass.kernels.gpu.tt_linear import tt_linear

    cores, dense = train(*case, dtype)
    x, bias, residual = (
        normal(rows, dense.shape[1], dtype=dtype),
        normal(len(dense), dtype=dtype),
        normal(rows, len(dense), dtype=dtype),
    )
    y = tt_linear(x, cores, bias, residual, "silu", precision="ieee")
    assert_close(y, activate(x.double() @ dense.T + bias.double() + residual.double(), "silu"), dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "s", "r", "parts", "length", "outputs"),
    [(2, 3, 5, 4, 17, 33), (1, 1, 1, 1, 3, 1), (3, 17, 2, 2, 5, 7)],
)
def test_block_term_linear(
    b: int, s: int, r: int, parts: int, length: int, outputs: int, dtype: torch.dtype
) -> None:
    from tdpass.kernels.gpu.block_term_linear import block_term_linear

    x, first = normal(5, parts * length, dtype=dtype), normal(b * r, length, dtype=dtype, scale=length**-0.5)
    core, last = (
        normal(b, parts * r, s, dtype=dtype, scale=(parts * r) ** -0.5),
        normal(outputs, b * s, dtype=dtype),
    )
    bias = normal(outputs, dtype=dtype)
    y = block_term_linear(x, first, core, last, bias, activation="relu", precision="ieee")
    h = torch.einsum(
        "xpi,bri->xbpr", x.double().unflatten(-1, (parts, length)), first.double().unflatten(0, (b, r))
    )
    h = torch.einsum("xbpr,bprs->xbs", h, core.double().unflatten(1, (parts, r))).flatten(1)
    assert_close(y, torch.relu(h @ last.double().T + bias.double()), dtype)


def served(name: str, *args: object) -> None:
    """The implementation of an operator takes these arguments and agrees with the reference in float64."""
    y = IMPLEMENTATIONS[name, "cuda"](*args)
    assert isinstance(y, Tensor), f"{name} left it to the reference"
    double = [
        [t.double() for t in a]
        if isinstance(a, list) and isinstance(a[0], Tensor)
        else a.double()
        if isinstance(a, Tensor)
        else a
        for a in args
    ]
    reference = OPS.get(name).reference(*double)
    assert isinstance(reference, Tensor)
    assert_close(y, reference, torch.float32)


@runs_kernels
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("lanes", ["channels", "pixels"])
@pytest.mark.parametrize("stages", ["tucker2", "channel_svd", "input_svd", "pointwise"])
def test_conv_chain_on_cuda(stages: str, lanes: str) -> None:
    first, last = Stage(5, 3), Stage(4, 18)
    core = Stage(3, 4, kernel=(3, 2), stride=(2, 1), before=(1, 0), after=(1, 1))
    chain = {
        "tucker2": [first, core, last],
        "channel_svd": [core, last],
        "input_svd": [first, core],
        "pointwise": [first, Stage(3, 4), last],
    }[stages]
    x = normal(2, chain[0].inputs, 5, 6).contiguous(memory_format=torch.channels_last)
    weights = [stage.pack(normal(*stage.shape), lanes) for stage in chain]  # type: ignore[arg-type]
    served(
        "conv_chain",
        x,
        weights,
        normal(chain[-1].outputs),
        None,
        [n for stage in chain for n in stage.integers()],
        "gelu",
        lanes,
    )


@runs_kernels
@pytest.mark.usefixtures("here")
def test_linear_and_tensor_chain_on_cuda() -> None:
    widths = [33, 5, 17]
    weights = [stage.pack(normal(*stage.shape), "channels") for stage in layers_of(widths)]
    served("linear_chain", normal(2, 3, 33), weights, normal(17), normal(2, 3, 17), widths, "silu")
    outs, ins, bonds = (2, 3, 4), (3, 2, 5), (3, 2)
    steps = train_program(outs, ins, bonds)
    served(
        "tensor_chain",
        normal(3, 30),
        *_packed(steps),
        normal(3, 24),
        [n for step in steps for n in step.integers()],
        "relu",
    )
    steps = block_program(7, 4, 6, (2, 3, 5))
    served(
        "tensor_chain",
        normal(3, 24),
        *_packed(steps),
        None,
        [n for step in steps for n in step.integers()],
        "identity",
    )


def _packed(steps: Sequence[Step]) -> tuple[list[Tensor], Tensor]:
    return [
        step.pack(normal(step.a if step.batched else 1, step.k, step.o, step.r)) for step in steps
    ], normal(steps[-1].outputs)


@pytest.mark.usefixtures("here")
def test_what_the_kernels_do_not_cover_is_left_to_the_reference() -> None:
    grouped = Stage(4, 4, groups=2, kernel=(3, 3))
    x, weights = normal(1, 4, 5, 5), [grouped.pack(normal(*grouped.shape), "channels")]
    call = IMPLEMENTATIONS["conv_chain", "cuda"]
    assert call(x, weights, None, None, grouped.integers(), "relu", "channels") is NotImplemented
    assert call(x.double(), weights, None, None, Stage(4, 4).integers(), "relu", "channels") is NotImplemented
    three = [stage.pack(normal(*stage.shape), "channels") for stage in layers_of([4, 4, 4, 4])]
    assert (
        IMPLEMENTATIONS["linear_chain", "cuda"](x, three, None, None, [4, 4, 4, 4], "relu") is NotImplemented
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a device")
def test_without_a_device_it_says_why_and_leaves_everything() -> None:
    assert not gpu.available()
    assert "triton" in gpu.missing() or "CUDA" in gpu.missing()
    assert (
        IMPLEMENTATIONS["linear_chain", "cuda"](normal(1, 4), [], None, None, [4, 2, 4], "relu")
        is NotImplemented
    )


@needs_triton
def test_wrong_arguments_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from tdpass.kernels.gpu import language
    from tdpass.kernels.gpu.block_term_linear import block_term_linear
    from tdpass.kernels.gpu.svd_linear import svd_linear
    from tdpass.kernels.gpu.tt_linear import tt_linear
    from tdpass.kernels.gpu.tucker2_conv2d import tucker2_conv2d

    x = normal(2, 4)
    if DEVICE == "cpu" and not INTERPRETED:
        with pytest.raises(UnsupportedError, match="read CUDA tensors"):
            svd_linear(x, normal(1, 4), normal(4, 1))
    monkeypatch.setattr(language, "INTERPRETED", True)
    with pytest.raises(KernelError, match="activation 'tanh' is not known"):
        svd_linear(x, normal(1, 4), normal(4, 1), activation="tanh")
    with pytest.raises(KernelError, match="do not fit"):
        svd_linear(x, normal(1, 5), normal(4, 1))
    with pytest.raises(UnsupportedError, match=r"not in torch\.float64"):
        svd_linear(x.double(), normal(1, 4), normal(4, 1))
    with pytest.raises(KernelError, match="does not fit an output of 4"):
        svd_linear(x, normal(1, 4), normal(4, 1), normal(3))
    with pytest.raises(KernelError, match="come in pairs and with scales"):
        svd_linear(x, normal(1, 4).to(torch.float8_e4m3fn), normal(4, 1))
    with pytest.raises(KernelError, match="do not fit"):
        tucker2_conv2d(normal(1, 4, 3, 3), normal(2, 5), normal(3, 2, 1, 1), None)
    with pytest.raises(UnsupportedError, match="takes 2 to 4 cores"):
        tt_linear(x, [normal(1, 4, 4, 1)])
    with pytest.raises(UnsupportedError, match="over 256"):
        tt_linear(normal(1, 520), [normal(1, 2, 2, 1), normal(1, 2, 260, 1)])
    with pytest.raises(UnsupportedError, match="cannot hold"):
        block_term_linear(x, normal(300, 4), normal(1, 300, 2), normal(4, 2))


@needs_triton
def test_unpacked_weights_are_kept_until_the_weight_changes_or_goes() -> None:
    from tdpass.kernels.gpu.weights import rows_of

    weight = normal(3, 5)
    made = rows_of(weight, torch.float32)
    assert torch.equal(made, weight)
    assert made.stride(0) % 16 == 0
    assert rows_of(weight, torch.float32) is made
    weight.mul_(2)
    assert torch.equal(rows_of(weight, torch.float32), weight)
    weight.data = normal(3, 5)
    assert torch.equal(rows_of(weight, torch.float32), weight)
    gone = weakref.ref(rows_of(weight, torch.float32))
    del weight
    gc.collect()
    assert gone() is None
    with torch.inference_mode():
        untracked = normal(3, 5)
        rows_of(untracked, torch.float32)
        untracked.mul_(2)
        assert torch.equal(rows_of(untracked, torch.float32), untracked)


@needs_triton
def test_the_tuner_times_once_and_remembers_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdpass.kernels.gpu import tuning

    monkeypatch.setenv("TDPASS_CACHE", str(folder))
    x, runs = normal(1), []
    slow, fast, broken = {"m": 1}, {"m": 2}, {"m": 3}

    def run(config: tuning.Config) -> None:
        if config == broken:
            raise tuning.OutOfResources(1, 0, "shared memory")
        runs.append(config["m"])

    def timer(call: object) -> float:
        call()  # type: ignore[operator]
        return 2.0 / runs[-1]

    listed = [slow, fast, broken]
    assert tuning.choose("k", (1, "a"), x, lambda: listed, run) == slow, "nothing is timed without a device"
    assert not runs
    assert tuning.choose("k", (1, "a"), x, lambda: listed, run, timer) == fast
    path = tuning.cache_file(x.device)
    assert path.is_relative_to(folder)
    assert list(json.loads(path.read_text()).values()) == [fast]
    count = len(runs)
    for forget in (tuning._USED.clear, tuning._CHOICES.clear):
        forget()
    assert tuning.choose("k", (1, "a"), x, lambda: listed, run, timer) == fast
    assert len(runs) == count, "what is on disk is not timed again"
    path.write_text("{ damaged")
    tuning._USED.clear()
    tuning._CHOICES.clear()
    assert tuning.choose("k", (1, "a"), x, lambda: listed, run, timer) == fast
    with pytest.raises(UnsupportedError, match="no configuration"):
        tuning.choose("k", (2,), x, lambda: [broken, broken], run, timer)


@compiles
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_defaults_compile_for_a_device_that_is_not_here(
    capability: int, compiled_for: Callable[[int], Any]
) -> None:
    from tdpass.kernels.gpu import block_term_linear, svd_linear, tt_linear, tucker2_conv2d

    shared = compiled_for(capability).shared
    low = torch.bfloat16 if capability == 90 else torch.float16
    x = normal(512, 768, dtype=low)
    for rows in (8, 512):
        svd_linear.svd_linear(x[:rows], normal(160, 768), normal(64, 160), normal(64), None, "gelu")
    tt_linear.tt_linear(
        x, [normal(1, 32, 24, 4), normal(4, 48, 32, 1)], normal(1536), x[:, :1].expand(512, 1536), "silu"
    )
    block_term_linear.block_term_linear(
        x, normal(64, 32), normal(4, 24 * 16, 16), normal(64, 64), activation="relu"
    )
    how = {"padding": ((1, 1), (1, 1)), "stride": (2, 2)}
    tucker2_conv2d.tucker2_conv2d(
        normal(1, 64, 14, 14, dtype=low),
        normal(32, 64),
        normal(48, 32, 3, 3),
        normal(64, 48),
        normal(64),
        **how,
    )
    tucker2_conv2d.tucker2_conv2d(
        normal(1, 3, 14, 14, dtype=low), normal(32, 3), normal(48, 32, 3, 3), None, **how
    )
    tucker2_conv2d.tucker2_conv2d(
        normal(1, 24, 14, 14), normal(32, 24), normal(48, 32, 3, 3), normal(64, 48), precision="ieee", **how
    )
    if capability == 90:
        (v, sv), (u, su) = pack_weight(normal(48, 768)), pack_weight(normal(64, 48))
        v, u = v.view(torch.float8_e4m3fn), u.view(torch.float8_e4m3fn)
        svd_linear.svd_linear(
            x.to(torch.float8_e4m3fn), v, u, scales=svd_linear.Scales(torch.ones(()), sv, su)
        )
    assert shared.keys() == {"svd_kernel", "gemm_kernel", "tt_kernel", "block_kernel", "conv_kernel"}
    assert max(shared.values()) <= 99 << 10, "a default must fit every device of capability 8.0 and newer"


@on_device
def test_inside_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from tdpass.kernels.gpu.svd_linear import svd_linear

    monkeypatch.setenv("TDPASS_TUNE", "1")
    x, v, u = normal(64, 128, dtype=torch.float16), normal(32, 128), normal(48, 32)
    svd_linear(x, v, u)  # compiles and tunes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = svd_linear(x, v, u)
    x.copy_(normal(64, 128))
    graph.replay()
    assert torch.equal(y, svd_linear(x, v, u))
