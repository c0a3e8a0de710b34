"""The verbs of `Ops` as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.formats.geometry import unit
from tdpass.models.onnx.names import FreshNames
from tdpass.models.onnx.shapes import Dims, Shapes
from tdpass.models.onnx.tensors import from_torch
from tdpass.ops import Pads, unpack_bits

_GEMM_WITHOUT_C = 11
_SLICE_WITH_INPUTS = 10
_AXES_FROM_THE_LAST = 11
_SHAPE_WITH_BOUNDS = 15
_DEQUANTIZE_BY_ROW = 13
_FOUR_BIT_INTEGERS = 21
_ARITHMETIC = 11  # CumSum, and Slice with inputs
_BYTE = 8
_HALF_BYTE = 4


class OnnxOps:
    """Records nodes for one site; implements `StorageOps[ir.Value]`.

    Factors are constants that become initializers when a node first reads them, in the layout that node
    wants: a factor that is only ever a MatMul's right operand is stored transposed, and one that is only
    reshaped is stored reshaped, so that no constant is rearranged at run time.  With `integers` activations
    are of eight bits too. Recording a second use of the site reads the same initializers.
    """

    def __init__(
        self, site: str, opset: int, names: FreshNames, shapes: Shapes, *, integers: bool = False
    ) -> None:
        self._site = site
        self._opset = opset
        self._integers_run = integers
        self._names = names
        self._shapes = shapes
        self._nodes: list[ir.Node] = []
        self._contents: dict[ir.Value, Tensor] = {}
        self._integers: dict[ir.Value, Tensor] = {}
        self._labels: dict[ir.Value, str] = {}
        self._rearranged: dict[tuple[object, ...], ir.Value] = {}
        self._read: dict[ir.Value, None] = {}
        self._dims: dict[ir.Value, Dims | None] = {}
        self._sources: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value | None, int]] = {}

    def constant(self, label: str, tensor: Tensor, properties: Mapping[str, str] | None = None) -> ir.Value:
        """A constant to be named `<site>.<label>` if a node reads it, with these properties beside it."""
        held = from_torch(tensor)
        value = ir.Value(shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held)
        value.metadata_props.update(properties or {})
        self._contents[value] = tensor
        self._labels[value] = label
        self._dims[value] = tuple(tensor.shape)
        return value

    def take_nodes(self) -> list[ir.Node]:
        """The nodes recorded since the last call."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def computed(self, y: ir.Value) -> ir.Value:
        """The value as the output of a node, which a constant is not."""
        return self._emit("Identity", [y], self._dims_of(y)) if y in self._contents else y

    def constants_read(self) -> list[tuple[ir.Value, str]]:
        """Every constant that some node still reads, with the name it would like."""
        return [(value, f"{self._site}.{self._labels[value]}") for value in self._read if value.uses()]

    def scale(self, x: ir.Value, factor: float, dtype: torch.dtype) -> ir.Value:
        """`factor * x`."""
        if factor == 1.0:
            return x
        return self._emit(
            "Mul",
            [x, self._cached(("scale", factor), "scale", torch.tensor(factor, dtype=dtype))],
            self._dims_of(x),
        )

    def linear(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        known, outputs = self._dims_of(x), self._dims_of(weight)
        y_dims = None if known is None or outputs is None else (*known[:-1], outputs[0])
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
            kernel_shape=kernel, strides=list(stride), pads=before + after, dilations=list(dilation), group=groups,
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
            kernel_shape=kernel, strides=list(stride), pads=before + [max(size, 0) for size in after], dilations=list(dilation), group=groups,
            output_padding=[max(-size, 0) for size in after],
        )  # fmt: skip

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        if x in self._contents:
            return self._cached(
                ("reshape", x, tuple(shape)),
                self._labels[x],
                self._contents[x].reshape(tuple(shape)),
                x.metadata_props,
            )
        if x in self._integers:
            return self._rearranged_integers(
                ("reshape", x, tuple(shape)), x, self._integers[x].reshape(tuple(shape))
            )
        return self._emit(
            "Reshape", [x, self._ints("shape", shape)], tuple(None if size == -1 else size for size in shape)
        )

    def permute(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        if list(axes) == sorted(axes):
            return x
        if x in self._contents:
            return self._cached(
                ("permute", x, tuple(axes)),
                self._labels[x],
                self._contents[x].permute(tuple(axes)),
                x.metadata_props,
            )
        if x in self._integers:
            return self._rearranged_integers(
                ("permute", x, tuple(axes)), x, self._integers[x].permute(tuple(axes))
            )
        if x in self._sources:
            values, scale, zero, rows = self._sources[x]
            self._forget(x)
            return self._dequantized(
                self.permute(values, axes), scale, zero, per_row=rows > 1, axis=list(axes).index(0)
            )
        known = self._dims_of(x)
        return self._emit(
            "Transpose", [x], None if known is None else tuple(known[axis] for axis in axes), perm=list(axes)
        )

    def take(self, x: ir.Value, index: ir.Value, axis: int) -> ir.Value:
        known = self._dims_of(x)
        dims = None if known is None else _with_size(known, axis, (self._dims_of(index) or (None,))[0])
        return self._emit("Gather", [x, index], dims, axis=self._axis(axis, known))

    def part(self, x: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        if x in self._contents:
            return self._cached(
                ("part", x, axis, start, stop),
                self._labels[x],
                self._contents[x].narrow(axis, start, stop - start),
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
                f"{self._site!r} reads values of unknown rank, whose last axes opset {self._opset} cannot name; export with opset 11"
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
        longer = max(left, right, key=len) if left is not None and right is not None else None
        return self._emit(
            "Add",
            [a, b],
            left
            if longer is not None and longer == left
            else None
            if longer is None
            else (None,) * len(longer),
        )

    def cast(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        return self._emit("Cast", [x], self._dims_of(x), to=int(tensor_adapters.from_torch_dtype(dtype)))

    def quantize(self, x: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        return self._emit("QuantizeLinear", [x, scale, zero], self._dims_of(x))

    def dequantize(
        self,
        values: ir.Value,
        scale: ir.Value,
        zero: ir.Value | None,
        shape: Sequence[int],
        rows: int,
        dtype: torch.dtype,
    ) -> ir.Value:
        per_row = (rows, math.prod(shape) // rows)
        grouped = rows not in {1, shape[0]}
        if values in self._contents or values in self._integers:
            held = self.reshape(values, per_row if grouped else shape)
            numbers = self._dequantized(held, scale, zero, per_row=rows > 1)
            self._sources[numbers] = (held, scale, zero, rows)
        else:
            numbers = self._scaled(self.reshape(values, per_row), scale, zero, 0)
            grouped = True
        whole = self.reshape(numbers, shape) if grouped else numbers
        return whole if dtype is torch.float32 else self.cast(whole, dtype)

    def unpack(self, packed: ir.Value, count: int, bits: int, *, signed: bool = False) -> ir.Value:
        content = self._contents.get(packed)
        if content is not None and signed and bits == _HALF_BYTE and self._opset >= _FOUR_BIT_INTEGERS:
            return self._four_bits(packed, unpack_bits(content, count, bits, signed=True))
        if content is not None and self._opset < _ARITHMETIC:
            raise UnsupportedError(
                f"the factors of {self._site!r} are stored in {bits} bits, which no operator of opset {self._opset} reads; "
                f"store them as int8, or convert the model to opset {_ARITHMETIC} or later"
            )
        step = bits if _BYTE % bits == 0 else 1
        flat = self.reshape(
            self._emit("Cast", [packed], self._dims_of(packed), to=int(ir.DataType.INT32)), (-1, 1)
        )
        low = [2**shift for shift in range(0, _BYTE, step)]
        whole = self._emit("Div", [flat, self._numbers("powers", low)], (None, len(low)))
        above = self._emit(
            "Div", [flat, self._numbers("powers", [2**step * power for power in low])], (None, len(low))
        )
        fields = self.reshape(self._less(whole, above, 2**step), (-1,))
        if (self._dims_of(packed) or (None,))[0] != count * bits / _BYTE:
            ends = [
                self._ints("start", (0,)),
                self._ints("end", (count * bits // step,)),
                self._ints("start", (0,)),
            ]
            fields = self._emit("Slice", [fields, *ends], (count * bits // step,))
        if step < bits:
            weights = self.reshape(self._numbers("powers", [2**shift for shift in range(bits)]), (bits, 1))
            fields = self.reshape(
                self._emit("MatMul", [self.reshape(fields, (count, bits)), weights], (count, 1)), (count,)
            )
        if not signed:
            return fields
        return self._less(
            fields, self._emit("Div", [fields, self._numbers("powers", [2 ** (bits - 1)])], (count,)), 2**bits
        )

    def spread(self, values: ir.Value, kept: ir.Value, shape: Sequence[int]) -> ir.Value:
        own = self._float_type(values)
        dtype = torch.float64 if own is torch.float64 else torch.float32
        numbers = values if own is dtype else self.cast(values, dtype)
        end = self._cached(("axis",), "axis", torch.tensor(0, dtype=torch.int64))
        places = self._emit(
            "Sub",
            [self._emit("CumSum", [kept, end], self._dims_of(kept)), self._numbers("one", [1])],
            self._dims_of(kept),
        )
        found = self._emit("Gather", [numbers, places], self._dims_of(kept), axis=0)
        whole = self.reshape(self._emit("Mul", [found, self.cast(kept, dtype)], self._dims_of(kept)), shape)
        return whole if own is None or own is dtype else self.cast(whole, own)

    def tiled(self, cells: ir.Value, tile: tuple[int, int], shape: tuple[int, int]) -> ir.Value:
        (high, wide), (rows, columns) = tile, shape
        parts = self.reshape(cells, (rows // high, 1, columns // wide, 1))
        wanted = (rows // high, high, columns // wide, wide)
        return self.reshape(
            self._emit("Expand", [parts, self._ints("shape", wanted)], wanted), (rows * columns,)
        )

    def lookup(self, table: ir.Value, indices: ir.Value) -> ir.Value:
        return self._emit("Gather", [table, indices], self._dims_of(indices), axis=0)

    def _less(self, whole: ir.Value, above: ir.Value, times: int) -> ir.Value:
        """`whole - times above`, of integers."""
        product = self._emit("Mul", [above, self._numbers("powers", [times])], self._dims_of(above))
        return self._emit("Sub", [whole, product], self._dims_of(whole))

    def _numbers(self, label: str, numbers: Sequence[int]) -> ir.Value:
        return self._cached(("numbers", *numbers), label, torch.tensor(list(numbers), dtype=torch.int32))

    def _four_bits(self, packed: ir.Value, values: Tensor) -> ir.Value:
        """The integers as a constant of the type that holds two to a byte."""
        key = ("four bits", packed)
        if key not in self._rearranged:
            self._rearranged[key] = self._integer_constant(
                self._labels[packed], values, dict(packed.metadata_props)
            )
        return self._rearranged[key]

    def _integer_constant(self, label: str, values: Tensor, properties: Mapping[str, str]) -> ir.Value:
        held = ir.tensor(values.to(torch.int8).contiguous().numpy(), ir.DataType.INT4)
        value = ir.Value(shape=ir.Shape(list(values.shape)), type=ir.TensorType(held.dtype), const_value=held)
        value.metadata_props.update(properties)
        self._integers[value] = values
        self._labels[value], self._dims[value] = label, tuple(values.shape)
        return value

    def _float_type(self, value: ir.Value) -> torch.dtype | None:
        """The type of floating-point numbers; None for integers."""
        if value in self._contents:
            return self._contents[value].dtype if self._contents[value].is_floating_point() else None
        node = value.producer()
        return torch.float32 if node is not None and node.op_type == "Gather" else None  # a table's

    def _dequantized(
        self, values: ir.Value, scale: ir.Value, zero: ir.Value | None, *, per_row: bool, axis: int = 0
    ) -> ir.Value:
        known = self._dims_of(values) or ()
        if len(known) == 2 and axis == 1 and not self._integers_run:
            # of [i, o] and the product that reads it, ONNX Runtime makes one operator that rounds activations
            # to eight bits too
            deep = self.reshape(values, (1, *(size or 1 for size in known)))
            return self.reshape(
                self._dequantized(deep, scale, zero, per_row=per_row, axis=axis + 1),
                [size or 1 for size in known],
            )
        if self._opset >= _DEQUANTIZE_BY_ROW:
            inputs = [values, scale] if zero is None else [values, scale, zero]
            return self._emit("DequantizeLinear", inputs, known, **({"axis": axis} if per_row else {}))
        return self._scaled(values, scale, zero, axis)

    def _scaled(self, values: ir.Value, scale: ir.Value, zero: ir.Value | None, axis: int) -> ir.Value:
        """`(values - zero) scale` along an axis, by arithmetic."""
        known = self._dims_of(values) or ()
        along = [-1 if place == axis else 1 for place in range(len(known))]
        numbers = self.cast(values, torch.float32)
        if zero is not None:
            numbers = self._emit("Sub", [numbers, self.cast(self.reshape(zero, along), torch.float32)], known)
        return self._emit("Mul", [numbers, self.reshape(scale, along)], known)

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

    def _forget(self, y: ir.Value) -> None:
        """Take back a node that nothing reads, and those that only it read."""
        node = y.producer()
        if node is None or node not in self._nodes or y.uses():
            return
        self._nodes.remove(node)
        inputs = [value for value in node.inputs if value is not None]
        for place in range(len(node.inputs)):
            node.replace_input_with(place, None)
        for value in inputs:
            self._forget(value)

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

    def _dims_of(self, value: ir.Value) -> Dims | None:
        return self._dims[value] if value in self._dims else self._shapes.of(value)

    def _ints(self, label: str, numbers: Sequence[int]) -> ir.Value:
        return self._cached(("ints", *numbers), label, torch.tensor(list(numbers), dtype=torch.int64))

    def _cached(
        self, key: tuple[object, ...], label: str, tensor: Tensor, properties: Mapping[str, str] | None = None
    ) -> ir.Value:
        if key not in self._rearranged:
            self._rearranged[key] = self.constant(label, tensor, properties)
        return self._rearranged[key]

    def _rearranged_integers(self, key: tuple[object, ...], x: ir.Value, values: Tensor) -> ir.Value:
        if key not in self._rearranged:
            self._rearranged[key] = self._integer_constant(self._labels[x], values, dict(x.metadata_props))
        return self._rearranged[key]

    def _emit(
        self, operator: str, inputs: list[ir.Value], known: Dims | None, **attributes: int | list[int]
    ) -> ir.Value:
        self._read.update(
            (value, None) for value in inputs if value in self._contents or value in self._integers
        )
        wanted = f"{self._site}/{operator.lower()}"
        node = ir.node(operator, inputs, attributes=attributes, name=self._names.node(wanted))
        output = node.outputs[0]
        output.name = self._names.value(wanted)
        self._dims[output] = known
        self._nodes.append(node)
        return output


def _with_size(known: Dims, axis: int, size: int | None) -> Dims:
    """The sizes with another along an axis counted from the last."""
    return tuple(size if place == axis + len(known) else each for place, each in enumerate(known))
