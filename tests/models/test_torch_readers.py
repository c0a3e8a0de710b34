"""What besides its layer reads a weight or a batch-norm, and by what way a module is reached.

Both are found in the run, and the result stays right.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import symbolic_trace

import tdpass
from tdpass.artifact import Artifact
from tdpass.models import Factorized
from tdpass.models.torch.sites.norms import Folded


class Plain(nn.Module):
    """A linear layer and a batch-norm before another linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(24, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x))))


class InList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.a, self.n, torch.relu, self.b]

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda value, step: step(value), self.steps, x)


class InDict(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"first": (self.a, self.n), "last": self.b}

    def forward(self, x: Tensor) -> Tensor:
        first, norm = self.parts["first"]  # type: ignore[misc]
        return self.parts["last"](torch.relu(norm(first(x))))  # type: ignore[operator,no-any-return]


class BoundCalls(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = self.a.__call__, self.n.__call__, functools.partial(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class ByAttribute(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x)).reshape(-1, self.n.num_features)) * (1 + self.n.eps))


class TwoNames(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 32, bias=False)
        self.again = self.a


class Casting(nn.Linear):
    """Overrides forward, though it only casts."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch names it so
        return F.linear(
            input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype)
        )


class Casts(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Casting(24, 32, bias=False), Casting(32, 10)


REACHED: list[type[Plain]] = [Plain, InList, InDict, BoundCalls, ByAttribute, TwoNames, Casts]


class BoundForward(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = self.a.forward, self.n.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.first(x))))


class Functional(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.a.weight, self.a.bias)
        return self.b(
            torch.relu(F.batch_norm(y, self.n.running_mean, self.n.running_var, self.n.weight, self.n.bias))
        )


class Transposed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x)))) + F.linear(self.n(self.a(x)), self.a.weight.t())[:, :10]


class Einsum(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x)))) + torch.einsum("ni,oi->no", x, self.a.weight)[:, :10]


class WeightPenalty(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x)))) + self.a.weight.square().mean()


class BiasRead(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x)))) + self.a.bias.mean()


class Returned(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.b(torch.relu(self.n(self.a(x)))), self.a.weight


READ_ELSEWHERE: list[type[Plain]] = [
    BoundForward,
    Functional,
    Transposed,
    Einsum,
    WeightPenalty,
    BiasRead,
    Returned,
]


class Activated(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch names it so
        return super().forward(input).relu()


class ActivatedNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.n = Activated(32)


class StatisticsRead(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x)))) + self.n.running_mean.mean()  # type: ignore[union-attr]


class AffineShared(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm1d(32)
        self.other.weight = self.n.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.other(torch.relu(self.n(self.a(x)))))


class ReadBefore(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.relu(self.n(y)) + y)


class NormTwice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(torch.relu(self.n(self.a(x)))))


NOT_FOLDED: list[type[Plain]] = [ActivatedNorm, StatisticsRead, AffineShared, ReadBefore, NormTwice]


class OtherAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.n(self.a(x))).flatten(1))


class UnbatchedConvolution(nn.Module):
    """A convolution of one sample without a batch axis, whose positions are then normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv1d(1, 16, 1), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x.reshape(1, -1)).t().reshape(x.shape[0], -1, 16)[:, :1].flatten(1)))


