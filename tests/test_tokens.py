"""Tokens: who may call, over raw sockets, by the command and by the client; and what never leaves with a token."""

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import SECONDS, parse_answer, raw, read_answer, serving
from support import MODULE, ignore_surroundings, until
from test_client import Scripted, hang

import wmi

ACCOUNTS = ["a-one", "a-two", "a-three", "a-00000000"]
TOKENS = {account: f"secret-of-{account}" for account in ACCOUNTS}
ONE = TOKENS["a-one"]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Each test has an empty folder, and an environment without our variables; no pause between tries is long."""
    monkeypatch.chdir(tmp_path)
    ignore_surroundings(monkeypatch)


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


def lines(accounts=ACCOUNTS):
    """Return a file of tokens."""
    return "".join(f"{account} {digest(TOKENS[account])}\n" for account in accounts)


@pytest.fixture
def path(tmp_path):
    """Return the path of a file of tokens, which was written some time ago."""
    path = tmp_path / "tokens"
    path.write_text(lines())
    path.chmod(0o600)
    return path


def filled():
    """Return a store with a private image of each account, and a public one."""
    storage = wmi.MemoryStorage()
    for account in ACCOUNTS:
        uri = "file:///nowhere.raw"
        fields = {"id": f"wmi-{account[2:]}", "account_id": account, "description": account, "source": {"uri": uri}}
        storage.add(wmi.image_record(fields))
    storage.add(wmi.image_record({"id": "wmi-public", "account_id": "a-nobody", "is_public": True}))
    return storage


@pytest.fixture
def server(path):
    """Serve with tokens; the log is in server.server.log_lines."""
    log = []
    with serving(filled(), log.append, tokens=wmi.Tokens(str(path))) as server:
        server.server.log_lines = log
        yield server


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """Serve with tokens, for tests that change nothing."""
    path = tmp_path_factory.mktemp("steady") / "tokens"
    path.write_text(lines())
    with serving(filled(), tokens=wmi.Tokens(str(path))) as server:
        yield server


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def basic(user, token):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()}


def ids_of(answer):
    """Return the ids of an index."""
    status, _, body = answer
    assert status == 200, body
    return {image["id"] for image in json.loads(body)["result"]}


# ---- three ways to present a token, and what is refused ----


@pytest.mark.parametrize(
    "fields",
    [
        bearer(ONE),
        {"Authorization": f"bEaReR   {ONE} "},
        basic("a-one", ONE),
        {"Authorization": basic("a-one", ONE)["Authorization"].replace("Basic", "BASIC")},
        {"X-VDC-REQUESTER-TOKEN": ONE},
        {"X_VDC_REQUESTER_TOKEN": ONE},
        {**bearer(ONE), "X-VDC-ACCOUNT-UUID": "a-one"},
        {**bearer(ONE), "X_VDC_ACCOUNT_UUID": "a-one"},
        {**bearer(ONE), "X-VDC-ACCOUNT-UUID": ""},
        {"X-VDC-Requester-Token": ONE, "X-VDC-Account-UUID": "a-one", "X-VDC-Account-Quota": "{}"},  # ruby-hijiki
    ],
)
def test_ways_to_present_a_token(server, fields):
    """Bearer, Basic with the account as user name, and the header of ruby-hijiki prove the account."""
    assert ids_of(server.request("GET", "/api/images", fields)) == {"wmi-one", "wmi-public"}
    assert server.request("GET", "/api/images/wmi-two", fields)[0] == 403
    assert server.request("DELETE", "/api/images/wmi-one", fields)[0] == 200


BAD = [
    {},
    {"X-VDC-ACCOUNT-UUID": "a-one"},
    {"X-VDC-ACCOUNT-UUID": "a-00000000"},
    bearer("wrong"),
    bearer(""),
    {"Authorization": "Bearer"},
    {"Authorization": ONE},
    {"Authorization": f"Token {ONE}"},
    {"Authorization": "Digest x", "X-VDC-REQUESTER-TOKEN": ONE},
    bearer(f"{ONE}, Bearer {ONE}"),
    bearer(digest(ONE)),
    bearer(ONE[:-1]),
    bearer(ONE.upper()),
    bearer("\xe9"),
    basic("a-two", ONE),
    basic("", ONE),
    basic("a-one", ""),
    basic("a-one", "wrong"),
    {"Authorization": "Basic a-one:" + ONE},
    {"Authorization": "Basic ====="},
    {"Authorization": "Basic /////w=="},
    {"Authorization": "Basic " + base64.b64encode(b"a-one").decode()},
    {"X-VDC-REQUESTER-TOKEN": ""},
    {"X-VDC-REQUESTER-TOKEN": "wrong"},
]


@pytest.mark.parametrize("fields", BAD)
def test_no_token_or_a_wrong_one_is_401(steady, fields):
    """Whatever does not prove an account gets 401, both challenges and code 103, and the same answer as any other."""
    status, _, body = steady.request("GET", "/api/images", fields)
    plain = steady.request("GET", "/api/images")
    assert (status, json.loads(body)["code"]) == (401, "103")
    assert (status, body) == (plain[0], plain[2])  # nothing tells whether an account or a token exists
    raw = steady.raw(b"GET /api/images HTTP/1.0\r\n\r\n").decode()
    assert 'WWW-Authenticate: Basic realm="wmi", charset="UTF-8"\r\n' in raw
    assert 'WWW-Authenticate: Bearer realm="wmi"\r\n' in raw


@pytest.mark.parametrize(
    "method, target",
    [
        *[("GET", f"{base}{rest}") for base in ("/api/images", "/api/11.12/images", "/api/12.03/images")
          for rest in ("", ".yml", "/wmi-one", "/wmi-public.json", "/wmi-nope", "?limit=1", "?start=x")],
        ("HEAD", "/api/images"), ("DELETE", "/api/images/wmi-one"), ("PUT", "/api/12.03/images/wmi-one?display_name=x"),
        ("GET", "/"), ("GET", "/?account=a-one"), ("GET", "/images/wmi-one"), ("GET", "/images/wmi-one?account=a-one"),
    ],
)
def test_nothing_is_said_without_a_token(steady, method, target):
    """Every call of every version, and the page, is 401 before anything else is looked at; nothing changes."""
    status, headers, body = steady.request(method, target, {"X-VDC-ACCOUNT-UUID": "a-one"})
    assert (status, "www-authenticate" in headers) == (401, True)
    assert b"wmi-" not in body and b"a-one" not in body.replace(b"/?account=a-one", b"")
    assert steady.server.service.storage.get("wmi-one")["display_name"] == ""


def test_another_account_is_403(steady):
    """A header that names another account than the token's is 403 and 105, whoever it names."""
    for named in ("a-two", "a-00000000", "A-one", "a-one, a-one", "-"):
        fields = {**bearer(ONE), "X-VDC-ACCOUNT-UUID": named}
        for method, target in (("GET", ""), ("GET", "/wmi-one"), ("DELETE", "/wmi-one")):
            status, _, body = steady.request(method, f"/api/images{target}", fields)
            assert (status, json.loads(body)["code"]) == (403, "105")


