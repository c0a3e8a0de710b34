"""Small transformers of several designs, with norms that are not what they were initialized to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tdpass

WIDTH = 16
TOKENS = 50


class Vision(nn.Module):
    """A vision transformer as timm's: patches, class token, positions, norms first, a head on the token."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.ModuleList(_Block(norm) for _ in range(2))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x)[:, 0])
        return y


class _Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def bert(**options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """A BERT that answers with its last states."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=TOKENS, max_position_embeddings=20)
    return _trained(BertModel(config, add_pooling_layer=False)), {"input_ids": _tokens()}


def llama(*, tied: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama whose head may be its table of tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(
        **sizes, num_key_value_heads=1, vocab_size=TOKENS, tie_word_embeddings=tied, use_cache=False
    )
    return _trained(LlamaForCausalLM(config)), {"input_ids": _tokens()}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """A GPT-2, whose linear layers hold `[in, out]` and whose head is its table of tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 20}
    config = GPT2Config(**sizes, vocab_size=TOKENS, bos_token_id=None, eos_token_id=None, use_cache=False)
    return _trained(GPT2LMHeadModel(config)), {"input_ids": _tokens()}


def tied_llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama whose head is its table of tokens."""
    return llama(tied=True)


def vision() -> tuple[nn.Module, Tensor]:
    """`Vision` with LayerNorm."""
    return _trained(Vision()), torch.randn(24, 3, 8, 8)


def vision_rms() -> tuple[nn.Module, Tensor]:
    """`Vision` with RMSNorm."""
    return _trained(Vision(lambda width: nn.RMSNorm(width, eps=1e-5))), torch.randn(24, 3, 8, 8)


def encoder(*, norm_first: bool = False) -> tuple[nn.Module, Tensor]:
    """torch's encoder, its attention opened, between two linear layers."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=norm_first)
    inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(nn.Linear(6, WIDTH), inner, nn.Linear(WIDTH, 3))
    return _trained(tdpass.open_attention(net)), torch.randn(24, 5, 6)


def encoder_norm_first() -> tuple[nn.Module, Tensor]:
    """torch's encoder with norms before each part."""
    return encoder(norm_first=True)


NETS: dict[str, Callable[[], tuple[nn.Module, object]]] = {
    net.__name__: net  # type: ignore[attr-defined]
    for net in (bert, gpt2, llama, tied_llama, vision, vision_rms, encoder, encoder_norm_first)
}


def _tokens() -> Tensor:
    return torch.randint(0, TOKENS, (24, 7), generator=torch.Generator().manual_seed(1))


def _trained(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        size = 0.3 if "norm" in name.lower() else 0.1 * float(parameter.detach().std())
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def answer(net: nn.Module, x: object) -> Tensor:
    """What a network returns, the first of several."""
    with torch.no_grad():
        y = net(**x) if isinstance(x, dict) else net(x)
    return y if isinstance(y, Tensor) else next(iter(y.values()))


def notes(artifact: tdpass.Artifact[nn.Module]) -> str:
    """What the first pass had to say."""
    return " ".join(artifact.report.passes[0].notes)
