"""Deadlines hold in total, whatever a client sends or takes in small pieces; slow readers delay nobody.

They are shortened here, so that each attack takes a fraction of a second. Where a test waits, it waits for a condition.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time

import pytest
from serving import parse_answer, read_answer, serving
from support import (
    CHUNKED,
    CLOSE,
    GET,
    PUT,
    SECONDS,
    connect,
    connections,
    head,
    leaders,
    rest,
    until,
)

import wmi

pytestmark = pytest.mark.usefixtures("quiet")


def test_the_deadlines_are_those_that_are_promised():
    """The README's figures, which the other tests shorten."""
    assert (wmi.HEAD_SECONDS, wmi.BODY_SECONDS, wmi.SEND_SECONDS, wmi.IDLE_SECONDS) == (10, 30, 30, 15)
    assert (wmi.MAX_CONNECTIONS, wmi.GRACE_SECONDS, wmi.STORE_SECONDS) == (1000, 10, 10)


def drip(peer, text, pause=0.02):
    """Send text byte by byte until an answer or the end comes; return the seconds that took."""
    began = time.monotonic()
    peer.settimeout(pause)
    for byte in text:
        with contextlib.suppress(ConnectionError):
            peer.sendall(bytes([byte]))
        try:
            peer.recv(1, socket.MSG_PEEK)
            break
        except socket.timeout:
            pass
        except ConnectionError:
            break
    peer.settimeout(SECONDS)
    return time.monotonic() - began


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize(
    "text", [b"GET /" + b"a" * 1000, GET[:-2] + b"A: b\r\n" * 200, b"\r\n" * 4 + b"G" * 1000],
    ids=["line", "fields", "empty lines"],
)
def test_slow_head(served, text, log):
    """A head that comes byte by byte is refused with 408 at its deadline, not later."""
    with connect(served) as peer:
        assert drip(peer, text) < SECONDS / 2
        status, fields, _ = parse_answer(rest(peer))
    assert (status, fields["connection"]) == (408, "close")
    assert until(lambda: log)[0].split()[5] == "408"
    assert float(log[0].split()[7][: -len("ms")]) >= 400  # since it began


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize(
    "head, body",
    [
        (PUT.replace(b"14", b"1000"), b"a" * 1000),
        (CHUNKED, b"1\r\na\r\n" * 200),
        (CHUNKED, b"1;" + b"e" * 1000),
        (CHUNKED, b"0\r\n" + b"A: b\r\n" * 200),
    ],
    ids=["sized", "chunks", "extension", "trailers"],
)
def test_slow_body(served, storage, head, body):
    """A body that comes byte by byte is refused with 408 at its deadline, and changes nothing."""
    before = storage.revision()
    with connect(served) as peer:
        peer.sendall(head)
        assert drip(peer, body) < SECONDS / 2
        assert parse_answer(rest(peer))[0] == 408
    assert storage.revision() == before


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize("text", [b"", GET, GET * 3])
def test_idle_connection_is_closed(served, text):
    """A connection on which nothing is asked is closed without an answer, and its thread ends."""
    with connect(served) as peer:
        peer.sendall(text)
        answers = rest(peer)
    assert answers.count(b"HTTP/1.1 ") == answers.count(b"HTTP/1.1 200 ") == text.count(b"GET")
    until(lambda: not connections(served), "the end of the connection")


def test_idle_time_begins_anew_with_each_request(served):
    """The wait is between two requests: a connection that is used stays open longer than that."""
    with connect(served) as peer:
        before = 0
        for _ in range(3):
            peer.sendall(GET)
            assert read_answer(peer)[0] == 200
            [each] = served.server._connections
            until(lambda each=each, before=before: each.phase == wmi.IDLE and each.deadline > before)
            assert 0 <= time.monotonic() + wmi.IDLE_SECONDS - each.deadline < wmi.IDLE_SECONDS / 2
            before = each.deadline


def test_deadlines_hold_whoever_leads(served, monkeypatch):
    """While one connection keeps the server busy, idle connections and slow heads still come to their end."""
    served.server.service.answer(wmi.parse_head(head("/api/images/wmi-one", "DELETE")))
    with contextlib.ExitStack() as stack:
        with monkeypatch.context() as shortened:
            for name in ("IDLE_SECONDS", "HEAD_SECONDS"):
                shortened.setattr(wmi, name, 0.4)
            idle, slow = (stack.enter_context(connect(served)) for _ in range(2))
            slow.sendall(GET[:9])
            until(lambda: sorted(each.phase for each in served.server._connections) == [wmi.IDLE, wmi.HEAD])
        busy = stack.enter_context(connect(served))
        ended, began = {}, time.monotonic()
        while len(ended) < 2:
            assert time.monotonic() < began + wmi.HEAD_SECONDS * 0.8, ended
            busy.sendall(PUT)
            threading.Event().wait(0.01)
            busy.sendall(b"display_name=x")
            assert read_answer(busy)[0] == 200
            for name, peer in {"idle": idle, "slow": slow}.items():
                peer.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    ended.setdefault(name, peer.recv(100))
        assert ended["idle"] == b"" and ended["slow"].startswith(b"HTTP/1.1 408 ")


