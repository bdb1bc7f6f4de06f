"""The running server, attacked: time, connections, descriptors, signals, processes, sockets.

The deadlines are shortened, so that each attack takes a fraction of a second; what is measured is that
they hold in total. Where a test waits, it waits for a condition.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from serving import parse_answer, read_answer, serving

import wmi

try:
    import resource
except ImportError:  # not on Windows
    resource = None

ACCOUNT = "a-shpoolxx"
needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc here")
HERE = os.path.dirname(os.path.abspath(wmi.__file__))
SCRIPT = os.path.abspath(wmi.__file__)
SECONDS = 20.0  # for anything to happen, on a machine that is busy
PYPY = sys.implementation.name == "pypy"


def image(id="wmi-one", **fields):
    """Return the record of an image."""
    return wmi.image_record({"id": id, "account_id": ACCOUNT, **fields})


def until(condition, what="the condition"):
    """Wait until condition() is true, and return what it returned."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        threading.Event().wait(0.005)
    raise AssertionError(f"{what} did not come about in {SECONDS} s")


def head(target="/api/images", method="GET", *fields):
    """Return a raw head."""
    lines = [f"{method} {target} HTTP/1.1", "Host: a", f"X-VDC-ACCOUNT-UUID: {ACCOUNT}", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


GET = head()
CLOSE = head("/api/images", "GET", "Connection: close")
PUT = head("/api/12.03/images/wmi-one", "PUT", "Content-Length: 14")
CHUNKED = head("/api/12.03/images/wmi-one", "PUT", "Transfer-Encoding: chunked")


def connect(served, receive_buffer=0):
    """Return a connection to the server."""
    family = socket.AF_INET6 if ":" in served.host else socket.AF_INET
    peer = socket.socket(family)
    if receive_buffer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    peer.settimeout(SECONDS)
    peer.connect((served.host, served.port))
    return peer


def rest(peer):
    """Return all that still comes until the end, however it ends."""
    text = b""
    with contextlib.suppress(ConnectionResetError):
        while True:
            piece = peer.recv(65536)
            if not piece:
                return text
            text += piece
    return text


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


def connections(served):
    """Return how many connections are open."""
    return len(served.server._connections)


def leaders():
    """Return how many threads serve connections."""
    return sum(thread.name == "wmi-leader" for thread in threading.enumerate())


@pytest.fixture
def storage():
    """A store in memory with one image."""
    with wmi.MemoryStorage() as storage:
        storage.add(image())
        yield storage


@pytest.fixture
def log():
    """Take the log's lines."""
    return []


@pytest.fixture(autouse=True)
def _quiet(log, capfd):
    """Whatever is done to a server, it prints no traceback and logs no fault of its own."""
    yield
    text = capfd.readouterr()
    assert "Traceback" not in text.err + text.out
    assert not [line for line in log if "error: connection" in line]


@pytest.fixture
def served(storage, log):
    """A running server."""
    with serving(storage, log=log.append) as served:
        yield served


@pytest.fixture
def shortened(monkeypatch):
    """Make each deadline a fraction of a second."""
    for name in ("IDLE_SECONDS", "HEAD_SECONDS", "BODY_SECONDS", "SEND_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(wmi, name, 0.4)


def test_the_deadlines_are_those_that_are_promised():
    """The README's figures, which the other tests shorten."""
    assert (wmi.HEAD_SECONDS, wmi.BODY_SECONDS, wmi.SEND_SECONDS, wmi.IDLE_SECONDS) == (10, 30, 30, 15)
    assert (wmi.MAX_CONNECTIONS, wmi.GRACE_SECONDS, wmi.STORE_SECONDS) == (1000, 10, 10)


# ---- deadlines, in total ----


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize(
    "text",
    [b"GET /" + b"a" * 1000, GET[:-2] + b"A: b\r\n" * 200, b"\r\n" * 4 + b"G" * 1000],
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


@pytest.fixture
def large():
    """A store whose index is one answer of 9 MB: more than the kernel's buffers hold."""
    with wmi.MemoryStorage() as storage:
        storage.add_all(image(f"wmi-{number}", description="x" * 10_000) for number in range(900))
        yield storage


@pytest.fixture
def larger():
    """A store whose index is streamed."""
    with wmi.MemoryStorage() as storage:
        storage.add_all(image(f"wmi-{number}", description="x" * 10_000) for number in range(1100))
        yield storage


@pytest.mark.parametrize("store", ["large", "larger"])
@pytest.mark.parametrize("sip", [0, 1], ids=["nothing", "little"])
def test_slow_reader(store, sip, log, monkeypatch, request):
    """A client that does not read, or only a byte now and then, is cut at the deadline, and logged."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", 0.4)
    monkeypatch.setattr(wmi, "IDLE_SECONDS", 0.4)
    with serving(request.getfixturevalue(store), log=log.append) as served, connect(served, 4096) as peer:
        peer.sendall(GET)
        peer.recv(1)
        began = time.monotonic()
        while not log:
            assert time.monotonic() < began + 10, "the reader was not cut"
            peer.recv(sip) if sip else None
            threading.Event().wait(0.02)
        until(lambda: not connections(served), "the end of the connection")
        assert re.search(r" GET /api/images 200 \d+ ", log[0])


@pytest.mark.parametrize("store", ["large", "larger"])
def test_a_reader_that_is_cut_sees_it(store, monkeypatch, request):
    """In HTTP/1.0 only the end shows the end: that of an answer that is cut is a reset."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", 0.2)
    with serving(request.getfixturevalue(store)) as served, connect(served, 4096) as peer:
        peer.sendall(GET.replace(b"HTTP/1.1", b"HTTP/1.0"))
        peer.recv(1)
        until(lambda: not connections(served), "the cut")
        with pytest.raises(ConnectionResetError):
            while peer.recv(65536):
                pass


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


@pytest.mark.parametrize("store", ["large", "larger"])
def test_a_slow_head_leaves_the_reader_its_time(store, log, monkeypatch, request):
    """What is left of the head's deadline is not the time for the answer."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", 1000)
    with serving(request.getfixturevalue(store), log=log.append) as served, connect(served, 65536) as peer:
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
    with serving(large) as served, connect(served) as peer:
        peer.sendall(CLOSE)
        text = peer.recv(1000)
        threading.Event().wait(0.2)
        text += rest(peer)
    assert len(json.loads(parse_answer(text)[2])["result"]) == 900


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


# ---- clients that go away ----


def reset(peer):
    """Close with a reset instead of an end (SO_LINGER of no time)."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@pytest.mark.parametrize("text", [GET, GET + CLOSE, PUT + b"display_name=x"], ids=["one", "two", "body"])
def test_half_close(served, text):
    """RFC 9112, 9.6: a client that says that nothing follows gets all its answers."""
    with connect(served) as peer:
        peer.sendall(text)
        peer.shutdown(socket.SHUT_WR)
        answers = rest(peer)
    assert answers.count(b"HTTP/1.1 200 ") == answers.count(b"HTTP/1.1 ") == text.count(b" HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "text, status", [(b"GET / HT", 400), (PUT + b"disp", 400), (CHUNKED + b"5\r\nab", 400), (b"", None)]
)
def test_half_close_in_the_middle(served, storage, text, status):
    """A request that is cut is refused, never done with what there is of it."""
    before = storage.revision()
    with connect(served) as peer:
        peer.sendall(text)
        peer.shutdown(socket.SHUT_WR)
        answer = rest(peer)
    assert (parse_answer(answer)[0] if answer else None) == status
    assert storage.revision() == before


STAGES = {
    "connected": b"",
    "head": GET[:20],
    "body": PUT + b"disp",
    "chunk": CHUNKED + b"5\r\nab",
    "asked": GET,
    "many": GET * 50,
    "refused": b"nonsense\r\n\r\n",
    "expecting": head("/api/12.03/images/wmi-one", "PUT", "Content-Length: 14", "Expect: 100-continue"),
}


@pytest.mark.parametrize("how", [reset, socket.socket.close], ids=["reset", "close"])
@pytest.mark.parametrize("stage", STAGES)
def test_hanging_up(served, stage, how, log):
    """A client that goes away at any stage frees its thread and leaves no traceback."""
    for _ in range(5):
        peer = connect(served)
        peer.sendall(STAGES[stage])
        how(peer)
    until(lambda: not connections(served), "the end of the connections")
    assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 200
    assert not [line for line in log if "error" in line]


@pytest.mark.parametrize("how", [reset, socket.socket.close], ids=["reset", "close"])
@pytest.mark.parametrize("store", ["large", "larger"])
def test_hanging_up_in_the_answer(how, store, log, request):
    """A client that goes away while it is answered is one log line, without a traceback."""
    with serving(request.getfixturevalue(store), log=log.append) as served:
        peer = connect(served, 4096)
        peer.sendall(GET)
        peer.recv(100)
        how(peer)
        until(lambda: not connections(served), "the end of the connection")
    assert len(log) == 1 and " 200 " in log[0]


# ---- at most so many connections ----


def test_who_is_idle_longest_gives_way(storage):
    """With every connection taken a new one is served at once, in place of the one that is idle longest."""
    with serving(storage, max_connections=3) as served, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(connect(served)) for _ in range(3))
        for peer in (first, second, third, first):  # so that the second is idle longest
            peer.sendall(GET)
            assert read_answer(peer)[0] == 200
        assert served.request("GET", "/nowhere")[0] == 404
        assert second.recv(1) == b""
        for peer in (first, third):
            peer.sendall(GET)
            assert read_answer(peer)[0] == 200


def test_idle_clients_lock_nobody_out(storage):
    """Hundreds of connections on which nothing is asked, more than there are places for, delay no other client."""
    with serving(storage, max_connections=50) as served, contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(connect(served))
        began = time.monotonic()
        for _ in range(10):
            assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 200
        assert time.monotonic() - began < wmi.IDLE_SECONDS * 0.8
        assert connections(served) <= 50


@pytest.mark.parametrize("text", [GET[:9], PUT + b"disp"], ids=["head", "body"])
def test_with_every_connection_busy_a_new_one_waits(storage, text):
    """What has begun does not give way: a new connection waits in the backlog, and is served when there is a place."""
    with serving(storage, max_connections=2) as served, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(served)) for _ in range(2)]
        for peer in busy:
            peer.sendall(text)
        until(lambda: not any(each.is_idle for each in served.server._connections) and connections(served) == 2)
        late = stack.enter_context(connect(served))
        late.sendall(GET)
        late.settimeout(0.3)
        with pytest.raises(socket.timeout):
            late.recv(1)
        late.settimeout(SECONDS)
        busy[0].close()
        assert read_answer(late)[0] == 200


