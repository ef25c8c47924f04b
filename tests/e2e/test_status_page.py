"""The pages for people, in a real browser: /status under real load, and /docs."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from config.sources import ROOT
from tests.debian import BROWSER
from tests.e2e.browser import Browser
from tests.e2e.server import Server, wait_until

KEY = "sk-people-and-browsers"
STREAMS = 4
CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.skipif(
    BROWSER.path() is None and BROWSER.may_be_missing,
    reason="no Chromium: `make test` fetches it from Debian's packages where apt-get can",
)


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    server = Server(f"--api_key=people={KEY}")
    server.http.headers["Authorization"] = f"Bearer {KEY}"
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def browser() -> Iterator[Browser]:
    opened = Browser()
    opened.password = ("anybody", KEY)
    try:
        yield opened
    finally:
        opened.close()


class Load:
    """Streams that are asked for again as soon as they end."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(STREAMS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._server.url, timeout=120, headers={"Authorization": f"Bearer {KEY}"}) as client:
            asked = 0
            while not self._done.is_set():
                asked += 1
                words = f"Tell me story {asked} of number {number}."
                body = {"messages": words, "max_tokens": 40, "ignore_eos": True, "stream": True}
                with suppress(httpx.TransportError), client.stream("POST", CHAT, json=body) as response:
                    for _ in response.iter_raw():
                        if self._done.is_set():
                            return


def text(browser: Browser, element: str) -> str:
    return str(browser.run(f"document.getElementById('{element}').textContent"))


def paths(browser: Browser, plot: str) -> list[str]:
    """The lines of a plot, as SVG draws them."""
    found = browser.run(f"[...document.querySelectorAll('#{plot} path')].map((path) => path.getAttribute('d'))")
    assert isinstance(found, list)
    return found


def keep(name: str, picture: bytes) -> None:
    """A picture of something: no small file. Where SCREENSHOTS names a folder it is left there."""
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    if folder := os.environ.get("SCREENSHOTS"):
        (Path(folder) / name).write_bytes(picture)


PLOTS = ("plot-throughput", "plot-requests", "plot-first", "plot-gap")


def test_the_page_shows_real_load_and_a_death_as_they_come(own_server: Server, browser: Browser):
    browser.open(f"{own_server.url}/status")
    browser.wait_for("document.getElementById('state').textContent === 'Ready'", "the state")
    assert "SmolLM2" in text(browser, "model")
    assert text(browser, "http") == "2"
    with Load(own_server):
        running = f"Number(document.getElementById('running').textContent) === {STREAMS}"
        browser.wait_for(running, "all streams to run")
        browser.wait_for("document.querySelectorAll('#plot-gap path').length === 2", "the last plot")
        browser.wait_for("Number(document.getElementById('throughput').textContent) > 1", "tokens")
        assert all(paths(browser, plot) for plot in PLOTS)
        before = {plot: paths(browser, plot) for plot in PLOTS}
        for plot in PLOTS:
            wait_until(lambda plot=plot: paths(browser, plot) != before[plot], f"{plot} to move", 30)
        assert "ms" in text(browser, "gap") or "s" in text(browser, "gap")
        assert own_server.worker()["restarts"] == 0
        psutil.Process(own_server.worker()["pid"]).kill()
        dead = "/Dead|Starting|Loading/.test(document.getElementById('workers').textContent)"
        browser.wait_for(dead, "the death on the page")
        browser.wait_for("document.getElementById('state').textContent === 'Ready'", "the worker to be back", 120)
        browser.wait_for(running, "the streams to go on")
        row = browser.run("[...document.querySelectorAll('#workers tr > *')].map((cell) => cell.textContent)")
        assert row[6] == "1", row
        assert row[7] not in ("", "none"), row
        faults = text(browser, "faults")
        assert "Deaths of model workers1" in faults
        # A client that was between two requests at that moment had none to be taken up.
        assert re.search(rf"Requests taken up again[1-{STREAMS}](?!\d)", faults), faults
        keep("status.png", browser.screenshot(whole=True))
        browser.prefer("dark")
        keep("status-dark.png", browser.screenshot(whole=True))
    assert browser.problems == []


def test_it_fits_a_phone_and_a_screen_in_light_and_dark(own_server: Server, browser: Browser):
    browser.open(f"{own_server.url}/status")
    browser.wait_for("document.querySelector('#workers td') !== null", "the table")
    colours = set()
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        colours.add(browser.run("getComputedStyle(document.body).backgroundColor"))
        for width in (320, 390, 768, 1280, 2200):
            browser.resize(width, 800)
            assert browser.run("document.documentElement.scrollWidth") <= width, (scheme, width)
            assert browser.run("document.querySelector('#plot-gap svg').getBoundingClientRect().width") > 200
    assert len(colours) == 2
    assert browser.problems == []


def test_it_can_be_used_without_a_mouse_and_read_without_eyes(own_server: Server, browser: Browser):
    browser.open(f"{own_server.url}/status")
    browser.wait_for("document.querySelector('#plot-requests svg').getAttribute('aria-label').includes('running 0')",
                     "the plot in words")  # fmt: skip
    assert browser.run("document.documentElement.lang") == "en"
    assert browser.run("document.getElementById('state').getAttribute('role')") == "status"
    assert browser.run("[...document.querySelectorAll('th')].every((cell) => cell.scope)") is True
    assert browser.run("[...document.querySelectorAll('progress')].every((bar) => bar.ariaLabel)") is True
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "pause"
    browser.press("Enter")
    assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    browser.press("Enter")
    assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "false"
    browser.press("Tab")
    assert browser.run("document.activeElement.getAttribute('role')") == "region"


def test_without_the_key_there_is_nothing_to_see(own_server: Server, browser: Browser):
    browser.password = None
    browser.call("Fetch.enable", handleAuthRequests=True)
    browser.open(f"{own_server.url}/status")
    assert browser.run("document.querySelector('h1')") is None
    assert "API key" in str(browser.run("document.body.textContent"))


def test_a_server_that_is_gone_is_told(browser: Browser):
    server = Server()
    try:
        server.wait_ready()
        browser.password = None
        browser.open(f"{server.url}/status")
        browser.wait_for("document.getElementById('state').textContent === 'Ready'", "the state")
        server.stop()
        browser.wait_for("document.getElementById('state').textContent === 'No answer'", "the news")
        assert "has not answered since" in text(browser, "notice")
        assert browser.run("document.getElementById('notice').hidden") is False
    finally:
        if server.process.poll() is None:
            server.stop()


def test_the_page_about_the_api_is_whole_on_a_screen_and_on_a_phone(own_server: Server, browser: Browser):
    browser.open(f"{own_server.url}/docs")
    assert browser.run("document.querySelector('main h2').textContent") == "chat"
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    for width in (320, 390, 768, 1280):
        browser.resize(width, 800)
        assert browser.run("document.documentElement.scrollWidth") <= width, width
    keep("docs.png", browser.screenshot())
    links = browser.run(
        "[...document.querySelectorAll('a[href^=\"#\"]')]"
        ".filter((each) => !document.getElementById(each.hash.slice(1))).length"
    )
    assert links == 0
    assert browser.problems == []


def test_the_documents_have_a_picture_of_the_page():
    picture = (ROOT / "docs" / "status.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 20_000 < len(picture) < 500_000
