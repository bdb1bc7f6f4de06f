"""The rules on a store: who sees what, who may change it, how a list is paged, filtered and sorted."""

import contextlib
import itertools
import json
import random

import pytest

import wmi

VERSIONS = ["document", "11.12", "12.03"]
OLDER = ["document", "11.12"]
ME, OTHER, SYSTEM, VISITOR = "a-shpoolxx", "a-otheracc", "a-00000000", "a-visitor1"
DELETED = {"state": "deleted", "deleted_at": "2011-12-24T00:00:00Z"}
EIGHT = [  # oldest first: every combination of owner, public or private, alive or deleted
    {"id": f"wmi-{owner}{'public' if public else 'private'}{'gone' if gone else ''}", "account_id": account,
     "is_public": public, "created_at": "2011-11-23T07:36:00Z", **(DELETED if gone else {})}
    for owner, account in (("my", ME), ("your", OTHER)) for public in (True, False) for gone in (False, True)
]
IDS = [image["id"] for image in EIGHT]


def filled(images):
    storage = wmi.open_storage("memory:")
    storage.add_all(map(wmi.image_record, images))
    return storage


@pytest.fixture
def storage():
    """A store with the eight images."""
    return filled(EIGHT)


@pytest.fixture(params=VERSIONS)
def version(request):
    """Each version."""
    return request.param


def ids(page):
    return [image["id"] for image in page.images]


def outcome(call, *arguments, **named):
    """Return the class of the error that a call raises, or None."""
    try:
        call(*arguments, **named)
    except wmi.Error as error:
        return type(error)
    return None


# ---- who sees what ----


@pytest.mark.parametrize("account", [ME, OTHER, SYSTEM, VISITOR, None])
def test_index_shows_own_and_public_images(storage, version, account):
    """Newest registration first. 12.03: own ones, deleted ones too, and public ones on demand."""
    newest = EIGHT[::-1]
    own = [one for one in newest if account in (None, one["account_id"])]
    seen = [one for one in newest if account in (None, one["account_id"]) or one["is_public"]]
    expected = own if version == "12.03" else [one for one in seen if "state" not in one]
    page = wmi.Catalog(storage, account, version).index()
    assert (page.total, ids(page)) == (len(expected), [one["id"] for one in expected])
    if version == "12.03":
        page = wmi.Catalog(storage, account, version).index(is_public=True)
        assert (page.total, ids(page)) == (len(seen), [one["id"] for one in seen])


@pytest.mark.parametrize("account", [ME, OTHER, SYSTEM, VISITOR, None])
@pytest.mark.parametrize("image", EIGHT, ids=IDS)
def test_show_gives_own_and_public_images(storage, version, account, image):
    """The system account sees all in the older versions; a tombstone is shown in 12.03 alone."""
    mine = account in (None, image["account_id"]) or (account == SYSTEM and version in OLDER)
    if "state" in image and version in OLDER:
        expected = wmi.UnknownUUIDResource
    elif mine or image["is_public"]:
        expected = None
    else:
        expected = wmi.OperationNotPermitted if version in OLDER else wmi.UnknownUUIDResource
    catalog = wmi.Catalog(storage, account, version)
    assert outcome(catalog.show, image["id"]) is expected
    if not expected:
        assert catalog.show(image["id"]) == wmi.image_record({**image, "updated_at": image["created_at"]})


@pytest.mark.parametrize("verb", ["destroy", "update"])
@pytest.mark.parametrize("account", [ME, OTHER, SYSTEM, VISITOR, None])
@pytest.mark.parametrize("image", EIGHT, ids=IDS)
def test_only_the_owner_may_change_an_image(storage, version, verb, account, image):
    """Public or not; the system account may delete in the older versions. A refusal changes nothing."""
    if verb == "update" and version in OLDER:
        return
    mine = account in (None, image["account_id"]) or (account == SYSTEM and version in OLDER)
    if "state" in image and version in OLDER:
        expected = wmi.UnknownUUIDResource
    elif mine:
        expected = None
    else:
        expected = wmi.OperationNotPermitted if version in OLDER else wmi.UnknownUUIDResource
    catalog = wmi.Catalog(storage, account, version)
    before, revision = storage.get(image["id"]), storage.revision()
    call = catalog.destroy if verb == "destroy" else lambda id: catalog.update(id, description="x")
    assert outcome(call, image["id"]) is expected
    if expected:
        assert (storage.get(image["id"]), storage.revision()) == (before, revision)


def test_errors_say_what_they_are_about(storage, version):
    """No such image: the id. Not yours: nothing, or in 12.03 that there is no such image."""
    catalog = wmi.Catalog(storage, VISITOR, version)
    for call in (catalog.show, catalog.destroy):
        with pytest.raises(wmi.UnknownUUIDResource, match="^wmi-nope$"):
            call("wmi-nope")
        with pytest.raises(wmi.Error) as caught:
            call("wmi-myprivate")
        assert str(caught.value) == ("" if version in OLDER else "wmi-myprivate")


@pytest.mark.parametrize("id", ["", "lucid0", "wmi-", "wmi-A", "wmi- ", "wmi-\n",
                                "wmi-é", "wmi-" + "a" * 252])
