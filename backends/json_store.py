"""A store of images in one JSON file that people and diff can read: `json:FILE`.

How it works:

1. The file is one JSON object: a head line, then a line for each image, the oldest first.
2. In memory an image is its encoded line, and the few values that decide who sees it. A record is made by decoding its
   line, so every caller gets a copy.
3. A state, which is one content of the file, never changes once it is made. Readers take the newest state and need
   no lock; a walk stays with the state that it began with.
4. A change copies the table of lines, alters the copy, and writes all of it to a new file. That file is synced to the
   disk, renamed over the old one, and the directory is synced. Only then is the change done.
5. Writers in all processes take a lock (flock) of the file itself. They try again and again, instead of waiting inside
   flock(), which has no time limit: whoever may read the file may hold this lock forever.
6. Each call looks at the times of the file (`stat`), and so notices what another process or an editor has written.
   The file of the state in memory stays open, so that no other file can get its inode number. Two edits
   within one tick of the file system's clock look the same to `stat`; so until the file is older than a tick, its
   content is compared as well.
7. A file that cannot be parsed is refused, with line and column, and never overwritten. So is a file in which an object
   has a key twice, such as two lists of images after a merge: one of the two would be lost.
8. An editor takes no lock. So a change looks at the times and the size of the file once more just before the rename,
   and is refused if they are not those of the state that it began with. What is not noticed: an edit in the
   microseconds between this look and the rename, and one of the same size in the same tick as the change before.
9. A missing or empty file is an empty store. But many programs empty a file before they write it, so to a process that
   has seen something in the file, an empty one is an error. It neither reads nor changes the store until the file has
   content again, or is removed.

Left out: anything that would make a change cheaper than writing the whole file. Ten thousand images are fine; for more
there is sqlite.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, NamedTuple, TypeVar

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FORMAT, VERSION = "wmi-images", 1
HEAD = f'{{{{"format": "{FORMAT}", "version": {VERSION}, "change": {{}},\n"images": [\n'
TAIL = b"\n]}\n"
BUSY_S = 8.0  # for which a call waits for locks, in all; a server gives up after 10 s
MODE = 0o640  # of a new file, less the umask: not readable for all, because who may read the file may lock it
PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.05  # between two attempts to get the lock, the first and the longest
SETTLED_NS = 3 * 10**9  # longer than a tick of the clock of any file system: that of FAT takes 2 s
TICK_NS = 500 * 10**6  # longer than a tick of the system's clock, even on a busy virtual machine
VIEWS = 32  # lists cached per state: enough for the accounts that are busy between two changes
POSIX = sys.platform != "win32"  # Windows cannot rename over a file that is open
BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows would translate the ends of lines

Record = dict[str, Any]
Scope = tuple["str | None", bool, "bool | None"]
T = TypeVar("T")
_encode_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class _Row(NamedTuple):
    """One image: its line in the file, and what decides who sees it."""

    line: bytes
    account: str
    public: bool
    deleted: bool


class _State(NamedTuple):
    """One content of the file. Its rows never change: a change makes another state."""

    rows: dict[str, _Row]  # by id, in order of registration
    change: int  # number of the change, written into the file: so no content ever comes back
    revision: str  # digest of the content
    identity: tuple[int, ...]  # of the file: device, inode, size and times
    settled: bool  # a later change of the file is certain to show in its times
    views: dict[Scope, list[bytes]]  # the lines of some scopes, newest first: the only thing that is added later


def open_storage(location: str) -> JsonStorage:
    """Return the store in the file `location`, opened. If the file does not exist, the first change makes it."""
    return JsonStorage(location)


class JsonStorage:
    """A store in one JSON file. Threads may share it; processes each open their own."""

    def __init__(self, path: str) -> None:
        """Open and read the file. Raises OSError if it is there, but not a store of images."""
        self._path = os.path.realpath(path)  # the target of a symbolic link is replaced, not the link
        self._closed = self._drafting = False  # drafting: inside a change, where another one is refused
        self._loading, self._writing = threading.Lock(), threading.RLock()  # one thread reads the file, one changes it
        self._pin: int | None = None  # the file of the current state, kept open: see 6
        self._state: _State | None = None
        self._current()
        self._remove_leftover()

    def get(self, id: str) -> Record:
        """Return the record, a tombstone too. Raises KeyError."""
        return _decode(self._current().rows[id].line)

    def add(self, record: Record) -> None:
        """Register a record as the newest, also over a tombstone. Raises FileExistsError."""
        id, row = _encode(record)
        with self._change() as rows:
            _register(rows, id, row)

    def add_all(self, records: Iterable[Record]) -> int:
        """Register all in this order, or none if one fails or the iterable raises; return how many."""
        # 1. Take all records without a lock, since their source may be slow. An id that exists is noticed at once: the
        #    caller reports the line of its input that was read last.
        staged: dict[str, _Row] = {}
        count = 0
        for record in records:
            id, row = _encode(record)
            known = self._current().rows.get(id)
            if known and not known.deleted:
                raise FileExistsError(id)
            _register(staged, id, row)
            count += 1
        # 2. Register them. Each id is checked again, because others may have made changes since.
        with self._change() as rows:
            for id, row in staged.items():
                _register(rows, id, row)
        return count

    def replace(self, id: str, change: Callable[[Record], Record]) -> Record:
        """Put change(record) in the place of the record, atomically, and return it. Raises KeyError."""
        with self._change() as rows:
            new, row = _encode(change(_decode(rows[id].line)))
            if new != id:
                raise ValueError(f"the id {id!r} cannot be changed to {new!r}")
            rows[id] = row
        return _decode(row.line)

    def delete(self, id: str) -> None:
        """Remove the record altogether. Raises KeyError."""
        with self._change() as rows:
            del rows[id]

    def page(
        self, account: str | None, start: int, limit: int, *, public: bool = True, deleted: bool | None = False
    ) -> tuple[int, list[Record]]:
        """Return how many records are in the scope, and those from offset start, newest first, at most limit."""
        if start < 0 or limit < 0:
            raise ValueError(f"start {start} and limit {limit} must not be negative")
        lines = _view(self._current(), (account, public, deleted))
        return len(lines), [_decode(line) for line in lines[start : start + limit]]

    def walk(
        self, account: str | None = None, *, public: bool = True, deleted: bool | None = None, start: int = 0,
        oldest_first: bool = False, frozen: bool = False,
    ) -> Iterator[Record]:
        """Yield the records of the scope from offset start, always as they were at the moment of the call."""
        if start < 0:
            raise ValueError(f"start {start} must not be negative")
        lines = _view(self._current(), (account, public, deleted))
        first = min(start, len(lines))  # islice() takes no number that is larger than an index can be
        return map(_decode, islice(reversed(lines) if oldest_first else lines, first, None))

    def revision(self) -> str:
        """Return a text that changes whenever the file does."""
        return self._current().revision

    def at_least(self, revision: str) -> JsonStorage:
        """Return this store, which always reads the newest."""
        return self

    def check(self, repair: bool = False) -> Iterator[str]:
        """Read the file again and yield what is wrong. There is nothing to repair: all that is kept is the records."""
        try:
            self._current()  # raises if the store is closed, or its file was emptied
            _release(_load(self._path)[0])  # parsed anew
        except OSError as error:
            return iter([str(error)])
        return iter([])

    def close(self) -> None:
        """Close the file; a second call is harmless. Every other call raises ValueError from now on."""
        with self._writing, self._loading:
            self._closed, self._state = True, None
            _release(self._pin)
            self._pin = None

    def __enter__(self) -> JsonStorage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _current(self) -> _State:
        """Return the newest state. The file is read again only if it has changed, or may have."""
        # The state is looked at again under the lock: once the file has settled, only one of many threads reads it.
        state = self._state
        if not self._is_newest(state):
            with self._loading:
                if self._closed:
                    raise ValueError(f"closed: {self._path}")
                state = self._state
                if not self._is_newest(state):
                    state = self._install(*_load(self._path, state))
        assert state
        return state

    def _is_newest(self, state: _State | None) -> bool:
        return bool(state and state.settled and state.identity == _identify(self._path))

    def _remove_leftover(self) -> None:
        """Remove the new file of a change that a crash interrupted; one that is being written is under the lock."""
        if os.path.lexists(self._path + ".new"):
            with suppress(OSError):  # somebody is writing, or the file may only be read
                lock = _lock(self._path, time.monotonic())
                try:
                    os.unlink(self._path + ".new")
                finally:
                    os.close(lock)

    def _install(self, pin: int | None, state: _State) -> _State:
        """Make a state the current one, and keep its file open. The caller holds `_loading`."""
        _release(self._pin)
        self._pin, self._state = pin, state
        return state

    @contextmanager
    def _change(self) -> Iterator[dict[str, _Row]]:
        """Yield a copy of the rows to alter, and write it unless the body raises."""
        # 1. Wait for the other threads, then for the other processes, until one deadline.
        deadline = time.monotonic() + BUSY_S
        if not self._writing.acquire(timeout=BUSY_S):
            raise _busy(self._path)
        try:
            if self._drafting:
                raise ValueError("a change cannot be made inside another one")
            self._current()  # raises if the store is closed, or the file is not a store: then it is not even locked
            lock = _lock(self._path, deadline)
            self._drafting = True
            try:
                # 2. Alter the newest state, which others may have written while this call waited.
                state = self._current()
                rows = state.rows.copy()
                yield rows
                # 3. Write it. Readers see the old state until the new file, which is synced, is renamed.
                written = _save(self._path, lock, state, rows)
                with self._loading:
                    self._install(*written)
            finally:
                self._drafting = False
                os.close(lock)
        finally:
            self._writing.release()


def _register(rows: dict[str, _Row], id: str, row: _Row) -> None:
    """Put a row at the end. Raises FileExistsError if its id is taken, but not by a tombstone."""
    known = rows.pop(id, None)
    if known and not known.deleted:
        raise FileExistsError(id)
    rows[id] = row


def _view(state: _State, scope: Scope) -> list[bytes]:
    """Return the lines of a scope, newest first; they are cached in the state."""
    lines = state.views.get(scope)
    if lines is None:
        account, public, deleted = scope
        lines = [
            row.line for row in reversed(state.rows.values())
            if (account is None or row.account == account or (public and row.public))
            and (deleted is None or row.deleted == deleted)
        ]
        if len(state.views) >= VIEWS:
            state.views.clear()
        state.views[scope] = lines
    return lines


def _encode(record: Record) -> tuple[str, _Row]:
    """Return the id and row of a record. Raises ValueError for what JSON or UTF-8 cannot hold."""
    try:
        id, account, public = record["id"], record["account_id"], record["is_public"]
        gone = record["deleted_at"]
        line = _encode_text(record).encode()
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a record: {error!r}") from error
    if not (type(id) is type(account) is str and type(public) is bool and (gone is None or type(gone) is str)):
        raise ValueError(f"not a record: id, account_id, is_public or deleted_at of {id!r}")
    return id, _Row(line, account, public, gone is not None)


def _decode(line: bytes) -> Record:
    record: Record = json.loads(line.decode())
    return record


# ---- the file ----


def _naming_file(step: Callable[..., T]) -> Callable[..., T]:
    """Return the step, a function whose first argument is a path, so that errors of the system name this path."""

    @functools.wraps(step)
    def wrapped(path: str, *rest: Any) -> T:
        try:
            return step(path, *rest)
        except OSError as error:
            if error.errno is None:  # raised by this module, and names the path already
                raise
            raise OSError(f"{path}: {error.strerror}") from error

    return wrapped


@_naming_file
def _identify(path: str) -> tuple[int, ...]:
    """Return what tells one state of the file from another; an empty tuple for a missing file."""
    try:
        return _identity(os.stat(path))
    except FileNotFoundError:
        return ()


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@_naming_file
def _load(path: str, known: _State | None = None) -> tuple[int | None, _State]:
    """Return the file, if it has to stay open, and its state. A missing or empty file is an empty store.

    If the content is still that of the known state, it is not parsed again. Raises OSError if it is empty, and was not.
    """
    now = time.time_ns()
    try:
        file = os.open(path, os.O_RDONLY | BINARY)
    except FileNotFoundError:
        return None, _State({}, 0, _digest(b""), (), True, {})
    try:
        identity = _identity(os.fstat(file))  # before the file is read, so that a later change shows
        with open(file, "rb", closefd=False) as stream:
            text = stream.read()
        revision = _digest(text)
        if known is None or known.revision != revision:
            if known and not text:
                raise OSError(f"{path}: emptied by another program; nothing was changed: try again, restore the file,"
                              " or remove it to begin without images")
            rows, change = _parse(path, text) if text else ({}, 0)
            known = _State(rows, change, revision, identity, False, {})
    except BaseException:
        os.close(file)
        raise
    return _keep(file), known._replace(identity=identity, settled=_is_settled(identity, now))


def _is_settled(identity: tuple[int, ...], now: int) -> bool:
    """Return whether any change of the file after the moment `now` will show in its times.

    A change does not show if the clock that stamps files has not ticked since the change before. If a time of the file
    is not a whole number of milliseconds, that clock ticks often, and a shorter wait is enough.
    """
    last = max(identity[-2:])  # anybody can set mtime back, but not ctime
    quick = POSIX and identity[-1] % 10**6  # on Windows ctime is the time of creation
    return now > last + (TICK_NS if quick else SETTLED_NS)


def _keep(file: int) -> int | None:
    """Return the file, still open, so that its inode number is not given to another one; on Windows close it."""
    if POSIX:
        return file
    os.close(file)
    return None


def _release(file: int | None) -> None:
    if file is not None:
        os.close(file)


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _busy(path: str) -> OSError:
    return OSError(
        f"{path}: locked by another thread or program for {BUSY_S:g} s; nothing was changed: try again, or end it"
    )


@_naming_file
def _lock(path: str, deadline: float) -> int:
    """Wait until only this process may change the file, and return the open file that holds the lock."""
    pause = PAUSE_S
    while True:
        file = os.open(path if POSIX else path + ".lock", os.O_RDWR | os.O_CREAT, MODE)
        try:
            # If the file was replaced while this call waited, the lock is that of the old one, and protects nothing.
            if _try_lock(file) and (not POSIX or _is_at(path, file)):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if time.monotonic() >= deadline:
            raise _busy(path)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _try_lock(file: int) -> bool:
    """Lock a file, and return true, unless somebody else has locked it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        return False
    return True