def test_operator_needs_its_own_token(server):
    """The account a-00000000 has its privilege with its own token, and nobody else has it."""
    fields = bearer(TOKENS["a-00000000"])
    assert server.request("GET", "/api/images/wmi-two", fields)[0] == 200
    assert server.request("GET", "/api/images/wmi-two", {**bearer(ONE), "X-VDC-ACCOUNT-UUID": "a-00000000"})[0] == 403
    assert server.request("DELETE", "/api/images/wmi-two", fields)[0] == 200


def test_page_of_an_account(steady):
    """With a token the page shows what its account may see, and an account in the query changes nothing."""
    status, headers, body = steady.request("GET", "/?account=a-two", basic("a-one", ONE))
    assert (status, headers["content-type"]) == (200, "text/html;charset=utf-8")
    assert set(re.findall(rb"/images/(wmi-\w+)", body)) == {b"wmi-one", b"wmi-public"}
    assert steady.request("GET", "/images/wmi-two?account=a-two", basic("a-one", ONE))[0] == 403


def test_without_tokens_nothing_is_proved():
    """A server without tokens takes the account from the header, and a token means nothing to it."""
    with serving(filled()) as server:
        answer = server.request("GET", "/api/images", {**bearer("wrong"), "X-VDC-ACCOUNT-UUID": "a-two"})
        assert ids_of(answer) == {"wmi-two", "wmi-public"}


