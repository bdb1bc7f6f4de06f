"""What each field of an image takes and refuses, how the refusal reads, and what is made up."""

import re

import pytest

import wmi

ID_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
NOT_TEXT = [1, 1.5, True, [], ["a"], {}, {"a": "b"}, b"text"]
SURROGATES = ["\ud800", "a\udfffb", "\udcff"]


def make(**fields):
    return wmi.image_record({"account_id": "a-shpoolxx", **fields})


def fields_with(field, value):
    """Return fields of an image with this value, and what must go along with it."""
    along = {
        "deleted_at": {"state": "deleted"} if value is not None else {},
        "state": {"deleted_at": "2012-01-01T00:00:00Z"} if value == "deleted" else {},
        "source": {"boot_dev_type": 1} if isinstance(value, dict) and "snapshot_id" in value else {},
    }
    return {"account_id": "a-shpoolxx", **along.get(field, {}), field: value}


TEXTS = ["", " ", "ubuntu", "é日本語 \"dq\" 'sq' a<b>&\\ tab\tend\nline2\n", "\0\x07\x7f\x85\u2028\ufeff",
         "😀" * 9]
TIMES = ["2011-11-23T07:36:00Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2012-02-29T00:00:00Z"]
GOOD = {
    "id": ["wmi-lucid0", "wmi-0", "wmi-a", "wmi-" + "z" * 251],
    "account_id": ["a-shpoolxx", "a-00000000", "a-0", "a-" + "a" * 253],
    "created_at": TIMES,
    "updated_at": TIMES,
    "deleted_at": [*TIMES, None],
    "boot_dev_type": [1, 2],
    "source": [{}, {"uri": "file:///a 日本"}, {"uri": "http://h/?q=1#f"}, {"snapshot_id": "snap-lucid1"}],
    "arch": ["x86", "x86_64"],
    "description": [*TEXTS, None],
    "md5sum": ["0123456789abcdef0123456789abcdef", "f" * 32, None],
    "is_public": [True, False],
    "state": ["init", "creating", "pending", "available", "deleted"],
    "features": [{}, {"virtio": True}, {"virtio": False}, {"acpi": True}, {"virtio": True, "acpi": True}],
    "file_format": ["raw", "qcow2"],
    "root_device": [*TEXTS, "label:root", "uuid:148bc5df-3fc5-4e93-8a16-7328907cb1c0", None],
    "is_cacheable": [True, False],
    "instance_model_name": [*TEXTS, "kvm", None],
    "parent_image_id": ["wmi-lucid0", None],
    "service_type": ["std", "lb"],
    "display_name": [*TEXTS, "Ubuntu 10.04"],
    "backup_object_id": ["bo-lucid0", None],
    "os_type": ["linux", "windows"],
}

