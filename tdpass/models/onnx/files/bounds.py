"""Bounds on what a file may make tdpass read, build or run.

Each is checked before anything is allocated for it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import onnx

from tdpass.errors import InvalidModelError, UnsupportedError, UsageError
from tdpass.models.onnx.graph.protos import graph_protos, nodes_within

LARGEST_PROTO = (1 << 31) - 1  # what a protobuf message can hold; larger weights lie in data files
MOST_NODES = 12_000
"""Nodes of one model, calls of local functions written out.

Exports of the largest networks in use stay below 10,000.  `tdpass inspect` takes three quarters of a
millisecond for a node, so that this many are listed within ten seconds; whoever has more, and the time, sets
`$TDPASS_MOST_NODES`.
"""
MOST_TRIPS = (
    10_000_000  # of a loop that nothing else ends; a step of the smallest body takes a microsecond or more
)
MOST_PARTS = (
    100_000  # outermost fields of a file: a handful, and one for each local function and each property
)
_VARINT, _BYTES = 0, 2
_FIXED_SIZES = {1: 8, 3: 0, 4: 0, 5: 4}  # 3 and 4 begin and end a group, as old writers have them
_Key = tuple[str, str, str]


def check_outline(path: Path) -> None:
    """Raise `InvalidModelError` unless a file is outwardly a protobuf of a model.

    Reads the heads of its parts, not their contents.
    """
    size = path.stat().st_size
    if size == 0:
        raise InvalidModelError(f"{str(path)!r} is empty; export the model again")
    if size > LARGEST_PROTO:
        raise InvalidModelError(
            f"{str(path)!r} cannot be read: it has {size:,} bytes, and a protobuf at most {LARGEST_PROTO:,}; "
            "export the model again, with its weights as external data"
        )
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
        try:
            problem = _problem(content)
        except IndexError:
            problem = "it is cut short"
    if problem:
        raise InvalidModelError(
            f"{str(path)!r} cannot be read: {problem}; the file is damaged or not ONNX; export the model "
            "again"
        )


def _problem(content: mmap.mmap) -> str:
    """Why the content is no protobuf, as far as its outermost fields say; empty for none.

    Raises `IndexError` where it ends within one.
    """
    place, parts = 0, 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind, parts = tag & 7, parts + 1
        if tag >> 3 == 0 or kind not in {_VARINT, _BYTES, *_FIXED_SIZES}:
            return "it is no protobuf"
        if parts > MOST_PARTS:
            return f"it has more than {MOST_PARTS:,} outermost parts"
        number, place = _varint(content, place) if kind in {_VARINT, _BYTES} else (0, place)
        place += number if kind == _BYTES else _FIXED_SIZES.get(kind, 0)
    return "it is cut short" if place > len(content) else ""


def _varint(content: mmap.mmap, place: int) -> tuple[int, int]:
    """A number of a protobuf, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = content[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            break
    return number, place


def check_expansion(proto: onnx.ModelProto, what: str) -> None:
    """Raise unless a model has at most `MOST_NODES` nodes once its local functions are written out.

    Runtimes and checkers write them out.
    """
    bodies = {
        (function.domain, function.name, function.overload): function.node for function in proto.functions
    }
    if len(bodies) < len(proto.functions):
        raise InvalidModelError(
            f"{what} defines a local function twice; give each its own name, or export the model again"
        )
    calls = {key: _calls(nodes, bodies) for key, nodes in bodies.items()}
    try:
        order = list(TopologicalSorter({key: called for key, (_, called) in calls.items()}).static_order())
    except CycleError:
        raise InvalidModelError(
            f"{what} has a local function that calls itself; ONNX allows no recursion: export the model again"
        ) from None
    expanded: dict[_Key, int] = {}
    for key in order:
        expanded[key] = _expanded(calls[key], expanded)
    total = _expanded(_calls(proto.graph.node, bodies), expanded)
    most = most_nodes()
    if total > most:
        written = ", its local functions written out," if proto.functions else ""
        raise UnsupportedError(
            f"{what} has{written} {_count(total)} nodes; supported are {most:,}: simplify the model, or set "
            "TDPASS_MOST_NODES"
        )


def most_nodes() -> int:
    """`$TDPASS_MOST_NODES`, or `MOST_NODES`; raises `UsageError` for what is no number of nodes."""
    text = os.environ.get("TDPASS_MOST_NODES", "").strip()
    if text and not (text.isascii() and text.isdigit() and 0 < len(text) < 10):
        raise UsageError(f"TDPASS_MOST_NODES={text!r} is no number of nodes; write one such as 50000")
    return int(text) if text else MOST_NODES


def _calls(nodes: Iterable[onnx.NodeProto], bodies: Mapping[_Key, object]) -> tuple[int, dict[_Key, int]]:
    """How many nodes there are that call no local function, and how often each function is called."""
    plain, called = 0, dict[_Key, int]()
    for node in nodes_within(nodes):
        key = (node.domain, node.op_type, node.overload)
        if key in bodies:
            called[key] = called.get(key, 0) + 1
        else:
            plain += 1
    return plain, called


def _expanded(calls: tuple[int, Mapping[_Key, int]], sizes: Mapping[_Key, int]) -> int:
    plain, called = calls
    return plain + sum(times * max(sizes[key], 1) for key, times in called.items())


def _count(number: int) -> str:
    """The number; of one that has more digits than anybody reads, how large it is."""
    return f"{number:,}" if number < 10**15 else f"more than 10^{(number.bit_length() - 1) * 3 // 10}"


def check_loops(proto: onnx.ModelProto, what: str) -> None:
    """Raise `InvalidModelError` for a loop that provably never ends.

    Nothing changes its condition, and no count or too high a one ends it. Others may do so, which is found
    when they run; see `session`.
    """
    known: dict[str, onnx.TensorProto] = {}
    for graph in graph_protos(proto):
        known.update((tensor.name, tensor) for tensor in graph.initializer)
        known.update((node.output[0], node.attribute[0].t) for node in graph.node if _is_constant(node))
    for node in nodes_within(proto.graph.node):
        if node.op_type == "Loop" and not node.domain:
            trips = _trips(node, known)
            if trips is None or trips > MOST_TRIPS:
                times = "for ever" if trips is None else f"{trips:,} times"
                raise InvalidModelError(
                    f"{what}: loop {node.name or node.output[0]!r} would run {times}, as nothing changes "
                    "its condition; "
                    f"give it a trip count of at most {MOST_TRIPS:,}, or a condition that becomes false"
                )


def _is_constant(node: onnx.NodeProto) -> bool:
    return (
        node.op_type == "Constant"
        and len(node.output) == 1
        and len(node.attribute) == 1
        and node.attribute[0].HasField("t")
    )


def _trips(node: onnx.NodeProto, known: Mapping[str, onnx.TensorProto]) -> int | None:
    """How often a loop runs at most: 0 where that is decided while it runs, None where nothing ends it."""
    body = next((attribute.g for attribute in node.attribute if attribute.name == "body"), None)
    limit, condition = (*node.input[:2], "", "")[:2]
    if body is None or not body.output or len(body.input) < 2 or (limit and limit not in known):
        return 0
    if not _stays_true(body, condition, known):
        return 0
    return int(onnx.numpy_helper.to_array(known[limit]).reshape(-1)[0]) if limit else None


def _stays_true(body: onnx.GraphProto, condition: str, known: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a loop's condition is true at first and after every run of its body, as far as one can see."""
    if condition and not _is_true(condition, known):
        return False
    copied = {
        node.output[0]: node.input[0]
        for node in body.node
        if node.op_type == "Identity" and node.input and node.output
    }
    name = body.output[0].name
    for _ in range(len(copied)):
        name = copied.get(name, name)
    return name == body.input[1].name or _is_true(name, known)


def _is_true(name: str, known: Mapping[str, onnx.TensorProto]) -> bool:
    return name in known and bool(onnx.numpy_helper.to_array(known[name]).all())


def physical_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
