"""The clients that exist, request by request, spelled as each of them spells it.

The texts are what these clients put on the wire: Net::HTTP capitalizes header names, curl sends what
it is told, Go's net/http keeps the connection. What a client then does with the answer is done here
too: grep and awk for mussel, statuses and key names for the others.
"""

import http.client
import json
import re
import socket

import pytest
from serving import SECONDS, serving

import wmi

ME, OTHER = "a-shpoolxx", "a-otheracc"
DEMO = [  # oldest first, as in the clients' own demo data
    {"id": "wmi-lucid0", "account_id": ME, "arch": "x86", "is_public": True, "md5sum": "1" * 32,
     "source": {"uri": "file:///var/lib/wakame-vdc/images/ubuntu-lucid-kvm-32.raw"},
     "features": {"virtio": True}, "description": "ubuntu-lucid-kvm-32.raw local",
     "display_name": "Ubuntu 10.04", "root_device": "label:root", "backup_object_id": "bo-lucid0"},
    {"id": "wmi-lucid1", "account_id": ME, "source": {"snapshot_id": "snap-lucid1"},
     "description": "ubuntu volume"},
    {"id": "wmi-other0", "account_id": OTHER, "is_public": True},
    {"id": "wmi-other1", "account_id": OTHER},
    {"id": "wmi-lb0", "account_id": ME, "service_type": "lb", "state": "available"},
    {"id": "wmi-gone0", "account_id": ME, "state": "deleted", "deleted_at": "2012-01-01T00:00:00Z"},
]


@pytest.fixture
def storage():
    """A store with a few images."""
    storage = wmi.open_storage("memory:")
    storage.add_all(map(wmi.image_record, DEMO))
    return storage


@pytest.fixture
def server(storage):
    """A server as the clients of 12.03 meet it."""
    with serving(storage) as running:
        yield running


def exchange(server, lines, body=b""):
    """Send a request line and header lines as they stand; return status, headers and text."""
    text = "".join(f"{line}\r\n" for line in lines).replace("HOST", f"{server.host}:{server.port}")
    with socket.create_connection((server.host, server.port), timeout=SECONDS) as connection:
        connection.sendall(text.encode("ascii") + b"\r\n" + body)
        answer = http.client.HTTPResponse(connection, method=lines[0].partition(" ")[0])
        answer.begin()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read().decode()


# ---- the specs of v11: HTTParty on Ruby 1.8.7 ----


def httparty(server, method, path):
    """Do APITest.get or APITest.delete; return whether it succeeded, and what the body holds."""
    status, headers, text = exchange(server, [
        f"{method} /api{path} HTTP/1.1", "Connection: close", f"X-Vdc-Account-Uuid: {ME}", "Host: HOST",
    ])
    assert headers["content-type"] == "application/json"  # HTTParty parses by this type
    return 200 <= status < 300, json.loads(text)


@pytest.mark.parametrize("unversioned", ["document", "11.12"])
def test_v11_specs_read(storage, unversioned):
    """The list answers success; an image has the id that was asked for."""
    with serving(storage, unversioned=unversioned) as server:
        success, _ = httparty(server, "GET", "/images")
        assert success
        success, image = httparty(server, "GET", "/images/wmi-lucid0")
        assert (success, image["id"]) == (True, "wmi-lucid0")
        assert not httparty(server, "GET", "/images/wmi-gone0")[0]


