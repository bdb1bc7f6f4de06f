"""Who leads, who has a turn, who gives way; what is answered together, and how new it is."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from serving import parse_answer, read_answer, serving
from support import (
    ACCOUNT,
    CLOSE,
    GET,
    MODULE,
    PUT,
    SECONDS,
    SLOW,
    Slow,
    Stub,
    Stuck,
    connect,
    connections,
    drive,
    head,
    held,
    image,
    leaders,
    make_certificate,
    no_thread,
    reset,
    rest,
    until,
)

import wmi

# ---- one leader ----


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
    assert default == wmi.WORK_SECONDS == 0.05


def test_a_burst_of_new_clients_is_accepted_at_once(monkeypatch):
    """A round may take long, so new clients are not accepted one a round, and what they sent is answered in it."""
    rounds = []
    receive = wmi.Server._receive
    monkeypatch.setattr(wmi.Server, "_receive", lambda server: rounds.append(1) or receive(server))
    with wmi.MemoryStorage() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        with held(served):
            stack.enter_context(connect(served)).sendall(GET)  # serving it waits for held()
            until(lambda: connections(served) == 1)
            peers = [stack.enter_context(connect(served)) for _ in range(wmi.ACCEPT_AT_ONCE)]
            for peer in peers:
                peer.sendall(GET)
            rounds.clear()
        assert {read_answer(peer)[0] for peer in peers} == {200}
        assert len(rounds) < wmi.ACCEPT_AT_ONCE / 4


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


# ---- what arrives together ----


def test_what_arrives_together_needs_one_look_at_the_store(storage, monkeypatch):
    """However many requests have arrived, the store is asked for its revision once."""
    monkeypatch.setattr(wmi, "WORK_SECONDS", SECONDS)  # another thread would receive, and look, by itself
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
            unserved.service.look()
            storage.replace("wmi-one", lambda record: {**record, "description": "changed"})
            return super().recv(size)

    stub = Changing(head("/api/images/wmi-one"))
    drive(stub, unserved)
    assert json.loads(parse_answer(stub.sent[0])[2])["description"] == "changed"


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


# ---- what an attack found: each once brought it down ----


def put(id, name):
    """Return a request that changes an image."""
    fields = f"Host: a\r\nX-VDC-ACCOUNT-UUID: {ACCOUNT}\r\nContent-Length: {len(name) + 13}\r\n\r\ndisplay_name={name}"
    return f"PUT /api/12.03/images/{id} HTTP/1.1\r\n{fields}".encode()


def test_a_leader_that_starts_fast_is_watched(monkeypatch):
    """A new leader that works before its starter goes on is seen if it is held up, too."""
    start = threading.Thread.start

    def slowly(thread):
        start(thread)
        if thread.name == "wmi-leader":
            threading.Event().wait(0.05)  # the new leader is at work by now

    monkeypatch.setattr(threading.Thread, "start", slowly)
    log = []
    with Stuck() as storage, serving(storage, log=log.append) as served, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(served)).sendall(head("/api/images/wmi-1"))
        for _ in range(3):
            with connect(served) as peer:
                peer.sendall(head("/nowhere"))
                assert read_answer(peer)[0] == 404
        storage.told.set()
        until(lambda: leaders() == 1 and served.server.service.waiting == 0)
    assert not [line for line in log if "error: " in line]


@pytest.mark.skipif(not shutil.which("openssl"), reason="certificates are made by the openssl program")
@pytest.mark.filterwarnings("ignore:.*unclosed.*SSLSocket")  # wrap_socket() leaves it so if the reset comes just then
@pytest.mark.parametrize("text", [b"", b"x"])
def test_a_reset_before_tls_begins(tmp_path, text):
    """Clients that hang up before they are accepted, as scanners do, cost themselves only."""
    names = make_certificate(tmp_path, "first")
    with wmi.MemoryStorage() as storage, serving(storage, tls=wmi.tls_context(*names)) as served:
        for _ in range(60):
            peer = connect(served)
            peer.sendall(text)
            reset(peer)
        assert served.raw(head("/nowhere")).startswith(b"HTTP/1.1 400 ")
        until(lambda: leaders() == 1)


@pytest.mark.parametrize("more", [b"", head("/api/images/wmi-2"), None], ids=["end", "request", "reset"])
def test_a_connection_has_one_turn_at_a_time(more):
    """What arrives on a connection that waits for its turn does not give it a second one."""
    replaced, log = [], []

    class Counting(Stuck):
        def replace(self, id, change):
            replaced.append(id)
            return super().replace(id, change)

    with Counting() as storage, serving(storage, log=log.append) as served, contextlib.ExitStack() as stack:
        one, other, third = (stack.enter_context(connect(served)) for _ in range(3))
        until(lambda: len(served.server._connections) == 3)
        with served.server._lock:  # the leader waits here, so that all of these arrive together
            one.sendall(head("/api/images/wmi-1"))
            other.sendall(put("wmi-2", "x"))
            third.sendall(head("/nowhere"))
            threading.Event().wait(0.1)
        until(lambda: served.server._held)
        if more is None:
            reset(other)
        elif more:
            other.sendall(more)
        else:
            other.shutdown(socket.SHUT_WR)
        assert read_answer(third)[0] == 404
        storage.told.set()
        assert read_answer(one)[0] == 200
        for _ in range(0 if more is None else 1 + bool(more)):
            assert read_answer(other)[0] == 200
        third.sendall(head("/nowhere"))
        assert read_answer(third)[0] == 404
        assert not select.select([third], [], [], 0.05)[0]
    assert len(replaced) <= 1 and not [line for line in log if "error: " in line]


def fails_once(method):
    """Return the method, whose first call raises."""
    faults = [ZeroDivisionError()]

    def call(server):
        if faults:
            raise faults.pop()
        return method(server)

    return call


def test_a_fault_of_ours_does_not_end_the_service(monkeypatch):
    """Whatever kills the thread that leads, another one is started, and the log has the reason."""
    log = []
    with wmi.MemoryStorage() as storage, serving(storage, log=log.append) as served, connect(served) as peer:
        peer.sendall(head("/nowhere"))
        assert read_answer(peer)[0] == 404
        for name in ("_accept", "_check_limits"):
            with monkeypatch.context() as patch:
                patch.setattr(wmi.Server, name, fails_once(getattr(wmi.Server, name)))
                with connect(served):
                    until(lambda: [line for line in log if "ZeroDivisionError" in line])
            peer.sendall(head("/nowhere"))
            assert read_answer(peer)[0] == 404
            log.clear()
        until(lambda: leaders() == 1 and not served.server._held)


def test_a_store_that_raises_anything_when_it_is_looked_at():
    """What a look before a round meets is nobody's loss: each request looks for itself then."""

    class Odd(wmi.MemoryStorage):
        odd = False

        def revision(self):
            if self.odd:
                raise RuntimeError("odd")
            return super().revision()

        def page(self, *args, **options):
            self.odd = True
            return super().page(*args, **options)

    with Odd() as storage, serving(storage) as served, connect(served) as peer:
        for _ in range(5):
            storage.odd = False
            peer.sendall(head("/api/images"))
            assert read_answer(peer)[0] in (200, 500)
        until(lambda: leaders() == 1 and served.server.service.waiting == 0)


