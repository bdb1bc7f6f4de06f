"""A store of images in an etcd cluster, for servers on several machines: `etcd:http://HOST:PORT[,…]/PREFIX`.

What etcd offers: a cluster has one counter, the revision, and each change raises it. A key has a value and a
mod_revision, the revision at which it was last put. A transaction compares some keys and, if all comparisons hold, puts
and deletes others, all at one revision. A key with a lease is deleted when the lease runs out. A watch reports each put
and delete from a given revision on.

Theory of operation:

1. Keys. All keys begin with PREFIX. A `?` marks what may be absent.

       change      a random text, put again by every change; its mod_revision is the revision of the store
       image/ID    {"order": [revision, n]?, "n": k?, "load": L?, "before": {…}?, "record": {…}}
       load/L      exists when the load L is done; never changed, never deleted
       session/S   exists as long as a client, or a load, may change something; it has a lease

2. Order. Images are sorted by the revision at which they became visible. Images that were added together have the same
   revision, and are sorted by `n`, their place among them. A new image need not store the revision: it is the
   mod_revision of its key or, for an image that was loaded, of its load/L. A later change gives the key another
   mod_revision, so `replace` writes the pair of revision and `n` into `order`. Thus no client needs a serial number,
   and clients that add images do not contend for a counter.
3. Changes. A change is one transaction that compares what was read, so it is made once or not at all. The hard case is
   an answer that is lost: the change may have been made, or it may still be under way in a slow member. So each change
   also compares a session, a key that only this change uses at the moment, and puts a random name there. If the answer
   is lost, the session is read. If it has the name, the change was made. Otherwise the session is deleted, and if the
   change arrives after that, its comparison fails. If the session can be neither read nor deleted, nobody can tell what
   happened, and the error is EINPROGRESS. (A refusal because the quota of space is exceeded counts as a lost answer:
   etcd has made the change that exceeds the quota, and still refuses it.)
4. Loads. Many records do not fit into one transaction. They are put as intents, values with the name of their load.
   Putting load/L makes all of them visible at once. Until then each key means what it meant `before`, or nothing. If
   somebody else changes an image on which a load has put an intent, the same transaction deletes the session of the
   load, and the load fails. The intents of a load that died mean nothing, and `check` can remove them.
5. Reads. etcd has no offsets, and finds keys only by their names. So a process that needs pages keeps a replica: a
   private SQLite file that follows the cluster by a watch. A read asks the cluster for the revision, waits until the
   replica has reached it, and is answered from the replica. Every change that was reported as done before the read
   began is in the answer. A process that only gets and changes single images, without at_least(), asks etcd, and has
   no replica. `check` compares the replica with etcd, both at the same revision, whatever others change.
6. Other histories. If the cluster was wiped, or restored from a snapshot, the replica shows what never happened. This
   is noticed by the key `change`: at a revision that the replica has reached, it has another value or another
   mod_revision than it had. Then a new replica is made from all keys.
7. Time limits. A try at one member takes at most TRY_S (a request for many images PAGE_S), and a call with all of its
   tries CALL_S, or FENCE_S longer if the answer to a change is lost. After a call that no member has answered, other
   calls fail at once for DOWN_S; then one of them tries again.

Left out: search in fields, client certificates, and leases that are kept alive for clients (an old session is replaced
by a new one).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import ssl
import tempfile
import threading
import time
import weakref
from base64 import b64decode, b64encode
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from glob import escape, glob
from itertools import chain, islice
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .sqlite_store import ADD, CACHE_KIB, LOAD_CACHE_KIB, Record, SqliteStorage, _Connection, _encode, _inherited, _row

# Seconds: for one member to answer; for a whole call (a server gives up after 10 s); and then, if its answer was lost,
# to find out whether the change was made.
TRY_S, CALL_S, FENCE_S = 1.5, 5.0, 2.5
# Seconds: between two rounds through all members; how long calls fail at once after one that no member answered; how
# long a read waits for the watch before the watch is started again.
PAUSE_S, DOWN_S, SILENT_S = 0.1, 1.0, 1.0
SESSION_S = 3600  # seconds of a session's lease; that of a load is renewed before each batch
# Images and bytes in one transaction, for which etcd allows 128 operations and 1.5 MiB; images in one transaction that
# holds a nested transaction for each.
AT_ONCE, BYTES_AT_ONCE, NESTED_AT_ONCE = 100, 500_000, 16
PAGE_S, PAGE, PAGE_BYTES = 4.0, 5000, 4_000_000  # seconds, images and bytes of one request that reads many images
FOLDER, LEFT_S = "wmi-etcd-", 60  # a folder of this age in seconds that nobody locks was left by a killed process
EXHAUSTED, UNDECIDED = 8, (1, 2, 4, 13, 14, 15)  # gRPC's codes of errors; after UNDECIDED a change may have been made
CLOSED = "closed: the store in etcd"
OTHERS = "etcd: no time was left, or others are changing the same images; nothing was changed: try again"
FORM_PATTERN = r"(https?://[^/,@?#]+(?:,https?://[^/,@?#]+)*)/+([^?#]*[^?#/])/*(?:\?cafile=(.+))?"

STAGED = "CREATE TEMP TABLE staged (revision, n, id, account_id, is_public, deleted, record)"
PREPARE = f"""PRAGMA synchronous = OFF; PRAGMA journal_mode = TRUNCATE; PRAGMA cache_size = -{LOAD_CACHE_KIB}; {STAGED};
    CREATE TABLE intent (id PRIMARY KEY, load, n, record); CREATE TABLE reached (revision)"""
STAGE = "INSERT INTO staged VALUES (?, ?, ?, ?, ?, ?, ?)"
SETTLE = f"""INSERT INTO image SELECT NULL, id, account_id, is_public, deleted, record FROM staged ORDER BY revision, n;
    DROP TABLE staged; PRAGMA cache_size = -{CACHE_KIB}"""
CHANGE = "UPDATE image SET account_id = ?, is_public = ?, deleted = ?, record = ? WHERE id = ?"
REACHED = "REPLACE INTO reached (rowid, revision) VALUES (1, ?)"
SORT = "CREATE TEMP TABLE sorted AS SELECT id, serial FROM frozen JOIN staged USING (id) ORDER BY revision, n"
DIFFERENCES = """SELECT id, 'is missing, or has another record in etcd' FROM (
    SELECT id, record FROM staged EXCEPT SELECT id, record FROM frozen) UNION ALL
    SELECT id, 'is not in etcd' FROM frozen WHERE id NOT IN (SELECT id FROM staged) UNION ALL
    SELECT later.id, 'is before ' || earlier.id || ', and in etcd after it' FROM sorted AS earlier JOIN sorted AS later
    ON later.rowid = earlier.rowid + 1 WHERE later.serial < earlier.serial"""

Ops = Sequence[Record]  # comparisons or operations, as etcd takes them
Row = tuple[int, str, bool, str]  # place among the images that are added together, id, whether a tombstone, JSON


def open_storage(location: str) -> EtcdStorage:
    """Return the store below a prefix of a cluster. Nothing is sent to the cluster yet."""
    return EtcdStorage(location)


# ---- wire ----


class _Unanswered(OSError):
    """Raised when the answer to a change was lost: the change may have been made, or may still be made."""


class _Refused(OSError):
    """Raised when etcd refuses a request: nothing was done."""


class _Exhausted(_Refused):
    """Raised when the quota is exceeded. Something was done if the request was a change that exceeded it."""


class _Pair(NamedTuple):
    """A key, its value, and the revisions that created it and put it last."""

    key: bytes
    value: bytes
    created: int  # 0: the event of a deletion
    put: int


NOTHING = _Pair(b"", b"", 0, 0)  # stands for the pair of a key that does not exist


class _Channel:
    """A connection to a member. It writes HTTP itself, at a quarter of the cost of http.client."""

    def __init__(self, url: str, context: ssl.SSLContext | None, seconds: float) -> None:
        parts = urlsplit(url)
        self.url, self.kept, self._host = url, False, parts.netloc  # kept: it can be used for another request
        self.socket = socket.create_connection((parts.hostname, parts.port or 2379), seconds)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            self.socket = context.wrap_socket(self.socket, server_hostname=parts.hostname)
        self._file = self.socket.makefile("rb")

    def ask(self, path: str, body: Record, fields: str, seconds: float) -> tuple[int, bytes]:
        """Send a request, and return the status and the body of the answer."""
        self.kept = False
        status, head = self._send(path, body, fields, seconds)
        text = self._file.read(int(head["content-length"]) if "content-length" in head else -1)
        self.kept = head.get("connection") == "keep-alive"
        return status, text

    def watch(self, path: str, body: Record, fields: str) -> Iterator[bytes]:
        """Send a request, and yield the lines of an answer that does not end. The first one must come within TRY_S."""
        self._send(path, body, fields, TRY_S)
        for line in self._file:
            yield line
            self.socket.settimeout(None)

    def _send(self, path: str, body: Record, fields: str, seconds: float) -> tuple[int, dict[str, str]]:
        # Answers to HTTP/1.0 are not chunked: a long one, or a watch, ends with the connection. If it was cut, its JSON
        # does not parse.
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.0\r\nHost: {self._host}\r\nConnection: keep-alive\r\n{fields}"
        self.socket.settimeout(seconds)
        self.socket.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        status = int(self._line().split()[1])
        lines = (line.lower().partition(": ") for line in iter(self._line, ""))
        return status, {name: value for name, _, value in lines}

    def _line(self) -> str:
        line = self._file.readline(65536)
        if not line.endswith(b"\n"):
            raise ConnectionError("the connection was cut")
        return line.decode("latin-1").strip()

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self.socket.close()


class _Cluster:
    """The members of a cluster; each of them can answer every request. Threads may share a cluster."""

    def __init__(self, location: str) -> None:
        match = re.fullmatch(FORM_PATTERN, location)
        if not match:  # the message does not show the location, which may hold a password
            raise ValueError("the form is etcd:http[s]://HOST:PORT[,...]/PREFIX[?cafile=FILE], and no password in it")
        self._urls, self._prefix = match[1].split(","), f"/{match[2]}/".encode()
        try:
            self._context = ssl.create_default_context(cafile=match[3]) if "https:" in location else None
        except OSError as error:
            raise ValueError(f"cafile: {match[3]} is not a file of PEM certificates: {error.args[-1]}") from error
        # The Authorization field, if etcd wants it; the index of the member to ask; the key `change`.
        self._field, self.at, self.change = "", 0, self.key("change")
        self._idle: list[_Channel] = []
        self._watching: _Channel | None = None
        self._failure: Exception | None = None  # of the last call, if no member answered it
        # time.monotonic() from which a call may try again after a failure, and `until` which a thread may work.
        self._again, self._bound = 0.0, threading.local()

    def allow(self, seconds: float) -> None:
        """Give this thread so many seconds from now on for what it does next."""
        self._bound.until = time.monotonic() + seconds

    def left(self) -> float:
        """Return how many seconds are left to this thread."""
        return float(self._bound.until - time.monotonic())

    def key(self, kind: str, name: str = "") -> bytes:
        """Return the key of a kind ("image/", …) and a name; without a name, what all keys of the kind begin with."""
        return self._prefix + f"{kind}{name}".encode()

    def split(self, pair: _Pair) -> tuple[str, str]:
        """Return the kind of a key ("change", "image", "load" or "session") and the name in it."""
        kind, _, name = pair.key[len(self._prefix):].partition(b"/")
        return kind.decode(), name.decode()

    def check_up(self) -> None:
        """Raise OSError at once if a call has just failed, or if another one is trying again."""
        # Otherwise every request of a server would wait CALL_S while the cluster is down.
        if self._failure and time.monotonic() < self._again:
            raise _no_quorum(self._failure)
        self._again = time.monotonic() + CALL_S  # matters after a failure: this call tries, and the others fail

    def call(self, path: str, body: Record, repeat: bool = True, seconds: float = TRY_S) -> Record:
        """Return the answer of any member. Raises OSError.

        With repeat=False the request is sent again only if it was refused. Raises _Unanswered if it was not answered.
        """
        # A member that fails before the request is sent is always passed over: nothing can have happened there.
        # If less time is left than one try may take (not `in_time`), a failure says nothing about the members.
        logged_in, in_time, failure = False, self.left() > TRY_S, Exception("no time is left")
        while (left := self.left()) > 0:
            at, channel = self.at, None
            try:
                channel = self._connect(min(TRY_S, left))
                return self._ask(channel, path, body, min(seconds, left))
            except _Refused as refused:
                self._failure = None
                if isinstance(refused, _Exhausted) and not repeat:
                    raise _Unanswered(str(refused)) from refused
                if logged_in or not re.search("user name is empty|auth token|auth store is old", str(refused)):
                    raise
                self._log_in(refused)
                logged_in = True
            except (OSError, ValueError, IndexError, AttributeError) as error:  # the last three if this is not etcd
                failure = error
                if self.at == at:  # no other thread has switched to the next member
                    self.at = (at + 1) % len(self._urls)
                self.close()  # idle connections to a member that has been restarted would fail one after the other
                if channel and not repeat:
                    raise _Unanswered(str(error)) from error
                time.sleep(0 if self.at else min(PAUSE_S, left))  # pause after the last member of the list
        if in_time:
            self._failure, self._again = failure, time.monotonic() + DOWN_S
        raise _no_quorum(failure) from failure

    def _connect(self, seconds: float) -> _Channel:
        """Return a connection to the current member: an idle one, or else a new one."""
        url = self._urls[self.at]
        with suppress(IndexError):
            while (channel := self._idle.pop()).url != url:
                channel.close()
            return channel
        return _Channel(url, self._context if url.startswith("https:") else None, seconds)

    def _ask(self, channel: _Channel, path: str, body: Record, seconds: float) -> Record:
        """Return the answer of one member. Raises _Refused, and OSError or ValueError if there is no proper answer."""
        try:
            status, text = channel.ask(path, body, self._field, seconds)
        finally:
            self._idle.append(channel) if channel.kept else channel.close()
        if status == 404 and not text.startswith(b"{"):
            raise _Refused(f"etcd: no JSON gateway at {channel.url}: its configuration needs enable-grpc-gateway: true")
        answer: Record = json.loads(text)
        if status != 200 or not answer.keys() & {"header", "result"}:
            raise _error(answer)
        self._failure = None
        return answer

    def _log_in(self, refused: _Refused) -> None:
        if "WMI_ETCD_USER" not in os.environ:
            raise _Refused(f"{refused}: set WMI_ETCD_USER and WMI_ETCD_PASSWORD") from refused
        who = {"name": os.environ["WMI_ETCD_USER"], "password": os.environ.get("WMI_ETCD_PASSWORD", "")}
        self._field = ""
        self._field = f"Authorization: {self.call('/v3/auth/authenticate', who)['token']}\r\n"

    def find(self, key: bytes, **options: Any) -> tuple[int, _Pair]:
        """Return the revision of the cluster, and the pair of a key, or NOTHING."""
        answer = self.call("/v3/kv/range", {"key": _text(key), **options})
        return int(answer["header"]["revision"]), _first(answer.get("kvs"))

    def pages(self, kind: str, revision: int) -> Iterator[_Pair]:
        """Yield all pairs of a kind as they were at a revision. Raises _Refused if that revision was compacted."""
        start, limit, end = self.key(kind), 16, _text(self.key(kind)[:-1] + b"0")  # "0" comes after "/"
        while start:
            self.allow(CALL_S)
            body = {"key": _text(start), "range_end": end, "limit": limit, "revision": revision}
            pairs = [_pair(each) for each in self.call("/v3/kv/range", body, seconds=PAGE_S).get("kvs", ())]
            yield from pairs
            start = pairs[-1].key + b"\0" if len(pairs) == limit else b""
            # The next page has as many as would have filled PAGE_BYTES now: records may have 100 bytes or 100,000.
            limit = max(16, min(PAGE, limit * PAGE_BYTES // (1 + sum(len(pair.value) for pair in pairs))))

    def names(self, kind: str, revision: int) -> dict[str, int]:
        """Return the names of a kind at a revision, each with the revision that created it."""
        return {self.split(pair)[1]: pair.created for pair in self.pages(kind, revision)}

    def transact(self, compare: Ops, success: Ops, failure: Ops = (),
                 repeat: bool = True) -> tuple[bool, list[_Pair], int]:
        """Return whether all comparisons held, what each range found, and the revision. See call()."""
        answer = self.call("/v3/kv/txn", {"compare": compare, "success": success, "failure": failure}, repeat)
        found = [_first(each.get("response_range", {}).get("kvs")) for each in answer.get("responses", ())]
        return answer.get("succeeded", False), found, int(answer["header"]["revision"])

    def watch(self, start: int) -> Generator[Record, None, None]:
        """Yield the answers of a watch from a revision on, with the events of `change`, images and loads."""
        # In fragments of 2 MB: otherwise, a watch that has to catch up gets a thousand revisions in one answer.
        body = {"key": _text(self.change), "range_end": _text(self.key("m")), "start_revision": start, "fragment": True}
        # With this field, a member that has lost the others ends the watch. Without it, the member would be silent.
        fields = self._field + "Grpc-Metadata-hasleader: true\r\n"
        with closing(self._connect(TRY_S)) as self._watching:
            for line in self._watching.watch("/v3/watch", {"create_request": body}, fields):
                answer = json.loads(line)
                if "result" not in answer or "canceled" in answer["result"]:
                    raise _error(answer.get("error", answer))
                yield answer["result"]

    def cut_watch(self) -> None:
        """Make the watch end, in whatever thread it runs."""
        if self._watching:
            with suppress(OSError):  # not shutdown() of a TLS socket, which removes the TLS object of the other thread
                socket.socket.shutdown(self._watching.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the idle connections."""
        with suppress(IndexError):
            while True:
                self._idle.pop().close()