@pytest.mark.parametrize("kind", ["local", "volume"])
def test_v11_specs_delete_and_register_again(tmp_path, capsys, kind):
    """The path is YAML.load(res["source"])[:uri]; then vdc-manage image add, which prints the id alone."""
    file = tmp_path / "ubuntu.raw"
    file.write_bytes(b"image")
    url = f"sqlite:{tmp_path / 'images.db'}"
    source = {"uri": f"file://{file}"} if kind == "local" else {"snapshot_id": "snap-lucid1"}
    with wmi.open_storage(url) as storage:
        wmi.Catalog(storage).register({**DEMO[0], "source": source, "features": {}})
        with serving(storage, unversioned="11.12") as server:
            before = httparty(server, "GET", "/images/wmi-lucid0")[1]
            key = ":uri" if kind == "local" else ":snapshot_id"
            place = dict(line.split(": ", 1) for line in before["source"].split("\n")[1:-1])[key].strip("'")
            place = place[len("file://") :] if kind == "local" else place
            assert httparty(server, "DELETE", "/images/wmi-lucid0") == (True, ["wmi-lucid0"])
            assert not httparty(server, "GET", "/images/wmi-lucid0")[0]
            assert wmi.main([
                "add", kind, place, "-m", before["md5sum"], "-a", before["account_id"], "-u", before["id"],
                "-r", before["arch"], "-d", before["description"], "-s", "init", "--store", url,
            ]) == 0
            assert capsys.readouterr().out == "wmi-lucid0\n"
            after = httparty(server, "GET", "/images/wmi-lucid0")[1]
    for name in ("id", "uuid", "account_id", "arch", "description", "md5sum", "state", "boot_dev_type",
                 "source"):
        assert after[name] == before[name], name


# ---- the GUI of v11: ActiveResource ----


def active_resource(server, method, path, *more):
    """Do a call of ActiveResource 3.0 with the GUI's account header; return status and data."""
    kind = "Accept" if method in ("GET", "DELETE") else "Content-Type"
    status, headers, text = exchange(server, [
        f"{method} {path} HTTP/1.1", f"{kind}: application/json", f"X-Vdc-Account-Uuid: {ME}", *more,
        "Connection: close", "Host: HOST", *([] if kind == "Accept" else ["Content-Length: 0"]),
    ])
    assert headers["content-type"] == "application/json"
    return status, json.loads(text)


def test_the_v11_gui_lists(storage):
    """find(:first) takes the first of an array, an object with owner_total and results."""
    with serving(storage, unversioned="11.12") as server:
        for path in ("/api/images.json", "/api/11.12/images.json"):
            status, found = active_resource(server, "GET", f"{path}?limit=1&start=0")
            assert (status, type(found), len(found)) == (200, list, 1)
            assert found[0]["owner_total"] == 4
            assert [image["id"] for image in found[0]["results"]] == ["wmi-lb0"]
            status, found = active_resource(server, "GET", f"{path}?start=2&limit=10")
            assert [image["uuid"] for image in found[0]["results"]] == ["wmi-lucid1", "wmi-lucid0"]
            assert (found[0]["start"], found[0]["limit"]) == (2, 10)
            assert active_resource(server, "GET", path)[1][0]["limit"] is None


def test_the_v11_gui_shows(storage):
    """An object by its id; somebody else's is 403, which it raises as ForbiddenAccess, an unknown one 404."""
    with serving(storage, unversioned="11.12") as server:
        status, image = active_resource(server, "GET", "/api/images/wmi-lucid0.json")
        assert (status, image["id"], image["state"], image["is_public"]) == (200, "wmi-lucid0", "init", True)
        assert active_resource(server, "GET", "/api/images/wmi-other1.json")[0] == 403
        assert active_resource(server, "GET", "/api/images/wmi-nope.json")[0] == 404
        assert active_resource(server, "DELETE", "/api/images/wmi-other0.json")[0] == 403
        assert active_resource(server, "DELETE", "/api/images/wmi-lucid0.json") == (200, ["wmi-lucid0"])


# ---- mussel: curl in bash, answers read with grep and awk ----


def mussel(server, method, tail, body=None, account=ME):
    """Do curl -fsSkL; return its exit code, and what it prints."""
    lines = [f"{method} /api/12.03/images{tail} HTTP/1.1",
             "User-Agent: curl/7.19.7 (x86_64-redhat-linux-gnu)", "Host: HOST", "Accept: */*",
             f"X_VDC_ACCOUNT_UUID:{account}"]
    if body is not None:
        lines += [f"Content-Length: {len(body)}", "Content-Type: application/x-www-form-urlencoded"]
    status, headers, text = exchange(server, lines, (body or "").encode())
    assert "yaml" in headers["content-type"] or status >= 400
    return (22, "") if status >= 400 else (0, text)


