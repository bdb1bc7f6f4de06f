#!/usr/bin/env python3
"""Serve and call the machine-image API of Wakame-vdc's DCMGR, with the standard library alone.

A short session, on a store in memory:

>>> storage = open_storage("memory:")
>>> Catalog(storage).register({
...     "uuid": "wmi-lucid0", "account_id": "a-shpoolxx", "is_public": True,
...     "source": {"uri": "file:///images/ubuntu-lucid-kvm-32.raw"}})
'wmi-lucid0'
>>> visitor = Catalog(storage, account="a-visitor1")
>>> visitor.show("wmi-lucid0")["source"]["uri"]
'file:///images/ubuntu-lucid-kvm-32.raw'
>>> visitor.destroy("wmi-lucid0")
Traceback (most recent call last):
    ...
wmi.OperationNotPermitted

The same verbs work on a server elsewhere: ``Client("http://127.0.0.1:9001", "a-visitor1")``.
The server is ``python3 wmi.py serve --sample``, or ``Server(storage).serve_forever()``.

Glossary:

    DCMGR         the data center manager of Wakame-vdc, a cloud platform; images are one of its resources
    the document  the description of the image API that DCMGR published; served under /api/images
    11.12, 12.03  the two releases of DCMGR that were deployed; each has its own path and small differences
    the originals the servers of these two releases, in Ruby; where the document is silent, they decide
    account       who owns an image, or who calls, such as a-shpoolxx; an image is public, or for its account alone
    operator      who works on a store directly, without an account, and may do everything
    record        an image as a store keeps it: a dict with all fields; each version of the API shows some of them
    index         the list of images, as the API answers it: one page of it, inside an envelope with the total
    tombstone     the record of a deleted image, which has a `deleted_at`; 12.03 still shows it
    revision      a text that names one state of a store; every change gives the store a new one

The parts (``grep -A1 '^####' wmi.py``). Each uses only what stands above it, except that a connection uses its server,
and that there are a few calls into Optional:

    Errors        a class for each failure, with its HTTP status and DCMGR's code
    YAML          the little of YAML that the API needs, written and read
    Image         the fields, their checks, and what each version of the API shows of them
    Storage       what a store does, the store in memory, and how a URL finds its backend
    Catalog       the rules: who sees what, who may delete; paging, filters, sorting
    Requests      HTTP read strictly: bytes in, requests or an error out
    Answers       what is sent back: status, header lines, JSON or YAML, in pieces if it is long
    Service       from a request to an answer: the routes, and the answers that are kept
    Connections   one client each: what it sends, what is sent to it, and its deadlines
    Server        the loop that serves all connections, its threads, and the log
    Processes     a parent that forks workers, and their signals
    Client        the verbs and errors of the catalog, over HTTP
    Terminal      what people see of the command: harmless text, progress, tables
    Command line  a function for each subcommand, and main()
    Optional      what the rest works without: HTTPS, image files, tokens, the page, fetch, load, dump, copy, check

Left out on purpose: everything of DCMGR that is not an image; the rest of YAML; async; scanning for plug-ins. A
backend, the code of one kind of store, is one file in backends/ with one function, open_storage(location).
"""

from __future__ import annotations

import binascii
import collections
import contextlib
import copy
import datetime
import email.utils
import errno
import functools
import hashlib
import heapq
import html
import http.client
import http.server
import importlib
import io
import itertools
import json
import operator
import os
import random
import re
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO, Union, cast

try:
    import ssl
except ImportError:  # in a Python built without it, all works but TLS and stores in etcd
    ssl = None  # type: ignore[assignment]

__version__ = "1.1.0"
__all__ = [  # the errors, which are the subclasses of Error, are public too
    "VERSIONS", "Catalog", "Client", "Error", "MemoryStorage", "Page", "Server", "Storage", "image_record", "listen",
    "main", "open_storage", "register_backend", "run_server",
]

# wmi is one file, yet a backend is imported as wmi.NAME_store: with __path__ a module counts as a package. The folder
# is backends/ beside wmi.py in a checkout or a vendored copy, and wmi_backends/ beside an installed one, because no
# package should claim the top-level name "backends".
__path__ = [os.path.join(os.path.dirname(os.path.abspath(__file__)), name) for name in ("backends", "wmi_backends")]

Record = dict[str, Any]


####################################################################################################
# Errors
####################################################################################################
# All errors form one tree. An error is raised once, by the code that knows what is wrong. Its class has the HTTP status
# and DCMGR's code as attributes, so the server needs no table of errors, and the client raises the same class again
# from an answer. One place turns errors into HTTP, another one into a line on stderr.


class Error(Exception):
    """Base class of every error in this module; ``str(error)`` is the message.

    An answer shows the name of the class in place of an empty message, as the originals did.
    """

    status = 500  # HTTP status of the answer
    code = "500"  # DCMGR's own code, a string in every answer
    retry_after = 0.0  # seconds; the client takes it from Retry-After


class UnknownUUIDResource(Error):
    """Raised when there is no such image; the message is its id."""

    status, code = 404, "100"


class InvalidRequestCredentials(Error):
    """Raised when the account is missing or malformed, or its token is missing or wrong."""

    status, code = 400, "103"


class OperationNotPermitted(Error):
    """Raised when the account may not do this, usually because the image belongs to another account."""

    status, code = 403, "105"


class DatabaseError(Error):
    """Raised when the store cannot answer; ``__cause__`` is the reason, if the store gave one."""

    status, code = 503, "110"


class InvalidParameter(Error):
    """Raised when a parameter, a field or the form of an id is wrong; the message names it."""

    status, code = 400, "143"


class DuplicateUUID(Error):
    """Raised when an image with this id exists already; not over HTTP, where nothing is registered."""

    status, code = 409, "409"


class BadRequest(Error):
    """Raised when a request breaks the rules of HTTP (RFC 9112)."""

    status, code = 400, "400"


class NotFound(Error):
    """Raised when nothing is served under a path."""

    status, code = 404, "404"


class MethodNotAllowed(Error):
    """Raised when a path does not have the method; the message lists the methods that it has."""

    status, code = 405, "405"


class RequestTimeout(Error):
    """Raised when a request, or the client's reading of its answer, takes too long or holds too much memory."""

    status, code = 408, "408"


class PreconditionFailed(Error):
    """Raised when If-Match or If-Unmodified-Since does not hold (RFC 9110, 13.1)."""

    status, code = 412, "412"


class ContentTooLarge(Error):
    """Raised when the body is over the limit."""

    status, code = 413, "413"


class URITooLong(Error):
    """Raised when the request line is over the limit."""

    status, code = 414, "414"


class UnsupportedMediaType(Error):
    """Raised when the body is neither a form nor JSON."""

    status, code = 415, "415"


class RangeNotSatisfiable(Error):
    """Raised for a range that is empty or begins past the end (RFC 9110, 14.4); the message is the size in bytes."""

    status, code = 416, "416"


class ExpectationFailed(Error):
    """Raised when a request expects something other than 100-continue."""

    status, code = 417, "417"


class MisdirectedRequest(Error):
    """Raised when the Host is not one that this server serves (RFC 9110, 15.5.20)."""

    status, code = 421, "421"


class RequestHeaderFieldsTooLarge(Error):
    """Raised when the head, or a field of it, is over its limit."""

    status, code = 431, "431"


class UnknownTransferCoding(Error):
    """Raised when the transfer coding is not chunked (RFC 9112, 6.1)."""

    status, code = 501, "501"


class FetchError(Error):
    """Raised when a file cannot be fetched, or is not the right one: its MD5 differs, or it changed in the meantime."""

    status, code = 409, "409"


class BadAnswer(Error):
    """Raised when an answer is too large, not one of this API, or from a server that cannot be trusted."""

    status, code = 502, "502"


class Unreachable(Error):
    """Raised when no whole answer came in time, or the other side has hung up."""

    status, code = 504, "504"


class HTTPVersionNotSupported(Error):
    """Raised when a request is HTTP/2 or later."""

    status, code = 505, "505"


####################################################################################################
# YAML
####################################################################################################
# The originals show `source` and `features` as a YAML document inside a text, and answer in YAML when the path ends
# in .yml. This part writes mappings (their keys as Ruby symbols), sequences and scalars, such that the YAML libraries
# of Ruby and Python read the same data back. It reads one flat mapping, which is what `source` and `features` are. Tags
# and anchors are not read: no text can make this module instantiate anything.

# Text stays unquoted only if every reader of YAML 1.1 treats it as text, and not as a number, a date or a boolean.
_YAML_PLAIN = r"[A-Za-z/][A-Za-z0-9_./@+=~-]*(?:[: ][A-Za-z0-9_./][A-Za-z0-9_./@+=~-]*)*"
_YAML_WORDS = frozenset("y n yes no on off true false null".split())
_YAML_ESCAPES = dict(zip('0abtnvfre"\\/ N_LP', '\0\a\b\t\n\v\f\r\x1b"\\/ \x85\xa0\u2028\u2029'))
_YAML_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
_YAML_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}


class Timestamp(str):
    """A time, which is text in JSON (2011-11-23T07:36:00Z) and a timestamp in YAML."""

    __slots__ = ()


def to_yaml(value: Any) -> str:
    """Return a value made of dicts, lists and scalars as one YAML document, its keys as Ruby symbols."""
    nested = isinstance(value, (dict, list)) and value
    return "---\n" + "".join(yaml_lines(value, "")) if nested else f"--- {_yaml_scalar(value)}\n"


def yaml_lines(value: Any, indent: str) -> list[str]:
    """Return a dict or list that is not empty as YAML, in texts of whole lines, in the layout of Ruby's psych.

    That layout indents a dict under its key, but not a list. It is kept exactly, because clients such as mussel search
    the answer for whole lines.
    """
    lines, listed = [], isinstance(value, list)
    for item in value:
        head, item = (f"{indent}-", item) if listed else (f"{indent}:{item}:", value[item])
        if not isinstance(item, (dict, list)) or not item:
            text = _yaml_scalar(item)
            lines.append(f"{head} {text}\n" if text else f"{head}\n")
        elif listed:
            lines.append(head + "".join(yaml_lines(item, indent + "  "))[len(head) :])
        else:
            lines += [f"{head}\n", *yaml_lines(item, indent if isinstance(item, list) else indent + "  ")]
    return lines


def _yaml_scalar(value: Any) -> str:
    if not isinstance(value, str):
        return "" if value is None else str(value).lower()  # true, 12, 1.5, {}, []
    if isinstance(value, Timestamp):
        return f"{value[:10]} {value[11:19]}.000000000 Z"
    if re.fullmatch(_YAML_PLAIN, value) and value.lower() not in _YAML_WORDS:
        return value
    if value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    return '"' + "".join(map(_yaml_escaped, value)) + '"'


def _yaml_escaped(char: str) -> str:
    if char in _YAML_SHORT or char.isprintable():
        return _YAML_SHORT.get(char, char)
    return f"\\u{ord(char):04x}" if char <= "\uffff" else f"\\U{ord(char):08x}"


def parse_yaml_mapping(text: str) -> dict[str, Any]:
    """Return the flat mapping in a YAML document, its keys without the colon of a symbol.

    This reads what this module and the originals (syck in Ruby 1.8, later psych) write for `source` and `features`.
    Most other YAML raises ValueError, which says what was found; 1.5, yes or a date is taken as text.
    """
    # 1. These characters are line breaks in YAML 1.1, but not for every parser. So only their escapes are accepted.
    if re.search("[\x85\u2028\u2029]", text):
        raise ValueError(f"expected escapes for the line breaks of YAML in {text!r:.60}")
    # 2. The first line may be "---", or "--- {}" for an empty mapping, or already the first entry.
    start, _, rest = text.partition("\n")
    start = start.strip()
    if start == "--- {}" and not rest.strip():
        return {}
    if not start.startswith("---"):
        rest = text
    elif start != "---":
        raise ValueError(f"expected '---' and a mapping, not {start!r:.60}")
    # 3. Each line is an entry, with the indented lines that follow it: syck and psych break long scalars.
    entries = re.split("\n(?! )", rest)
    return dict(_parse_yaml_entry(entry.rstrip(" \t\r\n")) for entry in entries if entry.strip(" \t\r\n"))


def _parse_yaml_entry(entry: str) -> tuple[str, Any]:
    match = re.fullmatch(r"(?s):?([A-Za-z_][A-Za-z0-9_]*):(?: +(.*))?", entry)
    if not match:
        raise ValueError(f"expected ':key: value', not {entry!r:.60}")
    return match[1], _parse_yaml_scalar(match[2] or "")


def _parse_yaml_scalar(text: str) -> Any:
    # A line break in a scalar stands for a space; after a backslash in double quotes, for nothing.
    if re.fullmatch(r'(?s)"[^"\\]*(?:\\.[^"\\]*)*"', text):
        escape = r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U(00[01][0-9A-Fa-f]{5})|\r?\n +|(.))|\r?\n +"
        return re.sub(escape, _yaml_unescaped, text[1:-1])
    text = re.sub("\r?\n +", " ", text)
    if re.fullmatch(r"'[^']*(?:''[^']*)*'", text):
        return text[1:-1].replace("''", "'")
    if text in _YAML_CONSTANTS:
        return _YAML_CONSTANTS[text]
    if text[0] in "!&*|>%@`{}[],?#\"'" or ": " in text or " #" in text or text[:2] == "- ":
        raise ValueError(f"expected plain or quoted text, not {text!r:.60}")
    if re.fullmatch("[-+]?[0-9]{1,18}", text):
        return int(text)
    return text[1:] if text[0] == ":" else text  # a Ruby symbol becomes its text


def _yaml_unescaped(match: re.Match[str]) -> str:
    if "\n" in match[0]:
        return "" if match[0][0] == "\\" else " "
    digits = match[1] or match[2] or match[3]
    if not digits and match[4] not in _YAML_ESCAPES:
        raise ValueError(f"unknown escape {match[0]!r}")
    return chr(int(digits, 16)) if digits else _YAML_ESCAPES[match[4]]


####################################################################################################
# Image
####################################################################################################
# An image is kept as a record: a plain dict with the fields of FIELDS, each checked, in that order. The three versions
# of the API differ in data only: names, order, defaults, and who may see what. This data is the table VERSIONS. A
# version is a row of that table, never an `if` somewhere else.
#
#     {"uuid": "wmi-a", "account_id": "a-x", …}    the fields, as somebody gives them
#         |
#         |  image_record(): names, checks, defaults
#         v
#     {"id": "wmi-a", …, "os_type": "linux"}       the record, as stores keep it: all of FIELDS, in this order
#         |
#         |  render(): the table `fields` of one Version
#         v
#     {"id": "wmi-a", "uuid": "wmi-a", …}          the image, as this version shows it, in JSON or YAML
#
# `source`, for example, is the dict {"uri": "file:///a.raw"} in the record; the document and 11.12 show it as text in
# YAML; 12.03 does not show it. The record is always whole, and each version is a view of it.

BOOT_DEV_SAN, BOOT_DEV_LOCAL = 1, 2  # the document's numbers: a volume on the storage network, a local file
SYSTEM_ACCOUNT = "a-00000000"  # may show and delete any image (document and 11.12)
STATES = ("init", "creating", "pending", "available", "deleted")
MAX_TEXT = 150_000  # characters in all texts of an image: they fit in 1 MiB even if JSON takes six bytes for each

# A check takes a field's name and a value, and returns the value as it is kept or raises InvalidParameter. The checks
# are functions made from parts such as _matching and _one_of, so that the table FIELDS reads like a specification.
Check = Callable[[str, Any], Any]


def refuse(field: str, value: Any, allowed: str) -> InvalidParameter:
    """Return the error for a value that is not allowed; it names the field, the value and what is allowed."""
    return InvalidParameter(f"{field}: {brief(value)} is not allowed; expected {allowed}")


def brief(value: Any) -> str:
    """Return at most 80 characters that show a value, however deeply it is nested."""
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # a ValueError: an int of thousands of digits
        return f"a value of type {type(value).__name__}, too deep or too long to show"


def _matching(pattern: str, allowed: str) -> Check:
    def check(field: str, value: Any) -> str:
        if isinstance(value, str) and re.fullmatch(pattern, value):
            return value
        raise refuse(field, value, allowed)

    return check


def _one_of(*allowed: Any) -> Check:
    typed = {(type(choice), choice) for choice in allowed}  # with its type: 1 == True, but JSON tells them apart

    def check(field: str, value: Any) -> Any:
        if isinstance(value, (str, int)) and (type(value), value) in typed:
            return value
        raise refuse(field, value, " or ".join(map(json.dumps, allowed)))

    return check


def _or_null(check: Check) -> Check:
    return lambda field, value: None if value is None else check(field, value)


def _check_text(field: str, value: Any) -> str:
    if isinstance(value, str) and not re.search("[\ud800-\udfff]", value):
        return value
    raise refuse(field, value, "text that is valid Unicode")


def parse_time(field: str, value: Any) -> datetime.datetime:
    """Return an ISO 8601 time as a naive datetime in UTC; a time without a zone is taken as UTC.

    Raises InvalidParameter, which names the field.
    """
    # datetime.fromisoformat() takes Z and short fractions only since Python 3.11, and since then much else besides,
    # such as 2011W471. The form is checked here, so that every Python takes the same times.
    form = r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,6})\d*)? ?(?:Z|([+-](?:[01]\d|2[0-3])):?([0-5]\d))?)?"
    match = re.fullmatch(form, value, re.ASCII) if isinstance(value, str) else None
    try:
        day, clock, fraction, hours, minutes = match.groups() if match else ("",) * 5
        moment = datetime.datetime.fromisoformat(f"{day}T{clock or '00:00:00'}")
        east = datetime.timedelta(hours=int(hours or 0), minutes=int(f"{(hours or '+')[0]}{minutes or 0}"))
        return moment - east + datetime.timedelta(microseconds=int((fraction or "0").ljust(6, "0")))
    except (ValueError, OverflowError) as error:
        raise refuse(field, value, "a time such as 2011-11-23T07:36:00Z") from error


def _check_time(field: str, value: Any) -> str:
    return parse_time(field, value).replace(microsecond=0).isoformat() + "Z"


