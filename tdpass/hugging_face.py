"""Hugging Face: compressed models, training methods in a `Trainer`, and model cards.

Compressed models load with `from_pretrained`, and a model card says what was done. Importing this module
registers tdpass with transformers; without it `from_pretrained` knows nothing of compressed layers and warns
of an unknown quantization type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tdpass.artifact import Artifact
from tdpass.errors import InvalidModelError, UsageError
from tdpass.files import write_text
from tdpass.methods.base import Method, make_method
from tdpass.models.torch.saving.pretrained import METHOD
from tdpass.models.torch.saving.structure import restructure


@register_quantization_config(METHOD)
class TdpassConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry `quantization_config` of a compressed model: which layers are factored, and how."""

    def __init__(self, structure: Mapping[str, Any], quant_method: str = METHOD, **_: object) -> None:
        self.quant_method, self.structure = quant_method, structure


@register_quantizer(METHOD)
class TdpassLoader(HfQuantizer):  # type: ignore[misc]
    """Builds the factored layers before weights are read, of which every one has to be there."""

    requires_calibration = True  # a dense checkpoint is compressed by tdpass.compress, not while it loads

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: object
    ) -> None:
        restructure(model, json.dumps(self.quantization_config.structure), "the model's configuration")
        if checkpoint_files:
            _check_complete(model, checkpoint_files)

    def is_serializable(self) -> bool:
        """Saving writes the same entry again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are parameters like any others."""
        return True


def _check_complete(model: nn.Module, files: Sequence[str]) -> None:
    """Raise `InvalidModelError` unless the files hold every tensor of the factored layers, in its shape.

    Else they would be made anew at random.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    held: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as archive:
            names = archive.keys()
            held.update({name: tuple(archive.get_slice(name).get_shape()) for name in names})
    for path, layer in model.named_modules():
        if not type(layer).__module__.startswith("tdpass."):
            continue
        for leaf, value in {**layer._parameters, **layer._buffers}.items():
            name = f"{path}.{leaf}"
            shape = next(
                (held[found] for found in (name, prefix + name, name.removeprefix(prefix)) if found in held),
                None,
            )
            if value is not None and shape != tuple(value.shape):
                said = "is not" if shape is None else f"has {list(shape)}"
                raise InvalidModelError(
                    f"{name!r} should have shape {list(value.shape)} and {said} in the checkpoint; save the "
                    "compressed model again with save_pretrained"
                )


class MethodCallback(TrainerCallback):  # type: ignore[misc]
    """A training method in a `Trainer`: attached when training begins, finished when it ends.

    The artifact is in `.artifact`. A round begins `rounds` times over the whole of training, `every`
    optimizer steps apart where that is given.
    """

    def __init__(
        self,
        method: Method | Mapping[str, Any] | str,
        *,
        every: int | None = None,
        example_inputs: Any = None,
    ) -> None:
        self.method, self.every, self.example = make_method(method), every, example_inputs
        self.artifact: Artifact[Any] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: object
    ) -> None:
        """Attach the method to the model and the optimizer."""
        del args, control
        every = self.every or max(1, state.max_steps // max(1, self.method.epochs()))
        self.method.attach(
            model, getattr(optimizer, "optimizer", optimizer), every=every, example_inputs=self.example
        )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: object) -> None:
        """Give back the compressed copy; the model that was trained stays as it is."""
        del args, state, control
        self.artifact = self.method.finish(model)


# `license` is what the hub calls it
def model_card(artifact: Artifact[Any], base: str = "", license: str = "") -> str:  # noqa: A002
    """A model card: what the model was, what is left of it, how it loads, and the plan's table."""
    report = artifact.report
    head = ["library_name: transformers", "tags: [tdpass, compressed]"]
    head += [f"base_model: {base}"] if base else []
    head += [f"license: {license}"] if license else []
    shares = ", ".join(
        f"{share:.0%} of the {name}" for name, share in report.final.shares(report.original).items()
    )
    rows = [
        f"| {row.site} | {'x'.join(map(str, row.shape))} | {row.form} | {row.error:.2g} |"
        for row in report.sites
    ]
    checks = [f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in report.checks.items()]
    return "\n".join([
        "---", *head, "---", "", f"# {report.model}, compressed", "",
        f"Made by [tdpass](https://pypi.org/project/tdpass/): {shares}.", "",
        "```python", "import tdpass.hugging_face  # registers the factored layers",
        "from transformers import AutoModel", "",
        'model = AutoModel.from_pretrained("this repository")', "```", "",
        *(["## Checks", "", *checks, ""] if checks else []),
        "## Layers", "", "| site | shape | form | error |", "|---|---|---|---|", *rows, "",
    ])  # fmt: skip


def save_pretrained(
    artifact: Artifact[Any],
    folder: Path | str,
    base: str = "",
    license: str = "",  # noqa: A002
) -> None:
    """The model as transformers saves it, with card, plan and report.

    `huggingface_hub.upload_folder` puts that on the hub. Raises `UsageError` for a model that is not of
    transformers.
    """
    if not hasattr(artifact.model, "save_pretrained"):
        raise UsageError(
            f"a {type(artifact.model).__name__} is no model of transformers; write it with artifact.save"
        )
    target = Path(folder)
    artifact.model.save_pretrained(target)
    artifact.plan.save(target / "plan.json")
    artifact.report.save(target / "report.json")
    write_text(target / "README.md", model_card(artifact, base, license))


def push_to_hub(
    artifact: Artifact[Any],
    repository: str,
    *,
    base: str = "",
    license: str = "",  # noqa: A002
    **options: Any,
) -> None:
    """Put model, card, plan and report in a repository of the hub; `options` are those of `upload_folder`."""
    from huggingface_hub import create_repo, upload_folder  # noqa: PLC0415 - only who pushes needs it

    with TemporaryDirectory() as folder:
        save_pretrained(artifact, folder, base, license)
        create_repo(repository, exist_ok=True)
        upload_folder(repo_id=repository, folder_path=folder, **options)
