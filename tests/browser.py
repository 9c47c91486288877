# SPDX-License-Identifier: MIT
"""A headless Chromium over its debugging pipe, for tests that look at a page as a user sees it. No packages needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

#: What is asked of a page once it is there: sizes, pictures, the colour that it is shown on.
LOOK = """
(async () => {
  document.querySelectorAll('details').forEach(each => { each.open = true; });
  await Promise.all([...document.images].map(each => each.decode().catch(() => null)));
  const outside = [...document.querySelectorAll('body *')].filter(each =>
    each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.scroll'));
  return JSON.stringify({
    width: innerWidth,
    scrollWidth: document.documentElement.scrollWidth,
    outside: outside.map(each => each.tagName + ' ' + each.textContent.slice(0, 40)),
    pictures: [...document.images].map(each => ({
      loaded: each.complete && each.naturalWidth > 0, width: each.clientWidth, source: each.currentSrc.length})),
    sources: [...document.images].map(each => each.currentSrc),
    background: getComputedStyle(document.body).backgroundColor,
    color: getComputedStyle(document.body).color,
    text: document.body.innerText,
  });
})()
"""


def find() -> str | None:
    """The browser's path, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Page:
    """One tab. ``problems`` holds every error that the page logged."""

    def __init__(self, commands: int, events: int) -> None:
        self.commands, self.events = os.fdopen(commands, "wb", 0), os.fdopen(events, "rb", 0)
        self.buffer, self.last, self.session = b"", 0, None
        self.problems: list[str] = []
        self.seen: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.last += 1
        message: dict[str, Any] = {"id": self.last, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == self.last:
                assert "error" not in reply, reply["error"]
                result: dict[str, Any] = reply["result"]
                return result

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            chunk = self.events.read(1 << 16)
            assert chunk, "the browser went away"
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method, params = message.get("method", ""), message.get("params", {})
        self.seen.append(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(params["entry"]))
        return message

    def open(self, path: Path, width: int, scheme: str) -> dict[str, Any]:
        """Shows the page so wide, light or dark. Returns what :data:`LOOK` sees."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.seen.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while "Page.loadEventFired" not in self.seen:
            self.receive()
        found = self.call("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
        seen: dict[str, Any] = json.loads(found["result"]["value"])
        return seen

    def screenshot(self, path: Path) -> None:
        """The whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(path: str) -> Iterator[Page]:
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()

    def connect() -> None:  # the browser reads from 3 and writes to 4
        reads, writes = os.dup(to_browser), os.dup(from_browser)
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [path, *options, "--remote-debugging-pipe", "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(from_us, to_us)
        finally:
            process.kill()
            process.wait()