def memory():
    """Return the resident memory of this process in KiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


@pytest.mark.skipif(resource is None, reason="POSIX only")
def test_connections_leave_descriptors_to_the_store(storage, monkeypatch):
    """However many connections are allowed, those that the process has no descriptors for are not taken."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (50, 50))
    with serving(storage, max_connections=1000) as served:
        assert served.server._max_connections == 50 - wmi.SPARE_DESCRIPTORS


def test_freed_memory_is_given_back(served, monkeypatch):
    """A process of ours asks for it now and then; whoever embeds a server is not asked."""
    times = []
    served.server.trim()
    served.server.trim = lambda: times.append(1)
    monkeypatch.setattr(wmi, "TRIM_SECONDS", 0.01)
    until(lambda: len(times) > 2)
    wmi.memory_trimmer()()


@needs_proc
def test_a_connection_costs_little(storage):
    """990 connections cost at most 15 MB beyond one, and no thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2200:
        pytest.skip("not enough descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2200), hard))
    with serving(storage) as served, contextlib.ExitStack() as stack:
        assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 200
        before, threads = memory(), threading.active_count()
        for _ in range(990):
            peer = stack.enter_context(connect(served))
            peer.sendall(GET + GET[:9])
            assert read_answer(peer)[0] == 200
        assert connections(served) == 990
        assert memory() - before < 15_000
        until(lambda: threading.active_count() <= threads, "the end of threads that were held up")


class Slow(wmi.MemoryStorage):
    """A store that shows one of its images only when it is told to."""

    def __init__(self):
        super().__init__()
        self.asked, self.told = threading.Semaphore(0), threading.Event()
        self.add_all([image(), image("wmi-slow")])

    def get(self, id):
        """Wait for the word before the slow one is shown."""
        if id == "wmi-slow":
            self.asked.release()
            assert self.told.wait(SECONDS)
        return super().get(id)


SLOW = head("/api/images/wmi-slow")


def test_the_loop_looks_after_the_leader_by_default():
    """Whoever embeds the server need not know how often the one that serves has to be watched."""
    with Slow() as storage:
        server = wmi.Server(storage, port=0, host_names=None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address[:2], SECONDS) as peer:
            peer.sendall(SLOW)
            assert storage.asked.acquire(timeout=SECONDS)
            until(lambda: leaders() == 2, "another thread")
            storage.told.set()
            assert read_answer(peer)[0] == 200
        server.shutdown()
        assert server.stop()
    default = inspect.signature(wmi.Server.serve_forever).parameters["poll_interval"].default
    assert default == wmi.TURN_SECONDS == 0.05


def test_a_log_that_nobody_reads_stops_nobody(storage):
    """While whoever reads the log keeps one thread waiting, all others are answered, and no second thread waits."""
    texts, waiting, told = [], threading.Semaphore(0), threading.Event()

    def wait(line):
        waiting.release()
        assert told.wait(SECONDS)
        texts.append(line)

    with serving(storage, log=wait) as served, connect(served) as one, connect(served) as other:
        try:
            one.sendall(GET)
            assert read_answer(one)[0] == 200
            assert waiting.acquire(timeout=SECONDS)
            for _ in range(300):
                for peer in (one, other):
                    peer.sendall(GET)
                    assert read_answer(peer)[0] == 200
            until(lambda: leaders() <= 2, "the end of threads that were held up")
        finally:
            told.set()
    assert len(texts) == 601


def test_lines_that_nobody_reads_are_counted(storage, monkeypatch):
    """What does not fit into the queue is dropped, and the log says how many lines that were."""
    monkeypatch.setattr(wmi, "LOG_LINES", 10)
    texts, told = [], threading.Event()

    def wait(line):
        assert told.wait(SECONDS)
        texts.append(line)

    with serving(storage, log=wait) as served, connect(served) as peer:
        for _ in range(50):
            peer.sendall(GET)
            assert read_answer(peer)[0] == 200
        told.set()
    lost = sum(int(line.split()[2]) for line in texts if "lines of the log are lost" in line)
    assert lost >= 30 and lost + sum(" 200 " in line for line in texts) == 50


def test_lines_of_answers_are_written_before_the_end(log):
    """Told to stop while one request takes long, the server logs those that were answered with it."""
    with Slow() as storage, serving(storage, log=log.append) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(6)]
        until(lambda: connections(served) == 6, "all connections")
        with held(served):
            for number, peer in enumerate(peers):
                peer.sendall(SLOW if number == 4 else GET)
        assert [read_answer(peer)[0] for peer in peers[:4]] == [200] * 4
        assert storage.asked.acquire(timeout=SECONDS)
        served.server.shutdown()
        assert not served.server.stop(0.01)
        until(lambda: len([line for line in log if " 200 " in line]) >= 4, "their lines")
        storage.told.set()


def test_no_memory_for_a_line_is_no_end(served, monkeypatch):
    """A fault while lines are put together costs lines, not the thread that serves."""
    monkeypatch.setattr(served.server, "_lines", Forgetful())
    with connect(served) as peer:
        for _ in range(3):
            peer.sendall(GET)
            assert read_answer(peer)[0] == 200
    monkeypatch.undo()


class Forgetful(list):
    """Lines that cannot be read again."""

    def popleft(self):
        """Have no memory for it."""
        raise MemoryError


def test_a_log_that_raises_does_not_stop_the_answers(storage):
    """Whatever the function that takes the log's lines raises, requests are answered."""

    def fail(line):
        raise BlockingIOError if "GET" in line else RuntimeError(line)

    with serving(storage, log=fail, max_connections=1) as served:
        for _ in range(3):
            assert served.raw(GET + CLOSE).count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("slow", [1, 3])
