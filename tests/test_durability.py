"""What is acknowledged is there after errors, kills, races and damage, and nothing else is."""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import types

import pytest
from faults import Faults, end, error, in_child

from wmi import json_store, sqlite_store
from wmi.contract import ALICE, BOB, dead, ids, image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")

VERBS = {
    "add": lambda store: store.add(image(201)),
    "add_all": lambda store: store.add_all([image(202), image(203, BOB)]),
    "replace": lambda store: store.replace("wmi-00000001", dead),
    "delete": lambda store: store.delete("wmi-00000001"),
}
FEW = [image(1), image(2, BOB, is_public=True), dead(image(3))]


@pytest.fixture(params=[json_store, sqlite_store], ids=["json", "sqlite"])
def module(request):
    """Each backend that keeps a file."""
    return request.param


@pytest.fixture
def path():
    """Where a store's file is to be, in a folder of its own."""
    folder = tempfile.mkdtemp()
    yield os.path.join(folder, "images")
    shutil.rmtree(folder)


@pytest.fixture
def rounds(request):
    """How many kills: a few, or with --long hundreds."""
    return 300 if request.config.getoption("--long", False) else 20


@pytest.fixture
def stride(request):
    """How far the points lie apart at which something is let fail: with --long each of them is tried."""
    return 1 if request.config.getoption("--long", False) else 3


def make(module, path, records=FEW):
    """Write a store anew."""
    for name in os.listdir(os.path.dirname(path)):
        os.unlink(os.path.join(os.path.dirname(path), name))
    with module.open_storage(path) as store:
        store.add_all(records)


def read(module, path):
    """Return all records, oldest first, as a program that opens the file now finds them."""
    with module.open_storage(path) as store:
        records = list(store.walk(oldest_first=True))
        assert list(store.check()) == []
        assert store.page(None, 0, 9999, deleted=None) == (len(records), records[::-1])
        return records


def after(module, path, verb):
    """Return what all records are when the verb is done."""
    make(module, path)
    with module.open_storage(path) as store:
        VERBS[verb](store)
    return read(module, path)


def files(path):
    return sorted(os.listdir(os.path.dirname(path)))


# ---- the n-th operation fails ----


@pytest.mark.parametrize(
    "verb, number", [*((verb, errno.EIO) for verb in VERBS), ("add", errno.ENOSPC), ("add", errno.EROFS)]
)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_json_survives_an_error_of_any_operation(path, monkeypatch, verb, number, lasting):
    """OSError with the path; old or new; nothing left over; then it goes on."""
    new = after(json_store, path, verb)
    for n in range(1, 99):
        make(json_store, path)
        with json_store.open_storage(path) as store:
            system = Faults(n, error(number), lasting)
            monkeypatch.setattr(json_store, "os", system)
            try:
                VERBS[verb](store)
                done = True
            except OSError as caught:
                done = False
                assert str(caught) == f"{path}: {os.strerror(number)}"
            monkeypatch.setattr(json_store, "os", os)
            found = read(json_store, path)
            assert found == list(store.walk(oldest_first=True))
            assert found == new if done else found in (FEW, new)
            if lasting:
                store.add(image(99))  # removes what the broken disk did not let us remove
            assert files(path) == ["images"]
            if not system.struck:
                break
            store.add(image(77))
            assert read(json_store, path)[-1] == image(77)
    assert 10 < n < 40


@pytest.mark.parametrize("verb", VERBS)
def test_json_survives_death_at_any_operation(path, monkeypatch, verb):
    """Old or new, and opening the store again leaves nothing over."""
    new, seen = after(json_store, path, verb), []
    for n in range(1, 99):
        make(json_store, path)

        def work(n=n):
            store = json_store.open_storage(path)
            json_store.os = Faults(n, end)
            VERBS[verb](store)

        status = in_child(work)
        found = read(json_store, path)
        assert found in (FEW, new)
        assert files(path) == ["images"]
        seen.append(found == new)
        with json_store.open_storage(path) as store:
            store.add(image(77))
        assert files(path) == ["images"]
        if status == 0:
            break
        assert status == 9
    assert seen[-1] and not seen[0] and seen == sorted(seen)


def test_json_first_write_fails_and_succeeds(path, monkeypatch):
    """A store that does not exist yet is empty after the failure, not damaged."""
    with json_store.open_storage(path) as store:
        for n in range(1, 30):
            monkeypatch.setattr(json_store, "os", Faults(n, error(errno.ENOSPC)))
            with contextlib.suppress(OSError):
                store.add(image(n))
            monkeypatch.setattr(json_store, "os", os)
            assert read(json_store, path) == list(store.walk(oldest_first=True))
            assert files(path) in ([], ["images"])


