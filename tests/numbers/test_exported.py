"""Layers stored in every number type and support, written as ONNX by torch's own exporters."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tdpass.form import DENSE, Form
from tdpass.formats import Layer
from tdpass.layers.factorized import Factorized
from tdpass.numbers import NUMBERS
from tdpass.site import Site
from tdpass.supports import SUPPORTS

SITE = Site("fc", "linear", (48, 64), extents=(((5,), (5,)),))
TEXTS = {"levels": "levels16"}  # of those whose name alone is no text
FORMS = [
    *(Form("dense", (), (TEXTS.get(name, name),)) for name in NUMBERS.names()),
    *(Form("dense", (), ("levels16",), each.example) for each in SUPPORTS),
    *(Form.parse(f"dense {lines}/25%") for lines in ("rows", "columns")),
]


class All(nn.Module):
    """Layers side by side, one of each form."""

    def __init__(self, forms: list[Form]) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = Layer(SITE, DENSE, {"kernel": torch.randn(SITE.shape)})
        bias = nn.Parameter(torch.randn(SITE.o))
        self.layers = nn.ModuleList(Factorized(plain.stored(form), bias) for form in forms)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("dynamo", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_onnx_runtime_answers_alike(dynamo: bool, tmp_path: Path) -> None:
    model, x = All(FORMS).eval(), torch.randn(3, 64)
    torch.onnx.export(model, (x,), tmp_path / "it.onnx", dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx")
    answers = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for form, found, wanted in zip(FORMS, answers, model(x), strict=True):
        torch.testing.assert_close(
            torch.from_numpy(found),
            wanted,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, form=form: f"{form}: {text}",
        )
