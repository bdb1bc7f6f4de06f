"""HTTPS: the corpus through TLS, handshakes that stall, certificates that are renewed, and HTTP on the wrong port."""

from __future__ import annotations

import contextlib
import pathlib
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from corpus import CASES, Case, Server, play
from serving import Serving, parse_answer, serving
from support import ACCOUNT, CLOSE, GET, MODULE, SECONDS, make_certificate, rest

import wmi

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="certificates are made by the openssl program")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The files of a certificate and of its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "first")


@pytest.fixture(scope="module")
def served(certificate) -> Iterator[Serving]:
    """A server of one image over HTTPS."""
    with wmi.MemoryStorage() as storage:
        wmi.Catalog(storage).register({"id": "wmi-corpus", "account_id": ACCOUNT})
        with serving(storage, tls=wmi.tls_context(*certificate)) as served:
            yield served


def connect(served, certificate) -> ssl.SSLSocket:
    """Return a connection whose handshake is done."""
    context = ssl.create_default_context(cafile=certificate[0])
    plain = socket.create_connection((served.host, served.port), SECONDS)
    return context.wrap_socket(plain, server_hostname="localhost")


# ---- the corpus, through a tunnel that speaks TLS to the server ----


class Tunnel:
    """A listener that passes each connection on to the server, through TLS."""

    def __init__(self, served, certificate):
        self._served, self._certificate = served, certificate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._pass, args=[self._listener.accept()[0]], daemon=True).start()

    def _pass(self, near):
        """Pass bytes on both ways, and both ends; in one thread, since a TLS object is not for two."""
        near.settimeout(SECONDS)
        with contextlib.suppress(OSError), near, connect(self._served, self._certificate) as far:
            sources = [near, far]
            while far in sources:
                readable = [far] if far.pending() else select.select(sources, [], [], SECONDS)[0]
                if near in readable:
                    if text := near.recv(65536):
                        with contextlib.suppress(OSError):  # the server may have hung up: what it sent is read next
                            far.sendall(text)
                    else:
                        sources.remove(near)
                        socket.socket.shutdown(far, socket.SHUT_WR)
                if far in readable:
                    if text := self._receive(far):
                        near.sendall(text)
                    elif text is not None:
                        sources.remove(far)
            near.shutdown(socket.SHUT_WR)
            while near in sources and near.recv(65536):
                pass  # to close it with something unread would be a reset

    def _receive(self, far):
        """Return what has come, None if that was TLS's own, such as a session ticket, and nothing at the end."""
        far.setblocking(False)
        try:
            return far.recv(65536)
        except ssl.SSLWantReadError:
            return None
        except OSError:  # a reset
            return b""
        finally:
            far.settimeout(SECONDS)

    def close(self):
        """Accept no more."""
        self._listener.close()


@pytest.fixture(scope="module")
def tunnel(served, certificate):
    """The way to the server for those who do not speak TLS."""
    tunnel = Tunnel(served, certificate)
    yield Server("127.0.0.1", tunnel.port, seconds=SECONDS)
    tunnel.close()


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_case(case: Case, tunnel):
    """A raw request through TLS gets the same answer as without."""
    play(case, "whole", tunnel)


# ---- what TLS adds ----


def test_clients(served, certificate):
    """Our client, with the certificate; keep-alive and pipelining over one connection."""
    assert served.url.startswith("https://127.0.0.1:")
    assert wmi.Client(served.url, ACCOUNT, cafile=certificate[0]).show("wmi-corpus")["id"] == "wmi-corpus"
    with connect(served, certificate) as peer:
        peer.sendall(GET * 20 + CLOSE)
        assert rest(peer).count(b"HTTP/1.1 200 OK\r\n") == 21


def test_the_command_says_what_is_wrong_with_https(served, capsys):
    """A certificate that is not trusted, and a port without TLS, are told in one line each."""
    assert wmi.main(["list", "--url", served.url, "--account", ACCOUNT]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"wmi: {served.url}: ") and "certificate" in said and said.endswith("give --cacert FILE\n")
    with wmi.MemoryStorage() as storage, serving(storage) as plain:
        url = plain.url.replace("http:", "https:")
        assert wmi.main(["list", "--url", url, "--account", ACCOUNT]) == 1
        assert f"cannot reach {url}: that port does not speak HTTPS, try http://" in capsys.readouterr().err


def test_the_end_is_said(served, certificate):
    """The answer that ends with its connection ends with a close_notify, so that it cannot be cut unseen."""
    with connect(served, certificate) as peer:
        peer.suppress_ragged_eofs = False  # an end without it would be an SSLError
        peer.sendall(CLOSE)
        assert rest(peer).startswith(b"HTTP/1.1 200 OK\r\n")


def test_http_on_the_port_of_https(served):
    """A client that speaks HTTP can read what is wrong."""
    status, fields, body = parse_answer(served.raw(GET))
    assert (status, fields["connection"]) == (400, "close") and b"https://" in body


@pytest.mark.parametrize(
    "text", [b"", b"\x16\x03\x01\x02\x00", b"\x00" * 100, b"SSH-2.0-x\r\n"], ids=["silent", "hello", "zeros", "ssh"],
)
def test_stalled_handshakes(served, certificate, text):
    """200 clients that stop within the handshake delay nobody, and are closed at the deadline of a head."""
    with contextlib.ExitStack() as stack:
        for number in range(200):
            if number % 100 == 99:
                connect(served, certificate).close()  # those before it are accepted: a full backlog would cost a second
            peer = stack.enter_context(socket.create_connection((served.host, served.port), SECONDS))
            peer.sendall(text)
        began = time.monotonic()
        for _ in range(3):
            with connect(served, certificate) as peer:
                peer.sendall(CLOSE)
                assert rest(peer).startswith(b"HTTP/1.1 200 OK\r\n")
        assert time.monotonic() - began < wmi.HEAD_SECONDS * 0.8


