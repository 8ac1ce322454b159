"""Headless Chromium by its DevTools protocol, over the pipe that it offers: no driver is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page.

    Arguments
    ---------
    profile : Path
        An empty folder.
    size : (int, int)
        Of the window in pixels.
    """

    def __init__(self, profile, size=(1200, 1300)):
        to_read, self.to_write = os.pipe()
        self.to_read, to_write = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-background-networking"
        flags += f" --remote-debugging-pipe --window-size={size[0]},{size[1]}"
        # Chromium reads from 3 and writes to 4; other shells know no descriptors above 9.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "sh", CHROMIUM, *flags.split(),
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.number, self.session = b"", 0, None
        self.requests, self.errors = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Network", "Page", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to_write)
        os.close(self.to_read)

    def call(self, method, timeout=60, **parameters):
        """Call a method of the protocol; events that come before its answer are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while True:
            answer = self._message(end)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _message(self, end):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.to_read], [], [], max(0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            got = os.read(self.to_read, 1 << 20)
            assert got, "Chromium has ended"
            self.buffer += got
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def _note(self, event):
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(event["params"]["exceptionDetails"])

    def evaluate(self, script):
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script, timeout=90):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + timeout
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.2)
        return value

    def upload(self, selector, path):
        """Choose a file in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def write(self, selector, text):
        """Type into a field."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        """Write a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
