"""A headless Chromium, spoken to through the DevTools protocol over two pipes: no port, no package."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on this machine; see `make browser`"
)

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and answers on 4.
WITH_PIPES = 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2'

Event = dict[str, Any]


class Browser:
    """One tab. `events` holds everything that the browser reported of the page, in order."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        self.events: list[Event] = []
        self._unread = b""
        self._last = 0
        self._session: str | None = None
        self._process = subprocess.Popen(
            ["sh", "-c", WITH_PIPES, "sh", CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self._last += 1
        number = self._last
        command: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._read()).get("id") != number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> Event:
        assert self._process.stdout is not None
        while b"\0" not in self._unread:
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            assert more, "chromium has ended"
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        event: Event = json.loads(message)
        if "method" in event:
            self.events.append(event)
        return event

    def wait_for(self, holds: Callable[[Event], bool]) -> None:
        while not any(map(holds, self.events)):
            self._read()

    def open(self, page: Path, *, width: int = 1200, dark: bool = False, scripts: bool = True) -> None:
        """Load a page from disk, as wide as said, and wait until it stands. Forgets earlier events."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        scheme = "dark" if dark else "light"
        self(
            "Emulation.setEmulatedMedia",
            media="",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
        self.wait_for(lambda event: event["method"] == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def requests(self) -> list[str]:
        """The addresses that the page has requested, except for itself and its embedded content."""
        asked = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked[1:] if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """Script errors, and what the console and the browser's log say."""
        kinds = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def content_width(self) -> float:
        return float(self("Page.getLayoutMetrics")["cssContentSize"]["width"])

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        image = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(image))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self("Browser.close")
        self._process.communicate(timeout=30)
