"""Hook of mkdocs: what pages cite from benchmarks/ stands in the site too, so all its links are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_IN_REPOSITORY = "](../benchmarks/"


def on_files(files: Files, *, config: Any) -> Files:
    """Add the tables of results, and what says how they were made."""
    cited = [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "benchmarks" / "results").glob("*.*"))]
    for path in cited:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead out of docs/ lead to these."""
    return markdown.replace(_IN_REPOSITORY, "](benchmarks/").replace("](../docs/", "](../")
