"""ONNX models as tdpass sees them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import InvalidModelError, PlanError, UnsupportedError, UsageError
from tdpass.form import Form
from tdpass.formats.layer import Layer, settles
from tdpass.models.abilities import Decline, Note, Range, no_reasons
from tdpass.models.base import Batch, Model
from tdpass.models.extents import UNREACHED, alike, with_extents
from tdpass.models.fitting import sized
from tdpass.models.onnx.files.checks import EXTERNAL_ABOVE, check_structure
from tdpass.models.onnx.files.file import remove_obsolete, write
from tdpass.models.onnx.files.source import Source, source_of
from tdpass.models.onnx.files.spill import HeldLayers
from tdpass.models.onnx.files.storage import stored_bytes
from tdpass.models.onnx.fused.fuse import decide
from tdpass.models.onnx.fused.rewrite import Fusions, fused
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.inputs import bind, declared_example, signature
from tdpass.models.onnx.operators.session import Session
from tdpass.models.onnx.rewriting.batchnorm import BatchStatistics
from tdpass.models.onnx.rewriting.dense import DenseGraph
from tdpass.models.onnx.rewriting.integer_activations import (
    check_opset,
    integer_layers,
    quantizable,
    watched,
    with_integer_activations,
)
from tdpass.models.onnx.rewriting.normalize import made_constant, named_twice
from tdpass.models.onnx.rewriting.recurrent_times import recurrent_times
from tdpass.models.onnx.runner import OnnxRunner
from tdpass.models.onnx.sites.forms import unreadable
from tdpass.models.onnx.sites.parameters import parameter_bytes, parameter_count
from tdpass.models.onnx.sites.products import count_products
from tdpass.models.onnx.sites.sites import check_fits
from tdpass.models.signature import Signature
from tdpass.models.streams import HeadChange, StreamEdits
from tdpass.products import Counted
from tdpass.site import Site
from tdpass.tape import Tape, record


class OnnxModel(Model):
    """A model from an ONNX file, `onnx.ModelProto`, `onnx_ir.Model` or `onnx_graphsurgeon.Graph`.

    The dense model is kept as it came, weights in their file where they were, and the layers that replace
    sites beside it.  The rewritten graph is built when it is asked for, so replacing is free and a later
    replacement leaves no trace of an earlier one.  Factors wait in memory up to 64 MiB, more of them in
    temporary files.  The object that came in is never changed.
    """

    frontend = "onnx"
    suffix = ".onnx"

    def __init__(self, dense: DenseGraph, source: Source) -> None:
        self._dense = dense
        # not the source itself: what came in would stay in memory
        self._give_back, self._owned = source.give_back, source.owned
        self._layers = HeldLayers()
        self._fusions: Fusions = {}
        self._ranges: Mapping[str, Range] = {}
        self._seen: dict[str, Site] = {}
        self._example: Batch | None = None
        self._observed: tuple[Batch, ...] = ()
        self._macs = 0
        self._constants: tuple[str, ...] = ()
        self._renamed = 0

    @classmethod
    def open(cls, given: object, example: Batch | None = None, overridable: Sequence[str] = ()) -> Self:
        """Accept any of the four kinds; with an example the sites' extents are known.

        Initializers that are inputs too are taken for weights, but for those that match a name in
        `overridable`.  Raises `InvalidModelError` for an unsound model or another type.
        """
        source = source_of(given)
        made = cls(DenseGraph.open(source.model, overridable), source)
        made._constants = made_constant(source.model, made._dense.model)
        made._renamed = named_twice(source.model)
        if example is not None:
            made.observe(sized(made.signature(), example))
        return made

    @cached_property
    def _built(self) -> ir.Model:
        return fused(self._unfused(), self._fusions)

    def _unfused(self) -> ir.Model:
        if self._ranges:
            return with_integer_activations(self._with_integers(), self._ranges)
        return self._dense.rewritten(self._layers)

    def _with_integers(self) -> ir.Model:
        """The model with its integer weights as integer operators read them."""
        return self._dense.rewritten(self._layers, integers=True)

    def integer_layers(self) -> Sequence[str]:
        check_opset(self._dense.model)
        return list(integer_layers(self._with_integers()))

    def activations(self, without: Container[str] = ()) -> Sequence[str]:
        return quantizable(self._with_integers(), without)

    def watch(self, names: Sequence[str], batch: Batch) -> Mapping[str, Tensor]:
        return watched(self._with_integers(), names)(self.named_inputs(batch))

    def hold_integers(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = dict(ranges)
        self._changed()

    def held_integers(self) -> Mapping[str, Range]:
        return self._ranges

    @cached_property
    def _session(self) -> Session:
        return Session(self._built)

    @cached_property
    def _runner(self) -> OnnxRunner:
        return OnnxRunner(self._dense.model, self._dense.sites, dict(self._layers))

    def _changed(self) -> None:
        for cache in ("_built", "_session", "_runner"):
            self.__dict__.pop(cache, None)

    def sites(self) -> Sequence[Site]:
        return [
            replace(self._seen.get(name, found.site), bias=self._has_bias(name))
            for name, found in self._dense.sites.items()
        ]

    def _has_bias(self, name: str) -> bool:
        layer = self._layers.get(name)
        return self._dense.sites[name].site.bias if layer is None else layer.bias is not None

    def declined(self) -> Mapping[str, str]:
        return dict(self._dense.found.declined)

    def weight(self, name: str) -> Tensor:
        """The dense weight as `[o, i, *kernel]`; raises `InvalidModelError` unless all of it is finite."""
        return self._dense.site(name).weight()

    def bias(self, name: str) -> Tensor | None:
        return self._dense.site(name).bias()

    def layer(self, name: str) -> Layer | None:
        return self.replaced().get(name, self._dense.site(name).present)

    def replaced(self) -> Mapping[str, Layer]:
        # in the type that they compute in, which may be another than what the model stores
        return {name: layer.to(self._dense.site(name).dtype) for name, layer in self._layers.items()}

    def refused(self, form: Form) -> str:
        return unreadable(form, opset_of(self._dense.model))

    def replace(self, name: str, layer: Layer) -> None:
        found = self._dense.site(name)
        reason = self.refused(layer.form)
        if reason:
            raise PlanError(f"site {name!r} of an ONNX model cannot be '{layer.form}': {reason}")
        check_fits(layer, found.site)
        kept, bias = layer.to(found.kept), layer.bias
        self._layers.put(name, replace(kept, bias=None if bias is None else bias.to(found.dtype)))
        self._changed()

    def record(self, batch: Batch) -> Tape:
        return self._record(self._runner, batch)

    def observe(self, *batches: Batch) -> None:
        dense = OnnxRunner(self._dense.model, self._dense.sites)
        first = batches[0]
        self._example = first.part(0, 2)
        try:
            self._record(dense, self._example, replayed=False)
        except (UnsupportedError, InvalidModelError):
            self._example = first
        tapes = [self._record(dense, first, replayed=False)]
        self._seen = {name: with_extents(found.site, tapes) for name, found in self._dense.sites.items()}
        differ = any(not site.extents or site.samples > 1 for site in self._seen.values())
        self._observed = batches if differ or not alike(batches) else batches[:1]
        tapes += [self._record(dense, batch, replayed=False) for batch in self._observed[1:]]
        self._seen = {name: with_extents(found.site, tapes) for name, found in self._dense.sites.items()}
        called = {name for tape in tapes for name in tape.site_calls}
        self._dense.leave({name: UNREACHED for name in self._dense.sites if name not in called})
        self._changed()
        self._macs = self._count(self._dense.model, self._observed).per_sample

    def _record(self, runner: OnnxRunner, batch: Batch, *, replayed: bool = True) -> Tape:
        inputs = self.named_inputs(batch)
        sites = {id(weight): name for name, weight in runner.weights.items()}
        held = (*runner.weights.values(), *runner.constants.values())
        values = list(inputs.values())
        return record(lambda: runner(inputs), values, sites, samples=batch.size, held=held, replayed=replayed)

    def run(self, batch: Batch) -> dict[str, Tensor]:
        return self._session(self.named_inputs(batch))

    def fold_batchnorm(self, decline: Decline = no_reasons) -> Sequence[str]:
        del decline  # what does not fold is no batch-norm of that form
        changed = self._dense.fold_batchnorm(self._layers)
        self._changed()
        return changed

    def divide(self, decline: Decline = no_reasons) -> Sequence[str]:
        example = self.example()
        if example is None or self._layers:
            return ()
        tape = self._record(OnnxRunner(self._dense.model, self._dense.sites), example, replayed=False)
        return self._seen_again(self._dense.divide(tape, decline))

    def join(self) -> Sequence[str]:
        return self._seen_again(self._dense.join(self._layers))

    def _seen_again(self, changed: Sequence[str]) -> Sequence[str]:
        """Observe the sites that there are where others changed."""
        if changed:
            self._changed()
            if self._observed:
                self.observe(*self._observed)
        return changed

    def norms(self, decline: Decline = no_reasons) -> Mapping[str, Sequence[str]]:
        return self._dense.norms(self._layers, decline)

    def scale_norm(self, name: str, scale: Tensor) -> None:
        self._dense.scale_norm(name, scale, self._layers)
        self._changed()

    def settle_channels(self) -> Mapping[str, Form]:
        narrow = {name: layer for name, layer in self._layers.items() if settles(layer)}
        self._layers.drop(narrow)
        self._seen_again(self._dense.settle(narrow))
        return {name: layer.form for name, layer in narrow.items()}

    def resize_heads(self, heads: Mapping[str, HeadChange]) -> None:
        self._dense.resize_heads(heads)
        self._changed()

    def slice_streams(self, edits: StreamEdits) -> None:
        self._seen_again(self._dense.slice_streams(edits, self._runner))

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        def run(seen: Mapping[ir.Node, BatchStatistics]) -> None:
            runner = OnnxRunner(self._dense.model, self._dense.sites, self._layers, seen)
            with torch.no_grad():
                for batch in batches:
                    runner(self.named_inputs(batch))

        return self._dense.estimate_anew(run, self._changed)

    def fuse(self, note: Note, decline: Decline, samples: Batch | None = None) -> bool:
        batch = samples or self.example()
        fusions = decide(self._unfused, {} if batch is None else self.named_inputs(batch), note, decline)
        changed = fusions != self._fusions
        self._fusions = fusions
        self._changed()
        return changed

    def grain(self) -> float:
        return math.hypot(*(fusion.grain for fusion in self._fusions.values()))

    def recurrent_times(self, samples: Batch) -> Iterator[tuple[str, float, float]]:
        return recurrent_times(self._built, self._dense.opened, self._layers, self.named_inputs(samples))

    def example(self) -> Batch | None:
        if self._example is None:
            self._example = declared_example(self._dense.model.graph)
        return self._example

    def signature(self) -> Signature:
        return signature(self._dense.model.graph, self._constants, self._renamed)

    def count(self, batch: Batch | None = None) -> Counted:
        return self._count(self._unfused(), self._observed if batch is None else (batch,))

    def _count(self, model: ir.Model, calls: Sequence[Batch]) -> Counted:
        each = [count_products(model, self.named_inputs(call)) for call in calls]
        unseen = dict.fromkeys(name for counted in each for name in counted.unseen)
        return Counted(
            sum(counted.macs for counted in each), tuple(unseen), sum(call.size for call in calls) or 1
        )

    def macs(self) -> int:
        """Multiply-adds per sample of the dense model as last observed; 0 where never observed."""
        return self._macs

    def params(self) -> int:
        return parameter_count(self._built) - sum(one.size for one in self._dense.copies(self._layers))

    def bytes(self) -> int:
        return parameter_bytes(self._built) - sum(one.nbytes for one in self._dense.copies(self._layers))

    def clone(self) -> Self:
        twin = copy.copy(self)
        twin._dense = self._dense.clone()
        twin._layers = self._layers.copy()
        twin._changed()
        return twin

    def check(self) -> None:
        check_structure(self._built, "the pass that changed it last is at fault; please report it")
        self.check_weights()

    def check_weights(self) -> None:
        """Raise `InvalidModelError` where a weight of the dense model is not finite.

        They are read once, however often this is asked.
        """
        self._dense.check_finite()

    def unwrap(self) -> object:
        return self._give_back(self._built)

    def named_inputs(self, batch: Batch) -> dict[str, Tensor]:
        return bind(self._dense.model.graph, batch)

    def reader(self) -> Callable[[Path], Model | None]:
        return OnnxModel.open

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write an .onnx file, atomically, with `metadata` among its properties.

        Raises `UsageError` for another suffix. Large weights go to a data file beside it where the source had
        one or they exceed 1.5 GiB.
        """
        if path.suffix != self.suffix:
            raise UsageError(f"cannot save an ONNX model as {path.name!r}; name an .onnx file")
        model = self._built.clone()
        model.metadata_props.update(metadata)
        obsolete = write(model, path, self._dense.external or stored_bytes(model) > EXTERNAL_ABOVE)
        if self._owned:
            # An onnx_ir.Model that came in may still read by path from the file it was loaded from.
            remove_obsolete(obsolete)
