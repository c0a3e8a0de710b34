"""Slices of one weight as sites of their own: query, key and value, on both front ends.

The model is not opened by hand.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import model_of, node, to_onnx, weight
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import tdpass
from tdpass.errors import PlanError
from tdpass.models import Factorized, Model, open_model
from tdpass.models.abilities import DividesLayers
from tdpass.models.base import Batch

E = 16


class Columns(nn.Module):
    """A linear layer that stores its weight as [in, out], as GPT-2's Conv1D does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(inputs, outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Net(nn.Module):
    """Attention whose projections come from one matrix, read apart in the ways that are met."""

    def __init__(self, packed: nn.Module, cut: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.packed, self.head, self.cut = packed, nn.Linear(E, 3), cut

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(self.packed(x))
        return self.head(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(E, 2, batch_first=True), nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Gates(nn.Module):
    """A recurrence whose layer makes two gates at once."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(E, 2 * E)

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, 0]
        for step in range(1, 3):
            kept, new = self.packed(state + x[:, step]).chunk(2, -1)
            state = state * kept.sigmoid() + new.tanh()
        return state


class Halves(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, y: Tensor) -> Tensor:
        return y[..., : self.first].sum(-1) * y[..., self.first :].sum(-1)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 8)).transpose(1, 2)


def repeated(y: Tensor) -> tuple[Tensor, ...]:
    """Key and value of one head, for two of the query."""
    q, k, v = (heads(part) for part in (y[..., :16], y[..., 16:24], y[..., 24:]))
    return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chunk": (lambda: Net(nn.Linear(E, 48), lambda y: tuple(map(heads, y.chunk(3, -1)))), (16, 16, 16)),
    "no bias": (
        lambda: Net(nn.Linear(E, 48, bias=False), lambda y: tuple(map(heads, y.chunk(3, -1)))),
        (16,) * 3,
    ),
    "unbind": (
        lambda: Net(nn.Linear(E, 48), lambda y: y.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)),
        (16, 16, 16),
    ),
    "columns": (lambda: Net(Columns(E, 48), lambda y: tuple(map(heads, y.split(16, 2)))), (16, 16, 16)),
    "uneven": (lambda: Net(nn.Linear(E, 32), repeated), (16, 8, 8)),
    "attention": (Attending, (16, 16, 16)),
}
WHOLE: dict[str, Callable[[], nn.Module]] = {
    "also read whole": lambda: Net(
        nn.Linear(E, 48), lambda y: tuple(map(heads, (y + y.mean()).chunk(3, -1)))
    ),
    "overlapping": lambda: Net(
        nn.Linear(E, 32), lambda y: tuple(map(heads, (y[..., :16], y[..., 8:24], y[..., 16:])))
    ),
    "in part": lambda: Net(nn.Linear(E, 49), lambda y: tuple(map(heads, y[..., :48].chunk(3, -1)))),
    "again and again": Gates,
    "too small": lambda: nn.Sequential(nn.Linear(E, 9), Halves(4)),
}
FAST = ("unbind", "columns", "attention")
X = torch.randn(24, 5, E, generator=torch.Generator().manual_seed(0))


def built(name: str) -> nn.Module:
    """The query of low rank, as trained ones are, and key and value that are not."""
    torch.manual_seed(0)
    net = (WHOLE[name] if name in WHOLE else NETS[name][0])().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
        if parameter.dim() == 2 and max(parameter.shape) > 2 * E - 1:
            turned = parameter.shape[0] == E
            for place, part in enumerate((parameter.t() if turned else parameter).detach().split(E)):
                u, s, v = torch.linalg.svd(part, full_matrices=False)
                part.copy_((u * s * (0.2 if place == 0 else 0.9) ** torch.arange(len(s))) @ v)
    return net


@cache
def exported(name: str) -> onnx.ModelProto:
    return to_onnx(built(name), X)


def opened(name: str, front_end: str) -> Model:
    return open_model(built(name) if front_end == "torch" else exported(name), Batch((X,))).clone()


def answer(model: Model) -> Tensor:
    made = model.run(Batch((X,)))
    value = next(iter(made.values())) if isinstance(made, dict) else made
    assert isinstance(value, Tensor)
    return value


def run_onnx(model: onnx.ModelProto) -> Tensor:
    held = io.BytesIO()
    onnx.save(model, held)
    session = onnxruntime.InferenceSession(held.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


@pytest.mark.parametrize("front_end", ["torch", "onnx"])
@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in NETS if name not in FAST)]
)
def test_what_is_read_apart_is_a_site_each_with_its_rows_of_the_weight(name: str, front_end: str) -> None:
    sizes = NETS[name][1]
    net, model = built(name), opened(name, front_end)
    assert isinstance(model, DividesLayers)
    before, macs, params = answer(model), model.macs(), model.params()
    (divided,) = model.divide()
    slices = [site for site in model.sites() if site.name.startswith(f"{divided}.")][: len(sizes)]
    assert [site.shape for site in slices] == [(size, E) for size in sizes]
    state = {key: value for key, value in net.state_dict().items() if "head" not in key and "out" not in key}
    whole = next(value for value in state.values() if value.dim() == 2)
    whole = whole if whole.shape[1] == E and name != "columns" else whole.t()
    rows = torch.cat([model.weight(site.name) for site in slices])
    torch.testing.assert_close(rows, whole, rtol=0, atol=0)
    torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-5)
    assert (model.macs(), model.params()) == (macs, params)
    assert all(site.seen for site in slices)
    assert not model.divide()


@pytest.mark.parametrize("front_end", ["torch", "onnx"])
@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in NETS if name not in FAST)]
)
def test_what_is_divided_for_nothing_is_made_whole_again(name: str, front_end: str) -> None:
    model = opened(name, front_end)
    assert isinstance(model, DividesLayers)
    names, text = [site.name for site in model.sites()], str(model.unwrap())
    divided = model.divide()
    assert model.clone().join() == divided  # type: ignore[attr-defined]
    assert model.join() == divided
    assert ([site.name for site in model.sites()], str(model.unwrap())) == (names, text)
    assert all(site.seen for site in model.sites())


@pytest.mark.parametrize("front_end", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WHOLE)
def test_what_something_reads_whole_or_in_other_pieces_stays(name: str, front_end: str) -> None:
    model = opened(name, front_end)
    assert isinstance(model, DividesLayers)
    assert not model.divide()


@pytest.mark.parametrize(
    "name",
    ["attention", *(pytest.param(name, marks=pytest.mark.slow) for name in NETS if name != "attention")],
)
def test_ranks_differ_and_the_plan_holds_on_both_front_ends_and_in_files(name: str, tmp_path: Path) -> None:
    net = built(name)
    how = {"data": X, "divergence": "mse", "effort": "fast", "cache": False, "progress": False}
    ours = tdpass.compress(net, {"macs": 0.8}, **how)
    slices = [choice for choice in ours.plan if choice.site.startswith(("packed.", "attention."))]
    assert len(slices) >= 3
    assert len({str(choice.form) for choice in slices}) > 1
    assert isinstance(ours.model, nn.Module)
    assert any(isinstance(part, Factorized) for part in ours.model.modules())
    assert ours.report.final.macs <= 0.8 * ours.report.original.macs
    ours.save(tmp_path / "small.safetensors")
    loaded = tdpass.load(tmp_path / "small.safetensors", built(name))
    with torch.no_grad():
        expected = ours.model(X)
        torch.testing.assert_close(loaded(X), expected, rtol=0, atol=0)
    graph = exported(name)
    there = tdpass.compress(graph, plan=ours.plan, **how)
    torch.testing.assert_close(run_onnx(there.model), expected, rtol=1e-3, atol=1e-4)
    planned = tdpass.compress(graph, {"macs": 0.8}, **how)
    back = tdpass.compress(net, plan=planned.plan, **how)
    assert len({str(choice.form) for choice in back.plan}) > 1
    with torch.no_grad():
        torch.testing.assert_close(back.model(X), run_onnx(planned.model), rtol=1e-3, atol=1e-4)


def test_a_plan_for_the_whole_weight_is_carried_out_on_the_whole() -> None:
    net = built("chunk")
    steps = "plan,factorize"
    whole = tdpass.compress(net, {"macs": 0.8}, X, pipeline=steps, effort="fast", cache=False)
    assert {choice.site for choice in whole.plan} == {"packed", "head"}
    again = tdpass.compress(net, plan=whole.plan, data=X)
    assert isinstance(again.model.packed, Factorized)


def test_a_split_that_fits_goes_and_its_readers_read_the_slices() -> None:
    nodes = [
        node("MatMul", "x packed.weight", "p"),
        node("Add", "p b", "s"),
        node("Split", "s sizes", "q k", axis=-1),
        node("Relu", "q", "r"),
        node("MatMul", "r head", "y"),
        node("MatMul", "k head", "z"),
    ]
    held = {"packed.weight": weight(E, 32), "b": weight(32), "head": weight(E, 4)}
    held["sizes"] = torch.tensor([16, 16]).numpy()
    proto = model_of(nodes, held, (2, E), ("y", "z"))
    model = open_model(proto, Batch((X[0, :2],)))
    assert isinstance(model, DividesLayers)
    assert model.divide() == ["packed"]
    built = model.unwrap()
    assert isinstance(built, onnx.ModelProto)
    assert not {"Split", "Concat"} & {each.op_type for each in built.graph.node}
    assert {"packed.0.weight", "packed.1.weight"} <= {each.name for each in built.graph.initializer}


def test_a_file_that_divides_does_not_fit_another_model(tmp_path: Path) -> None:
    net = built("uneven")
    made = tdpass.compress(net, {"macs": 0.8}, X, effort="fast", cache=False, divergence="mse")
    made.save(tmp_path / "small.safetensors")
    other = built("chunk")
    before = str(other)
    with pytest.raises(PlanError, match=r"divides 'packed' into slices of \[16, 8, 8\]"):
        tdpass.load(tmp_path / "small.safetensors", other)
    assert str(other) == before
