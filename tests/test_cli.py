"""The command line: every verb, its exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from tdpass.cli import main
from tdpass.views.summary import checks

FACTORY = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))

def chatty():
    print("a factory may print")
    return make()

class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(24, 24, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = torch.nn.Linear(24, 10)

    def forward(self, x):
        x = self.lstm(x)[0]
        return self.head(self.attention(x, x, x)[0])

def mixed():
    return Mixed()

class StepsFirst(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(24, 5)

    def forward(self, x):
        return self.lstm(x)[0][-1]

def steps_first():
    return StepsFirst()

def double():
    return make().double()

def wrong():
    return 3

def broken():
    raise ValueError("no such checkpoint")
"""


def weight(generator: np.random.Generator, out: int, into: int, rank: int) -> np.ndarray:
    """Nearly low rank, as trained weights are."""
    low = generator.standard_normal((out, rank)) @ generator.standard_normal((rank, into)) / rank
    return ((low + 0.05 * generator.standard_normal((out, into))) / into**0.5).astype(np.float32)


def mlp(path: Path) -> None:
    generator = np.random.default_rng(0)
    nodes, initializers = [], []
    sizes = [24, 48, 32, 5]
    for n in range(3):
        initializers += [
            numpy_helper.from_array(weight(generator, sizes[n + 1], sizes[n], 6), f"fc{n}.weight"),
            numpy_helper.from_array(
                generator.standard_normal(sizes[n + 1]).astype(np.float32), f"fc{n}.bias"
            ),
        ]
        source = "x" if n == 0 else f"r{n - 1}"
        nodes.append(
            helper.make_node(
                "Gemm", [source, f"fc{n}.weight", f"fc{n}.bias"], ["y" if n == 2 else f"h{n}"], transB=1
            )
        )
        if n < 2:
            nodes.append(helper.make_node("Relu", [f"h{n}"], [f"r{n}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 24), ("y", 5))
    ]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    mlp(path / "mlp.onnx")
    data = np.random.default_rng(1).standard_normal((32, 24)).astype(np.float32)
    np.savez(path / "calib.npz", x=data)
    np.save(path / "calib.npy", data)
    (path / "cli_net.py").write_text(FACTORY)
    return path


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TDPASS_CACHE", str(folder / "cache"))


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """One compressed model, made once for all that look at what it wrote."""
    output = folder / "small.onnx"
    words = (
        f"compress {folder}/mlp.onnx --budget macs=0.5 --data {folder}/calib.npz "
        f"--format svd -o {output} --quiet"
    )
    assert main(words.split()) == 0
    return output


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("tdpass: error: ")
    assert "Traceback" not in captured.err
    return line


def test_compress_writes_the_model_and_its_report_beside_it(small: Path) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession(
        str(small), providers=["CPUExecutionProvider"]
    )
    assert session.run(None, {"x": np.zeros((2, 24), np.float32)})[0].shape == (2, 5)
    for kind in ("plan.json", "report.json", "report.html"):
        assert small.with_name(f"small.{kind}").stat().st_size > 100
    report = json.loads(small.with_name("small.report.json").read_text())
    assert report["final"]["macs"] <= 0.5 * report["original"]["macs"]


def test_compress_shows_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = (
        f"compress mlp.onnx --budget macs=0.6 --data calib.npy --format svd "
        f"-o {tmp_path}/out.onnx --report-dir {tmp_path}/new/r"
    )
    assert main(words.split()) == 0
    captured = capsys.readouterr()
    for word in ("fc0", "fc1", "Kept", f"wrote {tmp_path / 'out.onnx'}", "out.report.html"):
        assert word in captured.out
    assert "\x1b" not in captured.out
    assert (tmp_path / "new" / "r" / "out.plan.json").is_file()


def test_compress_as_json_is_one_document_even_if_the_model_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "net.safetensors"
    words = [
        "compress",
        "cli_net:chatty",
        "--input",
        "4x24",
        "--budget",
        "params=0.5",
        "--format",
        "svd",
        "-o",
        str(output),
        "--json",
    ]
    assert main(words) == 0
    result = document(capsys)
    assert result["files"]["model"] == str(output)
    assert result["report"]["final"]["params"] <= 0.5 * result["report"]["original"]["params"]
    assert {choice["site"] for choice in result["plan"]["choices"]} == {"0", "2", "4"}
    assert (
        main(["verify", "cli_net:make", str(output), "--input", "4x24", "--tolerance", "100", "--json"]) == 0
    )
    assert document(capsys)["passed"] is True


def test_a_factory_that_draws_its_weights_draws_the_same_for_every_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drawn.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(24, 5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    state = torch.get_rng_state()
    assert main(["verify", "drawn:make", "drawn:make", "--input", "4x24", "--json"]) == 0
    assert document(capsys)["max_difference"] == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_go_into_the_factory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shapes = {"0": (48, 24), "2": (32, 48), "4": (5, 32)}
    state = {f"{name}.weight": torch.full(shape, 0.01) for name, shape in shapes.items()}
    state.update({f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()})
    save_file(state, tmp_path / "w.safetensors")
    assert (
        main(
            [
                "verify",
                "cli_net:make",
                "cli_net:make",
                "--weights",
                str(tmp_path / "w.safetensors"),
                "--input",
                "4x24",
                "--quiet",
            ]
        )
        == 1
    )
    same = ["--weights", str(tmp_path / "w.safetensors")] * 2
    assert main(["verify", "cli_net:make", "cli_net:make", *same, "--input", "4x24", "--quiet"]) == 0
    capsys.readouterr()
    del state["4.bias"]
    save_file(state, tmp_path / "w.safetensors")
    assert main(["inspect", "cli_net:make", "--weights", str(tmp_path / "w.safetensors")]) == 1
    assert "4.bias" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch.export's own
def test_exported_program_goes_in_and_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.ReLU(), torch.nn.Linear(48, 5)).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 24),)), tmp_path / "net.pt2")
    words = [
        str(tmp_path / "net.pt2"),
        "--budget",
        "params=0.5",
        "--format",
        "svd",
        "-o",
        str(tmp_path / "small.pt2"),
        "--quiet",
    ]
    assert main(["compress", *words]) == 0
    assert (
        main(["bench", str(tmp_path / "net.pt2"), str(tmp_path / "small.pt2"), "--rounds", "2", "--json"])
        == 0
    )
    assert [row["runtime"] for row in document(capsys)["rows"]] == ["eager", "eager"]