def test_what_cannot_be_an_id_is_refused_before_the_store_sees_it(version, id):
    """In the originals' words, by each verb."""
    catalog = wmi.Catalog(None, None, version)  # there is no store at all
    verbs = [catalog.show, catalog.destroy, catalog.modify]
    for call in verbs + ([catalog.update] if version == "12.03" else []):
        with pytest.raises(wmi.InvalidParameter) as caught:
            call(id)
        assert str(caught.value) == f"Invalid UUID Syntax: {id}"


@pytest.mark.parametrize("account", ["", "a-", "xyz", "A-x", "a-X", "a-x\n", "a-" + "a" * 254, 1, True])
def test_the_account_is_checked(storage, account):
    """A catalog for nobody cannot be made by mistake: only None is the operator."""
    with pytest.raises(wmi.InvalidParameter, match="^account: "):
        wmi.Catalog(storage, account)


def test_the_version_is_checked(storage):
    """The message lists those there are."""
    with pytest.raises(wmi.InvalidParameter, match='version: .*"document" or "11.12" or "12.03"'):
        wmi.Catalog(storage, ME, "11.11")


# ---- paging ----


@pytest.mark.parametrize(
    ("start", "limit", "expected"),
    [
        (0, None, slice(None)), (0, 0, slice(None)), ("0", "0", slice(None)), (0, 1, slice(1)),
        (1, 1, slice(1, 2)), (1, None, slice(1, None)), ("2", "3", slice(2, 5)), (3, 100, slice(3, None)),
        ("03", "003", slice(3, 6)), (4, 1, slice(4, 5)), (5, 1, slice(5, 5)), (6, None, slice(6, 6)),
        (10**18 - 1, 1, slice(0)), (0, 10**18 - 1, slice(None)), (10**18 - 1, 10**18 - 1, slice(0)),
    ],
)
def test_start_and_limit_cut_the_list(version, start, limit, expected):
    """Numbers or their text; limit 0 or None is the version's default; the total never changes."""
    images = [{"id": f"wmi-{number}", "account_id": ME} for number in range(5)]
    page = wmi.Catalog(filled(images), ME, version).index(start, limit)
    default = 250 if version == "12.03" else None
    assert page[:3] == (5, int(start), int(limit or 0) or default)
    assert [type(number) for number in page[:2]] == [int, int]
    assert ids(page) == [f"wmi-{number}" for number in range(4, -1, -1)][expected]


@pytest.mark.parametrize("name", ["start", "limit"])
@pytest.mark.parametrize(
    "value",
    [-1, "-1", "abc", "", " 1", "1 ", "1\n", "+1", "1.0", 1.0, 1.5, "1e3", "0x1", True, False, 10**18,
     "1" * 19, [], [1], {}, b"1", "１", "1_0", float("nan"), float("inf"), "null", "None",
     pytest.param(10**5000, id="huge")],
)
def test_what_is_no_whole_number_is_refused(storage, version, name, value):
    """The message is the parameter's name, as the originals had it."""
    with pytest.raises(wmi.InvalidParameter, match=f"^{name}$"):
        wmi.Catalog(storage, ME, version).index(**{name: value})


def test_start_must_be_given_as_a_number(storage):
    """None is a limit, not a start."""
    with pytest.raises(wmi.InvalidParameter, match="^start$"):
        wmi.Catalog(storage, ME).index(None)


def test_the_default_limit_of_12_03_is_250():
    """Reported and applied; a larger one may be asked for."""
    storage = filled({"id": f"wmi-{number}", "account_id": ME} for number in range(300))
    catalog = wmi.Catalog(storage, ME, "12.03")
    for limit in (None, 0, "0"):
        page = catalog.index(limit=limit)
        assert (page.total, page.limit, len(ids(page))) == (300, 250, 250)
    assert len(ids(catalog.index(limit=299))) == 299
    assert len(ids(wmi.Catalog(storage, ME).index())) == 300


def test_order_is_of_registration_not_of_time(version):
    """Newest registration first, where the times are equal or say the opposite."""
    images = [{"id": f"wmi-{number}", "account_id": ME,
               "created_at": f"20{20 - number // 2}-01-01"} for number in range(9)]
    assert ids(wmi.Catalog(filled(images), ME,
                           version).index()) == [f"wmi-{number}" for number in range(8, -1, -1)]


@pytest.mark.parametrize("count", [wmi.PAGE_AT_ONCE, wmi.PAGE_AT_ONCE + 1, wmi.IMAGES_A_CALL, wmi.IMAGES_A_CALL + 1])
def test_long_lists_are_whole(version, count):
    """Around the sizes that are read in one piece nothing is lost or doubled, from any start."""
    storage = filled({"id": f"wmi-{number}", "account_id": ME} for number in range(count))
    catalog = wmi.Catalog(storage, ME, version)
    newest = [f"wmi-{number}" for number in range(count - 1, -1, -1)]
    once = wmi.PAGE_AT_ONCE
    for start, limit in ((0, 10**6), (1, 10**6), (0, once - 1), (0, once), (0, once + 1), (count - 1, 5000), (9, once)):
        page = catalog.index(start, limit)
        assert (page.total, ids(page)) == (count, newest[start : start + limit]), (start, limit)
    if version in OLDER:
        assert ids(catalog.index()) == newest
    assert [image["id"] for image in catalog.images()] == newest


