"""The parser's functions and the service without a socket, then answers that are streamed through one.

The raw requests that a server must read or refuse are in corpus.py, each limit at one below, at and one above; what
the API answers in each version is in test_versions.py. Here is what the functions return, what reading costs, and
which answers the service keeps.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import socket
import threading
import time

import pytest
from serving import parse_answer, read_requests, serving, unchunk
from support import ACCOUNT, image

import wmi


def request(target="/api/images", method="GET", account=ACCOUNT, **fields):
    """Return the request that a head with these fields makes."""
    lines = [f"{method} {target} HTTP/1.1", "Host: images.example"]
    lines += [f"X-VDC-ACCOUNT-UUID: {account}"] if account else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return wmi.parse_head("\r\n".join([*lines, "", ""]).encode("latin-1"))


def fields_of(answer):
    """Return the header fields of an answer, names in lower case."""
    pairs = (line.split(": ", 1) for line in answer.head.decode("ascii").split("\r\n") if line)
    return {name.lower(): value for name, value in pairs}


def etag_of(answer):
    """Return the ETag of an answer."""
    return fields_of(answer).get("etag", "")


# ---- heads: RFC 9112, 3 and 5 ----


def test_request_line_is_taken_apart():
    """A request line is method, target and minor version, as sent."""
    assert wmi.parse_request_line(b"GET /api/images?a=b HTTP/1.1") == ("GET", "/api/images?a=b", 1)
    assert wmi.parse_request_line(b"M-SEARCH * HTTP/1.0") == ("M-SEARCH", "*", 0)
    assert wmi.parse_request_line(b"get / HTTP/1.9") == ("get", "/", 9)  # RFC 9110, 9.1: case matters


def test_fields_are_taken_apart():
    """Names are case-insensitive, blanks around a value are not part of it, bytes are latin-1."""
    lines = [b"Host:images.example", b"X-A: \t a b \t", b"x-b:", b"X-C: \xe9:,"]
    assert wmi.parse_fields(lines) == {"host": "images.example", "x-a": "a b", "x-b": "", "x-c": "\xe9:,"}


def test_repeated_fields_are_one_list():
    """RFC 9110, 5.3: fields of one name are joined in order; empty ones too."""
    assert wmi.parse_fields([b"A: 1", b"B: 2", b"a: 3", b"A:"]) == {"a": "1, 3, ", "b": "2"}


@pytest.mark.parametrize(
    "line",
    [
        b"", b"A", b": a", b"A : a", b" A: a", b"\tA: a", b"A\xe9: a", b"A: a\x00", b"A: \x0b", b"A: a\rb", b"A: a\nb",
        b"A: \x7f", b"A(b): c",
    ],
)
def test_field_of_another_form_is_refused(line):
    """RFC 9112, 5.1 and 5.2: no folding, no blank before the colon, no control character."""
    with pytest.raises(wmi.BadRequest):
        wmi.parse_fields([b"Host: a", line])


@pytest.mark.parametrize(
    "host, name",
    [
        ("a", "a"),
        ("Images.example:9001", "images.example"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]", "[::1]"),
        ("[2001:DB8::1.2.3.4]:65535", "[2001:db8::1.2.3.4]"),
        ("a_b", "a_b"),
    ],
)
def test_hosts(host, name):
    """RFC 9110, 7.2: a name, an address, either with a port."""
    assert wmi.parse_host({"host": host}, 1) == name


@pytest.mark.parametrize("host", ["a:", "a:123456"])
def test_no_hosts(host):
    """A port has one to five digits; other hosts that are none are in corpus.py."""
    with pytest.raises(wmi.BadRequest):
        wmi.parse_host({"host": host}, 1)


@pytest.mark.parametrize(
    "target, path, query",
    [
        ("/a/b", "/a/b", ""),
        ("/a?b?c=d", "/a", "b?c=d"),
        ("/?", "/", ""),
        ("//a", "//a", ""),
        ("/a%2fb", "/a%2fb", ""),
        ("http://h/a?b", "/a", "b"),
        ("HTTP://h:80", "/", ""),
        ("http://h?b", "/", "b"),
        ("http://[::1]/x", "/x", ""),
    ],
)
def test_targets(target, path, query):
    """RFC 9112, 3.2.1 and 3.2.2: origin-form and absolute-form, nothing decoded yet."""
    assert wmi.parse_target("GET", target)[1:] == (path, query)


def test_head_is_put_together():
    """A parsed head says everything that the server needs."""
    head = b"PUT http://h/a?b=c HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nConnection: close\r\n"
    head += b"Expect: 100-continue\r\n\r\n"
    assert wmi.parse_head(head)._asdict() == {
        "method": "PUT",
        "target": "http://h/a?b=c",
        "path": "/a",
        "query": "b=c",
        "minor": 1,
        "keep_alive": False,
        "length": 5,
        "chunked": False,
        "expects_continue": True,
        "fields": {"host": "h", "content-length": "5", "connection": "close", "expect": "100-continue"},
        "cache_key": ("http://h/a?b=c", "", "", "h"),
        "host": "h",
        "account": "-",
        "body": b"",
    }


@pytest.mark.parametrize(
    "buffer",
    [
        b"\x16\x03\x01", b"GET / HTTP/1.1\r\nA: \x00", b"GET / HTTP/1.1\nHost", b"GET / HTTP/2.0\r\n", b"a" * 8193,
        b"GET /\r\r", b"PRI * HTTP/2.0\r\n",
    ],
)
def test_hopeless_heads_are_refused_early(buffer):
    """A head that cannot become legal is refused before the rest of it is waited for."""
    with pytest.raises(wmi.Error):
        wmi.check_partial(buffer, 0)


# ---- the reader: RFC 9112, 6 and 7 ----


def body_of(*pieces):
    """Return the body of the first request in these pieces."""
    return next(request for request in read_requests(pieces) if request).body


PUT = b"PUT / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = PUT + b"Transfer-Encoding: chunked\r\n\r\n"


def test_longest_chunk_line():
    """A chunk's size and extensions have a limit of their own."""
    for size in (wmi.MAX_CHUNK_LINE - 1, wmi.MAX_CHUNK_LINE):
        assert body_of(CHUNKED, b"1;" + b"e" * (size - 2) + b"\r\na\r\n0\r\n\r\n") == b"a"
    for line in (b"1;" + b"e" * (wmi.MAX_CHUNK_LINE - 1) + b"\r\n", b"1;" + b"e" * wmi.MAX_CHUNK_LINE):
        with pytest.raises(wmi.BadRequest):
            body_of(CHUNKED, line)


