"""Debian's chromium without a window: what a page becomes in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def run(page: Path, *options: str, width: int = 1280, height: int = 2000, dark: bool = False) -> str:
    """Load a page and give what chromium prints."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def framed(page: Path, width: int, height: int = 2000) -> Path:
    """A page with another one in a frame of that width: chromium's own window is never narrower than 500 pixels."""
    path = page.parent / f"framed-{page.name}"
    path.write_text(
        "<!DOCTYPE html><style>:root { color-scheme: light dark } iframe { border: 0 }</style><pre></pre>"
        "<script>onmessage = (event) => { document.querySelector('pre').textContent = event.data }</script>"
        f'<iframe src="{page.name}" width="{width}" height="{height}"></iframe>',
        encoding="utf-8",
    )
    return path


def ask(page: Path, question: str, width: int = 1280, dark: bool = False) -> Any:
    """The JSON value of an expression of JavaScript on a copy of a page that allows it to be asked."""
    probe = f"<script>onload = () => parent.postMessage(encodeURIComponent(JSON.stringify({question})), '*')</script>"
    copy = page.parent / f"asked-{page.name}"
    text = _POLICY.sub("", page.read_text(encoding="utf-8")).replace("</body>", f"{probe}</body>")
    copy.write_text(text, encoding="utf-8")
    dom = run(framed(copy, width), "--dump-dom", "--virtual-time-budget=3000", dark=dark)
    answer = re.search(r"<pre>(.+?)</pre>", dom, re.DOTALL)
    assert answer, "the question was not answered"
    return json.loads(unquote(html.unescape(answer[1])))
