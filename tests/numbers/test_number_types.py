"""What every number type promises of a tensor: its text, its size to the byte, and how far values move."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdpass.bits import pack_bits, unpack_bits
from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.numbers import NUMBERS, numbers_named
from tdpass.numbers.float8_e4m3 import Float8E4M3
from tdpass.numbers.integer import Integer
from tdpass.numbers.levels import Levels
from tdpass.ops import TorchOps

TEXTS = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8/tensor",
    "int8/9",
    "int8/zero",
    "int8/tensor/zero",
    "int4",
    "int4/6",
    "int4/3/zero",
    "int16",
    "int16/9/zero",
    "levels2",
    "levels5",
    "levels16",
    "levels256",
    "float8_e4m3",
    "float8_e4m3/tensor",
    "float8_e4m3/9",
]
SHAPES = [(5, 18), (4, 3, 3, 2), (3, 6, 3)]
each_text = pytest.mark.parametrize("text", TEXTS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def factor_of(shape: tuple[int, ...]) -> Tensor:
    """Rows of unlike size, one of them zero, none of them centred."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    return values * torch.tensor([0.0, *(10.0**n for n in range(shape[0] - 1))]).reshape(
        -1, *(1,) * (len(shape) - 1)
    )


def restored(text: str, factor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    numbers = numbers_named(text)
    return numbers.restore(TorchOps(), numbers.store(factor), tuple(factor.shape), dtype)


def test_every_number_type_is_tried() -> None:
    assert {numbers_named(text).name for text in TEXTS} == set(NUMBERS.names())


@each_text
def test_the_text_reads_back_alone_and_in_a_form(text: str) -> None:
    assert str(numbers_named(text)) == text
    assert numbers_named(str(numbers_named(text))) == numbers_named(text)
    form = Form("svd", (12,), (text, "int8"), "2:4")
    assert Form.parse(str(form)) == form


WRONG = [
    "int7",
    "int8/",
    "int8/0",
    "int8/tensor/64",
    "int8/zero/zero",
    "int8/-3",
    "float32/tensor",
    "int8/zero/64",
    "levels",
    "levels1",
    "levels300",
    "levels16/64",
    "float8",
    "float8_e4m3/0",
    "float8_e4m3/zero",
]


@pytest.mark.parametrize("text", WRONG)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"unknown number type|is not understood"):
        numbers_named(text)


def test_a_group_that_does_not_divide_a_channel_is_refused() -> None:
    with pytest.raises(PlanError, match="a channel holds 18 numbers"):
        numbers_named("int8/4").parts((5, 18))


@each_text
@each_shape
def test_a_factor_takes_the_bytes_that_are_said_in_memory_and_in_a_file(
    text: str, shape: tuple[int, ...], tmp_path
) -> None:
    numbers = numbers_named(text)
    held = numbers.store(factor_of(shape))
    assert {name: (tuple(part.shape), part.dtype) for name, part in held.items()} == {
        n: (p.shape, p.dtype) for n, p in numbers.parts(shape).items()
    }
    save_file(held, tmp_path / "it.safetensors")
    read = load_file(tmp_path / "it.safetensors")
    header = int.from_bytes((tmp_path / "it.safetensors").read_bytes()[:8], "little") + 8
    assert (
        sum(part.nbytes for part in held.values())
        == numbers.bytes(shape)
        == (tmp_path / "it.safetensors").stat().st_size - header
    )
    assert torch.equal(
        numbers.restore(TorchOps(), read, shape, torch.float32),
        restored(text, factor_of(shape), torch.float32),
    )
    values = math.ceil(numbers.bits * math.prod(shape) / 8)
    assert numbers.bytes(shape) == values + sum(
        part.nbytes for name, part in held.items() if name != "values"
    )


@each_text
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_moves_by_more_than_half_a_step(
    text: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    numbers, factor = numbers_named(text), factor_of(shape)
    found = restored(text, factor, dtype)
    assert found.dtype is dtype
    assert found.shape == factor.shape
    assert bool((found[0] == 0).all())  # the first row, and zero is stored exactly
    gap = (found.double() - factor.double()).abs()
    if isinstance(numbers, Integer):
        scale = numbers.store(factor)["scale"].double()[:, None]
        assert bool(
            (gap.reshape(len(scale), -1) <= scale * (1.0 if numbers.zero else 0.5) * (1 + 1e-6)).all()
        )
    elif isinstance(numbers, Levels):
        table = numbers.store(factor)["levels"].double()
        assert bool((gap <= (factor.double()[..., None] - table).abs().min(-1).values * (1 + 1e-6)).all())
    elif isinstance(numbers, Float8E4M3):
        scale = numbers.store(factor)["scale"].double()[:, None]
        step = 2.0**-3 * (factor.abs().reshape(len(scale), -1) / scale).log2().floor().clamp_min(-6).exp2()
        assert bool((gap.reshape(len(scale), -1) <= 0.5 * step * scale * (1 + 1e-6)).all())
    else:
        assert bool((gap <= factor.abs() * 2.0 ** {"bfloat16": -8, "float16": -11}.get(text, -25)).all())


def test_int8_per_channel_is_round_to_nearest_of_the_largest_in_127_steps() -> None:
    factor = torch.tensor([[127.0, -1.4, 0.6, 0.0], [-2.54, 0.013, 1.27, 0.0]])
    held = numbers_named("int8").store(factor)
    assert held["values"].tolist() == [[127, -1, 1, 0], [-127, 1, 64, 0]]
    assert held["scale"].tolist() == pytest.approx([1.0, 0.02])


def test_a_zero_point_covers_a_range_from_end_to_end() -> None:
    factor = torch.tensor([[0.0, 2.55, 1.0, 0.5]])
    held = numbers_named("int8/zero").store(factor)
    assert held["values"].tolist() == [[-128, 127, -28, -78]]
    assert held["zero"].tolist() == [-128]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_integers_come_out_of_their_bytes_as_they_went_in(bits: int, count: int, signed: bool) -> None:
    values = (torch.arange(count) * 5) % 2**bits - signed * 2 ** (bits - 1)
    packed = pack_bits(values, bits)
    assert packed.numel() == math.ceil(count * bits / 8)
    assert unpack_bits(packed, count, bits, signed=signed).tolist() == values.tolist()


def test_four_bits_lie_in_a_byte_as_onnx_stores_them() -> None:
    assert pack_bits(torch.tensor([1, -2, 7]), 4).tolist() == [1 | 14 << 4, 7]


@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_codebook_of_what_a_factor_holds_is_exact(count: int) -> None:
    table = torch.randn(count, generator=torch.Generator().manual_seed(2))
    factor = table[torch.arange(60) % count].reshape(6, 10)
    assert torch.equal(restored(f"levels{count}", factor, torch.float32), factor)


def test_a_codebook_of_few_levels_is_about_as_good_as_the_best() -> None:
    factor = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    error = float((restored("levels16", factor) - factor).square().mean())
    assert error < 1.03 * 0.009497  # Max 1960: the best quantizer of 16 levels of a normal distribution
