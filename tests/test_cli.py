"""The command: each subcommand on a store and on a server, what it prints, its exit code, and bad input."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import threading

import pytest
from serving import serving
from support import ACCOUNT, MODULE, SECONDS, ignore_surroundings, until

import wmi

STORES = ["json:images", "sqlite:images"]
HOSTILE = [
    "", " ", "é\n\"'\\", "\x00\x1b[2J\x07\x7f\x85\x9b31m", "\u2028\u202e\ufeff", "\U0001f4a9" * 30,
    "--- !ruby/object:Gem {}", "null", "a: b #c", "\r\n", "x" * 40_000, "<script>", "%s{}",
]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Each test has an empty folder, and an environment without our variables; no pause between tries is long."""
    monkeypatch.chdir(tmp_path)
    ignore_surroundings(monkeypatch)


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function that runs the command and returns exit code, stdout and stderr."""

    def run(*argv, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = wmi.main(list(map(str, argv)))
        except SystemExit as exit:  # argparse's way out
            code = exit.code
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        return code, text.out, text.err

    return run


@pytest.fixture
def done(run):
    """Return a function that runs the command, which must succeed, and returns its stdout."""

    def done(*argv, **options):
        code, out, err = run(*argv, **options)
        assert code == 0, err
        return out

    return done


@pytest.fixture
def refused(run):
    """Return a function that runs the command, which must refuse in one line, and returns that line."""

    def refused(*argv, **options):
        code, out, err = run(*argv, **options)
        assert (code, out) == (1, ""), err
        assert err.startswith("wmi: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert all(char.isprintable() for char in err[:-1]), err
        return err

    return refused


def process(*argv, **options):
    """Run the command in a process of its own."""
    options = {"capture_output": True, "timeout": SECONDS, **options}
    return subprocess.run([sys.executable, MODULE, *argv], **options)


def shell(words, **options):
    """Run the command as a shell does, with the redirections among the words."""
    argv = ["sh", "-c", f'exec "$0" "$1" {words}', sys.executable, MODULE]
    return subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, **options)


def kept(url="sqlite:images.db"):
    """Return all records of a store, oldest first."""
    with wmi.open_storage(url) as storage:
        return list(storage.walk(oldest_first=True))


def fill(url, count=3, **fields):
    """Put images into a store."""
    with wmi.open_storage(url) as storage:
        storage.add_all(
            wmi.image_record({"id": f"wmi-{n}", "account_id": ACCOUNT, **fields}) for n in range(count)
        )


def content(path):
    """Return the bytes of a file, or None."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


# ---- add ----


def test_add_local_of_a_name_that_is_not_utf_8(done):
    """Its URI has the bytes of the name."""
    with open(b"caf\xe9.raw", "wb"):
        done("add", "local", os.fsdecode(b"caf\xe9.raw"), "-a", ACCOUNT)
    assert kept()[0]["source"]["uri"].endswith("/caf%E9.raw")


def test_add_local_of_a_file(done, tmp_path):
    """A file that is here is stored as a file:// URI, with its checksum; the id is all that is printed."""
    path = tmp_path / "a b é%.raw"
    path.write_bytes(b"image" * 1000)
    out = done("add", "local", path.name, "--account-id", ACCOUNT)
    assert re.fullmatch(r"wmi-[a-z0-9]{8}\n", out)
    (record,) = kept()
    assert record["id"] == out.strip()
    assert record["source"] == {"uri": path.as_uri()}
    assert record["md5sum"] == hashlib.md5(path.read_bytes()).hexdigest()
    assert (record["boot_dev_type"], record["state"], record["is_public"]) == (2, "init", False)


def test_add_local_with_a_checksum_reads_nothing(done, tmp_path):
    """A checksum that is given is taken, in lower case."""
    (tmp_path / "x").write_bytes(b"image")
    done("add", "local", "x", "-a", ACCOUNT, "-m", "ABCDEF0123456789" * 2)
    assert kept()[0]["md5sum"] == "abcdef0123456789" * 2


@pytest.mark.parametrize("uri", ["file:///no/such file", "http://127.0.0.1:1/x?y#z", "s3://é"])
def test_add_local_of_a_uri(done, uri):
    """A URI is stored as it is; nothing is fetched."""
    done("add", "local", uri, "-a", ACCOUNT)
    assert (kept()[0]["source"], kept()[0]["md5sum"]) == ({"uri": uri}, None)


@pytest.mark.parametrize("location", ["missing", "", ".", "/dev/null/x", "a\nb", "file:relative", "\x1b[31m"])
def test_add_local_of_nothing(refused, location):
    """A path that is no file is an error that names it, and registers nothing."""
    refused("add", "local", location, "-a", ACCOUNT)
    assert not os.path.exists("images.db") or kept() == []


def test_add_volume(done):
    """A snapshot is a source of its own kind; a backup object goes into its own field."""
    done("add", "volume", "snap-lucid1", "--account-id", ACCOUNT)
    done("add", "volume", "bo-abc1", "--account-id", ACCOUNT)
    done("add", "local", "bo-abc2", "--account-id", ACCOUNT)
    assert [(row["boot_dev_type"], row["source"], row["backup_object_id"]) for row in kept()] == [
        (1, {"snapshot_id": "snap-lucid1"}, None),
        (1, {}, "bo-abc1"),
        (2, {}, "bo-abc2"),
    ]


@pytest.mark.parametrize(
    "options",
    [
        [
            "--account-id", ACCOUNT, "--uuid", "wmi-abc", "--arch", "x86", "--md5sum", "0" * 32, "--description",
            "text", "--is-public",
        ],
        [
            "--account_id", ACCOUNT, "--uuid", "wmi-abc", "--arch", "x86", "--md5sum", "0" * 32, "--description",
            "text", "--is_public",
        ],
        ["-a", ACCOUNT, "-u", "wmi-abc", "-r", "x86", "-m", "0" * 32, "-d", "text", "-p"],
        [f"-a{ACCOUNT}", "-uwmi-abc", "-rx86", "-m" + "0" * 32, "-dtext", "-p"],
        [
            f"--account-id={ACCOUNT}", "--uuid=wmi-abc", "--arch=x86", "--md5sum=" + "0" * 32, "--description=text",
            "--is-public",
        ],
    ],
)
def test_add_takes_both_generations_of_options(done, options):
    """vdc-manage of 11.12 and of 12.03 spelled them differently: all are understood."""
    assert done("add", "local", "file:///x", *options) == "wmi-abc\n"
    (record,) = kept()
    assert [record[name] for name in ("account_id", "arch", "md5sum", "description", "is_public")] == [
        ACCOUNT, "x86", "0" * 32, "text", True,
    ]


def test_add_of_every_field(done):
    """The fields of 12.03 have their options too."""
    options = {
        "state": "available",
        "file-format": "qcow2",
        "root_device": "label:root",
        "instance-model-name": "kvm",
        "os-type": "windows",
        "parent_image_id": "wmi-parent",
        "service-type": "lb",
        "display-name": "né",
        "backup-object-id": "bo-1",
    }
    flags = itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())
    done(
        "add", "volume", "snap-1", "-a", ACCOUNT, *flags, "--is-cacheable", "--no-is-public", "--feature", "virtio",
        "--feature", "acpi",
    )
    (record,) = kept()
    assert {name: record[name.replace("-", "_")] for name in options} == options
    assert (record["is_cacheable"], record["is_public"], record["features"]) == (
        True, False, {"virtio": True, "acpi": True},
    )