def _made(cls: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    model = cls()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                for tensor, low, high in (
                    (module.running_mean, -1, 1),
                    (module.running_var, 0.2, 3),
                    (module.weight, 0.5, 2),
                    (module.bias, -1, 1),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high)
    return model.eval()


def _answer(model: object, x: Tensor) -> Tensor:
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        answer = model(x)
    return torch.cat([part.flatten() for part in answer]) if isinstance(answer, tuple) else answer


def _data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _folded(model: object, x: Tensor) -> Artifact:
    return tdpass.compress(model, None, x, pipeline="fold-batchnorm", cache=False)


def _small(model: object, x: Tensor, share: float = 0.9, formats: tuple[str, ...] = ("svd",)) -> Artifact:
    passes = "fold-batchnorm,plan,factorize,correct-bias,verify"
    return tdpass.compress(
        model, {"params": share}, x, pipeline=passes, cache=False, divergence="mse", formats=formats
    )


@pytest.mark.parametrize("cls", [*REACHED, *READ_ELSEWHERE, *NOT_FOLDED])
def test_folding_never_changes_the_answer(cls: type[Plain]) -> None:
    model, x = _made(cls), _data(16, 24)
    artifact = _folded(model, x)
    assert isinstance(artifact.model, nn.Module)
    torch.testing.assert_close(_answer(artifact.model, x), _answer(model, x), rtol=1e-4, atol=1e-5)
    assert isinstance(artifact.model.n, Folded) == (cls in REACHED)
    assert cls in REACHED or artifact.report.declined.keys() & {"a", "n"}


@pytest.mark.parametrize("cls", REACHED)
def test_every_reference_sees_the_factored_layer_and_a_file_too(cls: type[Plain], tmp_path: Path) -> None:
    model, x = _made(cls), _data(64, 24)
    artifact = _small(model, x, 0.4)
    small = artifact.model
    assert isinstance(small, nn.Module)
    assert isinstance(small.a, Factorized)
    assert isinstance(small.b, Factorized)
    expected, answer = _answer(model, x), _answer(small, x)
    difference = float((answer - expected).norm() / expected.norm())
    assert difference == pytest.approx(artifact.report.checks["relative_difference"], rel=0.01)
    artifact.save(tmp_path / "small.safetensors")
    torch.testing.assert_close(
        _answer(tdpass.load(tmp_path / "small.safetensors", cls().eval()), x), answer, rtol=0, atol=0
    )


@pytest.mark.parametrize("cls", READ_ELSEWHERE)
def test_a_weight_that_is_read_elsewhere_stays_dense_with_a_reason(cls: type[Plain]) -> None:
    model, x = _made(cls), _data(32, 24)
    artifact = _small(model, x, formats=())
    assert isinstance(artifact.model, nn.Module)
    assert [type(artifact.model.a), type(artifact.model.b)] == [nn.Linear, Factorized]
    assert "also" in artifact.report.declined["a"] or "returned" in artifact.report.declined["a"]
    with torch.no_grad():
        assert torch.equal(artifact.model.a.weight, model.a.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("cls", [OtherAxis, UnbatchedConvolution])
@pytest.mark.parametrize("exported", [False, True])
def test_a_batch_norm_on_another_axis_stays(cls: type[nn.Module], exported: bool) -> None:
    model, x = _made(cls), _data(8, 16, 24)
    given = torch.export.export(model, (x,)) if exported else model
    artifact = _folded(given, x)
    result = artifact.model.module() if isinstance(artifact.model, ExportedProgram) else artifact.model
    torch.testing.assert_close(_answer(result, x), _answer(model, x), rtol=1e-4, atol=1e-5)
    assert cls is not OtherAxis or "another axis" in artifact.report.declined["n"]


@pytest.mark.parametrize("front", ["export", "fx"])
@pytest.mark.parametrize("cls", [Plain, Transposed, Einsum, WeightPenalty, BiasRead, ReadBefore, NormTwice])
def test_graphs_fold_and_factor_under_the_same_conditions(front: str, cls: type[Plain]) -> None:
    model, x = _made(cls), _data(32, 24)
    given = (
        symbolic_trace(model)
        if front == "fx"
        else torch.export.export(model, (x[:4],), dynamic_shapes=({0: Dim("n", min=2, max=64)},))
    )
    artifact = _small(given, x)
    result = artifact.model.module() if isinstance(artifact.model, ExportedProgram) else artifact.model
    expected, answer = _answer(model, x), _answer(result, x)
    difference = float((answer - expected).norm() / expected.norm())
    assert difference == pytest.approx(artifact.report.checks["relative_difference"], rel=0.02, abs=1e-5)
    lifted = front == "fx" and cls is Einsum  # into a layer of the same weight, which shares its factors
    assert ("a" in artifact.report.declined) == (cls in READ_ELSEWHERE and not lifted)
    assert ("n" in artifact.report.declined) == (cls in NOT_FOLDED)


class TwoGeometries(nn.Module):
    """One kernel at two strides, and the statistics of one batch-norm at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8, 3))
        self.n, self.m = nn.BatchNorm1d(8), nn.BatchNorm1d(8, eps=0.5)
        self.m.weight, self.m.bias = self.n.weight, self.n.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.n(F.conv1d(x, self.kernel, padding=1))[:, :, ::2] + self.m(
            F.conv1d(x, self.kernel, padding=1, stride=2)
        )


def test_calls_of_one_weight_at_other_settings_stay_apart() -> None:
    model, x = _made(TwoGeometries), _data(6, 8, 10)
    artifact = _folded(torch.export.export(model, (x,)), x)
    assert isinstance(artifact.model, ExportedProgram)
    torch.testing.assert_close(_answer(artifact.model.module(), x), _answer(model, x), rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = (
            nn.Embedding(60, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 60, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.mid(self.embed(ids))))


@pytest.mark.parametrize("front", ["module", "export", "fx", "fx without inputs"])
def test_a_table_tied_to_a_head_is_one_site_with_it(front: str) -> None:
    model, ids = _made(Tied), torch.randint(0, 60, (16, 5), generator=torch.Generator().manual_seed(1))
    made: dict[str, Callable[[], object]] = {
        "export": lambda: torch.export.export(model, (ids,)),
        "module": lambda: model,
    }
    given = made.get(front, lambda: symbolic_trace(model))()
    artifact = tdpass.make_plan(
        given, {"params": 0.8}, None if front == "fx without inputs" else ids, cache=False, formats=["svd"]
    )
    assert {choice.site for choice in artifact.plan} == {"head", "mid"}
    assert artifact.report.final.params <= 0.8 * artifact.report.original.params
    assert artifact.report.original.params == sum(parameter.numel() for parameter in model.parameters())


def test_hooks_of_every_kind_stay_and_are_called() -> None:
    model, x = _made(Plain), _data(16, 24)
    seen: list[str] = []
    for layer in (model.a, model.b):
        assert isinstance(layer, nn.Module)
        layer.register_forward_hook(
            lambda module, args, kwargs, output: seen.append("kwargs"), with_kwargs=True, always_call=True
        )
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
        )
        layer.register_forward_hook(lambda module, args, output: output * 2)
        layer.register_full_backward_hook(lambda module, entered, left: seen.append("backward"))
        layer.register_full_backward_pre_hook(lambda module, left: seen.append("backward pre"))
    artifact = _small(model, x)
    expected, answer = _answer(model, x), _answer(artifact.model, x)
    assert float((answer - expected).norm() / expected.norm()) == pytest.approx(
        artifact.report.checks["relative_difference"], rel=0.01
    )
    assert isinstance(artifact.model, nn.Module)
    assert any(isinstance(module, Factorized) for module in artifact.model.modules())
    seen.clear()
    artifact.model(x.requires_grad_()).sum().backward()
    assert sorted(seen) == ["backward"] * 2 + ["backward pre"] * 2 + ["kwargs"] * 2


def test_a_watched_batch_norm_is_not_folded() -> None:
    for name in ("a", "n"):
        model, x = _made(Plain), _data(8, 24)
        means: list[float] = []
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, means=means: means.append(output.sum().item())
        )
        expected = (_answer(model, x), means[-1])
        artifact = _folded(model, x)
        torch.testing.assert_close((_answer(artifact.model, x), means[-1]), expected)
        assert "n" in artifact.report.declined


def test_a_batch_norm_with_a_hook_that_reads_nothing_is_not_folded() -> None:
    for name, method in (
        ("a", "register_forward_hook"),
        ("n", "register_forward_pre_hook"),
        ("n", "register_full_backward_hook"),
    ):
        model = _made(Plain)
        getattr(model.get_submodule(name), method)(lambda *given: None)
        assert "hooks" in _folded(model, _data(8, 24)).report.declined["n"]


def test_a_forward_of_the_instance_survives() -> None:
    model, x = _made(Plain), _data(32, 24)
    model.a.forward = types.MethodType(
        lambda self, value: F.linear(value, self.weight, self.bias) * 2, model.a
    )  # type: ignore[union-attr,method-assign]
    artifact = _small(model, x)
    expected, answer = _answer(model, x), _answer(artifact.model, x)
    assert float((answer - expected).norm() / expected.norm()) == pytest.approx(
        artifact.report.checks["relative_difference"], rel=0.01
    )
    assert "on the instance" in artifact.report.declined["a"]


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch names it so
        return super().forward(input) * 2


class Clamping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch names it so
        return super().forward(input.clamp(-50, 50))


class Scaled(nn.Linear):
    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:  # noqa: A002 - torch names it so
        return super().forward(input) * scale


class Slotted(nn.Linear):
    __slots__ = ("extra",)


class Adapted(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down = nn.Parameter(torch.zeros(2, 24))


@pytest.mark.parametrize("cls", [Doubling, Clamping, Scaled, Slotted, Adapted])
def test_a_layer_that_is_more_than_its_base_class_stays_dense(cls: type[nn.Linear]) -> None:
    model, x = _made(Plain), _data(32, 24)
    model.a = cls(24, 32).eval()
    artifact = _small(model, x)
    assert isinstance(artifact.model, nn.Module)
    assert type(artifact.model.a) is cls
    assert cls.__name__ in artifact.report.declined["a"]


def test_a_subclass_whose_bias_was_folded_in_loads(tmp_path: Path) -> None:
    model, x = _made(Casts), _data(8, 24)
    artifact = _folded(model, x)
    artifact.save(tmp_path / "folded.safetensors")
    loaded = tdpass.load(tmp_path / "folded.safetensors", Casts().eval())
    assert type(loaded.a) is Casting
    torch.testing.assert_close(_answer(loaded, x), _answer(model, x), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_one_layer_loads(tmp_path: Path) -> None:
    model, x = _made(lambda: nn.Linear(24, 32)), _data(32, 24)
    artifact = _small(model, x, 0.7)
    assert isinstance(artifact.model, Factorized)
    artifact.save(tmp_path / "one.safetensors")
    torch.testing.assert_close(
        _answer(tdpass.load(tmp_path / "one.safetensors", nn.Linear(24, 32)), x),
        _answer(artifact.model, x),
        rtol=0,
        atol=0,
    )


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _rebuilt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of factored layers' sites whose dense weight is rebuilt from here on."""
    read: list[str] = []
    rebuild = Factorized.weight.fget
    assert rebuild is not None
    monkeypatch.setattr(
        Factorized, "weight", property(lambda self: read.append(self.site.name) or rebuild(self))
    )
    return read


@pytest.mark.parametrize("loaded", [False, True])
def test_a_factored_encoder_calls_its_layers_instead_of_rebuilding_weights(
    loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _made(_encoder), _data(16, 5, 16)
    artifact = tdpass.compress(model, {"params": 0.55}, x, cache=False, formats=["svd"], divergence="mse")
    artifact.save(tmp_path / "encoder.safetensors")
    small = tdpass.load(tmp_path / "encoder.safetensors", copy.deepcopy(model)) if loaded else artifact.model
    read = _rebuilt(monkeypatch)
    expected, answer = _answer(model, x), _answer(small, x)
    # the linear layers, and those projections of attention that pay
    assert sum(isinstance(module, Factorized) for module in small.modules()) == 8
    assert read == []
    assert float((answer - expected).norm() / expected.norm()) == pytest.approx(
        artifact.report.checks["relative_difference"], rel=0.01
    )


class Masked(nn.Module):
    """An encoder that ignores padding, which torch runs on nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = _encoder(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=x[:, :, 0] == 0))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_runs_on_nested_tensors_stays_dense() -> None:
    model, x = _made(Masked), _data(16, 5, 16)
    x[::2, 3:] = 0
    artifact = tdpass.compress(
        model, {"params": 0.99}, x, pipeline="plan,factorize", cache=False, formats=["svd"], divergence="mse"
    )
    assert isinstance(artifact.model, Masked)
    assert isinstance(artifact.model.head, Factorized)
    assert "nested" in artifact.report.declined["encoder.layers.0.linear1"]
    with torch.no_grad():
        assert torch.equal(
            artifact.model.encoder(x, src_key_padding_mask=x[:, :, 0] == 0),
            model.encoder(x, src_key_padding_mask=x[:, :, 0] == 0),
        )  # type: ignore[operator]
