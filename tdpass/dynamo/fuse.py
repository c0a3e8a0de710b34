"""Fusing the chains of a graph: each becomes one operator, with its epilogue, on packed weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from tdpass.dynamo.chains import GraphChain, GraphReader, norm_inputs
from tdpass.dynamo.draft import Draft
from tdpass.dynamo.links import read_link
from tdpass.fusing.choose import Verdict, choose, served
from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import ChainCall, Layout
from tdpass.fusing.torch_calls import in_torch
from tdpass.kernels.conv_chain import CONV_CHAIN, packing
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.stage import Lanes
from tdpass.layers.derived import ChannelsInnermost, PackChain
from tdpass.models.torch.fused.integer_graph import join_integers
from tdpass.models.torch.graphs.graph_calls import argument, hint, mutates, tensor_of

log = logging.getLogger("tdpass.backend")

# Methods that read strides: a graph that calls one keeps the layout that it was recorded in.
_STRIDE_READERS = {
    "view",
    "view_as",
    "as_strided",
    "as_strided_",
    "set_",
    "resize_",
    "stride",
    "is_contiguous",
    "storage_offset",
}


def fuse_chains(
    draft: Draft, *, measure: bool = True, channels_last: bool = True, alone: bool = False
) -> int:
    """Replace every chain that is faster as one operator, and with `alone` every single layer that is.

    Returns how many, integer chains among them, which take in what follows them. The layout of
    four-dimensional activations is the one in which the chains together take less time; integer chains want
    channels innermost.  Dynamic sizes are measured as they are in the example.
    """
    joined = join_integers(draft.graph)
    found = find_chains(GraphReader(draft.graph, draft.stored), alone=alone)
    chains = [chain for chain in found if _reason(chain, measure=measure) == ""]
    layout: Layout = "contiguous"
    totals: dict[Layout, float] = {}
    verdicts: dict[Layout, dict[GraphChain, Verdict]] = {}
    bytes_of_images = any((value := tensor_of(node)) is not None and value.dim() == 4 for node in joined)
    for option in _layouts(draft, chains, bytes_of_images, channels_last=channels_last):
        verdicts[option] = {chain: _verdict(draft, chain, option, measure=measure) for chain in chains}
        totals[option] = sum(verdict.best for verdict in verdicts[option].values())
        layout = option if totals[option] < totals.get(layout, float("inf")) or not measure else layout
    results: dict[Node, Node] = {}
    for chain in chains:
        verdict = verdicts[layout][chain]
        if verdict.lanes is None:
            log.info(
                "%s: left as %d layers, %.1f us against %.1f us fused",
                chain.result.name,
                len(chain.links),
                verdict.plain * 1e6,
                verdict.seconds * 1e6,
            )
            continue
        results[chain.result] = _rewrite(draft, chain, verdict.lanes, results)
    if layout == "channels_last":
        lay_channels_last(draft)
    fused = sum(verdict.lanes is not None for verdict in verdicts[layout].values())
    log.info("%d of %d chains fused, activations %s", fused, len(chains), layout)
    return fused + len(joined)


def _reason(chain: GraphChain, *, measure: bool) -> str:
    """Why a chain cannot be fused; empty where it can."""
    values = (tensor_of(chain.x), tensor_of(chain.result))
    if values[0] is None or values[1] is None:
        return "its sizes are not known"
    if not measure and values[0].device.type == "cpu" and values[1].dtype in (torch.float32, torch.bfloat16):
        return ""
    return served(values[0].device.type, values[1].dtype)


def _layouts(
    draft: Draft, chains: Sequence[GraphChain], bytes_of_images: bool, *, channels_last: bool
) -> list[Layout]:
    """The layouts to choose from."""
    images = bytes_of_images or any(chain.links[0].axes == 2 for chain in chains)
    reads_strides = any(
        node.op == "call_method" and node.target in _STRIDE_READERS for node in draft.graph.nodes
    )
    writes = any(mutates(user) for node in draft.inputs for user in node.users)
    if not images or not channels_last or reads_strides or writes:
        return ["contiguous"]
    return ["channels_last"] if bytes_of_images else ["contiguous", "channels_last"]


def _verdict(draft: Draft, chain: GraphChain, layout: Layout, *, measure: bool) -> Verdict:
    x, result = tensor_of(chain.x), tensor_of(chain.result)
    assert x is not None
    assert result is not None
    laid: Layout = layout if chain.spec.axes == 2 else "contiguous"
    call = ChainCall(chain.spec, tuple(map(hint, x.shape)), result.dtype, laid, draft.frozen)
    verdict = choose([in_torch(call)], measure=measure)
    return (
        verdict
        if chain.lanes is None
        else Verdict(verdict.lanes or chain.lanes, verdict.seconds, verdict.plain)
    )


def _rewrite(draft: Draft, chain: GraphChain, lanes: Lanes, results: Mapping[Node, Node]) -> Node:
    """The call that stands for the chain.

    `results` are those of chains rewritten before, which it may read.
    """
    graph, spec = draft.graph, chain.spec
    result = tensor_of(chain.result)
    assert result is not None
    packed_for = packing(lanes, result.dtype)
    *weights, bias = _packed(draft, chain, packed_for)
    with graph.inserting_before(chain.result):
        x = results.get(chain.x, chain.x)
        residual = None if chain.residual is None else results.get(chain.residual, chain.residual)
        if tensor_of(x).dtype != result.dtype:  # type: ignore[union-attr]  # autocast would have converted it
            x = graph.call_method("to", (x, result.dtype))
        if spec.linear:
            call = graph.call_function(
                LINEAR_CHAIN.call, (x, weights, bias, residual, spec.widths, spec.activation)
            )
        else:
            if spec.axes == 1:
                x = graph.call_method("unsqueeze", (x, 2))
                residual = None if residual is None else graph.call_method("unsqueeze", (residual, 2))
            call = graph.call_function(
                CONV_CHAIN.call, (x, weights, bias, residual, spec.integers, spec.activation, packed_for)
            )
            if spec.axes == 1:
                call = graph.call_method("squeeze", (call, 2))
        call.meta = dict(chain.result.meta)
    draft.replace(chain.nodes, call)
    return call


def _packed(draft: Draft, chain: GraphChain, lanes: Lanes) -> list[Any]:
    """Packed weights as inputs of the graph, and the bias or None."""
    sources = [link.weight for link in chain.links]
    transposed = tuple(link.transposed for link in chain.links)
    if chain.norm is None:
        return [*draft.derive(PackChain(chain.spec.stages, lanes, transposed), sources), chain.bias]
    tensors = norm_inputs(chain.norm)
    affine = (tensors[2] is not None, tensors[3] is not None)
    recipe = PackChain(
        chain.spec.stages,
        lanes,
        transposed,
        chain.bias is not None,
        float(argument(chain.norm, 7, "eps", 1e-5)),
        affine,
    )
    return draft.derive(recipe, [node for node in (*sources, chain.bias, *tensors) if node is not None])


def lay_channels_last(draft: Draft) -> None:
    """Channels innermost in all images that enter the graph and in the weights of the convolutions left.

    What leaves it lies as it did.
    """
    weights = draft.stored
    last: Node = draft.inputs[-1]
    for node in draft.inputs:
        value = tensor_of(node)
        if (
            node in weights
            or value is None
            or value.dim() != 4
            or not value.is_floating_point()
            or not node.users
        ):
            continue
        with draft.graph.inserting_after(last):
            _replace_reads(
                node, draft.graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
            )
    for node in list(draft.graph.nodes):
        link = read_link(node, weights)
        if link is not None and link.axes == 2:
            (laid,) = draft.derive(ChannelsInnermost(), [link.weight])
            node.replace_input_with(link.weight, laid)
    _restore_outputs(draft)


def _restore_outputs(draft: Draft) -> None:
    output = next(node for node in reversed(draft.graph.nodes) if node.op == "output")
    for node in output.all_input_nodes:
        value = tensor_of(node)
        if value is not None and value.dim() == 4 and value.is_contiguous():
            with draft.graph.inserting_before(output):
                laid = draft.graph.call_method("contiguous", (node,))
            output.replace_input_with(node, laid)


def _replace_reads(node: Node, laid: Node) -> None:
    laid.meta = dict(node.meta)
    node.replace_all_uses_with(laid, delete_user_cb=lambda user: user is not laid)