def grep(pattern, text):
    return [line for line in text.split("\n") if re.search(pattern, line)]


def awk(number, lines):
    """Return the field of this number of each line, as awk prints it."""
    return [fields[number - 1] if len(fields) >= number else "" for fields in map(str.split, lines)]


def ids(text):
    """What piped_task_index prints for -o id."""
    return awk(3, grep("- :id:", text))


@pytest.mark.parametrize(
    ("query", "listed"),
    [
        ("", ["wmi-gone0", "wmi-lb0", "wmi-lucid1", "wmi-lucid0"]),
        ("?", ["wmi-gone0", "wmi-lb0", "wmi-lucid1", "wmi-lucid0"]),  # the first mussel always sent one
        ("?is_public=true", ["wmi-gone0", "wmi-lb0", "wmi-other0", "wmi-lucid1", "wmi-lucid0"]),
        ("?is_public=1", ["wmi-gone0", "wmi-lb0", "wmi-other0", "wmi-lucid1", "wmi-lucid0"]),
        ("?is_public=false", ["wmi-gone0", "wmi-lb0", "wmi-lucid1"]),
        ("?is_public=0", ["wmi-gone0", "wmi-lb0", "wmi-lucid1"]),
        ("?&service_type=std", ["wmi-gone0", "wmi-lucid1", "wmi-lucid0"]),
        ("?&service_type=lb", ["wmi-lb0"]),
        ("?&state=alive", ["wmi-lb0", "wmi-lucid1", "wmi-lucid0"]),
        ("?&state=alive_with_deleted", ["wmi-gone0", "wmi-lb0", "wmi-lucid1", "wmi-lucid0"]),
        ("?&state=available", ["wmi-lb0", "wmi-lucid1", "wmi-lucid0"]),
        ("?&state=deleted", ["wmi-gone0"]),
        ("?is_public=true&service_type=std&state=alive", ["wmi-other0", "wmi-lucid1", "wmi-lucid0"]),
        ("?&service_type=lb&state=deleted", []),
    ],
)
def test_mussel_index(server, query, listed):
    """Every option given or left out; ids stand behind '- :id:', one line each."""
    code, text = mussel(server, "GET", f".yml{query}")
    assert (code, ids(text)) == (0, listed)


@pytest.mark.parametrize("query", ["?is_public=maybe", "?&service_type=web", "?&state=gone", "?limit=x"])
def test_mussel_index_refused(server, query):
    """-f makes every status from 400 on the exit code 22."""
    assert mussel(server, "GET", f".yml{query}")[0] == 22


def test_mussel_show(server):
    """document_pair? reads a first-level key at the line's start; hash_value a word in the line."""
    code, text = mussel(server, "GET", "/wmi-lucid0.yml")
    assert code == 0
    for key, value in [("id", "wmi-lucid0"), ("state", "available"), ("arch", "x86"), ("is_public", "true"),
                       ("root_device", "label:root"), ("backup_object_id", "bo-lucid0")]:
        assert awk(2, grep(rf"^:{key}:", text)) == [value]
        assert awk(2, [line for line in grep(rf":{key}:", text) if len(line.split()) == 2]) == [value]
    assert text.startswith("---\n:id: ")


def test_mussel_walks_through_what_it_lists(server):
    """step_base_show_uuids: each id of the index can be shown."""
    for id in ids(mussel(server, "GET", ".yml")[1]):
        code, text = mussel(server, "GET", f"/{id}.yml")
        assert (code, awk(2, grep("^:id:", text))) == (0, [id])


def test_mussel_bad_ids_fail(server):
    """Also the one of its own tests, which has a dot in it."""
    for id in ("invalid-uuid-syntax.4711", "invalid-uuid-syntax", "wmi-nope", "wmi-other1", "lucid0"):
        for method in ("GET", "DELETE"):
            assert mussel(server, method, f"/{id}.yml")[0] == 22
    assert mussel(server, "GET", ".yml", account="xyz")[0] == 22


