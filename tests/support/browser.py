"""A headless Chromium, spoken to by the WebDriver protocol; needs no package."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def is_there():
    return bool(shutil.which("chromedriver") and shutil.which("chromium"))


class Browser:
    """Opens pages, tells their console, runs scripts, takes screenshots."""

    def __init__(self, port, profile, flags=()):
        self._url = f"http://127.0.0.1:{port}"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, f"--user-data-dir={profile}", *flags],
        }
        session = self._ask(
            "POST",
            "/session",
            capabilities={
                "alwaysMatch": {
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"browser": "ALL"},
                }
            },
        )
        self._session = f"/session/{session['sessionId']}"

    def _ask(self, method, path, **content):
        request = urllib.request.Request(
            self._url + path,
            data=json.dumps(content).encode() if method == "POST" else None,
            headers={"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def command(self, name, **parameters):
        """Send a command of the DevTools protocol."""
        return self._ask("POST", f"{self._session}/goog/cdp/execute", cmd=name, params=parameters)

    def open(self, url, width, height=900, dark=False):
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("POST", f"{self._session}/url", url=url)

    def run(self, script):
        return self._ask("POST", f"{self._session}/execute/sync", script=script, args=[])

    def console(self):
        return self._ask("POST", f"{self._session}/se/log", type="browser")

    def screenshot(self, path, whole=True):
        data = self.command("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self._ask("DELETE", self._session)


@contextlib.contextmanager
def browser(profile):
    """Start Chromium with a profile of its own, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [shutil.which("chromedriver"), f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        page = None
        for _ in range(100):
            try:
                page = Browser(port, profile)
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield page
        page.close()
    finally:
        driver.terminate()
        driver.wait(20)
