"""One process of a training run: `training_run.py FOLDER METHOD PARALLEL [STEPS]`.

Writes FOLDER/final-RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import tdpass
from tdpass.methods import Method, make_method
from tdpass.training.batches import Batches

METHODS = {
    "admm-tt": {
        "admm-tt": {"budget": {"params": 0.5}, "rounds": 4, "rho": {"geometric": {"start": 0.01, "end": 0.1}}}
    },
    "searches": {"admm-tt": {"ranks": {"2": {"cp": [6]}}, "rounds": 4, "rho": 0.1}},
    "batude": {"batude": {"budget": {"macs": 0.5}, "rounds": 4, "rho": 0.05, "metric": "fisher"}},
    "lc": {"lc": {"penalty": 1.0, "rounds": 4, "rho": {"geometric": {"start": 0.01, "end": 0.1}}}},
    "haloc": {"haloc": {"budget": {"macs": 0.5}, "warm": 1, "search": 3, "tune": 2, "ranks": 4}},
    "admm-nn": {
        "admm-nn": {
            "keep": 700,
            "bits_per_weight": 3,
            "prune": 3,
            "retrain": 1,
            "quantize": 2,
            "fix": 2,
            "rho": 0.05,
        }
    },
    "svd-training": {"svd-training": {"energy": 0.1, "sparse": 0.1, "factored": 1, "sparsify": 2, "tune": 2}},
    "cascaded-projection": {"cascaded-projection": {"width": 0.5, "rounds": 4}},
    "crossbar": {
        "crossbar": {
            "keep": 600,
            "weight_bits": 5,
            "admm": 4,
            "retrain": 2,
            "fix": 2,
            "noise": 0.1,
            "metric": "fisher",
            "rho": 0.05,
        }
    },
    "surgery": {
        "admm-nn": {
            "keep": 700,
            "bits_per_weight": 3,
            "prune": 4,
            "retrain": 2,
            "fix": 2,
            "quantize": 0,
            "metric": "fisher",
            "pruning": "surgery",
        }
    },
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    ]
    return nn.Sequential(*layers)


def data() -> Batches:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(256) % 4
    images = torch.randn(256, 1, 8, 8, generator=generator) * 0.5
    for index, label in enumerate(labels.tolist()):
        images[index, 0, (label // 2) * 4 : (label // 2) * 4 + 4, (label % 2) * 4 : (label % 2) * 4 + 4] += 1
    return Batches(images, labels, 32, change=lambda x, own: x + 0.05 * torch.randn(x.shape, generator=own))


def trained_by(method: Method) -> tdpass.Artifact:
    """What the method makes of the network on the data, without a control."""
    return tdpass.train(
        network(),
        data(),
        method,
        settings={"lr": 0.05},
        control=False,
        example_inputs=torch.zeros(2, 1, 8, 8),
    )


def train(
    folder: Path | None,
    method: str,
    parallel: str | None = None,
    resume: bool = False,
    every: int = 0,
    compiled: bool = False,
) -> tdpass.Artifact:
    return tdpass.train(
        network(),
        data(),
        METHODS[method],
        settings={
            "optimizer": "sgd",
            "lr": 0.05,
            "distill": 0.3,
            "average": 0.9,
            "compile": compiled,
            "rebuild": compiled,
        },
        pretrain=1,
        finetune=0 if make_method(METHODS[method]).final else 1,
        evaluate=lambda model: float(model(torch.ones(4, 1, 8, 8)).sum()),
        example_inputs=torch.zeros(2, 1, 8, 8),
        calibration=data().inputs[:64] if method in {"haloc", "cascaded-projection"} else None,
        folder=folder,
        resume=resume,
        parallel=parallel,
        checkpoint_every=every,
    )


def main() -> None:
    torch.set_num_threads(1)
    folder, method, parallel = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if parallel != "none":
        meeting = f"file://{folder.resolve()}/meeting"  # a port found free may be taken before it is used
        dist.init_process_group(
            "gloo",
            init_method=meeting,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    artifact = train(folder, method, None if parallel == "none" else parallel, resume=True, every=3)
    torch.save(artifact.model.state_dict(), folder / f"final-{os.environ.get('RANK', '0')}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
