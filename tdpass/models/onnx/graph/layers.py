"""Torch functions for layers: convolution, pooling, normalization, resizing, attention, dequantization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.kinds.pads import explicit_pads
from tdpass.models.onnx.graph.functions import NotServedError, Operator, numbers, serves
from tdpass.ops import padded_convolution

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _window(
    op: Operator, x: Tensor, kernel: Sequence[int]
) -> tuple[list[int], list[int], tuple[tuple[int, int], ...]]:
    """Strides, dilations and explicit pads."""
    axes = len(kernel)
    if not 1 <= axes <= 3:
        raise NotServedError
    stride, dilation = op.integers("strides") or [1] * axes, op.integers("dilations") or [1] * axes
    pads = explicit_pads(
        op.string("auto_pad", "NOTSET"), op.integers("pads") or (), x.shape[2:], kernel, stride, dilation
    )
    if pads is None:
        raise NotServedError
    return stride, dilation, pads


def _padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    return F.pad(x, [side for pair in reversed(pads) for side in pair], "constant", value)


@serves("Conv")
def _conv(op: Operator, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    stride, dilation, pads = _window(op, x, weight.shape[2:])
    if any(before != after or before < 0 for before, after in pads):
        return padded_convolution(x, weight, bias, stride, pads, dilation, op.integer("group", 1))
    return _CONV[len(pads) - 1](
        x,
        weight,
        bias,
        tuple(stride),
        tuple(before for before, _ in pads),
        tuple(dilation),
        op.integer("group", 1),
    )


@serves("ConvTranspose")
def _conv_transpose(op: Operator, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.dim() - 2
    if op.integers("output_shape") or op.string("auto_pad", "NOTSET") != "NOTSET" or not 1 <= axes <= 3:
        raise NotServedError
    flat = op.integers("pads") or [0] * (2 * axes)
    before, after = flat[:axes], flat[axes:]
    # torch pads both ends alike; what ONNX takes off the far end in excess is a negative output padding.
    extra = [
        o + b - a for o, b, a in zip(op.integers("output_padding") or [0] * axes, before, after, strict=True)
    ]
    stride, dilation = op.integers("strides") or [1] * axes, op.integers("dilations") or [1] * axes
    if any(e < 0 or e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise NotServedError
    return _CONV_TRANSPOSE[axes - 1](
        x, weight, bias, tuple(stride), tuple(before), tuple(extra), op.integer("group", 1), tuple(dilation)
    )


@serves("MaxPool")
def _max_pool(op: Operator, x: Tensor) -> Tensor:
    op.only_first_output()
    kernel = op.integers("kernel_shape") or []
    stride, dilation, pads = _window(op, x, kernel)
    if op.integer("ceil_mode"):
        raise NotServedError
    if any(before != after or 2 * before > k for (before, after), k in zip(pads, kernel, strict=True)):
        x, pads = _padded(x, pads, float("-inf")), ((0, 0),) * len(pads)
    return _MAX_POOL[len(kernel) - 1](x, kernel, stride, [before for before, _ in pads], dilation)


@serves("AveragePool")
def _average_pool(op: Operator, x: Tensor) -> Tensor:
    kernel = op.integers("kernel_shape") or []
    stride, dilation, pads = _window(op, x, kernel)
    counted = bool(op.integer("count_include_pad"))
    if op.integer("ceil_mode") or any(d != 1 for d in dilation):
        raise NotServedError
    if any(before != after or 2 * before > k for (before, after), k in zip(pads, kernel, strict=True)):
        if not counted:
            raise NotServedError
        x, pads = _padded(x, pads), ((0, 0),) * len(pads)
    return _AVERAGE_POOL[len(kernel) - 1](x, kernel, stride, [before for before, _ in pads], False, counted)


@serves("GlobalAveragePool")
def _global_average_pool(_op: Operator, x: Tensor) -> Tensor:
    return torch.mean(x, list(range(2, x.dim())), keepdim=True)


@serves("GlobalMaxPool")
def _global_max_pool(_op: Operator, x: Tensor) -> Tensor:
    return torch.amax(x, list(range(2, x.dim())), keepdim=True)


@serves("BatchNormalization")
def _batch_norm(
    op: Operator, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    op.only_first_output()
    if op.integer("training_mode") or not op.integer("spatial", 1):
        raise NotServedError
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, op.number("epsilon", 1e-5))


@serves("LayerNormalization")
def _layer_norm(op: Operator, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    op.only_first_output()
    shape = list(x.shape)[op.integer("axis", -1) :]
    if list(scale.shape) != shape:
        raise NotServedError
    return F.layer_norm(x, shape, scale, bias, op.number("epsilon", 1e-5))


@serves("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(op: Operator, x: Tensor, scale: Tensor) -> Tensor:
    op.only_first_output()
    shape = list(x.shape)[op.integer("axis", -1) :]
    if list(scale.shape) != shape:
        raise NotServedError
    return F.rms_norm(x, shape, scale, op.number("epsilon", 1e-5))


@serves("InstanceNormalization")
def _instance_norm(op: Operator, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, scale, bias, True, 0.0, op.number("epsilon", 1e-5))


@serves("GroupNormalization")
def _group_norm(op: Operator, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = op.integer("num_groups")
    if op.opset < 21:  # one number per group until then, one per channel since
        repeats = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    return F.group_norm(x, groups, scale, bias, op.number("epsilon", 1e-5))


@serves("LpNormalization")
def _lp_normalization(op: Operator, x: Tensor) -> Tensor:
    return F.normalize(x, float(op.integer("p", 2)), op.integer("axis", -1))


@serves("Attention")
def _attention(
    op: Operator, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Tensor | None
) -> Tensor:
    op.only_first_output()
    unusual = (
        op.number("softcap", 0.0)
        or op.integer("qk_matmul_output_mode")
        or any(value is not None for value in rest)
    )
    if q.dim() != 4 or unusual or (mask is not None and op.integer("is_causal")):
        raise NotServedError
    scale = op.number("scale", 0.0) or None
    return F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, bool(op.integer("is_causal")), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@serves("Resize", "Upsample")
def _resize(op: Operator, x: Tensor, *rest: Tensor | None) -> Tensor:
    roi, scales, sizes = _resize_inputs(op, rest)
    if (
        roi is not None
        and roi.numel()
        and op.string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    ):
        raise NotServedError
    if "axes" in op.attributes or op.integer("antialias") or not 3 <= x.dim() <= 5:
        raise NotServedError
    factors = [float(f) for f in scales.tolist()] if scales is not None and scales.numel() else None
    wanted = (
        numbers(sizes)
        if sizes is not None and sizes.numel()
        else [int(n * f) for n, f in zip(x.shape, factors or [], strict=True)]
    )
    if wanted[:2] != list(x.shape[:2]):
        raise NotServedError
    mode, place = op.string("mode", "nearest"), op.string("coordinate_transformation_mode", "half_pixel")
    if op.name == "Upsample" or op.opset == 10:
        place = "asymmetric"
    if mode == "nearest":
        whole = all(after % before == 0 for before, after in zip(x.shape[2:], wanted[2:], strict=True))
        rounding = op.string("nearest_mode", "floor" if op.opset < 11 else "round_prefer_floor")
        centred = place in ("half_pixel", "pytorch_half_pixel") and rounding == "round_prefer_floor"
        if not whole or not (centred or (place == "asymmetric" and rounding == "floor")):
            raise NotServedError
        return F.interpolate(x, wanted[2:], mode="nearest")
    smooth = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
    exact = factors is None or all(n * f == w for n, f, w in zip(x.shape, factors, wanted, strict=True))
    if (
        mode != "linear"
        or not exact
        or place not in ("half_pixel", "pytorch_half_pixel", "align_corners")
        or 1 in wanted[2:]
    ):
        raise NotServedError
    return F.interpolate(x, wanted[2:], mode=smooth, align_corners=place == "align_corners")


def _resize_inputs(
    op: Operator, rest: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Region, scale factors and sizes, which moved about between opsets."""
    if op.name == "Upsample" or op.opset == 10:
        if not rest:
            raise NotServedError
        return None, rest[0], None
    padded = (*rest, None, None, None)
    return padded[0], padded[1], padded[2]


@serves("DequantizeLinear")
def _dequantize(op: Operator, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if op.integer("block_size"):
        raise NotServedError
    factor, offset = (
        _along(scale, x, op.integer("axis", 1)),
        None if zero is None else _along(zero, x, op.integer("axis", 1)),
    )
    shifted = x.to(scale.dtype) if offset is None else x.to(scale.dtype) - offset.to(scale.dtype)
    return shifted * factor


@serves("QuantizeLinear")
def _quantize(op: Operator, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    kind = torch.uint8 if zero is None else zero.dtype
    if op.integer("block_size") or op.integer("output_dtype") or kind not in (torch.uint8, torch.int8):
        raise NotServedError
    limits = torch.iinfo(kind)
    level = torch.round(x / _along(scale, x, op.integer("axis", 1)))
    level = level if zero is None else level + _along(zero, x, op.integer("axis", 1)).to(x.dtype)
    return torch.clamp(level, limits.min, limits.max).to(kind)


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Numbers per slice of an axis, shaped to broadcast against `x`."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)
