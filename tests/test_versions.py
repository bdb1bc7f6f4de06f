"""The three versions of the API over HTTP, rule by rule: raw requests, whole answers."""

import json
import re
from urllib.parse import quote

import pytest
from serving import serving

import wmi

VERSIONS = ["document", "11.12", "12.03"]
PATHS = {"document": "/api/images", "11.12": "/api/11.12/images", "12.03": "/api/12.03/images"}
PREFIXES = {
    "document": "Dcmgr::Endpoints::", "11.12": "Dcmgr::Endpoints::", "12.03": "Dcmgr::Endpoints::Errors::",
}
ME, OTHER, SYSTEM = "a-shpoolxx", "a-otheracc", "a-00000000"
ACCOUNT = {"X-VDC-ACCOUNT-UUID": ME}
DELETED = {"state": "deleted", "deleted_at": "2011-12-24T00:00:00Z"}
IMAGES = [  # oldest first
    {"id": "wmi-mine1", "account_id": ME, "is_public": True, "source": {"uri": "file:///1.raw"},
     "features": {"virtio": True}, "md5sum": "0" * 32, "description": "one\n", "state": "available"},
    {"id": "wmi-mine2", "account_id": ME},
    {"id": "wmi-gone1", "account_id": ME, **DELETED},
    {"id": "wmi-their1", "account_id": OTHER, "is_public": True, "source": {"snapshot_id": "snap-1"}},
    {"id": "wmi-their2", "account_id": OTHER},
    {"id": "wmi-gone2", "account_id": OTHER, "is_public": True, **DELETED},
    {"id": "wmi-gone3", "account_id": OTHER, **DELETED},
]
TIMES = {"created_at": "2011-11-23T07:36:00Z", "updated_at": "2011-11-24T00:00:00Z"}
SHORT_KEYS = [
    "id", "uuid", "account_id", "created_at", "updated_at", "boot_dev_type", "source", "arch", "description",
    "md5sum", "is_public", "state", "features",
]
LONG_KEYS = [
    "id", "account_id", "uuid", "created_at", "updated_at", "boot_dev_type", "arch", "description",
    "is_public", "state", "features", "file_format", "root_device", "is_cacheable", "instance_model_name",
    "parent_image_id", "service_type", "display_name", "backup_object_id", "deleted_at", "volumes", "vifs",
    "os_type", "labels",
]
KEYS = {"document": SHORT_KEYS, "11.12": SHORT_KEYS, "12.03": LONG_KEYS}
ENVELOPES = {
    "document": ["owner_total", "start", "limit", "result"],
    "11.12": ["owner_total", "start", "limit", "results"],
    "12.03": ["total", "start", "limit", "results"],
}
LISTED = {  # by ME, newest first
    "document": ["wmi-their1", "wmi-mine2", "wmi-mine1"],
    "11.12": ["wmi-their1", "wmi-mine2", "wmi-mine1"],
    "12.03": ["wmi-gone1", "wmi-mine2", "wmi-mine1"],
}


def store():
    storage = wmi.open_storage("memory:")
    storage.add_all(wmi.image_record({**TIMES, **image}) for image in IMAGES)
    return storage


@pytest.fixture(scope="module")
def server():
    """A server that is only read."""
    with serving(store()) as running:
        yield running


@pytest.fixture
def changing():
    """A server of this test's own."""
    with serving(store()) as running:
        yield running


@pytest.fixture(params=VERSIONS)
def version(request):
    """Each version."""
    return request.param


def call(server, method, target, account=ME, body=b"", **fields):
    """Send a request; return status, headers and what the JSON body holds."""
    named = {"X-VDC-ACCOUNT-UUID": account} if account is not None else {}
    headers = {**named, **{name.replace("_", "-"): value for name, value in fields.items()}}
    status, answered, text = server.request(method, target, headers, body)
    data = json.loads(text.decode("utf-8")) if text and "json" in answered.get("content-type", "") else text
    return status, answered, data


def listing(server, version, query="", account=ME):
    """Return the one object of an index, its list renamed to images."""
    status, _, data = call(server, "GET", PATHS[version] + query, account)
    assert status == 200, data
    body = data if version == "document" else data[0]
    assert version == "document" or len(data) == 1
    total, start, limit, images = body.values()
    return total, start, limit, [image["id"] for image in images]


def refused(answer, version, name, status, code, message):
    """Assert that an answer is this error, in the form that every error has."""
    got, headers, data = answer
    assert (got, headers["content-type"]) == (status, "application/json")
    assert data == {"error": PREFIXES[version] + name, "message": message, "code": code}
    assert list(data) == ["error", "message", "code"]


# ---- index ----


def test_index_has_its_envelope_in_order(server, version):
    """The document answers an object, the deployed versions an array of one; the keys are each one's own."""
    data = call(server, "GET", PATHS[version])[2]
    assert isinstance(data, dict if version == "document" else list)
    body = data if version == "document" else data[0]
    assert list(body) == ENVELOPES[version]
    assert [list(image) for image in body[ENVELOPES[version][3]]] == [KEYS[version]] * 3