def test_a_slow_store_delays_nobody_else(slow, log):
    """While requests wait for the store, others are answered; then all of them are, and one thread serves again."""
    with Slow() as storage, serving(storage, log=log.append) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(slow + 1)]
        for peer in peers[:slow]:
            peer.sendall(SLOW)
            assert storage.asked.acquire(timeout=SECONDS)
        for _ in range(3):
            peers[-1].sendall(GET)
            assert read_answer(peers[-1])[0] == 200
        assert not [line for line in log if "wmi-slow" in line]
        storage.told.set()
        for peer in peers[:slow]:
            assert json.loads(read_answer(peer)[2])["id"] == "wmi-slow"
        until(lambda: leaders() == 1, "the end of the other threads")
        for peer in peers:  # they are all served on
            peer.sendall(SLOW + GET)
            assert [read_answer(peer)[0], read_answer(peer)[0]] == [200, 200]


def test_what_arrives_meanwhile_is_not_taken_by_two(log):
    """The connection of a request that takes long is left alone until it is answered."""
    with Slow() as storage, serving(storage, log=log.append) as served, connect(served) as peer:
        peer.sendall(SLOW)
        assert storage.asked.acquire(timeout=SECONDS)
        until(lambda: leaders() == 2, "another thread")
        peer.sendall(GET * 3)
        with connect(served) as other:
            other.sendall(GET)
            assert read_answer(other)[0] == 200
        storage.told.set()
        assert json.loads(read_answer(peer)[2])["id"] == "wmi-slow"
        assert [read_answer(peer)[0] for _ in range(3)] == [200] * 3


@contextlib.contextmanager
def held(served):
    """Keep the one that serves from serving: what is sent meanwhile is there when it goes on."""
    with served.server._lock:
        yield


def test_what_arrives_together_needs_one_look_at_the_store(storage, monkeypatch):
    """However many requests have arrived, the store is asked for its revision once."""
    monkeypatch.setattr(wmi, "TURN_SECONDS", SECONDS)  # another thread would receive, and look, by itself
    looks = []
    storage.revision = lambda: looks.append(1) or "the same"
    with serving(storage) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(9)]
        until(lambda: connections(served) == 9, "all connections")
        with held(served):  # the first wakes it, and it takes that one or more
            for peer in peers:
                peer.sendall(GET)
        assert [read_answer(peer)[0] for peer in peers] == [200] * 9
        assert len(looks) <= 5  # two, unless the machine stood still


def test_what_arrives_together_waits_for_nobody(log):
    """Requests that arrive with one that takes long are answered first of all by the thread that leads then."""
    with Slow() as storage, serving(storage, log=log.append) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(6)]
        until(lambda: connections(served) == 6, "all connections")
        with held(served):
            for number, peer in enumerate(peers):
                peer.sendall(SLOW if number == 2 else GET)
        assert [read_answer(peer)[0] for peer in peers[:2] + peers[3:]] == [200] * 5
        assert not storage.told.is_set()
        until(lambda: len(log) == 5, "their lines in the log")
        storage.told.set()
        assert read_answer(peers[2])[0] == 200


def test_a_change_is_seen_by_what_follows_it(served):
    """Requests sent in one piece are answered in order: what is behind a change shows it."""
    shown = head("/api/12.03/images/wmi-one")
    with connect(served) as peer:
        for number in range(5):
            peer.sendall(shown * 3 + PUT + b"display_name=%d" % number + shown * 2)
            answers = [json.loads(read_answer(peer)[2])["display_name"] for _ in range(6)]
            assert answers[3:] == [str(number)] * 3
            assert answers[:3] == [str(number - 1) if number else ""] * 3


def test_a_change_before_a_request_arrived_is_seen(unserved, storage):
    """Also one that was made after the server looked for somebody else, while this request was on its way."""

    class Changing(Stub):
        def recv(self, size):
            ask = wmi.parse_head(head("/api/images/wmi-one"))
            unserved.service.answer(ask)
            unserved.service.keep()
            storage.replace("wmi-one", lambda record: {**record, "description": "changed"})
            return super().recv(size)

    stub = Changing(head("/api/images/wmi-one"))
    drive(stub, unserved)
    assert json.loads(parse_answer(stub.sent[0])[2])["description"] == "changed"


def drive(stub, server):
    """Let a connection on a stub receive once and answer, as the leader would; return what it waits for then."""
    connection = wmi.Connection(stub, ("127.0.0.1", 1), server)
    wants, result = connection.receive(), None
    server.moment = time.monotonic()
    while wants == wmi.WORK:
        wants = connection.advance(result)
        result = connection.work() if wants == wmi.WORK else None
    connection.close()
    return wants