def test_digest_of_nothing_admits_nobody(path):
    """Even if the file holds the digest of an empty token, whoever presents none is refused."""
    path.write_text(f"a-one {digest('')}\n")
    with serving(filled(), tokens=wmi.Tokens(str(path))) as server:
        for fields in ({}, bearer(""), {"X-VDC-REQUESTER-TOKEN": ""}, basic("a-one", "")):
            assert server.request("GET", "/api/images", fields)[0] == 401


def test_lookup_tells_nothing_by_its_time(path):
    """Digests are looked up under a secret key of each process, so no comparison can be timed byte by byte."""
    first, second = wmi.Tokens(str(path)), wmi.Tokens(str(path))
    assert len(first._accounts) == len(ACCOUNTS)
    assert not set(first._accounts) & set(second._accounts)
    assert not set(first._accounts) & {bytes.fromhex(digest(token)) for token in TOKENS.values()}


# ---- no secret leaves ----


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_token_in_any_log_or_answer(path, log_format):
    """Neither tokens nor digests stand in the log or an answer; the log has the proven account, or none."""
    log = []
    storage = filled()
    with serving(storage, log.append, tokens=wmi.Tokens(str(path)), log_format=log_format) as server:
        answers = b""
        ways = [bearer(ONE), basic("a-one", ONE), {"X-VDC-REQUESTER-TOKEN": ONE}, basic("a-two", ONE),
                {**bearer(ONE), "X-VDC-ACCOUNT-UUID": "a-two"}, bearer(ONE + "x")]
        calls = ["GET /api/images HTTP/1.1", "GET /?start=x HTTP/1.1", "BREW / HTTP/1.1", "GET /no HTTP/1.1",
                 "GET /images/wmi-one HTTP/1.1", "GET /api/images HTTP/3.1", "GET http://u:p@h/ HTTP/1.1"]
        for fields in ways:
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            for line in calls:
                request = f"{line}\r\nHost: h\r\nConnection: close\r\n{head}\r\n"
                answers += server.raw(request.encode())
        path.write_text(f"a-one {ONE}\n")  # somebody writes the token itself into the file
        answers += server.raw(f"GET / HTTP/1.0\r\nAuthorization: Bearer {ONE}\r\n\r\n".encode())
        storage.close()  # every call fails from now on
        answers += server.raw(f"GET /api/images HTTP/1.0\r\nAuthorization: Bearer {ONE}\r\n\r\n".encode())
    text = "\n".join(log) + answers.decode()
    assert "503" in text and "line 1" in text
    for secret in (ONE, digest(ONE), base64.b64encode(f"a-one:{ONE}".encode()).decode()):
        assert secret not in text
    accounts = {json.loads(line).get("account") for line in log} if log_format == "json" else {
        line.split(" ")[2] for line in log if " error: " not in line}
    assert accounts - {None} == {"a-one", "-"}  # never a-two, which was only named


@pytest.fixture
def run(capsys):
    """Return a function that calls the command and returns its exit code and what it printed."""

    def run(*argv):
        try:
            code = wmi.main(list(map(str, argv)))
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_token_of_the_environment_or_of_a_file(server, run, tmp_path, monkeypatch):
    """WMI_TOKEN, --token-file and --token prove the account, which then need not be named."""
    (tmp_path / "mine").write_text(f"{ONE}\n")
    (tmp_path / "mine").chmod(0o600)
    listing = ["list", "--url", server.url, "-o", "id"]
    for options in (["--token-file", tmp_path / "mine"], ["--token", ONE]):
        assert run(*listing, *options) == (0, "wmi-public\nwmi-one\n", "")
    assert run(*listing, "--token", "wrong", "--token-file", tmp_path / "mine")[0] == 0  # the file counts
    monkeypatch.setenv("WMI_TOKEN", ONE)
    assert run(*listing) == (0, "wmi-public\nwmi-one\n", "")
    assert run("delete", "wmi-one", "--url", server.url) == (0, "wmi-one\n", "")


def test_process_list_has_no_token():
    """With WMI_TOKEN no token is among the words of the process, which others can see."""
    with Scripted(hang) as silent:
        argv = [sys.executable, MODULE, "list", "--url", silent.url]
        child = subprocess.Popen(argv, env={**os.environ, "WMI_TOKEN": ONE})
        try:
            (request,) = until(lambda: silent.requests)
            assert f"Authorization: Bearer {ONE}\r\n".encode() in request
            if os.path.exists(f"/proc/{child.pid}/cmdline"):
                with open(f"/proc/{child.pid}/cmdline", "rb") as file:
                    assert ONE.encode() not in file.read()
        finally:
            child.kill()
            child.wait()


