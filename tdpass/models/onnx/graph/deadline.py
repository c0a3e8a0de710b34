"""A deadline for what may never end: loops whose condition is computed while they run."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnxruntime

from tdpass.errors import InvalidModelError, UsageError

LOOP_SECONDS = 5.0
"""How long one run may take of a model or node that holds a Loop.

Decoders that loop over some hundred tokens take well under a second; a user who opens a file should be told
within ten.
"""
_VARIABLE = "TDPASS_LOOP_SECONDS"
_FATAL_ONLY = 4


def loops(nodes: Iterable[ir.Node]) -> bool:
    """Whether one of the nodes is a Loop; those within branches and bodies have to be among them."""
    return any(node.op_type == "Loop" and not node.domain for node in nodes)


def loop_seconds() -> float:
    """`$TDPASS_LOOP_SECONDS`, or `LOOP_SECONDS`; raises `UsageError` for what is no time."""
    text = os.environ.get(_VARIABLE, "").strip()
    try:
        seconds = float(text) if text else LOOP_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UsageError(f"{_VARIABLE}={text!r} is no time in seconds; write a number above 0, such as 60")
    return seconds


def too_long() -> InvalidModelError:
    """What is said of a loop that did not end by then."""
    return InvalidModelError(
        f"a loop of the model did not end within {loop_seconds():g} seconds; see that its condition becomes "
        f"false, or allow it more time with {_VARIABLE}=60"
    )


@contextmanager
def run_options(limited: bool) -> Iterator[onnxruntime.RunOptions]:
    """Options of one run, whose failure is said by an exception only.

    `limited` ends it at the deadline, with `InvalidModelError`.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL_ONLY
    if not limited:
        yield options
        return
    seconds, ended = loop_seconds(), threading.Event()

    def end() -> None:
        ended.set()
        options.terminate = True

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield options
    except Exception as error:
        if not ended.is_set():
            raise
        raise too_long() from error
    finally:
        timer.cancel()
