"""Factors are as good as those of TensorLy and NumPy at the same ranks, in the plain norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly
import torch
from numpy.typing import NDArray
from tensorly.decomposition import parafac, partial_tucker, tensor_ring, tensor_train
from torch import Tensor

from tdpass.formats import FORMATS, Metric, Rank
from tdpass.site import Site

Array = NDArray[np.float64]

# TensorLy warns when a rank is larger than a mode, which CP of a 3x3 kernel always meets.
pytestmark = pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs:UserWarning")

LINEAR = Site("linear", "linear", (48, 60))
CONV = Site("conv", "conv", (24, 20, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


def trained(site: Site) -> Tensor:
    """A weight whose spectra decay in every mode."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(site.shape, dtype=torch.float64, generator=generator)
    for axis, size in enumerate(site.shape):
        basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
        decay = torch.arange(1, size + 1, dtype=torch.float64) ** -0.7
        weight = torch.tensordot(weight, basis * decay, dims=([axis], [1])).movedim(-1, axis)
    return weight


def our_error(name: str, site: Site, rank: Rank) -> float:
    form, weight = FORMATS.get(name), trained(site)
    return Metric().relative_error(weight, form.reconstruct(form.factorize(weight, site, rank), site))


def error(tensor: Array, approximation: Array) -> float:
    return float(np.linalg.norm(tensor - approximation) / np.linalg.norm(tensor))


@pytest.mark.parametrize("rank", [1, 7, 30, 48])
def test_svd_equals_the_truncated_svd_of_numpy(rank: int) -> None:
    weight = trained(LINEAR).numpy()
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank]
    form = FORMATS.get("svd")
    ours = form.reconstruct(form.factorize(torch.from_numpy(weight), LINEAR, (rank,)), LINEAR)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("rank", [(4, 4), (10, 6), (6, 14), (20, 18)])
def test_tucker2_is_as_good_as_partial_tucker(rank: Rank) -> None:
    weight = trained(CONV).numpy()
    result = partial_tucker(weight, rank=list(rank), modes=[0, 1], n_iter_max=50)
    core, factors = result[0]
    theirs = error(weight, tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1]))
    assert our_error("tucker2", CONV, rank) <= 1.02 * theirs


@pytest.mark.parametrize("rank", [(3, 5), (8, 8), (20, 12)])
def test_tensor_train_of_a_convolution_equals_tt_svd(rank: Rank) -> None:
    tensor = trained(CONV).permute(1, 2, 3, 0).reshape(CONV.i, 9, CONV.o).numpy()
    theirs = error(tensor, tensor_train(tensor, [1, *rank, 1]).to_tensor())
    assert our_error("tensor_train", CONV, rank) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("rank", [(3, 4, 4, 3), (5, 10, 12, 4)])
def test_tensor_train_of_a_convolution_with_split_channels_equals_tt_svd(rank: Rank) -> None:
    tensor = trained(CONV).reshape(4, 6, 5, 4, 9).permute(2, 3, 4, 0, 1).numpy()
    theirs = error(tensor, tensor_train(tensor, [1, *rank, 1]).to_tensor())
    assert our_error("tensor_train", CONV, rank) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("rank", "o", "i"), [((9,), (8, 6), (6, 10)), ((30,), (8, 6), (6, 10)), ((5, 6), (4, 4, 3), (3, 4, 5))]
)
def test_tensor_train_of_a_linear_layer_equals_tt_svd(
    rank: Rank, o: tuple[int, ...], i: tuple[int, ...]
) -> None:
    d = len(o)
    order = [axis for k in range(d) for axis in (k, d + k)]
    tensor = (
        trained(LINEAR)
        .reshape(*o, *i)
        .permute(order)
        .reshape([a * b for a, b in zip(o, i, strict=True)])
        .numpy()
    )
    theirs = error(tensor, tensor_train(tensor, [1, *rank, 1]).to_tensor())
    assert our_error("tensor_train", LINEAR, rank) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("rank", [4, 12, 40])
def test_cp_is_as_good_as_parafac(rank: int) -> None:
    weight = trained(CONV).numpy()
    theirs = error(
        weight,
        parafac(weight, rank, init="svd", n_iter_max=60, tol=0, random_state=0, l2_reg=1e-10).to_tensor(),
    )
    assert our_error("cp", CONV, (rank,)) <= 1.03 * theirs


@pytest.mark.parametrize("rank", [(2, 2, 2, 2), (2, 4, 3, 4), (3, 3, 3, 3)])
def test_tensor_ring_is_better_than_tr_svd(rank: Rank) -> None:
    o, i = (6, 8), (10, 6)
    tensor = trained(LINEAR).reshape(*o, *i).permute(2, 3, 0, 1).numpy()
    theirs = error(tensor, tensor_ring(tensor, [*rank, rank[0]]).to_tensor())
    assert our_error("tensor_ring", LINEAR, rank) <= theirs


@pytest.mark.parametrize("rank", [(2, 4, 4), (4, 3, 4), (2, 10, 8)])
def test_block_terms_are_better_than_one_tucker2_of_the_same_size(rank: Rank) -> None:
    """What a block-diagonal core is for: wider outer factors at the price of a narrower core."""
    params = FORMATS.get("block_term").cost(CONV, rank).params
    tucker2 = FORMATS.get("tucker2")
    ratio = CONV.i / CONV.o
    sizes = [(r, max(1, round(r * ratio))) for r in range(1, CONV.o + 1)]
    largest = max((size for size in sizes if tucker2.cost(CONV, size).params <= params), key=math.prod)
    assert our_error("block_term", CONV, rank) <= our_error("tucker2", CONV, largest)