def test_images_yields_every_image_of_the_index(storage, version):
    """With the filters of the index."""
    for account in (ME, VISITOR, None):
        catalog = wmi.Catalog(storage, account, version)
        assert [image["id"] for image in catalog.images()] == ids(catalog.index())
    if version == "12.03":
        assert [image["id"] for image in catalog.images(state="deleted", is_public=1)] == IDS[::-1][::2]


def test_images_ends_where_images_go_away():
    """A list that shrinks while it is walked ends, it does not ask again forever."""
    storage = filled({"id": f"wmi-{number}", "account_id": ME} for number in range(1500))
    walk = wmi.Catalog(storage, ME).images()
    next(walk)
    for number in range(1500):
        storage.delete(f"wmi-{number}")
    assert len(list(walk)) < 1500


def test_a_page_that_is_empty_too_early_ends_the_walk():
    """A server whose total never comes true is not asked forever."""
    asked = []

    def index(start, limit):
        asked.append(start)
        assert len(asked) < 5
        return wmi.Page(10, start, limit, [{"id": f"wmi-{start}"}] if start < 2 else [])

    assert [image["id"] for image in wmi.every_image(index, {})] == ["wmi-0", "wmi-1"]
    assert asked == [0, 1, 2]


# ---- tombstones ----


def test_a_tombstone_keeps_everything_but_its_state(storage, version):
    """destroy returns the id; state, deleted_at and updated_at change, in every version."""
    before = storage.get("wmi-mypublic")
    assert wmi.Catalog(storage, ME, version).destroy("wmi-mypublic") == "wmi-mypublic"
    after = storage.get("wmi-mypublic")
    assert after["state"] == "deleted"
    assert after["deleted_at"] == after["updated_at"] > before["updated_at"]
    kept = {name: before[name] for name in ("state", "deleted_at", "updated_at")}
    assert {**after, **kept} == before


def test_in_12_03_deleting_again_changes_nothing(storage):
    """The time of the first deletion stays."""
    catalog = wmi.Catalog(storage, ME, "12.03")
    before = storage.get("wmi-mypublicgone")
    assert catalog.destroy("wmi-mypublicgone") == "wmi-mypublicgone"
    assert storage.get("wmi-mypublicgone") == before


def test_a_tombstone_gives_way_to_a_new_image(storage, version):
    """The id can be registered anew, as the newest; nothing of the old image is left."""
    catalog = wmi.Catalog(storage, version=version)
    catalog.destroy("wmi-mypublic")
    assert catalog.register({"uuid": "wmi-mypublic", "account_id": OTHER}) == "wmi-mypublic"
    page = wmi.Catalog(storage, OTHER, version).index()
    assert ids(page)[0] == "wmi-mypublic"
    shown = catalog.show("wmi-mypublic")
    assert (shown["account_id"], shown["is_public"], shown["deleted_at"]) == (OTHER, False, None)
    assert ids(page).count("wmi-mypublic") == 1


# ---- register, update, modify ----


def test_register_makes_a_checked_record(storage):
    """It takes what image_record takes and returns the id, made up where none is given."""
    catalog = wmi.Catalog(storage)
    id = catalog.register({"account_id": ME, "source": "--- \n:uri: file:///x\n", "description": "d"})
    assert catalog.show(id)["source"] == {"uri": "file:///x"}
    with pytest.raises(wmi.InvalidParameter, match="^arch: "):
        catalog.register({"account_id": ME, "arch": "m68k"})


def test_an_id_is_registered_once(storage):
    """409 while it is alive; the first image stays."""
    before = storage.get("wmi-mypublic")
    with pytest.raises(wmi.DuplicateUUID, match="wmi-mypublic is registered already"):
        wmi.Catalog(storage).register({"id": "wmi-mypublic", "account_id": ME})
    assert storage.get("wmi-mypublic") == before


@pytest.mark.parametrize("account", [ME, SYSTEM, VISITOR])
def test_only_the_operator_registers_and_modifies(storage, version, account):
    """An account cannot, not the system's either: the API has no such call."""
    catalog = wmi.Catalog(storage, account, version)
    revision = storage.revision()
    assert outcome(catalog.register, {"account_id": account}) is wmi.OperationNotPermitted
    assert outcome(catalog.modify, "wmi-mypublic", arch="x86") is wmi.OperationNotPermitted
    assert storage.revision() == revision


def test_update_sets_what_put_sets(storage):
    """display_name and description, of 12.03; the image comes back, changed now."""
    catalog = wmi.Catalog(storage, ME, "12.03")
    before = storage.get("wmi-mypublic")
    after = catalog.update("wmi-mypublic", display_name="n", description="d\n日")
    assert after == storage.get("wmi-mypublic")
    assert after["updated_at"] > before["updated_at"]
    expected = {**before, "display_name": "n", "description": "d\n日", "updated_at": after["updated_at"]}
    assert after == expected
    assert catalog.update("wmi-mypublic", description=None)["description"] is None