def _is_at(path: str, file: int) -> bool:
    return _identify(path)[:2] == _identity(os.fstat(file))[:2]


@_naming_file
def _save(path: str, lock: int, old: _State, rows: dict[str, _Row]) -> tuple[int | None, _State]:
    """Write all rows, so that after a crash the file has either the content of the old state or the new one."""
    change = old.change + 1
    text = HEAD.format(change).encode() + b",\n".join([r.line for r in rows.values()]) + TAIL
    new = path + ".new"  # always the same name, so that the next change finds what a crash left behind
    pin: int | None = None
    try:
        # 1. Write the new file. O_EXCL follows no link that somebody may have put there.
        with suppress(FileNotFoundError):
            os.unlink(new)
        pin = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o600)
        _write(pin, text)
        _inherit(pin if POSIX else new, os.fstat(lock))
        # 2. Sync it before it is renamed: otherwise a power failure could leave an empty file under the old name.
        os.fsync(pin)
        pin = _keep(pin)
        # 3. Rename it, but not over what an editor has put there or written since the old state was read: see 8.
        if POSIX and not (_identify(path) == _identity(os.fstat(lock)) == old.identity):
            raise OSError(f"{path}: replaced or edited by others, or removed; nothing was changed: try again")
        os.replace(new, path)
        new = ""  # from now on a file of that name belongs to the next writer
        _sync_directory(os.path.dirname(path))
        identity = _identity(os.stat(path) if pin is None else os.fstat(pin))
    except BaseException:
        _release(pin)
        with suppress(OSError):
            os.unlink(new)
        raise
    return pin, _State(rows, change, _digest(text), identity, False, {})


