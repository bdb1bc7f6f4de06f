"""The client: against our server, where it must behave as a catalog does, and against other servers.

The others are scripts: a thread that accepts connections and says, to each, what it was told to say.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import inspect
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import pytest
from serving import serving
from support import ACCOUNT, SECONDS, ignore_surroundings, image, make_certificate

import wmi

SHOWN = {
    "id": "wmi-one",
    "uuid": "wmi-one",
    "account_id": ACCOUNT,
    "source": "---\n:uri: file:///a\n",
    "features": "--- {}\n",
}


OK, NO = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 404 No\r\n"


# ---- servers that are not ours ----


class Scripted:
    """A server that plays one act a connection, the last one again and again, and keeps what it was asked.

    An act is bytes to send after a request was read, or a function of the connection and the request.
    """

    def __init__(self, *acts, before=lambda connection: connection):
        self.acts, self.before = list(acts), before
        self.requests = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._serve)

    def _serve(self):
        while True:
            connection, _ = self.listener.accept()
            with connection, contextlib.suppress(OSError):
                if self.stopped.is_set():
                    return
                connection.settimeout(SECONDS)
                act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
                with self.before(connection) as stream:
                    self._play(act, stream)

    def _play(self, act, stream):
        request = b""
        while b"\r\n\r\n" not in request:
            piece = stream.recv(65536)
            if not piece:
                return
            request += piece
        head, _, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        while length and len(body) < int(length[1]):
            body += stream.recv(65536)
        request = head + b"\r\n\r\n" + body
        self.requests.append(request)
        if callable(act):
            act(stream, request)
        else:
            stream.sendall(act)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.stopped.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), SECONDS).close()
        self.thread.join()
        self.listener.close()


def http(body=b"[]", status="200 OK", *fields, length=None):
    """Return a raw answer with its length."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", "Connection: close",
        *fields,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def error(name, status, message="", code="100"):
    """Return an error as DCMGR answers it."""
    return http(
        {"error": f"Dcmgr::Endpoints::Errors::{name}", "message": message, "code": code}, f"{status} X"
    )


def hang(stream, request):
    """Say nothing until the client goes."""
    while stream.recv(65536):
        pass


def dripping(text, begin=b"", pause=0.02):
    """Return an act that sends one byte at a time, while the client stays."""

    def act(stream, request):
        stream.sendall(begin)
        stream.settimeout(pause)
        for byte in itertools.islice(itertools.cycle(text), 1000):  # 20 s: longer than any test waits
            stream.sendall(bytes([byte]))
            with contextlib.suppress(socket.timeout):
                if not stream.recv(1):
                    return

    return act


def flooding(begin, again=b" ", megabytes=32):
    """Return an act that begins an answer and goes on with it for as long as the client stays, up to a bound."""
    block = again * (65536 // len(again))

    def act(stream, request):
        stream.sendall(begin)
        for _ in range(megabytes << 4):
            stream.sendall(block)

    return act


def reset(stream, request):
    """Hang up with a reset."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def client(server, **options):
    """Return a client that gives up soon."""
    options = {"timeout": 5, "deadline": 10, "retries": 0, **options}
    return wmi.Client(server if isinstance(server, str) else server.url, ACCOUNT, **options)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """No random pause takes long, and no proxy of this machine plays a part."""
    ignore_surroundings(monkeypatch)


# ---- the same verbs and errors as a catalog ----


@pytest.fixture
def storage():
    """A store with images of two accounts."""
    with wmi.MemoryStorage() as storage:
        storage.add(
            image(
                "wmi-mine", source={"uri": "file:///a b"}, features={"virtio": True},
                description="\u00e9\n\"'\u2028\U0001f4a9",
            )
        )
        storage.add(image("wmi-public", account_id="a-other", is_public=True))
        storage.add(image("wmi-private", account_id="a-other"))
        storage.add(image("wmi-volume", boot_dev_type=1, source={"snapshot_id": "snap-1"}, md5sum="0" * 32))
        yield storage


@pytest.fixture(params=["catalog", "client"])
def opened(request, storage):
    """Return a function that opens the catalog, or a client on a server of the same store."""
    with contextlib.ExitStack() as stack:
        if request.param == "catalog":
            yield lambda account=ACCOUNT, version="document": wmi.Catalog(storage, account, version)
        else:
            url = stack.enter_context(serving(storage)).url
            yield lambda account=ACCOUNT, version="document": wmi.Client(url, account, version=version)


VERSIONS = pytest.mark.parametrize("version", wmi.VERSIONS)


@VERSIONS
def test_index(opened, version):
    """An index has the same total, start and images on a store and on a server."""
    page = opened(version=version).index()
    own = ["wmi-volume", "wmi-mine"]
    expected = own if version == "12.03" else ["wmi-volume", "wmi-public", "wmi-mine"]
    assert (page.total, page.start, page.limit) == (len(expected), 0, 250 if version == "12.03" else None)
    assert [row["id"] for row in page.images] == expected
    second = opened(version=version).index(1, 1)
    assert (second.total, second.start, second.limit) == (len(expected), 1, 1)
    assert [row["id"] for row in second.images] == expected[1:2]
    assert list(opened(version=version).index("9", "1").images) == []


def test_filters(opened):
    """The filters of 12.03 are named and valued alike."""
    catalog = opened(version="12.03")
    assert [row["id"] for row in catalog.index(is_public=True).images] == ["wmi-volume", "wmi-public", "wmi-mine"]
    assert catalog.index(filter="deleted_at.nil", state="alive").total == 2
    assert catalog.index(filter=["deleted_at.nil", "parent_image_id.nil"], state="alive").total == 2
    assert catalog.index(filter=["deleted_at.nil", "parent_image_id.not_nil"], state="alive").total == 0
    assert catalog.index(filter=[], state="alive").total == 2
    catalog.destroy("wmi-mine")
    assert [row["id"] for row in catalog.index(state="deleted").images] == ["wmi-mine"]
    assert [row["id"] for row in catalog.images(sort_by="created_at.asc", state="alive")] == ["wmi-volume"]


@VERSIONS
def test_every_image(opened, version):
    """images() yields all, page by page."""
    assert [row["id"] for row in opened(version=version).images()][-1] == "wmi-mine"


@pytest.mark.parametrize("id", ["wmi-mine", "wmi-volume", "wmi-public"])
def test_show(opened, storage, id):
    """An image has the same fields, source and features as dicts, in the document's order."""
    shown, kept = opened().show(id), storage.get(id)
    for name in set(wmi.VERSIONS["document"].fields) - {"uuid"}:
        assert shown[name] == kept[name]
    assert isinstance(shown["source"], dict) and isinstance(shown["features"], dict)


def test_destroy(opened):
    """Destroy returns the id, and the image is gone; in 12.03 it stays as a tombstone."""
    assert opened().destroy("wmi-mine") == "wmi-mine"
    with pytest.raises(wmi.UnknownUUIDResource):
        opened().show("wmi-mine")
    with pytest.raises(wmi.UnknownUUIDResource):
        opened().destroy("wmi-mine")
    assert opened(version="12.03").show("wmi-mine")["state"] == "deleted"
    assert opened(version="12.03").destroy("wmi-mine") == "wmi-mine"


@pytest.mark.parametrize("text", ["new", "a&b=c+d %41;\n\u00e9\u2028", "", " "])
def test_update(opened, text):
    """Any text arrives as it is."""
    catalog = opened(version="12.03")
    changed = catalog.update("wmi-mine", display_name=text)
    assert (changed["id"], changed["display_name"]) == ("wmi-mine", text)
    assert catalog.show("wmi-mine")["display_name"] == text


ERRORS = [
    (wmi.UnknownUUIDResource, 404, "100", lambda c: c().show("wmi-none"), "wmi-none"),
    (wmi.OperationNotPermitted, 403, "105", lambda c: c().show("wmi-private"), ""),
    (wmi.OperationNotPermitted, 403, "105", lambda c: c().destroy("wmi-public"), ""),
    (wmi.UnknownUUIDResource, 404, "100", lambda c: c(version="12.03").show("wmi-private"), "wmi-private"),
    (wmi.InvalidParameter, 400, "143", lambda c: c().show("nope"), "Invalid UUID Syntax: nope"),
    (wmi.InvalidParameter, 400, "143", lambda c: c().show("wmi-a/../x"), "Invalid UUID Syntax: wmi-a/../x"),
    (wmi.InvalidParameter, 400, "143", lambda c: c().destroy(""), "Invalid UUID Syntax: "),
    (wmi.InvalidParameter, 400, "143", lambda c: c().index("x"), "start"),
    (wmi.InvalidParameter, 400, "143", lambda c: c().index(0, -1), "limit"),
    (wmi.InvalidParameter, 400, "143", lambda c: c(version="12.03").index(state="x"), "state"),
    (wmi.InvalidParameter, 400, "143", lambda c: c().update("wmi-mine", description="x"), None),
    (wmi.InvalidParameter, 400, "143", lambda c: c(version="12.03").update("wmi-mine", arch="x86"), None),
    (wmi.InvalidParameter, 400, "143", lambda c: c("nobody"), None),
    (wmi.InvalidParameter, 400, "143", lambda c: c(version="1.0"), None),
]


@pytest.mark.parametrize("kind, status, code, call, message", ERRORS)
def test_errors_are_the_same(opened, kind, status, code, call, message):
    """Class, status, code and message are the catalog's, whichever side they come from."""
    with pytest.raises(wmi.Error) as caught:
        call(opened)
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.code) == (status, code)
    if message and "Syntax" not in message:
        assert str(caught.value) in (message, f"Dcmgr::Endpoints::{kind.__name__}")


