"""A witness: a small HTTP server that counts what really arrived, in a process of its own.

A test of effects cannot ask the agent what it did: the agent is what is being killed. It asks the witness.

Invariants:
1. The witness lives outside the process group of whoever is killed, and ends when the process that started it ends
   (its standard input is a pipe from there).
2. A request is counted before it is answered, so a kill between the two leaves the count right.
3. A tool whose keys are honoured is applied once a key; every request is still counted.

    POST /<anything>        JSON object with "tool"; the header Idempotency-Key names the effect
                            -> {"applied": bool, "num_applied": int}
    GET  /seen?tool=&key=   -> {"arrivals": [{"tool", "key", "num_requests", "num_applied"}]}
    POST /control           {"delay_s": {tool: seconds}}: answer this tool's later requests so much later

``python -m agentckpt.testing.witness`` writes its address as the first line of standard output.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import IO, Any, cast

from ..errors import StoreError

MAX_BODY_BYTES = 1 << 20
MAX_DELAY_S = 60.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """What arrived for one (tool, key). ``num_applied`` is what the outside world felt."""

    tool: str
    key: str
    num_requests: int
    num_applied: int


class Counter:
    """The witness's memory; thread-safe."""

    def __init__(self, honoured: Sequence[str]) -> None:
        self._honoured = frozenset(honoured)
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._delay_s: dict[str, float] = {}

    def arrive(self, tool: str, key: str) -> tuple[bool, int, float]:
        """Count one request: (applied by this request, times applied so far, seconds to wait before the answer)."""
        with self._lock:
            counts = self._counts.setdefault((tool, key), [0, 0])
            applied = not (tool in self._honoured and key and counts[1])
            counts[0] += 1
            counts[1] += applied
            return applied, counts[1], self._delay_s.get(tool, 0.0)

    def delay(self, delays: dict[str, float]) -> None:
        with self._lock:
            self._delay_s.update(delays)

    def seen(self, tool: str | None = None, key: str | None = None) -> list[Arrival]:
        with self._lock:
            return [
                Arrival(t, k, *counts) for (t, k), counts in self._counts.items() if tool in (None, t) and key in (None, k)
            ]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    counter: Counter

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.path != "/seen":
            return self._answer(404, {"error": "only /seen can be asked"})
        query = dict(urllib.parse.parse_qsl(url.query))
        arrivals = self.counter.seen(query.get("tool"), query.get("key"))
        return self._answer(200, {"arrivals": [asdict(a) for a in arrivals]})

    def do_POST(self) -> None:
        try:
            body = self._body()
            if urllib.parse.urlsplit(self.path).path == "/control":
                self.counter.delay(_delays(body))
                return self._answer(200, {})
            tool = body["tool"]
            if not isinstance(tool, str):
                raise ValueError("tool must be text")
        except (ValueError, KeyError, TypeError) as error:
            self.close_connection = True  # what is left of a refused body must not be read as the next request
            return self._answer(400, {"error": str(error)})
        applied, num_applied, delay_s = self.counter.arrive(tool, self.headers.get("Idempotency-Key", ""))
        time.sleep(delay_s)
        return self._answer(200, {"applied": applied, "num_applied": num_applied})

    def _body(self) -> dict[str, Any]:
        size = int(self.headers.get("Content-Length", "0"))
        if not 0 <= size <= MAX_BODY_BYTES:
            raise ValueError(f"a body of {size} bytes; at most {MAX_BODY_BYTES} are taken")
        body = json.loads(self.rfile.read(size))
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        return body

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # whoever asked was killed while it waited: that is what the witness is for

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the count is the log."""


def _delays(body: dict[str, Any]) -> dict[str, float]:
    given = body["delay_s"]
    if not isinstance(given, dict):
        raise ValueError("delay_s must map tools to seconds")
    delays = {str(tool): float(seconds) for tool, seconds in given.items()}
    if any(not 0 <= seconds <= MAX_DELAY_S for seconds in delays.values()):
        raise ValueError(f"a delay is between 0 and {MAX_DELAY_S:.0f} s")
    return delays


class Witness:
    """A witness process that this process started; a context manager."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process = process
        self.url = url

    @classmethod
    def start(cls, *, honoured: Sequence[str] = (), timeout_s: float = 30.0) -> Witness:
        """Start one on a free port. ``honoured``: tools whose Idempotency-Key is respected. Raises ``StoreError``."""
        command = [sys.executable, "-m", "agentckpt.testing.witness", *(f"--honour={tool}" for tool in honoured)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )  # fmt: skip
        stdout = cast("IO[str]", process.stdout)
        ready, _, _ = select.select([stdout], [], [], timeout_s)
        url = stdout.readline().strip() if ready else ""
        if not url.startswith("http://"):
            process.kill()
            process.wait()
            _close_pipes(process)
            raise StoreError("the witness did not start", expected="its address on standard output", found=repr(url))
        return cls(process, url)

    @property
    def pid(self) -> int:
        return self._process.pid

    def seen(self, tool: str | None = None, key: str | None = None) -> list[Arrival]:
        """What arrived so far, in order of first arrival."""
        query = urllib.parse.urlencode({n: v for n, v in (("tool", tool), ("key", key)) if v is not None})
        with urllib.request.urlopen(f"{self.url}/seen?{query}", timeout=10) as answer:
            return [Arrival(**a) for a in json.load(answer)["arrivals"]]

    def num_requests(self, tool: str) -> int:
        return sum(arrival.num_requests for arrival in self.seen(tool))

    def delay(self, tool: str, seconds: float) -> None:
        """Answer later requests of this tool ``seconds`` after they were counted."""
        post(f"{self.url}/control", {"delay_s": {tool: seconds}})

    def close(self) -> None:
        """End the process. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        _close_pipes(self._process)

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def post(url: str, body: dict[str, Any], *, key: str | None = None, timeout_s: float = MAX_DELAY_S + 10) -> dict[str, Any]:
    """POST a JSON object and return the JSON answer. Raises ``OSError`` (``urllib.error.URLError``)."""
    headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key is not None else {})
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return cast("dict[str, Any]", json.load(answer))


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agentckpt.testing.witness", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--honour", action="append", default=[], metavar="TOOL", help="respect this tool's Idempotency-Key")
    options = parser.parse_args(arguments)
    handler = type("Handler", (_Handler,), {"counter": Counter(options.honour)})
    server = ThreadingHTTPServer(("127.0.0.1", options.port), handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while sys.stdin.read(1):  # ends when the starter ends
        pass
    server.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
