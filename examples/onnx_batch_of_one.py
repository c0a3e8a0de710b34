"""An ONNX file that takes one image at a time, as exporters write it by default.

It is compressed, and run by ONNX Runtime.

python examples/onnx_batch_of_one.py
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch

import tdpass
from tdpass.zoo import lenet5


def main() -> None:
    """Export, compress to half of the multiply-adds, and run the file."""
    torch.manual_seed(0)
    torch.onnx.export(lenet5().eval(), (torch.randn(1, 1, 28, 28),), "dense.onnx", verbose=False)
    images = np.random.default_rng(0).normal(size=(64, 1, 28, 28)).astype(np.float32)
    artifact = tdpass.compress("dense.onnx", {"macs": 0.5}, images, effort="fast")
    artifact.save("small.onnx")
    session = onnxruntime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: images[:1]})
    print(repr(artifact))
    print("answers of shape", answer.shape)


if __name__ == "__main__":
    main()
