"""Finding the sites of an ONNX graph, and the layers that hold weights but are left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

import tdpass.models.onnx.sites.attending
import tdpass.models.onnx.sites.coded_matchers
import tdpass.models.onnx.sites.other_matchers  # noqa: F401 - these fill the table of matchers
from tdpass.errors import InvalidModelError, PlanError
from tdpass.formats.layer import Layer
from tdpass.models.onnx.graph.bodies import runs_bodies
from tdpass.models.onnx.graph.folding import makers, number_sources, other_reader, sources
from tdpass.models.onnx.graph.graphs import bodies, opset_of
from tdpass.models.onnx.graph.names import site_names
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import finite, held, to_torch, torch_dtype
from tdpass.models.onnx.sites.as_stored import BY_CHANNEL, as_stored
from tdpass.models.onnx.sites.matchers import DeclinedNode, matcher_for, operator_name
from tdpass.models.onnx.sites.weight_use import WeightUse
from tdpass.site import Site


@dataclass(frozen=True)
class FoundSite:
    """A site and the nodes that use its weight, in the order of the graph.

    `present` is the layer of a weight that is stored as integers, in that form.
    """

    site: Site
    uses: tuple[WeightUse, ...]
    present: Layer | None = None

    @property
    def stored(self) -> ir.TensorProtocol:
        """The weight as the model stores it."""
        return self.uses[0].stored()

    @property
    def dtype(self) -> torch.dtype:
        """The weight's floating-point type."""
        return torch_dtype(self.stored.dtype)

    @property
    def kept(self) -> torch.dtype:
        """The type that the model stores it in, from which it may be cast each time it runs."""
        return torch_dtype(self.uses[0].stored_type())

    @property
    def copies(self) -> tuple[ir.TensorProtocol, ...]:
        """The same weight as the model stores it again, laid out for other nodes; it counts as one."""
        stored = [dict.fromkeys(number_sources(use.weight.value)) for use in self.uses]
        each = dict.fromkeys(value for values in stored if len(values) == 1 for value in values)
        return tuple(held(value) for value in each)[1:]

    def weight(self) -> Tensor:
        """The weight as `[o, i, *kernel]` in memory of its own.

        Raises `InvalidModelError` unless every number is finite.
        """
        try:
            weight = self.weight_view().clone(memory_format=torch.contiguous_format)
        except (ValueError, OSError, MemoryError) as error:
            raise InvalidModelError(
                f"the weight of {self.site.name!r} cannot be read: {error}; restore the model's data file"
            ) from error
        return finite(weight, self.site.name)

    def weight_view(self) -> Tensor:
        """The weight as `[o, i, *kernel]`, sharing memory with the model where possible.

        It must not be written to.
        """
        return self.uses[0].canonical(to_torch(self.stored))

    def bias(self) -> Tensor | None:
        """The bias as `[o]`."""
        bias = self.uses[0].bias_tensor()
        return None if bias is None else finite(bias, self.site.name)


@dataclass(frozen=True)
class Findings:
    """All sites by name, in the order of first use, and the reasons for what is not one."""

    sites: Mapping[str, FoundSite]
    declined: Mapping[str, str]

    def without(self, reasons: Mapping[str, str]) -> Findings:
        """The same, but for sites that are left alone for a reason."""
        sites = {name: found for name, found in self.sites.items() if name not in reasons}
        return Findings(sites, {**self.declined, **reasons})


def find_sites(model: ir.Model, shapes: Shapes) -> Findings:
    """Group the uses of every weight, in the main graph and in the branches and bodies in it.

    Decline the weights that cannot be replaced as a whole.
    """
    uses: dict[ir.Value, list[WeightUse]] = {}
    refused: dict[ir.Value, tuple[ir.Node, str]] = {}
    for node, place in _nodes(model):
        matcher = matcher_for(node)
        try:
            use = None if matcher is None else matcher.match(node, shapes)
        except DeclinedNode as declined:
            refused.setdefault(declined.weight, (node, declined.reason))
            continue
        if use is not None and place:
            refused.setdefault(use.weight.value, (node, f"the layer is inside {place}"))
        elif use is not None:
            uses.setdefault(use.weight.value, []).append(use)
    grouped: dict[ir.Value, tuple[WeightUse, ...]] = {}
    for value, group in _tied(uses).items():
        if value in refused:
            continue
        reason, shared = _as_one(group)
        if reason is None:
            grouped[value] = shared
        else:
            refused[value] = (group[0].node, reason)
    names = site_names([(value, group[0].node) for value, group in grouped.items()])
    left = site_names([(value, node) for value, (node, _) in refused.items()], frozenset(names))
    sites = {name: _found(name, group) for name, group in zip(names, grouped.values(), strict=True)}
    return Findings(sites, {name: reason for name, (_, reason) in zip(left, refused.values(), strict=True)})


