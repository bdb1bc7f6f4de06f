"""Image files: ranges and conditions by RFC 9110, no way out of the directory, and files that change while sent."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import itertools
import os
import random
import shutil
import socket
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import parse_answer, read_requests, serving
from support import ACCOUNT, SECONDS, Stuck, connect, image, leaders, make_certificate, until

import wmi

TEXT = random.Random(1).randbytes(1000)
MD5 = hashlib.md5(TEXT, usedforsecurity=False).hexdigest()
TIME = 1_700_000_000  # when the files were written: long ago
E, DATE = f'"{MD5}"', email.utils.formatdate(TIME, usegmt=True)
BEFORE, AFTER = (email.utils.formatdate(TIME + step, usegmt=True) for step in (-1, 1))
PREFIXES = "/api/images", "/api/11.12/images", "/api/12.03/images"
BIG = 20_000_000  # bytes: several times what sockets hold on their way

descriptors_are_listed = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")


def descriptors():
    """Return how many descriptors are open."""
    return len(os.listdir("/proc/self/fd"))


def write(path, content, moment=TIME):
    """Write a file of that time, and return its URI."""
    path.write_bytes(content)
    os.utime(path, (moment, moment))
    return path.as_uri()


def store(uri, **fields):
    """Return a store with one image."""
    storage = wmi.MemoryStorage()
    storage.add(image(source={"uri": uri}, **fields))
    return storage


def ask(served, fields=(), method="GET", path="/api/images/wmi-one/file"):
    """Return status, fields and body of an answer."""
    return served.request(method, path, {"X-VDC-ACCOUNT-UUID": ACCOUNT, **dict(fields)})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A server of a file with a checksum, wmi-one, of an empty one, and of one without checksum."""
    folder = tmp_path_factory.mktemp("files")
    storage = store(write(folder / "one.raw", TEXT), md5sum=MD5)
    for id, content in (("wmi-empty", b""), ("wmi-unsummed", TEXT)):
        storage.add(image(id, source={"uri": write(folder / id, content)}))
    with serving(storage, files=str(folder)) as served:
        yield served


# ---- ranges and conditions ----

