"""`wmi serve` as processes: its start, its workers, and the sockets that it makes or is given."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from serving import parse_answer
from support import (
    ACCOUNT,
    CLOSE,
    GET,
    MODULE,
    SECONDS,
    WORKERS,
    alive,
    children,
    needs_proc,
    needs_unix,
    rest,
    until,
)

import wmi

pytestmark = pytest.mark.usefixtures("quiet")


def test_start_up_message(command):
    """One line says what is served and where, and the address is that of this machine alone."""
    server = command("--sample")
    assert server.said == [f"wmi: serving sqlite:images.db on http://127.0.0.1:{server.port}/api/images (page: http://127.0.0.1:{server.port}/)\n"]
    with server.connect() as peer:
        peer.sendall(CLOSE)
        assert json.loads(parse_answer(rest(peer))[2])["owner_total"] > 0


# ---- workers ----


@needs_proc
def test_a_dead_worker_is_replaced(command):
    """kill -9 of one worker: the other serves on, and a new one comes; each serves."""
    server = command("--workers", "2")
    before = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)
    server.ready()
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    server.ready()
    after = until(lambda: (found := children(server.pid) - {victim}) and len(found) == 2 and found)
    assert len(after & before) == 1
    survivor = (after & before).pop()
    os.kill(survivor, signal.SIGKILL)  # now only the new one serves
    server.ready()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert not [pid for pid in after if alive(pid)]


@needs_proc
def test_a_worker_does_not_tell_the_others_to_stop(command):
    """A worker is a fork of the parent, but SIGALRM does not make it act like the parent."""
    server = command("--workers", "3")
    before = until(lambda: (found := children(server.pid)) and len(found) == 3 and found)
    for _ in range(3):
        server.ready()
    os.kill(max(before), signal.SIGALRM)
    after = until(lambda: (found := children(server.pid) - {max(before)}) and len(found) == 3 and found)
    assert before - after == {max(before)}
    for _ in range(9):
        server.ready()
    assert children(server.pid) == after
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0


@needs_proc
def test_workers_share_the_connections(command):
    """However fast they come, each process gets as many, or the others' cores are of no use."""
    patient = f"import sys, wmi; wmi.SHARE_SECONDS = {SECONDS / 4}; sys.exit(wmi.main())"  # on a busy machine
    server = command("--workers", "2", program=["-c", patient])
    server.ready()
    workers = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)

    def sockets():
        names = ((pid, f"/proc/{pid}/fd/{number}") for pid in workers for number in os.listdir(f"/proc/{pid}/fd"))
        return [pid for pid, name in names if os.path.lexists(name) and "socket" in os.readlink(name)]

    idle = until(lambda: (found := sockets()) and len(found) == 2 and found)  # each has the listener
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(server.connect())
        all_of_them = until(lambda: (found := sockets()) and len(found) == len(idle) + 40 and found)
        assert min(all_of_them.count(pid) for pid in workers) >= 1 + 19


@needs_proc
def test_a_worker_told_to_stop_is_replaced(command):
    """SIGTERM to one worker, as an operator may do, renews it; the server goes on."""
    server = command("--workers", "2")
    server.ready()
    before = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)
    os.kill(min(before), signal.SIGTERM)
    until(lambda: len(children(server.pid) - {min(before)}) == 2)
    server.ready()


@needs_proc
def test_workers_end_with_their_parent(command):
    """kill -9 of the parent: no worker stays behind and holds the port."""
    server = command("--workers", "2")
    server.ready()
    workers = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: not any(map(alive, workers)), "the end of the workers")
    assert server.refuses()


@needs_proc
def test_workers_that_cannot_start_do_not_spin(command, tmp_path):
    """A store that breaks after the start costs a try a second, not a core; the parent can be stopped."""
    server = command("--workers", "2")
    server.ready()
    with open(tmp_path / "images.db", "wb") as file:
        file.write(b"this is no database any more" * 100)
    for pid in children(server.pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: [line for line in server.said if "wmi: worker: " in line], "a failure")
    threading.Event().wait(0.7)  # a spin would show as many more
    assert len([line for line in server.said if "wmi: worker: " in line]) < 8
    assert "Traceback" not in "".join(server.said)
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0


FORKLESS = """
import errno, os, sys, wmi
fork, calls = os.fork, []
def failing():
    calls.append(1)
    if len(calls) in (1, 4):
        raise BlockingIOError(errno.EAGAIN, "no more processes")
    return fork()
os.fork = failing
sys.exit(wmi.main())
"""