def test_help_says_who_sees_a_token(run):
    """--token is documented as visible to others."""
    _, out, _ = run("list", "--help")
    assert re.search(r"--token T\s+your token; others can see it here, WMI_TOKEN is safer", out)
    assert ONE not in out


@pytest.mark.parametrize("argv", [["list"], ["show", "wmi-one"], ["delete", "wmi-one"], ["fetch", "wmi-one"]])
def test_errors_of_the_command_name_no_token(server, run, monkeypatch, argv):
    """A wrong token, one of another account, and one that cannot be sent are told in one line without the token."""
    argv = [*argv, "--url", server.url]
    monkeypatch.setenv("WMI_TOKEN", "wrong-secret")
    wrong = run(*argv)
    assert wrong[0] == 1 and "needs a valid token" in wrong[2] and "WMI_TOKEN" in wrong[2]
    monkeypatch.setenv("WMI_TOKEN", ONE)
    other = run(*argv, "--account", "a-two")
    assert other == (1, "", "wmi: not permitted: the token is another account's; leave --account out\n")
    monkeypatch.setenv("WMI_TOKEN", "secret\nX-Evil: 1")
    broken = run(*argv)
    for code, out, err in (wrong, other, broken):
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "secret" not in err


def test_token_file_of_a_client(server, run, tmp_path):
    """A token file that others can read or write gets a warning; one without a token, or that is absent, is refused."""
    mine = tmp_path / "mine"
    mine.write_text(ONE)
    for mode, warned in ((0o600, False), (0o640, False), (0o604, True), (0o602, True)):
        mine.chmod(mode)
        code, _, err = run("list", "--url", server.url, "--token-file", mine, "-o", "id")
        assert (code, "warning" in err, f"chmod o= {mine}" in err) == (0, warned, warned)
    mine.write_text(" \n")
    listing = ["list", "--url", server.url, "--account", "a-one", "--token-file"]
    assert run(*listing, mine) == (1, "", f"wmi: {mine}: holds no token\n")
    assert run(*listing, tmp_path / "none") == (1, "", f"wmi: {tmp_path}/none: No such file or directory\n")


# ---- the command `token` ----


def test_command_token(run, path):
    """The command prints a new token once, and appends its digest and nothing else."""
    before = path.read_text()
    code, token, err = run("token", "a-new", "--tokens", path)
    assert (code, err) == (0, "") and re.fullmatch(r"wmi_[0-9a-f]{64}\n", token)
    assert path.read_text() == f"{before}a-new {digest(token.strip())}\n"
    assert run("token", "a-new", "--tokens", path)[1] != token
    with serving(filled(), tokens=wmi.Tokens(str(path))) as server:
        assert server.request("GET", "/api/images", bearer(token.strip()))[0] == 200
        assert server.request("GET", "/api/images", bearer(ONE))[0] == 200


def test_new_file_of_tokens_is_private(run, tmp_path):
    """A file that is made has mode 0600 whatever the umask; one that is there keeps its mode."""
    umask = os.umask(0)
    try:
        assert run("token", "a-one", "--tokens", tmp_path / "new")[0] == 0
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    (tmp_path / "new").chmod(0o640)
    assert run("token", "a-one", "--tokens", tmp_path / "new")[0] == 0
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_line_without_end_stays_one_line(run, path):
    """A last line that an editor left without its end is not continued."""
    path.write_text("# ours\na-two " + digest("two"))
    assert run("token", "a-one", "--tokens", path)[0] == 0
    assert len(path.read_text().splitlines()) == 3 and len(wmi.Tokens(str(path))._accounts) == 2


@pytest.mark.parametrize("store", ["json", "sqlite"])
def test_file_that_holds_something_else_stays_as_it_is(run, tmp_path, store):
    """A slip of the hand: a line of tokens in the file of a store could make the store unreadable."""
    path = tmp_path / "images"
    with wmi.open_storage(f"{store}:{path}") as storage:
        wmi.Catalog(storage).register({"id": "wmi-1", "account_id": "a-one"})
    before = path.read_bytes()
    code, out, err = run("token", "a-one", "--tokens", path)
    assert (code, out, path.read_bytes()) == (1, "", before)
    assert str(path) in err