# The section of RFC 9110, what is asked, and what is answered: the status, and of 206 start and end.
ALL = 200, 0, 1000
UNMET, SAME, FAILED = (416, 0, 0), (304, 0, 0), (412, 0, 0)
RANGES = [
    ("14.1.2", "bytes=0-9", (206, 0, 10)),
    ("14.1.2", "bytes=0-0", (206, 0, 1)),
    ("14.1.2", "bytes=5-5", (206, 5, 6)),
    ("14.1.2", "bytes=500-", (206, 500, 1000)),
    ("14.1.2", "bytes=0-", (206, 0, 1000)),
    ("14.1.2", "bytes=999-", (206, 999, 1000)),
    ("14.1.2", "bytes=999-999", (206, 999, 1000)),
    ("14.1.2", "bytes=0-999", (206, 0, 1000)),
    ("14.1.2 past the end", "bytes=990-1000", (206, 990, 1000)),
    ("14.1.2 past the end", "bytes=990-" + "9" * 30, (206, 990, 1000)),
    ("14.1.2 suffix", "bytes=-1", (206, 999, 1000)),
    ("14.1.2 suffix", "bytes=-999", (206, 1, 1000)),
    ("14.1.2 suffix", "bytes=-1000", (206, 0, 1000)),
    ("14.1.2 suffix", "bytes=-1001", (206, 0, 1000)),
    ("14.1.2 suffix", "bytes=-" + "9" * 40, (206, 0, 1000)),
    ("14.1.2 suffix", "bytes=-0", UNMET),
    ("14.1.2 suffix", "bytes=-000", UNMET),
    ("14.1.2 zeros", "bytes=00000000000000000000000005-0000000000000000000000006", (206, 5, 7)),
    ("14.1.2 zeros", "bytes=" + "0" * 5000 + "5-6", (206, 5, 7)),
    ("14.1.2 zeros", "bytes=0-" + "0" * 5000, (206, 0, 1)),
    ("15.5.17", "bytes=1000-", UNMET),
    ("15.5.17", "bytes=1000-1001", UNMET),
    ("15.5.17", "bytes=999999999999999999-", UNMET),
    ("15.5.17", "bytes=" + "9" * 5000 + "-", UNMET),
    ("15.5.17", f"bytes={2**64}-", UNMET),
    ("15.5.17", f"bytes={2**64}-{2**65}", UNMET),
    ("14.1 unit in any case", "Bytes=1-2", (206, 1, 3)),
    ("14.1 unit in any case", "BYTES=1-2", (206, 1, 3)),
    ("5.6.1 empty members", "bytes=,1-2", (206, 1, 3)),
    ("5.6.1 empty members", "bytes=1-2, ,", (206, 1, 3)),
    ("5.6.1 blanks", "bytes= \t1-2 ", (206, 1, 3)),
    ("14.2 several", "bytes=0-1,5-6", ALL),
    ("14.2 several", "bytes=0-,0-,0-,0-", ALL),
    ("14.2 several", "bytes=" + ",".join(["0-"] * 500), ALL),
    ("14.2 several", "bytes=2000-,3000-", ALL),
    ("14.2 other unit", "lines=0-1", ALL),
    ("14.2 other unit", "byte=0-1", ALL),
]
MALFORMED = [  # 14.2: answered with all of it
    "", "bytes", "bytes=", "bytes=-", "bytes=,", "bytes=5", "bytes=9-5", "bytes=" + "9" * 30 + "-5", "bytes=--5",
    "bytes=+1-2", "bytes=1-+2", "bytes=1 - 2", "bytes=1-2-3", "bytes=0x1-0x2", "bytes=1_0-20", "bytes=1.5-2",
    "bytes=a-b", "bytes==1-2", "bytes:1-2", "bytes=\u0661-\u0662",  # digits, but not of ASCII
]
R = {"Range": "bytes=1-2"}
CONDITIONS = [
    ("13.1.1 If-Match", {"If-Match": E}, ALL),
    ("13.1.1 If-Match", {"If-Match": "*"}, ALL),
    ("13.1.1 If-Match", {"If-Match": f'"a", {E}'}, ALL),
    ("13.1.1 If-Match", {"If-Match": '"a"'}, FAILED),
    ("13.1.1 compares strongly", {"If-Match": f"W/{E}"}, FAILED),
    ("13.1.1 If-Match", {"If-Match": ""}, FAILED),
    ("13.1.1 with a range", {"If-Match": '"a"', **R}, FAILED),
    ("13.1.1 with a range", {"If-Match": E, **R}, (206, 1, 3)),
    ("13.1.2 If-None-Match", {"If-None-Match": E}, SAME),
    ("13.1.2 compares weakly", {"If-None-Match": f"W/{E}"}, SAME),
    ("13.1.2 If-None-Match", {"If-None-Match": f'"a" , {E}'}, SAME),
    ("13.1.2 If-None-Match", {"If-None-Match": "*"}, SAME),
    ("13.1.2 If-None-Match", {"If-None-Match": '"a"'}, ALL),
    ("13.1.2 If-None-Match", {"If-None-Match": MD5}, ALL),
    ("13.1.2 with a range", {"If-None-Match": E, **R}, SAME),
    ("13.1.2 with a range", {"If-None-Match": '"a"', **R}, (206, 1, 3)),
    ("13.1.3 If-Modified-Since", {"If-Modified-Since": DATE}, SAME),
    ("13.1.3 If-Modified-Since", {"If-Modified-Since": AFTER}, SAME),
    ("13.1.3 If-Modified-Since", {"If-Modified-Since": BEFORE}, ALL),
    ("13.1.3 ignored if If-None-Match", {"If-Modified-Since": DATE, "If-None-Match": '"a"'}, ALL),
    ("13.1.3 no date", {"If-Modified-Since": "yesterday"}, ALL),
    ("13.1.3 no date", {"If-Modified-Since": ""}, ALL),
    ("13.1.3 no date", {"If-Modified-Since": "24:61:61 Jan , GMT Nov"}, ALL),  # IndexError in Python 3.9
    ("13.1.3 no date", {"If-Modified-Since": f"Tue, 14 Nov {'9' * 400} 22:13:20 GMT"}, ALL),
    ("5.6.7 RFC 850", {"If-Modified-Since": "Tuesday, 14-Nov-23 22:13:20 GMT"}, SAME),
    ("5.6.7 asctime", {"If-Modified-Since": "Tue Nov 14 22:13:20 2023"}, SAME),
    ("5.6.7 asctime", {"If-Modified-Since": "Tue Nov 14 22:13:19 2023"}, ALL),
    ("13.1.4 If-Unmodified-Since", {"If-Unmodified-Since": DATE}, ALL),
    ("13.1.4 If-Unmodified-Since", {"If-Unmodified-Since": BEFORE}, FAILED),
    ("13.1.4 with a range", {"If-Unmodified-Since": BEFORE, **R}, FAILED),
    ("13.1.4 ignored if If-Match", {"If-Unmodified-Since": BEFORE, "If-Match": E}, ALL),
    ("13.1.4 no date", {"If-Unmodified-Since": "never"}, ALL),
    ("13.1.5 If-Range", {"If-Range": E, **R}, (206, 1, 3)),
    ("13.1.5 If-Range", {"If-Range": '"a"', **R}, ALL),
    ("13.1.5 compares strongly", {"If-Range": f"W/{E}", **R}, ALL),
    ("13.1.5 If-Range", {"If-Range": MD5, **R}, ALL),
    ("13.1.5 no list", {"If-Range": f'{E}, "a"', **R}, ALL),
    ("13.1.5 no *", {"If-Range": "*", **R}, ALL),
    ("13.1.5 date", {"If-Range": DATE, **R}, (206, 1, 3)),
    ("13.1.5 exactly that date", {"If-Range": AFTER, **R}, ALL),
    ("13.1.5 exactly that date", {"If-Range": BEFORE, **R}, ALL),
    ("13.1.5 empty", {"If-Range": "", **R}, ALL),
    ("13.1.5 without a range", {"If-Range": E}, ALL),
    ("13.1.5 past the end", {"If-Range": E, "Range": "bytes=1000-"}, UNMET),
    ("13.1.5 past the end", {"If-Range": '"a"', "Range": "bytes=1000-"}, ALL),
    ("13.2.2 order", {"If-Match": '"a"', "If-None-Match": E}, FAILED),
    ("13.2.2 order", {"If-Unmodified-Since": BEFORE, "If-None-Match": E}, FAILED),
    ("13.2.2 order", {"If-Match": E, "If-None-Match": E}, SAME),
]
RANGES += [("14.2 malformed", field, ALL) for field in MALFORMED]
CASES = [(section, {"Range": field}, answer) for section, field, answer in RANGES] + CONDITIONS


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "fields, expected", [case[1:] for case in CASES], ids=[f"{n} {case[0]}" for n, case in enumerate(CASES)]
)
def test_ranges_and_conditions(plain, method, fields, expected):
    """Each case is answered as RFC 9110 has it. HEAD knows no ranges (14.2), and has the fields of the answer."""
    status, start, end = expected
    if method == "HEAD" and status in (206, 416):
        status, start, end = ALL
    found, answered, body = ask(plain, fields, method)
    assert found == status
    if status == 416:
        assert answered["content-range"] == "bytes */1000"
    elif status in (200, 206):
        assert body == (TEXT[start:end] if method == "GET" else b"")
        assert int(answered["content-length"]) == end - start
        assert answered.get("content-range") == (f"bytes {start}-{end - 1}/1000" if status == 206 else None)
        assert answered["accept-ranges"] == "bytes"
        assert answered["content-type"] == "application/octet-stream"
        assert answered["content-disposition"] == 'attachment; filename="one.raw"'
        assert answered["x-content-type-options"] == "nosniff"
    else:
        assert body == b"" or status == 412
    if status in (200, 206, 304):
        assert (answered["etag"], answered["last-modified"]) == (E, DATE)
        assert answered["cache-control"] == "private, no-cache"