def test_mussel_destroy(server):
    """The last line holds the id; the state is then deleted, which it waits for."""
    code, text = mussel(server, "DELETE", "/wmi-lucid1.yml")
    assert (code, awk(2, text.strip().split("\n")[-1:])) == (0, ["wmi-lucid1"])
    assert awk(2, grep("^:state:", mussel(server, "GET", "/wmi-lucid1.yml")[1])) == ["deleted"]
    assert mussel(server, "DELETE", "/wmi-lucid1.yml")[0] == 0


def test_mussel_update(server):
    """curl --data-urlencode: a form; the id of the answer is grepped at the line's start."""
    code, text = mussel(server, "PUT", "/wmi-lucid0.yml", "display_name=new%20name")
    assert (code, awk(2, grep("^:id:", text))) == (0, ["wmi-lucid0"])
    assert grep("^:display_name:", text) == [":display_name: new name"]
    assert mussel(server, "PUT", "/wmi-nope.yml", "display_name=x")[0] == 22
    assert mussel(server, "PUT", "/wmi-lucid0.yml")[0] == 0  # no option given: no body, no type


# ---- ruby-hijiki: ActiveResource 3.2 for 12.03 ----

QUOTA = 'X-Vdc-Account-Quota: {"instance.count":5.0,"security_group.count":10.0,"image.count":"日"}'
EXTRA = ["X-Vdc-Requester-Token: user@example.com", QUOTA.replace("日", "\\u65e5")]


def hijiki(server, method, tail):
    return active_resource(server, method, f"/api/12.03/images{tail}", *EXTRA)


def test_hijiki_lists(server):
    """list asks for its service type, everybody's public ones and what is deleted; total is read."""
    status, found = hijiki(server, "GET", ".json?is_public=true&service_type=std&state=alive_with_deleted")
    assert status == 200
    assert found[0]["total"] == 4
    uuids = [image["uuid"] for image in found[0]["results"]]
    assert uuids == ["wmi-gone0", "wmi-other0", "wmi-lucid1", "wmi-lucid0"]
    status, found = hijiki(server, "GET", ".json?limit=1&start=0")  # total_resource
    assert (found[0]["total"], len(found[0]["results"])) == (4, 1)


def test_hijiki_reads_its_attributes(server):
    """Each field that its image has is there; features are an object, not text."""
    status, image = hijiki(server, "GET", "/wmi-lucid0.json")
    assert status == 200
    for name in ("uuid", "account_id", "boot_dev_type", "arch", "description", "is_public", "state",
                 "features", "file_format", "root_device", "is_cacheable", "service_type", "display_name",
                 "backup_object_id", "created_at", "updated_at", "deleted_at"):
        assert name in image
    assert image["features"] == {"virtio": True}


def test_hijiki_updates_by_the_query(server):
    """PUT with a type of JSON, no body and the fields in the query; it reads the answer's body."""
    status, image = hijiki(server, "PUT", "/wmi-lucid0.json?description=line+1%0Aline+2&display_name=x+%26+y")
    assert (status, image["display_name"], image["description"]) == (200, "x & y", "line 1\nline 2")
    assert hijiki(server, "GET", "/wmi-lucid0.json")[1]["display_name"] == "x & y"
    assert hijiki(server, "PUT", "/wmi-other0.json?display_name=x")[0] == 404
    assert hijiki(server, "PUT", "/lucid0.json?display_name=x")[0] == 400


def test_hijiki_destroys(server):
    """And sees the image afterwards, deleted."""
    assert hijiki(server, "DELETE", "/wmi-lucid0.json") == (200, ["wmi-lucid0"])
    assert hijiki(server, "GET", "/wmi-lucid0.json")[1]["state"] == "deleted"
    for id, status in (("wmi-nope", 404), ("wmi-other1", 404), ("lucid0", 400)):  # it raises by status
        got, error = hijiki(server, "GET", f"/{id}.json")
        assert (got, type(error["code"])) == (status, str)


