"""Measure a server: requests/s, start-up, import time, memory. A script, not a test.

    python3 tests/benchmark.py                          # ours, on 1,000 and on 100,000 images in sqlite
    python3 tests/benchmark.py --url http://HOST:9001   # any server of this API that runs already
    python3 tests/benchmark.py --peers --workers 2      # ours and those that are installed, in turns
    python3 tests/benchmark.py --etcd 3                 # ours on a cluster of three members, and on sqlite, in turns

Everything runs on this machine, the load too, so figures compare only within one table. The load is
wrk with one thread and 8 connections where it is installed, else a loop in this file (`--load own`),
which is slower than a fast server. Every server that has an access log writes it to a file. What is shown
is the median of the rounds. A row of peers is measured in turns with ours, and its ratio is the median
of the ratios of one round each, so that a machine that gets slower meanwhile does no harm.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import py_compile
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
ACCOUNT = "a-shpoolxx"
FEW, MANY = 1_000, 100_000  # images; the many are each asked for once at most, so no cache can help
CONNECTIONS = 8
START_SECONDS = 30  # for a server to answer
PAGE = "/api/images?start=0&limit=20"


def image_id(number: int) -> str:
    """Return the id of the image with this number."""
    return f"wmi-{number:06d}"


class Target(NamedTuple):
    """A server under test: where it is, and its processes."""

    host: str
    port: int
    pids: Sequence[int] = ()


class Load(NamedTuple):
    """The result of a run of load."""

    per_second: float
    median_ms: float
    p99_ms: float


# ---- load ----

WRK_SCRIPT = """
local number, before, after = %d
init = function()
  before, after = wrk.format("GET", "/api/images/wmi-NUMBER"):match("(.*)NUMBER(.*)")
end
request = function()
  number = (number + 1) %% %d
  return before .. string.format("%%06d", number) .. after
end
"""  # wrk's own thread calls it: the numbers go around, so that each comes again only after all others


class Asked(NamedTuple):
    """What is asked for: always the same path, or another image each time, from the one after `first`."""

    path: str
    first: int = -1  # less than 0: always the same path


def load_with_wrk(target: Target, asked: Asked, seconds: float, account: str) -> Load:
    """Run wrk, and check that every answer was good."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", "--latency"]
        command += ["-H", f"X-VDC-ACCOUNT-UUID: {account}"]
        if asked.first >= 0:
            script.write(WRK_SCRIPT % (asked.first, MANY))
            script.flush()
            command += ["-s", script.name]
        path = asked.path if asked.first < 0 else "/"
        done = subprocess.run(
            [*command, f"http://{target.host}:{target.port}{path}"], capture_output=True, text=True,
            timeout=seconds + 30, check=True,
        )
    if "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise SystemExit(f"wrk had errors:\n{done.stdout}")
    unit = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    median, p99 = (
        float(match[1]) * unit[match[2]] for match in re.finditer(r"(?:50|99)% +([0-9.]+)(us|ms|s)", done.stdout)
    )
    return Load(float(re.findall(r"Requests/sec: +([0-9.]+)", done.stdout)[0]), median, p99)


