"""Whether the GPU kernels can run here, found out without importing triton."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

_CAPABILITY = (8, 0)


@functools.cache
def missing() -> str:
    """Why the GPU kernels cannot run here; empty where they can."""
    if find_spec("triton") is None:
        return "triton is not installed; `pip install tdpass[gpu]` brings it on Linux"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else "this build of torch has no CUDA"
    if torch.version.hip:
        return "the kernels are written for CUDA, this is a build of torch for ROCm"
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; "
            "the kernels need 8.0"
        )
    return ""


def available() -> bool:
    """Whether the GPU kernels can run here; where not, `missing()` says why."""
    return not missing()