def test_system_account(opened):
    """a-00000000 may show and delete any image."""
    assert opened("a-00000000").show("wmi-private")["account_id"] == "a-other"
    assert opened("a-00000000").destroy("wmi-private") == "wmi-private"


def test_a_script_written_for_one_runs_on_the_other():
    """The client has every public verb that a server can answer, with the same parameters."""
    for name in ("index", "images", "show", "destroy", "update"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (wmi.Client, wmi.Catalog))
        assert list(ours.parameters.items()) == list(theirs.parameters.items()), name


def test_a_store_that_fails_is_the_same_error(storage):
    """DatabaseError comes through a server as DatabaseError."""
    with serving(storage) as served:
        storage.close()
        with pytest.raises(wmi.DatabaseError) as caught:
            client(served.url).index()
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "110", 1.0)


def test_the_account_is_the_clients_own(storage):
    """Two clients do not mix."""
    with serving(storage) as served:
        totals = [
            wmi.Client(served.url + end, account).index().total
            for account in (ACCOUNT, "a-third")
            for end in ("", "/")
        ]
    assert totals == [3, 3, 1, 1]


# ---- reading answers ----


@pytest.mark.parametrize("wrap", [lambda body: body, lambda body: [body]], ids=["object", "array"])
@pytest.mark.parametrize("total", ["owner_total", "total"])
@pytest.mark.parametrize("result", ["result", "results"])
def test_documented_and_deployed_indexes(wrap, total, result):
    """An object or an array of one; owner_total or total; result or results; a limit or null."""
    for limit in (None, 250):
        body = wrap({total: 7, "start": 2, "limit": limit, result: [SHOWN]})
        with Scripted(http(body)) as server:
            page = client(server).index(2)
        assert page == wmi.Page(7, 2, limit, [{**SHOWN, "source": {"uri": "file:///a"}, "features": {}}])


@pytest.mark.parametrize(
    "source, read",
    [
        ("---\n:uri: file:///a\n", {"uri": "file:///a"}),
        ("--- \n:uri: file:///a\n", {"uri": "file:///a"}),
        ({"uri": "file:///a"}, {"uri": "file:///a"}),
        ("--- \n:snapshot_id: snap-1\n", {"snapshot_id": "snap-1"}),
        ("--- {}\n\n", {}),
        (None, None),
    ],
)
def test_source_as_text_or_object(source, read):
    """The text of Ruby's old and new YAML and an object are the same dict."""
    with Scripted(http({**SHOWN, "source": source})) as server:
        assert client(server).show("wmi-one")["source"] == read


def test_image_of_12_03_has_no_source():
    """Where an answer has no source, the image has none."""
    with Scripted(http({"id": "wmi-one", "features": {"virtio": True}})) as server:
        assert client(server, version="12.03").show("wmi-one") == {
            "id": "wmi-one",
            "features": {"virtio": True},
        }


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "1.5", "-1", "1" + "0" * 1_000_000]
DEEP = b"[" * 100_000 + b"]" * 100_000
JUNK = {
    "empty": b"",
    "html": b"<!DOCTYPE html><title>It works!</title>",
    "text": b"OK",
    "bytes": b"\xff\xfe\x00",
    "cut": b'{"id": "wm',
    "deep": DEEP,
    "null": b"null",
    "number": b"5",
    "string": b'"wmi-one"',
    "array": b"[]",
    "arrays": b"[[]]",
    "object": b"{}",
    "nan": b"NaN",
    "long": b"9" * 10_000,
    "error": b'{"error": "x"}',
}
INDEXES = {
    "result": b'{"total": 1, "start": 0, "limit": null, "result": 5}',
    "row": b'{"total": 1, "start": 0, "limit": 0, "result": [5]}',
    "rows": b'{"total": 1, "start": 0, "limit": 0, "result": {"a": 1}}',
    "total": b'{"total": "x", "start": 0, "limit": 0, "result": []}',
    "infinite": b'{"total": 1e999, "start": 0, "limit": 0, "result": []}',
    "start": b'{"total": 0, "start": [], "limit": 0, "result": []}',
    "no limit": b'{"total": 0, "start": 0, "result": []}',
    "no id": b'{"total": 1, "start": 0, "limit": 0, "result": [{"uuid": 1}]}',
    "null": b'{"total": null, "start": 0, "limit": 0, "result": null}',
    "text": b'{"total": 3, "start": 0, "limit": 0, "result": "abc"}',
    "limit": b'{"total": 0, "start": 0, "limit": {"a": 1}, "result": []}',
    "inf": b'{"total": 0, "start": Infinity, "limit": 0, "result": []}',
}
IMAGES = {
    "source": {**SHOWN, "source": "---\n- a\n"},
    "tag": {**SHOWN, "source": "--- !ruby/object:Gem\nx: y\n"},
    "anchor": {**SHOWN, "source": "---\n:uri: &a b\n"},
    "escape": {**SHOWN, "source": '---\n:uri: "\\UFFFFFFFF"\n'},
    "digits": {**SHOWN, "source": '---\n:uri: "\\uzzzz"\n'},
    "features": {**SHOWN, "features": "virtio"},
    "long source": {**SHOWN, "source": "---\n:uri: " + "a" * 1_600_000},
    "list": [SHOWN],
    "half a pair": {**SHOWN, "description": "\ud800"},
    "half a pair within": {**SHOWN, "source": {"uri": "\udfff"}},
    "half a pair in YAML": {**SHOWN, "source": '---\n:uri: "\\ud800"\n'},
    **{f"number {number:.9}": json.dumps({**SHOWN, "new": 0}).replace(" 0", number).encode() for number in NUMBERS},
}
WRONG = {  # values that are not of a field's type; null is, but for id
    "id": ["", "one", "wmi-", "wmi-../x", "wmi-A", "wmi-x\n", None, 5, ["wmi-one"], {}],
    "text": [5, True, [], {}, ["a"]],
    "flag": [0, 1, "true", "", [], {}],
    "number": ["1", True, [], {}],
    "list": ["", 0, {}, False],
    "source": [5, [], ["uri"], True, {"uri": 5}, {"uri": None}, {"uri": ["a"]}, {"snapshot_id": {}}, "---\n:uri: 5\n"],
    "features": [5, [], "virtio", {"virtio": 1}, {"virtio": None}, {"virtio": "true"}, {"acpi": []}],
}
KINDS = {
    **dict.fromkeys(wmi.VERSIONS["document"].fields, "text"),
    **dict.fromkeys(wmi.VERSIONS["12.03"].fields, "text"),
    **dict.fromkeys(["is_public", "is_cacheable"], "flag"),
    **dict.fromkeys(["volumes", "vifs", "labels"], "list"),
    "id": "id", "boot_dev_type": "number", "source": "source", "features": "features",
}


