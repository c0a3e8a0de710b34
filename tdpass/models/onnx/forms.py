"""Which forms a layer of an ONNX model cannot have."""

from __future__ import annotations

from tdpass.form import STATIC, Form
from tdpass.numbers import numbers_named


def unreadable(form: Form, opset: int) -> str:
    """Why operators of that version do not read a layer in that form; empty where they do."""
    if form.activations == STATIC:
        return (
            "what is an integer there is a tensor of the graph, whatever reads it; run quantize-activations on "
            "the model"
        )
    since, text = max(((numbers_named(text).opset, text) for text in form.numbers), default=(0, ""))
    if since <= opset:
        return ""
    return (
        f"operators read {text} from opset {since} on, and the model has {opset}; store int8, or convert it"
    )
