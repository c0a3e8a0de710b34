"""Running an ONNX graph node by node in torch, to be recorded, observed and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import InlinePass
from torch import Tensor

import tdpass.models.onnx.graph.layers
import tdpass.models.onnx.graph.layout
import tdpass.models.onnx.graph.math  # noqa: F401 - these fill the table of functions
from tdpass.errors import InvalidModelError, TdpassError
from tdpass.formats.geometry import apply_dense
from tdpass.formats.layer import Layer
from tdpass.models.onnx.files.checks import brief
from tdpass.models.onnx.files.storage import release_pages
from tdpass.models.onnx.graph.bodies import Block, Control, Step, Values, runs_bodies
from tdpass.models.onnx.graph.functions import FUNCTIONS, NotServedError, Operator, TorchFunction
from tdpass.models.onnx.graph.graphs import bodies, captured_values, nodes_of, opset_of, within
from tdpass.models.onnx.graph.sequences import reads_sequence
from tdpass.models.onnx.graph.tensors import constant, to_torch
from tdpass.models.onnx.operators.session import NodeSession
from tdpass.models.onnx.sites.matchers import operator_name
from tdpass.models.onnx.sites.sites import FoundSite
from tdpass.models.onnx.sites.weight_use import WeightUse
from tdpass.ops import TorchOps

_KNOWN_FROM_SHAPES = frozenset({"Shape", "Size"})
_OPS = TorchOps()


@dataclass
class _NodeStep:
    """One node: a torch function, or ONNX Runtime where there is none for this form of the operator."""

    operator: Operator
    function: TorchFunction | None
    inputs: tuple[ir.Value | None, ...]
    captured: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    open_session: Callable[[], NodeSession]
    fixed: bool
    session: NodeSession | None = None

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return (*(value for value in self.inputs if value is not None), *self.captured)

    def run(self, values: Values) -> None:
        inputs = [None if value is None else values[value] for value in self.inputs]
        if self.function is not None:
            try:
                outputs = self.function(self.operator, *inputs)
            except NotServedError:
                self.function = None
            else:
                values.update(
                    zip(self.outputs, (outputs,) if isinstance(outputs, Tensor) else outputs, strict=False)
                )
                return
        self.session = self.session or self.open_session()
        made = self.session(*inputs, *(values[value] for value in self.captured))
        values.update(zip((value for value in self.outputs if value.name), made, strict=True))


@dataclass
class _SiteStep:
    """One use of a site: its dense layer, or the factored layer in its place."""

    use: WeightUse
    compute: Callable[[Tensor], Tensor]
    fixed: bool = False

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        addend, around = self.use.addend, (self.use.preceding, self.use.following)
        return (
            self.use.input.value,
            *(() if addend is None else (addend.value,)),
            *(value for part in around if part is not None for value in part.reads),
        )

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        return (self.use.output,)

    def run(self, values: Values) -> None:
        addend = None
        if self.use.addend is not None:
            addend = values[self.use.addend.value]
            addend = addend if self.use.addend_scale == 1.0 else self.use.addend_scale * addend
        x = values[self.use.input.value]
        if self.use.preceding is not None:
            x = self.use.preceding.computed(x, values)
        if self.use.reads_rows:  # numbers below zero count from the last row
            x = torch.remainder(x.long(), self.use.canonical_shape()[0])
        y = self.use.apply(_OPS, x, self.compute, addend)
        following = self.use.following
        values[self.use.output] = y if following is None else following.computed(y, values)


@dataclass
class OnnxRunner:
    """The dense model with `layers` in place of some sites, as a function from named inputs to named outputs.

    Dense sites call `F.linear` or `F.conv*d` with one tensor per site, held in `weights`.  What depends on
    constants and on shapes only is computed outside of any recording mode.  Operators without a torch
    function run in ONNX Runtime, and gradients stop there.  `functions` takes the place of the table for
    single nodes of the model.
    """

    model: ir.Model
    sites: Mapping[str, FoundSite]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    functions: Mapping[ir.Node, TorchFunction] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(init=False, default_factory=dict)
    constants: dict[ir.Value, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        twins = {node: node for node in nodes_of(self.model)}
        if self.model.functions:
            inlined = self.model.clone()
            twins = dict(zip(twins, nodes_of(inlined), strict=True))
            InlinePass()(inlined)
            self._executed = inlined
        else:
            self._executed = self.model
        self._opset = opset_of(self._executed)
        self._fixed: set[ir.Value] = set()
        self._site_places = self._site_steps(twins)
        self._functions = {twins[node]: function for node, function in self.functions.items()}
        self._block = self._compiled(self._executed.graph)

    def _site_steps(self, twins: Mapping[ir.Node, ir.Node]) -> dict[ir.Node, _SiteStep | None]:
        steps: dict[ir.Node, _SiteStep | None] = {}
        for name, found in self.sites.items():
            layer = self.layers.get(name)
            compute = self._dense(name, found) if layer is None else layer.to(found.dtype)
            for use in found.uses:
                here = use.on(twins)
                steps.update((node, None) for node in here.nodes)
                steps[here.node] = _SiteStep(here, compute)
        return steps

    def _dense(self, name: str, found: FoundSite) -> Callable[[Tensor], Tensor]:
        weight, bias = found.weight_view(), found.bias()
        self.weights[name] = weight

        def dense(x: Tensor) -> Tensor:
            rows = found.site.table and not x.is_floating_point()
            return F.embedding(x, weight) if rows else apply_dense(_OPS, x, weight, bias, found.site)

        return dense

    def _compiled(self, graph: ir.Graph) -> Block:
        steps: list[Step] = []
        for node in graph:
            if node in self._site_places:
                site_step = self._site_places[node]
                if site_step is not None:
                    steps.append(site_step)
            elif constant(node.outputs[0]) is None:
                steps.append(self._step(node))
        for value in {*(value for step in steps for value in step.reads), *graph.outputs}:
            tensor = value.const_value if value.is_initializer() else constant(value)
            if tensor is not None:
                self.constants[value] = to_torch(tensor)
        return Block(graph, steps, _perform)

    def _step(self, node: ir.Node) -> Step:
        inside = any(inner in self._site_places for inner in within(node)) or reads_sequence(node)
        if runs_bodies(node, self._opset) and inside:
            blocks = {name: self._compiled(graph) for name, graph in bodies(node).items()}
            return Control(node, blocks, captured_values(node))
        step = self._node_step(node, self._opset, self._executed)
        step.function = self._functions.get(node, step.function)
        return step

    def _node_step(self, node: ir.Node, opset: int, model: ir.Model) -> _NodeStep:
        name = operator_name(node)
        captured = tuple(captured_values(node))
        outputs = tuple(node.outputs)
        read = max(
            (index + 1 for index, output in enumerate(outputs) if output.uses() or output.is_graph_output()),
            default=1,
        )
        operator = Operator(node.op_type, opset, node.attributes, len(outputs) if name == "Split" else read)
        function = FUNCTIONS.get(name) if name in FUNCTIONS else None
        inputs = (*node.inputs, *captured)
        fixed = name in _KNOWN_FROM_SHAPES or all(
            value is None or value in self._fixed or constant(value) is not None for value in inputs
        )
        if fixed:
            self._fixed.update(outputs)
        return _NodeStep(
            operator,
            function,
            tuple(node.inputs),
            captured,
            outputs,
            partial(NodeSession, node, model, captured),
            fixed,
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; raises `InvalidModelError` naming the node that fails."""
        graph = self._executed.graph
        values = dict(self.constants)
        values.update((value, inputs[str(value.name)]) for value in graph.inputs if value.name in inputs)
        self._block.run(values)
        return {str(value.name): values[value] for value in graph.outputs}


def _perform(step: Step, values: Values) -> None:
    try:
        if step.fixed:
            with torch._C.DisableTorchFunction():
                step.run(values)
        else:
            step.run(values)
    except TdpassError:
        raise
    except Exception as error:
        made = step.outputs[0].name
        raise InvalidModelError(
            f"the node that computes {made!r} fails: {brief(error)}; check the sizes of the inputs"
        ) from error
    if isinstance(step, _SiteStep):
        release_pages()