@pytest.mark.parametrize(
    "body", [*JUNK.values(), *INDEXES.values()], ids=[*JUNK, *(f"index {name}" for name in INDEXES)]
)
def test_junk_for_an_index(body):
    """200 with anything but an index is BadAnswer, without a second try."""
    with Scripted(http(body)) as server:
        with pytest.raises(wmi.BadAnswer):
            client(server, retries=3).index()
        assert len(server.requests) == 1


@pytest.mark.parametrize("body", [*JUNK.values(), *IMAGES.values()], ids=[*JUNK, *IMAGES])
def test_junk_for_an_image(body):
    """200 with anything but an image is BadAnswer; nothing in it is executed or instantiated."""
    with Scripted(http(body)) as server, pytest.raises(wmi.BadAnswer):
        client(server).show("wmi-one")


def test_the_longest_source_is_read():
    """What a store takes, however it is escaped in YAML, the client reads."""
    uri = "file:///" + "\u200b" * (wmi.MAX_TEXT - 100)
    with Scripted(http({**SHOWN, "source": wmi.to_yaml({"uri": uri})})) as server:
        assert client(server).show("wmi-one")["source"] == {"uri": uri}


@pytest.mark.parametrize("name", KINDS)
def test_wrong_types_in_each_field(name):
    """A value of another type in any field of an image, shown or in an index, is BadAnswer."""
    bodies = [{**SHOWN, name: value} for value in WRONG[KINDS[name]]]
    indexes = [{"total": 1, "start": 0, "limit": None, "results": [body]} for body in bodies]
    with Scripted(*map(http, [*bodies, SHOWN])) as server:
        for body in bodies:
            with pytest.raises(wmi.BadAnswer):
                pytest.fail(f"taken: {client(server).show('wmi-one')}, {body}")
        assert client(server).show("wmi-one")["id"] == "wmi-one"
    with Scripted(*map(http, indexes)) as server:
        for body in bodies:
            with pytest.raises(wmi.BadAnswer):
                pytest.fail(f"taken: {client(server).index()}, {body}")


@pytest.mark.parametrize("name", ["total", "owner_total", "start", "limit", "result", "results"])
@pytest.mark.parametrize("value", ["1", "", -1, 1.5, True, False, [], {}, "abc", {"a": 1}, [5], [[]], ["wmi-one"]])
def test_wrong_types_in_an_index(name, value):
    """A count that is not a whole number, or a list that is not one of images, is BadAnswer."""
    body = {"total": 0, "start": 0, "limit": None, "results": [], name: value}
    good = name.startswith("result") and value == []
    with Scripted(http(body)) as server, contextlib.nullcontext() if good else pytest.raises(wmi.BadAnswer):
        client(server).index()


def test_null_where_nothing_is_known():
    """Every field but the id may be null."""
    body = {**dict.fromkeys(KINDS), "id": "wmi-one"}
    with Scripted(http(body)) as server:
        assert client(server).show("wmi-one") == body


@pytest.mark.parametrize("depth", [300, 900, 950, 990, 1000, 3000, 30_000])
def test_no_depth_escapes(depth):
    """At no depth of nesting does RecursionError reach the caller."""
    body = b'{"id": "wmi-one", "source": ' + b"[" * depth + b"]" * depth + b"}"
    with Scripted(http(body)) as server, contextlib.suppress(wmi.BadAnswer):
        assert client(server).show("wmi-one")["id"] == "wmi-one"


@pytest.mark.parametrize("body", JUNK.values(), ids=JUNK)
@pytest.mark.parametrize("status", [400, 404, 418, 500])
def test_junk_for_an_error(body, status):
    """An error that is not in the API's form is an Error with its status."""
    with Scripted(http(body, f"{status} Whatever")) as server, pytest.raises(wmi.Error) as caught:
        client(server).index()
    assert caught.value.status == status
    assert str(status) in str(caught.value)


@pytest.mark.parametrize(
    "status, name, kind",
    [
        (404, "UnknownUUIDResource", wmi.UnknownUUIDResource),
        (403, "OperationNotPermitted", wmi.OperationNotPermitted),
        (400, "InvalidRequestCredentials", wmi.InvalidRequestCredentials),
        (503, "DatabaseError", wmi.DatabaseError),
        (400, "SomethingElse", wmi.Error),
        (405, "MethodNotAllowed", wmi.MethodNotAllowed),
        (400, "", wmi.Error),
        (400, "__class__", wmi.Error),
    ],
)
def test_errors_of_other_servers(status, name, kind):
    """The class is found by its name; status and code are the answer's."""
    with Scripted(error(name, status, "text", "77")) as server, pytest.raises(wmi.Error) as caught:
        client(server).index()
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.code, str(caught.value)) == (status, "77", "text")


# ---- what is sent ----


