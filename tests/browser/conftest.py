"""A real browser: Debian's chromium, driven by Playwright. Where one of them is missing every test is skipped, with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.helpers.small_run import SmallRun, complete_run


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A running chromium, as `playwright.sync_api.Browser`."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    if find_spec("playwright") is None:
        pytest.skip("no playwright here: make test-browser installs it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox, as root has none; the pages are our own.
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty tab, 1300 wide, as `playwright.sync_api.Page`; no request may leave the machine, and no script may fail."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    tab, asked, errors = context.new_page(), list[str](), list[str]()
    context.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab
    context.close()
    hosts = {urlsplit(url).hostname for url in asked if url.startswith(("http", "ws"))}
    assert hosts <= {"127.0.0.1"}, sorted(asked)
    assert errors == []


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A whole run of a tiny model."""
    return complete_run(tmp_path_factory.mktemp("original"))