@pytest.mark.parametrize(
    "argv", [["a-one"], ["A-one", "--tokens", "new"], ["a-", "--tokens", "new"], ["a-one", "--tokens", "no/new"],
             ["a-one", "--tokens", "."], ["a-one", "--tokens", "/dev/full"]]
)
def test_token_is_not_made(run, tmp_path, argv):
    """Without a file, for what is no account, and where the line cannot be written, no token is printed."""
    if "/dev/full" in argv and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    code, out, err = run("token", *argv)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert not (tmp_path / "new").exists()


def test_tokens_made_at_once(path, monkeypatch):
    """A line that another command appends just before ours is written is neither lost nor mixed with it."""

    class Late(io.BufferedRandom):
        def flush(self):
            if others:
                made.append(wmi.add_token(others.pop(), str(path)))
            super().flush()

    def late(file, *how, **options):
        return Late(io.FileIO(file, "r+")) if isinstance(file, int) else open(file, *how, **options)

    others, made = ["a-other"], []
    monkeypatch.setattr(wmi, "open", late, raising=False)
    made.append(wmi.add_token("a-new", str(path)))
    assert path.read_text() == lines() + f"a-other {digest(made[0])}\na-new {digest(made[1])}\n"


# ---- the file: changed, replaced, removed, malformed ----


def status_of(server, token=ONE):
    return server.request("GET", "/api/images/wmi-public", bearer(token))[0]


def replace(path, text):
    """Replace a file by rename."""
    other = path.with_name("other")
    other.write_text(text)
    os.replace(other, path)


def overwrite(path, text):
    """Write into the same file."""
    with open(path, "r+") as file:
        file.write(text)
        file.truncate()


@pytest.mark.parametrize("write", [overwrite, replace])
def test_change_counts_at_once(server, path, write):
    """What is edited or replaced by rename is in force with the next request, in both directions."""
    for _ in range(3):
        write(path, lines(["a-two"]))
        assert (status_of(server), status_of(server, TOKENS["a-two"])) == (401, 200)
        write(path, lines(["a-one"]))
        assert (status_of(server), status_of(server, TOKENS["a-two"])) == (200, 401)


def test_revocation_reaches_open_connections(server, path):
    """A token that is revoked is refused with the next request on a connection that was opened with it."""
    request = f"GET /api/images HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {ONE}\r\n\r\n".encode()
    with contextlib.ExitStack() as opened:
        peers = [opened.enter_context(socket.create_connection((server.host, server.port), SECONDS)) for _ in range(3)]
        # Several times at first: also from what is kept.
        for accounts, status in ((ACCOUNTS, 200), (ACCOUNTS, 200), (ACCOUNTS, 200), (["a-two"], 401), (ACCOUNTS, 200)):
            overwrite(path, lines(accounts))
            for peer in peers:
                peer.sendall(request)
                assert read_answer(peer)[0] == status


def test_two_changes_within_a_tick(path):
    """A change that leaves inode, size and times as they were is seen, as long as the file was changed just now."""

    class SlowClock:  # a file system whose clock has not ticked since the first change
        def __getattr__(self, name):
            return getattr(os, name)

        def stat(self, *arguments):
            found = os.stat(*arguments)
            fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
            return type("Status", (), {**fields, "st_ctime_ns": stamp, "st_ctime": stamp / 1e9})

    stamp = time.time_ns()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wmi, "os", SlowClock())
        tokens = wmi.Tokens(str(path))
        for account, token in (("a-one", "1"), ("a-two", "2"), ("a-one", "3")):
            overwrite(path, f"{account} {digest(token)}\n")
            os.utime(path, ns=(10**18, 10**18))  # as `cp -p` or an editor does
            assert tokens.refresh() == ""
            assert [*tokens._accounts] == [tokens._keyed(bytes.fromhex(digest(token)))]


def test_file_is_read_only_when_it_has_changed(path):
    """A file that has rested for a while is asked for its state, and not read."""
    tokens = wmi.Tokens(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wmi.time, "time", lambda: os.stat(path).st_ctime + 60)
        assert tokens.refresh() == ""
        accounts = tokens._accounts
        assert tokens.refresh() == "" and tokens._accounts is accounts


