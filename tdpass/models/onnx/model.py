"""ONNX models as tdpass sees them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import InvalidModelError, PlanError, UnsupportedError, UsageError
from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.models.abilities import Decline, Note, Range, no_reasons
from tdpass.models.base import Batch, Model
from tdpass.models.extents import UNREACHED, alike, with_extents
from tdpass.models.fitting import sized
from tdpass.models.onnx.batchnorm import (
    BatchStatistics,
    batchnorms,
    fold,
    foldable,
    set_statistics,
    statistics,
)
from tdpass.models.onnx.checks import EXTERNAL_ABOVE, check_structure, invalid_if_failing
from tdpass.models.onnx.close_recurrent import close_recurrent
from tdpass.models.onnx.file import remove_obsolete, write
from tdpass.models.onnx.forms import unreadable
from tdpass.models.onnx.fuse import decide
from tdpass.models.onnx.fused_rewrite import Fusions, fused
from tdpass.models.onnx.graphs import opset_of
from tdpass.models.onnx.inputs import bind, declared_example, signature
from tdpass.models.onnx.integer_activations import (
    check_opset,
    integer_layers,
    quantizable,
    watched,
    with_integer_activations,
)
from tdpass.models.onnx.normalize import defaults, normalized
from tdpass.models.onnx.parameters import check_finite, parameter_bytes, parameter_count
from tdpass.models.onnx.products import count_products
from tdpass.models.onnx.recurrent import Opened, open_recurrent
from tdpass.models.onnx.rewrite import INPUTS_HOLD_INITIALIZERS_BELOW, rewritten
from tdpass.models.onnx.runner import OnnxRunner
from tdpass.models.onnx.scaled_norms import scale_columns, scaled_norms
from tdpass.models.onnx.session import Session
from tdpass.models.onnx.shapes import Shapes
from tdpass.models.onnx.sites import Findings, FoundSite, find_sites
from tdpass.models.onnx.source import Source, source_of
from tdpass.models.onnx.spill import HELD_BYTES, held_bytes, spilled
from tdpass.models.onnx.storage import open_data_files, release_heap, stored_bytes
from tdpass.models.onnx.tensors import finite, to_torch
from tdpass.models.onnx.window_checks import check_windows
from tdpass.models.signature import Signature
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

    def __init__(
        self,
        dense: ir.Model,
        source: Source,
        external: bool,
        shapes: Shapes,
        opened: Sequence[Opened] = (),
    ) -> None:
        self._dense = dense
        self._opened = opened
        self._give_back, self._owned = (
            source.give_back,
            source.owned,
        )  # not what came in: it would stay in memory
        self._external = external
        self._shapes = shapes
        self._layers: dict[str, Layer] = {}
        self._fusions: Fusions = {}
        self._ranges: Mapping[str, Range] = {}
        self._waiting: frozenset[str] = frozenset()
        self._seen: dict[str, Site] = {}
        self._left: dict[str, str] = {}
        self._example: Batch | None = None
        self._observed: tuple[Batch, ...] = ()
        self._macs = 0
        self._constants: tuple[str, ...] = ()
        self._finite = False

    @classmethod
    def open(cls, given: object, example: Batch | None = None, overridable: Sequence[str] = ()) -> Self:
        """Accept any of the four kinds; with an example the sites' extents are known.

        Initializers that are inputs too are taken for weights, but for those that match a name in
        `overridable`.  Raises `InvalidModelError` for an unsound model or another type.
        """
        source = source_of(given)
        dense = normalized(source.model, overridable)
        with invalid_if_failing("the model's data files cannot be opened", "put them beside the model"):
            external = open_data_files(dense)
        shapes = Shapes.infer(dense)
        check_windows(dense, shapes)
        opened = open_recurrent(dense)
        made = cls(dense, source, external, Shapes.infer(dense) if opened else shapes, opened)
        if (dense.ir_version or 0) >= INPUTS_HOLD_INITIALIZERS_BELOW:
            made._constants = tuple(
                str(value.name)
                for value in defaults(source.model)
                if value.name not in {kept.name for kept in dense.graph.inputs}
            )
        if example is not None:
            made.observe(sized(made.signature(), example))
        return made

    @cached_property
    def _found(self) -> Findings:
        return find_sites(self._dense, self._shapes).without(self._left)

    @cached_property
    def _built(self) -> ir.Model:
        return (
            with_integer_activations(self._with_integers(), self._ranges)
            if self._ranges
            else fused(self._unfused(), self._fusions)
        )

    def _unfused(self) -> ir.Model:
        return rewritten(self._dense, self._found.sites, self._layers, self._shapes, close=self._close)

    def _with_integers(self) -> ir.Model:
        """The model with its integer weights as integer operators read them."""
        found = self._found.sites
        return rewritten(self._dense, found, self._layers, self._shapes, integers=True, close=self._close)

    def _close(self, model: ir.Model, layers: Mapping[str, Layer]) -> frozenset[str]:
        return close_recurrent(model, self._opened, layers)

    def integer_layers(self) -> Sequence[str]:
        check_opset(self._dense)
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
        return OnnxRunner(self._dense, self._found.sites, dict(self._layers))

    def _changed(self, *, dense: bool = False) -> None:
        self._finite = self._finite and not dense
        for cache in ("_built", "_session", "_runner", *(("_found",) if dense else ())):
            self.__dict__.pop(cache, None)

    def _site(self, name: str) -> FoundSite:
        if name not in self._found.sites:
            known = ", ".join(list(self._found.sites)[:8]) or "none"
            why = f" ({self._found.declined[name]})" if name in self._found.declined else ""
            raise PlanError(f"the model has no site {name!r}{why}; its sites begin with: {known}")
        return self._found.sites[name]

    def sites(self) -> Sequence[Site]:
        """Every replaceable weight, in the order of the graph; with extents once `observe` has run."""
        return [
            replace(self._seen.get(name, found.site), bias=self._has_bias(name))
            for name, found in self._found.sites.items()
        ]

    def _has_bias(self, name: str) -> bool:
        layer = self._layers.get(name)
        return self._found.sites[name].site.bias if layer is None else layer.bias is not None

    def declined(self) -> Mapping[str, str]:
        """Other layers that hold weights, each with the reason why it is left alone."""
        return dict(self._found.declined)

    def weight(self, name: str) -> Tensor:
        """The dense weight as `[o, i, *kernel]`.

        Raises `InvalidModelError` unless all its numbers are finite.
        """
        return self._site(name).weight()

    def bias(self, name: str) -> Tensor | None:
        """The bias of a site's dense layer as `[o]`; still there after `replace`."""
        return self._site(name).bias()

    def layer(self, name: str) -> Layer | None:
        """What replaced the site's dense layer; None while it is dense."""
        self._site(name)
        return self._layers.get(name)

    def refused(self, form: Form) -> str:
        return unreadable(form, opset_of(self._dense))

    def replace(self, name: str, layer: Layer) -> None:
        """Put a factored layer at every use of the site.

        Raises `PlanError` for an unknown site or a shape that does not fit.
        """
        found = self._site(name)
        wanted = layer.form.on(found.site).geometry()
        if layer.site.geometry() != wanted:
            raise PlanError(
                f"the layer is for {layer.site.geometry()}, but site {name!r} is {wanted}; factorize the "
                "weight of this site"
            )
        reason = self.refused(layer.form)
        if reason:
            raise PlanError(f"site {name!r} of an ONNX model cannot be '{layer.form}': {reason}")
        expected = layer.storage.sizes()
        given = {label: tuple(factor.shape) for label, factor in layer.factors.items()}
        if given != expected:
            raise PlanError(
                f"the {layer.format} factors of {name!r} have shapes {given}, but '{layer.form}' wants "
                f"{expected}"
            )
        if layer.bias is not None and tuple(layer.bias.shape) != (layer.site.o,):
            raise PlanError(
                f"a bias of shape {tuple(layer.bias.shape)} does not fit site {name!r}; it takes "
                f"[{layer.site.o}]"
            )
        kept, bias = layer.to(found.kept), layer.bias
        self._layers[name] = replace(kept, bias=None if bias is None else bias.to(found.dtype))
        self._waiting |= {name}
        self._spill()
        self._changed()

    def _spill(self) -> None:
        """Move the factors in memory to a file once they are many; small models never have one."""
        waiting = {name: self._layers[name] for name in self._waiting}
        if held_bytes(waiting) > HELD_BYTES:
            self._layers.update(spilled(waiting))
            self._waiting = frozenset()
            del waiting
            release_heap()

    def record(self, batch: Batch) -> Tape:
        """Run the model on a batch and record it.

        Raises `InvalidModelError` for a batch that does not fit.
        """
        return self._record(self._runner, batch)

    def observe(self, *batches: Batch) -> None:
        """Fill in the sites' extents and the multiply-adds from a run of the dense model on the first call, on all where they may differ."""
        dense = OnnxRunner(self._dense, self._found.sites)
        first = batches[0]
        self._example = first.part(0, 2)
        try:
            self._record(dense, self._example, replayed=False)
        except (UnsupportedError, InvalidModelError):
            self._example = first
        tapes = [self._record(dense, first, replayed=False)]
        self._seen = {name: with_extents(found.site, tapes) for name, found in self._found.sites.items()}
        differ = not alike(batches) or any(
            not site.extents or site.samples > 1 for site in self._seen.values()
        )
        self._observed = batches if differ else batches[:1]
        tapes += [self._record(dense, batch, replayed=False) for batch in self._observed[1:]]
        self._seen = {name: with_extents(found.site, tapes) for name, found in self._found.sites.items()}
        called = {name for tape in tapes for name in tape.site_calls}
        self._leave({name: UNREACHED for name in self._found.sites if name not in called})
        self._macs = self._count(self._dense, self._observed).per_sample

    def _leave(self, reasons: Mapping[str, str]) -> None:
        """Sites that stay dense."""
        self._left = {**self._left, **reasons}
        self._found = self._found.without(reasons)
        self._changed()

    def _record(self, runner: OnnxRunner, batch: Batch, *, replayed: bool = True) -> Tape:
        inputs = self.named_inputs(batch)
        sites = {id(weight): name for name, weight in runner.weights.items()}
        held = (*runner.weights.values(), *runner.constants.values())
        return record(
            lambda: runner(inputs),
            list(inputs.values()),
            sites,
            samples=batch.size,
            held=held,
            replayed=replayed,
        )

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs by name, computed by ONNX Runtime on the CPU."""
        return self._session(self.named_inputs(batch))

    def fold_batchnorm(self, decline: Decline = no_reasons) -> Sequence[str]:
        """Fold every batch-norm that alone reads the only use of a dense site; returns the sites changed."""
        del decline  # what does not fold is no batch-norm of that form
        changed: list[str] = []
        for name in [name for name in self._found.sites if name not in self._layers]:
            node = foldable(self._dense, self._found.sites[name], self._shapes)
            if node is not None:
                fold(self._dense, name, self._found.sites[name], node)
                changed.append(name)
                self._changed(dense=True)
        return changed

    def norms(self, decline: Decline = no_reasons) -> Mapping[str, Sequence[str]]:
        """The norms that nothing but dense linear sites reads, by the name of what they make."""
        found = scaled_norms(self._dense, self._found.sites, self._layers, decline)
        return {name: norm.sites for name, norm in found.items()}

    def scale_norm(self, name: str, scale: Tensor) -> None:
        """Divide what a norm makes, and multiply the columns of the sites that read it."""
        norm = scaled_norms(self._dense, self._found.sites, self._layers, no_reasons)[name]
        norm.scale(self._dense, scale)
        for site in norm.sites:
            scale_columns(self._dense, site, self._found.sites[site], scale)
        self._changed(dense=True)

    def recalibrate_batchnorm(self, batches: Iterable[Batch]) -> Callable[[], None] | None:
        """Estimate all running statistics anew from the factored model.

        Returns how to undo that, None without a batch-norm.
        """
        norms = batchnorms(self._dense)
        if not norms:
            return None
        before = [statistics(node) for node in norms]
        seen = {node: BatchStatistics() for node in norms}
        runner = OnnxRunner(self._dense, self._found.sites, self._layers, seen)
        with torch.no_grad():
            for batch in batches:
                runner(self.named_inputs(batch))
        for node, batch_statistics in seen.items():
            batch_statistics.write(self._dense, node)
        self._changed(dense=True)

        def undo() -> None:
            for node, values in zip(norms, before, strict=True):
                set_statistics(self._dense, node, values)
            self._changed(dense=True)

        return undo

    def fuse(self, note: Note, decline: Decline, samples: Batch | None = None) -> bool:
        """Make one operator of com.tdpass of each chain of layers where that is faster in ONNX Runtime.

        Returns whether anything changed. Timed on the samples, else on the example.  A layer that is replaced
        afterwards is a chain of plain layers again.
        """
        batch = samples or self.example()
        fusions = decide(self._unfused, {} if batch is None else self.named_inputs(batch), note, decline)
        changed = fusions != self._fusions
        self._fusions = fusions
        self._changed()
        return changed

    def example(self) -> Batch | None:
        """Two samples of what was last observed.

        Before that, of what the inputs declare, where only the first axis is open.
        """
        if self._example is None:
            self._example = declared_example(self._dense.graph)
        return self._example

    def signature(self) -> Signature:
        """Inputs by name, type and sizes."""
        return signature(self._dense.graph, self._constants)

    def count(self, batch: Batch | None = None) -> Counted:
        """Multiply-adds of every node that runs, of a fused operator those of what it stands for.

        By default on what was last observed.
        """
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
        """Stored numbers in all parameters, shared ones once.

        Constants without axes and running statistics not counted.
        """
        return parameter_count(self._built)

    def bytes(self) -> int:
        """Bytes of all parameters."""
        return parameter_bytes(self._built)

    def clone(self) -> Self:
        """An independent copy; weights and factors, which are never written to, are shared."""
        twin = copy.copy(self)
        twin._dense = self._dense.clone()
        twin._layers = dict(self._layers)
        twin._changed(dense=True)
        twin._finite = self._finite  # the same weights
        return twin

    def check(self) -> None:
        """Raise `InvalidModelError` if the rewritten model is inconsistent."""
        check_structure(self._built, "the pass that changed it last is at fault; please report it")
        self.check_weights()

    def check_weights(self) -> None:
        """Raise `InvalidModelError` where a weight of the dense model is not finite.

        They are read once, however often this is asked.
        """
        if not self._finite:
            for held in (held for record in self._opened for held in record.constants.items()):
                finite(to_torch(held[1]), held[0])
            check_finite(self._dense)
            self._finite = True

    def unwrap(self) -> object:
        """The rewritten model as the type that came in; an `onnx_ir.Model` for a path."""
        return self._give_back(self._built)

    def named_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The batch by input name; raises `InvalidModelError` where it does not fit."""
        return bind(self._dense.graph, batch)

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
        obsolete = write(model, path, self._external or stored_bytes(model) > EXTERNAL_ABOVE)
        if self._owned:
            # An onnx_ir.Model that came in may still read by path from the file it was loaded from.
            remove_obsolete(obsolete)