@pytest.mark.parametrize(
    "field, status", [("bytes=0-", 416), ("bytes=0-0", 416), ("bytes=-0", 416), ("bytes=-1", 200), ("bytes=1-0", 200)]
)
def test_ranges_of_an_empty_file(plain, field, status):
    """Of nothing no first byte can be had; the last so many are all of it (14.1.2)."""
    found, fields, body = ask(plain, {"Range": field}, path="/api/images/wmi-empty/file")
    assert found == status and (status == 416 or body == b"")
    assert fields.get("content-range") == ("bytes */0" if status == 416 else None)


def test_dates_are_never_a_fault():
    """Whatever stands where a date should is a number or None."""
    words = ["Mon,", ",", "Nov", "6", "06-Nov-94", "1994", "08:49:37", "GMT", "-0000", "+9999", ":", "-", "9" * 20, "a"]
    chance = random.Random(1)
    for _ in range(5000):
        text = chance.choice([" ", "", ","]).join(chance.choices(words, k=chance.randrange(1, 8)))
        assert isinstance(wmi._http_date(text), (int, type(None)))


def test_without_a_checksum_the_etag_is_of_the_file(tmp_path):
    """It stays as long as the file does, and is another one after each change, also of the same size and time."""
    path = tmp_path / "a.raw"
    with serving(store(write(path, TEXT)), files=str(tmp_path)) as served:
        first = ask(served)[1]["etag"]
        assert ask(served)[1]["etag"] == first and ask(served, {"If-None-Match": first})[0] == 304
        write(path, TEXT[::-1], TIME + 1)
        second = ask(served)[1]["etag"]
        (tmp_path / "b").write_bytes(TEXT)
        os.utime(tmp_path / "b", (TIME + 1, TIME + 1))
        os.replace(tmp_path / "b", path)
        assert len({first, second, ask(served)[1]["etag"]}) == 3