def now() -> str:
    """Return the present time as the API spells it: UTC, whole seconds, such as 2011-11-23T07:36:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _mapping_of(**checks: Check) -> Check:
    """Return the check of a dict, or of a dict as text in YAML, that may have these keys and no others."""

    def check(field: str, value: Any) -> dict[str, Any]:
        try:
            value = parse_yaml_mapping(value) if isinstance(value, str) else value
        except ValueError as error:
            raise InvalidParameter(f"{field}: {error}") from error
        if not isinstance(value, dict) or not set(value) <= set(checks):
            raise refuse(field, value, "an object, or its YAML, with no other keys than " + ", ".join(checks))
        return {name: checks[name](f"{field}.{name}", item) for name, item in value.items()}

    return check


check_id = _matching("wmi-[a-z0-9]{1,251}", "wmi- and 1 to 251 letters a-z or digits")
check_account = _matching("a-[a-z0-9]{1,253}", "a- and 1 to 253 letters a-z or digits")
_check_flag = _one_of(True, False)
_check_uri = _matching("[^\x00-\x1f\x7f\ud800-\udfff]+", "a URI, valid Unicode without control characters")
_check_snapshot = _matching("snap-[a-z0-9]+", "snap- and letters a-z or digits")
_check_backup = _matching("bo-[a-z0-9]+", "bo- and letters a-z or digits")
_check_md5sum = _matching("[0-9A-Fa-f]{32}", "32 hex digits")

# Every field of a record, in the order in which records are kept: its check and its default. An image that omits a
# field gets its default, which is not checked: a default of None does not mean that null may be given. The first five
# are special: see image_record().
FIELDS: dict[str, tuple[Check, Any]] = {
    "id": (check_id, None),
    "account_id": (check_account, None),
    "created_at": (_check_time, None),
    "updated_at": (_check_time, None),
    "boot_dev_type": (_one_of(BOOT_DEV_SAN, BOOT_DEV_LOCAL), BOOT_DEV_LOCAL),
    "source": (_mapping_of(uri=_check_uri, snapshot_id=_check_snapshot), {}),
    "arch": (_one_of("x86", "x86_64"), "x86_64"),
    "description": (_or_null(_check_text), None),
    "md5sum": (_or_null(lambda field, value: _check_md5sum(field, value).lower()), None),
    "is_public": (_check_flag, False),
    "state": (_one_of(*STATES), "init"),
    "features": (_mapping_of(virtio=_check_flag, acpi=_check_flag), {}),
    # What 12.03 added.
    "file_format": (_matching("[a-z0-9]{1,255}", "letters a-z or digits, such as raw"), "raw"),
    "root_device": (_or_null(_check_text), None),
    "is_cacheable": (_check_flag, False),
    "instance_model_name": (_or_null(_check_text), None),
    "parent_image_id": (_or_null(check_id), None),
    "service_type": (_one_of("std", "lb"), "std"),
    "display_name": (_check_text, ""),
    "backup_object_id": (_or_null(_check_backup), None),
    "deleted_at": (_or_null(_check_time), None),
    "os_type": (_one_of("linux", "windows"), "linux"),
}
_ALWAYS_EMPTY = ("volumes", "vifs", "labels")  # 12.03 shows them as []: so [] is accepted, but not kept


def image_record(fields: Mapping[str, Any]) -> Record:
    """Return a complete, checked record made from some fields of an image.

    The names are those of FIELDS, and `uuid` is another name of `id`. Only account_id is required. By default, id is
    random, created_at is the present time, updated_at is the same as created_at, and boot_dev_type goes with the
    source. Raises InvalidParameter, which names the field and says what is allowed.
    """
    # 1. Resolve `uuid`: every version of the API shows both names, and what it shows can be registered again.
    given = {name: value for name, value in fields.items() if name not in _ALWAYS_EMPTY or value != []}
    uuid = given.pop("uuid", None)
    if uuid is not None and given.setdefault("id", uuid) != uuid:
        raise refuse("uuid", uuid, f"the same as id, {brief(given['id'])}")
    # 2. Refuse unknown names: a misspelled one would otherwise be dropped in silence.
    for name in given:
        if name not in FIELDS:
            raise refuse("field", name, ", ".join(FIELDS))
    if "account_id" not in given:
        raise InvalidParameter("account_id: is missing; say whose image it is, such as a-shpoolxx")
    # 3. Add what only this moment can supply. The id is eight random letters and digits, as in the originals.
    if "id" not in given:
        letters = random.SystemRandom().choices("abcdefghijklmnopqrstuvwxyz0123456789", k=8)
        given["id"] = "wmi-" + "".join(letters)
    given.setdefault("created_at", now())
    given.setdefault("updated_at", given["created_at"])
    # 4. Check each field, and copy each default: two records must not share one dict.
    record = {
        name: check(name, given[name]) if name in given else copy.copy(default)
        for name, (check, default) in FIELDS.items()
    }
    if "boot_dev_type" not in given and "snapshot_id" in record["source"]:
        record["boot_dev_type"] = BOOT_DEV_SAN
    return check_agreement(record)


def check_agreement(record: Record) -> Record:
    """Return the record if its fields agree with one another and are not too long.

    These rules concern several fields at once, so this is called again whenever fields are set. Raises
    InvalidParameter.
    """
    # state and deleted_at do not count: deletion makes them longer without a check, and the tombstone must still pass
    # this check when it is loaded.
    texts = *record["source"].values(), *(record[name] for name in record if name not in ("state", "deleted_at"))
    if sum(len(text) for text in texts if isinstance(text, str)) > MAX_TEXT:
        raise InvalidParameter(f"image: its texts have more than {MAX_TEXT:,} characters in all")
    key = "snapshot_id" if record["boot_dev_type"] == BOOT_DEV_SAN else "uri"
    if record["source"] and list(record["source"]) != [key]:
        raise refuse("source", record["source"], f"{key} alone, as boot_dev_type is {record['boot_dev_type']}")
    if (record["state"] == "deleted") != (record["deleted_at"] is not None):
        raise refuse("state", record["state"], "deleted if deleted_at is given, and only then")
    return record


def _fields(names: str, **shown: Callable[[Record], Any]) -> Mapping[str, Callable[[Record], Any]]:
    """Return, for each named field, a function from a record to what the field shows; by default, the value as kept."""
    shown["uuid"] = operator.itemgetter("id")
    shown["created_at"] = lambda record: Timestamp(record["created_at"])
    shown["updated_at"] = lambda record: Timestamp(record["updated_at"])
    return {name: shown.get(name) or operator.itemgetter(name) for name in names.split()}


class Version:
    """One version of the API: its path, envelope and visibility rules. The defaults are those of the document."""

    name: str = "document"
    path: str = "/api/images"  # of the collection
    prefix: str = "Dcmgr::Endpoints::"  # precedes the class of an error in its answer
    wrapped: bool = False  # the answer of the index is an array that holds one object
    envelope: Sequence[str] = ("owner_total", "start", "limit", "result")  # keys of an index, in order
    default_limit: int | None = None  # applies to limit=0 too; None: no limit
    fields: Mapping[str, Callable[[Record], Any]] = _fields(  # names in order, and what each shows of a record
        "id uuid account_id created_at updated_at boot_dev_type source arch description md5sum is_public state"
        " features",
        source=lambda record: to_yaml(record["source"]),
        features=lambda record: to_yaml(record["features"]),
    )
    index_public: bool = True  # the index lists the public images of every account
    index_deleted: bool | None = False  # tombstones in the index. False: none, True: nothing else, None: both
    shows_deleted: bool = False  # a tombstone can be shown, and deleted again
    not_yours: type[Error] = OperationNotPermitted  # raised if the caller may not see or change another account's image
    privileged: bool = True  # SYSTEM_ACCOUNT may show and delete any image
    updatable: Sequence[str] = ()  # fields that PUT sets
    filters: Sequence[str] = ()  # parameters of the index besides start and limit
    # The message when no account is given. Empty in 11.12 and 12.03, whose clients expect the error's class instead.
    no_account: str = "say who calls: send a header X-VDC-ACCOUNT-UUID, such as a-shpoolxx"


class _V1112(Version):
    # The deployed 11.12 servers differ from the document in their envelope, and in one message.
    name = "11.12"
    path = "/api/11.12/images"
    wrapped = True
    envelope = ("owner_total", "start", "limit", "results")
    no_account = ""


class _V1203(Version):
    # 12.03 lists an account's own images, tombstones included, and with is_public=true also the public ones of others.
    # A caller without permission gets 404, as if there were no such image; in the other versions, 403.
    name = "12.03"
    path = "/api/12.03/images"
    prefix = "Dcmgr::Endpoints::Errors::"
    wrapped = True
    envelope = ("total", "start", "limit", "results")
    default_limit = 250
    fields = _fields(
        "id account_id uuid created_at updated_at boot_dev_type arch description is_public state features file_format"
        " root_device is_cacheable instance_model_name parent_image_id service_type display_name backup_object_id"
        " deleted_at volumes vifs os_type labels",
        deleted_at=lambda record: record["deleted_at"] and Timestamp(record["deleted_at"]),
        description=lambda record: record["description"] or "",
        state=lambda record: "available" if record["state"] == "init" else record["state"],
        **{name: lambda record: [] for name in _ALWAYS_EMPTY},
    )
    index_public = False
    index_deleted = None
    shows_deleted = True
    not_yours = UnknownUUIDResource
    privileged = False
    updatable = ("display_name", "description")
    filters = (
        "is_public", "service_type", "state", "created_since", "created_until", "deleted_since", "deleted_until",
        "sort_by", "filter",
    )
    no_account = ""


DOCUMENT = Version.name
VERSIONS: dict[str, Version] = {row.name: row() for row in (Version, _V1112, _V1203)}
_check_version = _one_of(*VERSIONS)


def find_version(name: str) -> Version:
    """Return the row of VERSIONS with this name. Raises InvalidParameter."""
    return VERSIONS[_check_version("version", name)]


def render(version: Version, record: Record) -> Record:
    """Return a record as this version shows it: the fields of the version, in the order of the version."""
    return {name: show(record) for name, show in version.fields.items()}


####################################################################################################
# Storage
####################################################################################################
# What a store is, the store in memory, and how a URL such as sqlite:images.db finds its backend. A store keeps records
# by id, in order of registration; it knows nothing of the API's rules or of HTTP. backends/contract.py is the same
# interface as a set of tests, for the backends here and for those of third parties.
#
# A backend imports and inherits nothing from this module. It takes and returns plain dicts and raises
# built-in exceptions, so it also works beside a renamed copy of wmi.py. One place, StorageErrors, turns these
# exceptions into the errors of this module.


class Storage(Protocol):
    """A store of records by id, in order of registration; records go in and come out as copies.

    A store looks at four fields only: id, account_id, is_public and deleted_at (a record that has one is a
    *tombstone*). It raises KeyError if the id is absent, FileExistsError if it is taken, ValueError for misuse and
    after close(), OSError if the medium fails, and nothing else.

    The *scope* of `page` and `walk` is all that `account` owns and, if `public` is true, the public records of
    others; with the account None it is all records. `deleted` narrows the scope: False leaves tombstones out, True
    takes only tombstones, None takes both.
    """

    def get(self, id: str) -> Record:
        """Return the record, even if it is a tombstone. Raises KeyError."""

    def add(self, record: Record) -> None:
        """Register a record as the newest; it may replace a tombstone. Raises FileExistsError."""

    def add_all(self, records: Iterable[Record]) -> int:
        """Register all in this order, or none if one fails or the iterable raises; return how many."""

    def replace(self, id: str, change: Callable[[Record], Record]) -> Record:
        """Put change(record) in the place of the record, atomically, and return it. Raises KeyError.

        A store may call `change` again, if another process was faster. If `change` raises, the record stays as it was.
        """

    def delete(self, id: str) -> None:
        """Remove the record altogether. Raises KeyError."""

    def page(
        self, account: str | None, start: int, limit: int, *, public: bool = True, deleted: bool | None = False
    ) -> tuple[int, list[Record]]:
        """Return how many records are in the scope, and those from offset start, newest first, at most limit.

        Only the records of the page are read: an index is what clients ask for most, and its cost must not grow with
        the store.
        """

    def walk(
        self, account: str | None = None, *, public: bool = True, deleted: bool | None = None, start: int = 0,
        oldest_first: bool = False, frozen: bool = False,
    ) -> Iterator[Record]:
        """Yield the records of the scope from offset start, in bounded memory.

        A frozen walk yields them as they were at one moment. A walk that is not frozen may show some changes that are
        made in the meantime and miss others. But no record comes twice, and none that stays the same is left out.
        """

    def revision(self) -> str:
        """Return a text that changes whenever anything changes, by another process too.

        A server asks for it in every round of requests. A file answers at almost no cost, a cluster with one request.
        """

    def at_least(self, revision: str) -> Storage:
        """Return a store whose reads show this revision, which revision() has returned, or a newer one.

        A store in a cluster answers such reads from its own copy, without asking the cluster again.
        """

    def check(self, repair: bool = False) -> Iterator[str]:
        """Read everything and yield a line for each fault; repair what can be derived from the records."""

    def close(self) -> None:
        """Release everything; a second call is harmless."""

    def __enter__(self) -> Storage: ...

    def __exit__(self, *exc: object) -> None: ...


class _Row(NamedTuple):
    id: str
    account: str
    public: bool
    deleted: bool
    text: str  # the record as JSON: reading it makes the copy that a caller gets


class MemoryStorage:
    """A store in the memory of this process, for tests and trials; Storage describes the methods."""

    # A change copies the dict of rows, alters the copy, and puts it in place of the old dict, which stays as it is. So
    # a walk holds no lock while it yields, and is always frozen. The cost of a change or a page grows with the store,
    # which is fine for trials.

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}  # by id, in order of registration
        self._lock = threading.RLock()  # reentrant: what replace() calls may read the store
        self._nonce, self._changes = os.urandom(8).hex(), 0  # the nonce sets our revisions apart from other stores'
        self._closed = False

    def _opened(self) -> threading.RLock:
        """Return the lock of the store. Raises ValueError if the store is closed."""
        if self._closed:
            raise ValueError("the store is closed")
        return self._lock

    def get(self, id: str) -> Record:
        """Return the record, even if it is a tombstone. Raises KeyError."""
        with self._opened():
            return _decoded(self._rows[id])

    def add(self, record: Record) -> None:
        """Register a record as the newest; it may replace a tombstone. Raises FileExistsError."""
        self.add_all([record])

    def add_all(self, records: Iterable[Record]) -> int:
        """Register all in this order, or none if one fails or the iterable raises; return how many."""
        with self._opened():
            # Popping a tombstone first makes its successor the newest: a dict keeps the place of a key that it has.
            rows, count = self._rows.copy(), 0
            for count, record in enumerate(records, 1):
                row = _encoded(record)
                if row.id in rows and not rows.pop(row.id).deleted:
                    raise FileExistsError(row.id)
                rows[row.id] = row
            self._commit(rows)
            return count

    def replace(self, id: str, change: Callable[[Record], Record]) -> Record:
        """Put change(record) in the place of the record, atomically, and return it. Raises KeyError."""
        with self._opened():
            row = _encoded(change(_decoded(self._rows[id])))
            if row.id != id:
                raise ValueError(f"the id {id} may not change")
            self._commit({**self._rows, id: row})
            return _decoded(row)

    def delete(self, id: str) -> None:
        """Remove the record altogether. Raises KeyError."""
        with self._opened():
            rows = self._rows.copy()
            del rows[id]
            self._commit(rows)

    def _commit(self, rows: dict[str, _Row]) -> None:
        self._rows, self._changes = rows, self._changes + 1

    def page(
        self, account: str | None, start: int, limit: int, *, public: bool = True, deleted: bool | None = False
    ) -> tuple[int, list[Record]]:
        """Return how many records are in the scope, and those from offset start, newest first, at most limit."""
        if start < 0 or limit < 0:
            raise ValueError("start or limit is negative")
        rows = list(self._scope(account, public, deleted))
        return len(rows), [_decoded(row) for row in rows[start : start + limit]]

    def walk(
        self, account: str | None = None, *, public: bool = True, deleted: bool | None = None, start: int = 0,
        oldest_first: bool = False, frozen: bool = False,
    ) -> Iterator[Record]:
        """Yield the records of the scope from offset start, always as they were at one moment."""
        if start < 0:
            raise ValueError("start is negative")
        rows = self._scope(account, public, deleted, oldest_first)
        return map(_decoded, itertools.islice(rows, start, None))

    def _scope(
        self, account: str | None, public: bool, deleted: bool | None, oldest_first: bool = False
    ) -> Iterator[_Row]:
        with self._opened():
            rows = self._rows.values()
        for row in rows if oldest_first else reversed(rows):
            mine = account is None or row.account == account or (public and row.public)
            if mine and (deleted is None or row.deleted == deleted):
                yield row

    def revision(self) -> str:
        """Return a text that changes whenever anything changes."""
        with self._opened():
            return f"{self._nonce}.{self._changes}"

    def at_least(self, revision: str) -> MemoryStorage:
        """Return this store, which always reads the newest."""
        return self

    def check(self, repair: bool = False) -> Iterator[str]:
        """Yield nothing: nothing is derived from the records, so nothing can disagree with them."""
        with self._opened():
            return iter(())

    def close(self) -> None:
        """Forget everything; a second call is harmless."""
        self._closed, self._rows = True, {}

    def __enter__(self) -> MemoryStorage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _encoded(record: Record) -> _Row:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")  # raises ValueError for a lone surrogate now, rather than later when somebody reads it
        deleted = record["deleted_at"] is not None
        return _Row(record["id"], record["account_id"], record["is_public"], deleted, text)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record: {error!r}") from error


def _decoded(row: _Row) -> Record:
    record: Record = json.loads(row.text)
    return record


Opener = Callable[[str], Storage]
_openers: dict[str, Opener] = {"memory": lambda location: MemoryStorage()}


def register_backend(scheme: str, opener: Opener) -> None:
    """Make open_storage call opener(location) for this scheme, in place of a file or an entry point of that name.

    A scheme is a lower-case letter, and then such letters and digits.
    """
    _openers[scheme] = opener


def open_storage(url: str) -> Storage:
    """Open the store that a URL names, such as sqlite:images.db, json:images.json or memory:, and return it.

    The scheme is looked up among the registered ones, then as SCHEME_store.py in the folders of __path__, then among
    the entry points of the group wmi.backends. Raises InvalidParameter if it is not found, ImportError if its backend
    cannot be imported, and DatabaseError if the store cannot be opened.
    """
    # A backend is imported, and installed packages are searched, only when a URL asks for them. The scheme becomes
    # part of the name of a module, so it may hold nothing but a letter, and then letters and digits.
    scheme, colon, location = url.partition(":")
    named = colon and re.fullmatch("[a-z][a-z0-9]*", scheme)
    opener = (_openers.get(scheme) or _backend_file(scheme) or _entry_points().get(scheme)) if named else None
    if opener is None:
        raise refuse("store", url, f"SCHEME:LOCATION, such as sqlite:images.db, with one of {_known_schemes()}")
    with StorageErrors():
        return opener(location)


def _backend_file(scheme: str) -> Opener | None:
    name = f"{__name__}.{scheme}_store"
    try:
        opener: Opener = importlib.import_module(name).open_storage
    except ModuleNotFoundError as error:
        if error.name != name:  # the file is there, but something that it imports is not
            raise
        return None
    return opener


def _entry_points() -> dict[str, Opener]:
    """Return the openers that installed packages declare; a package is imported when its opener is called."""
    from importlib.metadata import entry_points  # here: its import takes long, and few calls need it

    found: Any = entry_points()  # a dict of groups in Python 3.9, an object with select() in later ones
    group = found.select(group="wmi.backends") if hasattr(found, "select") else found.get("wmi.backends", ())
    return {entry.name: functools.partial(lambda entry, location: entry.load()(location), entry) for entry in group}


def _known_schemes() -> str:
    import pkgutil  # here: only an error message needs it; unlike os.listdir it looks into a zip as well

    files = [module.name for module in pkgutil.iter_modules(__path__)]
    stores = [name[: -len("_store")] for name in files if name.endswith("_store")]
    return ", ".join(sorted({*_openers, *_entry_points(), *stores}))


class StorageErrors:
    """Context manager that turns what a store raises into errors of this module; the only place that does."""

    # As a generator it would leave a cycle for each error since Python 3.12, and take a microsecond more.

    def __init__(self, id: str = "") -> None:
        self._id = id

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileExistsError):
            raise DuplicateUUID(f"{error} is registered already") from error
        if isinstance(error, KeyError):
            raise UnknownUUIDResource(self._id) from error
        if isinstance(error, (OSError, ValueError)):
            raise DatabaseError(_STORE_SAYS.get(getattr(error, "errno", 0) or 0, "the store cannot answer")) from error


_UNKNOWN = "it is unknown whether this was done; look before trying again"
_STORE_SAYS = {  # what the caller is told about an OSError of a store, by its errno; the log has the reason
    errno.EINPROGRESS: _UNKNOWN,
    errno.EHOSTUNREACH: "the store has no quorum; try again",
}


####################################################################################################
# Catalog
####################################################################################################
# The rules of the API, applied to a store: who sees what, who may delete, how a list is paged, filtered and sorted.
# There is no HTTP here and no file. Where the versions of the API differ, the rules ask the table VERSIONS.
#
# The index has three ways to its images. The first that applies is taken:
#
#     asked for             way                                              reads               holds
#     sort_by               walk once, keep the sort keys and ids of the     all of the scope    start + limit keys
#                           first ones, then get these images by id
#     any other filter      walk once to count, and once more to yield       all of the scope    one image
#     neither of them       a page of the store; if more is asked for,       only the images     PAGE_AT_ONCE images
#                           the page gives the total, and a walk from        asked for
#                           `start` gives the images
#
# What the scope of a store can express does not count as a filter here: is_public=true, a state of alive or deleted.

PAGE_AT_ONCE = 50  # images read in one piece, each of up to MAX_TEXT characters; a longer list is walked
IMAGES_A_CALL = 1000  # the limit with which images() calls an index
SORTED_AT_MOST = 10_000  # the highest start + limit with sort_by, since this many keys are held in memory
SORTED_BY = 255  # leading characters by which a text is sorted; MySQL, under the originals, took the first 1024 bytes
PULSE = 1000  # records between two calls of `pulse`, see Catalog, in a walk with filters


class Page(NamedTuple):
    """One answer of an index: how many images there are, and those asked for, in order."""

    total: int
    start: int
    limit: int | None  # None: no limit
    images: Iterable[Record]  # a list, or an iterator that reads the store as it goes: if long, filtered or sorted


class Catalog:
    """The images of a store as one account sees them, by the rules of one version of the API.

    The account None is the operator at the machine itself, who may see and change the images of all accounts; a server
    always names an account. Every method but matching() raises errors of this module only, such as DatabaseError.
    During a walk with filters, `pulse` is called every PULSE records. It may raise an Error to end the walk, for
    example if the client is gone.
    """

    def __init__(
        self, storage: Storage, account: str | None = None, version: str = DOCUMENT,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage, self._pulse = storage, pulse
        self.account = account if account is None else check_account("account", account)
        self.version = find_version(version)

    def at_least(self, revision: str) -> Catalog:
        """Return a catalog whose reads show this revision, which the store has reached already, or a newer one."""
        storage = self.storage.at_least(revision)
        # A store on this machine always shows its newest state, and returns itself.
        return self if storage is self.storage else Catalog(storage, self.account, self.version.name, self._pulse)

    def index(self, start: int | str = 0, limit: int | str | None = None, **filters: Any) -> Page:
        """Return the page of images from offset start, at most limit of them, newest first unless sort_by is given.

        A limit of None or 0 is the default of the version. The filters are the parameters of 12.03, by their names;
        `filter` may be a list of tests, all of which must hold. Raises InvalidParameter, whose message names the
        parameter.
        """
        first = whole_number("start", start)
        size = whole_number("limit", 0 if limit is None else limit) or self.version.default_limit
        public, deleted = filter_scope(self.version, filters)
        conditions = filter_conditions(filters)
        matching = functools.partial(self.matching, public, deleted, conditions)
        with StorageErrors():
            if filters.get("sort_by"):
                return self._sorted(matching, filters["sort_by"], first, size)
            # The total stands before the images in an answer, so matching images are first counted and then read again.
            # To hold them instead would take unbounded memory.
            if conditions:
                total = sum(1 for _ in matching())
                return Page(total, first, size, _guarded(itertools.islice(matching(), first, size and first + size)))
            # Nearly every call ends here: one page of the store holds all that was asked for, or all that there is.
            at_once = PAGE_AT_ONCE if size is None else min(size, PAGE_AT_ONCE)
            total, images = self.storage.page(self.account, first, at_once, public=public, deleted=deleted)
            if at_once == size or first + at_once >= total:
                return Page(total, first, size, images)
            walk = self.storage.walk(self.account, start=first, public=public, deleted=deleted)
            return Page(total, first, size, _guarded(itertools.islice(walk, size)))

    def matching(
        self, public: bool, deleted: bool | None, conditions: Sequence[Condition], oldest_first: bool = False
    ) -> Iterator[Record]:
        """Yield the images in a scope of the store for which all conditions hold; the whole scope is read."""
        walk = self.storage.walk(self.account, public=public, deleted=deleted, oldest_first=oldest_first)
        for number, record in enumerate(walk, 1):
            if number % PULSE == 0:
                self._pulse()
            if all(condition(record) for condition in conditions):
                yield record

    def _sorted(self, matching: Callable[..., Iterator[Record]], sort_by: str, start: int, limit: int | None) -> Page:
        """Return a sorted page; images with equal keys are in order of registration, or newest first for desc.

        Raises InvalidParameter if the page ends beyond SORTED_AT_MOST.
        """
        # nsmallest and nlargest leave equal keys in the order in which they came, so the walk goes in the order that
        # equal keys should have. Entries are compared by their keys alone, since ids must not decide a tie.
        field, _, order = sort_by.partition(".")
        end = start + (limit or SORTED_AT_MOST)
        if end > SORTED_AT_MOST:
            raise InvalidParameter("limit" if start < SORTED_AT_MOST else "start")
        count = itertools.count()  # numbers what is walked: the next number after the walk is the total
        walked = matching(oldest_first=order == "asc")
        keys = ((_sort_key(self.version, field, record), next(count), record["id"]) for record in walked)
        pick = heapq.nsmallest if order == "asc" else heapq.nlargest
        chosen = pick(end, keys, key=lambda entry: entry[0])[start:]
        return Page(next(count), start, limit, self._visible(id for _, _, id in chosen))

    def _visible(self, ids: Iterable[str]) -> Iterator[Record]:
        """Yield the images with these ids, without those that were removed or made private since they were chosen."""
        for id in ids:
            with contextlib.suppress(UnknownUUIDResource, OperationNotPermitted):
                yield self._permitted(id)

    def images(self, **filters: Any) -> Iterator[Record]:
        """Yield every image of the index, in bounded memory; see every_image."""
        return every_image(self.index, filters)

    def show(self, id: str) -> Record:
        """Return the image. Raises InvalidParameter, UnknownUUIDResource, OperationNotPermitted."""
        check_id_syntax(id)
        return self._permitted(id)

    def _permitted(self, id: str) -> Record:
        with StorageErrors(id):
            record = self.storage.get(id)
        self._permit(record, public=True)
        return record

    def destroy(self, id: str) -> str:
        """Delete the image, which leaves a tombstone, and return its id. Raises as show does."""
        self._change(id, _buried)
        return id

    def update(self, id: str, **fields: Any) -> Record:
        """Set fields that a PUT may set in this version, and return the image. Raises as show does."""
        check_updatable(self.version, fields)
        return self._change(id, functools.partial(_amended, fields))

    def register(self, fields: Mapping[str, Any]) -> str:
        """Register an image, given as for image_record, and return its id; for the operator only.

        A tombstone with this id gives way. Raises InvalidParameter, DuplicateUUID and OperationNotPermitted.
        """
        self._check_operator()
        record = image_record(fields)
        with StorageErrors():
            self.storage.add(record)
        return str(record["id"])

    def modify(self, id: str, **fields: Any) -> Record:
        """Set any fields but the id and times, and return the image; for the operator only. Raises as show does.

        The state "deleted" cannot be set: see destroy().
        """
        self._check_operator()
        for name in fields:
            if name not in FIELDS or name in ("id", "created_at", "updated_at", "deleted_at"):
                raise refuse("field", name, "a field of an image, but not its id or a time")
        return self._change(id, functools.partial(_amended, fields))

    def set_features(self, id: str, **given: bool) -> Record:
        """Set or clear features, leave the others, and return the image; for the operator only. Raises as show does."""
        # Not by modify(), whose `features` replaces all of them: here the record is read and changed in one step, so
        # that two people who set two features at the same moment both succeed.
        self._check_operator()

        def change(record: Record) -> Record:
            features = {**record["features"], **FIELDS["features"][0]("features", given)}
            return _amended({"features": {n: features[n] for n in features if features[n] or n not in given}}, record)

        return self._change(id, change)

    def _check_operator(self) -> None:
        if self.account is not None:
            raise OperationNotPermitted("only the operator, a catalog without account, may do this")

    def _change(self, id: str, change: Callable[[Record], Record]) -> Record:
        check_id_syntax(id)

        # The permission is checked on the record that is replaced: one that was read before may be out of date.
        def permitted(record: Record) -> Record:
            self._permit(record, public=False)
            return change(record)

        with StorageErrors(id):
            return self.storage.replace(id, permitted)

    def _permit(self, record: Record, public: bool) -> None:
        """Raise unless the account may use the record; `public` permits a public record of another account as well."""
        # Tombstones come first: a version that does not show them answers as if they did not exist, even to the owner.
        version, id = self.version, record["id"]
        if record["deleted_at"] is not None and not version.shows_deleted:
            raise UnknownUUIDResource(id)
        mine = self.account in (None, record["account_id"]) or (version.privileged and self.account == SYSTEM_ACCOUNT)
        if not mine and not (public and record["is_public"]):
            raise version.not_yours(id if version.not_yours is UnknownUUIDResource else "")


def whole_number(name: str, value: int | str) -> int:
    """Return the value of a parameter that must be a whole number of at most 18 digits. Raises InvalidParameter."""
    # 18 digits fit into 64 bits. The pattern is stricter than int(), which takes signs, blanks, "1_0" and the digits
    # of every script; bool is an int, and is refused by its type.
    if (type(value) is str and re.fullmatch("[0-9]{1,18}", value)) or (type(value) is int and 0 <= value < 10**18):
        return int(value)
    raise InvalidParameter(name)


def every_image(index: Callable[..., Page], filters: Mapping[str, Any]) -> Iterator[Record]:
    """Yield every image of the index of a catalog or a client, page by page.

    If others add or delete images meanwhile, an image may come twice or be left out. With sort_by, the pages end at
    SORTED_AT_MOST, with InvalidParameter.
    """
    start, total = 0, 1
    while start < total:
        total, _, _, images = index(start, IMAGES_A_CALL, **filters)
        before = start
        for start, image in enumerate(images, start + 1):
            yield image
        if start == before:  # images were deleted: the same empty page would be asked for again and again
            return


def check_updatable(version: Version, fields: Iterable[str]) -> None:
    """Raise InvalidParameter if a PUT may not set one of the fields in this version."""
    for name in fields:
        if name not in version.updatable:
            raise refuse("field", name, " or ".join(version.updatable) or f"none: {version.name} has no PUT")


def check_id_syntax(id: str) -> None:
    """Raise InvalidParameter, in the words of the originals, for a text that cannot be an id."""
    try:
        check_id("id", id)
    except InvalidParameter as error:
        raise InvalidParameter(f"Invalid UUID Syntax: {id}") from error


def _buried(record: Record) -> Record:
    """Return the tombstone of a record; a tombstone is returned as it is."""
    moment = now()
    gone = {"state": "deleted", "deleted_at": moment, "updated_at": moment}
    return record if record["deleted_at"] is not None else {**record, **gone}


def _amended(fields: Mapping[str, Any], record: Record) -> Record:
    """Return the record with fields set and checked; if nothing differs, updated_at stays as well."""
    checked = {name: FIELDS[name][0](name, value) for name, value in fields.items()}
    if checked.get("state", "deleted") != "deleted":
        checked["deleted_at"] = None  # giving a tombstone another state brings the image back
    amended = {**record, **checked}
    return record if amended == record else check_agreement({**amended, "updated_at": now()})


def _guarded(images: Iterable[Record]) -> Iterator[Record]:
    """Yield images, and turn what the store raises while they are read into errors of this module."""
    with StorageErrors():
        yield from images


# ---- the filters of 12.03 ----

# A store answers some filters by itself, as part of a scope; filter_scope finds these. The others are conditions on
# each record; filter_conditions makes these. An unknown value is an error that names the parameter, as it was in the
# originals: ignoring it would return images that were not asked for.

Condition = Callable[[Record], bool]
_CHOICES: dict[str, set[str]] = {
    "is_public": {"true", "1", "false", "0", ""},  # the originals ignored an empty value
    "service_type": {"std", "lb"},
    "state": {"alive", "alive_with_deleted", "available", "deleted"},
    "sort_by": {f"{field}.{order}" for field in _V1203.fields for order in ("asc", "desc")},
    "filter": {f"{field}.{test}" for field in _V1203.fields for test in ("nil", "not_nil")},
}


def filter_scope(version: Version, filters: Mapping[str, Any]) -> tuple[bool, bool | None]:
    """Return the part of the filters that a store answers by itself, as `public` and `deleted` of its scope.

    Raises InvalidParameter, with the name of the parameter, if a parameter or its value is unknown.
    """
    for name, value in filters.items():
        values = value if name == "filter" and isinstance(value, list) else [value]
        if name not in version.filters or (name in _CHOICES and not set(map(_spelled, values)) <= _CHOICES[name]):
            raise InvalidParameter(name)
    public = version.index_public or _spelled(filters.get("is_public")) in ("true", "1")
    states = {"alive": False, "available": False, "deleted": True}
    return public, states.get(filters.get("state", ""), version.index_deleted)


def filter_conditions(filters: Mapping[str, Any]) -> list[Condition]:
    """Return the filters that filter_scope() leaves, as conditions on each record. Raises InvalidParameter."""
    conditions: list[Condition] = []
    if _spelled(filters.get("is_public")) in ("false", "0"):
        conditions.append(lambda record: not record["is_public"])
    if filters.get("service_type"):
        conditions.append(lambda record: bool(record["service_type"] == filters["service_type"]))
    if filters.get("state") == "available":
        conditions.append(lambda record: record["state"] in ("init", "available"))
    for field in ("created", "deleted"):
        since, until = (_filter_time(f"{field}_{end}", filters) for end in ("since", "until"))
        if since and until and since > until:
            raise InvalidParameter(f"{field}_since is larger than {field}_until")
        if since or until:
            conditions.append(functools.partial(_is_between, f"{field}_at", since or "", until or "~"))
    tests = filters.get("filter", [])
    distinct = {tests} if isinstance(tests, str) else set(tests)  # so that a test which is repeated costs nothing
    return conditions + [functools.partial(_is_null, *test.split(".")) for test in distinct]


def _is_null(field: str, expected: str, record: Record) -> bool:
    return (record.get(field, "") is None) == (expected == "nil")


def _is_between(field: str, since: str, until: str, record: Record) -> bool:
    return record[field] is not None and since <= record[field][:-1] <= until


def _filter_time(name: str, filters: Mapping[str, Any]) -> str | None:
    """Return the time as text that compares with the times of records, both without Z; None if it is not given.

    Raises InvalidParameter.
    """
    try:
        return parse_time(name, filters[name]).isoformat() if name in filters else None
    except InvalidParameter as error:
        raise InvalidParameter(name) from error


def _spelled(value: Any) -> str:
    """Return the value of a parameter as a query spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sort_key(version: Version, field: str, record: Record) -> tuple[bool, Any]:
    """Return what a record is sorted by: null comes first, and the case of a text does not matter."""
    # In the originals `id` was the number of a row, not the uuid. Here all keys for it are equal: see _sorted().
    if field == "id":
        return False, ""
    value = version.fields[field](record)
    text = json.dumps(value) if isinstance(value, (dict, list)) else value
    return value is not None, text[:SORTED_BY].upper() if isinstance(text, str) else text  # as MySQL, but for accents


####################################################################################################
# Requests
####################################################################################################
# Reading HTTP without sockets: bytes in, requests or an error out. Reading is strict, because if two programs on a
# path read the same bytes differently, a request can be smuggled past one of them. A request that breaks a rule of
# RFC 9112 gets an error, and nothing that follows it on the connection is served. The reader of the standard library
# is not used: it accepts most of what the RFC forbids.
#
# parse_head() makes a request from a whole head (the request line and the header fields). Each function below it reads
# one thing that a head says, and raises a subclass of Error if it breaks a rule. Reader finds the heads and bodies in
# the bytes of one connection. A request leaves it only when head and body are whole, so the code that answers it never
# has to wait for the client.

MAX_REQUEST_LINE = 8192  # bytes; RFC 9112, 3 asks for at least 8000
MAX_FIELD_LINE = 8192  # bytes; the limit of nginx and Apache
MAX_HEAD = 32768  # bytes; four lines of full length, far more than any known client sends
MAX_FIELDS = 64  # header fields; browsers send about 20
MAX_BODY = 65536  # bytes; the largest is a PUT of a name and a description
MAX_EMPTY_LINES = 4  # before a request line; some old clients send one after a body (RFC 9112, 2.2)
MAX_CHUNKS = 512  # of a body: clients send some KB in each, and a chunk takes microseconds, however short it is
MAX_CHUNK_LINE = 256  # bytes; a size, and extensions that nobody uses
SMALL_HEAD = 1024  # bytes; parsed heads up to this size are cached, at most 256 of them

CacheKey = tuple[str, str, str, str]  # target, account, If-None-Match, host
IDLE, HEAD, BODY = range(3)  # what a reader waits for: a request, the rest of its head, the rest of its body

# The grammar of RFC 9110 and 9112, in bytes. A target is visible ASCII. The value of a field may hold bytes above 0x7f
# (obs-text), which are read as Latin-1.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_FIELD_LINE = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_NEVER_IN_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")
_HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_ABSOLUTE = rf"(?i:http)://{_HOST}(|[/?].*)"


