"""Raw requests against the running server: the corpus in every mode, and mutations of it."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator

import pytest
from corpus import (
    BODY_LIMIT,
    CASES,
    FIELD_LIMIT,
    HEAD_LIMIT,
    LINE_LIMIT,
    MODES,
    Case,
    Peer,
    Server,
    Wrong,
    in_chunks,
    long_body,
    long_head,
    many_fields,
    play,
    put,
    request,
    sized,
)
from fuzz import REFUSED, SERVED, compare, mutations, of_head, verdicts
from serving import read_requests, serving

import wmi

SECONDS = 8.0  # for one exchange; below the server's deadlines, so that a hang is seen as one


@pytest.fixture(scope="module")
def count(pytestconfig: pytest.Config) -> int:
    """Return how many mutated texts one test tries."""
    return 20000 if pytestconfig.getoption("--long", False) else 250


@pytest.fixture(scope="module")
def log() -> list[str]:
    """Return the list that takes the server's log lines."""
    return []


@pytest.fixture(scope="module")
def server(log: list[str]) -> Iterator[Server]:
    """Run our server with one image and say where it is."""
    storage = wmi.open_storage("memory:")
    wmi.Catalog(storage).register({"id": "wmi-corpus", "account_id": "a-shpoolxx"})
    with serving(storage, log=log.append) as served:
        yield Server(served.host, served.port, seconds=SECONDS)
    storage.close()


@pytest.fixture(autouse=True)
def _silence(log: list[str], capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No request makes a traceback, or a line in the log about a fault of ours."""
    start = len(log)
    yield
    captured = capfd.readouterr()
    assert captured.err == ""
    assert not [line for line in log[start:] if " error: " in line]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, server: Server) -> None:
    """A raw request gets the answer of its case, no other, and the connection its end, in every mode of sending."""
    for mode in MODES:
        try:
            play(case, mode, server)
        except Wrong as wrong:
            pytest.fail(f"sent as {mode}: {wrong}")


def test_corpus_is_large_and_named() -> None:
    """There are at least 400 cases, each with a name and a text of its own."""
    assert len(CASES) >= 400
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({case.raw for case in CASES}) == len(CASES)


@pytest.mark.parametrize("part", range(8))
def test_mutations(part: int, count: int, server: Server) -> None:
    """A mutated text makes no hang and no second answer, and is judged as by a second reader."""
    for text in mutations(count, f"texts {part}"):
        with contextlib.closing(Peer(server.host, server.port, SECONDS)) as peer:
            try:
                compare(text, peer)
            except Wrong as wrong:
                pytest.fail(f"{wrong}, for {text!r}")


def test_head_mutations(count: int) -> None:
    """The head parser and a second reader agree on mutated heads, and nothing else escapes."""
    for text in mutations(80 * count, "heads"):
        head = text.lstrip(b"\r\n").partition(b"\r\n\r\n")[0]
        verdict, _ = of_head(head)
        try:
            parsed = wmi.parse_head(head + b"\r\n\r\n")
        except wmi.Error as error:
            found = f"{error.status} {error}"
        else:
            found = f"{SERVED} {parsed.method} {not parsed.keep_alive}"
        if verdict.outcome == SERVED:
            assert found == f"{SERVED} {verdict.method.decode()} {verdict.closing}", head
        elif verdict.outcome == REFUSED:
            assert re.match("4[0-9][0-9] |50[15] ", found), head


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17])
def test_pieces_of_a_pipeline(size: int, server: Server) -> None:
    """Requests that arrive in pieces of any size are answered in order, one answer each."""
    cases = [case for case in CASES if case.name.startswith("pipeline") and not case.closes]
    for case in cases:
        with contextlib.closing(Peer(server.host, server.port, SECONDS)) as peer:
            peer.send(case.raw + request(b"Connection: close"), size)
            for number, status in enumerate((*case.answers, 200)):
                assert peer.answer(head=number in case.heads).status == status
            peer.end()


def read_all(pieces: Iterable[bytes]) -> list[str]:
    """Return what the server's reader makes of a stream: its requests, then how it ends."""
    read = []
    try:
        for found in read_requests(pieces):
            if found:
                read.append(f"{found.method} {found.target} {found.body!r}")
            if found and not found.keep_alive:
                return [*read, "closed"]
    except wmi.Error as error:
        read.append(type(error).__name__)
    return read


@pytest.mark.parametrize(
    ("version", "field", "expected"),
    [
        (b"HTTP/1.1", b"Expect: 100-continue", True),
        (b"HTTP/1.1", b"X-Expect: 100-continue", False),
        (b"HTTP/1.0", b"Expect: 100-continue", False),
    ],
)
def test_continue(version: bytes, field: bytes, expected: bool) -> None:
    """A client that waits with its body is told to go on, no other is, and none of HTTP/1.0."""
    head, end, body = put(field, b"Content-Length: 5", body=b"hello", version=version).rpartition(b"\r\n\r\n")
    reader = wmi.Reader()
    reader.feed(head + end)
    assert reader.read() is None and reader.owes_continue == expected
    reader.feed(body)
    found = reader.read()
    assert found is not None and found.body == b"hello"


@pytest.mark.parametrize("case", [c for c in CASES if len(c.raw) < 1000], ids=lambda c: c.name)
def test_every_split(case: Case) -> None:
    """A request reads the same wherever it is cut into two pieces, and byte by byte."""
    whole = read_all([case.raw])
    assert read_all(bytes([byte]) for byte in case.raw) == whole
    for cut in range(1, len(case.raw)):
        assert read_all((case.raw[:cut], case.raw[cut:])) == whole, cut


@pytest.mark.parametrize("case", [c for c in CASES if len(c.raw) >= 1000], ids=lambda c: c.name)
def test_split_of_line_ends(case: Case) -> None:
    """A long request reads the same when CR and LF come apart, or the last bytes one by one."""
    whole = read_all([case.raw])
    assert read_all(re.split(rb"(?<=\r)", case.raw)) == whole
    assert read_all(re.split(rb"(?=\r)", case.raw)) == whole
    start = case.raw[:-9]
    assert read_all([start, *(bytes([byte]) for byte in case.raw[-9:])]) == whole


@pytest.mark.parametrize(
    "raw",
    [
        many_fields(FIELD_LIMIT)[:-4] + b"a" * LINE_LIMIT, long_head(HEAD_LIMIT), sized(long_body(BODY_LIMIT)),
        in_chunks(long_body(BODY_LIMIT), 1), b"\r\n" * (HEAD_LIMIT // 2) + request(),
    ],
    ids=["field", "head", "body", "chunks", "empty-lines"],
)
def test_bytes_one_by_one_cost_little(raw: bytes) -> None:
    """The largest legal requests, byte by byte, cost far less time than they take to send."""
    began = time.thread_time()
    read_all(bytes([byte]) for byte in raw)
    assert time.thread_time() - began < 2  # what the reader needs is a tenth of it


def test_second_reader_agrees_with_the_corpus() -> None:
    """The reader that the mutations are compared with judges the corpus itself as its table."""
    for case in CASES:
        outcomes = [verdict.outcome for verdict in verdicts(case.raw)]
        if "open" in outcomes or case.name.startswith("limit-"):
            continue
        assert len(outcomes) == len(case.answers), case.name
        refused = outcomes[-1] in ("refused", "ends", "cut")
        assert refused == (case.closes and case.answers[-1] >= 400 and "-404" not in case.name)
