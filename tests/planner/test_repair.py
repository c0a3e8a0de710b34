"""Bias correction and refitting on a badly compressed network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdpass.form import Form
from tdpass.formats import FORMATS, Layer
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.divergence import Divergence
from tdpass.planner.repair import correct_biases, divergence_of, refit_last_factors


def _rank_one(module: nn.Module, images: Tensor) -> tuple[list, dict[str, Layer]]:  # type: ignore[type-arg]
    model = open_model(module, Batch((images,)))
    model.fold_batchnorm()
    layers = {}
    for site in model.sites():
        fmt = FORMATS.get("svd" if site.kind == "linear" else "channel_svd")
        layers[site.name] = Layer(
            site,
            Form(fmt.name, (1,)),
            fmt.factorize(model.weight(site.name), site, (1,)),
            model.bias(site.name),
        ).to(torch.float32)
    return [model.record(Batch((images[:24],))), model.record(Batch((images[24:],)))], layers


def test_each_repair_brings_the_network_closer(residual: nn.Module, images: Tensor) -> None:
    tapes, layers = _rank_one(residual, images)
    wish = Divergence("mse")
    divergence = wish.fit([wish.outputs(tape.play().finish()) for tape in tapes])
    before = divergence_of(tapes, layers, divergence)
    corrected = correct_biases(tapes, layers, layers)
    refitted, declined = refit_last_factors(tapes, corrected, 1e-3, corrected)
    assert not declined
    assert divergence_of(tapes, corrected, divergence) < before
    assert divergence_of(tapes, refitted, divergence) < divergence_of(tapes, corrected, divergence)


def test_corrected_biases_restore_the_mean_of_the_last_layer(residual: nn.Module, images: Tensor) -> None:
    tapes, layers = _rank_one(residual, images)
    corrected = correct_biases(tapes, layers, layers)
    with torch.no_grad():
        dense = torch.cat([tape.play().finish() for tape in tapes]).mean(0)
        ours = torch.cat([tape.play().fork(dict(corrected)).finish() for tape in tapes]).mean(0)
    assert torch.allclose(ours, dense, atol=1e-5)


def test_the_last_factor_is_the_least_squares_solution(residual: nn.Module, images: Tensor) -> None:
    tapes, layers = _rank_one(residual, images)
    only = {"head": layers["head"]}
    refitted, _ = refit_last_factors(tapes, only, 0.0, only)
    with torch.no_grad():
        index = tapes[0].site_calls["head"][0]
        x = torch.cat([tape.play().advance(index).input_of(index) for tape in tapes])
        target = torch.cat([tape.play().finish() for tape in tapes])
        z = torch.cat([x @ layers["head"].factors["v"].T, torch.ones(len(x), 1)], 1)
        solution = torch.linalg.lstsq(z.double(), target.double()).solution
        assert refitted["head"].bias is not None
        assert torch.allclose(refitted["head"].factors["u"].double(), solution[:1].T, atol=1e-4)
        assert torch.allclose(refitted["head"].bias.double(), solution[1], atol=1e-4)
