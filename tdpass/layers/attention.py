"""Open attention: modules whose query, key and value are slices of one parameter, each a linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.errors import UnsupportedError, UsageError
from tdpass.layers.opening import Opener, linear, opened, register_opener, why_computed
from tdpass.layers.parallel import Parallel


class OpenAttention(nn.Module):
    """An `nn.MultiheadAttention` that calls linear layers.

    Takes and returns what the dense module does, nested tensors excepted. `query`, `key` and `value` hold
    what were slices of its `in_proj_weight` `[3 E, E]` and its bias, `out_proj` the very parameters of the
    dense module.  Any of them may be replaced by a factored layer.
    """

    # what torch's encoder layers read to choose their path: one that reads no weights
    _qkv_same_embed_dim = False
    in_proj_weight = in_proj_bias = None

    def __init__(self, dense: nn.MultiheadAttention) -> None:
        super().__init__()
        reason = why_closed(dense)
        if reason:
            raise UnsupportedError(f"{reason}; leave this layer as it is")
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = (
            dense.embed_dim,
            dense.num_heads,
            dense.dropout,
            dense.batch_first,
        )
        self.query, self.key, self.value = _layers(_weights(dense), dense.in_proj_bias)
        out: Any = dense.out_proj
        self.out_proj = linear(out.weight, out.bias)
        self.train(dense.training)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, where asked for, the attention weights.

        `is_causal` only says what `attn_mask` is.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch says it
        alone = query.dim() == 2
        sample = 0 if alone or self.batch_first else 1
        given = [x.unsqueeze(0) if alone else x.transpose(0, sample) for x in (query, key, value)]
        q, k, v = (
            self._heads(layer(x)) for layer, x in zip((self.query, self.key, self.value), given, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = F.dropout(
                (scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training
            )
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if alone else weights
        return (y.squeeze(0) if alone else y.transpose(0, sample)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """`[samples, heads, positions, width]` of `[samples, positions, E]`."""
        return x.reshape(*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads).transpose(1, 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores; True in a mask of booleans stands for minus infinity."""
        masks = []
        if attention is not None:  # [positions, positions], or that of every sample's every head
            each = (like.shape[0], self.num_heads) if attention.dim() == 3 else ()
            masks.append(_added(attention, like).reshape(*each, *attention.shape[-2:]))
        if padding is not None:  # [samples, positions], or [positions] of a single sample
            masks.append(_added(padding, like).reshape(like.shape[0], 1, 1, -1))
        return sum(masks[1:], masks[0]) if masks else None


def why_closed(module: nn.MultiheadAttention) -> str:
    """Why an attention module cannot be opened; empty where it can."""
    if type(module) is not nn.MultiheadAttention:
        return f"only nn.MultiheadAttention itself is opened, this is {type(module).__name__}"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv, add_zero_attn)"
    held = (
        [module.in_proj_weight]
        if module._qkv_same_embed_dim
        else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    )
    return why_computed(held)


register_opener(
    Opener(
        (nn.MultiheadAttention,),
        OpenAttention,
        OpenAttention,
        why_closed,
        frozenset({"multi_head_attention_forward"}),
        "open_attention",
    )
)


def open_attention(model: nn.Module, fused: Sequence[str] = ()) -> nn.Module:
    """A copy of the model in which query, key and value are linear layers of their own.

    Training can then factor each. `compress` does so by itself where that pays. Opens every
    `nn.MultiheadAttention`, those of torch's encoder and decoder layers among them, and the `nn.Linear`
    layers with three projections in one whose names fit a glob of `fused`.  The copy computes the same with
    as many parameters.  Raises `UsageError` for a glob that fits no linear layer whose outputs divide by 3.
    """
    fits: set[str] = set()

    def make(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.MultiheadAttention):
            return None if why_closed(module) else OpenAttention(module)
        asked = [glob for glob in fused if fnmatchcase(path, glob)]
        if not asked or type(module) is not nn.Linear or module.out_features % 3:
            return None
        fits.update(asked)
        return Parallel([*_layers(module.weight.chunk(3), module.bias)], [module.out_features // 3] * 3)

    made = opened(model, make, "open_attention")
    missing = [glob for glob in fused if glob not in fits]
    if missing:
        raise UsageError(
            f"fused={missing[0]!r} fits no nn.Linear whose outputs divide by 3; give the names of layers "
            "that make query, key and value"
        )
    for module in made.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(part, OpenAttention) for part in module.modules()
        ):
            module.enable_nested_tensor = module.use_nested_tensor = False  # that path reads weights
    return made


def _weights(dense: nn.MultiheadAttention) -> Sequence[Tensor]:
    if dense._qkv_same_embed_dim:
        return dense.in_proj_weight.chunk(3)
    return dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight


def _layers(weights: Sequence[Tensor], bias: Tensor | None) -> list[nn.Linear]:
    """A linear layer of each weight with its third of the bias, in parameters of their own."""
    biases: Sequence[Tensor | None] = (None,) * 3 if bias is None else bias.chunk(3)
    return [
        linear(_own(weight), None if part is None else _own(part))
        for weight, part in zip(weights, biases, strict=True)
    ]


def _own(part: Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach().clone(), requires_grad=part.requires_grad)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    return (
        torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
        if mask.dtype is torch.bool
        else mask.to(like.dtype)
    )