def _no_quorum(failure: Exception) -> OSError:
    return OSError(errno.EHOSTUNREACH, f"no member answers, or none has a quorum: {failure}")


def _error(answer: Record) -> OSError:
    """Return the error in an answer of etcd, to a request or in a watch."""
    code: int = {"code": answer.get("grpc_code", 2), **answer}["code"]
    kind = OSError if code in UNDECIDED else _Exhausted if code == EXHAUSTED else _Refused
    return kind(f"etcd: {answer.get('message') or answer.get('error') or answer}")


def _first(pairs: list[Record] | None) -> _Pair:
    return _pair(pairs[0]) if pairs else NOTHING


def _pair(found: Record) -> _Pair:
    revisions = int(found.get("create_revision", 0)), int(found["mod_revision"])
    return _Pair(b64decode(found["key"]), b64decode(found.get("value", "")), *revisions)


def _text(data: bytes) -> str:
    return b64encode(data).decode()


def _is_at(key: bytes, put: int) -> Record:
    """Return the comparison that a key was put last at this revision or, for 0, that the key does not exist."""
    return {"key": _text(key), "target": "MOD", "result": "EQUAL", "mod_revision": put}


def _put(key: bytes, value: bytes, lease: str = "0") -> Record:
    return {"request_put": {"key": _text(key), "value": _text(value), "lease": lease}}