@pytest.mark.parametrize("fields", [{}, {"display_name": ""}, {"display_name": "", "description": None}])
def test_an_update_that_changes_nothing_leaves_the_time(storage, fields):
    """Neither updated_at nor anything else moves."""
    before = storage.get("wmi-mypublic")
    assert wmi.Catalog(storage, ME, "12.03").update("wmi-mypublic", **fields) == before


@pytest.mark.parametrize("field", [*wmi.FIELDS, "x"])
def test_update_refuses_other_fields(storage, field):
    """An owner may not publish, revive or hand over an image by PUT."""
    if field in ("id", "display_name", "description"):
        return
    for version in VERSIONS:
        with pytest.raises(wmi.InvalidParameter, match=f"^field: '{field}' is not allowed"):
            wmi.Catalog(storage, ME, version).update("wmi-mypublic", **{field: "x"})


@pytest.mark.parametrize("version", OLDER)
def test_the_older_versions_have_no_update(storage, version):
    """The message says so."""
    with pytest.raises(wmi.InvalidParameter, match=f"{version} has no PUT"):
        wmi.Catalog(storage, ME, version).update("wmi-mypublic", display_name="x")


@pytest.mark.parametrize("value", [1, None, True, [], {}, "\ud800"])
def test_update_checks_values(storage, value):
    """As registration does; nothing is changed by half."""
    before = storage.get("wmi-mypublic")
    with pytest.raises(wmi.InvalidParameter, match="^display_name: "):
        wmi.Catalog(storage, ME, "12.03").update("wmi-mypublic", description="x", display_name=value)
    assert storage.get("wmi-mypublic") == before


def test_modify_sets_any_field_but_ids_and_times(storage):
    """Each value is checked; the whole must agree."""
    catalog = wmi.Catalog(storage, version="12.03")
    after = catalog.modify("wmi-mypublic", account_id=OTHER, is_public=False, arch="x86", md5sum="A" * 32,
                           source={"snapshot_id": "snap-1"}, boot_dev_type=1, state="available")
    assert (after["account_id"], after["md5sum"]) == (OTHER, "a" * 32)
    assert after["source"] == {"snapshot_id": "snap-1"}
    assert storage.get("wmi-mypublic") == after
    for name in ("uuid", "created_at", "updated_at", "deleted_at", "nope", "volumes"):
        with pytest.raises(wmi.InvalidParameter, match=f"^field: '{name}' is not allowed"):
            catalog.modify("wmi-mypublic", **{name: "2011-11-23T07:36:00Z"})
    for fields in ({"arch": "m68k"}, {"boot_dev_type": 2}, {"source": {"uri": "u"}}, {"state": "deleted"},
                   {"md5sum": ""}):
        with pytest.raises(wmi.InvalidParameter, match=f"^({'|'.join(fields)}|source|deleted_at): "):
            catalog.modify("wmi-mypublic", **fields)
    assert storage.get("wmi-mypublic") == after


def test_modify_can_bring_back_what_was_deleted(storage):
    """Another state takes the time of deletion away, and the image is listed again."""
    catalog = wmi.Catalog(storage, version="12.03")
    assert catalog.modify("wmi-mypublicgone", state="available")["deleted_at"] is None
    assert "wmi-mypublicgone" in ids(wmi.Catalog(storage, VISITOR).index())
    assert catalog.modify("wmi-myprivategone", description="x")["state"] == "deleted"


@pytest.mark.parametrize("version", OLDER)
def test_modify_follows_the_versions_rules(storage, version):
    """A tombstone is not there in the older versions."""
    catalog = wmi.Catalog(storage, version=version)
    assert outcome(catalog.modify, "wmi-mypublicgone", arch="x86") is wmi.UnknownUUIDResource
    assert catalog.modify("wmi-mypublic", arch="x86")["arch"] == "x86"


def test_an_unknown_feature_is_refused(storage):
    """Set or cleared: a misspelled name is not dropped in silence."""
    catalog = wmi.Catalog(storage)
    id = catalog.register({"account_id": ME, "features": {"virtio": True}})
    for value in (True, False, 1):
        with pytest.raises(wmi.InvalidParameter, match="features"):
            catalog.set_features(id, **{"virtoi" if value in (True, False) else "acpi": value})
    assert catalog.show(id)["features"] == {"virtio": True}


def test_features_are_replaced_as_a_whole(storage):
    """What is not named in the new ones is gone."""
    catalog = wmi.Catalog(storage)
    assert catalog.modify("wmi-mypublic", features={"virtio": True, "acpi": False})["features"] == {
        "virtio": True, "acpi": False,
    }
    assert catalog.modify("wmi-mypublic", features="--- \n:acpi: true\n")["features"] == {"acpi": True}
    assert catalog.modify("wmi-mypublic", features={})["features"] == {}


# ---- the filters of 12.03 against a model ----

SORTABLE = [name for name in wmi.VERSIONS["12.03"].fields if name not in ("volumes", "vifs", "labels")]