@pytest.mark.parametrize(
    "option, value",
    [
        ("--account-id", "nobody"),
        ("--account-id", "a-\n"),
        ("--uuid", "x"),
        ("--uuid", "wmi-A"),
        ("--uuid", "wmi-" + "a" * 252),
        ("--uuid", ""),
        ("--arch", "arm"),
        ("--md5sum", "0"),
        ("--md5sum", "é" * 32),
        ("--state", "gone"),
        ("--state", "deleted"),
        ("--feature", "magic"),
        ("--file-format", ""),
        ("--service-type", "x"),
        ("--os-type", "bsd"),
        ("--parent-image-id", "x"),
        ("--backup-object-id", "x"),
        ("--description", "\udcff"),
        ("--uuid", "\x1b[2J\n"),
    ],
)
def test_add_of_bad_fields(refused, option, value, tmp_path):
    """Each is refused with field, value and what is allowed, and nothing is registered."""
    account = [] if option == "--account-id" else ["-a", ACCOUNT]
    line = refused("add", "local", "file:///x", *account, option, value)
    named = {"--uuid": "id", "--feature": "features"}.get(option, option[2:].replace("-", "_"))
    assert line.startswith(f"wmi: {named}: ")
    assert not os.path.exists("images.db") or kept() == []


def test_add_of_an_id_that_is_taken(done, refused):
    """An id that exists is refused and stays as it was; a deleted one may be registered anew."""
    done("add", "local", "file:///one", "-a", ACCOUNT, "-u", "wmi-one")
    assert "wmi-one" in refused("add", "local", "file:///two", "-a", ACCOUNT, "-u", "wmi-one")
    assert kept()[0]["source"] == {"uri": "file:///one"}
    done("delete", "wmi-one")
    assert done("add", "local", "file:///three", "-a", ACCOUNT, "-u", "wmi-one") == "wmi-one\n"
    assert [row["source"] for row in kept()] == [{"uri": "file:///three"}]


def test_account_of_the_environment(done, refused, monkeypatch):
    """WMI_ACCOUNT says whose image it is where no option does; without either it is refused."""
    assert "account_id" in refused("add", "local", "file:///x")
    monkeypatch.setenv("WMI_ACCOUNT", "a-env")
    done("add", "local", "file:///x")
    done("add", "local", "file:///x", "-a", "a-option")
    assert [row["account_id"] for row in kept()] == ["a-env", "a-option"]


# ---- list, show, delete, modify, features: on a store and on a server ----


@pytest.fixture(params=["store", "url"])
def where(request, monkeypatch):
    """Say by options where the images are: in a store, or behind a server of the same store."""
    fill("sqlite:images.db", 3, is_public=True, source={"uri": "file:///x"})
    if request.param == "store":
        yield ["--store", "sqlite:images.db"]
    else:
        with wmi.open_storage("sqlite:images.db") as storage, serving(storage) as served:
            yield ["--url", served.url, "--account", ACCOUNT]


def test_list(done, where):
    """The newest comes first, in each form; --start and --limit page."""
    assert done("list", *where, "-o", "id") == "wmi-2\nwmi-1\nwmi-0\n"
    assert [row["id"] for row in json.loads(done("list", *where, "-o", "json"))] == ["wmi-2", "wmi-1", "wmi-0"]
    assert re.findall(r"^- :id: (\S+)|^  :id: ", done("list", *where, "-o", "yaml"), re.MULTILINE) == [
        "wmi-2", "wmi-1", "wmi-0",
    ]
    table = done("list", *where).splitlines()
    assert table[0].split() == ["ID", "ACCOUNT", "ARCH", "BOOT", "PUBLIC", "STATE", "NAME"]
    assert table[1].split() == ["wmi-2", ACCOUNT, "x86_64", "local", "true", "init"]
    assert done("list", *where, "-o", "id", "--start", "1", "--limit", "1") == "wmi-1\n"
    assert done("list", *where, "-o", "id", "--start", "9") == ""
    assert done("list", *where, "-o", "json", "--start", "9") == "[]\n"
    assert done("list", *where, "-o", "yaml", "--start", "9") == "--- []\n"


def test_show(done, where):
    """One image, all its fields, in each form."""
    assert done("show", *where, "wmi-1", "-o", "id") == "wmi-1\n"
    assert json.loads(done("show", *where, "wmi-1", "-o", "json"))["source"] == {"uri": "file:///x"}
    assert ":id: wmi-1\n" in done("show", *where, "wmi-1", "-o", "yaml")
    assert re.search(r"(?m)^arch: +x86_64$", done("show", *where, "wmi-1"))


@pytest.mark.parametrize("name", ["delete", "del"])
def test_delete(done, run, where, name):
    """Deleted images are printed; they are gone from the list; a second time is an error."""
    assert done(name, *where, "wmi-0", "wmi-2") == "wmi-0\nwmi-2\n"
    assert done("list", *where, "-o", "id") == "wmi-1\n"
    code, out, err = run(name, *where, "wmi-1", "wmi-0", "wmi-9")
    assert (code, out) == (1, "wmi-1\n")  # what was done is told, then the error
    assert err == "wmi: wmi-0\n" or "wmi-0" in err


def test_modify(done, where):
    """Description and name can be set on both; the image is printed."""
    assert (
        done("modify", *where, "wmi-1", "--description", "new é", "--display-name", "n", "-o", "id")
        == "wmi-1\n"
    )
    assert [(row["description"], row["display_name"]) for row in kept()] == [
        (None, ""),
        ("new é", "n"),
        (None, ""),
    ]


def test_modify_and_features_on_a_store(done, refused):
    """On a store every field can be set, features also by their own command, which keeps the others."""
    fill("sqlite:images.db", 1)
    done(
        "modify", "wmi-0", "--account_id", "a-new", "--arch", "x86", "--no-is-public", "--state", "available",
        "--feature", "virtio",
    )
    done("features", "wmi-0", "--acpi")
    assert kept()[0]["features"] == {"virtio": True, "acpi": True}
    done("features", "wmi-0", "--no-virtio")
    (record,) = kept()
    assert (record["account_id"], record["arch"], record["state"], record["features"]) == (
        "a-new", "x86", "available", {"acpi": True},
    )
    with wmi.open_storage("sqlite:images.db") as storage:
        catalog = wmi.Catalog(storage)
        record = catalog.modify("wmi-0", features={"virtio": True, "acpi": False})
        assert catalog.set_features("wmi-0", virtio=True) == record
    refused("modify", "wmi-0", "--arch", "arm")
    assert kept() == [record]


class Contended(wmi.MemoryStorage):
    """A store in which somebody else sets a feature just after each read of an image, the first time."""

    def get(self, id):
        """Return the image as it was before the other change."""
        record = super().get(id)
        self.meanwhile(id)
        return record

    def replace(self, id, change):
        """Change it as stores do that find out only then that they came too late: once more."""
        change(super().get(id))
        self.meanwhile(id)
        return super().replace(id, change)

    def meanwhile(self, id):
        """Set the feature."""
        super().replace(id, lambda record: {**record, "features": {"acpi": True, **record["features"]}})

    def close(self):
        """Stay open for the test."""


def test_features_that_others_set_meanwhile_are_kept(done, monkeypatch):
    """The features are read and set in one change of the store."""
    store = Contended()
    monkeypatch.setitem(wmi._openers, "contended", lambda location: store)
    fill("contended:", 1)
    done("features", "wmi-0", "--virtio", "--store", "contended:")
    assert store.get("wmi-0")["features"] == {"virtio": True, "acpi": True}
    done("features", "wmi-0", "--no-virtio", "--store", "contended:")
    assert store.get("wmi-0")["features"] == {"acpi": True}


@pytest.mark.parametrize("url", STORES)
def test_features_set_by_two_commands_at_once(url):
    """Neither change is lost."""
    fill(url, 2)
    for id in ("wmi-0", "wmi-1"):
        children = [
            subprocess.Popen([sys.executable, MODULE, "features", id, f"--{name}", "--store", url])
            for name in ("virtio", "acpi")
        ]
        assert [child.wait(SECONDS) for child in children] == [0, 0]
    assert [row["features"] for row in kept(url)] == [{"virtio": True, "acpi": True}] * 2


