"""What docs/extending.md says can be added as one file is added here, and found by what uses it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from onnx_nets import to_onnx
from torch import Tensor, nn
from typing_extensions import Self

import tdpass
from tdpass.constraints import CONSTRAINTS, Constraint, register_constraint
from tdpass.constraints.base import checked
from tdpass.cost import Cost
from tdpass.errors import PlanError, UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, offered_formats, register_format
from tdpass.formats.layer import Layer
from tdpass.formats.svd import Svd
from tdpass.job import Job
from tdpass.kernels.base import IMPLEMENTATIONS, OPS, Op, implements, register_op, use_reference
from tdpass.kinds import KINDS, register_kind
from tdpass.kinds.linear import Linear
from tdpass.measures import MEASURES, Measure, Needs, register_measure
from tdpass.methods import METHODS, AdmmTT, register_method
from tdpass.models import Model, open_model
from tdpass.models.base import Batch
from tdpass.models.front_ends import FRONT_ENDS, FrontEnd, register_front_end
from tdpass.numbers import NUMBERS, register_numbers
from tdpass.numbers.integer import Integer
from tdpass.pipeline import PASSES, Pass, Pipeline, register_pass
from tdpass.planner.answers import Answers
from tdpass.planner.calibrations import CALIBRATIONS, Histogram
from tdpass.planner.calibrations.base import register_calibration
from tdpass.planner.comparisons import COMPARISONS, Comparison, register_comparison
from tdpass.planner.divergence import Divergence
from tdpass.planner.trials import Promise
from tdpass.products import PRODUCTS, counting
from tdpass.registry import Registry
from tdpass.site import Site
from tdpass.sources import MODULE_SOURCES, ModuleSource, module_of, register_module_source
from tdpass.supports import SUPPORTS, register_support
from tdpass.supports.rows import Rows
from tdpass.tape import Tape, record
from tdpass.targets import TARGETS, open_target, register_target
from tdpass.targets.base import Setting
from tdpass.targets.modelled import ModelledTarget
from tdpass.targets.runtimes import RUNTIMES
from tdpass.targets.runtimes.base import register_runtime
from tdpass.targets.runtimes.eager import Eager
from tdpass.targets.workload import Product
from tdpass.training.admm import Admm
from tdpass.training.batches import Batches
from tdpass.training.loop import Loop, cross_entropy
from tdpass.training.rules import fixed
from tdpass.training.terms import Hooks, Term

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
GUIDE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
# Where what a section says is tried; what is tried elsewhere names a file.
TRIED: Mapping[str, str] = {
    "A format": "test_a_format_is_planned_written_and_run_on_both_front_ends",
    "A joint change": "planner/test_joint_changes.py",
    "A number type": "test_a_number_type_is_stored_and_run_on_both_front_ends",
    "A support": "test_a_support_is_stored_and_run_on_both_front_ends",
    "A calibration": "test_a_calibration_is_named_by_the_pass_that_rounds_activations",
    "A pass": "test_a_pass_is_read_run_and_held_to_its_promise",
    "A kernel": "test_an_operator_runs_its_implementation_or_its_reference",
    "A runtime": "test_a_runtime_times_layers_by_its_name",
    "A target": "test_a_target_prices_plans_in_a_measure_of_its_own",
    "A measure": "test_a_target_prices_plans_in_a_measure_of_its_own",
    "A constraint": "test_a_constraint_is_what_admm_draws_weights_to",
    "A training method": "test_a_method_is_named_in_train",
    "A term": "test_a_term_acts_around_every_step",
    "A divergence": "test_a_comparison_is_named_by_a_divergence",
    "A kind of layer": "test_a_kind_of_layer_is_found_factored_and_counted",
    "A front end": "test_a_front_end_is_compressed_by_what_is_abstract_alone",
    "A source of models or data": "test_a_source_of_models_is_named_before_the_colon",
    "A verb of the command line": "test_exit_codes.py",
    "A page": "test_documentation_runs.py",
}


@contextmanager
def added(*places: tuple[Registry[Any], str]) -> Iterator[None]:
    """Takes what was registered out again."""
    try:
        yield
    finally:
        for registry, name in places:
            registry._entries.pop(name, None)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    with torch.no_grad():
        for layer in made[::2]:
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((u * s * 0.5 ** torch.arange(len(s))) @ v)
    return made


def compress(model: object, budget: Mapping[str, float], **options: Any) -> tdpass.Artifact:
    return tdpass.compress(
        model, budget, X, divergence=options.pop("divergence", "mse"), effort="fast", cache=False, **options
    )


def answer(model: Model) -> Tensor:
    returned = model.run(Batch((X,)))
    (value,) = returned.values() if isinstance(returned, dict) else (returned,)
    assert isinstance(value, Tensor)
    return value


def holds_on_both_front_ends(form: Form, site_name: str = "2") -> None:
    """A layer of that form is stored as it says and answers alike through torch and through ONNX Runtime."""
    module = net()
    answers = []
    for model in (open_model(net()), open_model(to_onnx(module, X))):
        (site,) = (site for site in model.sites() if site.shape == (24, 32))
        fmt = FORMATS.get(form.format)
        factors = fmt.factorize(module[2].weight.detach(), site, form.rank)
        layer = Layer(site, Form(form.format, form.rank), factors, model.bias(site.name)).to(torch.float32)
        before = model.bytes()
        model.replace(site.name, layer.stored(form))
        held = model.layer(site.name)
        assert held is not None
        assert Form.parse(str(held.form)) == form
        assert before - model.bytes() == 4 * 24 * 32 - sum(tensor.nbytes for tensor in held.factors.values())
        answers.append(answer(model))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_every_section_of_the_guide_is_tried() -> None:
    sections = [title for title in re.findall(r"^## (.+)$", GUIDE, re.MULTILINE) if title != "Layers"]
    assert sections == list(TRIED)
    for place in TRIED.values():
        assert place in globals() or (Path(__file__).parent / place).is_file(), place


def test_a_format_is_planned_written_and_run_on_both_front_ends() -> None:
    with added((FORMATS, "mine")):

        @register_format
        class Mine(Svd):
            """Two linear layers."""

            name = "mine"

        assert "mine" in offered_formats()
        artifact = compress(net(), {"params": 0.6}, formats=("mine",))
        assert {choice.format for choice in artifact.plan if not choice.kept_dense} == {"mine"}
        again = tdpass.RankPlan.from_json(artifact.plan.to_json())
        assert again == artifact.plan
        holds_on_both_front_ends(Form("mine", (5,)))
    with pytest.raises(UsageError, match="unknown format 'mine'"):
        compress(net(), {"params": 0.6}, formats=("mine",))


def test_a_number_type_is_stored_and_run_on_both_front_ends() -> None:
    with added((NUMBERS, "mine6")):

        @register_numbers
        @dataclass(frozen=True)
        class Mine(Integer):
            """Six bits in a byte."""

            name = "mine6"
            bits = 6

        holds_on_both_front_ends(Form("svd", (5,), ("mine6",)))
        holds_on_both_front_ends(Form("dense", (), ("mine6/8",)))
    with pytest.raises(PlanError, match="unknown number type 'mine6'"):
        holds_on_both_front_ends(Form("svd", (5,), ("mine6",)))


def test_a_support_is_stored_and_run_on_both_front_ends() -> None:
    with added((SUPPORTS, "mine")):

        @register_support
        @dataclass(frozen=True)
        class Mine(Rows):
            """Whole rows."""

            name = "mine"
            example = "mine/8"

        assert str(Form.parse("dense mine/8")) == "dense mine/8"
        model = open_model(net())
        site = model.sites()[1]
        layer = Layer(site, DENSE, {"kernel": model.weight(site.name)}, model.bias(site.name))
        model.replace(site.name, layer.stored(Form.parse("dense mine/8")))
        held = model.layer(site.name)
        assert held is not None
        assert int((held.reconstruct() != 0).any(1).sum()) == 8


def test_a_calibration_is_named_by_the_pass_that_rounds_activations() -> None:
    pipeline = "quantize,quantize-activations{calibration=half}"
    with added((CALIBRATIONS, "half")):

        @register_calibration
        def half(seen: Histogram) -> tuple[float, float]:
            return seen.low / 2, seen.high / 2

        model = compress(net(), {"macs": 1.0}, pipeline=pipeline).model
        scale, zero = model[0].layer().factors["kernel_range"].tolist()
        low, high = (float(end) / 2 for end in (X.min(), X.max()))
        assert scale == pytest.approx((high - low) / 255)
        assert zero == round(-low / scale)
    with pytest.raises(UsageError, match="unknown calibration 'half'"):
        compress(net(), {"macs": 1.0}, pipeline=pipeline)


def test_a_pass_is_read_run_and_held_to_its_promise() -> None:
    with added((PASSES, "divide-biases")):

        @register_pass
        @dataclass(frozen=True)
        class DivideBiases(Pass):
            """b := b / by."""

            name = "divide-biases"
            promise = Promise.SAME

            by: float = 1.0

            def run(self, model: Model, job: Job) -> bool:
                for site in model.sites():
                    layer = model.layer(site.name)
                    if layer is not None and layer.bias is not None:
                        model.replace(site.name, replace(layer, bias=layer.bias / self.by))
                job.note(f"divided by {self.by:g}")
                return True

        assert str(Pipeline.parse("divide-biases{by=2.0}")) == "divide-biases{by=2.0}"
        artifact = compress(net(), {"params": 0.6}, pipeline="plan,factorize,divide-biases")
        assert artifact.report.passes[-1].notes == ("divided by 1",)
        with pytest.raises(tdpass.DifferenceError, match="divide-biases"):
            compress(net(), {"params": 0.6}, pipeline="plan,factorize,divide-biases{by=-4.0}")


def test_an_operator_runs_its_implementation_or_its_reference() -> None:
    with added((OPS, "test_doubled"), (PRODUCTS, "tdpass.test_doubled")):
        schema, macs = "(Tensor x) -> Tensor", lambda y, x: x.numel()
        op = register_op(Op("test_doubled", schema, lambda x: 2 * x, torch.empty_like, macs))
        ran: list[int] = []

        @implements("test_doubled", "cpu")
        def on_cpu(x: Tensor) -> Tensor:
            ran.append(x.numel())
            return x + x if x.dtype is torch.float32 else NotImplemented

        try:
            x = torch.arange(3.0)
            assert torch.equal(op.call(x), 2 * x)
            assert torch.equal(op.call(x.double()), 2 * x.double())
            assert ran == [3, 3]
            with use_reference():
                assert torch.equal(op.call(x), 2 * x)
            assert ran == [3, 3]
            with counting() as counter:
                op.call(x)
            assert counter.counted().macs == 3
        finally:
            del IMPLEMENTATIONS["test_doubled", "cpu"]


def test_a_runtime_times_layers_by_its_name(tmp_path: Path) -> None:
    with added((RUNTIMES, "mine")):

        @register_runtime
        class Mine(Eager):
            """Torch under another name."""

            name = "mine"
            families = frozenset({"mine"})

        site = Site("fc", "linear", (8, 6), extents=(((1,), (1,)),))
        target = open_target("cpu:mine", "torch", tmp_path)
        (timing,) = target.time(site, [Form("svd", (2,))], Setting())  # type: ignore[attr-defined]
        assert timing.kernel == "mine"
        assert 0 < timing.seconds < 1
    with pytest.raises(UsageError, match="target cpu has no runtime 'mine'"):
        open_target("cpu:mine", "torch", tmp_path)


def test_a_target_prices_plans_in_a_measure_of_its_own() -> None:
    with added((TARGETS, "mine"), (MEASURES, "coins")):
        register_measure(
            Measure(
                "coins", "Coins", "fewer coins", "more coins", "5k", {"": 1, "k": 1e3}, needs=Needs.TARGET
            )
        )

        @register_target
        class Mine(ModelledTarget):
            """A coin for every weight that a product reads."""

            name = "mine"
            measures: ClassVar[tuple[str, ...]] = ("coins",)

            @classmethod
            def open(cls, way: str, frontend: str, cache: Path | None) -> Self:
                return cls()

            def cost_product(self, product: Product) -> Cost:
                return Cost.of({"coins": product.weights})

        artifact = compress(net(), {"coins": 0.6}, target="mine")
        whole = 12 * 32 + 32 * 24 + 24 * 4
        assert artifact.report.original.get("coins") == whole
        assert artifact.report.final.get("coins") <= 0.6 * whole
        held = [artifact.opened.layer(site.name) for site in artifact.opened.sites()]
        stored = sum(layer.storage.params for layer in held if layer is not None)
        dense = sum(
            site.o * site.i
            for site, layer in zip(artifact.opened.sites(), held, strict=True)
            if layer is None
        )
        assert artifact.report.final.get("coins") == stored + dense


@dataclass(frozen=True)
class Ball(Constraint):
    """Weights of norm at most `radius`."""

    radius: float
    name = "ball"

    def project(self, weight: Tensor) -> Tensor:
        norm = float(checked(weight).norm())
        return weight.detach() * min(1.0, self.radius / max(norm, 1e-30))

    def __str__(self) -> str:
        return f"norm {self.radius:g}"


def test_a_constraint_is_what_admm_draws_weights_to() -> None:
    with added((CONSTRAINTS, "ball")):
        register_constraint(Ball)
        ball = CONSTRAINTS.get("ball")(1.0)  # type: ignore[call-arg]
        goal = torch.full((3, 3), 2.0)
        weight = nn.Parameter(torch.zeros(3, 3))
        term = Admm({"w": weight}, [fixed({"w": ball})], 1.0)
        optimizer = torch.optim.SGD([weight], lr=0.2)
        hooks = Hooks(optimizer, [term], lambda step: step % 10 == 0, 40)
        for _ in range(400):
            optimizer.zero_grad()
            (0.5 * (weight - goal).square().sum()).backward()
            optimizer.step()
        hooks.remove()
        torch.testing.assert_close(weight.detach(), goal / goal.norm(), rtol=1e-2, atol=1e-3)


def _data() -> Batches:
    return Batches(X, torch.arange(len(X)) % 4, 8)


def test_a_method_is_named_in_train() -> None:
    with added((METHODS, "mine")):

        @register_method
        @dataclass
        class Mine(AdmmTT):
            """ADMM under another name."""

            name: ClassVar[str] = "mine"

        method = {"mine": {"ranks": {"2": {"svd": [3]}}, "rounds": 2}}
        artifact = tdpass.train(net(), _data(), method, settings={"lr": 0.01}, control=False)
        assert [str(choice.form) for choice in artifact.plan if not choice.kept_dense] == ["svd 3"]
        assert {row.stage for row in artifact.report.training} == {"method"}


def test_a_term_acts_around_every_step() -> None:
    class Shrink(Term):
        """The last bias goes towards zero, and the loss says how far it is."""

        def __init__(self, bias: nn.Parameter) -> None:
            self.bias, self.steps = bias, 0

        def loss(self, inputs: object, outputs: object) -> Tensor:
            return 100 * self.bias.square().sum()

        @torch.no_grad()
        def after_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.steps += 1

    model = net()
    term = Shrink(model[4].bias)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = float(term.bias.detach().norm())
    rows = list(
        Loop("test", model, _data(), optimizer, cross_entropy(), 3, lambda progress: 1.0, terms=(term,)).run()
    )
    assert term.steps == 3 * 4
    assert float(term.bias.detach().norm()) < 0.3 * before
    assert rows[-1].loss < rows[0].loss


def test_a_comparison_is_named_by_a_divergence() -> None:
    with added((COMPARISONS, "l1")):

        @register_comparison
        @dataclass(frozen=True)
        class Absolute(Comparison):
            """Mean of |a - b| over the last axis."""

            name = "l1"

            @classmethod
            def fit(cls, answers: Answers) -> Self:
                return cls()

            @property
            def gain(self) -> float:
                return 1.0

            def rows(self, reference: Tensor, output: Tensor) -> Tensor:
                return (reference - output).abs().mean(-1).reshape(-1)

            def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
                return torch.randn(reference.shape, generator=generator, dtype=reference.dtype)

        one, other = torch.zeros(2, 4), torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 2]])
        assert Divergence("l1").fit([{"output": one}]).mean(
            [({"output": one}, {"output": other})]
        ) == pytest.approx(0.75)
        artifact = compress(net(), {"params": 0.6}, divergence="l1")
        assert artifact.report.divergence == "l1"
        module = net()
        with torch.no_grad():
            gap = (module(X) - artifact.model(X)).abs().mean()  # type: ignore[operator]
        assert artifact.report.checks["divergence"] == pytest.approx(float(gap), rel=1e-3)
    with pytest.raises(UsageError, match="unknown divergence 'l1'"):
        Divergence("l1")


class Named(nn.Linear):
    """A linear layer of a class that a kind of its own names."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def test_a_kind_of_layer_is_found_factored_and_counted() -> None:
    with added((KINDS, "mine")):

        @register_kind
        class Mine(Linear):
            """Linear layers of a class of one's own."""

            name = "mine"
            modules = (Named,)
            functions: ClassVar[Mapping[Any, type[nn.Module]]] = {}

            def examples(self) -> Sequence[Site]:
                return (Site("mine", self.name, (12, 16), extents=(((1,), (1,)),)),)

            def build(
                self, cls: type[nn.Module], shape: Sequence[int], options: Mapping[str, Any]
            ) -> nn.Module:
                return Named(shape[1], shape[0], bias=False, device="meta")

            def base_of(self, module: nn.Module) -> type[nn.Module] | None:
                return Named if isinstance(module, Named) else None

        module = nn.Sequential(Named(12, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        model = open_model(module, Batch((X,)))
        assert {site.name: site.kind for site in model.sites()} == {"0": "mine", "2": "linear"}
        assert model.macs() == 12 * 32 + 32 * 4
        artifact = compress(module, {"macs": 0.7}, formats=("svd",))
        assert [choice.site for choice in artifact.plan if not choice.kept_dense]
        assert artifact.report.final.macs <= 0.7 * (12 * 32 + 32 * 4)


class Stack:
    """A perceptron as a list of arrays: a kind of model that nothing here knows."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.layers = list(layers)


class StackModel(Model):
    """What is abstract in `Model`, and nothing else."""

    frontend = "stack"
    suffix = ".pt"

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.dense, self.made, self.seen = list(layers), dict[str, Layer](), False

    def sites(self) -> Sequence[Site]:
        extents = (((1,), (1,)),) if self.seen else ()
        return [
            Site(str(k), "linear", tuple(weight.shape), extents=extents, bias=True)
            for k, (weight, _) in enumerate(self.dense)
        ]

    def weight(self, name: str) -> Tensor:
        return self._layer(name)[0]

    def bias(self, name: str) -> Tensor | None:
        return self._layer(name)[1]

    def _layer(self, name: str) -> tuple[Tensor, Tensor]:
        if not name.isdecimal() or int(name) >= len(self.dense):
            raise PlanError(f"the stack has no site {name!r}")
        return self.dense[int(name)]

    def layer(self, name: str) -> Layer | None:
        self._layer(name)
        return self.made.get(name)

    def replace(self, name: str, layer: Layer) -> None:
        self.made[name] = layer.to(torch.float32)

    def _forward(self, x: Tensor) -> Tensor:
        for k, (weight, bias) in enumerate(self.dense):
            layer = self.made.get(str(k))
            x = F.linear(x, weight, bias) if layer is None else layer(x)
            x = x.relu() if k + 1 < len(self.dense) else x
        return x

    def record(self, batch: Batch) -> Tape:
        sites = {id(weight): str(k) for k, (weight, _) in enumerate(self.dense) if str(k) not in self.made}
        held = [tensor for pair in self.dense for tensor in pair] + [
            f for layer in self.made.values() for f in layer.factors.values()
        ]
        return record(lambda: self._forward(batch.args[0]), batch.tensors, sites, held=held)

    def observe(self, *batches: Batch) -> None:
        self.seen, self.call = True, batches[0]

    def example(self) -> Batch | None:
        return self.call if self.seen else None

    def run(self, batch: Batch) -> object:
        with torch.no_grad():
            return self._forward(batch.args[0])

    def clone(self) -> Self:
        twin = type(self)(self.dense)
        twin.made, twin.seen = dict(self.made), self.seen
        if self.seen:
            twin.call = self.call
        return twin

    def unwrap(self) -> object:
        layers = [self.made.get(str(k)) for k in range(len(self.dense))]
        return Stack(
            [
                pair if layer is None else (layer.reconstruct(), pair[1])
                for pair, layer in zip(self.dense, layers, strict=True)
            ]
        )

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        torch.save({"layers": self.unwrap().layers, **metadata}, path)  # type: ignore[attr-defined]


def test_a_front_end_is_compressed_by_what_is_abstract_alone(tmp_path: Path) -> None:
    with added((FRONT_ENDS, "stack")):
        register_front_end(
            FrontEnd("stack", lambda model, example, overridable: StackModel(model.layers), types=(Stack,))
        )  # type: ignore[attr-defined]
        module = net()
        stack = Stack([(layer.weight.detach(), layer.bias.detach()) for layer in module[::2]])
        artifact = compress(stack, {"macs": 0.6})
        assert isinstance(artifact.model, Stack)
        assert artifact.report.frontend == "stack"
        whole = 12 * 32 + 32 * 24 + 24 * 4
        assert artifact.report.original == Cost(whole + 32 + 24 + 4, whole, 4 * (whole + 32 + 24 + 4))
        assert artifact.report.final.macs <= 0.6 * whole
        torch_plan = compress(module, {"macs": 0.6}).plan
        assert [str(choice.form) for choice in artifact.plan] == [str(choice.form) for choice in torch_plan]
        assert any("fold" in note for row in artifact.report.passes for note in row.notes)
        artifact.save(tmp_path / "stack.pt")
        assert (tmp_path / "stack.pt").is_file()
    with pytest.raises(tdpass.InvalidModelError, match="Stack"):
        open_model(stack)


def test_a_source_of_models_is_named_before_the_colon() -> None:
    with added((MODULE_SOURCES, "mine")):

        @register_module_source
        class Mine(ModuleSource):
            """Stacks of linear layers by their widths."""

            name = "mine"
            example = "mine:12x4"

            def build(self, text: str, *, pretrained: bool) -> nn.Module:
                widths = [int(width) for width in text.split("x")]
                return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))

        assert [tuple(layer.weight.shape) for layer in module_of("mine:12x8x4")] == [(8, 12), (4, 8)]
    with pytest.raises(UsageError, match="mine"):
        module_of("mine:12x8x4")