def read_on(peer):
    """Read until the end, which may be that of this socket."""
    with contextlib.suppress(OSError):
        while peer.recv(65536):
            pass


def test_streams_that_wait_for_the_store_are_bounded_too(monkeypatch):
    """Long answers whose next piece the store does not give take no more threads than requests."""
    told = threading.Event()
    told.set()

    class Pausing(wmi.MemoryStorage):
        def page(self, account, start, limit, **scope):
            return 60_000, [self._record(n) for n in range(limit)]

        def walk(self, account=None, **scope):
            for number in range(60_000):
                assert told.wait(SECONDS)
                yield self._record(number)

        def _record(self, number):
            return {**record, "id": f"wmi-{number}"}

    monkeypatch.setattr(wmi, "WORK_SECONDS", 0.01)
    record = wmi.image_record({"account_id": ACCOUNT, "description": "x" * 200})
    with Pausing() as storage, serving(storage, send_buffer=65536) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served, 16384)) for _ in range(32)]
        for peer in peers:
            peer.sendall(head("/api/images"))
            assert peer.recv(15) == b"HTTP/1.1 200 OK"
        told.clear()
        for peer in peers:
            threading.Thread(target=read_on, args=[peer], daemon=True).start()
        until(lambda: served.server.service.waiting >= 1)
        with connect(served) as peer:
            peer.sendall(head("/nowhere"))
            assert read_answer(peer)[0] == 404
        most = [0]  # beside those that wait there may be some that have just ended, or write the log

        def cut():
            most[0] = max(most[0], leaders())
            return len(served.server._connections) <= 2 * wmi.MAX_WAITING

        until(cut)
        assert most[0] < 3 * wmi.MAX_WAITING
        for peer in peers:
            peer.close()
        told.set()
        until(lambda: leaders() == 1)


