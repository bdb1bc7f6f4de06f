"""The contract on every store, and what is particular to the json and the sqlite one."""

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest

import pytest
from faults import Clock, Faults

import wmi
from wmi import json_store, sqlite_store
from wmi.contract import ALICE, BOB, CAROL, SCOPES, StorageContract, ids, image

# ---- the contract ----


class OnFile(StorageContract):
    """A location of its own for each test."""

    shared = True

    def setUp(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        self.location = os.path.join(folder, "images")


class TestMemory(StorageContract, unittest.TestCase):
    opener = staticmethod(lambda location: wmi.MemoryStorage())


class TestJson(OnFile, unittest.TestCase):
    opener = staticmethod(json_store.open_storage)


class TestSqlite(OnFile, unittest.TestCase):
    opener = staticmethod(sqlite_store.open_storage)


# ---- both files ----

STORES = [json_store, sqlite_store]


@pytest.fixture(params=STORES, ids=["json", "sqlite"])
def module(request):
    """Each backend that keeps a file."""
    return request.param


@pytest.fixture
def path(tmp_path):
    """Where a store's file is to be, in a folder of its own."""
    (tmp_path / "store").mkdir()
    return str(tmp_path / "store" / "images")


@contextlib.contextmanager
def opened(module, path, *records):
    """Open a store, fill it, close it."""
    with module.open_storage(path) as store:
        store.add_all(records)
        yield store


def content(path):
    with open(path, "rb") as file:
        return file.read()


def overwrite(path, text):
    with open(path, "wb") as file:
        file.write(text)


def sql(path, *statements):
    """Run statements as the sqlite3 shell would; return the rows of the last one."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            rows = db.execute(statement).fetchall()
        return rows


def files(path):
    return sorted(os.listdir(os.path.dirname(path)))


def run(source, *arguments):
    """Run Python text in another process that finds the modules; return what it printed."""
    source = f"import sys; sys.path[:] = {sys.path!r}\n" + textwrap.dedent(source)
    return subprocess.run([sys.executable, "-c", source, *arguments], check=True,
                          capture_output=True, text=True, timeout=60).stdout


def test_an_empty_file_is_an_empty_store(module, path):
    """As mktemp makes it."""
    overwrite(path, b"")
    with opened(module, path) as store:
        assert store.page(None, 0, 9) == (0, [])
        store.add(image(1))
    with module.open_storage(path) as store:
        assert ids(store.walk()) == ["wmi-00000001"]


@pytest.mark.parametrize("text", [
    b"hello", b"{}", b"[]", b"\0" * 5000, b"SQLite format 3\0", b"\xff\xfe", b'{"format": "x"}',
    b'[{"id": "wmi-00000001"}]', b"# images\n" * 1000,
])
def test_a_file_that_is_not_ours_is_refused_untouched(module, path, text):
    """OSError that begins with the path; the file stays as it is, byte for byte."""
    overwrite(path, text)
    with pytest.raises(OSError, match="^" + path) as caught:
        module.open_storage(path)
    assert not isinstance(caught.value, FileExistsError)
    assert content(path) == text
    assert files(path) == ["images"]


def test_the_other_store_s_file_is_refused_untouched(module, path):
    """A json URL on a sqlite file, and the other way round."""
    other = STORES[module is json_store]
    with opened(other, path, image(1)):
        pass
    before = content(path)
    with pytest.raises(OSError, match="^" + path):
        module.open_storage(path)
    assert content(path) == before


def test_a_folder_or_a_missing_folder_is_an_error(module, path, tmp_path):
    """OSError that begins with the path, at the latest with the first write."""
    for place in (str(tmp_path), str(tmp_path / "absent" / "images"), "/dev/null/images"):
        with pytest.raises(OSError, match="^" + place):
            with module.open_storage(place) as store:
                store.add(image(1))


def test_a_file_overwritten_in_place_is_read(module, path):
    """A restore by cp shows in the next call too."""
    with opened(module, path, image(1)) as store:
        old = content(path)
        revision = store.revision()
        store.add(image(2))
        overwrite(path, old)
        assert ids(store.walk()) == ["wmi-00000001"]
        assert store.revision() == revision
        store.add(image(3))
        assert list(store.check()) == []
        assert store.page(None, 0, 9)[0] == 2


def test_a_symbolic_link_stays(module, path):
    """Its target is what changes."""
    target = path + ".target"
    os.symlink(target, path)
    with opened(module, path, image(1)) as store:
        store.add(image(2))
    assert os.path.islink(path)
    with module.open_storage(target) as store:
        assert store.page(None, 0, 0)[0] == 2


@pytest.mark.parametrize("mask", [0, 0o022, 0o027, 0o077])
def test_a_new_file_is_not_for_everybody(module, path, mask):
    """Whoever may read it can lock it: 0640 less the umask, also where a link leads."""
    os.symlink(path + ".target", path + ".link")
    old = os.umask(mask)
    try:
        for place in (path, path + ".link"):
            with opened(module, place, image(1)):
                assert stat.S_IMODE(os.stat(place).st_mode) == 0o640 & ~mask
    finally:
        os.umask(old)


def test_the_mode_of_the_file_is_kept(module, path):
    """Whatever its owner made it."""
    with opened(module, path, image(1)) as store:
        for mode in (0o600, 0o640, 0o660):
            os.chmod(path, mode)
            store.add(image(mode))
            assert stat.S_IMODE(os.stat(path).st_mode) == mode


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_read_only_file_is_read_and_not_written(module):
    """Reads go on; each write is OSError with the path; nothing changes."""
    folder = tempfile.mkdtemp()  # pytest's own folders are closed to other users
    try:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "images")
        with opened(module, path, image(1)):
            pass
        os.chmod(path, 0o444)
        os.chmod(folder, 0o555)
        before = content(path)
        printed = run("""
            import importlib, os
            import wmi
            module = importlib.import_module(sys.argv[1])
            from wmi.contract import image
            if os.getuid() == 0:
                os.setuid(65534)
            store = module.open_storage(sys.argv[2])
            assert store.get("wmi-00000001") == image(1) == next(store.walk(frozen=True))
            assert store.page(None, 0, 1)[0] == 1 and store.revision() and not list(store.check())
            for verb in (lambda: store.add(image(2)), lambda: store.delete("wmi-00000001"),
                         lambda: store.replace("wmi-00000001", dict),
                         lambda: store.add_all([image(2)])):
                try:
                    verb()
                except OSError as error:
                    assert str(error).startswith(sys.argv[2]), error
                    assert not isinstance(error, FileExistsError)
                    print("refused")
            assert store.get("wmi-00000001") == image(1)
            store.close()
            """, module.__name__, path)
        assert printed.split() == ["refused"] * 4
        assert content(path) == before
        assert files(path) == ["images"]
    finally:
        os.chmod(folder, 0o755)
        shutil.rmtree(folder)


def test_records_that_are_none_are_refused(module, path):
    """A record without the four fields, or with a wrong one, is a ValueError."""
    with opened(module, path) as store:
        for field, value in (("id", 1), ("account_id", None), ("is_public", 1),
                             ("is_public", None), ("deleted_at", False)):
            with pytest.raises(ValueError, match="not a record"):
                store.add(image(1, **{field: value}))
        for field in ("id", "account_id", "is_public", "deleted_at"):
            with pytest.raises(ValueError, match="not a record"):
                store.add({key: value for key, value in image(1).items() if key != field})
        with pytest.raises(ValueError, match="not a record"):
            store.add([image(1)])
        assert store.page(None, 0, 0)[0] == 0


def test_memory_refuses_what_is_no_record():
    """A record without the four fields, or with something that is not JSON, is a ValueError there, too."""
    with wmi.MemoryStorage() as store:
        for field in ("id", "account_id", "is_public", "deleted_at"):
            with pytest.raises(ValueError, match="not a record"):
                store.add({key: value for key, value in image(1).items() if key != field})
        with pytest.raises(ValueError, match="not a record"):
            store.add({**image(1), "extra": object()})
        assert store.page(None, 0, 0)[0] == 0


def test_a_change_within_a_change_is_refused(module, path):
    """ValueError instead of a deadlock or a lost change; the outer one is undone."""
    with opened(module, path, image(1)) as store:
        with pytest.raises(ValueError, match="inside another"):
            store.replace("wmi-00000001", lambda record: store.add(image(2)))
        assert ids(store.walk()) == ["wmi-00000001"]
        store.add(image(3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_fork_leaves_the_parent_s_store_right(module, path):
    """A child that uses and closes the store it inherited does no harm."""
    with opened(module, path, image(1)) as store:
        store.add(image(2))
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                store.add(image(3))
                store.get("wmi-00000001")
                store.close()
                status = 0
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        store.add(image(4))
        assert store.page(None, 0, 0)[0] == 4
        assert list(store.check()) == []


def test_a_slow_source_of_add_all_holds_no_lock(module, path):
    """While it is pulled others write, and what they added meanwhile is respected."""
    with opened(module, path, image(1)) as store, module.open_storage(path) as other:
        def source():
            yield image(2)
            other.add(image(3))
            store.add(image(4))
            yield image(5)

        assert store.add_all(source()) == 2
        assert [id[-1] for id in ids(store.walk())] == ["5", "2", "4", "3", "1"]

        def race():
            yield image(6)
            other.add(image(6, BOB))

        with pytest.raises(FileExistsError, match="wmi-00000006"):
            store.add_all(race())
        assert store.get("wmi-00000006") == image(6, BOB)


def test_a_store_s_working_directory_does_not_matter(module, path, monkeypatch):
    """A relative location is resolved once, when it is opened."""
    monkeypatch.chdir(os.path.dirname(path))
    with module.open_storage("images") as store:
        store.add(image(1))
        monkeypatch.chdir("/")
        store.add(image(2))
    assert files(path) == ["images"]


# ---- waiting ----


@contextlib.contextmanager
def locked(module, path):
    """Hold the store's lock as another program would, before it has written anything."""
    if module is sqlite_store:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield
            other.execute("ROLLBACK")
    else:
        fcntl = pytest.importorskip("fcntl")
        with open(path, "rb") as other:  # to read is enough
            fcntl.flock(other, fcntl.LOCK_EX)
            yield


def attempts(*works):
    """Do all works at once, each in a thread; return how long each took and what it raised."""
    results = []

    def attempt(work):
        began, raised = time.monotonic(), None
        try:
            work()
        except OSError as error:
            raised = error
        results.append((time.monotonic() - began, raised))

    threads = [threading.Thread(target=attempt, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_call_waits_for_a_locked_file_no_longer_than_it_may(module, path, monkeypatch):
    """With its queueing, however many wait; the error says what to do; then all goes on."""
    monkeypatch.setattr(module, "BUSY_S", 0.4)
    with opened(module, path, image(1)) as store:
        works = [lambda n=n: store.add(image(n)) for n in range(10, 40)]
        works += [lambda: store.add_all([image(20)]), lambda: store.delete("wmi-00000001")]
        with locked(module, path):
            results = attempts(*works)
        for seconds, error in results:
            assert 0.35 < seconds < 6  # one after the other they would take 12
            assert str(error).startswith(
                f"{path}: locked by another thread or program for 0.4 s; nothing was changed: try again")
        assert store.page(None, 0, 9) == (1, [image(1)])
        store.add(image(2))
        assert list(store.check()) == []


def test_a_call_goes_on_soon_after_the_lock_is_gone(module, path):
    """Those who wait are done within a second; busy neighbours may make it a few more."""
    with opened(module, path, image(1)) as store, contextlib.ExitStack() as stack:
        stack.enter_context(locked(module, path))
        threads = [threading.Thread(target=store.add, args=(image(n),)) for n in range(10, 14)]
        for thread in threads:
            thread.start()
        waiting(store)
        stack.close()
        began = time.monotonic()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < module.BUSY_S * 0.8
        assert store.page(None, 0, 0)[0] == 5


def test_a_call_waits_for_a_slow_change_no_longer_than_it_may(module, path, monkeypatch):
    """One of this process: others are refused, and it goes on to its end."""
    monkeypatch.setattr(module, "BUSY_S", 0.3)
    with opened(module, path, image(1)) as store:
        def change(record):
            results.extend(attempts(lambda: store.add(image(2)), lambda: store.add(image(3))))
            return {**record, "state": "slow"}

        results = []
        store.replace("wmi-00000001", change)
        for seconds, error in results:
            assert 0.25 < seconds < 5
            assert "nothing was changed" in str(error)
        assert list(store.walk()) == [image(1, state="slow")]


class AdvancedTime:
    """The module time, whose clock can be put forward."""

    def __init__(self):
        self.ahead, self.asked = 0, threading.Event()

    def monotonic(self):
        """Return the time, and take note that it was asked for."""
        self.asked.set()
        return time.monotonic() + self.ahead

    def __getattr__(self, name):
        return getattr(time, name)


def test_a_call_that_has_queued_waits_for_the_file_the_less(module, path, monkeypatch):
    """Both together are no longer than one call may wait."""
    monkeypatch.setattr(module, "BUSY_S", 60)
    clock = AdvancedTime()
    monkeypatch.setattr(module, "time", clock)
    with opened(module, path) as store, contextlib.ExitStack() as stack:
        store.add(image(1))  # what has to be opened is open
        stack.enter_context(locked(module, path))
        gate, results = own_lock(store), []
        gate.acquire()
        clock.asked.clear()
        writer = threading.Thread(
            target=lambda: results.extend(attempts(lambda: store.add(image(2)))))
        writer.start()
        assert clock.asked.wait(30)
        clock.ahead = 59.9  # the time in the queue
        gate.release()
        writer.join()
        (seconds, error), = results
        assert seconds < 30  # 60 if it began anew
        assert "nothing was changed" in str(error)


def own_lock(store):
    """Return the lock on which the writers of this process queue."""
    return store._writing if isinstance(store, json_store.JsonStorage) else store._writes._lock


def waiting(store):
    """Return when a writer has the store's own lock, and so waits for that of the file."""
    lock = own_lock(store)
    deadline = time.monotonic() + 30
    while lock.acquire(blocking=False):
        lock.release()
        assert time.monotonic() < deadline


def test_json_readers_do_not_wait_for_a_writer_that_waits(path):
    """Nor does whoever opens the store, also with something left of a change."""
    with opened(json_store, path, image(1)) as store, contextlib.ExitStack() as stack:
        stack.enter_context(locked(json_store, path))
        writer = threading.Thread(target=store.add, args=(image(2),))
        writer.start()
        waiting(store)
        overwrite(path + ".new", b"half")
        began = time.monotonic()
        with json_store.open_storage(path) as other:
            assert time.monotonic() - began < json_store.BUSY_S / 2
            for reader in (store, other):
                assert reader.get("wmi-00000001") == image(1) == next(reader.walk())
                assert reader.page(None, 0, 1) == (1, [image(1)])
                assert reader.revision()
        assert writer.is_alive()
        assert files(path) == ["images", "images.new"]
        stack.close()
        writer.join()
    assert files(path) == ["images"]


def test_sqlite_a_change_waits_for_readers_no_longer_than_it_may(path, monkeypatch):
    """One that reads and reads lets nobody commit; nothing is changed."""
    monkeypatch.setattr(sqlite_store, "BUSY_S", 0.3)
    with opened(sqlite_store, path, *map(image, range(9))) as store:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            rows = other.execute("SELECT * FROM image")
            rows.fetchone()
            (seconds, error), = attempts(lambda: store.add(image(10)))
            assert 0.25 < seconds < 5
            assert "nothing was changed" in str(error)
            rows.close()
        assert store.page(None, 0, 0)[0] == 9
        store.add(image(10))


# ---- backup and restore ----


def copy_in_shell(source, target):
    """Copy a database as the commands .backup and .restore of SQLite's shell do."""
    with contextlib.closing(sqlite3.connect(source)) as read, contextlib.closing(sqlite3.connect(target)) as written:
        read.backup(written)


@pytest.mark.parametrize(
    ("module", "back_up"),
    [
        (json_store, shutil.copy), (sqlite_store, shutil.copy), (sqlite_store, copy_in_shell),
        (sqlite_store, lambda path, backup: sql(path, f"VACUUM INTO '{backup}'")),
    ],
    ids=["json-copy", "sqlite-copy", "sqlite-backup", "sqlite-VACUUM INTO"],
)
def test_restored_by_rename(module, path, back_up):
    """A backup that is renamed over a store in use shows in the next call; a copy has the revision that it had."""
    with opened(module, path, image(1)) as store:
        back_up(path, path + ".backup")
        seen = [store.revision()]
        store.add(image(2))
        seen.append(store.revision())
        os.replace(path + ".backup", path)
        assert store.revision() != seen[1] and (back_up is not shutil.copy or store.revision() == seen[0])
        assert list(store.walk()) == [image(1)] == store.page(None, 0, 9)[1]
        with pytest.raises(KeyError):
            store.get("wmi-00000002")
        store.add(image(3))  # another content under the count that image 2 had
        assert store.revision() not in seen
        assert ids(store.walk()) == ["wmi-00000003", "wmi-00000001"]
        assert list(store.check()) == []
        assert files(path) == ["images"]
    assert files(path) == ["images"]


def test_sqlite_restored_by_the_shell(path):
    """SQLite's .restore into the file that is in use."""
    with opened(sqlite_store, path, image(1)) as store:
        sql(path, f"VACUUM INTO '{path}.backup'")
        store.add_all([image(n) for n in range(2, 300)])
        seen = store.revision()
        copy_in_shell(path + ".backup", path)
        assert store.revision() != seen
        assert list(store.walk()) == [image(1)] == store.page(None, 0, 9)[1]
        store.add(image(3))
        assert list(store.check()) == []


def test_json_restored_while_a_change_is_worked_out(path):
    """The change is refused: it belongs to what has been replaced."""
    with opened(json_store, path, image(1)) as store:
        shutil.copy(path, path + ".backup")
        store.add(image(2))

        def change(record):
            os.replace(path + ".backup", path)
            return {**record, "state": "changed"}

        with pytest.raises(OSError, match=f"^{path}: replaced .*nothing was changed"):
            store.replace("wmi-00000002", change)
        assert list(store.walk()) == [image(1)]
        store.add(image(3))
        assert files(path) == ["images"]


def test_sqlite_a_copy_over_the_file_is_noticed(path):
    """Also when others have brought SQLite's counter of changes to where it was."""
    many = [image(n, description="y" * 900) for n in range(40)]
    with opened(sqlite_store, path, *many) as store:
        backup = content(path)
        for n in range(3):
            store.add(image(100 + n, is_public=True))
        assert store.page(None, 0, 99)[0] == 43
        overwrite(path, backup)
        for n in range(3):
            sql(path, f"DELETE FROM image WHERE id = 'wmi-0000000{n}'")
        assert store.page(None, 0, 99) == (37, many[:2:-1])
        store.add(image(200, is_public=True))
        store.delete("wmi-00000007")
        assert list(store.check()) == []


def test_sqlite_a_copy_over_the_file_within_a_change_is_found(path):
    """That mixes two states; check says so, and what is left of the images can be used again."""
    with opened(sqlite_store, path, *map(image, range(40))) as store:
        backup = content(path)
        store.replace("wmi-00000004", lambda record: {**record, "is_public": True})

        def change(record):  # of a row that shares a page with the other one
            overwrite(path, backup)
            return {**record, "state": "changed", "account_id": BOB}

        store.replace("wmi-00000005", change)
        assert any("missing from index" in fault for fault in store.check())
        list(store.check(repair=True))
        assert list(store.check()) == []
        walked = list(store.walk())
        assert store.page(None, 0, 999, deleted=None) == (len(walked), walked)
        store.add(image(999))


# ---- json ----


@pytest.fixture
def table(path):
    """A json store with images 1 to 3."""
    with opened(json_store, path, image(1), image(2), image(3)) as store:
        yield store


def test_json_has_one_image_a_line(table, path):
    """A head line that names the format, then images, the oldest first, in plain UTF-8."""
    table.replace("wmi-00000002", lambda record: {**record, "description": "é\u2028😀\n"})
    lines = content(path).decode().split("\n")
    assert lines[:2] == ['{"format": "wmi-images", "version": 1, "change": 2,', '"images": [']
    assert lines[5:] == ["]}", ""]
    assert [json.loads(line.rstrip(","))["id"][-1] for line in lines[2:5]] == ["1", "2", "3"]
    assert "é\u2028😀\\n" in lines[3]
    assert json.loads(content(path))["images"] == list(table.walk(oldest_first=True))


def test_json_changes_only_the_lines_that_it_must(table, path):
    """A diff of two versions shows the image that changed, and the head's counter."""
    before = content(path).split(b"\n")
    table.replace("wmi-00000002", lambda record: {**record, "state": "changed"})
    after = content(path).split(b"\n")
    assert [n for n, pair in enumerate(zip(before, after)) if pair[0] != pair[1]] == [0, 3]


def test_json_edited_by_hand_is_read(table, path):
    """In any layout of JSON; the next change writes ours."""
    whole = json.loads(content(path))
    whole["images"][1]["state"] = "edited"
    overwrite(path, json.dumps(whole, indent=4).encode())
    assert table.get("wmi-00000002")["state"] == "edited"
    table.delete("wmi-00000001")
    assert content(path).count(b"\n") == 5


@pytest.mark.parametrize(("old", "new", "fault"), [
    ('"wmi-00000002"', '"wmi-00000002', r":4:\d+: "),
    ('"version": 1', '"version": 2', ":1:1: .*version 1.*has 2"),
    ('"version": 1', '"version": true', ":1:1: "),
    ('"version": 1', '"version": 1, "more": 1', ":1:1: only"),
    ("wmi-images", "other", ':1:1: .*not "wmi-images"'),
    ('"change": 1', '"change": -1', ':1:1: "change"'),
    ('"change": 1', '"change": 1.5', ':1:1: "change"'),
    ('"images": [', '"pictures": [', ':1:1: "change" must'),
    ("wmi-00000003", "wmi-00000001", ":5:1: the id 'wmi-00000001' .* second"),
    ('"id": "wmi-00000002", ', "", ":4:1: .*'id'"),
    ('"is_public": false', '"is_public": 0', ":3:1: "),
    ('"x86_64"', "NaN", ":3:1: "),
    ('"x86_64"', "1e999", ":3:1: "),
    ('"x86_64"', '"\\ud800"', ":3:1: .*surrogate"),
    ('"x86_64"', "[" * 100_000, ":"),
    ('"x86_64"', "1" * 5000 + "x", ":[13]:"),
    ('{"id": "wmi-00000002"', '7, {"id": "wmi-00000002"', ":4:1: "),
    ('"wmi-00000002"', '"wmi-\udcff0000002"', ":4:13: "),  # a byte that is not UTF-8
])
def test_json_says_where_it_does_not_parse(path, old, new, fault):
    """Path, line and column; at opening and while running; the file stays as it is."""
    with opened(json_store, path, image(1), image(2), image(3)) as store:
        good = content(path)
        bad = good.decode().replace(old, new, 1).encode("utf-8", "surrogateescape")
        overwrite(path, bad)
        for verb in (lambda: store.page(None, 0, 1), lambda: store.add(image(4)),
                     lambda: store.delete("wmi-00000001"), store.revision,
                     lambda: json_store.open_storage(path)):
            with pytest.raises(OSError, match="^" + path + fault):
                verb()
        assert [line.startswith(path + ":") for line in store.check()] == [True]
        assert content(path) == bad
        assert files(path) == ["images"]
        overwrite(path, good)  # mended: everything goes on
        store.add(image(4))
        assert store.page(None, 0, 0)[0] == 4


def test_json_sees_a_new_file_in_the_same_tick(table, path):
    """Also when a careless program restores times and reuses the inode number."""
    for n in range(20):
        before = os.stat(path)
        text = content(path).replace(b'"available"', b'"state%04d"' % n)
        os.unlink(path)
        overwrite(path, text)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with open(path, "rb") as file:
            assert json.load(file)["images"] == list(table.walk(oldest_first=True))
        overwrite(path, text.replace(b'"state%04d"' % n, b'"available"'))
        assert table.get("wmi-00000001")["state"] == "available"


@pytest.mark.parametrize("tick", [0.004, 1, 2])
def test_json_sees_every_edit_in_place_of_the_same_size(path, monkeypatch, tick):
    """However coarse the file system's clock is, and although the editor puts the time back."""
    monkeypatch.setattr(json_store, "os", Clock(tick))
    with opened(json_store, path, image(1), image(2)) as table:
        for n in range(50):
            before = os.stat(path)
            with open(path, "r+b") as file:
                text = file.read()
                file.seek(text.index(b'"state": "') + len(b'"state": "'))
                file.write(f"edit{n:05}".encode())
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert table.get("wmi-00000001")["state"] == f"edit{n:05}"
        table.delete("wmi-00000002")
        assert table.get("wmi-00000001")["state"] == "edit00049"


def test_json_settled_costs_a_stat(path, monkeypatch):
    """A file older than any tick is not read again; a young one is, and not parsed again."""
    with opened(json_store, path, image(1)) as table:
        monkeypatch.setattr(json_store, "os", Clock(1, behind=5))
        state = table._current()
        system = Faults()
        monkeypatch.setattr(json_store, "os", system)
        system.__dict__["stat"] = Clock(1, behind=5).stat
        for _ in range(5):
            assert table.get("wmi-00000001") == image(1)
        assert system.calls == []
        monkeypatch.setattr(json_store, "os", Clock(1))
        assert table._current().rows is state.rows


@pytest.mark.parametrize("target", ["there", "dangling"])
def test_json_follows_no_link_that_was_planted(path, target):
    """What a change writes beside the file is a new file of its own."""
    victim = path + ".victim"
    with opened(json_store, path, image(1)) as store:
        for plant in (lambda: store.add(image(2)), lambda: json_store.open_storage(path).close()):
            if target == "there":
                overwrite(victim, b"precious")
            os.symlink(victim, path + ".new")
            plant()
            assert files(path) == ["images"] + ["images.victim"] * (target == "there")
            assert target != "there" or content(victim) == b"precious"
        assert not os.path.islink(path)
        assert store.page(None, 0, 0)[0] == 2


def test_json_follows_no_link_that_is_planted_again(path, monkeypatch):
    """Not even one that comes after the last one was removed; then the change is refused."""
    class Planting:
        def __getattr__(self, name):
            return getattr(os, name)

        def unlink(self, name):
            os.unlink(name) if os.path.lexists(name) else None
            if not planted:
                planted.append(os.symlink(path + ".victim", name))

    planted = []
    overwrite(path + ".victim", b"precious")
    with opened(json_store, path, image(1)) as store:
        monkeypatch.setattr(json_store, "os", Planting())
        with pytest.raises(OSError, match=f"^{path}: ") as caught:
            store.add(image(2))
        assert not isinstance(caught.value, FileExistsError)
        assert content(path + ".victim") == b"precious"
        store.add(image(3))
        assert files(path) == ["images", "images.victim"]


def test_json_locks_again_what_was_replaced_as_it_was_locked(path, monkeypatch):
    """The lock of a file that is no longer at the path would keep nobody out."""
    fcntl = pytest.importorskip("fcntl")
    with opened(json_store, path, image(1)) as store:
        with opened(json_store, path + ".other", image(7)):
            pass

        def flock(file, how):
            if os.path.exists(path + ".other"):
                os.replace(path + ".other", path)
            fcntl.flock(file, how)

        monkeypatch.setattr(json_store, "fcntl", types.SimpleNamespace(
            flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))
        store.add(image(2))
        assert list(store.walk()) == [image(2), image(7)]


def test_json_missing_reads_as_empty(table, path):
    """The file taken away is an empty store; the next change makes it anew."""
    os.unlink(path)
    assert table.page(None, 0, 1) == (0, [])
    assert files(path) == []
    table.add(image(7))
    assert ids(table.walk()) == ["wmi-00000007"]


def test_json_reading_makes_no_file(path):
    """A store that is only read leaves nothing behind."""
    with json_store.open_storage(path) as store:
        assert list(store.walk()) == [] == list(store.check())
        assert store.revision()
    assert files(path) == []


def test_json_without_fcntl_locks_a_file_beside(path, monkeypatch):
    """As on Windows: msvcrt, no file held open when it is replaced."""
    locks = []
    stub = types.ModuleType("msvcrt")
    stub.LK_NBLCK = 3
    stub.locking = lambda file, mode, size: locks.append((mode, size))
    monkeypatch.setitem(sys.modules, "msvcrt", stub)
    monkeypatch.setattr(sys, "platform", "win32")
    other = types.ModuleType("windows_json_store")
    monkeypatch.setitem(sys.modules, other.__name__, other)
    with open(json_store.__file__, encoding="utf-8") as file:
        exec(compile(file.read(), json_store.__file__, "exec"), other.__dict__)
    with opened(other, path, image(1)) as store:
        store.add(image(2))
        assert store.page(None, 0, 0)[0] == 2
        assert store._pin is None
    assert locks == [(3, 1)] * 2
    assert files(path) == ["images", "images.lock"]


def test_json_keeps_few_lists(table):
    """However many accounts ask, the lists kept for them are bounded."""
    for n in range(1000):
        table.page(f"a-{n}", 0, 1)
    assert len(table._state.views) <= json_store.VIEWS


def test_json_holds_one_file_open(table, path):
    """Not one for each state that it has read."""
    count = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if count is None:
        pytest.skip("no /proc")
    with json_store.open_storage(path) as other:
        for n in range(10, 30):
            other.add(image(n))
            table.get(f"wmi-{n:08x}")
    assert len(os.listdir("/proc/self/fd")) == count


# ---- sqlite ----


@pytest.fixture
def base(path):
    """A sqlite store with images 1 to 3."""
    with opened(sqlite_store, path, image(1), image(2), image(3)) as store:
        yield store


@pytest.mark.parametrize("order", ["ASC", "DESC"])
@pytest.mark.parametrize("scope", SCOPES)
def test_sqlite_sorts_and_scans_nothing(base, path, scope, order):
    """The plan of a page merges index searches, also after ANALYZE."""
    keys = sqlite_store._keys(*scope)
    query, values = sqlite_store._query(keys, order, (0, sqlite_store.LAST), 20, 0)
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in ("SELECT 1", "ANALYZE"):
            db.execute(statement)
            plan = [row[3] for row in db.execute("EXPLAIN QUERY PLAN " + query, values)]
            assert not [step for step in plan if "SCAN" in step or "TEMP B-TREE" in step]
            assert len([step for step in plan if step.startswith("SEARCH")]) == len(keys)
            assert any("MERGE" in step for step in plan)


@pytest.mark.parametrize("name", ["GET", "LIVE", "DELETE", "BLOCKS", "REPLACE"])
def test_sqlite_finds_by_index(base, path, name):
    """No statement of a verb scans a table."""
    query = getattr(sqlite_store, name)
    with contextlib.closing(sqlite3.connect(path)) as db:
        plan = db.execute("EXPLAIN QUERY PLAN " + query, [1] * query.count("?")).fetchall()
    assert all(row[3].startswith("SEARCH") for row in plan), plan


def test_sqlite_pages_cost_the_same_anywhere(path):
    """Any of 20,000 images, more than one block of 16,384, is reached with about the work of the first page.

    Counted in steps of SQLite's machine, not in seconds: a busy computer counts the same.
    """
    steps = []
    with sqlite_store.open_storage(path) as store:
        store.add_all(image(n, ALICE if n % 9 else BOB, is_public=n % 2 == 0)
                      for n in range(1000))
        steps.append(count_steps(store, 0))
        store.add_all(image(n, ALICE if n % 9 else BOB, is_public=n % 2 == 0)
                      for n in range(1000, 20_000))
        total = store.page(ALICE, 0, 0)[0]
        steps.append(count_steps(store, 0))
        deep = [count_steps(store, start) for start in range(100, total, total // 50)]
    assert steps[1] <= 4 * steps[0]
    assert max(deep) <= 4 * steps[1] + 128 * 30  # the rows stepped over in one small block
    assert max(deep) < 10_000


def count_steps(store, start):
    """Return how many hundreds of SQLite's steps a page takes, in steps."""
    count = 0

    def step():
        nonlocal count
        count += 10

    with store._reads as db:
        db.set_progress_handler(step, 10)
    assert len(store.page(ALICE, start, 20)[1]) > 0
    with store._reads as db:
        db.set_progress_handler(None, 10)
    return count


def test_sqlite_adding_costs_the_same_later(path):
    """The time of one add does not grow with the store: the statements touch few pages."""
    def grow(store, first):
        with store._writes as db:
            before = db.execute("PRAGMA page_count").fetchone()[0]
        store.add(image(first))
        with store._writes as db:
            return db.execute("PRAGMA page_count").fetchone()[0] - before

    with opened(sqlite_store, path, *[image(n) for n in range(5000)]) as store:
        assert max(grow(store, 10_000 + n) for n in range(20)) <= 4


def test_sqlite_fields_are_reached_in_the_shell(base, path):
    """The record is JSON that SQLite's functions read, beside columns for the scope."""
    rows = sql(path, "SELECT id, json_extract(record, '$.source.uri') FROM image"
                     " WHERE json_extract(record, '$.arch') = 'x86_64' AND NOT is_public")
    assert rows[0] == ("wmi-00000001", "http://images.example/1")
    assert len(rows) == 3


def test_sqlite_changed_in_the_shell_is_seen(base, path):
    """Triggers keep counts and revision for any program."""
    seen = [base.revision()]
    for statement in (
        "UPDATE image SET record = json_set(record, '$.state', 'shell') WHERE id LIKE '%1'",
        "DELETE FROM image WHERE id = 'wmi-00000002'",
        """INSERT INTO image (id, account_id, is_public, deleted, record)
            SELECT 'wmi-00000009', account_id, 1, 0, json_set(record, '$.id', 'wmi-00000009',
            '$.is_public', json('true')) FROM image LIMIT 1""",
    ):
        sql(path, statement)
        seen.append(base.revision())
    assert len(set(seen)) == 4
    assert base.get("wmi-00000001")["state"] == "shell"
    assert base.page(BOB, 0, 9)[0] == 1
    assert list(base.check()) == []


def test_sqlite_revision_costs_a_stat_once_settled(base, path):
    """A file older than the coarsest clock is not asked again until its times change."""
    with sqlite_store.open_storage(path) as other:
        for n in range(5):
            os.utime(path, (1e9, 1e9))
            first = base.revision()
            assert base._revision[1] == first == base.revision()
            other.replace("wmi-00000001", lambda record, n=n: {**record, "ordinal": n})
            assert base.revision() == other.revision() != first
            assert base._revision[1] == first  # too fresh to be kept


def settle(store, path):
    """Make the file an old one, which is read without locks from the next look on."""
    os.utime(path, (1e9, 1e9))
    store.revision()


def test_sqlite_settled_is_read_without_locks(base, path):
    """Somebody who holds the file's lock, and has written nothing yet, is not waited for."""
    settle(base, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN EXCLUSIVE")
        assert base.get("wmi-00000001") == image(1)
        shell.execute("UPDATE image SET record = json_set(record, '$.state', 'shell')")
        assert base.get("wmi-00000001") == image(1)
        shell.execute("COMMIT")
        assert base.get("wmi-00000001")["state"] == "shell"
        with pytest.raises(KeyError):
            base.get("wmi-00000009")


def test_sqlite_settled_shows_nothing_uncommitted(path, monkeypatch):
    """A change that is in the file, and may still be rolled back, is waited for; then it never was."""
    monkeypatch.setattr(sqlite_store, "BUSY_S", 0.1)
    with opened(sqlite_store, path, *map(image, range(1, 400))) as store:
        settle(store, path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as shell:
            shell.execute("PRAGMA cache_size = 1")  # pages are written long before the end
            shell.execute("BEGIN IMMEDIATE")
            shell.execute("UPDATE image SET record = json_set(record, '$.state', 'shell')")
            with pytest.raises(OSError, match="locked"):
                store.get("wmi-00000001")
            shell.execute("ROLLBACK")
        assert store.get("wmi-00000001") == image(1)


def test_sqlite_settled_never_goes_back(base, path):
    """Of two readings the later one is never older, however often the file settles between changes."""
    done, seen = threading.Event(), []

    def read():
        last = 0
        while not done.is_set():
            base.revision()
            ordinal = base.get("wmi-00000001").get("ordinal", 0)
            seen.append(ordinal - last)
            last = ordinal

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    with sqlite_store.open_storage(path) as other:
        for n in range(1, 60):
            other.replace("wmi-00000001", lambda record, n=n: {**record, "ordinal": n})
            assert base.get("wmi-00000001")["ordinal"] == n
            settle(base, path)
            assert base.get("wmi-00000001")["ordinal"] == n
    done.set()
    for reader in readers:
        reader.join()
    assert seen
    assert min(seen) == 0


def test_sqlite_settled_and_replaced(base, path):
    """Another file at the path is read from then on."""
    settle(base, path)
    assert base.get("wmi-00000002") == image(2)
    with opened(sqlite_store, path + ".new", image(1, state="other")):
        os.utime(path + ".new", (1e9, 1e9))
    os.rename(path + ".new", path)
    assert base.get("wmi-00000001")["state"] == "other"
    with pytest.raises(KeyError):
        base.get("wmi-00000002")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_sqlite_settled_and_forked(base, path):
    """A child reads by itself, and its end takes nothing from the parent."""
    settle(base, path)
    reader = base._lock_free
    child = os.fork()
    if child == 0:
        reader._cursor = None  # what the parent opened is not touched
        good = base.get("wmi-00000001") == image(1)
        base.revision()
        good &= base._lock_free is not reader and bool(base._lock_free.get("wmi-00000002"))
        base.close()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert base._lock_free is not None


def test_sqlite_settled_is_forgotten_after_a_change(base, path):
    """What a change made useless is closed by the next look, or the next reading."""
    for look in (base.revision, lambda: base.get("wmi-00000002")):
        settle(base, path)
        assert base._lock_free
        sql(path, "UPDATE image SET record = json_set(record, '$.state', 'shell')")
        look()
        assert base._lock_free is None
        assert base.get("wmi-00000001")["state"] == "shell"


def test_sqlite_settled_and_taken_away(base, path, monkeypatch):
    """A file that goes away as it is opened for reading without locks is not made anew."""
    real = sqlite3.connect

    def connect(name, **options):
        if options.get("uri"):
            os.rename(path, path + ".away")
        return real(name, **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    settle(base, path)
    assert not os.path.exists(path)
    with pytest.raises(OSError, match="^" + path):
        base.get("wmi-00000001")


def test_sqlite_settled_path_of_odd_characters(tmp_path):
    """Every path is one: what means something in a URI, two slashes at the start."""
    folder = tmp_path / "a b?c#d%41é"
    folder.mkdir()
    path = f"/{folder}/images"
    with opened(sqlite_store, path, image(1)) as store:
        settle(store, path)
        assert store._lock_free.get("wmi-00000001")


def test_sqlite_settled_without_a_descriptor(base, path, monkeypatch):
    """What cannot be opened once more is read as it was before."""
    real = sqlite3.connect

    def connect(name, **options):
        if options.get("uri"):
            raise sqlite3.OperationalError("unable to open database file")
        return real(name, **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    settle(base, path)
    assert base.get("wmi-00000001") == image(1)


def test_sqlite_revision_is_not_kept_in_wal_mode(path):
    """There a change leaves the file's times alone."""
    with opened(sqlite_store, path, image(1)) as store:
        sql(path, "PRAGMA journal_mode = WAL")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as shell:
            os.utime(path, (1e9, 1e9))
            first = store.revision()
            shell.execute("UPDATE image SET record = record")
            os.utime(path, (1e9, 1e9))
            assert store.revision() != first


@pytest.mark.parametrize(("version", "mode"), [((3, 51, 2), "delete"), ((3, 51, 3), "wal")])
def test_sqlite_leaves_wal_where_it_is_not_safe(path, monkeypatch, version, mode):
    """A file that a shell put into WAL mode is put back by SQLite before 3.51.3."""
    with opened(sqlite_store, path, image(1)):
        assert sql(path, "PRAGMA journal_mode") == [("delete",)]
    sql(path, "PRAGMA journal_mode = WAL")
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    with sqlite_store.open_storage(path) as store:
        assert ids(store.walk()) == ["wmi-00000001"]
        with store._reads as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == (mode,)


@pytest.fixture
def old_sqlite(monkeypatch):
    """An SQLite that may damage a file in WAL mode."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))


@pytest.mark.parametrize("when", ["before", "after"])
def test_sqlite_in_wal_mode_elsewhere_is_read_and_not_written(path, old_sqlite, when):
    """As long as another program has it open so; the error says what to do."""
    with opened(sqlite_store, path, image(1)) as store:
        assert store.get("wmi-00000001")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            assert other.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
            other.execute("UPDATE image SET record = json_set(record, '$.state', 'shell')")
            with contextlib.ExitStack() as stack:
                used = store
                if when == "before":
                    used = stack.enter_context(sqlite_store.open_storage(path))
                for _ in range(2):
                    assert used.get("wmi-00000001")["state"] == "shell"
                    assert used.page(None, 0, 9)[0] == len(list(used.walk(frozen=True))) == 1
                    assert used.revision()
                    assert list(used.check()) == []
                    for verb in (lambda: used.add(image(2)), lambda: used.add_all([image(2)]),
                                 lambda: used.delete("wmi-00000001")):
                        with pytest.raises(OSError, match=f"^{path}: another program .* WAL mode,"
                                                          ".* close that program"):
                            verb()
        store.add(image(2))
        assert sql(path, "PRAGMA journal_mode") == [("delete",)]
        assert files(path) == ["images"]


def test_sqlite_syncs_as_it_promises(base):
    """Both connections wait for the disk, the journal's removal included."""
    for connection in (base._reads, base._writes):
        with connection as db:
            assert db.execute("PRAGMA synchronous").fetchone() == (3,)
            assert db.execute("PRAGMA cache_size").fetchone() == (-sqlite_store.CACHE_KIB,)


def test_sqlite_too_old_is_refused(path, monkeypatch):
    """OSError that says which one is needed; no file is made."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 23, 9))
    with pytest.raises(OSError, match=r"too old, 3\.24"):
        sqlite_store.open_storage(path)
    assert files(path) == []


def test_sqlite_newer_schema_is_refused_untouched(path):
    """Its message names both versions."""
    with opened(sqlite_store, path, image(1)):
        pass
    sql(path, "PRAGMA user_version = 99")
    before = content(path)
    with pytest.raises(OSError, match=f"^{path}: schema 99 is newer than .* 1"):
        sqlite_store.open_storage(path)
    assert content(path) == before


def test_sqlite_older_schema_is_migrated_in_one_transaction(path, monkeypatch):
    """The scripts that are missing run, all or none, and only once."""
    with opened(sqlite_store, path, image(1)):
        pass
    good = ("CREATE TABLE note (text)", "INSERT INTO note VALUES ('migrated')")
    monkeypatch.setattr(sqlite_store, "MIGRATIONS", (*sqlite_store.MIGRATIONS, (*good, "NONSENSE")))
    with pytest.raises(OSError, match="NONSENSE"):
        sqlite_store.open_storage(path)
    assert sql(path, "SELECT count(*) FROM sqlite_master WHERE name = 'note'") == [(0,)]
    monkeypatch.setattr(sqlite_store, "MIGRATIONS", (*sqlite_store.MIGRATIONS[:-1], good))
    for _ in range(2):
        with sqlite_store.open_storage(path) as store:
            assert ids(store.walk()) == ["wmi-00000001"]
    assert sql(path, "SELECT text FROM note") == [("migrated",)]
    assert sql(path, "PRAGMA user_version") == [(2,)]


@pytest.mark.parametrize("prepare", [
    ("CREATE TABLE image (id)",), ("PRAGMA user_version = 1",), ("PRAGMA application_id = 7",),
    ("PRAGMA journal_mode = WAL", "CREATE TABLE other (x)"),
])
def test_sqlite_foreign_database_is_refused_untouched(path, prepare):
    """Another program's database, whatever its tables are called."""
    sql(path, *prepare)
    before = content(path)
    with pytest.raises(OSError, match=f"^{path}: not a store of images"):
        sqlite_store.open_storage(path)
    assert content(path) == before


def test_sqlite_taken_away_is_an_error_until_it_is_back(base, path):
    """It is not made anew under a running server."""
    os.rename(path, path + ".away")
    for verb in (base.revision, lambda: base.page(None, 0, 1), lambda: base.add(image(9)),
                 lambda: base.add_all([image(9)]), lambda: list(base.walk(frozen=True))):
        with pytest.raises(OSError, match="^" + path):
            verb()
    assert files(path) == ["images.away"]
    os.rename(path + ".away", path)
    base.add(image(9))
    assert base.page(None, 0, 0)[0] == 4


def test_sqlite_threads_share_two_connections(base, path, monkeypatch):
    """Sixty-four threads open none of their own."""
    opens = []
    connect = sqlite_store._connect
    monkeypatch.setattr(sqlite_store, "_connect", lambda *args: opens.append(1) or connect(*args))
    case = TestSqlite()
    case.gather(*[lambda n=n: (base.page(ALICE, 0, 9), base.add(image(100 + n)))
                  for n in range(64)])
    assert len(opens) <= 2
    assert base.page(None, 0, 0)[0] == 67


def test_sqlite_a_waiting_writer_does_not_hold_up_readers(base, path):
    """While another process has the file reserved, reads go on and the write comes after."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writer = threading.Thread(target=base.add, args=(image(9),))
        writer.start()
        waiting(base)
        assert base.get("wmi-00000001") == image(1)
        assert base.page(None, 0, 0)[0] == 3
        assert writer.is_alive()
        other.execute("COMMIT")
        writer.join(30)
    assert base.page(None, 0, 0)[0] == 4


def test_sqlite_check_finds_tampered_counts(base, path):
    """And repair rebuilds them from the images."""
    for statement in ("UPDATE tally SET n = n + 1 WHERE shift = 14", "DELETE FROM tally",
                      "INSERT INTO tally VALUES ('nobody', 0, 0, 7, 99, 5)",
                      "UPDATE tally SET account = 'a-other' WHERE account = 'a-00000001'"):
        sql(path, statement)
        faults = list(base.check())
        assert faults and all(f.startswith(path + ": the count of") for f in faults)
        assert list(base.check(repair=True)) == faults
        assert list(base.check()) == []
        assert base.page(ALICE, 1, 1) == (3, [image(2)])


def test_sqlite_check_finds_columns_that_lie(base, path):
    """Repair sets them by the record, with the counts."""
    sql(path, "UPDATE image SET is_public = 1, account_id = 'x' WHERE id = 'wmi-00000001'",
        "UPDATE image SET id = 'other' WHERE id = 'wmi-00000002'",
        "UPDATE image SET deleted = 1 WHERE id = 'wmi-00000003'")
    assert len(list(base.check(repair=True))) == 3
    assert list(base.check()) == []
    assert list(base.walk(ALICE, public=False, deleted=False)) == [image(3), image(2), image(1)]
    assert base.get("wmi-00000002") == image(2)


def test_sqlite_repair_undoes_no_change(path):
    """What is changed or deleted while check reads stays so, and is repaired if it is wrong."""
    with opened(sqlite_store, path, *map(image, range(600))) as store:
        sql(path, "UPDATE image SET is_public = 1, account_id = 'x' WHERE serial % 3 = 1")
        faults = store.check(repair=True)
        first = [next(faults)]
        assert "wmi-00000000" in first[0]
        store.replace("wmi-00000000", lambda record: {**record, "state": "changed"})
        store.delete("wmi-00000003")
        sql(path, "UPDATE image SET record = json_set(record, '$.state', 'shell')"
                  " WHERE id = 'wmi-00000006'")
        store.replace("wmi-00000255", lambda record: {**record, "state": "changed"})  # not read yet
        store.delete("wmi-00000252")
        rest = list(faults)
        assert 196 <= len(first + rest) <= 200
        assert not [fault for fault in rest if "wmi-00000255" in fault or "wmi-00000252" in fault]
        assert list(store.check()) == []
        assert store.get("wmi-00000000") == image(0, state="changed")
        assert store.get("wmi-00000006") == image(6, state="shell")
        assert store.get("wmi-00000255") == image(0x255, state="changed")
        assert store.page("x", 0, 0)[0] == 0
        assert store.page(ALICE, 0, 0)[0] == 598


def test_sqlite_repair_says_what_it_cannot_mend(base, path):
    """Two images of one id: one of them stays as it is, and the others are repaired."""
    sql(path, "UPDATE image SET record = json_set(record, '$.id', 'wmi-00000003')"
              " WHERE id = 'wmi-00000001'",
        "UPDATE image SET is_public = 1 WHERE id = 'wmi-00000002'")
    assert any("UNIQUE" in fault for fault in base.check(repair=True))
    fault, = base.check()
    assert "image 1 (wmi-00000001): columns differ" in fault
    assert base.get("wmi-00000002") == image(2)
    assert base.page(CAROL, 0, 0)[0] == 0


def test_sqlite_repaired_counts_are_another_revision(base, path):
    """A total that was kept under the old one is not served again."""
    sql(path, "UPDATE tally SET n = n + 1")
    before = base.revision()
    list(base.check(repair=True))
    assert base.revision() != before


@pytest.mark.parametrize("what", ["walk", "repair"])
def test_sqlite_holds_few_large_records(path, what):
    """Of 12 MB of records no more than some chunks of 128 KiB are in memory at a time."""
    tracemalloc = pytest.importorskip("tracemalloc")
    with opened(sqlite_store, path) as store:
        store.add_all(image(n, description="x" * 60_000) for n in range(200))
        sql(path, "UPDATE image SET is_public = 1")
        tracemalloc.start()
        try:
            count = sum(1 for _ in (store.walk() if what == "walk" else store.check(repair=True)))
            assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
        finally:
            tracemalloc.stop()
        assert count == 200


def test_sqlite_a_record_that_does_not_parse_is_an_error(base, path):
    """Reading it is OSError with the path; check names it; others are served."""
    sql(path, "UPDATE image SET record = '{' WHERE id = 'wmi-00000002'")
    with pytest.raises(OSError, match=f"^{path}: .*parse"):
        base.get("wmi-00000002")
    assert base.get("wmi-00000001") == image(1)
    faults = list(base.check(repair=True))
    assert len(faults) == 1 and "wmi-00000002" in faults[0]


def test_sqlite_check_finds_an_index_that_lies(path):
    """An index that misses an image is a fault, and repair makes it anew."""
    with opened(sqlite_store, path, *[image(n) for n in range(50)]) as store:
        sql(path, "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = 'CREATE INDEX own ON image"
            " (account_id, is_public, deleted) WHERE serial > 25' WHERE name = 'own'")
        sql(path, "REINDEX own")
        sql(path, "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = 'CREATE INDEX own ON image"
            " (account_id, is_public, deleted)' WHERE name = 'own'")
    with sqlite_store.open_storage(path) as store:
        assert any("missing from index own" in fault for fault in store.check())
        list(store.check(repair=True))
        assert list(store.check()) == []
        assert len(store.page(ALICE, 0, 99)[1]) == 50


# ---- others at work on the file ----


@contextlib.contextmanager
def emptied(path):
    """Yield a store that knows image 1, and the content that its file had before it was emptied."""
    with opened(json_store, path, image(1)) as store:
        good = content(path)
        assert store.get("wmi-00000001") == image(1)
        overwrite(path, b"")
        yield store, good


def test_json_emptied_under_a_running_process_is_refused(path):
    """Others empty a file before they write it: until they have, nothing is read as absent, and nothing is written."""
    with emptied(path) as (store, good):
        for verb in (lambda: store.add(image(2)), lambda: store.add_all([image(2)]), lambda: store.page(None, 0, 1),
                     lambda: store.get("wmi-00000001"), lambda: store.delete("wmi-00000001"), store.revision):
            with pytest.raises(OSError, match=f"^{path}: emptied by another program; nothing was changed: try again"):
                verb()
        assert ["emptied" in fault for fault in store.check()] == [True]
        assert content(path) == b""
        assert files(path) == ["images"]
        overwrite(path, good)  # the other program is done
        store.add(image(2))
        assert list(store.walk()) == [image(2), image(1)]


def test_json_emptied_may_be_removed(path):
    """As the error says: then the store begins anew."""
    with emptied(path) as (store, _):
        os.unlink(path)
        store.add(image(2))
        assert list(store.walk()) == [image(2)]


@pytest.mark.parametrize("edit", [b'"available"', b'"edited"', b'"available" '])
def test_json_edited_in_place_while_a_change_is_worked_out(path, edit):
    """The change is refused, for it belongs to what was there before; the edit stays."""
    with opened(json_store, path, image(1), image(2)) as store:
        edited = content(path).replace(b'"available"', edit)

        def change(record):
            time.sleep(0.02)  # longer than a tick of the clock that stamps the file
            overwrite(path, edited)
            return {**record, "state": "changed"}

        with pytest.raises(OSError, match=f"^{path}: replaced.*edited.*nothing was changed"):
            store.replace("wmi-00000002", change)
        assert content(path) == edited
        assert files(path) == ["images"]
        store.add(image(3))
        assert [record["state"] for record in store.walk(oldest_first=True)][:2] == [json.loads(edit)] * 2


def test_json_says_soon_where_a_record_far_down_is_bad(path):
    """The place is searched for in one pass, however many images stand before it."""
    with opened(json_store, path) as store:
        store.add_all(image(n, description="\u20ac" * 300) for n in range(10_000))
        text = content(path).decode()
        overwrite(path, text.replace("wmi-0000270e", "wmi-0000270f").encode())
        began = time.monotonic()
        with pytest.raises(OSError, match=rf"^{path}:\d+:\d+: .*wmi-0000270f"):
            store.get("wmi-00000001")
        assert time.monotonic() - began < 5  # it took the square of that


@pytest.mark.parametrize(("old", "new", "fault"), [
    ('"version": 1,', '"version": 1, "version": 1,', ":1:40: the key 'version' "),
    ("]}\n", '],\n "images": []}\n', ":6:2: the key 'images' "),
    ('"virtio": true', '"virtio": true, "virtio": false', r":3:\d+: the key 'virtio' "),
    ('"x86_64",', r'"a\"}{", "\u0061rch": "x86",', r":3:\d+: the key 'arch' "),
])
def test_json_with_a_key_twice_is_refused(path, old, new, fault):
    """Of two values one would be lost: as after a merge that left two lists of images."""
    with opened(json_store, path, image(1), image(2)) as store:
        good = content(path)
        bad = good.decode().replace(old, new, 1).encode()
        overwrite(path, bad)
        for verb in (lambda: store.page(None, 0, 1), lambda: store.add(image(4)),
                     lambda: json_store.open_storage(path)):
            with pytest.raises(OSError, match=f"^{path}{fault}appears here a second time"):
                verb()
        assert [line.startswith(path + ":") for line in store.check()] == [True]
        assert content(path) == bad
        overwrite(path, good)
        assert store.page(None, 0, 9) == (2, [image(2), image(1)])


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() != 0, reason="needs root, to be two other users")
def test_json_keeps_the_group_when_it_cannot_keep_the_owner():
    """A change by a member of the file's group does not lock out the other members, nor the owner."""
    folder = tempfile.mkdtemp()
    try:
        path = os.path.join(folder, "images")
        with opened(json_store, path, image(1)):
            pass
        os.chmod(folder, 0o777)
        os.chmod(path, 0o660)
        os.chown(path, 12001, 13000)
        printed = run("""
            import os, wmi
            from wmi import json_store
            from wmi.contract import image
            os.setgroups([13000])
            os.setgid(12002)
            os.setuid(12002)
            with json_store.open_storage(sys.argv[1]) as store:
                store.add(image(2))
            print("added")
            """, path)
        found = os.stat(path)
        assert (printed, found.st_gid, stat.S_IMODE(found.st_mode)) == ("added\n", 13000, 0o660)
    finally:
        shutil.rmtree(folder)


def test_a_walk_from_beyond_the_end_is_empty(module, path):
    """However far beyond: the start may be larger than what SQLite or an index of Python can hold."""
    with opened(module, path, image(1), image(2)) as store:
        for start in (2, 2**63 - 1, 2**63, 10**30):
            for frozen in (True, False):
                for oldest_first in (True, False):
                    assert list(store.walk(start=start, frozen=frozen, oldest_first=oldest_first)) == []


def test_sqlite_opened_as_another_makes_it(path, monkeypatch):
    """Whoever finds the new file empty, and then not, looks at both at one moment."""
    class Slow:
        """The module os. After the first look at whose file it is, another process makes a store of it, if it can."""

        def __getattr__(self, name):
            return getattr(os, name)

        def stat(self, name):
            if threading.current_thread() is not maker and not maker.ident:
                maker.start()
                maker.join(0.3)
            return os.stat(name)

    made = []
    maker = threading.Thread(target=lambda: made.append(sqlite_store.open_storage(path)))
    overwrite(path, b"")
    monkeypatch.setattr(sqlite_store, "os", Slow())
    with sqlite_store.open_storage(path) as store:
        maker.join(30)
        made[0].add(image(1))
        made[0].close()
        assert list(store.walk()) == [image(1)]


@pytest.mark.parametrize("blob", ["CAST(record AS BLOB)", "x'ff'"])
def test_sqlite_a_record_that_is_not_text(base, path, blob):
    """As the shell's readfile() makes it: reading it is OSError; check finds it, and repairs it if it can be read."""
    sql(path, f"UPDATE image SET record = {blob} WHERE id = 'wmi-00000002'")
    for verb in (lambda: base.get("wmi-00000002"), lambda: base.page(None, 0, 9), lambda: list(base.walk()),
                 lambda: base.replace("wmi-00000002", dict)):
        with pytest.raises(OSError, match=f"^{path}: a record does not parse, `check` says which: "):
            verb()
    for repair in (False, True):
        fault, = base.check(repair=repair)
        assert "image 2 (wmi-00000002): " in fault
    if blob == "x'ff'":
        assert len(list(base.check())) == 1
    else:
        assert list(base.check()) == []
        assert base.get("wmi-00000002") == image(2)


def test_sqlite_repair_counts_what_a_shell_replaced(base, path):
    """Triggers do not see the row that INSERT OR REPLACE removes, unless they are told to; check sees it."""
    statement = """INSERT OR REPLACE INTO image (id, account_id, is_public, deleted, record)
        SELECT id, account_id, is_public, deleted, record FROM image WHERE id = 'wmi-00000001'"""
    before = base.revision()
    sql(path, "PRAGMA recursive_triggers = ON", statement)
    assert list(base.check()) == []
    assert base.revision() != before
    sql(path, statement)
    assert all("count" in fault for fault in base.check(repair=True))
    assert list(base.check()) == []
    assert base.page(ALICE, 0, 9) == (3, [image(1), image(3), image(2)])
