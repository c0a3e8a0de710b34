"""Torch models, by module surgery: class, hooks, control flow and parameter names of everything else stay."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tdpass.errors import InvalidModelError
from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.models.abilities import Decline, Note, no_reasons
from tdpass.models.base import Batch, Model
from tdpass.models.extents import alike
from tdpass.models.signature import Signature
from tdpass.models.streams import HeadChange, StreamEdits
from tdpass.models.torch.fused.fuse import fuse_layers
from tdpass.models.torch.graphs.lift import lift_computed
from tdpass.models.torch.modules.called_layers import call_layers, runs_nested
from tdpass.models.torch.modules.copying import copied
from tdpass.models.torch.modules.in_place import become
from tdpass.models.torch.modules.module_values import (
    buffers_kept,
    check_filled,
    check_finite,
    check_open,
    signature_of,
    version_of,
)
from tdpass.models.torch.modules.plain import make_plain
from tdpass.models.torch.runner import ModuleRunner
from tdpass.models.torch.saving.program_text import PROGRAM_KEY, program_text
from tdpass.models.torch.saving.state import load_module, save_module
from tdpass.models.torch.sites.divide import Divided, find_divisions
from tdpass.models.torch.sites.factored import storages
from tdpass.models.torch.sites.head_sizes import resize_heads
from tdpass.models.torch.sites.norms import batchnorms, find_folds
from tdpass.models.torch.sites.placement import placed_layer
from tdpass.models.torch.sites.proved import proved
from tdpass.models.torch.sites.readers import Run, entering, other_readers
from tdpass.models.torch.sites.scaled_norms import ScaledNorm, scaled_norms
from tdpass.models.torch.sites.site_table import SiteTable
from tdpass.models.torch.sites.streams import slice_module
from tdpass.models.torch.statistics import estimate_anew
from tdpass.packing import StoredSize, stored_in
from tdpass.products import Counted
from tdpass.site import Site
from tdpass.tape import LiveTape, Tape, record


class TorchModel(Model):
    """An `nn.Module` as the passes see it; rewrites `module` in place."""

    frontend = "torch"
    suffix = ".safetensors"

    def __init__(self, module: nn.Module, example: Batch | None = None) -> None:
        check_open(module)
        self.module = module
        self._runner = ModuleRunner(module)
        self._sites = SiteTable.of(module)
        self._divided: list[Divided] = []
        self._example = example
        self._observed: tuple[Batch, ...] = ()
        self._macs = 0
        self._twin: tuple[object, TorchModel] | None = None
        self._products: tuple[object, TorchModel] | None = None
        self.check()
        if example is not None:
            self.observe(example)

    def make_plain(self) -> Sequence[str]:
        """Make parameters of what layers compute from others, such as normed weights; returns their paths."""
        changed = [*make_plain(self.module), *lift_computed(self.module)]
        if changed:
            self._sites = SiteTable.of(self.module)
        return changed

    def sites(self) -> Sequence[Site]:
        return [matched.site for matched in self._sites.by_name.values()]

    def declined(self) -> Mapping[str, str]:
        return dict(self._sites.declined)

    def weight(self, name: str) -> Tensor:
        check_filled(self.module)
        return self._sites.matched(name).dense().cpu()

    def bias(self, name: str) -> Tensor | None:
        bias = self._sites.matched(name).bias
        return None if bias is None else bias.detach().cpu()

    def layer(self, name: str) -> Layer | None:
        return placed_layer(self._sites.matched(name)) if name in self._sites.replaced else None

    def replace(self, name: str, layer: Layer) -> None:
        self._sites.put(name, layer)
        call_layers(self.module)

    def record(self, batch: Batch) -> Tape:
        """As every front end does; layers that came factored run, and are named, as their dense ones."""
        return self._with_products()._record(batch)

    def _with_products(self) -> TorchModel:
        """The model itself, or where layers came in factored form a copy that multiplies them out."""
        if not self._sites.came_factored:
            return self
        state = version_of(self.module)
        if self._products is None or self._products[0] != state:
            twin = self.clone()
            twin._sites.multiply_out()
            self._products = state, twin
        return self._products[1]

    def _record(self, batch: Batch, *, replayed: bool = True) -> Tape:
        placed = self._runner.placed(batch)
        held = (*self.module.parameters(), *self.module.buffers())
        with buffers_kept(self.module):
            tape = record(
                lambda: self._runner.answer(placed),
                placed.tensors,
                self._sites.weights,
                samples=placed.size,
                held=held,
                apart=self._sites.apart,
                replayed=replayed,
            )
        if not isinstance(tape, LiveTape):
            return tape
        twin = self._as_it_is()  # layers of this one will be replaced while the tape is still played
        sites, apart = twin._sites.weights, twin._sites.apart
        return replace(tape, run=lambda: twin._runner.answer(placed), sites=sites, apart=apart)

    def _as_it_is(self) -> TorchModel:
        """A copy, the same one until a parameter or buffer changes."""
        version = version_of(self.module)
        if self._twin is None or self._twin[0] != version:
            twin = self.clone()
            twin._twin = None
            self._twin = version, twin
        return self._twin[1]

    def observe(self, *batches: Batch) -> None:
        seen = self._with_products()
        if seen is self:
            self._observe(batches)
            return
        seen._observe(batches)
        self._example, self._observed = seen._example, seen._observed
        self._sites.take(seen._sites)
        self._macs = self.count().per_sample

    def _observe(self, batches: Sequence[Batch]) -> None:
        # the whole call: two samples of it may reach fewer layers, or be two steps of one
        first = self._record(batches[0])
        self._observed = tuple(batches if first.doubt or not alike(batches) else batches[:1])
        runs = [self._watch(batches[0], first), *map(self._watch, self._observed[1:])]
        tapes = [run.tape for run in runs]
        self._example = batches[0].part(0, 2)
        try:
            self.run(self._example)
        except InvalidModelError:
            self._example = batches[0]
        self._macs = self.count().per_sample
        dense = self._sites.see(tapes)
        for run in runs:
            self._sites.leave(other_readers(run, dense))
        nested = runs_nested(self.module, lambda: self.run(batches[0]))
        self._sites.leave(
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
        folds = find_folds(self.module, self._sites.dense, run)
        folded = {made.site.name: made for made in proved(folds, self._answers, decline, "folded")}
        self._sites.by_name.update(folded)
        if folded:
            self._keep_divided()
        return list(folded)

    def divide(self, decline: Decline = no_reasons) -> Sequence[str]:
        if self._example is None or self._sites.replaced - self._sites.came_factored:
            return ()
        example = self._example
        run = self._watch(example, self._record(example))
        nested = runs_nested(self.module, lambda: self.run(example))
        found = find_divisions(self.module, self._sites.dense, run, nested)
        made = proved(found, self._answers, decline, "divided")
        self._divided += made
        if made:
            self._sites = SiteTable.of(self.module)
            self.observe(*(self._observed or (example,)))
        return [divided.path for divided in made]

    def join(self) -> Sequence[str]:
        whole = [divided for divided in self._divided if not divided.changed]
        for divided in self._divided:
            divided.keep() if divided.changed else divided.undo()
        for divided in whole:
            self._sites.rejoin(divided.path, divided.whole)
        self._divided = []
        call_layers(self.module)
        return [divided.path for divided in whole]

    def _keep_divided(self) -> None:
        """Weights changed, so that what was divided cannot be what it was."""
        for divided in self._divided:
            divided.keep()
        self._divided = []

    def _answers(self) -> list[object]:
        seen = (self._example, *self._observed[1:])
        return [self.run(batch) for batch in seen if batch is not None]

    def settle_channels(self) -> Mapping[str, Form]:
        if narrow := self._sites.settle():
            self.observe(*self._observed)
        return narrow

    def resize_heads(self, heads: Mapping[str, HeadChange]) -> None:
        resize_heads(self.module, self._sites.by_module(heads))

    def slice_streams(self, edits: StreamEdits) -> None:
        slice_module(self.module, edits, lambda: None if self._example is None else self.run(self._example))
        self._sites = SiteTable.of(self.module)
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
            self._sites.scale_columns(site, scale)
        self._keep_divided()

    def _norms(self, decline: Decline = no_reasons) -> dict[str, ScaledNorm]:
        if self._example is None:
            return {}
        run = self._watch(self._example, self.record(self._example))
        live = isinstance(run.tape, LiveTape)
        return {} if live else scaled_norms(self.module, self._sites.dense, run, decline)

    def fuse(self, note: Note, decline: Decline, samples: Batch | None = None) -> bool:
        batch = samples or self._example
        found = fuse_layers(self.module, batch, self.run, note, decline)
        for layer, fused in found.items():
            become(layer, fused)
        return bool(found)

    def example(self) -> Batch | None:
        return self._example

    def signature(self) -> Signature:
        return signature_of(self.module)

    def macs(self) -> int:
        return self._macs

    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters()) + sum(
            storage.params for storage in storages(self.module) if storage.numbers
        )

    def bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters()) + sum(
            storage.bytes for storage in storages(self.module)
        )

    def clone(self) -> Self:
        twin = copy.copy(self)
        memo: dict[int, Any] = {}
        twin.module = copied(self.module, memo)
        twin._runner = self._runner.on(twin.module)
        twin._sites, twin._products = self._sites.copy(memo), None
        twin._divided = copy.deepcopy(self._divided, memo)
        return twin

    def check_weights(self) -> None:
        check_finite(self.module)

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

    def _watch(self, batch: Batch, tape: Tape | None = None) -> Run:
        """A recorded run (by default one that is not replayed), and through which modules it went."""
        with entering({*self._sites.modules, *batchnorms(self.module)}) as (entered, more):
            seen = self._record(batch, replayed=False)
        return Run(
            tape or seen, entered, {name: len(places) for name, places in seen.site_calls.items()}, more
        )