def test_plan_can_be_written_and_carried_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert (
        main(
            [
                "plan",
                "mlp.onnx",
                "--budget",
                "params=0.5",
                "--exclude",
                "fc2*",
                "--format",
                "svd",
                "-o",
                str(plan),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "excluded by name" in text
    assert f"wrote {plan}" in text
    assert main(["compress", "mlp.onnx", "--plan", str(plan), "-o", str(tmp_path / "s.onnx"), "--json"]) == 0
    formats = {row["site"]: row["format"] for row in document(capsys)["report"]["sites"]}
    assert set(formats.values()) <= {"svd", "dense"}
    assert not any(name.startswith("fc2") for name in formats)


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                "mlp.onnx",
                "--budget",
                "macs=0.5",
                "--data",
                "calib.npz",
                "--samples",
                "16",
                "--format",
                "svd",
                "--json",
            ]
        )
        == 0
    )
    result = document(capsys)
    assert len(result["plan"]["choices"]) == 3
    assert result["report"]["curve"]
    assert result["files"] == []


def test_plan_on_a_target_shows_times_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "plan mlp.onnx --budget max_error=0.9 --data calib.npz --format svd "
        "--target cpu --batch 4 --threads 1"
    )
    assert main(words.split()) == 0
    text = capsys.readouterr().out
    for word in ("Dense", "Predicted", "Measured", "Kernel", "onnxruntime", "cpu, batch 4, 1 thread", "Time"):
        assert word in text
    assert main([*words.split(), "--json"]) == 0
    result = document(capsys)
    assert result["report"]["original"]["seconds"] > 0
    assert all(choice["dense"]["seconds"] > 0 for choice in result["plan"]["choices"])


def test_inspect_lists_sites_and_where_they_pay(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "mlp.onnx"]) == 0
    text = capsys.readouterr().out
    assert "48x24" in text
    assert "3 sites" in text
    assert main(["inspect", "mlp.onnx", "--json", "--data", "calib.npz", "--format", "svd"]) == 0
    said = document(capsys)
    site = said["sites"][0]
    weights = 24 * 48 + 48 * 32 + 32 * 5
    assert said["in_sites"] == {"params": weights, "macs": weights, "bytes": 4 * weights}
    assert {measure: said[measure] for measure in said["in_sites"]} == {
        "params": weights + 85,
        "macs": weights,
        "bytes": 4 * (weights + 85),
    }
    assert site["dense"] == {"params": 1152, "macs": 1152, "bytes": 4608}
    assert site["largest_paying_rank"] == {"svd": [15]}


