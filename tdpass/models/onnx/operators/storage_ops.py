"""What makes factors of the parts that they are stored as, as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from tdpass.bits import unpack_bits
from tdpass.models.onnx.operators.recording import Recording

_DEQUANTIZE_BY_ROW = 13
_DEQUANTIZE_WORDS = 21
_FOUR_BIT_INTEGERS = 21
_BYTE = 8
_HALF_BYTE = 4
_SIGNS = 0x88  # turns two's complement of four bits into distances from -8
_GROUPS = frozenset({16, 32, 64, 128, 256})


class StorageNodes(Recording):
    """The verbs of `StorageOps` that `Ops` does not have, and those that lay constants out anew."""

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
            made = self._dequantized(
                self.permute(values, axes), scale, zero, per_row=rows > 1, axis=list(axes).index(0)
            )
            self._forget(x)
            return made
        known = self._dims_of(x)
        return self._emit(
            "Transpose", [x], None if known is None else tuple(known[axis] for axis in axes), perm=list(axes)
        )

    def cast(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        return self._emit("Cast", [x], self._dims_of(x), to=int(tensor_adapters.from_torch_dtype(dtype)))

    def quantize(self, x: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        return self._emit("QuantizeLinear", [x, scale, zero], self._dims_of(x))

    def numbers_of_codes(self, x: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
        """What activations of integers stand for."""
        return self._emit(
            "DequantizeLinear", [x, scale] if zero is None else [x, scale, zero], self._dims_of(x)
        )

    def dequantize(
        self,
        values: ir.Value,
        scale: ir.Value,
        zero: ir.Value | None,
        shape: Sequence[int],
        rows: int,
        dtype: torch.dtype,
    ) -> ir.Value:
        per_row, source = (rows, math.prod(shape) // rows), self._halves.get(values)
        grouped = rows not in {1, shape[0]}
        if values in self._contents or values in self._integers:
            held = self.reshape(values, per_row if grouped else shape)
            numbers = self._dequantized(held, scale, zero, per_row=rows > 1)
            self._sources[numbers] = (held, scale, zero, rows)
        else:
            numbers = self._scaled(self.reshape(values, per_row), scale, zero, 0)
            grouped = True
        whole = self.reshape(numbers, shape) if grouped else numbers
        if dtype is not torch.float32:
            return self.cast(whole, dtype)
        in_groups = rows not in {1, shape[0]} and per_row[1] in _GROUPS
        packed = None if zero is None else self._halves.get(zero)
        # zero points of a row fill whole bytes
        fits = zero is None or (packed is not None and rows // shape[0] % 2 == 0)
        if in_groups and source is not None and fits and len(shape) == 2:
            self._grouped[whole] = (source, scale, packed, per_row[1])
        return whole

    def product_of_groups(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value | None:
        """The product with a matrix of four-bit integers with scales by group, as ONNX Runtime has it.

        None where the weight is no such.
        """
        if weight not in self._grouped:
            return None
        packed, scale, zeros, group = self._grouped[weight]
        outputs, inputs = (size or 0 for size in self._dims_of(weight) or ())
        shape = (outputs, inputs // group, group // 2)
        values = self._distances(packed, shape)
        middle = None if zeros is None else self._distances(zeros, (outputs * (inputs // group) // 2,))
        read = self._dims_of(x)
        made = self._emit(
            "com.microsoft::MatMulNBits",
            [x, values, scale, *self._trailing(middle, None, bias)],
            None if read is None else (*read[:-1], outputs),
            K=inputs,
            N=outputs,
            bits=_HALF_BYTE,
            block_size=group,
        )
        self._forget(weight)
        return made

    def _distances(self, packed: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Integers of four bits in two's complement as distances from -8, in bytes of that shape."""
        content = (self._contents[packed] ^ _SIGNS).reshape(tuple(shape))
        return self._cached(("halves", packed), self._labels[packed], content, packed.metadata_props)

    @staticmethod
    def _trailing(*inputs: ir.Value | None) -> list[ir.Value | None]:
        """Optional inputs up to the last that is there."""
        count = max((place + 1 for place, value in enumerate(inputs) if value is not None), default=0)
        return list(inputs[:count])

    def unpack(self, packed: ir.Value, count: int, bits: int, *, signed: bool = False) -> ir.Value:
        numbers = self._unpacked(packed, count, bits, signed=signed)
        if packed in self._contents and signed and bits == _HALF_BYTE:
            self._halves[numbers] = packed
        return numbers

    def _unpacked(self, packed: ir.Value, count: int, bits: int, *, signed: bool) -> ir.Value:
        content = self._contents.get(packed)
        if content is not None and signed and bits == _HALF_BYTE and self._opset >= _FOUR_BIT_INTEGERS:
            return self._four_bits(packed, unpack_bits(content, count, bits, signed=True))
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
        found = self._emit("Gather", [numbers, self.order(kept)], self._dims_of(kept), axis=0)
        whole = self.reshape(self._emit("Mul", [found, self.cast(kept, dtype)], self._dims_of(kept)), shape)
        # ONNX Runtime does not lay out floats of eight bits anew
        return whole if own is None or own is dtype or own.itemsize == 1 else self.cast(whole, own)

    def places(self, kept: ir.Value, count: int) -> ir.Value:
        return self.reshape(self._emit("NonZero", [kept], (1, count)), (count,))

    def order(self, kept: ir.Value) -> ir.Value:
        first = self._cached(("axis",), "axis", torch.tensor(0, dtype=torch.int64))
        count = self._emit("CumSum", [kept, first], self._dims_of(kept))
        return self._emit("Sub", [count, self._numbers("one", [1])], self._dims_of(kept))

    def where(self, kept: ir.Value, x: ir.Value, other: ir.Value | None) -> ir.Value:
        if other is None:
            own = torch.float32 if x.dtype is None else tensor_adapters.to_torch_dtype(x.dtype)
            zero = torch.zeros((), dtype=own)
            other = self._cached(("zero", zero.dtype), "zero", zero)
        return self._emit("Where", [self.cast(kept, torch.bool), x, other], self._dims_of(x))

    def tiled(self, cells: ir.Value, tile: tuple[int, int], shape: tuple[int, int]) -> ir.Value:
        (high, wide), (rows, columns) = tile, shape
        parts = self.reshape(cells, (rows // high, 1, columns // wide, 1))
        wanted = (rows // high, high, columns // wide, wide)
        return self.reshape(
            self._emit("Expand", [parts, self._ints("shape", wanted)], wanted), (rows * columns,)
        )

    def lookup(self, table: ir.Value, indices: ir.Value) -> ir.Value:
        known, rows = self._dims_of(indices), self._dims_of(table)
        made = None if known is None or rows is None else (*known, *rows[1:])
        return self._emit("Gather", [table, indices], made, axis=0)

    def _less(self, whole: ir.Value, above: ir.Value, times: int) -> ir.Value:
        """`whole - times above`, of integers."""
        product = self._emit("Mul", [above, self._numbers("powers", [times])], self._dims_of(above))
        return self._emit("Sub", [whole, product], self._dims_of(whole))

    def _numbers(self, label: str, numbers: Sequence[int]) -> ir.Value:
        return self._cached(("numbers", *numbers), label, torch.tensor(list(numbers), dtype=torch.int32))

    def product_of_bytes(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value | None:
        """The product of `x`, rounded to bytes by its own range in every call, with a matrix of signed bytes.

        ONNX Runtime makes one operator of it.  None where the weight is no such.
        """
        if weight not in self._sources or not self._dynamic:
            return None
        values, scale, zero, rows = self._sources[weight]
        outputs = (self._dims_of(weight) or (None,))[0]
        if zero is not None or values in self._integers or rows not in {1, outputs}:
            return None
        self._forget(weight)
        read = self._dims_of(x)
        made = None if read is None else (*read[:-1], outputs)
        codes, step, middle = self._emit_all("DynamicQuantizeLinear", [x], (read, (), ()))
        whole = self._emit("MatMulInteger", [codes, self.permute(values, (1, 0)), middle], made)
        y = self._emit(
            "Mul", [self.cast(whole, torch.float32), self._emit("Mul", [step, scale], (rows,))], made
        )
        return y if bias is None else self._emit("Add", [y, bias], made)

    def _four_bits(self, packed: ir.Value, values: Tensor) -> ir.Value:
        """The integers as a constant of the type that holds two to a byte."""
        key = ("four bits", packed)
        if key not in self._rearranged:
            self._rearranged[key] = self._integer_constant(
                self._labels[packed], values, dict(packed.metadata_props)
            )
        return self._rearranged[key]

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
        zeros_fit = zero is None or zero.dtype == values.dtype
        first = _DEQUANTIZE_WORDS if values.dtype == ir.DataType.INT16 else _DEQUANTIZE_BY_ROW
        if self._opset >= first and zeros_fit:
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
