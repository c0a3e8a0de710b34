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
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from tdpass.errors import InvalidModelError, PlanError
from tdpass.formats.base import Layer
from tdpass.formats.storage import Storage
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused, layer_by_layer
from tdpass.models.base import Batch, no_reasons
from tdpass.models.extents import alike, with_extents
from tdpass.models.signature import Input, Signature
from tdpass.models.torch.called_layers import call_layers, runs_nested
from tdpass.models.torch.copying import copied
from tdpass.models.torch.fuse import fuse_layers
from tdpass.models.torch.in_place import Backup, become
from tdpass.models.torch.module_values import buffers_kept, check_filled, check_open, input_types
from tdpass.models.torch.norms import Fold, batchnorms, find_folds, same_answers
from tdpass.models.torch.readers import Run, entering, graph_readers, other_readers
from tdpass.models.torch.sites import Matched, find_sites
from tdpass.models.torch.state import save_module
from tdpass.models.torch.statistics import estimate_anew
from tdpass.products import Counted, counting
from tdpass.site import Site
from tdpass.tape import LiveTape, Tape, record, site_order


class TorchModel:
    """An `nn.Module` as the passes see it; rewrites `module` in place."""

    frontend = "torch"
    suffix = ".safetensors"

    def __init__(self, module: nn.Module, example: Batch | None = None) -> None:
        check_open(module)
        self.module = module
        self._input_type: torch.dtype | None = None
        found, self._declined = find_sites(module)
        self._by_name = {matched.site.name: matched for matched in found}
        self._replaced: set[str] = set()
        self._example = example
        self._observed: tuple[Batch, ...] = ()
        self._macs = 0
        self._twin: tuple[object, TorchModel] | None = None
        self._adopt_factorized()
        if isinstance(module, GraphModule):
            self._leave(graph_readers(module, self._by_name))
        self.check()
        if example is not None:
            self.observe(example)

    def sites(self) -> Sequence[Site]:
        return [matched.site for matched in self._by_name.values()]

    def declined(self) -> Mapping[str, str]:
        return dict(self._declined)

    def weight(self, name: str) -> Tensor:
        check_filled(self.module)
        return self._matched(name).dense().cpu()

    def bias(self, name: str) -> Tensor | None:
        bias = self._matched(name).bias
        return None if bias is None else bias.detach().cpu()

    def layer(self, name: str) -> Layer | None:
        if name not in self._replaced:
            return None
        matched = self._matched(name)
        module, own = matched.modules[0], matched.biases[0] if matched.apart else None
        assert isinstance(module, Factorized)
        layer = module.layer()
        if own is None or layer.bias is None:
            return layer
        shift = layer.bias - own.detach()
        return replace(layer, bias=shift if bool(shift.any()) else None)

    def replace(self, name: str, layer: Layer) -> None:
        matched = self._matched(name)
        site = layer.form.on(matched.site)
        if layer.site.shape != site.shape:
            raise PlanError(f"a layer of shape {layer.site.shape} cannot replace site {name!r} of shape {matched.site.shape}; plan for this model")
        weight = matched.weight
        shared = Layer(site, layer.form, _placed_factors(layer, weight))
        biases = {id(own): _bias_for(own if matched.apart else None, layer.bias, weight) for own in matched.biases}
        for module, own in zip(matched.modules, matched.biases, strict=True):
            bias = biases[id(own)]
            pads = tuple(module._reversed_padding_repeated_twice) if _pads_itself(module) else ()  # type: ignore[arg-type]
            new = Factorized(shared, bias, str(getattr(module, "padding_mode", "zeros")), pads)
            if isinstance(module, Fused):  # it may have taken an activation in
                new = Fused.of(new, module.activation, module.lanes)
            become(module, new)
        self._replaced.add(name)
        call_layers(self.module)

    def record(self, batch: Batch) -> Tape:
        return self._record(batch)

    def _record(self, batch: Batch, *, replayed: bool = True) -> Tape:
        placed = self._placed(batch)
        held = (*self.module.parameters(), *self.module.buffers())
        sites = self._dense_weights()
        with buffers_kept(self.module):
            tape = record(lambda: self._answer(placed), placed.tensors, sites, samples=placed.size, held=held, apart=self._apart(), replayed=replayed)
        if not isinstance(tape, LiveTape):
            return tape
        twin = self._as_it_is()  # layers of this one will be replaced while the tape is still played
        return replace(tape, run=lambda: twin._answer(placed), sites=twin._dense_weights(), apart=twin._apart())

    def _dense_weights(self) -> dict[int, str]:
        return {id(matched.weight): name for name, matched in self._by_name.items() if name not in self._replaced}

    def _apart(self) -> frozenset[int]:
        return frozenset(id(bias) for matched in self._by_name.values() if matched.apart for bias in matched.biases if bias is not None)

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
        runs = [self._watch(batches[0], first), *map(self._watch, self._observed[1:])]
        tapes = [run.tape for run in runs]
        self._example = batches[0].part(0, 2)
        try:
            self.run(self._example)
        except InvalidModelError:
            self._example = batches[0]
        self._macs = self.count().per_sample
        called = site_order(tapes)
        ordered = [name for name in called if name in self._by_name] + [name for name in self._by_name if name not in called]
        self._by_name = {name: replace(self._by_name[name], site=with_extents(self._by_name[name].site, tapes)) for name in ordered}
        dense = {name: matched for name, matched in self._by_name.items() if name not in self._replaced}
        self._leave({name: "it is not called when the model runs on the data" for name in dense if name not in called})
        for run in runs:
            self._leave(other_readers(run, dense))
        nested = runs_nested(self.module, lambda: self.run(batches[0]))
        self._leave({name: nested[matched.modules[0]] for name, matched in dense.items() if matched.modules[0] in nested})

    def run(self, batch: Batch) -> object:
        placed = self._placed(batch)
        with torch.no_grad(), self._evaluating(), buffers_kept(self.module):
            return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, _plain(self._call(placed)))

    def count(self, batch: Batch | None = None) -> Counted:
        calls = self._observed if batch is None else (batch,)
        placed = [self._placed(call) for call in calls]
        with self._evaluating(), buffers_kept(self.module), counting() as counter, layer_by_layer(self.module):
            for call in placed:
                self._call(call)
        return counter.counted(sum(call.size for call in calls) or 1)

    def fold_batchnorm(self, decline: Callable[[str, str], None] = no_reasons) -> Sequence[str]:
        if self._example is None:
            return ()
        run = self._watch(self._example, self.record(self._example))
        if isinstance(run.tape, LiveTape):  # not every reader is known
            return ()
        sites = {name: matched for name, matched in self._by_name.items() if name not in self._replaced}
        folds = find_folds(self.module, sites, run)
        proved = [fold for fold in folds if not fold.reason]
        seen = (self._example, *self._observed[1:]) if proved else ()
        before = [self.run(batch) for batch in seen]
        done = self._carry_out(proved, seen, before) or [made for fold in proved for made in self._carry_out([fold], seen, before)]
        for fold in folds:
            if fold.matched.site.name not in done:
                decline(fold.path, f"not folded: {fold.reason or 'the model would answer otherwise'}")
        return done

    def _carry_out(self, folds: Sequence[Fold], seen: Sequence[Batch], before: Sequence[object]) -> list[str]:
        """The folds, undone together unless the answers stay as `before`; returns the sites that changed."""
        backup = Backup.of([module for fold in folds for module in (fold.norm, fold.matched.modules[0])])
        folded = {fold.matched.site.name: fold.apply() for fold in folds}
        try:
            same = all(same_answers(self.run(batch), answer) for batch, answer in zip(seen, before, strict=True))
        except InvalidModelError:
            same = False
        if same:
            self._by_name.update(folded)
            return list(folded)
        for entry in backup:
            entry.restore()
        return []

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        def run() -> None:
            with torch.no_grad(), self._evaluating():
                for batch in batches:
                    self._call(self._placed(batch))

        return estimate_anew(self.module, run)

    def fuse(self, note: Callable[[str], None], decline: Callable[[str, str], None], samples: Batch | None = None) -> bool:
        batch = samples or self._example
        found = fuse_layers(self.module, None if batch is None else lambda: self.run(batch), note, decline)
        for layer, fused in found.items():
            become(layer, fused)
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
        return sum(parameter.numel() for parameter in self.module.parameters()) + sum(storage.params for storage in _storages(self.module))

    def bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters()) + sum(storage.bytes for storage in _storages(self.module))

    def clone(self) -> TorchModel:
        """A deep copy of the module and of what is known about it."""
        twin = copy.copy(self)
        memo: dict[int, Any] = {}
        twin.module = copied(self.module, memo)
        twin._by_name = {name: matched.copy(memo) for name, matched in self._by_name.items()}
        twin._declined, twin._replaced = dict(self._declined), set(self._replaced)
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
        save_module(self.module, path, metadata)

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
                with torch.no_grad(), buffers_kept(self.module):
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

    def _watch(self, batch: Batch, tape: Tape | None = None) -> Run:
        """A recorded run (by default one that is not replayed), and through which modules it went."""
        layers = {module for matched in self._by_name.values() for module in matched.modules}
        with entering({*layers, *batchnorms(self.module)}) as (entered, more):
            seen = self._record(batch, replayed=False)
        return Run(tape or seen, entered, {name: len(places) for name, places in seen.site_calls.items()}, more)

    def _leave(self, reasons: Mapping[str, str]) -> None:
        """Sites that stay dense."""
        self._declined.update(reasons)
        self._by_name = {name: matched for name, matched in self._by_name.items() if name not in reasons}

    def _adopt_factorized(self) -> None:
        for path, module in self.module.named_modules():
            if isinstance(module, Factorized):
                self._declined[path] = f"it is factored already ({module.form})"
                for name in [name for name in self._declined if name.startswith(path + ".")]:
                    del self._declined[name]