def random_images(rng, count):
    """Return images whose fields repeat, so that there are ties and nulls, oldest first."""

    def moment():
        return f"2012-01-0{rng.randrange(1, 5)}T0{rng.randrange(4)}:00:00Z"

    for number in rng.sample(range(count * 9), count):
        gone = rng.random() < 0.3
        yield {
            "id": f"wmi-{number}",
            "account_id": rng.choice([ME, ME, OTHER]),
            "created_at": moment(),
            "updated_at": moment(),
            "deleted_at": moment() if gone else None,
            "state": "deleted" if gone else rng.choice(wmi.STATES[:-1]),
            "boot_dev_type": rng.choice([1, 2]),
            "arch": rng.choice(["x86", "x86_64"]),
            "description": rng.choice([None, "", "a", "b", "日"]),
            "is_public": rng.random() < 0.4,
            "features": rng.choice([{}, {"virtio": True}, {"virtio": False}, {"acpi": True}]),
            "file_format": rng.choice(["raw", "qcow2"]),
            "root_device": rng.choice([None, "label:root"]),
            "is_cacheable": rng.random() < 0.5,
            "instance_model_name": rng.choice([None, "kvm", "lxc"]),
            "parent_image_id": rng.choice([None, "wmi-a", "wmi-b"]),
            "service_type": rng.choice(["std", "std", "lb"]),
            "display_name": rng.choice(["", "A", "a", "é"]),
            "backup_object_id": rng.choice([None, "bo-1"]),
            "os_type": rng.choice(["linux", "windows"]),
        }


def random_filters(rng):
    """Return some of the parameters, spelled as a query or as a program would."""
    hours = [f"2012-01-0{day}T0{hour}" for day in range(1, 6) for hour in range(4)]
    times = [f"{hour}:{minute}:00Z" for hour in hours for minute in ("00", "30")]
    null_tests = [f"{field}.{test}" for field in wmi.VERSIONS["12.03"].fields for test in ("nil", "not_nil")]
    choices = {
        "is_public": ["true", "false", "1", "0", "", True, False, 1, 0],
        "service_type": ["std", "lb"],
        "state": ["alive", "alive_with_deleted", "available", "deleted"],
        "created_since": times,
        "created_until": times,
        "deleted_since": times,
        "deleted_until": times,
        "filter": [*null_tests, rng.sample(null_tests, 2), rng.choices(null_tests[::2], k=3), []],
        "sort_by": [f"{field}.{order}" for field in SORTABLE for order in ("asc", "desc")],
    }
    picked = rng.sample(list(choices), rng.choice([1, 1, 2, 2, 3, 4]))
    filters = {name: rng.choice(choices[name]) for name in picked}
    for field in ("created", "deleted"):
        since, until = f"{field}_since", f"{field}_until"
        if since in filters and until in filters and filters[since] > filters[until]:
            filters[since], filters[until] = filters[until], filters[since]
    return filters


def model(records, account, filters):
    """Return the records that a filtered index shows, in order, in the plainest way there is."""
    public = str(filters.get("is_public", "")).lower()
    found = [
        record for record in reversed(records)
        if account in (None, record["account_id"]) or (public in ("true", "1") and record["is_public"])
    ]
    if public in ("false", "0"):
        found = [record for record in found if not record["is_public"]]
    if "service_type" in filters:
        found = [record for record in found if record["service_type"] == filters["service_type"]]
    states = {
        None: wmi.STATES, "alive_with_deleted": wmi.STATES, "alive": wmi.STATES[:-1],
        "available": ("init", "available"), "deleted": ("deleted",),
    }
    found = [record for record in found if record["state"] in states[filters.get("state")]]
    for field in ("created", "deleted"):
        if f"{field}_since" in filters:
            since = filters[f"{field}_since"]
            found = [record for record in found if record[f"{field}_at"] and record[f"{field}_at"] >= since]
        if f"{field}_until" in filters:
            until = filters[f"{field}_until"]
            found = [record for record in found if record[f"{field}_at"] and record[f"{field}_at"] <= until]
    tests = filters.get("filter", [])
    for one in [tests] if isinstance(tests, str) else tests:
        field, test = one.split(".")
        found = [record for record in found if (record.get(field, "") is None) == (test == "nil")]
    if "sort_by" in filters:
        field, order = filters["sort_by"].split(".")
        place = {record["id"]: number for number, record in enumerate(records)}

        def key(record):
            shown = wmi.render(wmi.VERSIONS["12.03"], record)[field]
            if field == "id":
                return place[record["id"]]
            comparable = json.dumps(shown) if isinstance(shown, dict) else shown
            comparable = comparable.upper() if isinstance(comparable, str) else comparable
            return (shown is not None, "" if shown is None else comparable), place[record["id"]]

        found.sort(key=key, reverse=order == "desc")
    return found


@pytest.fixture(scope="module")
def generated():
    """A store of many images, and its records, oldest first."""
    records = [wmi.image_record(image) for image in random_images(random.Random(1203), 300)]
    storage = wmi.open_storage("memory:")
    storage.add_all(records)
    return storage, records