def test_modify_of_other_fields_on_a_server(run, where):
    """A server sets name and description; anything else is refused, not silently left out."""
    code, _, err = run("modify", *where, "wmi-1", "--arch", "x86")
    assert code == (1 if "--url" in where else 0)
    assert ("arch" in err) == ("--url" in where)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["show", "wmi-\x1b[2J\n"], "is not an id"),
        (["delete", ""], "'' is not an id"),
        (["show", "wmi-é"], "wmi-é"),
        (["list", "--start", "x"], "start"),
        (["list", "--limit=-1"], "limit"),
        (["list", "--limit", "9" * 19], "limit"),
        (["list", "--start", ""], "start"),
        (["show", "wmi-\udcff"], "wmi-"),
    ],
)
def test_bad_input(refused, where, argv, said):
    """One line that names it, alike on a store and on a server."""
    assert said in refused(argv[0], *where, *argv[1:])


@pytest.mark.parametrize("account", ["nobody", "", "a-A", "a-\n"])
def test_bad_accounts(refused, where, account):
    """An account that is none is refused before anything is asked."""
    refused("list", *[word for word in where if word not in ("--account", ACCOUNT)], "--account", account)


def test_account_on_a_store(done):
    """With --account a store lists as a server would; without, the operator sees everything."""
    fill("sqlite:images.db", 1)
    assert done("list", "-o", "id") == "wmi-0\n"
    assert done("list", "-o", "id", "--account", "a-other") == ""


def test_environment(done, monkeypatch):
    """WMI_STORE, WMI_URL and WMI_ACCOUNT stand for the options, which win over them."""
    fill("json:one", 1)
    fill("json:two", 2)
    monkeypatch.setenv("WMI_STORE", "json:one")
    assert done("list", "-o", "id") == "wmi-0\n"
    assert done("list", "-o", "id", "--store", "json:two") == "wmi-1\nwmi-0\n"
    with wmi.open_storage("json:two") as storage, serving(storage) as served:
        monkeypatch.setenv("WMI_URL", served.url)
        monkeypatch.setenv("WMI_ACCOUNT", ACCOUNT)
        assert done("list", "-o", "id") == "wmi-1\nwmi-0\n"
        assert done("list", "-o", "id", "--account", "a-other") == ""


def test_an_option_beats_the_variable_of_its_alternative(monkeypatch):
    """Whoever names a store must not change a server's images because WMI_URL is set; the same for tokens."""
    for name in ("STORE", "URL", "TOKEN", "TOKEN_FILE"):
        monkeypatch.setenv(f"WMI_{name}", f"variable {name}")
    options = wmi._parse_arguments(["delete", "wmi-0", "--store", "json:x", "--token", "t"])
    assert (options.store, options.url, options.token, options.token_file) == ("json:x", None, "t", None)
    options = wmi._parse_arguments(["delete", "wmi-0", "--url", "http://x", "--token-file", "f"])
    assert (options.url, options.token, options.token_file) == ("http://x", None, "f")
    options = wmi._parse_arguments(["delete", "wmi-0"])
    assert (options.store, options.url) == ("variable STORE", "variable URL")
    assert wmi._parse_arguments(["check"]).url is None  # the argument, not the option


@pytest.mark.parametrize("argv", [["list"], ["show", "wmi-0"], ["delete", "wmi-0"], ["modify", "wmi-0", "-d", "x"]])
def test_certificates_are_passed_on(run, monkeypatch, argv):
    """--cacert or WMI_CACERT says which ones the client trusts; without them it is not told any."""
    given = []

    class Told(wmi.Client):
        def __init__(self, url, account, **options):
            given.append(options.pop("cafile", None))
            super().__init__(url, account, **options)

    monkeypatch.setattr(wmi, "Client", Told)
    where = ["--url", "http://127.0.0.1:1", "--account", ACCOUNT]
    run(*argv, *where)
    run(*argv, *where, "--cacert", "ca.pem")
    monkeypatch.setenv("WMI_CACERT", "env.pem")
    run(*argv, *where)
    run(*argv, *where, "--cacert", "ca.pem")
    assert given == [None, "ca.pem", "env.pem", "ca.pem"]


# ---- what went wrong: one line, exit code 1 or 2, files untouched ----


@pytest.mark.parametrize(
    "url",
    [
        "", "images.db", "nope:x", "SQLITE:x", ":x", "../x:y", "sys:x", "os.path:x", "json store:x", "sqlite", "é:x",
        "\x1b[2J:x",
    ],
)
@pytest.mark.parametrize(
    "argv", [["list"], ["dump"], ["add", "volume", "snap-1", "-a", ACCOUNT], ["serve", "--port", "0"]]
)
def test_bad_store_urls(refused, url, argv):
    """A URL without a known scheme names those there are, and imports nothing."""
    line = refused(*argv, "--store", url)
    assert all(scheme in line for scheme in ("memory", "json", "sqlite"))
    assert os.listdir(".") == []


@pytest.mark.parametrize(
    "url",
    [
        "json:.", "sqlite:.", "json:no/such/folder/x", "sqlite:no/such/folder/x", "json:/dev/null/x",
        "sqlite:/dev/null/x",
    ],
)
@pytest.mark.parametrize("argv", [["list"], ["add", "volume", "snap-1", "-a", ACCOUNT]])
def test_stores_that_cannot_be_opened(run, url, argv):
    """A folder, or a file in no folder, is an error; nothing is made."""
    code, _, err = run(*argv, "--store", url)
    assert code == (0 if argv == ["list"] and "no/such" in url and url.startswith("json") and not err else 1)
    assert err.count("\n") <= 1
    assert os.listdir(".") == []