def test_file_that_is_removed(server, path):
    """While the file is away the last tokens stay in force; that is told once each time."""
    for times in (1, 2):
        path.rename(path.with_name("away"))
        assert [status_of(server) for _ in range(3)] == [200] * 3
        told = [line for line in server.server.log_lines if "tokens" in line and "No such file" in line]
        assert len(told) == times and "the last good ones stay in force" in told[0]
        path.with_name("away").rename(path)
        assert status_of(server) == 200


MALFORMED = [
    ("a-one", 1),
    ("\n# comment\na-one  \n", 3),
    (f"a-one {digest(ONE)} more\n", 1),
    (f"a-one {ONE}\n", 1),
    (f"A-one {digest(ONE)}\n", 1),
    (f"one {digest(ONE)}\n", 1),
    (f"a-one {digest(ONE)[:-1]}\n", 1),
    (f"a-one {digest(ONE)[:-1]}g\n", 1),
    (f"a-one {'0' * 63}\u0660\n", 1),
    (f"a-two {digest('two')}\r\na-one:{digest(ONE)}\r\n", 2),
]


@pytest.mark.parametrize("text, line", MALFORMED)
def test_malformed_file(path, text, line):
    """A file that is malformed is refused at the start, by its path and line, without a digest or token."""
    path.write_text(text)
    with pytest.raises(wmi.InvalidParameter, match=f"{path}: line {line}: ") as error:
        wmi.Tokens(str(path))
    assert ONE not in str(error.value) and digest(ONE)[:-1] not in str(error.value)


def test_well_formed_files(path):
    """Comments, blanks, empty lines and other ends of lines are no fault; of equal digests the last line counts."""
    path.write_text(f"\ufeff\n  # ours\r\n\t a-one\t{digest(ONE).upper()}  # laptop\r\n\r\na-two {digest(ONE)}")
    tokens = wmi.Tokens(str(path))
    assert [*tokens._accounts.values()] == ["a-two"]
    path.write_text("")
    assert tokens.refresh() == "" and tokens._accounts == {}


@pytest.mark.parametrize("content", [b"a-one nothing\n", b"\xff\xfe\n", b"\0" * 100])
def test_last_good_tokens_stay_in_force(server, path, content):
    """A file that becomes malformed changes nothing, is told once with its line, and counts again when it is mended."""
    path.write_bytes(content)
    assert [status_of(server) for _ in range(4)] == [200] * 4
    assert status_of(server, "wrong") == 401
    told = [line for line in server.server.log_lines if "stay in force" in line]
    assert len(told) == 1 and str(path) in told[0]
    path.write_text(lines(["a-two"]))
    assert (status_of(server), status_of(server, TOKENS["a-two"])) == (401, 200)


