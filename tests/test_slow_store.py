"""A store that is slow, locked or stuck: what is known goes on, the rest is told so in time, and threads are few."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import socket
import sqlite3
import threading
import time

import pytest
from serving import read_answer, serving
from support import ACCOUNT, SECONDS, Stuck, connect, connections, head, image, leaders, rest, until

import wmi


def test_what_the_store_does_not_answer_is_503_in_time(monkeypatch):
    """A call that does not return is answered for it, in the form of its version; its result is dropped, not sent."""
    monkeypatch.setattr(wmi, "STORE_SECONDS", 0.3)
    log = []
    with Stuck() as storage, serving(storage, log=log.append) as served, connect(served) as peer:
        began = time.monotonic()
        peer.sendall(head("/api/12.03/images/wmi-1.yml"))
        status, fields, body = read_answer(peer)
        assert status == 503 and 0.2 < time.monotonic() - began < SECONDS / 2
        assert fields["retry-after"] == "1" and fields["content-type"].startswith("text/yaml")
        assert b"Endpoints::Errors::DatabaseError" in body
        peer.sendall(head("/api/images"))  # needs no get: the connection goes on meanwhile
        assert read_answer(peer)[0] == 200
        storage.told.set()
        until(lambda: leaders() == 1)
        peer.sendall(head("/api/images/wmi-2"))
        assert json.loads(read_answer(peer)[2])["id"] == "wmi-2"
    assert [line.split()[5] for line in log if "/wmi-1.yml " in line] == ["503"]


def test_a_change_that_takes_too_long_is_said_to_be_unknown(monkeypatch):
    """Its thread may still make it, so nobody is told to try again; the client then takes 404 for success."""
    monkeypatch.setattr(wmi, "STORE_SECONDS", 0.3)
    told = threading.Event()

    class Sinking(wmi.MemoryStorage):
        def replace(self, id, change):
            assert told.wait(SECONDS)
            return super().replace(id, change)

    with Sinking() as storage, serving(storage) as served, connect(served) as peer:
        storage.add(image())
        peer.sendall(head("/api/images/wmi-one", "DELETE"))
        status, _, body = read_answer(peer)
        assert status == 503 and json.loads(body)["message"] == wmi._UNKNOWN
        told.set()
        until(lambda: storage.get("wmi-one")["deleted_at"])


def test_a_look_that_takes_long_each_time_is_waited_for():
    """As at a cluster far away: a look that began after a request had arrived serves it, however late it ends."""
    class Far(wmi.MemoryStorage):
        def revision(self):
            time.sleep(0.15)
            return super().revision()

    with Far() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        storage.add(image())
        peers = [stack.enter_context(connect(served)) for _ in range(5)]
        for peer in peers:
            peer.sendall(head("/api/images/wmi-one"))
        assert [read_answer(peer)[0] for peer in peers] == [200] * 5


def test_threads_are_bounded(monkeypatch):
    """However many requests wait for the store: those beyond the bound are refused at once, and the rest goes on."""
    monkeypatch.setattr(wmi, "STORE_SECONDS", 2 * SECONDS)  # by then the others are refused, too
    with Stuck() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(60)]
        peers[0].sendall(head("/api/images"))
        assert read_answer(peers[0])[0] == 200
        for peer in peers[1:]:
            peer.sendall(head("/api/images/wmi-1"))
        until(lambda: len(select.select(peers, [], [], 0)[0]) >= len(peers) - 1 - wmi.MAX_WAITING)
        refused = select.select(peers, [], [], 0)[0]
        for peer in refused:
            status, fields, body = read_answer(peer)
            assert (status, fields["retry-after"]) == (503, "1") and b'"110"' in body
        assert leaders() <= 2 * wmi.MAX_WAITING  # some may have just ended, or write the log
        storage.told.set()
        for peer in peers[1:]:
            if peer not in refused:
                assert read_answer(peer)[0] == 200
        until(lambda: leaders() == 1)
        peers[5].sendall(head("/api/images/wmi-1"))
        assert read_answer(peers[5])[0] == 200


class Far(wmi.MemoryStorage):
    """A store with one image that is asked for its revision over a network, which can hang."""

    def __init__(self):
        super().__init__()
        self.going = threading.Event()
        self.going.set()
        self.add(wmi.image_record({"id": "wmi-1", "account_id": ACCOUNT}))

    def revision(self):
        assert self.going.wait(SECONDS)
        return super().revision()


@contextlib.contextmanager
def hanging(storage, served, peers):
    """Let the store hang while these clients, more of them than may wait in threads, read kept and other answers."""
    for _ in range(4):  # after which the answer is kept
        peers[0].sendall(head("/api/images/wmi-1"))
        assert read_answer(peers[0])[0] == 200
    storage.going.clear()
    for number, peer in enumerate(peers):
        peer.sendall(head("/api/images" if number % 2 else "/api/images/wmi-1"))
    until(lambda: len(served.server._postponed) >= len(peers) - 1)
    try:
        yield
    finally:
        storage.going.set()


def test_a_look_that_hangs_holds_up_one_thread():
    """However many read while the store is asked for its revision, one look serves them all, none is refused."""
    count = 5 * wmi.MAX_WAITING
    with Far() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(count)]
        with hanging(storage, served, peers):
            with connect(served) as peer:  # what needs no look is answered meanwhile
                peer.sendall(head("/nowhere"))
                assert read_answer(peer)[0] == 404
                peer.sendall(head("/api/images/wmi-1", "DELETE"))
                assert read_answer(peer)[0] == 200
                peer.sendall(head("/api/images"))  # pipelined, and it gives up
                peer.sendall(head("/api/images"))
            assert leaders() == 2 and served.server.service.waiting == 1
        assert {read_answer(peer)[0] for peer in peers} == {200, 404}  # it was deleted meanwhile
        until(lambda: leaders() == 1 and len(served.server._connections) == count)


def test_a_look_that_hangs_too_long(monkeypatch):
    """Who waits for it is told so in time; later requests are served as soon as it is over."""
    monkeypatch.setattr(wmi, "STORE_SECONDS", 0.3)
    with Far() as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(2 * wmi.MAX_WAITING)]
        with hanging(storage, served, peers):
            for peer in peers:
                status, fields, _ = read_answer(peer)
                assert (status, fields["retry-after"]) == (503, "1")
        for peer in peers:
            peer.sendall(head("/api/images"))
            assert read_answer(peer)[0] == 200


@pytest.mark.parametrize("path", ["/api/images/wmi-1", "/api/images?limit=1"], ids=["kept", "new"])
def test_a_request_waits_for_one_slow_look_only(path):
    """The look that began after it had arrived serves it, also if another thread led while that look went on."""
    class Gated(wmi.MemoryStorage):
        gate, begun = threading.Semaphore(20), 0

        def revision(self):
            self.begun += 1
            assert self.gate.acquire(timeout=2 * SECONDS)
            return super().revision()

    with Gated() as storage, serving(storage) as served, connect(served) as peer:
        storage.add(wmi.image_record({"id": "wmi-1", "account_id": ACCOUNT}))
        for _ in range(4):
            peer.sendall(head("/api/images/wmi-1"))
            assert read_answer(peer)[0] == 200
        while storage.gate.acquire(blocking=False):
            pass
        before = storage.begun
        peer.sendall(head(path))
        until(lambda: storage.begun > before and leaders() == 2)
        storage.gate.release()
        try:
            assert read_answer(peer)[0] == 200  # although the next look hangs
        finally:
            storage.gate.release(20)


def test_a_round_has_one_look():
    """Answers that may be kept need none of their own: the look before the next round keeps them."""
    class Counted(wmi.MemoryStorage):
        looks = 0

        def revision(self):
            self.looks += 1
            return super().revision()

    with Counted() as storage, serving(storage) as served, connect(served) as peer:
        for number in range(30):
            peer.sendall(head(f"/api/images?limit={number // 3 + 1}"))
            assert read_answer(peer)[0] == 200
        assert len(served.server.service._kept) == 10
        assert storage.looks <= 31


def test_clients_that_hung_up_keep_no_thread(monkeypatch):
    """When the store goes on, the threads of clients that went away end, and their places are free."""
    with Stuck() as storage, serving(storage) as served:
        for _ in range(20):
            with connect(served) as peer:
                peer.sendall(head("/api/images/wmi-1"))
        until(lambda: served.server.service.waiting == wmi.MAX_WAITING)
        storage.told.set()
        until(lambda: leaders() == 1 and not served.server._connections and served.server.service.waiting == 0)


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A store in sqlite with 30 images, and another program's connection that can lock it."""
    url = f"sqlite:{tmp_path / 'images.db'}"
    monkeypatch.setattr(importlib.import_module("wmi.sqlite_store"), "BUSY_S", 0.5)
    with wmi.open_storage(url) as storage:
        storage.add_all(wmi.image_record({"id": f"wmi-{n}", "account_id": ACCOUNT}) for n in range(30))
        os.utime(tmp_path / "images.db", (1e9, 1e9))  # as if nobody had written for a while
        with contextlib.closing(sqlite3.connect(tmp_path / "images.db", isolation_level=None)) as other:
            yield storage, other


