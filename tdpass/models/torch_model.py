"""Torch models, by module surgery: class, hooks, control flow and parameter names of everything else stay."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tdpass.errors import InvalidModelError, PlanError
from tdpass.formats.base import Layer
from tdpass.models.base import Batch
from tdpass.models.copying import copied
from tdpass.models.extents import alike, with_extents
from tdpass.models.factorized import Factorized
from tdpass.models.fused import Fused, layer_by_layer
from tdpass.models.module_values import check_filled, check_open, input_types
from tdpass.models.signature import Input, Signature
from tdpass.models.torch_fuse import fuse_layers
from tdpass.models.torch_sites import Matched, find_sites
from tdpass.models.torch_state import save_module
from tdpass.products import Counted, counting
from tdpass.site import Site
from tdpass.tape import LiveTape, Ref, Tape, record, site_order


class TorchModel:
    """An `nn.Module` as the passes see it; rewrites `module` in place."""

    frontend = "torch"
    suffix = ".safetensors"

    def __init__(self, module: nn.Module, example: Batch | None = None) -> None:
        check_open(module)
        self.module = module
        self._input_type: torch.dtype | None = None
        self.folded: list[str] = []
        found, self._declined = find_sites(module)
        self._by_name = {matched.site.name: matched for matched in found}
        self._replaced: dict[str, list[Factorized]] = {}
        self._example = example
        self._observed: tuple[Batch, ...] = ()
        self._macs = 0
        self._twin: tuple[object, TorchModel] | None = None
        self._adopt_factorized()
        self.check()
        if example is not None:
            self.observe(example)

    def sites(self) -> Sequence[Site]:
        return [matched.site for matched in self._by_name.values()]

    def declined(self) -> Mapping[str, str]:
        return dict(self._declined)

    def weight(self, name: str) -> Tensor:
        check_filled(self.module)
        return self._matched(name).weight.detach().cpu()

    def bias(self, name: str) -> Tensor | None:
        bias = self._matched(name).modules[0].bias
        return None if bias is None else bias.detach().cpu()  # type: ignore[operator]

    def layer(self, name: str) -> Layer | None:
        modules = self._replaced.get(name)
        return modules[0].layer() if modules else None

    def replace(self, name: str, layer: Layer) -> None:
        matched = self._matched(name)
        if layer.site.shape != matched.site.shape:
            raise PlanError(f"a layer of shape {layer.site.shape} cannot replace site {name!r} of shape {matched.site.shape}; plan for this model")
        weight = matched.weight
        factors = {key: nn.Parameter(factor.to(weight), requires_grad=weight.requires_grad) for key, factor in layer.factors.items()}
        shared = Layer(matched.site, layer.format, layer.rank, factors)
        modules: list[Factorized] = []
        for dense in matched.modules:
            bias = _bias_for(dense, matched.modules[0], layer.bias, weight)
            pads = tuple(dense._reversed_padding_repeated_twice) if _pads_itself(dense) else ()  # type: ignore[arg-type]
            module = Factorized(shared, bias, str(getattr(dense, "padding_mode", "zeros")), pads)
            module.train(dense.training)
            module._forward_hooks, module._forward_pre_hooks = dense._forward_hooks, dense._forward_pre_hooks
            current = self._replaced[name][len(modules)] if name in self._replaced else dense
            if isinstance(current, Fused):  # it may have taken an activation in
                module = Fused.of(module, current.activation, current.lanes)
            modules.append(module)
            self._swap(dense, current, module)
        self._replaced[name] = modules

    def record(self, batch: Batch) -> Tape:
        return self._record(batch)

    def _record(self, batch: Batch, *, replayed: bool = True) -> Tape:
        placed = self._placed(batch)
        held = (*self.module.parameters(), *self.module.buffers())
        sites = self._dense_weights()
        tape = record(lambda: self._answer(placed), placed.tensors, sites, samples=placed.size, held=held, replayed=replayed)
        if not isinstance(tape, LiveTape):
            return tape
        twin = self._as_it_is()  # layers of this one will be replaced while the tape is still played
        return replace(tape, run=lambda: twin._answer(placed), sites=twin._dense_weights())

    def _dense_weights(self) -> dict[int, str]:
        return {id(matched.weight): name for name, matched in self._by_name.items() if name not in self._replaced}

    def _as_it_is(self) -> TorchModel:
        """A copy, the same one until a parameter or buffer changes."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        version = tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
        if self._twin is None or self._twin[0] != version:
            twin = self.clone()
            twin._twin = None
            self._twin = version, twin
        return self._twin[1]

    def observe(self, *batches: Batch) -> None:
        first = self.record(batches[0])  # the whole call: two samples of it may reach fewer layers, or be two steps of one
        self._observed = batches if first.doubt or not alike(batches) else batches[:1]
        tapes = [first, *(self._record(batch, replayed=False) for batch in self._observed[1:])]
        self._example = batches[0].part(0, 2)
        try:
            self.run(self._example)
        except InvalidModelError:
            self._example = batches[0]
        self._macs = self.count().per_sample
        called = site_order(tapes)
        ordered = [name for name in called if name in self._by_name] + [name for name in self._by_name if name not in called]
        self._by_name = {name: replace(self._by_name[name], site=with_extents(self._by_name[name].site, tapes)) for name in ordered}
        for name in set(self._by_name) - set(called) - set(self._replaced):
            self._declined[name] = "it is not called when the model runs on the data"
            del self._by_name[name]

    def run(self, batch: Batch) -> object:
        placed = self._placed(batch)
        with torch.no_grad(), self._evaluating():
            return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, _plain(self._call(placed)))

    def count(self, batch: Batch | None = None) -> Counted:
        calls = self._observed if batch is None else (batch,)
        placed = [self._placed(call) for call in calls]
        with self._evaluating(), counting() as counter, layer_by_layer(self.module):
            for call in placed:
                self._call(call)
        return counter.counted(sum(call.size for call in calls) or 1)

    def fold_batchnorm(self) -> Sequence[str]:
        if self._example is None:
            return ()
        tape = self.record(self._example)
        norms = {id(m.running_mean): m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None}
        uses = [id(call.args[1]) for call in tape.calls if call.func is F.batch_norm and len(call.args) > 1]
        folded: list[str] = []
        for name, indices in tape.site_calls.items():
            norm = self._norm_after(tape, indices, norms)
            matched = self._matched(name)
            if norm is None or uses.count(id(norm.running_mean)) != 1 or len(matched.modules) != 1:
                continue
            self._fold(matched, norm)
            folded.append(name)
        return folded

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        norms = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
        if not norms:
            return None
        before = [copy.deepcopy((m.running_mean, m.running_var, m.num_batches_tracked, m.momentum)) for m in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad(), self._evaluating():
            hooks = [norm.register_forward_pre_hook(_learn_where_it_can) for norm in norms]
            for batch in batches:
                self._call(self._placed(batch))
            for norm, hook in zip(norms, hooks, strict=True):
                hook.remove()
                norm.training = False
        for norm, (*statistics, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not norm.num_batches_tracked:  # nothing that the data holds reaches it, or single values only
                _set_statistics(norm, statistics)

        def undo() -> None:
            for norm, (*statistics, _) in zip(norms, before, strict=True):
                _set_statistics(norm, statistics)

        return undo

    def fuse(self, note: Callable[[str], None], decline: Callable[[str, str], None], samples: Batch | None = None) -> bool:
        batch = samples or self._example
        found = fuse_layers(self.module, None if batch is None else lambda: self.run(batch), note, decline)
        for layer, fused in found.items():
            self._swap(layer, layer, fused)
        self._replaced = {name: [found.get(module, module) for module in modules] for name, modules in self._replaced.items()}
        return bool(found)

    def example(self) -> Batch | None:
        return self._example

    def signature(self) -> Signature:
        given = inspect.signature(self.module.forward).parameters.values()
        named = [entry for entry in given if entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)]
        return Signature(tuple(Input(entry.name, required=entry.default is entry.empty) for entry in named), others=len(named) < len(given))

    def fixed_batch(self) -> int | None:
        return self.signature().fixed_batch()

    def macs(self) -> int:
        return self._macs

    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.module.parameters())

    def clone(self) -> TorchModel:
        """A deep copy of the module and of what is known about it."""
        twin = copy.copy(self)
        memo: dict[int, Any] = {}
        twin.module = copied(self.module, memo)
        twin.folded = list(self.folded)
        twin._by_name = {
            name: Matched(m.site, copy.deepcopy(m.weight, memo), tuple(copy.deepcopy(module, memo) for module in m.modules), m.paths)
            for name, m in self._by_name.items()
        }
        twin._declined = dict(self._declined)
        twin._replaced = {name: [copy.deepcopy(module, memo) for module in modules] for name, modules in self._replaced.items()}
        return twin

    def check(self) -> None:
        for name, parameter in self.module.named_parameters():
            if not parameter.is_meta and not bool(torch.isfinite(parameter.detach()).all()):
                raise InvalidModelError(f"parameter {name!r} holds NaN or infinite values; the model cannot be compressed")
        for name, buffer in self.module.named_buffers():
            if not buffer.is_meta and bool(torch.isnan(buffer).any()):  # an infinite one may be a mask
                raise InvalidModelError(f"buffer {name!r} holds NaN; re-estimate or load it before compressing")

    def unwrap(self) -> object:
        return self.module

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        save_module(self.module, self._replaced, self.folded, path, metadata)

    def _matched(self, name: str) -> Matched:
        if name not in self._by_name:
            raise PlanError(f"the model has no site {name!r}; `tdpass inspect` lists them")
        return self._by_name[name]

    def _call(self, batch: Batch) -> object:
        return self.module(*batch.args, **batch.kwargs)

    def _answer(self, placed: Batch) -> object:
        with self._evaluating():
            return self._call(placed)

    def _placed(self, batch: Batch) -> Batch:
        """The batch on the model's device, floating-point tensors in the type that it runs with."""
        check_filled(self.module)
        types = input_types(self.module, batch)
        if self._input_type not in types:
            self._input_type = types[0] if len(types) == 1 else self._type_it_takes(batch, types)
        return self._moved(batch, self._input_type)

    def _type_it_takes(self, batch: Batch, types: Sequence[torch.dtype]) -> torch.dtype | None:
        """The first of these types in which the model runs."""
        for dtype in types:
            try:
                with torch.no_grad():
                    self._answer(self._moved(batch, dtype))
            except InvalidModelError:
                continue
            return dtype
        return next(iter(types), None)

    def _moved(self, batch: Batch, dtype: torch.dtype | None) -> Batch:
        device = next((parameter.device for parameter in self.module.parameters()), None)
        return batch.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self.module.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        except (TypeError, RuntimeError, IndexError, ValueError, AssertionError) as error:
            raise InvalidModelError(
                f"the model does not run on the given data: {type(error).__name__}: {str(error).splitlines()[0]}; "
                "pass example_inputs or data of the shape and type that it takes"
            ) from error
        finally:
            for module in training:
                module.training = True

    def _swap(self, dense: nn.Module, current: nn.Module, new: nn.Module) -> None:
        for parent in list(self.module.modules()):
            for child_name, child in list(parent._modules.items()):
                if child is current or child is dense:
                    setattr(parent, child_name, new)
        if self.module is current or self.module is dense:
            self.module = new

    def _norm_after(self, tape: Tape, indices: list[int], norms: Mapping[int, nn.Module]) -> Any:
        if len(indices) != 1:
            return None
        number = next(tape.calls[indices[0]].writes())
        readers = tape.readers(number)
        if len(readers) != 1 or tape.is_output(number):
            return None
        call = tape.calls[readers[0]]
        if call.func is not F.batch_norm or call.args[0] != Ref(number) or len(call.args) < 2:
            return None
        return norms.get(id(call.args[1]))

    def _fold(self, matched: Matched, norm: Any) -> None:
        dense: Any = matched.modules[0]
        with torch.no_grad():
            scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight.double()
            bias = -norm.running_mean.double() if dense.bias is None else dense.bias.double() - norm.running_mean.double()
            bias = bias * scale if norm.bias is None else bias * scale + norm.bias.double()
            weight = matched.weight
            weight.copy_(weight.double() * scale.reshape(-1, *(1 for _ in weight.shape[1:])))
            dense.bias = nn.Parameter(bias.to(weight))
        self.folded.extend(path for path, module in self.module.named_modules(remove_duplicate=False) if module is norm)
        self._swap(norm, norm, nn.Identity())
        self._by_name[matched.site.name] = replace(matched, site=replace(matched.site, bias=True))

    def _adopt_factorized(self) -> None:
        for path, module in self.module.named_modules():
            if isinstance(module, Factorized):
                self._declined[path] = f"it is factored already ({module.format.name}, rank {module.rank})"
                for name in [name for name in self._declined if name.startswith(path + ".")]:
                    del self._declined[name]


def _bias_for(dense: Any, first: Any, bias: Tensor | None, like: Tensor) -> nn.Parameter | None:
    """The bias of one of several layers that share a weight: its own, changed as the first one's was."""
    if bias is None:
        return None
    placed = bias.to(like)
    if dense is not first:
        own, reference = (torch.zeros_like(placed) if m.bias is None else m.bias.detach() for m in (dense, first))
        placed = placed + own - reference
    return nn.Parameter(placed.clone(), requires_grad=like.requires_grad)


def _learn_where_it_can(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Estimate statistics from this call unless it holds a single value per channel, which has no variance."""
    norm.training = not args or args[0].numel() > args[0].shape[1]


def _set_statistics(norm: Any, values: Sequence[Tensor | None]) -> None:
    for buffer, value in zip((norm.running_mean, norm.running_var, norm.num_batches_tracked), values, strict=True):
        if buffer is not None and value is not None:
            buffer.copy_(value)


def _pads_itself(module: nn.Module) -> bool:
    return getattr(module, "padding_mode", "zeros") != "zeros"


def _plain(result: object) -> object:
    return dict(result) if isinstance(result, Mapping) else result
