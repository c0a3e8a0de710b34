"""Open embedding bags: the rows of a table of their own, which are a site, and their sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdpass.errors import UnsupportedError
from tdpass.layers.opening import Opener, opened, register_opener, why_computed

_MODES = ("sum", "mean")


class OpenEmbeddingBag(nn.Module):
    """An `nn.EmbeddingBag` that reads rows of an `nn.Embedding`, its `table`, and adds them.

    Takes and returns what the dense module does. `table` holds the very parameter of the dense module, and
    may be replaced by a factored one.
    """

    def __init__(self, dense: nn.EmbeddingBag) -> None:
        super().__init__()
        if reason := why_closed(dense):
            raise UnsupportedError(f"{reason}; leave this layer as it is")
        self.mode, self.padding_idx, self.include_last_offset = (
            dense.mode, dense.padding_idx, dense.include_last_offset,
        )  # fmt: skip
        count, width = dense.weight.shape
        self.table = nn.Embedding(count, width, padding_idx=dense.padding_idx, device="meta")
        self.table.weight = dense.weight
        self.train(dense.training)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, padding_idx={self.padding_idx}"

    def forward(
        self,
        input: Tensor,  # noqa: A002 - as torch names it
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """`[bags, width]` of numbers `[bags, n]`, or of `[numbers]` and where each bag of them begins."""
        if (offsets is None) != (input.dim() == 2):
            raise ValueError("input has to be 2D without offsets, or 1D with them")
        if per_sample_weights is not None and self.mode != "sum":
            raise NotImplementedError("per_sample_weights only goes with mode='sum'")
        rows = self.table(input)
        share = (
            torch.ones_like(rows[..., :1]) if per_sample_weights is None else per_sample_weights[..., None]
        )
        if self.padding_idx is not None:
            share = share * (input != self.padding_idx).to(share.dtype)[..., None]
        if offsets is None:
            return self._averaged((rows * share).sum(1), share.sum(1))
        bags = offsets.shape[0]
        begun = input.new_zeros(input.shape[0] + 1).index_add(0, offsets, input.new_ones(bags))
        bag = begun.cumsum(0)[:-1] - 1  # an empty bag begins where the next does

        def summed(values: Tensor) -> Tensor:
            sums = values.new_zeros(bags, values.shape[-1]).index_add(0, bag, values)
            return sums[:-1] if self.include_last_offset else sums  # what is behind the last is in no bag

        return self._averaged(summed(rows * share), summed(share))

    def _averaged(self, sums: Tensor, counts: Tensor) -> Tensor:
        return sums if self.mode == "sum" else sums / counts.clamp(min=1)


def why_closed(module: nn.EmbeddingBag) -> str:
    """Why an embedding bag cannot be opened; empty where it can."""
    if type(module) is not nn.EmbeddingBag:
        return f"only nn.EmbeddingBag itself is opened, this is {type(module).__name__}"
    if module.mode not in _MODES:
        return f"mode={module.mode!r} is no sum of rows, of which factors could be read"
    if module.max_norm is not None:
        return "it scales rows of its weight down while it runs (max_norm)"
    if module.sparse:
        return "it learns by sparse gradients (sparse=True)"
    return why_computed([module.weight])


register_opener(
    Opener(
        (nn.EmbeddingBag,),
        OpenEmbeddingBag,
        OpenEmbeddingBag,
        why_closed,
        frozenset({"embedding_bag"}),
        "open_embedding_bags",
    )
)


def open_embedding_bags(model: nn.Module) -> nn.Module:
    """A copy of the model in which every `nn.EmbeddingBag` reads the rows of an `nn.Embedding` and adds them.

    So training can factor its table; `compress` does so by itself where that pays. The copy computes the
    same from the same parameters; what cannot be opened stays, and `open_model(...).declined()` says why.
    """

    def make(_path: str, module: nn.Module) -> nn.Module | None:
        return (
            OpenEmbeddingBag(module)
            if isinstance(module, nn.EmbeddingBag) and not why_closed(module)
            else None
        )

    return opened(model, make, "open_embedding_bags")