# ---- the order of operations, and mutants that break it ----


def order_of_a_change(module, path):
    """Return the operations of one change that bear on durability, as name and file."""
    with module.open_storage(path) as store:
        system = Faults()
        module.os = system
        try:
            store.add(image(50))
        finally:
            module.os = os
    return [call for call in system.calls if call[0] in ("write", "fsync", "replace")]


def is_durable(calls, folder):
    """Return whether content is synced before its name is given, and the name after."""
    names = [name for name, _ in calls]
    replace = names.index("replace")
    return (
        ("fsync", "images.new") in calls[:replace]
        and "write" not in names[calls.index(("fsync", "images.new")):]
        and ("fsync", folder) in calls[replace:]
    )


SYNC, REPLACE = "os.fsync(pin)", "os.replace(new, path)"
MUTANTS = {
    "none": {},
    "no fsync": {SYNC: "pass"},
    "fsync after replace": {SYNC: "pass", REPLACE: f"{REPLACE}; {SYNC}"},
    "fsync before write": {"_write(pin, text)": SYNC, SYNC: "_write(pin, text)"},
    "no fsync of the folder": {"os.fsync(directory)": "pass"},
    "fsync of the folder before replace": {
        "_sync_directory(os.path.dirname(path))": "pass",
        REPLACE: f"_sync_directory(os.path.dirname(path)); {REPLACE}",
    },
}


@pytest.mark.parametrize("name", MUTANTS)
def test_json_syncs_content_then_name(path, name):
    """The calls are in an order that survives a power cut; each mutant is found out."""
    with open(json_store.__file__, encoding="utf-8") as file:
        source = file.read()
    for old in MUTANTS[name]:
        assert source.count(old + "\n") + source.count(old + "  #") == 1
    pattern = re.compile("|".join(map(re.escape, MUTANTS[name])) or "$^")
    mutant = types.ModuleType("mutant_json_store")
    sys.modules[mutant.__name__] = mutant
    try:
        source = pattern.sub(lambda found: MUTANTS[name][found[0]], source)
        exec(compile(source, "mutant", "exec"), mutant.__dict__)
        make(json_store, path)
        folder = os.path.basename(os.path.dirname(path))
        assert is_durable(order_of_a_change(mutant, path), folder) is (name == "none")
    finally:
        del sys.modules[mutant.__name__]


# ---- sqlite: no room, and death within a transaction ----


@contextlib.contextmanager
def no_file_longer_than(size):
    """Let every write beyond `size` fail, in this process, as on a full disk."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("verb", VERBS)
def test_sqlite_survives_a_write_that_fails_anywhere(path, verb, stride):
    """OSError with the path; old or new; reads go on; it recovers without being opened anew."""
    big = "x" * 20_000
    work = {**VERBS, "add": lambda store: store.add(image(99_999, description=big))}[verb]
    many = [image(n, description="y" * 500) for n in range(1, 60)]
    make(sqlite_store, path, many)
    with sqlite_store.open_storage(path) as store:
        work(store)
        new = list(store.walk(oldest_first=True))
    make(sqlite_store, path, many)
    failures, full = 0, os.path.getsize(path)
    for size in [*range(0, full, 4096 * stride), *range(full, full + 60_000, 2048 * stride)]:
        make(sqlite_store, path, many)
        with sqlite_store.open_storage(path) as store:
            with no_file_longer_than(size):
                try:
                    work(store)
                    done = True
                except OSError as caught:
                    done, failures = False, failures + 1
                    assert str(caught).startswith(path + ": ")
                    if size >= full:  # below it not even the journal can be played back
                        assert store.get("wmi-00000002") == many[1]
            found = list(store.walk(oldest_first=True))
            assert found == (new if done else many)
            store.add(image(100))
            assert read(sqlite_store, path) == [*found, image(100)]
            assert files(path) == ["images"]
    assert failures >= 3


def test_sqlite_full_is_an_error_and_passes(path):
    """With no page left, writes are OSError and reads are served; with room, all is well."""
    make(sqlite_store, path)
    with sqlite_store.open_storage(path) as store:
        with store._writes as db:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {pages}").fetchall()
        for _ in range(3):
            with pytest.raises(OSError, match=f"^{path}: .*full"):
                store.add(image(9, description="x" * 100_000))
            assert list(store.walk(oldest_first=True)) == FEW
        with store._writes as db:
            db.execute("PRAGMA max_page_count = 1000000").fetchall()
        store.add(image(9, description="x" * 100_000))
        assert len(read(sqlite_store, path)) == 4


@pytest.mark.parametrize("verb", VERBS)
def test_sqlite_survives_death_at_any_step(path, verb, stride):
    """Killed after any number of steps of SQLite's machine: old or new."""
    new, statuses = after(sqlite_store, path, verb), set()
    for n in range(1, 2000, 13 * stride):
        make(sqlite_store, path)
        status = in_child(lambda n=n: die_at_step(path, n, VERBS[verb]))
        assert read(sqlite_store, path) in ((FEW, new) if status else (new,))  # a step may come after COMMIT
        statuses.add(status)
        if not status:
            break
    assert statuses == {0, 9}


