"""Kernels are compiled once, not once per test session: their folder holds one library per state of the sources."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tdpass.kernels import native

os.environ.setdefault("TDPASS_KERNELS", str(native.cache_folder()))
sys.path.insert(0, str(Path(__file__).parent))
