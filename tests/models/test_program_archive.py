"""A `.pt2` file from elsewhere: what torch exports is read alike.

What would run code is refused before it can.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import damaged_bytes
from torch import Tensor, nn
from torch.export import Dim

from tdpass.cli import main
from tdpass.errors import InvalidModelError, TdpassError
from tdpass.models import open_model
from tdpass.models.torch.exported_program import load_program

Members = dict[str, bytes]
FAST, THOROUGH = 20, 300


class Net(nn.Module):
    """Dynamic sizes, constants, buffers and a tree of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 4), nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.ones(4))
        self.scale = torch.arange(4.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.norm(self.layer(x)) * self.scale
        flat = y.reshape(x.shape[0] * 2, 2)
        return {
            "a": y + self.shift,
            "(c) c's": y,
            "b": (flat, flat if mask is None else flat[: mask.shape[0]]),
        }


def exported(path: Path) -> Path:
    torch.manual_seed(0)
    batch, length = Dim("n", min=2, max=64), Dim("m", min=2, max=8)
    inputs = (torch.randn(4, 8),)
    program = torch.export.export(
        Net().eval(), inputs, {"mask": torch.ones(4)}, dynamic_shapes={"x": {0: batch}, "mask": {0: length}}
    )
    torch.export.save(program, path, extra_files={"tdpass.plan": "{}"})
    return path


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    with zipfile.ZipFile(exported(tmp_path_factory.mktemp("pt2") / "net.pt2")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_what_torch_exports_gives_the_same_outputs(tmp_path: Path) -> None:
    path = exported(tmp_path / "net.pt2")
    x, mask = torch.randn(6, 8), torch.ones(3)
    expected, found = (
        torch.export.load(path).module()(x, mask=mask),
        load_program(path).module()(x, mask=mask),
    )
    assert torch.equal(found["a"], expected["a"])
    assert torch.equal(found["b"][1], expected["b"][1])
    assert load_program(path, trust=True).state_dict.keys() == load_program(path).state_dict.keys()


def marker(path: Path) -> str:
    return f"__import__('pathlib').Path('{path}').touch()"


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, (marker(self.path),)


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def find(members: Members, ending: str) -> str:
    return next(name for name in members if name.endswith(ending))


def with_program(members: Members, change: Callable[[dict[str, Any]], None]) -> Members:
    name = find(members, "models/model.json")
    program = json.loads(members[name])
    change(program)
    return {**members, name: json.dumps(program).encode()}


def sample_inputs(members: Members, mark: Path) -> Members:
    return {**members, find(members, "sample_inputs/model.pt"): saved(((torch.randn(4, 8), Touch(mark)), {}))}


def pickled(members: Members, mark: Path, kind: str, file: str, place: str = "") -> Members:
    name = find(members, f"model_{kind}_config.json")
    config = json.loads(members[name])
    entry = next(entry for entry in config["config"].values() if entry["path_name"] == file)
    entry["use_pickle"], entry["path_name"] = True, place or file
    content = pickle.dumps(Touch(mark)) if place else saved(Touch(mark))
    root = name.partition("/")[0]
    return {**members, name: json.dumps(config).encode(), f"{root}/data/{kind}/{place or file}": content}


def legacy(members: Members, mark: Path, kind: str) -> Members:
    root = next(iter(members)).partition("/")[0]
    return {**members, f"{root}/data/{kind}/model.pt": saved({"a": Touch(mark)})}


def size(members: Members, mark: Path) -> Members:
    def change(program: dict[str, Any]) -> None:
        values = program["graph_module"]["graph"]["sym_int_values"]
        next(value for value in values.values() if "as_expr" in value)["as_expr"]["expr_str"] = marker(mark)

    return with_program(members, change)


def guards(members: Members, mark: Path) -> Members:
    return with_program(members, lambda program: program.update(guards_code=[f"{marker(mark)} is None"]))


def spec(members: Members, mark: Path) -> Members:
    """A module that is imported, and runs code as it is."""
    mark.with_name("imported_by_a_file.py").write_text(marker(mark))

    def change(program: dict[str, Any]) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        tree = json.loads(signature["out_spec"])
        context = {
            "default_factory_module": "imported_by_a_file",
            "default_factory_name": "x",
            "dict_context": ["a", "(c) c's", "b"],
        }
        tree[1]["type"], tree[1]["context"] = "collections.defaultdict", json.dumps(context)
        signature["out_spec"] = json.dumps(tree)

    return with_program(members, change)


def name(members: Members, mark: Path) -> Members:
    root = find(members, "models/model.json")
    return {**members, root: members[root].replace(b'"x"', json.dumps(f"x={marker(mark)}").encode())}


def hidden(members: Members, mark: Path) -> Members:
    """A size under the name of what is only quoted."""

    def change(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        for name in ("metadata", "as_string", "as_strings"):
            graph["sym_int_values"][name] = {"as_expr": {"expr_str": marker(mark), "hint": None}}

    return with_program(members, change)


def target(members: Members, mark: Path) -> Members:
    def change(program: dict[str, Any]) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"], node["inputs"] = (
            "torch.os.mkdir",
            [{"name": "path", "arg": {"as_string": str(mark)}, "kind": 1}],
        )

    return with_program(members, change)


def old_layout(members: Members, mark: Path) -> Members:
    program = members[find(members, "models/model.json")]
    parts = {"serialized_exported_program.json": program, "version": b"8.20"}
    return parts | {
        f"serialized_{part}.pt": saved({"a": Touch(mark)})
        for part in ("state_dict", "constants", "example_inputs")
    }


CRAFTED: dict[str, Callable[[Members, Path], Members]] = {
    "example inputs": sample_inputs,
    "a pickled weight": lambda members, mark: pickled(members, mark, "weights", "weight_0"),
    "a pickled constant": lambda members, mark: pickled(members, mark, "constants", "tensor_0"),
    "an opaque object": lambda members, mark: pickled(members, mark, "constants", "tensor_0", "opaque_obj_0"),
    "a custom object": lambda members, mark: pickled(members, mark, "constants", "tensor_0", "custom_obj_0"),
    "weights of old": lambda members, mark: legacy(members, mark, "weights"),
    "constants of old": lambda members, mark: legacy(members, mark, "constants"),
    "the layout of old": old_layout,
    "a size": size,
    "a size under another name": hidden,
    "a tree spec": spec,
    "the name of an input": name,
    "an operator": target,
}


@pytest.mark.parametrize("way", CRAFTED)
def test_crafted_files_are_refused_and_nothing_runs(
    way: str, members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "marker"
    path = write(tmp_path / "net.pt2", CRAFTED[way](members, mark))
    with pytest.raises(InvalidModelError, match="loading it could run code"):
        open_model(path)
    assert main(["inspect", str(path), "--quiet"]) == 1
    assert not mark.exists()


@pytest.mark.parametrize("way", ["example inputs", "a pickled weight", "a size"])
def test_the_files_are_crafted_so_that_trust_runs_them(way: str, members: Members, tmp_path: Path) -> None:
    mark = tmp_path / "marker"
    path = write(tmp_path / "net.pt2", CRAFTED[way](members, mark))
    main(["inspect", str(path), "--quiet", "--trust"])
    assert mark.exists()


def test_guards_of_the_file_are_not_run(members: Members, tmp_path: Path) -> None:
    mark = tmp_path / "marker"
    program = load_program(write(tmp_path / "net.pt2", guards(members, mark)))
    program.module()(torch.randn(3, 8), mask=torch.ones(2))
    assert not mark.exists()


def test_other_members_and_compressed_ones_are_refused(members: Members, tmp_path: Path) -> None:
    root = next(iter(members)).partition("/")[0]
    with pytest.raises(InvalidModelError, match="aotinductor"):
        load_program(
            write(tmp_path / "net.pt2", {**members, f"{root}/data/aotinductor/model/it.so": b"code"})
        )
    with zipfile.ZipFile(tmp_path / "net.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data/weights/weight_0", bytes(1 << 20))
    with pytest.raises(InvalidModelError, match="compressed"):
        load_program(tmp_path / "net.pt2")


@pytest.mark.parametrize("count", [FAST, pytest.param(THOROUGH, marks=pytest.mark.slow)])
def test_damaged_archives_are_one_clear_error(members: Members, tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "net.pt2", members)
    for broken in damaged_bytes(path.read_bytes(), count):
        path.write_bytes(broken)
        with suppress(TdpassError):
            load_program(path)


def test_a_pickle_of_a_default_dict_is_no_tensor(members: Members, tmp_path: Path) -> None:
    path = write(
        tmp_path / "net.pt2",
        {**members, find(members, "sample_inputs/model.pt"): saved(((defaultdict(exec),), {}))},
    )
    with pytest.raises(InvalidModelError, match=r"sample_inputs/model\.pt.*more than tensors"):
        load_program(path)