BAD_IDS = [
    "", "wmi-", "wmi", "lucid0", "WMI-lucid0", "wmi-Lucid", "wmi-a_b", "wmi-a b", "wmi-é", "wmi-a\n",
    " wmi-a", "wmi-a/b", "wmi-../x", "wmi-１", "wmi-" + "z" * 252, *NOT_TEXT,
]
BAD_ACCOUNTS = [
    None, "", "a-", "a", "A-shpoolxx", "a-Shpoolxx", "a_shpoolxx", "a-x y", "a-é", "a-x\n", "b-x",
    "a-" + "a" * 254, *NOT_TEXT,
]
BAD_TIMES = [
    "", "yesterday", "2011", "2011-11", "2011-13-01", "2011-02-30", "2011-02-29T00:00:00Z",
    "2011-11-23T24:00:00Z", "2011-11-23T07:60:00Z", "2011-11-23T07:36:60Z", "2011-11-23T07:36",
    "2011-11-23T07:36:00.Z", "20111123T073600Z", "2011-11-23T07:36:00z", "2011-11-23T07:36:00+9",
    "2011-11-23T07:36:00 +09:00 JST", "2011-11-23T07:36:00Z\n", "２０１１-11-23T07:36:00Z",
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-00:01", "0000-01-01T00:00:00Z",
    "2011-11-23T07:36:00+24:00", "2011-11-23T07:36:00+99:99", "2011-11-23T07:36:00-09:60", 1322033760,
    1322033760.5, True, [], {},
]
BAD = {  # what a message says is allowed, and what is not
    "id": ("wmi- and 1 to 251 letters a-z or digits", BAD_IDS),
    "account_id": ("a- and 1 to 253 letters a-z or digits", BAD_ACCOUNTS),
    "created_at": ("a time such as 2011-11-23T07:36:00Z", BAD_TIMES),
    "updated_at": ("a time such as 2011-11-23T07:36:00Z", BAD_TIMES),
    "deleted_at": ("a time such as 2011-11-23T07:36:00Z", BAD_TIMES),
    "boot_dev_type": ("1 or 2", [0, 3, -1, "1", "2", 1.0, 2.0, True, None, [], {}]),
    "source": ("uri, snapshot_id", [None, 1, True, [], ["uri"], {"path": "x"}, {"uri": "file:///a", "x": 1}, {1: "x"}]),
    "arch": ('"x86" or "x86_64"', ["", "x86-64", "X86", "i386", "amd64", "x86 ", None, *NOT_TEXT]),
    "description": ("text that is valid Unicode", [*NOT_TEXT, *SURROGATES]),
    "md5sum": (
        "32 hex digits",
        ["", "0" * 31, "0" * 33, "g" * 32, " " + "0" * 31, "0" * 32 + "\n", "０" * 32, *NOT_TEXT],
    ),
    "is_public": ("true or false", [0, 1, "", "true", "false", "1", None, 1.0, [], {}]),
    "state": (
        '"init" or "creating" or "pending" or "available" or "deleted"',
        ["", "Init", "running", "alive", None, *NOT_TEXT],
    ),
    "features": (
        "virtio, acpi",
        [None, 1, True, [], ["virtio"], {"vortio": True}, {"virtio": True, "x": True}, {1: True}],
    ),
    "file_format": (
        "letters a-z or digits, such as raw",
        ["", "RAW", "a b", "raw\n", "../x", "r" * 256, None, *NOT_TEXT],
    ),
    "root_device": ("text that is valid Unicode", [*NOT_TEXT, *SURROGATES]),
    "is_cacheable": ("true or false", [0, 1, "", "true", None, [], {}]),
    "instance_model_name": ("text that is valid Unicode", [*NOT_TEXT, *SURROGATES]),
    "parent_image_id": ("wmi- and 1 to 251 letters a-z or digits", BAD_IDS),
    "service_type": ('"std" or "lb"', ["", "STD", "web", None, *NOT_TEXT]),
    "display_name": ("text that is valid Unicode", [None, *NOT_TEXT, *SURROGATES]),
    "backup_object_id": (
        "bo- and letters a-z or digits",
        ["", "bo-", "lucid0", "BO-x", "bo-X", "bo-a\n", "bo-a b", *NOT_TEXT],
    ),
    "os_type": ('"linux" or "windows"', ["", "Linux", "bsd", None, *NOT_TEXT]),
}


def test_the_tables_of_this_test_name_every_field():
    """A field that is added must be tested: each table has all of them."""
    assert set(GOOD) == set(BAD) == set(wmi.FIELDS)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in GOOD.items() for value in values])
def test_a_good_value_is_kept_as_it_is(field, value):
    """What is legal goes in unchanged, whatever its characters; so does null where a field may be unknown."""
    record = wmi.image_record(fields_with(field, value))
    assert record[field] == value
    assert type(record[field]) is type(value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [(field, value, allowed) for field, (allowed, values) in BAD.items() for value in values],
)
def test_a_bad_value_is_refused_by_name(field, value, allowed):
    """The message names the field, the value and what is allowed; the code is 143."""
    with pytest.raises(wmi.InvalidParameter) as caught:
        wmi.image_record(fields_with(field, value))
    message = str(caught.value)
    assert message.startswith(f"{field}: ")
    assert f"{value!r:.80}" in message
    assert message.endswith(allowed)
    assert (caught.value.status, caught.value.code) == (400, "143")


def test_a_long_bad_value_is_not_repeated_at_length():
    """A megabyte of rubbish makes a message of a line."""
    with pytest.raises(wmi.InvalidParameter) as caught:
        make(arch="x" * 1_000_000)
    assert len(str(caught.value)) < 200


def test_the_defaults_are_those_of_the_originals():
    """Only the account must be said; the rest is what a new image has."""
    record = make()
    assert re.fullmatch("wmi-[a-z0-9]{8}", record.pop("id"))
    created = record.pop("created_at")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", created)
    assert record.pop("updated_at") == created
    assert record == {
        "account_id": "a-shpoolxx", "boot_dev_type": 2, "source": {}, "arch": "x86_64", "description": None,
        "md5sum": None, "is_public": False, "state": "init", "features": {}, "file_format": "raw",
        "root_device": None, "is_cacheable": False, "instance_model_name": None, "parent_image_id": None,
        "service_type": "std", "display_name": "", "backup_object_id": None, "deleted_at": None,
        "os_type": "linux",
    }


