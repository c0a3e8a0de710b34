"""Builds the C++ kernels into wheels where there is a compiler.

Everything else about the package stands in pyproject.toml. A wheel with them serves one platform and every
Python; without a compiler, or with TDPASS_WHEEL=pure, it serves all platforms and builds them on first use.
An editable install builds nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def kernels_build() -> types.ModuleType:
    """`tdpass.kernels.build` without `tdpass/__init__.py`, which asks for packages that are not there while a wheel is built."""
    package = types.ModuleType("tdpass")
    package.__path__ = [str(ROOT / "tdpass")]
    sys.modules.setdefault("tdpass", package)
    return importlib.import_module("tdpass.kernels.build")


class BuildWithKernels(build_py):
    """Copies the package, then compiles the kernels for every instruction set into it."""

    def library(self) -> Path:
        """Where the kernels are in what is built."""
        return Path(self.build_lib) / "tdpass" / "kernels" / "cpu" / "libtdpass_cpu.so"

    def run(self) -> None:
        super().run()
        for built in self.library().parents[1].glob("*/libtdpass_*.so"):
            built.unlink()
        if (
            self.editable_mode
            or os.environ.get("TDPASS_WHEEL") == "pure"
            or not sys.platform.startswith("linux")
        ):
            return
        build = kernels_build()
        try:
            objects = Path(self.get_finalized_command("build").build_temp).resolve() / "kernels"
            build.build(self.library().resolve(), build.units(build.compiled_targets()), objects)
            build.build_onnxruntime(
                self.library().resolve().parents[1] / "onnxruntime" / build.ONNXRUNTIME_LIBRARY, objects
            )
        except Exception as error:  # noqa: BLE001 - an installation without them builds them on first use
            self.announce(f"the kernels are not built into this wheel: {error}", level=3)


class PlatformWheel(bdist_wheel):
    """A wheel whose tag names the platform where it holds compiled kernels, and no version of Python."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_py").library().exists()
        # files of a distribution without extension modules are put where those go that suit every platform
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
