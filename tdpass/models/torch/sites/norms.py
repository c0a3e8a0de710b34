"""Folding the batch-norms of a torch module into the layers they follow.

It is done where a recorded run proves that this changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from tdpass.models.torch.modules.in_place import become, can_become, watched
from tdpass.models.torch.sites.readers import Run
from tdpass.models.torch.sites.sites import Matched
from tdpass.tape import Call, Ref

BatchNorm = nn.modules.batchnorm._BatchNorm


class Folded(nn.Identity):
    """What stays of a batch-norm that became part of the layer before it.

    Its attributes (`eps`, `num_features`) remain.
    """


@dataclass(frozen=True)
class Fold:
    """A batch-norm right behind the only call of a layer, and why it cannot be folded ('' where it can)."""

    matched: Matched
    norm: Any
    path: str
    reason: str

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that it writes to."""
        return self.norm, self.matched.modules[0]

    def apply(self) -> Matched:
        """Make the layer's weight and bias those of both, in new parameters; returns the layer as it is now.

        `W' = s W`, `b' = s (b - mean) + beta` with `s = gamma / sqrt(var + eps)`.
        """
        layer: Any = self.matched.modules[0]
        norm, weight, bias = self.norm, self.matched.weight, layer.bias
        with torch.no_grad():
            scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight.double()
            shift = (
                -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
            )
            shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
            scaled = self.matched.stored(
                self.matched.dense().double() * scale.reshape(-1, *(1 for _ in weight.shape[1:]))
            )
        layer._parameters["weight"] = nn.Parameter(scaled.to(weight), requires_grad=weight.requires_grad)
        layer._parameters["bias"] = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
        become(norm, Folded())
        site = replace(self.matched.site, bias=True)
        return replace(self.matched, site=site, weight=layer.weight, biases=(layer.bias,))


def batchnorms(module: nn.Module) -> dict[nn.Module, str]:
    """The batch-norms that hold statistics, each with its name."""
    return {
        norm: path
        for path, norm in module.named_modules()
        if isinstance(norm, BatchNorm) and norm.running_mean is not None
    }


def find_folds(module: nn.Module, sites: Mapping[str, Matched], run: Run) -> list[Fold]:
    """Every batch-norm that reads what a site's layer answers, in the order of the run."""
    norms = {id(norm.running_mean): (norm, path) for norm, path in batchnorms(module).items()}
    holders = Counter(
        id(tensor)
        for part in module.modules()
        for tensor in (*part._parameters.values(), *part._buffers.values())
        if tensor is not None
    )
    found: list[Fold] = []
    for name, places in run.tape.site_calls.items():
        if name not in sites:
            continue
        place, norm, path = _norm_after(run, places, norms)
        if norm is not None:
            reasons = (
                *_of_run(run, places, place, sites[name], norm),
                *_of_modules(module, sites[name], norm, holders),
            )
            found.append(Fold(sites[name], norm, path, next((text for wrong, text in reasons if wrong), "")))
    return found


def same_answers(one: object, other: object) -> bool:
    """Whether two answers of a model are the same but for rounding in their own precision."""
    ours, theirs = tree_leaves(one), tree_leaves(other)
    return len(ours) == len(theirs) and all(
        _close(a, b) if isinstance(a, Tensor) else True for a, b in zip(ours, theirs, strict=True)
    )


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return one.shape == other.shape
    level = float(other.detach().nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0
    share = max(1e-4, 16 * torch.finfo(one.dtype).eps)
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=share, atol=share * level, equal_nan=True
    )


def _norm_after(
    run: Run, places: Sequence[int], norms: Mapping[int, tuple[nn.Module, str]]
) -> tuple[int, Any, str]:
    """The first call of a batch-norm that reads one of these calls' results, the batch-norm and its name."""
    for place in places:
        number = next(run.tape.calls[place].writes())
        for reader in run.tape.readers(number):
            call = run.tape.calls[reader]
            if call.func is F.batch_norm and call.args[0] == Ref(number) and id(call.args[1]) in norms:
                return reader, *norms[id(call.args[1])]
    return 0, None, ""


def _of_run(
    run: Run, places: Sequence[int], place: int, matched: Matched, norm: Any
) -> tuple[tuple[bool, str], ...]:
    layer, call = run.tape.calls[places[0]], run.tape.calls[place]
    number = next(layer.writes())
    own = {
        name: tensor
        for name, tensor in (("weight", matched.weight), ("bias", matched.biases[0]))
        if tensor is not None
    }
    return (
        (len(places) != 1 or len(matched.modules) != 1, "its layer is called or held more than once"),
        (
            run.entered[id(norm)] != 1 or run.entered[id(matched.modules[0])] != 1,
            "it or its layer is called by another way than the module",
        ),
        (
            len(run.tape.readers(number)) != 1 or run.tape.is_output(number),
            "what its layer answers is also read elsewhere",
        ),
        (_on_another_axis(layer, matched), "it normalises another axis than the one its layer writes"),
        (bool(call.kwargs["training"]), "it normalises by the statistics of the batch"),
        *(
            (run.readers(tensor) != [places[0]], f"its layer's {what} is also read elsewhere")
            for what, tensor in own.items()
        ),
        *(
            (run.readers(tensor) != [place], f"its {what} is also read elsewhere")
            for what, tensor in _tensors(norm).items()
        ),
    )


def _on_another_axis(layer: Call, matched: Matched) -> bool:
    """Batch-norm is on axis 1.

    A linear layer writes the last one, a convolution the one before its positions.
    """
    return len(layer.shapes[1]) != 2 + matched.site.axes


def _of_modules(
    module: nn.Module, matched: Matched, norm: Any, holders: Mapping[int, int]
) -> tuple[tuple[bool, str], ...]:
    layer = matched.modules[0]
    held = [matched.weight, matched.biases[0], *_tensors(norm).values()]
    return (
        (type(norm).forward is not BatchNorm.forward, f"{type(norm).__name__} overrides forward"),
        (parametrize.is_parametrized(norm), "its weight is parametrized"),
        (not can_become(norm, Folded), f"{type(norm).__name__} has __slots__"),
        (matched.transposed, "its layer stores its weight as [in, out]"),
        (
            any(holders[id(tensor)] != 1 for tensor in held if tensor is not None),
            "its tensors, or those of its layer, are shared with another module",
        ),
        (bool(watched(norm)), watched(norm)),
        (bool(watched(layer)), f"its layer: {watched(layer)}"),
        (norm.training and not module.training, "it is in training mode, the model is not"),
    )


def _tensors(norm: Any) -> dict[str, Tensor]:
    named = {
        "weight": norm.weight,
        "bias": norm.bias,
        "running mean": norm.running_mean,
        "running variance": norm.running_var,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}