def _range(key: bytes) -> Record:
    return {"request_range": {"key": _text(key)}}


def _delete(key: bytes) -> Record:
    return {"request_delete_range": {"key": _text(key)}}


# ---- changes ----


class _Image(NamedTuple):
    """The meaning of an image's key at this moment."""

    put: int = 0  # mod_revision of the key; 0: there is no such key
    order: Sequence[int] = ()  # the pair by which images are sorted: see "Order"
    record: Record | None = None  # None: there is no such image
    load: str = ""  # a load that is not done and has an intent here
    intent: tuple[int, Record] = (0, {})  # of that load: the place of the image in it, and the record

    def kept(self) -> Record | None:
        """Return the image in the form of `before`, or None if there is none."""
        return {"order": self.order, "record": self.record} if self.record else None


def _read(pair: _Pair, done: Callable[[str], int]) -> _Image:
    """Return what a pair means; `done` returns the revision of a load, or 0 if the load is not done."""
    if not pair.created:
        return _Image()
    try:
        value = json.loads(pair.value)
        load, n, record = value.get("load", ""), value.get("n", 0), value["record"]
        before = value.get("before") or {"order": [0, 0], "record": None}
        for each in (record, before["record"] or record):
            if not pair.key.endswith(f"/image/{_row(each)[0]}".encode()):
                raise ValueError("it has another id")
        if at := done(load) if load else pair.put:
            return _Image(pair.put, value.get("order") or [at, n], record)
        return _Image(pair.put, before["order"], before["record"], load, (n, record))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OSError(f"etcd: {pair.key!r} does not hold an image of ours: {error!r}") from error