@needs_proc
def test_a_fork_that_fails_is_tried_again(command, tmp_path):
    """For want of memory or processes; the other workers go on meanwhile."""
    server = command("--workers", "2", program=("-c", FORKLESS))
    first = until(lambda: (found := children(server.pid)) and len(found) == 2 and found)
    killed = min(first)
    os.kill(killed, signal.SIGKILL)
    until(lambda: [line for line in server.said if "cannot start a worker: " in line][1:], "the second failure")
    server.ready()
    until(lambda: len(found := children(server.pid) - {killed}) == 2 and first - {killed} < found)
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0


# ---- sockets that are given, and sockets of files ----


@needs_unix
@WORKERS
def test_unix_socket(command, tmp_path, workers):
    """--unix-socket PATH serves there, says so, logs each request, and removes the file at the end."""
    path = str(tmp_path / "wmi.sock")
    server = command("--unix-socket", path, "--sample", "--workers", workers)
    assert path in server.said[-1] and "warning" not in "".join(server.said)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(SECONDS)
            peer.connect(path)
            peer.sendall(GET + CLOSE)
            assert rest(peer).count(b"HTTP/1.1 200 ") == 2
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert not os.path.exists(path)
    assert [line.split()[1:4] for line in server.said[1:]] == [["unix", ACCOUNT, "GET"]] * 4


@needs_unix
def test_unix_socket_that_a_crash_left_is_taken_over(command, tmp_path):
    """A socket file on which nobody listens is replaced; one that is in use is not."""
    path = str(tmp_path / "wmi.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    server = command("--unix-socket", path)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
    second = subprocess.run(
        [sys.executable, MODULE, "serve", "--store", "memory:", "--unix-socket", path], cwd=tmp_path,
        capture_output=True, text=True, timeout=SECONDS,
    )
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1 and "Traceback" not in second.stderr
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(SECONDS)
        peer.connect(path)
        peer.sendall(CLOSE)
        assert rest(peer).startswith(b"HTTP/1.1 200 ")
    assert server.process.poll() is None


@needs_unix
def test_unix_socket_does_not_replace_a_file(tmp_path):
    """A path that is something else is refused and stays as it is."""
    path = tmp_path / "precious"
    path.write_text("text")
    done = subprocess.run(
        [sys.executable, MODULE, "serve", "--store", "memory:", "--unix-socket", str(path)], cwd=tmp_path,
        capture_output=True, text=True, timeout=SECONDS,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and str(path) in done.stderr
    assert path.read_text() == "text"


ACTIVATE = """
import os, sys
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@contextlib.contextmanager
def activated(listener, folder, *options):
    """Run `wmi serve` as systemd does, the listening socket being descriptor 3; in the end it exits with 0."""
    number = listener.fileno()
    child = subprocess.Popen(
        [
            sys.executable, "-c", ACTIVATE, str(number), MODULE, "serve", "--store", "sqlite:images.db", "--host-name",
            "a", *options,
        ],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[number],
    )
    try:
        yield child
    finally:
        child.terminate()
        child.communicate(timeout=SECONDS)
    assert child.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
@WORKERS
def test_socket_activation(tmp_path, workers):
    """LISTEN_FDS and LISTEN_PID: the socket that was handed over is served, not --port, and stays open."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), SECONDS) as peer:  # before anybody serves
            peer.sendall(CLOSE)
            with activated(listener, tmp_path, "--workers", workers, "--port", "1") as child:
                assert f":{port}/" in child.stderr.readline()
                assert rest(peer).startswith(b"HTTP/1.1 200 ")
                peer.close()
        with socket.create_connection(("127.0.0.1", port), SECONDS):
            pass


@needs_unix
def test_socket_activation_with_a_unix_socket(tmp_path):
    """systemd may hand over a Unix socket; its file is systemd's and stays."""
    path = str(tmp_path / "given.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as peer:
        listener.bind(path)
        listener.listen(8)
        with activated(listener, tmp_path):
            peer.settimeout(SECONDS)
            peer.connect(path)
            peer.sendall(CLOSE)
            assert rest(peer).startswith(b"HTTP/1.1 200 ")
            peer.close()
    assert os.path.exists(path)


@pytest.mark.parametrize(
    "environment",
    [{"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "", "LISTEN_FDS": ""}],
)
def test_activation_meant_for_others_is_ignored(monkeypatch, environment):
    """sd_listen_fds(3): the variables count only for the process that LISTEN_PID names."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with wmi.listen(port=0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
