"""The dense model that layers are put into: its sites, and what may be changed about it as it stands."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import cached_property

import onnx_ir as ir
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError, UnsupportedError
from tdpass.formats.layer import Layer
from tdpass.models.abilities import Decline, no_reasons
from tdpass.models.onnx.files.checks import invalid_if_failing
from tdpass.models.onnx.files.layer_checks import check_layers
from tdpass.models.onnx.files.storage import open_data_files
from tdpass.models.onnx.files.window_checks import check_windows
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import finite, to_torch
from tdpass.models.onnx.rewriting.batchnorm import BatchStatistics, estimate_anew, fold, foldable
from tdpass.models.onnx.rewriting.close_recurrent import close_recurrent
from tdpass.models.onnx.rewriting.divide import Undivided, divided, slices_wanted
from tdpass.models.onnx.rewriting.head_shapes import resize_heads
from tdpass.models.onnx.rewriting.normalize import normalized
from tdpass.models.onnx.rewriting.open_pads import OpenPad, close_pads, open_pads
from tdpass.models.onnx.rewriting.recurrent import Opened, open_recurrent
from tdpass.models.onnx.rewriting.rewrite import forget_shapes, rewritten
from tdpass.models.onnx.rewriting.scaled_norms import scale_columns, scaled_norms
from tdpass.models.onnx.rewriting.streams import slice_graph, write_layer
from tdpass.models.onnx.runner import OnnxRunner
from tdpass.models.onnx.sites.parameters import check_finite
from tdpass.models.onnx.sites.sites import Findings, FoundSite, find_sites
from tdpass.models.streams import HeadChange, StreamEdits
from tdpass.tape import Tape

Run = Callable[[Mapping[ir.Node, BatchStatistics]], None]


class DenseGraph:
    """A model kept as it came, weights in their file where they were, but for what these methods change.

    `external` says whether its weights lie in files beside it, `opened` which recurrent nodes were opened,
    `padded` before which convolutions a Pad stands.
    """

    def __init__(
        self,
        model: ir.Model,
        shapes: Shapes,
        opened: Sequence[Opened] = (),
        padded: Sequence[OpenPad] = (),
        *,
        external: bool = False,
    ) -> None:
        self.model, self.shapes, self.external = model, shapes, external
        self.opened, self.padded = opened, padded
        self._undivided: Undivided | None = None
        self._left: dict[str, str] = {}
        self._finite = False

    @classmethod
    def open(cls, given: ir.Model, overridable: Sequence[str]) -> Self:
        """A copy of the model, normalized.

        Raises `InvalidModelError` for an unsound one.
        """
        model = normalized(given, overridable)
        with invalid_if_failing("the model's data files cannot be opened", "put them beside the model"):
            external = open_data_files(model)
        shapes = Shapes.infer(model)
        check_windows(model, shapes)
        check_layers(model)
        padded, opened = open_pads(model, shapes), open_recurrent(model)
        known = Shapes.infer(model) if opened or padded else shapes
        return cls(model, known, opened, padded, external=external)

    @cached_property
    def found(self) -> Findings:
        """Its sites."""
        return find_sites(self.model, self.shapes).without(self._left)

    @property
    def sites(self) -> Mapping[str, FoundSite]:
        """Its sites by name."""
        return self.found.sites

    @property
    def present(self) -> Mapping[str, Layer]:
        """The layers of the sites whose weights are integers, in the forms that they are in."""
        return {name: found.present for name, found in self.sites.items() if found.present is not None}

    def site(self, name: str) -> FoundSite:
        """The site of that name; raises `PlanError` where there is none."""
        if name not in self.sites:
            known = ", ".join(list(self.sites)[:8]) or "none"
            why = f" ({self.found.declined[name]})" if name in self.found.declined else ""
            raise PlanError(f"the model has no site {name!r}{why}; its sites begin with: {known}")
        return self.sites[name]

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Sites that stay dense, and why."""
        self._left = {**self._left, **reasons}
        self.found = self.found.without(reasons)

    def copies(self, replaced: Container[str]) -> Sequence[ir.TensorProtocol]:
        """What dense sites store twice."""
        dense = (found for name, found in self.sites.items() if name not in replaced)
        return [copy for found in dense if found.site.table for copy in found.copies]

    def rewritten(self, layers: Mapping[str, Layer], *, integers: bool = False) -> ir.Model:
        """A copy with these layers in place of sites, as `rewritten` makes it."""

        def close(model: ir.Model, layers: Mapping[str, Layer]) -> frozenset[str]:
            read = {str(use.input.value.name) for name in layers for use in self.sites[name].uses}
            close_pads(model, self.padded, read)
            return close_recurrent(model, self.opened, layers)

        return rewritten(self.model, self.sites, layers, self.shapes, integers=integers, close=close)

    def fold_batchnorm(self, replaced: Container[str]) -> list[str]:
        """Fold every batch-norm that alone reads the only use of a site that is not replaced.

        Returns the sites changed.
        """
        changed: list[str] = []
        for name in [name for name in self.sites if name not in replaced and name not in self.present]:
            node = foldable(self.model, self.sites[name], self.shapes)
            if node is not None:
                fold(self.model, name, self.sites[name], node)
                changed.append(name)
                self._edited()
        return changed

    def estimate_anew(self, run: Run, changed: Callable[[], None]) -> Callable[[], None] | None:
        """Estimate the statistics of all batch-norms from a run.

        `changed` is called after it, and after an undo. Returns how to undo that, None without a batch-norm.
        """

        def edited() -> None:
            self._edited()
            changed()

        return estimate_anew(self.model, run, edited)

    def norms(self, replaced: Container[str], decline: Decline) -> Mapping[str, Sequence[str]]:
        """The norms that nothing but dense linear sites reads, by the name of what they make."""
        found = scaled_norms(self.model, self.sites, replaced, decline)
        return {name: norm.sites for name, norm in found.items()}

    def scale_norm(self, name: str, scale: Tensor, replaced: Container[str]) -> None:
        """Divide what a norm makes, and multiply the columns of the sites that read it."""
        norm = scaled_norms(self.model, self.sites, replaced, no_reasons)[name]
        norm.scale(self.model, scale)
        for site in norm.sites:
            scale_columns(self.model, site, self.sites[site], scale)
        self._edited()

    def slice_streams(self, edits: StreamEdits, runner: OnnxRunner) -> Sequence[str]:
        """Carry out edits of streams by that runner's tensors; returns the names of the sites changed."""
        if self.model.functions or self.opened:
            raise UnsupportedError(
                "streams of models with local functions or recurrent nodes stay as they are"
            )
        names = {id(weight): name for name, weight in runner.weights.items()}
        constants = {id(tensor): value for value, tensor in runner.constants.items()}
        slice_graph(self.model, self.sites, edits, names, constants)
        self._resized()
        return [names[key] for key in edits.layers]

    def resize_heads(self, heads: Mapping[str, HeadChange]) -> None:
        """Let constants that heads are taken apart and joined by be those of the heads that there are."""
        sites = dict(self.sites)
        for name, change in heads.items():
            resize_heads(self.model, sites[name], name, change)
        self._resized()

    def settle(self, layers: Mapping[str, Layer]) -> Sequence[str]:
        """Make dense layers with fewer channels those of their sites; returns the names of these."""
        for name, layer in layers.items():
            write_layer(self.model, name, self.sites[name], layer.factors["kernel"], layer.bias)
        if layers:
            self._resized()
        return list(layers)

    def divide(self, tape: Tape, decline: Decline) -> Sequence[str]:
        """Divide the sites of which a run reads slices apart; returns their names."""
        gates = {
            name for record in self.opened for name in record.sites
        }  # what is read apart of these are gates
        whole = gates | set(self.present)
        sites = {name: found for name, found in self.sites.items() if name not in whole}
        wanted = {} if self._undivided is not None else slices_wanted(sites, tape, decline)
        if wanted:
            self._undivided = Undivided(self.model, self.shapes, wanted)
            self._put(divided(self.model, self.sites, wanted, self.shapes))
        return list(wanted)

    def join(self, replaced: Container[str]) -> Sequence[str]:
        """Make whole again the sites of which no slice is replaced; returns their names."""
        before, self._undivided = self._undivided, None
        kept = {} if before is None else before.replaced(replaced)
        if before is None or kept == before.wanted:
            return []
        self._put(before.model.clone(), before.shapes)
        if kept:
            self._put(divided(self.model, self.sites, kept, self.shapes))
        return [name for name in before.wanted if name not in kept]

    def check_finite(self) -> None:
        """Raise `InvalidModelError` where a weight is not finite.

        They are read once, however often this is asked.
        """
        if not self._finite:
            for name, held in (pair for record in self.opened for pair in record.constants.items()):
                finite(to_torch(held), name)
            check_finite(self.model)
            self._finite = True

    def clone(self) -> DenseGraph:
        """An independent copy; weights, which are never written to, are shared."""
        twin = DenseGraph(self.model.clone(), self.shapes, self.opened, self.padded, external=self.external)
        twin._undivided, twin._left, twin._finite = self._undivided, self._left, self._finite
        return twin

    def _put(self, model: ir.Model, shapes: Shapes | None = None) -> None:
        self.model, self.shapes = model, shapes or Shapes.infer(model)
        self.__dict__.pop("found", None)

    def _resized(self) -> None:
        """Weights of other sizes stand in it."""
        forget_shapes(self.model)
        self._edited()
        self._put(self.model)

    def _edited(self) -> None:
        """Constants changed, so that what the model was before is of no use."""
        self._undivided, self._finite = None, False
        self.__dict__.pop("found", None)
