"""Pruned and quantized models in safetensors: packed, loaded bit for bit, their sizes in the report."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tdpass
from tdpass.artifact import Artifact
from tdpass.cost import Cost
from tdpass.errors import InvalidModelError, PlanError, UsageError
from tdpass.html_report import render_html
from tdpass.models import open_model
from tdpass.packing import SUFFIX, StoredSize, pack
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report
from tdpass.terminal import report_view
from tdpass.views.tables import to_text


class Net(nn.Module):
    """Two layers, of which one is tied to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(60, 40), nn.Linear(40, 60), nn.Linear(60, 40)
        self.third.weight = self.first.weight


def quantized() -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for layer in (net.first, net.second):
            weight = torch.randint(1, 5, layer.weight.shape) * layer.weight.sign() * 0.03
            layer.weight.copy_(torch.where(torch.rand_like(weight) < 0.05, weight, 0.0))
    return net


def artifact_of(net: nn.Module) -> Artifact:
    return Artifact(net, RankPlan((), Cost(100, 0, 400)), Report(model="net"), open_model(net))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    artifact_of(quantized()).save(tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def altered(path: Path, change: dict[str, torch.Tensor | None]) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(path), **change}
    metadata.pop(
        "tdpass.digest", None
    )  # as in files of earlier versions: what the digest would find is found otherwise
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata=metadata
    )
    return path


def test_saved_and_loaded_bit_for_bit(saved: Path) -> None:
    loaded, expected = tdpass.load(saved, Net()), quantized().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.first.weight is loaded.third.weight
    assert tdpass.load_plan(saved).original == Cost(100, 0, 400)


def test_another_reader_sees_bytes_under_a_clear_name(saved: Path) -> None:
    held = load_file(saved)
    assert {name for name in held if name.endswith(SUFFIX)} == {
        f"first.weight{SUFFIX}",
        f"second.weight{SUFFIX}",
    }
    assert held[f"first.weight{SUFFIX}"].dtype is torch.uint8
    assert held["first.bias"].dtype is torch.float32


def test_models_of_other_shapes_are_refused_unchanged(saved: Path) -> None:
    other = Net()
    other.second = nn.Linear(40, 61)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(PlanError, match=r"second\.(weight|bias)"):
        tdpass.load(saved, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_damage_names_the_tensor_and_changes_nothing(saved: Path) -> None:
    name = f"second.weight{SUFFIX}"
    whole = load_file(saved)[name]
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flipped = whole.clone()
    flipped[len(whole) // 2] ^= 4
    for broken in (flipped, whole[:-3], whole.to(torch.int32), torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(InvalidModelError, match=r"second\.weight"):
            tdpass.load(altered(saved, {name: broken}), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(PlanError, match=r"second\.weight"):
        tdpass.load(altered(saved, {name: None}), model)


def test_files_written_before_packing_still_load(saved: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.safetensors"
    shutil.copy(saved, old)
    with safe_open(old, framework="pt") as file:
        metadata = file.metadata()
    structure = json.loads(metadata["tdpass.structure"])
    assert structure["version"] == 2
    metadata["tdpass.structure"] = json.dumps({**structure, "version": 1})
    del metadata["tdpass.digest"]
    state = {name: value for name, value in quantized().state_dict().items() if name != "third.weight"}
    save_file(state, old, metadata=metadata)
    assert torch.equal(tdpass.load(old, Net()).second.weight, quantized().second.weight)


def test_a_file_without_packed_tensors_is_as_it_was(tmp_path: Path) -> None:
    artifact = artifact_of(Net())
    artifact.save(tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["tdpass.structure"])["version"] == 1
    assert artifact.report.stored is None


def test_names_kept_for_packed_tensors_are_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight" + SUFFIX.replace(".", "_"), torch.zeros(3))
            self.inner = nn.Module()
            self.inner.register_parameter(SUFFIX[1:], nn.Parameter(torch.zeros(3)))

    with pytest.raises(UsageError, match="kept for packed tensors"):
        artifact_of(Odd()).save(tmp_path / "odd.safetensors")


def test_the_report_says_how_small_the_tensors_are(tmp_path: Path) -> None:
    artifact = artifact_of(quantized())
    paths = artifact.save_all(tmp_path / "out")
    stored = artifact.report.stored
    assert stored is not None
    net = quantized()
    survivors = int((net.first.weight != 0).sum() + (net.second.weight != 0).sum())
    assert (stored.weights, stored.survivors, stored.dense_bytes) == (4800, survivors, 19200)
    assert stored.true_bytes == sum(len(pack(layer.weight) or b"") for layer in (net.first, net.second))
    assert stored.plain_bytes == 4 * (40 + 60 + 40)
    loaded = Report.load(paths[2])
    assert loaded == artifact.report
    assert to_text(report_view(loaded, None, 200), 200).count("weight data") == 1
    assert "smaller file" in paths[3].read_text(encoding="utf-8")


def test_the_line_of_the_report() -> None:
    report = Report(stored=StoredSize(430_500, 3000, 7500, 938, 3100, 1_722_000, 2320))
    text = to_text(report_view(report, None, 200), 200)
    assert "weight data 938 B (1836x), stored 3.10 kB (555x) of 1.72 MB; 2.32 kB not packed" in text
    assert "555×" in render_html(report)
    assert "weight data" not in to_text(report_view(Report(), None, 200), 200)


def test_reports_without_the_sizes_still_load(tmp_path: Path) -> None:
    record = json.loads(Report(model="m").to_json())
    del record["stored"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    assert Report.load(path).stored is None
    for wrong in ({"weights": "many"}, {"unknown": 1}, [1], {**asdict(StoredSize()), "weights": True}):
        path.write_text(json.dumps({**record, "stored": wrong}), encoding="utf-8")
        with pytest.raises(InvalidModelError, match=r"report\.json"):
            Report.load(path)
