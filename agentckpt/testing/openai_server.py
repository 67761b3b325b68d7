"""A local server that speaks the OpenAI chat-completions API: scripted replies, and a count of what was asked.

A test of hosted models must know how often the model was really asked, and must get the same words every time.

Invariants:
1. A request is counted before it is answered, so a kill between the two leaves the count right.
2. A reply is a function of the script and the request; only ``id`` (``chatcmpl-<n>``, n the number of the request) tells two
   answers to the same request apart: who shows an id twice did not ask twice.
3. Nothing is scripted silently: a request that the script has no reply for is answered with status 400.

    POST <url>/chat/completions   model, messages, tools ...  -> a chat.completion object; streams are refused
    GET  <url>/models             the scripted model

The form of requests and answers: the public reference of the chat-completions endpoint.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

MAX_BODY_BYTES = 16 << 20
MAX_DELAY_S = 60.0
MODEL = "scripted-1"

Request = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; ``arguments`` are sent as JSON text."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. ``status`` other than 200 answers with an error of that status. ``delay_s`` passes after the count."""

    content: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    status: int = 200
    delay_s: float = 0.0


Script = Callable[[Request], Reply | None] | Sequence[Reply]


def by_assistant_turn(request: Request, replies: Sequence[Reply]) -> Reply | None:
    """The reply for a conversation that holds n assistant messages already is the n-th: a function of the request alone."""
    number = sum(isinstance(message, dict) and message.get("role") == "assistant" for message in request["messages"])
    return replies[number] if number < len(replies) else None


class ChatServer:
    """A server on a free port of this host, running from creation to ``close``; a context manager."""

    def __init__(self, script: Script) -> None:
        """``script``: what to answer to a request (None: status 400), or replies by the number of assistant messages so far."""
        self._script = script if callable(script) else (lambda request: by_assistant_turn(request, script))
        self._lock = threading.Lock()
        self._requests: list[dict[str, Any]] = []
        handler = type("Handler", (_Handler,), {"chat": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """For ``OpenAI(base_url=...)``."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def num_requests(self) -> int:
        """Completions asked for so far."""
        with self._lock:
            return len(self._requests)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The bodies asked so far, oldest first."""
        with self._lock:
            return list(self._requests)

    def count(self, request: dict[str, Any]) -> int:
        """Note one request; its number, from 1."""
        with self._lock:
            self._requests.append(request)
            return len(self._requests)

    def reply(self, request: Request) -> Reply | None:
        return self._script(request)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    chat: ChatServer

    def do_GET(self) -> None:
        if self.path.rstrip("/").endswith("/models"):
            return self._answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "test"}]})
        return self._answer(404, _error("there is only /chat/completions and /models"))

    def do_POST(self) -> None:
        try:
            request = self._body()
            if not self.path.split("?")[0].endswith("/chat/completions"):
                return self._answer(404, _error("there is only /chat/completions and /models"))
            if not isinstance(request.get("messages"), list) or not isinstance(request.get("model"), str):
                raise ValueError("model must be text and messages a list")
            if request.get("stream"):
                raise ValueError("streams are not scripted")
        except (ValueError, TypeError) as error:
            self.close_connection = True  # what is left of a refused body must not be read as the next request
            return self._answer(400, _error(str(error)))
        number = self.chat.count(request)
        reply = self.chat.reply(request)
        if reply is None:
            return self._answer(400, _error("the script has no reply for this request"))
        time.sleep(min(reply.delay_s, MAX_DELAY_S))
        if reply.status != 200:
            return self._answer(reply.status, _error("scripted failure"))
        return self._answer(200, completion(request, reply, number))

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
            self.close_connection = True  # whoever asked was killed while it waited

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the count is the log."""


def completion(request: Request, reply: Reply, number: int) -> dict[str, Any]:
    """The body of an answer. Usage counts words, so that it is a function of request and reply."""
    calls = [
        {
            "id": f"call_{number}_{index}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), sort_keys=True)},
        }
        for index, call in enumerate(reply.tool_calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    num_read = sum(len(str(each.get("content") or "").split()) for each in request["messages"] if isinstance(each, dict))
    num_written = len((reply.content or "").split()) + len(calls)
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls" if calls else "stop"}],
        "usage": {"prompt_tokens": num_read, "completion_tokens": num_written, "total_tokens": num_read + num_written},
    }


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
