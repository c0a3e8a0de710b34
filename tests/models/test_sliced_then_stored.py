"""Networks that were sliced and then factored or quantized: what is saved loads on the dense class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import mostly_slow
from torch import nn
from transformers_small import answer, bert, encoder, encoder_norm_first, gpt2, llama, vision

import tdpass

NETS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    each.__name__: each for each in (bert, encoder, encoder_norm_first, gpt2, llama, vision)
}
SLICED = ("slice-residual{keep=0.75}", "slice-heads{keep=0.5}")
STORED = ("quantize", "plan{params=0.5},factorize", "plan{params=0.4},factorize,quantize")


@pytest.mark.parametrize(
    ("name", "sliced", "stored"),
    mostly_slow(
        [*product(NETS, SLICED, STORED)],
        [("encoder_norm_first", SLICED[0], STORED[2]), ("encoder", SLICED[1], STORED[0])],
    ),
)
def test_what_is_saved_answers_as_before(name: str, sliced: str, stored: str, tmp_path: Path) -> None:
    net, x = NETS[name]()
    made = tdpass.compress(
        net, data=x, pipeline=f"{sliced},{stored}", strict=False, progress=False, cache=False
    )
    made.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", copy.deepcopy(net))
    assert torch.equal(answer(loaded, x), answer(made.model, x))