class Request(NamedTuple):
    """One request, which follows every rule of HTTP."""

    method: str
    target: str  # as sent: visible ASCII
    path: str
    query: str
    minor: int  # HTTP/1.minor
    cache_key: CacheKey  # all that an answer which may be kept depends on: see Service
    fields: Mapping[str, str]  # header fields, names in lower case; requests may share it, so it is never changed
    length: int  # of the body, in bytes
    chunked: bool  # the body comes in chunks, and the length is 0
    keep_alive: bool
    expects_continue: bool
    host: str  # without its port, in lower case
    account: str  # for the log; visible ASCII without blanks, like the target, so that neither can forge a line
    body: bytes = b""


def parse_head(head: bytes) -> Request:
    """Return the request that has this head, which ends with an empty line. The body of the request is still empty.

    Raises a subclass of Error for the first rule that is broken; the connection must then be closed.
    """
    # The request line comes first: a client that speaks HTTP/2 should be told so, whatever bytes follow.
    line, _, rest = head[:-2].partition(b"\r\n")
    method, target, minor = parse_request_line(line)
    check_head_text(head, len(head))  # only the length: the patterns allow no wrong character
    parsed = (_parse_small_fields if len(rest) <= SMALL_HEAD else _parse_field_lines)(rest, minor)
    fields, *_, host, account = parsed
    named, path, query = parse_target(method, target)
    host = named or host
    cache_key = target, fields.get("x-vdc-account-uuid", ""), fields.get("if-none-match", ""), host
    return Request(method, target, path, query, minor, cache_key, *parsed[:-2], host, account)


def _parse_field_lines(text: bytes, minor: int) -> tuple[dict[str, str], int, bool, bool, bool, str, str]:
    """Return the header fields in these lines, and what they mean, in the order of the attributes of Request."""
    fields = parse_fields(text.split(b"\r\n")[:-1])
    host = parse_host(fields, minor)
    account = fields.get("x-vdc-account-uuid") or "-"
    if not re.fullmatch("[!-~]{1,255}", account):
        account = ascii(account)[:255].replace(" ", "_")
    keep_alive, expects = parse_keep_alive(fields, minor), parse_expect(fields, minor)
    return fields, *parse_framing(fields, minor), keep_alive, expects, host, account


# Clients repeat themselves: they send the same fields with each request, and often the same head. Without the first
# cache, an answer that has to be made costs 13 % more; without the second, a kept one (see Service) 20 % more.
_parse_small_fields = functools.lru_cache(maxsize=256)(_parse_field_lines)
_parse_small_head = functools.lru_cache(maxsize=256)(parse_head)


def parse_request_line(line: bytes) -> tuple[str, str, int]:
    """Return method, target and minor version: METHOD SP TARGET SP HTTP/d.d (RFC 9112, 3)."""
    if len(line) > MAX_REQUEST_LINE:
        raise URITooLong(f"the request line has more than {MAX_REQUEST_LINE} bytes")
    match = _REQUEST_LINE.fullmatch(line)
    if not match or match[3] == b"0":
        raise BadRequest("the request line is not METHOD SP TARGET SP HTTP/1.1")
    if match[3] != b"1":
        raise HTTPVersionNotSupported("this server speaks HTTP/1.1 and 1.0")
    return match[1].decode(), match[2].decode(), int(match[4])


def parse_fields(lines: Sequence[bytes]) -> dict[str, str]:
    """Return the header fields: no folding, no space before the colon (RFC 9112, 5)."""
    if len(lines) > MAX_FIELDS:
        raise RequestHeaderFieldsTooLarge(f"there are more than {MAX_FIELDS} header fields")
    fields: dict[str, str] = {}
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if len(line) > MAX_FIELD_LINE:
            raise RequestHeaderFieldsTooLarge(f"a header field has more than {MAX_FIELD_LINE} bytes")
        if not match:
            raise BadRequest("a header field is not NAME: VALUE")
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        # mussel spells its fields with underscores. Only names with this prefix may be spelled so: Content_Length means
        # nothing to a proxy, so accepting it would let requests be smuggled.
        if name.startswith("x_vdc_"):
            name = name.replace("_", "-")
        if name == "host" and name in fields:
            raise BadRequest("there are two Host fields")
        if name not in fields:
            fields[name] = value
        elif name != "content-length" or fields[name] != value:  # two equal lengths count as one (RFC 9112, 6.3)
            fields[name] += f", {value}"
    return fields


def parse_host(fields: Mapping[str, str], minor: int) -> str:
    """Return the host in lower case, without its port; "" if HTTP/1.0 sends none (RFC 9112, 3.2). Raises BadRequest."""
    match = re.fullmatch(_HOST, fields.get("host", "" if minor else "-"))
    if not match:
        raise BadRequest("Host is missing or is not a host")
    return match[1].lower() if "host" in fields else ""


def parse_target(method: str, target: str) -> tuple[str, str, str]:
    """Return the host that a target names, or "", and its path and query.

    A target has origin form, asterisk form, or absolute form with http; in the last, its host counts and not that of
    the field Host (RFC 9112, 3.2). Raises BadRequest.
    """
    host, absolute = "", None if target[0] == "/" else re.fullmatch(_ABSOLUTE, target)
    if absolute:
        host, target = absolute.groups()
        target = target if target.startswith("/") else "/" + target
    if "#" in target or not (target.startswith("/") or (target == "*" and method == "OPTIONS")):
        raise BadRequest("the target is not a path, or has a fragment")
    path, _, query = target.partition("?")
    return host.lower(), path, query


def parse_framing(fields: Mapping[str, str], minor: int) -> tuple[int, bool]:
    """Return the length of the body, and whether it comes in chunks instead (RFC 9112, 6)."""
    # RFC 9112, 6.1 lets a server accept a request with both fields. That is the best known way to smuggle a request, so
    # it is an error here, as is Transfer-Encoding in HTTP/1.0, whose proxies do not know it.
    length, coding = fields.get("content-length", "0"), fields.get("transfer-encoding")
    if coding is not None and ("content-length" in fields or minor == 0):
        raise BadRequest("Transfer-Encoding does not go with Content-Length or HTTP/1.0")
    if coding is not None and coding.lower() != "chunked":
        raise UnknownTransferCoding("the only transfer coding here is chunked")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise BadRequest("Content-Length is not 1 to 18 digits")
    if int(length) > MAX_BODY:
        raise ContentTooLarge(f"the body has more than {MAX_BODY} bytes")
    return int(length), coding is not None


def parse_keep_alive(fields: Mapping[str, str], minor: int) -> bool:
    """Return whether the connection stays open: close beats keep-alive (RFC 9112, 9.3)."""
    if "connection" not in fields:
        return minor > 0
    options = [option.strip() for option in fields["connection"].lower().split(",")]
    return "close" not in options and (minor > 0 or "keep-alive" in options)


def parse_expect(fields: Mapping[str, str], minor: int) -> bool:
    """Return whether the client waits for a 100 before it sends its body (RFC 9110, 10.1.1)."""
    expect = fields.get("expect", "").lower()
    if expect not in ("", "100-continue"):
        raise ExpectationFailed("the only expectation met here is 100-continue")
    return expect != "" and minor > 0


def check_partial(head: bytes | bytearray, checked: int = 0) -> None:
    """Raise a subclass of Error if an unfinished head has a bad request line or character, or is too long already.

    The first `checked` bytes were checked by an earlier call and are skipped. Otherwise a client that sends one byte at
    a time could keep the server busy with the same bytes.
    """
    end = head.find(b"\r\n", 0, MAX_REQUEST_LINE + 2)
    if end >= max(0, checked - 1) or (end < 0 and len(head) - head.endswith(b"\r") > MAX_REQUEST_LINE):
        parse_request_line(bytes(head[:end] if end >= 0 else head))
    check_head_text(head, checked)


def check_head_text(text: bytes | bytearray, checked: int) -> None:
    """Raise if the text is too long, or has a character, past `checked` bytes, that heads and trailers may not have."""
    if _NEVER_IN_HEAD.search(text, max(0, checked - 1)):
        raise BadRequest("there is a bare CR, a bare LF or a control character")
    if len(text) > MAX_HEAD:
        raise RequestHeaderFieldsTooLarge(f"the head, or what follows a chunked body, has more than {MAX_HEAD} bytes")


class Reader:
    """The requests in the bytes of one connection: feed() what arrives, then read() until it returns None.

    Reading is a generator, which yields a request, or None where it needs more bytes. So the code follows the grammar
    from top to bottom, whatever the pieces in which the bytes come. A position marks what has been read, and the buffer
    is cut there only when more is needed, so the cost of a request grows with its bytes alone.
    """

    def __init__(self) -> None:
        self.waits_for = IDLE  # or HEAD or BODY
        self.ended = False  # the client will send no more
        self.owes_continue = False  # the client waits for "100 Continue" before it sends its body
        self._data, self._at = bytearray(), 0  # the bytes that are held, and how many of them are read
        self.asks_for_head = False  # the request that is being read, legal or not, is a HEAD: its answer has no body
        self._requests = self._read_requests()

    def feed(self, piece: bytes) -> None:
        """Add what has arrived; an empty piece is the end of the stream."""
        if self._at:
            self._drop_read()
        self._data += piece
        self.ended = not piece

    def read(self) -> Request | None:
        """Return the next request, or None if it is not whole; `waits_for` then tells what is missing.

        Raises a subclass of Error for the first rule that is broken; nothing can be read after that.
        """
        if self.waits_for == IDLE and self._at == len(self._data):  # a shortcut: this holds after nearly every request
            return None
        request = next(self._requests)
        if request is None and self.ended and self.waits_for != IDLE:
            raise BadRequest("the request is cut")
        return request

    def close(self) -> None:
        """End the reading."""
        # The generator refers to the reader, and the reader to the generator. Left to the garbage collector, which may
        # not come for minutes, the bytes of closed connections took 10 MB under attack.
        self._requests.close()

    @property
    def is_empty(self) -> bool:
        """Whether all that has arrived was read."""
        return self._at == len(self._data)

    @property
    def size(self) -> int:
        """How many bytes are held."""
        return len(self._data)

    def _drop_read(self) -> None:
        del self._data[: self._at]
        self._at = 0

    def _read_requests(self) -> Generator[Request | None, None, None]:
        data = self._data
        while True:
            # 1. Find the empty line that ends the head. A few empty lines may precede the head (RFC 9112, 2.2).
            skipped = checked = 0
            while True:
                while skipped < MAX_EMPTY_LINES and data.startswith(b"\r\n", self._at):
                    self._at, skipped = self._at + 2, skipped + 1
                self.asks_for_head = data.startswith(b"HEAD ", self._at)
                end = data.find(b"\r\n\r\n", self._at + max(0, checked - 3)) + 4
                if end >= 4:
                    break
                self._drop_read()
                if data:
                    check_partial(data, checked)
                self.waits_for, checked = HEAD if data else IDLE, len(data)
                yield None
            # 2. Parse the head.
            head = bytes(data[self._at : end])
            request = _parse_small_head(head) if len(head) <= SMALL_HEAD else parse_head(head)
            self._at = end  # only now: while a request is refused, its bytes count as unread, see Connection.is_idle
            # 3. Read the body, which has chunks or a length. If some of it is here, the client does not wait for a 100.
            if request.chunked or request.length:
                self.waits_for, self.owes_continue = BODY, request.expects_continue and self.is_empty
                read = self._read_chunks() if request.chunked else self._read_length(request.length)
                request = request._replace(body=(yield from read))
            self.waits_for = IDLE
            yield request

    def _read_length(self, length: int) -> Generator[None, None, bytes]:
        while len(self._data) - self._at < length:
            yield
        self._at += length
        return bytes(self._data[self._at - length : self._at])

    def _read_chunks(self) -> Generator[None, None, bytes]:
        """Return a chunked body, read strictly; extensions are skipped (RFC 9112, 7.1)."""
        body, chunks = bytearray(), 0
        while True:
            # 1. A line with the size in hex digits, and perhaps extensions. int() alone would take signs and 0x too.
            while not (line := _CHUNK_LINE.match(self._data, self._at, self._at + MAX_CHUNK_LINE + 2)):
                begun = self._data[self._at : self._at + MAX_CHUNK_LINE + 2]
                if b"\r\n" in begun or len(begun) > MAX_CHUNK_LINE + 1 or _NEVER_IN_HEAD.search(begun):
                    raise BadRequest("a chunk does not begin with a line that says its size")
                yield
            size = int(line[1], 16)
            if not size:
                break
            chunks += 1
            if len(body) + size > MAX_BODY or chunks > MAX_CHUNKS:
                raise ContentTooLarge(f"the body has more than {MAX_BODY} bytes or {MAX_CHUNKS} chunks")
            # 2. As many bytes as the size says, and the end of a line.
            self._at = line.end()
            while len(self._data) - self._at < size + 2:
                yield
            end = self._at + size
            body += self._data[self._at : end]
            if not self._data.startswith(b"\r\n", end):
                raise BadRequest("a chunk and its size disagree")
            self._at = end + 2
        # 3. Trailers, which are checked and dropped. Reading begins at the CRLF before them, so that the search for an
        #    empty line works even if there are none.
        self._at, checked = line.end() - 2, 0
        while (end := self._data.find(b"\r\n\r\n", self._at + max(0, checked - 3))) < 0:
            self._drop_read()
            check_head_text(self._data, checked)
            checked = len(self._data)
            yield
        parse_fields(bytes(self._data[self._at : end]).split(b"\r\n")[1:])
        self._at = end + 4
        return bytes(body)


####################################################################################################
# Answers
####################################################################################################
# What is sent back: a status, header lines and a body. Records and errors become JSON or YAML here. A long index
# becomes a series of pieces, so that it needs little memory.

MAX_WAITING = 8  # requests that wait for a slow store, each in its own thread; further ones are refused at once
PIECE = 16384  # bytes received, or gathered, at once: recv allocates this many, and a TLS record is not longer

_CONTENT_TYPES = {"json": "application/json", "yaml": "text/yaml;charset=utf-8"}
_CACHE_CONTROL = "private, no-cache"  # a cache has to ask each time, since each account sees different images


class Body(Protocol):
    """The body of an answer that is not held in memory: TextBody, or FileBody in the part Optional."""

    length: int | None  # in bytes; None: sent in chunks
    most_waiting: int  # when this many pieces of work wait for the store or a disk, the answer is cut off

    def more(self, stream: socket.socket) -> bytes | int:
        """Return the next piece, or send it on the stream and return its length; b"" at the end.

        Raises Error or OSError, of which BlockingIOError means that the client takes nothing at the moment.
        """

    def close(self) -> None:
        """Release what the body holds: a walk through the store, or an open file."""


class Answer(NamedTuple):
    """A status, header lines that each end with CRLF, and a body."""

    status: int
    head: bytes
    body: bytes | Body


def make_answer(status: int, lines: str, body: bytes | Body = b"") -> Answer:
    """Return an answer with these header lines and Content-Length, unless that is unknown or not allowed (204, 304)."""
    length = len(body) if isinstance(body, bytes) else body.length
    if length is not None and status not in (204, 304):
        lines += f"Content-Length: {length}\r\n"
    return Answer(status, lines.encode("ascii"), body)


def content_answer(request: Request, type: str, body: bytes | Body, lines: str = "") -> Answer:
    """Return 200 with this content, or 304 if the client has it already."""
    # The ETag is a digest of the body and not the revision: changes elsewhere in the store do not alter it, and a store
    # that was restored from a copy cannot give an old tag to new content. A streamed body is not known yet, so its tag
    # is random, and only "*" matches it.
    tag = hashlib.blake2b(body, digest_size=12).hexdigest() if isinstance(body, bytes) else os.urandom(12).hex()
    lines += f'ETag: "{tag}"\r\nCache-Control: {_CACHE_CONTROL}\r\n'
    if "if-none-match" in request.fields and matches_etag(request.fields["if-none-match"], f'"{tag}"'):
        if not isinstance(body, bytes):
            body.close()
        return make_answer(304, lines)
    return make_answer(200, f"Content-Type: {type}\r\n{lines}X-Content-Type-Options: nosniff\r\n", body)


def matches_etag(field: str, etag: str, weakly: bool = True) -> bool:
    """Return whether If-None-Match (compared weakly) or If-Match (strongly) names the tag (RFC 9110, 13.1)."""
    return field == "*" or etag in [tag.strip().removeprefix("W/" if weakly else "") for tag in field.split(",")]


def error_answer(error: Error, version: Version, format: str = "json") -> Answer:
    """Return an error in the form that the API has for all errors."""
    name = version.prefix + type(error).__name__
    shown = {"error": name, "message": str(error) or name, "code": error.code}
    return make_error(error, _CONTENT_TYPES[format], encode(shown, format))


def make_error(error: Error, type: str, body: bytes, lines: str = "") -> Answer:
    """Return an answer with the status of an error and the header lines that this status requires."""
    lines += f"Content-Type: {type}\r\n"
    if isinstance(error, MethodNotAllowed):
        lines += f"Allow: {error}\r\n"
    if isinstance(error, RangeNotSatisfiable):
        lines += f"Content-Range: bytes */{error}\r\n"
    if error.status == 503:
        lines += "Retry-After: 1\r\n"
    if error.status == 401:
        lines += 'WWW-Authenticate: Basic realm="wmi", charset="UTF-8"\r\nWWW-Authenticate: Bearer realm="wmi"\r\n'
    return make_answer(error.status, lines, body)


_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))


def to_json(value: Any) -> str:
    """Return a value as JSON, spelled as in the API: without spaces, and without escapes for letters beyond ASCII."""
    return _json.encode(value)


def encode(value: Any, format: str) -> bytes:
    """Return a value as the body of an answer, in json or yaml."""
    return (to_json(value) if format == "json" else to_yaml(value)).encode("utf-8", "replace")


def render_page(version: Version, page: Page, format: str) -> Generator[str, None, None]:
    """Yield an index in pieces of at most one image each."""
    # The envelope is rendered with an empty list of images and cut there, so that a long index needs little memory.
    envelope: Any = dict(zip(version.envelope, (page.total, page.start, page.limit, [])))
    envelope = [envelope] if version.wrapped else envelope
    images = (render(version, image) for image in page.images)
    if format == "json":
        before, after = to_json(envelope).split("[]")
        yield f"{before}["
        for number, image in enumerate(images):
            yield ("," if number else "") + to_json(image)
        yield f"]{after}"
        return
    before = to_yaml(envelope)[: -len(" []\n")]  # the list is the last field of every envelope
    number = 0
    for number, image in enumerate(images, 1):
        rows = "".join(yaml_lines([image], "  " if version.wrapped else ""))
        yield rows if number > 1 else f"{before}\n{rows}"
    if not number:
        yield f"{before} []\n"


def gather(texts: Iterator[str], size: int) -> bytes:
    """Return the next texts as at least `size` bytes, or fewer if the texts end; b"" when no text is left."""
    gathered = bytearray()
    while len(gathered) < size and (text := next(texts, None)) is not None:
        gathered += text.encode("utf-8")
    return bytes(gathered)


class TextBody:
    """A long index as a body; close() calls `closed`."""

    length: int | None = None
    most_waiting = 2 * MAX_WAITING

    def __init__(self, first: bytes, texts: Generator[str, None, None], closed: Callable[[], object]) -> None:
        self._first, self._texts, self._closed = first, texts, closed

    def more(self, stream: socket.socket) -> bytes:
        """Return the next piece; see Body."""
        piece, self._first = self._first or gather(self._texts, PIECE), b""
        return piece

    def close(self) -> None:
        """End the walk through the store."""
        with contextlib.suppress(ValueError):  # "generator already executing": a thread waits for the store in it
            self._texts.close()
        self._closed()


####################################################################################################
# Service
####################################################################################################
# From a request to an answer, without sockets: find the route, ask a catalog, render what it returns.
#
# Answers that are asked for again are kept in memory. Reading the store again would cost many times as much as looking
# at its revision. The promise is that no answer misses a change that was reported as done before its request arrived:
#
#     1. Each change to a store gives it a new revision, one that it never had before.
#     2. A GET takes the revision before it reads the store, and the next look takes it once more. The answer is kept
#        only if both are the same: then nothing changed in between, and the answer shows just this revision.
#     3. A kept answer is served only if a look at the store that began after the request had arrived shows the same
#        revision. So it is what the store held at a moment after the arrival, and what a new read would have returned.
#     4. A look thus serves every request that arrived before it. The server works in rounds, one for all requests that
#        have just arrived, and looks once before each round.
#
# The key of a kept answer holds all that the answer depends on: see CacheKey. What depends on anything else, such as a
# page for people or a file, is not kept.

MAX_WALKS = 4  # indexes with filters that are begun at the same time: each may read all images
MAX_STREAMS = 64  # long indexes that are being sent at the same time: each holds some images in memory
KEPT_AT_MOST = 1 << 16  # bytes of an index that is built in one piece and may be kept; a longer one is streamed
ASKED_AT_MOST = 2048  # different requests that are remembered; an answer is kept when it is asked for a second time
FRESH_AT_MOST = 32  # new answers in one round that may be kept
CACHE_BYTES = 2 << 20  # of kept answers in each process: about 200 pages of 20 images

_IMAGES_PATH = r"/api(?:/(11\.12|12\.03))?/images(?:/([^/.]+))?(|\.json|\.yml|\.yaml)"

Kept = tuple[str, "Answer | None", int]  # the revision that an answer shows, the answer, its size in bytes
_NOT_KEPT: Kept = "", None, 0


class Postponed(Exception):
    """Raised when a request needs a look at the store that is newer than the one under way; then it is tried again."""


Pulse = Callable[[], None]  # called now and then during a walk through all images; raises an Error to end the walk
Read = Callable[["Service", "Request", "Route", float, Pulse], Answer]  # answers GET and HEAD


class Route(NamedTuple):
    """The meaning of a path."""

    version: Version
    id: str | None  # of an image; None: all images
    format: str  # json or yaml
    read: Read  # answers GET and HEAD of this path


class Service:
    """The API over one store: takes requests and returns answers. Threads may share a service.

    `report` is called with a line of text for each failure of the store or of this program. The server sets `waiting`
    to the number of threads that wait at the moment, for the store or a disk.
    """

    def __init__(
        self, storage: Storage, unversioned: str = DOCUMENT, report: Callable[[str], None] = print,
        hosts: Container[str] | None = None, files: str | None = None, tokens: Tokens | None = None,
    ) -> None:
        self.unversioned, self.waiting = find_version(unversioned), 0
        self.files, self.tokens = files, tokens  # the directory of image files, and who may call: see Optional
        self.secure = False  # True: clients connect over HTTPS
        rows = [row for row in ROUTES if not row[2] or getattr(self, row[2])]
        self._routes = [(re.compile(pattern), read) for pattern, read, _ in rows]
        self._hosts = hosts  # names that a request may be sent to; None: any
        self.storage, self._report = storage, report
        self._catalogs = functools.lru_cache(maxsize=64)(functools.partial(Catalog, storage))
        # One tuple, so that a thread which reads it without a lock gets a revision and the time of the same look.
        self._known = 0.0, ""  # when the last look at the store's revision began, and the revision that it showed
        self._kept: collections.OrderedDict[Any, Kept] = collections.OrderedDict()  # least recently used first
        self._kept_bytes = 0
        self._asked: set[int] = set()  # hashes of the keys of earlier requests, since a key may be long
        self.fresh: list[tuple[CacheKey, Kept]] = []  # answers since the last look, to be kept by the next one
        self._lock = threading.Lock()  # held by _keep(), which changes _kept and _kept_bytes
        self.looking = False  # look() is under way: requests that need a newer look are postponed
        self._walks, self._streams = threading.Semaphore(MAX_WALKS), threading.Semaphore(MAX_STREAMS)

    def identify(self, request: Request) -> Request:
        """Return the request with the account that its token proves, if any; without --tokens, return it unchanged."""
        return self.tokens.identify(request) if self.tokens else request

    def answer(self, request: Request, arrived: float | None = None, pulse: Pulse = lambda: None) -> Answer:
        """Return the answer to a request; each failure becomes an error in the form of its path. Raises Postponed.

        `arrived` is a time.monotonic() at which the whole request had arrived, by default now. `pulse` is called now
        and then during a walk through all images, and may raise an Error to end the walk.
        """
        arrived = time.monotonic() if arrived is None else arrived
        try:
            if self._hosts is not None and request.host not in self._hosts:
                raise MisdirectedRequest(f"{request.host} is not served here; --host-name allows it")
            request = self.identify(request)
            if request.method not in ("GET", "HEAD"):
                return self._change(request)
            # The server may have tried kept_answer(), which returned None because the store has changed, or because the
            # last look began before this request arrived. After one more look, the answer may still come from memory.
            if request.cache_key in self._kept:
                self.revision(arrived)
                if answer := self.kept_answer(request, arrived):
                    return answer
            route = self._route(request.path)
            return route.read(self, request, route, arrived, pulse)
        except Error as error:
            if error.status >= 500 and error.__cause__:
                self._report(f"{request.method} {request.target}: {error}: {error.__cause__}")
            return self.answer_error(error, request)
        except Postponed:
            raise
        except MemoryError:
            return self.answer_error(DatabaseError("out of memory; try again"), request)
        except Exception as error:  # a bug in this program: the log says what it is, the client need not know
            self._report(f"{request.method} {request.target}: {error!r}")
            return self.answer_error(Error("internal error"), request)

    def kept_answer(self, request: Request, arrived: float) -> Answer | None:
        """Return the kept answer if the last look at the store is enough to know that it is up to date, else None."""
        # Called for nearly every request, so it takes no lock: dict and tuple are read in one step each, and _NOT_KEPT
        # stands for an entry that another thread has dropped in between. See steps 3 and 4 at the top of this part.
        if request.cache_key not in self._kept or request.method not in ("GET", "HEAD"):
            return None
        (moment, known), (revision, answer, _) = self._known, self._kept.get(request.cache_key, _NOT_KEPT)
        if revision != known or moment <= arrived:
            return None
        if self._kept_bytes > CACHE_BYTES // 2:  # while the cache is less than half full, the order does not matter
            with contextlib.suppress(KeyError):  # another thread has just dropped it
                self._kept.move_to_end(request.cache_key)
        return answer

    def answer_error(self, error: Error, request: Request | None = None) -> Answer:
        """Return an error as the answer to a request; None stands for a request that could not be read."""
        # The error has the form of the path that was asked for: its version, JSON or YAML, or a page for people.
        version, format = self.unversioned, "json"
        with contextlib.suppress(NotFound):
            if request:
                version, _, format, read = self._route(request.path)
                if read in ERROR_PAGES:
                    return ERROR_PAGES[read](error, request)
        return error_answer(error, version, format)

    def _route(self, path: str) -> Route:
        for pattern, read in self._routes:
            if match := pattern.fullmatch(path):
                version, id, suffix = match.groups()
                chosen = VERSIONS[version] if version else self.unversioned
                format = "yaml" if suffix.startswith(".y") else "json"
                return Route(chosen, urllib.parse.unquote(id) if id else None, format, read)
        raise NotFound(path)

    def _change(self, request: Request) -> Answer:
        """Answer a request whose method is neither GET nor HEAD."""
        if request.path == "*":
            return make_answer(204, "Allow: GET, HEAD, PUT, DELETE, OPTIONS\r\n")
        methods, (version, id, format, read) = ["GET", "HEAD", "OPTIONS"], self._route(request.path)
        if id is not None and read is Service.read_images:
            methods += ["DELETE", "PUT"] if version.updatable else ["DELETE"]
        if request.method not in methods:
            raise MethodNotAllowed(", ".join(methods))
        if request.method == "OPTIONS":
            return make_answer(204, f"Allow: {', '.join(methods)}\r\n")
        catalog = self.catalog(request, version)
        if request.method == "DELETE":
            done: Any = [catalog.destroy(id or "")]
        else:
            done = render(version, catalog.update(id or "", **parse_update(request, version.updatable)))
        return make_answer(200, f"Content-Type: {_CONTENT_TYPES[format]}\r\n", encode(done, format))

    def catalog(self, request: Request, version: Version, otherwise: str = "") -> Catalog:
        """Return the catalog of the account that calls, unless too many requests wait for the store already.

        `otherwise` is the account if the request names none; with --tokens it does not count.

        Raises InvalidRequestCredentials, OperationNotPermitted, DatabaseError.
        """
        # With --tokens, only the token counts. Without --tokens, the header is believed, as by the original DCMGR.
        named = request.fields.get("x-vdc-account-uuid") or otherwise
        account = self.tokens.proven_account(request) if self.tokens else named
        try:
            catalog = self._catalogs(account, version.name)
        except InvalidParameter as error:
            message = f"Invalid uuid or unsupported uuid: {account} in Dcmgr::Models::Account"
            raise InvalidRequestCredentials(message if account else version.no_account) from error
        self.check_waiting(MAX_WAITING)
        return catalog

    def look(self) -> None:
        """Look at the store's revision before a round of requests, for all of them; never raises.

        If the look fails, answer() looks again and answers with the error. Only the thread that serves may call this.
        """
        # A changed file of tokens is noticed here too, before any request of the round is identified.
        if self.tokens and (fault := self.tokens.refresh()):
            self._report(f"tokens: {fault}; the last good ones stay in force")
        # If the store is slow, the thread that looks is held up, and another one serves. The look under way began too
        # early for the requests that come now. They wait for the next look, and need no threads for that.
        if not self.looking:
            self.looking = True
            with contextlib.suppress(Exception):
                self._look()
            self.looking = False

    def _look(self) -> str:
        # Two threads may look at the same time and set _known in either order. Both values are true, and an older one
        # only costs another look. Two things are taken before the store is asked. The answers: one that is made during
        # the look waits for the next look. The time: the revision may be that of the moment when the look began.
        fresh, self.fresh = self.fresh, []
        moment = time.monotonic()
        with StorageErrors():
            revision = self.storage.revision()
        self._known = moment, revision
        if fresh:
            self._keep(fresh, revision)
        return revision

    def check_waiting(self, limit: int) -> None:
        """Raise DatabaseError if at least `limit` threads wait for the store or a disk."""
        if self.waiting >= limit:
            raise DatabaseError("too many requests wait for the store; try again")

    def revision(self, arrived: float) -> str:
        """Return a revision that the store had at some moment after `arrived`. Raises DatabaseError, Postponed."""
        moment, revision = self._known
        if moment > arrived:
            return revision
        if self.looking:
            raise Postponed
        return self._look()

    def read_images(self, request: Request, route: Route, arrived: float, pulse: Pulse) -> Answer:
        """Answer GET and HEAD of one image or of an index. Raises Postponed and every Error of Catalog."""
        # 1. The revision comes first: see step 2 at the top of this part. A cluster is asked for it once per round;
        #    with at_least(), the images are then read from this server's own copy.
        version, id, format, _ = route
        catalog, revision = self.catalog(request, version), self.revision(arrived)
        body: bytes | Body
        catalog = catalog.at_least(revision)
        # 2. Read and render.
        if id is not None:
            body = encode(render(version, catalog.show(id)), format)
        else:
            query = parse_query(request.query, ("start", "limit", *version.filters))
            if {"start", "limit"}.issuperset(query):
                body = self._gather_page(catalog, query, format)
            else:  # a filter or sort_by: every image may have to be read
                with self.walking(catalog, pulse) as walking:
                    body = self._gather_page(walking, query, format)
        answer = content_answer(request, _CONTENT_TYPES[format], body)
        # 3. Propose the answer to the next look. The account in the key must be the one that the answer was made for;
        #    with --tokens they could differ if the file of tokens changed after identify().
        may_be_kept = len(self.fresh) < FRESH_AT_MOST and request.cache_key[1] == catalog.account
        if may_be_kept and isinstance(answer.body, bytes) and self._was_asked(request.cache_key):
            size = len(answer.head) + len(answer.body) + sum(map(len, request.cache_key)) + 1024  # for Python's objects
            self.fresh.append((request.cache_key, (revision, answer, size)))
        return answer

    @contextlib.contextmanager
    def walking(self, catalog: Catalog, pulse: Pulse) -> Iterator[Catalog]:
        """Yield a catalog for a walk through all images. Raises DatabaseError if MAX_WALKS of them are under way."""
        if not self._walks.acquire(blocking=False):
            raise DatabaseError("too many requests look at all images; try again")
        try:
            yield Catalog(catalog.storage, catalog.account, catalog.version.name, pulse)
        finally:
            self._walks.release()

    def _gather_page(self, catalog: Catalog, query: Mapping[str, Any], format: str) -> bytes | Body:
        """Return an index: as bytes if it is short, otherwise as a body that reads the store while it is sent."""
        texts = render_page(catalog.version, catalog.index(**query), format)
        first = gather(texts, KEPT_AT_MOST)
        if len(first) < KEPT_AT_MOST:
            return first
        if not self._streams.acquire(blocking=False):
            raise DatabaseError("too many long indexes are being sent; try again")
        return TextBody(first, texts, self._streams.release)

    def _was_asked(self, key: CacheKey) -> bool:
        """Return whether a request with this key came before, and remember the key."""
        # Keeping an answer costs a tenth of making it, which is wasted if nobody asks for it again. Two keys with the
        # same hash do no harm: the answer to one of them is kept too early.
        if hash(key) in self._asked:
            return True
        if len(self._asked) >= ASKED_AT_MOST:
            self._asked.clear()
        self._asked.add(hash(key))
        return False

    def _keep(self, fresh: list[tuple[CacheKey, Kept]], revision: str) -> None:
        """Keep those of the fresh answers that show this revision, which the store had after they were made."""
        # Steps 1 and 2 at the top of this part. An entry that replaces one with the same key also replaces its size.
        with self._lock:
            for key, entry in fresh:
                if entry[0] == revision:
                    self._kept_bytes += entry[2] - self._kept.pop(key, _NOT_KEPT)[2]
                    self._kept[key] = entry
            while self._kept_bytes > CACHE_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1][2]


