"""Rules of the house that no linter checks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 350


@pytest.mark.parametrize("folder", ["tdpass", "passes", "kernels"])
def test_no_file_has_more_lines_than_one_can_keep_in_mind(folder: str) -> None:
    files = [path for kind in ("py", "cpp", "h", "js", "css") for path in (ROOT / folder).rglob(f"*.{kind}")]
    assert files
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in long.items() if lines > LONGEST} == {}


@pytest.mark.parametrize("folder", ["tdpass", "passes", "kernels", "benchmarks"])
def test_no_conditional_expression_holds_another(folder: str) -> None:
    chained = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.IfExp)
        and any(isinstance(part, ast.IfExp) for part in (node.body, node.orelse))
    ]
    assert chained == []


def test_tests_are_collected_without_the_benchmarks_which_are_no_part_of_the_package() -> None:
    imported = {
        path.name: name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        for name in _imported(node)
        if name.partition(".")[0] == "benchmarks"
    }
    assert imported == {}


def _imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
