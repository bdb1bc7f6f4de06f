"""Say which wmi is tested, know the option for the long runs, and make what the tests of the server share."""

import atexit
import gc
import os
import shutil
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

from serving import serving
from support import Command, image

import wmi

# These files take as long as all others.
SECOND_HALF = {"test_etcd.py", "test_history.py", "test_page.py", "test_cli.py", "test_docs.py"}


def pytest_addoption(parser):
    """Offer --long, whose runs are still a fixed number, and --halves, for a machine with two processors."""
    parser.addoption("--long", action="store_true", help="hundreds of kills and mutations instead of a few")
    parser.addoption("--halves", action="store_true", help="run the suite in two processes at the same time")
    parser.addoption("--second-half", action="store_true", help="run what --halves runs in the second process")


def pytest_configure(config):
    """Know the marks."""
    config.addinivalue_line("markers", "long: runs with --long only")
    config.addinivalue_line("markers", "browser: needs a Chromium, and is the same on each Python")
    config.addinivalue_line("markers", "etcd: needs members of etcd, and takes long")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Mark what uses a browser or etcd; leave out what only --long runs, without a line for each."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("browser")
        if item.path.name in ("test_etcd.py", "test_history.py"):
            item.add_marker("etcd")
    left = [] if config.getoption("--long") else [item for item in items if item.get_closest_marker("long")]
    if config.getoption("--halves") or config.getoption("--second-half"):
        ours = config.getoption("--second-half")
        left += [item for item in items if (item.path.name in SECOND_HALF) != ours]
    config.hook.pytest_deselected(items=left)
    left = {*left}
    items[:] = [item for item in items if item not in left]


def pytest_sessionstart(session):
    """With --halves, start the second process."""
    if session.config.getoption("--halves"):
        arguments = [word.replace("--halves", "--second-half") for word in session.config.invocation_params.args]
        printed = session.config.printed = tempfile.TemporaryFile("w+")
        session.config.second = subprocess.Popen([sys.executable, "-m", "pytest", *arguments], stdout=printed)


def pytest_sessionfinish(session):
    """With --halves, wait for the second process, print what it printed, and fail if it failed."""
    if session.config.getoption("--halves"):
        code = session.config.second.wait()
        session.config.printed.seek(0)
        print("\n", session.config.printed.read())
        session.config.printed.close()
        session.exitstatus = session.exitstatus or code


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