FOREIGN = {
    "text": b"this is not an image store\n",
    "empty object": b"{}",
    "cut": b'{"format": "wmi-images", "version": 1, "change": ',
    "newer": b'{"format": "wmi-images", "version": 99, "change": 1,\n"images": [\n\n]}\n',
    "binary": bytes(range(256)) * 20,
    "list": b"[]",
    "deep": b"[" * 100_000,
    "html": b"<html>",
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("scheme", ["json", "sqlite"])
@pytest.mark.parametrize(
    "argv",
    [
        ["list", "--store"], ["add", "volume", "snap-1", "-a", ACCOUNT, "--store"], ["check"], ["load", "--store"],
        ["copy", "memory:"],
    ],
    ids=lambda argv: argv[0],
)
def test_files_of_others_are_refused_and_untouched(refused, foreign, scheme, argv):
    """A file that is not ours, does not parse, or is newer, is named and stays as it is, byte for byte."""
    with open("precious", "wb") as file:
        file.write(foreign)
    assert "precious" in refused(*argv, f"{scheme}:precious")
    assert content("precious") == foreign
    assert os.listdir(".") == ["precious"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(refused):
    """A folder that may not be entered is an error in one line."""
    os.mkdir("closed", 0)
    refused("list", "--store", "sqlite:closed/images.db")


@pytest.mark.parametrize(
    "argv",
    [
        [], ["nope"], ["show"], ["list", "--nope"], ["list", "-o", "xml"], ["add"], ["add", "local"],
        ["copy", "memory:"], ["serve", "--port", "x"], ["serve", "--unversioned", "1"],
        ["features", "wmi-1", "--magic"], ["load", "a", "b"], ["delete"], ["modify", "wmi-1", "--uuid", "wmi-2"],
    ],
)
def test_wrong_usage(run, argv):
    """What cannot be understood is exit code 2, with the usage, and nothing is done."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and err.startswith("usage: wmi")
    assert os.listdir(".") == []


def test_version_and_help(run):
    """--version and --help are answers: exit code 0, on stdout."""
    assert run("--version") == (0, f"wmi {wmi.__version__}\n", "")
    for argv in ([], ["add"], ["add", "local"], ["list"], ["serve"], ["load"], ["check"]):
        code, out, err = run(*argv, "--help")
        assert (code, err) == (0, "") and out.startswith("usage: wmi")


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"], ["--port", "-1"], ["--workers", "0"], ["--workers", "-1"], ["--max-connections", "0"],
        ["--workers", "2", "--store", "memory:"], ["--host", "no.such.host.invalid."], ["--host", "a..b"],
        ["--host", "x" * 300], ["--host", "\udcff"], ["--log", "no/such/folder/log"],
    ],
)
def test_serve_refuses(refused, options):
    """What cannot be served is said in one line, before anything is served; no signal stays blocked."""
    refused("serve", "--store", "memory:", "--port", "0", *options)
    if hasattr(signal, "pthread_sigmask"):
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_serve_on_a_port_that_is_taken(refused):
    """The port in use is an error in one line."""
    with wmi.MemoryStorage() as storage, serving(storage) as served:
        refused("serve", "--store", "memory:", "--port", served.port)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1", "ftp://127.0.0.1/", "nope", "http://[::1", "file:///etc/passwd", "http://127.0.0.1:99999",
        "http://a b", "http://\x1b[2J",
    ],
)
@pytest.mark.parametrize(
    "argv",
    [["list"], ["show", "wmi-1"], ["delete", "wmi-1"], ["modify", "wmi-1", "-o", "id", "--description", "x"]],
)
def test_servers_that_cannot_be_asked(refused, url, argv):
    """A URL that is none, or where nobody answers, is one line."""
    refused(*argv, "--url", url, "--account", ACCOUNT)


EXPECTED_STORE = "expected SCHEME:LOCATION, such as sqlite:images.db, with one of {schemes}"
MISTAKES = [  # what was typed, and the whole line that answers it
    ("show wmi-nope", "no such image: wmi-nope in sqlite:images.db"),
    ("delete wmi-nope", "no such image: wmi-nope in sqlite:images.db"),
    ("modify wmi-nope --arch x86", "no such image: wmi-nope in sqlite:images.db"),
    ("features wmi-nope --acpi", "no such image: wmi-nope in sqlite:images.db"),
    ("show lucid0", "'lucid0' is not an id: an id is wmi- and letters a-z or digits"),
    ("show WMI-0", "'WMI-0' is not an id: an id is wmi- and letters a-z or digits"),
    ("show wmi-0 --account a-other", "not permitted: the image belongs to another account"),
    ("delete wmi-0 --account a-other", "not permitted: the image belongs to another account"),
    ("modify wmi-0 --account a-other -d x", "no such image: wmi-0 in sqlite:images.db"),
    ("list --limit x", "--limit: 'x' is not a whole number of at most 18 digits"),
    ("list --limit=-1", "--limit: '-1' is not a whole number of at most 18 digits"),
    ("list --limit 1.5", "--limit: '1.5' is not a whole number of at most 18 digits"),
    ("list --start x", "--start: 'x' is not a whole number of at most 18 digits"),
    ("list --start 99999999999999999999",
     "--start: '99999999999999999999' is not a whole number of at most 18 digits"),
    ("list --account shpoolxx",
     "account: 'shpoolxx' is not allowed; expected a- and 1 to 253 letters a-z or digits"),
    ("list --store images.db", "store: 'images.db' is not allowed; " + EXPECTED_STORE),
    ("list --store sqlit:images.db", "store: 'sqlit:images.db' is not allowed; " + EXPECTED_STORE),
    ("list --store json:.", "the store cannot answer: {cwd}: Is a directory"),
    ("modify wmi-0", "nothing to change: give a field, such as --description TEXT"),
    ("modify wmi-0 --arch arm", 'arch: \'arm\' is not allowed; expected "x86" or "x86_64"'),
    ("features wmi-0", "nothing to change: give --virtio, --no-virtio, --acpi or --no-acpi"),
    ("add local lucid.raw -a a-x",
     "lucid.raw is not a file here; give the path of a file, or a URI such as file:///…"),
    ("add volume snap-1", "account_id: is missing; say whose image it is, such as a-shpoolxx"),
    ("add volume lucid -a a-x", "source.snapshot_id: 'lucid' is not allowed; expected snap- and letters a-z or digits"),
    ("add volume snap-1 -a a-x -u wmi-0", "wmi-0 is registered already"),
    ("add volume snap-1 -a a-x -m 123", "md5sum: '123' is not allowed; expected 32 hex digits"),
    ("load absent", "absent: No such file or directory"),
    ("load .", ".: Is a directory"),
    ("load images.db", "images.db is a file of the store itself, sqlite:images.db; give another one"),
    ("dump .", ".: Is a directory"),
    ("dump absent/lines", "absent/lines: No such file or directory"),
    ("dump images.db", "images.db is a file of the store itself, sqlite:images.db; give another one"),
    ("copy sqlite:images.db sqlite:images.db", "sqlite:images.db is not empty; nothing was copied"),
    ("list --url http://127.0.0.1:1", "a server needs to know your account: give --account A or set WMI_ACCOUNT"),
    ("list --url 127.0.0.1:9001 --account a-x",
     "url: '127.0.0.1:9001' is not allowed; expected http://HOST:PORT or https://HOST:PORT"),
    ("list --url http://127.0.0.1:1 --account a-x",
     "cannot reach http://127.0.0.1:1: Connection refused; is the server running?"),
    ("show wmi-nope --url {url} --account a-x", "no such image: wmi-nope in {url}"),
    ("show wmi-0 --url {url} --account a-x", "not permitted: the image belongs to another account"),
    ("show lucid0 --url {url} --account a-x", "'lucid0' is not an id: an id is wmi- and letters a-z or digits"),
    ("list --limit x --url {url} --account a-x", "--limit: 'x' is not a whole number of at most 18 digits"),
    ("list --url {url}/api/images --account a-x",
     "there are no images at {url}/api/images; give the URL of an image server, such as http://HOST:PORT"),
    ("modify wmi-0 --arch x86 --url {url} --account a-shpoolxx",
     "field: 'arch' is not allowed; expected display_name or description"),
]


@pytest.fixture
def images():
    """A store of one image, images.db, which a server serves."""
    fill("sqlite:images.db", 1)
    with wmi.open_storage("sqlite:images.db") as storage, serving(storage) as served:
        yield served.url


@pytest.mark.parametrize("words, line", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistakes_are_explained(refused, images, words, line):
    """In one line that says which thing is wrong and what would be right."""
    texts = {"url": images, "cwd": os.getcwd(), "schemes": wmi._known_schemes()}
    assert refused(*words.format(**texts).split()) == f"wmi: {line.format(**texts)}\n"


def test_what_a_server_says_is_no_instruction(run, monkeypatch):
    """A message that looks like one of ours is only printed."""
    for message in ("limit", "start", "{text.__class__}", "Invalid UUID Syntax: \x1b[2J", ""):

        def show(self, id, message=message):
            raise wmi.InvalidParameter(message)

        monkeypatch.setattr(wmi.Client, "show", show)
        code, out, err = run("show", "wmi-0", "--url", "http://127.0.0.1:1", "--account", ACCOUNT)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert all(char.isprintable() for char in err[:-1])


@pytest.mark.parametrize("name", ["", "serve", "add local", "add volume", "list", "show", "delete", "del", "modify",
                                  "features", "fetch", "token", "load", "dump", "copy", "check"])
def test_help_fits_a_screen(run, name):
    """100 columns and 28 lines; those that set fields have a line for each. Each ends in an example that parses."""
    code, out, _ = run(*name.split(), "--help")
    lines = out.rstrip("\n").split("\n")
    assert code == 0 and max(map(len, lines)) <= 100
    assert len(lines) <= (40 if name.startswith(("add", "modify")) else 28)
    if name:
        example = shlex.split(lines[-1])
        assert example[:2] == ["example:", "wmi"] and " ".join(example[2:]).startswith(name)
        assert wmi._parse_arguments(example[2:]).run


# ---- what other servers answer ----


class Answering(wmi.MemoryStorage):
    """A store that shows what it is given, whatever that is."""

    def __init__(self, shown):
        super().__init__()
        self.shown = shown

    def page(self, *args, **options):
        """Return one image."""
        return 1, [self.shown]

    def get(self, id):
        """Return that image."""
        return self.shown


GOOD = {
    "id": "wmi-one",
    "account_id": ACCOUNT,
    "arch": "x86",
    "boot_dev_type": 2,
    "is_public": True,
    "state": "init",
    "deleted_at": None,
}


@pytest.mark.parametrize(
    "changes",
    [
        None, {}, {"arch": None}, {"boot_dev_type": []}, {"boot_dev_type": {}}, {"description": 5}, {"state": ["x"]},
        {"id": "wmi-\ud800"}, {"description": "\ud800"}, {"account_id": {"a": {}}}, {"id": "wmi-\x1b[2J"},
        {"is_public": "\x9b31m\n"}, {"\x1b[2J\n": "x"}, {"id": None},
    ],
    ids=ascii,
)
@pytest.mark.parametrize("output", ["table", "json", "yaml", "id"])
@pytest.mark.parametrize("verb", [["list"], ["show", "wmi-one"]], ids=["list", "show"])
def test_hostile_servers(run, monkeypatch, changes, output, verb):
    """Whatever a server shows as an image is printed or refused, and a table moves no cursor."""
    shown = {"id": "wmi-one"} if changes is None else {**GOOD, **changes}
    page = {"total": 1, "start": 0, "limit": None, "result": [shown]}
    body = json.dumps(shown if verb[0] == "show" else page).encode()
    monkeypatch.setattr(wmi.Client, "_send", lambda self, *request: json.loads(body))
    code, out, err = run(*verb, "--url", "http://127.0.0.1:1", "--account", ACCOUNT, "-o", output)
    assert code in (0, 1) and err.count("\n") == code
    if output in ("table", "id"):
        assert all(char.isprintable() for char in out.replace("\n", "")), ascii(out)
    assert all(char.isprintable() for char in err.replace("\n", "")), ascii(err)


# ---- terminals ----


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:20])
def test_tables_cannot_move_the_cursor(done, text):
    """Control characters in a description are shown, not obeyed; one image stays one line."""
    fill("sqlite:images.db", 1, description=text, display_name=text)
    table = done("list")
    assert table.count("\n") == 2
    for out in (table, done("show", "wmi-0")):
        assert all(char.isprintable() for char in out.replace("\n", ""))
    assert json.loads(done("show", "wmi-0", "-o", "json"))["description"] == text
    assert json.loads(done("list", "-o", "json"))[0]["description"] == text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("argv", [["list"], ["show", "wmi-0", "-o", "yaml"], ["dump"]], ids=" ".join)
def test_terminals_of_other_encodings(encoding, argv):
    """Text that the terminal's encoding does not have is no traceback."""
    fill("sqlite:images.db", 1, description="é\u2603\U0001f4a9")
    done = process(*argv, env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"" and b"wmi-0" in done.stdout


def terminal(stream, *argv, columns=0):
    """Run the command with stdout or stderr on a terminal; return its exit code and the text that the terminal got."""
    pty, fcntl, termios = (pytest.importorskip(n, reason="terminals are POSIX's") for n in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, stream: theirs}
    child = subprocess.Popen([sys.executable, MODULE, *argv], **streams)
    os.close(theirs)
    pieces = []
    try:
        while piece := os.read(ours, 65536):
            pieces.append(piece)
    except OSError:  # Linux's way to say that nobody writes any more
        pass
    finally:
        os.close(ours)
    return child.wait(SECONDS), b"".join(pieces).decode().replace("\r\n", "\n")


def test_a_table_ends_at_the_edge_of_the_terminal():
    """A name is cut there, and only if it is wider: a combining character takes no column, a wide one takes two."""
    names = {"x" * 40: "x" * 11 + "…", "x" * 12: "x" * 12, "e\u0301" * 12: "e\u0301" * 12, "日" * 6: "日" * 6,
             "e\u0301" * 13: "e\u0301" * 11 + "…", "日" * 7: "日" * 5 + "…"}
    with wmi.open_storage("sqlite:images.db") as storage:
        for number, name in enumerate(names):
            wmi.Catalog(storage).register({"id": f"wmi-{number}", "account_id": ACCOUNT, "display_name": name})
    width = len(f"wmi-0 {ACCOUNT} x86_64 local false  init  ")
    code, shown = terminal("stdout", "list", columns=width + 12)
    assert code == 0
    assert [line[width:] for line in shown.splitlines()[1:]] == [*names.values()][::-1]


NASTY = "\x9b31m \u202e \x7f \x1b[2J \u2028 \U000e0001 é 日 \U0001f4a9 \\ \" '"


@pytest.mark.parametrize("argv", [
    ["list", "-o", "json"], ["show", "wmi-0", "-o", "json"], ["dump"], ["dump", "/dev/stdout"],
    ["list", "-o", "yaml"], ["show", "wmi-0", "-o", "yaml"], ["list"], ["show", "wmi-0"],
], ids=" ".join)
def test_no_form_moves_the_cursor_of_a_terminal(argv):
    """On a terminal what is not printed is escaped, and JSON stays the same data; in a pipe it is not touched."""
    fill("sqlite:images.db", 1, description=NASTY)
    code, shown = terminal("stdout", *argv)
    assert code == 0
    assert all(char.isprintable() for char in shown.replace("\n", "")), ascii(shown)
    assert "é 日 \U0001f4a9" in shown
    if "json" in argv or "dump" in argv:
        piped = process(*argv).stdout.decode()
        assert json.loads(shown) == json.loads(piped)
        assert "\x9b31m \u202e \x7f" in piped and "\\u009b31m \\u202e \\u007f" in shown


@pytest.mark.parametrize("output", ["yaml", "json", "table"])
def test_keys_of_a_hostile_server_on_a_terminal(run, monkeypatch, capsys, output):
    """The names of fields are escaped as well as what they hold."""
    body = json.dumps({**GOOD, NASTY: NASTY}).encode()
    monkeypatch.setattr(wmi.Client, "_send", lambda self, *request: json.loads(body))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    code, out, _ = run("show", "wmi-one", "--url", "http://127.0.0.1:1", "--account", ACCOUNT, "-o", output)
    assert code == 0 and "\\u202e" in out
    assert all(char.isprintable() for char in out.replace("\n", "")), ascii(out)


def test_progress_is_for_terminals(run):
    """Long work counts on a terminal and cleans the line up; in a pipe it is quiet."""
    with open("big\x1b[2J", "wb") as file:
        file.truncate(300 << 20)  # sparse: costs no disk
    code, shown = terminal("stderr", "add", "local", "big\x1b[2J", "-a", ACCOUNT)
    assert code == 0
    assert "\rmd5 of big\\u001b[2J:" in shown and "\x1b[2J" not in shown and shown.endswith("\r\x1b[K")
    assert run("add", "local", "big\x1b[2J", "-a", ACCOUNT)[::2] == (0, "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_errors_after_progress_begin_their_own_line():
    """A failure after progress was shown is not written over it."""
    os.mkfifo("pipe")

    def write():
        with open("pipe", "wb", buffering=0) as pipe:
            pipe.write(LINE % 1 + b"\n")
            threading.Event().wait(0.5)  # progress is shown for what takes longer than 0.2 s
            pipe.write(LINE % 2 + b"\nnonsense\n")

    writer = threading.Thread(target=write)
    writer.start()
    code, shown = terminal("stderr", "load", "pipe", "--store", "memory:")
    writer.join()
    assert code == 1
    assert "loaded" in shown
    assert re.split(r"[\r\n]|\x1b\[K", shown.rstrip())[-1].startswith("wmi: line 3: ")


# ---- pipes, signals, descriptors ----


def test_head_is_no_error():
    """A reader that has seen enough is not answered with a traceback."""
    fill("sqlite:images.db", 2000)
    for argv in (["list"], ["list", "-o", "json"], ["list", "-o", "yaml"], ["dump"]):
        child = subprocess.Popen(
            [sys.executable, MODULE, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        child.stdout.read(10)
        child.stdout.close()
        assert child.stderr.read() == b""
        child.stderr.close()
        assert child.wait(SECONDS) in (0, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_dump_to_a_full_device(refused):
    """A dump that cannot be written is one line that names where to."""
    fill("sqlite:images.db", 3)
    assert refused("dump", "/dev/full") == "wmi: /dev/full: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell's way")
@pytest.mark.parametrize(
    "argv, closed",
    [("list", "<&-"), ("list", ">&-"), ("list", "2>&-"), ("list", "<&- >&- 2>&-"), ("load", "<&-"),
     ("load", "<&- >&- 2>&-"), ("show wmi-9", "2>&-"), ("show wmi-9", "<&- >&- 2>&-")],
)
def test_closed_descriptors(closed, argv):
    """A cron job without stdin, stdout or stderr gets an exit code, no traceback."""
    done = shell(f"{argv} {closed}", stdin=subprocess.DEVNULL)
    assert done.returncode in (0, 1, 2)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell's way")
@pytest.mark.parametrize("argv", ["list", "list -o id", "show wmi-0", "dump", "delete wmi-0", "--help", "--version"])
def test_output_that_goes_nowhere_is_an_error(argv):
    """With standard output closed or full, one line and exit code 1."""
    fill("sqlite:images.db", 3)
    full = ["> /dev/full"] if os.path.exists("/dev/full") else []
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # argparse needs it
    for where in [">&-", *full]:
        done = shell(f"{argv} {where}", env=buffered)
        assert done.returncode == 1, done
        assert re.fullmatch("wmi: standard output: (Bad file descriptor|No space left on device)\n", done.stderr)
        if argv == "delete wmi-0":
            fill("sqlite:images.db", 1)


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell's way")
def test_nothing_to_say_needs_no_output():
    """With standard output closed, a command that prints nothing does its work."""
    fill("sqlite:images.db", 3)
    for argv in ("list -o id --start 9", "features wmi-1 --acpi"):
        done = shell(f"{argv} >&-")
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_interrupted():
    """SIGINT in the middle of long work is exit code 130 without a traceback, and nothing is half done."""
    os.mkfifo("pipe")
    child = subprocess.Popen([sys.executable, MODULE, "load", "pipe"], stderr=subprocess.PIPE)
    with open("pipe", "wb") as pipe:  # waits until the command reads
        pipe.write(b'{"account_id": "a-x"}\n' * 10)
        pipe.flush()
        until(lambda: os.path.exists("images.db"))
        child.send_signal(signal.SIGINT)

        def ended():
            # A signal that comes just before a read begins is seen only when the read returns: an empty line ends it.
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe.fileno(), b"\n")
            return child.poll() is not None

        until(ended)
        assert child.wait() == 130
    assert b"Traceback" not in child.stderr.read()
    child.stderr.close()
    assert kept() == []


# ---- load and dump ----


def hostile_images():
    """Return lines of images whose texts, times, states and order try everything."""
    for number, text in enumerate(HOSTILE):
        yield {
            "id": f"wmi-{number}",
            "account_id": ACCOUNT,
            "description": text,
            "display_name": text,
            "root_device": text,
            "created_at": f"20{number:02}-02-28T23:59:59Z",
            "updated_at": "1970-01-01T00:00:00Z",
            "is_public": bool(number % 2),
            "features": {"virtio": True} if number % 3 else {},
            "source": {"uri": "file:///é 'x'"} if number % 2 else {},
        }
    yield {"id": "wmi-gone", "account_id": ACCOUNT, "state": "deleted", "deleted_at": "2012-02-29T00:00:00Z"}
    yield {
        "id": "wmi-volume",
        "account_id": ACCOUNT,
        "boot_dev_type": 1,
        "source": {"snapshot_id": "snap-1"},
        "md5sum": "0" * 32,
    }


@pytest.mark.parametrize("url", STORES)
def test_round_trip(done, url):
    """What was dumped, loaded and dumped again is the same: bytes, ids, times, tombstones, order."""
    lines = "\n".join(json.dumps(row) for row in hostile_images()).encode()
    done("load", "--store", url, stdin=lines)
    first = done("dump", "--store", url)
    assert [json.loads(line)["id"] for line in first.rstrip("\n").split("\n")] == [
        row["id"] for row in hostile_images()
    ]
    done("load", "--store", "json:second", stdin=first.encode())
    assert done("dump", "--store", "json:second") == first
    assert kept(url) == kept("json:second")
    done("dump", "file", "--store", url)
    assert content("file").decode() == first
    done("load", "file", "--store", "sqlite:third")
    assert kept("sqlite:third") == kept(url)


@pytest.mark.parametrize("version", wmi.VERSIONS)
def test_load_of_what_a_server_shows(done, version):
    """The images in an answer of any version can be loaded as they are."""
    fill("json:images", 2, description="é", source={"uri": "file:///x"}, features={"virtio": True})
    with wmi.open_storage("json:images") as storage:
        shown = [wmi.render(wmi.VERSIONS[version], record) for record in storage.walk(oldest_first=True)]
    done("load", "--store", "json:second", stdin="\n".join(map(json.dumps, shown)).encode())
    again = kept("json:second")
    for name in set(wmi.FIELDS) & set(shown[0]) - {"state"}:
        assert [row[name] for row in again] == [row[name] for row in kept("json:images")], name


@pytest.mark.parametrize("text", [b"", b"\n\n", b"  \r\n\t\n"])
def test_load_of_nothing(run, text):
    """Empty lines are no images."""
    assert run("load", stdin=text)[:2] == (0, "")
    assert kept() == []


LINE = b'{"account_id": "a-x", "id": "wmi-good%d"}'
BAD = {
    "json": b"{",
    "text": b"hello",
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "no account": b"{}",
    "utf-8": b'{"account_id": "a-\xff"}',
    "utf-16": '{"account_id": "a-x"}'.encode("utf-16"),
    "nul": b"\x00",
    "deep": b"[" * 100_000,
    "field": b'{"account_id": "a-x", "nope": 1}',
    "arch": b'{"account_id": "a-x", "arch": "arm"}',
    "id": b'{"account_id": "a-x", "id": "x"}',
    "time": b'{"account_id": "a-x", "created_at": "x"}',
    "two ids": b'{"account_id": "a-x", "id": "wmi-a", "uuid": "wmi-b"}',
    "surrogate": b'{"account_id": "a-x", "description": "\\ud800"}',
    "tombstone": b'{"account_id": "a-x", "state": "deleted"}',
    "source": b'{"account_id": "a-x", "source": "--- !ruby/object:X {}"}',
    "escape": b'{"account_id": "a-x", "source": "---\\n:uri: \\"\\\\UFFFFFFFF\\"\\n"}',
    "long number": b"9" * 10_000,
    "infinite": b'{"account_id": "a-x", "boot_dev_type": 1e999}',
    "nested": b'{"account_id": "a-x", "arch": ' + b"[" * 900 + b"]" * 900 + b"}",
    "escapes": b'{"account_id": "a-x", "\\u001b[2J\\n": 1}',
    "true": b'{"account_id": "a-x", "boot_dev_type": true}',
    "one": b'{"account_id": "a-x", "is_public": 1}',
    "two": LINE + b" " + LINE,
    "day": b'{"account_id": "a-x", "created_at": "2011-02-30"}',
    "duplicate": LINE % 1,
    "cr": b'{"account_id": "a-x"}\r{"account_id": "a-y"}',
}


@pytest.mark.parametrize(
    "url, bad", [*(("json:images", bad) for bad in BAD.values()), ("sqlite:images", BAD["duplicate"])],
    ids=[*BAD, "sqlite"],
)
def test_load_of_bad_lines(refused, run, url, bad):
    """The line's number is told, and nothing of the file is loaded; with --keep-going all the others are."""
    text = b"\n".join([LINE % 1, b"", LINE % 2, bad, LINE % 3])
    assert refused("load", "--store", url, stdin=text).startswith("wmi: line 4: ")
    assert kept(url) == []
    code, out, err = run("load", "--store", url, "--keep-going", stdin=text)
    assert (code, out) == (1, "")
    assert [row["id"] for row in kept(url)] == ["wmi-good1", "wmi-good2", "wmi-good3"]
    first, *_, last = err.splitlines()
    assert first.startswith("wmi: line 4: ") and "loaded 3, refused 1" in last
    assert len(err.splitlines()) == 2 and all(char.isprintable() for char in err.replace("\n", ""))


@pytest.mark.parametrize(
    "text",
    [LINE % 1 + b"\r\n" + LINE % 2 + b"\r\n", LINE % 1 + b"\n\n\n" + LINE % 2, b" \t" + LINE % 1 + b" \n" + LINE % 2],
)
def test_load_of_other_line_ends(done, text):
    """CRLF, empty lines, blanks around, no end after the last line: all are lines."""
    done("load", stdin=text)
    assert [row["id"] for row in kept()] == ["wmi-good1", "wmi-good2"]


def test_load_of_a_byte_order_mark(run):
    """What editors put before the first line is skipped or refused by its name, never a puzzle."""
    code, _, err = run("load", stdin=b"\xef\xbb\xbf" + LINE % 1)
    assert code == 0 or "BOM" in err


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("more", [-1, 0, 1, 2, wmi.MAX_LINE, 3 * wmi.MAX_LINE + 5])
def test_load_of_a_long_line(run, more, end):
    """A line of MAX_LINE bytes is a line; a longer one is refused with its number, the others are not."""
    long = b'{"account_id": "a-x", "id": "wmi-long"' + b" " * (wmi.MAX_LINE + more - 39) + b"}"
    assert len(long) == wmi.MAX_LINE + more
    text = b"\n".join([LINE % 1, long, LINE % 2]) + end
    code, _, err = run("load", stdin=text)
    if more <= 0:
        assert code == 0 and [row["id"] for row in kept()] == ["wmi-good1", "wmi-long", "wmi-good2"]
        return
    assert (code, err) == (1, "wmi: line 2: longer than 1,048,576 bytes\n")
    assert kept() == []
    code, _, err = run("load", "--keep-going", stdin=text)
    assert (code, err) == (1, "wmi: line 2: longer than 1,048,576 bytes\nwmi: loaded 2, refused 1\n")
    assert [row["id"] for row in kept()] == ["wmi-good1", "wmi-good2"]


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="memory is traced by CPython alone")
@pytest.mark.parametrize("options", [[], ["--keep-going"]], ids=str)
def test_a_long_line_is_not_held_in_memory(run, options):
    """One of 50 MB costs a few times the limit, whether the others are loaded or not."""
    with open("lines", "wb") as file:
        file.write(LINE % 1 + b"\n" + b"x" * 50_000_000 + b"\nno\n" + LINE % 2)
    tracemalloc = pytest.importorskip("tracemalloc", reason="this Python does not count allocations")
    tracemalloc.start()
    try:
        code, _, err = run("load", "lines", *options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code == 1 and "line 2: " in err and ("line 3: " in err) == bool(options)
    assert peak < 10 * wmi.MAX_LINE
    assert len(kept()) == (2 if options else 0)


def test_the_longest_image_can_be_dumped_and_loaded(done, refused):
    """What image_record takes has a line that load takes, also when each character needs six bytes."""
    rest = len("wmi-0" + ACCOUNT + 2 * "2011-11-23T07:36:00Z" + "x86_64rawstdlinux")
    text = "\x01" * (wmi.MAX_TEXT - rest)
    fill("json:images", 1, description=text, created_at="2011-11-23T07:36:00Z")
    done("dump", "lines", "--store", "json:images")
    done("load", "lines")
    assert kept() == kept("json:images")
    assert "150,000 characters" in refused("modify", "wmi-0", "--display-name", "x")
    done("delete", "wmi-0")
    done("dump", "buried")
    done("load", "buried", "--store", "json:again")
    assert kept("json:again") == kept()
    done("check")


def test_a_backend_that_cannot_be_imported(refused, monkeypatch):
    """A Python without sqlite3, say: one line, like any other error."""
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    monkeypatch.delitem(sys.modules, "wmi.sqlite_store", raising=False)
    assert "sqlite3" in refused("add", "local", "file:///x", "-a", ACCOUNT, "--store", "sqlite:new.db")


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell's way")
@pytest.mark.parametrize("source", ["<&-", "< images.db", "< link"])
def test_load_of_an_input_that_cannot_be_read(source):
    """No input at all, or the store itself: an error that does not put it down to the store."""
    fill("sqlite:images.db", 1)
    os.link("images.db", "link")
    done = shell(f"load {source}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    expected = "/dev/stdin is a file of the store" if "db" in source or "link" in source else "cannot read the lines: "
    assert expected in done.stderr


def test_load_over_images_that_are_there(refused, run, done):
    """An id that is taken is refused with its line; the rest is loaded only when asked."""
    fill("sqlite:images.db", 1)
    before = kept()
    text = b'{"account_id": "a-x", "id": "wmi-new"}\n{"account_id": "a-x", "id": "wmi-0"}\n'
    line = refused("load", stdin=text)
    assert "wmi-0" in line and kept() == before
    assert run("load", "--keep-going", stdin=text)[0] == 1
    assert [row["id"] for row in kept()] == ["wmi-0", "wmi-new"] and kept()[0] == before[0]


# ---- slips of the hand: no store and no good dump is lost ----


SPELLINGS = ["images", "./images", "folder/../images", "symlink", "hardlink", "{cwd}/images", "folder/up/images"]
ENDINGS = {"json": ["", ".new", ".lock"], "sqlite": ["", "-journal", "-wal", "-shm"]}


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("argv", [["dump"], ["load"], ["load", "--keep-going"], ["add", "local", "-a", ACCOUNT]],
                         ids=" ".join)
@pytest.mark.parametrize("url", STORES)
def test_a_store_is_no_file_for_itself(refused, url, argv, spelling, tmp_path):
    """Neither to be written nor to be read, however its path is spelled; it stays as it is."""
    fill(url, 2)
    os.mkdir("folder")
    os.symlink("..", "folder/up")
    os.symlink("images", "symlink")
    os.link("images", "hardlink")
    before = content("images")
    line = refused(*argv, spelling.format(cwd=tmp_path), "--store", url)
    assert "is a file of the store" in line
    assert content("images") == before and content("hardlink") == before
    assert sorted(os.listdir(".")) == ["folder", "hardlink", "images", "symlink"]


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("ending", ["", ".new", ".lock", "-journal", "-wal", "-shm"])
@pytest.mark.parametrize("url", STORES)
def test_what_stands_beside_a_store_is_not_dumped_to(refused, url, ending, there):
    """Nor are the files that a store makes when it needs them; a link to the store has them beside its target."""
    fill(url, 2)
    os.mkdir("folder")
    os.symlink("../images", "folder/link")
    path = f"images{ending}"
    if there and ending:
        open(path, "w").close()
    before = content("images")
    for store in (url, url.replace("images", "folder/link")):
        assert "is a file of the store" in refused("dump", path, "--store", store)
    assert content("images") == before and os.path.exists(path) == (there or not ending)


def test_standard_output_is_not_appended_to_the_store():
    """The shell has opened the file; at least nothing is written to it, and the exit code says so."""
    fill("json:images", 2)
    before = content("images")
    with open("images", "ab") as file:
        done = process("dump", "--store", "json:images", capture_output=False, stdout=file, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"/dev/stdout is a file of the store" in done.stderr
    assert content("images") == before


class Breaking(wmi.MemoryStorage):
    """A store that cannot be read to its end."""

    def walk(self, *args, **options):
        """Yield some, then fail."""
        yield wmi.image_record({"id": "wmi-new", "account_id": ACCOUNT})
        raise self.error


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError(5, "broken"), ValueError("broken"), KeyboardInterrupt(), BrokenPipeError()],
                         ids=repr)
def test_a_dump_that_fails_changes_nothing(run, done, monkeypatch, error, there):
    """The last dump is there, whole, and nothing else."""
    fill("json:images", 2)
    if there:
        done("dump", "lines", "--store", "json:images")
    before = content("lines")
    monkeypatch.setattr(Breaking, "error", error, raising=False)
    monkeypatch.setitem(wmi._openers, "breaking", lambda location: Breaking())
    assert run("dump", "lines", "--store", "breaking:")[0] == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert content("lines") == before
    assert sorted(os.listdir(".")) == ["images", "lines"][: 1 + there]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_dump_that_cannot_be_finished_changes_nothing(refused, done, monkeypatch, call):
    """A full disk and the like name the file; the last dump is there, and nothing else."""
    fill("json:images", 2)
    done("dump", "lines", "--store", "json:images")
    before = content("lines")

    def fail(path, *args):
        raise OSError(28, "No space left on device", path if isinstance(path, str) else None)

    with monkeypatch.context() as broken:
        broken.setattr(wmi.os, call, fail)
        assert refused("dump", "lines", "--store", "json:images") == "wmi: lines: No space left on device\n"
    assert content("lines") == before and sorted(os.listdir()) == ["images", "lines"]


def test_a_dump_is_on_the_disk_before_it_replaces_another(done, monkeypatch):
    """Else a power cut may leave an empty file under the name of the good one."""
    fill("json:images", 2)
    done("dump", "lines", "--store", "json:images")
    seen = []

    def fsync(descriptor):
        seen.append(("fsync", os.fstat(descriptor).st_size))

    def replace(source, target, real=os.replace):
        seen.append(("replace", os.path.getsize(source)))
        real(source, target)

    monkeypatch.setattr(wmi.os, "fsync", fsync)
    monkeypatch.setattr(wmi.os, "replace", replace)
    done("dump", "lines", "--store", "json:images")
    assert seen == [("fsync", len(content("lines"))), ("replace", len(content("lines")))]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o777])
def test_a_dump_keeps_the_mode_of_the_file(done, mode):
    """A new file gets what the umask leaves; one that is there keeps its own, and a link stays a link."""
    fill("sqlite:images.db", 1)
    before = os.umask(0o027)
    try:
        done("dump", "new")
        os.chmod("new", mode)
        os.symlink("new", "link")
        os.symlink("absent", "dangling")
        done("dump", "link")
        done("dump", "dangling")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("new").st_mode) == mode
    assert stat.S_IMODE(os.stat("absent").st_mode) == 0o640
    assert os.readlink("link") == "new" and os.readlink("dangling") == "absent"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_dump_to_what_is_no_file_streams(done):
    """A named pipe and /dev/stdout are written to as they are, and stay what they are."""
    fill("sqlite:images.db", 2)
    expected = done("dump").encode()
    os.mkfifo("pipe")
    child = subprocess.Popen([sys.executable, MODULE, "dump", "pipe"])
    assert content("pipe") == expected
    assert child.wait(SECONDS) == 0 and stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert done("dump", "-").encode() == process("dump", "/dev/stdout").stdout == expected
    with open("out", "wb") as out:
        assert process("dump", "/dev/stdout", capture_output=False, stdout=out).returncode == 0
    assert content("out") == expected


@pytest.mark.parametrize("argv, said", [
    (["dump", "folder"], "folder: Is a directory"),
    (["copy", "sqlite:images.db", "sqlite:./images.db"], "not empty; nothing was copied"),
    (["copy", "sqlite:images.db", "json:images.db"], "images.db"),
    (["copy", "json:other", "sqlite:images.db"], "there is no store json:other"),
    (["load", "lines", "--store", "json:lines"], "lines is a file of the store itself"),
    (["load", "images.db", "--store", "json:other"], "line 1: not JSON"),
])
def test_other_slips(refused, done, argv, said):
    """Each is refused, and all that was there is as it was."""
    fill("sqlite:images.db", 2)
    done("dump", "lines")
    os.mkdir("folder")
    before = content("images.db"), content("lines")
    assert said in refused(*argv)
    assert (content("images.db"), content("lines")) == before


@pytest.mark.parametrize("argv", [
    ["list"], ["show", "wmi-0"], ["delete", "wmi-0"], ["modify", "wmi-0", "--arch", "x86"], ["dump"], ["check"],
    ["features", "wmi-0", "--acpi"], ["copy", "sqlite:images.db", "json:copy"], ["list", "--store", "json:typo"],
])
def test_a_slip_in_the_name_of_a_store_makes_none(refused, argv):
    """What reads a store says that it is not there, and leaves no empty one behind."""
    assert "there is no store" in refused(*argv)
    assert os.listdir(".") == []


# ---- copy and check ----


@pytest.mark.parametrize("source, target", list(itertools.product(STORES, repeat=2)))
def test_copy(done, refused, source, target):
    """Ids, times, tombstones and order are kept; a store that is not empty is left alone."""
    target += "-copy"
    done("load", "--store", source, stdin="\n".join(map(json.dumps, hostile_images())).encode())
    done("copy", source, target)
    assert kept(target) == kept(source)
    assert "not empty" in refused("copy", source, target)
    assert kept(target) == kept(source)


def test_copy_of_a_tombstone_alone_counts_as_not_empty(refused):
    """A target that holds only deleted images is not empty."""
    fill("json:target", 1, state="deleted", deleted_at="2012-01-01T00:00:00Z")
    refused("copy", "memory:", "json:target")


@pytest.mark.parametrize("url", [*STORES, "memory:"])
def test_check_of_a_good_store(run, url):
    """A store without faults is exit code 0, and nothing on stdout."""
    if url != "memory:":
        fill(url, 3, description="é")
    code, out, err = run("check", url)
    assert (code, out) == (0, "") and err.count("\n") == 1


@pytest.mark.parametrize("argv", [
    ["json:images"], ["--store", "json:images"], ["json:images", "--store", "json:images"],
], ids=" ".join)
def test_check_takes_its_store_like_the_others(run, monkeypatch, argv):
    """As a word, by --store, or from the environment."""
    fill("json:images", 2)
    fill("json:other", 1)
    assert run("check", *argv)[::2] == (0, "wmi: json:images: no faults\n")
    monkeypatch.setenv("WMI_STORE", "json:other")
    assert run("check", *argv)[::2] == (0, "wmi: json:images: no faults\n")
    assert run("check")[::2] == (0, "wmi: json:other: no faults\n")


def test_check_looks_at_the_default_store(run):
    """As every command does."""
    fill("sqlite:images.db")
    assert run("check")[::2] == (0, "wmi: sqlite:images.db: no faults\n")


def test_check_of_bad_records(run):
    """A record that no command would have written is told with its id; the store is not changed."""
    fill("json:images", 2)
    text = content("images").replace(b'"x86_64"', b'"arm\\u001b[2J"', 1)
    with open("images", "wb") as file:
        file.write(text)
    code, out, _ = run("check", "json:images")
    assert code == 1
    assert out.count("\n") == 1 and "wmi-0" in out and "arch" in out
    assert all(char.isprintable() for char in out.replace("\n", ""))
    assert content("images") == text


def test_check_and_repair(run):
    """What is derived from the images is compared with them, and rebuilt when asked."""
    fill("sqlite:images", 5)
    db = sqlite3.connect("images")
    db.execute("UPDATE tally SET n = n + 1")
    db.commit()
    db.close()
    before = kept("sqlite:images")
    code, out, _ = run("check", "sqlite:images")
    assert code == 1 and out
    assert run("check", "sqlite:images")[0] == 1
    run("check", "sqlite:images", "--repair")
    assert run("check", "sqlite:images")[:2] == (0, "")
    assert kept("sqlite:images") == before


# ---- serve ----


def test_serve(command, done):
    """The command serves what the other commands change, and the sample only where the store is empty."""
    for _ in range(2):
        server = command("--sample", "--log", "-")
        caller = wmi.Client(f"http://127.0.0.1:{server.port}", ACCOUNT)
        ids = [row["id"] for row in caller.images()]
        assert ids[-1] == "wmi-lucid0" and len(ids) == len(set(ids)) == len(kept())
        if "wmi-new" not in ids:
            done("add", "local", "file:///x", "-a", ACCOUNT, "-u", "wmi-new")
        assert next(caller.images())["id"] == "wmi-new"
        server.process.terminate()
        assert server.wait() == 0 and len(server.said) == 1


def test_serve_of_another_version(command):
    """--unversioned makes /api/images speak another version."""
    server = command("--sample", "--unversioned", "12.03", store="memory:")
    page = wmi.Client(f"http://127.0.0.1:{server.port}", ACCOUNT).index()
    assert page.limit == 250 and "service_type" in page.images[0]
