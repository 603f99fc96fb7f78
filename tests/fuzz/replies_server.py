"""A server on this machine that answers whatever a case tells it to: one for the whole process."""

import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS, CHAT, COMPLETIONS, METRICS = "/v1/models", "/v1/chat/completions", "/v1/completions", "/metrics"
ENDLESS = 5 << 28  # bytes


@dataclass(frozen=True)
class Reply:
    """One HTTP reply; `pieces` are sent one after the other."""

    pieces: Iterable[bytes] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Any, **headers: str) -> "Reply":
        return cls([json.dumps(document).encode()], headers=headers)


Maker = Callable[[dict[str, Any]], Reply]  # from the request's JSON


class Scripted:
    """The running server; `answers` says what each path is answered with, until it is changed."""

    def __init__(self) -> None:
        self.answers: dict[str, Reply | Maker] = {}
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, asked: dict[str, Any]) -> None:
                found = script.answers.get(self.path, Reply(status=404))
                reply = found if isinstance(found, Reply) else found(asked)
                self.send_response(reply.status)
                for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for piece in reply.pieces:
                        self.wfile.write(piece)
                except OSError:  # the client has seen enough
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


@functools.cache
def server() -> Scripted:
    return Scripted()


@dataclass(frozen=True)
class Endless:
    """A body without an end, as far as a client should ever read; can be sent again."""

    piece: bytes

    def __iter__(self) -> Iterator[bytes]:
        block = self.piece * (65536 // len(self.piece))
        for _ in range(ENDLESS // len(block)):
            yield block
