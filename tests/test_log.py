"""The log: a line a request that nobody can forge, and no reader of it that holds up the answers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading

import pytest
from serving import read_answer, serving
from support import (
    ACCOUNT,
    CLOSE,
    GET,
    LOG_LINE,
    SECONDS,
    SLOW,
    Slow,
    connect,
    connections,
    head,
    held,
    leaders,
    rest,
    until,
)

import wmi

pytestmark = pytest.mark.usefixtures("quiet")


# ---- a line a request ----


def test_every_request_is_one_line(served, log):
    """A line has time, client, account, method, target, status, bytes and milliseconds."""
    body = served.request("GET", "/api/images?limit=1", {"X_VDC_ACCOUNT_UUID": ACCOUNT})[2]
    served.raw(GET + head("/nowhere", "HEAD") + b"nonsense\r\n\r\n")
    until(lambda: len(log) == 4)
    assert [LOG_LINE.fullmatch(line).groups() for line in log] == [
        (ACCOUNT, "GET", "/api/images?limit=1", "200", str(len(body))),
        (ACCOUNT, "GET", "/api/images", "200", LOG_LINE.fullmatch(log[1])[5]),
        (ACCOUNT, "HEAD", "/nowhere", "404", "0"),
        ("-", "-", "-", "400", LOG_LINE.fullmatch(log[3])[5]),
    ]


@pytest.mark.parametrize(
    "account",
    ["a b", "a\tb", "\xe9", "\x85", "\xa0", "\x9b31m", "a-x 200 0 0.0ms", "'", '"', "\\n", "x" * 5000, ""],
)
def test_accounts_cannot_forge_the_log(served, log, account):
    """Blanks, control characters and what is not ASCII are escaped; a line keeps its eight words."""
    fields = f"Host: a\r\nX-VDC-ACCOUNT-UUID: {account}\r\nConnection: close"
    served.raw(f"GET /api/images HTTP/1.1\r\n{fields}\r\n\r\n".encode("latin-1"))
    until(lambda: log)
    assert len(log) == 1 and LOG_LINE.fullmatch(log[0]), log
    assert log[0].isascii() and log[0].isprintable() and len(log[0]) < 1500


@pytest.mark.parametrize(
    "target", ["/%0a2011-11-23", "/api/images/wmi-%00%1b[31m", "/%E2%80%A8?\\n", "/" + "a" * 8000]
)
def test_targets_cannot_forge_the_log(served, log, target):
    """A target is logged as it was sent, which is visible ASCII, or escaped."""
    served.raw(head(target, "GET", "Connection: close"))
    until(lambda: log)
    assert len(log) == 1
    shown = LOG_LINE.fullmatch(log[0])[3]
    assert shown == target or (shown.startswith(target[:1000]) and len(log[0]) < 4096)  # a pipe's atomic write


def test_a_method_cannot_make_a_line_longer_than_a_write(served, log):
    """The whole of what a client can put into a line is bounded."""
    served.raw(b"M" * 8000 + CLOSE[3:])
    until(lambda: log)
    assert len(log) == 1 and len(log[0]) < wmi.PIPE_BUF


def test_reports_are_one_line(log):
    """A failure whose text has line ends or escape sequences is one line of visible ASCII."""

    class Broken(wmi.MemoryStorage):
        def revision(self):
            raise OSError("first\nsecond \x1b[31m \u2028 \xe9 \ud800")

    with serving(Broken(), log=log.append) as served:
        assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 503
    assert len(log) == 2 and "error: " in log[0] and "first" in log[0]
    assert all(line.isascii() and line.isprintable() for line in log)


def test_no_token_is_logged(served, log):
    """Fields that may hold secrets do not get into the log."""
    secrets = {
        "X-VDC-ACCOUNT-UUID": ACCOUNT,
        "X-VDC-REQUESTER-TOKEN": "hush1",
        "Authorization": "Basic hush2",
        "Cookie": "hush3",
    }
    assert served.request("GET", "/api/images", secrets)[0] == 200
    until(lambda: log)
    assert "hush" not in "".join(log)


# ---- how lines are written ----


def test_lines_are_written_together(served, monkeypatch):
    """What is answered together is one text of whole lines in order, or several small enough for a pipe."""
    monkeypatch.setattr(wmi, "WORK_SECONDS", SECONDS)  # another thread would write each line at once
    monkeypatch.setattr(wmi, "ROUND_SECONDS", SECONDS)  # on a busy machine, ten answers could take two rounds
    texts = []
    served.server._log = texts.append
    with connect(served) as peer:
        for count in (10, 300):
            del texts[:]
            peer.sendall(b"".join(head(f"/{number}/{'a' * (number % 90)}") for number in range(count)))
            assert [read_answer(peer)[0] for _ in range(count)] == [404] * count
            until(lambda count=count: "".join(texts).count("\n") == count, "all lines")
            assert all(text.endswith("\n") and len(text) <= wmi.PIPE_BUF for text in texts)
            targets = [LOG_LINE.fullmatch(line)[3] for line in "".join(texts).splitlines()]
            assert [target.split("/")[1] for target in targets] == list(map(str, range(count)))
            assert len(texts) == 1 or count == 300


def test_lines_of_answers_are_written_before_the_end(log):
    """Told to stop while one request takes long, the server logs those that were answered with it."""
    with Slow() as storage, serving(storage, log=log.append) as served, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(6)]
        until(lambda: connections(served) == 6, "all connections")
        with held(served):
            for number, peer in enumerate(peers):
                peer.sendall(SLOW if number == 4 else GET)
        assert [read_answer(peer)[0] for peer in peers[:4]] == [200] * 4
        assert storage.asked.acquire(timeout=SECONDS)
        served.server.shutdown()
        assert not served.server.stop(0.01)
        until(lambda: len([line for line in log if " 200 " in line]) >= 4, "their lines")
        storage.told.set()


@pytest.mark.parametrize("target", ["file", "pipe"])
def test_log_lines_of_processes_never_interleave(command, tmp_path, target):
    """Two processes, eight clients, lines from short to the longest: each is whole."""
    server = command("--workers", "2", *(("--log", str(tmp_path / "log")) if target == "file" else ()))
    server.ready()

    def ask(number):
        with server.connect() as peer:
            for length in range(30):
                path = "/" + str(number) * (1 + length * 250 if length % 2 else 4)
                peer.sendall(head(path, "HEAD"))
                assert b"\r\n\r\n" in peer.recv(65536)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    lines = (
        (tmp_path / "log").read_text().splitlines()
        if target == "file"
        else [line.rstrip("\n") for line in server.said[1:]]
    )
    assert len(lines) == 8 * 30 + 1
    for line in lines:
        assert LOG_LINE.fullmatch(line), line[:200]
        assert re.fullmatch(r"/(?:(\d)\1*\.*|api/images)", LOG_LINE.fullmatch(line)[3])


# ---- a log that is slow, or fails ----


def test_many_requests_at_once_lose_no_line(served, log):
    """A log that is read gets a line for each request, however many answers are known when a round begins."""
    many = GET * (wmi.PIECE // len(GET))
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(served)) for _ in range(60)]
        for _ in range(3):  # then the answer is kept
            peers[0].sendall(GET)
            assert read_answer(peers[0])[0] == 200
        with held(served):
            for peer in peers:
                peer.sendall(many)
        for peer in peers:
            peer.sendall(CLOSE)
            rest(peer)
    count = 3 + len(peers) * (many.count(b"GET") + 1)
    assert count > 2 * wmi.LOG_LINES
    until(lambda: len(log) == count)


def test_a_log_that_nobody_reads_stops_nobody(storage):
    """While whoever reads the log keeps one thread waiting, all others are answered, and no second thread waits."""
    texts, waiting, told = [], threading.Semaphore(0), threading.Event()

    def wait(line):
        waiting.release()
        assert told.wait(SECONDS)
        texts.append(line)

    with serving(storage, log=wait) as served, connect(served) as one, connect(served) as other:
        try:
            one.sendall(GET)
            assert read_answer(one)[0] == 200
            assert waiting.acquire(timeout=SECONDS)
            for _ in range(300):
                for peer in (one, other):
                    peer.sendall(GET)
                    assert read_answer(peer)[0] == 200
            until(lambda: leaders() <= 2, "the end of threads that were held up")
        finally:
            told.set()
    assert len(texts) == 601


def test_lines_that_nobody_reads_are_counted(storage, monkeypatch):
    """What does not fit into the queue is dropped, and the log says how many lines that were."""
    monkeypatch.setattr(wmi, "LOG_LINES", 10)
    texts, told = [], threading.Event()

    def wait(line):
        assert told.wait(SECONDS)
        texts.append(line)

    with serving(storage, log=wait) as served, connect(served) as peer:
        for _ in range(50):
            peer.sendall(GET)
            assert read_answer(peer)[0] == 200
        told.set()
    lost = sum(int(line.split()[2]) for line in texts if "lines of the log are lost" in line)
    assert lost >= 30 and lost + sum(" 200 " in line for line in texts) == 50


class Forgetful(list):
    """Lines that cannot be read again."""

    def popleft(self):
        """Have no memory for it."""
        raise MemoryError


def test_no_memory_for_a_line_is_no_end(served, monkeypatch):
    """A fault while lines are put together costs lines, not the thread that serves."""
    monkeypatch.setattr(served.server, "_lines", Forgetful())
    with connect(served) as peer:
        for _ in range(3):
            peer.sendall(GET)
            assert read_answer(peer)[0] == 200
    monkeypatch.undo()


@pytest.mark.parametrize("error", [BlockingIOError, RuntimeError])
def test_a_log_that_raises_does_not_stop_the_answers(storage, error):
    """Whatever the function that takes the log's lines raises, requests are answered, and it gets the next lines."""
    lines = []

    def fail(line):
        lines.append(line)
        raise error(line)

    with serving(storage, log=fail, max_connections=1) as served:
        for _ in range(3):
            before = len(lines)
            assert served.raw(GET + CLOSE).count(b"HTTP/1.1 200 ") == 2
            until(lambda before=before: len(lines) > before)


def test_a_log_that_fails_does_not_stop_the_answers(tmp_path, storage):
    """A full disk under the log: the line is lost, the answer is not."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with (
        open("/dev/full", "wb", buffering=0) as full,
        serving(storage, log=lambda text: full.write(text.encode())) as served,
    ):
        for _ in range(3):
            assert served.request("GET", "/api/images", {"X-VDC-ACCOUNT-UUID": ACCOUNT})[0] == 200
