"""Every way in which wmi.py gets into somebody's program: a script, a module, a copy, a zip, a wheel."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tokenize
import venv
import zipfile
from collections.abc import Iterator

import pytest

import wmi

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = pathlib.Path(wmi.__file__)
BACKENDS = next(folder for folder in map(pathlib.Path, wmi.__path__) if folder.is_dir())
INSTALLED = bool(os.environ.get("WMI_INSTALLED"))

MAX_CODE_LINES, MAX_CORE_LINES = 3265, 2560  # of wmi.py, and without its part "Optional": what the README promises

# Run by the copy under test as `module`: every store opens, and comes from beside the copy.
EXERCISE = """
import sys
module.open_storage("etcd:http://127.0.0.1:2379/images").close()  # asks nothing before it has to
for scheme in ("memory", "json", "sqlite"):
    with module.open_storage(f"{scheme}:{sys.argv[1]}/images.{scheme}") as storage:
        id = module.Catalog(storage).register({"account_id": "a-shpoolxx"})
        assert module.Catalog(storage, "a-shpoolxx").show(id)["id"] == id
        print(type(storage).__module__)
"""

# A backend as a third party writes it, complete for what is asked of it here.
THIRD_PARTY = """
import collections

class Store(dict):
    def __init__(self, location): self["wmi-here"] = {"id": "wmi-here", "location": location}
    get = dict.__getitem__
    def close(self): pass
    def __enter__(self): return self
    def __exit__(self, *exc): pass

def open_storage(location): return Store(location)
"""


def run(*arguments, path=(), cwd=None, code=0, site=False):
    """Run Python with these folders on its path, without site-packages unless asked; return what it printed."""
    kept = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")  # where what is compiled is kept: not where it is found
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("WMI_", "PYTHON")) or name in kept
    }
    environment.update(PYTHONPATH=os.pathsep.join(map(str, path)), PYTHONUTF8="1")
    done = subprocess.run(
        [sys.executable, *([] if site else ["-S"]), "-W", "error", *map(str, arguments)],
        env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Nothing is found in the checkout unless a test says so."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture
def copy(tmp_path):
    """Return a folder with wmi.py and backends/ as in a checkout, elsewhere."""
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(SOURCE, folder / "wmi.py")
    shutil.copytree(BACKENDS, folder / "backends", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def work(tmp_path):
    """Return an empty folder to run in, where nothing can be imported by chance."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_what_is_tested():
    """tox tests the installed wheel, everything else the checkout; never one for the other."""
    assert (SOURCE.parent != ROOT) == INSTALLED
    assert BACKENDS.name == ("wmi_backends" if INSTALLED else "backends")


# ---- a file that is run or imported ----


@pytest.mark.parametrize("way, scheme", [("script", "json"), ("module", "sqlite")])
def test_command(copy, work, scheme, way):
    """`python wmi.py` and `python -m wmi` are the command, from any folder, with every backend."""
    how, path = (["-m", "wmi"], [copy]) if way == "module" else ([copy / "wmi.py"], [])
    store = ["--store", f"{scheme}:images"]
    added = run(*how, "add", "volume", "snap-1", "--uuid", "wmi-one", "-a", "a-shpoolxx", *store, path=path, cwd=work)
    assert added == "wmi-one\n"
    assert run(*how, "list", "-o", "id", *store, path=path, cwd=work) == "wmi-one\n"
    assert run(*how, "--version", path=path, cwd=work) == f"wmi {wmi.__version__}\n"


def test_exit_code(copy, work):
    """The script exits with what main returns, 1 here, and says why in one line."""
    wmi.open_storage(f"sqlite:{work / 'images'}").close()
    message = run(copy / "wmi.py", "show", "wmi-none", "--store", "sqlite:images", cwd=work, code=1)
    assert message == "wmi: no such image: wmi-none in sqlite:images\n"


def test_import(copy, work):
    """A script imports wmi, and finds the backends beside it."""
    printed = run("-c", "import wmi as module" + EXERCISE, work, path=[copy], cwd=work)
    assert printed.split() == ["wmi", "wmi.json_store", "wmi.sqlite_store"]


