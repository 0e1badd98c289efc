"""A headless Chromium, driven by its DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Page:
    """One tab. `faults`: what its console said of errors, refused contents among them."""

    def __init__(self, connection: websocket.WebSocket) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self._loaded = False
        self.faults: list[str] = []
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])

    def _receive(self) -> dict[str, Any]:
        message = dict(json.loads(self._connection.recv()))
        kind = message.get("method")
        if kind == "Page.loadEventFired":
            self._loaded = True
        if kind == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.faults.append(message["params"]["entry"]["text"])
        if kind == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(message["params"]["exceptionDetails"]))
        return message

    def open(self, url: str, width: int = 1200, height: int = 860, dark: bool = False, phone: bool = False) -> None:
        """Go to an address, in a window of that size."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.send("Page.navigate", url=url)
        while not self._loaded:
            self._receive()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < deadline, f"{condition} did not come true; the page says: {self.text()}"
            time.sleep(0.05)

    def text(self, selector: str = "body") -> str:
        """What a person reads there."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element on the screen."""
        edges = self.run(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)}); "
            "element.scrollIntoView({block: 'nearest'}); "
            "const { x, y, width, height } = element.getBoundingClientRect(); "
            "return [x + width / 2, y + height / 2]; })()"
        )
        return float(edges[0]), float(edges[1])

    def click(self, selector: str) -> None:
        """Press the mouse there."""
        self.drag([self.middle(selector)])

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Hold the mouse from the first point to the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self, path: Path) -> None:
        """A screenshot, as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def chromium() -> Iterator[Page]:
    """A browser with one empty tab; skips the test where there is none."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here (Debian's package is called chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={folder}"]
        with open(Path(folder) / "log", "w") as log:
            process = subprocess.Popen([program, *options, "about:blank"], stdout=log, stderr=log)
        try:
            yield Page(_connect(Path(folder), process))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _connect(folder: Path, process: "subprocess.Popen[bytes]") -> websocket.WebSocket:
    port = folder / "DevToolsActivePort"
    deadline = time.monotonic() + 60
    while not (port.is_file() and len(port.read_text().split()) == 2):
        log = (folder / "log").read_text()[-2000:]
        assert process.poll() is None, f"Chromium ended: {log}"
        assert time.monotonic() < deadline, f"Chromium did not come up: {log}"
        time.sleep(0.1)
    number, path = port.read_text().split()
    browser = websocket.create_connection(f"ws://127.0.0.1:{number}{path}", timeout=60)
    browser.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
    target = ""
    while not target:
        message = json.loads(browser.recv())
        if message.get("id") == 1:
            target = message["result"]["targetId"]
    browser.close()
    return websocket.create_connection(f"ws://127.0.0.1:{number}/devtools/page/{target}", timeout=60)
