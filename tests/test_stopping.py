"""Told to stop, the server accepts nobody, finishes what runs, and ends in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from serving import read_answer, serving
from support import (
    GET,
    MODULE,
    SECONDS,
    SLOW,
    WORKERS,
    Slow,
    connect,
    head,
    leaders,
    needs_unix,
    rest,
    until,
)

import wmi

pytestmark = pytest.mark.usefixtures("quiet")


STOPS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])


# ---- a server in this process ----


def test_a_server_can_be_stopped_while_a_request_takes_long(log):
    """Idle connections are closed at once, what runs gets its time, and the answer says close."""
    with Slow() as storage, serving(storage, log=log.append) as served, connect(served) as slow, connect(
        served
    ) as idle:
        slow.sendall(SLOW)
        assert storage.asked.acquire(timeout=SECONDS)
        until(lambda: leaders() == 2, "another thread")
        idle.sendall(GET)
        assert read_answer(idle)[0] == 200
        served.server.shutdown()
        assert served.server.stop(0.2) is False
        assert rest(idle) == b""
        storage.told.set()
        assert b"Connection: close" in rest(slow)
        assert served.server.stop(SECONDS) is True
        until(lambda: not leaders(), "the end of the threads")


def test_a_head_that_has_begun_is_finished(served):
    """Told to stop, the server waits for the rest of a head, as it would for a body."""
    server, ended = served.server, []
    with connect(served) as peer, connect(served) as idle:
        idle.sendall(GET)
        read_answer(idle)
        peer.sendall(GET[:20])
        until(lambda: [each for each in server._connections if each.phase == wmi.HEAD], "the beginning of a head")
        server.shutdown()
        stopper = threading.Thread(target=lambda: ended.append(server.stop(SECONDS)))
        stopper.start()
        assert rest(idle) == b""
        peer.sendall(GET[20:])
        assert b"200 OK" in (text := rest(peer)) and b"Connection: close" in text
        stopper.join()
    assert ended == [True]


def test_a_connection_that_rests_late_does_not_hold_up_the_end(storage):
    """Told to stop just after it said that it keeps the connection, the server closes it all the same."""
    with serving(storage, log=lambda line: setattr(served.server, "stopping", True)) as served, connect(served) as peer:
        peer.sendall(GET)
        assert "connection" not in read_answer(peer)[1]
        began = time.monotonic()
        assert rest(peer) == b""
        assert time.monotonic() - began < wmi.IDLE_SECONDS / 2


def test_stopping_with_every_connection_taken(storage):
    """The accept loop that waits for a place can be told to stop."""
    began = time.monotonic()
    with serving(storage, max_connections=1) as served:
        peers = [connect(served)]
        peers[0].sendall(GET + GET[:9])
        read_answer(peers[0])
        peers += [connect(served) for _ in range(2)]
        threading.Thread(target=lambda: [until(lambda: served.server.stopping), peers[0].close()]).start()
    assert time.monotonic() - began < wmi.GRACE_SECONDS * 0.8
    for peer in peers:
        peer.close()


def test_waiting_for_what_runs_has_an_end(served):
    """A request that does not end in the time of grace is given up."""
    with connect(served) as peer:
        peer.sendall(head("/api/12.03/images/wmi-one", "PUT", "Content-Length: 14", "Expect: 100-continue"))
        assert peer.recv(100).startswith(b"HTTP/1.1 100 ")
        served.server.shutdown()
        began = time.monotonic()
        assert served.server.stop(0.3) is False
        assert 0.2 < time.monotonic() - began < wmi.GRACE_SECONDS * 0.8
        peer.sendall(b"display_name=x")
        assert b"Connection: close" in rest(peer)


# ---- the command, by signals ----


@WORKERS
@STOPS
def test_stopping_with_idle_connections(command, workers, number):
    """A connection that waits for its next request does not hold up the end; the exit code is 0."""
    server = command("--workers", workers)
    server.ready()
    peers = [server.connect() for _ in range(6)]
    for peer in peers[:4]:
        peer.sendall(GET)
        read_answer(peer)
    began = time.monotonic()
    os.kill(server.pid, number)
    assert server.wait() == 0
    assert time.monotonic() - began < wmi.GRACE_SECONDS * 0.8
    for peer in peers:
        assert rest(peer) == b""
        peer.close()
    assert server.refuses()


def begin_put(server):
    """Begin a request whose body is not whole yet, and wait until it is waited for."""
    server.ready()
    with server.connect() as peer:
        peer.sendall(
            head("/api/12.03/images/wmi-lucid0", "DELETE", "Connection: close")
        )  # a tombstone can be set
        rest(peer)
    peer = server.connect()
    target = "/api/12.03/images/wmi-lucid1"
    peer.sendall(head(target, "PUT", "Content-Length: 14", "Expect: 100-continue"))
    assert peer.recv(100).startswith(b"HTTP/1.1 100 ")
    return peer


@WORKERS
@STOPS
def test_what_runs_is_finished(command, workers, number):
    """Told to stop it accepts nobody, finishes what was begun, says close, and exits with 0."""
    server = command("--workers", workers, "--sample")
    with begin_put(server) as peer:
        os.killpg(server.pid, number)  # as a terminal or systemd does it: all processes get it
        until(server.refuses, "a closed listener")
        peer.sendall(b"display_name=x")
        status, fields, body = read_answer(peer)
        assert (status, fields["connection"], json.loads(body)["display_name"]) == (200, "close", "x")
    assert server.wait() == 0


@WORKERS
def test_what_runs_is_finished_after_a_signal_to_the_parent(command, workers):
    """SIGTERM to the one process that was started is enough, however many serve."""
    server = command("--workers", workers, "--sample")
    with begin_put(server) as peer:
        os.kill(server.pid, signal.SIGTERM)
        until(server.refuses, "a closed listener")
        peer.sendall(b"display_name=x")
        assert read_answer(peer)[0] == 200
    assert server.wait() == 0


@WORKERS
@STOPS
def test_second_signal_ends_at_once(command, workers, number):
    """Who asks twice does not wait for what runs."""
    server = command("--workers", workers, "--sample")
    with begin_put(server):
        os.kill(server.pid, number)
        until(server.refuses, "a closed listener")
        began = time.monotonic()
        os.kill(server.pid, number)
        server.wait()
        assert time.monotonic() - began < wmi.GRACE_SECONDS * 0.8


@needs_unix
@WORKERS
def test_a_signal_right_after_the_start_line(tmp_path, workers):
    """Whoever reads the line may stop the server at once: it ends with 0 and leaves no socket behind."""
    for _ in range(4):
        path = tmp_path / "wmi.sock"
        process = subprocess.Popen(
            [sys.executable, MODULE, "serve", "--store", "json:images.json", "--unix-socket", str(path),
             "--workers", workers],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )
        with process:
            process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0
        assert not path.exists()


@needs_unix
def test_a_signal_just_before_the_first_fork():
    """A signal that comes just before signals are blocked for the fork finds no worker to wait for."""
    program = """
import os, signal, sys, wmi
block_signals = wmi.block_signals
def signal_first(block):
    if block:
        os.kill(os.getpid(), signal.SIGTERM)
    block_signals(block)
wmi.block_signals = signal_first
sys.exit(wmi.run_server(lambda: None, workers=2))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, b"")
