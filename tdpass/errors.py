"""Every error tdpass raises on purpose; each says what, the value, what is allowed, and the next step."""

from __future__ import annotations


class TdpassError(Exception):
    """Root of all errors that a user can act on.

    `artifact` is the `Artifact` that was made before the error was found, so that the work is not lost; None
    where there is none.
    """

    artifact: object = None


class InvalidModelError(TdpassError):
    """The model, artifact or data that came in is damaged, inconsistent or not of a supported type."""


class UnsupportedError(TdpassError):
    """The request is sound, but this version cannot serve it."""


class BudgetError(TdpassError):
    """A budget that cannot be read, or that no plan can meet."""


class PlanError(TdpassError):
    """A plan that does not fit the model it is applied to."""


class NumericalError(TdpassError):
    """Numbers that no decomposition can be made of: weights, inputs or gradients that are not finite."""


class PassError(TdpassError):
    """A pass failed; the message names the pass, the passes before it and the cause."""


class UsageError(TdpassError):
    """An option, name or value that is not one of those allowed."""


class KernelError(TdpassError):
    """A kernel that cannot be built or chosen."""


class TrainingError(TdpassError):
    """A training run that diverges, or cannot go on from where it stopped."""


class WriteError(TdpassError):
    """A file that cannot be written whole: the disk is full or fails; what was there before is as it was."""


class DifferenceError(TdpassError):
    """A result whose outputs differ from the original's by more than was to be expected.

    The message names the pass that did it.
    """