@pytest.mark.parametrize("seed", range(20))
def test_filters_find_what_the_model_finds(generated, seed):
    """Combinations of filters, sorting and paging: the same total, the same images, the same order."""
    storage, records = generated
    rng = random.Random(seed)
    for _ in range(30):
        account, filters = rng.choice([ME, OTHER, VISITOR, None]), random_filters(rng)
        start, limit = rng.choice([0, 0, 1, 7, 150, 400]), rng.choice([None, 1, 10, 100, 1000])
        page = wmi.Catalog(storage, account, "12.03").index(start, limit, **filters)
        expected = model(records, account, filters)
        assert page[:3] == (len(expected), start, limit or 250), filters
        assert list(page.images) == expected[start : start + (limit or 250)], filters


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("field", SORTABLE)
def test_every_field_sorts(generated, field, order):
    """Null is smallest, as in MySQL; what is equal stays in order of registration, or in its reverse."""
    storage, records = generated
    filters = {"sort_by": f"{field}.{order}"}
    page = wmi.Catalog(storage, ME, "12.03").index(limit=1000, **filters)
    assert list(page.images) == model(records, ME, filters)


def test_text_is_sorted_without_regard_to_case():
    """As MySQL's utf8_general_ci did: by capitals, so that what stands between Z and a comes last."""
    names = ["p0", "Ubuntu", "centos", "Debian", "É", "é0", "_", "ubuntu", "z"]
    images = [{"id": f"wmi-{n}", "account_id": ME, "display_name": name} for n, name in enumerate(names)]
    catalog = wmi.Catalog(filled(images), ME, "12.03")
    page = catalog.index(sort_by="display_name.asc")
    expected = ["centos", "Debian", "p0", "Ubuntu", "ubuntu", "z", "_", "É", "é0"]
    assert [image["display_name"] for image in page.images] == expected
    page = catalog.index(sort_by="display_name.desc")
    assert [image["display_name"] for image in page.images] == expected[::-1]


def test_a_test_for_null_that_is_repeated_is_asked_once():
    """A query of many equal tests must not cost more than one."""
    assert len(wmi.filter_conditions({"filter": ["root_device.nil"] * 500})) == 1


@pytest.mark.parametrize("field", wmi.VERSIONS["12.03"].fields)
def test_every_field_can_be_asked_for_null(generated, field):
    """FIELD.nil and FIELD.not_nil share out all images; description is null where it is shown as ''."""
    storage, records = generated
    catalog = wmi.Catalog(storage, None, "12.03")
    nil, not_nil = (ids(catalog.index(limit=1000, filter=f"{field}.{test}")) for test in ("nil", "not_nil"))
    assert len(nil) + len(not_nil) == len(records)
    assert set(nil) == {record["id"] for record in records if record.get(field, "") is None}


@pytest.mark.parametrize("field", ["created", "deleted"])
def test_time_filters_are_inclusive(field):
    """To the second, with offsets and fractions; what has no such time is not between anything."""
    moments = [f"2012-01-01T00:00:0{second}Z" for second in range(3)]
    images = [
        {"id": f"wmi-{second}", "account_id": ME, "created_at": moment, **DELETED, "deleted_at": moment}
        for second, moment in enumerate(moments)
    ]
    images.append({"id": "wmi-alive", "account_id": ME, "created_at": "2012-06-01T00:00:00Z"})
    catalog = wmi.Catalog(filled(images), ME, "12.03")
    alive = ["wmi-alive"] if field == "created" else []
    for since, until, expected in [
        ("2012-01-01T00:00:01Z", None, [*alive, "wmi-2", "wmi-1"]),
        ("2012-01-01T09:00:01+09:00", None, [*alive, "wmi-2", "wmi-1"]),
        ("2012-01-01T00:00:00.5Z", None, [*alive, "wmi-2", "wmi-1"]),
        (None, "2012-01-01T00:00:01Z", ["wmi-1", "wmi-0"]),
        (None, "2012-01-01T00:00:01.999999Z", ["wmi-1", "wmi-0"]),
        (None, "2011-12-31T20:00:01-0400", ["wmi-1", "wmi-0"]),
        ("2012-01-01T00:00:01Z", "2012-01-01T00:00:01Z", ["wmi-1"]),
        ("2012-01-01", "2012-01-02", ["wmi-2", "wmi-1", "wmi-0"]),
        ("2012-01-01T00:00:03Z", "2012-01-01T00:00:04Z", []),
        ("0001-01-01", "9999-12-31T23:59:59Z", [*alive, "wmi-2", "wmi-1", "wmi-0"]),
    ]:
        filters = {f"{field}_since": since, f"{field}_until": until}
        given = {name: value for name, value in filters.items() if value}
        assert ids(catalog.index(**given)) == expected, given


