"""What `pack` leaves out of a sparse weight."""

from __future__ import annotations

import pytest
import torch
from cases import sparse_weight

from tdpass.errors import KernelError
from tdpass.kernels.blocks import CYCLES, pack, unpack


@pytest.mark.parametrize("width", CYCLES)
def test_packing_loses_nothing(width: int) -> None:
    for shape in ((1, 1), (33, 17), (20, 3, 3, 3)):
        weight = sparse_weight(*shape)
        assert torch.equal(unpack(pack(weight, width), shape), weight)


def test_removed_rows_and_columns_take_no_blocks() -> None:
    weight = torch.randn(40, 30)
    weight[3::2], weight[:, ::3] = 0, 0
    kept_rows, kept_columns = 3 + 18, 20
    blocks = pack(weight, 16)
    assert len(blocks.values) == -(-kept_rows // 16) * kept_columns


def test_the_width_follows_the_pattern() -> None:
    torch.manual_seed(0)
    whole = torch.randn(64, 64)
    assert pack(whole * (torch.rand(4, 64) < 0.3).repeat_interleave(16, 0)).width == 16
    assert pack(whole * (torch.rand(16, 64) < 0.3).repeat_interleave(4, 0)).width == 4
    assert pack(whole * (torch.rand(64, 64) < 0.05)).width == 1
    assert pack(whole).width == 16


def test_few_positions_take_wider_blocks() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256) * (torch.rand(256, 256) < 0.1)
    assert pack(weight, positions=1).width == 4
    assert pack(weight, positions=128).width == pack(weight).width == 1


def test_an_unknown_width_is_refused() -> None:
    with pytest.raises(KernelError, match="16, 8, 4, 1"):
        pack(torch.ones(4, 4), 3)
