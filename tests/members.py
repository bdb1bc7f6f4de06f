"""Run members of etcd for tests: on free loopback ports, in a temporary folder, each a process to kill or stop."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid

import pytest
from support import free_port

ETCD = os.environ.get("WMI_ETCD") or shutil.which("etcd")  # WMI_ETCD: another one than the system's
SECONDS = 20.0  # for a cluster to come up, or to elect


if not ETCD:  # whatever needs one is skipped as a whole; where CI installs it, its absence is a failure
    message = "no etcd here: install etcd-server, or name the program in WMI_ETCD"
    if os.environ.get("WMI_CI"):
        raise FileNotFoundError(message)
    pytest.skip(message, allow_module_level=True)


class Cluster:
    """Some members, numbered from 0."""

    def __init__(self, size=1, *options):
        self.size, self.options, self.processes = size, list(options), {}
        if size == 1:  # it is elected at once, as there are no others to hear
            self.options += ["--heartbeat-interval=10", "--election-timeout=100"]
        self.folder = tempfile.mkdtemp(prefix="wmi-members-")
        self.clients = [f"http://127.0.0.1:{free_port()}" for _ in range(size)]
        self.peers = [f"http://127.0.0.1:{free_port()}" for _ in range(size)]
        self.start(*range(size))

    def start(self, *numbers):
        """Start members, and wait until the cluster answers."""
        for number in numbers:
            self._start(number)
        self.wait()

    def _start(self, number):
        initial = ",".join(f"m{n}={peer}" for n, peer in enumerate(self.peers))
        command = [
            ETCD, "--name", f"m{number}", "--data-dir", os.path.join(self.folder, f"m{number}"),
            "--listen-client-urls", self.clients[number], "--advertise-client-urls", self.clients[number],
            "--listen-peer-urls", self.peers[number], "--initial-advertise-peer-urls", self.peers[number],
            "--initial-cluster", initial, "--initial-cluster-token", self.folder, *self.options,
        ]
        log = open(os.path.join(self.folder, f"m{number}.log"), "ab")
        with log:
            self.processes[number] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait(self):
        """Wait until a change can be made, by whichever member."""
        deadline = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError, AssertionError):
                for number in self.alive():
                    self.ask("/v3/kv/put", {"key": encode("up"), "value": ""}, number)
                return
            assert time.monotonic() < deadline, f"no quorum: {self.folder}"
            time.sleep(0.05)

    def alive(self):
        """Return the numbers of the members whose processes run."""
        return [number for number, process in self.processes.items() if process.poll() is None]

    def ask(self, path, body, number=None, seconds=5, token=None):
        """Return what a member answers, by default any that runs."""
        number = self.alive()[0] if number is None else number
        headers = {"Authorization": token} if token else {}
        request = urllib.request.Request(self.clients[number] + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return json.loads(answer.read())

    def leader(self):
        """Return the number of the member that leads, as soon as one does: a busy machine may cause an election."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for number in self.alive():
                status = self.ask("/v3/maintenance/status", {}, number)
                if status.get("leader") == status["header"]["member_id"]:
                    return number
            time.sleep(0.05)
        return pytest.fail(f"nobody leads: {self.folder}, {self.alive()}")

    def signal(self, number, signum):
        """Send a signal to a member; wait for its end if that ends it."""
        self.processes[number].send_signal(signum)
        if signum == signal.SIGKILL:
            self.processes[number].wait()

    def kill(self, *numbers):
        """Kill members at once."""
        for number in numbers:
            self.signal(number, signal.SIGKILL)

    def wipe(self):
        """Start another, empty cluster at the same addresses."""
        self.kill(*self.alive())
        for number in range(self.size):
            shutil.rmtree(os.path.join(self.folder, f"m{number}"))
        self.start(*range(self.size))

    def revision(self):
        """Return the cluster's revision."""
        return int(self.ask("/v3/kv/range", {"key": encode("up")})["header"]["revision"])

    def compact(self):
        """Forget all history but the newest revision."""
        self.ask("/v3/kv/compaction", {"revision": self.revision(), "physical": True})

    def keys(self, prefix):
        """Return the keys below a prefix."""
        body = {"key": encode(prefix), "range_end": encode(prefix[:-1] + chr(ord(prefix[-1]) + 1)), "keys_only": True}
        return [base64.b64decode(kv["key"]).decode() for kv in self.ask("/v3/kv/range", body).get("kvs", [])]

    def location(self, *numbers):
        """Return the location of a new store, on the members in this order."""
        return f"{','.join(self.clients[n] for n in numbers or range(self.size))}/t/{uuid.uuid4().hex[:12]}"

    def close(self):
        """End all members, and remove what they kept."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        shutil.rmtree(self.folder)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def encode(key):
    """Return a key or a value as the gateway takes it."""
    return base64.b64encode(key.encode() if isinstance(key, str) else key).decode()


class Relay:
    """A way to a member that can lose, hold back and cut what passes."""

    def __init__(self, url):
        host, port = url.rpartition("/")[2].split(":")
        self.target, self.held = (host, int(port)), []
        self.hold = b""  # a request with this in it is held back
        self.drop = b""  # after one with this, no answers come
        self.deaf = False  # no answers come
        self.pairs, self.late = [], []  # late: the answers to what was held back
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            try:
                member = socket.create_connection(self.target)
            except OSError:
                client.close()
                continue
            self.pairs.append((client, member))
            threading.Thread(target=self._to_member, args=[client, member], daemon=True).start()
            threading.Thread(target=self._to_client, args=[client, member], daemon=True).start()

    def _to_member(self, client, member):
        """Pass requests on. One that is held back is not, and the end of its connection is lost with it."""
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                if self.drop and self.drop in data:
                    self.drop, self.deaf = b"", True
                if self.hold and self.hold in data:
                    while not data.endswith(b"}"):
                        data += client.recv(1 << 20)
                    self.hold = b""
                    self.held.append((member, data))
                    return
                member.sendall(data)
            member.shutdown(socket.SHUT_WR)

    def _to_client(self, client, member):
        with contextlib.suppress(OSError):
            while data := member.recv(1 << 20):
                if self.held and self.held[0][0] is member:
                    self.late.append(data)
                elif not self.deaf:
                    client.sendall(data)
        for end in (client, member):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # or whoever waits for it in the other thread holds it open
            end.close()

    def release(self):
        """Pass on what was held back, after all."""
        for member, data in self.held:
            member.sendall(data)

    def cut(self):
        """Cut all connections."""
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Cut all, and listen no more."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
