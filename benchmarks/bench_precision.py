"""Accuracy and size of ResNet-20, 32 or 56 on CIFAR-10 in fewer bits.

Precision alone, ranks alone, both in one plan, and other tools.

    TDPASS_DATA=... python -m benchmarks.bench_precision  # every row, on all 10,000 test images
    TDPASS_DATA=... python -m benchmarks.bench_precision --rows int8 joint_0.1 --images 2000
    TDPASS_DATA=... python -m benchmarks.bench_precision --nets resnet32 resnet56

Every row starts from the trained network and 512 unlabelled calibration images, without training.  Rows
whose name begins with `onnx` are ONNX files with integer activations, run by ONNX Runtime; all others are
torch modules whose activations stay in single precision. `bytes` are those of parameters, `file_bytes`
those of the file that is saved.  Rows go to results/precision.csv; those of another network than ResNet-20
begin with its name.  Rows that the file holds already, of as many images and of this machine, are not
measured again.  NNCF takes part where it is installed.
"""

from __future__ import annotations

import argparse
import contextvars
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tdpass
from benchmarks import cifar
from benchmarks.results import Table, Value, show

COLUMNS = (
    "row",
    "pipeline",
    "images",
    "accuracy",
    "dense_accuracy",
    "divergence",
    "bytes",
    "bytes_fraction",
    "macs_fraction",
    "file_bytes",
    "seconds",
)
BEGIN, END = "fold-batchnorm", "verify"
REPAIR = "factorize,correct-bias,refit"
BUDGETS = (0.25, 0.1, 0.05)
Answers = Callable[[Tensor], Tensor]
NETWORKS = ("resnet20", "resnet32", "resnet56")
CALIBRATION = 512
_network = contextvars.ContextVar("network", default=NETWORKS[0])
"""Which network the rows are of."""
_samples = contextvars.ContextVar("samples", default=CALIBRATION)
"""How many of the calibration images are used."""


def calibration() -> Tensor:
    """The calibration images."""
    return cifar.calibration()[: _samples.get()]


@dataclass(frozen=True)
class Result:
    """A compressed network: how it answers, and what it takes."""

    answers: Answers
    divergence: float | None
    size: int | None
    size_fraction: float | None
    macs_fraction: float | None
    file_bytes: int


def compressed(budget: dict[str, float] | None, steps: str, formats: tuple[str, ...] = ()) -> Result:
    """The torch module that a pipeline makes; of the dense format alone, nothing is factored."""
    given, pipeline = cifar.load_resnet(_network.get()), f"{BEGIN},{steps},{END}"
    artifact = tdpass.compress(given, budget, calibration(), pipeline=pipeline, formats=formats, strict=False)
    assert isinstance(artifact.model, nn.Module)
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "it.safetensors")
        written = (Path(folder) / "it.safetensors").stat().st_size
    return _result(artifact, artifact.model.eval(), written)