def _images(cluster: _Cluster, revision: int) -> Iterator[_Image]:
    """Yield what the keys of all images meant at a revision."""
    done = cluster.names("load/", revision)
    return (_read(pair, lambda load: done.get(load, 0)) for pair in cluster.pages("image/", revision))


def _value(record: str, **fields: Any) -> bytes:
    """Return the value of the key of an image, from the JSON of its record and the other fields: see "Keys"."""
    return f'{_encode(fields)[:-1]}, "record": {record}}}'.encode()


class _Session:
    """A key that only one change at a time compares and puts: see "Changes"."""

    def __init__(self, key: bytes, lease: str, put: int) -> None:
        self.key, self.lease, self.put, self.born = key, lease, put, time.monotonic()

    def is_ours(self) -> Record:
        """Return the comparison that holds as long as the session exists and nobody else has put it."""
        return _is_at(self.key, self.put)


class _Changes:
    """The part of a client that changes images, each change once or not at all. Threads may share it."""

    def __init__(self, cluster: _Cluster) -> None:
        self._cluster, self._key = cluster, cluster.key
        self._sessions: list[_Session] = []  # those that no change is using

    def find(self, id: str) -> _Image:
        """Return the image as it is now."""
        return self._read(self._cluster.find(self._key("image/", id))[1])

    def _read(self, pair: _Pair) -> _Image:
        return _read(pair, lambda load: self._cluster.find(self._key("load/", load))[1].created)

    def commit(self, compare: Ops, success: Ops, failure: Ops = ()) -> list[_Pair] | None:
        """Make a change, and return None. If a comparison fails, return what the operations in `failure` found.

        Raises OSError, with EINPROGRESS if the change may have been made.
        """
        end = time.monotonic() + self._cluster.left() + FENCE_S
        while self._cluster.left() > 0:
            # 1. Send the change once, with a session that no other change is using.
            session, name = self._take_session(), os.urandom(8).hex().encode()
            puts = [_put(session.key, name, session.lease), _put(self._cluster.change, name)]
            try:
                held, found, revision = self._cluster.transact(
                    [session.is_ours(), *compare], [*success, *puts], [_range(session.key), *failure], repeat=False)
            # 2. If the answer is lost, find out whether the change was made. If not, its session is gone: try again
            #    with another one.
            except _Unanswered as error:
                self._cluster.allow(end - time.monotonic())
                if self._was_made(session, name, error):
                    return None
                continue
            # 3. Which comparison failed? `found` begins with the session: if it is not as we left it, its lease has run
            #    out, and nothing is wrong with the change itself.
            if held:
                session.put = revision
            elif found[0].put != session.put:
                continue
            self._sessions.append(session)
            return None if held else found[1:]
        raise OSError(OTHERS)

    def _was_made(self, session: _Session, name: bytes, error: _Unanswered) -> bool:
        """Return whether a change was made. If not, make sure that it never will be, by deleting its session."""
        # By a range and a delete, not by one transaction, which etcd may refuse when the quota is exceeded.
        found: _Pair | None = None
        with suppress(OSError):
            _, found = self._cluster.find(session.key)
            if found.value != name:
                path, body, found = "/v3/kv/deleterange", {"key": _text(session.key), "prev_kv": True}, None
                found = _first(self._cluster.call(path, body, repeat=False).get("prev_kvs"))
        # Nothing was learned; or there is no session, perhaps because its lease ran out after the change was made.
        if not found or (not found.created and time.monotonic() - session.born > SESSION_S - 2 * CALL_S):
            raise _Unanswered(errno.EINPROGRESS, f"etcd has not said whether this was done: {error}")
        return found.value == name

    def _take_session(self) -> _Session:
        """Return a session that no other change is using."""
        with suppress(IndexError):
            return self._sessions.pop()
        return self._begin_session(os.urandom(8).hex())

    def _begin_session(self, name: str) -> _Session:
        key = self._key("session/", name)
        lease = self._cluster.call("/v3/lease/grant", {"TTL": SESSION_S})["ID"]
        # The put may be sent twice, and the revision be that of the first. Then the comparison of the change that uses
        # this session fails, nothing is done, and commit() tries another session.
        return _Session(key, lease, self._cluster.transact([], [_put(key, b"", lease)])[2])

    def _defeat(self, images: Iterable[_Image]) -> tuple[list[Record], list[Record]]:
        """Return comparisons and operations that make the loads fail which have intents on these images."""
        # Comparisons: the load is not done yet (no load/L). Operations: without its session, it never will be.
        loads = sorted({image.load for image in images} - {""})
        return ([_is_at(self._key("load/", load), 0) for load in loads],
                [_delete(self._key("session/", load)) for load in loads])

    def add(self, rows: Sequence[Row], load: str = "", session: _Session | None = None) -> None:
        """Add all rows or none; for a load, put them as intents. Raises FileExistsError; OSError if the load failed."""
        # The first try assumes that none of the keys exists. If it fails, it has found what the keys hold, and the next
        # one compares that: a tombstone is replaced, a live image is an error.
        keys, images = [self._key("image/", id) for _, id, *_ in rows], [_Image()] * len(rows)
        ours = [session.is_ours()] if session else []
        while True:
            undone, defeat = self._defeat(image for image in images if image.load != load)
            puts = [_put(key, _value(text, n=n, load=load, before=image.kept() if load else None))
                    for key, (n, *_, text), image in zip(keys, rows, images)]
            found = self.commit(
                [*ours, *undone, *(_is_at(key, image.put) for key, image in zip(keys, images))],
                [*defeat, *puts], [_range(session.key if session else keys[0]), *map(_range, keys)])
            if found is None:
                return
            if session and found[0].put != session.put:
                raise OSError(OTHERS)
            images = [self._read(pair) for pair in found[1:]]
            for (_, id, *_), image in zip(rows, images):
                record = image.intent[1] if load and image.load == load else image.record
                if record and record["deleted_at"] is None:
                    raise FileExistsError(id)

    def change(self, id: str, make: Callable[[Record], str]) -> str:
        """Replace a record by the JSON that `make` returns, or delete it if that is "". Raises KeyError."""
        key, image = self._key("image/", id), self.find(id)
        while True:
            if image.record is None:
                raise KeyError(id)
            text = make(image.record)
            undone, defeat = self._defeat([image])
            done = _put(key, _value(text, order=image.order)) if text else _delete(key)
            found = self.commit([_is_at(key, image.put), *undone], [done, *defeat], [_range(key)])
            if found is None:
                return text
            image = self._read(found[0])

    # Many records.

    def load(self, batches: Iterable[Sequence[Row]]) -> None:
        """Add the images of all batches, or none. Raises FileExistsError and OSError."""
        # 1. The session. Its lease bounds how long the source may be silent and, if this process is killed, how long it
        #    takes until check() may remove the intents.
        session = self._begin_session(name := os.urandom(8).hex())
        try:
            # 2. The intents. Nobody sees them yet.
            for rows in batches:
                self._cluster.allow(CALL_S)
                self._cluster.call("/v3/lease/keepalive", {"ID": session.lease})
                self.add(rows, name, session)
            # 3. One transaction makes all of them visible, unless somebody has deleted the session.
            self._cluster.allow(CALL_S)
            puts = [_put(self._key("load/", name), b"{}"), _delete(session.key)]
            if self.commit([session.is_ours()], puts) is not None:
                raise OSError(OTHERS)
        except BaseException:
            with suppress(OSError):  # if this fails too, the lease ends the load, and a later check removes the intents
                self._cluster.allow(CALL_S)
                self._cluster.transact([], [_delete(session.key)])
                list(self.check(repair=True))
            raise

    def check(self, repair: bool) -> Iterator[str]:
        """Yield each key that does not hold an image, or that a dead load has left; with repair, undo the latter."""
        faults = self._faults()
        while some := list(islice(faults, NESTED_AT_ONCE)):
            yield from (fault for fault, _ in some)
            if repair:
                self._cluster.allow(CALL_S)
                self._cluster.transact([], [undo for _, undo in some if undo])

    def _faults(self) -> Iterator[tuple[str, Record | None]]:
        """Yield each fault, and the operation that repairs it."""
        revision, _ = self._cluster.find(self._cluster.change)
        done, alive = (self._cluster.names(kind, revision) for kind in ("load/", "session/"))
        for pair in self._cluster.pages("image/", revision):
            try:
                image = _read(pair, lambda load: done.get(load, 0))
            except OSError as error:
                yield str(error), None
            else:
                if image.load and image.load not in alive:
                    # When this is undone, the key may hold the intent of another load, a live one: so it is compared.
                    undo = _put(pair.key, _encode(image.kept()).encode()) if image.record else _delete(pair.key)
                    fault = f"etcd: {pair.key!r} was left by a load that has ended; it means nothing"
                    yield fault, {"request_txn": {"compare": [_is_at(pair.key, pair.put)], "success": [undo]}}