def test_made_up_ids_differ_and_use_every_character():
    """8 random characters of a-z0-9: a thousand ids are all different."""
    ids = {make()["id"] for _ in range(1000)}
    assert len(ids) == 1000
    assert {character for id in ids for character in id[4:]} == set(ID_CHARACTERS)


def test_defaults_are_not_shared():
    """To change one record's dicts changes no other's."""
    make()["source"]["uri"] = "file:///changed"
    make()["features"]["virtio"] = True
    assert (make()["source"], make()["features"]) == ({}, {})


def test_the_given_fields_are_not_changed():
    """The caller's dict stays as it was, its inner dicts too."""
    given = {"uuid": "wmi-a", "account_id": "a-x", "source": {"uri": "u"}, "features": {"virtio": True}}
    record = wmi.image_record(given)
    record["source"]["uri"] = "other"
    assert given == {"uuid": "wmi-a", "account_id": "a-x", "source": {"uri": "u"},
                     "features": {"virtio": True}}


def test_a_record_has_every_field_in_the_tables_order():
    """A record is complete, whatever order its fields came in."""
    backwards = dict(reversed(list(make().items())))
    assert list(wmi.image_record(backwards)) == list(wmi.FIELDS)
    assert wmi.image_record(backwards) == backwards


def test_the_account_must_be_said():
    """Without an owner there is no image; the message says how to say it."""
    with pytest.raises(wmi.InvalidParameter, match="account_id: is missing.*a-shpoolxx"):
        wmi.image_record({"id": "wmi-a"})


@pytest.mark.parametrize("field", ["Id", "owner", "sha256", "source_uri", ""])
def test_an_unknown_field_is_refused(field):
    """A misspelled field is an error that names it and the known ones, never dropped."""
    with pytest.raises(wmi.InvalidParameter) as caught:
        make(**{field: None})
    assert str(caught.value).startswith(f"field: {field!r} is not allowed")
    assert str(caught.value).endswith(", ".join(wmi.FIELDS))


@pytest.mark.parametrize("field", ["volumes", "vifs", "labels"])
def test_the_lists_of_12_03_are_taken_only_empty(field):
    """What 12.03 shows can be loaded again; what cannot be kept is refused, not lost."""
    assert field not in make(**{field: []})
    with pytest.raises(wmi.InvalidParameter, match=field):
        make(**{field: ["x"]})
    with pytest.raises(wmi.InvalidParameter, match=field):
        make(**{field: None})


# ---- id and uuid ----


def test_uuid_is_another_name_of_id():
    """Either may be given, or both if they are the same."""
    assert make(uuid="wmi-a")["id"] == "wmi-a"
    assert make(id="wmi-a")["id"] == "wmi-a"
    assert make(id="wmi-a", uuid="wmi-a")["id"] == "wmi-a"
    assert make(id="wmi-a", uuid=None)["id"] == "wmi-a"
    assert "uuid" not in make(uuid="wmi-a")


def test_id_and_uuid_may_not_differ():
    """Two ids for one image are refused, both named."""
    with pytest.raises(wmi.InvalidParameter) as caught:
        make(id="wmi-a", uuid="wmi-b")
    assert str(caught.value).startswith("uuid: 'wmi-b' is not allowed")
    assert "'wmi-a'" in str(caught.value)


@pytest.mark.parametrize("value", BAD_IDS)
def test_a_bad_uuid_is_refused(value):
    """What is no id is none under its other name either."""
    with pytest.raises(wmi.InvalidParameter):
        make(uuid=value)