# The table of paths: a pattern with three groups (version, id and ending), the function that answers GET and HEAD, and
# the attribute of Service without which the path does not exist. The part Optional adds rows.
ROUTES: list[tuple[str, Read, str]] = [(_IMAGES_PATH, Service.read_images, "")]
ERROR_PAGES: dict[Read, Callable[[Error, Request], Answer]] = {}  # how to answer errors of paths that people visit


def parse_query(query: str, known: Sequence[str]) -> dict[str, Any]:
    """Return the known parameters; if one is repeated, the last one counts. Raises InvalidParameter."""
    # As in Rack, on which the originals ran. Only filter[] may be a list, of tests.
    params: dict[str, Any] = {}
    for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        name, bracket, key = name.partition("[")
        if name not in known:
            continue
        if not bracket and not isinstance(params.get(name), list):
            params[name] = value
        elif name == "filter" and key == "]" and isinstance(params.setdefault(name, []), list):
            params[name].append(value)
        else:  # start[]=1 is a list in Rack, and only filter may be one; or both filter= and filter[]= came
            raise InvalidParameter(name)
    return params


def parse_update(request: Request, known: Sequence[str]) -> dict[str, Any]:
    """Return the fields that a PUT sets: from the query, and from a form, a JSON object, or one in {"image": …}.

    Raises InvalidParameter and UnsupportedMediaType.
    """
    params: dict[str, Any] = dict(parse_query(request.query, known))
    kind = request.fields.get("content-type", "").partition(";")[0].strip().lower()
    if request.body and kind == "application/json":
        try:
            value = json.loads(request.body)
        except (ValueError, RecursionError) as error:
            raise InvalidParameter(f"the body is not JSON: {error}") from error
        value = value.get("image", value) if isinstance(value, dict) else value
        if not isinstance(value, dict):
            raise InvalidParameter('the body, or "image" in it, is not a JSON object')
        params.update((name, value[name]) for name in known if value.get(name) is not None)
    elif request.body and kind in ("", "application/x-www-form-urlencoded"):
        params.update(parse_query(request.body.decode("utf-8", "surrogateescape"), known))
    elif request.body:
        raise UnsupportedMediaType("send a form or application/json")
    return params


####################################################################################################
# Connections
####################################################################################################
# One client: what has arrived from it, and the one answer that is sent to it. The engine has one rule: a turn never
# waits for a client. A turn, which is a call of Connection.advance(), does what can be done now and returns what has to
# come next: READ, WRITE, TURN, WORK or CLOSE. The next part, Server, sees to that. The life of a connection:
#
#            READ, until it is whole          WRITE, until the client takes more
#                    +---+                           +---+
#                    |   v                           |   v
#     accept -----> reading ---- kept, refused ---> sending ---- the last one is sent ----> lingering
#                    ^   |                          ^ | | ^                           READ: what still comes is dropped
#                    |   |                          | | | |
#                    |   +--- WORK ---> answering --+ | +-+ WORK, for the next piece of a long body
#                    |                                |
#                    +------- the answer is sent -----+
#
# An answer is sent without WORK if it is kept (see Service), or if it refuses a request that breaks the rules of HTTP.
# A turn makes ANSWERS_IN_A_TURN such answers at most; if there are more requests, the connection wants another TURN.
# Nothing is read while an answer is made or sent: a client that sends requests but reads no answers costs nothing.
# CLOSE can come anywhere, when the client has hung up. When a deadline passes, deadline_error() ends the wait: an idle
# connection is closed, an unfinished request is answered 408, and an unfinished answer is cut off with a reset.

IDLE_SECONDS = 15  # between two requests; Apache waits 5 s, nginx 75 s
HEAD_SECONDS = 10  # for a whole head, from its first byte on; for a TLS handshake
BODY_SECONDS = 30  # for a whole body
SEND_SECONDS = 30  # for a client to take any more of its answer: what counts is progress, not speed
LINGER_SECONDS = 1  # for a client to read the last answer
ANSWERS_IN_A_TURN = 8  # without work; with no limit, 900 clients that pipeline made a new one wait for 5 s
LOGGED = 1600  # characters of a target or a failure in the log: JSON may double them, and a line fits into PIPE_BUF
LOGGED_METHOD = 32  # characters of a method

READ, WRITE, TURN, WORK, CLOSE = selectors.EVENT_READ, selectors.EVENT_WRITE, 4, 8, 16  # what has to come next

_REASONS = {code: reason for code, (reason, _) in http.server.BaseHTTPRequestHandler.responses.items()}
Result = Union[Answer, bytes, int, Exception]  # of work: an answer, or what Body.more() returned, or a failure


class Connection:
    """One client: what it has sent, and the one answer that is sent to it."""

    def __init__(self, stream: socket.socket, address: Any, server: Server) -> None:
        self.socket, self.server = stream, server
        self.client = address[0] if isinstance(address, tuple) else "unix"
        self.watched = 0  # what the selector watches for: READ, WRITE, or 0 for nothing
        self.queued_since = 0.0  # since when it waits for a turn or for work, and is not received from; 0: it does not
        # Input. Nothing is received while an answer is made or sent.
        self.reader = Reader()
        self.receiving = True
        self.lingering = False  # the last answer is sent, and the client may still be reading it
        # The answer, from the moment when its request is read to the moment when its last byte is sent.
        self.request: Request | None = None  # also None if what came broke the rules and is refused
        self.status = self.sent = self.head_size = 0  # status 0: no answer is being sent; the others are in bytes
        self.keep_alive = self.chunked = False
        self.unsent: bytes | memoryview = b""
        self.body: Body | None = None  # the source of more bytes to send, as long as it has any
        # Times. What was received last had arrived by `arrived`: the answer must show each change that was reported as
        # done before. The first bytes of the request had arrived by `began`, from which the log counts. `phase` (IDLE,
        # HEAD, BODY) says what the server waits for; it has waited since `waiting_since`, and gives up at `deadline`.
        self.arrived = self.began = self.waiting_since = server.round_time
        self.phase = IDLE
        self.deadline = server.round_time + IDLE_SECONDS

    @property
    def is_idle(self) -> bool:
        """Whether nothing has arrived that will be answered."""
        return self.lingering or (self.receiving and self.reader.is_empty and self.reader.waits_for == IDLE)

    @property
    def is_change(self) -> bool:
        """Whether its request may change the store."""
        return self.request is not None and self.request.method not in ("GET", "HEAD")

    def receive(self) -> int:
        """Take what has arrived, and return what has to come next: TURN, READ or CLOSE. Raises OSError."""
        try:
            piece = self.socket.recv(PIECE)
        except BlockingIOError:
            return READ
        self.arrived = time.monotonic()
        if self.lingering:
            return READ if piece else CLOSE
        self.reader.feed(piece)
        return TURN

    def advance(self, result: Result | None = None) -> int:
        """Do what can be done now, and return what has to come next: READ, WRITE, TURN, WORK or CLOSE.

        `result` is what work() or deadline_error() returned, or an Error with which to refuse the client.
        """
        service = self.server.service
        try:
            # 1. Take the result of work: an answer, or the next piece of its body.
            if isinstance(result, Answer):
                self._start_answer(result)
            elif result is not None:
                self._take_piece(result)
            for _ in range(ANSWERS_IN_A_TURN):
                # 2. Send what there is.
                if wants := self._finish_answer():
                    return wants
                # 3. Read the next request.
                if self.phase == IDLE:
                    self.began = self.arrived
                try:
                    request = self.request = self.reader.read()
                except Error as error:
                    self._start_answer(service.answer_error(error))
                    continue
                # 4. Answer it, if the answer is kept.
                if request is not None:
                    request = self.request = service.identify(request)
                    self.phase, self.receiving = IDLE, False
                    answer = service.kept_answer(request, self.arrived)
                    if answer is None:
                        return WORK
                    self._start_answer(answer)
                    continue
                # 5. It is not whole. Ask for its body if the client waits for that, and wait.
                if not self.reader.owes_continue:
                    return self._await_input()
                self.unsent, self.reader.owes_continue = b"HTTP/1.1 100 Continue\r\n\r\n", False
            return self._finish_answer() or TURN  # the others first: this client has sent many requests at once
        except BlockingIOError:  # from work(): the client took nothing of the piece that Body.more() tried to send
            return WRITE
        except Exception as error:
            return self._abort(error)

    def _finish_answer(self) -> int:
        """Send what there is of the answer, if any; return 0 if all is sent, or what has to come next."""
        # 1. As far as the client takes it.
        if self.unsent and (wants := self._send()):
            return wants
        # 2. If there is more of a long body, let work() fetch it.
        if self.body is not None:
            return WORK
        # 3. If there was an answer, all of it is sent by now.
        if self.status:
            self._log_answer()
            if not self.keep_alive:
                return self._linger()
        return 0

    def work(self) -> Result:
        """Do what may have to wait for the store or a disk: answer the request, or get more of the body. Return it."""
        # A failure is returned, not raised: advance() takes it like any other result, and tells the client.
        try:
            if self.body is not None:
                # The head is sent, so an error can only cut the answer off. The client sees that bytes are missing.
                self.server.service.check_waiting(self.body.most_waiting)
                return self.body.more(self.socket)
            assert self.request is not None
            return self.server.service.answer(self.request, self.arrived, self._check_alive)
        except Exception as error:
            return error

    def _check_alive(self) -> None:
        """Raise Unreachable if the client has hung up. A client that sends no more counts as gone, as in nginx."""
        try:
            if hasattr(select, "POLLRDHUP"):  # Linux tells, even if there are bytes to read, such as TLS's last ones
                poll = select.poll()
                poll.register(self.socket, select.POLLRDHUP)
                gone = bool(poll.poll(0))
            else:
                gone = not socket.socket.recv(self.socket, 1, socket.MSG_PEEK)  # that of an SSLSocket does not peek
        except BlockingIOError:
            gone = False
        except (OSError, ValueError):  # a ValueError: the leader has closed the connection meanwhile
            gone = True
        if gone:
            raise Unreachable("the client has hung up")

    def deadline_error(self) -> Exception:
        """Return the result that makes advance() close an idle connection, refuse a request, or cut off an answer."""
        return ConnectionAbortedError() if self.is_idle else RequestTimeout("the request or its answer took too long")

    def _take_piece(self, result: bytes | int | Exception) -> None:
        """Take a piece of a body, or the size of one that was sent. Raise a failure that cannot be sent."""
        if isinstance(result, Exception):
            if self.status or not isinstance(result, Error):
                raise result
            self._start_answer(self.server.service.answer_error(result, self.request))
        elif isinstance(result, int):
            self.sent, self.deadline = self.sent + result, self.server.round_time + SEND_SECONDS
        else:
            self.unsent = b"%x\r\n%s\r\n" % (len(result), result) if self.chunked else result
        if not result:
            self._close_body()

    def _start_answer(self, answer: Answer) -> None:
        """Begin to send an answer."""
        request, body = self.request, answer.body
        minor = request.minor if request else 1
        unknown_length = not isinstance(body, bytes) and body.length is None
        self.chunked = unknown_length and minor > 0  # HTTP/1.0 has no chunks: there the connection ends with the body
        ends_itself = self.chunked or not unknown_length
        self.keep_alive = request is not None and request.keep_alive and not self.server.stopping and ends_itself
        head = _first_lines(answer.status, int(time.time())) + answer.head
        if self.chunked:
            head += b"Transfer-Encoding: chunked\r\n"
        if not self.keep_alive or not minor:
            head += b"Connection: keep-alive\r\n" if self.keep_alive else b"Connection: close\r\n"
        head += b"\r\n"
        self.status, self.sent, self.head_size = answer.status, 0, len(head)
        self.unsent, self.body = (head + body, None) if isinstance(body, bytes) else (head, body)
        if answer.status in (204, 304) or (request.method == "HEAD" if request else self.reader.asks_for_head):
            self.unsent = head
            self._close_body()

    def _send(self) -> int:
        """Send what there is; return 0 if that was all, or what has to come before the rest. Raises OSError."""
        try:
            count = self.socket.send(self.unsent)
        except BlockingIOError:
            return WRITE
        self.sent, self.deadline = self.sent + count, self.server.round_time + SEND_SECONDS
        self.unsent = b"" if count == len(self.unsent) else memoryview(self.unsent)[count:]
        return WRITE if self.unsent else 0

    def _await_input(self) -> int:
        """Set the deadline for what the reader waits for, and return what has to come next."""
        # A deadline is set when the wait begins, and not again when more of the same comes: a client that sends a byte
        # now and then must not hold a place for hours.
        waits_for = self.reader.waits_for
        if waits_for == IDLE:
            self.deadline = self.server.round_time + IDLE_SECONDS
            self.waiting_since = self.server.round_time
        elif waits_for != self.phase:
            self.waiting_since = self.server.round_time
            self.deadline = self.server.round_time + (HEAD_SECONDS if waits_for == HEAD else BODY_SECONDS)
        self.phase, self.receiving = waits_for, True
        return CLOSE if self.reader.ended else READ

    def _linger(self) -> int:
        """Send no more, and let the client read what was sent."""
        # An immediate close may be a reset, and the client would lose what it has not read yet (RFC 9112, 9.6).
        if self.server.stopping:
            return CLOSE
        self.socket.shutdown(socket.SHUT_WR)
        self.lingering = self.receiving = True
        self.waiting_since, self.deadline = self.server.round_time, self.server.round_time + LINGER_SECONDS
        return READ

    def _abort(self, error: Exception) -> int:
        """Log a failure, make close() send a reset if an answer is unfinished, and return CLOSE."""
        # Without the reset an unfinished answer in HTTP/1.0 would look whole.
        theirs = isinstance(error, (OSError, RequestTimeout, Unreachable)) and getattr(error, "errno", 0) != errno.EIO
        if not theirs:  # not caused by the client; EIO comes from the disk of an image file
            self.server.report(f"connection: {error!r}: {error.__cause__!r}")
        if self.status:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._log_answer()
        return CLOSE

    def _log_answer(self) -> None:
        """Log the answer, which was sent or cut off, and make room for the next one."""
        request, server, milliseconds = self.request, self.server, (time.monotonic() - self.began) * 1000
        account, method, target = (request.account, request.method, request.target) if request else "---"
        method, target, size = method[:LOGGED_METHOD], target[:LOGGED], max(0, self.sent - self.head_size)
        form, when = server.log_format, server.clock
        server.add_line(form.answer(when, self.client, account, method, target, self.status, size, milliseconds))
        self.request, self.status = None, 0

    def _close_body(self) -> None:
        if self.body is not None:
            self.body.close()
            self.body = None

    def close(self) -> None:
        """Close the socket and the reader, and the body of an answer that was cut off."""
        self._close_body()
        self.reader.close()
        self.socket.close()


@functools.lru_cache(maxsize=32)
def _first_lines(status: int, second: int) -> bytes:
    """Return the status line and the Date of an answer (RFC 9110, 5.6.7)."""
    return f"HTTP/1.1 {status} {_REASONS[status]}\r\nDate: {email.utils.formatdate(second, usegmt=True)}\r\n".encode()


def listen(host: str = "127.0.0.1", port: int = 9001, unix_socket: str | None = None) -> socket.socket:
    """Return a listening socket; with port 0 the system chooses the port. Raises InvalidParameter and OSError.

    A socket that systemd hands over, see sd_listen_fds(3), is taken before any other.
    """
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS", "0") != "0":
        return socket.socket(fileno=3)
    if unix_socket is None:
        if not 0 <= port <= 65535 or not re.fullmatch("[0-9A-Za-z.:%_-]+", host) or ".." in host:
            raise refuse("address", f"{host}:{port}", "a host, and a port of 0 to 65535")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:  # the address takes the place of a file name, which main() prints before the message
            raise OSError(error.errno, str(error.strerror).partition(" (while")[0], f"{host}:{port}") from error
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(unix_socket)
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.stat(unix_socket).st_mode):  # nobody listens there: a crash left it behind
                os.unlink(unix_socket)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(unix_socket)
    except OSError as error:
        listener.close()
        raise OSError(f"{unix_socket}: {error.strerror or error}") from error
    listener.listen(128)
    return listener


def served_hosts(listener: socket.socket, names: Sequence[str] | None) -> Container[str] | None:
    """Return the hosts that a server on this socket serves; None means any.

    The author of a web page can make a name point to 127.0.0.1, and so let the page reach a server on loopback from
    the browser of a visitor (DNS rebinding). So a server on loopback answers only to names of its own.
    """
    address: Any = listener.getsockname()
    if names is None or not isinstance(address, tuple) or not (address[0].startswith("127.") or address[0] == "::1"):
        return None
    return {"", "localhost", "127.0.0.1", "[::1]", address[0], *(name.lower() for name in names)}


