"""Compiling kernels takes nothing of a test's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread

import pytest
from stopped_clock import StoppedClock

from tdpass.kernels import build


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> StoppedClock:
    found = request.config.pluginmanager.get_plugin("stopped clock")
    assert isinstance(found, StoppedClock)
    return found


@pytest.mark.timeout(1.5)
def test_a_slow_call_does_not_end_the_test(clock: StoppedClock) -> None:
    clock.around(time.sleep)(1.7)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("fails", [False, True])
def test_the_clock_stands_still_for_as_long_as_the_call_takes(clock: StoppedClock, fails: bool) -> None:
    seen = []

    def compiled(value: int) -> int:
        seen.append(clock.watched)
        if fails:
            raise OSError("no compiler")
        return value + 1

    before = clock.watched
    assert before is not None
    if fails:
        with pytest.raises(OSError, match="no compiler"):
            clock.around(compiled)(1)
    else:
        assert clock.around(compiled)(1) == 2
    assert seen == [None]
    assert clock.watched == before


@pytest.mark.timeout(100)
def test_a_thread_leaves_the_clock_alone(clock: StoppedClock) -> None:
    seen: list[object] = []
    thread = Thread(target=clock.around(lambda: seen.append(clock.watched)))
    thread.start()
    thread.join()
    assert seen == [clock.watched]
    assert seen != [None]


@pytest.mark.parametrize("runs_the_compiler", [build.build, build.build_onnxruntime])
def test_what_runs_the_compiler_is_untimed(runs_the_compiler: Callable[..., object]) -> None:
    assert hasattr(runs_the_compiler, "__wrapped__")
