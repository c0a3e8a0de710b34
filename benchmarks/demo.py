"""The whole job on a small scale.

Train a network on handwritten digits, compress it, check it, write everything down.

    make demo          # or: python -m benchmarks.demo [--out out/demo]

The digits come with tdpass.  The network is compressed to 35 % of its multiply-adds as a torch module; then
its dense ONNX export is compressed by the same plan, and the two results and the original are held against
each other. Exits with 1 if they disagree.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from tdpass.cli import main as tdpass_command
from tdpass.datasets import open_dataset
from tdpass.zoo import digits_net

BUDGET = 0.35
AGREEMENT = 1e-4  # largest relative difference between the torch and the ONNX result
WORST_LOSS = 3.0  # percentage points of accuracy that compression may cost


def train(images: Tensor, classes: Tensor, epochs: int = 12) -> nn.Module:
    """A trained network in evaluation mode."""
    torch.manual_seed(0)
    model, generator = digits_net(), torch.Generator().manual_seed(0)
    steps = epochs * -(-len(images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: nn.Module, images: Tensor) -> onnx.ModelProto:
    """The network as an ONNX model whose batch size is free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own dependencies
        program = torch.onnx.export(
            model,
            (images[:8],),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
        )
    return program.model_proto


def run_torch(model: nn.Module, images: Tensor) -> Tensor:
    """Class scores of a torch model."""
    with torch.inference_mode():
        return model(images)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """Class scores of an ONNX file in ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return float((ours - theirs).norm() / theirs.norm())


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="where the model, plan and report go"
    )
    out: Path = parser.parse_args().out
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # more threads only wait for each other on a network this small
    digits = open_dataset("digits")
    images, calibration, unseen = (digits.inputs(part) for part in ("training", "calibration", "test"))
    classes, truth = digits.training.targets, digits.test.targets

    start = time.perf_counter()
    dense = train(images, classes)
    print(f"trained on {len(images)} digits in {time.perf_counter() - start:.1f} s")

    start = time.perf_counter()
    small = tdpass.compress(dense, {"macs": BUDGET}, calibration)
    print(f"compressed the torch module in {time.perf_counter() - start:.1f} s")
    small.save_all(out)

    start = time.perf_counter()
    small_onnx = tdpass.compress(export(dense, calibration), plan=out / "plan.json", data=calibration)
    small_onnx.save(out / "model.onnx")
    print(f"compressed the ONNX export by the same plan in {time.perf_counter() - start:.1f} s\n")

    tdpass_command(["report", str(out)])

    loaded = tdpass.load(out / "model.safetensors", digits_net().eval())
    answers = {
        "dense, torch": run_torch(dense, unseen),
        "compressed, torch": run_torch(small.model, unseen),
        "compressed, torch, loaded from model.safetensors": run_torch(loaded, unseen),
        "compressed, ONNX Runtime, from model.onnx": run_onnx(out / "model.onnx", unseen),
    }
    original, ours = answers["dense, torch"], answers["compressed, torch"]
    print(
        f"\n{'accuracy on ' + str(len(unseen)) + ' unseen digits':50} {'accuracy':>9} {'from dense':>11} "
        f"{'from torch':>11}"
    )
    accuracy = {}
    for name, scores in answers.items():
        accuracy[name] = 100 * float((scores.argmax(1) == truth).double().mean())
        print(
            f"{name:50} {accuracy[name]:7.2f} % {distance(scores, original):11.1e} "
            f"{distance(scores, ours):11.1e}"
        )

    share = small.plan.planned.macs / small.plan.original.macs
    lost = accuracy["dense, torch"] - min(accuracy.values())
    checks = {
        f"multiply-adds {share:.3f} of the dense network, allowed {BUDGET}": share <= BUDGET,
        f"both torch and ONNX results the same to {AGREEMENT:g}": all(
            distance(scores, ours) < AGREEMENT for scores in list(answers.values())[1:]
        ),
        f"accuracy lost {lost:.2f} points, allowed {WORST_LOSS}": lost <= WORST_LOSS,
        "every file is there": all(
            (out / name).stat().st_size > 0
            for name in ("model.onnx", "model.safetensors", "plan.json", "report.json", "report.html")
        ),
    }
    print()
    for name, passed in checks.items():
        print(f"{'ok    ' if passed else 'FAILED'} {name}")
    print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}/")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
