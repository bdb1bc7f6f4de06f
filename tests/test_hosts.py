"""Who is let in: the addresses that are listened on, the hosts that are served there, and pages of browsers."""

from __future__ import annotations

import os
import signal
import socket

import pytest
from serving import parse_answer, serving
from support import (
    ACCOUNT,
    CLOSE,
    GET,
    SECONDS,
    head,
    rest,
)

import wmi

pytestmark = pytest.mark.usefixtures("quiet")


def test_nobody_else_is_let_in_by_default(unserved):
    """A server that is told no address, and a listener, are for this machine only."""
    assert unserved.url.startswith("http://127.0.0.1:")
    with wmi.listen(port=0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_ipv6(storage, log):
    """The server listens on ::1, and its URL has the brackets that clients need."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with serving(storage, host="::1", log=log.append) as served:
        assert served.url.startswith("http://[::1]:")
        assert wmi.Client(served.url, ACCOUNT).show("wmi-one")["id"] == "wmi-one"
    assert " ::1 " in log[0]


def test_ipv6_command(command):
    """`serve --host ::1` says a URL with brackets, and refuses there what it refuses elsewhere."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = command("--host", "::1", "--workers", "2")
    assert server.said == [f"wmi: serving sqlite:images.db on http://[::1]:{server.port}/api/images (page: http://[::1]:{server.port}/)\n"]
    for text, status in ((GET[:-2] + b"Host: b\r\n\r\n", 400), (GET.replace(b"Host: a", b"Host: [::1]:9001"), 200)):
        with server.connect() as peer:
            peer.sendall(text)
            peer.shutdown(socket.SHUT_WR)
            assert parse_answer(rest(peer))[0] == status
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0 and server.refuses()


@pytest.mark.parametrize(
    "host, status",
    [("localhost", 200), ("LOCALHOST:9001", 200), ("127.0.0.1", 200), ("[::1]:1", 200), ("images.example", 200),
     ("evil.example", 421), ("evil.example:9001", 421), ("127.0.0.1.evil.example", 421), ("192.0.2.1", 421)],
)
def test_hosts_on_loopback(storage, host, status):
    """DNS rebinding: a page whose name was let point here sends that name, and gets nothing, not even what is kept."""
    with serving(storage, host_names=["Images.example"]) as served:
        for _ in range(3):
            for name in ("localhost", host):
                text = served.raw(CLOSE.replace(b"Host: a", b"Host: " + name.encode()))
            found, fields, body = parse_answer(text)
            assert found == status and (status == 200 or b"owner_total" not in body)
    assert status == 200 or fields["content-type"] == "application/json"


@pytest.mark.parametrize(
    "named, host, status",
    [("localhost", b"evil.example", 200), ("LOCALHOST:1", b"b", 200), ("evil.example", b"localhost", 421)],
)
def test_the_host_of_the_target_counts(storage, named, host, status):
    """RFC 9112, 3.2.2: if a target is a whole URL, the field Host is ignored, though it must be there."""
    asked = head(f"http://{named}/api/images", "GET", "Connection: close").replace(b"Host: a", b"Host: " + host)
    with serving(storage, host_names=()) as served:
        for _ in range(3):
            assert parse_answer(served.raw(asked))[0] == status


def test_hosts_elsewhere(storage):
    """On an address that others can reach, any Host is served, as names there are nobody's secret."""
    with wmi.Server(storage, host="0.0.0.0", port=0) as server:
        with socket.create_connection(("127.0.0.1", server.server_address[1]), SECONDS) as peer:
            peer.sendall(CLOSE.replace(b"Host: a", b"Host: images.example"))
            assert rest(peer).startswith(b"HTTP/1.1 200 ")


def test_host_names_of_the_command(command):
    """`serve` refuses a foreign Host by default and says what allows it; --host-name does."""
    server = command("--host-name", "images.example")
    for name, status in ((b"images.example", b"200"), (b"evil.example", b"421")):
        with server.connect() as peer:
            peer.sendall(CLOSE.replace(b"Host: a", b"Host: " + name))
            text = rest(peer)
        assert text.startswith(b"HTTP/1.1 " + status) and (b"--host-name" in text) == (status == b"421")


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "PUT", "DELETE"])
def test_no_other_origin_is_let_in(served, method):
    """A preflight, or a request with an Origin, gets nothing that would let a browser show the answer to its page."""
    asked = head("/api/images/wmi-one", method, "Origin: http://evil.example", "Access-Control-Request-Method: DELETE",
                 "Access-Control-Request-Headers: x-vdc-account-uuid", "Connection: close")
    assert b"access-control" not in served.raw(asked).lower()


def test_warning_where_others_can_call(command):
    """Listening for everybody without tokens is one clear warning."""
    server = command("--host", "0.0.0.0")
    warnings = [line for line in server.said if "warning" in line]
    assert len(warnings) == 1 and "0.0.0.0" in warnings[0] and "account" in warnings[0]
