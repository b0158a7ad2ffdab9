"""A browser without a window, for the tests and the screenshots of the pages: whichever Chromium or Chrome the machine has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""No window, and nothing that a browser does by itself on the network."""


def installed() -> str | None:
    """Where a browser is; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser of playwright's, closed at the end.

    Raises:
        FileNotFoundError: there is none.
    """
    from playwright.sync_api import sync_playwright

    path = installed()
    if path is None:
        raise FileNotFoundError(f"no browser: none of {', '.join(NAMES)} is installed")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        try:
            yield made
        finally:
            made.close()


def address(path: Path) -> str:
    return path.resolve().as_uri()