# ---- slow readers ----


@pytest.mark.parametrize("sip", [0, 1], ids=["nothing", "little"])
def test_slow_reader(large, sip, log, monkeypatch):
    """A client that does not read, or only a byte now and then, is cut at the deadline, and logged."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", 0.4)
    monkeypatch.setattr(wmi, "IDLE_SECONDS", 0.4)
    with serving(large, send_buffer=65536, log=log.append) as served, connect(served, 4096) as peer:
        peer.sendall(GET)
        peer.recv(1)
        began = time.monotonic()
        while not log:
            assert time.monotonic() < began + 10, "the reader was not cut"
            peer.recv(sip) if sip else None
            threading.Event().wait(0.02)
        until(lambda: not connections(served), "the end of the connection")
        assert re.search(r" GET /api/images 200 \d+ ", log[0])


def test_a_reader_that_is_cut_sees_it(large, monkeypatch):
    """In HTTP/1.0 only the end shows the end: that of an answer that is cut is a reset."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", 0.2)
    with serving(large, send_buffer=65536) as served, connect(served, 4096) as peer:
        peer.sendall(GET.replace(b"HTTP/1.1", b"HTTP/1.0"))
        peer.recv(1)
        until(lambda: not connections(served), "the cut")
        with pytest.raises(ConnectionResetError):
            while peer.recv(65536):
                pass


def test_a_slow_head_leaves_the_reader_its_time(large, log, monkeypatch):
    """What is left of the head's deadline is not the time for the answer."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", 1000)
    with serving(large, send_buffer=65536, log=log.append) as served, connect(served, 65536) as peer:
        peer.sendall(CLOSE[:-2])
        until(lambda: [each for each in served.server._connections if each.phase == wmi.HEAD])
        peer.sendall(CLOSE[-2:])
        peer.recv(1)
        [each] = served.server._connections
        until(lambda: each.deadline > time.monotonic() + 500, "a new deadline")
        assert not log


def test_a_reader_that_pauses_is_served(large, monkeypatch):
    """A large answer arrives whole at a slow reader that keeps reading."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", SECONDS)
    with serving(large, send_buffer=65536) as served, connect(served) as peer:
        peer.sendall(CLOSE)
        text = peer.recv(1000)
        threading.Event().wait(0.2)
        text += rest(peer)
    assert len(json.loads(parse_answer(text)[2])["result"]) == 1100


def test_slow_readers_delay_nobody(large):
    """While many clients read a long answer slowly, others are answered; the slow ones get all of it, and the next."""
    with serving(large, send_buffer=65536) as served, connect(served) as other, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(served, size)) for size in (65536, *[4096] * 5)]
        texts = []
        for peer in slow:
            peer.sendall(GET + CLOSE)
            texts.append(peer.recv(100))
        for _ in range(10):
            other.sendall(head("/api/images/wmi-1"))
            assert read_answer(other)[0] == 200
        assert sum(each.status > 0 for each in served.server._connections) >= len(slow)  # they are still sent to
        until(lambda: leaders() <= 2)  # the walk of a large store may be slow on a busy machine
        first, found, second = (texts[0] + rest(slow[0])).rpartition(b"HTTP/1.1 200")
        for text in (first, found + second):
            assert len(json.loads(parse_answer(text)[2])["result"]) == 1100


def test_a_slow_reader_that_makes_progress_is_served_to_its_end(large):
    """The deadline is for progress: when the client takes more, it has all of its time again."""
    with serving(large, send_buffer=65536) as served, connect(served, 65536) as peer:
        peer.sendall(CLOSE)
        text = peer.recv(1)
        [each] = served.server._connections
        until(lambda: each.watched == wmi.WRITE, "a client that is waited for")
        before = each.deadline
        while each.deadline == before:
            text += peer.recv(65536) or pytest.fail("the end came too soon")
        assert each.status and each.deadline > time.monotonic() + wmi.SEND_SECONDS / 2
        text += rest(peer)
    assert len(json.loads(parse_answer(text)[2])["result"]) == 1100


# ---- clients that are refused ----


def test_a_refused_client_can_read_why(served):
    """RFC 9112, 9.6: a client that is still sending gets its answer and an end, not a reset."""
    for _ in range(10):
        with connect(served) as peer:
            peer.sendall(head("/api/12.03/images/wmi-one", "PUT", "Content-Length: 300000") + b"a" * 150_000)
            peer.recv(1, socket.MSG_PEEK)
            peer.sendall(b"a" * 150_000)
            text = b"".join(iter(lambda peer=peer: peer.recv(65536), b""))
        assert parse_answer(text)[0] == 413
        assert text.count(b"HTTP/1.1") == 1


def test_a_refused_client_is_not_listened_to_for_long(served, monkeypatch):
    """A client that goes on sending after its refusal is cut."""
    monkeypatch.setattr(wmi, "LINGER_SECONDS", 0.2)
    with connect(served) as peer:
        peer.sendall(b"nonsense\r\n\r\n")
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < began + 10:
                peer.sendall(b"a")
                threading.Event().wait(0.01)
