"""What the command line says of ONNX files with fused operators.

They are only as fast as measured where the operators' library is registered.
"""

from __future__ import annotations

from pathlib import Path

from tdpass.errors import KernelError
from tdpass.kernels.native import onnx_ops_path


def library_notes(paths: list[Path]) -> list[str]:
    """What a program that runs the files has to do; nothing for files without fused operators."""
    graphs = [path for path in paths if path.suffix == ".onnx"]
    if not graphs:
        return []
    from tdpass.models.onnx.operators.fused import REGISTER  # noqa: PLC0415 - loads the ONNX libraries
    from tdpass.models.onnx.operators.session import has_fused_ops  # noqa: PLC0415 - as above

    names = [path.name for path in graphs if has_fused_ops(str(path))]
    if not names:
        return []
    return [
        (
            f"{', '.join(names)}: measured with the library of fused operators, {_library()}, and slower "
            f"without it; in your program: {REGISTER}"
        )
    ]


def _library() -> str:
    try:
        return str(onnx_ops_path())
    except KernelError:
        return "which `tdpass doctor --build` makes (it is not there, so that nothing here ran with it)"