def address_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return where a socket listens: the base URL for clients, or unix:PATH."""
    address: Any = listener.getsockname()
    if not isinstance(address, tuple):
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{scheme}://{host}:{address[1]}"


####################################################################################################
# Server
####################################################################################################
# The loop. One thread, the leader, serves all connections in rounds (see _serve_round). It receives what every client
# has sent, looks once at the revision of the store, and gives each connection a turn, in which kept answers are sent.
# Connections that want WORK are queued for it. Only work may wait: never for a client, but for a locked file, say, or
# for a cluster. When work takes longer than WORK_SECONDS, serve_forever starts another leader. The thread that was held
# up finishes this one piece of work, hands the result to the new leader, and ends. The number of such threads is
# bounded: see MAX_WAITING, and Body.most_waiting. If it is the look that takes long, requests that need one are
# postponed: the next look serves them all.
#
# Who may touch what:
#
#     the selector, `_queue`, `_postponed`,      the leader alone; but the thread in work() may read the attributes of
#     all connections, whatever is not listed    its connection, and send a piece of its body. Meanwhile `queued_since`
#                                                is set, and the connection gets no turn, for STORE_SECONDS at most
#     `round_time`, `clock`, `counts`            the leader sets them; any thread reads them
#     `_turns`                                   any thread appends a connection and a result; the leader takes them
#     `_leader`, `_working`, `_held`             any thread reads them, and who holds `_lock` changes them; the leader
#                                                alone begins work, so it sets `_working` without the lock
#     `_lines`, `_lost_lines`                    any thread adds; the one that has `_log_lock` takes and writes them
#     `_trimmed`, `parent`                       the threads of serve_forever and stop, one after the other
#     `stopping`, `tls`, `trim`                  any thread sets them, such as a handler of signals in the main thread
#
# Server keeps what people know from http.server.HTTPServer: serve_forever, shutdown, server_close,
# server_address, service_actions, handle_error, and the reason phrases. Two things are replaced: the loop, which serves
# one client at a time, and the handler, which accepts most of what RFC 9112 forbids.

MAX_CONNECTIONS = 1000  # per process; each costs a few KB and a descriptor
ACCEPT_AT_ONCE = 64  # connections that are accepted in one round
MAX_BUFFERED = 2 << 20  # bytes of all unfinished requests, and of all answers that clients do not take
SPARE_DESCRIPTORS = 24  # descriptors that are left to the store, the log and the selector
WORK_SECONDS = 0.05  # work may hold up the leader this long before another thread takes the lead
ROUND_SECONDS = 0.01  # for the turns of a round; with more, the log could overflow meanwhile
CHECK_SECONDS = 0.05  # between two checks of deadlines and other limits
POLL_SECONDS = 0.005  # between two looks for the results of threads that are held up
STORE_SECONDS = 10  # for one piece of work; the stores here give up earlier, after 8 s
STALLED_SECONDS = 2  # after which an unfinished request gives way to a new connection, if every place is taken
SHARE_SECONDS = 0.002  # for which a new connection is left to workers that have fewer
YIELD_SECONDS = 0.0002  # after which other processes may run: it cuts the time of the slowest 1 % of answers to a third
TRIM_SECONDS = 5  # how often freed memory is given back to the system
GRACE_SECONDS = 10  # for running requests to end when the server is told to stop
LOG_LINES = 4096  # lines that may wait to be written; further ones are counted and dropped
PIPE_BUF = 4096  # bytes: Linux writes up to this many to a pipe in one piece, so lines, which are shorter, never mix

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_yield_processor: Callable[[], object] = getattr(os, "sched_yield", lambda: None)  # not every system has it


class TextLog:
    """The lines of the log, as text."""

    @staticmethod
    def answer(
        time: str, client: str, account: str, method: str, target: str, status: int, size: int, milliseconds: float
    ) -> str:
        """Return the line of an answer."""
        return f"{time} {client} {account} {method} {target} {status} {size} {milliseconds:.1f}ms\n"

    @staticmethod
    def failure(time: str, text: str) -> str:
        """Return the line of a failure on our side."""
        return f"{time} error: {text}\n"


LOG_FORMATS: dict[str, type[TextLog]] = {"text": TextLog}


class Server(http.server.HTTPServer):
    """A server of one store.

    Use it like any HTTPServer: serve_forever() and, in another thread, shutdown(), then stop(). Or use it as a
    context manager, which serves in a thread of its own until the block ends. `log`, such as sys.stderr.write, is
    called with one or more whole lines; without it nothing is logged. `tls` is the context of an HTTPS server. On a
    loopback address, requests are served if their Host is a name of this machine (localhost, 127.0.0.1, [::1]), that
    address, or one of `host_names`; if that is None, any Host is served. `files` is the directory of image files,
    `tokens` says who may call. Raises InvalidParameter and OSError.
    """

    def __init__(
        self, storage: Storage, host: str = "127.0.0.1", port: int = 9001, *, listener: socket.socket | None = None,
        unversioned: str = DOCUMENT, max_connections: int = MAX_CONNECTIONS, tls: ssl.SSLContext | None = None,
        host_names: Sequence[str] | None = (), log: Callable[[str], object] = lambda text: None,
        files: str | None = None, tokens: Tokens | None = None, log_format: str = "text",
    ) -> None:
        self.log_format = LOG_FORMATS[_one_of(*LOG_FORMATS)("log_format", log_format)]  # first: report() needs it,
        self.clock = now()  # and this
        listener = listener or listen(host, port)
        self.service = Service(storage, unversioned, self.report, served_hosts(listener, host_names), files, tokens)
        self.tls = tls  # for new connections; another context may be put in its place
        self.service.secure = tls is not None
        self.stopping = False
        self.parent = 0  # the process that supervises this one; 0: none
        self.round_time = time.monotonic()  # when the input of this round was taken
        super().__init__(listener.getsockname(), http.server.BaseHTTPRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener  # bound already: server_bind would ask the DNS for our own name
        self.socket.setblocking(False)  # another process may accept the connection that select() saw
        self.watched = 0  # like that of a Connection: the selector holds the listener too
        self.counts, self.worker = memoryview(bytearray(4)).cast("I"), 0  # connections of each worker; our index
        descriptors = (_descriptors() - SPARE_DESCRIPTORS) // (2 if files else 1)  # an answer may hold an open file
        self._max_connections = min(max_connections, max(1, descriptors))
        self._connections: set[Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._turns: collections.deque[tuple[Connection, Result | None]] = collections.deque()  # want a turn
        self._queue: collections.deque[Connection] = collections.deque()  # want work
        self._postponed: list[Connection] = []  # want work after the look at the store that is under way
        self._offered = 0.0  # when the waiting connection was first left to other workers; 0: none waits
        self.trim: Callable[[], object] = lambda: None  # gives freed memory back: see Processes
        self._trimmed = time.monotonic()
        self._checked = self._yielded = 0.0  # when deadlines were checked, and when other processes could last run
        self._lock = threading.Lock()
        self._leader: threading.Thread | None = None
        self._working: tuple[Connection | None, float] | None = None  # for whom the leader works, and since when
        self._held: dict[threading.Thread, Connection | None] = {}  # for whom leaders that were held up still work
        self._ended = threading.Event()  # the last connection is closed
        self._log, self._log_lock = log, threading.Lock()
        self._lines: collections.deque[str] = collections.deque()  # lines of the log that are not written yet
        self._lost_lines = 0
        ascii("é")  # PyPy imports a codec for this, which fails later in report() if no descriptor is free

    @property
    def url(self) -> str:
        """The base URL for clients, or unix:PATH."""
        return address_of(self.socket, "https" if self.tls else "http")

    def serve_forever(self, poll_interval: float = WORK_SECONDS) -> None:
        """Serve until shutdown(). Other threads serve; this one looks after them at least every poll_interval."""
        while not self.stopping:
            self.service_actions()
            time.sleep(poll_interval / 5 if self._working else poll_interval)

    def shutdown(self) -> None:
        """Accept no more connections, and make serve_forever return; stop() then waits for running requests."""
        self.stopping = True

    def stop(self, seconds: float = GRACE_SECONDS) -> bool:
        """Wait at most `seconds` for running requests to end; return whether all have. The others still go on."""
        self.stopping, until = True, time.monotonic() + seconds
        if not self._leader:
            self._close()
        while not self._ended.wait(POLL_SECONDS) and time.monotonic() < until:
            self.service_actions()
        self.socket.close()
        if self._log_lock.acquire(timeout=LINGER_SECONDS):  # a thread may still be writing to a log nobody reads
            self._log_lock.release()
        self._write_log()
        return self._ended.is_set()

    def server_close(self) -> None:
        """Do the same as stop()."""
        self.stop()

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, name="wmi-server", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what serving a connection raised; the server goes on."""
        self.report(f"connection: {sys.exc_info()[1]!r}")

    # What serve_forever does while the leader serves.

    def service_actions(self) -> None:
        """Start a leader if there is none, or if work holds it up; stop if the supervising process is gone."""
        with self._lock:
            held_up = self._working and time.monotonic() - self._working[1] > WORK_SECONDS
            if held_up or not (self._leader or self._ended.is_set()):
                self._start_leader()
        if time.monotonic() - self._trimmed > TRIM_SECONDS:
            self._trimmed = time.monotonic()
            self.trim()
        if self.parent and os.getppid() != self.parent:
            self.parent = 0
            os.kill(os.getpid(), signal.SIGTERM)

    def _start_leader(self) -> None:
        """Start a thread that leads, in place of one that is held up, if any. The caller holds the lock."""
        before, working = self._leader, self._working
        self._leader = threading.Thread(None, self._lead, "wmi-leader", [working and working[0]], daemon=True)
        # This comes before the start: the new leader may begin to work at once, and must see that one more waits.
        if before and working:
            self._held[before], self._working = working[0], None
            self.service.waiting = len(self._held)
        try:
            self._leader.start()
        except RuntimeError:  # the system has no more threads: everybody has to wait for this work
            self._leader, self._working = before, working
            self._held.pop(before, None)  # type: ignore[arg-type]
            self.service.waiting = len(self._held)

    # What the leader does.

    def _lead(self, held: Connection | None) -> None:
        """Lead until another thread does, because work held this one up, or until all is done.

        `held` is the connection for which the leader before this one still works.
        """
        me = threading.current_thread()
        try:
            if held:  # not watched until its result comes: input that is not taken would wake the selector all the time
                self._watch(held, 0)
            self._watch(self, 0 if self.stopping else READ)  # now, and not only after the first CHECK_SECONDS
            while self._leader is me and not (self.stopping and not self._connections):
                self._serve_round(me)
            if self._leader is me:
                self._close()
        except Exception:  # a fault of ours: serve_forever starts another leader
            self.handle_error(None, None)
            with self._lock:
                self._held.pop(me, None)
                if self._leader is me:
                    self._leader = self._working = None

    def _serve_round(self, me: threading.Thread) -> None:
        """Take what has arrived, answer what is kept, then work for one connection after the other."""
        # 1. Receive from all clients before any is answered, so that one look at the store serves all of them.
        self._receive()
        if self._postponed and not self.service.looking:
            self._queue.extend(self._postponed)
            self._postponed.clear()
        received = time.monotonic()
        if (self._turns or self._queue) and not self._work(me, None, self.service.look)[0]:
            return
        # 2. Give each connection its turn. What needs no work does not wait for what does.
        looked = time.monotonic()
        while self._turns and time.monotonic() - looked < ROUND_SECONDS:
            self._take_turn(*self._turns.popleft())
        # 3. Work, but not for so long that clients which send something in the meantime would notice. After a slow look
        #    it may take twice as long as the look: otherwise most of the time would go into looks.
        until = time.monotonic() + max(ROUND_SECONDS, min(WORK_SECONDS, 2 * (looked - received)))
        while self._queue and time.monotonic() < until:
            connection = self._queue.popleft()
            leads, result = self._work(me, connection, connection.work)
            if not leads:
                return
            self._take_turn(connection, result)
        # 4. Each answer that was sent has added a line to the log: write them. Check deadlines.
        if self._lines and not self._work(me, None, self._write_log)[0]:
            return
        if self.stopping or self.round_time - self._checked > CHECK_SECONDS:
            self._check_limits()

    def _receive(self) -> None:
        """Wait for clients, and take what each of them has sent."""
        # Clients and other workers may share this processor. Yielding it costs nothing if nobody else wants it.
        if time.monotonic() - self._yielded > YIELD_SECONDS:
            _yield_processor()
            self._yielded = time.monotonic()
        accepting = False
        seconds = 0 if self._turns or self._queue else POLL_SECONDS if self._held else CHECK_SECONDS
        for key, _ in self._selector.select(seconds):
            connection = key.data
            if connection is self:
                accepting = True
            elif not connection.queued_since:
                self._receive_from(connection)
        self.round_time = time.monotonic()
        self.clock = now()
        if accepting:  # last, since it may close an idle connection: what has arrived there must have been taken
            # A round may take long. If it accepted one client only, a burst of them would be served late.
            for _ in range(ACCEPT_AT_ONCE):
                if not self._accept() or len(self._connections) >= self._max_connections:
                    break  # full: the next _accept() would close a connection, even if no other client waits
            self.round_time = time.monotonic()  # the requests of new connections are taken, too

    def _receive_from(self, connection: Connection) -> None:
        result: Result | None = None
        try:
            wants = connection.receive() if connection.receiving and not connection.unsent else TURN
        except Error as error:
            wants, result = TURN, error
        except (OSError, MemoryError):  # the client hung up, which is not a failure, or memory is short
            wants = CLOSE
        if wants == TURN:
            self._give_turn(connection, result)
        else:
            self._watch_or_close(connection, wants)

    def _give_turn(self, connection: Connection, result: Result | None) -> None:
        connection.queued_since = self.round_time
        self._turns.append((connection, result))

    def _take_turn(self, connection: Connection, result: Result | None) -> None:
        """Let a connection do what it can; if it wants work, queue it behind the others."""
        if isinstance(result, Postponed):  # not watched: input that is not taken would wake the selector all the time
            self._watch(connection, 0)
            self._postponed.append(connection)
            return
        if result is not None and connection.is_change:
            connection.arrived = time.monotonic()  # the requests that the client sent behind it have to show it
        wants = connection.advance(result)
        connection.queued_since = self.round_time if wants == WORK else 0.0
        if wants == TURN:
            self._give_turn(connection, None)
        elif wants == WORK:
            self._queue.append(connection)
        elif wants != connection.watched:
            self._watch_or_close(connection, wants)

    def _work(self, me: threading.Thread, connection: Connection | None, work: Callable[[], Any]) -> tuple[bool, Any]:
        """Do work that may hold up this thread; return whether the thread still leads, and if so the result."""
        self._working = connection, time.monotonic()
        result = work()
        # Under the lock the thread either still leads, or finds itself among those held up: see _start_leader.
        with self._lock:
            if self._leader is me:
                self._working = None
                return True, result
            owner = self._held.pop(me)
            self.service.waiting = len(self._held)
        if owner:
            self._turns.append((owner, result))
        elif isinstance(result, Answer) and not isinstance(result.body, bytes):
            result.body.close()  # nobody wants it: the client was told that the store takes too long
        return False, None

    def _accept(self) -> bool:
        """Accept a connection, and take what it has sent; return whether another one may follow.

        If every place is taken, another connection gives way: see _evict().
        """
        # All workers wait at one listener, and the first to wake up would take every connection. So a worker leaves
        # a new one for SHARE_SECONDS to those that have fewer.
        if self.counts[self.worker] > min(self.counts):
            self._offered = self._offered or self.round_time
            if self.round_time - self._offered < SHARE_SECONDS:
                return False
        self._offered = 0.0
        if len(self._connections) >= self._max_connections and not self._evict():
            self._watch(self, 0)
            return False
        try:
            stream, address = self.get_request()
        except OSError as error:
            if error.errno in _NO_ROOM and not self._evict():
                self._watch(self, 0)  # until _check_limits(): the listener stays ready, and the loop would spin
                self.report(f"accept: {error}")
            return False
        try:
            stream.setblocking(False)
            if stream.family in (socket.AF_INET, socket.AF_INET6):
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # otherwise some answers wait 40 ms
            connection = (TLSConnection if self.tls else Connection)(stream, address, self)
        except (OSError, ValueError):  # the client is gone already
            stream.close()
            return True
        self._connections.add(connection)
        self.counts[self.worker] = len(self._connections)
        self._receive_from(connection)
        return True

    def _evict(self) -> bool:
        """Close the one that has been idle longest, or else unfinished longest; return whether there was one.

        A connection that was accepted or served just now is spared: its request may be on its way.
        """
        # With a cap of 64 connections and no such rule, 200 idle sockets locked everybody out for 40 s.
        spared = {True: CHECK_SECONDS, False: STALLED_SECONDS}
        waiting = [each for each in self._connections if each.receiving and not each.queued_since]
        waiting = [each for each in waiting if self.round_time - each.waiting_since > spared[each.is_idle]]
        if waiting:
            self._watch_or_close(min(waiting, key=lambda each: (not each.is_idle, each.waiting_since)), CLOSE)
        return bool(waiting)

    def _watch_or_close(self, connection: Connection, wants: int) -> None:
        """Make the selector watch for what a connection waits for, or close the connection."""
        with contextlib.suppress(OSError, ValueError):  # the selector takes no more: then the connection is closed
            if wants != CLOSE:
                self._watch(connection, wants)
                return
        self._watch(connection, 0)
        self._connections.discard(connection)
        self.counts[self.worker] = len(self._connections)
        connection.close()
        self._watch(self, 0 if self.stopping else READ)

    def _watch(self, owner: Connection | Server, wants: int) -> None:
        """Watch a socket for READ, for WRITE, or for nothing."""
        if wants == owner.watched:
            return
        if owner.watched:
            self._selector.unregister(owner.socket)
        owner.watched = 0
        if wants:
            self._selector.register(owner.socket, wants, owner)
            owner.watched = wants

    def _check_limits(self) -> None:
        """End what is past its deadline, holds too many bytes or works too long; when stopping, also what is idle."""
        # 1. Connections whose deadline has passed get a turn, with the reason as its result.
        self._checked = self.round_time
        resting = [each for each in self._connections if each.watched and not each.queued_since]
        for each in resting:
            if each.deadline <= self.round_time or (self.stopping and each.is_idle):
                self._give_turn(each, each.deadline_error())
        # 2. The same for those that together hold too many bytes; those with the latest deadlines are spared.
        buffered = 0
        for each in sorted(resting, key=lambda each: -each.deadline):
            buffered += len(each.unsent) + each.reader.size
            if buffered > MAX_BUFFERED and not each.is_idle and not each.queued_since:
                self._give_turn(each, RequestTimeout("too much waits to be read"))
        # 3. Requests whose work takes too long, or that were postponed for too long, get a 503, or are cut off if their
        #    answer has begun. The thread of such work cannot be stopped, and its result will be dropped.
        with self._lock:
            waiting = filter(None, (*self._held.values(), *self._postponed))
            late = {each for each in waiting if self.round_time - each.queued_since > STORE_SECONDS}
            self._held.update((thread, None) for thread, each in self._held.items() if each in late)
        self._postponed = [each for each in self._postponed if each not in late]
        for each in late:
            self._give_turn(each, DatabaseError(_UNKNOWN if each.is_change else "the store takes too long; try again"))
        # 4. Accept connections again, if there was no room for them before; when stopping, accept no more.
        self._watch(self, 0 if self.stopping else READ)
        if self.stopping:
            self.socket.close()

    def _close(self) -> None:
        self._selector.close()
        self.socket.close()
        self._ended.set()

    # The log.

    def report(self, text: str) -> None:
        """Log a failure, in one line of visible ASCII."""
        # By ascii() and not by encode(): a codec has to be imported first, which fails if no descriptor is free.
        self.add_line(self.log_format.failure(self.clock, ascii(text)[1:-1][:LOGGED]))

    def add_line(self, line: str) -> None:
        """Queue a line of the log. Lines are written together, at the end of a round."""
        if len(self._lines) < LOG_LINES:
            self._lines.append(line)
        else:
            self._lost_lines += 1

    def _write_log(self) -> None:
        """Write the lines that wait, unless another thread is writing: the reader of the log may be holding it up."""
        if not self._log_lock.acquire(blocking=False):
            return
        with contextlib.suppress(Exception):  # a log that fails, perhaps on a full disk, must not stop the server
            lost, self._lost_lines = self._lost_lines, 0
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            lines += [self.log_format.failure(now(), f"{lost} lines of the log are lost")] if lost else []
            # As many lines in each write as fit into PIPE_BUF, or one that is longer.
            for part in re.findall(rf"(?s).{{1,{PIPE_BUF - 1}}}\n|.+?\n", "".join(lines)):
                self._log(part)
        self._log_lock.release()


def _descriptors() -> int:
    """Return how many descriptors this process may have."""
    limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # -1: there is no limit
    return limit if limit > 0 else sys.maxsize


####################################################################################################
# Processes
####################################################################################################
# One process, or a parent that forks workers and replaces those that die. The parent serves nobody. Workers share the
# listener and a few bytes of memory with their counts of connections, and nothing of a store.
#
#     signal             the parent                                    a worker, or the only process
#     SIGTERM            closes its listener, sends SIGTERM to each    accepts no more, lets running requests end for
#                        worker, and waits until all have ended        GRACE_SECONDS at most, and exits
#     SIGINT             the same as SIGTERM                           a worker ignores it: Ctrl-C in a terminal goes to
#                                                                      all processes, and the parent tells the workers
#     either one again   sends SIGKILL to each worker                  the only process exits at once; a worker goes on,
#                                                                      because systemd and the parent may both send it
#     SIGALRM            the same as SIGTERM again; the parent sets    -
#                        it for some time later, in case a
#                        worker hangs
#     SIGHUP             with HTTPS: reads the certificate again,      with HTTPS: reads it again, for new connections
#                        for later workers, and sends SIGHUP to
#                        each worker; without: ends
#     the parent died    -                                             a worker learns it by getppid(), sends SIGTERM to
#                                                                      itself, and gives running requests one second
#
# All of these are blocked around each fork. Otherwise one could come when the parent has a child that it does not know
# yet, and this child would never be told, or when the child still has the handlers of the parent.

Renew = Callable[["Server | None"], None]  # renews the certificate of a server, or with None that of later workers
Place = tuple[int, memoryview, int]  # what a worker is told: its parent, the counts of all workers, its own number
_STOPS = (signal.SIGTERM, signal.SIGINT)
_HANDLED = {*_STOPS, *(getattr(signal, name, signal.SIGTERM) for name in ("SIGHUP", "SIGALRM"))}  # Windows has neither


def block_signals(block: bool) -> None:
    """Block the signals of _HANDLED, or unblock them, which delivers those that came in the meantime."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if block else signal.SIG_UNBLOCK, _HANDLED)


def memory_trimmer() -> Callable[[], object]:
    """Return a function that makes the C library give freed memory back, if it can; it takes a millisecond.

    Without it a process keeps the memory that an attack once took: 62 MB a minute later, instead of 46. The threads
    are also made to share one arena (a pool of malloc), which saves 3 to 4 MB; only one of them runs at a time anyway.
    """
    try:
        import ctypes  # here: a program that embeds a server decides about memory by itself, and needs no ctypes

        library = ctypes.CDLL(None)
        library.mallopt(-8, 1)  # M_ARENA_MAX
        return functools.partial(library.malloc_trim, 0)
    except (ImportError, OSError, AttributeError, TypeError):  # a C library that has no such function
        return lambda: None


def run_server(
    make_server: Callable[[], Server], workers: int = 1, listener: socket.socket | None = None,
    announce: Callable[[], None] = lambda: None, renew: Renew | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, in this process or in several forked ones, and return 0.

    make_server is called in each process that serves, after the fork; announce is called once, when the handlers
    of signals are set; renew is called in each process at SIGHUP. A worker that dies is replaced.
    """
    if workers == 1:
        return _run_here(make_server, announce, renew)
    import mmap  # here: one process has nothing to share

    parent, counts = os.getpid(), memoryview(mmap.mmap(-1, 4 * workers)).cast("I")
    children: dict[int, int] = {}  # process id -> number of the worker, which is its place among the counts
    signals: list[int] = []  # the signals to stop that have come, in order

    def stop(signum: int, frame: Any) -> None:
        signals.append(signum)
        if listener:
            listener.close()  # otherwise it would stay open, and take connections, when the workers have closed theirs
        tell(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)
        signal.alarm(GRACE_SECONDS + 2)  # a little later than the workers give up

    def hang_up(signum: int, frame: Any) -> None:
        assert renew is not None
        with contextlib.suppress(Error):  # the workers fail too, and report it
            renew(None)
        tell(signum)

    def tell(signum: int) -> None:
        for pid in list(children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    for signum in (*_STOPS, signal.SIGALRM):
        signal.signal(signum, stop)
    if renew and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, hang_up)
    block_signals(False)
    announce()
    while children or not signals:
        # 1. Fork the workers that are missing. The child unblocks the signals itself, once it handles them.
        while len(children) < workers and not signals:
            block_signals(True)
            number = min({*range(workers)} - {*children.values()})
            try:
                if not signals:  # one may have come just before the signals were blocked
                    children[os.fork() or _exit_as_worker(make_server, renew, (parent, counts, number))] = number
            except OSError as error:  # too little memory, or too many processes: the other workers go on
                print(f"wmi: cannot start a worker: {error}; trying again", file=sys.stderr, flush=True)
                time.sleep(1)
                with contextlib.suppress(ChildProcessError):  # those that have ended count until they are waited for
                    children.pop(os.waitpid(-1, os.WNOHANG)[0], None)
            block_signals(False)
        # 2. Wait until one of them ends. If it ends soon, it may be unable to start: then wait a second before a fork.
        waited = time.monotonic()
        if children:  # there are none if the first signal came just before the signals were blocked
            children.pop(os.wait()[0], None)
        if not signals and time.monotonic() - waited < 1:
            time.sleep(1)
    return 0


def _exit_as_worker(make_server: Callable[[], Server], renew: Renew | None, place: Place) -> int:
    """Run a forked worker, and exit: nothing on the stack of the parent may run in the worker too."""
    try:
        os._exit(_run_here(make_server, lambda: None, renew, place))
    except BaseException as error:
        print(f"wmi: worker: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _run_here(
    make_server: Callable[[], Server], announce: Callable[[], None], renew: Renew | None,
    place: Place | None = None,
) -> int:
    server = make_server()
    server.trim = memory_trimmer()
    if place:
        server.parent, server.counts, server.worker = place
    signals: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        signals.append(signum)
        if len(signals) > 1 and not place:
            os._exit(128 + signum)
        server.stopping = True

    def hang_up(signum: int, frame: Any) -> None:
        assert renew is not None
        try:
            renew(server)
        except Error as error:
            server.report(f"not renewed: {error}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN if place else stop)
    if place:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the handler of the parent would stop the other workers
    if renew and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, hang_up)
    block_signals(False)
    announce()
    server.serve_forever()
    server.stop(1 if place and os.getppid() != place[0] else GRACE_SECONDS)  # 1 s: nobody supervises it any more
    return 0


####################################################################################################
# Client
####################################################################################################
# The verbs and errors of the catalog over HTTP, so that a script works in the same way on a store and on a server. The
# client reads the answers of the document and those of the deployed servers, and trusts neither:
#
#     _call          repeats a call that failed, up to `retries` times; the deadline bounds all tries together
#     _send          makes one try and follows its redirects, none of which takes the account to another host
#     _Connection    ends each wait at the deadline, and counts each byte that arrives
#     _body_sizes    reads the framing of a body strictly, or refuses it
#
# urllib is used for proxies, and http.client for heads. Bodies are read here, because http.client treats a chunk of
# size -1 as a body without end, and ignores a Content-Length that is not a number.

_ERRORS = {error.__name__: error for error in Error.__subclasses__()}
_PAUSE_AT_MOST = 5.0  # seconds between two tries, whatever Retry-After asks for
_REDIRECTS_AT_MOST = 5
_HEAD_AT_MOST = 65536  # bytes, with those of interim answers (1xx); common servers send at most 8 KiB
_YAML_AT_MOST = 10 * MAX_TEXT + 1000  # characters of `source` or `features`: an escape takes up to ten
_READ_AT_ONCE = 1 << 18  # bytes of a body; with 16 KB a file of 1 GB took half as long again
_UNTIL_CLOSE = float("inf")  # the size of a body that ends with its connection
_NO_DEADLINE = float("inf")
_WHOLE = functools.partial(whole_number, "a number is negative, a fraction or too long")  # int() may take minutes
_JSON = json.JSONDecoder(parse_int=_WHOLE, parse_float=_WHOLE, parse_constant=_WHOLE)
# The type of each field of an image, apart from null. Values are not checked: another server may know more of them.
_TYPES = {name: str if default is None else type(default) for name, (_, default) in FIELDS.items()}
_TYPES.update({"uuid": str, **dict.fromkeys(_ALWAYS_EMPTY, list)})
_LOOPBACK = r"https?://(127(\.[0-9]+){3}|\[::1\]|localhost)(:[0-9]*)?(/|$)"
_check_url = _matching(r"https?://[^/?#@\s]+(/[^?#\s]*)?", "http://HOST:PORT or https://HOST:PORT")


class Client:
    """A server of this API as one account sees it, with the verbs and errors of Catalog, and Unreachable and BadAnswer.

    `url` is the base of the server, such as http://127.0.0.1:9001. Each wait takes at most `timeout` seconds, and a
    whole call with its retries at most `deadline` seconds (but looking up a host name takes as long as the
    system allows). An answer over `max_answer` bytes is refused. A file from fetch() has no deadline and no limit.
    The proxies of the environment are used only if `proxies` is true. Over https, `cafile` is a file of PEM
    certificates to trust instead of those of the system.

    `token` proves the account, which then need not be named. Over plain http it is sent to loopback only, and not with
    `proxies`, unless `plain_token` is true, because others could read it on its way. Raises InvalidParameter.
    """

    def __init__(
        self, url: str, account: str | None, *, version: str = DOCUMENT, timeout: float = 10.0, deadline: float = 60.0,
        retries: int = 3, proxies: bool = False, max_answer: int = 64 << 20, cafile: str | None = None,
        token: str | None = None, plain_token: bool = False,
    ) -> None:
        self.account = check_account("account", account) if account or not token else None
        self.version = find_version(version)
        self._url = _check_url("url", url).rstrip("/") + self.version.path
        self._fields = {"X-VDC-ACCOUNT-UUID": self.account} if self.account else {}
        if token:
            if not (plain_token or url.startswith("https:") or (re.match(_LOOPBACK, url) and not proxies)):
                raise InvalidParameter("others could read the token over http: use https, or give --plain-token")
            if not re.fullmatch("[!-~]{1,4096}", token):  # the message does not show it
                raise InvalidParameter("token: expected visible ASCII without blanks")
            self._fields["Authorization"] = f"Bearer {token}"
        self._timeout, self._deadline, self._retries, self._max_answer = timeout, deadline, retries, max_answer
        self._make_opener = functools.partial(_make_opener, proxies, cafile)
        self._opener = self._make_opener(url)

    def index(self, start: int | str = 0, limit: int | str | None = None, **filters: Any) -> Page:
        """Return the page of images from offset start; see Catalog.index."""
        params = {"start": start, "limit": limit, **filters}
        tests = [("filter[]", test) for test in params.pop("filter")] if isinstance(filters.get("filter"), list) else []
        given = [(name, _spelled(value)) for name, value in params.items() if value is not None]
        answer = self._call("GET", f".json?{urllib.parse.urlencode(given + tests, errors='replace')}")
        try:
            body = answer[0] if isinstance(answer, list) else answer  # the deployed servers wrap it in an array
            total = body["owner_total"] if "owner_total" in body else body["total"]
            images = body["result"] if "result" in body else body["results"]
            page = Page(total, body["start"], body["limit"], images)
            if [*map(type, page)] != [int, int, int if page.limit is not None else type(None), list]:
                raise TypeError("a count or the list has the wrong type")
            return page._replace(images=list(map(_shown_record, images)))
        except (TypeError, KeyError, IndexError) as error:
            raise BadAnswer(f"the answer is not an index of images: {error!r}") from error

    def images(self, **filters: Any) -> Iterator[Record]:
        """Yield every image of the index, page by page; see every_image."""
        return every_image(self.index, filters)

    def show(self, id: str) -> Record:
        """Return the image, with source and features, where they are shown, as dicts; see Catalog.show."""
        check_id_syntax(id)
        return _shown_record(self._call("GET", f"/{id}.json"))

    def destroy(self, id: str) -> str:
        """Delete the image and return its id; see Catalog.destroy."""
        check_id_syntax(id)
        self._call("DELETE", f"/{id}.json")
        return id

    def update(self, id: str, **fields: Any) -> Record:
        """Set display_name or description to a text, and return the image; see Catalog.update."""
        check_id_syntax(id)
        check_updatable(self.version, fields)
        form = urllib.parse.urlencode({name: _check_text(name, value) for name, value in fields.items()})
        return _shown_record(self._call("PUT", f"/{id}.json", form.encode()))

    def fetch(self, id: str, path: str | None = None, progress: Progress = lambda done, total: None) -> str:
        """Fetch the image's file and return its path; see fetch_image."""
        return fetch_image(self, id, path, progress, replaces=path is not None)

    def _anonymous_client(self, url: str) -> Client:
        """Return a copy whose _send() asks another server, without account and token."""
        client = copy.copy(self)
        client._fields, client._opener = {}, self._make_opener(url)
        return client

    def _call(self, method: str, path: str, form: bytes | None = None) -> Any:
        """Send a request, if need be several times, and return what its answer holds; None for a repeated DELETE."""
        # Every verb may be sent again. GET reads, and PUT sets the same values; a DELETE whose answer was lost finds
        # no image the second time, which then counts as done.
        until = time.monotonic() + self._deadline
        lost = False  # an earlier try may have been carried out, although its answer never came
        for attempt in itertools.count():
            try:
                return self._send(method, self._url + path, self._read, until, form)
            except Error as error:
                if method == "DELETE" and lost and isinstance(error, UnknownUUIDResource):
                    return None
                # Nothing was done if the request was not sent (urllib's URLError), or if the answer is 503. (One that
                # says _UNKNOWN is not tried again.)
                lost |= error.status in (502, 504) and not isinstance(error.__cause__, urllib.error.URLError)
                growing = random.uniform(0.05, 0.1) * 2**attempt  # random, so that clients do not march in step
                pause = min(_PAUSE_AT_MOST, max(growing, error.retry_after))
                lasting = error.status not in (502, 503, 504) or isinstance(error, BadAnswer) or str(error) == _UNKNOWN
                if lasting or attempt >= self._retries or time.monotonic() + pause > until:
                    raise
                time.sleep(pause)

    def _send(
        self, method: str, url: str, read: Callable[[Any], Any], until: float, form: bytes | None = None,
        fields: Mapping[str, str] = types.MappingProxyType({}),
    ) -> Any:
        """Return what read() makes of the answer to one try. Raises Error, and OSError for a file that read() uses."""

        def wait() -> float:
            left = min(self._timeout, until - time.monotonic())
            if left <= 0:
                raise TimeoutError("the deadline has passed")
            return left

        try:
            for _ in range(1 + _REDIRECTS_AT_MOST):
                # A new request each time, because ProxyHandler changes it. urllib passes `wait` on to the connection.
                request = urllib.request.Request(url, form, {**self._fields, **fields}, method=method)
                with self._opener.open(request, timeout=wait) as answer:  # type: ignore[arg-type]
                    if answer.status not in (301, 302, 303, 307, 308):
                        return read(answer)
                    target = urllib.parse.urljoin(url, answer.headers.get("Location", ""))
                # Only on the same scheme, host and port: nobody else should see the account.
                if method != "GET" or target.split("/")[:3] != url.split("/")[:3]:
                    raise BadAnswer(f"the server redirects {method} to {brief(target)}, which is not followed")
                url = target
            raise BadAnswer(f"the server redirects more than {_REDIRECTS_AT_MOST} times")
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
            if getattr(error, "filename", None):  # an error of the file that read() writes
                raise
            reason = getattr(error, "reason", error)
            message = f"{url}: {str(reason) or repr(reason)}"
            if hasattr(reason, "verify_message"):  # ssl.SSLCertVerificationError
                raise BadAnswer(f"{message}; to trust a CA of your own, give --cacert, or in Python cafile=") from error
            raise Unreachable(message) from error

    def _read(self, answer: Any) -> Any:
        """Return what an answer holds in JSON, or raise the error that it names, or else Error. Raises BadAnswer."""
        succeeded, body = 200 <= answer.status < 300, bytearray()
        for piece in _body_pieces(answer, self._max_answer):  # not join(), which would hold millions of little pieces
            body += piece
        try:
            shown = _JSON.decode(body.decode("utf-8-sig"))
            if succeeded:
                return shown
            name, message, code = (str(shown[key]) for key in ("error", "message", "code"))
        except (ValueError, TypeError, KeyError, RecursionError, InvalidParameter) as error:
            if succeeded:
                coding = answer.headers.get("Content-Encoding", "none")  # no compression was asked for
                raise BadAnswer(f"the answer is not our JSON: {error} (compression: {brief(coding)})") from error
            reason = http.client.responses.get(answer.status, "")
            name, message, code = "", f"{answer.status} {reason} from {answer.url}", str(answer.status)
        found = _ERRORS.get(name.rpartition("::")[2], Error)(message)
        seconds = re.fullmatch("[0-9]{1,9}", answer.headers.get("Retry-After", ""))
        found.status, found.code, found.retry_after = answer.status, code, float(seconds[0] if seconds else 0)
        raise found