def test_index_shows_what_the_version_shows(server, version):
    """Own and public ones alive; in 12.03 own ones, deleted ones too. Newest registration first."""
    limit = 250 if version == "12.03" else None
    assert listing(server, version) == (3, 0, limit, LISTED[version])


def test_an_unknown_account_sees_what_is_public(server, version):
    """An account needs no registration; in 12.03 it owns nothing, so its list is empty."""
    expected = [] if version == "12.03" else ["wmi-their1", "wmi-mine1"]
    for account in ("a-brandnew1", SYSTEM):  # for the index the system account is any account
        total, _, _, ids = listing(server, version, account=account)
        assert (total, ids) == (len(expected), expected)


def test_limit_and_start_page_the_list(server, version):
    """As they stand in a query; what each number shows is in test_catalog.py."""
    default = 250 if version == "12.03" else None
    ids = LISTED[version]
    for query, start, limit, page in [
        ("?limit=1&start=01", 1, 1, ids[1:2]),
        ("?start=100&limit=0", 100, default, []),
        ("?", 0, default, ids),
        ("?&start=1&", 1, default, ids[1:]),
    ]:
        assert listing(server, version, query) == (3, start, limit, page), query


@pytest.mark.parametrize("name", ["start", "limit"])
def test_what_is_no_whole_number_is_refused(server, version, name):
    """400, code 143; the message is the parameter's name. All values are in test_catalog.py."""
    for value in ("abc", "", "+1", "%201", "%EF%BC%91", "%FF", "1%0A"):
        answer = call(server, "GET", f"{PATHS[version]}?{name}={value}")
        refused(answer, version, "InvalidParameter", 400, "143", name)


IN_BRACKETS = ["start[]=1", "start%5B%5D=1", "start[0]=1", "limit[a][b]=1", "limit[=1", "start=1&start[]=1"]


@pytest.mark.parametrize("query", IN_BRACKETS)
def test_a_parameter_in_brackets_is_unusable(server, version, query):
    """Rack made lists and hashes of these, and the originals failed on them."""
    name = query[:5]
    refused(call(server, "GET", f"{PATHS[version]}?{query}"), version, "InvalidParameter", 400, "143", name)


def test_the_last_of_repeated_parameters_counts(server, version):
    """As in Rack."""
    assert listing(server, version, "?limit=2&limit=1")[2] == 1
    assert listing(server, version, "?start=abc&start=1")[1] == 1


def test_unknown_parameters_are_ignored(server, version):
    """Names of other versions among them, whatever they hold."""
    queries = ["?x=1", "?_=123", "?x[]=1", "?account_id=a-otheracc", "?Start=1", "?a&b&%FF=%FF", "?=", "?;"]
    if version != "12.03":
        queries += ["?is_public=x", "?state=bogus", "?sort_by=x", "?filter=x", "?service_type=x",
                    "?state[]=x"]
    for query in queries:
        assert listing(server, version, query)[3] == LISTED[version], query


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("service_type=lb", []),
        ("state=alive&is_public=true", ["wmi-their1", "wmi-mine2", "wmi-mine1"]),
        ("created_since=2011-11-23T16:36:01%2B09:00", []),
        ("created_until=2011-11-23T07:36:00Z", ["wmi-gone1", "wmi-mine2", "wmi-mine1"]),
        ("deleted_since=2011-12-24", ["wmi-gone1"]),
        ("deleted_until=2011-12-23T23:59:59Z", []),
        ("sort_by=deleted_at.desc&limit=1", ["wmi-gone1"]),
        ("filter=deleted_at.nil", ["wmi-mine2", "wmi-mine1"]),
        ("filter%5B%5D=deleted_at.not_nil&filter[]=root_device.nil", ["wmi-gone1"]),
    ],
)
def test_the_filters_of_12_03(server, query, ids):
    """Each parameter as it stands in a query; what each value finds is in test_catalog.py."""
    assert listing(server, "12.03", f"?{query}")[3] == ids


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_public", "true%20"), ("is_public", "2"), ("service_type", "STD"), ("service_type", ""), ("state", "init"),
        ("created_since", "2011-11-23T07:36:00%2B99:99"), ("created_until", "2011-02-30"), ("deleted_since", ""),
        ("deleted_until", "%FF"), ("sort_by", "id"), ("sort_by", "md5sum.asc"), ("filter", "nope.nil"), ("filter", ""),
    ],
)
def test_an_unknown_value_or_field_of_a_filter_is_refused(server, name, value):
    """400, code 143; the message is the parameter's name. In brackets too."""
    answer = call(server, "GET", f"{PATHS['12.03']}?{name}={value}")
    refused(answer, "12.03", "InvalidParameter", 400, "143", name)
    for brackets in ("[]", "[x]", "[0]", "[", "[][]"):
        answer = call(server, "GET", f"{PATHS['12.03']}?{name}{brackets}={value}")
        refused(answer, "12.03", "InvalidParameter", 400, "143", name)


