"""Deployed models: in Python, in C++ without Python, as ONNX, and what is refused."""

from __future__ import annotations

import copy
import importlib
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import tdpass
from tdpass.deploy import OPS_SUFFIX, SUFFIXES
from tdpass.errors import InvalidModelError, KernelError, UnsupportedError, UsageError
from tdpass.formats.base import offered_formats
from tdpass.fusing.choose import choosing
from tdpass.kernels import build
from tdpass.kernels.base import use_reference
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused
from tdpass.models.base import Batch
from tdpass.models.torch.fused.deployable import FusedLayer, Packed, fused
from tdpass.models.torch.fused.fuse import chosen_operators

TORCH = Path(torch.__file__).parent
RUN = Path(__file__).with_name("run.cpp")
compiled = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")


def compressed(model: nn.Module, data: Tensor, share: float = 0.6) -> nn.Module:
    small = tdpass.compress(model, {"macs": share}, data).model
    assert isinstance(small, nn.Module)
    assert any(isinstance(module, Factorized) for module in small.modules())
    return small


def operators(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose factored layers are one operator each wherever one serves, unmeasured."""
    with choosing(measure=False):
        return chosen_operators(copy.deepcopy(model), Batch((x,)), lambda _name, _why: None)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A small network with a dynamic batch, deployed."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
    network.append(nn.Linear(64, 48)).append(nn.Linear(48, 10))
    small = compressed(network.eval(), torch.randn(16, 3, 12, 12), 0.5)
    path = tmp_path_factory.mktemp("deploy") / "net.pt2"
    with choosing(measure=False):
        done = tdpass.deploy(small, torch.randn(1, 3, 12, 12), path, dynamic_batch=True)
    assert done.declined == {}
    assert done.fused == sum(isinstance(module, Factorized) for module in small.modules())
    assert done.files == (path, path.with_name(f"net{OPS_SUFFIX}"))
    assert {file.name for file in path.parent.iterdir()} == {"net.pt2", f"net{OPS_SUFFIX}"}
    return path, small


@pytest.mark.slow
def test_every_format_that_is_a_chain_is_fused_exactly() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(24, 32, 3, padding=1),
        nn.Flatten(2),
        nn.Conv1d(32, 24, 5, padding=2),
        nn.Flatten(),
        nn.Linear(24 * 36, 40),
    )
    x, found = torch.randn(2, 24, 6, 6), set()
    for name in offered_formats():
        try:
            small = tdpass.compress(dense.eval(), {"macs": 0.95}, x, formats=[name], cache=False).model
        except tdpass.TdpassError:
            continue
        assert isinstance(small, nn.Module)
        network, layers = fused(operators(small, x))
        assert layers == sum(isinstance(module, FusedLayer | Packed) for module in network.modules())
        found |= {name} if layers else set()
        with torch.no_grad(), use_reference():
            assert torch.allclose(network(x), small(x), atol=1e-4, rtol=1e-4), name
    assert {"svd", "tucker2", "spatial_svd", "channel_svd"} <= found


def test_a_type_that_no_kernel_computes_in_stays_as_it_is(residual: nn.Module, images: Tensor) -> None:
    assert fused(operators(compressed(residual, images), images).double())[1] == 0


def test_what_was_fused_before_keeps_its_lanes_and_activation(residual: nn.Module, images: Tensor) -> None:
    small = compressed(residual, images)
    layers = [(name, module) for name, module in small.named_modules() if isinstance(module, Factorized)]
    small.set_submodule(layers[0][0], Fused.of(layers[0][1], "silu", "pixels"))
    for name, module in layers[1:]:
        small.set_submodule(name, Fused.of(module, "identity", None))
    network, count = fused(small)
    made = network.get_submodule(layers[0][0])
    assert isinstance(made, FusedLayer)
    assert (count, made.activation, made.lanes) == (1, "silu", "pixels")
    with torch.no_grad():
        assert torch.allclose(network(images), small(images), atol=1e-5)


@compiled
@pytest.mark.slow
def test_python_loads_what_was_deployed(package: tuple[Path, nn.Module]) -> None:
    path, small = package
    loaded = tdpass.load_deployed(path)
    for size in (1, 2, 7):
        x = torch.randn(size, 3, 12, 12)
        with torch.no_grad():
            assert torch.allclose(loaded(x), small(x), atol=1e-5)


@compiled
@pytest.mark.slow
def test_a_program_without_python_gives_the_same_numbers(
    package: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    path, small = package
    program, x = tmp_path / "run", torch.randn(3, 3, 12, 12)
    include = [f"-isystem{TORCH / 'include'}", f"-isystem{TORCH / 'include/torch/csrc/api/include'}"]
    link = [
        f"-L{TORCH / 'lib'}",
        f"-Wl,-rpath,{TORCH / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
    ]
    subprocess.run(
        [str(build.compiler()), "-std=c++20", *include, str(RUN), "-o", str(program), *link], check=True
    )
    x.numpy().tofile(tmp_path / "x.f32")
    words = [
        str(program),
        str(path.with_name(f"net{OPS_SUFFIX}")),
        str(path),
        str(tmp_path / "x.f32"),
        *map(str, x.shape),
    ]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    with torch.no_grad():
        assert np.allclose(np.array(run.stdout.split(), np.float32), small(x).flatten().numpy(), atol=1e-5)


def test_onnx_runs_in_onnx_runtime(residual: nn.Module, images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    small = compressed(residual, images)
    done = tdpass.deploy(small, images[:1], tmp_path / "net.onnx", dynamic_batch=True)
    assert done.files == (tmp_path / "net.onnx",)
    session = onnxruntime.InferenceSession(str(done.files[0]))
    with torch.no_grad():
        assert np.allclose(
            session.run(None, {session.get_inputs()[0].name: images[:5].numpy()})[0],
            small(images[:5]).numpy(),
            atol=1e-5,
        )
    again = tdpass.deploy(done.files[0], None, tmp_path / "again.onnx")
    assert again.files[0].is_file()
    with pytest.raises(UnsupportedError, match="AOTInductor compiles torch models"):
        tdpass.deploy(done.files[0], None, tmp_path / "net.pt2")


class Kept(nn.Module):
    """Parts of different mode, frozen parameters, hooks, a batch-norm, dropout, a kept activation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        self.body[5].requires_grad_(False)
        self.body[0].register_forward_hook(lambda module, args, output: None)
        self.body[3].train(False)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.last = x
        return self.body(x)

    def state(self) -> list[object]:
        """All that a user of the network could miss."""
        flags = [module.training for module in self.modules()]
        hooks = [dict(module._forward_hooks) for module in self.modules()]
        tensors = [
            (name, id(tensor), tensor.requires_grad, tensor._version)
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
        ]
        return [flags, hooks, tensors, id(self.last)]


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "suffix",
    [".onnx", pytest.param(".pt2", marks=[pytest.mark.slow, compiled])],
    ids=lambda suffix: suffix[1:],
)
def test_a_fixed_batch_is_that_of_the_example(
    suffix: str, samples: int, residual: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    small, path = compressed(residual.eval(), images), tmp_path / f"net{suffix}"
    example = images[:samples]
    tdpass.deploy(small, example, path)
    if suffix == ".pt2":
        answer = tdpass.load_deployed(path)(example)
    else:
        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].shape[0] == samples
        answer = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: example.numpy()})[0])
    torch.testing.assert_close(answer, small(example), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_model_is_left_as_it_was(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    programs: list[ExportedProgram] = []
    monkeypatch.setattr(
        importlib.import_module("tdpass.deploy"),
        "compile_package",
        lambda program, path: (programs.append(program), path.touch()),
    )
    monkeypatch.setattr(build, "compiler", lambda: "c++")
    network, x = Kept(), torch.randn(4, 3, 4, 4)
    network(x)
    before = network.state()
    done = tdpass.deploy(network, x, tmp_path / f"net{suffix}")
    assert network.state() == before
    answer = network.eval()(x).detach()  # dropout and batch statistics are for training
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(done.files[0]))
        assert np.allclose(
            session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], answer.numpy(), atol=1e-5
        )
    else:
        assert torch.allclose(programs[0].module()(x), answer, atol=1e-6)


class Stubborn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_deployed_is_refused(
    residual: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"cannot deploy to 'net.so'; name a .pt2"):
        tdpass.deploy(residual, images, tmp_path / "net.so")
    with pytest.raises(UsageError, match="there is no folder"):
        tdpass.deploy(residual, images, tmp_path / "nowhere" / "net.pt2")
    with pytest.raises(UsageError, match="pass example_inputs="):
        tdpass.deploy(residual, None, tmp_path / "net.pt2")
    with pytest.raises(InvalidModelError, match="the model cannot be exported"):
        tdpass.deploy(Stubborn(), images, tmp_path / "net.pt2")
    with pytest.raises(UsageError, match=r"name a .pt2 file that tdpass.deploy wrote"):
        tdpass.load_deployed("net.onnx")
    with pytest.raises(InvalidModelError, match="there is no file"):
        tdpass.load_deployed(tmp_path / "net.pt2")
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(KernelError, match="takes a C\\+\\+ compiler"):
        tdpass.deploy(residual, images, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


@compiled
def test_a_damaged_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"PK\x03\x04 nothing else")
    with pytest.raises(InvalidModelError, match="no compiled package that loads here"):
        tdpass.load_deployed(tmp_path / "net.pt2")