def in_onnx_runtime(budget: dict[str, float] | None, steps: str) -> Result:
    """The ONNX file that a pipeline makes of the exported network."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = tdpass.compress(
            exported(Path(folder)),
            budget,
            calibration(),
            pipeline=f"{BEGIN},{steps},{END}",
            strict=False,
        )
        artifact.save(Path(folder) / "it.onnx")
        return _result(artifact, session(Path(folder) / "it.onnx"), (Path(folder) / "it.onnx").stat().st_size)


def by_onnxruntime() -> Result:
    """Static quantization by onnxruntime.quantization, from the extremes of the same images.

    Activations in u8, weights in s8 by channel.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = iter([{name: part.numpy()} for part in calibration().split(64)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, made = (
            exported(Path(folder)),
            Path(folder) / "prepared.onnx",
            Path(folder) / "made.onnx",
        )
        quant_pre_process(str(plain), str(prepared))
        reader = Reader("x")
        quantize_static(
            str(prepared), str(made), reader, quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return Result(session(made), None, None, None, 1.0, made.stat().st_size)


def by_nncf() -> Result:
    """Static quantization by NNCF with its defaults, on the same images, run by ONNX Runtime."""
    import nncf
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        parts = calibration().split(64)
        data = nncf.Dataset(list(parts), lambda part: {"x": part.numpy()})
        made = nncf.quantize(onnx.load(exported(Path(folder))), data, subset_size=len(parts))
        path = Path(folder) / "made.onnx"
        onnx.save(made, path)
        return Result(session(path), None, None, None, 1.0, path.stat().st_size)


def exported(folder: Path) -> Path:
    """The trained network as an ONNX file of any number of images."""
    path = folder / f"{_network.get()}.onnx"
    model, example = cifar.load_resnet(_network.get()), calibration()[:2].contiguous()
    shapes = ({0: torch.export.Dim("n")},)
    torch.onnx.export(
        model,
        (example,),
        path,
        dynamo=True,
        verbose=False,
        input_names=["x"],
        dynamic_shapes=shapes,
        external_data=False,
    )
    return path


def session(path: Path) -> Answers:
    """A call of ONNX Runtime on that file, with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda x: torch.from_numpy(opened.run(None, {name: x.contiguous().numpy()})[0])


def _result(artifact: tdpass.Artifact, answers: Answers, written: int) -> Result:
    original, final = artifact.report.original, artifact.report.final
    fractions = final.bytes / original.bytes, final.macs / original.macs
    return Result(answers, artifact.report.checks.get("divergence"), final.bytes, *fractions, written)


def _row(make: Callable[..., Result], *given: object) -> Callable[[], tuple[Result, str]]:
    return lambda: (make(*given), " ".join(str(part) for part in given if part is not None))


STATIC = "quantize{numbers=int8},quantize-activations"
PLAIN = "plan{numbers=none}," + REPAIR
ROWS: dict[str, Callable[[], tuple[Result, str]]] = {
    "dense": _row(compressed, None, "verify"),
    "int8": _row(compressed, None, "quantize{numbers=int8}"),
    "int4": _row(compressed, None, "quantize{numbers=int4}"),
    "int4_nearest": _row(compressed, None, "quantize{numbers=int4,rounding=nearest}"),
    "levels8": _row(compressed, None, "quantize{numbers=levels8}"),
    "rank_0.5": _row(compressed, {"macs": 0.5}, PLAIN),
    "rank_0.5_int8": _row(compressed, {"macs": 0.5}, f"{PLAIN},quantize{{numbers=int8}}"),
    "rank_0.5_int4": _row(compressed, {"macs": 0.5}, f"{PLAIN},quantize{{numbers=int4}}"),
    "sparse_0.5": _row(compressed, None, "sparsify{support=unstructured/50%}"),
    "sparse_2:4_int8": _row(compressed, None, "sparsify{support=2:4},quantize{numbers=int8}"),
    **{f"joint_{budget}": _row(compressed, {"bytes": budget}, f"plan,{REPAIR}") for budget in BUDGETS},
    **{f"rank_bytes_{budget}": _row(compressed, {"bytes": budget}, PLAIN) for budget in BUDGETS},
    **{
        f"numbers_bytes_{budget}": _row(compressed, {"bytes": budget}, f"plan,{REPAIR}", ("dense",))
        for budget in BUDGETS
    },
    "onnx_int8": _row(in_onnx_runtime, None, STATIC),
    "onnx_int8_minmax": _row(
        in_onnx_runtime, None, "quantize{numbers=int8},quantize-activations{calibration=minmax}"
    ),
    "onnx_rank_0.5_int8": _row(in_onnx_runtime, {"macs": 0.5}, f"{PLAIN},{STATIC}"),
    "onnxruntime_int8": _row(by_onnxruntime),
    "nncf_int8": _row(by_nncf),
    "int4_32": _row(compressed, None, "quantize{numbers=int4/32}"),
    "int4_32_beside_4": _row(compressed, None, "quantize{numbers=int4/32,beside=4}"),
    "torch_int8_static": _row(compressed, None, STATIC),
}


def accuracy(answers: Answers, images: int) -> float:
    """Percentage classified correctly of so many test images.

    They are evenly spaced, since they lie there class by class.
    """
    found = cifar.data().part("test")
    right = 0
    with torch.no_grad():
        for chosen in (torch.arange(images) * len(found.targets) // images).split(250):
            inputs = cifar.data().prepared(found.inputs[chosen])
            right += int((answers(inputs).argmax(1) == found.targets[chosen]).sum())
    return 100 * right / images


def main() -> None:
    """Measure the rows that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--nets", nargs="+", choices=NETWORKS, default=[NETWORKS[0]])
    parser.add_argument(
        "--images", type=int, default=10_000, help="so many of the test images, evenly spaced"
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=CALIBRATION,
        help="so many of the calibration images; rows of fewer than all say so",
    )
    parser.add_argument("--out", help="file in results/ instead of precision.csv")
    options = parser.parse_args()
    cifar.data()
    _samples.set(options.calibration)
    table = Table(options.out or "precision.csv", COLUMNS)
    for network in options.nets:
        _network.set(network)
        _measure(network, options, table)


def _measure(network: str, options: argparse.Namespace, table: Table) -> None:
    few = "" if options.calibration == CALIBRATION else f" of {options.calibration}"
    of = "" if network == NETWORKS[0] else f"{network} "
    titles = {name: f"{of}{name}{few}" for name in options.rows}
    left = [name for name in titles if not table.kept(row=titles[name], images=options.images)]
    dense = accuracy(cifar.load_resnet(network), options.images) if left else 0.0
    for name in left:
        start = time.perf_counter()
        try:
            result, pipeline = ROWS[name]()
        except (tdpass.BudgetError, ImportError) as error:
            print(f"{name}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        row: dict[str, Value] = {
            "row": titles[name],
            "pipeline": pipeline,
            "images": options.images,
            "accuracy": accuracy(result.answers, options.images),
            "dense_accuracy": dense,
            "divergence": result.divergence,
            "bytes": result.size,
            "bytes_fraction": result.size_fraction,
            "macs_fraction": result.macs_fraction,
            "file_bytes": result.file_bytes,
            "seconds": seconds,
        }
        table.add(**row)
        print(show([row], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