@pytest.mark.parametrize("version", OLDER)
@pytest.mark.parametrize("name", wmi.VERSIONS["12.03"].filters)
def test_the_older_versions_have_no_filters(storage, version, name):
    """A program that asks for one is told, instead of getting what it did not ask for."""
    with pytest.raises(wmi.InvalidParameter, match=f"^{name}$"):
        wmi.Catalog(storage, ME, version).index(**{name: "true"})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("is_public", ["yes", "TRUE", 2, None, [], "nil"]),
        ("service_type", ["web", "STD", "", None, 1, True]),
        ("state", ["gone", "init", "", None, True, ["alive"]]),
        ("created_since", ["yesterday", "", None, 1322033760, True, []]),
        ("created_until", ["2012-13-01", "", None]),
        ("deleted_since", ["2012-01-01T25:00:00Z", "", None]),
        ("deleted_until", ["x", "", None]),
        ("sort_by", ["id", "id.up", "nope.asc", "md5sum.asc", "", None, "id.asc ", 1, ["id.asc"]]),
        ("filter", ["id", "nope.nil", "source.nil", "id.null", "", None, 1, ["id"], ["id.nil", "x"],
                    [["id.nil"]], [None], [""], {"id.nil": 1}, ("id.nil",)]),
        ("account_id", [ME]),
        ("nope", ["x", None]),
    ],
)
def test_unknown_filters_and_values_are_refused(storage, name, values):
    """The message is the parameter's name, or names it."""
    for value in values:
        with pytest.raises(wmi.InvalidParameter, match=f"^{name}"):
            wmi.Catalog(storage, ME, "12.03").index(**{name: value})


def test_a_range_that_is_backwards_is_refused(storage):
    """In the originals' words."""
    for field in ("created", "deleted"):
        with pytest.raises(wmi.InvalidParameter, match=f"^{field}_since is larger than {field}_until$"):
            wmi.Catalog(storage, ME, "12.03").index(
                **{f"{field}_since": "2012-01-01T00:00:01Z", f"{field}_until": "2012-01-01"}
            )


def test_sorting_has_a_limit(monkeypatch):
    """What must be held in memory is bounded; a page that ends beyond is refused by its limit."""
    monkeypatch.setattr(wmi, "SORTED_AT_MOST", 50)
    catalog = wmi.Catalog(filled({"id": f"wmi-{number}", "account_id": ME} for number in range(80)), ME,
                          "12.03")
    page = catalog.index(20, 30, sort_by="uuid.desc")
    assert (page.total, len(ids(page))) == (80, 30)
    refused = [(21, 30, "limit"), (0, 51, "limit"), (49, 2, "limit"), (50, 1, "start"), (50, None, "start")]
    for start, limit, name in refused:
        with pytest.raises(wmi.InvalidParameter, match=f"^{name}$"):
            catalog.index(start, limit, sort_by="uuid.desc")


# ---- what is asked of a store, and how much of it is held ----


class Watched:
    """A store of so many equal images that are made as they are asked for; it notes what is asked."""

    def __init__(self, count):
        self.count, self.asked, self.walked = count, [], 0
        self.template = wmi.image_record({"account_id": ME})

    def get(self, id):
        return {**self.template, "id": id, "description": "x" * 3000 + id}

    def page(self, account, start, limit, *, public=True, deleted=False):
        self.asked.append(("page", account, start, limit, public, deleted))
        return self.count, [self.get(f"wmi-{number}") for number in range(self.count)[start : start + limit]]

    def walk(self, account=None, *, public=True, deleted=None, start=0, oldest_first=False, frozen=False):
        self.asked.append(("walk", account, start, None, public, deleted))
        for number in range(start, self.count):
            self.walked += 1
            yield self.get(f"wmi-{number}")


@pytest.mark.parametrize(
    ("version", "filters", "public", "deleted"),
    [
        ("document", {}, True, False),
        ("11.12", {}, True, False),
        ("12.03", {}, False, None),
        ("12.03", {"is_public": "true"}, True, None),
        ("12.03", {"state": "deleted"}, False, True),
        ("12.03", {"state": "alive"}, False, False),
        ("12.03", {"state": "alive_with_deleted", "is_public": True}, True, None),
    ],
)
def test_what_an_index_can_answer_is_one_page(version, filters, public, deleted):
    """Owner, public and deleted are the store's own: nothing is walked for them."""
    storage = Watched(100_000)
    page = wmi.Catalog(storage, ME, version).index(50_000, 20, **filters)
    assert (page.total, len(page.images)) == (100_000, 20)
    assert storage.asked == [("page", ME, 50_000, 20, public, deleted)]


SCANNED = [{"service_type": "std"}, {"state": "available"}, {"filter": "deleted_at.nil"}]


@pytest.mark.parametrize("filters", SCANNED)
def test_other_filters_walk_the_smallest_scope(filters):
    """Own images only, and only those that are alive where that is asked for."""
    storage = Watched(10)
    list(wmi.Catalog(storage, ME, "12.03").index(**filters).images)
    deleted = False if filters.get("state") == "available" else None
    assert set(storage.asked) == {("walk", ME, 0, None, False, deleted)}


def test_an_unlimited_list_is_read_as_it_is_consumed():
    """Beyond the first piece images are taken from the store one by one."""
    storage = Watched(50_000)
    images = iter(wmi.Catalog(storage, ME).index().images)
    assert len(list(itertools.islice(images, 1500))) == 1500
    assert storage.walked <= 1501


