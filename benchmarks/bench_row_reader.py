"""The LSTM of the recipe `lstm_tt`, trained and factored, against the best dense runtime.

    TDPASS_DATA=... python -m benchmarks.bench_row_reader out/training/lstm_tt-0/model.safetensors

Dense in eager torch, ONNX Runtime and OpenVINO (where installed), factored in eager torch, one thread; all in
turn, medians.  Rows go to results/row_reader.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import tdpass
from benchmarks.results import Table, show
from tdpass.clock import on_cpu
from tdpass.zoo.row_reader import RowReader, row_reader

COLUMNS = ("batch", "runtime", "milliseconds", "over_best_dense")


def dense_calls(batch: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """One call of the dense network in each runtime."""
    model, x = RowReader().eval(), torch.randn(batch, 1, 28, 28)
    path = folder / f"dense_{batch}.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    feed = {session.get_inputs()[0].name: x.numpy()}
    calls: dict[str, Callable[[], Any]] = {
        "dense, eager": lambda: model(x),
        "dense, onnxruntime": lambda: session.run(None, feed),
    }
    try:
        import openvino
    except ImportError:
        return calls
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    request = compiled.create_infer_request()
    calls["dense, openvino"] = lambda: request.infer([x.numpy()])
    return calls


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = tdpass.load(options.artifact, row_reader()).eval()
    table = Table("row_reader.csv", COLUMNS)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for batch in (1, 8, 64):
            calls = dense_calls(batch, Path(folder))
            x = torch.randn(batch, 1, 28, 28)
            calls["factored, eager"] = lambda x=x: small(x)
            seconds = dict(zip(calls, on_cpu(list(calls.values()), threads=1, rounds=60), strict=True))
            best = min(value for name, value in seconds.items() if name.startswith("dense"))
            for name, value in seconds.items():
                table.add(batch=batch, runtime=name, milliseconds=1e3 * value, over_best_dense=best / value)
    print(show(table.rows, COLUMNS))


if __name__ == "__main__":
    main()
