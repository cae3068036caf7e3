"""What of an executed notebook does not fit a laptop's screen, by JupyterLab's styles, in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
# Leaves an output the 934 pixels, and its figures the 914, that they have in JupyterLab at 1366 with its file
# browser open.
WINDOW = "--window-size=1071,768"
MEASURE = """<style>html {overflow-y: scroll}</style><script>addEventListener('load', () => {
  const found = [], name = e => e.innerText.trim().slice(0, 40);
  document.querySelectorAll('.jp-Cell').forEach((cell, i) => {
    const add = text => found.push(`cell ${i}: ${text}`);
    for (const out of cell.querySelectorAll('.jp-OutputArea-output, .jp-RenderedMarkdown')) {
      const tables = [...out.querySelectorAll('table')].map(e => e.offsetWidth);
      const wide = Math.max(out.scrollWidth, ...[...out.children].map(e => e.scrollWidth));
      if (wide > out.clientWidth + 1 || Math.max(0, ...tables) > 934) add(`${wide} px of 934`);
    }
    for (const out of cell.querySelectorAll('.jp-OutputArea-output')) {
      for (const img of out.querySelectorAll('img'))
        if (parseInt(img.style.width) > 914) add(`a figure of ${img.style.width} shrinks`);
      for (const table of out.querySelectorAll('table')) for (const e of table.querySelectorAll('th, td')) {
        const range = document.createRange();
        range.selectNodeContents(e);
        const lines = new Set([...range.getClientRects()].map(r => Math.round(r.top)));
        if (lines.size > 1) add(`"${name(e)}" wraps`);
        if (name(e) === '...') add('a table leaves columns or rows out');
      }
    }
  });
  document.documentElement.textContent = 'FOUND' + JSON.stringify(found) + 'END';
});</script>"""


def browser() -> str | None:
    """The path of a Chromium or Chrome; None without one, RuntimeError where CI is set."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI"):
        raise RuntimeError(f"no browser found ({', '.join(BROWSERS)})")
    return found


def overflow(notebook: Any, path: str) -> list[str]:
    """What is wider than its cell in an executed notebook, and what wraps or is left out in its tables."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", mathjax_url="", require_js_url="", jquery_url="")
    page, _ = exporter.from_notebook_node(notebook)
    page = re.sub(r"<script[^>]*src=[^>]*></script>", "", page)  # nothing is fetched
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page.replace("</head>", f"{MEASURE}</head>", 1), "utf-8")
        command = [path, "--headless", *FLAGS, f"--user-data-dir={folder}/profile"]
        command += [WINDOW, "--timeout=60000", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    answer = re.search(r"FOUND(.*)END", done.stdout, re.S)
    if answer is None:
        raise RuntimeError(f"{path} measured nothing: {done.stderr[-1000:]}")
    found: list[str] = json.loads(html.unescape(answer[1]))
    return found
