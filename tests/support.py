"""What the tests of the running server share: requests, waiting, stores that wait, and the command in a process.

Here stands what three files need or more. How a server is run for a test, and one exchange with it, is in serving.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import wmi

ACCOUNT = "a-shpoolxx"
SECONDS = 20.0  # for anything to happen, on a machine that is busy
MODULE = "-mwmi"  # the command, which as a script would be compiled each time; conftest.py says where it is
HERE = os.path.dirname(os.path.abspath(wmi.__file__))
PYPY = sys.implementation.name == "pypy"
needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc here")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 (\S+) (\S+) (\S+) (\d{3}) (\d+) \d+\.\dms")


def image(id="wmi-one", **fields):
    """Return the record of an image."""
    return wmi.image_record({"id": id, "account_id": ACCOUNT, **fields})


def until(condition, what="the condition"):
    """Wait until condition() is true, and return what it returned."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        threading.Event().wait(0.005)
    raise AssertionError(f"{what} did not come about in {SECONDS} s")


def free_port():
    """Return a port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ignore_surroundings(monkeypatch):
    """Make random pauses short, and take from the environment what would change what a client does."""
    monkeypatch.setattr(wmi.random, "uniform", lambda low, high: 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in [name for name in os.environ if name.startswith(("WMI_", "LISTEN_"))]:
        monkeypatch.delenv(name)


def head(target="/api/images", method="GET", *fields):
    """Return a raw head."""
    lines = [f"{method} {target} HTTP/1.1", "Host: a", f"X-VDC-ACCOUNT-UUID: {ACCOUNT}", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


GET = head()
CLOSE = head("/api/images", "GET", "Connection: close")
PUT = head("/api/12.03/images/wmi-one", "PUT", "Content-Length: 14")
CHUNKED = head("/api/12.03/images/wmi-one", "PUT", "Transfer-Encoding: chunked")


# ---- connections ----


def connect(served, receive_buffer=0):
    """Return a connection to the server."""
    family = socket.AF_INET6 if ":" in served.host else socket.AF_INET
    peer = socket.socket(family)
    if receive_buffer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    peer.settimeout(SECONDS)
    peer.connect((served.host, served.port))
    return peer


def rest(peer):
    """Return all that still comes until the end, however it ends."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := peer.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def reset(peer):
    """Close with a reset instead of an end (SO_LINGER of no time)."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def connections(served):
    """Return how many connections are open."""
    return len(served.server._connections)


def leaders():
    """Return how many threads serve connections."""
    return sum(thread.name == "wmi-leader" for thread in threading.enumerate())


@contextlib.contextmanager
def held(served):
    """Keep the one that serves from serving: what is sent meanwhile is there when it goes on."""
    with served.server._lock:
        yield


def make_certificate(folder, name, names="DNS:localhost,IP:127.0.0.1"):
    """Return the files of a certificate for these names of this machine, signed by itself, and of its key."""
    files = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-out", files[0], "-keyout", files[1], "-subj", f"/CN={name}",
         "-addext", f"subjectAltName={names}"],
        check=True, capture_output=True,
    )
    return files


# ---- stores that wait ----


class Slow(wmi.MemoryStorage):
    """A store that shows one of its images only when it is told to."""

    def __init__(self):
        super().__init__()
        self.asked, self.told = threading.Semaphore(0), threading.Event()
        self.add_all([image(), image("wmi-slow")])

    def get(self, id):
        """Wait for the word before the slow one is shown."""
        if id == "wmi-slow":
            self.asked.release()
            assert self.told.wait(SECONDS)
        return super().get(id)


SLOW = head("/api/images/wmi-slow")


class Stuck(wmi.MemoryStorage):
    """A store whose `get` waits for as long as it is told to."""

    def __init__(self):
        super().__init__()
        self.told = threading.Event()
        self.add_all(wmi.image_record({"id": f"wmi-{n}", "account_id": ACCOUNT}) for n in range(3))

    def get(self, id):
        """Wait for the word, then return the record."""
        assert self.told.wait(SECONDS)
        return super().get(id)


def no_thread(thread):
    """Fail as Thread.start does where the system has no thread left."""
    raise RuntimeError("can't start new thread")


# ---- one turn, without a socket ----


class Stub:
    """A TCP socket that writes down what is done to it, and has one piece to read."""

    family = socket.AF_INET

    def __init__(self, *pieces):
        self.pieces, self.sent, self.options = list(pieces), [], []
        self.readable, self._other = socket.socketpair()
        self._other.send(b"a")

    def fileno(self):
        """Return the descriptor of something that can be read."""
        return self.readable.fileno()

    def close(self):
        """Close what stands for it."""
        self.readable.close()
        self._other.close()

    def setsockopt(self, *option):
        """Write down an option."""
        self.options.append(option)

    def recv(self, size):
        """Return the next piece."""
        return self.pieces.pop(0) if self.pieces else b""

    def send(self, data):
        """Write down one send."""
        self.sent.append(bytes(data))
        return len(data)

    def shutdown(self, how):
        """Take any."""


def drive(stub, server):
    """Let a connection on a stub receive once and answer, as the leader would; return what it waits for then."""
    connection = wmi.Connection(stub, ("127.0.0.1", 1), server)
    wants, result = connection.receive(), None
    server.round_time = time.monotonic()
    while wants in (wmi.TURN, wmi.WORK):
        wants = connection.advance(result)
        result = connection.work() if wants == wmi.WORK else None
    connection.close()
    return wants


# ---- the command in a process ----


class Command:
    """A `wmi serve` in a process, and what it prints."""

    def __init__(self, folder, *options, store="sqlite:images.db", program=(MODULE,), **more):
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("WMI_", "LISTEN_"))
        }
        more = {"stderr": subprocess.PIPE, "start_new_session": True, **more}
        port = () if "--unix-socket" in options or "pass_fds" in more else ("--port", "0")
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "--store", store, "--host-name", "a", *port, *options], cwd=folder,
            env=clean, text=True, **more,
        )
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if "serving" in line:
                break
        found = re.search(r"http://([^/ ]*):(\d+)/", self.said[-1])
        self.host, self.port = (found[1].strip("[]"), int(found[2])) if found else ("", 0)
        self.pid = self.process.pid
        self._drain = threading.Thread(target=self._read)
        self._drain.start()

    def _read(self):
        for line in self.process.stderr:
            self.said.append(line)

    def connect(self):
        """Return a connection to it."""
        return socket.create_connection((self.host, self.port), SECONDS)

    def ready(self):
        """Wait until a request is answered: before, a signal could come before its handler."""
        with self.connect() as peer:
            peer.sendall(CLOSE)
            assert rest(peer).startswith(b"HTTP/1.1 200 ")

    def refuses(self):
        """Return whether nobody listens any more."""
        try:
            self.connect().close()
        except ConnectionError:
            return True
        return False

    def wait(self):
        """Wait for the end and return the exit code."""
        self._drain.join(SECONDS)  # first: wait() looks only every 50 ms
        return self.process.wait(SECONDS)

    def end(self):
        """End it and whatever it left in its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        self.process.stderr.close()


def children(pid):
    """Return the processes whose parent this is, zombies left out."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(int(name))
    return found


def alive(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WORKERS = pytest.mark.parametrize("workers", ["1", "2"])
