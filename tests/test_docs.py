"""The README and the docstrings are true: what they print is run, what they name exists."""

import ast
import contextlib
import doctest
import io
import os
import pathlib
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
import unittest
import urllib.request

import pytest
from support import free_port

import wmi

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = pathlib.Path(wmi.__file__).read_text(encoding="utf-8")

# A fresh Debian has no curl and no sqlite3 shell; then these stand in for them.
STAND_INS = {
    "curl": """
        import sys, urllib.error, urllib.request
        args, headers, method, url = iter(sys.argv[1:]), {}, "GET", ""
        for arg in args:
            if arg == "-H":
                name, _, value = next(args).partition(": ")
                headers[name] = value
            elif arg == "-X":
                method = next(args)
            elif not arg.startswith("-"):
                url = arg
        try:
            answer = urllib.request.urlopen(urllib.request.Request(url, None, headers, method=method))
        except urllib.error.HTTPError as error:
            answer = error
        sys.stdout.buffer.write(answer.read())
        """,
    "sqlite3": """
        import sqlite3, sys
        for row in sqlite3.connect(sys.argv[1]).execute(sys.argv[2]):
            print("|".join(map(str, row)))
        """,
}


def blocks(language):
    """Return the fenced blocks of the README in a language, such as "python backend"."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def examples(language="console"):
    """Return the README's console examples in order: command, what it prints."""
    return [
        (command, printed)
        for block in blocks(language)
        for command, printed in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what a fresh clone has, a free port, and a PATH with the README's commands."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copy(wmi.__file__, folder / "wmi.py")
    backends = next(path for path in map(pathlib.Path, wmi.__path__) if path.is_dir())
    shutil.copytree(backends, folder / "backends", ignore=shutil.ignore_patterns("__pycache__"))
    commands = folder / "bin"
    commands.mkdir()
    (commands / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name, code in STAND_INS.items():
        if not shutil.which(name):
            (commands / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
    for command in commands.iterdir():
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WMI_")}
    environment["PATH"] = f"{commands}{os.pathsep}{environment['PATH']}"
    return folder, str(port), environment


@pytest.fixture(scope="module")
def server(place):
    """The README's first example, running: the process and the line that it printed."""
    folder, port, environment = place
    command, _ = examples()[0]
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command} --port {port}"],
        cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
    )
    line = process.stderr.readline()
    log = pathlib.Path(folder, "log").open("w")
    drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
    yield line
    process.terminate()
    assert process.wait(15) == 0
    drain.wait(15)
    process.stderr.close()
    log.close()


def run(place, command):
    """Return what a command of the README prints, on the port where the server listens."""
    folder, port, environment = place
    done = subprocess.run(
        ["bash", "-c", command.replace("9001", port)],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
    )
    return done.stdout.decode().replace(port, "9001")


def test_first_example_serves(place, server):
    """The first command of the README prints its line and serves."""
    command, printed = examples()[0]
    assert command == "python3 wmi.py serve --sample"
    assert server.replace(place[1], "9001") == printed


def test_examples_print_what_the_readme_prints(place, server):
    """Every other command, in order, prints exactly what stands below it."""
    assert len(examples()) > 10
    for command, printed in examples()[1:]:
        output = run(place, command)
        if output and not output.endswith("\n"):
            output += "\n"  # curl prints the body as it is
        assert output == printed, command


def test_python_blocks_run(place, server, tmp_path):
    """The Python blocks run, one after the other, against the running example server."""
    code = "\n".join(blocks("python"))
    assert "Client(" in code
    assert "Server(" in code
    environment = {**place[2], "PYTHONPATH": str(place[0])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.replace("9001", place[1])],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_image_is_published_and_fetched(place):
    """The README's walk, in one shell: a token, a server with files, add, list, fetch; nothing without the token."""
    folder, _, environment = place
    port, lines, expected = free_port(), ["trap 'kill $!' EXIT"], []
    for command, printed in examples("console publish"):
        lines.append(command.replace("9002", str(port)))
        if command.endswith("&"):  # a reader takes longer to type the next one than the server to start
            lines.append("until grep -q serving serve.log; do sleep 0.05; done")
        lines.append("echo; echo ====")
        expected.append(printed.strip())
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert [text.strip() for text in done.stdout.split("====\n")[:-1]] == expected
    assert (folder / "copy.raw").read_bytes() == bytes(1_000_000)


def test_the_fixture_of_the_readme(place, tmp_path):
    """It gives a test a server of its own."""
    (tmp_path / "test_mine.py").write_text(
        "import pytest, wmi\n" + blocks("python fixture")[0]
        + "\n\ndef test_mine(images):\n    assert images.index().total == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path, env={**place[2], "PYTHONPATH": str(place[0])}, capture_output=True, text=True, timeout=60,
    )
    assert "1 passed" in done.stdout, done.stdout


def test_vendoring_of_the_readme(place):
    """A copy under another name, with a backend beside it, opens a store."""
    folder, _, environment = place
    command = ["bash", "-ec", blocks("sh vendoring")[0]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_the_systemd_unit_of_the_readme(place, tmp_path):
    """Its command, with its environment and a socket that is handed over as systemd does it, serves."""
    folder, _, environment = place
    unit = dict(line.split("=", 1) for line in blocks("ini service")[0].splitlines() if "=" in line)
    assert dict(line.split("=", 1) for line in blocks("ini socket")[0].splitlines() if "=" in line)["ListenStream"]
    (tmp_path / "images").mkdir()
    wmi.add_token("a-guest1", str(tmp_path / "tokens"))
    command = unit["ExecStart"].replace("/usr/bin/python3", "python3").replace("/var/lib/wmi", str(tmp_path))
    name, path = unit["Environment"].split("=")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            ["bash", "-c", f"exec 3<&{listener.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec {command}"],
            cwd=tmp_path, env={**environment, name: path.replace("/opt/wmi", str(folder))},
            pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True,
        )
        try:
            assert "serving" in process.stderr.readline()
            with pytest.raises(wmi.InvalidRequestCredentials):
                wmi.Client(f"http://127.0.0.1:{listener.getsockname()[1]}", "a-guest1").index()
        finally:
            process.terminate()
            process.communicate(timeout=15)
    assert process.returncode == 0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed here")
def test_the_systemd_units_are_valid(tmp_path):
    """systemd has nothing to say against them."""
    unit = blocks("ini service")[0].replace("/opt/wmi", str(ROOT)).replace("/usr/bin/python3", sys.executable)
    (tmp_path / "wmi.service").write_text(unit)
    (tmp_path / "wmi.socket").write_text(blocks("ini socket")[0])
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "wmi.service", tmp_path / "wmi.socket"],
        capture_output=True, text=True, timeout=60,
    )
    assert not re.search(r"wmi\.(service|socket):.*(Unknown|Failed to parse|Invalid)", done.stderr), done.stderr


@pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("openssl"), reason="nginx or openssl is missing here")
def test_nginx_of_the_readme(place, tmp_path):
    """Behind it, over TLS, the client lists and fetches, and the page writes https into its commands."""
    folder, _, environment = place
    port, key, certificate = free_port(), tmp_path / "images.key", tmp_path / "images.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True, timeout=60,
    )
    [block] = [block for block in blocks("nginx") if "listen 443" in block]
    block = block.replace("listen 443", f"listen 127.0.0.1:{port}").replace("images.example", "localhost")
    block = block.replace("/etc/ssl", str(tmp_path)).replace("/run/wmi", str(tmp_path))
    (tmp_path / "nginx.conf").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''} daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error;\n"
        "events {}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}/b; proxy_temp_path {tmp_path}/p;"
        f" fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;\n{block} }}\n"
    )
    (tmp_path / "lucid.raw").write_bytes(os.urandom(3_000_000))
    with contextlib.ExitStack() as stack:
        for command in (
            ["python3", folder / "wmi.py", "serve", "--sample", "--unix-socket", "wmi.sock", "--files", "."],
            ["nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf"],
        ):
            process = stack.enter_context(
                subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
            )
            stack.callback(process.terminate)
            if "serve" in command:
                assert "serving" in process.stderr.readline()
        with wmi.open_storage(f"sqlite:{tmp_path}/images.db") as storage:
            uri = f"file://{tmp_path}/lucid.raw"
            wmi.Catalog(storage).register({"id": "wmi-lucid", "account_id": "a-guest1", "source": {"uri": uri}})
        client = wmi.Client(f"https://localhost:{port}", "a-guest1", cafile=str(certificate), retries=8)
        assert client.index().total == 5
        client.fetch("wmi-lucid", str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "lucid.raw").read_bytes()
        context = ssl.create_default_context(cafile=str(certificate))
        page = urllib.request.urlopen(f"https://localhost:{port}/images/wmi-lucid0", context=context, timeout=15)
        assert b" https://localhost" in page.read()


