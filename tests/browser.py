"""Look at a page in a real browser: headless Chromium, spoken to over a pipe by its DevTools protocol. No network."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
_ANSWER_S = 300.0


def find_browser() -> str | None:
    """A browser that can be driven; None where there is none."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One page of one browser. `problems` are the errors of scripts and the complaints of the console so far."""

    def __init__(self, read_end: int, write_end: int):
        self._read_end, self._write_end = read_end, write_end
        self._buffer, self._number, self._session = b"", 0, None
        self._events: list[str] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int = 1280, scheme: str = "light", media: str = "screen") -> None:
        """Open a file as on a screen of this width, in light or dark, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + _ANSWER_S
        while "Page.loadEventFired" not in self._events:
            self._receive(deadline)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def width(self) -> int:
        """Pixels that the page takes: more than the screen's where one has to scroll sideways."""
        return self.evaluate("document.documentElement.scrollWidth")

    def broken_images(self) -> int:
        """Images that are not shown."""
        return self.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length")

    def smallest_text(self) -> float:
        """Height in pixels of the smallest text of all plots; 1e9 where there is none."""
        heights = "[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"
        return self.evaluate(f"Math.min(...{heights}, 1e9)")

    def brightness(self) -> tuple[int, int]:
        """Of paper and ink, each from 0 for black to 765 for white."""
        colours = ("backgroundColor", "color")
        sums = (f"getComputedStyle(document.body).{colour}.match(/\\d+/g).map(Number)" for colour in colours)
        paper, ink = (self.evaluate(f"{numbers}.reduce((a, b) => a + b)") for numbers in sums)
        return paper, ink

    def screenshot(self, path: Path) -> None:
        """A picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def print_pdf(self, path: Path) -> None:
        """The page as it would be printed, on A4."""
        data = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_end, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read_end], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser has not answered for {_ANSWER_S:.0f} s"
            received = os.read(self._read_end, 1 << 20)
            assert received, "the browser has ended"
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._events.append(message.get("method", ""))
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(message["params"]))
        if message.get("method") == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.problems.append(f"asks the network for {url}")
        return message


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in a folder; it is ended with the block."""
    program = find_browser()
    assert program
    to_read, to_write = os.pipe(), os.pipe()  # the browser reads 3 and writes 4
    command = (
        'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"',  # bash, because descriptors are to have these numbers
        "bash",
        str(to_read[0]),
        str(to_write[1]),
        program,
        "--headless",
        "--remote-debugging-pipe",
        "--no-sandbox",  # tests may run as root in a container
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        f"--user-data-dir={profile}",
    )
    with (profile.parent / f"{profile.name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", *command], pass_fds=(to_read[0], to_write[1]), stdout=log, stderr=subprocess.STDOUT
        )
    os.close(to_read[0])
    os.close(to_write[1])
    try:
        yield Browser(to_write[0], to_read[1])
    finally:
        os.close(to_write[0])
        os.close(to_read[1])  # which ends it
        process.terminate()
        process.wait(timeout=30)