def test_requests_as_they_are_sent(storage):
    """Account, path, extension and query are the documented ones; PUT is a form."""
    with Scripted(http(SHOWN)) as server:
        caller = client(server)
        with pytest.raises(wmi.BadAnswer):
            caller.index(3, 4)
        caller.show("wmi-one")
        client(server, version="12.03").update("wmi-one", display_name="a b&")
    first, second, third = server.requests
    assert first.startswith(b"GET /api/images.json?start=3&limit=4 HTTP/1.1\r\n")
    assert second.startswith(b"GET /api/images/wmi-one.json HTTP/1.1\r\n")
    assert third.startswith(b"PUT /api/12.03/images/wmi-one.json HTTP/1.1\r\n") and third.endswith(
        b"\r\n\r\ndisplay_name=a+b%26"
    )
    for request in server.requests:
        assert f"x-vdc-account-uuid: {ACCOUNT}\r\n".encode() in request.lower()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://127.0.0.1/", "127.0.0.1:9001", "//127.0.0.1", "", "http://", "http:///x",
        "data:,x", "gopher://h", "http://h/?a", "http://h/#a", "http://h /", "http://h\r\nX: y/", "http://user:word@h/",
        "HTTP//h", "javascript:0", "unix:/x",
    ],
)
def test_urls_that_are_refused(url):
    """Only http and https, a host, and nothing that could become a header."""
    with pytest.raises(wmi.InvalidParameter):
        wmi.Client(url, ACCOUNT)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:99999", "http://127.0.0.1:99999999999999999999", "http://127.0.0.1:x", "http://a..b",
        "http://[::1", "http://\u0100" + "x" * 70, "http://127.0.0.1:-1", "http://[zz]", "http://.",
        "http://127.0.0.1:1/\u00e9", "http://%00",
    ],
)
def test_urls_that_cannot_work(url):
    """A URL that passes the check and yet cannot be called is an Error too."""
    with pytest.raises(wmi.Error):
        client(url, timeout=0.5).index()


@pytest.mark.parametrize("account", ["", "a-", "A-x", "a-\n", "a-x\r\nX: y", "a-\u00e9", None, 5, "a-x "])
def test_accounts_that_are_refused(account):
    """What is not an account never gets into a header."""
    with pytest.raises(wmi.InvalidParameter):
        wmi.Client("http://127.0.0.1:1", account)


# ---- redirects ----


def moved(where, status="302 Found"):
    """Return a redirect."""
    return http(b"", status, f"Location: {where}")


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T"])
def test_redirect_on_the_same_server_is_followed(status):
    """GET follows a redirect to the same scheme, host and port, with the account."""
    with Scripted(moved("/elsewhere/x", status), http(SHOWN)) as server:
        assert client(server).show("wmi-one")["id"] == "wmi-one"
        assert server.requests[1].startswith(b"GET /elsewhere/x HTTP/1.1\r\n")
        assert ACCOUNT.encode() in server.requests[1]


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
@pytest.mark.parametrize(
    "form",
    [
        "http://127.0.0.1:{port}/x", "http://localhost:{same}/x", "https://127.0.0.1:{same}/x", "//127.0.0.1:{port}/x",
        "http://u:p@127.0.0.1:{same}/x", "http://127.0.0.1/x",
    ],
)
def test_redirect_to_another_server_is_not_followed(form, status):
    """Account and token are never handed to another scheme, host, port or user: not a byte goes there."""
    with Scripted(http(SHOWN)) as other:
        target = []
        with Scripted(lambda stream, request: stream.sendall(moved(target[0], status))) as server:
            target.append(form.format(port=other.port, same=server.port))
            with pytest.raises(wmi.BadAnswer) as caught:
                client(server, token="secret").show("wmi-one")
        assert other.requests == [] and "secret" not in str(caught.value)
        assert len(server.requests) == 1 and b"\r\nAuthorization: Bearer secret\r\n" in server.requests[0]


@pytest.mark.parametrize(
    "where",
    [
        "file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "javascript:0", "", "http://[", "\x00",
        "http://h:x/", "//", "?", "http://127.0.0.1:99999999/",
    ],
)
def test_redirect_to_nonsense_is_an_error(where):
    """file:, ftp: and other schemes are not opened; a Location that is none is one of our errors."""
    with Scripted(moved(where)) as server, pytest.raises(wmi.Error):
        client(server).show("wmi-one")


@pytest.mark.parametrize("where", ["http://127.0.0.1/other", "ftp://x/", "/circle"])
def test_refused_redirects_leave_nothing_open(where):
    """The connection of a redirect that is not followed is closed at once, not when memory is collected."""
    ended = threading.Event()

    def act(stream, request):
        stream.sendall(moved(where).replace(b"Connection: close\r\n", b""))
        if stream.recv(1) == b"":
            ended.set()

    gc.disable()
    try:
        with Scripted(act) as server:
            with pytest.raises(wmi.Error):
                client(server).show("wmi-one")
            assert ended.wait(SECONDS / 4)
    finally:
        gc.enable()
        gc.collect()


@pytest.mark.parametrize("hops", [5, 6])
def test_redirects_are_counted(hops):
    """At most five are followed."""
    with Scripted(*(moved(f"/{number}") for number in range(hops)), http(SHOWN)) as server:
        if hops == 5:
            assert client(server).show("wmi-one")["id"] == "wmi-one"
        else:
            with pytest.raises(wmi.Error):
                client(server).show("wmi-one")
        assert len(server.requests) == 6


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
@pytest.mark.parametrize(
    "call", [lambda c: c.destroy("wmi-one"), lambda c: c.update("wmi-one", display_name="x")], ids=["DELETE", "PUT"],
)
def test_changes_do_not_follow_redirects(status, call):
    """A DELETE or PUT that is redirected is an error; it is not done elsewhere, nor as a GET."""
    with Scripted(moved("/elsewhere", status), http(SHOWN)) as server:
        with pytest.raises(wmi.Error):
            call(client(server, version="12.03"))
        assert len(server.requests) == 1


# ---- proxies ----


