"""The HTML report in a real browser: no error, nothing wider than the screen, a click shows a site."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from test_html_report import report_of

from tdpass.html_report import render_html

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
)

PROBE = """
const found = { errors: [] };
addEventListener("error", (event) => found.errors.push(event.message));
addEventListener("DOMContentLoaded", () => {
  const cell = document.querySelectorAll(".cell")[1];
  cell.click();
  const details = document.getElementById("site-details");
  found.details = details.hidden ? "" : details.textContent;
  found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const outside = (box) => box.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
  found.cut = Array.from(document.querySelectorAll(".card, .scroll, .strip, .switch, nav")).filter(outside).length;
  const beyond = (box) => box.getBoundingClientRect().right > box.closest(".scroll").getBoundingClientRect().right + 1;
  found.bars = Array.from(document.querySelectorAll("#sites-table .bar")).filter(beyond).length;
  const wider = (label) => { const box = document.querySelector(`[aria-label="${label}"]`); return box.scrollWidth - box.clientWidth; };
  found.wider = ["Formats", "Two reports"].filter((label) => wider(label) > 1);
  const rows = () => Array.from(document.querySelectorAll("#sites-table tbody tr[id]:not([hidden])"), (row) => row.id);
  found.network = rows();
  document.querySelectorAll("#sites-table thead .number button")[1].click();
  found.sorted = rows();
  const filter = document.getElementById("filter");
  filter.value = "layer3.";
  filter.dispatchEvent(new Event("input"));
  found.filtered = rows();
  document.getElementById("theme").click();
  found.theme = document.documentElement.dataset.theme;
  parent.postMessage(JSON.stringify(found), "*");
});
"""

FRAME = """<script>addEventListener("message", (event) => document.body.setAttribute("data-found", event.data))</script>
<iframe src="report.html" width="{width}" height="900"></iframe>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("sites", [6, 74, 200])
def test_it_works_in_a_browser(tmp_path: Path, sites: int, width: int) -> None:
    text = render_html(report_of(sites), against=report_of(sites))
    text = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: f"<script>{PROBE}</script>", text
    )
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    frame = tmp_path / "frame.html"  # a window is never narrower than 500 pixels, a frame may be
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    assert BROWSER is not None
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        frame.as_uri(),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    match = re.search(r'data-found="([^"]*)"', dumped)
    assert match is not None, dumped[-2000:]
    found = json.loads(unescape(match[1]))
    assert found["bars"] == 0  # a bar that is cut would show a share that is none
    assert found["wider"] == []
    assert found["errors"] == []
    assert "layer1.conv" in found["details"]
    assert (found["wide"], found["cut"]) == (0, 0)
    assert len(found["sorted"]) == sites
    assert found["sorted"] != found["network"]
    assert found["filtered"] == ["site-3"]
    assert found["theme"] in ("light", "dark")
