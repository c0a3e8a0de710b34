"""Packed tensors against what their positions and values need at least."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tdpass.packing import pack, read_header
from tdpass.packing.stream import ONE, Reader, Scale, Writer, learned_symbols, weighed


def entropy(counts: np.ndarray) -> float:
    """Bytes of as many symbols at their own frequencies."""
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def floor_of(tensor: Tensor) -> float:
    flat = tensor.numpy().ravel()
    kept = flat[flat != 0]
    return entropy(np.array([kept.size, flat.size - kept.size])) + entropy(
        np.unique(kept, return_counts=True)[1]
    )


def layer(rows: int = 500, columns: int = 800, density: float = 0.008, levels: int = 4) -> Tensor:
    torch.manual_seed(0)
    index = (torch.randn(rows, columns) * 1.5).round().clamp(-levels, levels)
    keep = (torch.rand(rows, columns) < density) & (index != 0)
    return torch.where(keep, index * 0.041, 0.0)


@pytest.mark.parametrize("density", [0.0008, 0.008, 0.08])
def test_close_to_the_entropy_where_there_is_no_structure(density: float) -> None:
    tensor = layer(density=density)
    block = pack(tensor)
    assert block is not None
    assert len(block) <= 1.05 * floor_of(tensor) + 100
    assert len(block) <= 1.01 * floor_of(tensor) + 40


def test_empty_rows_and_columns_cost_next_to_nothing() -> None:
    tensor = layer(density=0.2)
    tensor[torch.rand(500) < 0.9] = 0
    tensor[:, torch.rand(800) < 0.7] = 0
    block = pack(tensor)
    assert block is not None
    assert len(block) < 0.65 * floor_of(tensor)


def test_rows_that_are_kept_whole_are_named() -> None:
    torch.manual_seed(0)
    tensor = torch.zeros(500, 800)
    rows, columns = torch.rand(500) < 0.1, torch.rand(800) < 0.3
    tensor[rows.nonzero(), columns.nonzero().T] = torch.tensor(0.5)
    block = pack(tensor)
    assert block is not None
    assert read_header(block, "w")[0].learning.named
    assert len(block) < 190


def test_uneven_rows_and_columns_cost_less_than_even_ones() -> None:
    torch.manual_seed(0)
    rates = (
        0.008
        * torch.distributions.Gamma(0.3, 0.3).sample((500, 1))
        * torch.distributions.Gamma(0.3, 0.3).sample((1, 800))
    )
    tensor = torch.where(torch.rand(500, 800) < rates, 0.1, 0.0)
    block = pack(tensor)
    assert block is not None
    assert len(block) < 0.75 * floor_of(tensor)


def test_the_coder_takes_integer_probabilities_as_they_are() -> None:
    frequencies = np.array([1, 100, 2**23, 7, ONE - 2**23 - 108])
    for symbol, frequency in enumerate(frequencies):
        known = np.full(3000, symbol)
        writer, scale = Writer(), Scale()
        writer.symbols(frequencies, known.size, known)
        scale.symbols(frequencies, known.size, known)
        written = writer.finish()
        assert abs(8 * len(written) - scale.bits) < 64, frequency
        assert (Reader(written).symbols(frequencies, known.size, None) == known).all()


def test_learned_symbols_of_one_kind_take_no_room() -> None:
    writer = Writer()
    learned_symbols(writer, 1, 1000, 4, np.zeros(1000, np.int64))
    assert writer.finish() == b""
    assert weighed(4, np.zeros(0, np.int64), (1, 2)) == (0.0, 0)