def test_a_change_before_a_body_arrived_is_seen(served, storage):
    """A request with a body is as new as the end of its body."""
    shown = head("/api/images/wmi-one", "GET", "Content-Length: 2")
    with connect(served) as slow, connect(served) as other:
        slow.sendall(shown + b"a")
        for _ in range(2):
            other.sendall(head("/api/images/wmi-one"))
            assert read_answer(other)[0] == 200
        storage.replace("wmi-one", lambda record: {**record, "description": "changed"})
        slow.sendall(b"b")
        assert json.loads(read_answer(slow)[2])["description"] == "changed"


@pytest.mark.parametrize("text", [GET[:-2], GET[:9], b"\r"], ids=["head", "line", "empty line"])
def test_heads_that_are_not_whole_take_no_thread(served, text):
    """One thread waits for all that has to arrive, and serves the others meanwhile."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(served)).sendall(text)
        assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 200
        until(lambda: leaders() == 1)


def test_a_body_that_is_waited_for_delays_nobody(served):
    """It takes no thread; the connection goes on."""
    served.server.service.answer(wmi.parse_head(head("/api/images/wmi-one", "DELETE")))  # 12.03 shows it still
    with connect(served) as slow, connect(served) as other:
        for _ in range(3):
            slow.sendall(PUT + b"display")
            other.sendall(GET)
            assert read_answer(other)[0] == 200
            until(lambda: leaders() == 1)
            slow.sendall(b"_name=x")
            assert json.loads(read_answer(slow)[2])["display_name"] == "x"


@pytest.mark.parametrize("store", ["large", "larger"])
def test_slow_readers_delay_nobody(store, request):
    """While many clients read a long answer slowly, others are answered; the slow ones get all of it, and the next."""
    with serving(request.getfixturevalue(store)) as served, connect(served) as other, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(served, 4096)) for _ in range(6)]
        texts = []
        for peer in slow:
            peer.sendall(GET + CLOSE)
            texts.append(peer.recv(100))
        for _ in range(10):
            other.sendall(head("/api/images/wmi-1"))
            assert read_answer(other)[0] == 200
        until(lambda: sum(each.status > 0 for each in served.server._connections) == len(slow))  # still sent to
        until(lambda: leaders() <= 2)  # the walk of a large store may be slow on a busy machine
        slow[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # it has been slow for long enough
        first, found, second = (texts[0] + rest(slow[0])).rpartition(b"HTTP/1.1 200")
        for text in (first, found + second):
            assert len(json.loads(parse_answer(text)[2])["result"]) >= 900


@pytest.mark.parametrize("store, count", [("large", 900), ("larger", 1100)])
def test_a_slow_reader_that_makes_progress_is_served_to_its_end(store, count, request):
    """The deadline is for progress: when the client takes more, it has all of its time again."""
    with serving(request.getfixturevalue(store)) as served, connect(served, 65536) as peer:
        peer.sendall(CLOSE)
        text = peer.recv(1)
        [each] = served.server._connections
        until(lambda: each.watched == wmi.WRITE, "a client that is waited for")
        before = each.deadline
        while each.deadline == before:
            text += peer.recv(65536) or pytest.fail("the end came too soon")
        assert each.status and each.deadline > time.monotonic() + wmi.SEND_SECONDS / 2
        text += rest(peer)
    assert len(json.loads(parse_answer(text)[2])["result"]) == count


def no_thread(thread):
    """Fail as Thread.start does where the system has no thread left."""
    raise RuntimeError("can't start new thread")


def test_without_threads_all_wait_for_the_store(monkeypatch, log):
    """Where no thread can be started, a slow store holds up everybody, and everybody is served then."""
    with (
        Slow() as storage,
        serving(storage, log=log.append) as served,
        connect(served) as slow,
        connect(served) as other,
    ):
        other.sendall(GET)
        assert read_answer(other)[0] == 200
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        slow.sendall(SLOW)
        assert storage.asked.acquire(timeout=SECONDS)
        other.sendall(GET)
        other.settimeout(0.3)
        with pytest.raises(socket.timeout):
            other.recv(1)
        other.settimeout(SECONDS)
        storage.told.set()
        for peer in (slow, other):
            assert read_answer(peer)[0] == 200
        monkeypatch.undo()


def test_a_fault_of_ours_ends_its_connection_only(served, log, monkeypatch):
    """An exception that nobody foresaw is one line in the log; the thread that serves all survives it."""
    with connect(served) as one, connect(served) as other:
        other.sendall(GET)
        assert read_answer(other)[0] == 200
        monkeypatch.setattr(served.server.service, "answer", lambda *given: 1 // 0)
        one.sendall(GET)
        assert rest(one) == b""
        monkeypatch.undo()
        other.sendall(GET)
        assert read_answer(other)[0] == 200
    assert [line for line in log if "error: connection: ZeroDivisionError" in line]
    log.clear()


def test_a_server_can_be_stopped_while_a_request_takes_long(log):
    """Idle connections are closed at once, what runs gets its time, and the answer says close."""
    with Slow() as storage, serving(storage, log=log.append) as served, connect(served) as slow, connect(
        served
    ) as idle:
        slow.sendall(SLOW)
        assert storage.asked.acquire(timeout=SECONDS)
        until(lambda: leaders() == 2, "another thread")
        idle.sendall(GET)
        assert read_answer(idle)[0] == 200
        served.server.shutdown()
        assert served.server.stop(0.2) is False
        assert rest(idle) == b""
        storage.told.set()
        assert b"Connection: close" in rest(slow)
        assert served.server.stop(SECONDS) is True
        until(lambda: not leaders(), "the end of the threads")


def test_a_head_that_has_begun_is_finished(served):
    """Told to stop, the server waits for the rest of a head, as it would for a body."""
    server, ended = served.server, []
    with connect(served) as peer, connect(served) as idle:
        idle.sendall(GET)
        read_answer(idle)
        peer.sendall(GET[:20])
        until(lambda: [handler for handler in server._connections if not handler.is_idle], "the beginning of a head")
        server.shutdown()
        stopper = threading.Thread(target=lambda: ended.append(server.stop(SECONDS)))
        stopper.start()
        assert rest(idle) == b""
        peer.sendall(GET[20:])
        assert b"200 OK" in (text := rest(peer)) and b"Connection: close" in text
        stopper.join()
    assert ended == [True]


def test_a_connection_that_rests_late_does_not_hold_up_the_end(storage):
    """Told to stop just after it said that it keeps the connection, the server closes it all the same."""
    with serving(storage, log=lambda line: setattr(served.server, "stopping", True)) as served, connect(served) as peer:
        peer.sendall(GET)
        assert "connection" not in read_answer(peer)[1]
        began = time.monotonic()
        assert rest(peer) == b""
        assert time.monotonic() - began < wmi.IDLE_SECONDS / 2


def test_stopping_with_every_connection_taken(storage):
    """The accept loop that waits for a place can be told to stop."""
    began = time.monotonic()
    with serving(storage, max_connections=1) as served:
        peers = [connect(served)]
        peers[0].sendall(GET + GET[:9])
        read_answer(peers[0])
        peers += [connect(served) for _ in range(2)]
        threading.Thread(target=lambda: [until(lambda: served.server.stopping), peers[0].close()]).start()
    assert time.monotonic() - began < wmi.GRACE_SECONDS * 0.8
    for peer in peers:
        peer.close()


def test_a_first_thread_that_cannot_start_is_started_later(storage, monkeypatch):
    """Where the system has no thread left, clients wait until it has one."""
    server = wmi.Server(storage, port=0, host_names=None)
    watcher = threading.Thread(target=server.serve_forever, daemon=True)
    with monkeypatch.context() as patch:
        watcher.start()
        patch.setattr(threading.Thread, "start", no_thread)
    with socket.create_connection(server.server_address[:2], SECONDS) as peer:
        peer.sendall(CLOSE)
        assert rest(peer).startswith(b"HTTP/1.1 200 ")
    server.shutdown()
    assert server.stop()


EXHAUSTED = """
import resource, sys, threading, time
import wmi
lines = []
server = wmi.Server(wmi.MemoryStorage(), port=0, host_names=None, log=lines.append)
threading.Thread(target=server.serve_forever, daemon=True).start()
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
print(server.url, flush=True)
for line in sys.stdin:  # each is a question
    print(time.process_time(), len(lines), sum("error: accept: " in line for line in lines), flush=True)
