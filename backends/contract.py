"""What every store must do, as tests that third parties can run on their own stores.

    import unittest
    from wmi.contract import StorageContract        # or: from wmi_backends.contract import …
    from my_store import open_storage

    class MyStore(StorageContract, unittest.TestCase):
        opener = staticmethod(open_storage)
        shared = True                   # False: each opening makes a store of its own

        def setUp(self):
            self.location = …           # a fresh one for each test

The tests run with `python -m unittest` and with pytest, and need only the standard library. If a store is shared, the
tests also open it twice, and in other processes. These import the opener by its module and name.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Base = unittest.TestCase
else:
    Base = object  # a mixin, which test runners do not collect by itself

Record = dict[str, Any]
ALICE, BOB, CAROL = "a-00000001", "a-00000002", "a-00000003"
TIME = "2013-01-01T00:00:00Z"
HOSTILE = (
    "", " ", "'", '"', "\\", "'; DROP TABLE image; --", "%", "_", "*", "?", "{}", "$.id", "null",
    "line\nbreak", "carriage\rreturn", "tab\t", "nul\0inside", "\0", "\x1b[31m", "\x7f", "\x85",
    "\u2028 and \u2029", "é", "e\u0301", "ß", "\U0001f600", "\ufeff", "\uffff", "٣", "long " * 5000,
)
PROCESSES, THREADS = 4, 8


def image(number: int, account: str = ALICE, **fields: Any) -> Record:
    """Return a record as the catalog would make it."""
    return {
        "id": f"wmi-{number:08x}", "account_id": account, "created_at": TIME, "updated_at": TIME,
        "source": {"type": "http", "uri": f"http://images.example/{number}"}, "arch": "x86_64",
        "is_public": False, "state": "available", "features": {"virtio": True},
        "deleted_at": None, **fields,
    }


def dead(record: Record) -> Record:
    """Return the record's tombstone."""
    return {**record, "deleted_at": TIME}


def ids(records: Iterable[Record]) -> list[str]:
    """Return the records' ids, in the same order."""
    return [record["id"] for record in records]


def belongs(record: Record, account: str | None, public: bool, deleted: bool | None) -> bool:
    """Return whether a record is in a scope: the rule that every store must follow."""
    seen = account is None or record["account_id"] == account or (public and record["is_public"])
    return bool(seen) and (deleted is None or (record["deleted_at"] is not None) == deleted)


SCOPES = [
    (account, public, deleted) for account in (None, ALICE, BOB, CAROL)
    for public in (True, False) for deleted in (None, True, False)
]


