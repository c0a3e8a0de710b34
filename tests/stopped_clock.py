"""The clock that ends a test stands still while kernels are compiled.

That takes minutes on a busy machine, happens once a checkout in whichever test needs them first, and says
nothing of the test.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import pytest

from tdpass.kernels import build

P = ParamSpec("P")
T = TypeVar("T")


class StoppedClock:
    """A plugin that knows the test that pytest-timeout watches, and stops its clock around slow calls."""

    def __init__(self, config: pytest.Config) -> None:
        self.hooks = config.pluginmanager.hook
        self.watched: dict[str, Any] | None = None

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: object) -> None:
        """Remember what is watched; pytest-timeout goes on to set its timer."""
        self.watched = {"item": item, "settings": settings}

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_cancel_timer(self) -> None:
        """Nothing is watched any more."""
        self.watched = None

    def around(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same call, while which no test's time runs; afterwards the test has all of its time again."""

        @functools.wraps(call)
        def untimed(*args: P.args, **kwargs: P.kwargs) -> T:
            watched = self.watched
            # timers are the main thread's
            if watched is None or threading.current_thread() is not threading.main_thread():
                return call(*args, **kwargs)
            self.hooks.pytest_timeout_cancel_timer(item=watched["item"])
            try:
                return call(*args, **kwargs)
            finally:
                self.hooks.pytest_timeout_set_timer(**watched)

        return untimed


def stop_while_compiling(config: pytest.Config) -> None:
    """Register the plugin, and let it stop the clock around everything that runs a compiler."""
    clock = StoppedClock(config)
    config.pluginmanager.register(clock, "stopped clock")
    for name in ("build", "build_onnxruntime"):
        setattr(build, name, clock.around(getattr(build, name)))