def test_a_locked_file(locked):
    """While another program locks the file, kept answers go on, and others are 503 in time; then all is well."""
    storage, other = locked
    log = []
    with serving(storage, log=log.append) as served, connect(served) as quick, contextlib.ExitStack() as stack:
        for _ in range(3):
            quick.sendall(head("/api/images/wmi-0"))
            assert read_answer(quick)[0] == 200
        other.execute("BEGIN EXCLUSIVE")
        peers = [stack.enter_context(connect(served)) for _ in range(40)]
        began = time.monotonic()
        for number, peer in enumerate(peers):
            peer.sendall(head(f"/api/images?limit=2&unknown={number}"))
        most = 0
        for _ in range(50):
            quick.sendall(head("/api/images/wmi-0"))
            assert read_answer(quick)[0] == 200
            most = max(most, leaders())
        for peer in peers:
            status, fields, _ = read_answer(peer)
            assert status == 503 and "retry-after" in fields
        assert time.monotonic() - began < wmi.STORE_SECONDS
        assert most < 3 * wmi.MAX_WAITING
        other.execute("ROLLBACK")
        began = time.monotonic()
        for peer in peers:
            peer.sendall(head("/api/images?limit=2"))
            assert read_answer(peer)[0] == 200
        assert time.monotonic() - began < wmi.STORE_SECONDS