def test_link(copy, work, tmp_path):
    """A folder that links to a checkout serves as well as the checkout."""
    (tmp_path / "link").symlink_to(copy)
    printed = run("-c", "import wmi as module" + EXERCISE, work, path=[tmp_path / "link"], cwd=work)
    assert printed.split() == ["wmi", "wmi.json_store", "wmi.sqlite_store"]


def test_vendored_under_another_name(copy, work, tmp_path):
    """A copy inside a package, with another name, has backends of its own beside it."""
    vendor = tmp_path / "lib" / "pkg" / "_vendor"
    vendor.mkdir(parents=True)
    (vendor / "__init__.py").touch()
    (vendor.parent / "__init__.py").touch()
    shutil.copy(copy / "wmi.py", vendor / "images_api.py")
    shutil.copytree(copy / "backends", vendor / "backends")
    code = "from pkg._vendor import images_api as module" + EXERCISE + "assert 'wmi' not in sys.modules"
    name = "pkg._vendor.images_api"
    printed = run("-c", code, work, path=[tmp_path / "lib"], cwd=work)
    assert printed.split() == [name, f"{name}.json_store", f"{name}.sqlite_store"]
    assert run("-m", name, "--version", path=[tmp_path / "lib"], cwd=work) == f"wmi {wmi.__version__}\n"


@contextlib.contextmanager
def started(*how, folder):
    """Start `python HOW serve` in a folder, and yield its process and the base URL that it says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WMI_", "PYTHON"))}
    command = [sys.executable, *how, "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stderr.readline()
            assert "wmi: serving" in said, said + process.stderr.read()
            yield process, re.search("http://[^/]+", said)[0]
        finally:
            process.terminate()
            process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="the promise is about CPython")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
@pytest.mark.parametrize("how, most", [(["-m", "wmi"], 28_000_000), (["wmi.py"], 42_000_000)], ids=["module", "script"])
def test_promised_memory(copy, how, most, monkeypatch):
    """Serving 1,000 images from sqlite takes little memory, also when all were asked for."""
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    subprocess.run([sys.executable, "-m", "compileall", "-q", copy], check=True)  # as the first start does
    with wmi.open_storage(f"sqlite:{copy / 'images.db'}") as storage:
        storage.add_all(wmi.image_record({"id": f"wmi-{n}", "account_id": "a-guest1"}) for n in range(1000))
    with started(*how, folder=copy) as (process, url):
        client = wmi.Client(url, "a-guest1")
        assert client.index(limit=20).total == 1000
        assert [client.show(f"wmi-{n}")["id"] for n in range(0, 1000, 2)]
        resident = re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{process.pid}/status").read_text())[1]
    assert int(resident) * 1024 <= most


def test_two_copies(copy, work, tmp_path):
    """Two copies in one process do not mix: each has its own errors and backends."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(copy / "wmi.py", other / "theirs.py")
    shutil.copytree(copy / "backends", other / "backends")
    code = """
        import theirs, wmi
        assert theirs.Error is not wmi.Error
        print(type(theirs.open_storage("json:a")).__module__, type(wmi.open_storage("json:b")).__module__)
        """
    assert run("-c", _dedented(code), path=[copy, other], cwd=work) == "theirs.json_store wmi.json_store\n"


@pytest.fixture
def archive(copy, tmp_path):
    """Return a zip with wmi.py and backends/, with the start of a program in it."""
    (copy / "__main__.py").write_text("import sys, wmi\nsys.exit(wmi.main())\n")
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for source in sorted(copy.rglob("*.py")):
            file.write(source, source.relative_to(copy))
    return path


def test_zip(archive, work):
    """A zip is imported from and run like a folder, backends included."""
    printed = run("-c", "import wmi as module" + EXERCISE, work, path=[archive], cwd=work)
    assert printed.split() == ["wmi", "wmi.json_store", "wmi.sqlite_store"]
    wmi.open_storage(f"sqlite:{work / 'new'}").close()
    for how, path in (([archive], []), (["-m", "wmi"], [archive])):
        assert run(*how, "list", "-o", "id", "--store", "sqlite:new", path=path, cwd=work) == ""
    assert "etcd, json, memory, sqlite" in run(archive, "list", "--store", "none:x", cwd=work, code=1)


# ---- backends ----


