"""Debian's Chromium, driven by playwright's Python package, for the tests that need a real page."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import plotly
import pytest

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    expect = sync_playwright = None

CHROMIUM = shutil.which("chromium")
MISSING = [name for name, there in (("playwright (extra ui)", sync_playwright), ("chromium", CHROMIUM)) if not there]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@contextmanager
def browser():
    """A headless Chromium."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses its sandbox to root
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


def listen(page, harmless=()):
    """A list that fills with what the page's console and scripts complain of, less what holds one of `harmless`."""
    found = []

    def hear(text):
        if not any(words in text for words in harmless):
            found.append(text)

    page.on(
        "console",
        lambda message: hear(f"{message.text} ({message.location['url']})") if message.type == "error" else None,
    )
    page.on("pageerror", lambda error: hear(str(error)))
    return found


def serve_plotly(page):
    """Figures in saved notebooks fetch plotly.js from its own site: here they get the package's."""
    file = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    page.route("https://cdn.plot.ly/*", lambda route: route.fulfill(path=file, content_type="text/javascript"))