server.shutdown()
print(server.stop(), flush=True)
"""


def test_without_descriptors_the_server_neither_spins_nor_dies():
    """With no descriptor left it waits at low cost, says so, and serves again when there are some."""
    pytest.importorskip("resource", reason="the limit is POSIX's")
    child = subprocess.Popen(
        [sys.executable, "-c", EXHAUSTED], cwd=HERE, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def ask():
        child.stdin.write("\n")
        child.stdin.flush()
        cpu, *counts = child.stdout.readline().split()
        return float(cpu), *map(int, counts)

    try:
        port = int(child.stdout.readline().rsplit(":", 1)[1])
        peers = []
        try:
            for _ in range(60):
                peers.append(socket.create_connection(("127.0.0.1", port), SECONDS))
                peers[-1].sendall(b"GET /")  # what is idle would give way
            first = until(lambda: (counts := ask())[2] and counts, "a line about it in the log")
            threading.Event().wait(1)
            last = ask()
        finally:
            for peer in peers:
                peer.close()
        assert last[0] - first[0] < 0.4, "a second cost this much CPU time"
        assert 1 <= last[2] <= 60 and last[1] == last[2], "lines about it in the log"
        with socket.create_connection(("127.0.0.1", port), SECONDS) as peer:
            peer.sendall(CLOSE)
            assert rest(peer).startswith(b"HTTP/1.1 200 ")
    finally:
        out, _ = child.communicate(timeout=SECONDS)
    assert out == "True\n" and child.returncode == 0


# ---- the log ----

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 (\S+) (\S+) (\S+) (\d{3}) (\d+) \d+\.\dms")


def test_every_request_is_one_line(served, log):
    """A line has time, client, account, method, target, status, bytes and milliseconds."""
    body = served.request("GET", "/api/images?limit=1", {"X_VDC_ACCOUNT_UUID": ACCOUNT})[2]
    served.raw(GET + head("/nowhere", "HEAD") + b"nonsense\r\n\r\n")
    until(lambda: len(log) == 4)
    assert [LINE.fullmatch(line).groups() for line in log] == [
        (ACCOUNT, "GET", "/api/images?limit=1", "200", str(len(body))),
        (ACCOUNT, "GET", "/api/images", "200", LINE.fullmatch(log[1])[5]),
        (ACCOUNT, "HEAD", "/nowhere", "404", "0"),
        ("-", "-", "-", "400", LINE.fullmatch(log[3])[5]),
    ]


@pytest.mark.parametrize(
    "account",
    ["a b", "a\tb", "\xe9", "\x85", "\xa0", "\x9b31m", "a-x 200 0 0.0ms", "'", '"', "\\n", "x" * 5000, ""],
)
def test_accounts_cannot_forge_the_log(served, log, account):
    """Blanks, control characters and what is not ASCII are escaped; a line keeps its eight words."""
    fields = f"Host: a\r\nX-VDC-ACCOUNT-UUID: {account}\r\nConnection: close"
    served.raw(f"GET /api/images HTTP/1.1\r\n{fields}\r\n\r\n".encode("latin-1"))
    until(lambda: log)
    assert len(log) == 1 and LINE.fullmatch(log[0]), log
    assert log[0].isascii() and log[0].isprintable() and len(log[0]) < 1500


@pytest.mark.parametrize(
    "target", ["/%0a2011-11-23", "/api/images/wmi-%00%1b[31m", "/%E2%80%A8?\\n", "/" + "a" * 8000]
)
def test_targets_cannot_forge_the_log(served, log, target):
    """A target is logged as it was sent, which is visible ASCII, or escaped."""
    served.raw(head(target, "GET", "Connection: close"))
    until(lambda: log)
    assert len(log) == 1
    shown = LINE.fullmatch(log[0])[3]
    assert shown == target or (shown.startswith(target[:1000]) and len(log[0]) < 4096)  # a pipe's atomic write


def test_lines_are_written_together(served, monkeypatch):
    """What is answered together is one text of whole lines in order, or several small enough for a pipe."""
    monkeypatch.setattr(wmi, "TURN_SECONDS", SECONDS)  # another thread would write each line at once
    texts = []
    served.server._log = texts.append
    with connect(served) as peer:
        for count in (10, 300):
            del texts[:]
            peer.sendall(b"".join(head(f"/{number}/{'a' * (number % 90)}") for number in range(count)))
            assert [read_answer(peer)[0] for _ in range(count)] == [404] * count
            until(lambda count=count: "".join(texts).count("\n") == count, "all lines")
            assert all(text.endswith("\n") and len(text) <= wmi.PIPE_BUF for text in texts)
            targets = [LINE.fullmatch(line)[3] for line in "".join(texts).splitlines()]
            assert [target.split("/")[1] for target in targets] == list(map(str, range(count)))
            assert len(texts) == 1 or count == 300


def test_a_method_cannot_make_a_line_longer_than_a_write(served, log):
    """The whole of what a client can put into a line is bounded."""
    served.raw(b"M" * 8000 + CLOSE[3:])
    until(lambda: log)
    assert len(log) == 1 and len(log[0]) < wmi.PIPE_BUF


def test_reports_are_one_line(log):
    """A failure whose text has line ends or escape sequences is one line of visible ASCII."""

    class Broken(wmi.MemoryStorage):
        def revision(self):
            raise OSError("first\nsecond \x1b[31m \u2028 \xe9 \ud800")

    with serving(Broken(), log=log.append) as served:
        assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 503
    assert len(log) == 2 and "error: " in log[0] and "first" in log[0]
    assert all(line.isascii() and line.isprintable() for line in log)


def test_no_token_is_logged(served, log):
    """Fields that may hold secrets do not get into the log."""
    secrets = {
        "X-VDC-ACCOUNT-UUID": ACCOUNT,
        "X-VDC-REQUESTER-TOKEN": "hush1",
        "Authorization": "Basic hush2",
        "Cookie": "hush3",
    }
    assert served.request("GET", "/api/images", secrets)[0] == 200
    until(lambda: log)
    assert "hush" not in "".join(log)


def test_a_log_that_fails_does_not_stop_the_answers(tmp_path, storage):
    """A full disk under the log: the line is lost, the answer is not."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with (
        open("/dev/full", "wb", buffering=0) as full,
        serving(storage, log=lambda text: full.write(text.encode())) as served,
    ):
        for _ in range(3):
            assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 200