def test_backend_of_the_readme_passes_the_contract(tmp_path, monkeypatch):
    """The whole backend that the README shows is held to the contract, as the README says."""
    (tmp_path / "tiny_store.py").write_text(blocks("python backend")[0])
    monkeypatch.syspath_prepend(tmp_path)
    names = {}
    exec(blocks("python contract")[0], names)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(names["TinyContract"])
    with open(os.devnull, "w") as nothing:
        result = unittest.TextTestRunner(nothing).run(suite)
    assert result.wasSuccessful(), result.failures + result.errors
    assert result.testsRun > 40


def test_docstring_session_is_true():
    """The session in the module's docstring prints what it shows."""
    assert doctest.testmod(wmi).attempted > 4
    assert doctest.testmod(wmi).failed == 0


@pytest.fixture(scope="module")
def help_texts():
    """What every subcommand prints for --help."""
    return {command: printed(*command.split(), "--help") for command in ("", *(row[0] for row in wmi._COMMANDS))}


def printed(*argv):
    """Return what the command prints before it ends by itself."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        wmi.main(argv)
    return out.getvalue()


def test_every_option_is_in_the_readme(help_texts):
    """An option that --help names is documented, or is one with its dashes written as underscores."""
    options = {option for text in help_texts.values() for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text)}
    missing = {option for option in options if option not in README and option.replace("_", "-") not in README}
    assert missing == set()


def test_every_subcommand_is_in_the_readme(help_texts):
    """A subcommand that --help lists is documented."""
    commands = re.findall(r"^    ([a-z]+) ", help_texts[""], re.MULTILINE)
    assert "serve" in commands
    assert [name for name in commands if f"`{name}" not in README] == []


def test_every_route_and_parameter_is_in_the_readme():
    """Each version's path, and each of its parameters and fields to set, is documented."""
    for version in wmi.VERSIONS.values():
        for name in (version.path, *version.filters, *version.updatable):
            assert f"`{name}" in README, name


def test_limits_of_the_readme_are_those_of_the_code():
    """The table of limits says what the constants say."""
    rows = {
        "request line": f"{wmi.MAX_REQUEST_LINE // 1024} KiB",
        "one header field · all of them": (
            f"{wmi.MAX_FIELD_LINE // 1024} KiB · {wmi.MAX_FIELDS} fields, {wmi.MAX_HEAD // 1024} KiB"
        ),
        "body": f"{wmi.MAX_BODY // 1024} KiB",
        "a whole head · a whole body": f"{wmi.HEAD_SECONDS} s · {wmi.BODY_SECONDS} s",
        "idle between requests": f"{wmi.IDLE_SECONDS} s",
        "a reader that does not read": f"{wmi.SEND_SECONDS} s",
        "connections per process": f"{wmi.MAX_CONNECTIONS}",
    }
    for what, limit in rows.items():
        assert f"| {what} | {limit}" in README


def test_parts_stand_in_the_order_of_the_design():
    """The banners are the table of contents, from errors to what is optional, and the docstring maps them."""
    banners = re.findall(r"^#{100}\n# (.*)\n#{100}$", SOURCE, re.MULTILINE)
    assert banners == [
        "Errors", "YAML", "Image", "Storage", "Catalog", "Requests", "Answers", "Service", "Connections", "Server",
        "Processes", "Client", "Terminal", "Command line", "Optional",
    ]
    parts = (wmi.__doc__ or "").partition("\nThe parts")[2]
    assert re.findall(r"^    ([A-Z][A-Za-z ]*?)  ", parts, re.MULTILINE) == banners


def test_every_public_name_has_a_docstring():
    """Public functions, classes and methods say what they do; overridden ones of the library too."""
    classes = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef)]
    functions = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)]
    methods = [
        item
        for node in classes
        if not node.name.startswith("_")
        for item in node.body
        if isinstance(item, ast.FunctionDef)
    ]
    public = [node for node in (*classes, *functions, *methods) if not node.name.startswith("_")]
    assert len(public) > 100
    assert [node.name for node in public if not ast.get_docstring(node)] == []
