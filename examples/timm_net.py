"""A network of timm, here without its published weights: compressed, saved, and loaded by its name.

pip install timm
python examples/timm_net.py resnet18
"""

from __future__ import annotations

import sys

import timm
import torch

import tdpass
from tdpass.sources import module_of


def main(name: str = "resnet18") -> None:
    """Compress to 60 % of the parameters on noise, which says nothing of accuracy."""
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False).eval()
    images = torch.randn(8, 3, 64, 64)
    artifact = tdpass.compress(net, {"params": 0.6}, images, effort="fast")
    artifact.report.model = f"timm:{name}"  # the command line writes it by itself
    artifact.save("timm.safetensors")
    loaded = tdpass.load("timm.safetensors", module_of(f"timm:{name}", pretrained=False)).eval()
    print(repr(artifact))
    print("loaded, largest difference", float((loaded(images) - artifact.model(images)).detach().abs().max()))


if __name__ == "__main__":
    main(*sys.argv[1:2])
