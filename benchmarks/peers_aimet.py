"""AIMET's greedy spatial SVD in a process of its own.

`benchmarks.peers` starts it and reads the rows it prints as JSON. The greedy search scores ten compression
ratios of each layer by the accuracy on the calibration images, then combines them.  It overshoots: asked for
0.8 of the multiply-adds it may return 0.64.  So it is asked for a fine ladder of ratios, which is cheap once
the scores are there, and the largest result within each budget counts.
"""

from __future__ import annotations

import importlib.machinery
import json
import logging
import os
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from benchmarks import cifar, peers
from benchmarks.results import Value

# AIMET imports torchvision for data sets and layers that these networks do not have, and its wheel needs
# CUDA;
# transformers, where installed, would look into the stand-in.
for _name in ("torchvision", "torchvision.transforms", "torchvision.datasets", "torchvision.ops"):
    _stand_in = mock.MagicMock()
    _stand_in.__spec__ = importlib.machinery.ModuleSpec(_name, None)
    sys.modules[_name] = _stand_in
sys.modules["transformers"] = None  # type: ignore[assignment]
logging.disable(logging.INFO)

LADDER = [Decimal(percent) / 100 for percent in range(98, 30, -2)]


def compress(dense: nn.Module, target: Decimal, scores: str | None) -> nn.Module:
    """One run of AIMET's compressor on the multiply-adds; `scores` is the file of an earlier run's search."""
    from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import SpatialSvdParameters

    inputs, labels = cifar.calibration(), cifar.data().calibration.targets

    def accuracy(model: nn.Module, iterations: int | None, use_cuda: bool = False) -> float:
        with torch.no_grad():
            return sum(
                float((model(x).argmax(1) == y).sum())
                for x, y in zip(inputs.split(128), labels.split(128), strict=True)
            ) / len(labels)

    greedy = GreedySelectionParameters(
        target_comp_ratio=target, num_comp_ratio_candidates=10, saved_eval_scores_dict=scores
    )
    automatic = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=[dense.conv1])
    model, _ = ModelCompressor.compress_model(
        dense,
        eval_callback=accuracy,
        eval_iterations=None,
        input_shape=(1, 3, 32, 32),
        compress_scheme=CompressionScheme.spatial_svd,
        cost_metric=CostMetric.mac,
        parameters=SpatialSvdParameters(SpatialSvdParameters.Mode.auto, automatic),
    )
    return model.eval()


def main() -> None:
    """`peers_aimet NETWORK BUDGET... [--finetune]`; prints one JSON object per budget."""
    name, finetune = sys.argv[1], "--finetune" in sys.argv
    budgets = [float(text) for text in sys.argv[2:] if text != "--finetune"]
    dense = cifar.load_resnet(name)
    full = cifar.macs(dense)
    start = time.perf_counter()
    found: dict[float, nn.Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        os.chdir(folder)  # AIMET writes its scores under the current folder
        scores = None
        for target in LADDER:
            model = compress(dense, target, scores)
            scores = str(Path(folder) / "data" / "greedy_selection_eval_scores_dict.pkl")
            found.setdefault(cifar.macs(model) / full, model)
    seconds = time.perf_counter() - start
    measured: dict[float, dict[str, Value]] = {}
    for budget in budgets:
        share = max((share for share in found if share <= budget), default=None)
        if share is not None:
            measured[share] = measured.get(share) or peers.measure(
                name, "aimet_spatial_svd", (budget, found[share], seconds), finetune
            )
            print(json.dumps({**measured[share], "budget_asked": budget}), flush=True)


if __name__ == "__main__":
    main()
