"""Replay what the original servers answered: v11.12.0 on Ruby 1.8.7, the last 12.03 on Ruby 2.0.

golden/ holds recorded requests with their answers, in order. The images that those servers had are
derived from the answers; then every request is sent again, under the version's own path and, on a
server started for it, under the unversioned one.
"""

import graphlib
import json
import os
import re

import pytest
from serving import serving

import wmi

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")

# Requests that the recording shows by their effect only: what is sent before the one that is named.
UNRECORDED = {
    ("12.03", "index-after-del?state=deleted"): (  # it shows a new name: a tombstone could be renamed
        "PUT", "/wmi-priv0.json", ["X-VDC-ACCOUNT-UUID: a-shpoolxx"], "display_name=afterdel",
    ),
}

# Where the answers differ on purpose, and why.
DIFFERENCES = {
    "Content-Type: application/json;charset=utf-8": "JSON has no charset parameter (RFC 8259, 11)",
    "Content-Length": "the layout is compact in every version; only HEAD and GET must agree",
    "X-Cascade": "an internal signal of Rack",
    "Vary": "answered for cross-origin requests, which are not served",
    "11.12 key order": "Ruby 1.8 has none; ours is the document's",
    "11.12 YAML layout": "Ruby 1.8 wrote '--- ' and '|+'; yaml_with_pyyaml.py compares the data",
    "times of changes": "updated_at and deleted_at of what the replay itself changes are of today",
}


def recordings(version):
    with open(os.path.join(FOLDER, f"dcmgr-{version}.json"), encoding="utf-8") as file:
        return json.load(file)


def is_json(recording):
    return any(re.match("Content-Type: application/json", line) for line in recording["response_headers"])


def images_in(data):
    """Return the images that an answer shows, in its order."""
    if isinstance(data, list) and data and isinstance(data[0], dict):
        return data[0]["results"]
    return [data] if isinstance(data, dict) and "account_id" in data else []


def original_images(version):
    """Return the images as they were first shown, oldest first.

    Every index shows a part of the order of registration, newest first; together they give all of it.
    """
    first, order = {}, graphlib.TopologicalSorter()
    for recording in recordings(version):
        images = images_in(json.loads(recording["body"])) if is_json(recording) and recording["body"] else []
        for image in images:
            first.setdefault(image["id"], image)
            order.add(image["id"])
        if recording["name"] in ("index-owner", "index-other", "index?is_public=true"):
            for newer, older in zip(images, images[1:]):
                order.add(newer["id"], older["id"])
    return [first[id] for id in order.static_order()]


def original_store(version):
    """Return a store as the originals had theirs when the recording began."""
    storage = wmi.open_storage("memory:")
    storage.add_all(map(wmi.image_record, original_images(version)))
    return storage


def fields_of(lines):
    """Return recorded header lines as a dict; mussel's has no space after the colon."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def read_block_yaml(text):
    """Return the data of a document in psych's layout: one scalar a line, keys with their colon."""
    lines = [(len(line) - len(line.lstrip(" ")), line.strip()) for line in text.split("\n")[1:] if line]
    value, rest = read_block(lines, 0)
    assert not rest
    return value


def read_block(lines, column):
    """Return the list or dict whose lines begin at this column, and the lines after it."""
    value = [] if lines[0][1].startswith("-") else {}
    while lines and lines[0][0] == column and lines[0][1].startswith("-") == isinstance(value, list):
        text = lines.pop(0)[1]
        if isinstance(value, list) and text.startswith("- :"):
            item, lines = read_block([(column + 2, text[2:]), *lines], column + 2)
            value.append(item)
        elif isinstance(value, list):
            value.append(read_scalar(text[2:]))
        else:
            key, scalar = re.fullmatch("(:[a-z0-9_]+):(?: (.*))?", text).groups()
            column_next, text_next = lines[0] if lines else (-1, "")
            nested = column_next > column or (column_next == column and text_next.startswith("-"))
            if nested and not scalar:
                value[key[1:]], lines = read_block(lines, lines[0][0])
            else:
                value[key[1:]] = read_scalar(scalar or "")
    return value, lines


def read_scalar(text):
    constants = {"": None, "true": True, "false": False, "{}": {}, "[]": []}
    if text in constants:
        return constants[text]
    if re.fullmatch("-?[0-9]+", text):
        return int(text)
    moment = re.fullmatch(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)(?:\.000000000)? Z", text)
    if moment:
        return f"{moment[1]}T{moment[2]}Z"
    return wmi.parse_yaml_mapping(f":k: {text}")["k"]


def comparable(data, changed):
    """Return data with the texts of source and features read, and the times of changes taken out."""
    if isinstance(data, list):
        return [comparable(item, changed) for item in data]
    if not isinstance(data, dict):
        return data
    result = {name: comparable(item, changed) for name, item in data.items()}
    for name in ("source", "features"):
        if isinstance(result.get(name), str):
            result[name] = wmi.parse_yaml_mapping(result[name])
    if "updated_at" in result:
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result[name])
                   for name in ("created_at", "updated_at", "deleted_at") if result.get(name))
        if result["id"] in changed:
            result["updated_at"] = "of the change"
            result["deleted_at"] = "of the change" if result.get("deleted_at") else None
    return result


