"""fetch: the right bytes or one clear line, whatever is killed, cut, changed, full, planted or hostile."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import serving
from support import ACCOUNT, MODULE, SECONDS, free_port, ignore_surroundings, make_certificate, until
from test_client import Scripted

import wmi

CONTENT = random.Random(1).randbytes(3_000_000)
LM = "Tue, 14 Nov 2023 22:13:20 GMT"


def md5(content):
    """Return the checksum as the catalog holds it."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def image(uri, content=CONTENT, **fields):
    """Return the record of an image with the checksum of this content."""
    given = {"md5sum": md5(content), "source": {"uri": uri}, **fields}
    return wmi.image_record({"id": "wmi-one", "account_id": ACCOUNT, **given})


@contextlib.contextmanager
def catalog(*records, **options):
    """Serve a store with these records; yield its URL."""
    with wmi.MemoryStorage() as storage:
        storage.add_all(records)
        with serving(storage, **options) as served:
            yield served.url


def fetch(url, path, *options, id="wmi-one"):
    """Run the command in this process; return its exit code."""
    output = [] if path is None else ["-O", str(path)]
    return wmi.main(["fetch", id, "--url", url, "--account", ACCOUNT, *output, *options])


@pytest.fixture
def refused(capfd):
    """Return what runs the command, which must fail with exit code 1 and one line, and returns that line."""

    def run(url, path, *options):
        assert fetch(url, path, *options) == 1
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("wmi: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return run


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """No random pause takes long, and no setting of this machine plays a part."""
    ignore_surroundings(monkeypatch)


class Source(Scripted):
    """A server of one file that can do much, and not do it. It counts the bytes that it has sent.

    `cuts` are the numbers of bytes after which one connection after the other is cut; None is a hang.
    """

    def __init__(self, content=CONTENT, *lines, ranges=True, cuts=(), hang=False):
        super().__init__(self.give)
        self.content, self.lines, self.ranges, self.cuts, self.hang = content, lines, ranges, list(cuts), hang
        self.starts = []
        self.uri = f"{self.url}/one.raw"

    def give(self, stream, request):
        """Answer a request by the rules of If-Range, then cut."""
        asked = re.search(rb"\r\nRange: bytes=(\d+)-\r\n", request)
        valid = re.search(rb"\r\nIf-Range: (.*?)\r\n", request)
        known = [line.partition(": ")[2].encode() for line in self.lines]
        start = int(asked[1]) if asked and self.ranges and valid and valid[1] in known else 0
        self.starts.append(start)
        size, end = len(self.content), self.cuts.pop(0) if self.cuts else len(self.content)
        lines = ["HTTP/1.1 200 OK", f"Content-Length: {size - start}", *self.lines, "", ""]
        if start == size:
            lines[:2] = ["HTTP/1.1 416 No", f"Content-Range: bytes */{size}", "Content-Length: 0"]
        elif start:
            lines[0] = "HTTP/1.1 206 Part"
            lines.insert(1, f"Content-Range: bytes {start}-{size - 1}/{size}")
        stream.sendall("\r\n".join(lines).encode() + self.content[start:end])
        while self.hang and end < size and stream.recv(65536):
            pass


def left(folder):
    """Return the names of the files in a folder."""
    return sorted(os.listdir(folder))


def half(url, path, size=1_000_000):
    """Fetch a part of a file from Python, as a client does that is interrupted; return how much has arrived."""

    class Enough(BaseException):
        pass

    def progress(done, total):
        if done >= size:
            raise Enough

    with pytest.raises(Enough):
        wmi.Client(url, ACCOUNT).fetch("wmi-one", str(path), progress)
    assert not path.exists()
    return os.path.getsize(f"{path}.part")


# ---- the right bytes ----


@pytest.fixture
def own(tmp_path):
    """A server that gives out a file of its own, by URL."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one.raw").write_bytes(CONTENT)
    with catalog(image((tmp_path / "files" / "one.raw").as_uri()), files=str(tmp_path / "files")) as url:
        yield url


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An empty folder to fetch to, which is the present one."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    return tmp_path / "out"


def test_by_command(own, out, capfd):
    """The file is there under its name in the source, nothing else is, and the name is printed; no progress."""
    assert fetch(own, None) == 0
    assert capfd.readouterr() == ("one.raw\n", "")
    assert (out / "one.raw").read_bytes() == CONTENT and left(out) == ["one.raw"]


@pytest.mark.parametrize("version", ["document", "11.12", "12.03"])
def test_from_python(version, own, out):
    """Each version fetches, though 12.03 does not show the source; progress hears of all bytes."""
    heard = []
    client = wmi.Client(own, ACCOUNT, version=version)
    path = client.fetch("wmi-one", None, lambda done, total: heard.append((done, total)))
    assert path == ("wmi-one" if version == "12.03" else "one.raw")
    assert (out / path).read_bytes() == CONTENT and heard[-1] == (len(CONTENT), len(CONTENT))


def test_to_standard_output(own, out, capfdbinary):
    """- is standard output: the bytes and nothing else, and no file."""
    assert fetch(own, "-") == 0
    assert capfdbinary.readouterr() == (CONTENT, b"") and left(out) == []


def test_a_reader_that_has_seen_enough(own, out):
    """When the reader of standard output goes, as head does, no traceback is printed."""
    argv = [sys.executable, MODULE, "fetch", "wmi-one", "--url", own, "--account", ACCOUNT, "-O", "-"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout.read(10) == CONTENT[:10]
        command.stdout.close()
        assert command.stderr.read() == b"" and command.wait(SECONDS) == 1


def test_over_tls(tmp_path, out):
    """The options of the client count: the certificate is checked for the file too."""
    if not shutil.which("openssl"):
        pytest.skip("certificates are made by the openssl program")
    names = make_certificate(tmp_path, "fetch")
    (tmp_path / "one.raw").write_bytes(CONTENT)
    record = image((tmp_path / "one.raw").as_uri())
    with catalog(record, files=str(tmp_path), tls=wmi.tls_context(*names)) as url:
        assert fetch(url, None, "--cacert", names[0]) == 0
    assert (out / "one.raw").read_bytes() == CONTENT


def test_another_server_learns_neither_account_nor_token(out, monkeypatch):
    """An http source is asked without them; the part behind # is not sent, and blanks are escaped."""
    monkeypatch.setenv("WMI_TOKEN", "secret")
    with Source() as source, catalog(image(f"{source.url}/a b?c=%20d#e")) as url:
        assert fetch(url, "x") == 0
    (request,) = source.requests
    assert request.startswith(b"GET /a%20b?c=%20d HTTP/1.1\r\n")
    assert ACCOUNT.encode() not in request and b"secret" not in request and b"uthorization" not in request


@pytest.mark.parametrize("content", [b"", b"x"])
def test_small_files(content, out):
    """A file of nothing is a file."""
    with Source(content) as source, catalog(image(source.uri, content)) as url:
        assert fetch(url, "x") == 0
    assert (out / "x").read_bytes() == content and left(out) == ["x"]


@pytest.mark.parametrize(
    "end, name", [("a/..%2f..%2fb", "b"), ("-", "wmi-one"), (".bashrc", "bashrc"), ("", "wmi-one"), ("x/", "wmi-one")]
)
def test_the_name_of_the_source_is_made_safe(end, name, out, capfd):
    """No URI leads elsewhere, hides a file, or makes the bytes go to the terminal."""
    with Source() as source, catalog(image(f"{source.url}/{end}")) as url:
        assert fetch(url, None) == 0
    assert capfd.readouterr().out == f"{name}\n" and left(out) == [name]


def test_the_checksum_may_be_in_capitals(out):
    """Other servers show it so."""
    shown = {"id": "wmi-one", "md5sum": md5(CONTENT).upper()}
    with Source() as source:
        shown["source"] = f"---\n:uri: {source.uri}\n"
        body = json.dumps(shown).encode()
        with Scripted(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body) as server:
            assert fetch(server.url, "x") == 0
    assert (out / "x").read_bytes() == CONTENT


def test_a_file_that_is_there_is_replaced_at_the_end_only(own, out):
    """It stays as it is until all bytes are there and are the right ones."""
    (out / "x").write_bytes(b"old")
    seen = set()
    wmi.Client(own, ACCOUNT).fetch("wmi-one", "x", lambda done, total: seen.add((out / "x").read_bytes()))
    assert seen == {b"old"} and (out / "x").read_bytes() == CONTENT


# ---- interruptions ----


def test_the_name_of_the_source_replaces_no_file(own, out, refused):
    """The name was chosen by whoever registered the image, so a file of this name is not replaced without -O."""
    (out / "one.raw").write_bytes(b"mine")
    assert refused(own, None) == "wmi: one.raw exists already; to replace it, or to use another name, give -O FILE\n"
    with pytest.raises(wmi.FetchError, match="exists already"):
        wmi.Client(own, ACCOUNT).fetch("wmi-one")
    assert (out / "one.raw").read_bytes() == b"mine" and left(out) == ["one.raw"]


def test_the_name_of_the_source_replaces_no_file_that_is_made_meanwhile(own, out, refused, monkeypatch):
    """A download may take an hour; what arrived is kept, and taken by the next call that names a file."""
    with pytest.raises(wmi.FetchError, match="exists already"):
        wmi.Client(own, ACCOUNT).fetch("wmi-one", progress=lambda done, total: (out / "one.raw").write_bytes(b"mine"))
    assert (out / "one.raw").read_bytes() == b"mine" and (out / "one.raw.part").read_bytes() == CONTENT
    os.unlink("one.raw")  # the same by the command, which looks at the name before it fetches
    monkeypatch.setattr(wmi, "_Progress", lambda *what: contextlib.nullcontext(
        lambda done, total: (out / "one.raw").write_bytes(b"mine")))
    (out / "one.raw.part").write_bytes(CONTENT[:-1])
    assert "exists already" in refused(own, None) and (out / "one.raw").read_bytes() == b"mine"
    wmi.Client(own, ACCOUNT).fetch("wmi-one", "one.raw")
    assert (out / "one.raw").read_bytes() == CONTENT and left(out) == ["one.raw"]


@pytest.mark.parametrize("name", ["images.db", "images.db-journal", "images.db-wal", "other.json", "other.json.lock"])
def test_no_store_is_replaced(name, out, refused, monkeypatch):
    """Neither under the name of the source nor with -O: a journal beside a store would be part of it."""
    url = "sqlite:images.db"  # the default
    if name.startswith("other"):
        monkeypatch.setenv("WMI_STORE", url := "json:other.json")
    with wmi.open_storage(url) as storage:
        storage.add(wmi.image_record({"id": "wmi-mine", "account_id": ACCOUNT}))
    before = left(out)
    with catalog(image(f"file:///{name}")) as served:
        assert "is a file of the store itself" in refused(served, name)
        if name not in before:
            assert "is a file of the store itself" in refused(served, None)
    assert left(out) == before
    with wmi.open_storage(url) as storage:
        assert storage.get("wmi-mine")


@pytest.mark.parametrize("path", ["x", "-"])
@pytest.mark.parametrize("lines", [['ETag: "a"'], ["Last-Modified: " + LM, "Date: Tue, 14 Nov 2023 22:13:22 GMT"]])
def test_cut_connections(path, lines, out, capfdbinary):
    """Cut at 20 random places, one call fetches each byte once, by ETag or time, also to standard output."""
    cuts = sorted(random.Random(str(lines)).sample(range(len(CONTENT)), 20))
    with Source(CONTENT, *lines, cuts=cuts) as source, catalog(image(source.uri)) as url:
        assert fetch(url, path) == 0
    assert source.starts == [0, *cuts]
    assert md5(capfdbinary.readouterr().out if path == "-" else (out / "x").read_bytes()) == md5(CONTENT)


@pytest.mark.parametrize("path", ["x", "-"])
@pytest.mark.parametrize("lines", [[], ['ETag: W/"a"'], ["Last-Modified: " + LM, "Date: " + LM], ['ETag: "a"']])
def test_cut_connections_of_a_server_without_ranges(path, lines, out, capfdbinary):
    """It sends all of it again, which is compared and not written twice, so that progress is never lost."""
    cuts = sorted(random.Random(1).sample(range(len(CONTENT)), 5))
    source = Source(CONTENT, *lines, cuts=cuts, ranges=False)
    with source, catalog(image(source.uri, md5sum=None)) as url:
        assert fetch(url, path) == 0
    assert source.starts == [0] * 6
    assert md5(capfdbinary.readouterr().out) == md5(CONTENT if path == "-" else b"x\n")
    assert path == "-" or (out / "x").read_bytes() == CONTENT
    assert [b"If-Range" in each for each in source.requests] == [False] + [lines == ['ETag: "a"']] * 5


def test_kill_of_the_server(command, tmp_path, out, request):
    """Killed at random places and started anew, it is asked for what is missing only."""
    (tmp_path / "one.raw").write_bytes(CONTENT * 3)
    store = f"json:{tmp_path}/images.json"
    with wmi.open_storage(store) as storage:
        storage.add(image((tmp_path / "one.raw").as_uri(), CONTENT * 3))
    options = ["--files", str(tmp_path), "--port", str(free_port()), "--log", "log"]
    servers = [command(*options, store=store)]
    chance = random.Random(2)
    places = sorted(chance.sample(range(len(CONTENT) * 2), 20 if request.config.getoption("--long") else 3))
    heard = [0]

    def progress(done, total):
        assert done >= heard[-1] and total == len(CONTENT) * 3
        heard.append(done)
        if places and done >= places[0]:
            places.pop(0)
            servers.pop().end()
            servers.append(command(*options, store=store))

    wmi.Client(f"http://127.0.0.1:{servers[0].port}", ACCOUNT).fetch("wmi-one", "x", progress)
    servers.pop().end()
    assert not places and (out / "x").read_bytes() == CONTENT * 3
    statuses = re.findall(r"/file (\d+) ", (tmp_path / "log").read_text())
    assert set(statuses) <= {"200", "206"} and statuses[-1] == "206"


def holds(path, size):
    """Return whether a file is there, and larger."""
    return path.exists() and os.path.getsize(path) > size


def test_kill_of_the_client(out, request):
    """Killed at random places, the next one asks for the bytes behind those that are in the file."""
    places = random.Random(3).sample(range(len(CONTENT)), 20 if request.config.getoption("--long") else 3)
    for place in places:
        source = Source(CONTENT, 'ETag: "a"', cuts=[place], hang=True)
        with source, catalog(image(source.uri)) as url:
            argv = [sys.executable, MODULE, "fetch", "wmi-one", "--url", url, "--account", ACCOUNT, "-O", "x"]
            with subprocess.Popen(argv) as command:
                # Any moment will do: most often the last bytes have not arrived yet.
                until(functools.partial(holds, out / "x.part", place * 0.9))
                command.kill()
                assert command.wait(SECONDS) == -signal.SIGKILL
            there = os.path.getsize(out / "x.part")
            assert left(out) == ["x.part", "x.part.json"] and fetch(url, "x") == 0
        assert source.starts == [0, there] and (out / "x").read_bytes() == CONTENT and left(out) == ["x"]
        os.unlink(out / "x")


class Killed(BaseException):
    """What ends a client in the middle of a call."""


@pytest.mark.parametrize("known", [True, False], ids=["md5", "no md5"])
def test_an_end_at_each_operation(known, out, monkeypatch):
    """Ended at the first, second, … operation on files, the next call comes to the right bytes."""
    names = ("open", "unlink", "fsync", "replace", "stat", "fstat")
    for at in range(1, 40):
        count = 0

        def strike(original, *args, at=at, **options):
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return original(*args, **options)

        content = CONTENT[:100_000]
        source = Source(content, 'ETag: "a"')
        with source, catalog(image(source.uri, content, **({} if known else {"md5sum": None}))) as url:
            client = wmi.Client(url, ACCOUNT)
            with monkeypatch.context() as patched:
                stand_in = type("os", (), {"__getattr__": lambda self, name: getattr(os, name)})()
                for name in names:
                    setattr(stand_in, name, functools.partial(strike, getattr(os, name)))
                patched.setattr(wmi, "os", stand_in)
                with contextlib.suppress(Killed):
                    client.fetch("wmi-one", "x")
            assert not (out / "x").exists() or (out / "x").read_bytes() == content
            with contextlib.suppress(wmi.FetchError):  # the last moment in which no note is there, but all bytes
                client.fetch("wmi-one", "x")
            if not (out / "x").exists():
                assert not known and (out / "x.part").read_bytes() == content
                os.unlink(out / "x.part")
                client.fetch("wmi-one", "x")
            assert (out / "x").read_bytes() == content and left(out) == ["x"]
            os.unlink(out / "x")
        if count < at:
            break
    assert 8 < at < 39


def test_all_had_arrived(out):
    """What is whole is not asked for again: by its md5, or because the server says that nothing follows."""
    with Source(CONTENT, 'ETag: "a"') as source:
        for known in ({}, {"md5sum": None}):
            with catalog(image(source.uri, **known)) as url:
                half(url, out / "x", len(CONTENT))
                del source.starts[:]
                assert fetch(url, "x") == 0
                assert source.starts == ([len(CONTENT)] if known else [])
                assert (out / "x").read_bytes() == CONTENT and left(out) == ["x"]
                os.unlink(out / "x")


def test_a_server_that_never_goes_on_is_given_up(out, refused):
    """Tries without progress are counted: then one line, exit 1, and what has arrived stays."""
    with Source(CONTENT, 'ETag: "a"', cuts=[1000] * 99) as source, catalog(image(source.uri)) as url:
        assert "the answer is cut" in refused(url, "x")
    assert source.starts == [0] + [1000] * 4 and left(out) == ["x.part", "x.part.json"]


# ---- what is not the file ----


@pytest.mark.parametrize("known", [True, False], ids=["md5", "no md5"])
@pytest.mark.parametrize("after", [['ETag: "b"'], ['ETag: W/"b"'], [], ["Last-Modified: " + LM]])
def test_a_changed_file(after, known, out, refused):
    """Other bytes than before, with or without another ETag: one line; what has arrived is not touched."""
    source = Source(CONTENT, 'ETag: "a"')
    with source, catalog(image(source.uri, **({} if known else {"md5sum": None}))) as url:
        size = half(url, out / "x")
        source.content, source.lines = CONTENT[::-1], after
        assert "has changed since the fetch began; remove x.part" in refused(url, "x")
    assert (out / "x.part").read_bytes() == CONTENT[:size] and not (out / "x").exists()


def test_a_shorter_file(out, refused):
    """A file that is shorter than what has arrived has changed, though it begins with the same bytes."""
    source = Source(CONTENT, 'ETag: "a"')
    with source, catalog(image(source.uri, md5sum=None)) as url:
        half(url, out / "x")
        source.content, source.lines = CONTENT[:10], []
        assert "has changed" in refused(url, "x")


def test_an_end_of_what_is_sent_again(out, refused):
    """A server without ranges or lengths whose connection ends before the bytes that are here has not sent all."""
    with Source() as source, catalog(image(source.uri, md5sum=None)) as url:
        size = half(url, out / "x")
        source.acts = [b"HTTP/1.1 200 OK\r\n\r\n" + CONTENT[:10]]
        assert "the answer is cut" in refused(url, "x")
    assert (out / "x.part").read_bytes() == CONTENT[:size]


def test_a_changed_catalog(out, refused):
    """A part that was begun for another md5sum is not continued, and not lost."""
    with Source(CONTENT, 'ETag: "a"') as source:
        with catalog(image(source.uri)) as url:
            half(url, out / "x")
        with catalog(image(source.uri, CONTENT[::-1])) as url:
            assert "has changed since the fetch began; remove x.part" in refused(url, "x")
    assert "x.part" in left(out)


def test_a_part_of_another_image(out, refused):
    """The line names the URL of which it is a part."""
    with Source(CONTENT, 'ETag: "a"') as source:
        with catalog(image(source.uri)) as url:
            size = half(url, out / "x")
        with catalog(image(f"{source.url}/two.raw", b"two")) as url:
            assert f"x.part is a part of {source.uri}; remove it, or give another name" in refused(url, "x")
    assert (out / "x.part").read_bytes() == CONTENT[:size]


@pytest.mark.parametrize("note", [None, b"", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"url": 1}'])
def test_a_part_of_which_nothing_is_known(note, own, out, refused):
    """It may be anybody's: it is not overwritten."""
    (out / "x.part").write_bytes(b"mine")
    if note is not None:
        (out / "x.part.json").write_bytes(note)
    assert "x.part exists, but nothing says what it is a part of; remove it" in refused(own, "x")
    assert (out / "x.part").read_bytes() == b"mine"


@pytest.mark.parametrize("path", ["x", "-"])
def test_a_wrong_md5(path, out, capfdbinary):
    """Both sums are named, exit 1, and there is no output file, however often it is tried."""
    with Source() as source, catalog(image(source.uri, b"other")) as url:
        for _ in range(2):
            assert fetch(url, path) == 1
            err = capfdbinary.readouterr().err.decode()
            assert f"the MD5 of what arrived is {md5(CONTENT)}, but the catalog says {md5(b'other')}" in err
            assert ("; remove x.part to fetch the whole file again" in err) == (path == "x") and err.count("\n") == 1
    assert not (out / "x").exists()


@pytest.mark.parametrize("source, said", [
    ({}, "has no file to fetch"),
    ({"uri": "ftp://a/b"}, "has no file to fetch"),
    ({"uri": "http://user:secret@127.0.0.1:1/a"}, "has no file to fetch"),
    ({"uri": "http://"}, "has no file to fetch"),
    ({"uri": "file:///none"}, "the server gives out no file of wmi-one: it must lie below --files DIR"),
])
def test_nothing_to_fetch(source, said, out, refused):
    """One line says why, and no file stays, not even an empty one."""
    with catalog(image("", source=source)) as url:
        assert said in refused(url, "x")
    assert left(out) == []


def test_a_system_without_locks(own, out, refused, monkeypatch):
    """Without fcntl, as on Windows, two fetches could write to one file."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert "needs the module fcntl" in refused(own, "x")
    assert left(out) == []


def test_no_such_image(own, out, refused):
    """The error is that of show."""
    with catalog() as url:
        assert "no such image: wmi-one" in refused(url, "x")
    assert left(out) == []


def test_a_source_that_cannot_be_reached(out, refused):
    """The line names the source, not the server of images."""
    port = free_port()
    with catalog(image(f"http://127.0.0.1:{port}/a")) as url:
        assert f"the source of wmi-one cannot be fetched: http://127.0.0.1:{port}/a: " in refused(url, "x")
    assert left(out) == []


# ---- hostile servers ----

OK, PART = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 206 Part\r\n"
THERE = 1000  # bytes that have arrived
SIZE = 2000
LIES = {
    "a place before": (PART + b'ETag: "a"\r\nContent-Range: bytes 0-1999/2000\r\nContent-Length: 2000\r\n', 0, "206"),
    "a place behind": (PART + b'ETag: "a"\r\nContent-Range: bytes 1001-1999/2000\r\nContent-Length: 999\r\n', 0, "206"),
    "no place": (PART + b'ETag: "a"\r\nContent-Length: 1000\r\n', 0, "206"),
    "a place of no size": (PART + b'ETag: "a"\r\nContent-Range: bytes 1000-1999/*\r\n\r\n', 0, "206"),
    "a negative size": (PART + b'ETag: "a"\r\nContent-Range: bytes 1000-1999/-1\r\n\r\n', 0, "206"),
    "several parts": (PART + b'ETag: "a"\r\nContent-Type: multipart/byteranges; boundary=a\r\n\r\n', 0, "206"),
    "a smaller size": (PART + b'ETag: "a"\r\nContent-Range: bytes 1000-1999/900\r\n\r\n', 0, "has changed"),
    "another ETag": (PART + b'ETag: "b"\r\nContent-Range: bytes 1000-1999/2000\r\n\r\n', 0, "has changed"),
    "a weak ETag": (PART + b'ETag: W/"a"\r\nContent-Range: bytes 1000-1999/2000\r\n\r\n', 0, "has changed"),
    "no ETag": (PART + b"X-No: ETag\r\nContent-Range: bytes 1000-1999/2000\r\n\r\n", 0, "has changed"),
    "a body without end": (PART + b"Content-Range: bytes 1000-1999/2000\r\n\r\n", 9000, "more than 1000 bytes"),
    "a longer body": (
        PART + b"Content-Range: bytes 1000-1999/2000\r\nContent-Length: 1001\r\n", 1001, "more than 1000 bytes"),
    "endless chunks": (
        PART + b"Content-Range: bytes 1000-1999/2000\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n", 1 << 20,
        "more than"),
    "416 of another size": (
        b"HTTP/1.1 416 No\r\nContent-Range: bytes */999\r\nContent-Length: 0\r\n", 0, "has changed"),
    "416 without a size": (b"HTTP/1.1 416 No\r\nContent-Length: 0\r\n", 0, "has changed"),
    "gzip": (OK + b"Content-Encoding: gzip\r\nContent-Length: 2000\r\n", 2000, "gzip"),
    "gzip of a part": (
        PART + b"Content-Range: bytes 1000-1999/2000\r\nContent-Encoding: gzip\r\nContent-Length: 1000\r\n", 1000,
        "gzip"),
    "redirect to another port": (b"HTTP/1.1 302 F\r\nLocation: http://127.0.0.1:1/\r\n", 0, "redirects GET"),
    "redirect to a file": (b"HTTP/1.1 302 F\r\nLocation: file:///etc/passwd\r\n", 0, "redirects GET"),
    "redirect in a circle": (b"HTTP/1.1 302 F\r\nLocation: /x\r\n", 0, "redirects more than 5 times"),
    "304": (b"HTTP/1.1 304 No\r\n", 0, "304"),
    "204": (b"HTTP/1.1 204 No\r\n", 0, "204"),
    "404": (b"HTTP/1.1 404 No\r\nContent-Length: 5\r\n", 5, "404 Not Found from"),
    "two lengths": (OK + b"Content-Length: 2000\r\nContent-Length: 2001\r\n", 1, "how long it is"),
    "no HTTP": (b"nonsense\r\n", 0, "cannot be fetched"),
    "a head without end": (OK + b"A: b\r\n" * 99999, 0, "cannot be fetched"),
}


@pytest.mark.parametrize("there", [0, THERE], ids=["at the start", "in the middle"])
@pytest.mark.parametrize("lie", LIES)
def test_lies(lie, there, out, refused):
    """Whatever a server says, there is one line and no output file; no byte that had arrived is lost or changed."""
    head, length, said = LIES[lie]
    head = head if head.endswith(b"\r\n\r\n") or lie == "endless chunks" else head + b"\r\n"
    content = CONTENT[:SIZE]
    if head.startswith(PART) and b"ETag" not in head:
        head = head.replace(PART, PART + b'ETag: "a"\r\n')
    source = Source(content, 'ETag: "a"', cuts=[THERE], hang=True)
    with source, catalog(image(source.uri, content)) as url:
        if there:
            half(url, out / "x", THERE)
        source.acts = [head + b"x" * length]
        line = refused(url, "x")
        assert said in line or not there, line
    assert not (out / "x").exists()
    if there:
        assert (out / "x.part").read_bytes()[:THERE] == content[:THERE] and len((out / "x.part").read_bytes()) <= SIZE
    assert not any(part for part in left(out) if there == 0 and head.startswith(PART))


def test_a_redirect_on_the_same_server_is_followed(out):
    """It stays with the one that was named, and is asked for the same range."""
    source = Source(CONTENT, 'ETag: "a"', cuts=[1000])
    moved = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
    source.acts = [moved, source.give, moved, source.give]
    with source, catalog(image(source.uri)) as url:
        assert fetch(url, "x") == 0
    assert source.starts == [0, 1000] and (out / "x").read_bytes() == CONTENT


def test_a_part_without_any_validator_is_taken(out):
    """RFC 9110, 15.3.7: an answer to If-Range with a time need not repeat it."""
    lines = ["Last-Modified: " + LM, "Date: Tue, 14 Nov 2023 22:13:22 GMT"]
    source = Source(CONTENT, *lines, cuts=[1000])
    head = b"HTTP/1.1 206 Part\r\nContent-Range: bytes 1000-2999999/3000000\r\nContent-Length: 2999000\r\n\r\n"
    source.acts = [source.give, head + CONTENT[1000:]]
    with source, catalog(image(source.uri)) as url:
        assert fetch(url, "x") == 0
    assert (out / "x").read_bytes() == CONTENT


# ---- two at once, and what is planted ----


def test_two_fetches_to_one_file(own, out, capfd):
    """The second one says so, and does not disturb the first."""
    codes = []

    def progress(done, total):
        if not codes:
            codes.append(fetch(own, "x"))

    wmi.Client(own, ACCOUNT).fetch("wmi-one", "x", progress)
    assert codes == [1] and "x.part is being fetched by another process" in capfd.readouterr().err
    assert (out / "x").read_bytes() == CONTENT and left(out) == ["x"]


def test_many_fetches_to_one_file(own, out):
    """Each of them has all of it or is told that another one fetches; in the end the file is right and alone."""

    def run(number):
        try:
            wmi.Client(own, ACCOUNT).fetch("wmi-one", "x")
            return (out / "x").read_bytes() == CONTENT
        except wmi.FetchError as error:
            return "is being fetched by another process" in str(error)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(20))) == [True] * 20
    assert left(out) == ["x"]


def test_another_fetch_ends_just_before(own, out, monkeypatch):
    """A part that was opened while another process finished it is the file there by now, and not written to."""
    fcntl = pytest.importorskip("fcntl")
    lock = fcntl.flock

    def flock(file, how):
        if not (out / "y").exists():
            os.replace(out / "x.part", out / "y")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert fetch(own, "x") == 0
    assert (out / "x").read_bytes() == CONTENT and (out / "y").read_bytes() == b""


def test_a_refusal_leaves_nothing_locked(own, out):
    """A second try is told the same, though the first error is still looked at."""
    (out / "x.part").write_bytes(b"mine")
    client, errors = wmi.Client(own, ACCOUNT), []
    for _ in range(2):
        with pytest.raises(wmi.FetchError, match="nothing says what") as error:
            client.fetch("wmi-one", "x")
        errors.append(error)


@pytest.mark.parametrize("ending", ["", ".part", ".part.json"])
def test_a_planted_link(ending, own, out, capfd):
    """What a link points to is neither written to nor taken for a part."""
    (out / "victim").write_bytes(b"mine")
    os.symlink("victim", out / f"x{ending}")
    assert fetch(own, "x") == (1 if ending == ".part" else 0)
    err = capfd.readouterr().err
    assert err.startswith("wmi: x.part: ") == (ending == ".part") and err.count("\n") <= 1
    assert (out / "victim").read_bytes() == b"mine"
    assert ending == ".part" or (not (out / "x").is_symlink() and (out / "x").read_bytes() == CONTENT)


@pytest.mark.parametrize("ending", [".part", ".part.json"])
def test_a_planted_fifo(ending, own, out, capfd):
    """Nobody is waited for."""
    os.mkfifo(out / f"x{ending}")
    assert fetch(own, "x") == (1 if ending == ".part" else 0)
    assert ending != ".part" or "x.part is not a regular file" in capfd.readouterr().err
    if ending == ".part.json":
        os.mkfifo(out / "y.part.json")
        (out / "y.part").write_bytes(b"a")
        assert fetch(own, "y") == 1


# ---- disks ----


@contextlib.contextmanager
def tiny_disk(folder):
    """Make a folder a disk of 1 MB; yield what mounts it with other options. Only root can."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("only root can make a disk of its own")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        os.chdir("/")
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("lines", [['ETag: "a"'], []], ids=["ranges", "no ranges"])
def test_a_full_disk(lines, tmp_path, refused):
    """One line names the file; when there is room again, it goes on where it was."""
    (tmp_path / "disk").mkdir()
    with tiny_disk(tmp_path / "disk") as remount, Source(CONTENT, *lines) as source, catalog(image(source.uri)) as url:
        path = tmp_path / "disk" / "x"
        for _ in range(2):
            assert f"{path}.part: No space left on device" in refused(url, path)
        there = os.path.getsize(f"{path}.part")
        assert not path.exists() and there > 800_000
        remount("size=9m")
        assert fetch(url, path) == 0 and path.read_bytes() == CONTENT
        assert source.starts[-1] == (there if lines else 0)


def test_a_read_only_disk(tmp_path, refused, own):
    """One line names the file that cannot be made."""
    (tmp_path / "disk").mkdir()
    with tiny_disk(tmp_path / "disk") as remount:
        remount("ro")
        assert f"{tmp_path / 'disk' / 'x'}.part: Read-only file system" in refused(own, tmp_path / "disk" / "x")


def test_a_limit_of_the_size_of_files(own, out):
    """The same as a full disk, for those who are not root."""
    argv = [sys.executable, MODULE, "fetch", "wmi-one", "--url", own, "--account", ACCOUNT, "-O", "x"]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1_000_000, hard))
    ended = subprocess.run(argv, preexec_fn=limit, capture_output=True, text=True, timeout=SECONDS)
    assert (ended.returncode, ended.stderr) == (1, "wmi: x.part: File too large\n")
    assert os.path.getsize("x.part") == 1_000_000
    assert fetch(own, "x") == 0 and (out / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("path, said", [
    ("none/x", "none/x.part: No such file or directory"),
    ("y/x", "y/x.part: Not a directory"),
    (".", ". is not a regular file; name one with -O, or - for standard output"),
    ("a" * 300, "File name too long"),
])
def test_places_that_cannot_be(path, said, own, out, refused):
    """One line names what is wrong, before a byte is asked for."""
    (out / "y").write_bytes(b"")
    assert said in refused(own, path)
    assert left(out) == ["y"]


def test_a_device_is_not_replaced(own, out, refused):
    """A FIFO or a device stays what it is: what arrives can be written there by -O -."""
    os.mkfifo("pipe")
    assert "pipe is not a regular file" in refused(own, "pipe")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode) and left(out) == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_standard_output_on_a_full_disk(own, out):
    """The line names standard output."""
    argv = [sys.executable, MODULE, "fetch", "wmi-one", "--url", own, "--account", ACCOUNT, "-O", "-"]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    assert (ended.returncode, ended.stderr) == (1, "wmi: standard output: No space left on device\n")


