"""The table of support as a page: `python tests/support/page.py` writes docs/support.md anew."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "models")]

import onnx_layers  # noqa: E402, F401 - fills the table
import torch_layers  # noqa: E402, F401 - fills the table
from cells import CELLS, FRONT_ENDS  # noqa: E402

PAGE = "support.md"
_HEAD = """# What is a site

A kind of layer in every line, a front end in every column. "yes": its weights are sites, and at full rank the model answers as
before. "left": it stays as it is, for that reason. An empty place was not tried. Every place is a test (`tests/support`).
Attention and recurrent layers of torch modules become linear layers in the pass `divide`, which is in every default pipeline."""


def page() -> str:
    """The page, in Markdown."""
    layers = dict.fromkeys(layer for layer, _ in CELLS)
    lines = [["layer", *FRONT_ENDS], ["---"] * (1 + len(FRONT_ENDS))]
    lines += [[layer, *(_text(layer, front_end) for front_end in FRONT_ENDS)] for layer in layers]
    count = f"{len(CELLS)} places, {sum(not cell.left for cell in CELLS.values())} of them yes."
    return "\n\n".join([_HEAD, "\n".join(f"| {' | '.join(line)} |" for line in lines), count]) + "\n"


def _text(layer: str, front_end: str) -> str:
    cell = CELLS.get((layer, front_end))
    return "" if cell is None else cell.text


if __name__ == "__main__":
    (HERE.parents[1] / "docs" / PAGE).write_text(page())
