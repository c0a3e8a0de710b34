"""The verbs of `Ops` as ONNX nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from tdpass.errors import UnsupportedError
from tdpass.formats.geometry import unit
from tdpass.models.onnx.graph.shapes import Dims
from tdpass.models.onnx.operators.storage_ops import StorageNodes
from tdpass.ops import Pads

_GEMM_WITHOUT_C = 11
_SLICE_WITH_INPUTS = 10
_AXES_FROM_THE_LAST = 11
_SHAPE_WITH_BOUNDS = 15
_LIMITS_AS_INPUT = 11


class OnnxOps(StorageNodes):
    """Records nodes for one site; implements `StorageOps[ir.Value]`.

    Factors are constants that become initializers when a node first reads them, in the layout that node
    wants: a factor that is only ever a MatMul's right operand is stored transposed, and one that is only
    reshaped is stored reshaped, so that no constant is rearranged at run time.  With `integers` activations
    are of eight bits too. Recording a second use of the site reads the same initializers.
    """

    def scale(self, x: ir.Value, factor: float, dtype: torch.dtype) -> ir.Value:
        """`factor * x`."""
        if factor == 1.0:
            return x
        return self._emit(
            "Mul",
            [x, self._cached(("scale", factor), "scale", torch.tensor(factor, dtype=dtype))],
            self._dims_of(x),
        )

    def activated(self, x: ir.Value, operator: str, attributes: Mapping[str, float]) -> ir.Value:
        """An activation with float attributes, which are inputs of a Clip of later opsets."""
        if operator == "Clip" and self._opset >= _LIMITS_AS_INPUT:
            ends = [
                self._cached(("limit", limit), "limit", torch.tensor(limit)) for limit in attributes.values()
            ]
            return self._emit("Clip", [x, *ends], self._dims_of(x))
        return self._emit(operator, [x], self._dims_of(x), **attributes)

    def attention(
        self, inputs: Sequence[ir.Value | None], heads: int, scale: float, hidden: float, *, causal: bool
    ) -> ir.Value:
        """ONNX Runtime's attention on queries, keys, values, and what it takes beside; scale 0 is its own."""
        scaled = {"scale": scale} if scale else {}
        return self._emit(
            "com.microsoft::MultiHeadAttention", inputs, None, num_heads=heads, mask_filter_value=hidden,
            unidirectional=int(causal), **scaled,
        )  # fmt: skip

    def linear(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        known, outputs = self._dims_of(x), self._dims_of(weight)
        y_dims = None if known is None or outputs is None else (*known[:-1], outputs[0])
        for product in (self.product_of_groups, self.product_of_bytes):
            made = product(x, weight, bias)
            if made is not None:
                return made
        if known is not None and len(known) == 2 and (bias is not None or self._opset >= _GEMM_WITHOUT_C):
            return self._emit("Gemm", [x, weight] if bias is None else [x, weight, bias], y_dims, transB=1)
        y = self._emit("MatMul", [x, self.permute(weight, (1, 0))], y_dims)
        return y if bias is None else self.add(y, bias)

    def conv(
        self,
        x: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> ir.Value:
        known = self._dims_of(weight) or ()
        kernel = [size for size in known[2:] if size is not None]
        before, after = [pair[0] for pair in padding], [pair[1] for pair in padding]
        return self._emit(
            "Conv", [x, weight] if bias is None else [x, weight, bias], (None,) * (2 + len(kernel)),
            kernel_shape=kernel, strides=list(stride), pads=before + after, dilations=list(dilation),
            group=groups,
        )  # fmt: skip

    def conv_transpose(
        self,
        x: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> ir.Value:
        outputs, inputs, *kernel = [size or 0 for size in self._dims_of(weight) or ()]
        axes = len(kernel)
        parts = self.permute(
            self.reshape(weight, (groups, outputs // groups, inputs, *kernel)), (0, 2, 1, *range(3, axes + 3))
        )
        stored = self.reshape(parts, (groups * inputs, outputs // groups, *kernel))
        before, after = [pair[0] for pair in cut], [pair[1] for pair in cut]
        return self._emit(
            "ConvTranspose", [x, stored] if bias is None else [x, stored, bias], (None,) * (2 + axes),
            kernel_shape=kernel, strides=list(stride), pads=before + [max(size, 0) for size in after],
            dilations=list(dilation), group=groups,
            output_padding=[max(-size, 0) for size in after],
        )  # fmt: skip

    def take(self, x: ir.Value, index: ir.Value, axis: int) -> ir.Value:
        known = self._dims_of(x)
        dims = None if known is None else _with_size(known, axis, (self._dims_of(index) or (None,))[0])
        return self._emit("Gather", [x, index], dims, axis=self._axis(axis, known))

    def part(self, x: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        if x in self._contents:
            # what holds no numbers of its own holds none in parts; how many others hold, their size says
            properties = {key: held for key, held in x.metadata_props.items() if held == "0"}
            return self._cached(
                ("part", x, axis, start, stop),
                self._labels[x],
                self._contents[x].narrow(axis, start, stop - start),
                properties,
            )
        known = self._dims_of(x)
        dims, at = None if known is None else _with_size(known, axis, stop - start), self._axis(axis, known)
        if self._opset < _SLICE_WITH_INPUTS:
            return self._emit("Slice", [x], dims, axes=[at], starts=[start], ends=[stop])
        return self._emit(
            "Slice",
            [
                x,
                *(
                    self._ints(label, (number,))
                    for label, number in (("start", start), ("end", stop), ("axis", at))
                ),
            ],
            dims,
        )

    def concat(self, a: ir.Value, b: ir.Value, axis: int) -> ir.Value:
        known, others = self._dims_of(a), self._dims_of(b)
        sizes = [None if dims is None else dims[axis] for dims in (known, others)]
        whole = None if sizes[0] is None or sizes[1] is None else sizes[0] + sizes[1]
        return self._emit(
            "Concat",
            [a, b],
            None if known is None else _with_size(known, axis, whole),
            axis=self._axis(axis, known),
        )

    def _axis(self, axis: int, known: Dims | None) -> int:
        """An axis counted from the last, as nodes of this opset name it."""
        if known is None and self._opset < _AXES_FROM_THE_LAST:
            raise UnsupportedError(
                f"{self._site!r} reads values of unknown rank, whose last axes opset {self._opset} cannot "
                "name; export with opset 11"
            )
        return axis if known is None else axis + len(known)

    def matmul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        left, right = self._dims_of(a), self._dims_of(b)
        known: Dims | None = None
        if left is not None and right is not None and len(left) >= 2 and len(right) >= 2:
            known = (*(None,) * (max(len(left), len(right)) - 2), left[-2], right[-1])
        return self._emit("MatMul", [a, b], known)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        left, right = self._dims_of(a), self._dims_of(b)
        if left is None or right is None:
            return self._emit("Add", [a, b], None)
        longer = max(left, right, key=len)
        return self._emit("Add", [a, b], left if longer == left else (None,) * len(longer))

    def join(self, x: ir.Value, count: int) -> ir.Value:
        known = self._dims_of(x)
        if known is None:
            raise UnsupportedError(
                f"{self._site!r} reads values of unknown rank; run shape inference on the model"
            )
        return self._with_last(x, known[:-count], (-1,))

    def split(self, x: ir.Value, sizes: Sequence[int]) -> ir.Value:
        return self._with_last(x, (self._dims_of(x) or ())[:-1], sizes)

    def _with_last(self, x: ir.Value, kept: Dims, last: Sequence[int]) -> ir.Value:
        """The leading axes as they are (a 0 copies a size), then these."""
        made = (*kept, *(None if size == -1 else size for size in last))
        return self._emit("Reshape", [x, self._ints("shape", (*(0 for _ in kept), *last))], made)

    def flatten_positions(self, x: ir.Value, last: int) -> ir.Value:
        known = self._dims_of(x)
        return x if known is not None and len(known) == 2 else self.reshape(x, (-1, last))

    def restore_positions(self, y: ir.Value, like: ir.Value, last: int) -> ir.Value:
        known = self._dims_of(like)
        if known is not None and len(known) == 2:
            return y
        if known is not None and sum(size is None for size in known[:-1]) <= 1:
            return self.reshape(y, (*(-1 if size is None else size for size in known[:-1]), last))
        shape = self._emit("Concat", [self._leading_sizes(like), self._ints("size", (last,))], None, axis=0)
        return self._emit("Reshape", [y, shape], None if known is None else (*known[:-1], last))

    def fill(self, like: ir.Value, bias: ir.Value, windows: Sequence[tuple[int, int]]) -> ir.Value:
        leading = 1 if windows else len(self._dims_of(like) or (None,)) - 1
        return self.reshape(bias, (*unit(leading), -1, *unit(len(windows))))

    def _leading_sizes(self, like: ir.Value) -> ir.Value:
        if self._opset >= _SHAPE_WITH_BOUNDS:
            return self._emit("Shape", [like], None, start=0, end=-1)
        shape = self._emit("Shape", [like], None)
        if self._opset >= _SLICE_WITH_INPUTS:
            return self._emit(
                "Slice",
                [shape, self._ints("start", (0,)), self._ints("end", (-1,)), self._ints("start", (0,))],
                None,
            )
        return self._emit("Slice", [shape], None, axes=[0], starts=[0], ends=[-1])


def _with_size(known: Dims, axis: int, size: int | None) -> Dims:
    """The sizes with another along an axis counted from the last."""
    return tuple(size if place == axis + len(known) else each for place, each in enumerate(known))