# ---- one send an answer, and what is not asked of the system ----


class Stub:
    """A TCP socket that writes down what is done to it, and has one piece to read."""

    family = socket.AF_INET

    def __init__(self, *pieces):
        self.pieces, self.sent, self.options = list(pieces), [], []
        self.readable, self._other = socket.socketpair()
        self._other.send(b"a")

    def fileno(self):
        """Return the descriptor of something that can be read."""
        return self.readable.fileno()

    def close(self):
        """Close what stands for it."""
        self.readable.close()
        self._other.close()

    def setsockopt(self, *option):
        """Write down an option."""
        self.options.append(option)

    def recv(self, size):
        """Return the next piece."""
        return self.pieces.pop(0) if self.pieces else b""

    def send(self, data):
        """Write down one send."""
        self.sent.append(bytes(data))
        return len(data)

    def shutdown(self, how):
        """Take any."""


@pytest.fixture
def unserved(storage):
    """A server whose loop does not run."""
    server = wmi.Server(storage, port=0, host_names=None)
    yield server
    server.stop()


@pytest.mark.parametrize(
    "raw",
    [
        GET,
        head("/api/images/wmi-one"),
        head("/nowhere"),
        head("/api/images", "HEAD"),
        b"nonsense\r\n\r\n",
        head("/api/images", "GET", "If-None-Match: *"),
        PUT + b"display_name=x",
    ],
)
def test_one_send_an_answer(unserved, raw):
    """Head and body leave in one send: two sends cost 40 ms a request, unless Nagle is off."""
    stub = Stub(raw)
    drive(stub, unserved)
    assert len(stub.sent) == 1
    _, fields, body = parse_answer(stub.sent[0])
    assert len(body) == (int(fields.get("content-length", 0)) if b"HEAD" not in raw else 0)


def test_nobody_else_is_let_in_by_default(unserved):
    """A server that is told no address, and a listener, are for this machine only."""
    assert unserved.url.startswith("http://127.0.0.1:")
    with wmi.listen(port=0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_name_service_is_not_asked(storage, monkeypatch):
    """The stock server asks for our own name, and for the client's in its log: either can stall."""

    def fail(*args):
        raise AssertionError("the name service was asked")

    for name in ("getfqdn", "gethostbyaddr", "gethostname", "getnameinfo"):
        monkeypatch.setattr(socket, name, fail)
    with serving(storage, log=lambda line: None) as served:
        assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 200


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


def descriptors():
    """Return how many descriptors this process has."""
    return len(os.listdir("/dev/fd"))


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="descriptors cannot be counted here")
def test_connections_leave_nothing(served):
    """Hundreds of connections, good, bad and cut, leave no descriptor and no thread."""
    served.raw(CLOSE)
    until(lambda: not connections(served) and leaders() == 1)
    before, threads = descriptors(), threading.active_count()  # which may count some that end now
    for number in range(300):
        if number % 3 == 2:
            with connect(served) as peer:
                peer.sendall(GET[: number % 50])
        else:
            served.raw(CLOSE if number % 3 else b"nonsense\r\n\r\n")
    until(lambda: descriptors() == before and threading.active_count() <= threads, "the end of all")


MEMORY = """
import sys, wmi
with wmi.open_storage("sqlite:" + sys.argv[1]) as storage:
    storage.add_all(wmi.image_record({"id": f"wmi-{n}", "account_id": "a-shpoolxx"}) for n in range(100))
    server = wmi.Server(storage, port=0, host_names=None)
    print(server.url, flush=True)
    wmi.run_server(lambda: server)
"""


def resident(pid):
    """Return the resident memory of a process in KiB, and how many descriptors and threads it has."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmRSS"].split()[0]), int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
def test_thousands_of_requests_leave_nothing(tmp_path):
    """6,000 requests on one connection leave descriptors, threads and memory as they were."""
    child = subprocess.Popen(
        [sys.executable, "-c", MEMORY, str(tmp_path / "images.db")],
        cwd=HERE,
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        port = int(child.stdout.readline().rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), SECONDS) as peer:
            peer.settimeout(SECONDS)
            marks = []
            for start in range(0, 8_000, 20):
                many = [head(f"/api/images/wmi-{n % 100}", "HEAD") for n in range(start, start + 20)]
                peer.sendall(b"".join(many))
                text = b""
                while text.count(b"\r\n\r\n") < 20:
                    text += peer.recv(65536) or pytest.fail("the connection ended")
                assert text.count(b"HTTP/1.1 200 ") == 20
                if start in (2000, 7_980):
                    until(lambda: resident(child.pid)[1] == 2, "the end of threads that were held up")
                    marks.append(resident(child.pid))
        assert marks[0][2] == marks[1][2]
        if not PYPY:  # whose compiler keeps what it makes
            assert marks[1][0] - marks[0][0] < 2048
            assert marks[1][0] < 40_000
    finally:
        child.terminate()
        child.communicate(timeout=SECONDS)
    assert child.returncode == 0


# ---- the command: start, signals, processes ----


class Command:
    """A `wmi serve` in a process, and what it prints."""

    def __init__(self, folder, *options, store="sqlite:images.db", script=(SCRIPT,), **more):
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("WMI_", "LISTEN_"))
        }
        more = {"stderr": subprocess.PIPE, "start_new_session": True, **more}
        port = () if "--unix-socket" in options or "pass_fds" in more else ("--port", "0")
        self.process = subprocess.Popen(
            [sys.executable, *script, "serve", "--store", store, "--host-name", "a", *port, *options],
            cwd=folder,
            env={**clean, "PYTHONPATH": HERE},
            text=True,
            **more,
        )
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if "serving" in line:
                break
        self._drain = threading.Thread(target=self._read)
        self._drain.start()
        found = re.search(r"http://([^/ ]*):(\d+)/", self.said[-1])
        self.host, self.port = (found[1].strip("[]"), int(found[2])) if found else ("", 0)
        self.pid = self.process.pid

    def _read(self):
        for line in self.process.stderr:
            self.said.append(line)

    def connect(self):
        """Return a connection to it."""
        return socket.create_connection((self.host, self.port), SECONDS)

    def ready(self):
        """Wait until a request is answered: before, a signal could come before its handler."""
        with self.connect() as peer:
            peer.sendall(CLOSE)
            assert rest(peer).startswith(b"HTTP/1.1 200 ")

    def refuses(self):
        """Return whether nobody listens any more."""
        try:
            self.connect().close()
        except ConnectionError:
            return True
        return False

    def wait(self):
        """Wait for the end and return the exit code."""
        code = self.process.wait(SECONDS)
        self._drain.join(SECONDS)
        return code

    def end(self):
        """End it and whatever it left in its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        self.process.stderr.close()


