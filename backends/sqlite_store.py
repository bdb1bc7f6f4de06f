"""A store of images in one SQLite file that a million of them do not slow down: `sqlite:FILE`.

How it works:

1. Each image is a row: a serial number in order of registration, the columns that decide who sees it, and the whole
   record as JSON. `json_extract(record, '$.arch')` reaches the other fields.
2. A scope (see wmi.Storage) is a union of keys (account, is_public, deleted) which exclude each other: "own and public"
   is the private images of the account plus the public ones of everybody. Each key has an index that ends in the
   serial, so SQLite merges a page from indexes and sorts nothing.
3. The table `tally` counts the images of each key, by blocks of serials. Triggers update the counts in the transaction
   that makes the change, whoever makes it. See "Counts" below. There is one exception: SQLite fires no trigger for a
   row that OR REPLACE removes, except with PRAGMA recursive_triggers. This store does not use OR REPLACE. If somebody
   does in the sqlite3 shell, the row stays counted until `check --repair` counts anew.
4. A trigger draws a new random revision for every change, even one that is made with the sqlite3 shell.
5. Durability is left to SQLite, with a rollback journal and full synchronisation. A change begins with BEGIN IMMEDIATE,
   because a transaction that has begun by reading cannot wait for its turn to write. If another program keeps the file
   in WAL mode, and this version of SQLite might damage it in that mode, the file is only read.
6. A process has two connections, one to read and one to write, each under a lock. They are opened again after a fork,
   and when another file stands at the path. One deadline per call bounds the wait for that lock and then for a lock of
   the file. The few calls that wait for the file more than once may take as long again.
7. While nobody writes the file, single images are read through a third connection, which takes no locks of the file:
   locking costs more than the search. One `stat` afterwards tells whether the file was still the same.
8. Many records at once first go into a temporary table, so that no lock is held while their source is slow.

Counts. OFFSET alone would step over every image before a page: for the last page of a million images, over a million.
So the images of each key are counted by blocks, large ones of 2**14 = 16,384 serials and small ones of 2**7 = 128:

    large blocks       0: 9,012          1: 16,102          2: 301        their sum is the total of the key
                                         |
    small blocks       128: 128   129: 97   130: 119   …   255: 128       the 128 small ones in large block 1
                                  |
    serials            16,512   16,513   16,515   …   16,639              the 97 images in small block 129

To find the image at an offset, go through the large blocks and subtract their counts, as long as the offset is not
less than the next count. Go through the small blocks of that large one in the same way. Step over the rest, fewer
than 128 images, with OFFSET. This reads a count for every 16,384 images, and then up to 128 counts, for each of the
two or four keys of a scope. The cost is the same for a page at the beginning, in the middle and at the end.

Left out: search in fields (but see 1), and a pool of connections: the interpreter lock makes readers queue anyway.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import chain
from typing import Any
from urllib.parse import quote

BUSY_S = 8.0  # for which a call waits for locks, in all; a server gives up after 10 s
CACHE_KIB, LOAD_CACHE_KIB = 1000, 64_000  # small in a server; for a load, so large that a million images' index fits
CHUNK, CHUNK_TEXT = 256, 32 * 1024  # rows of a walk that are read at once, and characters; no lock is held in between
LARGE, SMALL = 14, 7  # a block of counts covers 2**14 or 2**7 serials; the SQL below spells them out
LAST = 2**63 - 1  # the highest serial that SQLite can give
EVERYBODY = b""  # in place of an account, in `tally`: a blob equals no text, not even an empty one
SETTLED_NS = 3 * 10**9  # age at which the next write is sure to give the file another time, on any file system
LOCKED = "database is locked"  # in the words of SQLite, and in ours:
BUSY = "locked by another thread or program for {:g} s; nothing was changed: try again, or end it"
NEEDED, WAL_SAFE = (3, 24, 0), (3, 51, 3)  # the first with upsert; the first in which a WAL of many writers is safe
APPLICATION_ID = 0x776D6931  # "wmi1" at offset 68 of the file tells it from other databases

# The schema. A change of an image adds 1 to four counts, two blocks of its own key and two of everybody's, or takes 1
# from them. A count of 0 is removed, so that `tally` does not grow with what has been deleted.

COUNT = """INSERT INTO tally VALUES
    ({row}.account_id, {row}.is_public, {row}.deleted, 14, {row}.serial >> 14, {n}),
    ({row}.account_id, {row}.is_public, {row}.deleted, 7, {row}.serial >> 7, {n}),
    (x'', {row}.is_public, {row}.deleted, 14, {row}.serial >> 14, {n}),
    (x'', {row}.is_public, {row}.deleted, 7, {row}.serial >> 7, {n})
    ON CONFLICT (account, is_public, deleted, shift, block) DO UPDATE SET n = n + excluded.n;"""
FORGET = """DELETE FROM tally WHERE account IN (OLD.account_id, x'')
    AND is_public = OLD.is_public AND deleted = OLD.deleted
    AND shift IN (14, 7) AND block IN (OLD.serial >> 14, OLD.serial >> 7) AND n = 0;"""
RENEW = "UPDATE state SET revision = lower(hex(randomblob(16)));"
ADDED, REMOVED = COUNT.format(row="NEW", n=1), COUNT.format(row="OLD", n=-1) + FORGET
COLUMNS = """(serial INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, account_id TEXT
    NOT NULL, is_public INTEGER NOT NULL, deleted INTEGER NOT NULL, record TEXT NOT NULL)"""
TOMBSTONE = """TRIGGER {name} BEFORE INSERT ON {table}
    BEGIN DELETE FROM {table} WHERE id = NEW.id AND deleted; END"""
MIGRATIONS = (  # MIGRATIONS[N:] bring a file of schema version N up to date
    (
        f"PRAGMA application_id = {APPLICATION_ID}",
        f"CREATE TABLE image {COLUMNS}",
        "CREATE INDEX own ON image (account_id, is_public, deleted)",
        "CREATE INDEX everybody ON image (is_public, deleted)",
        """CREATE TABLE tally (account, is_public, deleted, shift, block, n NOT NULL,
            PRIMARY KEY (account, is_public, deleted, shift, block)) WITHOUT ROWID""",
        "CREATE TABLE state (revision TEXT NOT NULL)",
        "INSERT INTO state VALUES (lower(hex(randomblob(16))))",
        "CREATE " + TOMBSTONE.format(name="reuse", table="image"),
        f"CREATE TRIGGER added AFTER INSERT ON image BEGIN {ADDED} {RENEW} END",
        f"CREATE TRIGGER removed AFTER DELETE ON image BEGIN {REMOVED} {RENEW} END",
        f"CREATE TRIGGER changed AFTER UPDATE ON image BEGIN {REMOVED} {ADDED} {RENEW} END",
    ),
)

VERSION = """SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)
    FROM pragma_application_id, pragma_user_version"""  # sqlite_master makes SQLite read the file, under one lock
GET = "SELECT serial, record FROM image WHERE id = ?"
ADD = "INSERT INTO {} (id, account_id, is_public, deleted, record) VALUES (?, ?, ?, ?, ?)"
REPLACE = "UPDATE image SET id = ?, account_id = ?, is_public = ?, deleted = ?, record = ? WHERE serial = ?"
LIVE = "SELECT 1 FROM image WHERE id = ? AND NOT deleted"
DELETE = "DELETE FROM image WHERE id = ?"
IMAGES_AFTER = "SELECT * FROM image WHERE serial > ? ORDER BY serial LIMIT ?"
BLOCKS = """SELECT block, n FROM tally WHERE account = ? AND is_public = ? AND deleted = ?
    AND shift = ? AND block BETWEEN ? AND ?"""
ROWS = """SELECT serial, record FROM image INDEXED BY {}
    WHERE {}is_public = ? AND deleted = ? AND serial BETWEEN ? AND ?"""
OWN, ANYBODY = ROWS.format("own", "account_id = ? AND "), ROWS.format("everybody", "")
ORDER = " ORDER BY serial {} LIMIT ? OFFSET ?"
PUBLISH = """INSERT INTO image (id, account_id, is_public, deleted, record)
    SELECT id, account_id, is_public, deleted, record FROM staged ORDER BY serial"""
KNOWN = "SELECT id FROM image JOIN staged USING (id) WHERE NOT image.deleted LIMIT 1"
RECOUNT = """SELECT account, is_public, deleted, shift, serial >> shift AS block, count(*) AS n
    FROM (SELECT account_id AS account, is_public, deleted, serial FROM image
        UNION ALL SELECT x'', is_public, deleted, serial FROM image),
        (SELECT 14 AS shift UNION ALL SELECT 7) GROUP BY 1, 2, 3, 4, 5"""
MISCOUNTED = f"""SELECT DISTINCT account, is_public, deleted, shift, block FROM ({RECOUNT}
    UNION ALL SELECT * FROM tally) GROUP BY 1, 2, 3, 4, 5, n HAVING count(*) = 1"""

Record = dict[str, Any]
Row = tuple[str, str, bool, bool, str]
Key = tuple["str | bytes", bool, bool]
Span = tuple[int, int]
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_parse_json: Callable[[str], Record] = json.JSONDecoder().decode  # json.loads() would look at its options first
_making = threading.Lock()
_inherited: list[Any] = []  # connections of a parent process, kept: closing them in the child could harm its files


def open_storage(location: str) -> SqliteStorage:
    """Return the store in the file `location`, opened. If the file does not exist, it is made."""
    return SqliteStorage(location)


class SqliteStorage(AbstractContextManager["SqliteStorage"]):
    """A store in an SQLite file. Threads may share it; processes each open their own."""

    def __init__(self, path: str) -> None:
        """Open the file. Raises OSError if it is there, but not a store of images."""
        self._path = os.path.abspath(path)
        self._revision: tuple[object, str] = None, ""
        self._lock_free: _LockFreeReader | None = None
        if sqlite3.sqlite_version_info < NEEDED:
            raise OSError(f"{path}: SQLite {sqlite3.sqlite_version} is too old, 3.24 is needed")
        # SQLite would make the file readable for all. So it is made here, by one thread at a time, and only if there
        # is none: closing a file makes a process lose every lock that it has on that file.
        with _making, suppress(OSError):  # the file exists, or SQLite will report why it cannot be made
            os.close(os.open(os.path.realpath(path), os.O_CREAT | os.O_EXCL, 0o640))
        _connect(self._path, _deadline()).close()
        self._reads, self._writes = _Connection(self._path), _Connection(self._path)

    def get(self, id: str) -> Record:
        """Return the record, a tombstone too. Raises KeyError."""
        reader = self._lock_free
        found = reader.get(id) if reader else None
        if found is None:
            with self._reads as db:
                self._close_lock_free(reader)
                found = db.execute(GET, (id,)).fetchall()
        if not found:
            raise KeyError(id)
        return self._decode(found[0][1])

    def add(self, record: Record) -> None:
        """Register a record as the newest, also over a tombstone. Raises FileExistsError."""
        with self._writes as db:
            db.begin()
            _insert(db, "image", _row(record))

    def add_all(self, records: Iterable[Record]) -> int:
        """Register all in this order, or none if one fails or the iterable raises; return how many."""
        count = 0
        with self._private() as db:
            # 1. Stage all records without a lock, since their source may be slow. An id that exists is noticed at
            #    once: the caller reports the line of its input that was read last.
            db.execute(f"PRAGMA cache_size = -{LOAD_CACHE_KIB}")
            db.execute(f"CREATE TEMP TABLE staged {COLUMNS}")
            db.execute("CREATE TEMP " + TOMBSTONE.format(name="restage", table="staged"))
            for count, record in enumerate(records, 1):
                row = _row(record)
                if db.execute(LIVE, (row[0],)).fetchall():
                    raise FileExistsError(row[0])
                _insert(db, "staged", row)
            # 2. Register them, with a new deadline: the source may have taken longer than a call may wait for locks.
            db.begin(_deadline())
            try:
                db.execute(PUBLISH)
            except sqlite3.IntegrityError:  # another process has just registered one of the ids
                raise FileExistsError(db.execute(KNOWN).fetchall()[0][0]) from None
            db.execute("COMMIT")
        return count

    def replace(self, id: str, change: Callable[[Record], Record]) -> Record:
        """Put change(record) in the place of the record, atomically, and return it. Raises KeyError."""
        with self._writes as db:
            db.begin()
            found = db.execute(GET, (id,)).fetchall()
            if not found:
                raise KeyError(id)
            row = _row(change(self._decode(found[0][1])))
            if row[0] != id:
                raise ValueError(f"the id {id!r} cannot be changed to {row[0]!r}")
            db.execute(REPLACE, (*row, found[0][0]))
        return self._decode(row[-1])

    def delete(self, id: str) -> None:
        """Remove the record altogether. Raises KeyError."""
        with self._writes as db:
            db.begin()
            if not db.execute(DELETE, (id,)).rowcount:
                raise KeyError(id)

    def page(
        self, account: str | None, start: int, limit: int, *, public: bool = True, deleted: bool | None = False
    ) -> tuple[int, list[Record]]:
        """Return how many records are in the scope, and those from offset start, newest first, at most limit."""
        if start < 0 or limit < 0:
            raise ValueError(f"start {start} and limit {limit} must not be negative")
        keys = _keys(account, public, deleted)
        with self._reads as db:
            db.execute("BEGIN")  # so that the counts and the rows are of one state
            total, serials, skip = _seek(db, keys, start, "DESC")
            rows = db.execute(*_query(keys, "DESC", serials, min(limit, total), skip)).fetchall()
        return total, [self._decode(text) for _, text in rows]

    def walk(
        self, account: str | None = None, *, public: bool = True, deleted: bool | None = None, start: int = 0,
        oldest_first: bool = False, frozen: bool = False,
    ) -> Iterator[Record]:
        """Yield the records of the scope from offset start; those of a frozen walk are all of one revision."""
        if start < 0:
            raise ValueError(f"start {start} must not be negative")
        keys, order = _keys(account, public, deleted), "ASC" if oldest_first else "DESC"
        with self._reads:  # raises if the store is closed: now, and not when the walk begins
            return map(self._decode, (self._copied if frozen else self._chunks)(keys, order, start))

    def _chunks(self, keys: list[Key], order: str, start: int) -> Iterator[str]:
        """Yield the texts of records. They are read in chunks, and no lock is held between two chunks."""
        # 1. Find the first serial. What is registered later has a higher serial than `last`, and is not seen.
        with self._reads as db:
            db.execute("BEGIN")
            _, (first, last), skip = _seek(db, keys, start, order)
            last = min(last, *db.execute("SELECT ifnull(max(serial), 0) FROM image").fetchall()[0])
        # 2. Read a chunk, and go on behind its last serial.
        while first <= last:
            with self._reads as db:
                rows = _fetch(db.execute(*_query(keys, order, (first, last), CHUNK, skip)))
            yield from (text for _, text in rows)
            if not rows:
                return
            end, skip = rows[-1][0], 0
            if not first <= end <= last:  # the table is out of order: this might never end
                raise OSError(f"{self._path}: the images are damaged, check says where")
            first, last = (end + 1, last) if order == "ASC" else (first, end - 1)

    def _copied(self, keys: list[Key], order: str, start: int) -> Iterator[str]:
        """Yield the texts of records from a temporary table, so that writers wait only while it is filled."""
        with self._private() as db:
            select, values = _query(keys, order, (0, LAST), -1, min(start, LAST))
            db.execute("CREATE TEMP TABLE frozen (serial, record)")
            db.allow()
            db.execute("INSERT INTO frozen " + select, values)
            yield from (text for (text,) in db.execute("SELECT record FROM frozen ORDER BY rowid"))

    def revision(self) -> str:
        """Return a text that changes with every change. Usually it costs one `stat`."""
        # The revision is remembered for a file that has settled. Before that, a write might leave its times as they
        # are. In WAL mode a change goes into another file, so nothing is remembered.
        found = _identify(self._path)
        known, revision = self._revision
        if found != known:
            now = time.time_ns()
            with self._reads as db:
                self._close_lock_free(self._lock_free)
                ((revision,),) = db.execute("SELECT revision FROM state").fetchall()
                ((mode,),) = db.execute("PRAGMA journal_mode").fetchall()
                if found[-2] + SETTLED_NS < now and mode == "delete":
                    self._revision = found, revision
                    with suppress(sqlite3.Error):  # no descriptor is free: then get() takes locks
                        self._lock_free = _LockFreeReader(self._path, found) if os.name == "posix" else None
        return str(revision)

    def at_least(self, revision: str) -> SqliteStorage:
        """Return this store, which always reads the newest."""
        return self

    def check(self, repair: bool = False) -> Iterator[str]:
        """Read everything and yield a line for each fault; repair indexes, counts and columns from the records."""
        try:
            with self._private() as db:
                yield from (f"{self._path}: {fault}" for fault in _faults(db, repair))
        except OSError as error:
            yield str(error)

    def close(self) -> None:
        """Close every connection; a second call is harmless. Every other call raises ValueError from now on."""
        self._reads.close()
        self._writes.close()
        self._close_lock_free(self._lock_free)
        self._revision = None, ""

    def _close_lock_free(self, reader: _LockFreeReader | None) -> None:
        if reader and reader is self._lock_free:
            self._lock_free = None
            reader.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _private(self) -> Iterator[_Database]:
        """Open a connection for one long task; its cache and its temporary tables are gone when it is closed."""
        with self._reads as reads:  # raises if the store is closed, or its file is gone, which is not made again
            db = _connect(self._path, reads.deadline)
        try:
            yield db
        except sqlite3.Error as error:
            raise _failure(self._path, error) from error
        finally:
            db.close()

    def _decode(self, text: str) -> Record:
        try:
            return _parse_json(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise OSError(f"{self._path}: a record does not parse, `check` says which: {error}") from error


class _Database(sqlite3.Connection):
    """A connection whose statements wait for locks, each for as long as was left at the last allow()."""

    path, deadline, allowed = "", 0.0, -1

    def allow(self) -> None:
        """Let each statement from now on wait for locks for as long as is left until the deadline."""
        # fetchall(), here and wherever nobody needs the rows: PyPy resets an unfinished statement later, from another
        # thread, and crashes.
        if (left := max(0, round(1000 * (self.deadline - time.monotonic())))) != self.allowed:
            self.execute(f"PRAGMA busy_timeout = {left}").fetchall()
            self.allowed = left

    def begin(self, deadline: float = 0.0) -> None:
        """Begin a change. Raises OSError if the file is in WAL mode, and writing to it is not safe."""
        self.deadline = deadline or self.deadline
        self.allow()
        self.execute("BEGIN IMMEDIATE")
        if self.is_unsafe():
            raise OSError(f"{self.path}: another program has it open in WAL mode, in which this"
                          f" SQLite, {sqlite3.sqlite_version}, may damage it: close that program")
        self.allow()  # for COMMIT, which waits for readers

    def is_unsafe(self) -> bool:
        """Return whether the file is in WAL mode, in which this SQLite may only read it."""
        return sqlite3.sqlite_version_info < WAL_SAFE and (self.execute("PRAGMA journal_mode").fetchall() == [("wal",)])

    def change(self, *statements: str) -> None:
        """Execute statements as one change."""
        self.begin(_deadline())
        for statement in (*statements, "COMMIT"):
            self.execute(statement)


class _Connection:
    """A connection under a lock, opened when first needed, and again after a fork or when another file is at the path.

    `with` yields the connection, ends the transaction that the body began, and turns the errors of SQLite into OSError.
    """

    def __init__(self, path: str) -> None:
        self._path, self._lock, self._closed, self._changed = path, threading.RLock(), False, False
        self._db: _Database | None = None
        self._seen: tuple[int, ...] = ()  # what _identify() returned last; `_changed`: differs from the time before

    def __enter__(self) -> _Database:
        deadline = _deadline()
        if not self._lock.acquire(timeout=BUSY_S):
            raise _failure(self._path, LOCKED)
        try:
            if self._closed:
                raise ValueError(f"closed: {self._path}")
            found = _identify(self._path)
            if found[:3] != self._seen[:3]:  # another process, device or inode
                self._drop()
            db = self._db = self._db or _connect(self._path, deadline)
            if db.in_transaction:
                raise ValueError("a change cannot be made inside another one")
            self._changed, self._seen = found != self._seen, found
            if self._changed:  # SQLite may not notice that a backup was copied over the file: empty its cache
                db.execute("PRAGMA shrink_memory").fetchall()
            db.deadline = deadline
            db.allow()
            return db
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self._db and self._changed and self._db.is_unsafe():
                self._drop()  # the file can leave WAL mode only if nobody has it open
            elif self._db and self._db.in_transaction:
                self._db.execute("ROLLBACK" if kind else "COMMIT")
        except sqlite3.Error as failed:
            error = error or failed
            self._drop()  # closing the connection rolls back, whatever state it is in
        finally:
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise _failure(self._path, error) from error

    def _drop(self) -> None:
        if self._db:
            _close(self._db, self._seen[0])
        self._db, self._seen = None, ()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop()


class _LockFreeReader:
    """A connection that reads one state of the file without taking its locks.

    SQLite neither locks an "immutable" file nor looks for changes in it, which is right as long as nobody writes. Once
    a file has settled (see SETTLED_NS), a write changes its times before others can read what was written. So what was
    read is right if the times are the same afterwards.
    """

    def __init__(self, path: str, state: tuple[int, ...]) -> None:
        self._path, self._state, self._lock = path, state, threading.Lock()
        uri = f"file://{quote(os.fsencode(path))}?mode=ro&immutable=1"
        self._db = sqlite3.connect(uri, uri=True, check_same_thread=False)
        self._cursor = self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")

    def get(self, id: str) -> list[tuple[int, str]] | None:
        """Return the rows that GET finds, or None if the file is no longer in this state."""
        if self._state[0] != os.getpid():  # opened by the parent, and of no use after a fork
            return None
        with self._lock:
            try:
                found = self._cursor.execute(GET, (id,)).fetchall()
            except sqlite3.Error:  # it read half of a change, or was just closed
                return None
        return found if _identify(self._path) == self._state else None

    def close(self) -> None:
        with self._lock:
            _close(self._db, self._state[0])


def _close(db: sqlite3.Connection, pid: int) -> None:
    """Close a connection, unless another process opened it: closing it here could harm its files."""
    if pid == os.getpid():
        db.close()
    else:
        _inherited.append(db)


# ---- scopes and places ----


def _keys(account: str | None, public: bool, deleted: bool | None) -> list[Key]:
    """Return the keys that make up a scope. They exclude each other, so no image is found twice."""
    owner = EVERYBODY if account is None else account
    others = EVERYBODY if public else owner
    gone = (False, True) if deleted is None else (deleted,)
    return [key for dead in gone for key in ((owner, False, dead), (others, True, dead))]


def _query(keys: list[Key], order: str, serials: Span, limit: int, skip: int) -> tuple[str, Any]:
    """Return the statement that merges the rows of the keys in order of their serials, and its values."""
    selects = [ANYBODY if key[0] == EVERYBODY else OWN for key in keys]
    values = [(*(key[1:] if key[0] == EVERYBODY else key), *serials) for key in keys]
    return " UNION ALL ".join(selects) + ORDER.format(order), (*chain(*values), limit, skip)


def _seek(db: _Database, keys: list[Key], start: int, order: str) -> tuple[int, Span, int]:
    """Return the total, a span of serials, and how many images to skip in it to be at offset `start`."""
    # 1. The total, from the large blocks. An offset of 0 needs no search. The span of an offset past the end is empty.
    counts = _count(db, keys, LARGE, 0, LAST)
    total = sum(counts.values())
    if not 0 < start < total:  # from the first one on, or nothing
        return total, (1, 0) if start else (0, LAST), 0
    # 2. The large block that holds the image, then the small one within it. Its first or last serial begins the span.
    large, skip = _find(counts, start, order)
    first = large << LARGE - SMALL
    last = first + (1 << LARGE - SMALL) - 1
    small, skip = _find(_count(db, keys, SMALL, first, last), skip, order)
    serial = small << SMALL
    return total, (serial, LAST) if order == "ASC" else (0, serial + (1 << SMALL) - 1), skip


def _count(db: _Database, keys: list[Key], shift: int, first: int, last: int) -> dict[int, int]:
    """Return the sum of the counts of the keys, for each of the blocks from `first` to `last`."""
    counts: dict[int, int] = {}
    for key in keys:
        for block, n in db.execute(BLOCKS, (*key, shift, first, last)):
            counts[block] = counts.get(block, 0) + n
    return counts


def _find(counts: dict[int, int], start: int, order: str) -> tuple[int, int]:
    """Return the block that holds the image at offset `start`, and its offset within the block."""
    for block in sorted(counts, reverse=order == "DESC"):
        if start < counts[block]:
            return block, start
        start -= counts[block]
    return 0, 0  # only if the counts are damaged, which `check` finds


# ---- rows ----


def _row(record: Record) -> Row:
    """Return the columns of a record. Raises ValueError for what JSON or UTF-8 cannot hold."""
    try:
        id, account, public = record["id"], record["account_id"], record["is_public"]
        gone = record["deleted_at"]
        text = _encode(record).encode().decode()  # raises for a lone surrogate
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a record: {error!r}") from error
    if not (type(id) is type(account) is str and type(public) is bool and (gone is None or type(gone) is str)):
        raise ValueError(f"not a record: id, account_id, is_public or deleted_at of {id!r}")
    return id, account, public, gone is not None, text


def _insert(db: _Database, table: str, row: Row) -> None:
    """Insert a row; a trigger removes a tombstone with this id. Raises FileExistsError."""
    try:
        db.execute(ADD.format(table), row)
    except sqlite3.IntegrityError:
        raise FileExistsError(row[0]) from None


def _fetch(cursor: sqlite3.Cursor) -> list[Any]:
    """Return the next rows, until the texts in their last column have CHUNK_TEXT characters."""
    rows, size = [], 0
    while size < CHUNK_TEXT and (row := cursor.fetchone()):
        rows.append(row)
        size += len(str(row[-1]))  # in a damaged file it may be of any type
    cursor.close()  # rows that are left unread would keep writers waiting
    return rows


# ---- the file ----


def _deadline() -> float:
    return time.monotonic() + BUSY_S


def _failure(path: str, why: object) -> OSError:
    return OSError(f"{path}: {BUSY.format(BUSY_S) if str(why) == LOCKED else why}")


def _identify(path: str) -> tuple[int, ...]:
    """Return what tells one state of the file from another, and this process from its parent."""
    try:
        s = os.stat(path)
    except OSError as error:
        raise _failure(path, error.strerror) from error
    return os.getpid(), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def _connect(path: str, deadline: float) -> _Database:
    """Return a connection to the file, its schema up to date. Raises OSError unless it is a store of images."""
    db = None
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=_Database)
        db.path, db.deadline = path, deadline
        db.allow()
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        db.execute("PRAGMA synchronous = EXTRA")  # FULL, and the removal of the journal is synced as well
        db.execute("BEGIN")  # so that no other process makes the store in the midst of _version()
        version = _version(db)
        db.execute("COMMIT")
        if db.is_unsafe():
            with suppress(sqlite3.OperationalError):  # another program has the file open: then it is only read
                db.execute("PRAGMA journal_mode = DELETE").fetchall()
        if version < len(MIGRATIONS):
            db.begin()
            for statement in chain(*MIGRATIONS[_version(db) :]):  # asked again: another process may have been first
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            db.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        if db:
            db.close()
        raise error if isinstance(error, OSError) else _failure(path, error) from error
    return db


def _version(db: _Database) -> int:
    """Return the version of the schema, 0 for an empty file. Raises OSError unless it is a store of images.

    The caller has begun a transaction: what SQLite reads and the size of the file must be of one moment.
    """
    ((owner, version, _),) = db.execute(VERSION).fetchall()
    if os.stat(db.path).st_size == 0:  # not by what SQLite says: it takes a file of a few bytes for empty, too
        return 0
    if owner != APPLICATION_ID:
        raise OSError(f"{db.path}: not a store of images but another program's database")
    if version > len(MIGRATIONS):
        raise OSError(f"{db.path}: schema {version} is newer than this program's {len(MIGRATIONS)}")
    return int(version)


# ---- faults ----


def _faults(db: _Database, repair: bool) -> Iterator[str]:
    """Yield a line for each fault, and mend it if `repair` is true; each step relies on the one before."""
    # 1. Indexes, from the tables.
    indexes = [fault for (fault,) in db.execute("PRAGMA integrity_check") if fault != "ok"]
    yield from indexes
    if repair and indexes:
        db.change("REINDEX")
    # 2. Counts, from the columns.
    counts = [f"the count of {key} is wrong" for key in db.execute(MISCOUNTED)]
    yield from counts
    if repair and counts:
        db.change("DELETE FROM tally", "INSERT INTO tally " + RECOUNT, RENEW)
    # 3. Columns, from the records, chunk by chunk. What is written depends on what was read, so both are in one
    #    transaction.
    last, rows = -1, [(0,)]
    while rows and rows[-1][0] > last:  # in a damaged table the images may be out of order
        last = rows[-1][0]
        db.begin(_deadline()) if repair else db.execute("BEGIN")
        rows = _fetch(db.execute(IMAGES_AFTER, (last, CHUNK)))
        wrong = [fault for row in rows for fault in _check_row(db, repair, *row)]
        db.execute("COMMIT")
        yield from wrong


def _check_row(db: _Database, repair: bool, serial: int, *columns: Any) -> Iterator[str]:
    """Yield a fault if a record does not parse, does not agree with its columns, or is a BLOB, which reads refuse."""
    try:
        row = _row(json.loads(columns[-1]))  # which takes bytes, too
        if row[:-1] != columns[:-1] or type(columns[-1]) is not str:
            yield f"image {serial} ({columns[0]}): columns differ from the record, or it is not TEXT"
            if repair:
                db.execute(REPLACE, (*row, serial))
    except (TypeError, ValueError, RecursionError, sqlite3.IntegrityError) as error:
        yield f"image {serial} ({columns[0]}): {error}"