def _make_opener(proxies: bool, cafile: str | None, url: str) -> urllib.request.OpenerDirector:
    """Return an opener for the scheme of `url` alone. One from build_opener() would open file: and ftp: as well.

    Raises InvalidParameter.
    """
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler(None if proxies else {}))
    opener.add_handler(_BoundedHTTP(_secure_connection(cafile) if url.startswith("https:") else _Connection))
    return opener


def _body_pieces(answer: Any, most: int) -> Iterator[bytes]:
    """Yield the body as it arrives. Raises ConnectionError if it is cut, BadAnswer if it is too large; see below."""
    received = 0
    answer.budget[0] = 2 * most + _HEAD_AT_MOST  # framing may take as much as what it frames
    for size in _body_sizes(answer):
        while size:
            piece = answer.fp.read1(min(size, _READ_AT_ONCE))  # read1 allocates as many bytes as it is asked for
            if not piece and size != _UNTIL_CLOSE:
                raise ConnectionError("the answer is cut")
            received += len(piece)
            if received > most:
                raise BadAnswer(f"the answer has more than {most} bytes")
            yield piece
            size = size - len(piece) if piece else 0


def _body_sizes(answer: Any) -> Iterator[float]:
    """Yield how many bytes of the body to read next, until its end (RFC 9112, 6.3 and 7.1); _UNTIL_CLOSE: all of it.

    Raises ConnectionError if the answer is cut or a chunk is malformed, BadAnswer if its framing is not clear.
    """
    lengths, codings = (answer.headers.get_all(name, []) for name in ("Content-Length", "Transfer-Encoding"))
    if [coding.lower() for coding in codings] == ["chunked"] and not lengths:
        # int() alone would take -1, +1, 0x1 and 1_0 as well. What follows the last chunk is not read.
        form, end = rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\r\n", b"\r\n"
        while (line := re.fullmatch(form, answer.fp.readline(PIECE))) and end == b"\r\n" and int(line[1], 16):
            yield int(line[1], 16)
            end = answer.fp.read(2)
        if not line or end != b"\r\n":
            raise ConnectionError("the answer is cut, or a chunk is malformed")
    elif len(lengths) == 1 and re.fullmatch("[0-9]{1,18}", lengths[0]) and not codings:
        yield int(lengths[0])
    elif lengths or codings:
        raise BadAnswer(f"the answer does not say clearly how long it is: {brief(lengths + codings)}")
    elif answer.length != 0:  # http.client sets 0 for statuses that have no body
        yield _UNTIL_CLOSE


class _BoundedHTTP(urllib.request.HTTPHandler):
    """Handler of http and https that opens one kind of connection, as the scheme of a client never changes."""

    https_request = urllib.request.HTTPHandler.http_request

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def http_open(self, req: Any) -> Any:
        return self.do_open(self._connection, req)

    https_open = http_open


class _Connection(http.client.HTTPConnection):
    """A connection whose timeout is a function, called before each wait, that returns how long the wait may take.

    The timeout of a socket bounds a single wait: a server that sends a byte now and then could keep a client forever.
    """

    def connect(self) -> None:
        self._wait = cast("Callable[[], float]", self.timeout)
        self.timeout = self._wait() / len(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM))
        super().connect()  # to each address in turn, until one answers: so each has its share of the time
        self.sock.settimeout(self._wait())  # for the handshake

    def send(self, data: Any) -> None:
        for start in range(0, len(data), PIECE):
            if self.sock:
                self.sock.settimeout(self._wait())
            super().send(data[start : start + PIECE])

    def response_class(self, sock: Any, **options: Any) -> Any:  # type: ignore[override]
        """Return the answer, which reads from a file that bounds each wait and counts what it receives."""
        # http.client calls response_class like a class, and offers no other place to step in.
        answer: Any = _Response(sock, **options)
        answer.budget = budget = [_HEAD_AT_MOST]  # a list: readinto() with a reference to answer would be a cycle
        wait = self._wait

        def readinto(buffer: Any) -> int:
            sock.settimeout(wait())
            count: int = sock.recv_into(buffer)
            budget[0] -= count
            if budget[0] < 0:
                raise BadAnswer("the head or the chunks of the answer are too long")
            return count

        answer.fp.raw.readinto = readinto  # answer.fp is a buffer on top of the file of the socket
        return answer


class _Response(http.client.HTTPResponse):
    """An answer, without the interim ones that may come before it (1xx): http.client skips no other than 100."""

    def begin(self) -> None:
        """Read heads until one is final (RFC 9110, 15.2)."""
        super().begin()
        while self.status < 200:
            self.headers = None  # type: ignore[assignment] # otherwise begin() returns at once
            super().begin()


def _shown_record(shown: Any) -> Record:
    """Return an image that a server showed, with source and features, if any, as dicts. Raises BadAnswer."""
    try:
        check_id("id", shown["id"])
        image = dict(shown)
        for name, kind in (("source", str), ("features", bool)):
            text = shown.get(name)
            if isinstance(text, str) and len(text) <= _YAML_AT_MOST:
                image[name] = parse_yaml_mapping(text)
            if {*map(type, (image.get(name) or {}).values())} - {kind}:
                raise ValueError(f"{name} holds values of the wrong type")
        for name, value in image.items():
            if value is not None and type(value) is not _TYPES.get(name, type(value)):
                raise refuse(name, value, f"null or {_TYPES[name].__name__}")
        json.dumps(image, ensure_ascii=False).encode()  # fails for lone surrogates and for nesting that is too deep
    except (TypeError, AttributeError, KeyError, ValueError, RecursionError, InvalidParameter) as error:
        raise BadAnswer(f"the answer is not an image: {error!r}") from error
    return image


####################################################################################################
# Terminal
####################################################################################################
# What people see of the command: text that cannot harm a terminal, the progress of long work, and tables of images.

# ---- what is printed ----


def _visible(value: Any) -> str:
    """Return a value as text that cannot move the cursor of a terminal or begin a new line."""
    return re.sub("[^ -~]", _escape, value if isinstance(value, str) else json.dumps(value))


def _escape(char: re.Match[str]) -> str:
    """Return a printable character as it is, and any other as an escape of JSON."""
    units = char[0].encode("utf-16-be", "surrogatepass").hex()
    return char[0] if char[0].isprintable() else re.sub("(....)", r"\\u\1", units)


def _write(text: str, out: TextIO | None = None) -> None:
    """Write text to standard output or another file."""
    # Names and descriptions come from strangers. On a terminal, whatever could move the cursor is printed as an escape;
    # a file or a pipe gets the text as it is.
    out = out or sys.stdout
    with _naming("standard output"):  # for another file, _replacing() names that one
        out.write(re.sub(r"[^\n -~]", _escape, text) if out.isatty() else text)


@contextlib.contextmanager
def _naming(file: str) -> Iterator[None]:
    """Name this file in an OSError: errors of read() and write() come without a name."""
    try:
        yield
    except OSError as error:
        error.filename = file
        raise


def _remove(path: str) -> None:
    """Remove a file, if it is there and may be removed."""
    with contextlib.suppress(OSError):
        os.unlink(path)


class _Progress(contextlib.AbstractContextManager["_Progress"]):
    """A line on a terminal that shows the progress of long work: count, total, rate and time left."""

    def __init__(self, what: str, unit: int = 1, name: str = "") -> None:
        self._what, self._unit, self._name = _visible(what), unit, name
        self._first: tuple[int, float] | None = None  # count and time at the first call
        self._shown = time.monotonic() if sys.stderr.isatty() else float("inf")

    def __call__(self, done: int, total: int | None = None) -> None:
        """Show the line, at most five times a second."""
        moment = time.monotonic()
        self._first = self._first or (done, moment)
        if moment - self._shown < 0.2:
            return
        self._shown, (count, began) = moment, self._first
        rate = (done - count) / max(moment - began, 0.001)  # the first call may be the one that shows
        text = f"{self._what} {self._amount(done)}"
        text += f" of {self._amount(total)}" if total else ""
        text += f"{self._name}, {self._amount(rate)}{self._name}/s"
        if total and rate:
            minutes, seconds = divmod(round(max(0, total - done) / rate), 60)
            text += f", {minutes}:{seconds:02} left"
        print(f"\r{text}", end="\x1b[K", file=sys.stderr, flush=True)

    def _amount(self, count: float) -> str:
        return f"{count:,.0f}" if self._unit == 1 else f"{count / self._unit:,.1f}"

    def __exit__(self, *exc: object) -> None:
        if sys.stderr.isatty():
            print(end="\r\x1b[K", file=sys.stderr, flush=True)


def _progressing(what: str, items: Iterable[Any], total: int | None = None) -> Iterator[Any]:
    """Yield the items, and show the progress on a terminal."""
    with _Progress(what) as progress:
        for count, item in enumerate(items, 1):
            progress(count, total)
            yield item


def _tell(options: Any, text: str) -> None:
    """Print a line to standard error, in JSON if the log is in JSON."""
    is_json = getattr(options, "log_format", "text") == "json"
    print(json.dumps({"time": now(), "message": text}) if is_json else f"wmi: {text}", file=sys.stderr, flush=True)


# ---- how an image is printed ----


def _table(image: Record) -> str:
    return "".join(f"{_visible(name) + ':':<21}{_visible(value)}\n" for name, value in image.items())


_COLUMNS = ("ID", "ACCOUNT", "ARCH", "BOOT", "PUBLIC", "STATE", "NAME")


def _table_lines(images: Iterator[Record]) -> Iterator[str]:
    """Yield the lines of a table."""
    # The list may be long, so only the first 100 images decide how wide the columns are; a longer cell further down
    # pushes its row to the right. On a terminal, the name is cut at the edge.
    first = [_COLUMNS, *map(_cells, itertools.islice(images, 100))]
    widths = [max(map(_width, column)) for column in zip(*first)][:-1]
    columns = os.get_terminal_size(1).columns if sys.stdout.isatty() else 0
    room = (columns or sys.maxsize) - sum(widths) - len(widths)
    for *cells, name in itertools.chain(first, map(_cells, images)):
        padded = (cell + " " * (width - _width(cell)) for cell, width in zip(cells, widths))
        yield " ".join((*padded, _clipped(name, max(room, len("NAME"))))).rstrip() + "\n"


def _cells(image: Record) -> tuple[str, ...]:
    boot = "volume" if image.get("boot_dev_type") == BOOT_DEV_SAN else "local"
    name = image.get("display_name") or image.get("description") or ""
    return tuple(map(_visible, (*map(image.get, ("id", "account_id", "arch")), boot,
                                *map(image.get, ("is_public", "state")), name)))


def _width(text: str) -> int:
    """Return how many columns a text takes on a terminal: a wide character takes two, a combining one takes none."""
    if text.isascii():
        return len(text)
    import unicodedata  # here: most text is ASCII and does not need it

    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def _clipped(text: str, room: int) -> str:
    """Return a text, cut to `room` columns if it is longer; a cut text ends with …."""
    if _width(text) <= room:
        return text
    ends = itertools.accumulate(map(_width, text))
    return text[: sum(1 for _ in itertools.takewhile(lambda end: end < room, ends))] + "…"


def _json_list(images: Iterator[Record]) -> Iterator[str]:
    yield "["
    for number, image in enumerate(images):
        yield (",\n" if number else "") + to_json(image)
    yield "]\n"


def _yaml_list(images: Iterator[Record]) -> Iterator[str]:
    first = next(images, None)
    yield "--- []\n" if first is None else to_yaml([first])
    yield from ("".join(yaml_lines([image], "")) for image in images)


def _id_line(image: Record) -> str:
    return _visible(image["id"]) + "\n"


# How one image and how a list of them is printed, by the value of --output.
_OUTPUTS: dict[str, tuple[Callable[[Record], str], Callable[[Iterator[Record]], Iterator[str]]]] = {
    "table": (_table, _table_lines),
    "json": (lambda image: json.dumps(image, ensure_ascii=False, indent=2) + "\n", _json_list),
    "yaml": (to_yaml, _yaml_list),
    "id": (_id_line, lambda images: map(_id_line, images)),
}


####################################################################################################
# Command line
####################################################################################################
# Each subcommand is one function, which makes a few calls to the parts above. A command works on a store (--store) or,
# if the API allows it, on a server (--url). Standard output has the result and nothing else, so that it can be piped.
# An error is one line on standard error, in words for people, and exit code 1.

_SAMPLE = [  # the names of Wakame-vdc's own demo data
    ("wmi-lucid0", "x86", "ubuntu-10.04_local_kvm_i386.raw", "Ubuntu 10.04 LTS, 32 bit"),
    ("wmi-lucid1", "x86_64", "ubuntu-10.04_local_kvm_x86_64.raw", "Ubuntu 10.04 LTS, 64 bit"),
    ("wmi-centos1d", "x86_64", "centos-6.4_x86_64_kvm_md.raw", "CentOS 6.4 with a metadata drive"),
    ("wmi-lbnode1d", "x86_64", "lbnode-stud_x86_64_kvm_md.raw", "load balancer node (haproxy, stud)"),
]


# ---- what a command does ----

_STORE_FILES = ("", ".new", ".lock", "-journal", "-wal", "-shm")  # endings of the files of json and sqlite stores


def _serve(options: Any) -> int:
    def make_context() -> Any:
        return tls_context(options.tls_cert, options.tls_key) if options.tls_cert else None

    _check_processes(options)
    log, context = _log_writer(options), make_context()

    def make_server() -> Server:
        ours = storage if options.workers == 1 else open_storage(options.store)
        return Server(ours, listener=listener, unversioned=options.unversioned, host_names=options.host_name,
                      max_connections=options.max_connections, tls=context, log=log, log_format=options.log_format,
                      files=options.files, tokens=Tokens(options.tokens) if options.tokens else None)

    def renew(server: Server | None) -> None:  # None: called in the parent, for workers that are forked later
        nonlocal context
        context = make_context()
        if server:
            server.tls = context

    # The order matters. Whatever can be wrong (certificate, log, store, tokens, address) is found out before a worker
    # is forked, so that the user gets one line and exit code 1. But no worker may inherit an open store: with several
    # workers, the store is closed again and each worker opens its own.
    with contextlib.ExitStack() as cleanup:
        block_signals(True)  # a SIGTERM before the server handles it would leave the Unix socket behind
        cleanup.callback(block_signals, False)
        storage = cleanup.enter_context(open_storage(options.store))
        if options.sample:
            _add_sample(storage)
        if options.workers > 1:
            storage.close()
        if options.tokens:
            Tokens(options.tokens)  # raises if the file has a fault
            _warn_if_exposed(options, options.tokens)
        listener = listen(options.host, options.port, options.unix_socket)
        address = address_of(listener, "https" if context else "http")
        if address == f"unix:{options.unix_socket}":
            cleanup.callback(_remove, options.unix_socket)
        announce = functools.partial(_announce, options, address)
        return run_server(make_server, options.workers, listener, announce, renew if context else None)


def _check_processes(options: Any) -> None:
    if options.workers < 1 or options.max_connections < 1:
        raise InvalidParameter("--workers and --max-connections must be at least 1")
    if options.files and not os.path.isdir(options.files):
        raise InvalidParameter(f"--files: {options.files} is not a directory")
    if options.workers > 1 and not hasattr(os, "fork"):
        raise InvalidParameter("--workers: this system cannot fork; use 1")
    if options.workers > 1 and options.store.startswith("memory:"):
        raise InvalidParameter("--workers: a store in memory belongs to one process; use 1, or another store")


def _add_sample(storage: Storage) -> None:
    """Put the images of _SAMPLE into an empty store."""
    with StorageErrors():
        if not _count(storage):
            storage.add_all(image_record({
                "id": id, "account_id": "a-shpoolxx", "arch": arch, "is_public": True, "description": description,
                "source": {"uri": f"file:///var/lib/wakame-vdc/images/{file}"}, "features": {"virtio": True},
                "md5sum": hashlib.md5(file.encode(), usedforsecurity=False).hexdigest(),
                "created_at": "2013-02-01T09:00:00Z",
            }) for id, arch, file, description in _SAMPLE)


def _log_writer(options: Any) -> Callable[[str], object]:
    """Return a function that appends text to the log in one write, so that lines of several processes never mix.

    Raises InvalidParameter for a file of the store, and OSError.
    """
    if options.log == "-":
        return lambda text: None
    file = 2
    if options.log:
        _refuse_store_file(options.log, options.store)
        file = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    return lambda text: os.write(file, text.encode("ascii", "backslashreplace"))


def _announce(options: Any, address: str) -> None:
    if not address.startswith("unix:") and not re.match(_LOOPBACK, address):
        if not options.tokens:
            _tell(options, f"warning: {address} is open to others, and callers may claim to be any account")
        elif not options.tls_cert:
            _tell(options, f"warning: {address} is open to others, who may read tokens on their way; use --tls-cert")
    page = "" if address.startswith("unix:") else f" (page: {address}/)"
    _tell(options, f"serving {options.store} on {address}/api/images{page}")


def _add(options: Any, boot_dev_type: int, location: str) -> None:
    fields = {**_given_fields(options), "boot_dev_type": boot_dev_type}
    if "WMI_ACCOUNT" in os.environ:
        fields.setdefault("account_id", os.environ["WMI_ACCOUNT"])
    if location.startswith("bo-"):  # vdc-manage of 12.03 took the id of a backup object here
        fields["backup_object_id"] = location
    elif boot_dev_type == BOOT_DEV_SAN:
        fields["source"] = {"snapshot_id": location}
    elif re.match("[A-Za-z][A-Za-z0-9+.-]*://", location):
        fields["source"] = {"uri": location}
    else:
        _refuse_store_file(location, options.store)
        _describe_file(location, fields)
    with open_storage(options.store) as storage:
        _write(Catalog(storage).register(fields) + "\n")


def _describe_file(path: str, fields: dict[str, Any]) -> None:
    """Set source and checksum of an image whose file is on this machine. Raises InvalidParameter and OSError."""
    if not os.path.isfile(path):
        raise InvalidParameter(f"{path} is not a file here; give the path of a file, or a URI such as file:///…")
    fields["source"] = {"uri": "file://" + urllib.parse.quote(os.fsencode(os.path.abspath(path)))}
    image_record(fields)  # raises for a wrong field now, and not after the MD5 of a large file
    if "md5sum" not in fields:
        digest = hashlib.md5(usedforsecurity=False)  # the API's checksum; no secret depends on it
        with open(path, "rb") as file, _Progress(f"md5 of {path}:", 1 << 20, " MiB") as progress:
            while piece := file.read(1 << 20):
                digest.update(piece)
                progress(file.tell(), os.fstat(file.fileno()).st_size)
        fields["md5sum"] = digest.hexdigest()


def _given_fields(options: Any) -> dict[str, Any]:
    fields = {name: getattr(options, name, None) for name in _FIELD_OPTIONS.split()}
    if names := fields.pop("feature"):
        fields["features"] = dict.fromkeys(names, True)
    return {name: value for name, value in fields.items() if value is not None}


def _refuse_store_file(path: str, url: str) -> None:
    """Raise InvalidParameter if a path leads to a file of the store, however the path is spelled."""
    # Files that exist are compared by inode, which sees through links; files that do not exist yet by their real path.
    location = url.partition(":")[2]
    for file in [os.path.realpath(location) + ending for ending in _STORE_FILES if location]:
        same = os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file)
        if same or os.path.realpath(path) == file:
            raise InvalidParameter(f"{path} is a file of the store itself, {url}; give another one")


def _open_existing(url: str) -> Storage:
    """Open a store that exists: a typo in its name must not create a store. Raises as open_storage does."""
    scheme, _, location = url.partition(":")
    if scheme in ("json", "sqlite") and location and not os.path.exists(location):
        raise InvalidParameter(f"there is no store {url}; `add` or `load` makes one")
    return open_storage(url)


def _count(storage: Storage) -> int:
    return storage.page(None, 0, 0, deleted=None)[0]


@contextlib.contextmanager
def _catalog(options: Any, version: str = DOCUMENT) -> Iterator[Any]:
    """Yield a Client for --url, otherwise a Catalog on --store. Both have the same verbs."""
    if not options.url:
        with _open_existing(options.store) as storage:
            yield Catalog(storage, options.account, version)
    else:
        yield _client(options, version)


def _client(options: Any, version: str = DOCUMENT) -> Client:
    token = _read_token(options)
    if not options.url:
        raise InvalidParameter("files are fetched from a server: give --url http://HOST:PORT or set WMI_URL")
    if not options.account and not token:
        raise InvalidParameter("a server needs to know your account: give --account A or set WMI_ACCOUNT")
    return Client(options.url, options.account, version=version, cafile=options.cacert, token=token,
                  plain_token=options.plain_token)


def _read_token(options: Any) -> str:
    """Return the token of --token-file, --token or WMI_TOKEN; "" if there is none. Raises InvalidParameter, OSError."""
    if not options.token_file:
        return options.token or ""
    with open(options.token_file, encoding="ascii", errors="replace") as file:
        token = file.read(8192).strip()
    if not token:
        raise InvalidParameter(f"{options.token_file}: holds no token")
    _warn_if_exposed(options, options.token_file)
    return token


def _warn_if_exposed(options: Any, path: str) -> None:
    if os.stat(path).st_mode & (stat.S_IROTH | stat.S_IWOTH):
        _tell(options, f"warning: {path} is open to others on this machine; use chmod o= {path}")


def _list(options: Any) -> None:
    with _catalog(options) as catalog:
        for text in _OUTPUTS[options.output][1](iter(catalog.index(options.start, options.limit).images)):
            _write(text)


def _show(options: Any) -> None:
    with _catalog(options) as catalog:
        _write(_OUTPUTS[options.output][0](catalog.show(options.id)))


def _delete(options: Any) -> None:
    with _catalog(options) as catalog:
        for id in options.id:
            _write(catalog.destroy(id) + "\n")


def _modify(options: Any) -> None:
    fields = _given_fields(options)
    if not fields:
        raise InvalidParameter("nothing to change: give a field, such as --description TEXT")
    with _catalog(options, "12.03") as catalog:
        # An account, or a server, may set only what PUT of 12.03 sets. The operator of a store may set nearly all.
        change = catalog.update if options.url or options.account else catalog.modify
        _write(_OUTPUTS[options.output][0](change(options.id, **fields)))


def _set_features(options: Any) -> None:
    given = {name: getattr(options, name) for name in ("virtio", "acpi") if getattr(options, name) is not None}
    if not given:
        raise InvalidParameter("nothing to change: give --virtio, --no-virtio, --acpi or --no-acpi")
    with _open_existing(options.store) as storage:
        Catalog(storage).set_features(options.id, **given)


# ---- options and commands ----

# The options by name: the short form, mostly vdc-manage's; the help text; and further arguments for argparse.
_Option = tuple[str, str, dict[str, Any]]
_SWITCH, _TOGGLE = {"action": "store_true"}, {"action": "toggle"}  # --NAME, and --NAME or --no-NAME
_MANY: Any = {"action": "append", "metavar": "NAME"}
_COUNT: Any = {"type": int, "metavar": "N"}
_DEFAULT_STORE = "sqlite:images.db"
_OPTIONS: dict[str, dict[str, _Option]] = {  # by the title of their group in --help
    "options": {
        "output": ("-o", "table (the default), json, yaml or id", {"choices": _OUTPUTS, "default": "table"}),
        "start": ("", "number of images to skip (default: 0)", {"default": "0"}),
        "limit": ("", "list at most this many images (0: all)", {}),
        "virtio": ("", "set or clear this feature", _TOGGLE),
        "acpi": ("", "set or clear this feature", _TOGGLE),
        "sample": ("", "fill an empty store with a few images", _SWITCH),
        "unversioned": ("", "version of /api/images: %(choices)s", {"choices": VERSIONS, "default": DOCUMENT}),
        "log": ("", "append the log to FILE, not to stderr; - for no log", {"metavar": "FILE"}),
        "log_format": ("", "text (the default) or json", {"choices": LOG_FORMATS, "default": "text"}),
    },
    "where the images are": {  # the environment has defaults: WMI_STORE, WMI_URL, …
        "store": ("", f"SCHEME:LOCATION (default: {_DEFAULT_STORE})", {"metavar": "URL"}),
        "url": ("", "use the server at http://HOST:PORT, not a store", {"metavar": "URL"}),
        "cacert": ("", "certificates to trust for https (PEM)", {"metavar": "FILE"}),
        "account": ("", "your account (default on a store: the operator)", {"metavar": "A"}),
        "token": ("", "your token; others can see it here, WMI_TOKEN is safer", {"metavar": "T"}),
        "token_file": ("", "read the token from FILE", {"metavar": "FILE"}),
        "plain_token": ("", "allow the token over http, where others may read it", _SWITCH),
    },
    "where to listen": {
        "host": ("", "address to listen on (default: %(default)s)", {"default": "127.0.0.1"}),
        "port": ("", "port; 0: any free one (default: %(default)s)", {**_COUNT, "default": 9001}),
        "unix_socket": ("", "listen on a Unix socket instead", {"metavar": "PATH"}),
        "host_name": ("", "on loopback, accept this Host too; may be repeated", {**_MANY, "default": []}),
        "workers": ("", "number of processes (default: %(default)s)", {**_COUNT, "default": 1}),
        "max_connections": ("", "connections per process (default: %(default)s)",
                            {**_COUNT, "default": MAX_CONNECTIONS}),
    },
    "fields": {
        "uuid": ("-u", "id of the image (default: a random one)", {}),
        "account_id": ("-a", "owner (default for add: WMI_ACCOUNT)", {}),
        "arch": ("-r", "x86 or x86_64", {}),
        "md5sum": ("-m", "MD5 of the file (default for add PATH: computed)", {}),
        "description": ("-d", "any text", {}),
        "state": ("-s", "one of " + ", ".join(STATES[:-1]), {}),
        "is_public": ("-p", "every account may see the image", _TOGGLE),
        "file_format": ("", "such as raw", {}),
        "feature": ("", "virtio or acpi; may be repeated", _MANY),
        "root_device": ("", "such as label:root", {}),
        "is_cacheable": ("", "hosts may keep a copy of the file", _TOGGLE),
        "instance_model_name": ("", "such as kvm", {}),
        "service_type": ("", "std or lb", {}),
        "parent_image_id": ("", "id of the image that this one was made from", {}),
        "display_name": ("", "a short name", {}),
        "backup_object_id": ("", "id of a backup object, bo-…", {}),
        "os_type": ("", "linux or windows", {}),
    },
}

