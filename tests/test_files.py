"""Bodies that are a part of an open file: exact, cut where the file is too short, in flat memory, beside others."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sys
import threading
import time

import pytest
from serving import parse_answer, serving
from support import SECONDS, make_certificate

import wmi

TEXT = random.Random(1).randbytes(3_000_000)
GET = b"GET /file HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def file(tmp_path):
    """A file of 3 MB."""
    path = tmp_path / "file"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(params=["http", "https"])
def tls(request, tmp_path):
    """The options of a server with TLS or without, and what connects to it."""
    if request.param == "http":
        return {}, lambda plain: plain
    if not shutil.which("openssl"):
        pytest.skip("certificates are made by the openssl program")
    import ssl

    names = make_certificate(tmp_path, "files")
    context = ssl.create_default_context(cafile=names[0])
    return {"tls": wmi.tls_context(*names)}, lambda plain: context.wrap_socket(plain, server_hostname="localhost")


@contextlib.contextmanager
def serving_file(path, start, length, opened=None, **options):
    """Serve a part of a file under every path; `opened` takes the files."""
    with serving(wmi.MemoryStorage(), **options) as served:

        def answer(request, arrived, pulse):
            file = open(path, "rb")
            if opened is not None:
                opened.append(file)
            return wmi.make_answer(200, "", wmi.FileBody(file, start, length))

        served.server.service.answer = answer
        yield served


def rest(peer):
    """Return all that comes until the end."""
    return b"".join(iter(lambda: peer.recv(1 << 20), b""))


@pytest.mark.parametrize("start, length", [(0, len(TEXT)), (1, 1), (17, 0), (12345, 2_000_000), (len(TEXT) - 5, 5)])
def test_a_range_is_sent_exactly(file, tls, start, length):
    """The bytes of the range, no more and no fewer; then the connection goes on."""
    opened, (options, wrap) = [], tls
    with serving_file(file, start, length, opened, **options) as served:
        with wrap(socket.create_connection((served.host, served.port), SECONDS)) as peer:
            peer.sendall(GET * 2 + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            text = rest(peer)
    for _ in range(3):
        head, _, text = text.partition(b"\r\n\r\n")
        assert b"Content-Length: %d" % length in head and b"chunked" not in head
        assert text[:length] == TEXT[start : start + length]
        text = text[length:]
    assert text == b"" and all(each.closed for each in opened)


def test_head_of_a_file(file):
    """HEAD has the length and no body, and closes the file."""
    opened = []
    with serving_file(file, 5, 100, opened) as served:
        text = served.raw(GET.replace(b"GET", b"HEAD") + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    head, _, text = text.partition(b"\r\n\r\n")
    assert b"Content-Length: 100" in head and parse_answer(text)[2] == TEXT[5:105]
    assert [each.closed for each in opened] == [True, True]


def test_a_file_that_shrinks_is_cut(file, tls):
    """What is missing is not made up: the connection ends before the length that was promised, and the log says why."""
    log, (options, wrap) = [], tls
    with serving_file(file, 0, len(TEXT), log=log.append, **options) as served:
        os.truncate(file, 1_000_000)
        with wrap(socket.create_connection((served.host, served.port), SECONDS)) as peer:
            peer.sendall(GET * 2)
            text = b""
            with contextlib.suppress(OSError):
                while piece := peer.recv(1 << 16):
                    text += piece
    body = text.partition(b"\r\n\r\n")[2]
    assert len(body) <= 1_000_000 and body == TEXT[: len(body)]
    assert any("shorter" in line for line in log)


@pytest.mark.parametrize("how", ["hangs up", "reads nothing"])
def test_a_client_that_goes_away_closes_the_file(file, tls, how, monkeypatch):
    """Neither a client that hangs up nor one that stops reading keeps the file open."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", 0.3)
    opened, (options, wrap) = [], tls
    with open(file, "ab") as more:
        more.truncate(200_000_000)
    with serving_file(file, 0, 200_000_000, opened, **options) as served:
        with wrap(socket.create_connection((served.host, served.port), SECONDS)) as peer:
            peer.sendall(GET)
            peer.recv(1000)
            if how == "hangs up":
                peer.close()
            end = time.monotonic() + SECONDS
            while not opened[0].closed and time.monotonic() < end:
                threading.Event().wait(0.01)
            assert opened[0].closed


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc here")
@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy collects this test's own pieces when it likes")
def test_memory_stays_flat_and_others_are_served(file, tls):
    """While several clients fetch 40 MB again and again, little memory is used, and another client is answered."""
    with open(file, "ab") as more:
        more.truncate(40_000_000)
    options, wrap = tls
    counts, answered = [], []

    def fetch(served):
        while len(answered) < 3:
            with wrap(socket.create_connection((served.host, served.port), SECONDS)) as peer:
                peer.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                counts.append(sum(map(len, iter(lambda peer=peer: peer.recv(1 << 16), b""))))

    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with serving_file(file, 0, 40_000_000, **options) as served:
        threads = [threading.Thread(target=fetch, args=[served]) for _ in range(3)]
        before = resident()
        for thread in threads:
            thread.start()
        most = before
        while any(thread.is_alive() for thread in threads):
            with wrap(socket.create_connection((served.host, served.port), SECONDS)) as peer:
                peer.sendall(b"nonsense\r\n\r\n")
                answered += [1] if b" 400 " in peer.recv(100) else []
            most = max(most, resident())
        assert most - before < 10_000_000
    assert len(counts) >= 3 and all(0 < count - 40_000_000 < 1000 for count in counts)