def test_file_that_could_not_be_opened_is_read_later(path):
    """Where no descriptor was free, the file is read as soon as one is, although it has not changed since."""
    tokens = wmi.Tokens(str(path))
    path.write_text(lines(["a-two"]))
    os.utime(path, (1, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wmi.time, "time", lambda: os.stat(path).st_ctime + 60)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            fault = tokens.refresh()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "Too many open files" in fault and len(tokens._accounts) == len(ACCOUNTS)
        assert tokens.refresh() == "" and [*tokens._accounts.values()] == ["a-two"]


def test_one_thread_reads(path):
    """While one thread is held up by the file, others go on with the tokens that they have, and do not wait."""
    tokens = wmi.Tokens(str(path))
    path.unlink()
    os.mkfifo(path)  # opening it waits for who writes
    reader = threading.Thread(target=tokens.refresh)
    reader.start()
    try:
        until(tokens._lock.locked)
        began = time.monotonic()
        assert tokens.refresh() == "" and time.monotonic() - began < SECONDS
        assert len(tokens._accounts) == len(ACCOUNTS)
    finally:
        with open(path, "w") as file:
            file.write(lines(["a-two"]))
        reader.join(SECONDS)
    assert [*tokens._accounts.values()] == ["a-two"]


# ---- kept answers ----


def expected(account):
    """Return the ids that an account's index has."""
    return {f"wmi-{account[2:]}", "wmi-public"}


def call_in_pairs(host, port, count, seed):
    """Send requests of two random callers in turn on shared connections; each must get what is its own."""
    pick, tags = random.Random(seed), {}
    with contextlib.ExitStack() as opened:
        peers = [opened.enter_context(socket.create_connection((host, port), SECONDS)) for _ in range(4)]
        for _ in range(count):
            for caller in pick.sample([*ACCOUNTS, ""], 2):
                target = "/api/images" + pick.choice(["", ".json", "?limit=9", "/wmi-public"])
                token = TOKENS.get(caller, "none")
                fields = pick.choice([bearer(token), basic(caller, token), {"X-VDC-REQUESTER-TOKEN": token}])
                named = pick.choice(["", caller, *ACCOUNTS])
                fields |= {"X-VDC-ACCOUNT-UUID": named} if named else {}
                tag = pick.choice(["", *tags.values()])
                fields |= {"If-None-Match": tag} if tag else {}
                head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
                peer = pick.choice(peers)
                peer.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
                status, headers, body = read_answer(peer)
                if not caller:
                    assert status == 401
                elif named not in ("", caller):
                    assert status == 403
                elif status == 304:
                    assert tag == tags.get((caller, target), tags.get(("", target)))
                elif status != 200:
                    pytest.fail(f"{status} {body!r}")
                elif "wmi-public" in target:
                    assert json.loads(body)["id"] == "wmi-public"
                    tags["", target] = headers["etag"]
                else:
                    assert {image["id"] for image in json.loads(body)["result"]} == expected(caller)
                    tags[caller, target] = headers["etag"]


def test_kept_answers_never_cross_accounts(server):
    """Random pairs of callers, however they name themselves, get their own answers, most of them kept ones."""
    call_in_pairs(server.host, server.port, 200, 13)
    kept = {key[1] for key in server.server.service._kept}
    assert kept == set(ACCOUNTS)


def test_answer_is_not_kept_for_whom_it_was_not_made(path):
    """If a token passes to another account while its request is answered, the answer is kept for neither."""

    class Reassigning(wmi.MemoryStorage):
        def revision(self):
            if armed:
                armed.clear()
                path.write_text(f"a-two {digest(ONE)}\n")
                assert tokens.refresh() == ""
            return super().revision()

    tokens, armed = wmi.Tokens(str(path)), []
    storage = Reassigning()
    storage.add_all(filled().walk(oldest_first=True))
    service = wmi.Service(storage, tokens=tokens)
    request = wmi.parse_head(f"GET /api/images HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {ONE}\r\n\r\n".encode())
    for _ in range(3):
        service.answer(request)
        service.look()
    assert [key[1] for key in service._kept] == ["a-one"]
    storage.add(wmi.image_record({"account_id": "a-nobody"}))  # what is kept is out of date
    armed.append(1)
    assert b"wmi-two" in service.answer(request).body
    service.look()
    assert all(b"wmi-two" not in answer.body for _, answer, _ in service._kept.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
@pytest.mark.parametrize(
    "host, certificate, expected",
    [("0.0.0.0", None, ["read tokens on their way"]), ("0.0.0.0", "cert.pem", []), ("127.0.0.1", None, [])],
)
def test_tokens_that_others_could_read_are_warned_of(capsys, host, certificate, expected):
    """On an address for others, without TLS, the start says so; on loopback and with TLS it does not."""
    options = types.SimpleNamespace(tokens="tokens", tls_cert=certificate, store="memory:", log_format="text")
    wmi._announce(options, f"http://{host}:9001")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == len(expected) and all(text in line for text, line in zip(expected, warnings))


def test_workers_with_tokens(command, path):
    """Workers keep accounts apart, too, and each of them sees a change of the file; the log has no token."""
    path.chmod(0o644)
    with wmi.open_storage("json:images.json") as storage:
        storage.add_all(filled().walk(oldest_first=True))
    server = command("--workers", "2", "--tokens", str(path), "--log", "log", store="json:images.json")
    assert any(f"warning: {path} is open to others" in line for line in server.said)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: call_in_pairs(server.host, server.port, 40, seed), (1, 2)))
    overwrite(path, lines(["a-two"]))
    for _ in range(8):
        answer = raw(server.host, server.port, f"GET / HTTP/1.0\r\nAuthorization: Bearer {ONE}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 401")
    server.process.terminate()
    assert server.wait() == 0
    with open("log", encoding="ascii") as file:
        text = file.read()
    assert ONE not in text and digest(ONE) not in text and " a-one GET " in text


