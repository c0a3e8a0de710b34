"""What libraries warn about and log is theirs; a user of the command line can act on none of it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_LIBRARIES = ("datasets", "huggingface_hub", "onnxscript", "timm", "torch", "transformers")


@contextlib.contextmanager
def libraries(heard: bool = False) -> Iterator[None]:
    """No warnings, and of the loggers of libraries only errors, unless they are to be `heard`."""
    if heard:
        yield
        return
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