def test_a_request_on_its_way_is_not_evicted():
    """With every place taken, a new connection does not close one whose request has just arrived."""
    with wmi.MemoryStorage() as storage, contextlib.ExitStack() as stack:
        server = wmi.Server(storage, port=0, host_names=None, max_connections=2)  # its loop does not run
        stack.callback(server.stop)
        server._check_limits()
        peers = []
        while len(server._connections) < 2:
            peers.append(stack.enter_context(socket.create_connection(server.server_address[:2], SECONDS)))
            server._receive()
        before = {*server._connections}
        for each in before:
            each.waiting_since -= 60  # both may give way
        stack.enter_context(socket.create_connection(server.server_address[:2], SECONDS))
        for peer in peers:
            peer.sendall(head("/nowhere"))
        until(lambda: len(server._selector.select(0)) == 3)
        server._receive()
        assert server._connections == before and len(server._turns) == 2
        for each in server._connections:
            each.close()


def test_half_a_head_does_not_keep_its_place(monkeypatch):
    """With every place taken by clients that sent one byte, a new client is served when they have stalled for long."""
    monkeypatch.setattr(wmi, "STALLED_SECONDS", 0.3)
    with wmi.MemoryStorage() as storage, serving(storage, max_connections=5) as served, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(served)).sendall(b"G")
        began = time.monotonic()
        assert served.request("GET", "/nowhere")[0] == 404
        assert time.monotonic() - began < wmi.HEAD_SECONDS * 0.8


def test_many_long_works_delay_what_needs_no_store():
    """While many requests that each take the store a while are queued, what is known is answered between them."""
    sent, log = threading.Event(), []

    class Busy(wmi.MemoryStorage):
        gets = 0

        def get(self, id):
            self.gets += 1
            if self.gets == 10:
                assert sent.wait(SECONDS)  # another request comes now
            threading.Event().wait(0.02)
            return super().get(id)

    with Busy() as storage, serving(storage, log=log.append) as served, contextlib.ExitStack() as stack:
        storage.add(wmi.image_record({"id": "wmi-1", "account_id": ACCOUNT}))
        quick = stack.enter_context(connect(served))
        for _ in range(3):
            quick.sendall(head("/api/images"))
            assert read_answer(quick)[0] == 200
        peers = [stack.enter_context(connect(served)) for _ in range(50)]
        until(lambda: len(served.server._connections) == 51)
        with served.server._lock:  # the leader waits here, so that all of these arrive together
            for number, peer in enumerate(peers):
                peer.sendall(head(f"/api/images/wmi-1?{number}"))
        until(lambda: storage.gets == 10)
        quick.sendall(head("/api/images"))
        sent.set()
        assert [read_answer(peer)[0] for peer in (quick, *peers)] == [200] * 51
        until(lambda: len(log) == 3 + 51)
    answered = [line.split()[4] for line in log[3:]]
    assert answered.index("/api/images") < 35  # a turn is three of the others


def test_a_client_that_pipelines_takes_turns_with_the_others(unserved):
    """Kept answers need no work, but 900 clients that asked for many at once made a new one wait for 5 s."""
    for _ in range(2):
        unserved.service.answer(wmi.parse_head(head("/api/images")))
    stub = Stub(head("/api/images") * (2 * wmi.ANSWERS_IN_A_TURN + 5))
    connection = wmi.Connection(stub, ("127.0.0.1", 1), unserved)
    wants, sent = connection.receive(), []
    unserved.service.look()
    while wants == wmi.TURN:
        assert not connection.unsent  # many that wait for their turn must not hold an answer each
        sent.append(len(stub.sent))
        wants = connection.advance()
    connection.close()
    assert wants == wmi.READ and len(stub.sent) == 2 * wmi.ANSWERS_IN_A_TURN + 5
    assert all(0 <= after - before <= wmi.ANSWERS_IN_A_TURN for before, after in zip(sent, sent[1:])) and len(sent) == 3


