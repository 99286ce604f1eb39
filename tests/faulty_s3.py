"""A proxy in front of the real S3 server that fails chosen requests in the ways that S3 does."""

import http.client
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.seaweed import S3Server

SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
# Only what is read has a body to be cut.
_FAULTS = ("busy", "reset", "lost", "half")
_SILENT_SHARE = 0.2
_SILENT_SECONDS = 30.0  # more than clients wait for an answer
Chooses = Callable[[str, str], str | None]


@dataclass
class FaultyS3:
    """`choose` gives the fault for a method and a path, or None; `asked` are all requests.

    "busy" is 503 SlowDown, "reset" ends the connection unanswered, "lost" does so after the request
    was served, "half" sends half of a body, "silent" answers nothing for as long as clients wait.
    """

    server: S3Server
    choose: Chooses = lambda method, path: None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def fail(self, fault: str, *, times: int, method: str = "", path: str = "") -> None:
        """Fail the next so many requests of this method whose path holds this text."""
        left = [fault] * times

        def choose(its_method: str, its_path: str) -> str | None:
            meant = its_method == (method or its_method) and path in its_path
            return left.pop() if meant and left else None

        self.choose = choose

    def fail_for(self, fault: str, seconds: float, *, method: str, path: str) -> None:
        """Fail every such request for so long, counted from the first."""
        began: list[float] = []

        def choose(its_method: str, its_path: str) -> str | None:
            if its_method != method or path not in its_path:
                return None
            began.append(time.monotonic())
            return fault if time.monotonic() - began[0] < seconds else None

        self.choose = choose

    def fail_by_chance(self, chance: random.Random, share: float, *, silent: int = 0) -> None:
        """Fail this share of all requests, each in any way that it can fail, few by silence.

        Of so many requests in a row one fails, so that no run goes without.
        """
        left, places, lock = [None] * silent, _one_of(round(1 / share), chance), threading.Lock()

        def choose(method: str, path: str) -> str | None:
            with lock:
                fails = next(places)
            if not fails:
                return None
            if left and chance.random() < _SILENT_SHARE:
                left.pop()
                return "silent"
            return chance.choice(_FAULTS if method == "GET" else _FAULTS[:-1])

        self.choose = choose


def _one_of(count: int, chance: random.Random) -> Iterator[bool]:
    """Yield for ever, of so many in a row, one true."""
    while True:
        chosen = chance.randrange(count)
        yield from (place == chosen for place in range(count))


@contextmanager
def faulty_s3(server: S3Server) -> Iterator[tuple[FaultyS3, str]]:
    """The faults to set, and the endpoint of the proxy; requests keep their signed host."""
    faulty = FaultyS3(server)
    handler = type("Handler", (_Proxy,), {"faulty": faulty})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield faulty, f"http://127.0.0.1:{proxy.server_port}"
        finally:
            proxy.shutdown()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultyS3

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faulty.choose(self.command, self.path)
        self.faulty.asked.append((self.command, self.path, fault))
        if fault == "busy":
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
        elif fault in ("reset", "silent"):
            time.sleep(_SILENT_SECONDS if fault == "silent" else 0.0)
            self.close_connection = True
        else:
            self._forward(body, fault)

    def _forward(self, body: bytes, fault: str | None) -> None:
        behind = http.client.HTTPConnection(urlsplit(self.faulty.server.endpoint).netloc)
        behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            behind.putheader(name, value)
        behind.endheaders(body)
        answer = behind.getresponse()
        content, headers = answer.read(), dict(answer.getheaders())
        behind.close()
        if fault == "lost":
            self.close_connection = True
        else:
            self._answer(answer.status, headers, content, half=fault == "half")

    def _answer(
        self, status: int, headers: dict[str, Any], content: bytes, *, half: bool = False
    ) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", len(content))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        self.close_connection = self.close_connection or half

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""
