"""Every layer kind in torch and ONNX: same site, same numbers, dense and in every format that fits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.geometry import apply_dense
from tdpass.formats.layer import Layer
from tdpass.kinds import KINDS, kind_of
from tdpass.models import open_model
from tdpass.models.base import Batch, Model
from tdpass.ops import TorchOps
from tdpass.site import Site

EXAMPLES = [site for kind in KINDS if kind.operator for site in kind.examples()]
CASES = [(site, name) for site in EXAMPLES for name in FORMATS.names() if FORMATS.get(name).fits(site)]
each_example = pytest.mark.parametrize("site", EXAMPLES, ids=[site.name for site in EXAMPLES])
each_case = pytest.mark.parametrize(
    ("site", "name"), CASES, ids=[f"{site.name}-{name}" for site, name in CASES]
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


def tensors(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples to read, a weight and a bias."""
    return noise(*kind_of(site).sample(site, 2)), noise(*site.shape, seed=1), noise(site.o, seed=2)


def graph(site: Site, weight: Tensor, bias: Tensor) -> onnx.ModelProto:
    """The layer as one ONNX node."""
    kind = kind_of(site)
    after = [pair[1] for pair in site.padding]
    attributes = {
        "strides": site.stride, "dilations": site.dilation, "group": site.groups,
        "pads": [*(pair[0] for pair in site.padding), *(max(0, size) for size in after)],
        **({"output_padding": [max(0, -size) for size in after]} if min(after) < 0 else {}),
    }  # fmt: skip
    stored = {f"{site.name}.weight": kind.turned(weight, site.groups), f"{site.name}.bias": bias}
    made = helper.make_graph(
        [helper.make_node(kind.operator, ["x", *stored], ["y"], name="layer", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *kind.sample(site, 1)[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ascontiguousarray(value.numpy()), name)
            for name, value in stored.items()
        ],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )


class Net(nn.Module):
    """The layer as a module of that name, where torch can pad so."""

    def __init__(self, site: Site, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        kind, extra = kind_of(site), [before - after for before, after in site.padding]
        options = {
            "stride": site.stride,
            "dilation": site.dilation,
            "groups": site.groups,
            "padding": [before for before, _ in site.padding],
        }
        if any(extra):
            options["output_padding"] = extra
        module = kind.build(
            kind.modules[site.axes - 1], tuple(kind.turned(weight, site.groups).shape), options
        )
        module.weight, module.bias = nn.Parameter(kind.turned(weight, site.groups)), nn.Parameter(bias)
        self.add_module(site.name, module)

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self.children()
        return module(x)


def torch_can(site: Site) -> bool:
    """Whether a module of torch pads so."""
    extra = [before - after for before, after in site.padding]
    limits = [
        max(steps) if kind_of(site).reaches(site) is None else 1
        for steps in zip(site.stride, site.dilation, strict=True)
    ]
    return all(0 <= size < limit for size, limit in zip(extra, limits, strict=True))


def front_ends(site: Site, exported: bool = False) -> list[Model]:
    """The layer opened from ONNX, from torch and, if asked for, from an exported program."""
    x, weight, bias = tensors(site)
    models: list[object] = [graph(site, weight, bias)]
    if torch_can(site):
        net = Net(site, weight, bias).eval()
        models += [net, torch.export.export(net, (x,), strict=False)] if exported else [net]
    return [open_model(model, Batch((x,))) for model in models]


def answer(model: Model, x: Tensor) -> Tensor:
    """Its only output."""
    found = model.run(Batch((x,)))
    return next(iter(found.values())) if isinstance(found, dict) else found


def geometry(site: Site) -> tuple[object, ...]:
    """What must be the same on every front end."""
    return site.name, site.geometry(), site.extents, site.groups


@each_example
def test_a_dense_layer_is_the_same_site_and_computes_the_same_everywhere(site: Site) -> None:
    x, weight, bias = tensors(site)
    wanted = apply_dense(TorchOps(), x, weight, bias, site)
    for model in front_ends(site, exported=True):
        (found,) = model.sites()
        assert geometry(found) == geometry(site)
        torch.testing.assert_close(model.weight(site.name), weight)
        torch.testing.assert_close(answer(model, x), wanted, rtol=1e-4, atol=1e-5)
        tape = model.record(Batch((x,)))
        assert set(tape.site_calls) == {site.name}
        played = (
            tape.play()
            .fork({site.name: lambda value: apply_dense(TorchOps(), value, 2 * weight, bias, site)})
            .finish()
        )
        (value,) = played.values() if isinstance(played, dict) else [played]
        torch.testing.assert_close(
            value, apply_dense(TorchOps(), x, 2 * weight, bias, site), rtol=1e-4, atol=1e-5
        )


def test_a_layer_that_is_called_with_an_output_size_stays_dense() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sized, self.plain = nn.ConvTranspose2d(4, 4, 3, 2), nn.ConvTranspose2d(4, 4, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.sized(x, output_size=[8, 8]))

    model = open_model(Sized(), Batch((noise(2, 4, 3, 3),)))
    assert [site.name for site in model.sites()] == ["plain"]
    assert "output size" in model.declined()["sized"]


@each_case
def test_a_format_computes_the_same_everywhere_at_its_price(site: Site, name: str) -> None:
    x, weight, bias = tensors(site)
    form = FORMATS.get(name)
    ranks = form.ranks(site)
    for model in front_ends(site):
        for rank in {ranks[len(ranks) // 2], ranks[-1]}:
            layer = Layer(site, Form(name, rank), form.factorize(weight, site, rank), bias).to(torch.float32)
            model.replace(site.name, layer)
            model.check()
            wanted = apply_dense(TorchOps(), x, form.reconstruct(dict(layer.factors), site), bias, site)
            torch.testing.assert_close(answer(model, x), wanted, rtol=2e-4, atol=2e-5)
            assert model.count(Batch((x,))).per_sample == form.cost(site, rank).macs
            assert model.params() == form.cost(site, rank).params + site.o
            if form.exact_at_full_rank and rank == ranks[-1]:
                torch.testing.assert_close(
                    answer(model, x), apply_dense(TorchOps(), x, weight, bias, site), rtol=1e-3, atol=1e-4
                )
