"""The benchmark of recurrent networks by type: its rows are there, and what they say of errors is right."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime.quantization")

from tdpass.kernels import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(native.missing()), reason=native.missing()),
    pytest.mark.filterwarnings("ignore"),  # of torch's and onnxruntime's own quantization
]
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2}
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_every_shape_is_there_with_the_error_of_its_type(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)  # where benchmarks lie, which are no part of the package
    from benchmarks import recurrent_dtypes

    for name, value in (("WIDTH", 64), ("STEPS", 8), ("RANK", 16)):
        monkeypatch.setattr(recurrent_dtypes, name, value)
    rows = recurrent_dtypes.rows_of(kind, 1, 1, tuple(ALLOWED), rounds=1)
    shapes = {(row["dtype"], row["shape"]) for row in rows}
    wanted = {(dtype, shape) for dtype in ("fp32", "int8") for shape in ("dense", "chain", "fused")}
    assert wanted | {("bf16", "dense")} <= shapes
    for row in rows:
        assert float(str(row["error"])) <= ALLOWED[str(row["dtype"])], row
        exact = row["shape"] == "dense"
        assert (row["error"] == row["error_of_dense"]) == exact
        assert row["dtype"] != "int8" or float(str(row["error"])) > 1e-4, row
