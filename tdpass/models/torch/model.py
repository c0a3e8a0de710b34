"""Torch models, by module surgery: class, hooks, control flow and parameter names of everything else stay."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from typing_extensions import Self

from tdpass.errors import InvalidModelError, PlanError
from tdpass.formats.layer import Layer
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused
from tdpass.models.abilities import Decline, Note, no_reasons
from tdpass.models.base import Batch, Model
from tdpass.models.extents import UNREACHED, alike, with_extents
from tdpass.models.signature import Input, Signature
from tdpass.models.streams import StreamEdits
from tdpass.models.torch.called_layers import call_layers, runs_nested
from tdpass.models.torch.copying import copied
from tdpass.models.torch.factored import (
    bias_for,
    find_factored,
    pads_of,
    placed_factors,
    put_product,
    storages,
)
from tdpass.models.torch.fuse import fuse_layers
from tdpass.models.torch.in_place import Backup, become
from tdpass.models.torch.module_values import buffers_kept, check_filled, check_open
from tdpass.models.torch.norms import Fold, batchnorms, find_folds, same_answers
from tdpass.models.torch.program_text import PROGRAM_KEY, program_text
from tdpass.models.torch.readers import Run, entering, graph_readers, other_readers
from tdpass.models.torch.runner import ModuleRunner
from tdpass.models.torch.scaled_norms import ScaledNorm, scaled_norms
from tdpass.models.torch.sites import Matched, find_sites
from tdpass.models.torch.state import load_module, save_module
from tdpass.models.torch.statistics import estimate_anew
from tdpass.models.torch.streams import slice_module
from tdpass.packing import StoredSize, stored_in
from tdpass.products import Counted
from tdpass.site import Site
from tdpass.tape import LiveTape, Tape, record, site_order


class TorchModel(Model):
    """An `nn.Module` as the passes see it; rewrites `module` in place."""

    frontend = "torch"
    suffix = ".safetensors"

    def __init__(self, module: nn.Module, example: Batch | None = None) -> None:
        check_open(module)
        self.module = module
        self._runner = ModuleRunner(module)
        found, self._declined = find_sites(module)
        self._by_name = {matched.site.name: matched for matched in found}
        self._replaced: set[str] = set()
        self._came_factored: set[str] = set()
        self._example = example
        self._observed: tuple[Batch, ...] = ()
        self._macs = 0
        self._twin: tuple[object, TorchModel] | None = None
        self._products: tuple[object, TorchModel] | None = None
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
            raise PlanError(
                f"a layer of shape {layer.site.shape} cannot replace site {name!r} of shape "
                f"{matched.site.shape}; plan for this model"
            )
        weight = matched.weight
        shared = Layer(site, layer.form, placed_factors(layer, weight))
        biases = {
            id(own): bias_for(own if matched.apart else None, layer.bias, weight) for own in matched.biases
        }
        for module, own in zip(matched.modules, matched.biases, strict=True):
            bias = biases[id(own)]
            new = Factorized(shared, bias, str(getattr(module, "padding_mode", "zeros")), pads_of(module))
            if isinstance(module, Fused):  # it may have taken an activation in
                new = Fused.of(new, module.activation, module.lanes)
            become(module, new)
        self._replaced.add(name)
        self._came_factored.discard(name)
        call_layers(self.module)

    def record(self, batch: Batch) -> Tape:
        """As every front end does; layers that came in factored form run, and are named, as the dense ones they stand for."""
        return self._with_products()._record(batch)

    def _with_products(self) -> TorchModel:
        """The model itself, or where layers came in factored form a copy that multiplies them out."""
        if not self._came_factored:
            return self
        state = self._version()
        if self._products is None or self._products[0] != state:
            twin = self.clone()
            for name in self._came_factored:
                put_product(twin._by_name[name])
            twin._replaced -= self._came_factored
            twin._came_factored = set()
            self._products = state, twin
        return self._products[1]

    def _record(self, batch: Batch, *, replayed: bool = True) -> Tape:
        placed = self._runner.placed(batch)
        held = (*self.module.parameters(), *self.module.buffers())
        sites = self._dense_weights()
        with buffers_kept(self.module):
            tape = record(
                lambda: self._runner.answer(placed),
                placed.tensors,
                sites,
                samples=placed.size,
                held=held,
                apart=self._apart(),
                replayed=replayed,
            )
        if not isinstance(tape, LiveTape):
            return tape
        twin = self._as_it_is()  # layers of this one will be replaced while the tape is still played
        return replace(
            tape, run=lambda: twin._runner.answer(placed), sites=twin._dense_weights(), apart=twin._apart()
        )

    def _dense_weights(self) -> dict[int, str]:
        return {
            id(matched.weight): name for name, matched in self._by_name.items() if name not in self._replaced
        }

    def _apart(self) -> frozenset[int]:
        return frozenset(
            id(bias)
            for matched in self._by_name.values()
            if matched.apart
            for bias in matched.biases
            if bias is not None
        )

    def _as_it_is(self) -> TorchModel:
        """A copy, the same one until a parameter or buffer changes."""
        version = self._version()
        if self._twin is None or self._twin[0] != version:
            twin = self.clone()
            twin._twin = None
            self._twin = version, twin
        return self._twin[1]

    def _version(self) -> tuple[tuple[int, int], ...]:
        """What changes with any parameter or buffer."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)

    def observe(self, *batches: Batch) -> None:
        seen = self._with_products()
        if seen is self:
            self._observe(batches)
            return
        seen._observe(batches)
        self._example, self._observed = seen._example, seen._observed
        self._by_name = {
            name: replace(self._by_name[name], site=matched.site) for name, matched in seen._by_name.items()
        }
        self._declined = dict(seen._declined)
        self._macs = self.count().per_sample

    def _observe(self, batches: Sequence[Batch]) -> None:
        first = self._record(
            batches[0]
        )  # the whole call: two samples of it may reach fewer layers, or be two steps of one
        self._observed = tuple(batches if first.doubt or not alike(batches) else batches[:1])
        runs = [self._watch(batches[0], first), *map(self._watch, self._observed[1:])]
        tapes = [run.tape for run in runs]
        self._example = batches[0].part(0, 2)
        try:
            self.run(self._example)
        except InvalidModelError:
            self._example = batches[0]
        self._macs = self.count().per_sample
        called = site_order(tapes)
        ordered = [name for name in called if name in self._by_name] + [
            name for name in self._by_name if name not in called
        ]
        self._by_name = {
            name: replace(self._by_name[name], site=with_extents(self._by_name[name].site, tapes))
            for name in ordered
        }
        dense = {name: matched for name, matched in self._by_name.items() if name not in self._replaced}
        self._leave({name: UNREACHED for name in dense if name not in called})
        for run in runs:
            self._leave(other_readers(run, dense))
        nested = runs_nested(self.module, lambda: self.run(batches[0]))
        self._leave(
            {
                name: nested[matched.modules[0]]
                for name, matched in dense.items()
                if matched.modules[0] in nested
            }
        )

    def run(self, batch: Batch) -> object:
        return self._runner.run(batch)

    def count(self, batch: Batch | None = None) -> Counted:
        return self._runner.count(self._observed if batch is None else (batch,))

    def fold_batchnorm(self, decline: Decline = no_reasons) -> Sequence[str]:
        if self._example is None:
            return ()
        run = self._watch(self._example, self._record(self._example))
        if isinstance(run.tape, LiveTape):  # not every reader is known
            return ()
        sites = {name: matched for name, matched in self._by_name.items() if name not in self._replaced}
        folds = find_folds(self.module, sites, run)
        proved = [fold for fold in folds if not fold.reason]
        seen = (self._example, *self._observed[1:]) if proved else ()
        before = [self.run(batch) for batch in seen]
        done = self._carry_out(proved, seen, before) or [
            made for fold in proved for made in self._carry_out([fold], seen, before)
        ]
        for fold in folds:
            if fold.matched.site.name not in done:
                decline(fold.path, f"not folded: {fold.reason or 'the model would answer otherwise'}")
        return done

    def _carry_out(self, folds: Sequence[Fold], seen: Sequence[Batch], before: Sequence[object]) -> list[str]:
        """The folds, undone together unless the answers stay as `before`; returns the sites that changed."""
        backup = Backup.of([module for fold in folds for module in (fold.norm, fold.matched.modules[0])])
        folded = {fold.matched.site.name: fold.apply() for fold in folds}
        try:
            same = all(
                same_answers(self.run(batch), answer) for batch, answer in zip(seen, before, strict=True)
            )
        except InvalidModelError:
            same = False
        if same:
            self._by_name.update(folded)
            return list(folded)
        for entry in backup:
            entry.restore()
        return []

    def slice_streams(self, edits: StreamEdits) -> None:
        slice_module(self.module, edits)
        found, self._declined = find_sites(self.module)
        self._by_name = {matched.site.name: matched for matched in found}
        self.observe(*self._observed)

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        def run() -> None:
            with torch.no_grad():
                for batch in batches:
                    self._runner.answer(self._runner.placed(batch))

        return estimate_anew(self.module, run)

    def norms(self, decline: Decline = no_reasons) -> Mapping[str, Sequence[str]]:
        return {path: norm.sites for path, norm in self._norms(decline).items()}

    def scale_norm(self, name: str, scale: Tensor) -> None:
        norm = self._norms()[name]
        norm.scale(scale)
        for site in norm.sites:
            matched = self._by_name[site]
            layer, weight = matched.modules[0], matched.weight
            scaled = matched.stored(matched.dense().double() * scale.to(torch.float64)).to(weight)
            placed = nn.Parameter(scaled, requires_grad=weight.requires_grad)
            layer._parameters["weight"] = placed
            self._by_name[site] = replace(matched, weight=placed)

    def _norms(self, decline: Decline = no_reasons) -> dict[str, ScaledNorm]:
        if self._example is None:
            return {}
        run = self._watch(self._example, self.record(self._example))
        dense = {name: held for name, held in self._by_name.items() if name not in self._replaced}
        return {} if isinstance(run.tape, LiveTape) else scaled_norms(self.module, dense, run, decline)

    def fuse(self, note: Note, decline: Decline, samples: Batch | None = None) -> bool:
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
        return Signature(
            tuple(Input(entry.name, required=entry.default is entry.empty) for entry in named),
            others=len(named) < len(given),
        )

    def macs(self) -> int:
        return self._macs

    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters()) + sum(
            storage.params for storage in storages(self.module)
        )

    def bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters()) + sum(
            storage.bytes for storage in storages(self.module)
        )

    def clone(self) -> Self:
        """A deep copy of the module and of what is known about it."""
        twin = copy.copy(self)
        memo: dict[int, Any] = {}
        twin.module = copied(self.module, memo)
        twin._runner = self._runner.on(twin.module)
        twin._by_name = {name: matched.copy(memo) for name, matched in self._by_name.items()}
        twin._declined, twin._replaced = dict(self._declined), set(self._replaced)
        twin._came_factored, twin._products = set(self._came_factored), None
        return twin

    def check_weights(self) -> None:
        for name, parameter in self.module.named_parameters():
            if not parameter.is_meta and not bool(torch.isfinite(parameter.detach()).all()):
                raise InvalidModelError(
                    f"parameter {name!r} holds NaN or infinite values; the model cannot be compressed"
                )
        for name, buffer in self.module.named_buffers():
            if not buffer.is_meta and bool(torch.isnan(buffer).any()):  # an infinite one may be a mask
                raise InvalidModelError(
                    f"buffer {name!r} holds NaN; re-estimate or load it before compressing"
                )

    def unwrap(self) -> object:
        return self.module

    def inference_module(self) -> nn.Module:
        """A copy of the module, in evaluation mode part by part: an exported one refuses `eval`."""
        module = copied(self.module, {})
        for part in module.modules():
            part.training = False
        return module

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        save_module(self.module, path, metadata)

    def described(self, call: Batch) -> dict[str, str]:
        return {PROGRAM_KEY: program_text(self.module, self._runner.placed(call))}

    def stored(self, path: Path) -> StoredSize | None:
        return stored_in(path)

    def reader(self) -> Callable[[Path], Model | None]:
        """Puts the file on the dense structure, for as long as somebody else holds that."""
        held = weakref.ref(self.module)

        def read(path: Path) -> Model | None:
            dense = held()
            return None if dense is None else TorchModel(load_module(path, copy.deepcopy(dense)))

        return read

    def _matched(self, name: str) -> Matched:
        if name not in self._by_name:
            raise PlanError(f"the model has no site {name!r}; `tdpass inspect` lists them")
        return self._by_name[name]

    def _watch(self, batch: Batch, tape: Tape | None = None) -> Run:
        """A recorded run (by default one that is not replayed), and through which modules it went."""
        layers = {module for matched in self._by_name.values() for module in matched.modules}
        with entering({*layers, *batchnorms(self.module)}) as (entered, more):
            seen = self._record(batch, replayed=False)
        return Run(
            tape or seen, entered, {name: len(places) for name, places in seen.site_calls.items()}, more
        )

    def _leave(self, reasons: Mapping[str, str]) -> None:
        """Sites that stay dense."""
        self._declined.update(reasons)
        self._by_name = {name: matched for name, matched in self._by_name.items() if name not in reasons}

    def _adopt_factorized(self) -> None:
        found, declined = find_factored(self.module)
        self._came_factored = {matched.site.name for matched in found}
        if not (found or declined):
            return
        order = {path: place for place, (path, _) in enumerate(self.module.named_modules())}
        every = [*self._by_name.values(), *found]
        self._by_name = {
            matched.site.name: matched for matched in sorted(every, key=lambda one: order[one.site.name])
        }
        self._replaced |= self._came_factored
        held = {*declined, *(path for matched in found for path in matched.paths)}
        for name in [name for name in self._declined if name in held or name.rpartition(".")[0] in held]:
            del self._declined[name]
        self._declined |= declined
