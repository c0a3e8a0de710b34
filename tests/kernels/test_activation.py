"""What operators end with, as text: read, written, and understood alike in Python and in C++."""

from __future__ import annotations

import pytest
import torch
from setting import BOUNDS, CLAMPS, ENDINGS, MALFORMED

from tdpass.errors import KernelError
from tdpass.kernels.activation import Activation, activate, check_activation, clamp
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.stage import Stage


@pytest.mark.parametrize("text", [*ENDINGS, *CLAMPS])
def test_a_text_says_what_it_was_written_for(text: str) -> None:
    said = Activation.read(text)
    assert Activation.read(str(said)) == said
    assert str(said) == text


def test_clamps_that_have_a_name_are_called_by_it() -> None:
    assert (clamp(0, 6), clamp(0.0, None), clamp(None, None)) == ("relu6", "relu", "identity")
    assert clamp(None, 6) == "clamp(-inf,6.0)"


@pytest.mark.parametrize("text", MALFORMED)
def test_a_text_that_says_nothing_known_is_named_with_those_that_do(text: str) -> None:
    with pytest.raises(KernelError, match=r"is not known; it is one of identity, relu, .* clamp\(low,high\)"):
        check_activation(text)


def test_the_operators_understand_every_clamp() -> None:
    x = torch.tensor([*BOUNDS, 0.05, -0.7, 3e38])[:, None]
    one = Stage(1, 1).pack(torch.ones(1, 1, 1, 1), "channels")
    for text in CLAMPS:
        y = LINEAR_CHAIN.call(x, [one], None, None, [1, 1], text)
        assert torch.equal(y, activate(x, text)), text


def test_the_ends_of_a_clamp_that_are_the_wrong_way_round_give_the_upper_one() -> None:
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(activate(x, "clamp(1.0,-1.0)"), x.clamp(1.0, -1.0))
    assert torch.equal(activate(x, "clamp(1.0,-1.0)"), torch.full((9,), -1.0))
