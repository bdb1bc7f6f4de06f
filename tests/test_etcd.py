"""The store in etcd: the contract on real members, and attacks on members, clients and the way between them."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor

import members
import pytest
from members import Cluster, Relay, encode
from serving import parse_answer, raw, read_answer, serving
from support import free_port, until

import wmi
from wmi import etcd_store, sqlite_store
from wmi.contract import ALICE, StorageContract, dead, ids, image

ID = "wmi-00000001"


@pytest.fixture(scope="module")
def single():
    """A cluster of one member."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three():
    """A cluster of three members."""
    with Cluster(3) as cluster:
        yield cluster


@pytest.fixture
def whole(three):
    """The cluster of three members, all of which run, before and after the test."""
    yield three
    for number, process in three.processes.items():
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        if process.poll() is not None:
            three._start(number)
    three.wait()


@pytest.fixture
def opened():
    """Open stores that are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda location: stack.enter_context(etcd_store.open_storage(location))


@pytest.fixture
def hasty(monkeypatch):
    """A store that waits less long for a member, so that a test does."""
    for name, seconds in (("TRY_S", 0.5), ("CALL_S", 2.5), ("FENCE_S", 1.0), ("SILENT_S", 0.4)):
        monkeypatch.setattr(etcd_store, name, seconds)


# ---- the contract ----


class TestSingle(StorageContract, unittest.TestCase):
    opener = staticmethod(etcd_store.open_storage)
    shared = True

    @pytest.fixture(autouse=True)
    def _located(self, single, request):
        self.location, self.long = single.location(), request.config.getoption("--long")

    def operate(self, chance):
        """Of the random sequences do one, unless there is time."""
        if self.long or not hasattr(self, "operated"):
            self.operated = True
            super().operate(chance)


@pytest.mark.long
class TestThree(StorageContract, unittest.TestCase):
    opener = staticmethod(etcd_store.open_storage)
    shared = True

    @pytest.fixture(autouse=True)
    def _located(self, three):
        self.location = three.location()


# ---- changes whose answers are lost ----


def test_a_request_that_comes_late_does_nothing(single, opened, hasty):
    """A change that no answer came to is made again; the first request, come at last, brings nothing back."""
    with Relay(single.clients[0]) as relay:
        prefix = single.location().partition("/t/")[2]
        late = opened(f"{relay.url},{single.clients[0]}/t/{prefix}")
        other = opened(f"{single.clients[0]}/t/{prefix}")
        late.add(image(2))  # there is a session
        relay.hold = b"/v3/kv/txn"
        late.add(image(1))
        assert relay.held
        assert other.get(ID) == image(1)
        other.delete(ID)
        revision = other.revision()
        relay.release()
        until(lambda: b"revision" in b"".join(relay.late))
        assert b"succeeded" not in b"".join(relay.late)
        with pytest.raises(KeyError):
            other.get(ID)
        assert other.revision() == revision and ids(late.walk()) == ["wmi-00000002"]


CHANGES = [
    lambda store: store.add(image(1)),
    lambda store: store.replace("wmi-00000002", lambda record: {**record, "n": record.get("n", 0) + 1}),
    lambda store: store.delete("wmi-00000002"),
    lambda store: store.add_all([image(1), image(4)]),
    lambda store: store.add_all(image(10 + n) for n in range(250)),
]


@pytest.mark.parametrize("change", CHANGES, ids=["add", "replace", "delete", "few", "many"])
def test_a_change_whose_answer_is_lost_is_made_once(single, opened, hasty, change):
    """It is found out that the change was made: no error of a second try, and nothing is done twice."""
    with Relay(single.clients[0]) as relay:
        prefix = single.location().partition("/t/")[2]
        store, plain = opened(f"{relay.url},{single.clients[0]}/t/{prefix}"), opened(f"{single.clients[0]}/t/{prefix}")
        plain.add_all([image(2), image(3)])
        store.page(None, 0, 1)
        store.add(image(9))
        with wmi.MemoryStorage() as model:
            model.add_all([image(2), image(3), image(9)])
            change(model)
            relay.drop = b"/v3/kv/txn"
            change(store)
            assert list(plain.walk()) == list(model.walk())
            assert list(plain.check()) == []


def test_an_outcome_that_cannot_be_found_out_is_said_to_be_unknown(single, opened, hasty, monkeypatch):
    """EINPROGRESS in time, in words of its own over HTTP; nothing of it is left in the store object."""
    with Relay(single.clients[0]) as relay:
        prefix = single.location().partition("/t/")[2]
        store = opened(f"{relay.url}/t/{prefix}")
        store.add(wmi.image_record({"id": ID, "account_id": ALICE}))
        relay.drop = b"/v3/kv/txn"
        began = time.monotonic()
        monkeypatch.setattr(etcd_store, "CALL_S", 1.0)
        monkeypatch.setattr(etcd_store, "FENCE_S", 0.5)
        with pytest.raises(OSError, match="not said") as caught:
            store.replace(ID, lambda record: {**record, "state": "x"})
        assert caught.value.errno == errno.EINPROGRESS and time.monotonic() - began < 4
        relay.deaf = False
        relay.cut()
        until(lambda: works(lambda: store.get(ID)))
        assert store.get(ID)["state"] == "x"  # as it happens
        store.replace(ID, lambda record: {**record, "state": "available"})
        log = []
        with serving(store, log=log.append) as served:
            relay.drop = b"/v3/kv/txn"
            status, _, body = served.request("DELETE", f"/api/images/{ID}", {"X-VDC-ACCOUNT-UUID": ALICE})
        assert status == 503 and b"unknown" in body
        assert any("not said whether" in line for line in log)


def works(call):
    """Return whether a call succeeds."""
    try:
        call()
        return True
    except OSError:
        return False


# ---- another history ----


@pytest.mark.parametrize("changes", [1, 40])
def test_a_wiped_cluster_is_not_taken_for_the_old_one(changes, opened):
    """Behind the same addresses another history begins, shorter or longer: no image of the old one is shown."""
    with Cluster() as cluster:
        location = cluster.location()
        store, writer = opened(location), opened(location)
        store.add_all(image(n) for n in range(20))
        view = store.at_least(store.revision())
        assert view.page(None, 0, 0)[0] == 20
        cluster.wipe()
        for n in range(changes):
            writer.add(image(100 + n))
        until(lambda: works(store.revision))
        assert store.page(None, 0, 1) == (changes, [image(99 + changes)])
        view = store.at_least(store.revision())
        assert len(list(view.walk())) == changes
        with pytest.raises(KeyError):
            view.get(ID)


def test_another_history_is_noticed_by_reads(opened, hasty):
    """Also while the watch still hangs at a member of the old one, which is silent."""
    with Cluster() as old, Cluster() as new, Relay(old.clients[0]) as relay:
        prefix = old.location().partition("/t/")[2]
        store = opened(f"{relay.url}/t/{prefix}")
        store.add_all(image(n) for n in range(20))
        assert store.page(None, 0, 0)[0] == 20
        opened(f"{new.clients[0]}/t/{prefix}").add(image(100))
        host, port = new.clients[0].rpartition("/")[2].split(":")
        relay.target, relay.hold = (host, int(port)), b"/v3/kv/range"  # on the connection that is kept
        assert store.page(None, 0, 9) == (1, [image(100)])


def test_another_history_that_is_longer_is_noticed_by_the_watch(opened):
    """A watch that begins again there must not go on where the old one ended."""
    with Cluster() as old, Cluster() as new, Relay(old.clients[0]) as relay:
        prefix = old.location().partition("/t/")[2]
        store = opened(f"{relay.url}/t/{prefix}")
        store.add_all(image(n) for n in range(20))
        assert store.page(None, 0, 0)[0] == 20
        writer = opened(f"{new.clients[0]}/t/{prefix}")
        for n in range(40):
            writer.add(image(100 + n))
        host, port = new.clients[0].rpartition("/")[2].split(":")
        relay.target = host, int(port)
        relay.cut()
        until(lambda: works(store.revision))
        assert store.page(None, 0, 1) == (40, [image(139)])


# ---- loads ----

LOADER = """
import sys; sys.path[:] = {path!r}
from wmi import etcd_store
from wmi.contract import image
etcd_store.SESSION_S = 2
etcd_store.open_storage({location!r}).add_all(image(n) for n in range({count}))
"""


def killed_load(cluster, location, count=4000):
    """Have a process load images, and kill it among its intents; return the ids that it has put."""
    code = LOADER.format(path=sys.path, location=location, count=count)
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        prefix = f"/t/{location.partition('/t/')[2]}/"
        until(lambda: len(cluster.keys(prefix + "image/")) > 150)
        process.kill()
    left = cluster.keys(prefix + "image/")
    assert 150 < len(left) < count and not cluster.keys(prefix + "load/")
    return [key.rpartition("/")[2] for key in left]


def test_a_killed_load_means_nothing(single, opened):
    """No image of it is seen, every verb works over what it left, and check removes the rest."""
    location = single.location()
    store = opened(location)
    store.add_all([dead(image(1)), image(5000)])
    left = killed_load(single, location)
    assert list(store.walk()) == [image(5000), dead(image(1))]
    assert store.get(ID) == dead(image(1))
    for verb in (store.get, store.delete, lambda id: store.replace(id, dead)):
        with pytest.raises(KeyError):
            verb("wmi-00000002")
    store.add(image(3, n=1))
    store.add_all([image(4, n=1), image(7, n=1)])
    store.replace(ID, lambda record: {**record, "n": 1})
    want = [image(7, n=1), image(4, n=1), image(3, n=1), image(5000), {**dead(image(1)), "n": 1}]
    again = opened(location)  # its copy is made of what is there now
    for each in (store, again):
        assert list(each.walk()) == want
    until(lambda: list(store.check()))  # the lease of the load is over
    assert list(store.check(repair=True)) and list(store.check()) == []
    assert len(single.keys(f"/t/{location.partition('/t/')[2]}/image/")) == 5 < len(left)
    store.add_all(image(100 + n) for n in range(250))
    for each in (store, again, opened(location)):
        assert list(each.walk(oldest_first=True)) == want[::-1] + [image(100 + n) for n in range(250)]


def test_a_repair_does_not_harm_a_load(single, opened):
    """What a dead load left is not taken back where another load, which goes on, has put its own over it."""
    location = single.location()
    store, loader = opened(location), opened(location)
    killed_load(single, location)
    until(lambda: list(store.check()))
    repair = store.check(repair=True)
    next(repair)  # it has begun

    def source():
        yield from (image(n) for n in range(250))
        assert list(repair)
        yield from (image(n) for n in range(250, 400))

    loader.add_all(source())
    assert list(store.walk(oldest_first=True)) == [image(n) for n in range(400)]
    list(store.check(repair=True))
    assert len(single.keys(f"/t/{location.partition('/t/')[2]}/image/")) == 400


def test_a_load_that_loses_an_image_fails(single, opened):
    """Who adds an image that a load holds, or deletes the tombstone below it, wins; nothing is left of the load."""
    location = single.location()
    loader, other = opened(location), opened(location)
    loader.add_all([dead(image(5)), image(600)])
    keys = f"/t/{location.partition('/t/')[2]}/image/"
    for act in (lambda: other.delete("wmi-00000005"), lambda: other.add(image(5))):
        def source(act=act):
            yield from (image(n) for n in range(300))
            assert f"{keys}wmi-00000064" in single.keys(keys)
            act()
            yield from (image(n) for n in range(300, 500))

        with pytest.raises(OSError, match="nothing was changed"):
            loader.add_all(source())
    want = [image(5), image(600)]
    assert list(loader.walk()) == list(other.walk()) == want
    assert list(other.check()) == [] and len(single.keys(keys)) == len(want)
    with pytest.raises(FileExistsError, match="wmi-00000005"):
        loader.add_all(image(n) for n in range(300))


def test_a_load_over_large_tombstones(single, opened):
    """Until a load is done, its keys hold the tombstones too, which count for the size of a transaction."""
    store = opened(single.location())
    store.add_all(dead(image(n, description="x" * 20_000)) for n in range(110))
    assert store.add_all(image(n) for n in range(110)) == 110
    assert store.page(None, 0, 0) == (110, [])


def test_a_load_whose_source_fails_leaves_nothing(single, opened):
    """However much of it was put: an exception of the source comes out as it is, and the keys are as before."""
    location = single.location()
    store = opened(location)
    store.add_all([dead(image(7)), image(600)])

    def source():
        yield from (image(n) for n in range(350))
        yield dead(image(1000))
        yield from (image(n) for n in range(350, 480))
        yield image(1000)  # over a tombstone of the load itself, in another transaction
        raise RuntimeError("x")

    with pytest.raises(RuntimeError, match="x"):
        store.add_all(source())
    assert list(store.walk()) == [image(600), dead(image(7))] and list(store.check()) == []
    assert len(single.keys(f"/t/{location.partition('/t/')[2]}/image/")) == 2

    def whole():
        with contextlib.suppress(RuntimeError):
            yield from source()

    assert store.add_all(whole()) == 482
    with opened(location) as again:
        want = [600, *range(480), 1000]
        assert list(again.walk(oldest_first=True)) == list(store.walk(oldest_first=True)) == [image(n) for n in want]


def test_a_load_waits_for_its_source(single, opened):
    """While the source is silent, no session can be renewed: each lives for an hour, and is renewed by what comes."""
    def leases():
        found = single.ask("/v3/lease/leases", {}).get("leases", [])
        return {each["ID"]: int(single.ask("/v3/lease/timetolive", each)["TTL"]) for each in found}

    def source():
        yield from (image(n) for n in range(250))
        during.update(leases())
        yield image(250)

    store, before, during = opened(single.location()), leases(), {}
    assert store.add_all(source()) == 251
    ours = [seconds for lease, seconds in during.items() if lease not in before]
    assert len(ours) == 2 and min(ours) > 3500  # of the client and of the load


# ---- members that are gone ----


def test_without_quorum_it_is_said_at_once(whole, opened, monkeypatch):
    """Two of three members are dead: 503 within 5 s, the next ones at once; all works again without a restart."""
    assert etcd_store.CALL_S == 5  # half of which is waited for here
    monkeypatch.setattr(etcd_store, "CALL_S", 2.5)
    store = opened(whole.location())
    store.add(wmi.image_record({"id": ID, "account_id": ALICE}))
    log = []
    with serving(store, log=log.append) as served:
        def show():
            began = time.monotonic()
            status, _, body = served.request("GET", f"/api/images/{ID}", {"X-VDC-ACCOUNT-UUID": ALICE})
            return status, body, time.monotonic() - began

        assert show()[0] == 200
        survivor = whole.leader()
        gone = [number for number in range(3) if number != survivor]
        whole.kill(*gone)
        status, body, seconds = show()
        assert status == 503 and b"no quorum" in body and seconds < 4
        for _ in range(5):
            status, body, seconds = show()
            assert status == 503 and b"no quorum" in body and seconds < 0.5
        assert served.request("GET", "/nowhere")[0] == 404
        assert any("quorum" in line for line in log)
        whole.start(*gone)
        until(lambda: show()[0] == 200)
        store.replace(ID, lambda record: {**record, "state": "x"})


def test_a_call_without_time_does_not_stop_the_others(single, opened):
    """That a thread had no time left says nothing about the cluster: other threads are served."""
    store = opened(single.location())
    store.add(image(1))

    def hurry():
        for _ in range(20):
            store._client.cluster.allow(0.0001)
            with contextlib.suppress(OSError):
                store._client.changes.find(ID)

    thread = threading.Thread(target=hurry)
    thread.start()
    thread.join()
    assert store.get(ID) == image(1)


def test_a_call_without_time_does_not_fail_those_that_come_next(single, opened, hasty):
    """Nor need the others wait until one of them has been answered: several are served at once."""
    with Relay(single.clients[0]) as relay:
        store, held = opened(f"{relay.url}/t/{single.location().partition('/t/')[2]}"), []
        store.add(image(1))
        store._client.cluster.allow(0.0)
        with pytest.raises(OSError, match="no time is left"):
            store._client.changes.find(ID)
        relay.hold = b"/v3/kv/range"
        thread = threading.Thread(target=lambda: held.append(store.get(ID)))
        thread.start()
        until(lambda: relay.held)
        assert store.get(ID) == image(1)
        thread.join()
        assert held == [image(1)]


def test_a_member_that_is_started_again_is_asked_at_once(opened):
    """However many idle connections to it there were."""
    with Cluster() as cluster:
        store = opened(cluster.location())
        store.add(image(1))
        channels = [store._client.cluster._connect(1.0) for _ in range(100)]
        for channel in channels:
            store._client.cluster._ask(channel, "/v3/maintenance/status", {}, 5.0)
        assert len(store._client.cluster._idle) == 100
        cluster.kill(0)
        cluster.start(0)
        began = time.monotonic()
        assert store.get(ID) == image(1)
        assert time.monotonic() - began < 2


@pytest.mark.long
@pytest.mark.parametrize("role", ["leader", "follower"])
def test_no_read_fails_when_a_member_hangs(whole, opened, role):
    """SIGSTOP does not close a connection: each read waits until it asks another member."""
    attack_a_member(whole, opened, signal.SIGSTOP, role)


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_no_read_fails_when_a_member_dies(whole, opened, role):
    """Nor when it is killed with SIGKILL."""
    attack_a_member(whole, opened, signal.SIGKILL, role)


def attack_a_member(whole, opened, signum, role):
    """One of three dies or hangs: every read is answered, by both servers, and shows each change."""
    leader = whole.leader()
    victim = leader if role == "leader" else (leader + 1) % 3
    order = [victim, (victim + 1) % 3, (victim + 2) % 3]  # the one that both ask first
    location = whole.location(*order)
    writer = opened(location)
    writer.add(wmi.image_record({"id": ID, "account_id": ALICE, "description": "0"}))
    stores = opened(location), opened(location)
    with serving(stores[0]) as one, serving(stores[1]) as two:
        def check(number):
            for served in (one, two):
                for target in (f"/api/images/{ID}", "/api/images"):
                    status, _, body = served.request("GET", target, {"X-VDC-ACCOUNT-UUID": ALICE})
                    assert status == 200 and f'"description":"{number}"'.encode() in body, body

        for number in range(1, 8):
            if number == 3:
                whole.signal(victim, signum)
            writer.replace(ID, lambda record, number=number: {**record, "description": str(number)})
            check(number)


def test_no_read_of_many_clients_fails_when_the_leader_dies(whole, opened):
    """32 clients on connections that are kept, more than a server has threads: each read waits, and is answered 200."""
    leader = whole.leader()
    store = opened(whole.location(leader, (leader + 1) % 3, (leader + 2) % 3))  # the one that is asked first
    store.add_all(wmi.image_record({"id": f"wmi-{n}", "account_id": ALICE}) for n in range(10))
    stop, answers, failures = threading.Event(), [0] * 32, []

    def read(number):
        with socket.create_connection((served.host, served.port), timeout=20) as peer:
            for n in itertools.count(number):
                target = f"/api/images/wmi-{n % 12}" if n % 12 < 10 else "/api/images"
                head = f"GET {target} HTTP/1.1\r\nHost: {served.host}\r\nX-VDC-ACCOUNT-UUID: {ALICE}\r\n\r\n"
                peer.sendall(head.encode())
                status, _, body = read_answer(peer)
                answers[number] += 1
                if status != 200:
                    failures.append((status, body))
                if stop.is_set():
                    return

    with serving(store) as served:
        until(lambda: served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ALICE})[0] == 200)
        threads = [threading.Thread(target=read, args=[number]) for number in range(32)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: min(answers) > 3)
            whole.kill(leader)
            before = list(answers)
            until(lambda: all(now > then + 10 for now, then in zip(answers, before)))  # a new leader serves all of them
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert failures == [], (len(failures), sum(answers), failures[0])


# ---- compaction ----


def test_compaction_in_a_gap_of_the_watch(single, opened):
    """What happened while the watch was cut is seen though it can no longer be watched."""
    with Relay(single.clients[0]) as relay:
        prefix = single.location().partition("/t/")[2]
        other = opened(f"{single.clients[0]}/t/{prefix}")
        other.add_all(image(n) for n in range(10))
        with contextlib.closing(etcd_store.open_storage(f"{relay.url}/t/{prefix}")) as store:
            assert store.page(None, 0, 0)[0] == 10
            copy = store._client.follower.state.replica
            for changes in (0, 1):
                relay.target, target = ("127.0.0.1", 9), relay.target  # discard: nobody is there
                relay.cut()
                for n in range(changes):
                    other.delete(f"wmi-{n:08x}")
                    other.add(image(50 + n))
                single.ask("/v3/kv/put", {"key": encode("elsewhere"), "value": ""})
                single.compact()
                relay.target = target
                until(lambda: works(store.revision))
                assert list(store.walk()) == list(other.walk())
                assert (store._client.follower.state.replica is copy) == (not changes)  # made anew only if need be
                other.add(image(60 + changes))
                assert store.page(None, 0, 1) == other.page(None, 0, 1)


def test_compaction_during_a_walk_and_while_the_copy_is_made(single, opened, monkeypatch):
    """A walk goes on, and a copy whose revision is compacted meanwhile is begun anew."""
    location = single.location()
    store = opened(location)
    store.add_all(image(n) for n in range(400))
    for frozen in (True, False):
        walk = store.walk(frozen=frozen)
        seen = [next(walk)]
        store.replace("wmi-00000000", lambda record: {**record, "n": 1})
        single.compact()
        assert len(seen + list(walk)) == 400
    monkeypatch.setattr(etcd_store, "PAGE", 16)
    done = threading.Event()

    def compact():
        for n in range(5):
            store.replace("wmi-00000000", lambda record, n=n: {**record, "n": n})
            single.compact()
        done.set()

    thread = threading.Thread(target=compact)
    thread.start()
    with etcd_store.open_storage(location) as late:
        assert len(list(late.walk())) == 400
    thread.join()
    assert done.is_set()


# ---- what etcd refuses ----


def test_a_full_quota(opened):
    """Changes are refused with the reason, and nothing is lost; reads go on; with space again all is well."""
    with Cluster(1, "--quota-backend-bytes", str(4 << 20)) as cluster:
        store = opened(cluster.location())
        store.page(None, 0, 0)
        kept, errors = [], []

        def fill(first):  # several at once: some are refused before they are done, and some after
            try:
                for n in range(first, first + 200):
                    store.add(image(n, description="x" * 100_000))
                    kept.append(n)
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=fill, args=[first]) for first in range(0, 1600, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == len(threads) and all("space" in str(error) and not error.errno for error in errors)
        assert sorted(int(id[4:], 16) for id in ids(store.walk())) == sorted(kept) and len(kept) > 5
        with pytest.raises(OSError, match="space"):
            store.delete(f"wmi-{kept[0]:08x}")
        assert store.get(f"wmi-{kept[0]:08x}")
        prefix = "/t/" + store._location.partition("/t/")[2]
        for n in kept[1:]:  # as an administrator would
            cluster.ask("/v3/kv/deleterange", {"key": encode(f"{prefix}/image/wmi-{n:08x}")})
        cluster.compact()
        cluster.ask("/v3/maintenance/defragment", {}, seconds=30)
        for alarm in cluster.ask("/v3/maintenance/alarm", {"action": "GET"})["alarms"]:
            cluster.ask("/v3/maintenance/alarm", {"action": "DEACTIVATE", **alarm})
        store.add(image(5000))
        with etcd_store.open_storage(store._location) as again:
            assert ids(again.walk()) == [f"wmi-{5000:08x}", f"wmi-{kept[0]:08x}"]


def test_a_token_that_is_not_valid_any_more(opened, monkeypatch):
    """With authentication on, a token is got, and got anew; a wrong password, or none, is said; it is never shown."""
    with Cluster() as cluster:
        location = cluster.location()
        with etcd_store.open_storage(location) as before:
            before.add(image(1))
        cluster.ask("/v3/auth/user/add", {"name": "root", "password": "s3cret"})
        cluster.ask("/v3/auth/role/add", {"name": "root"})
        cluster.ask("/v3/auth/user/grant", {"user": "root", "role": "root"})
        cluster.ask("/v3/auth/enable", {})
        with etcd_store.open_storage(location) as nobody, pytest.raises(OSError, match="WMI_ETCD_USER"):
            nobody.get(ID)
        monkeypatch.setenv("WMI_ETCD_USER", "root")
        monkeypatch.setenv("WMI_ETCD_PASSWORD", "wrong-one")
        with etcd_store.open_storage(location) as wrong:
            with pytest.raises(OSError, match="authentication failed") as caught:
                wrong.get(ID)
        assert "wrong-one" not in str(caught.value)
        monkeypatch.setenv("WMI_ETCD_PASSWORD", "s3cret")
        store = opened(location)
        assert store.page(None, 0, 9) == (1, [image(1)])
        store.add(image(2))
        cluster.kill(0)
        cluster._start(0)  # which forgets its tokens
        until(lambda: works(store.revision))
        store.replace(ID, lambda record: {**record, "n": 1})
        assert list(store.walk()) == [image(2), image(1, n=1)]


def test_a_gateway_that_is_switched_off(opened):
    """The error says which option of etcd is missing."""
    with contextlib.ExitStack() as stack:
        cluster = Cluster.__new__(Cluster)
        wait, Cluster.wait = Cluster.wait, lambda self: None
        stack.callback(setattr, Cluster, "wait", wait)
        cluster.__init__(1, "--enable-grpc-gateway=false")
        stack.enter_context(cluster)
        store = opened(cluster.location())

        def message():
            with pytest.raises(OSError, match=".") as caught:
                store.get(ID)
            return str(caught.value)

        until(lambda: "enable-grpc-gateway" in message())


@pytest.mark.parametrize("answer", [
    b"", b"\r\n\r\n", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 200 OK\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>",
])
def test_what_is_not_etcd(opened, hasty, answer, monkeypatch):
    """Whatever answers there, a read is an OSError in time, not an image that is not there."""
    monkeypatch.setattr(etcd_store, "CALL_S", 0.15)  # nothing here ever succeeds
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        peer.recv(65536)
                        peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        store = opened(f"http://127.0.0.1:{listener.getsockname()[1]}/x")
        for read in (lambda: store.get(ID), store.revision, lambda: store.page(None, 0, 1)):
            with pytest.raises(OSError, match="quorum"):
                read()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("location", [
    "", "images", "http://", "http://127.0.0.1:2379", "http://127.0.0.1:2379/", "ftp://127.0.0.1:2379/x",
    "http://127.0.0.1:2379,127.0.0.1:2380/x", "http://user:s3cret@127.0.0.1:2379/x",
    "http://127.0.0.1:2379,http://user:s3cret@127.0.0.1/x",
])
def test_a_location_that_is_none(location):
    """ValueError that shows the form, and never a password."""
    with pytest.raises(ValueError, match="PREFIX") as caught:
        etcd_store.open_storage(location)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.pem", "empty.pem", "text.pem", ""])
def test_a_cafile_that_is_none(tmp_path, name):
    """The error names the file and says what it has to be."""
    (tmp_path / "empty.pem").touch()
    (tmp_path / "text.pem").write_text("hello")
    path = str(tmp_path / name)  # the last one is a folder
    with pytest.raises(ValueError, match=f"{re.escape(path)} is not a file of PEM certificates"):
        etcd_store.open_storage(f"https://127.0.0.1:2379/x?cafile={path}")


def test_what_is_too_large_is_refused(single, opened):
    """An image that etcd does not take is an error; nothing is done, and the store goes on."""
    store = opened(single.location())
    for verb in (store.add, lambda record: store.add_all([image(2), record])):
        with pytest.raises(OSError, match="large"):
            verb(image(1, description="x" * 2_000_000))
    assert store.page(None, 0, 9) == (0, [])
    store.add(image(1))


NOT_OURS = ["hello", "[]", "{}", '{"record": 5}', '{"record": {"id": "wmi-00000002"}}', '{"load": 5, "record": {}}',
            json.dumps({"record": image(3)}), "[" * 100_000]


@pytest.mark.parametrize("value", NOT_OURS, ids=range(len(NOT_OURS)))
def test_a_value_that_is_not_ours_is_refused(single, opened, value):
    """It is named by every read that would need it, and by check; it is not overwritten, and without it all is well."""
    location = single.location()
    store = opened(location)
    store.add(image(1))
    assert store.page(None, 0, 0)[0] == 1
    key = f"/t/{location.partition('/t/')[2]}/image/wmi-00000002"
    single.ask("/v3/kv/put", {"key": encode(key), "value": encode(value)})
    with pytest.raises(OSError, match="wmi-00000002"):
        store.get("wmi-00000002")
    with pytest.raises(OSError, match="wmi-00000002"):
        store.add(image(2))
    assert any("wmi-00000002" in fault for fault in store.check())
    single.ask("/v3/kv/deleterange", {"key": encode(key)})
    store.add(image(4))
    assert store.at_least(store.revision()).page(None, 0, 0)[0] == 2
    assert list(store.check()) == [] and list(store.walk()) == [image(4), image(1)]


@pytest.mark.parametrize("count", [1, 250])
def test_a_copy_that_cannot_be_made_holds_up_nobody(single, opened, monkeypatch, count):
    """A read says why, in time, even if some images come at each try; one that waits ends when the store is closed."""
    location = single.location()
    opened(location).add_all(image(n) for n in range(count))
    key = f"/t/{location.partition('/t/')[2]}/image/wmi-zzz"
    single.ask("/v3/kv/put", {"key": encode(key), "value": encode("hello")})
    store = opened(location)
    with monkeypatch.context() as shorter:
        shorter.setattr(etcd_store, "CALL_S", 0.5)
        shorter.setattr(etcd_store, "DOWN_S", 0.05)
        with pytest.raises(OSError, match="being made: .*wmi-zzz"):
            store.page(None, 0, 1)
        assert any("wmi-zzz" in fault for fault in itertools.islice(store.check(), 1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.page, None, 0, 1)
        until(waiting.running)
        store.close()
        with pytest.raises(ValueError, match="closed"):
            waiting.result(etcd_store.CALL_S / 2)


# ---- the copy and its check ----


def damage(store, *statements):
    """Change the copy of a store behind its back."""
    store.page(None, 0, 0)
    with contextlib.closing(sqlite3.connect(store._client.follower.state.replica._path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


OTHER = "SELECT NULL, 'wmi-x', account_id, is_public, deleted, replace(record, id, 'wmi-x') FROM image WHERE serial = 7"
DAMAGE = {
    "changed": ["UPDATE image SET record = replace(record, 'available', 'x') WHERE id = 'wmi-00000007'"],
    "removed": ["DELETE FROM image WHERE id = 'wmi-00000007'"],
    "added": [f"INSERT INTO image {OTHER}"],
    "exchanged": [f"UPDATE image SET serial = {new} WHERE serial = {old}" for old, new in ((8, 0), (3, 8), (0, 3))],
    "moved": ["UPDATE image SET serial = 1000 WHERE id = 'wmi-00000007'"],
    "hidden": ["UPDATE image SET is_public = NOT is_public WHERE id = 'wmi-00000007'"],
    "uncounted": ["UPDATE tally SET n = n + 1"],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_check_compares_the_copy_with_etcd(single, opened, kind):
    """Whatever differs is found, with the id; a repair makes the copy anew, and etcd is left as it is."""
    location = single.location()
    store = opened(location)
    store.add_all(image(n) for n in range(250))
    store.add(dead(image(300)))
    assert list(store.check()) == []
    want, revision = list(store.walk()), store.revision()
    damage(store, *DAMAGE[kind])
    for repair in (False, True):
        faults = list(store.check(repair))
        assert faults and (kind == "uncounted" or any("wmi-00000007" in f or "wmi-x" in f for f in faults)), faults
        assert len(faults) < 5 or kind == "uncounted"
    assert list(store.check()) == [] and list(store.walk()) == want and store.page(None, 0, 0, deleted=None)[0] == 251
    assert store.revision() == revision


def test_check_works_with_the_oldest_sqlite():
    """SQLite 3.24, which is allowed, has no window functions."""
    assert sqlite_store.NEEDED == (3, 24, 0)
    assert not re.search(r"\bOVER\b", pathlib.Path(etcd_store.__file__).read_text(encoding="utf-8"))


def test_check_beside_writers_reports_no_false_fault(single, opened, pytestconfig):
    """Whatever others add, change, move and delete meanwhile, one at a time and by loads."""
    count, checks = (2000, 5) if pytestconfig.getoption("--long") else (700, 2)
    location = single.location()
    store = opened(location)
    store.add_all(image(n) for n in range(count))
    stop, changes = threading.Event(), []

    def write(first):
        with etcd_store.open_storage(location) as writer:
            for n in itertools.cycle(range(first, first + 20)):
                writer.replace(f"wmi-{n:08x}", lambda record: {**record, "n": record.get("n", 0) + 1})
                writer.delete(f"wmi-{n + 20:08x}")
                writer.add(image(n + 20, n=len(changes)))
                changes.append(n)
                if n == 500:
                    writer.add_all(image(5000 + 150 * len(changes) + each) for each in range(150))
                if stop.is_set():
                    return

    threads = [threading.Thread(target=write, args=[first]) for first in (0, 500, count - 60)]
    for thread in threads:
        thread.start()
    try:
        done = 0
        while done < checks or len(changes) < 40 * checks:
            assert list(store.check(repair=done % 2 == 0)) == []
            done += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert list(store.check()) == []
    assert list(store.walk()) == list(opened(location).walk())


def test_a_copy_that_is_removed_is_made_again(single, opened):
    """As by a program that removes old temporary files: the next read is answered all the same."""
    store = opened(single.location())
    store.add_all(image(n) for n in range(3))
    view = store.at_least(store.revision())
    assert view.page(None, 0, 0)[0] == 3
    shutil.rmtree(os.path.dirname(store._client.follower.state.replica._path))
    assert view.page(None, 0, 0)[0] == store.page(None, 0, 0)[0] == 3


def test_a_long_gap_is_caught_up_in_short_answers(single, opened, monkeypatch):
    """The watch does not get all in one answer, for which no reader would wait; each revision is applied as a whole."""
    sizes, spans, watch, apply = [], [], etcd_store._Channel.watch, etcd_store._Replica.apply

    def measured_watch(*args):
        for line in watch(*args):
            sizes.append(len(line))
            yield line

    def measured_apply(replica, events, *args):
        spans.append((replica, events[0].put, events[-1].put))
        apply(replica, events, *args)

    monkeypatch.setattr(etcd_store._Channel, "watch", measured_watch)
    monkeypatch.setattr(etcd_store._Replica, "apply", measured_apply)
    with Relay(single.clients[0]) as relay:
        prefix = single.location().partition("/t/")[2]
        store, other = opened(f"{relay.url}/t/{prefix}"), opened(f"{single.clients[0]}/t/{prefix}")
        store.add(image(1))
        assert store.page(None, 0, 0)[0] == 1
        copy = store._client.follower.state.replica
        relay.target, target = ("127.0.0.1", 9), relay.target
        relay.cut()
        for first in range(10, 170, 4):
            other.add_all(image(first + n, description="x" * 90_000) for n in range(4))
        relay.target = target
        until(lambda: works(store.revision))
        assert store.page(None, 0, 0)[0] == other.page(None, 0, 0)[0] == 161
    assert len(sizes) > 5 and max(sizes) < 4_000_000
    ours = [span for replica, *span in spans if replica is copy]
    assert len(ours) > 5 and all(last < first for (_, last), (first, _) in zip(ours, ours[1:]))


def test_a_copy_to_be_made_again_does_not_wait_for_silence(single, opened):
    """Not even if the watch was just being started when that was decided, and others never stop changing images."""
    location = single.location()
    store, writer, stop = opened(location), opened(location), threading.Event()
    writer.add(image(1))
    store.page(None, 0, 0)
    copy = store._client.follower.state.replica

    def write():
        deadline = time.monotonic() + 10
        while not stop.is_set() and time.monotonic() < deadline:
            writer.replace(ID, lambda record: {**record, "n": time.monotonic()})

    thread = threading.Thread(target=write)
    thread.start()
    store._client.follower._stale = True  # and no watch that could be cut
    began = time.monotonic()
    store.page(None, 0, 0)
    stop.set()
    thread.join()
    assert time.monotonic() - began < 5 and store._client.follower.state.replica is not copy


def test_a_key_that_is_not_ours_does_no_lasting_harm(single, opened):
    """Its name need not even be a text; it is reported, and all is well again when it is removed."""
    location = single.location()
    store, key = opened(location), f"/t/{location.partition('/t/')[2]}/image/".encode() + b"\xff"
    store.add(image(1))
    store.page(None, 0, 0)
    single.ask("/v3/kv/put", {"key": encode(key), "value": encode(json.dumps({"record": image(2)}))})
    assert any("xff" in fault for fault in store.check())
    single.ask("/v3/kv/deleterange", {"key": encode(key)})
    store.add(image(3))
    assert store.at_least(store.revision()).page(None, 0, 0)[0] == 2


def test_a_copy_is_kept_while_a_walk_holds_events_back(single, opened, monkeypatch):
    """A frozen walk of a large store on a slow disk takes longer than a call may wait for locks: events come later."""
    monkeypatch.setattr(sqlite_store, "BUSY_S", 0.2)
    store = opened(single.location())
    store.add_all(image(n) for n in range(3))
    view = store.at_least(store.revision())
    assert view.page(None, 0, 0)[0] == 3
    follower = store._client.follower
    copy, connection = follower.state.replica, follower.state.replica._reads._db
    with contextlib.closing(sqlite3.connect(copy._path, isolation_level=None)) as walk:
        walk.execute("BEGIN")
        assert walk.execute("SELECT count(*) FROM image").fetchall() == [(3,)]
        store.add(image(9))
        until(lambda: follower._why)
        until(lambda: works(lambda: view.page(None, 0, 0)))
    assert store.page(None, 0, 1) == (4, [image(9)])
    assert follower.state.replica is copy and copy._reads._db is connection  # as fast as before


ENDLESS = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n"


@pytest.mark.skipif(not hasattr(sqlite3.Connection, "interrupt"), reason="PyPy cannot interrupt SQLite")
def test_a_copy_can_be_closed_while_it_works(single, opened):
    """To apply a large load takes a minute; who ends the program does not wait for it."""
    store = opened(single.location())
    store.add(image(1))
    store.page(None, 0, 0)
    replica, errors = store._client.follower.state.replica, []

    def work():
        try:
            with replica._reads as db:
                db.execute(ENDLESS).fetchall()
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 3
    thread.join(3)
    assert len(errors) == 1 and not os.path.exists(replica._path)


# ---- processes ----


def test_a_forked_process_opens_its_own(single, opened):
    """Parent and child go on with one store object, and neither harms the other."""
    store = opened(single.location())
    store.add(image(1))
    assert store.page(None, 0, 0)[0] == 1
    child = os.fork()
    if not child:
        status = 1
        signal.alarm(20)
        with contextlib.suppress(BaseException):
            store.add(image(2))
            status = int(store.page(None, 0, 0)[0] < 2)
            store.close()
        os._exit(status)
    for n in range(10, 20):
        store.add(image(n))
        assert store.page(None, 0, 1)[1] == [image(n)] or store.get("wmi-00000002")
    assert os.waitpid(child, 0)[1] == 0
    assert store.page(None, 0, 0)[0] == 12


def test_a_copy_leaves_nothing(single, opened, tmp_path, monkeypatch):
    """Closed, its folder is gone; that of a killed process is removed by the next one, that of a live one is not."""
    monkeypatch.setattr(etcd_store.tempfile, "tempdir", str(tmp_path))
    location = single.location()
    with etcd_store.open_storage(location) as store:
        store.page(None, 0, 0)
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []
    code = f"""
        import sys, os; sys.path[:] = {sys.path!r}
        from wmi import etcd_store
        etcd_store.open_storage({location!r}).page(None, 0, 0)
        print("made", flush=True)
        sys.stdin.read()
        """.replace("\n        ", "\n")
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as process:
        assert process.stdout.readline() == b"made\n"
        (folder,) = os.listdir(tmp_path)
        os.utime(tmp_path / folder / "lock", (0, 0))
        with etcd_store.open_storage(location) as store:
            store.page(None, 0, 0)
            assert len(os.listdir(tmp_path)) == 2
        process.kill()
    os.utime(tmp_path / folder / "lock", (0, 0))
    with etcd_store.open_storage(location) as store:
        store.page(None, 0, 0)
        assert len(os.listdir(tmp_path)) == 1 and folder not in os.listdir(tmp_path)


def test_a_copy_that_cannot_be_made_leaves_nothing(single, opened, tmp_path, monkeypatch):
    """It is tried again and again, here with an SQLite that is too old: no folder is left, and no descriptor."""
    monkeypatch.setattr(etcd_store.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(etcd_store, "CALL_S", 1.0)
    monkeypatch.setattr(etcd_store, "DOWN_S", 0.01)
    store = opened(single.location())
    store.add(image(1))
    before = len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "sqlite_version_info", (3, 23, 9))
        with pytest.raises(OSError, match="too old"):
            store.page(None, 0, 0)
    assert store.page(None, 0, 0)[0] == 1
    gc.collect()  # for PyPy, which does this when it needs memory
    until(lambda: len(os.listdir(tmp_path)) == 1)
    assert len(os.listdir("/dev/fd")) < before + 10


def test_copies_change_nothing(single, tmp_path):
    """sqlite to etcd and back: ids, times, order and tombstones are as they were; check finds nothing."""
    first, there, back = f"sqlite:{tmp_path}/a", f"etcd:{single.location()}", f"sqlite:{tmp_path}/b"
    with wmi.open_storage(first) as store:
        store.add_all(wmi.image_record({"id": f"wmi-{n * 7919 % 1000:04d}", "account_id": ALICE}) for n in range(350))
        for n in range(0, 350, 7):
            wmi.Catalog(store).destroy(f"wmi-{n * 7919 % 1000:04d}")
        want = [json.dumps(record) for record in store.walk(oldest_first=True)]
    for source, target in ((first, there), (there, back)):
        assert wmi.main(["copy", source, target]) == 0
        assert wmi.main(["check", target]) == 0
        with wmi.open_storage(target) as store:
            assert [json.dumps(record) for record in store.walk(oldest_first=True)] == want


def test_a_command_sees_each_change_of_a_server_at_once(single, opened, capsys):
    """And the server that of a command, which makes no copy for a single image."""
    location = single.location()
    with serving(opened(location)) as one, serving(opened(location)) as two:
        for n in range(5):
            store = ["--store", f"etcd:{location}"]
            assert wmi.main(["add", "volume", "snap-1", "--uuid", f"wmi-{n}", "-a", ALICE, *store]) == 0
            for served in (one, two):
                for target in (f"/api/images/wmi-{n}", "/api/images"):
                    assert f"wmi-{n}".encode() in served.request("GET", target, {"X-VDC-ACCOUNT-UUID": ALICE})[2]
            assert one.request("DELETE", f"/api/images/wmi-{n}", {"X-VDC-ACCOUNT-UUID": ALICE})[0] == 200
            assert two.request("GET", f"/api/images/wmi-{n}", {"X-VDC-ACCOUNT-UUID": ALICE})[0] == 404
            capsys.readouterr()
            assert wmi.main(["list", "-o", "id", *store, "--account", ALICE]) == 0
            assert capsys.readouterr().out == ""


# ---- the README ----


@pytest.fixture
def shown(tmp_path):
    """The README's cluster with two servers, its commands run as they are printed but for the ports."""
    text = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```sh cluster\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (config,) = re.findall(r"^```nginx cluster\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ports = {name: str(free_port()) for name in ("9000", "9001", "9002")}
    for kind in ("2379", "2380"):
        ports.update({f"{n}{kind}": str(free_port()) for n in (1, 2, 3)})
        numbers = " ".join(f"{n}) echo {ports[f'{n}{kind}']};;" for n in (1, 2, 3))
        commands = commands.replace(f"${{n}}{kind}", f"$(case $n in {numbers} esac)")
    for old, new in ports.items():
        commands, config = (re.sub(rf"(?<=[: ]){old}\b", new, each) for each in (commands, config))
    shutil.copy(wmi.__file__, tmp_path / "wmi.py")
    shutil.copytree(os.path.dirname(etcd_store.__file__), tmp_path / "backends")
    (tmp_path / "nginx.conf").write_text(config)
    for name, program in (("etcd", members.ETCD), ("python3", sys.executable)):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec "{program}" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    shell = subprocess.Popen(
        ["bash", "-c", commands + "\necho done\nwait\n"], cwd=tmp_path, env=environment, start_new_session=True,
        stdout=subprocess.PIPE,
    )
    try:
        assert (shell.stdout.readline(), shell.stdout.readline()) == (b"wmi-shared\n", b"done\n")
        yield tmp_path, ports, shell, environment
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        shell.stdout.close()