def _write(file: int, text: bytes) -> None:
    unwritten = memoryview(text)
    while unwritten:
        unwritten = unwritten[os.write(file, unwritten) :]


def _inherit(new: int | str, old: os.stat_result) -> None:
    """Give the new file the owner, group and mode of the old one: a change must not lock out those who had access."""
    if hasattr(os, "chown"):
        for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):  # members may set the group, only root any owner
            with suppress(PermissionError):
                os.chown(new, owner, group)
    os.chmod(new, stat.S_IMODE(old.st_mode))


def _sync_directory(path: str) -> None:
    """Make a rename in the directory survive a power failure. Windows has no such call."""
    if POSIX:
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


# ---- the text ----


def _parse(path: str, text: bytes) -> tuple[dict[str, _Row], int]:
    """Return the rows and the counter of changes. Raises OSError with line and column."""
    try:
        decoded = text.decode()
        whole = json.loads(decoded, object_pairs_hook=functools.partial(_object, decoded))
    except UnicodeDecodeError as error:
        raise _fault(path, text[: error.start].decode(), "this is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _fault(path, error.doc[: error.pos], error.msg) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nested too deeply
        raise _fault(path, "", str(error)) from error
    if fault := _head_fault(whole):
        raise _fault(path, "", fault)
    rows: dict[str, _Row] = {}
    for n, record in enumerate(whole["images"]):
        try:
            id, row = _encode(record)
            if id in rows:
                raise ValueError(f"the id {id!r} appears here a second time")
        except ValueError as error:
            raise _fault(path, _before(decoded, n), str(error)) from error
        rows[id] = row
    return rows, whole["change"]


def _object(text: str, pairs: list[tuple[str, Any]]) -> Record:
    """Return an object of the text. Raises JSONDecodeError if it has a key twice: json.loads() would drop a value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        key, place = _repeated_key(text)
        raise json.JSONDecodeError(f"the key {key!r} appears here a second time", text, place)
    return made


def _repeated_key(text: str) -> tuple[str, int]:
    """Return the first key that its object has twice, and the place of the second one. There must be one."""
    keys: list[set[str]] = []  # of each object that is open
    for token in re.finditer(r'[{}]|("(?:[^"\\]|\\.)*")(\s*:)?', text):  # a brace or a string, perhaps a key
        if token[0] == "{":
            keys.append(set())
        elif token[0] == "}":
            keys.pop()
        elif token[2]:
            key = json.loads(token[1])
            if key in keys[-1]:
                return key, token.start()
            keys[-1].add(key)
    raise AssertionError("no key is repeated")


def _head_fault(whole: Any) -> str:
    """Return why a parsed file is not a store of images, or an empty text if it is one."""
    if type(whole) is not dict or whole.get("format") != FORMAT:
        return f'not a file of images: "format" is not "{FORMAT}"'
    version, change = whole.get("version"), whole.get("change")
    if type(version) is not int or version != VERSION:
        return f"this program reads version {VERSION} of the format, the file has {version!r}"
    if type(change) is not int or change < 0 or type(whole.get("images")) is not list:
        return '"change" must be a whole number and "images" a list'
    if len(whole) > 4:
        return "only format, version, change and images may stand here: the next change would lose anything else"
    return ""


def _before(text: str, n: int) -> str:
    """Return the text before the n-th image. It is searched for only when there is an error to report."""
    found = re.compile(r'"images"\s*:\s*\[\s*').search(text)
    at = found.end() if found else 0
    for _ in range(n):
        at = json.JSONDecoder().raw_decode(text, at)[1]
        at = re.compile(r"[ \t\r\n,]*").match(text, at).end()  # type: ignore[union-attr]
    return text[:at]


def _fault(path: str, before: str, why: str) -> OSError:
    """Return an error that tells where in the file parsing stopped."""
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return OSError(f"{path}:{line}:{column}: {why}")
