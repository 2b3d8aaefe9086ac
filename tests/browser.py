"""Headless Chromium, as tests look at pages with it."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (apt-get install chromium)")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--allow-file-access-from-files"),
)

Browser = Callable[..., str]


def browse(folder: Path) -> Browser:
    """Chromium with a new profile in `folder` each time: what it printed. It complains of a page only where that is
    expected."""

    def run(*arguments: str | Path, complaints: bool = False) -> str:
        profile = folder / f"profile-{len(list(folder.glob('profile-*')))}"
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert bool(found) == complaints, found
        return done.stdout

    return run


def framed(page: Path, script: str, width: int = 1400) -> str:
    """A page beside `page` that shows it `width` pixels wide, and what `script` says of its document `it`."""
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<iframe src="{page.name}" width={width} height=900 style="border: 0"></iframe><pre></pre><script>'
        f"onload = () => {{ const it = document.querySelector('iframe').contentDocument;"
        f"document.querySelector('pre').textContent = {script}; }}</script>"
    )
    return f"file://{frame}"


def said(dom: str) -> str:
    return html.unescape(re.findall(r"<pre>(.*)</pre>", dom, re.DOTALL)[0])


def pixels(path: Path) -> np.ndarray:
    """uint8 `[height, width, 3]`."""
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")
