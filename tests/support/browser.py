"""A headless Chromium, driven through chromedriver by the W3C's WebDriver protocol (HTTP and JSON)."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
# Whatever the page asks of another machine fails.
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


class Browser:
    """One window; a context manager. Element arguments are CSS selectors."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory()
        self.driver = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for line in self.driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                self.url = f"http://127.0.0.1:{found[1]}"
                break
        options = {"binary": CHROMIUM, "args": [*OPTIONS, OFFLINE, f"--user-data-dir={self.profile.name}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            session = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        except Exception:
            self._stop()
            raise
        self.url += f"/session/{session['sessionId']}"
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._send("DELETE", "")
        finally:
            self._stop()

    def _stop(self) -> None:
        self.driver.terminate()
        self.driver.wait(30)
        self.driver.stdout.close()
        self.profile.cleanup()

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(json.load(e)["value"]["message"]) from None

    def _post(self, path: str, body: Any) -> Any:
        return self._send("POST", path, body)

    def open(self, url: str) -> None:
        self._post("/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """What a script's `return` gives; a promise is waited for."""
        return self._post("/execute/sync", {"script": script, "args": args})

    def wait(self, script: str, seconds: float = 20) -> Any:
        """What a script gives as soon as that is neither false nor empty, and at last whatever it gives."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return value

    def devtools(self, command: str, **params: Any) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": command, "params": params})

    def view(self, width: int, height: int, dark: bool = False) -> None:
        """Size of the page in CSS pixels, and what it is told of light or dark."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def hover(self, selector: str, right: float = 0.5, down: float = 0.5) -> None:
        """Bring the pointer to a place of an element, in parts of its size."""
        x, y = self._place(selector, right, down)
        self._pointer(*(_move(x + d, y) for d in (3, 0)))

    def drag(self, selector: str, begin: float, end: float) -> None:
        """Press, move to the right and release, halfway down an element; in parts of its width."""
        (x, y), (to, _) = (self._place(selector, right, 0.5) for right in (begin, end))
        press, release = ({"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp"))
        self._pointer(_move(x, y), press, *(_move(x + (to - x) * part / 4, y) for part in (1, 2, 3, 4)), release)

    def _place(self, selector: str, right: float, down: float) -> list[float]:
        return self.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const b = e.getBoundingClientRect();"
            "return [b.x + b.width * arguments[1], b.y + b.height * arguments[2]];",
            selector,
            right,
            down,
        )

    def _pointer(self, *actions: dict) -> None:
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": actions}
        self._post("/actions", {"actions": [pointer]})

    def press(self, selector: str, keys: str) -> None:
        """Focus an element and type; WebDriver's code points are the special keys."""
        self.run("document.querySelector(arguments[0]).focus()", selector)
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def console(self) -> list[str]:
        """Messages since the last call, errors of the page and of its requests among them."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def screenshot(self, path: Path, whole_page: bool = False) -> None:
        options = {"captureBeyondViewport": whole_page, "format": "png"}
        if whole_page:
            width, height = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
            options["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        Path(path).write_bytes(base64.b64decode(self.devtools("Page.captureScreenshot", **options)["data"]))


def _move(x: float, y: float) -> dict:
    return {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 20}
