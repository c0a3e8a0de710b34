"""Structured optimal brain surgery: removing input channels of a layer, the rest making up for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.formats.metric import Metric

MAX_WIDTH = 2400


@dataclass(frozen=True)
class Surgery:
    """Input channels in the order of their removal, and the squared error after each.

    The last one never leaves.
    """

    order: tuple[int, ...]
    errors: tuple[float, ...]

    def kept(self, keep: int) -> tuple[int, ...]:
        """The channels left when `keep` of them are."""
        return tuple(sorted(set(range(len(self.order))) - set(self.order[: len(self.order) - keep])))


def remove_channels(weight: Tensor, metric: Metric) -> Surgery:
    """Remove input channels one by one, each time the one that costs least in the metric.

    Removing the columns g of `W` costs `tr(G W_g (H_gg)^-1 W_g^T)` with `H = C^-1`, and the best update of
    the others is `W -= W_g (H_gg)^-1 H_g` (Hassibi and Stork 1993; in blocks, Frantar and Alistarh 2022).
    The mean input is not part of C, so the layer's bias must be shifted by the lost mean.
    """
    o, i = weight.shape[:2]
    block = weight[0, 0].numel()
    w = weight.double().reshape(o, -1).clone()
    inputs = torch.eye(i * block, dtype=torch.float64) if metric.inputs is None else metric.inputs.double()
    hessian = torch.diag(1 / inputs) if inputs.dim() == 1 else torch.linalg.inv(inputs)
    gw = w if metric.outputs is None else metric.outputs.double() @ w  # follows the same updates
    left = list(range(i))
    order: list[int] = []
    errors: list[float] = []
    spent = 0.0
    columns = torch.arange(i * block).reshape(i, block)
    while len(left) > 1:
        index = columns[left]
        blocks = hessian[index[:, :, None], index[:, None, :]]
        inverse = torch.linalg.inv(blocks)
        parts = w[:, index].permute(1, 0, 2)
        weighed = gw[:, index].permute(1, 0, 2)
        costs = torch.einsum("cob,cbd,cod->c", weighed, inverse, parts)
        best = int(costs.argmin())
        channel, g = left.pop(best), index[best]
        spent += float(costs[best])
        rows = inverse[best] @ hessian[g]
        gw -= gw[:, g] @ rows
        if gw is not w:
            w -= w[:, g] @ rows
        hessian -= hessian[:, g] @ rows
        w[:, g] = gw[:, g] = 0
        order.append(channel)
        errors.append(max(spent, 0.0))
    return Surgery((*order, *left), tuple(errors))


def keep_channels(weight: Tensor, metric: Metric, channels: Sequence[int]) -> Tensor:
    """The best weights `[o, kept, *kernel]` on those input channels.

    `W C_:S (C_SS)^-1`, least squares in the metric.
    """
    o, i = weight.shape[:2]
    kernel = weight.shape[2:]
    columns = torch.arange(weight[0].numel()).reshape(i, -1)[list(channels)].reshape(-1)
    w = weight.double().reshape(o, -1)
    if metric.inputs is None or metric.inputs.dim() == 1:
        return w[:, columns].reshape(o, len(channels), *kernel)
    c = metric.inputs.double()
    solved = torch.linalg.solve(c[columns][:, columns], (c[columns] @ w.T))
    kept: Tensor = solved.T.reshape(o, len(channels), *kernel)
    return kept.contiguous()
