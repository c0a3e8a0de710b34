"""Layers of torch, as modules and as exported programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cell, Sizes, add, noise
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Alone(nn.Module):
    """One layer, called `layer`, of which the first output is returned."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *x: Tensor) -> Tensor:
        y = self.layer(*x)
        return y[0] if isinstance(y, tuple) else y


class Attended(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


class Decoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


class Cells(nn.Module):
    """A recurrent cell over the steps of a sequence."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.layer = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.layer(step, state)
        return state[0] if isinstance(state, tuple) else state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)))


class Conv1D(nn.Module):
    """A linear layer that stores its weight as [in, out], as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = 16, nn.Parameter(noise(24, 16)), nn.Parameter(noise(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Functional(nn.Module):
    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.w, self.call = nn.Parameter(noise(*shape)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w)


class Heads(nn.Module):
    """Projections that make, and read, an axis of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = nn.Parameter(noise(2, 8, 24)), nn.Parameter(noise(2, 8, 20, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bhso,hom->bms", torch.einsum("bsi,hoi->bhso", x, self.v), self.w)


class Branching(nn.Module):
    """Chooses a layer by what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(24, 16), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if float(x.sum()) > -1e9 else self.other(x)


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(24, 24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.tanh(x))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


class Weighed(nn.Module):
    """Reads its layer's weight beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer.weight.norm()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(noise(3, 24, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.w)


ROWS, TOKENS, STEPS = (4, 24), (2, 3, 24), (2, 3, 16)
LINE, IMAGE, VOLUME = (2, 8, 11), (2, 8, 7, 9), (2, 8, 5, 6, 4)
IDS = "ids"


def _tensors(fed: Sizes | str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    if isinstance(fed, str):
        return (torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1)),)
    return (noise(*fed, seed=1).to(dtype),)


def _exported(make: Callable[[], nn.Module], fed: tuple[Tensor, ...]) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of recurrent layers, whose lists of weights torch sees written to
        return torch.export.export(make().eval(), fed, strict=False)


def layer(
    name: str,
    make: Callable[[], nn.Module],
    fed: Sizes | str,
    sites: tuple[str, ...] = ("layer",),
    left: str = "",
    dtype: torch.dtype = torch.float32,
    exported: tuple[tuple[str, ...], str] | None = None,
) -> None:
    """A row: through the module, and through the exported program where something else is found there."""

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make().to(dtype).eval()

    def given() -> tuple[Tensor, ...]:
        return _tensors(fed, dtype)

    add(Cell(name, "torch", seeded, given, sites, left))
    if exported != ((), "-"):
        found, reason = (sites, left) if exported is None else exported
        add(Cell(name, "torch.export", lambda: _exported(seeded, given()), given, found, reason))


def projections(path: str) -> tuple[str, ...]:
    """What attention is divided into."""
    return tuple(path + part for part in ("query", "key", "value", "out_proj"))


def thirds(path: str) -> tuple[str, ...]:
    """The same where the exporter keeps the three in one weight."""
    return tuple(f"{path}in_proj_weight_layer.{part}" for part in range(3))


NOT_EXPORTED: tuple[tuple[str, ...], str] = ((), "-")
layer("Linear", lambda: Alone(nn.Linear(24, 16)), TOKENS)
layer("Linear without bias", lambda: Alone(nn.Linear(24, 16, bias=False)), ROWS)
layer("Conv1d", lambda: Alone(nn.Conv1d(8, 12, 3, padding=1)), LINE)
layer("Conv2d", lambda: Alone(nn.Conv2d(8, 12, 3, padding=1)), IMAGE)
layer("Conv3d", lambda: Alone(nn.Conv3d(8, 12, 3, padding=1)), VOLUME)
layer("Conv2d, strided and dilated", lambda: Alone(nn.Conv2d(8, 12, (3, 2), (2, 1), (0, 1), (1, 2))), IMAGE)
layer("Conv2d, grouped", lambda: Alone(nn.Conv2d(8, 12, 3, groups=2)), IMAGE)
layer("Conv2d, depthwise", lambda: Alone(nn.Conv2d(8, 16, 3, groups=8)), IMAGE)
layer("Conv2d, padding same", lambda: Alone(nn.Conv2d(8, 12, (4, 3), padding="same")), IMAGE)
layer(
    "Conv2d, padding reflected",
    lambda: Alone(nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="reflect")),
    IMAGE,
)
layer("ConvTranspose1d", lambda: Alone(nn.ConvTranspose1d(8, 6, 3, 2, 1)), LINE)
layer("ConvTranspose2d", lambda: Alone(nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1)), IMAGE)
layer("ConvTranspose3d", lambda: Alone(nn.ConvTranspose3d(8, 6, 3, 2)), VOLUME)
layer("ConvTranspose2d, grouped", lambda: Alone(nn.ConvTranspose2d(8, 6, 3, groups=2)), IMAGE)
layer(
    "LSTM",
    lambda: Alone(nn.LSTM(16, 8, batch_first=True)),
    STEPS,
    ("layer.input_l0", "layer.hidden_l0"),
)
layer(
    "LSTM, two layers both ways",
    lambda: Alone(nn.LSTM(16, 8, 2, bidirectional=True)),
    STEPS,
    tuple(
        f"layer.{part}_l{k}{end}" for k in (0, 1) for end in ("", "_reverse") for part in ("input", "hidden")
    ),
)
layer(
    "LSTM with projections",
    lambda: Alone(nn.LSTM(16, 8, proj_size=4)),
    STEPS,
    ("layer.input_l0", "layer.hidden_l0", "layer.project_l0"),
)
layer(
    "GRU",
    lambda: Alone(nn.GRU(16, 8)),
    STEPS,
    ("layer.input_l0", "layer.hidden_l0"),
)
layer(
    "RNN",
    lambda: Alone(nn.RNN(16, 8)),
    STEPS,
    ("layer.input_l0", "layer.hidden_l0"),
)
layer(
    "LSTMCell",
    lambda: Cells(nn.LSTMCell(16, 8)),
    STEPS,
    ("layer.input", "layer.hidden"),
)
layer(
    "GRUCell",
    lambda: Cells(nn.GRUCell(16, 8)),
    STEPS,
    ("layer.input", "layer.hidden"),
)
layer(
    "MultiheadAttention",
    Attended,
    STEPS,
    projections("layer."),
    exported=((*thirds("layer."), "layer.out_proj"), ""),
)
layer(
    "MultiheadAttention, other key sizes",
    lambda: Attended(kdim=16, vdim=16),
    STEPS,
    projections("layer."),
    exported=((*thirds("layer."), "layer.out_proj"), ""),
)
layer(
    "TransformerEncoderLayer",
    lambda: Alone(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)),
    STEPS,
    (*projections("layer.self_attn."), "layer.linear1", "layer.linear2"),
    exported=(
        (
            *thirds("layer.self_attn."),
            "layer.self_attn.out_proj",
            "layer.linear1",
            "layer.linear2",
        ),
        "",
    ),
)
layer(
    "TransformerDecoderLayer",
    Decoded,
    STEPS,
    (
        *projections("layer.self_attn."),
        *projections("layer.multihead_attn."),
        "layer.linear1",
        "layer.linear2",
    ),
    exported=(
        (
            *thirds("layer.self_attn."),
            "layer.self_attn.out_proj",
            "layer.multihead_attn.in_proj_weight.0",
            "layer.multihead_attn.in_proj_weight.1.0",
            "layer.multihead_attn.in_proj_weight.1.1",
            "layer.multihead_attn.out_proj",
            "layer.linear1",
            "layer.linear2",
        ),
        "",
    ),
)
layer(
    "Embedding",
    lambda: Alone(nn.Embedding(20, 16)),
    IDS,
)
layer("Embedding with padding", lambda: Alone(nn.Embedding(20, 16, padding_idx=0)), IDS)
layer(
    "Embedding that rescales",
    lambda: Alone(nn.Embedding(20, 16, max_norm=1.0)),
    IDS,
    (),
    "max_norm",
    exported=NOT_EXPORTED,
)
layer("Embedding tied to the head", Tied, IDS, ("head",))
layer("EmbeddingBag", lambda: Alone(nn.EmbeddingBag(20, 16)), IDS, ("layer.table",))
layer(
    "EmbeddingBag, sums with padding",
    lambda: Alone(nn.EmbeddingBag(20, 16, mode="sum", padding_idx=3)),
    IDS,
    ("layer.table",),
)
layer("EmbeddingBag, maxima", lambda: Alone(nn.EmbeddingBag(20, 16, mode="max")), IDS, (), "mode='max'")
layer("Bilinear", Paired, TOKENS, ("layer.first",))
layer("Conv1D as in GPT-2", lambda: Alone(Conv1D()), TOKENS)
layer(
    "x @ w",
    lambda: Functional(torch.matmul, 24, 16),
    TOKENS,
    (),
    "torch.export it",
    exported=(("w_layer",), ""),
)
layer(
    "functional linear",
    lambda: Functional(F.linear, 16, 24),
    TOKENS,
    (),
    "torch.export it",
    exported=(("w_layer",), ""),
)
layer(
    "functional convolution",
    lambda: Functional(F.conv2d, 12, 8, 3, 3),
    IMAGE,
    (),
    "several matrices",
    exported=(("w_layer",), ""),
)
layer(
    "Einsum",
    lambda: Functional(partial(torch.einsum, "bsi,io->bos"), 24, 16),
    TOKENS,
    (),
    "torch.export it",
    exported=(("w_layer",), ""),
)
layer(
    "Einsum into heads and out of them",
    Heads,
    TOKENS,
    (),
    "several matrices",
    exported=(("v_layer", "w_layer"), ""),
)
layer("chosen by a branch", Branching, ROWS, ("one",), "not called when", exported=NOT_EXPORTED)
layer("called three times", Repeated, (4, 16))
layer("its weight also read", Weighed, ROWS, (), "also read by")
layer(
    "weight_norm",
    lambda: Alone(parametrizations.weight_norm(nn.Linear(24, 16))),
    ROWS,
)
layer(
    "spectral_norm",
    lambda: Alone(parametrizations.spectral_norm(nn.Conv2d(8, 12, 3))),
    IMAGE,
)
layer("spectral_norm of a table", lambda: Alone(parametrizations.spectral_norm(nn.Embedding(20, 16))), IDS)
layer("float16", lambda: Alone(nn.Linear(24, 16)), TOKENS, dtype=torch.float16)
layer("bfloat16", lambda: Alone(nn.Conv2d(8, 12, 3)), IMAGE, dtype=torch.bfloat16)
layer("float64", lambda: Alone(nn.Linear(24, 16)), TOKENS, dtype=torch.float64)
layer("matrices of experts", Experts, ROWS, (), "several matrices")
