"""Fusing the factored layers of a module: which, in which lanes, and with which activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.errors import InvalidModelError
from tdpass.formats.lowering import Lowered, chain_of, lower
from tdpass.fusing.choose import Verdict, choose, served
from tdpass.fusing.spec import ChainCall, ChainSpec, Layout
from tdpass.fusing.together import Shared, choose_together
from tdpass.fusing.torch_calls import in_torch
from tdpass.kernels.activation import clamp
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused
from tdpass.layers.integer_chain import IntegerChain
from tdpass.layers.one_operator import OneOperator
from tdpass.models.base import Batch
from tdpass.models.torch.fused.as_operator import AsOperator, as_operator
from tdpass.models.torch.fused.handed_bytes import handed_bytes
from tdpass.models.torch.modules.in_place import become

Calls = dict[int, list[Tensor]]


def fuse_layers(
    module: nn.Module,
    example: Batch | None,
    run: Callable[[Batch], object],
    note: Callable[[str], None],
    decline: Callable[[str, str], None],
) -> dict[Factorized, Factorized]:
    """What each factored layer that is faster so becomes.

    The activations they take in are replaced by identities at once. `run` calls the module on `example`,
    which is what to measure at; without it nothing is measured.
    """
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, Factorized) and not isinstance(layer, Fused | OneOperator)
    }
    inputs = None if example is None else _inputs(layers, lambda: run(example))
    found: dict[Factorized, Factorized] = {}
    others: dict[str, AsOperator] = {}
    plain = fused = 0.0
    for path, layer in layers.items():
        called = None if inputs is None else inputs[path]
        if layer.form.encoded or chain_of(layer.layer()) is None:
            made = as_operator(layer, called)
            if isinstance(made, str):
                decline(path, f"not fused: {made}")
            else:
                others[path] = made
            continue
        verdict = _verdict(layer, called)
        if isinstance(verdict, str):
            decline(path, f"not fused: {verdict}")
            continue
        plain, fused = plain + verdict.plain, fused + verdict.best
        if verdict.lanes is None:
            decline(
                path,
                f"not fused: {verdict.seconds * 1e6:.0f} us as one operator, {verdict.plain * 1e6:.0f} us "
                "as it is",
            )
            continue
        found[layer] = Fused.of(layer, _absorb(module, layer), verdict.lanes)
    for path in _chosen(module, others, example, note):
        made = others[path]
        made.call.activation = _absorb(module, layers[path])
        found[layers[path]] = made.call
    for path, made in others.items():
        if layers[path] not in found:
            decline(path, f"not fused: {made.why_not}")
    if layers:
        times = f", {plain * 1e6:.0f} us -> {fused * 1e6:.0f} us in these layers" if plain else ""
        note(f"{len(found)} of {len(layers)} factored layers are now one operator each{times}")
    else:
        note("there is no factored layer to fuse")
    return found


def chosen_operators(module: nn.Module, example: Batch, decline: Callable[[str, str], None]) -> nn.Module:
    """The module, changed in place: the factored layers that are measured faster so are one operator each.

    As `fuse_layers` measures them; `decline` takes a layer that stays as it is, and why.
    """

    def run(call: Batch) -> object:
        with torch.no_grad():
            return module(*call.args, **dict(call.kwargs))

    for layer, call in fuse_layers(module, example, run, lambda _line: None, decline).items():
        become(layer, call)
    return module


def _chosen(
    module: nn.Module, layers: Mapping[str, AsOperator], example: Batch | None, note: Callable[[str], None]
) -> list[str]:
    """The layers that save time by themselves, or with the bytes that they hand each other in graphs."""
    gains = {path: each.gain for path, each in layers.items()}
    chains = {path: each.call for path, each in layers.items() if isinstance(each.call, IntegerChain)}
    shared: list[Shared[str]] = []
    if example is not None and len(chains) > 1 and any(gains[path] <= 0 for path in chains):
        try:
            shared = handed_bytes(module, chains, example)
        except InvalidModelError as error:
            note(f"what integer layers save by handing on bytes is not known: {error}")
    chosen = choose_together(gains, shared)
    together = [path for path in layers if path in chosen and gains[path] <= 0]
    for path in together:
        layers[path].call.in_graphs = True
    if together:
        note(
            f"{len(together)} of the layers are one operator in graphs alone (torch.compile, deploy), where "
            "they are faster for the bytes that they hand on"
        )
    return [path for path in layers if path in chosen]


def _inputs(layers: Mapping[str, Factorized], run: Callable[[], object]) -> dict[str, list[Tensor]]:
    """What each layer is called with, as tensors without storage."""
    seen: dict[str, list[Tensor]] = {path: [] for path in layers}

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            del layer
            seen[path].append(
                torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device="meta")
            )

        return hook

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(path)).remove)
        run()
    return seen


def _verdict(layer: Factorized, inputs: list[Tensor] | None) -> Verdict | str:
    """The measured choice over all calls of a layer, or why there is none."""
    lowered = lower(layer.layer())
    assert lowered is not None
    parameter = next(layer.parameters())
    reason = served(parameter.device.type, parameter.dtype)
    if reason:
        return reason
    if inputs is None:
        size = (1, lowered.stages[0].inputs, *(1 for _ in range(lowered.axes)))
        return choose([in_torch(ChainCall(_spec(layer, lowered), size, parameter.dtype))], measure=False)
    if not inputs:
        return "it is not called when the model runs on the data"
    return choose([in_torch(_call(layer, lowered, x)) for x in inputs])


def _call(layer: Factorized, lowered: Lowered, x: Tensor) -> ChainCall:
    if layer.pads:
        x = F.pad(x, layer.pads, mode=layer.padding_mode)
    if x.dim() < lowered.axes + 2:
        x = x.unsqueeze(0)
    last = lowered.axes == 2 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout: Layout = "channels_last" if last else "contiguous"
    return ChainCall(_spec(layer, lowered), tuple(x.shape), x.dtype, layout)


def _spec(layer: Factorized, lowered: Lowered) -> ChainSpec:
    return ChainSpec(lowered.stages, lowered.axes, bias=layer.bias is not None)


def _absorb(module: nn.Module, layer: Factorized) -> str:
    """Take the activation that follows the layer's only place, in an `nn.Sequential`, out of the model.

    Returns its name.
    """
    places = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if child is layer
    ]
    if len(places) != 1 or layer._forward_hooks:
        return "identity"
    parent, name = places[0]
    if type(parent).forward is not nn.Sequential.forward:
        return "identity"
    names = list(parent._modules)
    after = names[names.index(name) + 1] if name != names[-1] else None
    following = None if after is None else parent._modules[after]
    activation = _activation(following)
    if after is None or activation is None:
        return "identity"
    parent._modules[after] = nn.Identity().train(parent.training)
    return activation


def _activation(module: nn.Module | None) -> str | None:
    """The name of an activation that an operator can end with; None for every other module."""
    if module is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    if type(module) is nn.Hardtanh:
        return clamp(module.min_val, module.max_val)
    return {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}.get(type(module))
