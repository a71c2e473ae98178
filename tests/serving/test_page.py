"""The page in a real browser, which is driven over its DevTools protocol. Skipped where there is no Chromium."""

import itertools
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from websockets.sync.client import ClientConnection, connect

from serving.api import BodyLimits, create_app
from serving.refusal import not_ready
from serving.schema import LineInfo
from serving.scorer import LineScorer, LoadedLine
from serving.service import ScoringService
from tests.serving.lines import encoded, picture

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]
WAIT_S = 30


class Late(LineScorer):
    """A line that is not loaded until it is `here`."""

    here = False

    async def info(self) -> LineInfo:
        if not self.here:
            raise not_ready([self._info.line])
        return await super().info()


class Tab:
    """One tab of the browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """The result of a command of the protocol."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._socket.recv(timeout=WAIT_S))
            if said.get("id") == number:
                result: dict[str, Any] = said["result"]
                return result

    def value(self, expression: str) -> Any:
        """Of JavaScript in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def choose(self, *paths: Path) -> None:
        """Files, or folders as they are when dropped, for the page's input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)

    def texts(self, selector: str) -> list[str]:
        """Of the elements that fit, in their order."""
        found: list[str] = self.value(f"[...document.querySelectorAll({selector!r})].map(one => one.textContent)")
        return found


def until(holds: Callable[[], object]) -> None:
    """Returns as soon as it does; fails after `WAIT_S`."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def late(loaded: dict[str, LoadedLine]) -> Late:
    return Late(loaded["line-a"])


@pytest.fixture
def url(loaded: dict[str, LoadedLine], late: Late) -> Iterator[str]:
    """Of a service whose line-a is late and whose line-b is ready."""
    service = ScoringService({"line-a": late, "line-b": LineScorer(loaded["line-b"])})
    app = create_app(service, BodyLimits(2_000_000, seconds=60, at_once=8))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def tab(url: str, tmp_path: Path) -> Iterator[Tab]:
    """The page, opened."""
    assert BROWSER is not None
    profile = tmp_path / "profile"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    process = subprocess.Popen([BROWSER, *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = profile / "DevToolsActivePort"
        until(lambda: address.is_file() and len(address.read_text().splitlines()) == 2)
        port, path = address.read_text().splitlines()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as browser:
            targets = Tab(browser).call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        with connect(f"ws://127.0.0.1:{port}/devtools/page/{page}", max_size=None, proxy=None) as socket:
            tab = Tab(socket)
            until(lambda: tab.texts("#line option"))
            yield tab
    finally:
        process.terminate()
        process.wait(WAIT_S)


def test_a_line_that_is_late_appears_and_the_chosen_one_stays_chosen(tab: Tab, late: Late) -> None:
    assert tab.texts("#line option") == ["line-b"]
    late.here = True
    until(lambda: tab.texts("#line option") == ["line-a", "line-b"])
    assert tab.value("document.getElementById('line').value") == "line-b"
    assert "wtflow-line-b version 3" in tab.value("document.getElementById('about').textContent")


def test_photographs_are_scored_and_a_folder_is_explained(tab: Tab, tmp_path: Path) -> None:
    photo, folder = tmp_path / "photo.png", tmp_path / "folder"
    photo.write_bytes(encoded(picture(1)))
    folder.mkdir()
    tab.choose(photo)
    until(lambda: len(tab.texts("figcaption .flag")) == 1)
    assert "score" in tab.texts("figcaption")[0]
    tab.choose(folder)
    until(lambda: len(tab.texts("figcaption .flag")) == 2)
    newest = tab.texts("figcaption")[0]
    assert "cannot be read. In place of a folder, drop the photographs in it." in newest
    assert "Does it run?" not in newest
