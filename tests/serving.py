"""Run a server for a test, and talk to it over raw sockets, so that no client library smooths anything."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

import wmi

SECONDS = 10.0  # for one exchange; a server that hangs is seen as one


class Serving(NamedTuple):
    """A running server: where it is, and one exchange with it."""

    server: wmi.Server
    url: str
    host: str
    port: int

    def raw(self, text: bytes) -> bytes:
        """Send bytes on a connection of their own and return all that comes until its end."""
        return raw(self.host, self.port, text)

    def request(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request; return status, headers (names in lower case) and the body, decoded."""
        fields = {"Host": f"{self.host}:{self.port}", "Connection": "close", **(headers or {})}
        if body or method in ("PUT", "POST"):
            fields.setdefault("Content-Length", str(len(body)))
        lines = [f"{method} {target} HTTP/1.1", *map(": ".join, fields.items()), "", ""]
        return parse_answer(self.raw("\r\n".join(lines).encode("utf-8", "surrogateescape") + body))


@contextlib.contextmanager
def serving(
    storage: wmi.Storage, log: Callable[[str], object] = lambda line: None, send_buffer: int = 0, **options: Any
) -> Iterator[Serving]:
    """Serve a store on a port of the system's choice for as long as the block runs; log takes one line at a time.

    With a send_buffer the system takes so many bytes of what a client does not read, not some megabytes.
    """
    options.setdefault("host_names", None)
    server = wmi.Server(storage, port=0, log=lambda text: [log(line) for line in text.splitlines()], **options)
    with server:
        if send_buffer:
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        parts = urlsplit(server.url)
        yield Serving(server, server.url, str(parts.hostname), int(parts.port or 0))
        server.shutdown()
        with contextlib.suppress(OSError):  # a new client wakes it, or it would look 50 ms later
            socket.create_connection((str(parts.hostname), int(parts.port or 0)), SECONDS).close()


def raw(host: str, port: int, text: bytes) -> bytes:
    """Send bytes on a new connection and return all that comes until its end."""
    with socket.create_connection((host, port), timeout=SECONDS) as connection:
        connection.sendall(text)
        pieces = []
        with contextlib.suppress(ConnectionResetError):  # what came before a reset counts
            while True:
                piece = connection.recv(65536)
                if not piece:
                    break
                pieces.append(piece)
    return b"".join(pieces)


def read_answer(peer: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read exactly one answer that has a length; return status, fields and body."""
    text, flags = b"", 0 if hasattr(peer, "pending") else socket.MSG_PEEK  # TLS cannot look ahead
    while b"\r\n\r\n" not in text:
        ahead = text + peer.recv(65536 if flags else 1, flags)
        assert len(ahead) > len(text), f"the connection ended after {text!r}"
        end = ahead.find(b"\r\n\r\n") + 4
        text = text + peer.recv((end if end > 3 else len(ahead)) - len(text)) if flags else ahead
    status, fields, _ = parse_answer(text)
    body = b""
    while len(body) < int(fields.get("content-length", 0)):
        body += peer.recv(int(fields["content-length"]) - len(body)) or pytest.fail("the body is cut")
    return status, fields, body


def parse_answer(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and decoded body of the first answer in what a server sent."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    headers = {name.lower(): value for name, value in fields.items()}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunk(body)
    return int(status.split(" ")[1]), headers, body


def unchunk(body: bytes) -> bytes:
    """Return what a chunked body holds; one that is cut is an error."""
    pieces = []
    while True:
        size, found, body = body.partition(b"\r\n")
        assert found, "the chunked body is cut"
        length = int(size, 16)
        if not length:
            return b"".join(pieces)
        pieces.append(body[:length])
        assert body[length : length + 2] == b"\r\n", "the chunk is cut"
        body = body[length + 2 :]


def read_requests(pieces: Iterable[bytes]) -> Iterator[wmi.Request | None]:
    """Yield the requests that a reader finds in pieces that arrive one after the other, None where it waits."""
    reader = wmi.Reader()
    for piece in (*pieces, b""):
        reader.feed(piece)
        while (request := reader.read()) is not None:
            yield request
        yield None
