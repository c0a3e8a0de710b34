"""Packing gives back the same bits, whatever the type, the sparsity, the levels and the shape."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tdpass.packing import pack, read_header, stored_size, unpack
from tdpass.packing.values import Kind

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


def pruned(shape: tuple[int, ...], density: float, dtype: torch.dtype, levels: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    keep = torch.rand(shape, generator=generator) < density
    index = (values * 2).round().clamp(-4, 4)
    index = torch.where(index == 0, torch.ones_like(index), index)
    made = {
        "raw": values,
        "multiples": index * torch.tensor(0.0371, dtype=dtype).double(),
        "wide": index * 0.0371,
        "powers": torch.randn(shape, generator=generator, dtype=torch.float64).sign()
        * 2.0 ** (-3 * index.abs()),
        "table": torch.tensor([-0.3, 0.11, 0.17, 0.9], dtype=torch.float64)[index.long() % 4],
        "one": torch.full_like(values, -0.7),
    }[levels]
    return torch.where(keep, made, torch.zeros_like(made)).to(dtype)


def checked(tensor: Tensor) -> bytes:
    block = pack(tensor)
    assert block is not None
    assert same_bits(unpack(block), tensor)
    return block


@pytest.mark.parametrize("levels", ["raw", "multiples", "wide", "powers", "table", "one"])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_sparsity_and_kind_of_level(dtype: torch.dtype, density: float, levels: str) -> None:
    tensor = pruned((40, 150), density, dtype, levels)
    if levels == "raw" and density == 1.0:
        assert pack(tensor) is None
        return
    assert len(checked(tensor)) < 0.75 * tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    "shape", [(6000,), (1, 6000), (6000, 1), (20, 1, 5, 5), (3, 1, 2, 3, 4, 5, 6), (33, 65), (2, 3000)]
)
@pytest.mark.parametrize("levels", ["raw", "multiples"])
def test_every_shape(shape: tuple[int, ...], levels: str) -> None:
    checked(pruned(shape, 0.1, torch.float32, levels))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(()),
        torch.empty(0),
        torch.empty(3, 0),
        torch.arange(9),
        torch.ones(2, dtype=torch.bool),
    ],
)
def test_scalars_empty_tensors_and_integers_stay_plain(tensor: Tensor) -> None:
    assert pack(tensor) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_stay_plain(value: float) -> None:
    tensor = torch.zeros(1000)
    tensor[3] = value
    assert pack(tensor) is None


def test_zeros_alone_and_a_single_survivor() -> None:
    assert len(checked(torch.zeros(500, 800))) < 20
    one = torch.zeros(500, 800)
    one[17, 400] = -0.25
    assert len(checked(one)) < 40


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zeros_are_kept_apart(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(50, 80) * (torch.rand(50, 80) < 0.1)).to(dtype)
    assert (tensor.double().signbit() & (tensor == 0)).any()
    checked(tensor)
    checked(-torch.zeros(50, 80, dtype=dtype))
    assert read_header(checked(tensor), "w")[0].survivors == int((tensor != 0).sum())


def test_extreme_numbers_survive() -> None:
    tensor = torch.zeros(40, 40)
    tensor[0, :4] = torch.tensor(
        [1e-45, -1e-45, torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny]
    )
    checked(tensor)
    checked(tensor.double() * 1e-300)


def test_tensors_that_are_not_contiguous() -> None:
    tensor = pruned((60, 40), 0.1, torch.float32, "raw")
    assert same_bits(unpack(checked(tensor.T)), tensor.T.contiguous())


@pytest.mark.parametrize(
    ("levels", "kinds"),
    [
        ("multiples", {Kind.MULTIPLES}),
        ("powers", {Kind.POWERS}),
        ("table", {Kind.TABLE}),
        ("raw", {Kind.RAW}),
    ],
)
def test_the_fitting_kind_is_chosen(levels: str, kinds: set[Kind]) -> None:
    assert read_header(checked(pruned((100, 200), 0.1, torch.float32, levels)), "w")[0].kind in kinds


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_with_a_scale_per_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256, dtype=torch.float64)
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(dtype).double()
    tensor = ((weight / scale).round() * scale + 0.0).to(dtype)
    block = checked(tensor)
    header = read_header(block, "w")[0]
    if dtype in {torch.float32, torch.float64}:
        assert (header.grouped, header.scales) == (True, 64)
        assert len(block) < 1.05 * tensor.numel()


def test_a_scale_that_is_no_number_of_the_type() -> None:
    tensor = pruned((60, 90), 0.2, torch.float32, "wide")
    header = read_header(checked(tensor), "w")[0]
    assert header.kind in {Kind.MULTIPLES, Kind.WIDE_MULTIPLES}


def test_sizes_are_counted_as_the_literature_does() -> None:
    tensor = pruned((100, 200), 0.1, torch.float32, "multiples")
    dense = torch.randn(30, 30)
    size = stored_size({"a": tensor, "b": dense, "again": tensor, "steps": torch.arange(3)})
    survivors, levels = int((tensor != 0).sum()), tensor[tensor != 0].unique().numel()
    assert levels == 8
    assert (size.weights, size.survivors, size.value_bits) == (20_000, survivors, 3 * survivors)
    assert size.weight_data_bytes == math.ceil(3 * survivors / 8)
    assert (size.dense_bytes, size.plain_bytes, size.true_bytes) == (80_000, 3600, len(checked(tensor)))
    raw = pruned((100, 200), 0.1, torch.float32, "raw")
    assert stored_size({"a": raw}).value_bits == 32 * int((raw != 0).sum())
    assert stored_size({}).true_bytes == 0