# ---- replica ----


class _Rewritten(Exception):
    """Raised when the replica cannot be continued: the cluster has another history, or events are missing."""


class _Replica(SqliteStorage):
    """A private copy of what etcd held at one revision."""

    def __init__(self) -> None:
        # A replica that is replaced by another may still be read by a walk. It is removed when nothing refers to it,
        # even if it could not be opened.
        folder, lock = _make_folder()
        connection = _Connection(os.path.join(folder, "images.db"))
        self.remove = weakref.finalize(self, _remove_folder, folder, lock, os.getpid(), connection)
        super().__init__(connection._path)
        self._reads = self._writes = connection  # with two, applying events would wait for the locks of readers
        with connection as db:
            db.executescript(PREPARE)

    def stage(self, images: Iterable[_Image]) -> None:
        """Add images in any order; settle() must follow."""
        with self._reads as db:
            db.begin()
            for image in images:
                if image.record is not None:
                    db.execute(STAGE, (*image.order, *_row(image.record)))
                if image.load:
                    self._intend(db, image)

    def settle(self, revision: int) -> None:
        """Bring the images that were staged into their order; they are those of this revision."""
        with self._reads as db:
            db.executescript(SETTLE)
            db.execute(REACHED, (revision,))

    def _intend(self, db: Any, image: _Image) -> None:
        n, record = image.intent
        db.execute("REPLACE INTO intent VALUES (?, ?, ?, ?)", (record["id"], image.load, n, _row(record)[-1]))

    def apply(self, events: Sequence[_Pair], split: Callable[[_Pair], tuple[str, str]]) -> None:
        """Apply the events of whole revisions, in their order. Raises _Rewritten."""
        # In one transaction, so that no reader sees half a revision. If it has to wait for a walk that copies the
        # images, it waits at the beginning: after a COMMIT that failed, another connection would be opened.
        with self._reads as db:
            db.execute("BEGIN EXCLUSIVE")
            for pair in events:
                kind, name = split(pair)
                if kind == "load":
                    self._publish(db, name)
                elif kind == "image":
                    image = _read(pair, lambda load: 0)
                    db.execute("DELETE FROM intent WHERE id = ?", (name,))
                    if image.load:
                        self._intend(db, image)
                    elif not image.record:
                        db.execute("DELETE FROM image WHERE id = ?", (name,))
                    elif image.order[0] == pair.put:  # it was registered by this very put
                        db.execute(ADD.format("image"), _row(image.record))
                    elif not db.execute(CHANGE, (*_row(image.record)[1:], name)).rowcount:
                        raise _Rewritten
            db.execute(REACHED, (events[-1].put,))

    def _publish(self, db: Any, load: str) -> None:
        for record, in db.execute("SELECT record FROM intent WHERE load = ? ORDER BY n", (load,)):  # may be a million
            db.execute(ADD.format("image"), _row(json.loads(record)))
        db.execute("DELETE FROM intent WHERE load = ?", (load,))

    def held(self, id: str) -> tuple[bool, int]:
        """Return whether there is an image with this id that is not a tombstone, and the size of its record."""
        sizes = "SELECT NOT deleted, length(CAST(record AS BLOB)) FROM image WHERE id = ?"
        with self._reads as db:
            return next(iter(db.execute(sizes, (id,)).fetchall()), (False, 0))

    def compare(self, cluster: _Cluster, revision: int) -> Iterator[str]:
        """Yield each difference from etcd, at the given revision or at that of this replica, whichever is newer."""
        with self._private() as db:
            # 1. Copy the images and their revision. Meanwhile no events can be applied, afterwards they can.
            db.execute("BEGIN")
            db.execute("CREATE TEMP TABLE frozen AS SELECT serial, id, record FROM image")
            ((reached,),) = db.execute("SELECT revision FROM reached").fetchall()
            db.execute("COMMIT")
            # 2. Put beside them what etcd has, and compare.
            db.execute(STAGED)
            images = _images(cluster, max(revision, reached))
            db.executemany(STAGE, ((*image.order, *_row(image.record)) for image in images if image.record))
            db.execute(SORT)
            yield from (f"the copy here: {id} {fault}" for id, fault in db.execute(DIFFERENCES))