def test_a_closed_connection_counts_as_gone(unserved):
    """As the thread of a long walk finds out, when the leader has closed it: no failure of the store."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = wmi.Connection(ours, "", unserved)
    connection._check_alive()
    connection.close()
    with pytest.raises(wmi.Unreachable):
        connection._check_alive()
    theirs.close()


def test_the_log_counts_the_time_that_a_request_waits_for_its_turn(unserved):
    """However many rounds it waits, its milliseconds begin when it was received."""
    stub = Stub(head("/nowhere"))
    connection = wmi.Connection(stub, ("127.0.0.1", 1), unserved)
    connection.receive()
    received = time.monotonic()
    unserved.round_time = received + 60  # other rounds have begun
    assert connection.advance() == wmi.WORK
    assert connection.began <= received and connection.arrived <= received
    connection.close()


def test_pipelined_changes_delay_nobody_else():
    """Each change moves the time from which answers have to be new; it must not prolong the round."""
    class Slowly(wmi.MemoryStorage):
        def replace(self, id, change):
            time.sleep(0.002)
            return super().replace(id, change)

    with Slowly() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        storage.add(image())
        puts = head("/api/12.03/images/wmi-one?display_name=x", "PUT", "Content-Length: 0") * 100
        peers = [stack.enter_context(connect(served)) for _ in range(12)]
        for peer in peers:
            peer.sendall(puts)
        assert served.raw(head("/nowhere", "GET", "Connection: close")).startswith(b"HTTP/1.1 404 ")
        received = sum(len(peer.recv(1 << 20)) for peer in peers)
        assert received < len(peers) * len(puts) / 2  # the answers to most of them are still to come


def test_slow_pieces_of_long_answers_delay_nobody_else():
    """However many rounds end with work that takes longer than one may, others are received in each."""
    class Dragging(wmi.MemoryStorage):
        def page(self, *scope, **options):
            return 60_000, [record] * 50

        def walk(self, *scope, **options):
            for number in range(60_000):
                if number > 100 and number % 8 == 0:
                    time.sleep(0.07)
                yield record

    record = image(description="x" * 2000)
    with Dragging() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        storage.add(image())
        peers = [stack.enter_context(connect(served)) for _ in range(2)]
        for peer in peers:
            peer.sendall(GET)
            threading.Thread(target=read_on, args=[peer], daemon=True).start()
        until(lambda: leaders() > 1)
        began = time.monotonic()
        for _ in range(5):
            assert served.raw(head("/nowhere", "GET", "Connection: close")).startswith(b"HTTP/1.1 404 ")
        assert time.monotonic() - began < 5  # it was one answer in 12 s
        for peer in peers:
            reset(peer)


@pytest.mark.skipif(not hasattr(os, "fork") or not os.path.exists("/proc/self/stat"), reason="workers, and /proc")
def test_a_worker_that_stands_still_does_not_make_another_spin(tmp_path):
    """What a worker with fewer connections does not take in time, another one takes, at little cost."""
    process = subprocess.Popen(
        [sys.executable, MODULE, "serve", "--store", "json:i", "--port", "0", "--workers", "2", "--log", "-"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )
    try:
        port = int(process.stderr.readline().rpartition(":")[2].partition("/")[0])

        def workers():
            tasks = f"/proc/{process.pid}/task/{process.pid}/children"
            with open(tasks) as file:
                return list(map(int, file.read().split()))

        until(lambda: len(workers()) == 2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(socket.create_connection(("127.0.0.1", port), SECONDS))
            os.kill(workers()[0], signal.SIGSTOP)
            stack.callback(os.kill, workers()[0], signal.SIGCONT)
            began = time.monotonic()
            for _ in range(6):
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", port), SECONDS))
                peer.sendall(head("/nowhere").replace(b"Host: a", b"Host: localhost"))
                assert read_answer(peer)[0] == 404
            assert time.monotonic() - began < SECONDS / 2
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)
