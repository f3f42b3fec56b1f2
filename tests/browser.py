"""A real browser, where there is one, that reads a page as people see it."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.patience import PATIENCE

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

# What would run, load or break out if a text were taken for a part of the page; each leaves a word in the console.
HOSTILE = (
    "<script>console.error('owned 1');document.title='owned'</script>",
    '"><img src=x onerror="console.error(\'owned 2\');alert(1)">',
    "'><svg onload=console.error('owned 3')>",
    "</style></title></textarea><script>console.error('owned 4')</script><!--",
    "javascript:console.error('owned 5')",
    "<a href=\"javascript:console.error('owned 6')\" autofocus onfocus=console.error('owned 7')>x</a>",
    "url(http://192.0.2.1/x);}*{display:none}",
    "&lt;b&gt; &amp;#60;i&#62; ]]>",
    "\u202egnp.evil\u202c \u2066 \u200f \u0000",
)


@dataclasses.dataclass(frozen=True)
class Seen:
    """title and text: what a page says to people. tags: of all elements. console: what it complained of."""

    title: str
    text: str
    tags: tuple[str, ...]
    console: tuple[str, ...]


def look_at(path: Path, profile: Path) -> Seen:
    """Opens a page within another one, which asks it what it shows. profile: a folder for the browser's own files."""
    ask = (
        "const page = frames[0].document, say = (id, text) => document.getElementById(id).textContent = text;"
        "say('title', page.title); say('text', page.body.innerText);"
        "say('tags', [...page.querySelectorAll('*')].map(e => e.localName).join(' '));"
    )
    frame = path.with_name("frame.html")
    frame.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe src="{path.name}" width="1000"></iframe>'
        '<pre id="title"></pre><pre id="text"></pre><pre id="tags"></pre>'
        f"<script>addEventListener('load', () => {{{ask}}})</script>",
        encoding="utf-8",
    )
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0")
    reads = ("--allow-file-access-from-files", f"--user-data-dir={profile}", "--virtual-time-budget=2000")
    command = [str(BROWSER), *flags, *reads, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    title, text, tags = (
        html.unescape(re.search(rf'<pre id="{part}">(.*?)</pre>', done.stdout, re.S)[1])  # type: ignore[index]
        for part in ("title", "text", "tags")
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "dialog" in line.lower()]
    return Seen(title, text, tuple(tags.split()), tuple(console))