def die_at_step(path, n, work, pages=None):
    """Do the work on a store whose connections end the process at their n-th step."""
    connect, steps = sqlite_store._connect, [0]

    def step():
        steps[0] += 1
        if steps[0] == n:
            end()

    def connect_to_die(*arguments):
        db = connect(*arguments)
        if pages:
            db.execute(f"PRAGMA cache_size = {pages}")
        db.set_progress_handler(step, 1)
        return db

    store = sqlite_store.open_storage(path)
    sqlite_store._connect = connect_to_die
    work(store)


def test_sqlite_survives_death_after_pages_were_spilled(path):
    """Killed with half of a change in the file already: the journal brings back the old."""
    many = [image(n, description="y" * 2000) for n in range(200)]

    def work(store):
        with store._writes as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("UPDATE image SET record = replace(record, 'y', 'z')")

    make(sqlite_store, path, many)
    spilled = 0
    for n in range(2000, 40_000, 4000):
        before = os.stat(path).st_mtime_ns
        assert in_child(lambda n=n: die_at_step(path, n, work, pages=5)) == 9
        spilled += "images-journal" in files(path) and os.stat(path).st_mtime_ns != before
        assert read(sqlite_store, path) == many
        assert files(path) == ["images"]
    assert spilled > 3


# ---- killed at random moments ----


def operation(n):
    """Return the n-th of an endless sequence of changes: a verb and its arguments."""
    chance = random.Random(n)
    number = n % 97
    return [("add", (image(number, n=n, description="x" * chance.randrange(3000)),)),
            ("replace", (f"wmi-{number - 1:08x}", lambda record: {**record, "again": n})),
            ("delete", (f"wmi-{number - 2:08x}",))][n % 3]


def perform(store, n):
    """Do the n-th change; one that finds nothing, or an image in its way, is no change."""
    verb, arguments = operation(n)
    with contextlib.suppress(KeyError, FileExistsError):
        getattr(store, verb)(*arguments)


class Model:
    """The same verbs on a dict."""

    def __init__(self, records):
        self.records = {record["id"]: record for record in records}

    def add(self, record):
        if record["id"] in self.records:
            raise FileExistsError
        self.records[record["id"]] = record

    def replace(self, id, change):
        self.records[id] = change(self.records[id])

    def delete(self, id):
        del self.records[id]

    def content(self):
        return list(self.records.values())