# ---- times ----


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("2011-11-23T07:36:00Z", "2011-11-23T07:36:00Z"),
        ("2011-11-23T16:36:00+09:00", "2011-11-23T07:36:00Z"),
        ("2011-11-23T16:36:00+0900", "2011-11-23T07:36:00Z"),
        ("2011-11-23T04:06:00-03:30", "2011-11-23T07:36:00Z"),
        ("2011-11-24T00:06:00+23:59", "2011-11-23T00:07:00Z"),
        ("2011-12-31T23:30:00-00:45", "2012-01-01T00:15:00Z"),
        ("2011-11-23T07:36:00.000Z", "2011-11-23T07:36:00Z"),
        ("2011-11-23T07:36:00.999999999Z", "2011-11-23T07:36:00Z"),
        ("2011-11-23T07:36:00.5+00:00", "2011-11-23T07:36:00Z"),
        ("2011-11-23 07:36:00.000000000 Z", "2011-11-23T07:36:00Z"),
        ("2011-11-23 07:36:00 Z", "2011-11-23T07:36:00Z"),
        ("2011-11-23 07:36:00 +0100", "2011-11-23T06:36:00Z"),
        ("2011-11-23 07:36:00", "2011-11-23T07:36:00Z"),
        ("2011-11-23T07:36:00", "2011-11-23T07:36:00Z"),
        ("2011-11-23", "2011-11-23T00:00:00Z"),
        ("2012-02-29", "2012-02-29T00:00:00Z"),
    ],
)
def test_a_time_is_kept_in_utc_and_whole_seconds(given, kept):
    """Offsets are applied, fractions cut, spellings of the originals' YAML taken; no zone means UTC."""
    record = make(created_at=given, updated_at=given, deleted_at=given, state="deleted")
    assert record["created_at"] == record["updated_at"] == record["deleted_at"] == kept


def test_a_fraction_counts_where_times_are_compared():
    """parse_time keeps microseconds, so that since .5 does not take what was at .0."""
    assert wmi.parse_time("since", "2011-11-23T07:36:00.1234567Z").microsecond == 123456
    assert wmi.parse_time("since", "2011-11-23T07:36:00.5Z").microsecond == 500000


def test_updated_at_starts_as_created_at():
    """An image that came with its age was not changed today."""
    assert make(created_at="2011-11-23T07:36:00Z")["updated_at"] == "2011-11-23T07:36:00Z"


# ---- md5sum ----


def test_md5sum_is_kept_in_lower_case():
    """So that equal sums are equal texts."""
    assert make(md5sum="ABCDEF0123456789abcdef0123456789")["md5sum"] == "abcdef0123456789abcdef0123456789"


# ---- source and features, as objects and as the texts that the originals wrote ----


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("--- \n:uri: file:///var/lib/o.raw\n", {"uri": "file:///var/lib/o.raw"}),
        ("---\n:uri: file:///var/lib/o.raw\n", {"uri": "file:///var/lib/o.raw"}),
        ("---\nuri: file:///var/lib/o.raw\n", {"uri": "file:///var/lib/o.raw"}),
        (":uri: file:///var/lib/o.raw", {"uri": "file:///var/lib/o.raw"}),
        ("---\n:uri: 'file:///it''s.raw'\n", {"uri": "file:///it's.raw"}),
        ('---\n:uri: "file:///\\xC3\\xA9\\u65e5.raw"\n', {"uri": "file:///\xc3\xa9日.raw"}),
        ("---\n:uri: http://h:80/a?b=c&d\n", {"uri": "http://h:80/a?b=c&d"}),
        ("--- \n:snapshot_id: snap-lucid1\n", {"snapshot_id": "snap-lucid1"}),
        ("---\n:snapshot_id: snap-lucid1\n", {"snapshot_id": "snap-lucid1"}),
        ("--- {}\n", {}),
        ("--- {}\n\n", {}),
    ],
)
def test_source_is_taken_as_the_text_that_was_shown(text, kept):
    """Every layout of Ruby 1.8 and 2.0, with and without the colon of a symbol."""
    record = make(source=text)
    assert record["source"] == kept
    assert record["boot_dev_type"] == (1 if "snapshot_id" in kept else 2)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("--- \n:virtio: true\n", {"virtio": True}),
        ("---\n:virtio: true\n", {"virtio": True}),
        ("---\n:virtio: false\n", {"virtio": False}),
        ("---\n:virtio: true\n:acpi: true\n", {"virtio": True, "acpi": True}),
        ("--- \nvirtio: true\n", {"virtio": True}),
        ("--- {}\n", {}),
        ("--- {}\n\n", {}),
    ],
)
def test_features_are_taken_as_the_text_that_was_shown(text, kept):
    """As source; the values are booleans."""
    assert make(features=text)["features"] == kept


@pytest.mark.parametrize("version", ["document", "11.12"])
@pytest.mark.parametrize(
    "fields",
    [
        {"source": {"uri": "file:///a: b # 'c' \"d\" 日.raw"}, "features": {"virtio": True, "acpi": False}},
        {"source": {"snapshot_id": "snap-1"}, "boot_dev_type": 1}, {},
    ],
)
def test_what_a_version_shows_can_be_registered_again(version, fields):
    """A shown image, its source and features as text, makes the same record."""
    record = make(**fields)
    shown = wmi.render(wmi.VERSIONS[version], record)
    assert isinstance(shown["source"], str)
    assert isinstance(shown["features"], str)
    assert wmi.image_record(shown) == record


