"""tdpass report: a saved report, shown and rendered again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tdpass.cli.arguments import Verbs, add_verb
from tdpass.cli.output import Output
from tdpass.cli.values import file_ending
from tdpass.errors import UsageError
from tdpass.files import write_text
from tdpass.html_report import render_html
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report
from tdpass.terminal import report_view


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(
        verbs,
        "report",
        run,
        "show a saved report and render it as HTML",
        "tdpass report out/small.report.json -o report.html",
    )
    parser.add_argument(
        "report", metavar="DIR|REPORT.json", type=Path, help="a report.json, or the folder that holds one"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="REPORT.html",
        type=file_ending(".html", ".htm"),
        help="where the page goes (default: beside the report)",
    )
    parser.add_argument(
        "--against",
        metavar="DIR|REPORT.json",
        type=Path,
        help="another report of the same model, shown beside it",
    )


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Read, render and show."""
    path = _find(arguments.report)
    page: Path = arguments.output or path.with_suffix(".html")
    report = Report.load(path)
    beside = path.with_name(path.name.replace("report.json", "plan.json"))
    plan = RankPlan.load(beside) if beside != path and beside.is_file() else None
    against = None if arguments.against is None else Report.load(_find(arguments.against))
    write_text(page, render_html(report, plan, against))
    document = {"files": {"report.html": str(page)}, "report": json.loads(report.to_json())}
    out.show(document, lambda width: [*report_view(report, plan, width), "", f"wrote {page}"])
    return 0


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*report.json"))
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise UsageError(
            f"the folder {path} holds {len(found)} reports ({names}); name one file that ends in report.json"
        )
    return found[0]
