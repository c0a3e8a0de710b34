"""Chains of any front end: found over links that it reads, described once, and timed once per machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import torch._dynamo
from onnx_nets import to_onnx
from torch import Tensor, fx, nn

from tdpass.dynamo.chains import GraphReader
from tdpass.fusing import choose
from tdpass.fusing.choose import PLAIN, Trial, Verdict, choosing, measured
from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import Chain, ChainCall, ChainSpec, Link
from tdpass.fusing.torch_calls import in_torch
from tdpass.kernels import native
from tdpass.kernels.stage import Stage
from tdpass.machine import processor
from tdpass.models.onnx.fused.links import NodeReader
from tdpass.timings import TimingTable


@dataclass(frozen=True)
class _Call:
    """A line of a program: what it does, to which lines before it."""

    name: str
    reads: tuple[str, ...]
    widths: tuple[int, int] = (0, 0)


class _ProgramReader:
    """The front end of a language in which every line is `name = function(names)`."""

    def __init__(self, *calls: _Call, cuts: bool = True) -> None:
        self.calls, self.cuts = calls, cuts

    def links(self) -> Iterator[Link[_Call, str]]:
        for call in self.calls:
            if call.name.startswith("layer"):
                yield Link((call,), call.reads[0], f"{call.name}.weight", None, 0, Stage(*call.widths))

    def following(self, link: Link[_Call, str]) -> _Call | None:
        return self._only_reader(link.node)

    def fuses(self, first: Link[_Call, str], second: Link[_Call, str]) -> bool:
        return second.x == first.node.name

    def norm(self, chain: Chain[_Call, str]) -> Chain[_Call, str]:
        return chain

    def bias(self, chain: Chain[_Call, str]) -> Chain[_Call, str]:
        return chain

    def residual(self, chain: Chain[_Call, str]) -> Chain[_Call, str]:
        call = self._only_reader(chain.result)
        if call is None or not call.name.startswith("sum"):
            return chain
        (rest,) = set(call.reads) - {chain.result.name}
        return replace(chain, nodes=(*chain.nodes, call), residual=rest)

    def activation(self, chain: Chain[_Call, str]) -> Chain[_Call, str]:
        call = self._only_reader(chain.result)
        known = call is not None and call.name.startswith("relu")
        return (
            replace(chain, nodes=(*chain.nodes, call), activation="relu")
            if known and call is not None
            else chain
        )

    def movable(self, chain: Chain[_Call, str]) -> bool:
        return True

    def fused(self) -> Iterator[Chain[_Call, str]]:
        yield from ()

    def _only_reader(self, call: _Call) -> _Call | None:
        readers = [other for other in self.calls if call.name in other.reads]
        return readers[0] if len(readers) == 1 else None


def layer(name: str, read: str, *widths: int) -> _Call:
    return _Call(f"layer {name}", (read,), widths)  # type: ignore[arg-type]


LOW_RANK = (
    layer("a", "x", 16, 4),
    layer("b", "layer a", 4, 16),
    layer("c", "layer b", 16, 4),
    layer("d", "layer c", 4, 16),
)


def names(chains: list[Chain[_Call, str]]) -> list[list[str]]:
    return [[node.name for node in chain.nodes] for chain in chains]


def test_a_front_end_says_only_how_its_calls_are_read() -> None:
    calls = (*LOW_RANK[:2], _Call("sum", ("layer b", "x")), _Call("relu", ("sum",)))
    (chain,) = find_chains(_ProgramReader(*calls))
    assert [node.name for node in chain.nodes] == ["layer a", "layer b", "sum", "relu"]
    assert (chain.x, chain.residual, chain.bias) == ("x", "x", None)
    assert chain.spec == ChainSpec((Stage(16, 4), Stage(4, 16)), 0, residual=True, activation="relu")


def test_rows_are_cut_where_one_low_rank_layer_ends_if_nothing_else_tells() -> None:
    assert names(find_chains(_ProgramReader(*LOW_RANK))) == [["layer a", "layer b"], ["layer c", "layer d"]]
    assert names(find_chains(_ProgramReader(*LOW_RANK, cuts=False))) == [
        ["layer a", "layer b", "layer c", "layer d"]
    ]


def test_a_sum_of_two_chains_belongs_to_one_of_them() -> None:
    calls = (
        *LOW_RANK[:2],
        layer("c", "x", 16, 2),
        layer("d", "layer c", 2, 16),
        _Call("sum", ("layer b", "layer d")),
    )
    assert names(find_chains(_ProgramReader(*calls))) == [
        ["layer a", "layer b", "sum"],
        ["layer c", "layer d"],
    ]


def test_a_result_that_is_read_twice_ends_a_chain_and_layers_alone_count_where_asked() -> None:
    calls = (*LOW_RANK[:2], _Call("peek", ("layer a",)))
    assert find_chains(_ProgramReader(*calls)) == []
    assert names(find_chains(_ProgramReader(*calls), alone=True)) == [["layer a"], ["layer b"]]


class _Low(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = (
            nn.Conv2d(16, 4, (3, 1), (2, 1), (1, 0), bias=False),
            nn.Conv2d(4, 16, (1, 3), 1, (0, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(self.down(x)))


def test_the_same_network_has_the_same_spec_on_every_front_end() -> None:
    net, x = _Low().eval(), torch.randn(2, 16, 9, 8)
    found: list[ChainSpec] = []

    def backend(module: fx.GraphModule, inputs: object) -> object:
        stored = {node for node in module.graph.nodes if node.op == "placeholder" and "weight" in node.name}
        found.extend(chain.spec for chain in find_chains(GraphReader(module.graph, stored)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(net, backend=backend)(x)
    model = ir.from_proto(to_onnx(net, x))
    spec = ChainSpec(
        (Stage(16, 4, 1, (3, 1), (2, 1), (1, 0), (1, 0)), Stage(4, 16, 1, (1, 3), (1, 1), (0, 1), (0, 1))),
        2,
        bias=True,
        activation="relu",
    )
    assert found == [chain.spec for chain in find_chains(NodeReader(model))] == [spec]


CALL = ChainCall(ChainSpec((Stage(8, 2), Stage(2, 8)), 0, bias=True), (5, 8))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A clock: plain chains take 4 s, channel lanes 2 s; tells how many calls it was given each time."""
    seen: list[int] = []

    def seconds(calls: dict[str, object], threads: int) -> dict[str, float]:
        seen.append(len(calls))
        return {way: {PLAIN: 4.0, "channels": 2.0}.get(way, 3.0) for way in calls}

    monkeypatch.setattr(choose, "seconds_of", seconds)
    monkeypatch.setattr(choose, "times_kept", lambda: TimingTable(tmp_path))
    return seen