def test_what_12_03_shows_can_be_registered_again():
    """All 24 fields are taken, the empty lists too."""
    record = make(description="d", state="available", features={"virtio": True}, display_name="n")
    assert wmi.image_record(wmi.render(wmi.VERSIONS["12.03"], record)) == record


@pytest.mark.parametrize("field", ["source", "features"])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("--- !binary |\n  aGVsbG8=\n", "--- !binary |"),
        ("--- !ruby/object:Kernel {}\n", "!ruby/object"),
        ("---\n:uri: !binary aGVsbG8=\n", "!binary"),
        ("--- &a\n:uri: x\n", "&a"),
        ("---\n:uri: *a\n", "*a"),
        ("--- {uri: x}\n", "{uri: x}"),
        ("---\n- uri\n", "- uri"),
        ("--- uri\n", "--- uri"),
        ("no mapping", "no mapping"),
    ],
)
def test_text_that_is_no_flat_mapping_is_refused(field, text, found):
    """The message names the field and quotes what was found; nothing is ever instantiated."""
    with pytest.raises(wmi.InvalidParameter) as caught:
        make(**{field: text})
    assert str(caught.value).startswith(f"{field}: expected ")
    assert found in str(caught.value)


@pytest.mark.parametrize("value", ["", "a\nb", "\0", "\x7f", "\x1f", "\ud800", None, 1, [], {}])
def test_a_uri_has_no_control_characters(value):
    """The message names the inner field, source.uri."""
    with pytest.raises(wmi.InvalidParameter, match=r"^source\.uri: .*URI") as caught:
        make(source={"uri": value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", ["", "lucid1", "snap-", "snap-A", "snap-a b", "snap-a\n", None, 1])
def test_a_snapshot_id_has_its_form(value):
    """The message names the inner field, source.snapshot_id."""
    with pytest.raises(wmi.InvalidParameter, match=r"^source\.snapshot_id: .*snap- and letters") as caught:
        make(source={"snapshot_id": value}, boot_dev_type=1)
    assert repr(value) in str(caught.value)


def test_a_number_of_thousands_of_digits_is_refused():
    """Python does not print it, but it is refused like any other value."""
    with pytest.raises(wmi.InvalidParameter, match="^boot_dev_type: a value of type int"):
        wmi.image_record({"account_id": "a-x", "boot_dev_type": 10**5000})


@pytest.mark.parametrize("value", [1, 0, "true", "false", None, [], 1.0])
@pytest.mark.parametrize("name", ["virtio", "acpi"])
def test_a_feature_is_true_or_false(name, value):
    """Never 0, 1 or text, which would be shown differently from what was set."""
    with pytest.raises(wmi.InvalidParameter, match=rf"^features\.{name}: .*true or false") as caught:
        make(features={name: value})
    assert repr(value) in str(caught.value)


# ---- fields that must agree ----


def test_a_volume_has_a_snapshot_and_a_file_a_uri():
    """boot_dev_type says which; it is taken from the source where it is not given."""
    assert make(source={"uri": "u"})["boot_dev_type"] == 2
    assert make(source={"snapshot_id": "snap-1"})["boot_dev_type"] == 1
    assert make(boot_dev_type=1)["source"] == {}
    for fields in (
        {"source": {"uri": "u"}, "boot_dev_type": 1},
        {"source": {"snapshot_id": "snap-1"}, "boot_dev_type": 2},
        {"source": {"uri": "u", "snapshot_id": "snap-1"}},
        {"source": {"uri": "u", "snapshot_id": "snap-1"}, "boot_dev_type": 2},
    ):
        with pytest.raises(wmi.InvalidParameter, match="^source: .* alone, as boot_dev_type is [12]"):
            make(**fields)


def test_only_what_is_deleted_has_a_time_of_deletion():
    """state and deleted_at say the same: a store looks at one, a client at the other."""
    assert make(state="deleted", deleted_at="2012-01-01T00:00:00Z")["deleted_at"] == "2012-01-01T00:00:00Z"
    for fields in ({"state": "deleted"}, {"deleted_at": "2012-01-01T00:00:00Z"}):
        with pytest.raises(wmi.InvalidParameter, match="^state: .*expected deleted if deleted_at is given, and"):
            make(**fields)