def show(port):
    """Return the status of an answer on a port, 0 if there is none, and the description."""
    with contextlib.suppress(OSError, IndexError):
        target = "/api/images/wmi-shared HTTP/1.0\r\nHost: localhost\r\nX-VDC-ACCOUNT-UUID: a-shpoolxx\r\n\r\n"
        status, _, body = parse_answer(raw("127.0.0.1", int(port), f"GET {target}".encode()))
        return status, json.loads(body).get("description")
    return 0, None


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc here")
def test_the_cluster_of_the_readme(shown):
    """Three members and two servers behind nginx: any member may be killed, no read fails, each change shows."""
    folder, ports, shell, environment = shown
    addresses = [ports["9001"], ports["9002"]]
    until(lambda: all(show(port)[0] == 200 for port in addresses))
    with contextlib.ExitStack() as stack:
        if shutil.which("nginx"):
            nginx = ["nginx", "-p", f"{folder}/", "-c", "nginx.conf", "-g", "daemon off;"]
            proxy = stack.enter_context(subprocess.Popen(nginx, cwd=folder, env=environment, stderr=subprocess.PIPE))
            stack.callback(proxy.terminate)
            addresses.append(ports["9000"])
            until(lambda: show(ports["9000"])[0] == 200)
        children = pathlib.Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
        (member,) = [pid for pid in children if b"\0m2\0" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
        for number in range(8):
            if number == 3:
                os.kill(int(member), signal.SIGKILL)
            change = ["python3", "wmi.py", "modify", "wmi-shared", "-d", str(number)]
            store = ",".join(f"http://127.0.0.1:{ports[f'{n}2379']}" for n in (1, 2, 3))
            subprocess.run(change, cwd=folder, env={**environment, "WMI_STORE": f"etcd:{store}/images"}, check=True,
                           stdout=subprocess.DEVNULL)
            assert [show(port) for port in addresses] == [(200, str(number))] * len(addresses)