def test_the_bounds_of_stores_and_server_fit():
    """A store gives up before the server does, so that the client is told why."""
    for scheme in ("json", "sqlite"):
        assert importlib.import_module(f"wmi.{scheme}_store").BUSY_S < wmi.STORE_SECONDS


# ---- what looks at all images ----


class Long(wmi.MemoryStorage):
    """A store of very many images, made up when they are walked; a walk may be stopped on its way."""

    def __init__(self, count):
        super().__init__()
        self.count, self.walked, self._template = count, 0, wmi.image_record({"account_id": ACCOUNT})
        self.going = threading.Event()
        self.going.set()

    def page(self, account, start, limit, **scope):
        """Return the first images."""
        records = [self._record(n) for n in range(start, min(self.count, start + limit))]
        return self.count, records

    def walk(self, account=None, *, start=0, **scope):
        """Yield them."""
        for number in range(start, self.count):
            self.walked += 1
            if number == self.count // 2:
                assert self.going.wait(SECONDS)
            yield self._record(number)

    def get(self, id):
        """Return any of them."""
        return self._record(int(id[4:]))

    def _record(self, number):
        return {**self._template, "id": f"wmi-{number}"}


FILTERED = head("/api/12.03/images?sort_by=description.asc&service_type=std")


@pytest.mark.parametrize("more", [
    b"",
    pytest.param(b"GET", marks=pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="Python does not tell")),
], ids=["silent", "unread"])
def test_a_walk_whose_client_is_gone_ends(more):
    """A client that hangs up while all images are looked at for it does not keep the server at it.

    Not even if it has sent more, such as another request or, with TLS, that it closes.
    """
    log = []
    with Long(20_000) as storage, serving(storage, log=log.append) as served:
        storage.going.clear()
        with connect(served) as peer:
            peer.sendall(FILTERED)
            until(lambda: storage.walked > storage.count // 2)
            peer.sendall(more)
        storage.going.set()
        until(lambda: leaders() == 1 and not served.server._connections)
        assert storage.walked < storage.count * 0.6
    assert "error" not in "".join(log)


def test_a_client_that_goes_while_it_is_sent_a_filtered_index_is_no_fault_of_the_server():
    """The answer is cut, and the log has its line, but no failure."""
    log = []
    with Long(20_000) as storage, serving(storage, log=log.append) as served, connect(served, 4096) as peer:
        peer.sendall(head("/api/12.03/images?service_type=std&limit=20000"))
        assert peer.recv(15) == b"HTTP/1.1 200 OK"
        peer.shutdown(socket.SHUT_WR)
        rest(peer)
        until(lambda: not connections(served))
    assert "error" not in "".join(log)


def test_walks_are_bounded(monkeypatch):
    """Requests that look at all images beyond the bound are 503 at once; others are answered."""
    monkeypatch.setattr(wmi, "STORE_SECONDS", 2 * SECONDS)  # by then the others are 503, too
    with Long(4_000) as storage, serving(storage) as served, contextlib.ExitStack() as stack:
        storage.going.clear()
        peers = [stack.enter_context(connect(served)) for _ in range(wmi.MAX_WALKS + 3)]
        for peer in peers:
            peer.sendall(FILTERED)
        until(lambda: len(select.select(peers, [], [], 0)[0]) >= 3)
        for peer in select.select(peers, [], [], 0)[0]:
            status, fields, _ = read_answer(peer)
            assert (status, fields["retry-after"]) == (503, "1")
            peer.sendall(head("/api/images?limit=1"))
            assert read_answer(peer)[0] == 200
            peers.remove(peer)
        storage.going.set()
        for peer in peers:
            peer.settimeout(60)
            assert peer.recv(15) == b"HTTP/1.1 200 OK"


def test_a_stream_whose_store_hangs_is_cut(monkeypatch):
    """Its place is free again, although a thread still waits in the walk; that is no fault of the server."""
    monkeypatch.setattr(wmi, "STORE_SECONDS", 0.3)
    log = []
    with Long(20_000) as storage, serving(storage, log=log.append) as served, connect(served, 4096) as peer:
        peer.sendall(head("/api/images"))
        assert peer.recv(15) == b"HTTP/1.1 200 OK"
        storage.going.clear()
        rest(peer)
        until(lambda: not connections(served))
        assert served.server.service._streams._value == wmi.MAX_STREAMS
        storage.going.set()
        until(lambda: leaders() == 1)
    assert not [line for line in log if "ValueError" in line]


def test_streams_are_bounded(monkeypatch):
    """So many long indexes are sent at once; one more is 503, until one of them ends or is given up."""
    monkeypatch.setattr(wmi, "MAX_STREAMS", 8)
    with Long(5_000) as storage, serving(storage, send_buffer=65536) as served, contextlib.ExitStack() as stack:
        peers = []
        for _ in range(wmi.MAX_STREAMS):
            peers.append(stack.enter_context(connect(served, 4096)))
            peers[-1].sendall(head("/api/images"))
            assert peers[-1].recv(15) == b"HTTP/1.1 200 OK"
        late = stack.enter_context(connect(served))
        for _ in range(3):
            late.sendall(head("/api/images"))
            assert read_answer(late)[0] == 503
        late.sendall(head("/api/images", "GET", "If-None-Match: *"))
        peers[0].close()
        until(lambda: served.server.service._streams._value)
        assert late.recv(12) in (b"HTTP/1.1 503", b"HTTP/1.1 304")
        with connect(served) as peer:
            peer.sendall(head("/api/images"))
            assert peer.recv(15) == b"HTTP/1.1 200 OK"


def test_a_head_or_a_304_of_a_long_index_leaves_nothing(monkeypatch):
    """Where the body is not sent, the walk behind it ends, and its place is free."""
    monkeypatch.setattr(wmi, "MAX_STREAMS", 8)
    with Long(20_000) as storage, serving(storage) as served, connect(served) as peer:
        for _ in range(2 * wmi.MAX_STREAMS):
            peer.sendall(head("/api/images", "GET", "If-None-Match: *"))
            assert peer.recv(65536).startswith(b"HTTP/1.1 304 ")
            peer.sendall(head("/api/images", "HEAD"))
            assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
        until(lambda: served.server.service._streams._value == wmi.MAX_STREAMS)


def test_what_clients_do_not_take_is_bounded(monkeypatch):
    """Answers that wait to be read take so much memory in all; beyond it, who took nothing for longest is cut."""
    monkeypatch.setattr(wmi, "MAX_BUFFERED", 300_000)
    with wmi.MemoryStorage() as storage:
        storage.add_all(wmi.image_record({"account_id": ACCOUNT, "description": "x" * 10_000}) for _ in range(5))
        with serving(storage) as served, contextlib.ExitStack() as stack:
            peers = [stack.enter_context(connect(served)) for _ in range(20)]
            for peer in peers:
                peer.sendall(head("/api/images") * 150)
            until(lambda: len(served.server._connections) < 10)
            assert served.raw(head("/nowhere", "GET", "Connection: close")).startswith(b"HTTP/1.1 404 ")
            until(lambda: sum(len(each.unsent) for each in list(served.server._connections)) <= wmi.MAX_BUFFERED)


def test_no_memory_is_503(monkeypatch):
    """A request for which there is no memory is told to come again; the next one is served."""

    class Full(wmi.MemoryStorage):
        def page(self, *args, **options):
            raise MemoryError

    with Full() as storage, serving(storage) as served, connect(served) as peer:
        peer.sendall(head("/api/images"))
        status, fields, _ = read_answer(peer)
        assert (status, fields["retry-after"]) == (503, "1")
        peer.sendall(head("/nowhere"))
        assert read_answer(peer)[0] == 404