@pytest.mark.parametrize(
    ("version", "limit", "filters"),
    [
        ("document", None, {}),
        ("12.03", 10**9, {}),
        ("12.03", 10**9, {"service_type": "std"}),
        ("12.03", 10, {"sort_by": "created_at.desc"}),
        ("12.03", 10_000, {"sort_by": "uuid.asc"}),
    ],
)
def test_long_lists_are_walked_in_bounded_memory(version, limit, filters):
    """40 MB of images pass through less than 12."""
    tracemalloc = pytest.importorskip("tracemalloc", reason="this Python does not count allocations")
    storage = Watched(10_000)
    tracemalloc.start()
    try:
        page = wmi.Catalog(storage, ME, version).index(0, limit, **filters)
        count = sum(1 for _ in page.images)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (page.total, count) == (10_000, min(limit or 10_000, 10_000))
    assert peak < 12 << 20


# ---- a store that fails ----


class Failing:
    """A store whose every verb raises; after some images where it is walked."""

    def __init__(self, error):
        self.error = error

    def fail(self, *arguments, **named):
        raise self.error

    get = add = replace = fail

    def page(self, account, start, limit, *, public=True, deleted=False):
        if limit < wmi.PAGE_AT_ONCE:
            raise self.error
        return 5000, [wmi.image_record({"account_id": ME})]

    def walk(self, account=None, *, public=True, deleted=None, start=0, oldest_first=False, frozen=False):
        yield wmi.image_record({"account_id": ME})
        raise self.error


FAILURES = [OSError(28, "No space left on device"), ValueError("the store is closed"), PermissionError("x"),
            TimeoutError()]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        lambda catalog: catalog.show("wmi-a"),
        lambda catalog: catalog.destroy("wmi-a"),
        lambda catalog: catalog.update("wmi-a", display_name="x"),
        lambda catalog: catalog.modify("wmi-a", arch="x86"),
        lambda catalog: catalog.register({"account_id": ME}),
        lambda catalog: catalog.index(0, 20),
        lambda catalog: catalog.index(0, 20, service_type="std"),
        lambda catalog: catalog.index(0, 20, sort_by="id.asc"),
        lambda catalog: list(catalog.index(0, 5000).images),
        lambda catalog: list(catalog.images()),
    ],
    ids=["show", "destroy", "update", "modify", "register", "page", "filter", "sort", "stream", "images"],
)
def test_what_a_store_raises_becomes_a_database_error(call, error):
    """503, code 110; the message gives nothing away, the cause is kept for the log."""
    with pytest.raises(wmi.DatabaseError, match="^the store cannot answer$") as caught:
        call(wmi.Catalog(Failing(error), version="12.03"))
    assert caught.value.__cause__ is error
    assert (caught.value.status, caught.value.code) == (503, "110")


@pytest.mark.parametrize("filters", [{"service_type": "std"}, {"sort_by": "id.asc"}], ids=["filter", "sort"])
def test_a_store_that_fails_while_the_images_are_yielded(storage, filters):
    """The same where they have been counted or sorted, and are then read once more."""
    page = wmi.Catalog(storage, ME, "12.03").index(0, 20, **filters)
    storage.close()
    with pytest.raises(wmi.DatabaseError):
        list(page.images)


def test_absent_and_existing_are_no_failures():
    """A store's KeyError is an unknown image, its FileExistsError a duplicate."""
    catalog = wmi.Catalog(Failing(KeyError("wmi-a")), version="12.03")
    for call in (catalog.show, catalog.destroy, catalog.update, catalog.modify):
        with pytest.raises(wmi.UnknownUUIDResource, match="^wmi-a$"):
            call("wmi-a")
    with pytest.raises(wmi.DuplicateUUID, match="wmi-a is registered already"):
        wmi.Catalog(Failing(FileExistsError("wmi-a"))).register({"id": "wmi-a", "account_id": ME})


def test_an_error_of_the_rules_is_not_taken_for_the_stores(storage):
    """What is raised while a record is changed comes through as it is."""
    with contextlib.closing(storage):
        assert outcome(wmi.Catalog(storage, VISITOR).destroy, "wmi-mypublic") is wmi.OperationNotPermitted
    assert outcome(wmi.Catalog(storage, ME).destroy, "wmi-mypublic") is wmi.DatabaseError


def test_a_sorted_list_shows_nothing_that_has_become_private():
    """The images are read one by one after they were sorted; what was hidden or deleted since is left out."""
    with filled({"id": f"wmi-{n}", "account_id": ME, "is_public": True} for n in range(4)) as storage:
        page = wmi.Catalog(storage, "a-other", "12.03").index(is_public=True, sort_by="uuid.asc")
        storage.replace("wmi-1", lambda record: {**record, "is_public": False, "description": "secret"})
        storage.delete("wmi-2")
        assert [shown["id"] for shown in page.images] == ["wmi-0", "wmi-3"]


def test_a_sorted_list_shows_an_id_of_another_form_too():
    """Another program may have put it into the store; lists that are not sorted show it as well."""
    with filled([{"id": "wmi-1", "account_id": ME}]) as storage:
        storage.add({**storage.get("wmi-1"), "id": "old-2"})
        for options in ({}, {"sort_by": "uuid.asc"}):
            assert sorted(ids(wmi.Catalog(storage, ME, "12.03").index(**options))) == ["old-2", "wmi-1"]
