"""Recorded histories of many clients on a cluster whose members die and hang are linearizable; so is the checker."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import random
import signal
import threading
import time
from typing import Any, NamedTuple

import pytest
from members import Cluster
from serving import serving

import wmi
from wmi import etcd_store
from wmi.contract import ALICE

IDS = ["wmi-one", "wmi-two", "wmi-three"]
CALLER = {"X-VDC-ACCOUNT-UUID": ALICE}


# ---- the checker ----


class Operation(NamedTuple):
    """What a client did with one image, when, and what it was told."""

    began: float
    ended: float  # infinity: it may be done at any time, or never
    kind: str  # read, add, replace, delete
    value: Any  # that was read or written
    told: str = "done"  # or "refused", or "unknown"


def steps(state, operation):
    """Return the states in which an operation, told as it was, may leave an image (None: there is none)."""
    if operation.kind == "read":
        return [state] if operation.value == state else []
    allowed = (state is None) == (operation.kind == "add")
    after = None if operation.kind == "delete" else operation.value
    if operation.told == "unknown":
        return [after, state] if allowed else [state]
    return ([after] if allowed else []) if operation.told == "done" else ([] if allowed else [state])


def is_linearizable(history):
    """Return whether some order of the operations, each within its time, explains what every client was told."""
    history = sorted(history)
    seen, pending = set(), [(frozenset(range(len(history))), None)]
    while pending:
        left, state = pending.pop()
        if (left, state) in seen:
            continue
        seen.add((left, state))
        if all(history[n].ended == math.inf for n in left):
            return True
        first = min(history[n].ended for n in left)
        for n in sorted(left):
            if history[n].began > first:
                break
            pending.extend((left - {n}, after) for after in steps(state, history[n]))
    return False


def op(began, ended, kind, value=None, told="done"):
    return Operation(began, ended, kind, value, told)


GOOD = [
    [],
    [op(0, 1, "read")],
    [op(0, 1, "add", 1), op(2, 3, "read", 1)],
    [op(0, 9, "add", 1), op(1, 2, "read"), op(3, 4, "read", 1), op(5, 6, "read", 1)],
    [op(0, 1, "add", 1), op(2, 5, "replace", 2), op(3, 4, "read", 2), op(6, 7, "delete"), op(8, 9, "read")],
    [op(0, 1, "add", 1), op(2, math.inf, "replace", 2, "unknown"), op(3, 4, "read", 1), op(8, 9, "read", 2)],
    [op(0, 1, "add", 1), op(2, math.inf, "replace", 2, "unknown"), op(3, 4, "read", 1)],
    [op(0, 1, "add", 1), op(2, 3, "add", 2, "refused"), op(4, 5, "delete"), op(6, 7, "replace", 3, "refused")],
]
BAD = [
    [op(0, 1, "read", 1)],
    [op(0, 1, "add", 1), op(2, 3, "read")],
    [op(0, 9, "add", 1), op(1, 2, "read", 1), op(3, 4, "read")],
    [op(0, 1, "add", 1), op(2, 3, "replace", 2), op(4, 5, "read", 1)],
    [op(0, 1, "add", 1), op(2, math.inf, "replace", 2, "unknown"), op(3, 4, "read", 2), op(8, 9, "read", 1)],
    [op(0, 1, "add", 1), op(0, 1, "add", 2)],
    [op(0, 1, "add", 1), op(2, 3, "delete"), op(4, 5, "read", 1)],
    [op(0, 1, "add", 1), op(2, 3, "replace", 3, "refused")],
]


@pytest.mark.parametrize("history", GOOD)
def test_a_history_that_can_be_explained(history):
    """Some order within the times of the operations fits."""
    assert is_linearizable(history)


@pytest.mark.parametrize("history", BAD)
def test_a_history_that_cannot_be_explained(history):
    """A stale read, a lost or a doubled change is found."""
    assert not is_linearizable(history)


# ---- clients ----


def wait(seconds):
    """Let the clients go on for a while; their number of operations is bounded by it."""
    threading.Event().wait(seconds)


class Recorder:
    """The histories of some images, recorded by clients in threads of their own."""

    def __init__(self):
        self.histories = {id: [] for id in IDS}
        self.stop = threading.Event()
        self.values, self.errors, self.failed = itertools.count(1), [], 0

    def client(self, served, seed):
        """Show, list and update over HTTP until told to stop."""
        chance = random.Random(seed)
        while not self.stop.is_set():
            id, value, began = chance.choice(IDS), f"v{next(self.values)}", time.monotonic()
            if chance.random() < 0.3:
                status, answer = self.ask(served, "PUT", f"/api/12.03/images/{id}?display_name={value}")
                told = {200: "done", 404: "refused"}.get(status, "unknown")
                if status == 503 and "unknown" not in answer["message"]:  # then it was not done
                    wait(0.01)
                else:
                    self.record(id, began, "replace", value, told)
            elif chance.random() < 0.6:
                status, answer = self.ask(served, "GET", f"/api/12.03/images/{id}")
                if status in (200, 404):
                    self.record(id, began, "read", answer.get("display_name"))
                self.failed += status not in (200, 404)
            else:
                status, answer = self.ask(served, "GET", "/api/12.03/images?limit=9")
                if status == 200:
                    found = {image["id"]: image["display_name"] for image in answer[0]["results"]}
                    for each in IDS:
                        self.record(each, began, "read", found.get(each))
                self.failed += status != 200

    def ask(self, served, method, target):
        """Return the status, 0 if there is no answer, and what it holds."""
        try:
            status, _, body = served.request(method, target, CALLER)
            return status, json.loads(body)
        except (OSError, ValueError, IndexError):
            return 0, {}

    def operator(self, store, seed):
        """Add and delete, as commands do, until told to stop."""
        chance = random.Random(seed)
        while not self.stop.is_set():
            id, value, began = chance.choice(IDS), f"v{next(self.values)}", time.monotonic()
            kind, told = chance.choice(["add", "delete"]), "done"
            try:
                if kind == "add":
                    store.add(wmi.image_record({"id": id, "account_id": ALICE, "display_name": value}))
                else:
                    store.delete(id)
            except (KeyError, FileExistsError):
                told = "refused"
            except OSError as error:
                # Without quorum each call fails at once, and nothing was done. As unknown operations, thousands of
                # them would be more than the checker can think of.
                if error.errno == errno.EHOSTUNREACH:
                    wait(0.01)
                    continue
                told = "unknown"
            self.record(id, began, kind, value if kind == "add" else None, told)

    def record(self, id, began, kind, value, told="done"):
        ended = math.inf if told == "unknown" else time.monotonic()
        self.histories[id].append(Operation(began, ended, kind, value, told))


def recorded(location, act, opener=etcd_store.open_storage):
    """Return the recorder of eight clients of two servers, and two operators, while `act` is done."""
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(opener(location)) for _ in range(2)]
        operators = [stack.enter_context(etcd_store.open_storage(location)) for _ in range(2)]
        works = [(recorder.operator, store) for store in operators]
        for store in stores:
            served = stack.enter_context(serving(store))
            works += [(recorder.client, served)] * 3
        threads = [threading.Thread(target=work, args=[of, n]) for n, (work, of) in enumerate(works)]
        for thread in threads:
            thread.start()
        try:
            act()
        finally:
            recorder.stop.set()
            for thread in threads:
                thread.join()
    return recorder


@pytest.fixture(scope="module")
def three():
    """A cluster of three members."""
    with Cluster(3) as cluster:
        yield cluster


def test_histories_while_members_die_and_hang(three, request):
    """The leader and a follower are killed and stopped in turn: every image's history is linearizable."""
    for turn in range(8 if request.config.getoption("--long") else 1):
        def act(turn=turn):
            wait(0.5)
            for signum, lead in ((signal.SIGKILL, turn % 2 == 0), (signal.SIGSTOP, turn % 2 == 1)):
                leader = three.leader()
                victim = leader if lead else (leader + 1) % 3
                three.signal(victim, signum)
                wait(1.5)
                if signum == signal.SIGKILL:
                    three.start(victim)
                else:
                    three.signal(victim, signal.SIGCONT)
                    three.wait()
                wait(0.5)

        recorder = recorded(three.location(turn % 3, (turn + 1) % 3, (turn + 2) % 3), act)
        for id, history in recorder.histories.items():
            assert len(history) > 50
            assert is_linearizable(history), (id, sorted(history))


class Stale(etcd_store.EtcdStorage):
    """A store that answers what was the newest revision a while ago."""

    asked, answered = 0.0, ""

    def revision(self):
        """Return the revision, asked for twice a second."""
        if time.monotonic() > self.asked + 0.5:
            self.asked, self.answered = time.monotonic(), super().revision()
        return self.answered


def test_stale_reads_are_found(three):
    """With reads that may be half a second old, the same clients record what cannot be explained."""
    recorder = recorded(three.location(), lambda: wait(2), Stale)
    assert not all(map(is_linearizable, recorder.histories.values()))