# ---- progress ----


class Terminal(io.StringIO):
    """A text that says that it is a terminal."""

    def isatty(self):
        """Say so."""
        return True


def test_progress_on_a_terminal(out, monkeypatch):
    """It shows how much of how much has come, the rate and the time left; the line is wiped at the end."""
    terminal = Terminal()
    source = Source()

    def slowly(stream, request):
        stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
        end, place = time.monotonic() + SECONDS, 0
        while "left" not in terminal.getvalue() and time.monotonic() < end:
            stream.sendall(CONTENT[place : place + 1000])
            place += 1000
            threading.Event().wait(0.01)
        stream.sendall(CONTENT[place:])

    source.acts = [slowly]
    with source, catalog(image(source.uri)) as url, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        assert fetch(url, "x") == 0
    shown = terminal.getvalue()
    assert re.search(r"\rfetched \d\.\d of 2\.9 MiB, \d+\.\d MiB/s, \d+:\d\d left\x1b\[K", shown), shown
    assert shown.endswith("\r\x1b[K")


# ---- other servers ----


def test_http_server_of_python(tmp_path, out):
    """python3 -m http.server has no ranges: it sends all again, and the part is kept and compared."""
    (tmp_path / "one.raw").write_bytes(CONTENT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        server.handle_error = lambda *args: None  # the client that is interrupted
        try:
            with catalog(image(f"http://127.0.0.1:{server.server_port}/one.raw")) as url:
                half(url, out / "x")
                assert fetch(url, "x") == 0
        finally:
            server.shutdown()
    assert (out / "x").read_bytes() == CONTENT and left(out) == ["x"]


def test_nginx(tmp_path, out):
    """An interrupted fetch from nginx goes on with a range, which is all that its log shows the second time."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if not program:
        pytest.skip("nginx is not installed")
    (tmp_path / "www").mkdir()
    tmp_path.chmod(0o755)
    (tmp_path / "www" / "one.raw").write_bytes(CONTENT)
    port = free_port()
    (tmp_path / "conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error; events {{}}\n"
        f"http {{ access_log {tmp_path}/log combined; client_body_temp_path {tmp_path}/a; proxy_temp_path {tmp_path}/b;"
        f" fastcgi_temp_path {tmp_path}/c; uwsgi_temp_path {tmp_path}/d; scgi_temp_path {tmp_path}/e;"
        f" server {{ listen 127.0.0.1:{port}; root {tmp_path}/www; }} }}\n"
    )
    argv = [program, "-e", str(tmp_path / "error"), "-c", str(tmp_path / "conf")]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as server:
        try:

            def answers():
                assert server.poll() is None
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), SECONDS).close()
                    return True

            until(answers)
            with catalog(image(f"http://127.0.0.1:{port}/one.raw")) as url:
                there = half(url, out / "x")
                assert fetch(url, "x") == 0
            until(lambda: (tmp_path / "log").read_text().count("\n") >= 2)
        finally:
            server.terminate()
    assert (out / "x").read_bytes() == CONTENT and left(out) == ["x"]
    assert f'" 206 {len(CONTENT) - there} ' in (tmp_path / "log").read_text()
