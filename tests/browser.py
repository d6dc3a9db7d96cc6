"""Chromium without a window, driven through its debugging protocol over a pipe.

The protocol needs no other package: JSON messages, each ended by a zero byte, over two pipes that
the browser expects as file descriptors 3 and 4.
"""

import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
)
_PATIENCE = 120  # seconds; a busy machine may be slow to start a browser


class Browser:
    """Browser with one page, which it opens and clicks on.

    Args:
      profile: empty folder for the files of the browser.

    Attributes:
      problems: messages of the console, uncaught exceptions, and log entries such as refused loads.
      requests: addresses of everything that the page has asked for, the page included.
    """

    def __init__(self, profile: Path):
        assert PROGRAM is not None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._number, self._rest, self._session, self._loaded = 0, b"", "", False
        (inner_read, self._write), (self._read, inner_write) = os.pipe(), os.pipe()
        # The shell can name any descriptors, while pass_fds keeps their numbers.
        line = f'exec "$@" 3<&{inner_read} 4>&{inner_write}'
        command = [PROGRAM, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *command],
            pass_fds=(inner_read, inner_write),
            env=os.environ | {"HOME": str(profile)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inner_read)
        os.close(inner_write)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result; events until then are collected."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, page: Path) -> None:
        """Opens a file and waits until it is loaded."""
        self._loaded = False
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def call(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression in the page; waits for a promise."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, element: str) -> None:
        """Clicks with the mouse on the element that a JavaScript expression names."""
        x, y = self.call(
            f"(() => {{ const e = {element};"
            " e.scrollIntoView({block: 'center', inline: 'center'});"
            " const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def look(self, width: int, scheme: str) -> None:
        """Sets the width of the window in pixels, and the color scheme: "light" or "dark"."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def close(self) -> None:
        """Ends the browser and waits for it."""
        os.close(self._write)  # the browser ends when its pipe does
        os.close(self._read)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], _PATIENCE)
            part = os.read(self._read, 1 << 16) if ready else b""
            assert part, f"{PROGRAM} has ended, or has not answered for {_PATIENCE} s"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        method, parameters = message.get("method"), message.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.problems.append(json.dumps(parameters))
        self._loaded = self._loaded or method == "Page.loadEventFired"
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        return message
