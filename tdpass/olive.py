"""A pass of Olive: `"type": "TdpassCompress"` in the workflow.

Run it by `olive run --config run.json --package-config passes.json`. `python -m tdpass.olive passes.json`
writes that list of passes: Olive's own and this one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from olive.common.config_utils import validate_config
from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.passes.pytorch.common import inherit_hf_from_hf

from tdpass.artifact import Artifact
from tdpass.errors import UsageError
from tdpass.files import write_text
from tdpass.html_report import render_html
from tdpass.verbs import compress

NAME = "TdpassCompress"
EVERYWHERE = ("providers", "accelerators", "precisions")


class TdpassCompress(Pass):  # type: ignore[misc]
    """Compress an ONNX model, or one of transformers, within a budget.

    What comes out is a model of the same kind, with plan and report beside it.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        del accelerator_spec
        return {
            "budget": PassConfigParam(
                type_=dict[str, Any] | float,
                required=True,
                description='Bounds on the whole model, such as {"macs": 0.4} or {"params": "5M"}.',
            ),
            "data_config": PassConfigParam(
                type_=DataConfig | dict | None,
                default_value=None,
                description="Calibration data as Olive describes it; its labels are left out.",
            ),
            "data": PassConfigParam(
                type_=str | None,
                default_value=None,
                description="Calibration data as `tdpass --data` takes it: .npz, .npy, a folder or a file.",
            ),
            "options": PassConfigParam(
                type_=dict[str, Any],
                default_value={},
                description="Further arguments of `tdpass.compress`, such as effort, formats or exclude.",
            ),
        }

    def _run_for_config(self, model: Any, config: BasePassConfig, output_model_path: str) -> Any:
        """Compress and write; raises `UsageError` for a model that tdpass does not write for Olive."""
        write = next((write for kind, write in _KINDS.items() if isinstance(model, kind)), None)
        if write is None:
            allowed = " or ".join(kind.__name__ for kind in _KINDS)
            raise UsageError(
                f"{NAME} takes an {allowed}, not a {type(model).__name__}; put a conversion before it"
            )
        return write(model, config, output_model_path)


def _artifact(model: Any, config: Any) -> Artifact[Any]:
    return compress(model, config.budget, _samples(config), progress=False, **config.options)


def _samples(config: Any) -> object:
    """The inputs to calibrate with, or None."""
    if config.data_config is None:
        return config.data
    if config.data is not None:
        raise UsageError("data and data_config both name calibration data; leave one out")
    described = validate_config(config.data_config, DataConfig)
    calls = described.to_data_container().create_dataloader()
    return [
        call[0] if isinstance(call, list | tuple) else call for call in calls
    ]  # inputs, or inputs and labels


def _write_onnx(model: Any, config: Any, output: str) -> Any:
    path = Path(resolve_onnx_path(output, Path(model.model_path).name))
    artifact = _artifact(model.model_path, config)
    external = artifact.save(path)
    _describe(artifact, path.parent)
    if external:  # the folder is the model where weights lie beside the graph
        return ONNXModelHandler(model_path=str(path.parent), onnx_file_name=path.name)
    return ONNXModelHandler(model_path=str(path))


def _write_transformers(model: Any, config: Any, output: str) -> Any:
    from tdpass import hugging_face  # noqa: PLC0415 - Olive passes over ONNX need no transformers

    artifact = _artifact(model.load_model(cache_model=False).eval(), config)
    hugging_face.save_pretrained(artifact, output, base=str(model.model_path))
    _describe(artifact, Path(output))
    model.save_metadata(output)
    return inherit_hf_from_hf(model, output)


_KINDS: dict[type, Callable[[Any, Any, str], Any]] = {
    ONNXModelHandler: _write_onnx,
    HfModelHandler: _write_transformers,
}


def _describe(artifact: Artifact[Any], folder: Path) -> None:
    artifact.plan.save(folder / "plan.json")
    artifact.report.save(folder / "report.json")
    write_text(folder / "report.html", render_html(artifact.report, artifact.plan))


def package_config() -> dict[str, Any]:
    """Olive's own passes and this one, as `olive run --package-config` reads them."""
    config: dict[str, Any] = json.loads(
        Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8")
    )
    config["passes"][NAME] = {"module_path": f"tdpass.olive.{NAME}", "dataset": "dataset_optional"} | {
        f"supported_{what}": ["*"] for what in EVERYWHERE
    }
    return config


def main(words: Sequence[str]) -> int:
    """Write `package_config` to the file named, or print it."""
    text = json.dumps(package_config(), indent=2)
    if not words:
        print(text)  # noqa: T201 - it is what was asked for
        return 0
    write_text(Path(words[0]), text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