def test_proxies_of_the_environment_are_ignored(monkeypatch):
    """Whatever http_proxy says, the server itself is called."""
    with Scripted(http(SHOWN)) as proxy, Scripted(http(SHOWN)) as server:
        for name in ("http_proxy", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert client(server).show("wmi-one")["id"] == "wmi-one"
        assert (len(proxy.requests), len(server.requests)) == (0, 1)


def test_proxies_are_used_when_asked_for(monkeypatch):
    """With proxies=True the environment's is used, also for a second try."""
    with Scripted(http(b"", "502 X"), http(SHOWN)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert client("http://images.example:81", proxies=True, retries=1).show("wmi-one")["id"] == "wmi-one"
    for request in proxy.requests:
        assert request.startswith(b"GET http://images.example:81/api/images/wmi-one.json HTTP/1.1\r\n")
    assert len(proxy.requests) == 2


def test_https_through_a_proxy(https, certificate, monkeypatch):
    """A tunnel is asked for, and the certificate is the server's; the proxy never sees the account."""
    heads = []

    def open_tunnel(connection):
        heads.append(b"")
        while not heads[-1].endswith(b"\r\n\r\n"):
            heads[-1] += connection.recv(65536)
        connection.sendall(OK + b"A: b\r\n\r\n")
        return https(connection)

    with Scripted(http(b"", "502 X"), GOOD, before=open_tunnel) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        caller = client("https://localhost:81", proxies=True, retries=1, cafile=certificate[0])
        assert caller.show("wmi-one")["id"] == "wmi-one"
        for connect in heads:
            assert connect.startswith(b"CONNECT localhost:81 HTTP/1.") and ACCOUNT.encode() not in connect
        for request in proxy.requests:
            assert request.startswith(b"GET /api/images/wmi-one.json HTTP/1.1\r\n")
        assert len(proxy.requests) == 2


TUNNELS = {"endless": flooding(OK, b"A: b\r\n"), "drip": dripping(b"A: b\r\n", OK), "no": http(b"", "403 No")}


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # http.client of 3.9 leaves its socket to gc
@pytest.mark.parametrize("act", TUNNELS.values(), ids=TUNNELS)
def test_bad_proxies(act, monkeypatch):
    """What a proxy answers to CONNECT is bounded as every answer is."""
    with Scripted(act) as proxy, little_memory(1 << 20):
        monkeypatch.setenv("https_proxy", proxy.url)
        caller = client("https://localhost:81", proxies=True, deadline=0.4)
        assert elapsed(lambda: caller.show("wmi-one"), wmi.BadAnswer, wmi.Unreachable) < 8
        assert ACCOUNT.encode() not in b"".join(proxy.requests)
        gc.collect()


def test_deadline_after_a_late_tunnel(monkeypatch):
    """A proxy that opens the tunnel late leaves the handshake no more than the time that is left."""
    left = []

    def act(stream, request):
        stream.settimeout(0.4)
        with contextlib.suppress(socket.timeout):
            stream.recv(1)
        stream.sendall(OK + b"\r\n")
        stream.settimeout(SECONDS)
        hang(stream, request)

    def shake_hands(context, sock, **options):
        left.append(sock.gettimeout())
        sock.close()
        raise OSError("enough")

    with Scripted(act) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.setattr(ssl.SSLContext, "wrap_socket", shake_hands)
        with pytest.raises(wmi.Error):
            client("https://localhost:81", proxies=True, deadline=0.6).show("wmi-one")
    assert left == [] or left[0] < 0.3  # no handshake if this machine stood still, else less than what a try may take


# ---- time ----


def elapsed(call, *errors):
    """Return how long a call took that must be Unreachable, or one of these errors."""
    began = time.monotonic()
    with pytest.raises(errors or wmi.Unreachable) as caught:
        call()
    assert str(caught.value)
    return time.monotonic() - began


def test_defaults_are_bounded():
    """Without any option there is a timeout of 10 s, a deadline, and a cap on answers."""
    defaults = {name: p.default for name, p in inspect.signature(wmi.Client.__init__).parameters.items()}
    assert defaults["timeout"] == 10 and 10 <= defaults["deadline"] <= 120
    assert defaults["max_answer"] == 64 << 20 and defaults["proxies"] is False


def test_silent_server():
    """A server that says nothing is given up after the timeout."""
    with Scripted(hang) as server:
        assert 0.2 < elapsed(lambda: client(server, timeout=0.3).show("wmi-one")) < 8


@contextlib.contextmanager
def no_room(listener):
    """Fill the backlog of a listener, so that whoever connects is kept waiting while the block runs."""
    listener.listen(0)
    with contextlib.ExitStack() as peers:
        for _ in range(3):
            peer = peers.enter_context(socket.socket())
            peer.setblocking(False)
            peer.connect_ex(listener.getsockname())
        yield


def test_server_that_does_not_accept():
    """A listener whose backlog is full is given up after the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listener, no_room(listener):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert elapsed(lambda: client(url, timeout=0.3).show("wmi-one")) < 8


DRIPS = {
    "status": dripping(b"HTTP/1.1 200 OK"),
    "fields": dripping(b"A: b\r\n", b"HTTP/1.1 200 OK\r\n"),
    "continue": dripping(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": dripping(b" ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
    "chunks": dripping(b"1\r\n \r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "chunk line": dripping(b"1", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;"),
    "error": dripping(b" ", b"HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n"),
    "redirect": dripping(b" ", b"HTTP/1.1 302 F\r\nLocation: /x\r\nContent-Length: 1000000\r\n\r\n"),
}


@pytest.mark.parametrize("drip", DRIPS.values(), ids=DRIPS)
def test_deadline_is_for_the_whole_call(drip):
    """A byte now and then, each within the timeout, does not outlast the deadline."""
    with Scripted(drip) as server:
        caller = client(server, timeout=15, deadline=0.25, retries=5)
        assert elapsed(lambda: caller.show("wmi-one"), wmi.Error) < 8


def test_answer_without_length_at_the_deadline():
    """An answer that only the connection's end would end is not taken as whole when the deadline ends it."""
    body = json.dumps(SHOWN).encode()
    with Scripted(dripping(b" ", b"HTTP/1.1 200 OK\r\n\r\n" + body)) as server:
        assert elapsed(lambda: client(server, timeout=15, deadline=0.3).show("wmi-one")) < 8


def test_deadline_bounds_the_tries_too(monkeypatch):
    """However many tries are allowed, there is none after the deadline, and no pause that would last until then."""
    pauses = []
    monkeypatch.setattr(wmi.time, "sleep", pauses.append)
    for seconds, expected in ((1, [1, 1]), (5, [])):
        with Scripted(http(b"", "503 Busy", f"Retry-After: {seconds}")) as server:
            with pytest.raises(wmi.Error):
                client(server, retries=2, deadline=4).index()
            assert pauses == expected and len(server.requests) == 1 + len(expected)
        pauses.clear()


@pytest.mark.parametrize("interim", [b"100 Continue", b"102 Processing", b"103 Early Hints", b"199 X"])
def test_interim_answers_are_skipped(interim):
    """RFC 9110, 15.2: a client has to read those that it did not ask for; the final answer comes after them."""
    before = b"HTTP/1.1 " + interim + b"\r\nLink: </x>\r\n\r\n"
    with Scripted(before * 3 + http(SHOWN), before + http(["wmi-one"])) as server:
        assert client(server).show("wmi-one")["id"] == "wmi-one"
        assert client(server).destroy("wmi-one") == "wmi-one"


# ---- servers that hurt ----

GOOD = http(SHOWN)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
FLOODS = {
    "status": flooding(b"HTTP/1.1 200 ", b"a"),
    "junk": flooding(b"", b"\x00"),
    "lines of junk": flooding(b"", b"SSH\r\n"),
    "continue": flooding(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "continue with fields": flooding(b"HTTP/1.1 100 Continue\r\n", b"A: b\r\n"),
    "hints": flooding(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "fields": flooding(OK, b"A: b\r\n"),
    "long fields": flooding(OK, b"A: " + b"b" * 60_000 + b"\r\n"),
    "field": flooding(OK + b"A: "),
    "until close": flooding(OK + b"\r\n"),
    "length": flooding(OK + b"Content-Length: 999999999999999999\r\n\r\n"),
    "length -1": flooding(OK + b"Content-Length: -1\r\n\r\n"),
    "chunk -1": flooding(CHUNKED + b"-1\r\n"),
    "chunk": flooding(CHUNKED + b"7fffffffff\r\n"),
    "chunks": flooding(CHUNKED, b"40\r\n" + b" " * 64 + b"\r\n"),
    "little chunks": flooding(CHUNKED, b"1;" + b"a" * 1000 + b"\r\n \r\n"),
    "chunk line": flooding(CHUNKED + b"1;", b"a"),
    "chunk size": flooding(CHUNKED, b"1"),
    "chunk end": flooding(CHUNKED + b"1\r\n ", b"\r"),
    "404": flooding(NO + b"\r\n"),
    "404 length": flooding(NO + b"Content-Length: 999999999999999999\r\n\r\n"),
    "404 chunk -1": flooding(NO + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n"),
    "503": flooding(b"HTTP/1.1 503 No\r\n\r\n"),
    "302": flooding(b"HTTP/1.1 302 F\r\nLocation: /x\r\n\r\n"),
    "302 length": flooding(b"HTTP/1.1 302 F\r\nLocation: /x\r\nContent-Length: 99999999999\r\n\r\n"),
    "302 chunk -1": flooding(b"HTTP/1.1 302 F\r\nLocation: /x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"),
}


@contextlib.contextmanager
def little_memory(at_most):
    """Expect that what runs in the block, in all threads, never holds that many bytes more than before it."""
    tracemalloc = pytest.importorskip("tracemalloc", reason="this Python does not count memory")
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        assert tracemalloc.get_traced_memory()[1] - before < at_most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_floods_take_no_memory(flood):
    """What has no end, wherever in an answer, is BadAnswer or Unreachable, within max_answer and 1 MB, and at once."""
    with Scripted(flood) as server, little_memory((1 << 18) + (1 << 20)):
        caller = client(server, max_answer=1 << 18, deadline=5)
        assert elapsed(lambda: caller.show("wmi-one"), wmi.BadAnswer, wmi.Unreachable) < 8


def test_redirect_with_a_body_without_end_is_followed():
    """The body of a redirect is not read at all."""
    with Scripted(FLOODS["302"], GOOD) as server, little_memory(1 << 20):
        assert client(server).show("wmi-one")["id"] == "wmi-one"


def test_trailers_are_not_read():
    """A chunked answer is whole with its last chunk, whatever comes after it."""
    body = json.dumps(SHOWN).encode()
    begin = CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(body), body)
    with Scripted(flooding(begin, b"A: b\r\n")) as server, little_memory(1 << 20):
        assert client(server).show("wmi-one")["id"] == "wmi-one"


SIZES = ["{:x}", "{:X}", "000{:x}", "{:x};a=b", '{:x} ;a="b"', "{:x}  "]
NO_SIZES = ["-{:x}", "+{:x}", "0x{:x}", "0X{:x}", "{:_x}", "{:x}_0", " {:x}", "\t{:x}", "{:x} 1", "{:x}\x00",
            "{:x},{:x}", "{:x}.0", "{:x}h", "", ";a", "zz", "{:x}\n1", "1" * 16, "{:x}\x0b", "\xb2"]


@pytest.mark.parametrize("size", [*SIZES, *NO_SIZES])
def test_sizes_of_chunks_are_read_strictly(size):
    """A chunk's size is hex digits; what int() would read beside them is refused."""
    body = json.dumps(SHOWN).encode().ljust(0x10000)
    line = size.replace("{:_x}", "1_0000").format(len(body), len(body)).encode("latin-1")
    with Scripted(CHUNKED + line + b"\r\n" + body + b"\r\n0\r\n\r\n") as server:
        if size in SIZES:
            assert client(server).show("wmi-one")["id"] == "wmi-one"
        else:
            with pytest.raises((wmi.BadAnswer, wmi.Unreachable)):
                client(server, timeout=1).show("wmi-one")


@pytest.mark.parametrize(
    "line, end", [("{:x}\n", "\r\n"), ("{:x}\r", "\r\n"), ("{:x}", "\r\n"), ("{:x}\r\n", "\n\n"), ("{:x}\r\n", "XX")],
)
def test_lines_of_chunks_end_with_crlf(line, end):
    """Nothing but CRLF ends the line before a chunk, and the chunk itself."""
    body = json.dumps(SHOWN).encode()
    with Scripted(CHUNKED + line.format(len(body)).encode() + body + end.encode() + b"0\r\n\r\n") as server:
        with pytest.raises((wmi.BadAnswer, wmi.Unreachable)):
            client(server, timeout=1).show("wmi-one")


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Length: {0}\r\nContent-Length: {1}",
        "Content-Length: {0}\r\nContent-Length: {0}",
        "Content-Length: {0}, {0}",
        "Content-Length: {0},{1}",
        "Content-Length: -{0}",
        "Content-Length: +{0}",
        "Content-Length: {0}.0",
        "Content-Length: 0x{0:x}",
        "Content-Length: {0:x}h",
        "Content-Length: {0} 1",
        "Content-Length: 1_{0}",
        "Content-Length: \u00b2",
        "Content-Length: 0000000000000000000{0}",
        "Content-Length: x",
        "Content-Length:",
        "Content-Length: 9" + "9" * 5000,
        "Content-Length: {0}\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: {0}",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding:",
        "Content-Length: {1}",  # one byte less: what is there is not JSON
    ],
)
def test_lengths_that_lie(fields):
    """A length in any form but one plain number is refused, even if the body is good JSON."""
    body = json.dumps(SHOWN).encode()
    head = f"HTTP/1.1 200 OK\r\n{fields.format(len(body), len(body) - 1)}\r\n\r\n".encode("latin-1")
    with Scripted(head + body) as server, pytest.raises(wmi.BadAnswer):
        client(server).show("wmi-one")


def test_what_follows_an_answer_is_not_read():
    """Bytes after the end that Content-Length names are nobody's."""
    with Scripted(GOOD + b"HTTP/1.1 500 No\r\n\r\n" + GOOD) as server:
        assert client(server).show("wmi-one")["id"] == "wmi-one"


def test_statuses_without_a_body_do_not_wait_for_one():
    """204 ends with its head; as an answer it is bad, at once."""

    def act(stream, request):
        stream.sendall(b"HTTP/1.1 204 No\r\n\r\n")
        hang(stream, request)

    with Scripted(act) as server, pytest.raises(wmi.BadAnswer):
        client(server).destroy("wmi-one")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_compressed_answers_are_named(coding):
    """A body that is compressed though nobody asked for it is BadAnswer that says so."""
    body = gzip.compress(json.dumps(SHOWN).encode())
    with Scripted(http(body, "200 OK", f"Content-Encoding: {coding}")) as server:
        with pytest.raises(wmi.BadAnswer, match=coding):
            client(server).show("wmi-one")
        assert b"\r\nAccept-Encoding: identity\r\n" in server.requests[0]


def test_a_number_of_a_million_digits_takes_no_time():
    """A long number is refused by its length: older Pythons need time that grows with its square."""
    body = b'{"id": "wmi-one", "boot_dev_type": ' + b"7" * 2_000_000 + b"}"
    with Scripted(http(body)) as server:
        began = time.process_time()
        with pytest.raises(wmi.BadAnswer):
            client(server).show("wmi-one")
        assert time.process_time() - began < 2


def test_a_late_redirect_into_a_full_backlog():
    """A server that redirects late and then accepts no more does not outlast the deadline."""
    done = threading.Event()

    def act(stream, request):
        with no_room(server.listener):
            done.wait(0.4)
            stream.sendall(moved("/x"))
            done.wait(SECONDS)

    with Scripted(act, b"") as server:
        try:
            assert elapsed(lambda: client(server, timeout=15, deadline=0.5).show("wmi-one")) < 8
        finally:
            server.listener.listen()  # room again: otherwise what ends the server would have to knock twice
            done.set()


def test_each_address_of_a_host_has_its_share_of_the_time(monkeypatch):
    """A host with several addresses that do not answer takes no longer than one."""
    with socket.create_server(("127.0.0.1", 0)) as listener, no_room(listener):
        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", listener.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [address] * 12)
        assert elapsed(lambda: client("http://four.example", timeout=0.5, deadline=0.5).show("wmi-one")) < 4


# ---- trying again ----


def refuse_connections():
    """Return the URL of a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


FAILURES = {
    "502": http(b"<html>", "502 Bad Gateway"),
    "503": http(b"", "503 Busy"),
    "504": http(b"", "504 T"),
    "reset": reset,
    "close": lambda stream, request: None,
    "cut body": http(b"{}", length=50),
    "cut chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "no http": b"SSH-2.0-OpenSSH\r\n",
    "database": error("DatabaseError", 503),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_failures_are_tried_again(failure):
    """Connections that fail, cut answers, 502, 503 and 504 are tried again; then the answer counts."""
    with Scripted(failure, failure, GOOD) as server:
        assert client(server, retries=2).show("wmi-one")["id"] == "wmi-one"
        assert len(server.requests) == 3


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_tries_are_counted(failure):
    """After the last try the failure is raised, as one of our errors with a status for a gateway."""
    with Scripted(failure) as server:
        with pytest.raises(wmi.Error) as caught:
            client(server, retries=2).show("wmi-one")
        assert len(server.requests) == 3
    assert caught.value.status in (502, 503, 504)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 409, 429, 500, 501, 505])
def test_other_errors_are_final(status):
    """What would be the same the next time is not tried again."""
    with Scripted(error("Whatever", status), GOOD) as server:
        with pytest.raises(wmi.Error) as caught:
            client(server, retries=3).show("wmi-one")
        assert len(server.requests) == 1
    assert caught.value.status == status


@pytest.mark.parametrize("failure", ["503", "reset", "cut body"])
@pytest.mark.parametrize(
    "call", [lambda c: c.index(), lambda c: c.destroy("wmi-one"), lambda c: c.update("wmi-one", display_name="x")],
    ids=["GET", "DELETE", "PUT"],
)
def test_each_verb_is_tried_again(failure, call):
    """GET, DELETE and PUT may be sent twice, and are sent the same way again."""
    answer = http({**SHOWN, "total": 0, "start": 0, "limit": None, "results": []})
    with Scripted(FAILURES[failure], answer) as server:
        call(client(server, retries=1, version="12.03"))
        assert len(server.requests) == 2
        assert server.requests[0] == server.requests[1]


def test_nobody_listens():
    """A refused connection is Unreachable, and says where."""
    url = refuse_connections()
    with pytest.raises(wmi.Unreachable, match=url):
        client(url, retries=2).index()


GONE = error("UnknownUUIDResource", 404, "wmi-one")


@pytest.mark.parametrize("loss", ["reset", "close", "cut body", "cut chunks", "no http", "502", "504"])
def test_a_lost_answer_may_have_been_success(loss):
    """After an answer that was lost, here or at a gateway, 404 means success; a 503 in between changes nothing."""
    for acts in ([FAILURES[loss], GONE], [FAILURES[loss], FAILURES["503"], GONE]):
        with Scripted(*acts) as server:
            assert client(server, retries=2).destroy("wmi-one") == "wmi-one"


def test_a_timeout_may_have_been_success():
    """A DELETE that was not answered in time may have been done."""
    with Scripted(hang, GONE) as server:
        assert client(server, timeout=0.2, retries=9).destroy("wmi-one") == "wmi-one"


@pytest.mark.parametrize("refusal", ["503", "database"])
def test_503_says_that_nothing_was_deleted(refusal):
    """404 after a 503 means that the image never existed."""
    with Scripted(FAILURES[refusal], FAILURES[refusal], GONE) as server:
        with pytest.raises(wmi.UnknownUUIDResource):
            client(server, retries=2).destroy("wmi-one")


@pytest.mark.parametrize("change", [lambda it: it.destroy("wmi-one"), lambda it: it.update("wmi-one", description="x")])
def test_a_change_of_unknown_outcome_is_not_repeated(change):
    """The error says to look first: another client may have made a change since."""
    with Scripted(error("DatabaseError", 503, wmi._UNKNOWN), GONE) as server:
        with pytest.raises(wmi.DatabaseError, match="look before trying again"):
            change(client(server, version="12.03", retries=2))
        assert len(server.requests) == 1


@pytest.mark.parametrize("value", [None, 3, "\ud800"])
def test_what_no_form_can_hold_is_not_sent(value):
    """Neither null, which would become the text "None", nor half a surrogate pair."""
    with Scripted() as server, pytest.raises(wmi.InvalidParameter, match="description"):
        client(server, version="12.03").update("wmi-one", description=value)
    with Scripted(error("InvalidParameter", 400, "start")) as server, pytest.raises(wmi.InvalidParameter):
        client(server).index(start="\ud800")


def test_a_request_that_was_not_sent_deleted_nothing(monkeypatch):
    """404 after a connection that was refused means that the image never existed."""
    connect, refused = socket.create_connection, []

    def refuse_once(address, *args, **options):
        if not refused:
            refused.append(address)
            raise ConnectionRefusedError("refused")
        return connect(address, *args, **options)

    monkeypatch.setattr(socket, "create_connection", refuse_once)
    with Scripted(GONE) as server:
        with pytest.raises(wmi.UnknownUUIDResource):
            client(server, retries=1).destroy("wmi-one")
    assert refused


def test_404_of_another_server_is_not_success():
    """After a lost answer only this API's own 404 means that the image is gone."""
    with Scripted(reset, http(b"<html>", "404 Not Found")) as server, pytest.raises(wmi.Error) as caught:
        client(server, retries=1).destroy("wmi-one")
    assert caught.value.status == 404


def test_404_after_a_failure_counts_for_other_verbs():
    """Only DELETE takes a 404 for success."""
    with Scripted(reset, GONE) as server, pytest.raises(wmi.UnknownUUIDResource):
        client(server, retries=1).show("wmi-one")


@pytest.mark.parametrize(
    "asked, slept",
    [
        ("0", 0.001),
        ("1", 1),
        ("3", 3),
        ("3600", 5),
        ("999999999", 5),
        ("-1", 0.001),
        ("x", 0.001),
        ("1.5", 0.001),
        ("9" * 5000, 0.001),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.001),
    ],
)
def test_retry_after_is_honoured_up_to_a_cap(asked, slept, monkeypatch):
    """The pause is as long as the server asks, at most five seconds; what is no number is ignored."""
    pauses = []
    monkeypatch.setattr(wmi.time, "sleep", pauses.append)
    with Scripted(http(b"", "503 Busy", f"Retry-After: {asked}"), GOOD) as server:
        client(server, retries=1, deadline=60).show("wmi-one")
    assert pauses == [slept]


def test_pauses_grow(monkeypatch):
    """Without Retry-After each pause is longer than the one before, up to the cap."""
    pauses = []
    monkeypatch.setattr(wmi.time, "sleep", pauses.append)
    with Scripted(http(b"", "503 Busy")) as server, pytest.raises(wmi.Error):
        client(server, retries=14, deadline=600).show("wmi-one")
    assert pauses == [min(5.0, 0.001 * 2**number) for number in range(14)]


# ---- bodies ----


@pytest.mark.parametrize("missing", [1, 10, 1 << 20])
def test_cut_body(missing):
    """A body shorter than its Content-Length is Unreachable, even if what came is good JSON."""
    body = json.dumps(SHOWN).encode()
    with Scripted(http(body, length=len(body) + missing)) as server, pytest.raises(wmi.Unreachable):
        client(server).show("wmi-one")


@pytest.mark.parametrize("end", [b"", b"5\r\n", b"zz\r\n"])
def test_cut_chunks(end):
    """A chunked body without its last chunk is Unreachable, even if what came is good JSON."""
    body = json.dumps(SHOWN).encode()
    text = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body)
    with Scripted(text + end) as server, pytest.raises(wmi.Unreachable):
        client(server).show("wmi-one")
    with Scripted(text + b"0\r\n\r\n") as server:
        assert client(server).show("wmi-one")["id"] == "wmi-one"


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_too_large_answers_are_refused(spare):
    """An answer of max_answer bytes is read, one byte more is BadAnswer, without a second try."""
    body = json.dumps(SHOWN).encode()
    body += b" " * (200_000 + spare - len(body))
    with Scripted(http(body)) as server:
        if spare <= 0:
            assert client(server, max_answer=200_000).show("wmi-one")["id"] == "wmi-one"
        else:
            with pytest.raises(wmi.BadAnswer):
                client(server, max_answer=200_000, retries=3).show("wmi-one")
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nA: b\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000, b"HTTP/1.1 999999 OK\r\n\r\n", b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"\x00" * 100, b"HTTP/9.9 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 304 No\r\n\r\n",
        b"HTTP/1.1 101 S\r\n\r\n",
    ],
)
def test_broken_answers_are_errors(answer):
    """Whatever a server sends, what is raised is one of our errors."""
    with Scripted(answer) as server, pytest.raises(wmi.Error):
        client(server).show("wmi-one")


