"""Drive a headless Chromium by its DevTools protocol, over two pipes, with the standard library alone."""

from __future__ import annotations

import base64
import json
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60.0  # for one answer of the browser, which may start beside busy neighbours
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--remote-debugging-pipe",
]


class Browser:
    """A browser with one page; `events` are what it told since the last load."""

    def __init__(self, profile: str) -> None:
        # The browser reads from descriptor 3 and writes to 4; each message ends with a NUL.
        words = [PROGRAM or "chromium", *OPTIONS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1', *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._number, self._session, self._login = 0, "", ("", "")
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    def _read(self) -> None:
        assert self._process.stdout
        text = b""
        while piece := self._process.stdout.read1(1 << 16):
            *messages, text = (text + piece).split(b"\0")
            for message in messages:
                self._messages.put(json.loads(message))

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and return its result."""
        number = self._send(method, **params)
        answer = self._wait(lambda message: message.get("id") == number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _send(self, method: str, **params: Any) -> int:
        assert self._process.stdin
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        return self._number

    def _wait(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while True:
            message = self._messages.get(timeout=max(0.0, until - time.monotonic()))
            self.events.append(message)
            if message.get("method") == "Fetch.requestPaused":
                self._send("Fetch.continueRequest", requestId=message["params"]["requestId"])
            elif message.get("method") == "Fetch.authRequired":  # the browser asks its user, once
                (user, password), self._login = self._login, ("", "")
                choice = "ProvideCredentials" if user else "CancelAuth"
                answer = {"response": choice, "username": user, "password": password}
                request = message["params"]["requestId"]
                self._send("Fetch.continueWithAuth", requestId=request, authChallengeResponse=answer)
            elif is_wanted(message):
                return message

    def wait_for(self, method: str) -> dict[str, Any]:
        """Return the parameters of the first event of this name since the last load, awaited if need be."""
        found = [event for event in self.events if event.get("method") == method]
        event = found[0] if found else self._wait(lambda message: message.get("method") == method)
        return event["params"]

    def said(self, *methods: str) -> list[dict[str, Any]]:
        """Return the parameters of all events of these names since the last load."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def load(self, url: str, width: int = 1280, dark: bool = False, login: tuple[str, str] | None = None) -> None:
        """Show a page of this width in CSS pixels, and wait until it is loaded; `login` is for the browser's dialog."""
        self._login = login or ("", "")
        if login:
            self.call("Fetch.enable", handleAuthRequests=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def value_of(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self) -> bytes:
        """Return the whole page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        """End the browser."""
        self._session = ""
        try:
            self.call("Browser.close")
            self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(SECONDS)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
