"""A small OpenAI-compatible server for tests of judges and models behind one."""

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint:
    """Says `text` to everything, until told otherwise: `answer` gets the number of the request and its body; it returns
    the status, the body and headers."""

    def __init__(self, text: str) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[int, dict[str, Any]], tuple[int, bytes, dict[str, str]]] = lambda n, body: reply(text)
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append({"path": self.path, **body})
                    endpoint.headers.append(dict(self.headers))
                    number = len(endpoint.requests)
                status, content, headers = endpoint.answer(number, body)
                if status == 0:  # the connection breaks
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                with contextlib.suppress(ConnectionError):  # a client that was killed, or that waits no longer
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def reply(text: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(), {}
