"""Transformer encoders (Vaswani et al. 2017), alone and on images as patches (Dosovitskiy et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.zoo.base import register_net


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network of four times the width.

    Each is followed by a residual sum and a layer-norm.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`x[n, tokens, width]`."""
        n, tokens, width = x.shape
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.view(n, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = self.norm1(x + self.out(h))
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


def encoder(width: int, heads: int, depth: int) -> nn.Sequential:
    """Encoder layers one after the other, for `[n, tokens, width]`."""
    return nn.Sequential(*(EncoderLayer(width, heads) for _ in range(depth)))


class VisionTransformer(nn.Module):
    """An encoder over the patches of a grey image, and a classifier on their mean.

    The image has `size` x `size` pixels; positions are learned.
    """

    def __init__(self, size: int, patch: int, width: int, heads: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.encoder = encoder(width, heads, depth)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, size, size]`."""
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        scores: Tensor = self.classifier(self.encoder(self.embed(patches) + self.positions).mean(1))
        return scores


@register_net(1, 28, 28)
def vision_transformer(classes: int = 10) -> nn.Module:
    """An untrained transformer of four layers of width 64 over patches of 4 x 4 pixels."""
    return VisionTransformer(28, 4, 64, 4, 4, classes)
