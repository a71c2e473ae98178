"""A proxy in front of an S3 server that answers some requests wrongly, as networks and servers do."""

import http.client
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
ANSWERS = {
    "500": (500, "InternalError", "We encountered an internal error"),
    "503": (503, "SlowDown", "Please reduce your request rate"),
    "400": (400, "InvalidArgument", "Invalid argument: partNumber"),
    "403": (403, "AccessDenied", "Access Denied"),
    "501": (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
Fault = Callable[[str, str], str | None]
"""(method, path with query) -> what to do wrong: a key of `ANSWERS`, or `slow`, `cut`, `short`, `long`, `flip`,
`garbage`; `whole`: forget the query; None: nothing."""


class Proxy(ThreadingHTTPServer):
    """Forwards to `upstream`, a port of this machine. `done` counts the faults, `asked` the requests."""

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.fault: Fault = lambda method, path: None
        self.done: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:  # every method comes here
        with self.server.lock:
            self.server.asked[self.command] += 1
            fault = self.server.fault(self.command, self.path)
            self.server.done[fault or ""] += 1
        if fault in ANSWERS:
            status, code, message = ANSWERS[fault]
            body = b"" if self.command == "HEAD" else ERROR.format(code=code, message=message).encode()
            self.answer(status, [], body)
            return
        status, headers, body = self.forwarded(self.path.partition("?")[0] if fault == "whole" else self.path)
        match fault:
            case "flip":
                body = body[:-1] + bytes([body[-1] ^ 1])
            case "garbage":
                body = b"<html>a login page" + bytes(20)
            case "short":
                body = body[: len(body) // 2]
        self.answer(status, headers, body, fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def forwarded(self, path: str) -> tuple[int, list[tuple[str, str]], bytes]:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        upstream.request(self.command, path, body=sent, headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        return answer.status, answer.getheaders(), body

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str | None = None) -> None:
        left_out = {"connection", "transfer-encoding", "date", "server"}
        if self.command != "HEAD":
            left_out.add("content-length")
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in left_out:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body) + (7 if fault == "long" else 0)))
        self.end_headers()
        half = len(body) // 2 if fault in ("slow", "cut") else len(body)
        try:
            self.wfile.write(body[:half])
            if fault == "slow":
                self.server.stopped.wait(5)
        except OSError:
            pass
        if fault in ("slow", "cut", "long"):
            self.close_connection = True
            self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def proxy(upstream: int) -> Iterator[Proxy]:
    """A running proxy."""
    server = Proxy(upstream)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
