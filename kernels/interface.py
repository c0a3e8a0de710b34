"""The C interface of the kernels as ctypes has it, read from the header that declares it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tdpass.errors import KernelError

CType = Any
_NUMBERS: dict[str, CType] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENUM = re.compile(r"enum (\w+) \{(.*?)\};", re.DOTALL)
_STRUCT = re.compile(r"typedef struct \{(.*?)\} (\w+);", re.DOTALL)
_FUNCTION = re.compile(r'__attribute__\(\(visibility\("default"\)\)\) ([^;(]+?)\b(\w+)\(([^)]*)\);')
_DECLARED = re.compile(r"(?P<pointer>[\s*]*)(?P<name>\w+)\s*(?:\[(?P<length>\d+)\])?\s*")


@dataclass(frozen=True)
class Interface:
    """What a header declares, by name: numbers of enumerations, structures, functions (result, arguments)."""

    enums: Mapping[str, Mapping[str, int]]
    structures: Mapping[str, type[ctypes.Structure]]
    functions: Mapping[str, tuple[CType, list[CType]]]

    @classmethod
    def read(cls, header: str) -> Interface:
        """The declarations in a header; raises `KernelError` for one that is not understood."""
        text = _COMMENT.sub("", header)
        enums = {name: _numbered(body) for name, body in _ENUM.findall(text)}
        structures: dict[str, type[ctypes.Structure]] = {}
        for body, name in _STRUCT.findall(text):
            fields = [
                field for line in body.split(";") if line.strip() for field in _fields(line, structures)
            ]
            structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        functions = {
            name: (
                _result(result),
                [] if given.strip() == "void" else [ctypes.c_void_p] * len(given.split(",")),
            )
            for result, name, given in _FUNCTION.findall(text)
        }
        return cls(enums, structures, functions)

    def declare(self, library: ctypes.CDLL) -> None:
        """Tell a library how its functions are called; raises `AttributeError` where it lacks one."""
        for name, (result, arguments) in self.functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments


def _numbered(body: str) -> dict[str, int]:
    pairs = (entry.split("=") for entry in body.split(",") if entry.strip())
    return {name.strip(): int(number) for name, number in pairs}


def _fields(line: str, structures: Mapping[str, type[ctypes.Structure]]) -> Iterator[tuple[str, CType]]:
    """The fields that a line declares, such as `const float *v, *u` or `int64_t size[4], stride[4]`."""
    called = re.fullmatch(r"\s*\w+ \(\*(\w+)\)\(.*\)\s*", line, re.DOTALL)
    if called:
        yield called[1], ctypes.c_void_p
        return
    kind, rest = _split(line)
    for declared in rest.split(","):
        found = _DECLARED.fullmatch(declared)
        plain = _NUMBERS.get(kind) or structures.get(kind)
        if found is None or (plain is None and "*" not in found["pointer"]):
            raise KernelError(f"the kernels' header declares {line.strip()!r}, which is not understood")
        field: CType = ctypes.c_void_p if "*" in found["pointer"] else plain
        yield found["name"], field * int(found["length"]) if found["length"] else field


def _split(line: str) -> tuple[str, str]:
    """The type and what it is of, the stars with the latter."""
    found = re.fullmatch(r"\s*(\w+)\s*(\*.*|\w.*)", re.sub(r"\bconst\b", "", line), re.DOTALL)
    if found is None:
        raise KernelError(f"the kernels' header declares {line.strip()!r}, which is not understood")
    return found[1], found[2]


def _result(text: str) -> CType:
    return ctypes.c_char_p if "char" in text else _NUMBERS[text.strip()]
