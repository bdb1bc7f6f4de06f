"""Connections: clients that hang up, as many as there are places for, and what each costs."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref

import pytest
from serving import parse_answer, read_answer, serving
from support import (
    ACCOUNT,
    CHUNKED,
    CLOSE,
    GET,
    HERE,
    PUT,
    PYPY,
    SECONDS,
    Stub,
    connect,
    connections,
    drive,
    head,
    leaders,
    needs_proc,
    reset,
    rest,
    until,
)

import wmi

try:
    import resource
except ImportError:  # not on Windows
    resource = None

pytestmark = pytest.mark.usefixtures("quiet")


# ---- clients that go away ----


@pytest.mark.skipif(PYPY, reason="PyPy frees everything by its garbage collector")
@pytest.mark.parametrize(
    "text, phase", [(GET, wmi.IDLE), (GET[:20], wmi.HEAD), (PUT + b"name", wmi.BODY), (CHUNKED + b"3\r\nab", wmi.BODY)]
)
def test_closed_connection_is_freed_at_once(served, text, phase):
    """The bytes that a client has sent do not wait for the garbage collector, which may take minutes to come."""
    gc.disable()
    try:
        with connect(served) as peer:
            peer.sendall(text)
            connection = until(lambda: next((weakref.ref(each) for each in served.server._connections), None))
            until(lambda: connection().phase == phase and (connection().sent or phase))
            reader = weakref.ref(connection().reader)
        until(lambda: reader() is None)
    finally:
        gc.enable()


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
def test_hanging_up_in_the_answer(how, large, log):
    """A client that goes away while it is answered is one log line, without a traceback."""
    with serving(large, send_buffer=65536, log=log.append) as served:
        peer = connect(served, 4096)
        peer.sendall(GET)
        peer.recv(100)
        how(peer)
        until(lambda: not connections(served), "the end of the connection")
    assert len(log) == 1 and " 200 " in log[0]


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
        for number in range(500):
            if number % 100 == 99:
                assert served.request("GET", "/nowhere")[0] == 404  # those before it are accepted
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


@pytest.mark.parametrize("fields, body", [
    ("Content-Length: 9", b"x"), ("Transfer-Encoding: chunked", b"x\r\n"), ("Transfer-Encoding: gzip", b""),
])
def test_an_error_in_a_head_request_has_no_body(served, fields, body):
    """Neither if its head is refused, nor if the body that comes with it is (RFC 9110, 9.3.2)."""
    with connect(served) as peer:
        peer.sendall(head("/api/images", "HEAD", fields) + body)
        peer.shutdown(socket.SHUT_WR)
        answer = rest(peer)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")) and answer.endswith(b"\r\n\r\n")


def test_more_connections_than_16_bits_count(unserved):
    """--max-connections has no bound, so nor have the counts that workers share."""
    unserved.counts[unserved.worker] = 70_000
    assert max(unserved.counts) == 70_000


@pytest.mark.skipif(resource is None, reason="POSIX only")
def test_connections_leave_descriptors_to_the_store(storage, monkeypatch):
    """However many connections are allowed, those that the process has no descriptors for are not taken."""
    for limit, expected in ((50, 50 - wmi.SPARE_DESCRIPTORS), (-1, 1000)):  # -1: no limit
        monkeypatch.setattr(os, "sysconf", lambda name, limit=limit: limit)
        with serving(storage, max_connections=1000) as served:
            assert served.server._max_connections == expected


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


# ---- what a connection costs ----


def memory():
    """Return the resident memory of this process in KiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


@needs_proc
def test_a_connection_costs_little(storage, monkeypatch):
    """990 connections cost at most 15 MB beyond one, and no thread."""
    monkeypatch.setattr(wmi, "HEAD_SECONDS", 1000)  # however long it takes to open them
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


def test_freed_memory_is_given_back(served, monkeypatch):
    """A process of ours asks for it now and then; whoever embeds a server is not asked."""
    times = []
    served.server.trim()
    served.server.trim = lambda: times.append(1)
    monkeypatch.setattr(wmi, "TRIM_SECONDS", 0.01)
    until(lambda: len(times) > 2)
    wmi.memory_trimmer()()


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


@pytest.mark.parametrize(
    "raw",
    [
        GET, head("/api/images/wmi-one"), head("/nowhere"), head("/api/images", "HEAD"), b"nonsense\r\n\r\n",
        head("/api/images", "GET", "If-None-Match: *"), PUT + b"display_name=x",
    ],
)
def test_one_send_an_answer(unserved, raw):
    """Head and body leave in one send: two sends cost 40 ms a request, unless Nagle is off."""
    stub = Stub(raw)
    drive(stub, unserved)
    assert len(stub.sent) == 1
    _, fields, body = parse_answer(stub.sent[0])
    assert len(body) == (int(fields.get("content-length", 0)) if b"HEAD" not in raw else 0)


def test_the_name_service_is_not_asked(storage, monkeypatch):
    """The stock server asks for our own name, and for the client's in its log: either can stall."""

    def fail(*args):
        raise AssertionError("the name service was asked")

    for name in ("getfqdn", "gethostbyaddr", "gethostname", "getnameinfo"):
        monkeypatch.setattr(socket, name, fail)
    with serving(storage, log=lambda line: None) as served:
        assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 200


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
        [sys.executable, "-c", MEMORY, str(tmp_path / "images.db")], cwd=HERE, text=True, stdout=subprocess.PIPE,
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
        assert marks[1][2] <= marks[0][2] + 2  # a store may open a second connection when it is first needed
        if not PYPY:  # whose compiler keeps what it makes
            assert marks[1][0] - marks[0][0] < 2048
            assert marks[1][0] < 40_000
    finally:
        child.terminate()
        child.communicate(timeout=SECONDS)
    assert child.returncode == 0