def test_inspect_shows_the_share_of_all_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Recurrence and attention are no sites, but the model's parameters and products."""
    assert main(["inspect", "cli_net:mixed", "--input", "2x5x24", "--json"]) == 0
    said = document(capsys)
    recurrence, attention, head = 5 * 2 * 4 * 24 * 24, 5 * 4 * 24 * 24 + 2 * 5 * 5 * 24, 5 * 24 * 10
    assert said["in_sites"]["macs"] == head
    assert said["macs"] == recurrence + attention + head
    assert said["params"] == 2 * 4 * 24 * 24 + 2 * 4 * 24 + 4 * 24 * 24 + 4 * 24 + 24 * 10 + 10
    assert main(["inspect", "cli_net:mixed", "--input", "2x5x24"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"({100 * head / said['macs']:.1f} %) MACs per sample" in text
    assert f"({100 * 240 / said['params']:.1f} %) parameters" in text
    assert main(["inspect", "cli_net:mixed"]) == 0
    assert "MACs unknown; give --input or --data" in capsys.readouterr().out


def test_bench_puts_data_as_the_model_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.npz"
    np.savez(
        steps, x=np.zeros((7, 8, 24), np.float32)
    )  # to a model that takes its batch second, 8 samples of 7 steps
    words = [
        "bench",
        "cli_net:steps_first",
        "--rounds",
        "1",
        "--data",
        str(steps),
        "--runtime",
        "eager",
        "--json",
    ]
    assert main([*words, "--batch", "4"]) == 0
    assert document(capsys)["inputs"] == ["7x4x24"]
    np.savez(tmp_path / "rows.npz", np.zeros((32, 24), np.float32))
    assert (
        main(
            [
                "bench",
                "cli_net:double",
                "--rounds",
                "1",
                "--data",
                str(tmp_path / "rows.npz"),
                "--runtime",
                "eager",
                "--json",
            ]
        )
        == 0
    )
    assert document(capsys)["inputs"] == ["32x24"]


def test_verify_passes_and_fails_by_the_tolerance(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "mlp.onnx", "mlp.onnx", "--data", "calib.npz"]) == 0
    assert "is within the tolerance of 0.0001" in capsys.readouterr().out
    assert (
        main(["verify", "mlp.onnx", str(small), "--data", "calib.npz", "--tolerance", "1e-9", "--json"]) == 1
    )
    result = document(capsys)
    assert result["passed"] is False
    assert {"divergence", "max_difference", "same_class"} <= result.keys()


def test_the_share_of_equal_classes_is_in_percent_for_each_output() -> None:
    shown = dict(checks({"same_class": 0.975, "same_class[logits]": 1.0, "max_difference[logits]": 1.0}))
    assert shown == {
        "same class chosen": "97.5 %",
        "same class chosen [logits]": "100.0 %",
        "max difference [logits]": "1",
    }


def test_bench_compares_with_the_first_model(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "mlp.onnx", str(small), "--batch", "4", "--rounds", "2", "--runtime", "onnxruntime"]
    assert main([*words, "--json"]) == 0
    result = document(capsys)
    assert result["inputs"] == ["4x24"]
    assert [row["model"] for row in result["rows"]] == ["mlp.onnx", "small.onnx"]
    assert result["rows"][0]["faster"]["median"] == 1
    assert main(words) == 0
    assert "1.00x" in capsys.readouterr().out


def test_bench_of_a_factory_and_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cli_net:make", "--input", "2x24", "--rounds", "1", "--quiet"]) == 0
    assert (
        main(
            [
                "bench",
                "mlp.onnx",
                "--data",
                "calib.npz",
                "--rounds",
                "1",
                "--runtime",
                "onnxruntime",
                "--json",
            ]
        )
        == 0
    )
    assert document(capsys)["inputs"] == ["32x24"]
    assert main(["bench", "cli_net:make", "--input", "2x9"]) == 1
    assert "eager cannot run cli_net:make" in error_line(capsys)
    assert main(["bench", "cli_net:make"]) == 1
    assert "--input" in error_line(capsys)


def test_report_is_rendered_again_from_file_or_folder(
    small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "again.html"
    assert main(["report", str(small.with_name("small.report.json")), "-o", str(page)]) == 0
    assert "fc0" in capsys.readouterr().out
    assert page.read_text() == small.with_name("small.report.html").read_text()
    (tmp_path / "report.json").write_text(small.with_name("small.report.json").read_text())
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert document(capsys)["files"] == {"report.html": str(tmp_path / "report.html")}
    (tmp_path / "b.report.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 1
    assert "holds 2 reports" in error_line(capsys)
    assert main(["report", str(tmp_path / "b.report.json")]) == 1
    assert "is not a tdpass report" in error_line(capsys)


COMPRESS = ["compress", "mlp.onnx", "-o", "never.onnx"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "see `tdpass --help`"),
        (["squeeze"], 2, "invalid choice"),
        (["compress", "mlp.onnx", "--budget", "macs=0.5"], 2, "-o"),
        ([*COMPRESS], 2, "--budget macs=0.4"),
        ([*COMPRESS, "--budget", "macs"], 2, "is not KEY=VALUE"),
        ([*COMPRESS, "--budget", "macs=0.5", "--budget", "macs=0.4"], 2, "given twice"),
        ([*COMPRESS, "--budget", "macs=much"], 2, "fraction in (0, 1]"),
        ([*COMPRESS, "--budget", "speed=2"], 2, "unknown budget 'speed'"),
        ([*COMPRESS, "--budget", "params=0.0001"], 1, "params"),
        ([*COMPRESS, "--budget", "params=0.5", "--format", "magic"], 2, "invalid choice: 'magic'"),
        ([*COMPRESS, "--budget", "params=0.5", "--divergence", "far"], 2, "invalid choice: 'far'"),
        ([*COMPRESS, "--budget", "params=0.5", "--pipeline", "plan,shrink"], 2, "unknown pass 'shrink'"),
        ([*COMPRESS, "--budget", "params=0.5", "--pipeline", "recipe.yaml"], 1, "recipe.yaml"),
        ([*COMPRESS, "--budget", "params=0.5", "--exclude", "*"], 1, "no site is left"),
        ([*COMPRESS, "--budget", "params=0.5", "--samples", "0"], 2, "at least 1"),
        ([*COMPRESS, "--budget", "params=0.5", "--data", "none.npz"], 1, "there is no file none.npz"),
        ([*COMPRESS, "--budget", "mac=0.5"], 2, "(did you mean 'macs'?)"),
        ([*COMPRESS, "--budget", "params=0.5", "--format", "sdv"], 2, "(did you mean 'svd'?)"),
        ([*COMPRESS, "--budget", "params=0.5", "--effort", "fats"], 2, "(did you mean 'fast'?)"),
        (["compres", "mlp.onnx"], 2, "(did you mean 'compress'?)"),
        ([*COMPRESS, "--budgt", "params=0.5"], 2, "(did you mean '--budget'?); see `tdpass compress --help`"),
        (
            [*COMPRESS, "--budget", "params=0.5", "--pipeline", "plan{efort=fast}"],
            2,
            "(did you mean 'effort'?)",
        ),
        (
            ["compress", "mlp.onnx", "--budgt", "params=0.5"],
            2,
            "unrecognized arguments: --budgt (did you mean",
        ),
        (["verify", "mlp.onnx", "small.plan.json"], 2, "show a report with `tdpass report`"),
        (["inspect", "cli_net:mak"], 1, "(did you mean 'make'?)"),
        (["inspect", "zoo:resnet21"], 1, "(did you mean 'resnet20'?)"),
        (
            ["train", "lenet5_cap", "--data", "digits", "--folder", "run", "--set", "pretran=1"],
            1,
            "unknown key 'pretran' (did you mean 'pretrain'?)",
        ),
        (["inspect", "tim:resnet18"], 1, "(did you mean 'timm'?)"),
        (["train", "lenet5_adm_nn", "--folder", "run"], 1, "(did you mean 'lenet5_admm_nn'?)"),
        (["train", "lenet5_cap", "--data", "digts", "--folder", "run"], 1, "(did you mean 'digits'?)"),
        (
            [
                "train",
                "lenet5_cap",
                "--data",
                "digits",
                "--folder",
                "run",
                "--set",
                "method.cascaded-projection.rouns=1",
            ],
            1,
            "has no option 'rouns' (did you mean 'rounds'?); it takes: exclude, gamma",
        ),
        ([*COMPRESS, "--budget", "params=0.5", "--data", "cli_net.py"], 1, ".npz or .npy"),
        ([*COMPRESS, "--budget", "params=0.5", "--data", "damaged.npz"], 1, "damaged.npz"),
        ([*COMPRESS, "--budget", "params=0.5", "--report-dir", "cli_net.py/x"], 1, "--report-dir"),
        ([*COMPRESS, "--plan", "none.json"], 1, "none.json"),
        ([*COMPRESS, "--weights", "w.safetensors", "--budget", "params=0.5"], 2, "holds its own weights"),
        (["compress", "mlp.onnx", "-o", "small.pt2", "--budget", "macs=0.5"], 2, "write -o small.onnx"),
        (
            ["compress", "mlp.onnx", "-o", "nowhere/small.onnx", "--budget", "macs=0.5"],
            1,
            "no folder nowhere",
        ),
        (["compress", "mlp.onnx", "-o", "mlp.onnx", "--budget", "macs=0.5"], 1, "is the input"),
        (
            ["compress", "cli_net:make", "-o", "small.onnx", "--budget", "macs=0.5"],
            2,
            "write -o small.safetensors",
        ),
        (["inspect", "none.onnx"], 1, "there is no file none.onnx"),
        (["inspect", "damaged.onnx"], 1, "damaged.onnx"),
        (["inspect", "model.h5"], 2, "names no model"),
        (["inspect", "nowhere_at_all:make"], 1, "cannot import 'nowhere_at_all'"),
        (["inspect", "cli_net:nothing"], 1, "has no 'nothing'"),
        (["inspect", "cli_net:wrong"], 1, "returned a int"),
        (["inspect", "cli_net:broken"], 1, "no such checkpoint"),
        (["inspect", "cli_net:make", "--input", "3 by 4"], 2, "write 1x3x32x32"),
        (["inspect", "cli_net:make", "--input", "3x4:complex128"], 2, "types: float32"),
        (["inspect", "cli_net:make", "--weights", "none.safetensors"], 1, "none.safetensors"),
        (["inspect", "cli_net:make", "--weights", "weights.h5"], 2, "not a file of weights"),
        (["verify", "mlp.onnx", "small.safetensors"], 1, "small.safetensors"),
        (["verify", "mlp.onnx", "factors.safetensors"], 1, "holds factors only"),
        (["plan", "mlp.onnx", "-o", "plan.yaml", "--budget", "macs=0.5"], 2, "write -o plan.json"),
        (["plan", "mlp.onnx"], 2, "no budget"),
        (["bench", "mlp.onnx", "--runtime", "abacus"], 2, "invalid choice"),
        (["bench", "mlp.onnx", "--runtime", "eager"], 1, "no runtime left"),
        (["report", "none.json"], 1, "none.json"),
        (["report", "mlp.onnx", "-o", "page.pdf"], 2, "write -o page.html"),
    ],
)
def test_refusals_are_one_line_with_the_right_code(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "damaged.npz").write_bytes(b"PK\x03\x04 nothing")
    (folder / "damaged.onnx").write_bytes(b"\x08\x09 nothing")
    (folder / "factors.safetensors").write_bytes(b"")
    assert main(words) == code
    assert says in error_line(capsys)
    assert not (folder / "never.onnx").exists()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "none.onnx", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("two\nlines \x1b[31m")

    monkeypatch.setattr("tdpass.cli.inspect.open_model", fail)
    assert main(["inspect", "mlp.onnx"]) == 70
    line = error_line(capsys)
    assert "ZeroDivisionError: two lines \ufffd[31m; run again with --debug" in line


def test_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tdpass.cli.inspect.open_model", stop)
    assert main(["inspect", "mlp.onnx"]) == 130
    assert capsys.readouterr().err.strip().splitlines() == [
        "tdpass: interrupted; files are written whole or not at all"
    ]


@pytest.mark.parametrize("verb", ["inspect", "plan", "compress", "verify", "bench", "report"])
def test_every_verb_has_help_and_the_common_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--json", "--quiet", "--debug", "example:"):
        assert option in text


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "mlp.onnx", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_as_a_real_process(folder: Path) -> None:
    call = subprocess.run(
        [sys.executable, "-m", "tdpass", "inspect", "cli_net:chatty", "--input", "1x24", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert call.returncode == 0, call.stderr
    assert len(json.loads(call.stdout)["sites"]) == 3
    assert "a factory may print" in call.stderr


def test_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    call = subprocess.Popen(
        [sys.executable, "-m", "tdpass", "inspect", "mlp.onnx"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert call.stdout is not None
    assert call.stderr is not None
    call.stdout.close()
    assert call.stderr.read() == ""
    assert call.wait() == 141
    call.stderr.close()