@pytest.mark.parametrize("query", [
    "filter[x]=id.nil", "filter[=id.nil", "filter[][]=id.nil", "filter[0]=id.nil", "filter=id.nil&filter[]=id.nil",
    "filter[]=id.nil&filter=id.nil",
    "filter[]=id.nil&filter[]=x", "filter[]=id.nil&filter[x]=id.nil", "sort_by[]=id.asc", "state[]=alive",
])
def test_only_filter_takes_a_list(server, query):
    """And only a list: one with keys, or one beside a single value, is unusable."""
    answer = call(server, "GET", f"{PATHS['12.03']}?{query}")
    refused(answer, "12.03", "InvalidParameter", 400, "143", re.match("[a-z_]+", query)[0])


# ---- show ----


def test_show_has_the_versions_fields_and_values(server):
    """Whole answers of one image, key order included."""
    common = {"id": "wmi-mine1", "uuid": "wmi-mine1", "account_id": ME, **TIMES, "boot_dev_type": 2,
              "arch": "x86_64", "description": "one\n", "is_public": True, "state": "available"}
    short = {**common, "source": "---\n:uri: file:///1.raw\n", "md5sum": "0" * 32,
             "features": "---\n:virtio: true\n"}
    long = {
        **common, "features": {"virtio": True}, "file_format": "raw", "root_device": None,
        "is_cacheable": False, "instance_model_name": None, "parent_image_id": None, "service_type": "std",
        "display_name": "", "backup_object_id": None, "deleted_at": None, "volumes": [], "vifs": [],
        "os_type": "linux", "labels": [],
    }
    for version in VERSIONS:
        status, headers, data = call(server, "GET", f"{PATHS[version]}/wmi-mine1")
        assert (status, headers["content-type"]) == (200, "application/json")
        assert data == (long if version == "12.03" else short)
        assert list(data) == KEYS[version]


def test_defaults_are_shown_as_the_version_shows_them(server):
    """Null and init as they are; in 12.03 an empty text and available."""
    for version in VERSIONS:
        data = call(server, "GET", f"{PATHS[version]}/wmi-mine2")[2]
        new = version == "12.03"
        assert data["description"] == ("" if new else None)
        assert data["state"] == ("available" if new else "init")
        assert data["features"] == ({} if new else "--- {}\n")
        assert data.get("source") == (None if new else "--- {}\n")
        assert data["is_public"] is False


def test_a_volume_shows_its_snapshot(server):
    """boot_dev_type 1 and :snapshot_id."""
    for version in ("document", "11.12"):
        data = call(server, "GET", f"{PATHS[version]}/wmi-their1")[2]
        assert (data["boot_dev_type"], data["source"]) == (1, "---\n:snapshot_id: snap-1\n")


@pytest.mark.parametrize(
    ("account", "id", "older", "newest"),
    [
        (ME, "wmi-gone1", 404, 200),
        (ME, "wmi-their2", 403, 404),
        (ME, "wmi-nope", 404, 404),
        ("a-brandnew1", "wmi-mine1", 200, 200),
        (SYSTEM, "wmi-mine2", 200, 404),
    ],
)
def test_who_may_see_an_image(server, version, account, id, older, newest):
    """A row for each outcome; every combination is in test_catalog.py."""
    answer = call(server, "GET", f"{PATHS[version]}/{id}", account)
    status = newest if version == "12.03" else older
    assert answer[0] == status
    if status == 404:
        refused(answer, version, "UnknownUUIDResource", 404, "100", id)
    if status == 403:
        name = f"{PREFIXES[version]}OperationNotPermitted"
        refused(answer, version, "OperationNotPermitted", 403, "105", name)


BAD_IDS = [
    "lucid0", "wmi-a%20b", "wmi-a%0Ab", "wmi-a%2Fb", "wmi-a%2Ejson", "wmi-%F0%9F%98%80", "wmi-%00", "..%2F", "wmi-%",
    "wmi-%zz",
]


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
@pytest.mark.parametrize("id", BAD_IDS)
def test_what_cannot_be_an_id_is_refused_in_the_originals_words(server, version, method, id):
    """400, code 143, and the id as it was asked for."""
    if method == "PUT" and version != "12.03":
        return
    answer = call(server, method, f"{PATHS[version]}/{id}")
    asked = {
        "wmi-a%20b": "wmi-a b", "wmi-a%0Ab": "wmi-a\nb", "wmi-a%2Fb": "wmi-a/b", "wmi-a%2Ejson": "wmi-a.json",
        "wmi-%F0%9F%98%80": "wmi-😀", "wmi-%00": "wmi-\0", "..%2F": "../",
    }.get(id, id)
    if id.startswith(".."):
        assert answer[0] == 404  # a dot begins the extension
        return
    refused(answer, version, "InvalidParameter", 400, "143", f"Invalid UUID Syntax: {asked}")


@pytest.mark.parametrize("extension", ["", ".yml"])
@pytest.mark.parametrize("id", ["wmi-%FF", "wmi-%ED%A0%80", "%C3", "wmi-%ED%B3%BF"])
def test_an_id_that_is_not_unicode_is_refused_in_unicode(server, version, id, extension):
    """The answer itself is valid UTF-8, without halves of surrogate pairs, whatever was asked for."""
    status, _, body = server.request("GET", f"{PATHS[version]}/{id}{extension}", ACCOUNT)
    assert status == 400
    assert "Invalid UUID Syntax: " in body.decode("utf-8")
    assert not re.search(rb"\\u[dD][89a-fA-F]", body)


