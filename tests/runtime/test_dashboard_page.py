"""The dashboard in a real browser: a flight runs, the page shows it, its buttons steer it."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from worldvln_edge.client import SessionClient
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.worldvln.worldvln_policy import PREVIEW_GRAPHS, load_policy

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (`make test` installs it)")
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1180, "height": 820})  # a tablet
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    yield page
    context.close()


@pytest.fixture
def policy(tiny_bundle: Path):
    policy = load_policy(tiny_bundle, side_graphs=PREVIEW_GRAPHS)
    yield policy
    policy.close()


def jpeg(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), shade, np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def colours(page: Page, canvas: str) -> int:
    """How many different ones a canvas shows."""
    return page.evaluate(
        """id => {
            const canvas = document.getElementById(id);
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(new Uint32Array(data.buffer)).size;
        }""",
        canvas,
    )


def test_page_shows_a_flight_and_its_hold_button_holds(page: Page, policy):
    hosts, failures = set(), []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
    points = policy.info.horizon.points
    with BackgroundServer(policy, dashboard=True) as server, SessionClient(server.url) as client:
        page.goto(f"{server.server.http_url}/dashboard")
        expect(page.locator("#link")).to_have_text("connected, no session")
        expect(page.locator("#key-form")).to_be_hidden()
        client.start("fly to the tower")
        client.observe([jpeg(90)])
        expect(page.locator("#link")).to_have_text("flying")
        expect(page.locator("#prompt")).to_have_value("fly to the tower")
        expect(page.locator("#camera-note")).to_have_text("frame 1")
        expect(page.locator("#camera")).to_have_js_property("naturalWidth", 64)
        expect(page.locator("#predicted-note")).to_contain_text("of segment 0")
        expect(page.locator("#predicted")).to_have_attribute("data-segment", "0")

        page.locator("#hold").click()
        expect(page.locator("#link")).to_have_text("held by operator")
        held = client.observe([jpeg(120)] * (points[1] - points[0]))
        assert held.hold == "operator"
        assert not held.actions.any()
        expect(page.locator("#notes li").first).to_have_text("holdsegment 1: operator")

        page.locator("#resume").click()
        expect(page.locator("#link")).to_have_text("flying")
        page.locator("#prompt").fill("turn back")
        page.locator("#send").click()
        expect(page.locator("#said")).to_have_text("new instruction: from the next segment on")
        expect(page.locator("#sessions option").first).to_have_text("turn back")
        assert client.observe([jpeg(150)] * (points[2] - points[1])).hold is None
        expect(page.locator("#progress")).to_contain_text(f"frame {points[2]} of {points[-1]}")
        expect(page.locator("#predicted")).to_have_attribute("data-segment", "2")
        for canvas in ("above", "path3d", "latency", "predicted"):
            assert colours(page, canvas) > 2, canvas
    expect(page.locator("#link")).to_contain_text("no connection")
    assert hosts <= {server.server.http_url.split("/")[2]} | {""}
    assert [text for text in failures if "ERR_CONNECTION_REFUSED" not in text] == []


def test_page_asks_for_the_key_and_goes_on_with_it(page: Page, policy):
    with BackgroundServer(policy, dashboard=True, keys=("the key",)) as server:
        page.goto(f"{server.server.http_url}/dashboard")
        expect(page.locator("#link")).to_have_text("a key is needed")
        page.locator("#key").fill("another key")
        page.locator("#key-form button").click()
        expect(page.locator("#key-error")).not_to_be_empty()
        page.locator("#key").fill("the key")
        page.locator("#key-form button").click()
        expect(page.locator("#link")).to_have_text("connected, no session")
        expect(page.locator("#key-form")).to_be_hidden()