def test_backend_dropped_beside(copy, work):
    """A file backends/NAME_store.py is a backend, with nothing to register."""
    (copy / "backends" / "mine_store.py").write_text(THIRD_PARTY)
    code = "import wmi; print(wmi.open_storage('mine:there').get('wmi-here')['location'])"
    assert run("-c", code, path=[copy], cwd=work) == "there\n"


def test_registered_backend(copy, work):
    """register_backend comes first, even before a file of the same scheme."""
    code = """
        import wmi
        wmi.register_backend("mine", lambda location: {"mine": location})
        wmi.register_backend("json", lambda location: {"instead": location})
        print(wmi.open_storage("mine:a:b"), wmi.open_storage("json:"))
        """
    assert run("-c", _dedented(code), path=[copy], cwd=work) == "{'mine': 'a:b'} {'instead': ''}\n"


@pytest.fixture
def plugin(tmp_path):
    """Return a folder that is as if a distribution with a backend `theirs` were installed in it."""
    folder = tmp_path / "plugin"
    info = folder / "theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "theirs_images.py").write_text(THIRD_PARTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[wmi.backends]\ntheirs = theirs_images:open_storage\nsqlite = theirs_images:open_storage\n"
        "broken = theirs_images_that_are_not_there:open_storage\n"
    )
    return folder


def test_backend_of_a_distribution(copy, work, plugin):
    """An entry point in the group wmi.backends is a backend; a file beside wmi.py comes before it."""
    code = """
        import sys, wmi
        with wmi.open_storage("memory:"), wmi.open_storage("sqlite:images") as storage:
            print(type(storage).__module__, "theirs_images" in sys.modules)
        print(wmi.open_storage("theirs:x/y").get("wmi-here")["location"])
        """
    printed = run("-c", _dedented(code), path=[copy, plugin], cwd=work)
    assert printed == "wmi.sqlite_store False\nx/y\n"


def test_unknown_scheme_names_the_known(copy, work, plugin):
    """A scheme that nobody knows is refused with those that somebody does; none of them is imported."""
    code = """
        import sys, wmi
        for url in ("none:x", "sqlite", "../json:x", "Json:x", "contract:x", ":"):
            try:
                wmi.open_storage(url)
            except wmi.InvalidParameter as error:
                assert all(name in str(error) for name in ("broken, etcd, json, memory, sqlite, theirs", url)), error
            except AttributeError:
                print(url)
        print(sorted(name for name in sys.modules if "_store" in name or "theirs" in name))
        """
    assert run("-c", _dedented(code), path=[copy, plugin], cwd=work) == "[]\n"


def test_backend_that_lacks_something(copy, work):
    """A backend whose own import fails says so; it is not taken for an unknown scheme."""
    (copy / "backends" / "mine_store.py").write_text("import not_there_at_all\n")
    code = """
        import wmi
        try:
            wmi.open_storage("mine:x")
        except ModuleNotFoundError as error:
            print(error.name)
        """
    assert run("-c", _dedented(code), path=[copy], cwd=work) == "not_there_at_all\n"


def test_nothing_is_imported_before_it_is_asked_for(copy, work):
    """`import wmi` and a store in memory load no backend, no database, and no parser of arguments."""
    code = """
        import sys, wmi
        with wmi.open_storage("memory:") as storage:
            wmi.Catalog(storage, "a-shpoolxx").index()
        late = ("argparse", "sqlite3", "importlib.metadata", "wmi.json_store", "wmi.sqlite_store", "wmi.contract")
        print([name for name in late if name in sys.modules])
        with wmi.open_storage("json:images.json"):
            print([name for name in late if name in sys.modules])
        """
    assert run("-c", _dedented(code), path=[copy], cwd=work) == "[]\n['wmi.json_store']\n"


# ---- what the files are made of ----


def _dedented(code: str) -> str:
    return re.sub(r"(?m)^ {8}", "", code)


