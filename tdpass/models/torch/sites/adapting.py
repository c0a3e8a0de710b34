"""Turning a torch module into one of several widths and ranks."""

from __future__ import annotations

from torch import nn

from tdpass.errors import PlanError
from tdpass.formats.base import FORMATS, Factors
from tdpass.kinds import kind_of_module
from tdpass.layers.adaptive import Adaptive, AdaptiveNorm
from tdpass.layers.dial import Adaptation, Cut, Dial
from tdpass.models.torch.modules.called_layers import call_layers
from tdpass.models.torch.modules.in_place import become
from tdpass.models.torch.sites.norms import BatchNorm


def adapt(module: nn.Module, adaptation: Adaptation, *, filled: bool = True) -> nn.Module:
    """Put adaptive layers in the place of those that the adaptation names.

    Their weights are the module's own, or to be `filled`. Raises `PlanError` for a module that has not these
    layers.
    """
    dial, modules = Dial(adaptation), dict(module.named_modules())
    for path in adaptation.layers:
        layer = modules.get(path)
        if layer is None or not _fits(layer, path, adaptation):
            raise PlanError(
                f"{path!r} is no layer of this model, or one of other sizes; use the class that was adapted"
            )
        become(layer, Adaptive(layer, path, dial, _factors(layer, path, adaptation) if filled else None))
    for path in adaptation.norms:
        norm = modules.get(path)
        if not isinstance(norm, BatchNorm) or not _within(
            adaptation.norms[path], norm.num_features, adaptation
        ):
            raise PlanError(
                f"{path!r} is no batch-norm of this model, or one of another size; use the class that was "
                "adapted"
            )
        become(norm, AdaptiveNorm(norm, path, dial))
    call_layers(module)
    return module


def adaptation_of(model: nn.Module) -> Adaptation | None:
    """What an adaptive model was made by; None for an ordinary one."""
    return next(
        (module.dial.adaptation for module in model.modules() if isinstance(module, Adaptive | AdaptiveNorm)),
        None,
    )


def _fits(layer: nn.Module, path: str, adaptation: Adaptation) -> bool:
    """Whether a layer has the channels and can have the rank."""
    kind, form = kind_of_module(layer), adaptation.layers[path]
    if kind is None or form.format not in FORMATS:
        return False
    site, whole = kind.site(layer, path), (form.rank,) if form.rank else ()
    largest = FORMATS.get(form.format).ranks(site)[-1] if FORMATS.get(form.format).fits(site) else None
    sizes = _within(form.inputs, site.i, adaptation) and _within(form.outputs, site.o, adaptation)
    return sizes and largest is not None and len(whole) == len(largest) and whole <= largest


def _within(cuts: tuple[Cut, ...], size: int, adaptation: Adaptation) -> bool:
    return len(cuts) == len(adaptation.widths) and all(cut.first + cut.count <= size for cut in cuts)


def _factors(layer: nn.Module, path: str, adaptation: Adaptation) -> Factors:
    kind, form, weight = kind_of_module(layer), adaptation.layers[path], layer.weight
    assert kind is not None
    assert isinstance(weight, nn.Parameter)
    if not form.rank:
        return {"kernel": weight}
    found = FORMATS.get(form.format).factorize(weight.detach().double(), kind.site(layer, path), (form.rank,))
    return {name: factor.to(weight) for name, factor in found.items()}
