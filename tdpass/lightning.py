"""A training method in a Lightning `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tdpass.artifact import Artifact
from tdpass.errors import UsageError
from tdpass.methods.base import Method, make_method
from tdpass.optional import optional
from tdpass.registry import nearest

_Callback: Any = optional("lightning.pytorch", "lightning", "tdpass.lightning").Callback


class MethodCallback(_Callback):  # type: ignore[misc]
    """Attached when training begins, finished when it ends; the artifact is in `.artifact`.

    `part` names the sub-module that is compressed, the whole module where it is empty; a round begins every
    `every` optimizer steps.
    """

    def __init__(
        self,
        method: Method | Mapping[str, Any] | str,
        *,
        every: int | None = None,
        part: str = "",
        example_inputs: Any = None,
    ) -> None:
        self.method, self.every, self.part, self.example = make_method(method), every, part, example_inputs
        self.artifact: Artifact[Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the method to the module and its first optimizer."""
        every = self.every or max(1, trainer.estimated_stepping_batches // max(1, self.method.epochs()))
        self.method.attach(
            self._trained(pl_module),
            trainer.optimizers[0],
            every=int(every),
            example_inputs=self.example,
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give back the compressed copy; the module that was trained stays as it is."""
        del trainer
        self.artifact = self.method.finish(self._trained(pl_module))

    def _trained(self, pl_module: Any) -> nn.Module:
        try:
            found: nn.Module = pl_module.get_submodule(self.part)
        except AttributeError:
            names = [name for name, _ in pl_module.named_children()]
            raise UsageError(
                f"part={self.part!r} is no module in {type(pl_module).__name__}{nearest(self.part, names)}; "
                f"it has: {', '.join(names) or 'none'}"
            ) from None
        return found
