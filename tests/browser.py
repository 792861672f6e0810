"""A headless Chromium for tests of web pages; where there is none, or no playwright, the test is skipped."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def driver(text: str) -> bool:
    """Remarks of the graphics driver on its own speed, which no page is to blame for."""
    return "GL Driver Message" in text


@contextlib.contextmanager
def opened(path: Path, profile: Path) -> Iterator[tuple[Any, list[str]]]:
    """(the page of a file, opened without a network; what went wrong in it so far: errors and requests).

    Args:
        profile: a new folder.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    options = {"executable_path": program, "headless": True, "args": FLAGS, "offline": True}
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(str(profile), **options)
        try:
            page, faults = context.new_page(), []
            page.on("console", lambda message: driver(message.text) or faults.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: faults.append(f"error: {error}"))
            own = ("data:", "blob:", path.as_uri())
            page.on("request", lambda request: request.url.startswith(own) or faults.append(f"request: {request.url}"))
            page.goto(path.as_uri())
            yield page, faults
        finally:
            context.close()
