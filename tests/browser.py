"""A real browser for tests: Debian's chromium without a window, spoken to in its DevTools protocol over a pipe.

https://chromedevtools.github.io/devtools-protocol/ names the methods.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH (Debian: apt-get install chromium)"
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-breakpad",
)
KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
LONGEST = 60  # seconds until an answer, on a machine with other work


class Left(Exception):
    """The page was left, or loaded again, before an expression had a value."""


class Browser:
    """One page in a window of 1280 x 800; what goes wrong in the page's script fails the test.

    Args:
        profile: an empty folder for the browser's own files.
    """

    def __init__(self, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        # Above 9, so that the shell below can make them 3 and 4, which chromium expects, in any order.
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1])]
        self._to, self._from = ours[1], theirs[0]
        start = f'exec "$0" "$@" 3<&{inherited[0]} 4>&{inherited[1]}'
        command = ["bash", "-c", start, CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        with open(profile / "chromium.log", "wb") as log:
            self._process = subprocess.Popen(
                command, pass_fds=inherited, stdout=log, stderr=log, start_new_session=True
            )
        for end in (*inherited, ours[0], theirs[1]):
            os.close(end)
        self._buffer, self._number, self._session = b"", 0, None
        self._loads, self.errors = 0, []
        self._target, self._looks = None, {"width": 1280, "height": 800}
        self._new_tab()

    def close(self) -> None:
        """End the browser and all of its processes."""
        os.close(self._to)
        os.close(self._from)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Give the window another size in pixels, and a scheme of colours."""
        self._looks = {"width": width, "height": height, "dark": dark}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path, view: str = "") -> None:
        """Load a file, with what the address says after "#"; in a new tab, since an old page may reload itself."""
        self._new_tab()
        self._load("Page.navigate", url=f"file://{path.resolve()}{view and '#'}{view}")
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")

    def reload(self) -> None:
        """Load the page again, as F5 does."""
        self._load("Page.reload")

    def go(self, view: str) -> None:
        """Write into the address of the open page what stands after "#"."""
        self(f"location.hash = {json.dumps(view)}")

    def back(self) -> None:
        """Go back by one entry of the history."""
        self("new Promise((go) => { addEventListener('popstate', go, { once: true }); history.back(); })")

    def wait(self, condition: str, seconds: float = LONGEST) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while True:
            with suppress(Left):
                if self(f"Boolean({condition})"):
                    return
            assert time.monotonic() < until, f"{condition}: not true within {seconds} seconds"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Click with the mouse on the first element of a selector, where a reader would see it."""
        where = f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{ block: "nearest" }}); const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        x, y = self(where)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press one of KEYS."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)

    def write(self, text: str) -> None:
        """Write where the focus is."""
        self._call("Input.insertText", text=text)

    def choose(self, control: str, value: str) -> None:
        """Choose an option of a <select>, whose list headless chromium does not open."""
        self(f"""{{
            const control = document.getElementById({json.dumps(control)});
            control.value = {json.dumps(value)};
            for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind, {{ bubbles: true }}));
        }}""")

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def __call__(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page; of a promise, what it gives."""
        given = {"expression": expression, "awaitPromise": True, "returnByValue": True, "replMode": True}
        answer = self._call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]["exception"]["description"]
        return answer["result"].get("value")

    def _new_tab(self) -> None:
        old, self._session = self._target, None
        self._target = self._call("Target.createTarget", url="about:blank")["targetId"]
        if old is not None:
            self._call("Target.closeTarget", targetId=old)
        self._session = self._call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self.resize(**self._looks)

    def _load(self, method: str, **given: Any) -> None:
        before = self._loads
        self._call(method, **given)
        self._until(lambda: self._loads > before)

    def _call(self, method: str, **given: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._to, json.dumps({"id": self._number, "method": method, "params": given} | session).encode() + b"\0"
        )
        number, answers = self._number, []
        self._until(lambda: answers, lambda message: message.get("id") == number and answers.append(message))
        error = answers[0].get("error", {}).get("message")
        if method == "Runtime.evaluate" and error in (
            "Inspected target navigated or closed",
            "Execution context was destroyed.",
        ):
            raise Left
        assert error is None, f"{method}: {error}"
        return answers[0]["result"]

    def _until(self, condition: Any, take: Any = lambda message: None) -> None:
        """Read messages until a condition holds."""
        until = time.monotonic() + LONGEST
        while not condition():
            *messages, self._buffer = self._buffer.split(b"\0")
            for message in map(json.loads, messages):
                take(message)
                self._note(message)
            if messages:
                continue
            ready, _, _ = select.select([self._from], [], [], max(until - time.monotonic(), 0))
            assert ready, f"no answer from {CHROMIUM} within {LONGEST} seconds"
            part = os.read(self._from, 1 << 20)
            assert part, f"{CHROMIUM} has ended"
            self._buffer += part

    def _note(self, message: dict[str, Any]) -> None:
        method, given = message.get("method"), message.get("params", {})
        if message.get("sessionId") != self._session:  # of a tab that was closed
            return
        if method == "Page.loadEventFired":
            self._loads += 1
        elif method == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.errors.append(given["entry"]["text"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block, whose pages must have thrown nothing."""
    opened = Browser(profile)
    try:
        yield opened
    finally:
        opened.close()