def test_the_longest_id_is_an_id(server, version):
    """255 characters in all."""
    id = "wmi-" + "a" * 251
    refused(call(server, "GET", f"{PATHS[version]}/{id}"), version, "UnknownUUIDResource", 404, "100", id)


# ---- the account ----

SPELLINGS = [
    "X-VDC-ACCOUNT-UUID", "x-vdc-account-uuid", "X-Vdc-Account-Uuid", "X-VDC-Account-UUID",
    "X_VDC_ACCOUNT_UUID", "x_vdc_account_uuid",
]


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_account_header_in_any_spelling(server, version, name):
    """Any case, hyphens or underscores, with or without a space after the colon."""
    for separator in (":", ": ", ":\t "):
        lines = [f"GET {PATHS[version]} HTTP/1.1", "Host: h", f"{name}{separator}{ME}", "Connection: close"]
        answer = server.raw("\r\n".join([*lines, "", ""]).encode())
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"wmi-mine2" in answer


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
@pytest.mark.parametrize("account", ["xyz", "a-x,a-y"])
def test_a_malformed_account_is_refused(changing, version, method, account):
    """400, code 103, in the originals' words, before anything is done."""
    if method == "PUT" and version != "12.03":
        return
    answer = call(changing, method, f"{PATHS[version]}/wmi-mine1", account)
    message = f"Invalid uuid or unsupported uuid: {account} in Dcmgr::Models::Account"
    refused(answer, version, "InvalidRequestCredentials", 400, "103", message)
    assert call(changing, "GET", f"{PATHS[version]}/wmi-mine1")[0] == 200


@pytest.mark.parametrize("target", ["", "/wmi-nope", "/lucid0", "?start=abc"])
@pytest.mark.parametrize("account", [None, "", " "])
def test_a_missing_account_is_refused(server, version, target, account):
    """400, code 103, before all else; the document's reader is told what to send."""
    answer = call(server, "GET", PATHS[version] + target, account)
    message = f"{PREFIXES[version]}InvalidRequestCredentials"
    if version == "document":
        message = "say who calls: send a header X-VDC-ACCOUNT-UUID, such as a-shpoolxx"
    refused(answer, version, "InvalidRequestCredentials", 400, "103", message)


def test_two_accounts_are_none(server, version):
    """Two header fields do not say who calls, also if one of them is spelled with underscores."""
    for first, second in (("X-VDC-ACCOUNT-UUID", "x-vdc-account-uuid"),
                          ("X-VDC-ACCOUNT-UUID", "X_VDC_ACCOUNT_UUID")):
        fields = {first: ME, second: OTHER}
        status, _, body = server.request("GET", PATHS[version], fields)
        assert (status, json.loads(body)["code"]) == (400, "103")


# ---- formats ----


@pytest.mark.parametrize("extension", ["", ".json", ".yml", ".yaml"])
@pytest.mark.parametrize("accept", [None, "text/yaml", "application/json"])
def test_the_extension_alone_chooses_the_format(server, version, extension, accept):
    """JSON without one; Accept never changes it; errors come in the same format."""
    fields = {"Accept": accept} if accept else {}
    for target, status in (("", 200), ("/wmi-mine1", 200), ("/wmi-nope", 404), ("/lucid0", 400)):
        got, headers, data = call(server, "GET", PATHS[version] + target + extension, **fields)
        assert got == status
        if extension.startswith(".y"):
            assert headers["content-type"] == "text/yaml;charset=utf-8"
            assert data.startswith(b"---\n")
        else:
            assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "target",
    ["/api/images.xml", "/api/images.", "/api/images.JSON", "/api/images.json.json",
     "/api/images/wmi-mine1.xml", "/api/images/wmi-mine1.", "/api/images/wmi-mine1.html",
     "/api/images/wmi-mine1.yml.json", "/api/images/.json", "/api/images/", "/api/images/wmi-mine1/",
     "/api/images/wmi-mine1/x", "/api/images//wmi-mine1", "/api//images", "/api/Images", "/api", "/api/",
     "/api/images/wmi-mine1/file", "/api/12.03", "/api/12.03/", "/api/12.3/images", "/api/13.08/images",
     "/api/12x03/images", "/api/document/images", "/api/instances", "/api/12.03/instances.yml", "/images", "/x",
     "/api/images%2Ejson", "/api%2Fimages", "/favicon.ico"],
)
def test_an_unknown_path_is_not_found(server, target):
    """404 in the form of every error, never HTML; the message is the path."""
    refused(call(server, "GET", target), "document", "NotFound", 404, "404", target)