def _make_folder() -> tuple[str, int]:
    """Return a new folder for a replica, and a descriptor that holds its lock; remove folders of killed processes."""
    # LEFT_S is for a folder that another process has just made and not locked yet.
    for left in glob(os.path.join(escape(tempfile.gettempdir()), FOLDER + "*")):
        with suppress(OSError), open(os.path.join(left, "lock"), "r+b") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > LEFT_S:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
    folder = tempfile.mkdtemp(prefix=FOLDER)
    lock = os.open(os.path.join(folder, "lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _remove_folder(folder: str, lock: int, pid: int, connection: Any) -> None:
    if pid == os.getpid():
        with suppress(AttributeError):  # it is not open, or this is PyPy
            connection._db.interrupt()  # it may be adding a million images
        connection.close()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


class _State(NamedTuple):
    """A replica, the revision up to which it is complete, and the last change up to there."""

    replica: _Replica | None = None
    applied: int = -1
    last: _Pair = NOTHING


class _Follower:
    """The replica, and the thread that makes it and follows the cluster. Threads may share it."""

    def __init__(self, cluster: _Cluster) -> None:
        self._cluster, self.closed, self._stale = cluster, False, False
        self._changed = threading.Condition()  # guards the start of the thread, and tells readers of a new state
        self._thread: threading.Thread | None = None
        self._why, self._failures = "", 0  # why the replica is not up to date; how often in a row it failed
        self.state, self._progress = _State(), 0.0  # the latter: when events arrived, or CALL_S after the watch was cut

    def start(self) -> bool:
        """Start the thread, unless it is running. Return whether there is a replica."""
        with self._changed:
            if not self._thread and not self.closed:
                self._thread = threading.Thread(target=self._run, name="wmi-etcd", daemon=True)
                self._thread.start()
        return bool(self.state.replica)

    def at(self, revision: int, patient: bool) -> _Replica:
        """Return the replica as soon as it has reached a revision. Raises OSError.

        A patient caller gives up if something failed and nothing has arrived for CALL_S, or if it fails more than five
        times in a row meanwhile. Others wait CALL_S at most.
        """
        began, most = time.monotonic(), self._failures + 5
        self.start()
        if (made := self.state.replica) and not os.path.exists(made._path):  # removed, as temporary files are
            self.renew()
        while not (state := self.state).replica or self._stale or state.applied < revision:
            with self._changed:
                if self.closed:
                    raise ValueError(CLOSED)
                self._changed.wait_for(lambda: self.state is not state, PAUSE_S)
            now, since = time.monotonic(), max(began, self._progress)
            if (self._failures > most or (self._why and now > since + CALL_S)) if patient else self._cluster.left() < 0:
                raise OSError(f"etcd: the copy here is {'late' if state.replica else 'being made'}: {self._why}")
            # The cluster has this revision, but the watch does not bring it: its member may be cut off from the others.
            # If this does not help, it is not repeated soon, since the first events may take longer than SILENT_S.
            if state.replica and now > since + SILENT_S:
                self._progress = now + CALL_S
                self._cluster.cut_watch()
        return state.replica

    def renew(self) -> None:
        """Make the thread make the replica again."""
        self._stale = True
        self._cluster.cut_watch()

    def revision(self) -> str:
        """Return the revision of the cluster, when the replica has reached it; renew one of another history."""
        seen = self.state  # taken before the request: afterwards it may be ahead of the answer
        _, last = self._cluster.find(self._cluster.change)
        if last.put <= seen.applied and last != seen.last and seen.replica is self.state.replica:
            self.renew()
        if self.state.replica:  # a server asks once for all requests that wait, and their reads need not wait again
            self.at(last.put, patient=False)
        return f"{last.put}.{last.value.decode('latin-1')}"

    def close(self) -> None:
        """End the thread and remove the replica."""
        self.closed = True
        thread, until = self._thread, time.monotonic() + DOWN_S
        while thread and thread.is_alive() and time.monotonic() < until:
            self._cluster.cut_watch()
            thread.join(PAUSE_S / 2)
        if self.state.replica:
            self.state.replica.remove()

    # The methods below run in the thread of the follower.

    def _run(self) -> None:
        while not self.closed:
            self._cluster.allow(CALL_S)
            work = self._make if self._stale or not self.state.replica else self._follow
            try:
                work()
            except Exception as error:  # of any kind: the thread must go on, and readers that give up are told why
                if isinstance(error, (_Rewritten, _Refused)):  # not `|=`, which could undo what renew() does meanwhile
                    self._stale = True
                # Not the error itself, which would keep a failed replica alive.
                self._why, self._failures = str(error) or repr(error), self._failures + 1
                time.sleep(PAUSE_S if self.state.replica else DOWN_S)

    def _make(self) -> None:
        """Make a replica of what etcd holds now."""
        # All at the revision of the first answer, however long it takes; the watch brings what comes after.
        self.state, self._stale = _State(), False
        replica = _Replica()
        revision, change = self._cluster.find(self._cluster.change)
        images = _images(self._cluster, revision)
        while some := list(islice(images, 100)):
            replica.stage(some)
            self._advance(self.state)
        replica.settle(revision)
        self._advance(_State(replica, revision, change))

    def _advance(self, state: _State) -> _State:
        with self._changed:
            if self.closed or self._stale:
                raise _Rewritten
            self.state, self._progress = state, max(self._progress, time.monotonic())
            self._why, self._failures = ("", 0) if state.replica else (self._why, self._failures)
            self._changed.notify_all()
        return state

    def _follow(self) -> None:
        """Apply the events of the watch until it ends. Raises _Rewritten."""
        state, events = self._resume(self.state), list[_Pair]()
        with closing(self._cluster.watch(state.applied + 1)) as answers:
            for answer in answers:
                # An answer ends with a whole revision. But the last one of a fragment may go on in the next answer.
                events += [_pair(event["kv"]) for event in answer.get("events", ())]
                whole = [pair for pair in events if not answer.get("fragment") or pair.put < events[-1].put]
                if whole and state.replica:
                    try:
                        state.replica.apply(whole, self._cluster.split)
                    except Exception as error:
                        if "locked by" in str(error):  # another thread copies the replica, which is sound: try again
                            raise
                        raise _Rewritten from error
                    # Not the revision in the header of the answer, which may be ahead of the events.
                    last = [state.last, *(pair for pair in whole if pair.key == self._cluster.change)][-1]
                    state = self._advance(_State(state.replica, whole[-1].put, last))
                    del events[:len(whole)]

    def _resume(self, state: _State) -> _State:
        """Return the state from which a watch can go on. Raises _Rewritten, and _Refused if it has been compacted."""
        # If the last change is still the one that the replica knows, it has missed nothing. Otherwise, it goes on only
        # if, at its own revision, `change` had the value that the replica knows.
        revision, last = self._cluster.find(self._cluster.change)
        if last != state.last:
            revision, (_, last) = state.applied, self._cluster.find(self._cluster.change, revision=state.applied)
        if last != state.last or revision < state.applied:
            raise _Rewritten
        return self._advance(state._replace(applied=revision))


# ---- store ----


class _Client:
    """The connections and the replica of a process; a store and its views share them."""

    def __init__(self, location: str) -> None:
        self.pid, self.cluster = os.getpid(), _Cluster(location)
        self.changes, self.follower = _Changes(self.cluster), _Follower(self.cluster)


class EtcdStorage(AbstractContextManager["EtcdStorage"]):
    """A store in etcd. Threads may share it; a forked process makes a client of its own."""

    def __init__(self, location: str, client: _Client | None = None, floor: str = "") -> None:
        """Open the store. A floor is a revision: reads show it or a newer one. Raises ValueError."""
        self._location, self._floor, self._client = location, floor, client or _Client(location)

    def _opened(self, asking: bool = False) -> _Client:
        """Return the client of this process, and give the thread CALL_S. Raises ValueError if the store is closed."""
        if self._client.follower.closed:
            raise ValueError(CLOSED)
        if self._client.pid != os.getpid():
            _inherited.append(self._client)
            self._client = _Client(self._location)
        self._client.cluster.allow(CALL_S)
        if asking:
            self._client.cluster.check_up()
        return self._client

    def _replica(self) -> _Replica:
        """Return the replica as soon as it has reached the floor or, without a floor, the cluster's revision."""
        follower, floor = self._opened().follower, self._floor or self.revision()
        return follower.at(int(floor.partition(".")[0]), patient=not self._floor)

    def get(self, id: str) -> Record:
        """Return the record, a tombstone too. Raises KeyError."""
        if self._floor and self._opened().follower.start():
            return self._replica().get(id)
        record = self._opened(asking=True).changes.find(id).record
        if record is None:
            raise KeyError(id)
        return record

    def add(self, record: Record) -> None:
        """Register a record as the newest, also over a tombstone. Raises FileExistsError."""
        id, *_, text = _row(record)
        self._opened(asking=True).changes.add([(0, id, False, text)])

    def add_all(self, records: Iterable[Record]) -> int:
        """Register all in this order, or none if one fails or the iterable raises; return how many."""
        # What fits into one transaction needs no load. An id that the replica shows to be taken ends the work early;
        # the transactions find the others.
        replica, count = self._replica(), 0

        def batches() -> Iterator[list[Row]]:
            nonlocal count
            rows, size = dict[str, Row](), 0
            for count, record in enumerate(records, 1):
                (id, *_, deleted, text), (live, more) = _row(record), replica.held(record["id"])
                if live or (id in rows and not rows.pop(id)[2]):
                    raise FileExistsError(id)
                size += (more := more + len(text.encode()))  # an intent has the tombstone as well
                if len(rows) == AT_ONCE or size > BYTES_AT_ONCE:
                    yield list(rows.values())
                    rows, size = {}, more
                rows[id] = count, id, deleted, text
            if rows:
                yield list(rows.values())

        some = list(islice(found := batches(), 2))
        if len(some) == 2:
            self._opened().changes.load(chain(some, found))
        elif some:
            self._opened().changes.add(some[0])
        return count

    def replace(self, id: str, change: Callable[[Record], Record]) -> Record:
        """Put change(record) in the place of the record, atomically, and return it. Raises KeyError."""
        def make(record: Record) -> str:
            found, *_, text = _row(change(record))
            if found != id:
                raise ValueError(f"the id {id!r} cannot be changed to {found!r}")
            return text

        return dict(json.loads(self._opened(asking=True).changes.change(id, make)))

    def delete(self, id: str) -> None:
        """Remove the record altogether. Raises KeyError."""
        self._opened(asking=True).changes.change(id, lambda record: "")

    def page(self, account: str | None, start: int, limit: int, **options: Any) -> tuple[int, list[Record]]:
        """Return how many records are in the scope, and those from offset start, newest first, at most limit."""
        return self._replica().page(account, start, limit, **options)

    def walk(self, account: str | None = None, **options: Any) -> Iterator[Record]:
        """Yield the records of the scope from offset start; those of a frozen walk are all of one revision."""
        return self._replica().walk(account, **options)

    def revision(self) -> str:
        """Return a text that changes with every change. It costs one request to the cluster."""
        return self._opened(asking=True).follower.revision()

    def at_least(self, revision: str) -> EtcdStorage:
        """Return this store for reads from the replica, once there is one, without a request to the cluster."""
        return EtcdStorage(self._location, self._client, revision)

    def check(self, repair: bool = False) -> Iterator[str]:
        """Yield each fault in etcd and in the replica; with repair, remove what dead loads left, and renew the replica.

        All images in etcd must be in the replica, with the same records and in the same order, and no others.
        """
        client, faults = self._opened(), 0
        yield from client.changes.check(repair)
        # The replica shows every change up to this revision, and perhaps newer ones: see compare().
        revision, _ = self._opened().cluster.find(client.cluster.change)
        replica = self._replica()
        for faults, fault in enumerate(chain(replica.check(), replica.compare(client.cluster, revision)), 1):
            yield fault
        if repair and faults:
            client.follower.renew()

    def close(self) -> None:
        """Close every connection; a second call is harmless. Every other call raises ValueError from now on."""
        if self._client.pid == os.getpid():
            self._client.follower.close()
            self._client.cluster.close()

    def __exit__(self, *error: object) -> None:
        self.close()
