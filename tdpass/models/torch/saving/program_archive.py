"""`.pt2` archives from elsewhere, read without running what they hold.

`torch.export.load` unpickles weights, constants and example inputs, evaluates sizes and guards as Python,
imports modules that tree specs name, and writes names into code that it compiles.  What it is given is
therefore another archive, written anew from members that were checked here: tensors alone in pickles, and a
program of known operators, sizes and names.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tdpass.errors import InvalidModelError

_LEGACY = "serialized_exported_program.json"
_LARGEST_PROGRAM = 1 << 30
_PLAIN = re.compile(
    r"extra/.*|extra_files/.*|archive_format|archive_version|version|byteorder|\.data/\w+|"
    r"data/(weights|constants)/(weight|tensor)_\d+"
)
_PICKLED = re.compile(
    r"data/(sample_inputs|weights|constants)/[^/]*\.pt|"
    r"serialized_(state_dict|constants|example_inputs)\.(pt|json)"
)
_PROGRAM = re.compile(r"models/[^/]*\.json|" + re.escape(_LEGACY))
_CONFIG = re.compile(r"data/(weights|constants)/[^/]*_config\.json")
_TENSOR = re.compile(r"(weight|tensor)_\d+")

# operators of libraries that are loaded already, and arithmetic on sizes
_BUILT_IN = (
    "getitem|add|mul|sub|truediv|ge|le|gt|lt|eq|ne|floordiv|mod|and_|or_|not_|pow|neg|abs|lshift|rshift"
)
_NO_OPERATORS = r"(?!load_library|loaded_libraries|import_module|aten\.from_file)"
_OPERATOR = re.compile(
    rf"(torch\.ops\.{_NO_OPERATORS}[a-zA-Z]\w*\.\w+(\.\w+)?|_operator\.({_BUILT_IN})|"
    r"math\.[a-z0-9]+|torch\._?sym_[a-z]+)?"
)
_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    RecursionError,
)
_NAME = re.compile(r"[\w.\-/:$+ ]*")
_ASSUMED = (
    "positive|negative|integer|real|finite|zero|nonzero|nonnegative|nonpositive|infinite|even|odd|"
    "rational|commutative|evaluate"
)
_COMPUTED = "floor|ceiling|sqrt|log|exp|oo|zoo|true|false|and|or|not|e"
_QUOTED_SYMBOL = re.compile(r"Symbol\('(\w+)'")
_SIZE = re.compile(r"[\w\s()+\-*/%,<>=!&|~]*(\d\.\d*[\w\s()+\-*/%,<>=!&|~]*)*")
_WORD = re.compile(r"[^\W\d]\w*")
_SIZE_WORD = re.compile(rf"[a-z_]{{1,6}}\d+|[A-Z][A-Za-z0-9]*|{_ASSUMED}|{_COMPUTED}")


def plain_archive(path: Path) -> io.BytesIO:
    """The archive with nothing in it that loading would run.

    Raises `InvalidModelError` naming the member that could.
    """
    try:
        with zipfile.ZipFile(path) as given:
            members = _members(given, path)
    except _DAMAGED as error:
        raise broken(path, error) from None
    return checked_archive(members, path)


def checked_archive(members: dict[str, bytes], path: Path) -> io.BytesIO:
    """An archive of these members, which are in the file, with nothing in them that loading would run.

    Raises `InvalidModelError` naming the member that could.
    """
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(made, "w") as archive:
            for name, content in _checked(members, path):
                archive.writestr(name, content)
    except _DAMAGED as error:
        raise broken(path, error) from None
    made.seek(0)
    return made


def broken(path: Path, error: Exception) -> InvalidModelError:
    """What to say of a file that torch, or the archive's own structure, makes nothing of."""
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return InvalidModelError(
        f"{path} is not an intact exported program: {said}; write it with torch.export.save"
    )


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, bytes]:
    """The content of every member by its name; nothing is expanded beyond the size of the file."""
    listed = [member for member in archive.infolist() if not member.is_dir()]
    if len({member.filename for member in listed}) < len(listed):
        raise ValueError("two of its members have the same name")
    if (
        any(member.compress_type != zipfile.ZIP_STORED for member in listed)
        or sum(member.file_size for member in listed) > path.stat().st_size
    ):
        raise ValueError("its members are compressed, or overlap; torch.export.save stores them plain")
    return {member.filename: archive.read(member) for member in listed}