YAML = {
    ("document", ""): (
        "---\n:owner_total: 1\n:start: 0\n:limit: 1\n:result:\n- :id: wmi-mine1\n  :uuid: wmi-mine1\n"
        "  :account_id: a-shpoolxx\n  :created_at: 2011-11-23 07:36:00.000000000 Z\n"
        "  :updated_at: 2011-11-24 00:00:00.000000000 Z\n  :boot_dev_type: 2\n"
        '  :source: "---\\n:uri: file:///1.raw\\n"\n  :arch: x86_64\n  :description: "one\\n"\n'
        f"  :md5sum: '{'0' * 32}'\n  :is_public: true\n  :state: available\n"
        '  :features: "---\\n:virtio: true\\n"\n'
    ),
    ("11.12", ""): (
        "---\n- :owner_total: 1\n  :start: 0\n  :limit: 1\n  :results:\n  - :id: wmi-mine1\n"
        "    :uuid: wmi-mine1\n"
        "    :account_id: a-shpoolxx\n    :created_at: 2011-11-23 07:36:00.000000000 Z\n"
        "    :updated_at: 2011-11-24 00:00:00.000000000 Z\n    :boot_dev_type: 2\n"
        '    :source: "---\\n:uri: file:///1.raw\\n"\n    :arch: x86_64\n    :description: "one\\n"\n'
        f"    :md5sum: '{'0' * 32}'\n    :is_public: true\n    :state: available\n"
        '    :features: "---\\n:virtio: true\\n"\n'
    ),
    ("12.03", ""): (
        "---\n- :total: 1\n  :start: 0\n  :limit: 1\n  :results:\n  - :id: wmi-mine1\n"
        "    :account_id: a-shpoolxx\n"
        "    :uuid: wmi-mine1\n    :created_at: 2011-11-23 07:36:00.000000000 Z\n"
        "    :updated_at: 2011-11-24 00:00:00.000000000 Z\n    :boot_dev_type: 2\n    :arch: x86_64\n"
        '    :description: "one\\n"\n    :is_public: true\n    :state: available\n'
        "    :features:\n      :virtio: true\n"
        "    :file_format: raw\n    :root_device:\n    :is_cacheable: false\n    :instance_model_name:\n"
        "    :parent_image_id:\n    :service_type: std\n    :display_name: ''\n    :backup_object_id:\n"
        "    :deleted_at:\n    :volumes: []\n    :vifs: []\n    :os_type: linux\n    :labels: []\n"
    ),
    ("document", "?start=9"): "---\n:owner_total: 1\n:start: 9\n:limit: 1\n:result: []\n",
    ("11.12", "?start=9"): "---\n- :owner_total: 1\n  :start: 9\n  :limit: 1\n  :results: []\n",
    ("12.03", "?start=9"): "---\n- :total: 1\n  :start: 9\n  :limit: 1\n  :results: []\n",
}


@pytest.mark.parametrize(("version", "query"), YAML)
def test_an_index_in_yaml_to_the_byte(version, query):
    """Block style, symbol keys, id first in every image, times as times; an empty list beside its key."""
    storage = wmi.open_storage("memory:")
    storage.add(wmi.image_record({**TIMES, **IMAGES[0]}))
    with serving(storage) as server:
        _, _, body = call(server, "GET", f"{PATHS[version]}.yml{query or '?start=0'}&limit=1")
    assert body.decode() == YAML[version, query]


def test_a_tombstone_in_yaml(server):
    """Its time of deletion is a time as the others are."""
    body = call(server, "GET", f"{PATHS['12.03']}/wmi-gone1.yml")[2]
    assert b"\n:state: deleted\n" in body
    assert b"\n:deleted_at: 2011-12-24 00:00:00.000000000 Z\n" in body


def test_an_error_in_yaml(server, version):
    """The code is quoted, so that it stays a text."""
    status, headers, body = call(server, "GET", f"{PATHS[version]}/wmi-nope.yml")
    assert (status, headers["content-type"]) == (404, "text/yaml;charset=utf-8")
    name = f"{PREFIXES[version]}UnknownUUIDResource"
    assert body.decode() == f"---\n:error: '{name}'\n:message: wmi-nope\n:code: '100'\n"


def test_json_is_utf_8_as_it_is(server, version):
    """Characters are not escaped; the length counts bytes."""
    storage = wmi.open_storage("memory:")
    storage.add(wmi.image_record({**IMAGES[1], "description": "é日本語😀\u2028"}))
    with serving(storage) as own:
        _, headers, body = own.request("GET", f"{PATHS[version]}/wmi-mine2", ACCOUNT)
    assert "é日本語😀\u2028".encode() in body
    assert int(headers["content-length"]) == len(body)


# ---- destroy ----


def test_destroy_answers_the_id_in_an_array(changing, version):
    """As JSON and as YAML, and nothing else."""
    assert call(changing, "DELETE", f"{PATHS[version]}/wmi-mine1")[2] == ["wmi-mine1"]
    status, headers, body = call(changing, "DELETE", f"{PATHS[version]}/wmi-mine2.yml")
    assert (status, headers["content-type"], body) == (200, "text/yaml;charset=utf-8", b"---\n- wmi-mine2\n")


