"""Families of networks of timm and transformers, small and from configurations, so that nothing is fetched.

timm needs torchvision, whose compiled operators do not load beside a torch for processors alone; no family
calls them, so their names are declared without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
_DETECTING = (
    "nms(Tensor dets, Tensor scores, float threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float threshold) -> Tensor",
    "roi_align(Tensor x, Tensor rois, float scale, SymInt h, SymInt w, int ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor x, Tensor rois, float scale, SymInt h, SymInt w) -> (Tensor, Tensor)",
    "ps_roi_align(Tensor x, Tensor rois, float scale, SymInt h, SymInt w, int ratio) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor x, Tensor rois, float scale, SymInt h, SymInt w) -> (Tensor, Tensor)",
    "deform_conv2d(Tensor x, Tensor weight, Tensor offset, Tensor mask, Tensor bias) -> Tensor",
)
_declared: list[torch.library.Library] = []


def available(library: str) -> str:
    """Why a library cannot be imported; empty where it is."""
    if library == "timm" and not _declared:
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in _DETECTING:
            with suppress(RuntimeError):  # where torchvision loaded before
                _declared[0].define(schema)
    try:
        importlib.import_module(library)
    except (ImportError, RuntimeError) as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Family:
    """A network and inputs for it, by name."""

    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return model.eval()

    return build


def _hugging_face(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
        return made.eval()

    return build


def _images() -> Inputs:
    return {"x": torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))}


def _tokens(*names: str) -> Callable[[], Inputs]:
    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randint(3, 200, (8, 16), generator=generator) for name in names}

    return inputs


def _sound() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_features": torch.randn(8, 80, 100, generator=generator),
        "decoder_input_ids": torch.randint(3, 200, (8, 6), generator=generator),
    }


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_WHISPER = {
    "vocab_size": 200,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 50,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
_T5 = {
    "vocab_size": 200, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "use_cache": False,
}  # fmt: skip
_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4)}

FAMILIES = {
    "ResNet": Family("timm", _timm("resnet18"), _images),
    "ConvNeXt": Family("timm", _timm("convnext_atto"), _images),
    "ViT": Family("timm", _timm("vit_tiny_patch16_224", img_size=64, depth=4), _images),
    "MobileNetV3": Family("timm", _timm("mobilenetv3_small_100"), _images),
    "EfficientNet": Family("timm", _timm("efficientnet_b0"), _images),
    "Swin": Family("timm", _timm("swin_tiny_patch4_window7_224", **_SWIN), _images),
    "BERT": Family(
        "transformers",
        _hugging_face("BertForSequenceClassification", "BertConfig", vocab_size=200, **_SMALL),
        _tokens("input_ids"),
    ),
    "GPT-2": Family(
        "transformers",
        _hugging_face(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=200, n_embd=64, n_layer=2, n_head=4, n_positions=32,
            use_cache=False,
        ),
        _tokens("input_ids"),
    ),
    "Llama": Family(
        "transformers",
        _hugging_face("LlamaForCausalLM", "LlamaConfig", vocab_size=200, use_cache=False, **_SMALL),
        _tokens("input_ids"),
    ),
    "T5": Family(
        "transformers",
        _hugging_face("T5ForConditionalGeneration", "T5Config", **_T5),
        _tokens("input_ids", "decoder_input_ids"),
    ),
    "Whisper": Family(
        "transformers", _hugging_face("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER), _sound
    ),
}  # fmt: skip
