"""What ctypes passes to the kernels is what the C header declares.

The compiler itself says so, to the byte.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from tdpass.errors import KernelError
from tdpass.kernels import build, native
from tdpass.kernels.interface import Interface

HEADER = build.SOURCES / "tdpass.h"
DECLARED = Interface.read(HEADER.read_text())


def test_everything_in_the_header_is_read() -> None:
    text = HEADER.read_text()
    assert text.count("typedef struct {") == len(DECLARED.structures) >= 9
    assert text.count('visibility("default")') == len(DECLARED.functions) >= 5
    assert text.count("\nenum ") == len(DECLARED.enums) >= 3
    assert {"float32", "bfloat16"} <= {str(dtype).removeprefix("torch.") for dtype in native.DTYPES}
    assert native.activation("clamp(-1,2)").function == DECLARED.enums["tdpass_function"]["TDPASS_CLAMP"]
    assert {"channels": 0, "pixels": 1, "pairs": 2}.items() <= native.LANES.items()


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_structures_lie_in_memory_as_the_compiler_lays_them(tmp_path: Path) -> None:
    lines = []
    expected = []
    for name, structure in DECLARED.structures.items():
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(structure)}")
        for field, _ in structure._fields_:
            lines.append(f'std::printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
            expected.append(f"{name}.{field} {getattr(structure, field).offset}")
    source = tmp_path / "layout.cpp"
    body = "\n".join(lines)
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "{HEADER}"\nint main() {{\n{body}\n}}\n'
    )
    subprocess.run([str(build.compiler()), str(source), "-o", str(tmp_path / "layout")], check=True)
    told = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout
    assert told.split("\n")[:-1] == expected


@pytest.mark.parametrize("line", ["double x;", "float x[n];", "struct other y;"])
def test_a_declaration_that_is_not_understood_is_an_error(line: str) -> None:
    with pytest.raises(KernelError, match="not understood"):
        Interface.read(f"typedef struct {{\n  {line}\n}} tdpass_odd;\n")