# ---- https ----



@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Return the files of a certificate for localhost, signed by itself, and of its key."""
    if not shutil.which("openssl"):
        pytest.skip("the program openssl, which makes a certificate for this test, is not installed")
    return make_certificate(tmp_path_factory.mktemp("tls"), "localhost", "DNS:localhost")


@pytest.fixture
def https(certificate):
    """Return what makes a scripted server speak TLS with a certificate that nobody knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return lambda connection: context.wrap_socket(connection, server_side=True)


def test_unknown_certificate_is_refused(https):
    """Nothing is sent to a server whose certificate is not trusted; the error says what to do, and is final."""
    handshakes = []
    with Scripted(GOOD, before=lambda connection: handshakes.append(1) or https(connection)) as server:
        with pytest.raises(wmi.BadAnswer, match="(?s)certificate.*--cacert.*cafile"):
            client(f"https://localhost:{server.port}", retries=3).show("wmi-one")
        assert server.requests == []
    assert len(handshakes) == 1


def test_cafile_is_trusted(https, certificate):
    """A certificate that cafile holds is trusted, for the name that it has and for no other."""
    with Scripted(GOOD, before=https) as server:
        url = f"https://localhost:{server.port}"
        assert client(url, cafile=certificate[0]).show("wmi-one")["id"] == "wmi-one"
        with pytest.raises(wmi.BadAnswer, match="certificate"):
            client(url.replace("localhost", "127.0.0.1"), cafile=certificate[0]).show("wmi-one")
        assert len(server.requests) == 1


