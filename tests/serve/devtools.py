"""One page of a headless Chromium, driven by the DevTools protocol over a pipe."""
from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class Page:
    """Open `url`; `value` evaluates an expression in it, `until` waits for one to be true."""

    def __init__(self, browser: str, url: str, profile: Path) -> None:
        read_commands, self._commands = os.pipe()
        self._replies, write_replies = os.pipe()
        # Chromium takes commands from descriptor 3 and replies on 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{read_commands} 4>&{write_replies} && exec "$@"', "-", browser, "--headless",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_commands, write_replies), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_commands)
        os.close(write_replies)
        self._buffer, self._calls = b"", 0
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._commands)
        os.close(self._replies)

    def value(self, expression: str) -> Any:
        found = self._call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        while not self.value(f"Boolean({expression})"):
            time.sleep(0.02)  # a promise of the page would be lost with a page that is replaced

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        call = dict(id=self._calls, method=method, params=parameters, **({"sessionId": session} if session else {}))
        os.write(self._commands, json.dumps(call).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                piece = os.read(self._replies, 1 << 16)
                assert piece, "the browser has ended"
                self._buffer += piece
            message, _, self._buffer = self._buffer.partition(b"\0")
            reply = json.loads(message)
            if reply.get("id") == self._calls:
                assert "error" not in reply or "context" in str(reply["error"]), reply  # while a page is replaced
                return dict(reply.get("result", {"result": {}}))