def test_a_stalled_handshake_ends(certificate, monkeypatch):
    """It is closed at the deadline, although bytes keep coming."""
    monkeypatch.setattr(wmi, "HEAD_SECONDS", 0.4)
    with wmi.MemoryStorage() as storage, serving(storage, tls=wmi.tls_context(*certificate)) as served:
        with socket.create_connection((served.host, served.port), SECONDS) as peer:
            peer.sendall(b"\x16\x03\x01\x02\x00")
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < began + SECONDS:
                    peer.settimeout(0.02)
                    with contextlib.suppress(socket.timeout):
                        if not peer.recv(100):
                            break
                    peer.sendall(b"\x01")
            assert time.monotonic() - began < SECONDS / 2


def test_slow_readers(certificate):
    """A long answer arrives whole at a client that reads slowly, in records that TLS makes of it."""
    with wmi.MemoryStorage() as storage:
        storage.add_all(wmi.image_record({"account_id": ACCOUNT, "description": "x" * 2000}) for _ in range(600))
        tls = wmi.tls_context(*certificate)
        with serving(storage, send_buffer=65536, tls=tls) as served, connect(served, certificate) as slow:
            slow.sendall(CLOSE)
            text = slow.recv(1000)
            with connect(served, certificate) as other:
                other.sendall(GET.replace(b"/api/images", b"/nowhere"))
                assert other.recv(100).startswith(b"HTTP/1.1 404 ")
            text += rest(slow)
    assert parse_answer(text)[2].count(b'"id":"wmi-') == 600


def test_nothing_waits_inside_tls(served, certificate):
    """What was received is taken to its end: the selector would not see what stayed in the TLS object."""
    body = b"display_name=" + b"x" * 60_000
    put = f"PUT /api/12.03/images/wmi-corpus HTTP/1.1\r\nHost: a\r\nX-VDC-ACCOUNT-UUID: {ACCOUNT}\r\n"
    with connect(served, certificate) as peer:
        for _ in range(3):
            peer.sendall(f"{put}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert peer.recv(15) == b"HTTP/1.1 200 OK"
            text = peer.recv(100_000)
            while not text.endswith(b"}"):
                text += peer.recv(100_000)
        assert all(each.socket.pending() == 0 for each in served.server._connections)


# ---- the command ----


def start(folder, *options):
    """Return `wmi serve` on a port of the system's choice, and its URL."""
    process = subprocess.Popen(
        [sys.executable, MODULE, "serve", "--store", "sqlite:images.db", "--sample", "--port", "0", *options],
        cwd=folder, stderr=subprocess.PIPE, text=True,
    )
    line = process.stderr.readline()
    url = re.search(r"https?://[0-9.:]+", line)
    return process, url[0] if url else line


def common_name(url, trusted):
    """Return the name in the certificate that a server shows."""
    context = ssl.create_default_context(cafile=str(trusted))
    host, _, port = url.rpartition("/")[2].partition(":")
    with socket.create_connection((host, int(port)), SECONDS) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as peer:
            return dict(pair for (pair,) in peer.getpeercert()["subject"])["commonName"]


def hang_up(process, condition):
    """Send SIGHUP, each second again as a worker that has only just begun may miss it, until the condition holds."""
    for turn in range(int(20 * SECONDS)):
        if turn % 20 == 0:
            process.send_signal(signal.SIGHUP)
        if condition():
            return
        threading.Event().wait(0.05)
    pytest.fail("SIGHUP has not had its effect")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX only")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_renewed_certificate(tmp_path, workers):
    """SIGHUP: connections from then on get the new certificate; a broken one leaves the old in force, and is logged."""
    first, second = make_certificate(tmp_path, "first"), make_certificate(tmp_path, "second")
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join(pathlib.Path(names[0]).read_bytes() for names in (first, second)))
    served = [shutil.copy(name, tmp_path / f"served{number}") for number, name in enumerate(first)]
    process, url = start(
        tmp_path, "--tls-cert", served[0], "--tls-key", served[1], "--workers", workers, "--log", "log"
    )
    try:
        assert url.startswith("https://")
        assert common_name(url, both) == "first"
        pathlib.Path(served[0]).write_text("")
        hang_up(process, lambda: (tmp_path / "log").read_text().count("not renewed") >= int(workers))
        assert {common_name(url, both) for _ in range(6)} == {"first"}
        for name, renewed in zip(second, served):
            shutil.copy(name, renewed)
        hang_up(process, lambda: {common_name(url, both) for _ in range(6)} == {"second"})
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)
    assert process.returncode == 0


@pytest.mark.parametrize("text", ["", "this is no certificate"])
def test_a_bad_certificate_is_refused(tmp_path, text):
    """One clear line that names the file, and exit code 1."""
    (tmp_path / "bad.pem").write_text(text)
    done = subprocess.run(
        [sys.executable, MODULE, "serve", "--store", "memory:", "--port", "0", "--tls-cert", "bad.pem"],
        cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "bad.pem" in done.stderr
