"""Which forms a layer of an ONNX model cannot have."""

from __future__ import annotations

from tdpass.form import ALL, DYNAMIC, STATIC, Form
from tdpass.numbers import numbers_named
from tdpass.supports import support_named

_DYNAMIC = 11  # DynamicQuantizeLinear


def unreadable(form: Form, opset: int) -> str:
    """Why operators of that version do not read a layer in that form; empty where they do."""
    if form.activations == STATIC:
        return (
            "what is an integer there is a tensor of the graph, whatever reads it; run "
            "quantize-activations on the model"
        )
    supports = [text for text in form.support.split(",") if text not in ("", ALL)]
    needs = [(numbers_named(text).opset, text, "store int8, or ") for text in form.numbers]
    needs += [(support_named(text).opset, text, "") for text in supports]
    needs += [(_DYNAMIC, "ranges of every call", "")] if form.activations == DYNAMIC else []
    since, text, instead = max(needs, default=(0, "", ""))
    if since <= opset:
        return ""
    return f"operators read {text} from opset {since} on, and the model has {opset}; {instead}convert it"
