"""Triton kernels for CUDA devices.

Triton itself is imported with the first call that needs it, and only in this package. Importing this package
makes the operators of `tdpass.kernels.base.OPS` run on CUDA tensors through these kernels wherever they cover
the arguments and `available()`; the operators' references serve everything else.
"""

from __future__ import annotations

from tdpass.kernels.gpu import low_precision, operators
from tdpass.kernels.gpu.device import available, missing

__all__ = ["available", "low_precision", "missing", "operators"]