def test_kills_lose_nothing_acknowledged(module, path, rounds):
    """After kill -9 each acknowledged change is there, and at most one more; opening is quick."""
    chance, model, n, kills, seconds = random.Random(5), Model([]), 0, 0, []
    make(module, path, [])
    while kills < rounds:
        acknowledged, status = killed(module, path, n, chance)
        kills += status == -signal.SIGKILL
        for _ in range(acknowledged):
            perform(model, n)
            n += 1
        began = time.monotonic()
        store = module.open_storage(path)
        found = list(store.walk(oldest_first=True))
        seconds.append(time.monotonic() - began)
        if found != model.content():
            perform(model, n)
            n += 1
        assert found == model.content()
        assert list(store.check()) == []
        store.close()
    assert n > rounds
    assert sorted(seconds)[len(seconds) // 2] < 1  # whatever keeps this machine busy in some of them


def killed(module, path, first, chance):
    """Let a child change the store from the change `first` on until it is killed.

    Return how many changes it acknowledged, each by a byte, and its exit status.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            store = module.open_storage(path)
            for n in range(first, first + 10_000):
                perform(store, n)
                os.write(writer, b".")
        os._exit(1)
    os.close(writer)
    count = len(os.read(reader, 1))
    time.sleep(chance.random() * 0.02)  # the random moment; nothing is waited for
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    while acknowledged := os.read(reader, 4096):
        count += len(acknowledged)
    os.close(reader)
    return count, status


# ---- six processes ----


def test_six_processes_lose_and_double_nothing(module, path):
    """Each adds, modifies and deletes, and adds to one common count; a reader sees sense."""
    make(module, path, [image(0xffff, n=0)])
    children = [os.fork() or race(module, path, me) for me in range(6)]
    with module.open_storage(path) as store:
        last, running = 0, set(children)
        while running:
            total, page = store.page(None, 0, 9999, deleted=None)
            assert total == len(page) == len(set(ids(page)))
            count = store.get("wmi-0000ffff")["n"]
            assert count >= last
            last = count
            for child in list(running):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    assert status == 0
                    running.remove(child)
        assert store.get("wmi-0000ffff")["n"] == 6 * 15
        want = {f"wmi-{me:04x}{n:04x}": n for me in range(6) for n in range(15) if n % 3}
        got = {r["id"]: r.get("seen") for r in store.walk() if r["id"] != "wmi-0000ffff"}
        assert got == want
        assert list(store.check()) == []


def race(module, path, me):
    """Act as one of the six, and leave with status 0 if every change went well."""
    try:
        with module.open_storage(path) as store:
            for n in range(15):
                id = f"wmi-{me:04x}{n:04x}"
                store.add(image(0, id=id))
                store.replace(id, lambda record, n=n: {**record, "seen": n})
                assert store.get(id)["seen"] == n
                store.replace("wmi-0000ffff", lambda record: {**record, "n": record["n"] + 1})
                if n % 3 == 0:
                    store.delete(id)
    except BaseException as failed:
        os.write(2, f"{failed!r}\n".encode())
        os._exit(1)
    os._exit(0)


def test_a_copy_of_a_live_store_is_of_one_revision(module, path):
    """Two images always change together; a frozen walk never sees one without the other."""
    make(module, path, [image(n, n=0) for n in range(300)])
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), module.open_storage(path) as store:
            for n in range(10_000):
                store.replace("wmi-00000000", lambda record, n=n: {**record, "n": n})
                store.replace("wmi-0000012b", lambda record, n=n: {**record, "n": n})
                time.sleep(0.002)  # a writer without any rest would only test patience
        os._exit(1)
    with module.open_storage(path) as store:
        seen = set()
        while len(seen) < 8:
            records = list(store.walk(frozen=True))
            first, last = records[-1]["n"], records[0]["n"]
            assert first in (last, last + 1)
            seen.add(first)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# ---- damage ----

SOME = [image(n, (ALICE, BOB)[n % 2], is_public=n % 3 == 0) for n in range(40)]


def damaged(path, text, chance):
    """Write damaged versions of a file one after the other; yield what was done."""
    step = max(1, len(text) // 60)
    for at in range(1, len(text), step):
        yield f"cut at {at}", text[:at]
        where = at + chance.randrange(step)
        if where < len(text):
            bit = 1 << chance.randrange(8)
            yield f"bit at {where}", text[:where] + bytes([text[where] ^ bit]) + text[where + 1:]
            yield f"hole at {where}", text[:where] + bytes(64) + text[where + 64:]


def test_damage_is_refused_or_found(module, path):
    """A damaged file is refused with its path, or check says so, or it reads as it stands.

    What reads without a fault agrees with itself, differs from the original in one record
    at most (a letter in a text is not covered by any sum), and is never overwritten.
    """
    make(module, path, SOME)
    with open(path, "rb") as file:
        text = file.read()
    refused = 0
    for what, bad in damaged(path, text, random.Random(7)):
        with open(path, "wb") as file:
            file.write(bad)
        try:
            with module.open_storage(path) as store:
                if list(store.check()):
                    refused += 1
                else:
                    agrees_with_itself(store, what)
        except OSError as caught:
            refused += 1
            assert str(caught).startswith(path + ":"), what
        with open(path, "rb") as file:
            assert file.read() == bad, what
    assert refused > 80
    assert files(path) == ["images"]


def agrees_with_itself(store, what):
    records = list(store.walk(oldest_first=True))
    assert store.page(None, 0, 99, deleted=None) == (len(records), records[::-1]), what
    assert [store.get(record["id"]) for record in records] == records, what
    assert len(records) == len(SOME), what
    assert sum(a != b for a, b in zip(records, SOME)) <= 1, what


def test_sqlite_a_damaged_index_is_found_and_rebuilt(path):
    """Each page of an index and of the counts, with its cells altered."""
    make(sqlite_store, path, SOME)
    with contextlib.closing(sqlite3.connect(path)) as db:
        roots = [row[0] for row in db.execute(
            "SELECT rootpage FROM sqlite_master WHERE name IN ('own', 'everybody', 'tally',"
            " 'sqlite_autoindex_image_1')")]
    assert len(roots) == 4
    with open(path, "rb") as file:
        text = file.read()
    for root in roots:
        end_of_page = root * 4096
        bad = bytearray(text)
        bad[end_of_page - 12] ^= 0x01  # within the last cell, which was the first one written
        with open(path, "wb") as file:
            file.write(bad)
        with sqlite_store.open_storage(path) as store:
            assert list(store.check()) != []
            list(store.check(repair=True))
            assert list(store.check()) == []
            assert list(store.walk(oldest_first=True)) == SOME
