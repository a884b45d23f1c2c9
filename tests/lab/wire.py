"""HTTP on the lab's addresses, and requests that go wrong on demand."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import trustme


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    content_type: str = "text/plain"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """See Aws.fail()."""

    what: str
    code: str
    status: int
    times: int
    how: str
    when: str
    seconds: float
    skip: int
    do: Callable[[], object] | None
    source: str
    says: Answer | None

    def strikes(self) -> bool:
        """Count a request that this fault concerns: is it to be spoilt?"""
        if self.times == 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= self.times > 0
        return True

    def deliver(
        self,
        connection: Handler,
        act: Callable[[], Answer],
        spoilt: Answer,
        stopped: threading.Event,
    ) -> None:
        """Spoil one request. `act` has its effects and makes the true answer; `spoilt` is the
        answer to give instead of it."""
        answer = act() if self.when == "after" or self.how == "truncate" else None
        if self.do:
            self.do()
        if self.how == "hang":
            if stopped.wait(self.seconds or None):
                return
            answer = answer or act()
        elif self.how == "answer":
            answer = spoilt
        elif self.how == "html":
            answer = Answer(200, b"<html><body><h1>Welcome</h1></body></html>", "text/html")
        elif self.how == "empty":
            answer = Answer(200)
        if answer is None or self.how in ("reset", "drop"):
            connection.close(reset=self.how == "reset")
        elif self.how == "truncate":
            connection.send(answer, cut=len(answer.body) // 2)
            connection.close()
        else:
            connection.send(answer)


@cache
def authority() -> trustme.CA:
    return trustme.CA(organization_name="lab")


@cache
def server_context(names: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(*names).configure_cert(context)
    return context


def come_first() -> None:
    """Let this thread, and those that it starts, run before all others of a busy machine.

    AWS does not share the processors of its instances. It is without effect for who is not root.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # in Linux, that of the calling thread


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one segment: no Nagle delay
    server: Listener
    sending: Callable[[int], None] = staticmethod(lambda status: None)  # told before each answer

    def log_message(self, *_: object) -> None:
        """Aws.calls and Aws.imds_calls are the log."""

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.answer(self, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _respond

    def send(self, answer: Answer, cut: int | None = None) -> None:
        """Send `answer`, or its head and the first `cut` bytes of its body."""
        self.sending(answer.status)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut])

    def close(self, reset: bool = False) -> None:
        self.wfile.flush()
        self.close_connection = True
        if reset:  # SO_LINGER with 0 s makes close() send RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


class Listener(ThreadingHTTPServer):
    """Answers at an address and port until stop(), which waits for no client."""

    def __init__(
        self,
        address: str,
        port: int,
        answer: Callable[[Handler, bytes], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answer = answer
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.request_queue_size = 512
        self._open: set[Any] = set()
        super().__init__((address, port), Handler)
        if tls:  # the handshake comes with the first read, in the connection's own thread
            self.socket = tls.wrap_socket(self.socket, True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        come_first()
        while self.fileno() >= 0:
            with contextlib.suppress(OSError):  # a client that is gone already, or stop()
                request, client = self.get_request()
                self._open.add(request)
                self.process_request(request, client)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)  # ends accept(); close() alone does not
        self.server_close()
        self._thread.join()
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
