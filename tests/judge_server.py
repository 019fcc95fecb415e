"""A stand-in for a judge model: a server at a local address that speaks as an OpenAI-compatible one does."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str], "str | int | tuple[int, str] | dict[str, Any] | bytes"]
"""From a question to the judge's words, to an HTTP status with an error's text, or to all of a document or page."""


class JudgeServer:
    """Counts what it is asked; `reply` may be changed while it runs."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    outer.times.append(time.monotonic())
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    found = outer.reply(body["messages"][-1]["content"])
                finally:
                    with outer._lock:
                        outer._now -= 1
                status, document = outer._document(found)
                answer = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                is_page = answer.startswith(b"<")
                self.send_header("Content-Type", "text/html" if is_page else "application/json")
                self.send_header("Content-Length", str(len(answer)))
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @staticmethod
    def _document(
        found: "str | int | tuple[int, str] | dict[str, Any] | bytes",
    ) -> tuple[int, dict[str, Any] | bytes]:
        if isinstance(found, dict | bytes):
            return 200, found
        if not isinstance(found, str):
            status, message = found if isinstance(found, tuple) else (found, "no")
            return status, {"error": {"message": message, "type": "error"}}
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": found},
        }
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        return 200, {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [choice],
            "usage": usage,
        }

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def judge_server(reply: Reply) -> Iterator[JudgeServer]:
    """Such a server, for a while."""
    server = JudgeServer(reply)
    server.start()
    try:
        yield server
    finally:
        server.stop()