def test_one_store_is_seen_by_all_versions(changing):
    """What 12.03 deletes is gone in the others, and the other way round."""
    assert call(changing, "DELETE", f"{PATHS['12.03']}/wmi-mine1")[0] == 200
    assert call(changing, "GET", f"{PATHS['11.12']}/wmi-mine1")[0] == 404
    assert call(changing, "DELETE", f"{PATHS['document']}/wmi-mine2")[0] == 200
    assert call(changing, "GET", f"{PATHS['12.03']}/wmi-mine2")[2]["state"] == "deleted"


@pytest.mark.parametrize("method", ["DELETE", "PUT"])
@pytest.mark.parametrize(
    ("account", "id", "older", "newest"),
    [
        (ME, "wmi-their1", 403, 404),
        (ME, "wmi-nope", 404, 404),
        (SYSTEM, "wmi-mine1", 200, 404),
        (OTHER, "wmi-gone3", 404, 200),
    ],
)
def test_who_may_change_an_image(changing, version, method, account, id, older, newest):
    """A row for each outcome; every combination is in test_catalog.py."""
    if method == "PUT" and version != "12.03":
        return
    status = newest if version == "12.03" else older
    before = changing.server.service.storage.revision()
    answer = call(changing, method, f"{PATHS[version]}/{id}?display_name=x", account)
    assert answer[0] == status
    if status == 404:
        refused(answer, version, "UnknownUUIDResource", 404, "100", id)
    if status == 403:
        name = f"{PREFIXES[version]}OperationNotPermitted"
        refused(answer, version, "OperationNotPermitted", 403, "105", name)
    if status != 200:
        assert changing.server.service.storage.revision() == before


# ---- PUT ----

FORM = "application/x-www-form-urlencoded"
IMAGE = f"{PATHS['12.03']}/wmi-mine1"


def names(server):
    data = call(server, "GET", IMAGE)[2]
    return data["display_name"], data["description"]


@pytest.mark.parametrize(
    ("query", "kind", "body", "expected"),
    [
        ("", FORM, b"display_name=new+name", ("new name", "one\n")),
        ("", FORM, b"display_name=n2&description=d%0A2+%E6%97%A5", ("n2", "d\n2 日")),
        ("", FORM, b"description=x", ("", "x")),
        ("", FORM, b"description=", ("", "")),
        ("", FORM, b"display_name=a&display_name=b", ("b", "one\n")),
        ("", f"{FORM}; charset=utf-8", b"display_name=x", ("x", "one\n")),
        ("", FORM.upper(), b"display_name=x", ("x", "one\n")),
        ("", None, b"display_name=x", ("x", "one\n")),
        ("", FORM, b"display_name=a%26b%3Dc%2B%25", ("a&b=c+%", "one\n")),
        ("", FORM, b"is_public=false&state=deleted&id=wmi-x&x[]=1", ("", "one\n")),
        ("", FORM, b"", ("", "one\n")),
        ("", FORM, b"description=one%0A", ("", "one\n")),
        ("?display_name=q", None, b"", ("q", "one\n")),
        ("?display_name=q&description=%E6%97%A5", None, b"", ("q", "日")),
        ("?display_name=q", "application/json", b"", ("q", "one\n")),
        ("?display_name=q", "text/plain", b"", ("q", "one\n")),
        ("?display_name=q", FORM, b"description=b", ("q", "b")),
        ("?display_name=q", FORM, b"display_name=b", ("b", "one\n")),
        ("", "application/json", b'{"display_name":"j"}', ("j", "one\n")),
        ("", "application/json", b'{"image":{"display_name":"j","description":"k"}}', ("j", "k")),
        ("", "application/json; charset=utf-8", '{"display_name":"日"}'.encode(), ("日", "one\n")),
        ("", "Application/JSON", b'{"description":"\\ud83d\\ude00\\n"}', ("", "😀\n")),
        ("", "application/json", b'{"display_name":null,"description":null}', ("", "one\n")),
        ("", "application/json", b'{"image":{"display_name":"j","description":null}}', ("j", "one\n")),
        ("", "application/json", b'{"display_name":"","description":""}', ("", "")),
        ("", "application/json", b"{}", ("", "one\n")),
        ("", "application/json", b'{"image":{}}', ("", "one\n")),
        ("", "application/json", b'{"is_public":5,"state":[],"x":{"y":1}}', ("", "one\n")),
        ("?display_name=q", "application/json", b'{"display_name":"j"}', ("j", "one\n")),
        ("?display_name=q", "application/json", b'{"display_name":null}', ("q", "one\n")),
    ],
)
def test_put_sets_name_and_description(changing, query, kind, body, expected):
    """From a form, the query, JSON flat or wrapped; null changes nothing; it answers the image."""
    fields = {"Content_Type": kind} if kind else {}
    status, headers, data = call(changing, "PUT", IMAGE + query, body=body, **fields)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert list(data) == LONG_KEYS
    assert (data["display_name"], data["description"]) == expected
    assert names(changing) == expected
    changed = expected != ("", "one\n")
    assert (data["updated_at"] > TIMES["updated_at"]) == changed
    assert (data["is_public"], data["state"], data["created_at"]) == (True, "available", TIMES["created_at"])


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("application/json", b'{"display_name":5}',
         "display_name: 5 is not allowed; expected text that is valid Unicode"),
        ("application/json", b'{"image":{"description":true}}',
         "description: True is not allowed; expected text that is valid Unicode"),
        ("application/json", b'{"display_name":["a"]}',
         "display_name: ['a'] is not allowed; expected text that is valid Unicode"),
        ("application/json", b'{"display_name":{"a":"b"}}',
         "display_name: {'a': 'b'} is not allowed; expected text that is valid Unicode"),
        ("application/json", b'{"display_name":"\\ud800"}',
         "display_name: '\\ud800' is not allowed; expected text that is valid Unicode"),
        ("application/json", b"[]", 'the body, or "image" in it, is not a JSON object'),
        ("application/json", b'"display_name"', 'the body, or "image" in it, is not a JSON object'),
        ("application/json", b"null", 'the body, or "image" in it, is not a JSON object'),
        ("application/json", b'{"image":"x"}', 'the body, or "image" in it, is not a JSON object'),
        ("application/json", b"{", "the body is not JSON: "),
        ("application/json", b"display_name=x", "the body is not JSON: "),
        ("application/json", b'{"display_name":"\xff"}', "the body is not JSON: "),
        ("application/json", b'{"display_name":"x"}}', "the body is not JSON: "),
        ("application/json", b"[" * 60000, "the body is not JSON: "),
        (FORM, b"display_name=%FF",
         "display_name: '\\udcff' is not allowed; expected text that is valid Unicode"),
        (FORM, b"display_name=\xff",
         "display_name: '\\udcff' is not allowed; expected text that is valid Unicode"),
        (FORM, b"display_name[]=x", "display_name"),
        (FORM, b"description%5Ba%5D=x", "description"),
    ],
)
def test_put_refuses_what_it_cannot_set(changing, kind, body, message):
    """400, code 143; nothing is changed."""
    answer = call(changing, "PUT", IMAGE, body=body, Content_Type=kind)
    if message.endswith(": "):
        assert answer[2]["message"].startswith(message)
        message = answer[2]["message"]
    refused(answer, "12.03", "InvalidParameter", 400, "143", message)
    assert names(changing) == ("", "one\n")


