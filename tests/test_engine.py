"""What an attack on the engine found: who leads, who has a turn, who gives way. Each once brought it down."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from serving import read_answer, serving
from test_slow_store import ACCOUNT, SECONDS, Stuck, connect, head, leaders, until
from test_tls import make_certificate

import wmi

HANG_UP = struct.pack("ii", 1, 0)  # SO_LINGER of no time: a close is a reset


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
    with Stuck() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(served)).sendall(head("/api/images/wmi-1"))
        for _ in range(3):
            with connect(served) as peer:
                peer.sendall(head("/nowhere"))
                assert read_answer(peer)[0] == 404
        storage.told.set()


@pytest.mark.skipif(not shutil.which("openssl"), reason="certificates are made by the openssl program")
@pytest.mark.parametrize("text", [b"", b"x"])
def test_a_reset_before_tls_begins(tmp_path, text):
    """Clients that hang up before they are accepted, as scanners do, cost themselves only."""
    names = make_certificate(tmp_path, "first")
    with wmi.MemoryStorage() as storage, serving(storage, tls=wmi.tls_context(*names)) as served:
        for _ in range(60):
            peer = connect(served)
            peer.sendall(text)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, HANG_UP)
            peer.close()
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
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, HANG_UP)
            other.close()
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


def test_a_store_that_raises_anything_at_the_end_of_a_round():
    """What keep() meets is nobody's loss: the answer was sent."""

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

    monkeypatch.setattr(wmi, "TURN_SECONDS", 0.01)
    record = wmi.image_record({"account_id": ACCOUNT, "description": "x" * 200})
    with Pausing() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(32)]
        for peer in peers:
            peer.sendall(head("/api/images"))
            assert peer.recv(15) == b"HTTP/1.1 200 OK"
        told.clear()
        for peer in peers:
            threading.Thread(target=rest, args=[peer], daemon=True).start()
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


def rest(peer):
    """Read until the end, however it ends."""
    with contextlib.suppress(OSError):
        while peer.recv(1 << 16):
            pass


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
        for each in server._connections:
            each.waiting_since -= 60  # both may give way
        stack.enter_context(socket.create_connection(server.server_address[:2], SECONDS))
        for peer in peers:
            peer.sendall(head("/nowhere"))
        until(lambda: len(server._selector.select(0)) == 3)
        server._receive()
        assert len(server._connections) == 2 and len(server._turns) == 2
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

    class Busy(wmi.MemoryStorage):
        gets = 0

        def get(self, id):
            self.gets += 1
            threading.Event().wait(0.02)
            return super().get(id)

    with Busy() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
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
        quick.sendall(head("/api/images"))
        assert read_answer(quick)[0] == 200
        assert storage.gets < 25  # half of the queue; a turn is three of them


@pytest.mark.skipif(not hasattr(os, "fork") or not os.path.exists("/proc/self/stat"), reason="workers, and /proc")
def test_a_worker_that_stands_still_does_not_make_another_spin(tmp_path):
    """What a worker with fewer connections does not take in time, another one takes, at little cost."""
    process = subprocess.Popen(
        [sys.executable, wmi.__file__, "serve", "--store", "json:i", "--port", "0", "--workers", "2", "--log", "-"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
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