def _imports(path: pathlib.Path) -> Iterator[str]:
    """Yield the name of every module that a file imports, wherever; relative ones begin with a dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def _is_standard(name: str) -> bool:
    top = name.partition(".")[0]
    if sys.version_info >= (3, 10):
        return top in sys.stdlib_module_names
    if top in (*sys.builtin_module_names, "msvcrt"):
        return True
    spec = importlib.util.find_spec(top) if top else None
    origin = (spec and spec.origin) or ""
    inside = origin in ("built-in", "frozen") or origin.startswith(sysconfig.get_path("stdlib"))
    return inside and "site-packages" not in origin


FILES = [SOURCE, *sorted(BACKENDS.glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_standard_library_only(path):
    """wmi.py and its backends import the standard library and nothing else; backends not even wmi, but each other."""
    siblings = [f".{scheme}_store" for scheme in _schemes_with_files()] if path != SOURCE else []
    assert [name for name in _imports(path) if not _is_standard(name) and name not in siblings] == []


def test_foreign_modules_are_seen():
    """The test before this one would notice a package, a relative import and wmi itself."""
    assert [_is_standard(name) for name in ("pytest", ".contract", "wmi", "os.path", "sys")] == [False] * 3 + [True] * 2


def count_code_lines(source: str) -> int:
    """Return how many lines hold code: no blank lines, no comments, no docstrings."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_code_lines_are_counted_right():
    """A blank line, a comment and a docstring do not count; each line of a long expression does."""
    source = '"""A.\n\nB."""\n\n# c\nx = (1,\n  2)  # d\ndef f():\n    """E."""\n    return """\n\n"""\n'
    assert count_code_lines(source) == 6


def core_of(source):
    """Return wmi.py without its part "Optional"."""
    before, _, after = source.partition("#" * 100 + "\n# Optional\n")
    return before + after[after.index("if __name__ ==") :]


def test_promised_size():
    """wmi.py stays small enough to be read at one sitting."""
    source = SOURCE.read_text(encoding="utf-8")
    assert count_code_lines(source) <= MAX_CODE_LINES
    assert count_code_lines(core_of(source)) <= MAX_CORE_LINES


