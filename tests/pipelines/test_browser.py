"""The pages in a real headless browser: nothing is complained of, nothing asked of a network, everything can be read.

Any Chromium or Chrome on PATH will do (apt install chromium); without one these tests are skipped. It is driven by its
own protocol over two pipes, so nothing else is needed.
"""

import fcntl
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from olavlm.config import PipelineConfig
from pipelines.app import Server
from pipelines.compare import compare
from pipelines.report import report
from pipelines.see import MAP, Column, Row, TaskView, Tile

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESKTOP = 380, 1280  # CSS pixels

# Of every text that is seen: the ratio of its colour's luminance to its background's (WCAG 2, 1.4.3).
CONTRASTS = """(() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const paper = e => { for (; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  } return [255, 255, 255]; };
  const found = [];
  for (const e of document.body.querySelectorAll('*')) {
    if (e.closest('svg, script') || !e.getClientRects().length) continue;
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(parts(getComputedStyle(e).color)), light(paper(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.tagName + '.' + e.className + ' ' + e.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
})()"""


class Browser:
    """A headless Chromium, spoken to in messages that end with a zero byte."""

    def __init__(self, binary: str, profile: Path) -> None:
        # above 3 and 4, where the browser expects them
        (self._in, out), (into, self._out) = (
            [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends] for ends in (os.pipe(), os.pipe())
        )
        self._process = subprocess.Popen(
            [binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
             "--disable-background-networking", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=lambda: (os.dup2(into, 3), os.dup2(out, 4)),
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(out)
        os.close(into)
        self._unread, self._calls = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Ask for something and return the result; what happens meanwhile is kept in `events`."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._calls:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, method: str) -> None:
        """Until this has happened."""
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            more = os.read(self._in, 2**20)
            assert more, "the browser has ended"
            self._unread += more
        message, self._unread = self._unread.split(b"\0", 1)
        return dict(json.loads(message))

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


class Tab:
    """A page as someone has it before their eyes."""

    def __init__(self, browser: Browser, url: str, width: int, dark: bool = False, scripts: bool = True) -> None:
        self.browser, self.url = browser, url
        browser.events.clear()
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        browser.wait("Page.loadEventFired")

    def call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, self.session, **params)

    def value(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def problems(self) -> list[str]:
        """What the page complained of, and whatever it asked for but itself."""
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        found = []
        for event in self.browser.events:
            match event["method"], event.get("params"):
                case "Runtime.exceptionThrown", params:
                    found.append(f"exception: {params['exceptionDetails']['text']}")
                case "Runtime.consoleAPICalled", params if params["type"] in ("error", "warning", "assert"):
                    found.append(f"console: {params['args']}")
                case "Log.entryAdded", params if params["entry"]["level"] in ("error", "warning"):
                    found.append(f"log: {params['entry']['text']}")
                case "Network.requestWillBeSent", params:
                    url = params["request"]["url"]
                    if not url.startswith("data:") and url.split("#")[0] != self.url.split("#")[0]:
                        found.append(f"request: {url}")
        return found

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser on PATH ({', '.join(BROWSERS)}): apt install chromium")
    started = Browser(binary, tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


Visit = Callable[..., Tab]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens a file or URL in a tab of its own."""
    tabs: list[Tab] = []

    def visit(page: Path | str, width: int = DESKTOP, **options: Any) -> Tab:
        tabs.append(Tab(browser, page if isinstance(page, str) else page.as_uri(), width, **options))
        return tabs[-1]

    yield visit
    for tab in tabs:
        tab.close()


def check(tab: Tab, width: int) -> None:
    """What holds of every page."""
    assert tab.problems() == []
    assert tab.value("document.documentElement.scrollWidth") <= width
    contrast, where = tab.value(CONTRASTS)
    assert contrast >= 4.5, where
    assert tab.value("[...document.images].every(image => image.complete && image.naturalWidth)"), "broken images"


LOOKS = [(DESKTOP, False), (PHONE, True)]


@pytest.mark.usefixtures("finished_run")
def test_a_report(visit: Visit, config: PipelineConfig) -> None:
    page = report(config)
    for width, dark in LOOKS:
        check(visit(page, width, dark=dark), width)
    bare = visit(page, scripts=False)
    assert bare.value(f"{SEEN}.length") == 24
    assert bare.value("document.querySelector('#filter').getClientRects().length") == 0
    browse(visit(page))
    linked = visit(f"{page.as_uri()}#reply-cv_bench-3d-14")
    assert linked.value("document.querySelector(':target').getClientRects().length") == 1


SEEN = "[...document.querySelectorAll('.reply')].filter(e => e.getClientRects().length)"


def browse(tab: Tab) -> None:
    """Choose replies by keyboard, and by a link from the table of scores."""
    assert tab.value(f"{SEEN}.length") == 6  # the first task's
    for name, key, times in (("task", "ArrowUp", 1), ("outcome", "ArrowDown", 2)):  # all; unanswered, wrong
        tab.value(f"document.querySelector('[name={name}]').focus()")
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                code = {"ArrowUp": 38, "ArrowDown": 40}[key]
                tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
    assert tab.value(f"{SEEN}.every(e => e.dataset.outcome === 'wrong')")
    assert tab.value(f"{SEEN}.length") == 4
    assert tab.value("document.querySelector('output').value") == "4 of 24 shown"
    tab.value("document.querySelector('td a[href=\"#replies-cv_bench-depth\"]').click()")
    shown = "[...document.querySelectorAll('section.task')].filter(e => !e.hidden).map(e => e.id)"
    tab.value("new Promise(done => setTimeout(done))")
    assert tab.value(shown) == ["replies-cv_bench-depth"]
    assert tab.problems() == []


def test_runs_side_by_side(visit: Visit, finished_run: Path, tmp_path: Path) -> None:
    page = compare([finished_run, Path(shutil.copytree(finished_run, tmp_path / "other"))])
    for width, dark in LOOKS:
        check(visit(page, width, dark=dark), width)


FLAWS = {
    '<script>console.error("planted")</script>': "console",
    "<script>throw new Error('planted')</script>": "exception",
    '<img src="http://127.0.0.1:9/planted.png" alt="">': "127.0.0.1:9",
    '<link rel="stylesheet" href="http://127.0.0.1:9/planted.css">': "127.0.0.1:9",
    "<script>fetch('http://127.0.0.1:9/planted').catch(() => 0)</script>": "127.0.0.1:9",
    '<style>body { background: url("http://127.0.0.1:9/planted.png") }</style>': "127.0.0.1:9",
    '<div style="width: 2000px">planted</div>': "<= 380",
    '<p style="color: #999">planted</p>': "planted",
    '<img src="data:image/png;base64,AAAA" alt="">': "images",
}


def test_these_checks_find_what_they_are_for(visit: Visit, config: PipelineConfig, tmp_path: Path) -> None:
    """Also where the page's own content policy, which blocks any request, is gone."""
    (tmp_path / "run").mkdir()
    text = report(config).read_text()
    page = tmp_path / "flawed.html"
    for guarded in (text, text.replace("Content-Security-Policy", "X-None")):
        page.write_text(guarded)
        check(visit(page, PHONE), PHONE)
        for flaw, said in FLAWS.items():
            page.write_text(guarded.replace("</main>", f"{flaw}</main>"))
            with pytest.raises(AssertionError, match=said):
                check(visit(page, PHONE), PHONE)


class Desk:
    """Stands in for the students, which have tests of their own."""

    folder = seeing = "student"
    missing = ""

    def ask(self, image: Image.Image, question: str) -> tuple[str, list[TaskView]]:
        tile = Tile(np.zeros((8, 8, 3), np.uint8), "below")
        columns = [Column(f"layer {i}", torch.zeros(1, 2)) for i in range(8)]  # more than a phone is wide
        view = TaskView("depth", tile.picture, columns, [Row(MAP, [tile] * 8, True)], ["a note"])
        return f"{question} {image.size}", [view]


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_the_app(visit: Visit, tmp_path: Path, width: int, dark: bool) -> None:
    Image.new("RGB", (30, 20), "green").save(tmp_path / "image.png")
    with Server(Desk(), "127.0.0.1", 0) as server:  # type: ignore[arg-type]
        threading.Thread(target=server.serve_forever).start()
        try:
            tab = visit(server.address, width, dark=dark)
            check(tab, width)
            document = tab.call("DOM.getDocument")["root"]["nodeId"]
            field = tab.call("DOM.querySelector", nodeId=document, selector="[name=image]")["nodeId"]
            tab.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "image.png")])
            tab.browser.events.clear()
            tab.value("document.querySelector('textarea').value = 'How big?'; document.querySelector('button').click()")
            tab.browser.wait("Page.loadEventFired")
            check(tab, width)
            assert tab.value("document.querySelector('.answer').textContent") == "How big? (30, 20)"
            assert tab.value("document.querySelector('textarea').value") == "How big?"
        finally:
            server.shutdown()