OTHER_TYPES = ["text/plain", "text/json", "multipart/form-data; boundary=x", "json", "application/jsonx"]


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_put_refuses_other_media_types(changing, kind):
    """415, for a body; without one its type is not looked at."""
    answer = call(changing, "PUT", IMAGE, body=b"display_name=x", Content_Type=kind)
    refused(answer, "12.03", "UnsupportedMediaType", 415, "415", "send a form or application/json")
    assert names(changing) == ("", "one\n")


def test_put_answers_yaml_too(changing):
    """:id first, at the line's start, as mussel greps it."""
    status, headers, body = call(changing, "PUT", f"{IMAGE}.yml", body=b"display_name=x")
    assert (status, headers["content-type"]) == (200, "text/yaml;charset=utf-8")
    assert body.startswith(b"---\n:id: wmi-mine1\n")
    assert b"\n:display_name: x\n" in body


def test_put_may_rename_what_is_deleted(changing):
    """As the recording shows; the tombstone stays one."""
    data = call(changing, "PUT", f"{PATHS['12.03']}/wmi-gone1", body=b"display_name=x")[2]
    assert (data["display_name"], data["state"]) == ("x", "deleted")
    assert data["deleted_at"] == DELETED["deleted_at"]


# ---- methods ----

ALLOW = {
    ("document", True): {"GET", "HEAD", "OPTIONS", "DELETE"},
    ("11.12", True): {"GET", "HEAD", "OPTIONS", "DELETE"},
    ("12.03", True): {"GET", "HEAD", "OPTIONS", "DELETE", "PUT"},
    ("document", False): {"GET", "HEAD", "OPTIONS"},
    ("11.12", False): {"GET", "HEAD", "OPTIONS"},
    ("12.03", False): {"GET", "HEAD", "OPTIONS"},
}


METHODS = ["POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "get", "PROPFIND", "X"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extension", ["", ".yml"])
@pytest.mark.parametrize("on_image", [False, True])
def test_other_methods_are_not_allowed(server, version, method, extension, on_image):
    """405 with Allow, before the account is looked at; PUT exists in 12.03 only."""
    if method in ALLOW[version, on_image]:
        return
    target = PATHS[version] + ("/wmi-mine1" if on_image else "") + extension
    status, headers, body = server.request(method, target)
    assert status == 405
    assert set(headers["allow"].split(", ")) == ALLOW[version, on_image]
    if extension != ".yml":
        data = json.loads(body)
        assert data["error"] == f"{PREFIXES[version]}MethodNotAllowed"
        assert data["code"] == "405"
    else:
        assert b"\n:code: '405'\n" in body