class StorageContract(Base):
    """The tests of the contract. A subclass sets how a store is opened, and whether it is shared."""

    opener: Callable[[str], Any]
    location: str = ""
    shared = False

    def open(self) -> Any:
        """Return a store; a second call in the same test returns another object at the same location."""
        store = self.opener(self.location)
        self.addCleanup(store.close)
        return store

    # ---- one record ----

    def test_get_returns_what_was_added(self) -> None:
        """A record comes back with all its fields, in their order."""
        store = self.open()
        store.add(image(1))
        self.assertEqual(store.get("wmi-00000001"), image(1))
        self.assertEqual(list(store.get("wmi-00000001")), list(image(1)))

    def test_get_of_an_absent_id_is_a_key_error(self) -> None:
        """The exception carries the id."""
        store = self.open()
        store.add(image(1))
        for id in ("wmi-00000002", "", "wmi", "WMI-00000001", "wmi-00000001 ", "%", "'"):
            with self.assertRaises(KeyError) as caught:
                store.get(id)
            self.assertEqual(caught.exception.args, (id,))

    def test_unknown_fields_are_kept(self) -> None:
        """A store keeps every type of JSON, nested, in fields that it does not know."""
        strange: dict[str, Any] = {
            "z": [1, -1, 0, 2**53 + 1, 10**30, 0.1, -1e-300, 1e300], "a": None, "t": [True, False],
            "": {"": {"": []}}, "deep": [[[[[[{"x": [None]}]]]]]], "serial": 7, "record": "{}",
        }
        store = self.open()
        store.add(image(1, **strange))
        got = store.get("wmi-00000001")
        self.assertEqual(got, image(1, **strange))
        self.assertEqual(json.dumps(got), json.dumps(image(1, **strange)))

    def test_hostile_texts_are_kept(self) -> None:
        """No text harms a store, and the store changes none, neither as a value nor as a key."""
        store = self.open()
        for n, text in enumerate(HOSTILE):
            store.add(image(n, description=text, extra={text: [text]}))
        for n, text in enumerate(HOSTILE):
            self.assertEqual(store.get(f"wmi-{n:08x}"), image(n, description=text, extra={text: [text]}))

    def test_hostile_ids_are_told_apart(self) -> None:
        """An id is compared exactly, and never taken as a pattern, a number or a path."""
        store = self.open()
        store.add_all(image(0, id=text) for text in HOSTILE)
        for text in HOSTILE:
            self.assertEqual(store.get(text)["id"], text)
        store.delete("%")
        self.assertEqual(store.page(None, 0, 0)[0], len(HOSTILE) - 1)

    def test_hostile_accounts_are_told_apart(self) -> None:
        """An account is compared exactly; the empty one is not everybody."""
        store = self.open()
        store.add_all(image(n, text) for n, text in enumerate(HOSTILE))
        for n, text in enumerate(HOSTILE):
            for public in (True, False):
                total, page = store.page(text, 0, 9, public=public)
                self.assertEqual((total, ids(page)), (1, [f"wmi-{n:08x}"]))

    def test_text_that_is_not_unicode_is_refused(self) -> None:
        """A lone surrogate is a ValueError, and nothing is stored."""
        store = self.open()
        for fields in ({"description": "\ud800"}, {"\udfff": 1}, {"extra": ["\udc80"]}):
            with self.assertRaises(ValueError):
                store.add(image(1, **fields))
            with self.assertRaises(ValueError):
                store.add_all([image(2), image(1, **fields)])
        self.assertEqual(store.page(None, 0, 9), (0, []))

    def test_what_is_not_json_is_refused(self) -> None:
        """NaN, infinity and objects are errors, and nothing is stored."""
        store = self.open()
        store.add(image(9))
        for value in (float("nan"), float("inf"), {1, 2}, object(), b"bytes"):
            with self.assertRaises((ValueError, TypeError)):
                store.add(image(1, extra=value))
            with self.assertRaises((ValueError, TypeError)):
                store.replace("wmi-00000009", lambda record, value=value: {**record, "x": value})
        self.assertEqual(list(store.walk()), [image(9)])

    def test_a_record_added_is_a_copy(self) -> None:
        """What the caller does with its record later does not reach the store."""
        store, record = self.open(), image(1)
        store.add(record)
        record["features"]["virtio"] = False
        record["state"] = "changed"
        self.assertEqual(store.get("wmi-00000001"), image(1))

    def test_a_record_returned_is_a_copy(self) -> None:
        """What the caller does with an answer does not reach the store."""
        store = self.open()
        store.add(image(1))
        answers: list[Callable[[], Record]] = [
            lambda: store.get("wmi-00000001"), lambda: store.page(None, 0, 1)[1][0],
            lambda: next(store.walk()), lambda: next(store.walk(frozen=True)),
            lambda: store.replace("wmi-00000001", lambda record: record),
        ]
        for answer in answers:
            got = answer()
            got["features"]["virtio"] = False
            got.clear()
            self.assertEqual(answer(), image(1))

    # ---- add, replace, delete ----

    def test_an_id_is_added_once(self) -> None:
        """Adding it again raises FileExistsError(id), and the first record stays as it is."""
        store = self.open()
        store.add(image(1))
        with self.assertRaises(FileExistsError) as caught:
            store.add(image(1, BOB))
        self.assertEqual(caught.exception.args, ("wmi-00000001",))
        self.assertEqual(list(store.walk()), [image(1)])

    def test_a_tombstone_is_present(self) -> None:
        """A record with a deleted_at can be read, changed and walked like any other."""
        store = self.open()
        store.add(dead(image(1)))
        self.assertEqual(store.get("wmi-00000001"), dead(image(1)))
        store.replace("wmi-00000001", lambda record: {**record, "state": "gone"})
        self.assertEqual(next(store.walk())["state"], "gone")

    def test_a_tombstone_gives_its_id_free(self) -> None:
        """A new record may take the id; the tombstone is gone, and the record is the newest."""
        store = self.open()
        store.add_all([image(1), dead(image(2)), image(3)])
        store.add(image(2, BOB))
        self.assertEqual(ids(store.walk()), ["wmi-00000002", "wmi-00000003", "wmi-00000001"])
        self.assertEqual(store.get("wmi-00000002"), image(2, BOB))
        with self.assertRaises(FileExistsError):
            store.add(image(2))

    def test_a_deleted_record_is_gone(self) -> None:
        """It is absent for every method, and its id is free."""
        store = self.open()
        store.add_all([image(1), image(2)])
        self.assertIsNone(store.delete("wmi-00000001"))
        for verb in (store.get, store.delete, lambda id: store.replace(id, dead)):
            with self.assertRaises(KeyError) as caught:
                verb("wmi-00000001")
            self.assertEqual(caught.exception.args, ("wmi-00000001",))
        self.assertEqual(store.page(None, 0, 9), (1, [image(2)]))
        store.add(image(1))
        self.assertEqual(ids(store.walk()), ["wmi-00000001", "wmi-00000002"])

    def test_a_tombstone_can_be_deleted(self) -> None:
        """Nothing is left of it."""
        store = self.open()
        store.add(dead(image(1)))
        store.delete("wmi-00000001")
        self.assertEqual(store.page(None, 0, 9, deleted=None), (0, []))

    def test_replace_puts_what_change_returns(self) -> None:
        """The new record is stored and returned; its place in the order stays the same."""
        store = self.open()
        store.add_all(image(n) for n in range(3))
        new = image(1, BOB, state="changed", extra=[1])
        self.assertEqual(store.replace("wmi-00000001", lambda record: new), new)
        self.assertEqual(list(store.walk(oldest_first=True)), [image(0), new, image(2)])

    def test_replace_gives_change_a_copy(self) -> None:
        """`change` gets a copy of the record; altering this copy has no effect unless it is returned."""
        store, seen = self.open(), []
        store.add(image(1))

        def change(record: Record) -> Record:
            seen.append(json.loads(json.dumps(record)))
            record["features"].clear()
            return image(1, state="changed")

        store.replace("wmi-00000001", change)
        self.assertEqual(seen[-1], image(1))
        self.assertEqual(store.get("wmi-00000001"), image(1, state="changed"))

    def test_replace_of_an_absent_id_calls_nothing(self) -> None:
        """It raises KeyError(id) before `change` is called."""
        with self.assertRaises(KeyError) as caught:
            self.open().replace("wmi-00000001", self.fail)
        self.assertEqual(caught.exception.args, ("wmi-00000001",))

    def test_replace_that_raises_changes_nothing(self) -> None:
        """The exception that `change` raises reaches the caller as it is, whatever its class."""
        store = self.open()
        store.add(image(1))
        for error in (RuntimeError("x"), KeyError("x"), OSError("x"), KeyboardInterrupt()):
            def change(record: Record, error: BaseException = error) -> Record:
                record["state"] = "changed"
                raise error

            with self.assertRaises(type(error)) as caught:
                store.replace("wmi-00000001", change)
            self.assertIs(caught.exception, error)
        self.assertEqual(list(store.walk()), [image(1)])
        store.add(image(2))

    def test_replace_keeps_the_id(self) -> None:
        """A record with another id is a ValueError, and nothing is changed."""
        store = self.open()
        store.add(image(1))
        with self.assertRaises(ValueError):
            store.replace("wmi-00000001", lambda record: {**record, "id": "wmi-00000002"})
        self.assertEqual(list(store.walk()), [image(1)])

    def test_replace_may_read_the_store(self) -> None:
        """`change` may call get() and page() of the same store."""
        store = self.open()
        store.add_all([image(1), image(2, state="special")])
        got = store.replace("wmi-00000001", lambda record: {
            **record, "state": store.get("wmi-00000002")["state"], "n": store.page(None, 0, 0)[0]})
        self.assertEqual((got["state"], got["n"]), ("special", 2))

    def test_replace_moves_between_scopes(self) -> None:
        """A change of owner, is_public or deleted_at shows in pages and totals at once."""
        store, chance = self.open(), random.Random(0)
        store.add_all(image(n) for n in range(3))
        for fields in ({"is_public": True}, {"account_id": BOB}, {"deleted_at": TIME},
                       {"is_public": False}, {"deleted_at": None}, {"account_id": ALICE}):
            store.replace("wmi-00000001",
                          lambda record, fields=fields: {**record, **fields})
            self.compare(store, list(store.walk(oldest_first=True)), chance)

    # ---- order ----

    def test_order_is_that_of_registration(self) -> None:
        """Neither a clock that steps back nor the order of the ids matters."""
        store = self.open()
        for n in (5, 3, 9, 1):
            store.add(image(n, created_at=f"201{9 - n}-01-01T00:00:00Z"))
        self.assertEqual([int(id[4:], 16) for id in ids(store.walk())], [1, 9, 3, 5])

    def test_order_survives_deletion(self) -> None:
        """After the newest record is deleted, the next one to be added is still the newest."""
        store = self.open()
        store.add_all(image(n) for n in range(3))
        store.delete("wmi-00000002")
        store.add(image(7))
        store.delete("wmi-00000001")
        store.add(image(5))
        self.assertEqual([int(id[4:], 16) for id in ids(store.walk())], [5, 7, 0])

    # ---- pages ----

    def test_an_empty_store_has_an_empty_page(self) -> None:
        """It has a total of 0 and no records, for every scope."""
        self.compare(self.open(), [])

    def test_a_page_is_newest_first(self) -> None:
        """Start and limit select from the scope; the total is that of the whole scope."""
        store = self.open()
        store.add_all(image(n) for n in range(10))
        self.assertEqual(store.page(ALICE, 0, 3), (10, [image(9), image(8), image(7)]))
        self.assertEqual(store.page(ALICE, 8, 3), (10, [image(1), image(0)]))

    def test_a_page_beyond_the_end_is_empty(self) -> None:
        """The total is still that of the scope; start and limit may be arbitrarily large."""
        store = self.open()
        store.add_all(image(n) for n in range(3))
        for start, limit in ((3, 1), (4, 0), (0, 0), (10**30, 1), (2**63, 2**63)):
            self.assertEqual(store.page(ALICE, start, limit), (3, []))
        self.assertEqual(len(store.page(ALICE, 1, 10**30)[1]), 2)

    def test_negative_numbers_are_refused(self) -> None:
        """They raise ValueError; a walk does so before its first record."""
        store = self.open()
        store.add(image(1))
        for start, limit in ((-1, 1), (0, -1), (-(10**30), 0)):
            with self.assertRaises(ValueError):
                store.page(ALICE, start, limit)
        for frozen in (True, False):
            with self.assertRaises(ValueError):
                list(store.walk(start=-1, frozen=frozen))

    def test_a_scope_is_own_and_public_once(self) -> None:
        """A public image of the account is listed once; `public=False` leaves out those of others."""
        store = self.open()
        store.add_all([image(1), image(2, is_public=True), image(3, BOB), image(4, BOB, is_public=True)])
        self.assertEqual(ids(store.page(ALICE, 0, 9)[1]), ["wmi-00000004", "wmi-00000002", "wmi-00000001"])
        self.assertEqual(ids(store.page(ALICE, 0, 9, public=False)[1]), ["wmi-00000002", "wmi-00000001"])
        self.assertEqual(ids(store.page(CAROL, 0, 9)[1]), ["wmi-00000004", "wmi-00000002"])
        self.assertEqual(store.page(None, 0, 0)[0], 4)

    def test_tombstones_are_left_out_of_pages(self) -> None:
        """This is the default; `deleted` asks for tombstones alone, or for both."""
        store = self.open()
        store.add_all([image(1), dead(image(2))])
        self.assertEqual(ids(store.page(ALICE, 0, 9)[1]), ["wmi-00000001"])
        self.assertEqual(ids(store.page(ALICE, 0, 9, deleted=True)[1]), ["wmi-00000002"])
        self.assertEqual(store.page(ALICE, 0, 9, deleted=None)[0], 2)
        self.assertEqual(ids(store.walk()), ["wmi-00000002", "wmi-00000001"])

    def test_random_operations_agree_with_a_list(self) -> None:
        """After any sequence of calls, every scope, start and limit gives the same as a plain list would."""
        for seed in range(3):
            with self.subTest(seed=seed):
                self.operate(random.Random(seed))

    def operate(self, chance: random.Random) -> None:
        store = self.open()
        model: list[Record] = []  # in order of registration
        for record in list(store.walk()):  # a shared location has the last seed's records
            store.delete(record["id"])
        for _ in range(6):
            for _ in range(15):
                self.step(store, model, chance)
            self.compare(store, model, chance)
        self.assertEqual(list(store.check()), [])

    def step(self, store: Any, model: list[Record], chance: random.Random) -> None:
        """Do one random thing to the store and to the model."""
        new = image(
            chance.randrange(40), chance.choice([ALICE, BOB, CAROL]), is_public=chance.random() < .4,
            deleted_at=TIME if chance.random() < .3 else None,
        )
        old = next((record for record in model if record["id"] == new["id"]), None)
        if old is None or (old["deleted_at"] and chance.random() < 0.5):
            store.add(new) if chance.random() < 0.5 else store.add_all([new])
            model[:] = [record for record in model if record is not old] + [new]
        elif chance.random() < 0.7:
            store.replace(new["id"], lambda record: new)
            model[model.index(old)] = new
        else:
            store.delete(new["id"])
            model.remove(old)

    def compare(self, store: Any, model: list[Record], chance: random.Random | None = None) -> None:
        """Compare pages and walks of every scope with the model, from several starts, or two of them by `chance`."""
        for account, public, deleted in SCOPES:
            scope = {"public": public, "deleted": deleted}
            want = [r for r in reversed(model) if belongs(r, account, public, deleted)]
            starts = [0, 1, 7, len(want) // 2, max(0, len(want) - 1), len(want)]
            for start in chance.sample(starts, 2) if chance else set(starts):
                for limit in (0, 1, 3, 1000):
                    self.assertEqual(store.page(account, start, limit, **scope),
                                     (len(want), want[start:start + limit]))
                self.assertEqual(list(store.walk(account, start=start, **scope)), want[start:])
                self.assertEqual(list(store.walk(account, start=start, oldest_first=True, **scope)), want[::-1][start:])
            self.assertEqual(list(store.walk(account, frozen=True, **scope)), want)

    def test_many_records_page_as_they_walk(self) -> None:
        """Pages put together are the same as the walk, even in a store that counts by blocks of serials."""
        store = self.open()
        store.add_all(image(n, BOB if n % 3 else ALICE, is_public=n % 5 == 0) for n in range(700))
        for n in range(0, 700, 7):
            store.delete(f"wmi-{n:08x}")
        want = ids(store.walk(ALICE))
        got = [id for start in range(0, len(want), 40) for id in ids(store.page(ALICE, start, 40, deleted=None)[1])]
        self.assertEqual(got, want)
        for start in range(0, len(want), 13):
            self.assertEqual(ids(store.page(ALICE, start, 1)[1]), want[start : start + 1])

    # ---- walks ----

    def test_a_walk_goes_both_ways(self) -> None:
        """The newest or the oldest comes first; `start` skips records at the end where the walk begins."""
        store = self.open()
        store.add_all(image(n) for n in range(5))
        for frozen in (True, False):
            self.assertEqual(list(store.walk(frozen=frozen, start=3)), [image(1), image(0)])
            self.assertEqual(list(store.walk(frozen=frozen, start=3, oldest_first=True)), [image(3), image(4)])

    def test_a_walk_under_change_keeps_its_promise(self) -> None:
        """No record comes twice, and none that stayed the same is left out."""
        self.disturb(oldest_first=False)

    def test_a_walk_from_the_oldest_under_change_keeps_its_promise(self) -> None:
        """It may yield what is added while it runs, and promises the same."""
        self.disturb(oldest_first=True)

    def disturb(self, oldest_first: bool) -> None:
        store = self.open()
        store.add_all(image(n, deleted_at=TIME if n % 4 == 1 else None) for n in range(1200))
        seen = []
        for turn, record in enumerate(store.walk(oldest_first=oldest_first)):
            seen.append(record["id"])
            if turn % 50 == 0:
                n = turn // 50 * 4
                store.replace(f"wmi-{n:08x}", dead)
                store.add(image(n + 1))  # over its tombstone: it is the newest now
                store.delete(f"wmi-{n + 2:08x}")
                store.add(image(n + 5000))
        self.assertEqual(len(seen), len(set(seen)))
        same = {f"wmi-{n:08x}" for n in range(1200) if n % 4 == 3 or n >= 120}
        self.assertEqual(same - set(seen), set())

    def test_a_frozen_walk_is_of_one_revision(self) -> None:
        """Changes that are made after its first record do not show in it, and do not have to wait for it."""
        store = self.open()
        store.add_all(image(n) for n in range(600))
        for oldest_first in (True, False):
            want = list(store.walk(oldest_first=oldest_first))
            walk = store.walk(oldest_first=oldest_first, frozen=True)
            got = [next(walk)]
            store.replace("wmi-00000100", lambda record: {**record, "state": "changed"})
            store.delete(want[300]["id"])
            store.add(image(1000 + oldest_first))
            self.assertEqual(got + list(walk), want)

    def test_a_walk_left_alone_holds_nothing(self) -> None:
        """After one record of a walk, the store takes changes as before."""
        store = self.open()
        store.add_all(image(n) for n in range(5))
        for frozen in (True, False):
            walk = store.walk(frozen=frozen)
            next(walk)
            store.add(image(10 + frozen))
            store.delete("wmi-00000000" if frozen else "wmi-00000001")
            getattr(walk, "close", list)()
            del walk
        self.assertEqual(store.page(None, 0, 0)[0], 5)

    def test_large_records_walk_as_they_page(self) -> None:
        """Records of very different sizes come once each, in both directions."""
        store = self.open()
        records = [image(n, description="x" * (n * n * 997 % 60_000)) for n in range(60)]
        store.add_all(records)
        self.assertEqual(list(store.walk(oldest_first=True)), records)
        self.assertEqual(list(store.walk(start=7)), records[-8::-1])
        self.assertEqual(store.page(None, 0, 99), (60, records[::-1]))

    # ---- revisions ----

    def test_a_revision_stays_while_nothing_changes(self) -> None:
        """Calls that read and calls that fail do not change it."""
        store = self.open()
        store.add(image(1))
        revision = store.revision()
        self.assertIsInstance(revision, str)
        list(store.walk(frozen=True)), list(store.check()), store.page(None, 0, 1)
        failing: list[Callable[[], object]] = [
            lambda: store.add(image(1)), lambda: store.delete("x"),
            lambda: store.replace("wmi-00000001", lambda record: record["absent"]),
            lambda: store.add_all([image(2), image(1)]),
        ]
        for verb in failing:
            with self.assertRaises((KeyError, FileExistsError)):
                verb()
        self.assertEqual(store.revision(), revision)

    def test_every_change_changes_the_revision(self) -> None:
        """Each method that changes something makes a new revision. None ever returns, even if the content does."""
        store = self.open()
        seen = [store.revision()]
        changes: list[Callable[[], object]] = [
            lambda: store.add(image(1)), lambda: store.delete("wmi-00000001"),
            lambda: store.add_all([image(1)]), lambda: store.replace("wmi-00000001", dead),
            lambda: store.delete("wmi-00000001"),
        ]
        for _ in range(3):
            for verb in changes:
                verb()
                seen.append(store.revision())
        self.assertEqual(len(seen), len(set(seen)))

    def test_changes_within_one_tick_have_their_revisions(self) -> None:
        """However fast the changes come, each has its own revision, even if all sizes stay the same."""
        store = self.open()
        store.add(image(1))
        seen = [store.revision()]
        for n in range(200):
            store.replace("wmi-00000001", lambda record, n=n: {**record, "ordinal": n % 10})
            seen.append(store.revision())
        self.assertEqual(len(seen), len(set(seen)))

    def test_reads_at_least_as_new_as_a_revision(self) -> None:
        """Every method that reads shows all that was done before the revision was taken."""
        store = self.open()
        others = [store, self.open()] if self.shared else [store]
        for n in range(20):
            store.add(image(n, n=0))
            store.replace(f"wmi-{n:08x}", lambda record, n=n: {**record, "n": n})
            for other in others:
                view = other.at_least(other.revision())
                self.assertEqual(view.get(f"wmi-{n:08x}"), image(n, n=n))
                self.assertEqual(view.page(None, 0, 1), (n + 1, [image(n, n=n)]))
                self.assertEqual([r["n"] for r in view.walk(oldest_first=True)], list(range(n + 1)))
        revision = store.revision()
        store.close()
        with self.assertRaisesRegex(ValueError, "closed"):
            store.at_least(revision).get("wmi-00000001")

    # ---- all or nothing ----

    def test_add_all_keeps_the_order(self) -> None:
        """The last record is the newest; the number of records is returned, and may be 0."""
        store = self.open()
        self.assertEqual(store.add_all(image(n) for n in (3, 1, 2)), 3)
        self.assertEqual([r["id"][-1] for r in store.walk()], ["2", "1", "3"])
        self.assertEqual(store.add_all([]), 0)
        self.assertEqual(store.page(None, 0, 0)[0], 3)

    def test_add_all_undoes_everything_when_its_source_fails(self) -> None:
        """The exception that the iterable raises reaches the caller as it is."""
        store = self.open()
        store.add_all([image(100), dead(image(101))])
        for error in (RuntimeError("x"), FileExistsError("x"), OSError(5, "x"), SystemExit()):
            def source(error: BaseException = error) -> Iterator[Record]:
                yield from (image(n) for n in range(50))
                yield image(101)
                raise error

            with self.assertRaises(type(error)) as caught:
                store.add_all(source())
            self.assertIs(caught.exception, error)
            self.assertEqual(list(store.walk()), [dead(image(101)), image(100)])
        store.add(image(1))

    def test_add_all_refuses_an_id_that_exists(self) -> None:
        """It raises FileExistsError(id), for an id of the store or a repeated one, and reads no further records."""
        store, pulled = self.open(), []
        store.add(image(5))

        def source(*numbers: int) -> Iterator[Record]:
            for n in numbers:
                pulled.append(n)
                yield image(n)

        for numbers, culprit in (((1, 2, 5, 6), 5), ((1, 2, 1, 6), 1)):
            pulled.clear()
            with self.assertRaises(FileExistsError) as caught:
                store.add_all(source(*numbers))
            self.assertEqual(caught.exception.args, (f"wmi-{culprit:08x}",))
            self.assertEqual(pulled, list(numbers[:3]))
            self.assertEqual(list(store.walk()), [image(5)])

    def test_add_all_takes_the_place_of_tombstones(self) -> None:
        """A tombstone may be in the store or among the records; each new record is the newest."""
        store = self.open()
        store.add_all([dead(image(1)), image(2)])
        store.add_all([dead(image(3)), image(1), image(3)])
        self.assertEqual(list(store.walk()), [image(3), image(1), image(2)])
        self.assertEqual(list(store.check()), [])

    def test_add_all_may_read_the_store(self) -> None:
        """A source may be a walk of the same store."""
        store = self.open()
        store.add_all(image(n) for n in range(300))
        store.add_all({**record, "id": "new-" + record["id"]} for record in store.walk())
        self.assertEqual(store.page(None, 0, 0)[0], 600)

    # ---- close ----

    def test_close_twice_is_harmless(self) -> None:
        """It may be called by hand, and again at the end of a with statement."""
        with self.open() as store:
            store.add(image(1))
            store.close()
        store.close()

    def test_a_closed_store_refuses_every_verb(self) -> None:
        """Every method raises ValueError, whose message contains "closed"."""
        store = self.open()
        store.add(image(1))
        store.close()
        verbs = (
            lambda: store.get("wmi-00000001"), lambda: store.add(image(2)), store.revision,
            lambda: store.add_all([image(2)]), lambda: store.replace("wmi-00000001", dead),
            lambda: store.delete("wmi-00000001"), lambda: store.page(None, 0, 1),
            lambda: list(store.walk()), lambda: list(store.walk(frozen=True)),
            lambda: list(store.check()),
        )
        for verb in verbs:
            with self.assertRaisesRegex(ValueError, "closed"):
                verb()

    def test_a_sound_store_has_no_faults(self) -> None:
        """`check` yields nothing, and a repair changes no record."""
        store = self.open()
        store.add_all(image(n, is_public=n % 2 == 0) for n in range(300))
        before = list(store.walk())
        self.assertEqual(list(store.check()) + list(store.check(repair=True)), [])
        self.assertEqual(list(store.walk()), before)
        self.compare(store, before[::-1])

    def test_a_repair_undoes_no_change(self) -> None:
        """A change that is made while `check` reads and repairs is not lost."""
        store, done = self.open(), threading.Event()
        store.add_all(image(n, n=0) for n in range(300))

        def change() -> None:
            try:
                for n in range(0, 30, 3):
                    store.replace(f"wmi-{n:08x}", lambda record: {**record, "n": 1})
                    store.delete(f"wmi-{n + 1:08x}")
                    store.add(image(1000 + n))
            finally:
                done.set()

        def check() -> None:
            while not done.wait(0.002):
                self.assertEqual(list(store.check(repair=True)), [])

        self.gather(change, check)
        want = [image(n, n=int(n < 30 and n % 3 == 0)) for n in range(300) if n >= 30 or n % 3 != 1]
        self.assertEqual(list(store.walk(oldest_first=True)), want + [image(1000 + n) for n in range(0, 30, 3)])

    # ---- threads ----

    def gather(self, *works: Callable[[], object]) -> None:
        """Run each work in a thread of its own, and raise the first exception of any."""
        errors: list[BaseException] = []

        def guarded(work: Callable[[], object]) -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def test_threads_lose_no_change(self) -> None:
        """Each read-modify-write is atomic."""
        store = self.open()
        store.add(image(1, n=0))

        def work() -> None:
            for _ in range(10):
                store.replace("wmi-00000001", lambda record: {**record, "n": record["n"] + 1})

        self.gather(*[work] * THREADS)
        self.assertEqual(store.get("wmi-00000001")["n"], 10 * THREADS)

    def test_threads_add_and_read_at_once(self) -> None:
        """No record is lost, and no page has a total that does not agree with its records."""
        store, done = self.open(), threading.Event()

        def write(first: int) -> None:
            for n in range(first, first + 15):
                store.add(image(n))
                if n % 3 == 0:
                    store.delete(f"wmi-{n:08x}")

        def read() -> None:
            while not done.wait(0.002):  # readers that never rest starve writers of the interpreter
                total, page = store.page(None, 0, 1000)
                self.assertEqual(total, len(page))
                walked = ids(store.walk())
                self.assertEqual(len(walked), len(set(walked)))

        def write_all() -> None:
            try:
                self.gather(*[lambda f=f: write(100 * f) for f in range(THREADS - 2)])
            finally:
                done.set()

        self.gather(write_all, read, read)
        want = {f"wmi-{100 * f + n:08x}" for f in range(THREADS - 2) for n in range(15) if (100 * f + n) % 3}
        self.assertEqual(set(ids(store.walk())), want)

    def test_one_thread_wins_an_id(self) -> None:
        """Of many threads that add the same id, all but one get FileExistsError."""
        store, wins = self.open(), []

        def work(name: str) -> None:
            for n in range(5):
                try:
                    store.add(image(n, name))
                    wins.append((f"wmi-{n:08x}", name))
                except FileExistsError:
                    pass

        self.gather(*[lambda t=t: work(f"a-{t}") for t in range(THREADS)])
        self.assertEqual(sorted(wins), sorted((r["id"], r["account_id"]) for r in store.walk()))
        self.assertEqual(len(wins), 5)

    # ---- other objects, other processes ----

    def only_shared(self) -> None:
        if not self.shared:
            self.skipTest("not a shared store")

    def test_what_was_stored_is_there_when_opened_again(self) -> None:
        """Records, their order and the revision outlive close()."""
        self.only_shared()
        with self.open() as store:
            for n, text in enumerate(HOSTILE):
                store.add(image(n, description=text))
            want, revision = list(store.walk()), store.revision()
        again = self.open()
        self.assertEqual(list(again.walk()), want)
        self.assertEqual(again.revision(), revision)

    def test_another_object_sees_each_change_at_once(self) -> None:
        """The very next call shows it, whichever method it is."""
        self.only_shared()
        one, two = self.open(), self.open()
        seen = [two.revision()]
        for n in range(30):
            one.add(image(n))
            seen.append(two.revision())
            self.assertEqual(two.get(f"wmi-{n:08x}"), image(n))
            one.replace(f"wmi-{n:08x}", dead)
            seen.append(two.revision())
            self.assertEqual(two.page(None, 0, 0, deleted=True)[0], n + 1)
            self.assertEqual(len(list(two.walk())), n + 1)
            self.assertEqual(one.revision(), two.revision())
        self.assertEqual(len(seen), len(set(seen)))

    def spawn(self, work: str) -> list[Any]:
        """Run Python code in PROCESSES processes at once; return what each of them prints, parsed as JSON.

        The code may use `store`, the number of its process as `me`, and the names of this module.
        """
        opener = self.opener
        source = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "import importlib, json\n"
            f"from {__name__} import *\n"
            f"opener = importlib.import_module({opener.__module__!r}).{opener.__qualname__}\n"
            f"me, store = int(sys.argv[1]), opener({self.location!r})\n"
            "sys.stdin.read()\n"  # all processes begin together, when their pipes are closed
            f"{work}\nstore.close()\n"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", source, str(me)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            ) for me in range(PROCESSES)
        ]
        for child in children:
            assert child.stdin
            child.stdin.close()
            child.stdin = None
        answers = [child.communicate(timeout=120) for child in children]
        for child, (_, errors) in zip(children, answers):
            self.assertEqual((child.returncode, errors), (0, ""))
        return [json.loads(out or "null") for out, _ in answers]

    def test_processes_lose_no_change(self) -> None:
        """Each read-modify-write is atomic, also against other processes."""
        self.only_shared()
        store = self.open()
        store.add(image(1, n=0))
        self.spawn("for _ in range(25):\n  store.replace('wmi-00000001', lambda r: {**r, 'n': r['n'] + 1})")
        self.assertEqual(store.get("wmi-00000001")["n"], 25 * PROCESSES)

    def test_processes_add_and_delete_at_once(self) -> None:
        """No record is lost, doubled or left over, and `check` finds no fault."""
        self.only_shared()
        store = self.open()
        self.spawn("for n in range(me * 100, me * 100 + 20):\n"
                   "  store.add(image(n))\n"
                   "  if n % 2: store.delete(f'wmi-{n:08x}')\n"
                   "store.add_all(image(1000 + me * 100 + n) for n in range(50))")
        want = {f"wmi-{me * 100 + n:08x}" for me in range(PROCESSES) for n in range(0, 20, 2)}
        want |= {f"wmi-{1000 + me * 100 + n:08x}" for me in range(PROCESSES) for n in range(50)}
        self.assertEqual(sorted(ids(store.walk())), sorted(want))
        self.assertEqual(list(store.check()), [])

    def test_one_process_wins_an_id(self) -> None:
        """Of many processes that add the same id, all but one get FileExistsError."""
        self.only_shared()
        store = self.open()
        wins = self.spawn("wins = []\n"
                          "for n in range(20):\n"
                          "  try: store.add(image(n, f'a-{me}')); wins.append([n, f'a-{me}'])\n"
                          "  except FileExistsError: pass\n"
                          "print(json.dumps(wins))")
        got = [[int(r["id"][4:], 16), r["account_id"]] for r in store.walk(oldest_first=True)]
        self.assertEqual(sorted(pair for pairs in wins for pair in pairs), sorted(got))
        self.assertEqual(len(got), 20)