@pytest.mark.parametrize("workers", ["1", "2"])
def test_malformed_file_ends_serve(path, workers):
    """A malformed file is one line of error and exit 1, and no worker is started to fail again and again."""
    path.write_text("a-one\n")
    argv = [sys.executable, MODULE, "serve", "--store", "json:images", "--port", "0", "--workers", workers]
    done = subprocess.run([*argv, "--tokens", path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"wmi: {path}: line 1: expected ACCOUNT SHA256-OF-TOKEN, as `wmi token` writes it\n"


# ---- the client ----


def refused_url(url, **options):
    """Say whether a client with a token refuses a URL."""
    try:
        wmi.Client(url, None, token=ONE, **options)
    except wmi.InvalidParameter as error:
        assert ONE not in str(error)
        return True
    return False


def test_token_over_plain_http():
    """Over http a token is sent to loopback only, unless that is allowed; a proxy is not loopback."""
    for url in ("http://127.0.0.1:9001", "http://127.9.8.7", "http://[::1]:9001/", "http://localhost/x",
                "https://images.example", "https://images.example:9001"):
        assert not refused_url(url)
    for url in ("http://images.example", "http://10.0.0.1:9001", "http://localhost.evil.example", "http://[::2]",
                "http://127.0.0.1.evil.example", "http://127.0.0.1:.evil.example", "http://127.0.0.1:x@evil.example",
                "http://localhost:80.evil.example", "http://evil.example/http://localhost/"):
        assert refused_url(url)
    assert not refused_url("http://images.example", plain_token=True)
    assert refused_url("http://127.0.0.1:9001", proxies=True)
    assert not refused_url("https://images.example", proxies=True)


def test_plain_http_is_allowed_by_its_option_only(run, monkeypatch):
    """The command refuses, too; --plain-token allows it, and nothing in the environment does."""
    monkeypatch.setenv("WMI_TOKEN", ONE)
    for value in ("", "0", "1"):
        monkeypatch.setenv("WMI_PLAIN_TOKEN", value)
        code, out, err = run("list", "--url", "http://images.invalid:9")
        assert (code, out) == (1, "") and "--plain-token" in err and ONE not in err
    assert "cannot reach" in run("list", "--url", "http://127.0.0.1:1", "--plain-token")[2]


def test_client_with_a_token(server):
    """The client proves its account with each verb, and raises what 401 and 403 say."""
    client = wmi.Client(server.url, None, token=ONE, version="12.03", retries=0)
    assert [image["id"] for image in client.images()] == ["wmi-one"]
    assert client.update("wmi-one", display_name="mine")["display_name"] == "mine"
    assert client.destroy("wmi-one") == "wmi-one"
    with pytest.raises(wmi.InvalidRequestCredentials) as error:
        wmi.Client(server.url, "a-one", token="wrong", retries=0).index()
    assert (error.value.status, error.value.code) == (401, "103")
    with pytest.raises(wmi.OperationNotPermitted):
        wmi.Client(server.url, "a-two", token=ONE, retries=0).index()


@pytest.mark.parametrize("token", ["my token", "secret\n", "secret\r\nX-Evil: 1", "secr\xe9t", "secr\0t", "x" * 5000])
def test_client_refuses_what_is_no_token(token):
    """What could not stand in a header is refused, and not shown."""
    with pytest.raises(wmi.InvalidParameter) as error:
        wmi.Client("http://127.0.0.1:9001", None, token=token)
    assert token.strip() not in str(error.value)


def test_answers_of_requests_in_one_segment(steady):
    """Requests of different callers that arrive together are each answered in the name of their own caller."""
    callers = [*ACCOUNTS, "", *reversed(ACCOUNTS)] * 3
    text = "".join(f"GET /api/images HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKENS.get(caller, 'no')}\r\n\r\n"
                   for caller in callers)
    with socket.create_connection((steady.host, steady.port), SECONDS) as peer:
        peer.sendall(text.encode())
        for caller in callers:
            answer = read_answer(peer)
            assert ids_of(answer) == expected(caller) if caller else answer[0] == 401
    assert parse_answer(steady.raw(b"GET /health HTTP/1.0\r\n\r\n"))[0] == 200
