"""A page in headless Chromium, through its DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from tornado.websocket import websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser():
    """The browser's command; the test is skipped where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or pytest.skip("needs Chromium to look at the pages")


class Page:
    """Opened by `async with Page(url, folder)`; folder is where the browser keeps its profile."""

    def __init__(self, url, folder, width=1280, height=900):
        self.url, self.folder, self.size, self.sent, self.events = url, folder, (width, height), 0, []

    async def __aenter__(self):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command = [find_browser(), *options, f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not (told := self.folder / "DevToolsActivePort").is_file() or "\n" not in told.read_text():
            await asyncio.sleep(0.1)
        port = told.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        self.socket = await websocket_connect(tab["webSocketDebuggerUrl"], max_message_size=1 << 28)
        for domain in ("Page", "Runtime", "DOM", "Network"):
            await self.call(f"{domain}.enable")
        await self.resize(*self.size)
        await self.call("Page.navigate", url=self.url)
        return self

    async def __aexit__(self, *error):
        self.process.terminate()
        self.process.wait()

    async def call(self, method, **parameters):
        self.sent += 1
        mine = self.sent
        await self.socket.write_message(json.dumps({"id": mine, "method": method, "params": parameters}))
        while (answer := json.loads(await self.socket.read_message())).get("id") != mine:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    async def run(self, code):
        """The value of JavaScript."""
        found = await self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not await self.run(f"!!({condition})"):
            assert time.monotonic() < deadline, f"{condition}: {await self.run('document.body.innerText')}"
            await asyncio.sleep(0.1)

    async def resize(self, width, height, density=1):
        options = {"width": width, "height": height, "deviceScaleFactor": density, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **options)

    async def choose(self, selector, path):
        """Choose a file in an <input type="file">."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    async def drag(self, start, end):
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            options = {"x": x, "y": y, "button": "left", "buttons": int(kind != "mouseReleased"), "clickCount": 1}
            await self.call("Input.dispatchMouseEvent", type=kind, **options)

    async def picture(self, path):
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"]))