def trial(call: ChainCall = CALL, runtime: str = "here 1", threads: int = 1) -> Trial[ChainCall]:
    return Trial(call, runtime, threads, lambda: {PLAIN: list, "channels": list})


def test_times_are_measured_once_for_all_that_they_depend_on(timed: list[int]) -> None:
    assert measured([trial()], choose.LANES) == Verdict("channels", 2.0, 4.0)
    assert measured([trial()], choose.LANES) == Verdict("channels", 2.0, 4.0)
    assert timed == [2]
    others = [
        trial(threads=2),
        trial(runtime="here 2"),
        trial(replace(CALL, size=(6, 8))),
        trial(replace(CALL, frozen=True)),
    ]
    for count, other in enumerate(others, start=2):
        measured([other], choose.LANES)
        assert len(timed) == count


def test_the_key_names_the_machine_the_libraries_and_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    key = in_torch(CALL).key("channels")
    assert processor() in key.device
    assert native.isa() in key.device
    assert f"torch {torch.__version__}" in key.runtime
    assert native.version() in key.runtime
    assert (key.threads, key.batch, key.dtype, key.format) == (
        torch.get_num_threads(),
        5,
        "float32",
        "chain channels",
    )
    monkeypatch.setattr(native, "version", lambda: "another build")
    assert in_torch(CALL).key("channels") != key


def test_what_gains_too_little_stays_as_it_is(timed: list[int]) -> None:
    assert measured([trial()], choose.LANES, least=2.0) == Verdict(None, 2.0, 4.0)
    assert measured([trial(), trial()], choose.LANES, least=1.9) == Verdict("channels", 4.0, 8.0)
    with choosing("pixels"):
        convolution = replace(CALL, spec=replace(CALL.spec, axes=2), size=(5, 8, 3, 3))
        assert choose.choose([trial(convolution)]).lanes is None  # nothing serves it in these lanes
    with choosing(measure=False):
        assert choose.choose([trial(convolution)]) == Verdict("channels")