_, _PLACES, _LISTENING, _FIELD_OPTIONS = map(" ".join, _OPTIONS.values())
# The subcommands: name, function, arguments (positional ones in capitals, as in a usage line), help text, example.
_COMMANDS: list[tuple[str, Callable[[Any], object], str, str, str]] = [
    ("serve", _serve,
     f"store sample files tokens unversioned log log_format {_LISTENING} tls_cert tls_key",
     "serve the images of a store over HTTP", "--sample --port 9001"),
    ("add local", lambda options: _add(options, BOOT_DEV_LOCAL, options.path_or_uri),
     f"PATH_OR_URI store {_FIELD_OPTIONS}",
     "register an image file", "lucid.raw -a a-shpoolxx -d 'Ubuntu 10.04' --is-public"),
    ("add volume", lambda options: _add(options, BOOT_DEV_SAN, options.snapshot_id),
     f"SNAPSHOT_ID store {_FIELD_OPTIONS}",
     "register a volume snapshot", "snap-lucid1 -a a-shpoolxx"),
    ("list", _list, f"{_PLACES} output start limit", "list images, newest first", "--limit 20 -o json"),
    ("show", _show, f"ID {_PLACES} output", "show one image", "wmi-lucid0 -o yaml"),
    ("delete", _delete, f"ID... {_PLACES}", "delete images and print their ids", "wmi-lucid0 wmi-lucid1"),
    ("del", _delete, f"ID... {_PLACES}", "vdc-manage's name for delete", "wmi-lucid0"),
    ("modify", _modify, f"ID {_PLACES} output {_FIELD_OPTIONS.replace('uuid ', '')}",
     "change fields of an image (on a server: display name, description)", "wmi-lucid0 --arch x86 --no-is-public"),
    ("features", _set_features, "ID store virtio acpi",
     "set or clear features and leave the others as they are", "wmi-lucid0 --virtio --no-acpi"),
]


# ---- running a command ----


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 error, 130 interrupted.

    Raises SystemExit: 2 for wrong usage, 0 after --help and --version.
    """
    _prepare_streams()
    options: Any = None
    try:
        try:
            options = _parse_arguments(sys.argv[1:] if argv is None else argv)
            return options.run(options) or 0
        finally:
            with _naming("standard output"):
                sys.stdout.flush()
    except (Error, OSError, ImportError) as error:  # an ImportError comes from a backend
        if not isinstance(error, BrokenPipeError):  # no message if the reader, such as head, has seen enough
            print(f"wmi: {_visible(_explain(error, options))}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # drop the rest: otherwise the interpreter tries to write it once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130


def _prepare_streams() -> None:
    """Open standard descriptors that are closed, and write UTF-8 in any locale."""
    # Otherwise the next file that is opened would get the number of a closed one, and a message on standard error could
    # end up in a store. Input is opened for writing and output for reading, so that using them still fails.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_WRONLY)
            setattr(sys, name, os.fdopen(null, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _parse_arguments(argv: Sequence[str]) -> Any:
    import argparse  # here: a program that only imports this module does not need it

    style: Any = {"formatter_class": functools.partial(argparse.HelpFormatter, width=100, max_help_position=43)}
    parser = argparse.ArgumentParser("wmi", description=(__doc__ or "").partition("\n")[0], **style)
    parser.add_argument("--version", action="version", version=f"wmi {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add = commands.add_parser("add", help="register an image and print its id", **style)
    parents = {"": commands, "add": add.add_subparsers(metavar="local|volume", required=True)}
    for words, run, arguments, help, example in _COMMANDS:
        parent, _, name = words.rpartition(" ")
        command = parents[parent].add_parser(
            name, help=help, description=help, add_help=False, epilog=f"example: wmi {words} {example}", **style,
            usage=" ".join(["%(prog)s [OPTION ...]", *filter(str.isupper, arguments.split())]),
        )
        command.register("action", "toggle", argparse.BooleanOptionalAction)
        command.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        # file="-" is standard input or output. The defaults of None are for `serve` without the part Optional.
        command.set_defaults(run=run, file="-", files=None, tokens=None, tls_cert=None, accepted={*arguments.split()})
        if name in argv:  # to add those of every command would take longer than most commands do
            _add_arguments(command, arguments.split())
    # As in vdc-manage, --account_id is the same as --account-id; what follows "--" is left as it is.
    end = [*argv, "--"].index("--")
    dashed = [re.sub("^--[^=]*", lambda match: match[0].replace("_", "-"), word) for word in argv[:end]]
    return _completed(parser.parse_args([*dashed, *argv[end:]]))


def _completed(options: Any) -> Any:
    """Set the options that were not given: from the environment, or --store to its default."""
    # An option beats the variables: with --store, WMI_URL does not count, and with --token, WMI_TOKEN_FILE does not.
    for names in (("store", "url"), ("token", "token_file"), ("account",), ("cacert",)):
        if not any(getattr(options, name, None) for name in names) and getattr(options, names[0], None) != "":
            for name in options.accepted.intersection(names):
                default = _DEFAULT_STORE if name == "store" else None
                setattr(options, name, os.environ.get(f"WMI_{name.upper()}") or default)
    return options


def _add_arguments(command: Any, names: Sequence[str]) -> None:
    """Add the options with these names in _OPTIONS, and a positional argument for each name in capitals."""
    for name in filter(str.isupper, names):
        nargs = "?" if name[0] == "[" else "+" if name[-1] == "." else None
        command.add_argument(name.strip("[].").lower(), metavar=name, nargs=nargs)
    for title, options in _OPTIONS.items():
        group = command.add_argument_group(title)
        for name, (short, help, settings) in options.items():
            if name in names:
                if "action" not in settings:
                    settings = {"metavar": name.split("_")[-1].upper(), **settings}
                group.add_argument(f"--{name.replace('_', '-')}", *short.split(), help=help, **settings)


_CONTRADICTION = "the token is another account's"


def _explain(error: Exception, options: Any) -> str:
    """Return a message that tells a person what is wrong and what to do about it."""
    # Errors carry the API's words, which old clients expect over HTTP and which say little to a person.
    text = str(error) or type(error).__name__
    if isinstance(error, OSError):
        text = error.strerror or text
        return f"{error.filename}: {text}" if isinstance(error.filename, str) else text
    if text in ("start", "limit") and hasattr(options, text):
        return f"--{text}: {getattr(options, text)!r} is not a whole number of at most 18 digits"
    if getattr(error, "status", 0) == 401:
        return f"{options.url} needs a valid token: set WMI_TOKEN, or give --token-file FILE"
    if text == _CONTRADICTION:
        return f"not permitted: {text}; leave --account out"
    if text.startswith("Invalid UUID Syntax: "):
        return f"{text[21:]!r} is not an id: an id is wmi- and letters a-z or digits"
    cause: Any = getattr(error.__cause__, "reason", error.__cause__)  # urllib wraps the system's error
    said = getattr(cause, "strerror", "") or cause
    if getattr(cause, "reason", "") == "WRONG_VERSION_NUMBER":
        said = "that port does not speak HTTPS, try http://"
    where = getattr(options, "url", None) or getattr(options, "store", "")
    if hasattr(cause, "verify_message"):
        return f"{where}: {cause.verify_message}; to trust a CA of your own, give --cacert FILE"
    return _EXPLAINED.get(type(error), "{text}").format(text=text, where=where, cause=f": {said}" if said else "")


_EXPLAINED: dict[type[Exception], str] = {
    UnknownUUIDResource: "no such image: {text} in {where}",
    OperationNotPermitted: "not permitted: the image belongs to another account",
    DatabaseError: "{text}{cause}",
    NotFound: "there are no images at {where}; give the URL of an image server, such as http://HOST:PORT",
    BadAnswer: "{where}: {text}; is this an image server?",
    Unreachable: "cannot reach {where}{cause}; is the server running?",
}


####################################################################################################
# Optional
####################################################################################################
# Nobody needs this part in order to understand the others, which work without it; a test deletes it. They call it in a
# few places, if an option asks for it. It adds its paths to ROUTES, its format to LOG_FORMATS, and its options and
# subcommands to the tables of the command line.

# ---- HTTPS ----


class TLSConnection(Connection):
    """A connection whose bytes pass through TLS.

    In TLS, a read may have to write first, and a write may have to read: then READ or WRITE is returned. The handshake
    is part of the first read.
    """

    # No decrypted bytes stay in OpenSSL, where the selector would not see them: a record of TLS holds at most PIECE
    # bytes, and receive() asks for PIECE bytes.

    def __init__(self, stream: socket.socket, address: Any, server: Server) -> None:
        assert server.tls
        stream.getpeername()  # raises if the client is gone: then wrap_socket() would not close the socket
        wrapped = server.tls.wrap_socket(stream, server_side=True, do_handshake_on_connect=False)
        super().__init__(wrapped, address, server)
        self.deadline = self.began + HEAD_SECONDS

    def receive(self) -> int:
        """Take what has arrived; see Connection. Raises BadRequest if the client speaks HTTP without TLS."""
        try:
            return _wanted(super().receive)
        except ssl.SSLError as error:
            if error.reason != "HTTP_REQUEST":
                raise
            # The error is sent without TLS, on the bare socket, so that the client can read it.
            self.socket = socket.socket(fileno=self.socket.detach())
            self.socket.setblocking(False)
            raise BadRequest("this port speaks HTTPS: the URL has to begin with https://") from error

    def _send(self) -> int:
        return _wanted(super()._send)

    def _linger(self) -> int:
        if isinstance(self.socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()  # sends close_notify, so the answer is complete; that of the client is not awaited
            self._clear_errors()
        return super()._linger()

    def close(self) -> None:
        """Close the socket; see Connection."""
        super().close()
        self._clear_errors()

    def _clear_errors(self) -> None:
        """Empty OpenSSL's queue of errors on PyPy."""
        # PyPy leaves errors in the queue of the thread, and reports them for the next connection that is served. Making
        # a TLS object clears the queue.
        if sys.implementation.name == "pypy" and self.server.tls:
            self.server.tls.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)


def _wanted(call: Callable[[], int]) -> int:
    """Return what a call returns, or READ or WRITE if TLS has to do that first."""
    try:
        return call()
    except ssl.SSLWantReadError:
        return READ
    except ssl.SSLWantWriteError:
        return WRITE


def tls_context(certificate: str, key: str | None = None) -> ssl.SSLContext:
    """Return the context of an HTTPS server, from PEM files. If key is None, the certificate's file holds the key too.

    Raises InvalidParameter.
    """
    if not ssl:
        raise InvalidParameter("--tls-cert: this Python has no ssl module")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # to renegotiate costs the server far more than a client
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        files = certificate if key is None else f"{certificate}, {key}"
        raise InvalidParameter(f"{files}: not a certificate and its key in PEM: {error.args[-1]}") from error
    return context


def _secure_connection(cafile: str | None) -> Any:
    """Return a factory of TLS connections for a client. Raises InvalidParameter if the file holds no certificates."""
    if not ssl:
        raise InvalidParameter("https: this Python has no ssl module")

    class SecureConnection(http.client.HTTPSConnection, _Connection):  # here: without ssl there is no HTTPSConnection
        """A connection that does its handshake on the socket that _Connection.connect() has opened."""

    try:
        return functools.partial(SecureConnection, context=ssl.create_default_context(cafile=cafile))
    except (OSError, ValueError) as error:
        raise InvalidParameter(f"cafile: {cafile} is not a file of PEM certificates: {error.args[-1]}") from error


# ---- image files ----

TICK_SECONDS = 2.0  # the coarsest step of the times in any common file system: FAT
FILE_PIECE = 1 << 20  # bytes of a file that are sent or read by one system call
_FAR = 10**18  # an offset past the end of every file
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
           errno.ELOOP, errno.EINVAL,  # a link, or a link that vanished while it was read
           errno.ENXIO, errno.ENODEV)  # a socket, or a device without a driver


class FileBody:
    """The body of an answer that is an open file, or a range of it; see Body. close() closes the file.

    `status` is the result of fstat() when the answer was begun. If the file changes later, the answer is cut.
    """

    # The head names the bytes by their ETag, so no complete answer may mix bytes of two versions of the file. The size
    # and the time of modification are compared after each piece. sendfile() has already sent it by then, so the last
    # piece is always copied: it is read, the file is compared, and only then is it sent. A client that gets all of
    # Content-Length thus has bytes of one version, as far as the clock of the file system tells two versions apart.

    most_waiting = 3 * MAX_WAITING  # more than for TextBody, so that files are still sent while the store is stuck

    def __init__(self, file: BinaryIO, status: os.stat_result, start: int, end: int) -> None:
        self.length: int | None = end - start
        self._file, self._status, self._at, self._end = file, status, start, end

    def more(self, stream: socket.socket) -> bytes | int:
        """Return the next piece, or send it; see Body. Raises BadAnswer if the file has changed, and OSError."""
        left = self._end - self._at
        piece: bytes | int
        if left > PIECE and hasattr(os, "sendfile") and not (ssl and isinstance(stream, ssl.SSLSocket)):
            size = min(left - PIECE, FILE_PIECE)
            piece = os.sendfile(stream.fileno(), self._file.fileno(), self._at, size)
        else:  # the last piece, TLS, or a system without sendfile
            piece = os.pread(self._file.fileno(), min(left, PIECE), self._at)
        status = os.fstat(self._file.fileno())
        same = (status.st_size, status.st_mtime_ns) == (self._status.st_size, self._status.st_mtime_ns)
        if not same or (left and not piece):
            raise BadAnswer("the file was changed while it was sent")
        self._at += piece if isinstance(piece, int) else len(piece)
        return piece

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_file(service: Service, request: Request, route: Route, arrived: float, pulse: Pulse) -> Answer:
    """Answer GET and HEAD of an image's file, if the caller may see the image (RFC 9110, 13 and 14)."""
    record = service.catalog(request, route.version).show(route.id or "")
    return file_answer(request, record, open_image_file(service.files or "", record))


def open_image_file(folder: str, record: Record) -> BinaryIO:
    """Return the file that an image's source names, open for reading; it must be a regular file below folder.

    Links may lead to other places below the folder, but not out of it. Raises NotFound, and DatabaseError if the file
    exists and cannot be read.
    """
    # A user who registers images must not be able to give out files from elsewhere on this machine, not even by a link
    # that is made at the right moment.
    #
    # 1. Only a file:// URI of this machine names a file.
    uri = record["source"].get("uri", "")
    match = re.fullmatch("file://(?:localhost)?(/.*)", uri)
    absent = NotFound(f"there is no file of {record['id']} here")
    if not match:
        raise absent
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # else opening a FIFO would wait for a writer
    with contextlib.ExitStack() as opened:
        try:
            # 2. Resolve all links in the path. The result must be below the folder.
            base, step = os.path.realpath(folder), None
            real = os.path.realpath(os.fsdecode(urllib.parse.unquote_to_bytes(match[1])))
            if os.path.commonpath([base, real]) != base:
                raise absent
            # 3. Walk the resolved path: open each directory relative to the one before, and follow no link. If somebody
            #    has put a link into the path since step 2, opening it fails.
            *folders, name = os.path.relpath(real, base).split(os.sep)
            for each in (base, *folders):
                step = os.open(each, flags | os.O_DIRECTORY, dir_fd=step)
                opened.close()  # closes the previous directory
                opened.callback(os.close, step)
            file = io.FileIO(name, opener=lambda name, _: os.open(name, flags, dir_fd=step))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _ABSENT:
                raise DatabaseError(f"the file of {record['id']} cannot be read") from error
            raise absent from error  # a ValueError comes from a NUL in the name
    # 4. No FIFO, device or directory. Opening one was harmless because of O_NONBLOCK.
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise absent
    return cast(BinaryIO, file)


def file_answer(request: Request, record: Record, file: BinaryIO) -> Answer:
    """Return the answer that sends a file or a range of it, or 304, by the conditions that the request sets.

    The file is closed unless it is sent. Raises PreconditionFailed and RangeNotSatisfiable.
    """
    # 1. Make the ETag. The checksum in the catalog is the same on every server, so that a download can be resumed from
    #    another one. Without a checksum, the ETag is inode, size and time. If the file was written in the last tick, a
    #    second write may get the same time: then the ETag is random, and never matches again.
    status, fields, moment = os.fstat(file.fileno()), request.fields, time.time()
    size, modified = status.st_size, int(min(status.st_mtime, moment))
    settled = abs(moment - status.st_mtime) > TICK_SECONDS
    mark = f"{status.st_ino:x}-{size:x}-{status.st_mtime_ns:x}" if settled else os.urandom(12).hex()
    etag, date = f'"{record["md5sum"] or mark}"', email.utils.formatdate(modified, usegmt=True)
    lines = (f"ETag: {etag}\r\nLast-Modified: {date}\r\n"
             f"Accept-Ranges: bytes\r\nCache-Control: {_CACHE_CONTROL}\r\n")
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(file.close)
        # 2. Check the conditions, in the order of RFC 9110, 13.2.2.
        unless, since = _http_date(fields.get("if-unmodified-since")), _http_date(fields.get("if-modified-since"))
        if "if-match" in fields:
            if not matches_etag(fields["if-match"], etag, weakly=False):
                raise PreconditionFailed("If-Match")
        elif unless is not None and modified > unless:
            raise PreconditionFailed("If-Unmodified-Since")
        if "if-none-match" in fields:
            if matches_etag(fields["if-none-match"], etag):
                return make_answer(304, lines)
        elif since is not None and modified <= since:
            return make_answer(304, lines)
        # 3. Find the range. Only GET has one, and If-Range, if given, must name this file (RFC 9110, 13.1.5):
        #    otherwise the client would put two different files together, so it gets the whole file.
        ranged = None
        if request.method == "GET" and fields.get("if-range", etag) in (etag, date if settled else etag):
            ranged = parse_range(fields.get("range", ""), size)
        # 4. Add the name under which a browser saves the file.
        name = safe_name(record["source"]["uri"]) or record["id"]
        lines += (f'Content-Type: application/octet-stream\r\nContent-Disposition: attachment; filename="{name}"\r\n'
                  "X-Content-Type-Options: nosniff\r\n")
        start, end = ranged or (0, size)
        if ranged:
            lines += f"Content-Range: bytes {start}-{end - 1}/{size}\r\n"
        cleanup.pop_all()  # from here on FileBody.close() closes the file
        return make_answer(206 if ranged else 200, lines, FileBody(file, status, start, end))


def safe_name(uri: str) -> str:
    """Return the last part of a URI as a file name of safe characters; "" if nothing is left of it."""
    name = urllib.parse.unquote(uri.partition("?")[0]).rpartition("/")[2]
    return re.sub("[^A-Za-z0-9._-]", "_", name)[:200].lstrip(".-")


def parse_range(field: str, size: int) -> tuple[int, int] | None:
    """Return start and end of the range that Range asks for, or None if the whole file is to be sent (RFC 9110, 14).

    Several ranges, other units than bytes and malformed fields are ignored, as the RFC permits. Raises
    RangeNotSatisfiable.
    """
    # A number of more than 18 digits lies past the end of every file. It is not converted: Python refuses, or takes
    # long, for thousands of digits. A missing number becomes _FAR too.
    match = re.fullmatch(r"(?i:bytes)=[ \t,]*([0-9]*)-([0-9]*)[ \t,]*", field)
    if not match or not any(match.groups()):
        return None
    first, last = (_FAR if len(digits.lstrip("0")) > 18 else int(digits[-18:] or _FAR) for digits in match.groups())
    if not match[1]:  # "-500": the last 500 bytes
        if not last:
            raise RangeNotSatisfiable(size)
        return (max(0, size - last), size) if size else None
    if last < first:
        return None
    if first >= size:
        raise RangeNotSatisfiable(size)
    return first, min(last + 1, size)


def _http_date(field: str | None) -> int | None:
    """Return an HTTP date in seconds since 1970, or None for a malformed one, which the RFC says to ignore."""
    with contextlib.suppress(ValueError, OverflowError, TypeError, IndexError):  # the last one comes from Python 3.9
        parsed = email.utils.parsedate_tz(field or "")
        return email.utils.mktime_tz(parsed) if parsed else None
    return None


ROUTES.append((r"/api(?:/(11\.12|12\.03))?/images/([^/.]+)/file()", read_file, "files"))


# ---- the log in JSON ----

class JSONLog(TextLog):
    """The lines of the log, each a JSON object."""

    @staticmethod
    def answer(*cells: Any) -> str:
        """Return the line of an answer."""
        names = "time", "client", "account", "method", "target", "status", "bytes", "ms"
        return json.dumps(dict(zip(names, (*cells[:-1], round(cells[-1], 1))))) + "\n"

    @staticmethod
    def failure(time: str, text: str) -> str:
        """Return the line of a failure on our side."""
        return json.dumps({"time": time, "error": text}) + "\n"


LOG_FORMATS["json"] = JSONLog


# ---- tokens ----


class Tokens:
    """The tokens of all accounts, from a file that is read again when it changes.

    Each line is `ACCOUNT SHA256-OF-TOKEN`; `#` begins a comment. A caller presents a token as Bearer, as Basic with the
    account as the user name, or in X-VDC-REQUESTER-TOKEN. The constructor raises InvalidParameter for a bad file.
    """

    def __init__(self, path: str) -> None:
        self._path, self._key = path, os.urandom(16)
        self._accounts: dict[bytes, str] = {}
        self._state: object = None  # of the file when it was last read; None: read it again
        self._fault = ""  # the fault that was reported last
        self._lock = threading.Lock()  # held by the thread that reads the file; the others do not wait for it
        if fault := self.refresh():
            raise InvalidParameter(fault)

    def refresh(self) -> str:
        """Read the file if it has changed. Return a fault that was not reported yet, or ""; never raise.

        If the file has a fault, the tokens that were read last stay in force.
        """
        # Called before every round of requests, so it has to be cheap: usually it costs one stat.
        #
        # 1. If another thread is reading, perhaps from a network that is slow, go on with the tokens as they are.
        if not self._lock.acquire(blocking=False):
            return ""
        fault = ""
        try:
            # 2. Read the file if its state is not the one that was read. The new tokens take the place of the old ones
            #    in one assignment, after the last line has turned out to be good: no request sees half a file.
            status = os.stat(self._path)
            state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
            if state != self._state:
                with open(self._path, encoding="utf-8-sig") as file:
                    self._accounts = dict(self._parse_lines(file))
            # 3. Remember the state, unless the file was changed just now: another change in the same tick of the clock
            #    would leave the same state, so the file is read again each time until it is older than a tick. The
            #    state was taken before the file was read, so a change during the reading is noticed as well.
            self._state = state if abs(time.time() - status.st_ctime) > TICK_SECONDS else None
        except (OSError, ValueError, InvalidParameter) as error:
            fault = f"{self._path}: {getattr(error, 'strerror', '') or error}"
        finally:
            self._lock.release()
        # 4. Report each fault once, instead of in every round until somebody mends the file.
        told, self._fault = self._fault, fault
        return "" if fault == told else fault

    def _parse_lines(self, lines: Iterable[str]) -> Iterator[tuple[bytes, str]]:
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            match = re.fullmatch(r"(a-[a-z0-9]{1,253})\s+([0-9A-Fa-f]{64})", text)
            if match:
                yield self._keyed(bytes.fromhex(match[2])), match[1]
            elif text:
                raise InvalidParameter(f"line {number}: expected ACCOUNT SHA256-OF-TOKEN, as `wmi token` writes it")

    def _keyed(self, digest: bytes) -> bytes:
        """Return the key under which a digest is looked up."""
        # Hashed once more with a secret of this process, so that the time of a look-up in the dict says nothing about
        # the digests in it.
        return hashlib.blake2b(digest, key=self._key, digest_size=16).digest()

    def proven_account(self, request: Request) -> str:
        """Return the account whose token the request presents.

        Raises InvalidRequestCredentials, with status 401; OperationNotPermitted if the header names another account.
        """
        user, token = presented_token(request.fields)
        account = self._accounts.get(self._keyed(hashlib.sha256(token.encode("utf-8", "replace")).digest()))
        if not token or account is None or user not in ("", account):
            error = InvalidRequestCredentials("a token of a known account is needed")
            error.status = 401
            raise error
        if (request.fields.get("x-vdc-account-uuid") or account) != account:
            raise OperationNotPermitted(_CONTRADICTION)
        return account

    def identify(self, request: Request) -> Request:
        """Return the request with the account its token proves; if none, "" in the cache key and "-" in the log."""
        # The account goes into the cache key, so that no caller gets a kept answer of another account.
        try:
            account = self.proven_account(request)
        except Error:
            account = ""
        target, _, tags, host = request.cache_key
        return request._replace(account=account or "-", cache_key=(target, account, tags, host))


def presented_token(fields: Mapping[str, str]) -> tuple[str, str]:
    """Return the account that is named beside the token, and the token; each may be ""."""
    scheme, _, value = fields.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return "", value.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            user, colon, token = binascii.a2b_base64(value.strip().encode()).decode("utf-8").partition(":")
            return (user, token) if user and colon else ("", "")
    return "", "" if scheme else fields.get("x-vdc-requester-token", "")


def add_token(account: str, path: str) -> str:
    """Make a token for an account, append its digest to the file of tokens at path, and return the token.

    Raises InvalidParameter and OSError.
    """
    if os.path.isfile(path):
        Tokens(path)  # raises if the file holds something else, such as a store, which a line of ours could destroy
    token = f"wmi_{os.urandom(32).hex()}"  # the prefix tells people, and tools that look for secrets, what this is
    line = f"{check_account('account', account)} {hashlib.sha256(token.encode()).hexdigest()}\n"
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
        if file.seek(0, io.SEEK_END) and (file.seek(-1, io.SEEK_END), file.read(1))[1] != b"\n":
            line = "\n" + line  # an editor left the last line without a newline
        file.write(line.encode())
        file.flush()  # the whole line in one write, so that a server never reads half of it
        os.fsync(file.fileno())
    return token


def _token(options: Any) -> None:
    if not options.tokens:
        raise InvalidParameter("give the file that `serve --tokens` reads: --tokens FILE")
    _write(add_token(options.account, options.tokens) + "\n")


# ---- the page, and /health ----

