"""A training method in a Lightning `Trainer`."""

from __future__ import annotations

from typing import Any

from tdpass.artifact import Artifact
from tdpass.methods.base import Method
from tdpass.optional import optional

_Callback: Any = optional("lightning.pytorch", "lightning", "tdpass.lightning").Callback


class MethodCallback(_Callback):  # type: ignore[misc]
    """Attached when training begins, finished when it ends; the artifact is in `.artifact`.

    `part` names the sub-module that is compressed, the whole module where it is empty; a round begins every
    `every` optimizer steps.
    """

    def __init__(
        self, method: Method, *, every: int | None = None, part: str = "", example_inputs: Any = None
    ) -> None:
        self.method, self.every, self.part, self.example = method, every, part, example_inputs
        self.artifact: Artifact[Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the method to the module and its first optimizer."""
        every = self.every or max(1, trainer.estimated_stepping_batches // max(1, self.method.epochs()))
        self.method.attach(
            pl_module.get_submodule(self.part),
            trainer.optimizers[0],
            every=int(every),
            example_inputs=self.example,
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give back the compressed copy; the module that was trained stays as it is."""
        del trainer
        self.artifact = self.method.finish(pl_module.get_submodule(self.part))
