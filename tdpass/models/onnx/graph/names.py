"""Names of sites, equal to the torch module's path, and of new values, which clash with nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from tdpass.models.onnx.graph.folding import number_sources
from tdpass.models.onnx.graph.tensors import held

_MEANINGLESS = re.compile(
    r"(onnx::\w+|_?val|const(ant)?|tensor|init(ializer)?|param(eter)?|weight|[a-z])?[_.:]?\d+|"
    r"const(ant)?(_\d+)?_output(_\d+)?|.*/const(ant)?(_\d+)?_output_\d+",
    re.IGNORECASE,
)
# what torch names the parameters that a norm of a weight is computed from
_NORMED = re.compile(r"\.(parametrizations\.weight\.original\d*|weight_(g|v|orig))$")
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_SCOPES = "pkg.torch.onnx.name_scopes"


def site_names(weights: Sequence[tuple[ir.Value, ir.Node]], taken: frozenset[str] = frozenset()) -> list[str]:
    """A unique name for each weight and the first node that reads it, in order.

    The initializer's own name, without `.weight`, wins where it says something.  Else the module path that
    the exporter noted: torch folds a transposed weight into `val_0` but keeps its origin in the metadata, and
    the TorchScript exporter keeps the path in the node's name.  Names that are said outright are given away
    first.
    """
    candidates = [list(_candidates(value, node)) for value, node in weights]
    names: dict[int, str] = {}
    used = set(taken)
    for outright in (True, False):
        for index, ((value, _), options) in enumerate(zip(weights, candidates, strict=True)):
            if index in names or outright is not _meaningful(value.name):
                continue
            names[index] = next((option for option in options if option not in used), None) or _numbered(
                options[0], used
            )
            used.add(names[index])
    return [names[index] for index in range(len(weights))]


def _meaningful(name: str | None) -> bool:
    return bool(name) and _MEANINGLESS.fullmatch(name or "") is None


def _stem(name: str) -> str:
    return _NORMED.sub("", name).removesuffix("_quantized").removesuffix(".weight")


def _candidates(value: ir.Value, node: ir.Node) -> Iterator[str]:
    made = value.producer()
    integers = made.inputs[0] if made is not None and made.op_type == "DequantizeLinear" else None
    if integers is not None and integers.name and _meaningful(integers.name):
        yield _stem(integers.name.removesuffix(".kernel"))
    origin = _listed(value.metadata_props.get(_FOLDED_FROM))
    if len(origin) > 1:  # its own name is that of an operator
        yield from _scopes(node)
    for source in sorted(number_sources(value), key=lambda source: -held(source).size):
        if source.name and _meaningful(source.name):
            yield _stem(source.name)
    if value.name and _meaningful(value.name):
        yield _stem(value.name)
    if len(origin) == 1 and _meaningful(origin[0]):
        yield _stem(origin[0])
    yield from places_of(node)
    yield _stem(value.name or "") or "weight"


def places_of(node: ir.Node) -> Iterator[str]:
    """Where the exporter says that a node comes from, the surest first; last its own name."""
    yield from _scopes(node)
    path = (node.name or "").split("/")
    if len(path) > 2 and not path[0]:
        yield ".".join(path[1:-1])
    if node.name:
        yield node.name


def _scopes(node: ir.Node) -> Iterator[str]:
    scopes = _listed(node.metadata_props.get(_SCOPES))
    if len(scopes) >= 2 and scopes[-2]:
        yield scopes[-2]


def _listed(text: str | None) -> list[str]:
    try:
        parsed = ast.literal_eval(text or "[]")
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in parsed] if isinstance(parsed, list) else []


def _numbered(name: str, used: set[str]) -> str:
    number = 2
    while f"{name}_{number}" in used:
        number += 1
    return f"{name}_{number}"


class FreshNames:
    """Names that no value and no node of a model has, in any of its graphs: ONNX forbids shadowing."""

    def __init__(self, model: ir.Model) -> None:
        self._values: set[str] = set()
        self._nodes: set[str] = set()
        for graph in model.graphs():
            self._values.update(
                value.name for value in (*graph.inputs, *graph.initializers.values()) if value.name
            )
            for node in graph:
                self._values.update(output.name for output in node.outputs if output.name)
                if node.name:
                    self._nodes.add(node.name)

    def value(self, wanted: str) -> str:
        """Claim a name for a value."""
        return self._claim(wanted, self._values)

    def node(self, wanted: str) -> str:
        """Claim a name for a node."""
        return self._claim(wanted, self._nodes)

    @staticmethod
    def _claim(wanted: str, used: set[str]) -> str:
        name = wanted if wanted not in used else _numbered(wanted, used)
        used.add(name)
        return name