def keys_in_order(data):
    """Return every dict's keys, in order, wherever it stands."""
    if isinstance(data, list):
        return [keys_in_order(item) for item in data]
    return [(name, keys_in_order(item)) for name, item in data.items()] if isinstance(data, dict) else None


def send(server, path, recording):
    """Send a recorded request under this path and return what comes back."""
    method, tail, lines, body = recording
    fields = fields_of(lines)
    fields.pop("Content-Length", None)
    return server.request(method, path + tail, fields, (body or "").encode())


@pytest.mark.parametrize("unversioned", [False, True], ids=["own path", "unversioned"])
@pytest.mark.parametrize("version", ["11.12", "12.03"])
def test_the_recorded_answers_are_given_again(version, unversioned):
    """The same status, data and key order for each request, changes included; 12.03's JSON to the byte."""
    path = "/api/images" if unversioned else f"/api/{version}/images"
    options = {"unversioned": version} if unversioned else {}
    changed = set()
    with serving(original_store(version), **options) as server:
        for recording in recordings(version):
            name, method = recording["name"], recording["method"]
            if (version, name) in UNRECORDED:
                assert send(server, path, UNRECORDED[version, name])[0] == 200
            tail = re.fullmatch(r"/api(?:/12\.03)?/images(.*)", recording["path"])[1]
            request = (method, tail, recording["request_headers"], recording["request_body"])
            status, headers, body = send(server, path, request)
            assert status == recording["status"], name
            if method in ("PUT", "DELETE") and status == 200:
                changed.add(re.search("wmi-[a-z0-9]+", tail)[0])
            assert headers["content-type"] == (
                "application/json" if is_json(recording) else "text/yaml;charset=utf-8"
            ), name
            if not recording["body"]:
                shown = send(server, path, ("GET", tail, recording["request_headers"], None))
                assert (method, body, headers["content-length"]) == ("HEAD", b"", str(len(shown[2]))), name
            elif is_json(recording):
                ours, theirs = json.loads(body), json.loads(recording["body"])
                assert comparable(ours, changed) == comparable(theirs, changed), name
                if version == "12.03":
                    assert keys_in_order(ours) == keys_in_order(theirs), name
                if version == "12.03" and not changed:
                    assert body.decode() == recording["body"], name
            elif version == "12.03" or "uuid" not in recording["body"]:
                ours, theirs = (read_block_yaml(text) for text in (body.decode(), recording["body"]))
                assert comparable(ours, changed) == comparable(theirs, changed), name
                if version == "12.03":
                    assert keys_in_order(ours) == keys_in_order(theirs), name
            if not is_json(recording) and method == "GET":
                as_json = send(server, path,
                               (method, tail.replace(".yml", ".json"), recording["request_headers"], None))
                assert read_block_yaml(body.decode()) == json.loads(as_json[2]), name


def test_the_yaml_of_12_03_is_laid_out_as_recorded():
    """Line by line as psych wrote it, which clients in bash count on; only quotes may be more."""
    texts = [one for one in recordings("12.03") if one["path"].endswith(".yml") and one["method"] == "GET"]
    assert len(texts) == 4
    with serving(original_store("12.03")) as server:
        for recording in texts:
            tail = recording["path"][len("/api/12.03/images") :]
            body = send(server, "/api/12.03/images",
                        ("GET", tail, recording["request_headers"], None))[2].decode()
            unquoted = re.sub(r": '(Dcmgr::[A-Za-z:]+)'$", r": \1", body, flags=re.MULTILINE)
            assert unquoted == recording["body"]


def test_the_differences_are_those_that_are_listed():
    """What the recordings have in their headers is answered alike, or named above with its reason."""
    known = {"Content-Type: application/json", "Content-Type: text/yaml;charset=utf-8",
             "X-Content-Type-Options: nosniff"}
    for version in ("11.12", "12.03"):
        for recording in recordings(version):
            for line in recording["response_headers"]:
                assert line in known or line in DIFFERENCES or line.partition(":")[0] in DIFFERENCES, line
    assert all(DIFFERENCES.values())


@pytest.mark.parametrize("version", ["11.12", "12.03"])
def test_every_original_image_is_found(version):
    """The recordings show five images; the newest of each account's list is registered last."""
    ids = [image["id"] for image in original_images(version)]
    assert sorted(ids) == ["wmi-lucid0", "wmi-lucid1", "wmi-other0", "wmi-other1", "wmi-priv0"]
    assert ids.index("wmi-lucid0") < ids.index("wmi-lucid1") < ids.index("wmi-priv0")
    assert ids.index("wmi-lucid0") < ids.index("wmi-other0") < ids.index("wmi-other1")