@pytest.fixture
def command(tmp_path):
    """Start servers that end with the test."""
    started = []

    def start(*options, **more):
        started.append(Command(tmp_path, *options, **more))
        return started[-1]

    if not hasattr(os, "fork"):
        pytest.skip("signals and processes of POSIX")
    yield start
    for each in started:
        each.end()


def children(pid):
    """Return the processes whose parent this is, zombies left out."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(int(name))
    return found


def alive(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
STOPS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])


def test_start_up_message(command):
    """One line says what is served and where, and the address is that of this machine alone."""
    server = command("--sample")
    url = f"http://127.0.0.1:{server.port}"
    assert server.said == [f"wmi: serving sqlite:images.db on {url}/api/images (page: {url}/)\n"]
    with server.connect() as peer:
        peer.sendall(CLOSE)
        assert json.loads(parse_answer(rest(peer))[2])["owner_total"] > 0


def test_ipv6_command(command):
    """`serve --host ::1` says a URL with brackets, and refuses there what it refuses elsewhere."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = command("--host", "::1", "--workers", "2")
    url = f"http://[::1]:{server.port}"
    assert server.said == [f"wmi: serving sqlite:images.db on {url}/api/images (page: {url}/)\n"]
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
)  # fmt: skip
def test_hosts_on_loopback(storage, host, status):
    """DNS rebinding: a page whose name was let point here sends that name, and gets nothing, not even what is kept."""
    with serving(storage, host_names=["Images.example"]) as served:
        for _ in range(3):
            for name in ("localhost", host):
                text = served.raw(CLOSE.replace(b"Host: a", b"Host: " + name.encode()))
            found, fields, body = parse_answer(text)
            assert found == status and (status == 200 or b"owner_total" not in body)
    assert status == 200 or fields["content-type"] == "application/json"


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
                 "Access-Control-Request-Headers: x-vdc-account-uuid", "Connection: close")  # fmt: skip
    assert b"access-control" not in served.raw(asked).lower()


def test_warning_where_others_can_call(command):
    """Listening for everybody without tokens is one clear warning."""
    server = command("--host", "0.0.0.0")
    warnings = [line for line in server.said if "warning" in line]
    assert len(warnings) == 1 and "0.0.0.0" in warnings[0] and "account" in warnings[0]


@WORKERS
@STOPS
def test_stopping_with_idle_connections(command, workers, number):
    """A connection that waits for its next request does not hold up the end; the exit code is 0."""
    server = command("--workers", workers)
    server.ready()
    peers = [server.connect() for _ in range(6)]
    for peer in peers[:4]:
        peer.sendall(GET)
        read_answer(peer)
    began = time.monotonic()
    os.kill(server.pid, number)
    assert server.wait() == 0
    assert time.monotonic() - began < wmi.GRACE_SECONDS * 0.8
    for peer in peers:
        assert rest(peer) == b""
        peer.close()
    assert server.refuses()


def begin_put(server):
    """Begin a request whose body is not whole yet, and wait until it is waited for."""
    server.ready()
    with server.connect() as peer:
        peer.sendall(
            head("/api/12.03/images/wmi-lucid0", "DELETE", "Connection: close")
        )  # a tombstone can be set
        rest(peer)
    peer = server.connect()
    target = "/api/12.03/images/wmi-lucid1"
    peer.sendall(head(target, "PUT", "Content-Length: 14", "Expect: 100-continue"))
    assert peer.recv(100).startswith(b"HTTP/1.1 100 ")
    return peer


@WORKERS
@STOPS
def test_what_runs_is_finished(command, workers, number):
    """Told to stop it accepts nobody, finishes what was begun, says close, and exits with 0."""
    server = command("--workers", workers, "--sample")
    with begin_put(server) as peer:
        os.killpg(server.pid, number)  # as a terminal or systemd does it: all processes get it
        until(server.refuses, "a closed listener")
        peer.sendall(b"display_name=x")
        status, fields, body = read_answer(peer)
        assert (status, fields["connection"], json.loads(body)["display_name"]) == (200, "close", "x")
    assert server.wait() == 0


@WORKERS
def test_what_runs_is_finished_after_a_signal_to_the_parent(command, workers):
    """SIGTERM to the one process that was started is enough, however many serve."""
    server = command("--workers", workers, "--sample")
    with begin_put(server) as peer:
        os.kill(server.pid, signal.SIGTERM)
        until(server.refuses, "a closed listener")
        peer.sendall(b"display_name=x")
        assert read_answer(peer)[0] == 200
    assert server.wait() == 0


@WORKERS
@STOPS
def test_second_signal_ends_at_once(command, workers, number):
    """Who asks twice does not wait for what runs."""
    server = command("--workers", workers, "--sample")
    with begin_put(server):
        os.kill(server.pid, number)
        until(server.refuses, "a closed listener")
        began = time.monotonic()
        os.kill(server.pid, number)
        server.wait()
        assert time.monotonic() - began < wmi.GRACE_SECONDS * 0.8


def test_waiting_for_what_runs_has_an_end(served):
    """A request that does not end in the time of grace is given up."""
    with connect(served) as peer:
        peer.sendall(head("/api/12.03/images/wmi-one", "PUT", "Content-Length: 14", "Expect: 100-continue"))
        assert peer.recv(100).startswith(b"HTTP/1.1 100 ")
        served.server.shutdown()
        began = time.monotonic()
        assert served.server.stop(0.3) is False
        assert 0.2 < time.monotonic() - began < wmi.GRACE_SECONDS * 0.8
        peer.sendall(b"display_name=x")
        assert b"Connection: close" in rest(peer)


@needs_unix
@WORKERS
def test_a_signal_right_after_the_start_line(tmp_path, workers):
    """Whoever reads the line may stop the server at once: it ends with 0 and leaves no socket behind."""
    for _ in range(4):
        path = tmp_path / "wmi.sock"
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "serve", "--store", "json:images.json", "--unix-socket", str(path),
             "--workers", workers],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with process:
            process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0
        assert not path.exists()


@needs_proc
def test_a_dead_worker_is_replaced(command):
    """kill -9 of one worker: the other serves on, and a new one comes; each serves."""
    server = command("--workers", "2")
    before = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)
    server.ready()
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    server.ready()
    after = until(lambda: (found := children(server.pid) - {victim}) and len(found) == 2 and found)
    assert len(after & before) == 1
    survivor = (after & before).pop()
    os.kill(survivor, signal.SIGKILL)  # now only the new one serves
    server.ready()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert not [pid for pid in after if alive(pid)]


