"""Headless Chromium through the DevTools protocol over a pipe, for tests of pages: real keys and clicks, what
the console said, what was asked of the network."""
import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The protocol's pipe is at 3 and 4, whatever is open here
LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
CODES = dict(
    ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40, PageUp=33, PageDown=34, End=35, Home=36, Tab=9,
    Enter=13)


def high(descriptor):
    """The same open file, inheritable, at a number above those that the pipe takes."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return copy


class Browser:
    """A page in a browser of its own, a context manager. errors: what the console, uncaught exceptions and
    refused requests said; requests: every address but data: that was asked for."""

    def __init__(self, profile, width=1280, height=800, dark=False):
        ours_read, theirs_write = map(high, os.pipe())
        theirs_read, ours_write = map(high, os.pipe())
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
                   "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(theirs_read), str(theirs_write), CHROMIUM, *options],
            pass_fds=(theirs_read, theirs_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_read)
        os.close(theirs_write)
        self.reader = os.fdopen(ours_read, "rb")
        self.writer = os.fdopen(ours_write, "wb", buffering=0)
        self.unread = b""
        self.number = 0
        self.session = None
        self.errors = []
        self.requests = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.reader.close()
        self.writer.close()

    def message(self):
        """The next message of the browser; what it reports is noted."""
        while b"\0" not in self.unread:
            more = self.reader.read1(2**16)
            if not more:
                raise EOFError("the browser has ended")
            self.unread += more
        content, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(content)
        method = message.get("method")
        facts = message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(facts["exceptionDetails"]["exception"].get("description", str(facts)))
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.errors.append(str(facts["args"]))
        elif method == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.errors.append(facts["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not facts["request"]["url"].startswith("data:"):
            self.requests.append(facts["request"]["url"])
        return message

    def call(self, method, **arguments):
        """A command of the protocol -> its result."""
        self.number += 1
        command = dict(id=self.number, method=method, params=arguments)
        if self.session:
            command["sessionId"] = self.session
        self.writer.write(json.dumps(command).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                assert "error" not in message, (method, message)
                return message["result"]

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def each(self, selector, function):
        """A JavaScript function of all elements that a selector finds -> list of its values."""
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map({function})")

    def one(self, selector, function):
        """The same of the first of them."""
        return self.evaluate(f"({function})(document.querySelector({json.dumps(selector)}))")

    def text(self, selector):
        """The text in an element."""
        return self.one(selector, "x => x.textContent")

    def middle(self, selector):
        """-> where the middle of an element is, in the layout as it stands."""
        return self.one(selector, "x => { const box = x.getClientRects()[0]; "
                        "return {x: box.x + box.width / 2, y: box.y + box.height / 2} }")

    def wait(self, expression, seconds=60):
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.errors}"
            time.sleep(0.02)

    def settle(self):
        """Until what was chosen has been drawn."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def open(self, path):
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.wait("document.documentElement?.dataset.complete")

    def key(self, name):
        """Press a key, "ArrowLeft", "Tab", "h", ..."""
        code = CODES.get(name, ord(name[0].upper()))
        typed = "\r" if name == "Enter" else name if len(name) == 1 else ""
        self.call("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", key=name, text=typed,
                  windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)
        self.settle()

    def click(self, selector):
        """The left button in the middle of the element."""
        button = dict(button="left", clickCount=1, **self.middle(selector))
        self.call("Input.dispatchMouseEvent", type="mousePressed", **button)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **button)
        self.settle()

    def hover(self, selector):
        """The pointer over the middle of the element."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.middle(selector))
        self.settle()

    def screenshot(self, path, kind="png", **options):
        """The window as an image file."""
        data = self.call("Page.captureScreenshot", format=kind, **options)["data"]
        path.write_bytes(base64.b64decode(data))
