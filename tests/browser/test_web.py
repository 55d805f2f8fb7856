"""The web page in a real browser: submit a job, watch its curves move, cancel and resume it, compare two.

Needs Chromium (Debian: ``apt-get install chromium``); skipped without it. Screenshots go to ``$JACKPOT_SCREENSHOTS``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from server_world import Server, running_server, tiny_job

from jackpot.control_plane.tokens import Scope, TokenFile

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
    pytest.mark.timeout(TEST_SECONDS),
]
MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("web") / "data") as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    directory = Path(os.environ.get("JACKPOT_SCREENSHOTS", tmp_path / "screenshots"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def open_page(browser: Any, url: str, **settings: Any) -> Any:
    """A page that fails the test on a script error, and on anything loaded from elsewhere."""
    page = browser.new_context(**settings).new_page()
    page.set_default_timeout(1000 * PATIENCE_SECONDS)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda request: page.errors.append(request.url) if not request.url.startswith(url) else None)
    page.goto(url)
    return page


@pytest.mark.slow
def test_a_job_is_submitted_watched_cancelled_and_compared(
    server: Server, browser: Any, screenshots: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    page = open_page(browser, server.url)
    job = tiny_job(tmp_path, make_model, steps=4000, checkpoint_every=2)
    page.get_by_role("link", name="Submit a job").click()
    page.get_by_label("Job file").fill("name: tiny\npolcy: {}")
    page.get_by_role("button", name="Check").click()
    page.get_by_role("alert").get_by_text("Did you mean 'policy'?").wait_for()
    page.get_by_label("Job file").fill(json.dumps(job))
    page.get_by_label("Labels").fill("team=web")
    page.get_by_role("button", name="Submit", exact=True).click()
    page.wait_for_url("**/#/jobs/tiny-*")
    page.locator(".state.running").wait_for()
    reward = page.locator("figure").first
    server.wait_until(lambda: int(reward.get_attribute("data-points") or 0) >= 2, "a curve")
    before = int(reward.get_attribute("data-points") or 0)
    server.wait_until(lambda: int(reward.get_attribute("data-points") or 0) > before, "the curve to move")
    assert reward.locator("canvas").count() == 1
    assert "reward" in (reward.locator("[role=img]").get_attribute("aria-label") or "")
    page.locator(".sample .token").first.wait_for()
    page.screenshot(path=screenshots / "job-running.png", full_page=True)
    replicas = page.locator("#replicas")
    assert replicas.get_by_role("button", name="one rollout replica fewer").is_disabled()
    replicas.get_by_role("button", name="one rollout replica more").click()
    replicas.get_by_text("2 rollout replicas").wait_for()
    replicas.get_by_role("button", name="one rollout replica fewer").click()
    replicas.get_by_text("1 rollout replica").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.locator(".state.cancelled").wait_for()
    page.get_by_role("button", name="Resume").wait_for()
    assert page.locator("th", has_text="trained").count() == 1
    page.screenshot(path=screenshots / "job-cancelled.png", full_page=True)
    with server.client() as client:
        second = client.submit(job | {"seed": 1})
        client.cancel(second.id)
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.locator("svg.spark polyline").first.wait_for(state="attached")  # a flat one has no height
    for box in (page.get_by_label("compare tiny").nth(0), page.get_by_label("compare tiny").nth(1)):
        box.check()
    page.screenshot(path=screenshots / "jobs.png", full_page=True)
    page.get_by_role("link", name="Compare 2 jobs").click()
    page.get_by_role("heading", name="Comparison of 2 jobs").wait_for()
    page.locator("figure canvas").wait_for()
    page.screenshot(path=screenshots / "comparison.png", full_page=True)
    assert page.errors == []


def test_on_a_phone_in_the_dark_nothing_sticks_out_and_the_keyboard_reaches_everything(
    server: Server, browser: Any, screenshots: Path
) -> None:
    page = open_page(browser, server.url, viewport={"width": 360, "height": 740}, color_scheme="dark")
    page.get_by_role("heading", name="Jobs").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    reached = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"Jobs", "Submit a job", "filter-state", "filter-label"} <= reached
    unnamed = """[...document.querySelectorAll('input, select, textarea, button')].filter((one) => one.offsetParent &&
        !one.labels?.length && !one.ariaLabel && !one.textContent).length"""
    assert page.evaluate(unnamed) == 0
    page.screenshot(path=screenshots / "phone-dark.png", full_page=True)
    page.get_by_role("link", name="Submit a job").click()
    page.get_by_label("Job file").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.errors == []


def test_a_server_with_tokens_asks_for_one(browser: Any, tmp_path: Path) -> None:
    token = TokenFile(tmp_path / "data" / "tokens.json").create("me", Scope.READ, timedelta(hours=1))
    with running_server(tmp_path / "data") as server:
        page = open_page(browser, server.url)
        page.get_by_role("alert").get_by_text("Send a valid token").wait_for()
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Use it").click()
        page.get_by_text("No jobs. Submit one.").wait_for()
        assert page.errors == []