PAGE_SIZE = 20  # images on a page
MAX_SEARCH = 200  # characters of a search, as each of its words is looked for in every image
_NOBODY = "a-" + os.urandom(16).hex()  # an account that owns no image, for visitors who name no account
_STYLE = """
:root { color-scheme: light dark; --link: #0a58ad; }
@media (prefers-color-scheme: dark) { :root { --link: #7db8ff; } }
body { margin: 0 auto; max-width: 56rem; padding: 0 1rem 3rem; background: Canvas; color: CanvasText;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
header { padding: .9rem 0; border-bottom: 1px solid #8886; font-weight: 600; }
h1 { margin: 1.25rem 0 0; font-size: 1.5rem; } h2 { margin: 0; font-size: 1.0625rem; } p { margin: .25rem 0 .5rem; }
small, dt, .soft { font-size: .875rem; opacity: .75; } small { display: inline-block; }
form { display: flex; flex-wrap: wrap; gap: .75rem; align-items: end; margin: 1rem 0; } label { flex: 1 1 12rem; }
input, button, .button, pre { padding: .5rem 1rem; border: 1px solid #888; border-radius: .375rem; font: inherit; }
input { box-sizing: border-box; width: 100%; }
button, .button { display: inline-block; background: var(--link); color: Canvas; }
ol { margin: 1rem 0; padding: 0; list-style: none; } li { padding: .75rem 0; border-top: 1px solid #8886; }
.tag { margin-right: .375rem; padding: 0 .5rem; border: 1px solid #888; border-radius: 1rem; font-size: .8125rem; }
nav { display: flex; justify-content: space-between; }
dl { display: grid; grid-template-columns: fit-content(30%) 1fr; gap: .5rem 1.25rem; } dd { margin: 0; }
pre { margin: .25rem 0 1rem; font: .875rem monospace; user-select: all; -webkit-user-select: all; }
dd, pre { white-space: pre-wrap; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>
<body><header><a href="{home}">Machine images</a></header>
<main>
{main}
</main></body></html>
"""
_FORM = """<form role="search" action="/"><label>Search
<input type="search" name="q" value="{words}"></label>{account}<button>Show</button></form>"""
_ACCOUNT_FIELD = """
<label>Account <input name="account" value="{account}" placeholder="a-shpoolxx" pattern="a-[a-z0-9]+"
title="a- and letters a-z or digits" autocapitalize="none" autocomplete="username" spellcheck="false"></label>"""
_PAGE_ERRORS = {
    400: "Something in this address is not right: {error}",
    401: "Load the page again to sign in: the user name is your account, and the password is its token.",
    403: "This image belongs to another account, and is not public.",
    404: "It may have been deleted, or its address is misspelled.",
}
# The fields that people look for first, with labels; the other fields follow under their own names.
_LABELS = {
    "display_name": "Name", "description": "Description", "id": "ID", "file": "File", "md5sum": "MD5",
    "arch": "Architecture", "os_type": "System", "is_public": "Visible to", "account_id": "Owner", "state": "State",
    "created_at": "Registered", "updated_at": "Changed", "boot_dev_type": "Boots from", "source": "Source",
}


def _page_body(title: str, main: str, account: str) -> tuple[bytes, str]:
    """Return a page and its header lines."""
    # The policy allows no script at all, and no style but ours, by its digest. So if a field of an image ever got into
    # a page without escapes, it still could not run or load anything.
    digest = binascii.b2a_base64(hashlib.sha256(_STYLE.encode()).digest(), newline=False).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'self'; base-uri 'none'"
    lines = f"Content-Security-Policy: {policy}; frame-ancestors 'none'\r\nReferrer-Policy: no-referrer\r\n"
    return _PAGE.format(title=_html(title), style=_STYLE, main=main, home=_link("/", account=account)).encode(), lines


def _html(value: Any) -> str:
    """Return a value as text for HTML, even in an attribute; characters that HTML does not allow are replaced."""
    text = value if isinstance(value, str) else to_json(value)
    return html.escape(re.sub("[^\t\n -~\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def _link(path: str, **query: Any) -> str:
    """Return a link for an attribute of HTML: the path, and the parameters that are not empty."""
    given = {name: value for name, value in query.items() if value}
    return _html(f"{path}?{urllib.parse.urlencode(given)}" if given else path)


def read_page(service: Service, request: Request, route: Route, arrived: float, pulse: Pulse) -> Answer:
    """Answer GET and HEAD of the pages for people, / and /images/ID, and of the file that a page links to.

    Without --tokens, the account is a parameter of the query, unless the header names one. Visitors who name none see
    the public images.
    """
    # A browser cannot send X-VDC-ACCOUNT-UUID, so every link of a page carries the account along. With --tokens the
    # browser sends user name and password itself, and the links carry nothing.
    query = parse_query(request.query, ("account", "q", "start"))
    named = query.get("account", "") and check_account("account", query["account"])
    catalog = service.catalog(request, find_version(DOCUMENT), named or _NOBODY)
    account = "" if catalog.account == _NOBODY else str(catalog.account)
    linked = "" if service.tokens else account  # the account that links carry
    if route.id is None:
        title, parts = "Machine images", _listing(service, catalog, query, account, linked, pulse)
    else:
        image = catalog.show(route.id)
        if request.path.endswith("/file"):
            return file_answer(request, image, open_image_file(service.files or "", image))
        title, parts = f"{route.id} · Machine images", _image_page(service, request, image, account, linked)
    body, lines = _page_body(title, "\n".join(parts), linked)
    return content_answer(request, "text/html;charset=utf-8", body, lines)


def error_page(error: Error, request: Request) -> Answer:
    """Return an error as an HTML page."""
    account = re.search("(?:^|&)account=(a-[a-z0-9]+)(?:&|$)", request.query)
    text = _PAGE_ERRORS.get(error.status, "{error}").format(error=error)
    main = f"<h1>{_REASONS[error.status]}</h1>\n<p><bdi>{_html(text)}</bdi></p>"
    body, lines = _page_body(_REASONS[error.status], main, account[1] if account else "")
    return make_error(error, "text/html;charset=utf-8", body, f"{lines}Cache-Control: {_CACHE_CONTROL}\r\n")


def _listing(service: Service, catalog: Catalog, query: Any, account: str, linked: str, pulse: Pulse) -> Iterator[str]:
    start, total, images = whole_number("start", query.get("start") or "0"), 0, []
    words = " ".join(query.get("q", "")[:MAX_SEARCH].encode("utf-8", "replace").decode().split())
    if words:  # every image is read, but only those of this page are held
        with service.walking(catalog, pulse) as walking, StorageErrors():
            found = walking.matching(True, False, [functools.partial(_has_words, words.lower().split())])
            for total, image in enumerate(found, 1):
                if start < total <= start + PAGE_SIZE:
                    images.append(image)
    else:
        total, _, _, images = catalog.index(start, PAGE_SIZE)  # type: ignore[assignment]
    yield f"<h1>Images for {account}</h1>" if account else "<h1>Public images</h1>"
    field = "" if service.tokens else _ACCOUNT_FIELD.format(account=account)
    yield _FORM.format(words=_html(words), account=field)
    if not account:
        yield '<p class="soft">Enter your account to see its private images as well.</p>'
    if images:
        yield f'<p class="soft">Images {start + 1:,} to {start + len(images):,} of {total:,}</p>\n<ol>'
        yield from (_list_item(image, linked) for image in images)
        yield "</ol>"
    else:
        none = f"Nothing here has <bdi>“{_html(words)}”</bdi> in it." if words else "There are no images yet."
        yield f'<p>{"There are no more images." if total else none}</p>'
    before, after = max(0, min(start, total) - PAGE_SIZE), start + PAGE_SIZE
    newer, older = (_link("/", account=linked, q=words, start=offset) for offset in (before, after))
    # The span is there even if it is empty: it keeps the other link on the right.
    yield "<nav><span>" + (f'<a href="{newer}">← Newer</a>' if start else "") + "</span>"
    yield (f'<a href="{older}">Older →</a>' if after < total else "") + "</nav>"


def _has_words(words: Sequence[str], record: Record) -> bool:
    texts = (str(record[name] or "") for name in ("id", "account_id", "arch", "description", "display_name"))
    text = " ".join(texts).lower()
    return all(word in text for word in words)


def _heading(image: Record) -> str:
    """Return, as HTML, the first of an image's names that a person can see and read."""
    # A name of blanks or punctuation alone would be a link that nobody can see or read. <bdi> keeps right-to-left names
    # apart from the text around them.
    texts = (str(image[name] or "")[:200] for name in ("display_name", "description", "id"))
    return f"<bdi>{_html(next(text for text in texts if any(map(str.isalnum, text))))}</bdi>"


def _tags(image: Record) -> str:
    tags = [image["arch"], "public" if image["is_public"] else "private"]
    tags += [image["state"]] if image["state"] not in ("init", "available") else []
    return "".join(f'<span class="tag">{tag}</span>' for tag in tags)


def _list_item(image: Record, linked: str) -> str:
    about = f"{image['id']} · {image['account_id']} · <time>{image['created_at'][:10]}</time>"
    return (f'<li><h2><a href="{_link("/images/" + image["id"], account=linked)}">{_heading(image)}</a></h2>\n'
            f"<p>{_tags(image)} <small>{about}</small></p></li>")


def _image_page(service: Service, request: Request, image: Record, account: str, linked: str) -> Iterator[str]:
    secure = service.secure or request.fields.get("x-forwarded-proto") == "https"
    base = f"{'https' if secure else 'http'}://{request.fields.get('host', 'localhost')}"
    id, uri, caller = image["id"], image["source"].get("uri", ""), account or "a-guest"
    yield f"<h1>{_heading(image)}</h1>\n<p>{_tags(image)} <small>{id}</small></p>"
    if service.files and uri.startswith("file:"):
        address = _link(f"/images/{id}/file", account=linked)
    else:
        address = _html(uri) if re.match("https?://", uri) else ""
    if address:
        yield f'<p><a class="button" href="{address}" rel="noreferrer">Download</a></p>'
    yield f"<dl>\n{''.join(_rows(image))}</dl>"
    if address:
        proof = "--token-file ~/.wmi-token" if service.tokens else f"--account {caller}"
        yield _command("Fetch the file, checked and resumed", f"wmi fetch {id} --url {base} {proof}")
    # With -u and no password, curl asks for it: a token in the command would end up in the history of the shell.
    proof = f"-u {caller}" if service.tokens else f"-H 'X-VDC-ACCOUNT-UUID: {caller}'"
    yield _command("Read the record", f"curl {proof} {base}/api/images/{id}")


def _command(what: str, line: str) -> str:
    return f'<h2>{what}</h2>\n<pre tabindex="0">{_html(line)}</pre>'


def _rows(image: Record) -> Iterator[str]:
    source = image["source"]
    shown = {**dict.fromkeys(_LABELS), **image, "source": "".join(source.values())}
    shown["file"] = safe_name(source["uri"]) if "uri" in source else None
    shown["is_public"] = "everybody" if image["is_public"] else f"{image['account_id']} only"
    shown["boot_dev_type"] = "a volume" if image["boot_dev_type"] == BOOT_DEV_SAN else "a local file"
    shown["features"] = ", ".join(name for name, present in image["features"].items() if present)
    for name, value in shown.items():
        if value not in (None, ""):
            label = _LABELS.get(name) or name.replace("_", " ").capitalize()
            yield f"<dt>{label}</dt><dd><bdi>{_html(value)}</bdi></dd>\n"


def read_health(service: Service, request: Request, route: Route, arrived: float, pulse: Pulse) -> Answer:
    """Answer GET and HEAD of /health: 200 if the store answers now, otherwise 503."""
    shown = {"status": "ok", "version": __version__, "backend": type(service.storage).__name__,
             "revision": service.revision(arrived)}
    return content_answer(request, "application/json", encode(shown, "json"))


ROUTES += [
    ("()/(?:images/([^/.]+))?()", read_page, ""),
    ("()/images/([^/.]+)/file()", read_page, "files"),
    ("()/health()()", read_health, ""),
]
ERROR_PAGES[read_page] = error_page


# ---- fetch ----

Progress = Callable[[int, Union[int, None]], object]  # takes the bytes that have arrived, and the total if it is known


def fetch_image(client: Client, id: str, path: str | None, progress: Progress, replaces: bool) -> str:
    """Fetch the file of an image to path, and return the path.

    A path of "-" is standard output; None is the name of the file in the image's source. A file that exists is replaced
    only if `replaces` is true. If the source is a file:// URI, the client's server sends the file. If it is an http or
    https URI, the file is fetched from there, and neither account nor token is sent to that server. The bytes are kept
    in path.part until the file is complete and has the md5sum of the catalog. A later call fetches only what is
    missing, if that server can send ranges. Raises FetchError, Unreachable, the errors of show, and OSError for files
    on this machine.
    """
    # 1. Find out where the file is.
    image, source = client.show(id), client
    shown = image.get("source", {"uri": "file:/"}) or {}  # 12.03 does not show the source, so the server is asked
    url, uri = f"{client._url}/{id}/file", str(shown.get("uri", ""))
    if re.fullmatch("https?://[^/?#@]+([/?#].*)?", uri):
        url = urllib.parse.quote(uri.partition("#")[0], safe="!$%&'()*+,/:;=?@[]~")
        source = client._anonymous_client(uri)
    elif not uri.startswith("file:"):
        raise FetchError(f"{id} has no file to fetch: its source is {brief(shown)}")
    path, tries = path or unused_name(image), 0
    # 2. Ask for what is missing until all of it is here. Only tries in a row that brought nothing are counted, so a
    #    line that breaks now and then delays a large file but does not stop it.
    with _Arrival(path, url, image.get("md5sum")) as arrival:
        while not arrival.is_whole:
            before = arrival.size
            try:
                receive = functools.partial(arrival.receive, source, progress)
                source._send("GET", url, receive, _NO_DEADLINE, fields=arrival.fields())
            except NotFound as error:
                raise FetchError(f"the server gives out no file of {id}: it must lie below --files DIR") from error
            except Error as error:
                tries = 0 if arrival.size > before else tries + 1
                if error.status not in (502, 503, 504) or isinstance(error, BadAnswer) or tries > client._retries:
                    if source is client or isinstance(error, FetchError):
                        raise
                    raise FetchError(f"the source of {id} cannot be fetched: {error}") from error
                time.sleep(min(_PAUSE_AT_MOST, max(error.retry_after, random.uniform(0.05, 0.1) * 2**tries)))
        # 3. Check the file, and give it its name.
        arrival.finish(replaces)
    return path


def unused_name(image: Record) -> str:
    """Return the name of the file in an image's source, or else its id. Raises FetchError if that file exists here."""
    # Whoever registered the image has chosen the name. It must not replace a file of the user.
    return check_unused(safe_name(str((image.get("source") or {}).get("uri", ""))) or str(image["id"]))


def check_unused(path: str) -> str:
    """Return the path. Raises FetchError if there is a file."""
    if os.path.lexists(path):
        raise FetchError(f"{path} exists already; to replace it, or to use another name, give -O FILE")
    return path


class _Arrival:
    """The bytes of a file that have arrived so far, in path.part, and a note in path.part.json of what they belong to.

    A part is continued only with bytes of the same file. They come from the same URL. A range (206) must repeat the
    ETag that was noted or, if a time was noted, must have that time or none. In a whole file (200), the first bytes
    must be those of the part.
    """

    # The life of a part file. One process at a time holds it, by a lock on path.part.
    #
    #     no part, or an empty one
    #        |    ^
    #        |    +---- the process ends before a byte has arrived: part and note are removed
    #        | an answer begins: _begin() writes the note (URL, md5sum, validator)
    #        v
    #     begun -------- killed, or the connection lost: part and note stay --------> begun
    #        |           continued: 206 with the same validator appends; 200 sends all of it again, and what is
    #        |           here already is compared and skipped
    #        |---------- other URL, other md5sum, 206 with another validator, 200 with other bytes: FetchError; part
    #        |           and note stay, for the user to remove
    #        v
    #     whole --------- finish(): the MD5 is wrong: FetchError, as above
    #        |
    #        v            finish(): flush to the disk, remove the note, rename the part
    #     path
    #
    # A kill between the last two steps leaves a whole part without a note. The MD5 of the catalog then proves that the
    # part is whole; if the catalog has none, the user has to remove the part.

    def __init__(self, path: str, url: str, md5sum: str | None) -> None:
        self._path = "" if path == "-" else path
        self._part, self._note = f"{path}.part" if self._path else "standard output", f"{path}.part.json"
        self._remedy = f"; remove {self._part} to fetch the whole file again" if self._path else ""
        self._about = {"url": url, "md5sum": md5sum and md5sum.lower(), "validator": ""}
        self.size, self.is_whole = 0, False
        self._digest = hashlib.md5(usedforsecurity=False)
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> _Arrival:
        if not self._path:
            self._file = sys.stdout.buffer
            return self
        if os.path.exists(self._path) and not os.path.isfile(self._path):
            raise FetchError(f"{self._path} is not a regular file; name one with -O, or - for standard output")
        with contextlib.ExitStack() as opened, _naming(self._part):
            self._file = opened.enter_context(_open_alone(self._part))
            while piece := self._file.read(FILE_PIECE):
                self._digest.update(piece)
                self.size += len(piece)
            self.is_whole = self._digest.hexdigest() == self._about["md5sum"]
            if self.size and not self.is_whole:
                self._continue()
            self._cleanup = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._path and not (self.size or self.is_whole):  # nothing has arrived
            _remove(self._note)
            _remove(self._part)
        self._cleanup.close()

    def _continue(self) -> None:
        """Read the note about the part. Raises FetchError if the part belongs to another file, or has no note."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(self._note, flags), "rb") as file:
                about = json.loads(file.read(FILE_PIECE))
            url, md5sum, self._about["validator"] = str(about["url"]), about["md5sum"], str(about["validator"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise FetchError(f"{self._part} exists, but nothing says what it is a part of; remove it") from error
        if url != self._about["url"]:
            raise FetchError(f"{self._part} is a part of {url}; remove it, or give another name with -O")
        if md5sum != self._about["md5sum"]:
            raise self._changed()

    def _changed(self) -> FetchError:
        return FetchError(f"the file has changed since the fetch began{self._remedy}")

    def fields(self) -> dict[str, str]:
        """Return the header fields that ask for the missing bytes (RFC 9110, 13.1.5)."""
        # Without a validator, a range could be that of another file. So the whole file is asked for, and compared.
        validator = self._about["validator"]
        return {"Range": f"bytes={self.size}-", "If-Range": validator} if self.size and validator else {}

    def receive(self, client: Client, progress: Progress, answer: Any) -> None:
        """Add the bytes of an answer to the part. Raises FetchError, OSError, BadAnswer, or the error in the answer."""
        # 1. Is it the whole file, or the range that follows the bytes that are here? `size[1]` is the file's size.
        headers, asked = answer.headers, self.fields()
        length, place = headers.get("Content-Length", ""), headers.get("Content-Range", "")
        coding = headers.get("Content-Encoding", "identity")
        size = re.fullmatch("([0-9]{1,18})", length)
        if answer.status == 416 and asked:
            if place != f"bytes */{self.size}":
                raise self._changed()
            self.is_whole = True  # the file has as many bytes as the part: nothing is missing
            return
        if answer.status >= 400:
            client._read(answer)  # raises the error that the answer describes
        if answer.status == 206 and asked:
            size = re.fullmatch(rf"bytes {self.size}-[0-9]+/([0-9]{{1,18}})", place)
            known = asked["If-Range"]  # an ETag comes with each 206, a time need not (RFC 9110, 15.3.7)
            if (headers.get("ETag") if known[0] == '"' else headers.get("Last-Modified", known)) != known:
                raise self._changed()
        if coding != "identity" or not (answer.status == 200 or (answer.status == 206 and asked and size)):
            raise FetchError(f"the server answered {answer.status} {place} ({coding}), which is not the file")
        total = int(size[1]) if size else None
        if total is not None and total < self.size:
            raise self._changed()
        if not self.size:
            self._begin(_strong_validator(headers))
        # 2. Of a whole file, compare the first bytes with those that are here, by digest; `repeated` counts how many of
        #    these are still to come. Nothing is written before they have turned out to be the same.
        repeated, same = (0 if answer.status == 206 else self.size), hashlib.md5(usedforsecurity=False)
        for piece in _body_pieces(answer, sys.maxsize if total is None else total - self.size + repeated):
            if repeated:
                same.update(piece[:repeated])
                piece, repeated = piece[repeated:], max(0, repeated - len(piece))
                if not repeated and same.digest() != self._digest.digest():
                    raise self._changed()
            # 3. Write the rest. The file has no buffer, so a write may take only some of the bytes.
            with _naming(self._part):
                rest = memoryview(piece)
                while rest:
                    rest = rest[self._file.write(rest) :]
            self._digest.update(piece)
            self.size += len(piece)
            progress(self.size, total)
        # 4. Is anything missing?
        if repeated or total not in (None, self.size):
            raise ConnectionError("the answer is cut")
        self.is_whole = True

    def _begin(self, validator: str) -> None:
        """Write the note about the bytes that are about to arrive."""
        self._about["validator"] = validator
        if not self._path:
            return
        with _naming(self._note):
            _remove(self._note)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # the last: no link is followed
            with open(os.open(self._note, flags, 0o666), "w", encoding="ascii") as file:
                json.dump(self._about, file)

    def finish(self, replaces: bool) -> None:
        """Give the file its name, unless its MD5 differs from that of the catalog. Raises FetchError and OSError."""
        found, md5sum = self._digest.hexdigest(), self._about["md5sum"]
        if md5sum and found != md5sum:
            raise FetchError(f"the MD5 of what arrived is {found}, but the catalog says {md5sum}{self._remedy}")
        with _naming(self._path or self._part):
            self._file.flush()
            if self._path:
                os.fsync(self._file.fileno())
                if not replaces:
                    check_unused(self._path)
                # The note is removed first, while the lock on the part keeps other processes from writing a note of the
                # same name. After the rename, the note could be that of another fetch.
                _remove(self._note)
                os.replace(self._part, self._path)


def _strong_validator(headers: Any) -> str:
    """Return a strong ETag, or else a strong Last-Modified, or else "" (RFC 9110, 8.8)."""
    # A time is strong if it lies before Date: then the file cannot change again and keep the same time.
    tag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if tag.startswith('"'):
        return str(tag)
    written, date = _http_date(modified), _http_date(headers.get("Date"))
    return modified if written is not None and date is not None and written < date else ""


@contextlib.contextmanager
def _open_alone(path: str) -> Iterator[BinaryIO]:
    """Open a file, or create it, to read and write it under an exclusive lock. Raises FetchError and OSError."""
    try:
        import fcntl  # here: Windows has none
    except ImportError as error:
        raise FetchError("fetch locks the file that it writes, which needs the module fcntl") from error
    # Between open() and flock(), the process that held the lock may have finished the file and renamed it. Then the
    # lock is on the finished file, so the path is opened again.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with open(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FetchError(f"{path} is not a regular file")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FetchError(f"{path} is being fetched by another process") from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    yield file
                    return


def _fetch(options: Any) -> None:
    client = _client(options)
    path = options.output_file or unused_name(client.show(options.id))
    _refuse_store_file(path, os.environ.get("WMI_STORE") or _DEFAULT_STORE)  # a journal of it, too
    with _Progress("fetched", 1 << 20, " MiB") as progress:
        fetch_image(client, options.id, path, progress, replaces=bool(options.output_file))
    if path != "-":
        _write(path + "\n")


# ---- whole stores ----

MAX_LINE = 1 << 20  # bytes of a line that `load` accepts; `dump` writes shorter ones, see MAX_TEXT


def _read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file, but only the first MAX_LINE + 1 bytes of a longer one. Raises Error."""
    # A file without newlines must not fill the memory.
    try:
        while line := (piece := file.readline(MAX_LINE + 1)):
            while len(piece) > MAX_LINE and piece[-1:] != b"\n":
                piece = file.readline(MAX_LINE + 1)
            yield line
    except OSError as error:
        # An Error, because this runs inside add_all(): an OSError would look like a failure of the store.
        raise Error(f"cannot read the lines: {error.strerror}") from error


def _parse_line(line: bytes) -> Record:
    if len(line) > MAX_LINE and line[-1:] != b"\n":
        raise InvalidParameter(f"longer than {MAX_LINE:,} bytes")
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidParameter(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidParameter("not a JSON object")
    return image_record(fields)


def _load(options: Any) -> None:
    path, standard = options.file, contextlib.nullcontext(sys.stdin.buffer)
    _refuse_store_file("/dev/stdin" if path == "-" else path, options.store)
    number = loaded = refused = 0

    def lines() -> Iterator[bytes]:
        nonlocal number
        for number, line in enumerate(_read_lines(file), 1):
            if line.strip():
                yield line

    with standard if path == "-" else open(path, "rb") as file, open_storage(options.store) as storage:
        # All or nothing: the lines are one batch. With --keep-going each line is a batch, so a bad one undoes no other.
        batches: Iterable[Iterator[Record]] = [_progressing("loaded", map(_parse_line, lines()))]
        if options.keep_going:
            batches = (map(_parse_line, [line]) for line in lines())
        for batch in batches:
            try:
                with StorageErrors():
                    loaded += storage.add_all(batch)
            except (InvalidParameter, DuplicateUUID) as error:
                if not options.keep_going:
                    raise type(error)(f"line {number}: {error}") from error
                print(f"wmi: line {number}: {_visible(str(error))}", file=sys.stderr)
                refused += 1
    if refused:
        raise Error(f"loaded {loaded}, refused {refused}")
    print(f"wmi: loaded {loaded}, refused 0", file=sys.stderr)


def _dump(options: Any) -> None:
    path, standard = options.file, contextlib.nullcontext(sys.stdout)
    _refuse_store_file("/dev/stdout" if path == "-" else path, options.store)
    with _open_existing(options.store) as storage, standard if path == "-" else _replacing(path) as out:
        for record in _walk(storage, "dumped", oldest_first=True, frozen=True):
            _write(json.dumps(record, ensure_ascii=False) + "\n", out)


def _walk(storage: Storage, what: str, **order: Any) -> Iterator[Record]:
    """Yield all records, tombstones too, and show the progress on a terminal."""
    with StorageErrors():
        yield from _progressing(what, storage.walk(**order), _count(storage))


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[TextIO]:
    """Open a new file that replaces path at the end; if the body raises, path stays as it was.

    A path that is a pipe or a device is written to directly. Raises OSError that names path.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with _naming(path), open(path, "w", encoding="utf-8") as out:
            yield out
        return
    target = os.path.realpath(path)  # the file that a symbolic link leads to is replaced, not the link
    temporary = f"{target}.{os.urandom(8).hex()}"
    with _naming(path), contextlib.ExitStack() as cleanup:
        cleanup.callback(_remove, temporary)  # after the rename there is none
        with open(temporary, "x", encoding="utf-8", newline="\n") as out:
            if os.path.exists(target):
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
            yield out
            # Sync it before the rename: otherwise a power failure could leave an empty file in place of the old one.
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)


def _copy(options: Any) -> None:
    with _open_existing(options.source) as source, open_storage(options.target) as target, StorageErrors():
        if _count(target):
            raise InvalidParameter(f"{options.target} is not empty; nothing was copied")
        copied = target.add_all(_walk(source, "copied", oldest_first=True, frozen=True))
    print(f"wmi: copied {copied}", file=sys.stderr)


def _check(options: Any) -> None:
    store, faults = options.url or options.store, 0
    with _open_existing(store) as storage, StorageErrors():
        for faults, fault in enumerate(itertools.chain(storage.check(options.repair), _wrong_records(storage)), 1):
            _write(_visible(fault) + "\n")
    if faults:
        raise Error(f"{store}: {faults} faults")
    print(f"wmi: {store}: no faults", file=sys.stderr)


def _wrong_records(storage: Storage) -> Iterator[str]:
    for record in _walk(storage, "checked"):
        try:
            if image_record(record) != record:
                yield f"{record['id']}: a field is not in the form in which stores keep it"
        except InvalidParameter as error:
            yield f"{record.get('id')}: {error}"


# ---- options and subcommands ----

__all__ += ["Tokens", "tls_context"]
_OPTIONS["options"].update({
    "output_file": ("-O", "write to FILE, - for stdout (default: the name in the source)", {"metavar": "FILE"}),
    "keep_going": ("", "report bad lines and load the others", _SWITCH),
    "repair": ("", "rebuild what can be derived from the images", _SWITCH),
    "files": ("", "serve the image files below this directory", {"metavar": "DIR"}),
    "tokens": ("", "file of tokens: `serve` checks them, `token` adds one", {"metavar": "FILE"}),
})
_OPTIONS["where to listen"].update({
    "tls_cert": ("", "serve HTTPS with this certificate chain (PEM)", {"metavar": "FILE"}),
    "tls_key": ("", "key of the certificate (default: in the same file)", {"metavar": "FILE"}),
})
_COMMANDS += [
    ("fetch", _fetch, f"ID {_PLACES.replace('store ', '')} output_file",
     "download the file of an image, resume if interrupted, check its MD5",
     "wmi-lucid0 --url http://127.0.0.1:9001 --account a-guest1"),
    ("token", _token, "ACCOUNT tokens",
     "make a token for an account and print it; it is not shown again", "a-shpoolxx --tokens tokens"),
    ("load", _load, "[FILE] store keep_going", "load images from JSON lines, all or nothing", "images.jsonl"),
    ("dump", _dump, "[FILE] store", "write all images as JSON lines", "images.jsonl"),
    ("copy", _copy, "SOURCE TARGET", "copy a store into an empty one that is not in use", "json:a sqlite:b"),
    ("check", _check, "[URL] store repair", "read a whole store and print its faults", "sqlite:images.db --repair"),
]


if __name__ == "__main__":
    sys.exit(main())