@pytest.mark.parametrize("on_image", [False, True])
def test_options_says_what_is_allowed(server, version, on_image):
    """204 with Allow, no body, no account needed."""
    status, headers, body = call(server, "OPTIONS", PATHS[version] + ("/wmi-mine1" if on_image else ""), None)
    assert (status, body) == (204, b"")
    assert set(headers["allow"].split(", ")) == ALLOW[version, on_image]
    assert "content-length" not in headers


@pytest.mark.parametrize("extension", ["", ".json", ".yml"])
def test_head_is_get_without_the_body(server, version, extension):
    """The same status and headers, errors included."""
    for target in ("", "/wmi-mine1", "/wmi-nope", "/lucid0"):
        got = server.request("GET", PATHS[version] + target + extension, ACCOUNT)
        head = server.request("HEAD", PATHS[version] + target + extension, ACCOUNT)
        assert head[2] == b""
        assert {**head[1], "date": ""} == {**got[1], "date": ""}
        assert (head[0], int(head[1]["content-length"])) == (got[0], len(got[2]))


# ---- ETag ----


def test_an_etag_saves_the_body(changing, version):
    """304 without a body while nothing changed; another tag with another body, after a change or for another."""
    for target in ("", "?limit=1", ".yml", "/wmi-mine1", "/wmi-mine1.yml"):
        target = PATHS[version] + target
        tag = call(changing, "GET", target)[1]["etag"]
        assert re.fullmatch('"[!#-~]+"', tag)
        for method in ("GET", "HEAD"):
            for given in (tag, f"W/{tag}", f'"x", {tag}', f'{tag} ,"y"', f'W/"a",W/{tag}', "*", " * "):
                status, headers, body = call(changing, method, target, If_None_Match=given)
                assert (status, headers["etag"], headers["cache-control"], body) == (304, tag, "private, no-cache", b"")
                assert "content-length" not in headers
            for given in ('"x"', tag[:-2] + '"', tag.strip('"'), f"{tag}x", f"W/W/{tag}", '"*"', "**", "", ","):
                assert call(changing, method, target, If_None_Match=given)[0] == 200
        mine, others = call(changing, "GET", target), call(changing, "GET", target, OTHER)
        assert (others[1]["etag"] == tag) == (others[2] == mine[2])
    tag = call(changing, "GET", PATHS[version])[1]["etag"]
    assert call(changing, "DELETE", f"{PATHS[version]}/wmi-mine2")[0] == 200
    assert call(changing, "GET", PATHS[version], If_None_Match=tag)[0] == 200


def test_only_what_is_shown_has_an_etag(server, version):
    """An error must not be kept as if it were the image; answers may be kept by nobody but the caller."""
    assert "etag" not in call(server, "GET", f"{PATHS[version]}/wmi-nope")[1]
    headers = call(server, "GET", f"{PATHS[version]}/wmi-mine1")[1]
    assert headers["cache-control"] == "private, no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    answer = call(server, "GET", f"{PATHS[version]}/wmi-nope", If_None_Match="*")
    refused(answer, version, "UnknownUUIDResource", 404, "100", "wmi-nope")


# ---- --unversioned ----


@pytest.mark.parametrize("unversioned", VERSIONS)
def test_unversioned_makes_the_plain_path_speak_a_version(unversioned):
    """/api/images answers as the version's own path does, errors included; that path stays."""
    with serving(store(), unversioned=unversioned) as server:
        for target in ("", ".yml", "?start=1&limit=1", "?state=deleted", "?start=x", "/wmi-mine1",
                       "/wmi-their2", "/wmi-nope.yml", "/lucid0"):
            own = PATHS[unversioned] if unversioned != "document" else "/api/images"
            one, two = (server.request("GET", path + target, ACCOUNT) for path in ("/api/images", own))
            assert (one[0], one[2]) == (two[0], two[2]), target
        for version in ("11.12", "12.03"):
            assert listing(server, version)[3] == LISTED[version]
        assert call(server, "PUT", "/api/images/wmi-mine1", body=b"display_name=x")[0] == (
            200 if unversioned == "12.03" else 405
        )
        unknown = call(server, "GET", "/nowhere")
        refused(unknown, unversioned, "NotFound", 404, "404", "/nowhere")


def test_unversioned_is_one_of_the_versions():
    """Another name is refused when the server is made, with the names there are."""
    with pytest.raises(wmi.InvalidParameter, match='"document" or "11.12" or "12.03"'):
        wmi.Service(store(), unversioned="13.08")


# ---- errors ----


def test_every_error_is_in_the_form_of_the_api(server):
    """A storm of strange targets: JSON or YAML with three texts, never HTML, never a status of 500."""
    for text in ("<script>", "'\"", "%", "a" * 2000, "../../etc/passwd", "\x7f", "é", "{}", "wmi-a;x",
                 "wmi-a\\b"):
        for pattern in ("/api/images/{}", "/api/12.03/images/{}.json", "/{}", "/api/{}/images",
                        "/api/images?start={}", "/api/12.03/images?sort_by={}&filter={}"):
            status, _, data = call(server, "GET", pattern.replace("{}", quote(text)))
            assert status in (400, 404)
            assert list(data) == ["error", "message", "code"]
            assert all(isinstance(value, str) for value in data.values())
