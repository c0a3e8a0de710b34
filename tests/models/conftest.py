"""What tests of models share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tdpass.errors import KernelError
from tdpass.fusing import choose
from tdpass.kernels.native import onnx_ops_path
from tdpass.models.onnx.fused import fuse
from tdpass.timings import TimingTable


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing that finds every chain faster as one operator, with lanes on pixels where it has the choice."""
    try:
        onnx_ops_path()
    except KernelError as error:
        pytest.skip(str(error))
    order = {"plain": 9.0, "channels": 2.0, "pixels": 1.0}
    rows = {"False False": 18.0, "True False": 10.0, "False True": 10.0, "True True": 2.0}
    order |= {f"in a row {chosen}": seconds for chosen, seconds in rows.items()}

    def times(
        calls: dict[object, Callable[[], object]], threads: int, rounds: int = 1
    ) -> dict[object, float]:
        return {key: order[key] if isinstance(key, str) else 10.0 - len(key) for key in calls}

    monkeypatch.setattr(choose, "times_kept", lambda: TimingTable(None))
    for module in (choose, fuse):
        monkeypatch.setattr(module, "seconds_of", times)