def test_a_cafile_that_is_none_is_named(tmp_path, certificate):
    """A file that is missing, or holds no certificate, is InvalidParameter that names it; over http none is read."""
    (tmp_path / "text").write_text("not a certificate")
    (tmp_path / "empty").write_text("")
    for path in (tmp_path / "missing", tmp_path / "text", tmp_path / "empty", tmp_path, certificate[1], "a\0b"):
        with pytest.raises(wmi.InvalidParameter, match="cafile") as caught:
            wmi.Client("https://127.0.0.1:1", ACCOUNT, cafile=str(path))
        assert str(path) in str(caught.value).replace("\\x00", "\0") or len(str(path)) > 70
    wmi.Client("http://127.0.0.1:1", ACCOUNT, cafile=str(tmp_path / "missing"))


def test_importing_wmi_imports_no_more_of_ssl_than_urllib():
    """ssl is there only if urllib has it; without it wmi works over http."""
    code = "import sys; sys.modules['ssl'] = sys.modules['_ssl'] = None; import wmi; wmi.Client('http://h', 'a-x')"
    code += "; assert sys.modules['ssl'] is None; wmi.main(['list', '--url', 'https://h', '--account', 'a-x'])"
    where = os.path.dirname(os.path.abspath(wmi.__file__))
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "wmi: https: this Python has no ssl module\n")