# ---- go-wakamevdc: sling on net/http, one connection for all ----


def go_lines(method, tail):
    return [f"{method} /api/12.03/images{tail} HTTP/1.1", "Host: HOST", "User-Agent: go-wakamevdc/0.1.0",
            f"X-Vdc-Account-Uuid: {ME}", "Accept-Encoding: gzip"]


def go(server, method, tail):
    """Return status and data; Go looks at neither the type nor, for success, more than its fields."""
    status, _, text = exchange(server, go_lines(method, tail))
    return status, json.loads(text)


def test_go_reads_an_image(server):
    """Every field of its struct is a string or null: encoding/json takes nothing else for a Go string."""
    status, image = go(server, "GET", "/wmi-lucid0")
    assert status == 200
    for name in ("id", "arch", "backup_object_id", "os_type", "state", "root_device", "file_format",
                 "parent_image_id", "display_name", "description", "created_at", "updated_at",
                 "deleted_at"):
        assert image[name] is None or isinstance(image[name], str)
    assert (image["id"], image["state"]) == ("wmi-lucid0", "available")


def test_go_reads_a_list(server):
    """Whole numbers, never null; omitempty leaves start and limit out where they are 0."""
    for tail, start, limit in (("", 0, 250), ("?limit=10", 0, 10), ("?limit=1&start=1", 1, 1)):
        found = go(server, "GET", tail)[1][0]
        assert (found["total"], found["start"], found["limit"]) == (4, start, limit)
        assert {type(found[name]) for name in ("total", "start", "limit")} == {int}


def test_go_reads_an_error(server):
    """Three strings, the code too; it waits for the state deleted after a delete."""
    status, error = go(server, "GET", "/wmi-nope")
    assert (status, error) == (404, {
        "error": "Dcmgr::Endpoints::Errors::UnknownUUIDResource", "message": "wmi-nope", "code": "100",
    })
    assert go(server, "DELETE", "/wmi-lucid0")[0] == 200
    assert go(server, "GET", "/wmi-lucid0")[1]["state"] == "deleted"


def test_go_keeps_its_connection(server):
    """Requests one after the other on one connection are answered in order."""
    requests = [("GET", "/wmi-lucid0", 200), ("GET", "", 200), ("GET", "/wmi-nope", 404),
                ("DELETE", "/wmi-lucid0", 200), ("GET", "/lucid0", 400),
                ("GET", "/wmi-lucid0", 200)]
    with socket.create_connection((server.host, server.port), timeout=SECONDS) as connection:
        for method, tail, expected in requests:
            text = "\r\n".join([*go_lines(method, tail), "", ""])
            connection.sendall(text.replace("HOST", server.host).encode())
            answer = http.client.HTTPResponse(connection, method=method)
            answer.begin()
            assert (answer.status, answer.will_close) == (expected, False)
            assert json.loads(answer.read())


# ---- our own ----


@pytest.mark.parametrize("version", ["document", "11.12", "12.03"])
def test_our_own_client_speaks_each_version(server, version):
    """The same verbs; update exists where the version has it."""
    client = wmi.Client(server.url, ME, version=version)
    page = client.index(limit=1)
    assert (page.total, page.start, page.limit, len(page.images)) == (4, 0, 1, 1)
    assert client.show("wmi-lucid0")["features"] == {"virtio": True}
    if version == "12.03":
        assert client.update("wmi-lucid0", display_name="x")["display_name"] == "x"
        assert [image["id"] for image in client.images(state="deleted")] == ["wmi-gone0"]
    else:
        assert client.show("wmi-lucid0")["source"] == DEMO[0]["source"]
        with pytest.raises(wmi.InvalidParameter):
            client.update("wmi-lucid0", display_name="x")
    assert client.destroy("wmi-lucid0") == "wmi-lucid0"
    with pytest.raises(wmi.UnknownUUIDResource if version == "12.03" else wmi.OperationNotPermitted):
        client.show("wmi-other1")
