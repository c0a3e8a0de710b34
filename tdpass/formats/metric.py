"""How an error of a weight is weighed.

By what the layer reads and by what its output means to the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tdpass.errors import NumericalError


@dataclass(frozen=True)
class Metric:
    """The error of What is || G^1/2 (W - What) C^1/2 ||_F, with W unfolded to `o x (i h w)`.

    `inputs` is C: the covariance of the (unfolded) input, a square matrix, or its diagonal as a vector where
    the matrix would not fit; `outputs` is G: how much the network's output moves with each output channel.
    None stands for the identity.  `mean` is the mean unfolded input.  Of a layer of several groups each has
    its own, stacked along a first axis; G then holds the outputs of one group.  All float64 or float32 on the
    CPU; used in float64.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    mean: Tensor | None = None
    groups: int = 1

    @property
    def plain(self) -> bool:
        """Whether this is the Frobenius norm of the weight itself."""
        return self.inputs is None and self.outputs is None

    def times_inputs(self, matrix: Tensor) -> Tensor:
        """`matrix @ C`."""
        if self.inputs is None:
            return matrix
        c = self.inputs.double()
        if self.groups > 1:
            parts = self._by_group(matrix)
            return (parts * c[:, None] if c.dim() == 2 else parts @ c).flatten(0, 1)
        return matrix * c if c.dim() == 1 else matrix @ c

    def times_outputs(self, matrix: Tensor) -> Tensor:
        """`G @ matrix`."""
        if self.outputs is None:
            return matrix
        g = self.outputs.double()
        return g @ matrix if self.groups == 1 else (g @ self._by_group(matrix)).flatten(0, 1)

    def mean_output(self, matrix: Tensor) -> Tensor | None:
        """`matrix @ mean`, what the layer with that unfolded weight answers on average.

        None where the mean is not known.
        """
        if self.mean is None:
            return None
        return (
            matrix @ self.mean
            if self.groups == 1
            else (self._by_group(matrix) @ self.mean[:, :, None]).flatten()
        )

    def _by_group(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.groups, -1, matrix.shape[1])

    def of_group(self, group: int) -> Metric:
        """That of one group of a grouped layer."""
        inputs, outputs, mean = (
            None if value is None else value[group] for value in (self.inputs, self.outputs, self.mean)
        )
        return Metric(inputs, outputs, mean)

    def square(self, matrix: Tensor) -> float:
        """`|| G^1/2 M C^1/2 ||^2` of an unfolded matrix."""
        if self.plain:
            return float(torch.linalg.vector_norm(matrix)) ** 2
        return max(0.0, float((self.times_outputs(matrix) * self.times_inputs(matrix)).sum()))

    def relative_error(self, weight: Tensor, approximation: Tensor, whole: float | None = None) -> float:
        """`||W - What|| / ||W||` in this metric; `whole` is `||W||^2` where it is known."""
        w = weight.double().flatten(1)
        whole = self.square(w) if whole is None else whole
        return (self.square(w - approximation.double().flatten(1)) / whole) ** 0.5 if whole > 0 else 0.0

    @cached_property
    def output_roots(self) -> tuple[Tensor, Tensor] | None:
        """`G^1/2` and `G^-1/2`, or None for the identity."""
        return None if self.outputs is None else symmetric_roots(self.outputs.double())

    @cached_property
    def input_roots(self) -> tuple[Tensor, Tensor] | None:
        """`C^1/2` and `C^-1/2` (vectors where C is a diagonal), or None for the identity."""
        if self.inputs is None:
            return None
        c = self.inputs.double()
        if c.dim() == 1:
            root = c.clamp_min(float(c.max()) * 1e-12).sqrt()
            return root, 1 / root
        return symmetric_roots(c)


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors of a symmetric matrix.

    What divide and conquer cannot do (clusters of tiny values, numbers near the ends of the range) is scaled
    and done by QR iterations in double precision.  Raises `NumericalError` where the matrix has values that
    are not finite.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except LinAlgError:
        import scipy.linalg  # noqa: PLC0415 - takes a third of a second, and is rarely needed

        scale = float(matrix.abs().max())
        if not math.isfinite(scale):
            raise NumericalError(
                f"a second moment of {matrix.shape[0]} x {matrix.shape[0]} holds values that are not finite"
            ) from None
        found, columns = scipy.linalg.eigh((matrix.double() / (scale or 1.0)).numpy(), driver="ev")
        values, vectors = torch.from_numpy(found * scale).to(matrix), torch.from_numpy(columns).to(matrix)
    return values, vectors


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix, ascending; raises as `eigenpairs` does."""
    try:
        values: Tensor = torch.linalg.eigvalsh(matrix)
    except LinAlgError:
        return eigenpairs(matrix)[0]
    return values


def symmetric_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive semidefinite matrix, and the root's inverse.

    Both have a floor of 1e-12 of the top eigenvalue.
    """
    values, vectors = eigenpairs(matrix)
    root = values.clamp_min(float(values[-1]) * 1e-12 + 1e-300).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