def load_with_own(target: Target, asked: Asked, seconds: float, account: str) -> Load:
    """Keep every connection busy from one process, with one request under way on each."""
    tail = f" HTTP/1.1\r\nHost: {target.host}\r\nX-VDC-ACCOUNT-UUID: {account}\r\n\r\n"
    paths: Iterator[str] = itertools.repeat(asked.path)
    if asked.first >= 0:
        paths = (f"{asked.path}/{image_id(number % MANY)}" for number in itertools.count(asked.first + 1))
    times: list[float] = []
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:

        def send(stream: socket.socket) -> tuple[float, bytearray]:
            stream.sendall(f"GET {next(paths)}{tail}".encode())
            return time.perf_counter(), bytearray()

        for _ in range(CONNECTIONS):
            stream = stack.enter_context(socket.create_connection((target.host, target.port), timeout=10))
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(stream, selectors.EVENT_READ, send(stream))
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            for key, _ in selector.select(timeout=10):
                stream = key.fileobj  # type: ignore[assignment]
                sent, answer = key.data
                answer += stream.recv(1 << 18) or _fail("the server hung up")
                if is_whole(answer):
                    times.append((time.perf_counter() - sent) * 1000)
                    selector.modify(stream, selectors.EVENT_READ, send(stream))
        elapsed = time.perf_counter() - began
    times.sort()
    return Load(len(times) / elapsed, statistics.median(times), times[len(times) * 99 // 100])


def is_whole(answer: bytearray) -> bool:
    """Return whether a whole answer has arrived; one that is not good ends the program."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    if not answer.startswith(b"HTTP/1.1 200 "):
        _fail(f"the server answered {bytes(answer[:200])!r}")
    length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", answer[:end])
    if not length:
        _fail("an answer without Content-Length is more than this load can read")
    return len(answer) >= end + 4 + int(length[1])  # type: ignore[index]


def _fail(message: str) -> bytes:
    raise SystemExit(message)


# ---- servers ----


@contextlib.contextmanager
def running(command: Sequence[object], log: pathlib.Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a session of its own, so that its workers end with it, whatever they do."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def fetch(target: Target, path: str, account: str = ACCOUNT) -> bytes:
    """Return the body of one answer."""
    request = urllib.request.Request(f"http://{target.host}:{target.port}{path}")
    request.add_header("X-VDC-ACCOUNT-UUID", account)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
        return bytes(answer.read())


def wait_for(process: subprocess.Popen[bytes], port: int, log: pathlib.Path) -> Target:
    """Return the target when it answers. What it says instead ends the program."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            fetch(Target("127.0.0.1", port), f"/api/images/{image_id(0)}")
        except OSError:
            time.sleep(0.002)
        else:
            return Target("127.0.0.1", port, family_of(process.pid))
    raise SystemExit(f"no answer from {process.args!r:.200}:\n{log.read_text()[-2000:]}")


def family_of(pid: int) -> list[int]:
    """Return the pids of a process and its children, where /proc knows."""
    children = [pid]
    for parent in children:
        with contextlib.suppress(OSError):
            children += map(int, pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return children


@contextlib.contextmanager
def ours(folder: pathlib.Path, workers: int, store: str) -> Iterator[Target]:
    """Run our server on a file in the folder, or on what a URL names."""
    port = free_port()
    log, url = folder / f"{port}.log", store if ":" in store else f"sqlite:{folder / store}"
    command = [sys.executable, folder / "wmi.py", "serve", "--store", url, "--port", port]
    with running([*command, "--workers", workers, "--log", folder / "access.log"], log) as process:
        yield wait_for(process, port, log)


NGINX = """
daemon off; worker_processes %(workers)d; pid %(folder)s/nginx.pid; error_log %(folder)s/nginx.log; %(user)s
events { worker_connections 256; }
http {
  client_body_temp_path %(folder)s/t1; proxy_temp_path %(folder)s/t2; fastcgi_temp_path %(folder)s/t3;
  uwsgi_temp_path %(folder)s/t4; scgi_temp_path %(folder)s/t5;
  access_log %(folder)s/nginx-access.log; default_type application/json; keepalive_requests 1000000000;
  sendfile on; tcp_nopush on; etag on;
  server {
    listen 127.0.0.1:%(port)d;
    location = /api/images { try_files /index.json =404; root %(folder)s/static; }
    location /api/images/ { alias %(folder)s/static/; }
  }
}
"""

CONSTANT = '''
"""Answer constant bytes: what Python's sockets and threads can do at most, with no HTTP at all."""
import os, socket, sys, threading
port, workers, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def answer(name):
    with open(os.path.join(folder, name), "rb") as file:
        body = file.read()
    return b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body

show, index = answer(sys.argv[4]), answer("index.json")

def serve(stream):
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with stream:
        while True:
            request = stream.recv(65536)
            if not request:
                return
            stream.sendall(index if request[15:16] == b"?" else show)

listener = socket.create_server(("127.0.0.1", port), backlog=128)
for _ in range(workers - 1):
    if os.fork() == 0:
        break
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
'''

APP = '''
"""The same two calls as somebody would write them with a framework: a query, dicts, JSON."""
import json, os, sqlite3, threading

local = threading.local()
SHOW = "SELECT body FROM image WHERE id = ?"
INDEX = "SELECT body FROM image WHERE public OR account = ? ORDER BY number DESC LIMIT ? OFFSET ?"
COUNT = "SELECT count(*) FROM image WHERE public OR account = ?"

def rows(query, *values):
    if not hasattr(local, "database"):
        local.database = sqlite3.connect(os.environ["PEER_DATABASE"])
    return local.database.execute(query, values).fetchall()

def one(id):
    found = rows(SHOW, id)
    return json.loads(found[0][0]) if found else None

def page(account, start, limit):
    images = [json.loads(body) for body, in rows(INDEX, account, limit, start)]
    return {"owner_total": rows(COUNT, account)[0][0], "start": start, "limit": limit, "result": images}

try:
    from fastapi import FastAPI, Header, HTTPException
    fast = FastAPI()

    @fast.get("/api/images/{id}")
    async def show(id: str, x_vdc_account_uuid: str = Header()):
        image = one(id)
        if image is None:
            raise HTTPException(404)
        return image

    @fast.get("/api/images")
    async def index(start: int = 0, limit: int = 20, x_vdc_account_uuid: str = Header()):
        return page(x_vdc_account_uuid, start, limit)
except ImportError:
    pass

try:
    from flask import Flask, abort, jsonify, request
    flask = Flask(__name__)

    @flask.get("/api/images/<id>")
    def flask_show(id):
        return jsonify(one(id) or abort(404))

    @flask.get("/api/images")
    def flask_index():
        account = request.headers["X-VDC-ACCOUNT-UUID"]
        return jsonify(page(account, int(request.args["start"]), int(request.args["limit"])))
except ImportError:
    pass
'''


class Peer(NamedTuple):
    """Another server: its name and version, how it is started, and what it is asked."""

    name: str
    command: Callable[[pathlib.Path, int, int], list[object]]  # (folder, port, workers)
    scenarios: tuple[str, ...]
    note: str = ""


def version_of(*names: str) -> str:
    """Return names and versions of distributions."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def has(*modules: str) -> bool:
    """Return whether all of these can be imported."""
    return all(importlib.util.find_spec(name) for name in modules)


def _nginx(folder: pathlib.Path, port: int, workers: int) -> list[object]:
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers could not read the folder
    (folder / "nginx.conf").write_text(NGINX % {"workers": workers, "folder": folder, "port": port, "user": user})
    return [shutil.which("nginx") or "/usr/sbin/nginx", "-p", folder, "-c", folder / "nginx.conf"]


def _constant(folder: pathlib.Path, port: int, workers: int) -> list[object]:
    (folder / "constant.py").write_text(CONSTANT)
    return [sys.executable, folder / "constant.py", port, workers, folder / "static", image_id(0)]


def _uvicorn(folder: pathlib.Path, port: int, workers: int) -> list[object]:
    command = [sys.executable, "-m", "uvicorn", "peer_app:fast", "--app-dir", folder, "--port", port]
    return [*command, "--workers", workers]  # the access log is on, and goes to a file like everything it prints


def _gunicorn(folder: pathlib.Path, port: int, workers: int) -> list[object]:
    command = [sys.executable, "-m", "gunicorn", "--chdir", folder, "peer_app:flask", "-b", f"127.0.0.1:{port}"]
    return [*command, "-w", workers, "-k", "gthread", "--threads", CONNECTIONS,
            "--access-logfile", folder / "gunicorn-access.log"]


def _waitress(folder: pathlib.Path, port: int, workers: int) -> list[object]:
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import peer_app, waitress"
    return [sys.executable, "-c", f"{code}; waitress.serve(peer_app.flask, listen='127.0.0.1:{port}', threads=8)"]


def installed_peers() -> list[Peer]:
    """Return the peers that are on this machine."""
    everything = ("show", "index", "other")
    nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    peers = [Peer("recv and sendall", _constant, ("show", "index"), "constant bytes, a thread a connection, no log")]
    if nginx:
        version = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=True).stderr.rpartition("/")[2]
        peers.insert(0, Peer(f"nginx {version.strip()}", _nginx, ("show", "index"), "the same bytes as files, log on"))
    if has("uvicorn", "fastapi"):
        note = "with uvloop and httptools" if has("uvloop", "httptools") else "without uvloop"
        peers.append(Peer(version_of("uvicorn", "fastapi"), _uvicorn, everything, f"{note}, log on"))
    if has("gunicorn", "flask"):
        peers.append(Peer(version_of("gunicorn", "flask"), _gunicorn, everything, "gthread, log on"))
    if has("waitress", "flask"):
        peers.append(Peer(version_of("waitress", "flask"), _waitress, everything, "one process, it has no log"))
    return peers


# ---- stores ----


def fill(folder: pathlib.Path, store: str, count: int, peers: bool) -> None:
    """Make a store of ours, and the same images in a plain table for the peers."""
    import sqlite3

    sys.path.insert(0, str(folder))  # the copy that is measured
    import wmi

    def records() -> Iterator[dict[str, object]]:
        for number in range(count):
            yield wmi.image_record({
                "id": image_id(number), "account_id": ACCOUNT if number % 2 else "a-another1", "is_public": True,
                "source": {"uri": f"file:///var/lib/wakame-vdc/images/ubuntu-{number}.raw"}, "state": "available",
                "description": f"Ubuntu 10.04 LTS, build {number}", "features": {"virtio": True},
                "md5sum": f"{number:032x}",
            })

    with wmi.open_storage(f"sqlite:{folder / store}") as storage:
        storage.add_all(records())
        if peers:
            version = wmi.VERSIONS[wmi.DOCUMENT]
            with contextlib.closing(sqlite3.connect(folder / f"peer-{store}")) as database, database:
                database.execute("CREATE TABLE image (number INTEGER PRIMARY KEY, id UNIQUE, account, public, body)")
                database.executemany(
                    "INSERT INTO image (id, account, public, body) VALUES (?, ?, ?, ?)",
                    ((r["id"], r["account_id"], r["is_public"], wmi.to_json(wmi.render(version, r)))
                     for r in storage.walk(oldest_first=True)),
                )


# ---- import time, start-up, memory ----


def import_times(folder: pathlib.Path, rounds: int) -> tuple[float, float, float]:
    """Return milliseconds of CPU to import what wmi imports, to import wmi, and the median of their ratios."""
    tree = ast.parse((folder / "wmi.py").read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    # Processor time, as a busy machine would spoil the ratio otherwise; everything is in the page cache.
    code = "import time; began = time.process_time(); import {}; print((time.process_time() - began) * 1000)"

    def once(modules: str) -> float:
        command = [sys.executable, "-c", code.format(modules)]
        return float(subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=60).stdout)

    pairs = [(once(", ".join(names)), once("wmi")) for _ in range(rounds + 1)][1:]  # the first one fills caches
    base, whole = (statistics.median(column) for column in zip(*pairs))
    return base, whole, statistics.median(after / before for before, after in pairs)


def start_times(folder: pathlib.Path, how: Sequence[object], rounds: int) -> float:
    """Return the median of milliseconds from the start of the process to its first answer."""
    times = []
    for _ in range(rounds):
        port, log = free_port(), folder / "start.log"
        began = time.perf_counter()
        with running([*how, "serve", "--store", f"sqlite:{folder / 'few.db'}", "--port", port], log,
                     PYTHONPATH=str(folder)) as process:
            wait_for(process, port, log)
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def memory_of(pid: int) -> tuple[float, float]:
    """Return resident and proportional memory of a process in MB. Raises OSError where /proc does not say."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    rss, pss = (int(re.findall(rf"(?m)^{name}: +([0-9]+) kB", text)[0]) for name in ("Rss", "Pss"))
    return rss * 1024 / 1e6, pss * 1024 / 1e6


# ---- tables ----


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first one to the left, as Markdown, so that a README can take it over."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 1) + ("-" if not i else ":") for i, width in enumerate(widths)) + "|")
    print(flush=True)


LABELS = {"show": "show", "index": "index of 20", "other": f"show, another of {MANY:,} each time"}


class Bench:
    """Measure targets in turns, and remember every run by target and scenario."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runs: dict[tuple[str, str], list[Load]] = {}
        self._first = 0
        self._load = load_with_wrk if options.load == "wrk" else load_with_own

    def measure(self, name: str, scenario: str, target: Target, id: str = image_id(0)) -> None:
        """Measure one run."""
        if scenario == "other":  # goes on where the last run ended, roughly: other images again
            self._first = (self._first + MANY // 7) % MANY
        asked = {"show": Asked(f"/api/images/{id}"), "index": Asked(PAGE), "other": Asked("/api/images", self._first)}
        load = self._load(target, asked[scenario], self.options.seconds, self.options.account)
        self.runs.setdefault((name, scenario), []).append(load)

    def median(self, name: str, scenario: str, column: int = 0) -> float:
        """Return the median over the rounds of one column of Load."""
        return statistics.median(load[column] for load in self.runs[name, scenario])

    def ratio(self, name: str, other: str, scenario: str) -> float:
        """Return the median of the ratios of requests/s, name over other, round by round."""
        pairs = zip(self.runs[name, scenario], self.runs[other, scenario])
        return statistics.median(ours.per_second / theirs.per_second for ours, theirs in pairs)

    def show_rates(self, name: str) -> None:
        """Print the table of one target."""
        rows = [["", "requests/s", "median ms", "p99 ms"]]
        for scenario, label in LABELS.items():
            if (name, scenario) in self.runs:
                rate, median, p99 = (self.median(name, scenario, column) for column in range(3))
                rows.append([label, f"{rate:,.0f}", f"{median:.2f}", f"{p99:.2f}"])
        show_table(rows)


def measure_ours(options: argparse.Namespace, folder: pathlib.Path) -> None:
    """Print all tables about our server."""
    fill(folder, "few.db", FEW, peers=False)
    fill(folder, "many.db", MANY, peers=False)
    bench = Bench(options)
    with ours(folder, options.workers, "few.db") as few:
        idle = [memory_of(pid) for pid in few.pids] if os.path.exists("/proc/self/smaps_rollup") else []
        for _ in range(options.rounds):
            bench.measure("ours", "show", few)
            bench.measure("ours", "index", few)
        loaded = [memory_of(pid) for pid in few.pids] if idle else []
    with ours(folder, options.workers, "many.db") as many:
        for _ in range(options.rounds):
            bench.measure("ours", "other", many)
    print(f"{FEW:,} images in sqlite, {options.workers} process(es), access log to a file")
    bench.show_rates("ours")

    base, whole, ratio = import_times(folder, 15)
    script = start_times(folder, [sys.executable, folder / "wmi.py"], 5)
    module = start_times(folder, [sys.executable, "-m", "wmi"], 5)
    rows = [
        ["start (imports in processor time)", "ms"],
        ["import of the standard modules that wmi uses", f"{base:.1f}"],
        [f"import wmi ({(ratio - 1) * 100:+.0f} %)", f"{whole:.1f}"],
        ["python3 wmi.py serve, to the first answer", f"{script:.0f}"],
        ["python3 -m wmi serve (compiled once), to the first answer", f"{module:.0f}"],
    ]
    show_table(rows)
    if idle:
        rows = [["memory of each process", "resident MB", "of it ours alone or our share"]]
        for number, (before, after) in enumerate(zip(idle, loaded)):
            name = "server" if len(idle) == 1 else f"worker {number}" if number else "parent"
            rows.append([f"{name}, before the load", f"{before[0]:.1f}", f"{before[1]:.1f}"])
            rows.append([f"{name}, after it", f"{after[0]:.1f}", f"{after[1]:.1f}"])
        show_table(rows)


READ_PAGES = """
import json, statistics, sys, time
sys.path.insert(0, sys.argv[1])
import wmi
def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
with wmi.open_storage(sys.argv[2]) as store:
    total = []
    first = seconds(lambda: total.append(store.page(None, 0, 20)[0]))
    starts = (0, total[0] // 2, total[0] - 20)
    pages = [statistics.median(seconds(lambda: store.page(None, start, 20)) for _ in range(50)) for start in starts]
    status = open("/proc/self/status").read()  # not getrusage, which knows what this process was before exec
    print(json.dumps([first, *pages, int(status.split("VmHWM:")[1].split()[0]) / 1024]))
"""


def measure_etcd(options: argparse.Namespace, folder: pathlib.Path) -> None:
    """Print tables about one and two servers on a cluster, and on sqlite in turns. Needs etcd and pytest."""
    fill(folder, "many.db", options.images, peers=False)  # makes wmi importable, for the tests' Cluster too
    from members import Cluster

    import wmi

    bench = Bench(options)
    with Cluster(options.etcd, "--quota-backend-bytes", str(8 << 30)) as cluster, contextlib.ExitStack() as stack:
        urls = {"sqlite": f"sqlite:{folder / 'many.db'}", "etcd": f"etcd:{cluster.location()}"}
        began = time.perf_counter()
        with wmi.open_storage(urls["sqlite"]) as source, wmi.open_storage(urls["etcd"]) as target:
            target.add_all(source.walk(oldest_first=True))
        loaded = time.perf_counter() - began
        rows = [["", "first page, s", "page at the start, ms", "in the middle", "at the end", "memory at most, MB"]]
        for name, url in urls.items():
            command = [sys.executable, "-c", READ_PAGES, str(folder), url]
            first, *pages, memory = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            rows.append([name, f"{first:.2f}", *(f"{1000 * page:.2f}" for page in pages), f"{memory:.0f}"])
        print(f"{options.images:,} images, {options.etcd} members of etcd; copied into it in {loaded:.0f} s")
        show_table(rows)
        servers = [stack.enter_context(ours(folder, 1, url)) for url in (urls["sqlite"], urls["etcd"], urls["etcd"])]
        for server in servers:
            until_answered(server, PAGE)
        for _ in range(options.rounds):
            for scenario in LABELS:
                bench.measure("sqlite", scenario, servers[0])
                bench.measure("etcd, one server", scenario, servers[1])
                threads = [threading.Thread(target=bench.measure, args=[f"pair {n}", scenario, server])
                           for n, server in enumerate(servers[1:])]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    rows = [["requests/s (p99, ms)", *LABELS.values()]]
    for name in ("sqlite", "etcd, one server"):
        rows.append([name, *(f"{bench.median(name, s):,.0f} ({bench.median(name, s, 2):.1f})" for s in LABELS)])
    both = [sum(bench.median(f"pair {n}", scenario) for n in range(2)) for scenario in LABELS]
    rows.append(["etcd, two servers at once", *(f"{rate:,.0f}" for rate in both)])
    show_table(rows)


def until_answered(target: Target, path: str) -> None:
    """Wait until a server answers a path, which it cannot at first if it has to copy a million images."""
    while True:
        try:
            fetch(target, path)
            return
        except OSError:
            time.sleep(0.1)


def measure_url(options: argparse.Namespace) -> None:
    """Print requests/s of a server that runs already."""
    match = re.fullmatch(r"http://([^/:]+):([0-9]+)/?", options.url)
    if not match:
        raise SystemExit(f"--url {options.url}: give http://HOST:PORT")
    target, bench = Target(match[1], int(match[2])), Bench(options)
    answer = json.loads(fetch(target, PAGE, options.account))
    answer = answer[0] if isinstance(answer, list) else answer
    images = answer.get("result") or answer.get("results") or _fail("the server has no image to show")
    for _ in range(options.rounds):
        bench.measure(options.url, "show", target, images[0]["id"])
        bench.measure(options.url, "index", target)
    print(f"{options.url}: {len(images)} images on the page")
    bench.show_rates(options.url)


def measure_peers(options: argparse.Namespace, folder: pathlib.Path) -> None:
    """Print requests/s of ours and of the peers, and ours over theirs."""
    peers = installed_peers()
    fill(folder, "few.db", FEW, peers=True)
    fill(folder, "many.db", MANY, peers=True)
    (folder / "peer_app.py").write_text(APP)
    (folder / "static").mkdir()
    bench, targets = Bench(options), {}
    with contextlib.ExitStack() as stack:
        few = stack.enter_context(ours(folder, options.workers, "few.db"))
        targets["wmi.py"] = {"show": few, "index": few}
        targets["wmi.py"]["other"] = stack.enter_context(ours(folder, options.workers, "many.db"))
        (folder / "static" / image_id(0)).write_bytes(fetch(few, f"/api/images/{image_id(0)}"))
        (folder / "static" / "index.json").write_bytes(fetch(few, PAGE))
        for peer in peers:
            targets[peer.name] = {}
            for store, scenarios in (("few.db", ("show", "index")), ("many.db", ("other",))):
                asked = [scenario for scenario in scenarios if scenario in peer.scenarios]
                if asked:
                    port, log = free_port(), folder / "peer.log"
                    command = peer.command(folder, port, options.workers)
                    environment = {"PEER_DATABASE": str(folder / f"peer-{store}")}
                    target = wait_for(stack.enter_context(running(command, log, **environment)), port, log)
                    targets[peer.name].update(dict.fromkeys(asked, target))
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            for scenario in LABELS:
                for name, scenarios in targets.items():
                    if scenario in scenarios:
                        bench.measure(name, scenario, scenarios[scenario])
    for scenario, label in LABELS.items():
        rows = [[f"{label}, {options.workers} process(es)", "requests/s", "median ms", "p99 ms", "wmi.py is", ""]]
        notes = {peer.name: peer.note for peer in peers}
        for name, scenarios in targets.items():
            if scenario in scenarios:
                rate, median, p99 = (bench.median(name, scenario, column) for column in range(3))
                ratio = "" if name == "wmi.py" else f"{bench.ratio('wmi.py', name, scenario):.2f} times"
                note = notes.get(name, "the whole API, log on")
                rows.append([name, f"{rate:,.0f}", f"{median:.2f}", f"{p99:.2f}", ratio, note])
        show_table(rows)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="measure this server, http://HOST:PORT")
    parser.add_argument("--account", default=ACCOUNT, help="who asks (default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="measure other servers that are installed, too")
    parser.add_argument("--etcd", type=int, metavar="N", help="measure servers on a cluster of N members, too")
    parser.add_argument("--images", type=int, default=MANY, help="for --etcd, at least %(default)s (the default)")
    parser.add_argument("--workers", type=int, default=1, help="processes of each server (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2, help="of each run (default: %(default)s)")
    parser.add_argument("--load", choices=("wrk", "own"), default="wrk" if shutil.which("wrk") else "own",
                        help="what makes the requests (default: %(default)s)")
    options = parser.parse_args()
    print(f"{platform.python_implementation()} {platform.python_version()}, {multiprocessing.cpu_count()} processors, "
          f"load by {options.load} on {CONNECTIONS} connections, "
          f"median of {options.rounds} runs of {options.seconds:g} s\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for source in ("wmi.py", "backends"):  # a copy, compiled as an installed one is
            (shutil.copytree if source == "backends" else shutil.copy)(ROOT / source, folder / source)
        for source in (folder / "wmi.py", *(folder / "backends").glob("*.py")):
            py_compile.compile(str(source), doraise=True)
        if options.url:
            try:
                measure_url(options)
            except (OSError, ValueError) as error:
                raise SystemExit(f"{options.url}: {error}") from error
        elif options.etcd:
            measure_etcd(options, folder)
        elif options.peers:
            measure_peers(options, folder)
        else:
            measure_ours(options, folder)


if __name__ == "__main__":
    main()