def test_redirect_over_https(https, certificate):
    """A redirect is followed over TLS too, on a connection as safe as the first."""
    with Scripted(moved("/x"), GOOD, before=https) as server:
        assert client(f"https://localhost:{server.port}", cafile=certificate[0]).show("wmi-one")["id"] == "wmi-one"
        assert server.requests[1].startswith(b"GET /x HTTP/1.1\r\n")


@pytest.mark.parametrize("name", ["until close", "chunk -1", "fields", "continue"])
def test_floods_over_https(https, certificate, name):
    """The bounds are the same over TLS."""
    with Scripted(FLOODS[name], before=https) as server, little_memory(1 << 21):
        with pytest.raises((wmi.BadAnswer, wmi.Unreachable)):
            client(f"https://localhost:{server.port}", cafile=certificate[0], max_answer=1 << 20).show("wmi-one")


@pytest.mark.parametrize("drip", [DRIPS["body"], DRIPS["fields"]])
def test_deadline_over_https(https, certificate, drip):
    """A byte now and then does not outlast the deadline over TLS either."""
    with Scripted(drip, before=https) as server:
        url = f"https://localhost:{server.port}"
        assert elapsed(lambda: client(url, cafile=certificate[0], deadline=0.25).show("wmi-one")) < 8


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_deadline_while_sending(https, certificate, scheme):
    """A server that takes a little of a long request now and then does not outlast the deadline."""

    def read_slowly(connection):
        with connection if scheme == "http" else https(connection) as stream:
            while not stopped.wait(0.005) and (piece := stream.recv(65536)):  # at most 4 MB until the deadline
                sizes.append(len(piece))
        return stream

    sizes, stopped = [], threading.Event()
    with Scripted(b"", before=read_slowly) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        caller = client(f"{scheme}://localhost:{server.port}", cafile=certificate[0], deadline=0.3, version="12.03")
        try:
            assert elapsed(lambda: caller.update("wmi-one", display_name="x" * (16 << 20))) < 6
        finally:
            stopped.set()
    assert sum(sizes) < 10 << 20


def test_https_to_a_server_without_it():
    """A server that does not speak TLS is Unreachable."""
    with Scripted(GOOD) as server, pytest.raises(wmi.Unreachable):
        client(server.url.replace("http:", "https:"), timeout=0.2).show("wmi-one")


def test_deadline_holds_during_the_handshake():
    """A TLS hello that comes byte by byte does not outlast the deadline."""

    def before(connection):
        with contextlib.suppress(OSError):
            connection.settimeout(0.02)
            for byte in itertools.chain(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03", itertools.repeat(0)):
                connection.sendall(bytes([byte]))
                with contextlib.suppress(socket.timeout):
                    if not connection.recv(65536):
                        break
        return connection

    with Scripted(b"", before=before) as server:
        url = server.url.replace("http:", "https:")
        assert elapsed(lambda: client(url, timeout=15, deadline=0.25).show("wmi-one")) < 8


def test_https_works_where_the_certificate_is_trusted(https, certificate, monkeypatch):
    """With a certificate that the system knows, https is like http; an empty cafile is none."""
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    with Scripted(GOOD, before=https) as server:
        assert client(f"https://localhost:{server.port}", cafile="").show("wmi-one")["id"] == "wmi-one"