def test_trailers_are_bounded():
    """RFC 9112, 7.1.2: trailers are fields, as many as in a head and not one more."""
    most = b"A: b\r\n" * wmi.MAX_FIELDS
    assert body_of(CHUNKED, b"0\r\n" + most + b"\r\n") == b""
    with pytest.raises(wmi.RequestHeaderFieldsTooLarge):
        body_of(CHUNKED, b"0\r\n" + most + b"A: b\r\n\r\n")
    with pytest.raises(wmi.BadRequest):
        body_of(CHUNKED, b"0\r\nA b\r\n\r\n")
    reader, fed = wmi.Reader(), 0
    reader.feed(CHUNKED + b"0\r\n")
    with pytest.raises(wmi.RequestHeaderFieldsTooLarge):
        for fed in range(100_000):
            reader.read()
            reader.feed(b"A: b\r\n")
    assert fed * len(b"A: b\r\n") <= wmi.MAX_HEAD + 10  # the rest was not even taken


def cost(text, size):
    """Return the processor time of reading text in pieces of this size."""
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    began = time.thread_time()
    assert sum(request is not None for request in read_requests(pieces)) >= 1
    return time.thread_time() - began


def chunks(count):
    """Return a body of so many chunks of one byte each."""
    return b"1\r\na\r\n" * count + b"0\r\n\r\n"


def test_chunks_are_bounded():
    """A chunk costs as much as a KB, however few bytes it has."""
    assert body_of(CHUNKED, chunks(wmi.MAX_CHUNKS - 1)) == b"a" * (wmi.MAX_CHUNKS - 1)
    assert body_of(CHUNKED, chunks(wmi.MAX_CHUNKS)) == b"a" * wmi.MAX_CHUNKS
    with pytest.raises(wmi.ContentTooLarge):
        body_of(CHUNKED, chunks(wmi.MAX_CHUNKS + 1))


def test_cost_of_chunks():
    """HARDENING: 65,536 chunks of one byte cost at most three times as much as a body of that size in one piece."""
    with wmi.MemoryStorage() as storage:
        storage.add(image("wmi-one"))
        service = wmi.Service(storage)

        def seconds(text):
            pieces = [text[start : start + wmi.PIECE] for start in range(0, len(text), wmi.PIECE)]
            began = time.thread_time()
            try:
                status = service.answer(next(filter(None, read_requests(pieces)))).status
            except wmi.Error as error:
                status = service.answer_error(error).status
            return time.thread_time() - began, status

        whole = b"display_name=" + b"a" * (wmi.MAX_BODY - len(b"display_name="))
        put = f"PUT /api/12.03/images/wmi-one HTTP/1.1\r\nHost: a\r\nX-VDC-ACCOUNT-UUID: {ACCOUNT}\r\n".encode()
        least = min(seconds(put + b"Content-Length: 65536\r\n\r\n" + whole) for _ in range(20))
        most = min(seconds(put + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(65536)) for _ in range(20))
        assert (least[1], most[1]) == (200, 413)
        assert most[0] < 3 * least[0], (most, least)