@needs_proc
def test_workers_share_the_connections(command):
    """However fast they come, each process gets as many, or the others' cores are of no use."""
    patient = f"import sys, wmi; wmi.SHARE_SECONDS = {SECONDS / 4}; sys.exit(wmi.main())"  # on a busy machine
    server = command("--workers", "2", script=["-c", patient])
    server.ready()
    workers = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)

    def sockets():
        names = ((pid, f"/proc/{pid}/fd/{number}") for pid in workers for number in os.listdir(f"/proc/{pid}/fd"))
        return [pid for pid, name in names if os.path.lexists(name) and "socket" in os.readlink(name)]

    idle = until(lambda: (found := sockets()) and len(found) == 2 and found)  # each has the listener
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(server.connect())
        all_of_them = until(lambda: (found := sockets()) and len(found) == len(idle) + 40 and found)
        assert min(all_of_them.count(pid) for pid in workers) >= 1 + 19


@needs_proc
def test_a_worker_told_to_stop_is_replaced(command):
    """SIGTERM to one worker, as an operator may do, renews it; the server goes on."""
    server = command("--workers", "2")
    server.ready()
    before = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)
    os.kill(min(before), signal.SIGTERM)
    until(lambda: len(children(server.pid) - {min(before)}) == 2)
    server.ready()


@needs_proc
def test_workers_end_with_their_parent(command):
    """kill -9 of the parent: no worker stays behind and holds the port."""
    server = command("--workers", "2")
    server.ready()
    workers = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: not any(map(alive, workers)), "the end of the workers")
    assert server.refuses()


@needs_proc
def test_workers_that_cannot_start_do_not_spin(command, tmp_path):
    """A store that breaks after the start costs a try a second, not a core; the parent can be stopped."""
    server = command("--workers", "2")
    server.ready()
    with open(tmp_path / "images.db", "wb") as file:
        file.write(b"this is no database any more" * 100)
    for pid in children(server.pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: [line for line in server.said if "wmi: worker: " in line], "a failure")
    threading.Event().wait(0.7)  # a spin would show as many more
    assert len([line for line in server.said if "wmi: worker: " in line]) < 8
    assert "Traceback" not in "".join(server.said)
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.parametrize("target", ["file", "pipe"])
def test_log_lines_of_processes_never_interleave(command, tmp_path, target):
    """Two processes, eight clients, lines from short to the longest: each is whole."""
    server = command("--workers", "2", *(("--log", str(tmp_path / "log")) if target == "file" else ()))
    server.ready()

    def ask(number):
        with server.connect() as peer:
            for length in range(30):
                path = "/" + str(number) * (1 + length * 250 if length % 2 else 4)
                peer.sendall(head(path, "HEAD"))
                assert b"\r\n\r\n" in peer.recv(65536)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    lines = (
        (tmp_path / "log").read_text().splitlines()
        if target == "file"
        else [line.rstrip("\n") for line in server.said[1:]]
    )
    assert len(lines) == 8 * 30 + 1
    for line in lines:
        assert LINE.fullmatch(line), line[:200]
        assert re.fullmatch(r"/(?:(\d)\1*\.*|api/images)", LINE.fullmatch(line)[3])


# ---- sockets that are given, and sockets of files ----


@needs_unix
@WORKERS
def test_unix_socket(command, tmp_path, workers):
    """--unix-socket PATH serves there, says so, logs each request, and removes the file at the end."""
    path = str(tmp_path / "wmi.sock")
    server = command("--unix-socket", path, "--sample", "--workers", workers)
    assert path in server.said[-1] and "warning" not in "".join(server.said)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(SECONDS)
            peer.connect(path)
            peer.sendall(GET + CLOSE)
            assert rest(peer).count(b"HTTP/1.1 200 ") == 2
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert not os.path.exists(path)
    assert [line.split()[1:4] for line in server.said[1:]] == [["unix", ACCOUNT, "GET"]] * 4


@needs_unix
def test_unix_socket_that_a_crash_left_is_taken_over(command, tmp_path):
    """A socket file on which nobody listens is replaced; one that is in use is not."""
    path = str(tmp_path / "wmi.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    server = command("--unix-socket", path)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
    second = subprocess.run(
        [sys.executable, SCRIPT, "serve", "--store", "memory:", "--unix-socket", path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1 and "Traceback" not in second.stderr
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(SECONDS)
        peer.connect(path)
        peer.sendall(CLOSE)
        assert rest(peer).startswith(b"HTTP/1.1 200 ")
    assert server.process.poll() is None


@needs_unix
def test_unix_socket_does_not_replace_a_file(tmp_path):
    """A path that is something else is refused and stays as it is."""
    path = tmp_path / "precious"
    path.write_text("text")
    done = subprocess.run(
        [sys.executable, SCRIPT, "serve", "--store", "memory:", "--unix-socket", str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and str(path) in done.stderr
    assert path.read_text() == "text"


ACTIVATE = """
import os, sys
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def activated(listener, folder, *options):
    """Start `wmi serve` as systemd does: the listening socket is descriptor 3."""
    number = listener.fileno()
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            ACTIVATE,
            str(number),
            SCRIPT,
            "serve",
            "--store",
            "sqlite:images.db",
            "--host-name",
            "a",
            *options,
        ],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[number],
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
@WORKERS
def test_socket_activation(tmp_path, workers):
    """LISTEN_FDS and LISTEN_PID: the socket that was handed over is served, not --port, and stays open."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), SECONDS) as peer:  # before anybody serves
            peer.sendall(CLOSE)
            child = activated(listener, tmp_path, "--workers", workers, "--port", "1")
            try:
                assert f":{port}/" in child.stderr.readline()
                assert rest(peer).startswith(b"HTTP/1.1 200 ")
                peer.close()
            finally:
                child.terminate()
                child.communicate(timeout=SECONDS)
        assert child.returncode == 0
        with socket.create_connection(("127.0.0.1", port), SECONDS):
            pass


@needs_unix
def test_socket_activation_with_a_unix_socket(tmp_path):
    """systemd may hand over a Unix socket; its file is systemd's and stays."""
    path = str(tmp_path / "given.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as peer:
        listener.bind(path)
        listener.listen(8)
        child = activated(listener, tmp_path)
        try:
            peer.settimeout(SECONDS)
            peer.connect(path)
            peer.sendall(CLOSE)
            assert rest(peer).startswith(b"HTTP/1.1 200 ")
            peer.close()
        finally:
            child.terminate()
            child.communicate(timeout=SECONDS)
    assert child.returncode == 0
    assert os.path.exists(path)


@pytest.mark.parametrize(
    "environment",
    [{"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "", "LISTEN_FDS": ""}],
)
def test_activation_meant_for_others_is_ignored(monkeypatch, environment):
    """sd_listen_fds(3): the variables count only for the process that LISTEN_PID names."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with wmi.listen(port=0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