@pytest.mark.parametrize(
    "names",
    [
        "golden image deployed_clients hosts log",
        pytest.param("yaml versions catalog http connections deadlines processes stopping", marks=pytest.mark.long),
    ],
    ids=["some", "more"],
)
def test_core_works_without_the_optional_part(names, tmp_path):
    """With "Optional" deleted, the tests of the other parts pass, and the command has its other subcommands."""
    (tmp_path / "wmi.py").write_text(core_of(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copytree(BACKENDS, tmp_path / "backends")
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in names.split()]
    config = ["-c", str(ROOT / "pyproject.toml"), "-o", f"cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *config, "-q", "-x", *files], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "WMI_INSTALLED": "1", "PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}, timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, "wmi.py"]
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "serve" in shown and "fetch" not in shown
    subprocess.run([*command, "add", "volume", "snap-1", "-a", "a-x"], cwd=tmp_path, capture_output=True, check=True)
    listed = subprocess.run([*command, "list", "-o", "id"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert listed.stdout.startswith("wmi-")


@pytest.mark.parametrize("scheme, most", [("json", 450), ("sqlite", 450), ("etcd", 650)])
def test_promised_size_of_a_backend(scheme, most):
    """A backend is short; the one that speaks to a cluster is the longest."""
    assert count_code_lines((BACKENDS / f"{scheme}_store.py").read_text(encoding="utf-8")) <= most


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/test_*.py")), ids=lambda path: path.name)
def test_tests_say_what_they_expect(path):
    """Every test has a docstring."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    tests = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert [test.name for test in tests if not ast.get_docstring(test)] == []


# ---- a distribution ----


@pytest.mark.skipif(not INSTALLED, reason="wmi is not installed here; tox installs it")
def test_installed_distribution():
    """The wheel is wakame-wmi, of this version, needs nothing, and declares the backends."""
    distribution = importlib.metadata.distribution("wakame-wmi")
    assert distribution.version == wmi.__version__
    assert not distribution.requires
    openers = {entry.name: entry for entry in distribution.entry_points if entry.group == "wmi.backends"}
    assert {name: entry.value for name, entry in openers.items()} == {
        scheme: f"wmi_backends.{scheme}_store:open_storage" for scheme in _schemes_with_files()
    }
    for entry in openers.values():
        assert callable(entry.load())


def _schemes_with_files() -> list[str]:
    return sorted(path.name[: -len("_store.py")] for path in BACKENDS.glob("*_store.py"))


@pytest.mark.skipif(not INSTALLED, reason="wmi is not installed here; tox installs it")
def test_installed_files():
    """The wheel brings wmi.py and wmi_backends/, and no top-level name that others could have."""
    files = importlib.metadata.files("wakame-wmi") or []
    names = {file.parts[0] for file in files if file.suffix == ".py" and "__pycache__" not in file.parts}
    assert names == {"wmi.py", "wmi_backends"}
    assert importlib.util.find_spec("backends") is None


@pytest.mark.skipif(not INSTALLED, reason="wmi is not installed here; tox installs it")
def test_installed_command(work):
    """The script wmi runs, opens a backend of the wheel, and exits with what main returns."""
    script = shutil.which("wmi", path=sysconfig.get_path("scripts"))
    assert script
    for url in (f"json:{work / 'images'}", f"sqlite:{work / 'images.db'}"):
        with wmi.open_storage(url) as storage:
            storage.add(wmi.image_record({"account_id": "a-guest1"}))
    listing = subprocess.run([script, "list", "--store", "json:images"], cwd=work, capture_output=True, text=True)
    assert (listing.returncode, listing.stdout[:2], listing.stderr) == (0, "ID", "")
    failing = subprocess.run([script, "show", "wmi-none"], cwd=work, capture_output=True, text=True)
    assert (failing.returncode, failing.stderr) == (1, "wmi: no such image: wmi-none in sqlite:images.db\n")


def _can_build() -> bool:
    if not all(map(importlib.util.find_spec, ("setuptools", "pip"))):
        return False
    version = importlib.metadata.version("setuptools").split(".")
    return tuple(map(int, version[:2])) >= (70, 1)  # the first that builds a wheel by itself


building = pytest.mark.skipif(not _can_build(), reason="building needs pip and setuptools 70.1; tox has them")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a copy of what a build reads, so that it leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE", "wmi.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "backends", folder / "backends", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def _environment(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder of the programs of a new, empty virtual environment."""
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def _try(programs: pathlib.Path, cwd: pathlib.Path) -> str:
    """Return where the backends of an installed wmi come from, by file and by entry point."""
    code = """
        import importlib.metadata as metadata, wmi
        from wmi_backends.contract import StorageContract
        entries = metadata.distribution("wakame-wmi").entry_points
        found = [entry.load() for entry in entries if entry.group == "wmi.backends"]
        with wmi.open_storage("json:images") as storage:
            print(type(storage).__module__, *sorted({opener.__module__ for opener in found}))
        """
    version = subprocess.run([programs / "wmi", "--version"], cwd=cwd, capture_output=True, text=True)
    assert version.stdout == f"wmi {wmi.__version__}\n", version.stderr
    done = subprocess.run([programs / "python", "-c", _dedented(code)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _expected() -> str:
    return " ".join(["wmi.json_store", *(f"wmi_backends.{scheme}_store" for scheme in _schemes_with_files())]) + "\n"


@building
def test_wheel_of_the_source_distribution(project, tmp_path, work):
    """A wheel built from the source distribution works in an empty environment."""
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=project, check=True, capture_output=True)
    (source,) = tmp_path.glob("wakame*wmi-*.tar.gz")
    with tarfile.open(source) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        assert {"wmi.py", "LICENSE", "README.md", "pyproject.toml", "backends/json_store.py"} <= names
    _pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        tops = {name.partition("/")[0] for name in file.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"wmi.py", "wmi_backends"}
    programs = _environment(tmp_path / "env")
    _pip("--python", programs / "python", "install", "--no-deps", "--no-index", wheel)
    assert _try(programs, work) == _expected()


@building
def test_editable_install(project, tmp_path, work):
    """An editable install runs the checkout, wmi_backends included."""
    programs = _environment(tmp_path / "env")
    # pip would build with the Python it installs for, which has no setuptools: so the wheel is built here
    code = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    _pip("--python", programs / "python", "install", "--no-deps", "--no-index", wheel)
    assert _try(programs, work) == _expected()
    code = "import os, wmi, wmi_backends.json_store as store; print(os.path.dirname(wmi.__file__), store.__file__)"
    done = subprocess.run([programs / "python", "-c", code], cwd=work, capture_output=True, text=True)
    assert done.stdout.split() == [str(project), str(project / "backends" / "json_store.py")]