def _placed_factors(layer: Layer, like: Tensor) -> dict[str, Tensor]:
    """The factors as a module holds them where the dense weight lies; those in number types of their own are no parameters."""
    held = {key: factor.to(like.device) for key, factor in layer.factors.items()}
    if layer.form.encoded:
        return held
    trained = {key: nn.Parameter(factor.to(like), requires_grad=like.requires_grad) for key, factor in held.items() if factor.is_floating_point()}
    return {**held, **trained}


def _storages(module: nn.Module) -> list[Storage]:
    """How the factors are stored that are no parameters, shared ones once."""
    layers = [layer for layer in module.modules() if isinstance(layer, Factorized) and layer.storage.numbers]
    return list({id(next(iter(layer.factors().values()))): layer.storage for layer in layers}.values())


def _bias_for(own: nn.Parameter | None, bias: Tensor | None, like: Tensor) -> nn.Parameter | None:
    """The bias of a layer that stands for its site's, where it keeps one of its own beside it."""
    if bias is None:
        return own
    placed = bias.to(like)
    return nn.Parameter(placed.clone() if own is None else placed + own.detach(), requires_grad=like.requires_grad)


def _pads_itself(module: nn.Module) -> bool:
    return getattr(module, "padding_mode", "zeros") != "zeros"


def _plain(result: object) -> object:
    return dict(result) if isinstance(result, Mapping) else result