def _nodes(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Every node, with a description of the place where it is run by nothing but a runtime."""
    yield from _within(model.graph, opset_of(model), "")
    for function in model.functions.values():
        for node in function.all_nodes():
            yield node, f"the model-local function {function.name}"


def _within(graph: ir.Graph, opset: int, place: str) -> Iterator[tuple[ir.Node, str]]:
    for node in graph:
        yield node, place
        inner = "" if runs_bodies(node, opset) else f"the body of a {operator_name(node)}"
        for body in bodies(node).values():
            yield from _within(body, opset, place or inner)


def _tied(uses: Mapping[ir.Value, list[WeightUse]]) -> dict[ir.Value, list[WeightUse]]:
    """The same, with the layers of a table in the table's group, first.

    They may read a copy of it the other way round, that a node or the exporter made.
    """
    found = {value: list(group) for value, group in uses.items()}
    tables = [value for value, group in uses.items() if all(use.reads_rows for use in group)]
    for table in tables:
        for value, group in uses.items():
            if value not in tables and value in found and _same_weight(uses[table][0], group[0]):
                found[table] = [*found.pop(value), *found[table]]
    return found


def _same_weight(table: WeightUse, layer: WeightUse) -> bool:
    if layer.kind != table.kind or layer.canonical_shape() != table.canonical_shape():
        return False
    ours, theirs = (use.canonical(to_torch(use.stored())) for use in (table, layer))
    return torch.equal(ours, theirs)


def _found(name: str, uses: tuple[WeightUse, ...]) -> FoundSite:
    site = _site(name, uses)
    return FoundSite(site, uses, as_stored(site, uses[0]))


def _as_one(uses: list[WeightUse]) -> tuple[str | None, tuple[WeightUse, ...]]:
    """Why the uses cannot be replaced together, or None and the uses to replace."""
    values = list(dict.fromkeys(use.weight.value for use in uses))
    known = {(use.node, use.weight.index) for use in uses}
    for value in values:
        if value.is_graph_output() or any(source.is_graph_output() for source in sources(value)):
            return "the weight is also a graph output", ()
        outside = (usage.node for usage in value.uses() if (usage.node, usage.idx) not in known)
        beside = [node for other in values if other is not value for node in makers(other)]
        other = next((node for node in outside if node not in beside), None)
        other = other or other_reader(value, known={use.node for use in uses})
        if other is not None:
            return f"the weight is also read by a {other.op_type} node", ()
    if uses[0].found_integers() is not None and as_stored(_site("", uses), uses[0]) is None:
        return BY_CHANNEL, ()
    layers = [use for use in uses if not use.reads_rows]
    if len({use.layer_geometry for use in layers}) > 1:
        return "the weight is shared by layers of different geometry or orientation", ()
    if len(layers) < len(uses) and any(use.bias is not None for use in layers):
        if any(use.absorbed is None for use in layers):
            return "the weight is that of a table, which has no bias, and of a layer with one", ()
        uses = [use.without_bias() for use in uses]
    elif len({use.bias_identity for use in uses}) > 1:
        if any(use.bias is not None and use.absorbed is None for use in uses):
            return "the weight is shared by layers with different biases", ()
        uses = [use.without_bias() for use in uses]
    return None, tuple(uses)


def _site(name: str, uses: Sequence[WeightUse]) -> Site:
    use = uses[0]
    itemsize = torch_dtype(use.stored_type()).itemsize
    return Site(
        name,
        use.kind,
        use.canonical_shape(),
        **vars(use.window),
        bias=use.bias is not None,
        itemsize=itemsize,
        table=any(use.reads_rows for use in uses),
    )


def check_fits(layer: Layer, site: Site) -> None:
    """Raise `PlanError` unless a layer has its site's geometry, and its form's factor and bias shapes."""
    wanted = layer.form.on(site).geometry()
    if layer.site.geometry() != wanted:
        raise PlanError(
            f"the layer is for {layer.site.geometry()}, but site {site.name!r} is {wanted}; factorize the "
            "weight of this site"
        )
    expected = layer.storage.sizes()
    given = {label: tuple(factor.shape) for label, factor in layer.factors.items()}
    if given != expected:
        raise PlanError(
            f"the {layer.format} factors of {site.name!r} have shapes {given}, but '{layer.form}' "
            f"wants {expected}"
        )
    if layer.bias is not None and tuple(layer.bias.shape) != (layer.site.o,):
        raise PlanError(
            f"a bias of shape {tuple(layer.bias.shape)} does not fit site {site.name!r}; it takes "
            f"[{layer.site.o}]"
        )