def test_a_file_written_just_now_has_no_name_yet(tmp_path):
    """A second change could bear the same time, so neither its ETag nor its time continues a range (8.8.1)."""
    path = tmp_path / "a.raw"
    with serving(store(write(path, TEXT)), files=str(tmp_path)) as served:
        for moment in (time.time(), time.time() - 0.5):
            os.utime(path, (moment, moment))
            fields = ask(served)[1]
            for name in ("etag", "last-modified"):
                status, _, body = ask(served, {"If-Range": fields[name], "Range": "bytes=5-"})
                assert (status, body) == (200, TEXT)
            assert ask(served, {"Range": "bytes=5-"})[2] == TEXT[5:]


def test_last_modified_is_never_in_the_future(tmp_path):
    """A file from the future counts as of now (8.8.2.1)."""
    with serving(store(write(tmp_path / "a", TEXT, time.time() + 1e6)), files=str(tmp_path)) as served:
        fields = ask(served)[1]
        assert wmi._http_date(fields["last-modified"]) <= wmi._http_date(fields["date"])


@pytest.mark.parametrize(
    "name, saved",
    [("a b.raw", "a_b.raw"), ("..%2f..%2fb", "b"), (".bashrc", "bashrc"), ("-rf", "rf"), ("%22;x", "__x"),
     ("%0d%0aX:%20y", "__X__y"), ("\u00e9", "_"), ("a" * 250, "a" * 200), ("a.raw?b/c", "a.raw"), ("..", "wmi-one")],
)
def test_the_name_to_save_it_under_is_safe(name, saved, tmp_path):
    """No path, no hidden file, no option, and nothing that ends the header field."""
    record = image(source={"uri": f"file:///x/{name}"})
    (request,) = [each for each in read_requests([b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"]) if each]
    write(tmp_path / "a", TEXT)
    answer = wmi.file_answer(request, record, open(tmp_path / "a", "rb"))
    answer.body.close()
    assert f'; filename="{saved}"\r\n'.encode() in answer.head


# ---- who may, and what there is ----


DELETED = {"state": "deleted", "deleted_at": "2011-11-23T07:36:00Z", "is_public": True}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_who_may_show_an_image_may_have_its_file(prefix, tmp_path):
    """For each caller and image the answer is that of show: the file, or the same error."""
    storage = wmi.MemoryStorage()
    for number, fields in enumerate([{"is_public": True}, {"is_public": False}, DELETED]):
        storage.add(image(f"wmi-{number}", source={"uri": write(tmp_path / f"{number}.raw", TEXT)}, **fields))
    statuses = set()
    with serving(storage, files=str(tmp_path)) as served:
        for caller, id in itertools.product(
            [ACCOUNT, "a-other", "a-00000000", "", "nonsense"], ["wmi-0", "wmi-1", "wmi-2", "wmi-none", "x"]
        ):
            shown = ask(served, {"X-VDC-ACCOUNT-UUID": caller}, path=f"{prefix}/{id}")
            found = ask(served, {"X-VDC-ACCOUNT-UUID": caller}, path=f"{prefix}/{id}/file")
            assert found[0] == shown[0] and found[2] == (TEXT if found[0] == 200 else shown[2])
            statuses.add(found[0])
    assert {200, 400, 404} <= statuses


def test_without_files_there_is_no_such_path(tmp_path):
    """Without the option the path is 404, and so is a longer one with it."""
    uri = write(tmp_path / "a", TEXT)
    with serving(store(uri)) as served:
        assert ask(served)[0] == 404
    with serving(store(uri), files=str(tmp_path)) as served:
        for ending in ("/", ".json", "/..", "/a", "/../file/x"):
            assert ask(served, path=f"/api/images/wmi-one/file{ending}")[0] in (400, 404)


@pytest.mark.parametrize("method, status", [("PUT", 405), ("DELETE", 405), ("POST", 405), ("OPTIONS", 204)])
def test_files_are_only_read(plain, method, status):
    """No other method has an effect; OPTIONS and 405 say which there are."""
    found, fields, _ = ask(plain, method=method)
    assert (found, fields["allow"]) == (status, "GET, HEAD, OPTIONS")
    assert ask(plain)[0] == 200


# ---- no way out ----


@pytest.fixture
def place(tmp_path):
    """A directory of files, and a secret beside it."""
    write(tmp_path / "secret", b"secret")
    (tmp_path / "files" / "sub").mkdir(parents=True)
    write(tmp_path / "files" / "sub" / "in", b"inside")
    return tmp_path / "files"


def linked(target):
    """Return what makes a link and returns its path."""

    def make(place):
        os.symlink(str(target).format(place=place), place / "link")
        return place / "link"

    return make


def made(make):
    """Return what makes a special file and returns its path."""

    def at(place):
        try:
            make(str(place / "special"))
        except PermissionError:
            pytest.skip("only root makes devices")
        return place / "special"

    return at


def bound(path):
    """Make a socket file."""
    with contextlib.chdir(os.path.dirname(path)) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("special" if hasattr(contextlib, "chdir") else path)


OUTSIDE = {
    "..": "{place}/../secret",
    ".. encoded": "{place}/%2e%2e/secret",
    ".. after a folder": "{place}/sub/../../secret",
    "another file": "{place}/../../../../../../../etc/passwd",
    "a name that begins like the directory": "{place}x/secret",
    "/proc": "/proc/self/environ",
    "/proc/root": "/proc/self/root{place}/../secret",
    "the directory": "{place}",
    "the directory with a slash": "{place}/",
    "a folder": "{place}/sub",
    "a file as a folder": "{place}/sub/in/x",
    "nothing": "{place}/none",
    "NUL": "{place}/sub/in%00",
    "a long name": "{place}/" + "a" * 300,
    "a long path": "{place}" + "/a" * 5000,
    "another host": "//elsewhere{place}/sub/in",
    "no slash": "sub/in",
    "a link to a file": linked("{place}/../secret"),
    "a relative link": linked("../secret"),
    "a link to nothing": linked("none"),
    "a link to itself": linked("link"),
    "a folder that is a link": lambda place: f"{linked('{place}/..')(place)}/secret",
    "a link into /proc": linked("/proc/self/environ"),
    "a link through /proc": linked("/proc/self/root/etc/passwd"),
    "a link to /dev/zero": linked("/dev/zero"),
    "a FIFO": made(os.mkfifo),
    "a socket": made(bound),
    "a device": made(lambda path: os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))),
}


@pytest.mark.parametrize("way", OUTSIDE)
def test_no_way_out(way, place):
    """What is not a regular file below the directory is 404, at once, and leaves no descriptor open."""
    path = OUTSIDE[way](place) if callable(OUTSIDE[way]) else OUTSIDE[way].format(place=place)
    uri = f"file:{path}" if str(path).startswith("//") or way == "no slash" else f"file://{path}"
    (place.parent / "filesx").mkdir()
    write(place.parent / "filesx" / "secret", b"secret")
    with serving(store(uri), files=str(place)) as served:
        status, _, body = ask(served)
        before = descriptors() if os.path.isdir("/proc/self/fd") else 0
        for _ in range(5):
            assert ask(served)[0] == 404
        if before:
            until(lambda: descriptors() <= before)
    assert status == 404 and b"secret" not in body and b"root:" not in body


@pytest.mark.parametrize("way", ["plain", "localhost", "encoded", "a link inside", "the directory is a link", "dots"])
def test_ways_that_stay_inside(way, place):
    """Links may lead about below the directory, which may be a link itself; escapes in a URI count as characters."""
    os.symlink(place / "sub", place / "link")
    os.symlink(place, place.parent / "way")
    path = {"encoded": f"{place}/s%75b/in", "a link inside": f"{place}/link/in", "dots": f"{place}/sub/../sub/./in"}
    host = "localhost" if way == "localhost" else ""
    folder = place.parent / "way" if way == "the directory is a link" else place
    with serving(store(f"file://{host}{path.get(way, f'{place}/sub/in')}"), files=str(folder)) as served:
        assert ask(served)[2] == b"inside"


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are always UTF-8")
def test_a_name_that_is_not_utf8(place):
    """The bytes of a name are what the URI escapes."""
    with open(os.fsencode(place) + b"/\xff", "wb") as file:
        file.write(b"inside")
    with serving(store(f"file://{place}/%ff"), files=str(place)) as served:
        assert ask(served)[2] == b"inside"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(place):
    """503, because it is there; the log says why."""
    os.chmod(place / "sub" / "in", 0)
    log = []
    with serving(store(f"file://{place}/sub/in"), log=log.append, files=str(place)) as served:
        assert ask(served)[0] == 503
    assert any("Permission denied" in line for line in log)


@pytest.mark.parametrize("what", ["sub", "sub/in"])
def test_a_link_that_is_put_there_after_the_path_was_resolved(what, place, monkeypatch):
    """Nothing is followed any more once the path was found to be inside."""
    outside = place.parent / "outside"
    outside.mkdir()
    write(outside / "in", b"secret")
    target = outside if what == "sub" else outside / "in"
    resolve = os.path.realpath

    def realpath(path):
        found = resolve(path)
        if str(path).endswith("/in"):
            os.rename(place / what, place.parent / "moved")
            os.symlink(target, place / what)
        return found

    record = image(source={"uri": f"file://{place}/sub/in"})
    monkeypatch.setattr(os.path, "realpath", realpath)
    with pytest.raises(wmi.NotFound):
        wmi.open_image_file(str(place), record)
    assert resolve(place / "sub" / "in") == str(resolve(outside / "in"))


def test_links_that_are_swapped_during_requests(place, request):
    """While links are put in the place of a folder and a file, and back, only what is inside comes out."""
    outside = place.parent / "outside"
    outside.mkdir()
    write(outside / "in", b"secret")
    ended, answers = threading.Event(), set()

    def swap():
        while not ended.is_set():
            os.rename(place / "sub", place / "kept")
            os.symlink(outside, place / "sub")
            os.unlink(place / "sub")
            os.rename(place / "kept", place / "sub")
            os.symlink(outside / "in", place / "link")
            os.replace(place / "link", place / "sub" / "in")
            write(place / "new", b"inside")
            os.replace(place / "new", place / "sub" / "in")

    with serving(store(f"file://{place}/sub/in"), files=str(place)) as served:
        swapping = threading.Thread(target=swap)
        swapping.start()
        try:
            for count in range(20_000 if request.config.getoption("--long") else 200):
                answers.add(ask(served)[::2] if count % 2 else ask(served)[2])
        finally:
            ended.set()
            swapping.join()
        assert ask(served)[2] == b"inside"
    assert {answer for answer in answers if b"secret" in str(answer).encode()} == set()
    assert {answer[0] for answer in answers if isinstance(answer, tuple)} <= {200, 404}


@descriptors_are_listed
def test_a_deep_path_takes_two_descriptors(place, monkeypatch):
    """However deep the file is, the folders on the way are closed at once."""
    deep = place.joinpath(*["d"] * 100)
    deep.mkdir(parents=True)
    record = image(source={"uri": write(deep / "in", TEXT)})
    before, counts, original = descriptors(), [], os.open

    def count(*arguments, **options):
        counts.append(descriptors())
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", count)
        file = wmi.open_image_file(str(place), record)
    with file:
        assert file.read() == TEXT and len(counts) == 102
    assert max(counts) <= before + 1


# ---- while it is sent ----


@pytest.fixture(params=["http", "https"], scope="module")
def tls(request, tmp_path_factory):
    """The options of a server with TLS or without, and what connects to it."""
    if request.param == "http":
        return {}, lambda plain: plain
    if not shutil.which("openssl"):
        pytest.skip("certificates are made by the openssl program")
    names = make_certificate(tmp_path_factory.mktemp("tls"), "files")
    context = ssl.create_default_context(cafile=names[0])
    return {"tls": wmi.tls_context(*names)}, lambda plain: context.wrap_socket(plain, server_hostname="localhost")


@pytest.fixture
def big(tmp_path):
    """A file of many bytes: zeros, and now and then a number; its holes take no time to write."""
    path = tmp_path / "big"
    with open(path, "wb") as file:
        for place in range(0, BIG, 50_000):
            file.seek(place)
            file.write(b"%d" % place)
        file.truncate(BIG)
    os.utime(path, (TIME, TIME))
    return path


GET = f"GET /api/images/wmi-one/file HTTP/1.1\r\nHost: a\r\nX-VDC-ACCOUNT-UUID: {ACCOUNT}\r\n".encode()
CLOSE = b"Connection: close\r\n\r\n"


def rest(peer):
    """Return all that comes until the end or a reset."""
    text = bytearray()
    with contextlib.suppress(OSError):
        while piece := peer.recv(1 << 18):
            text += piece
    return bytes(text)


@contextlib.contextmanager
def downloading(big, tls, requests=GET + CLOSE, log=lambda line: None):
    """Serve the big file, with TLS or without, and ask for it on a connection."""
    options, wrap = tls
    with serving(store(big.as_uri()), log=log, files=str(big.parent), **options) as served:
        with wrap(connect(served)) as peer:
            peer.sendall(requests)
            yield served, peer


@pytest.mark.parametrize(
    "start, end", [(0, 5_000_000), (1, 2), (12345, 2_000_000), (BIG - 5, BIG), (0, 16384), (7, 16392)]
)
def test_a_range_is_sent_exactly(big, tls, start, end):
    """The bytes of the range, no more and no fewer; then the connection goes on."""
    content = memoryview(big.read_bytes())
    ask = GET + b"Range: bytes=%d-%d\r\n" % (start, end - 1)
    with downloading(big, tls, (ask + b"\r\n") * 2 + ask + CLOSE) as (_, peer):
        text = rest(peer)
    at = 0
    for _ in range(3):
        head = text[at : text.index(b"\r\n\r\n", at)]
        assert b" 206 " in head and b"Content-Length: %d" % (end - start) in head and b"chunked" not in head
        at += len(head) + 4
        assert text[at : at + end - start] == content[start:end]
        at += end - start
    assert at == len(text)


def test_junk_on_other_connections_cuts_nothing(big, tls):
    """A handshake that fails is no failure of those who are served meanwhile."""
    text = bytearray()
    with downloading(big, tls) as (served, peer):
        for _ in range(10):
            with connect(served) as other:
                other.sendall(b"nonsense\r\n\r\n")
                rest(other)
            for _ in range(100):  # so that the server sends, until it has to wait again
                text += peer.recv(16384)
        text += rest(peer)
    body = bytes(text).partition(b"\r\n\r\n")[2]
    assert len(body) == BIG and hash(body) == hash(big.read_bytes())


def test_a_disk_that_fails_is_in_the_log(big, tls, monkeypatch):
    """A read error cuts the answer; nothing is wrong with the client, so the log says what is."""
    log = []

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    for name in ("sendfile", "pread"):
        monkeypatch.setattr(os, name, fail, raising=False)
    with downloading(big, tls, log=log.append) as (_, peer):
        assert rest(peer).endswith(b"\r\n\r\n")
        until(lambda: any("error: " in line and "Input/output" in line for line in log))


CHANGES = {
    "shrinks": lambda path: os.truncate(path, 12_288_000),
    "is emptied": lambda path: os.truncate(path, 0),
    "is written to": lambda path: write_at(path, BIG - 1, b"!"),
    "is written to where it was sent": lambda path: write_at(path, 0, b"!"),
    "grows": lambda path: write_at(path, BIG, b"!"),
    "is replaced": lambda path: (write(path.with_suffix(".new"), TEXT), os.replace(path.with_suffix(".new"), path)),
    "is deleted": os.unlink,
}


def write_at(path, place, content):
    """Overwrite some bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_while_it_is_sent(how, big, tls):
    """It is cut before its end, and the log says why; one that was replaced is sent as it was, to its end."""
    log, content = [], big.read_bytes()
    with downloading(big, tls, log=log.append) as (served, peer):
        text = peer.recv(1000)
        CHANGES[how](big)
        with connect(served) as other:  # it serves others meanwhile
            other.sendall(b"nonsense\r\n\r\n")
            assert tls[0] or b" 400 " in other.recv(100)
        text += rest(peer)
    head, _, body = text.partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % BIG in head + b"\r\n"
    if how in ("is replaced", "is deleted"):
        assert len(body) == BIG, log
        assert hash(body) == hash(content)
    else:
        assert len(body) < BIG - 16384 and any("was changed while it was sent" in line for line in log)


@pytest.mark.parametrize("size", [1, 5000, 16384, 16385, 3_000_000])
def test_the_last_piece_is_checked_after_it_was_copied(size, tmp_path, monkeypatch):
    """A change in the moment in which the last bytes are read cuts the answer: they do not leave."""
    path, read = tmp_path / "a", os.pread
    write(path, b"a" * size)

    def pread(*arguments):
        write_at(path, 0, b"!")
        return read(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, open(path, "rb", buffering=0) as file:
        body = wmi.FileBody(file, os.fstat(file.fileno()), 0, size)
        sent = 0
        with pytest.raises(wmi.BadAnswer):
            for _ in range(size):
                count = int(body.more(ours))
                theirs.recv(count, socket.MSG_WAITALL)
                sent += count
        assert sent < size


@descriptors_are_listed
@pytest.mark.parametrize("how", ["hangs up", "reads nothing", "304", "412", "416", "HEAD", "reads all"])
def test_files_are_closed(how, big, tls, monkeypatch):
    """Whatever the answer is and wherever the client goes away, no file stays open."""
    monkeypatch.setattr(wmi, "SEND_SECONDS", 0.3 if how == "reads nothing" else SECONDS)
    lines = {"304": b"If-None-Match: *\r\n", "412": b'If-Match: "a"\r\n', "416": b"Range: bytes=99999999-\r\n"}
    method, there = b"HEAD" if how == "HEAD" else b"GET", str(big.resolve())

    def opened():
        names = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                names.append(os.readlink(f"/proc/self/fd/{name}"))
        return there in names

    with downloading(big, tls, GET.replace(b"GET", method) + lines.get(how, b"") + b"\r\n") as (_, peer):
        text = bytearray(peer.recv(100))
        assert text.startswith(b"HTTP/1.1 %s " % how.encode()) or how not in lines
        if how == "hangs up":
            assert opened()
            peer.close()
        while how == "reads all" and len(text) < BIG:
            text += peer.recv(1 << 18)
        until(lambda: not opened())


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc here")
@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy collects this test's own pieces when it likes")
def test_memory_stays_flat_and_others_are_served(big, tls):
    """While several clients have 40 MB sent, little memory is used, and another client is answered."""
    os.truncate(big, 40_000_000)
    options, wrap = tls
    counts, answered = [], 0

    def fetch(served):
        while not counts or (answered < 3 and len(counts) < 99):  # however long the other waits for a processor
            with wrap(connect(served)) as peer:
                peer.sendall(GET + CLOSE)
                counts.append(sum(map(len, iter(lambda: peer.recv(1 << 16), b""))))

    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with serving(store(big.as_uri()), files=str(big.parent), **options) as served:
        threads = [threading.Thread(target=fetch, args=[served]) for _ in range(3)]
        before = resident()
        for thread in threads:
            thread.start()
        most = before
        while any(thread.is_alive() for thread in threads):
            with wrap(connect(served)) as peer:
                peer.sendall(b"nonsense\r\n\r\n")
                answered += b" 400 " in peer.recv(100)
            most = max(most, resident())
        assert most - before < 10_000_000 and answered >= 3
    assert len(counts) >= 3 and all(0 < count - 40_000_000 < 1000 for count in counts)


def test_readers_that_wait_cost_no_memory(big):
    """Many clients that stop reading a file for a while are not cut for it, and others are answered."""
    with serving(store(big.as_uri()), files=str(big.parent)) as served, contextlib.ExitStack() as peers:
        waiting = [peers.enter_context(connect(served)) for _ in range(100)]
        for peer in waiting:
            peer.sendall(GET + CLOSE)
        assert ask(served, path="/api/images/wmi-one")[0] == 200
        for peer in waiting[::50]:
            assert parse_answer(rest(peer))[2] == big.read_bytes()


def test_a_store_that_is_stuck_does_not_cut_downloads(big):
    """What was begun goes on to its end while the store keeps as many requests waiting as it may."""
    storage = Stuck()
    storage.add(image(source={"uri": big.as_uri()}))
    storage.told.set()
    with serving(storage, files=str(big.parent)) as served, contextlib.ExitStack() as peers:
        peer = peers.enter_context(connect(served))
        peer.sendall(GET + CLOSE)
        text = peer.recv(1000)
        storage.told.clear()
        try:
            for _ in range(2 * wmi.MAX_WAITING):
                peers.enter_context(connect(served)).sendall(GET + CLOSE)
            until(lambda: served.server.service.waiting >= wmi.MAX_WAITING)
            text += rest(peer)
        finally:
            storage.told.set()
    assert parse_answer(text)[2] == big.read_bytes()


def test_a_disk_that_is_stuck_takes_few_threads(big, monkeypatch):
    """Of many downloads from a disk that does not answer, most are cut off; the others, and the clients, are served."""
    told, take, before = threading.Event(), wmi.FileBody.more, leaders()
    told.set()

    def more(self, stream):
        assert told.wait(SECONDS)
        return take(self, stream)

    monkeypatch.setattr(wmi.FileBody, "more", more)
    monkeypatch.setattr(wmi, "WORK_SECONDS", 0.01)
    with serving(store(big.as_uri()), files=str(big.parent)) as served, contextlib.ExitStack() as peers:
        waiting = [peers.enter_context(connect(served)) for _ in range(40)]
        for peer in waiting:
            peer.sendall(GET + CLOSE)
            assert peer.recv(1000).startswith(b"HTTP/1.1 200")
        told.clear()
        peers.callback(told.set)
        counts = peers.enter_context(ThreadPoolExecutor(len(waiting))).map(bytes_of, waiting)
        until(lambda: len(served.server._connections) <= wmi.FileBody.most_waiting)
        assert leaders() - before <= wmi.FileBody.most_waiting + 1
        assert ask(served, path="/nowhere")[0] == 404
        told.set()
        assert max(counts) > BIG - 1000


def bytes_of(peer):
    """Return how many bytes come until the end, or 0 if that is a reset."""
    count = 0
    try:
        while piece := peer.recv(65536):
            count += len(piece)
    except OSError:
        return 0
    return count


def test_a_full_server_of_files_keeps_descriptors(tmp_path):
    """With files a process takes half as many connections, as each may hold an open file."""
    with serving(wmi.MemoryStorage(), max_connections=10**9) as plain:
        with serving(wmi.MemoryStorage(), max_connections=10**9, files=str(tmp_path)) as served:
            assert served.server._max_connections == plain.server._max_connections // 2
