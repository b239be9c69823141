"""Headless Chromium, spoken to in its own protocol: what a visitor would do, and what the page said meanwhile."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--mute-audio",
    "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip
PATIENCE = 100.0


class Browser:
    """One tab.

    Attributes
    ----------
    requests : list of str
        Every address that was asked for.
    complaints : list of str
        Errors on the console, and exceptions.
    """

    def __init__(self, profile: Path, width: int = 1480, height: int = 1180) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
            stderr=subprocess.DEVNULL,
        )
        port_file = profile / "DevToolsActivePort"
        wait_for(lambda: port_file.is_file() and len(port_file.read_text().splitlines()) == 2, "chromium")
        port, path = port_file.read_text().splitlines()
        self._socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None)
        self._count, self._session = 0, ""
        (page,) = [x for x in self._call("Target.getTargets")["targetInfos"] if x["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def open(self, address: str) -> None:
        """Go there."""
        self._call("Page.navigate", url=address)

    def js(self, expression: str) -> Any:
        """The value of an expression on the page."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def text(self, selector: str) -> str:
        """What is written in the first such element; empty where there is none."""
        return str(self.js(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def until(self, expression: str) -> None:
        """Wait until an expression is true on the page."""
        wait_for(lambda: self.js(f"Boolean({expression})"), expression)

    def click(self, selector: str) -> None:
        """In the middle of the first such element."""
        self._press(*self._middle(selector))

    def drag(self, selector: str, share: float) -> None:
        """A slider, from where it is pressed to a share of its width, in steps as a hand would."""
        x, middle, width = self._box(selector)
        left = x - width / 2
        self._mouse("mousePressed", left + width / 2, middle)
        for step in range(1, 6):
            self._mouse("mouseMoved", left + width * (0.5 + (share - 0.5) * step / 5), middle)
        self._mouse("mouseReleased", left + width * share, middle)

    def type(self, selector: str, text: str) -> None:
        """Instead of what is in an input, then Enter."""
        self.js(f"document.querySelector({selector!r}).focus(); document.querySelector({selector!r}).select()")
        self._call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)

    def choose(self, selector: str, option: str) -> None:
        """An entry of a menu."""
        self.click(selector)
        first = "x.innerText.split('\\n')[0]"
        item = f"[...document.querySelectorAll('.q-menu .q-item')].find((x) => {first} === {option!r})"
        self.until(item)
        self.js(f"{item}.click()")

    def upload(self, selector: str, path: Path) -> None:
        """A file into a file input."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        """Of the whole page."""
        taken = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _middle(self, selector: str) -> tuple[float, float]:
        return self._box(selector)[:2]

    def _box(self, selector: str) -> tuple[float, float, float]:
        """Middle and width."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'nearest'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2, r.width]; })()"
        )
        return tuple(box)  # type: ignore[return-value]

    def _press(self, x: float, y: float) -> None:
        self._mouse("mousePressed", x, y)
        self._mouse("mouseReleased", x, y)

    def _mouse(self, kind: str, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            told = json.loads(self._socket.recv(PATIENCE))
            if told.get("id") == self._count:
                assert "error" not in told, told
                result: dict[str, Any] = told["result"]
                return result
            self._hear(told)

    def _hear(self, told: dict[str, Any]) -> None:
        method, params = told.get("method"), told.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(json.dumps(params["entry"]))


def wait_for(happened: Callable[[], Any], what: str) -> Any:
    """The first true value; an error where there is none in time."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if value := happened():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")
