"""Say which wmi is tested, know the option for the long runs, and make what the tests of the server share."""

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

# In a checkout, the file beside tests/. tox sets WMI_INSTALLED: there it is the installed wheel.
if not os.environ.get("WMI_INSTALLED"):
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    os.environ["PYTHONPATH"] = sys.path[0]  # for the processes that tests start
    # Nothing is written to the checkout, but no process compiles 5,000 lines again. (pip has compiled the wheel.)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="wmi-tests-")
    atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)

os.environ["LANGUAGE"] = "C"  # argparse looks for no translations of its messages

from serving import serving
from support import Command, image

import wmi

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets `pytest &` ignore it, and so all its children

# The whole suite is run in three processes, as tests often wait. Each share takes about as long as all other files.
SHARES = [
    "test_etcd test_history test_page".split(),
    "test_cli test_client test_deadlines test_docs test_durability test_fetch test_processes test_stopping"
    " test_vendoring".split(),
]


def pytest_addoption(parser):
    """Offer --long, whose runs are still a fixed number."""
    parser.addoption("--long", action="store_true", help="hundreds of kills and mutations instead of a few")
    parser.addoption("--share", type=int, help="run what `pytest` without a file runs in process 0, 1 or 2")


def pytest_configure(config):
    """Know the marks, and whether the whole suite was asked for: then this process runs one share of it."""
    config.addinivalue_line("markers", "long: runs with --long only")
    config.addinivalue_line("markers", "browser: needs a Chromium, and is the same on each Python")
    config.addinivalue_line("markers", "etcd: needs members of etcd, and takes long")
    config.others = {}  # the numbers of the other shares, later each with its process and what that prints
    option = config.option
    part = option.share is not None or option.keyword or option.markexpr or option.usepdb or option.collectonly
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not part:
        option.share, config.others = 0, dict.fromkeys(range(1, 1 + len(SHARES)))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Mark what uses a browser or etcd; leave out what only --long runs, without a line for each."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("browser")
        if item.path.name in ("test_etcd.py", "test_history.py"):
            item.add_marker("etcd")
    left = [] if config.getoption("--long") else [item for item in items if item.get_closest_marker("long")]
    if config.option.share is not None:
        shares = {name: number for number, names in enumerate(SHARES, 1) for name in names}
        left += [item for item in items if shares.get(item.path.stem, 0) != config.option.share]
    config.hook.pytest_deselected(items=left)
    left = {*left}
    items[:] = [item for item in items if item not in left]


def pytest_sessionstart(session):
    """Start the processes that run the other shares."""
    invoked, others = session.config.invocation_params, session.config.others
    for number in others:
        printed = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "pytest", f"--share={number}", *invoked.args]
        others[number] = subprocess.Popen(command, stdout=printed, cwd=invoked.dir), printed


def pytest_sessionfinish(session):
    """Wait for the other shares, print what they printed, and fail if one of them failed."""
    for process, printed in session.config.others.values():
        session.exitstatus = process.wait() or session.exitstatus
        with printed:
            printed.seek(0)
            print("\n", printed.read())


def pytest_collection_finish():
    """Keep what pytest itself holds, thousands of tests, out of each search for what is unreachable."""
    gc.collect()
    if hasattr(gc, "freeze"):  # PyPy has none
        gc.freeze()


def pytest_report_header():
    """Show what is tested."""
    return f"wmi: {wmi.__version__} from {wmi.__file__}"


# ---- of the running server ----


@pytest.fixture
def storage():
    """A store in memory with one image."""
    with wmi.MemoryStorage() as storage:
        storage.add(image())
        yield storage


@pytest.fixture
def log():
    """Take the log's lines."""
    return []


@pytest.fixture
def quiet(log, capfd):
    """Whatever is done to a server, it prints no traceback and logs no fault of its own."""
    yield
    text = capfd.readouterr()
    assert "Traceback" not in text.err + text.out
    assert not [line for line in log if "error: connection" in line]


@pytest.fixture
def served(storage, log):
    """A running server."""
    with serving(storage, log=log.append) as served:
        yield served


@pytest.fixture
def shortened(monkeypatch):
    """Make each deadline a fraction of a second."""
    for name in ("IDLE_SECONDS", "HEAD_SECONDS", "BODY_SECONDS", "SEND_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(wmi, name, 0.4)


@pytest.fixture
def large():
    """A store whose index is streamed: 2 MB, in several pieces of the store."""
    with wmi.MemoryStorage() as storage:
        storage.add_all(image(f"wmi-{number}", description="x" * 1500) for number in range(1100))
        yield storage


@pytest.fixture
def unserved(storage):
    """A server whose loop does not run."""
    server = wmi.Server(storage, port=0, host_names=None)
    yield server
    server.stop()


@pytest.fixture
def command(tmp_path):
    """Start servers that end with the test."""
    started = []

    def start(*options, **more):
        started.append(Command(tmp_path, *options, **more))
        return started[-1]

    if not hasattr(os, "fork"):
        pytest.skip("signals and processes of POSIX")
    yield start
    for each in started:
        each.end()