def _checked(members: dict[str, bytes], path: Path) -> Iterator[tuple[str, bytes]]:
    root = "" if _LEGACY in members else next(iter(members), "").partition("/")[0] + "/"
    inside = {name.removeprefix(root): name for name in members}
    pickled = {
        place
        for short, name in inside.items()
        if _CONFIG.fullmatch(short)
        for place in _pickled(short, members[name], path)
    }
    for short, name in inside.items():
        content = members[name]
        if short in pickled or _PICKLED.fullmatch(short):
            yield name, _tensors(content, path, short)
        elif _PROGRAM.fullmatch(short):
            yield name, _program(content, path, short)
        elif _CONFIG.fullmatch(short) or _PLAIN.fullmatch(short):
            yield name, content
        else:
            raise _refused(path, f"holds {short!r}, which is neither tensors nor a program")


def _refused(path: Path, what: str) -> InvalidModelError:
    return InvalidModelError(
        f"{path} {what}; loading it could run code, so it is refused: if you trust where it comes from, "
        "pass torch.export.load(path), or --trust"
    )


def _pickled(short: str, content: bytes, path: Path) -> Iterator[str]:
    """Places of the tensors that a table of weights or constants says are pickled."""
    folder = short.rpartition("/")[0]
    found = json.loads(content)
    entries = found.get("config") if isinstance(found, dict) else None
    for entry in entries.values() if isinstance(entries, dict) else ():
        name = entry.get("path_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _TENSOR.fullmatch(name):
            raise _refused(path, f"keeps {name!r} among its tensors, an object of another kind")
        if entry.get("use_pickle"):
            yield f"{folder}/{name}"


def _tensors(content: bytes, path: Path, short: str) -> bytes:
    """A pickle of tensors in plain containers, written anew."""
    if not content:
        return content
    try:
        found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        said = re.search(r"GLOBAL [\w.]+|Unsupported \w+ [\w.]+", str(error))
        raise _refused(
            path, f"holds a pickle in {short!r} with more than tensors in it{f' ({said[0]})' if said else ''}"
        ) from None
    written = io.BytesIO()
    torch.save(found, written)
    return written.getvalue()


def _program(content: bytes, path: Path, short: str) -> bytes:
    if len(content) > _LARGEST_PROGRAM:
        raise ValueError(f"its program has {len(content):,} bytes")
    found = json.loads(content)
    if not isinstance(found, dict):
        raise broken(path, TypeError(f"{short!r} is no program"))
    found.pop("guards_code", None)  # checks of inputs, as Python
    for key, text in _texts(found, ""):
        if not _harmless(key, text):
            raise _refused(path, f"says {text[:80]!r} as {key!r} in {short!r}")
    return json.dumps(found).encode()


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text of a program with the key that it stands under.

    Constants and remarks, which are only quoted, are left out.
    """
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, key)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield "name", name
            if not _quoted(key, name, part):
                yield from _texts(part, name)


def _quoted(outer: str, key: str, value: Any) -> bool:
    if isinstance(value, str):
        return key == "as_string" or outer == "metadata"
    return key == "as_strings" and isinstance(value, list) and all(isinstance(part, str) for part in value)


def _harmless(key: str, text: str) -> bool:
    if key in {"target", "as_operator"}:
        return bool(_OPERATOR.fullmatch(text))
    if key == "expr_str":
        return _is_size(text)
    if key in {"in_spec", "out_spec"}:
        return not text or _is_spec(json.loads(text), named=key == "in_spec")
    return bool(_NAME.fullmatch(text))


def _is_size(text: str) -> bool:
    """Whether a size is arithmetic on symbols: it is evaluated as Python."""
    bare = _QUOTED_SYMBOL.sub(r"Symbol(\1", text)
    return bool(_SIZE.fullmatch(bare)) and all(map(_SIZE_WORD.fullmatch, _WORD.findall(bare)))


def _is_spec(value: Any, named: bool) -> bool:
    """Whether a tree spec names no module to import, and nothing odd where it is `named` in code.

    It names neither a default factory nor an enumeration.
    """
    if isinstance(value, dict):
        imports = {"default_factory_module", "__enum__"} & set(value)
        context = value.get("context")
        inner = json.loads(context) if isinstance(context, str) and context[:1] in {"{", "["} else context
        parts = [*value, *(part for key, part in value.items() if key != "context"), inner]
        return not imports and all(_is_spec(part, named) for part in parts)
    if isinstance(value, list):
        return all(_is_spec(part, named) for part in value)
    return not named or not isinstance(value, str) or bool(_NAME.fullmatch(value))