def test_cost_grows_with_the_bytes():
    """HARDENING: pipelined requests cost what they cost one by one."""
    text = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 100
    least = min(cost(text, 16384) for _ in range(5))
    assert min(cost(text * 64, 16384) for _ in range(3)) < 3 * 64 * least


@pytest.mark.parametrize(
    "text",
    [PUT + b"Content-Length: 65536\r\n\r\n" + b"a" * 65536, PUT + (b"A: " + b"b" * 8000 + b"\r\n") * 4 + b"\r\n"],
    ids=["body", "head"],
)
def test_cost_of_a_byte_does_not_grow_with_what_came_before(text):
    """The second half of a request that arrives byte by byte costs about as much as the first."""

    def halves():
        reader, marks = wmi.Reader(), []
        for start in (0, len(text) // 2):
            began = time.thread_time()
            for at in range(start, start + len(text) // 2):
                reader.feed(text[at : at + 1])
                reader.read()
            marks.append(time.thread_time() - began)
        return marks[1] / marks[0]

    assert min(halves() for _ in range(3)) < 3


def test_continue_is_owed_only_where_a_body_is_waited_for():
    """RFC 9110, 10.1.1: not if the body, or its beginning, is there already."""
    head = PUT + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    for piece, owed in ((head, True), (head + b"a", False), (head + b"ab", False)):
        reader = wmi.Reader()
        reader.feed(piece)
        reader.read()
        assert reader.owes_continue is owed


# ---- the service: caching ----


@pytest.fixture(params=["memory", "json", "sqlite"])
def storage(request, tmp_path):
    """Each kind of store, with one image."""
    with wmi.open_storage(f"{request.param}:{tmp_path / 'images'}") as storage:
        storage.add(image())
        yield storage


@pytest.fixture
def lines():
    """Take what the service reports."""
    return []


@pytest.fixture
def service(storage, lines):
    """A service on the store."""
    return wmi.Service(storage, report=lines.append)


def ask(service, request, arrived=None):
    """Return the answer to a request that is a round by itself, and that was asked before."""
    service._asked.add(hash(request.cache_key))
    answer = service.answer(request, arrived)
    service._look()  # by any thread, unlike look()
    return answer


def test_answer_is_kept_while_nothing_changes(service):
    """A question that came before gets the very same answer object from then on."""
    for _ in range(2):
        first = service.answer(request())
        service.look()
    assert service.answer(request()) is first


def test_what_is_asked_once_is_not_kept(service, monkeypatch):
    """Answers to questions that come once are not kept, however many; nor are the questions."""
    monkeypatch.setattr(wmi, "ASKED_AT_MOST", 50)
    for number in range(3 * wmi.ASKED_AT_MOST):
        service.answer(request(f"/api/images?unknown={number}"))
        service.look()
        assert len(service._asked) <= wmi.ASKED_AT_MOST
    assert kept_bytes(service) == 0


def test_what_is_used_is_kept_longest(monkeypatch):
    """Who reads all images pushes out other answers, yet not the one that is asked for again and again."""
    monkeypatch.setattr(wmi, "CACHE_BYTES", 1 << 16)
    storage = wmi.MemoryStorage()
    storage.add(image())
    service = wmi.Service(storage)
    usual, first = ask(service, request()), ask(service, request("/api/images?unknown=0"))
    for number in range(1, 200):
        ask(service, request(f"/api/images?unknown={number}"))
        assert service.answer(request()) is usual
    assert service.answer(request("/api/images?unknown=0")) is not first


class Looked(wmi.MemoryStorage):
    """A store that counts how often it was asked for its revision."""

    looks = 0

    def revision(self):
        """Count, and answer."""
        self.looks += 1
        return super().revision()


def test_one_look_serves_all_that_arrived_before_it():
    """What arrived before a look at the store needs none of its own; what arrived later, or any time, does."""
    storage = Looked()
    storage.add(image(description="first"))
    service = wmi.Service(storage)
    arrived = time.monotonic()
    for _ in range(5):
        assert b"first" in service.answer(request(), arrived).body
    assert storage.looks == 1
    service.look()
    assert storage.looks == 2
    storage.replace("wmi-one", lambda record: {**record, "description": "second"})
    assert b"second" in ask(service, request()).body
    assert storage.looks == 4
    storage.replace("wmi-one", lambda record: {**record, "description": "third"})
    assert b"third" in service.answer(request()).body
    service.answer(request("/api/images/wmi-one"))
    assert storage.looks == 6


class Far(Looked):
    """A store as in a cluster, where each read asks for a revision unless it says that an older one will do."""

    def __init__(self):
        super().__init__()
        self.floors = []

    def at_least(self, revision):
        """Return a store for reads that need no look."""
        self.floors.append(revision)
        return super()

    def get(self, id):
        """Return the record after another look."""
        self.revision()
        return super().get(id)

    def page(self, *args, **options):
        """Return the page after another look."""
        self.revision()
        return super().page(*args, **options)

    def walk(self, *args, **options):
        """Yield the records after another look."""
        self.revision()
        return super().walk(*args, **options)


def test_one_look_serves_what_is_read_after_it():
    """Every read of a request takes the revision that was seen after the request arrived, and needs no other."""
    storage = Far()
    storage.add_all(image(f"wmi-{n}") for n in range(3))
    service, arrived = wmi.Service(storage), time.monotonic()
    targets = (
        "/api/images/wmi-1", "/api/images?limit=1", "/api/images", "/api/12.03/images?service_type=std",
        "/api/12.03/images?sort_by=description.asc",
    )
    for target in targets:
        assert service.answer(request(target), arrived).status == 200
    assert (storage.looks, storage.floors) == (1, [storage.revision()] * len(targets))
    storage.add(image("wmi-new"))
    assert b"wmi-new" in service.answer(request()).body
    assert storage.floors[-1] == storage.revision() != storage.floors[0]


def test_a_change_shows_in_the_very_next_answer(service, storage):
    """A kept answer is used only while the store's revision is the same."""
    for number in range(30):
        storage.replace("wmi-one", lambda record, number=number: {**record, "description": str(number)})
        for target in ("/api/images", "/api/images/wmi-one", "/api/images.yml", "/api/12.03/images?limit=1"):
            assert str(number) in ask(service, request(target)).body.decode()
    storage.delete("wmi-one")
    assert ask(service, request("/api/images/wmi-one")).status == 404
    storage.add(image())
    assert ask(service, request("/api/images/wmi-one")).status == 200


@pytest.mark.parametrize("scheme", ["json", "sqlite"])
def test_a_change_by_another_store_shows_in_the_very_next_answer(scheme, tmp_path):
    """Two stores on one file, as in two processes: neither serves what the other has changed."""
    url = f"{scheme}:{tmp_path / 'images'}"
    with wmi.open_storage(url) as one, wmi.open_storage(url) as other:
        one.add(image())
        services = [wmi.Service(one), wmi.Service(other)]
        for number, writer in zip(range(20), itertools.cycle([one, other])):
            writer.replace("wmi-one", lambda record, number=number: {**record, "description": f"n{number}."})
            for service in services:
                assert f"n{number}." in ask(service, request("/api/images/wmi-one")).body.decode()


class Late:
    """A store that changes between the moment it was read and the moment the answer is kept."""

    def __init__(self, storage):
        self._storage = storage

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def at_least(self, revision):
        """Return this store: its reads are what is late."""
        return self

    def get(self, id):
        """Return the record as it was before a change that is done on return."""
        record = self._storage.get(id)
        self._storage.replace(id, lambda now: {**now, "description": "changed"})
        return record

    def page(self, *args, **options):
        """Return the page as it was before a change that is done on return."""
        page = self._storage.page(*args, **options)
        self.get("wmi-one")
        return page


@pytest.mark.parametrize("target", ["/api/images", "/api/images/wmi-one"])
def test_a_change_during_rendering_is_not_kept(target):
    """An answer that was rendered while the store changed is not served after the change."""
    storage = wmi.MemoryStorage()
    storage.add(image(description="first"))
    late = Late(storage)
    service = wmi.Service(late)
    first = ask(service, request(target))
    assert b"first" in first.body
    late.get, late.page = storage.get, storage.page  # from here on only what was kept could show "first"
    again = ask(service, request(target))
    assert b"changed" in again.body
    assert etag_of(again) != etag_of(first)


class Restored(wmi.MemoryStorage):
    """A store whose revision can be put back, as that of a file by a backup."""

    put_back = ""

    def revision(self):
        """Return the revision that was put back, if one was."""
        return self.put_back or super().revision()


@pytest.mark.parametrize("target", ["/api/images", "/api/images/wmi-one"])
def test_an_answer_from_before_a_restore_is_not_served(target):
    """Content that was read after a change is not kept under the revision before it, which may come back."""
    storage, service, records = Restored(), None, []
    storage.add(image())
    service, arrived = wmi.Service(storage), time.monotonic()
    service.answer(request("/api/images?limit=1"), arrived)  # the look of this round
    before = storage.revision()
    records.append(storage.get("wmi-one"))
    storage.delete("wmi-one")  # by another process
    gone = ask(service, request(target), arrived)
    assert b"wmi-one" not in gone.body or gone.status == 404
    storage.add(records[0])  # the backup
    storage.put_back = before
    assert b"a-shpoolxx" in ask(service, request(target)).body


def test_everything_that_decides_an_answer_is_in_its_key(service, storage):
    """Path, query and account each have answers and ETags of their own, whatever was asked before."""
    storage.add(image("wmi-two", account_id="a-other", is_public=True))
    targets = [
        "/api/images", "/api/images.yml", "/api/images.json", "/api/images?limit=1", "/api/images?start=1",
        "/api/11.12/images", "/api/12.03/images", "/api/12.03/images?is_public=true", "/api/12.03/images?state=deleted",
        "/api/12.03/images?sort_by=id.asc", "/api/images/wmi-one", "/api/11.12/images/wmi-one.yml",
    ]
    fresh = {}
    for target, account in itertools.product(targets, [ACCOUNT, "a-other", "a-third"]):
        fresh[target, account] = ask(wmi.Service(storage), request(target, account=account))
    for _ in range(2):  # rendered, kept
        for (target, account), expected in fresh.items():
            answer = ask(service, request(target, account=account))
            assert (answer.status, answer.body) == (expected.status, expected.body)
    tags = {(etag_of(answer), answer.body) for answer in fresh.values() if answer.status == 200}
    assert len({tag for tag, _ in tags}) == len({body for _, body in tags}) == len(tags)


def test_unversioned_path_does_not_share_answers(storage):
    """The same path under --unversioned 12.03 has another ETag: a proxy between sees two servers."""
    answers = [ask(wmi.Service(storage, name), request()) for name in wmi.VERSIONS]
    assert len({etag_of(answer) for answer in answers}) == 3
    assert len({answer.body for answer in answers}) == 3


def test_etag_survives_a_restart(tmp_path):
    """While a file does not change, each process gives the same ETag."""
    url = f"sqlite:{tmp_path / 'images.db'}"
    tags = []
    for _ in range(2):
        with wmi.open_storage(url) as storage:
            if not tags:
                storage.add(image())
            tags.append(etag_of(ask(wmi.Service(storage), request())))
    assert tags[0] == tags[1]


def test_cache_is_bounded_in_bytes(monkeypatch):
    """However many questions are asked, what is kept stays about at the limit."""
    monkeypatch.setattr(wmi, "CACHE_BYTES", 1 << 18)
    storage = wmi.MemoryStorage()
    storage.add_all(image(f"wmi-{number}", description="x" * 500) for number in range(20))
    service = wmi.Service(storage)
    most = 0
    for number in range(600):
        for _ in range(2):
            assert ask(service, request(f"/api/images?limit=20&unknown={number}")).status == 200
        most = max(most, kept_bytes(service))
    assert 1 << 17 < most < 1 << 19


def test_an_answer_that_takes_the_place_of_another_counts_once(service, storage):
    """The count of bytes is that of what is kept, however often an answer is made anew."""
    for number in range(5):
        storage.replace("wmi-one", lambda record, number=number: {**record, "description": "x" * number})
        ask(service, request())
        assert kept_bytes(service) == len(ask(service, request()).body)


def kept_bytes(service):
    """Return the size of the bodies that a service keeps."""
    assert service._kept_bytes == sum(size for *_, size in service._kept.values())
    return sum(len(answer.body) for _, answer, _ in service._kept.values())


def test_answer_larger_than_the_cache_is_not_kept(monkeypatch):
    """One huge answer does not break the bound."""
    monkeypatch.setattr(wmi, "CACHE_BYTES", 1 << 16)
    storage = wmi.MemoryStorage()
    storage.add(image(description="x" * 100_000))
    service = wmi.Service(storage)
    for number in (0, 0, 1, 1, 2, 2):
        assert ask(service, request(f"/api/images?unknown={number}")).status == 200
        assert kept_bytes(service) <= 1 << 17


def test_errors_are_not_kept(service, storage):
    """Ids that do not exist, asked for by the thousand, fill no memory; and one that appears is shown."""
    for number in (*range(200), *range(200)):
        assert ask(service, request(f"/api/images/wmi-none{number}")).status == 404
    assert kept_bytes(service) == 0
    storage.add(image("wmi-none7"))
    assert ask(service, request("/api/images/wmi-none7")).status == 200


def test_threads_see_each_acknowledged_change(tmp_path):
    """While one thread changes and many ask, no answer is older than the last change before it."""
    with wmi.open_storage(f"sqlite:{tmp_path / 'images.db'}") as storage:
        storage.add(image(description="0"))
        service = wmi.Service(storage)
        done, wrong, stop = [0], [], threading.Event()

        def watch(target):
            while not stop.is_set():
                before = done[0]
                shown = json.loads(ask(service, request(target)).body)
                shown = shown["result"][0] if "result" in shown else shown
                if int(shown["description"]) < before:
                    wrong.append((before, shown["description"]))

        threads = [threading.Thread(target=watch, args=[t]) for t in ("/api/images", "/api/images/wmi-one") * 2]
        for thread in threads:
            thread.start()
        try:
            for number in range(1, 60):
                storage.replace(
                    "wmi-one", lambda record, number=number: {**record, "description": str(number)}
                )
                done[0] = number
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert wrong == []


# ---- the service: conditions ----


def test_a_stale_tag_gets_the_new_answer(service, storage):
    """After a change of what is shown the old tag matches no more; other changes leave it as it is."""
    old = etag_of(ask(service, request("/api/images/wmi-one")))
    storage.add(image("wmi-two"))
    assert ask(service, request("/api/images/wmi-one", If_None_Match=old)).status == 304
    storage.replace("wmi-one", lambda record: {**record, "description": "changed"})
    answer = ask(service, request("/api/images/wmi-one", If_None_Match=old))
    assert answer.status == 200
    assert etag_of(answer) != old


# ---- the service: errors ----


class Failing:
    """A store each of whose calls raises."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        def fail(*args, **options):
            raise self.error

        return fail


CALLS = [
    ("GET", "/api/images"),
    ("GET", "/api/images/wmi-one.yml"),
    ("HEAD", "/api/12.03/images"),
    ("DELETE", "/api/images/wmi-one"),
    ("PUT", "/api/12.03/images/wmi-one?display_name=x"),
]


@pytest.mark.parametrize("method, target", CALLS)
@pytest.mark.parametrize(
    "error", [OSError(5, "secret"), ValueError("secret\nline"), PermissionError(13, "secret", "/secret")],
    ids=["io", "closed", "denied"],
)
def test_a_store_that_fails_is_503(error, method, target, lines):
    """What fails below is DatabaseError: try again later; the reason is in the log and nowhere else."""
    answer = wmi.Service(Failing(error), report=lines.append).answer(request(target, method))
    assert answer.status == 503
    assert fields_of(answer)["retry-after"].isdigit()
    assert b"DatabaseError" in answer.body and b"110" in answer.body
    assert b"secret" not in answer.body + answer.head
    assert "secret" in "".join(lines)


@pytest.mark.parametrize("number, words", [(errno.EINPROGRESS, b"unknown whether"), (errno.EHOSTUNREACH, b"no quorum")])
def test_what_a_cluster_cannot_say_is_told(number, words, lines):
    """A change whose outcome is unknown is not told as one that failed; a missing quorum is named; the log has why."""
    answer = wmi.Service(Failing(OSError(number, "secret")), report=lines.append).answer(
        request("/api/images/wmi-one", "DELETE")
    )
    assert answer.status == 503 and words in answer.body and b"secret" not in answer.body
    assert "secret" in lines[0]


@pytest.mark.parametrize("method, target", CALLS)
def test_a_fault_of_ours_is_500(method, target, lines):
    """An exception that nobody expected is 500 in the API's form; its text is in the log alone."""
    answer = wmi.Service(Failing(RuntimeError("secret")), report=lines.append).answer(
        request(target, method)
    )
    assert answer.status == 500
    assert fields_of(answer)["content-type"].startswith(
        "text/yaml" if target.endswith(".yml") else "application/json"
    )
    assert (
        b"secret" not in answer.body
        and b"RuntimeError" not in answer.body
        and b"Traceback" not in answer.body
    )
    assert len(lines) == 1 and "secret" in lines[0] and target in lines[0]


def test_a_store_that_recovers_is_served_again(storage):
    """Nothing of a failure is remembered."""

    class Sometimes(Failing):
        def __getattr__(self, name):
            return getattr(storage, name) if self.error is None else super().__getattr__(name)

    sometimes = Sometimes(OSError("full"))
    service = wmi.Service(sometimes, report=lambda line: None)
    assert service.answer(request()).status == 503
    sometimes.error = None
    assert service.answer(request()).status == 200


# ---- the service: PUT ----


def put(service, body, kind="application/json", target="/api/12.03/images/wmi-one"):
    """Return the answer to a PUT."""
    return service.answer(request(target, "PUT", Content_Type=kind)._replace(body=body))


@pytest.mark.parametrize("template", ['{{"display_name": {}}}', '{{"image": {}}}', "{}"])
def test_no_depth_of_nesting_is_a_fault(template, lines):
    """Whatever the depth of the JSON, it is refused as a parameter: at no depth is it a 500."""
    storage = wmi.MemoryStorage()
    storage.add(image())
    service = wmi.Service(storage, report=lines.append)
    others = []

    def try_all():  # in a thread, where little of the stack is used: one depth in a thousand may hurt
        for depth in (*range(900, 1010), 5000, *range(9950, 10010), 32000):
            status = put(service, template.format("[" * depth + "]" * depth).encode()).status
            if status != 400:
                others.append((depth, status))

    thread = threading.Thread(target=try_all)
    thread.start()
    thread.join()
    assert others == []
    assert lines == []


# ---- an index that is streamed ----


class Many:
    """A store of very many images that are made up when they are walked."""

    def __init__(self, count, fails_after=None, size=200):
        self.count, self.fails_after, self.size = count, fails_after, size
        self.walked = 0
        self.record = image(description="x" * size)

    def revision(self):
        """Return that nothing changes."""
        return "1"

    def at_least(self, revision):
        """Return this store."""
        return self

    def page(self, account, start, limit, **scope):
        """Return the first records."""
        return self.count, [self._record(n) for n in range(start, min(self.count, start + limit))]

    def walk(self, account=None, *, start=0, **scope):
        """Yield records, and fail where that was asked for."""
        for self.walked in range(start, self.count):
            if self.walked == self.fails_after:
                raise OSError("secret: the disk is gone")
            yield self._record(self.walked)

    def _record(self, number):
        return {**self.record, "id": f"wmi-{number}"}


def pieces_of(answer):
    """Return the pieces of an answer's body, in the order in which they are sent."""
    return iter([answer.body] if isinstance(answer.body, bytes) else iter(lambda: answer.body.more(None), b""))


def test_a_large_index_comes_in_pieces():
    """The first bytes are there after a few images, and no piece is large."""
    storage = Many(1_000_000)
    answer = wmi.Service(storage).answer(request())
    pieces = pieces_of(answer)
    assert next(pieces).startswith(b'{"owner_total":1000000,"start":0,"limit":null,"result":[{"id":"wmi-0"')
    assert storage.walked < 1000
    answer.body.close()
    for piece in itertools.islice(pieces, 50):
        assert 0 < len(piece) < 40_000
    assert storage.walked < 10_000
    assert "content-length" not in fields_of(answer)


@pytest.mark.parametrize("count", [0, 1, wmi.PAGE_AT_ONCE - 1, wmi.PAGE_AT_ONCE, wmi.PAGE_AT_ONCE + 1])
@pytest.mark.parametrize("extension", [".json", ".yml"])
@pytest.mark.parametrize("path", ["/api/images", "/api/11.12/images", "/api/12.03/images"])
def test_streamed_or_not_it_is_the_same_answer(count, path, extension):
    """At the edge between one piece and a stream nothing is lost, doubled or spelled otherwise."""
    answer = wmi.Service(Many(count)).answer(request(f"{path}{extension}?limit=2000"))
    body = b"".join(pieces_of(answer)).decode()
    assert re.findall(r'\bid(?:":"|: )(wmi-\d+)', body) == [f"wmi-{n}" for n in range(count)]
    assert extension == ".yml" or json.loads(body)


def head(minor, method="GET", more=""):
    """Return the raw head of a request for everything."""
    account = f"X-VDC-ACCOUNT-UUID: {ACCOUNT}"
    return f"{method} /api/images HTTP/1.{minor}\r\nHost: a\r\n{account}\r\n{more}\r\n".encode()


def test_stream_in_http_1_1_is_chunked_and_the_connection_goes_on():
    """RFC 9112, 7.1: chunks, the last one empty; then the next request is answered."""
    with serving(Many(5000)) as served:
        text = served.raw(head(1) + head(1, "HEAD") + head(1, more="Connection: close\r\n"))
    status, fields, body = parse_answer(text)
    assert (status, fields["transfer-encoding"], fields.get("connection")) == (200, "chunked", None)
    assert "content-length" not in fields
    assert [row["id"] for row in json.loads(body)["result"]] == [f"wmi-{n}" for n in range(5000)]
    first, second, third = text.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert first.endswith(b"\r\n0\r\n\r\n")
    assert second.endswith(b"\r\n\r\n") and b"[" not in second  # HEAD: the same fields, no body
    assert unchunk(third.partition(b"\r\n\r\n")[2]) == body


def test_stream_in_http_1_0_ends_with_the_connection():
    """RFC 9112, 6.3: HTTP/1.0 knows no chunks, so the end is the connection's, keep-alive or not."""
    with serving(Many(5000)) as served:
        status, fields, body = parse_answer(served.raw(head(0, more="Connection: keep-alive\r\n") + head(0)))
    assert (status, fields["connection"]) == (200, "close")
    assert "transfer-encoding" not in fields and "content-length" not in fields
    assert len(json.loads(body)["result"]) == 5000


def test_a_store_that_fails_in_mid_stream_cuts_the_answer(lines):
    """RFC 9112, 8: the chunk that ends the body is missing, so the client knows; the log has the reason."""
    with serving(Many(5000, fails_after=3000), log=lines.append) as served:
        text = served.raw(head(1) + head(1))
    assert text.startswith(b"HTTP/1.1 200 ") and text.count(b"HTTP/1.1") == 1
    assert not text.endswith(b"0\r\n\r\n") and b"secret" not in text
    assert any("error: " in line and "secret" in line for line in lines)
    with pytest.raises((AssertionError, ValueError)):
        unchunk(text.partition(b"\r\n\r\n")[2])


def test_a_cut_answer_gives_its_place_back(lines, capfd):
    """However often the store fails in mid-stream, connections and threads are free again."""
    with serving(Many(5000, fails_after=3000), log=lines.append, max_connections=2) as served:
        for _ in range(5):
            assert served.raw(head(1)).startswith(b"HTTP/1.1 200 ")
        assert served.request("GET", "/nowhere")[0] == 404
    assert not served.server._connections and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("target", ["/api/12.03/images.yml", "/api/images/wmi-one"])
def test_a_failure_is_told_alike_whether_or_not_an_answer_was_kept(target):
    """The error has the form of the path's version and format, also where the store breaks later."""
    storage = wmi.MemoryStorage()
    storage.add(image())
    service = wmi.Service(storage, report=lambda line: None)
    assert service.answer(request(target)).status == 200
    storage.close()
    kept, fresh = service.answer(request(target)), wmi.Service(storage, report=print).answer(request(target))
    assert kept.status == 503
    assert kept == fresh


def test_a_cut_answer_of_http_1_0_shows():
    """Where only the end of the connection ends an answer, a cut one ends in a reset."""
    with (
        serving(Many(5000, fails_after=3000)) as served,
        socket.create_connection((served.host, served.port), 10) as peer,
    ):
        peer.sendall(head(0))
        with pytest.raises(ConnectionResetError):
            while peer.recv(65536):
                pass


def test_a_client_sees_that_a_stream_was_cut():
    """Our client raises instead of returning part of an index."""
    with serving(Many(5000, fails_after=3000)) as served:
        with pytest.raises(wmi.Unreachable):
            wmi.Client(served.url, ACCOUNT, retries=0).index()


@pytest.mark.parametrize("scheme", ["memory", "json", "sqlite"])
def test_a_change_during_the_stream_does_not_break_it(scheme, tmp_path):
    """A writer is not held up by a slow reader of a stream, and the stream stays a whole JSON text."""
    with wmi.open_storage(f"{scheme}:{tmp_path / 'images'}") as storage:
        storage.add_all(image(f"wmi-{n}", description="x" * 400) for n in range(1500))
        with serving(storage, send_buffer=65536) as served, socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # the server must wait for us
            peer.settimeout(10)
            peer.connect((served.host, served.port))
            peer.sendall(head(1, more="Connection: close\r\n"))
            text = peer.recv(1000)
            storage.add(image("wmi-new"))
            storage.delete("wmi-0")
            storage.replace("wmi-1", lambda record: {**record, "description": "changed"})
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            text += b"".join(iter(lambda: peer.recv(1 << 20), b""))
    shown = [row["id"] for row in json.loads(parse_answer(text)[2])["result"]]
    assert len(set(shown)) == len(shown)
    assert set(shown) - {"wmi-new"} >= {f"wmi-{n}" for n in range(2, 1500)}


def test_memory_of_a_stream_is_bounded():
    """A reader that stops holds back the walk: the server gathers nothing ahead of it."""
    storage = Many(300_000, size=1000)
    with serving(storage) as served, socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        peer.connect((served.host, served.port))
        peer.sendall(head(1))
        peer.recv(1)
        walked = -1
        while walked != storage.walked:  # until it stands still for a while
            walked = storage.walked
            threading.Event().wait(0.1)
        assert walked < 30_000  # what the kernel's buffers hold
