"""How the loss bends along pairs of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from tdpass.errors import UsageError

TEMPERATURE = 3.0  # a trained network is nearly certain: its probabilities as they are hardly bend
_ROOM = 2**26  # entries of the Jacobians held at once


@torch.no_grad()
def gauss_newton(model: nn.Module, inputs: Sequence[Tensor], entries: Mapping[str, Tensor]) -> Tensor:
    """Sum over samples of J^T (diag(p) - p p^T) J, `[n, n]`: J of the class scores by the chosen entries, p their softened probabilities.

    `entries` holds flat positions within parameters, by parameter name; n is their number and their order is kept.  `inputs` are
    the model's positional inputs, samples along axis 0; it is called in evaluation mode.  This is the Hessian of cross-entropy and of
    distillation at T = 3 without the curvature of the network itself (Schraudolph 2002).

    Raises `UsageError` where the model does not return class scores `[samples, classes]`.
    """
    training = model.training
    model.eval()
    try:
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        scores = model(*inputs)
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UsageError(f"curvature needs class scores [samples, classes], the model returned {found}; fix levels by nearest instead")
        moving = {name: parameters[name] for name in entries}

        def one(values: dict[str, Tensor], *sample: Tensor) -> Tensor:
            found: Tensor = functional_call(model, {**parameters, **values}, tuple(part[None] for part in sample))
            return found[0]

        jacobian = vmap(jacrev(one), in_dims=(None, *[0] * len(inputs)))
        size = sum(index.numel() for index in entries.values())
        total = scores.new_zeros(size, size)
        step = max(1, _ROOM // (scores.shape[1] * sum(value.numel() for value in moving.values())))
        for start in range(0, len(scores), step):
            part = [value[start : start + step] for value in inputs]
            by_name = jacobian(moving, *part)
            rows = torch.cat([by_name[name].flatten(2)[:, :, index] for name, index in entries.items()], 2)
            p = F.softmax(scores[start : start + step] / TEMPERATURE, 1)
            root = torch.diag_embed(p.sqrt()) - p.sqrt()[:, :, None] * p[:, None, :]
            bent = (root @ rows).flatten(0, 1)
            total.addmm_(bent.T, bent)
        return total
    finally:
        model.train(training)
