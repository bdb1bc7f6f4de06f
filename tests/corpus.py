"""Score how strictly an HTTP/1.1 server reads requests.

The table below holds raw requests, each with the answers it must get and the section of the
RFC that says so. The tests run it against wmi.py; as a program it scores any server:

    python tests/corpus.py --port 8080 --path /index.html

Every case is played in four modes: sent whole, in pieces of one byte, after a good request on
the same connection, and pipelined between two good requests.

Without --strict only what keeps a connection safe is scored: a bad request is refused with an
error status and the connection closed, a good one is answered and so is the next one after it.
Where the RFC leaves a choice either is right. With --strict the choices are ours, to the byte.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import select
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

MODES = ("whole", "bytes", "after", "pipelined")
REFUSALS = frozenset({400, 408, 411, 413, 414, 417, 421, 431, 501, 505})  # the connection ends
HOST = b"images.example"  # --host-header replaces it
PATH = b"/api/images"  # --path replaces it
IMAGE = b"/api/12.03/images/wmi-corpus"  # takes a form by PUT; --path replaces it
ACCOUNT = b"X-VDC-ACCOUNT-UUID: a-shpoolxx"

LINE_LIMIT = 8192  # bytes of a request line and of one header line, without their CRLF
HEAD_LIMIT = 32768  # bytes from the method to the empty line, all CRLFs counted
FIELD_LIMIT = 64  # header lines
BODY_LIMIT = 65536  # bytes of a body, decoded


class Case(NamedTuple):
    """One raw text and what a server owes for it.

    `answers` are the statuses in order, one for each request in `raw`. `closes` means that the
    connection ends after the last of them and that nothing more is served. `free` says what
    another server may do instead and still be safe: "" nothing, "status" answer with another
    status, "any" refuse what we accept or accept what we refuse, "skip" anything at all, for
    a case that is about our own limits.
    """

    name: str
    raw: bytes
    answers: tuple[int, ...]
    closes: bool
    rfc: str
    free: str = ""
    code: str = ""  # the code in our JSON error
    heads: tuple[int, ...] = ()  # which answers are to HEAD and have no body
    pause: bool = False  # the client waits for 100 Continue before the body


CASES: list[Case] = []


def add(rfc: str, answers: int | tuple[int, ...], table: dict[str, bytes], **rest: Any) -> None:
    """Add cases that share their answers; they close if the last is a refusal, unless told."""
    if isinstance(answers, int):
        answers = (answers,)
    rest.setdefault("closes", answers[-1] in REFUSALS)
    CASES.extend(Case(name, raw, answers, rfc=rfc, **rest) for name, raw in table.items())


def request(
    *fields: bytes,
    line: bytes = b"GET /api/images HTTP/1.1",
    host: bytes | None = b"Host: " + HOST,
    body: bytes = b"",
) -> bytes:
    """Return a request with these header lines after Host and the account."""
    first = [line] if host is None else [line, host]
    return b"\r\n".join([*first, ACCOUNT, *fields, b"", b""]) + body


def target(text: bytes, method: bytes = b"GET") -> bytes:
    """Return a request for this target."""
    return request(line=method + b" " + text + b" HTTP/1.1")


def version(text: bytes, *fields: bytes, **rest: Any) -> bytes:
    """Return a request that ends its first line like this."""
    return request(*fields, line=b"GET /api/images " + text, **rest)


def put(*fields: bytes, body: bytes = b"", version: bytes = b"HTTP/1.1") -> bytes:
    """Return a PUT of a form with these header lines and this body."""
    form = b"Content-Type: application/x-www-form-urlencoded"
    return request(form, *fields, line=b"PUT " + IMAGE + b" " + version, body=body)


def chunked(body: bytes, *fields: bytes) -> bytes:
    """Return a PUT with a chunked body, given as it travels."""
    return put(b"Transfer-Encoding: chunked", *fields, body=body)


def sized(body: bytes, *fields: bytes) -> bytes:
    """Return a PUT with this body and its length."""
    return put(*fields, b"Content-Length: %d" % len(body), body=body)


FORM = b"display_name=x"
SMUGGLED = b"GET /api/images/wmi-smuggled HTTP/1.1\r\nHost: " + HOST + b"\r\n\r\n"

##########################################################################################
# Good requests
##########################################################################################

add("9112 3", 200, {"get": request()})
add("9110 15.5.5", 404, {"get-unknown-image": target(PATH + b"/wmi-nope")}, code="100")
add("9110 15.5.5", 404, {"get-unknown-path": target(b"/nowhere/at/all")}, code="404")
add(
    "9110 15.5.1",
    400,
    {"get-without-account": request().replace(ACCOUNT + b"\r\n", b"")},
    closes=False,
    free="any",
    code="103",
)
add("9110 9.3.2", 200, {"head": target(PATH, b"HEAD")}, heads=(0,))
add("9110 9.3.2", 404, {"head-unknown-image": target(PATH + b"/wmi-nope", b"HEAD")}, heads=(0,))
add("9110 9.3.7", 204, {"options": target(PATH, b"OPTIONS")})
add("9112 6.2", 200, {"put": sized(FORM), "put-length-0": sized(b"")})
add("9112 6.3", 200, {"put-no-length": put()}, free="any")
add(
    "9110 9.1",
    405,
    {
        "method-post": target(PATH, b"POST"),
        "method-trace": target(PATH, b"TRACE"),
        "method-lower-case": target(PATH, b"get"),
        "method-unknown": target(PATH, b"FROBNICATE"),
        "method-dashed": target(PATH, b"M-SEARCH"),
        "method-one-letter": target(PATH, b"G"),
        "method-every-token-character": target(PATH, b"X!#$%&'*+-.^_`|~9"),
    },
    free="any",
    code="405",
)
add(
    "9110 5.5",
    200,
    {
        "field-no-space": request(b"X-Note:x"),
        "field-empty": request(b"X-Note:"),
        "field-only-spaces": request(b"X-Note: \t "),
        "field-tabs-around": request(b"X-Note:\t x \t"),
        "field-tab-inside": request(b"X-Note: a\tb"),
        "field-colons": request(b"X-Note: a:b: c"),
        "field-latin-1": request(b"X-Note: caf\xe9"),
        "field-utf-8": request("X-Note: café".encode()),
        "field-name-every-token-character": request(b"X!#$%&'*+-.^_`|~9: x"),
        "field-upper-case": request(b"CONTENT-LENGTH: 5", body=b"hello"),
        "field-lower-case": request(b"content-length: 5", body=b"hello"),
        "field-te": request(b"TE: trailers"),
        "field-proxy-connection": request(b"Proxy-Connection: close"),
        # Account headers may come underscored; framing must never be read that way.
        "field-underscored-account": request().replace(ACCOUNT, b"X_VDC_ACCOUNT_UUID: a-shpoolxx"),
        "field-underscored-length": request(b"Content_Length: 5"),
        "field-underscored-length-of-put": sized(FORM, b"Content_Length: 5"),
        "field-underscored-coding": request(b"Transfer_Encoding: chunked"),
        "field-lookalike-length": request(b"Content-Length-X: 5", b"X-Content-Length: 5"),
    },
)
add(
    "9110 7.8",
    200,
    {
        "upgrade-h2c": request(
            b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"
        ),
        "upgrade-websocket": request(b"Connection: Upgrade", b"Upgrade: websocket"),
    },
)

##########################################################################################
# Request lines
##########################################################################################

add(
    "9112 3",
    400,
    {
        "line-no-version": request(line=b"GET /api/images"),
        "line-method-only": request(line=b"GET"),
        "line-method-and-space": request(line=b"GET "),
        "line-no-target": request(line=b"GET HTTP/1.1"),
        "line-empty-target": request(line=b"GET  HTTP/1.1"),
        "line-four-words": request(line=b"GET /api/images HTTP/1.1 HTTP/1.1"),
    },
)
add(
    "9112 3",  # which lets a server split the line at any white space
    400,
    {
        "line-two-spaces-before-target": request(line=b"GET  /api/images HTTP/1.1"),
        "line-two-spaces-before-version": request(line=b"GET /api/images  HTTP/1.1"),
        "line-space-before": request(line=b" GET /api/images HTTP/1.1"),
        "line-space-after": request(line=b"GET /api/images HTTP/1.1 "),
        "line-tab-before": request(line=b"\tGET /api/images HTTP/1.1"),
        "line-tab-after": request(line=b"GET /api/images HTTP/1.1\t"),
        "line-tab-before-target": request(line=b"GET\t/api/images HTTP/1.1"),
        "line-tab-before-version": request(line=b"GET /api/images\tHTTP/1.1"),
        "line-form-feed": request(line=b"GET\x0c/api/images HTTP/1.1"),
    },
    free="any",
)
add(
    "9112 2.3",
    400,
    {
        "version-lower-case": version(b"http/1.1"),
        "version-mixed-case": version(b"Http/1.1"),
        "version-two-digit-minor": version(b"HTTP/1.10"),
        "version-two-digit-major": version(b"HTTP/01.1"),
        "version-no-dot": version(b"HTTP/11"),
        "version-no-minor": version(b"HTTP/1"),
        "version-empty-minor": version(b"HTTP/1."),
        "version-empty-major": version(b"HTTP/.1"),
        "version-empty": version(b"HTTP/"),
        "version-comma": version(b"HTTP/1,1"),
        "version-letter-after": version(b"HTTP/1.1x"),
        "version-space-inside": version(b"HTTP/ 1.1"),
        "version-plus": version(b"HTTP/+1.1"),
        "version-minus": version(b"HTTP/1.-1"),
        "version-three-numbers": version(b"HTTP/1.1.1"),
        "version-fullwidth-digit": version("HTTP/\uff11.1".encode()),
        "version-superscript-digit": version(b"HTTP/1.\xb9"),
        "version-nul-after": version(b"HTTP/1.1\x00"),
        "version-https": version(b"HTTPS/1.1"),
        "version-other-protocol": version(b"ICY/1.1"),
    },
)
add("9112 2.3", 400, {"version-0.9": version(b"HTTP/0.9")}, free="status")
add(
    "9110 15.6.6",
    505,
    {
        "version-2.0": version(b"HTTP/2.0"),
        "version-3.0": version(b"HTTP/3.0"),
        "version-9.9": version(b"HTTP/9.9"),
        "preface-http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    },
    free="status",
)
add("9110 2.5", 200, {"version-1.2": version(b"HTTP/1.2"), "version-1.9": version(b"HTTP/1.9")})
add("9110 2.5", 400, {"version-1.2-no-host": version(b"HTTP/1.2", host=None)})
add(
    "9110 9.1",
    400,
    {
        "method-parenthesis": target(PATH, b"GET("),
        "method-less-than": target(PATH, b"G<T"),
        "method-slash": target(PATH, b"GET/"),
        "method-colon": target(PATH, b"GET:"),
        "method-quoted": target(PATH, b'"GET"'),
        "method-comma": target(PATH, b"GET,"),
        "method-nul": target(PATH, b"GET\x00"),
        "method-del": target(PATH, b"GET\x7f"),
        "method-latin-1": target(PATH, b"G\xc9T"),
        "method-utf-8": target(PATH, "GÉT".encode()),
        "method-byte-order-mark": target(PATH, b"\xef\xbb\xbfGET"),
    },
)

HELLO = bytes.fromhex("160301003a010000360303") + bytes(range(128, 160))
HELLO += bytes.fromhex("00000213010100000b00170000002b0003020304")  # without CR and LF
add(
    "9112 2.2",
    400,
    {
        "http-0.9": b"GET /api/images\r\n",
        "http-0.9-empty-line": b"GET /api/images\r\n\r\n",
        "tls-hello-line": HELLO + b"\r\n\r\n",
        "binary": bytes(range(256)) * 2,
        "binary-zeros": bytes(64) + b"\r\n\r\n",
        "binary-high": b"\xff" * 64 + b"\r\n\r\n",
        "smtp": b"EHLO mail.example\r\nMAIL FROM:<a@b>\r\n\r\n",
        "ssh": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "json-rpc": b'{"jsonrpc": "2.0", "method": "x"}\r\n\r\n',
        "answer-as-request": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "empty-line-cr-before": b"\r" + request(),
        "empty-line-cr-crlf-before": b"\r\r\n" + request(),
        "empty-line-space-before": b" \r\n" + request(),
    },
)
add("9112 2.2", 400, {"tls-hello": HELLO}, free="skip")  # others may wait for the end of the line
add("9112 2.2", 200, {"empty-line-before": b"\r\n" + request()})
add("9112 2.2", 200, {"empty-lines-before": b"\r\n\r\n" + request()}, free="any")
add(
    "9112 2.2",
    400,
    {
        "empty-lines-endless": b"\r\n" * 64 + request(),
        "empty-line-lf-before": b"\n" + request(),
    },
    free="any",
)

##########################################################################################
# Targets
##########################################################################################

SITE = b"http://" + HOST
add(
    "9112 3.2.1",
    200,
    {
        "target-query": target(PATH + b"?start=0&limit=1"),
        "target-empty-query": target(PATH + b"?"),
        "target-query-url": target(PATH + b"?x=http://a/b?c"),
    },
)
add("9112 3.2.1", 404, {"target-empty-segments": target(b"//api/images")})
add(
    "3986 3.4",
    400,
    {"target-brackets": target(PATH + b"?start[]=1")},
    closes=False,
    free="any",
    code="143",
)
add(
    "9112 3.2.2",
    200,
    {
        "target-absolute": target(SITE + PATH),
        "target-absolute-port": target(SITE + b":8080" + PATH),
        "target-absolute-query": target(SITE + PATH + b"?limit=1"),
        "target-absolute-ipv6": target(b"http://[::1]:80" + PATH),
        "target-absolute-upper-case": target(b"HTTP://" + HOST + PATH),
    },
)
add(
    "9112 3.2.2",
    200,
    {"target-absolute-other-host": target(SITE + PATH).replace(b": " + HOST, b": other.example")},
    free="any",
)
add("9112 3.2.2", 200, {"target-absolute-no-path": target(SITE)})  # the page
add("9112 3.2.4", 204, {"target-asterisk-options": target(b"*", b"OPTIONS")})
add(
    "9112 3.2",
    400,
    {
        "target-relative": target(b"api/images"),
        "target-only-query": target(b"?start=0"),
        "target-dot": target(b"."),
        "target-backslash": target(b"\\api\\images"),
        "target-asterisk-and-more": target(b"*/api/images"),
        "target-asterisk-get": target(b"*"),
        "target-asterisk-put": target(b"*", b"PUT"),
        "target-authority": target(b"images.example:80"),
        "target-authority-connect": target(b"images.example:443", b"CONNECT"),
        "target-absolute-no-host-line": request(
            line=b"GET " + SITE + PATH + b" HTTP/1.1", host=None
        ),
        "target-absolute-no-host": target(b"http:///api/images"),
        "target-absolute-one-slash": target(b"http:/api/images"),
        "target-absolute-port-only": target(b"http://:80/api/images"),
        "target-absolute-port-letters": target(SITE + b":x" + PATH),
        "target-absolute-two-ports": target(SITE + b":80:80" + PATH),
        "target-absolute-broken-ipv6": target(b"http://[::1/api/images"),
        "target-ftp": target(b"ftp://images.example/api/images"),
        "target-file": target(b"file:///api/images"),
        "target-javascript": target(b"javascript:alert(1)"),
    },
)
add(
    "9112 3.2",
    400,
    {
        "target-https": target(b"https://images.example/api/images"),
        "target-absolute-user": target(b"http://u:p@images.example/api/images"),
    },
    free="any",
)
add(
    "3986 2",
    400,
    {
        "target-space": target(PATH + b"/a b"),
        "target-nul": target(PATH + b"\x00"),
        "target-control": target(PATH + b"/\x01"),
        "target-escape": target(PATH + b"/\x1b[2J"),
        "target-vertical-tab": target(b"/api\x0bimages"),
        "target-del": target(PATH + b"\x7f"),
        "target-latin-1": target(PATH + b"/caf\xe9"),
        "target-utf-8": target(PATH + "/café".encode()),
        "target-no-break-space": target(PATH + b"\xa0"),
        "target-next-line": target(PATH + b"\x85"),
        "target-fragment": target(PATH + b"#top"),
        "target-fragment-in-query": target(PATH + b"?x=1#top"),
        "target-fragment-only": target(b"#"),
        "target-fragment-absolute": target(SITE + PATH + b"#top"),
        "target-control-absolute": target(SITE + b"/\x01"),
    },
)

##########################################################################################
# Header lines
##########################################################################################

add(
    "9112 5.1",
    400,
    {
        "header-no-colon": request(b"nonsense"),
        "header-no-colon-spaces": request(b"some nonsense here"),
        "header-space-before-colon": request(b"X-Note : x"),
        "header-tab-before-colon": request(b"X-Note\t: x"),
        "header-space-before-colon-length": request(b"Content-Length : 0"),
        "header-space-before-colon-coding": chunked(b"").replace(b"g: c", b"g : c"),
        "header-empty-name": request(b": x"),
        "header-only-colon": request(b":"),
        "header-space-in-name": request(b"X Note: x"),
        "header-tab-in-name": request(b"X\tNote: x"),
        "header-parenthesis-in-name": request(b"X(Note): x"),
        "header-bracket-in-name": request(b"X[0]: x"),
        "header-slash-in-name": request(b"X/Note: x"),
        "header-at-in-name": request(b"X@Note: x"),
        "header-equals-in-name": request(b"X=Note: x"),
        "header-quoted-name": request(b'"X-Note": x'),
        "header-comma-in-name": request(b"X,Note: x"),
        "header-nul-in-name": request(b"X\x00Note: x"),
        "header-nul-before-name": request(b"\x00X-Note: x"),
        "header-control-in-name": request(b"X\x01Note: x"),
        "header-del-in-name": request(b"X\x7fNote: x"),
        "header-latin-1-in-name": request(b"Caf\xe9: x"),
        "header-utf-8-in-name": request("Café: x".encode()),
        "header-kelvin-in-name": request("X-\u212aeep: x".encode()),
        "header-byte-order-mark": request(b"\xef\xbb\xbfX-Note: x"),
    },
)
add(
    "9110 5.5",  # which lets a server put spaces for CR and NUL and keep harmless controls
    400,
    {
        "value-nul": request(b"X-Note: a\x00b"),
        "value-nul-last": request(b"X-Note: a\x00"),
        "value-cr": request(b"X-Note: a\rb"),
        "value-cr-last": request(b"X-Note: a\r"),
        "value-control": request(b"X-Note: a\x01b"),
        "value-bell": request(b"X-Note: a\x07b"),
        "value-backspace": request(b"X-Note: a\x08b"),
        "value-vertical-tab": request(b"X-Note: a\x0bb"),
        "value-form-feed": request(b"X-Note: \x0ca"),
        "value-escape": request(b"X-Note: \x1b[2J"),
        "value-unit-separator": request(b"X-Note: a\x1fb"),
        "value-del": request(b"X-Note: a\x7fb"),
        "value-control-in-account": request().replace(ACCOUNT, ACCOUNT + b"\x01"),
        "value-control-in-user-agent": request(b"User-Agent: \x1b]0;title\x07"),
    },
    free="any",
)
add(
    "9112 5.2",  # which lets a server join folded lines with spaces
    400,
    {
        "fold-space": request(b"X-Note: a", b" b"),
        "fold-tab": request(b"X-Note: a", b"\tb"),
        "fold-spaces-only": request(b"X-Note: a", b"   "),
        "fold-length": request(b"X-Note: a", b" Content-Length: 5"),
        "fold-name-alone": request(b"X-Note:", b" a"),
        "fold-twice": request(b"X-Note: a", b" b", b" c"),
        "fold-coding": put(b"Transfer-Encoding:", b" chunked", body=b"0\r\n\r\n"),
        "fold-first-line": request(host=b" X-Note: a\r\nHost: " + HOST),
        "fold-first-line-tab": request(host=b"\tX-Note: a\r\nHost: " + HOST),
    },
    free="any",
)
add("9112 5.2", 400, {"fold-before-colon": request(b"X-Note", b" : a")})
add(
    "9112 2.2",  # which lets a server take LF alone as the end of a line
    400,
    {
        "lf-request-line": request().replace(b"\r\n", b"\n", 1),
        "lf-first-header": request().replace(HOST + b"\r\n", HOST + b"\n"),
        "lf-last-header": request().replace(b"xx\r\n\r\n", b"xx\n\r\n"),
        "lf-empty-line": request().replace(b"\r\n\r\n", b"\r\n\n"),
        "lf-two-at-the-end": request().replace(b"\r\n\r\n", b"\n\n"),
        "lf-everywhere": request().replace(b"\r\n", b"\n"),
        "lf-in-value": request(b"X-Note: a\nX-More: b"),
        "lf-hides-length": request(b"X-Note: a\nContent-Length: 5", body=b"hello"),
    },
    free="any",
)
add(
    "9112 2.2",  # which lets a server put a space for CR alone
    400,
    {
        "cr-first-header": request().replace(HOST + b"\r\n", HOST + b"\r"),
        "cr-last-header": request().replace(b"xx\r\n\r\n", b"xx\r\r\n\r\n"),
        "cr-hides-length": request(b"X-Note: a\rContent-Length: 5"),
        "cr-hides-coding": request(b"X-Note: a\rTransfer-Encoding: chunked"),
    },
    free="any",
)
add(
    "9112 2.2",
    400,
    {
        "lf-before-colon": request(b"X-Note\n: a"),
        "lf-cr": request(b"X-Note: a\n\rX-More: b"),
        "cr-request-line": request().replace(b"\r\n", b"\r", 1),
        "cr-empty-line": request().replace(b"\r\n\r\n", b"\r\n\r\r\n\r\n"),
        "cr-everywhere": request().replace(b"\r\n", b"\r") + b"\r\n\r\n",
        "cr-in-target": target(b"/api/ima\rges"),
        "cr-in-method": target(PATH, b"G\rET"),
        "cr-in-version": version(b"HTTP/1.\r1"),
        "cr-in-name": request(b"X-\rNote: a"),
    },
)

##########################################################################################
# Host
##########################################################################################

add(
    "9112 3.2",
    400,
    {
        "host-missing": request(host=None),
        "host-twice": request(b"Host: " + HOST),
        "host-two": request(b"Host: other.example"),
        "host-two-1.0": version(b"HTTP/1.0", b"Host: other.example"),
        "host-bad-1.0": version(b"HTTP/1.0", host=b"Host: a b"),
        "host-space": request(host=b"Host: a b"),
        "host-tab": request(host=b"Host: a\tb"),
        "host-slash": request(host=b"Host: a/b"),
        "host-url": request(host=b"Host: http://images.example"),
        "host-user": request(host=b"Host: user@images.example"),
        "host-query": request(host=b"Host: a?b"),
        "host-fragment": request(host=b"Host: a#b"),
        "host-backslash": request(host=b"Host: a\\b"),
        "host-list": request(host=b"Host: a, b"),
        "host-angle": request(host=b"Host: <script>"),
        "host-quote": request(host=b'Host: a"b'),
        "host-latin-1": request(host=b"Host: caf\xe9.example"),
        "host-utf-8": request(host="Host: café.example".encode()),
        "host-percent": request(host=b"Host: a%zzb"),
        "host-port-letters": request(host=b"Host: a:http"),
        "host-port-plus": request(host=b"Host: a:+80"),
        "host-port-minus": request(host=b"Host: a:-1"),
        "host-port-fullwidth": request(host="Host: a:\uff18\uff10".encode()),
        "host-port-space": request(host=b"Host: a: 80"),
        "host-two-ports": request(host=b"Host: a:80:80"),
        "host-ipv6-bare": request(host=b"Host: ::1"),
        "host-ipv6-open": request(host=b"Host: [::1"),
        "host-ipv6-close": request(host=b"Host: ::1]"),
        "host-ipv6-letters": request(host=b"Host: [::g]"),
        "host-ipv6-empty": request(host=b"Host: []"),
        "host-ipv6-tail": request(host=b"Host: [::1]a"),
        "host-name-in-brackets": request(host=b"Host: [images.example]"),
    },
)
add(
    "9110 7.2",  # by the letter of RFC 3986 both are names
    400,
    {
        "host-empty": request(host=b"Host:"),
        "host-comma": request(host=b"Host: a,b"),
    },
    free="any",
)
add(
    "9110 7.2",
    200,
    {
        "host-port": request(host=b"Host: images.example:8080"),
        "host-ipv4": request(host=b"Host: 127.0.0.1"),
        "host-ipv4-port": request(host=b"Host: 127.0.0.1:80"),
        "host-ipv6": request(host=b"Host: [::1]"),
        "host-ipv6-port": request(host=b"Host: [2001:db8::1]:8080"),
        "host-upper-case": request(host=b"Host: IMAGES.EXAMPLE"),
        "host-one-word": request(host=b"Host: localhost"),
        "host-underscore": request(host=b"Host: a_b"),
        "host-trailing-dot": request(host=b"Host: images.example."),
        "host-spaces-around": request(host=b"Host: \timages.example \t"),
        "host-no-space": request(host=b"Host:images.example"),
        "host-lower-case-name": request(host=b"host: " + HOST),
        "host-last": request(b"Host: " + HOST, host=None),
    },
)
add("9112 3.2", 200, {"host-missing-1.0": version(b"HTTP/1.0", host=None)}, closes=True)

##########################################################################################
# Content-Length
##########################################################################################


def length(value: bytes, body: bytes = b"hello") -> bytes:
    """Return a PUT with this Content-Length."""
    return put(b"Content-Length: " + value, body=body)


add(
    "9112 6.3",
    400,
    {
        "length-empty": length(b""),
        "length-blank": length(b" \t"),
        "length-plus": length(b"+5"),
        "length-minus": length(b"-5"),
        "length-minus-zero": length(b"-0"),
        "length-underscore": length(b"0_5"),
        "length-hex": length(b"0x5"),
        "length-hex-letter": length(b"a"),
        "length-octal": length(b"0o5"),
        "length-exponent": length(b"5e0"),
        "length-decimal": length(b"5.0"),
        "length-suffix": length(b"5b"),
        "length-semicolon": length(b"5;"),
        "length-quoted": length(b'"5"'),
        "length-space-inside": length(b"0 5"),
        "length-tab-inside": length(b"0\t5"),
        "length-fullwidth": length("\uff15".encode()),
        "length-arabic": length("\u0665".encode()),
        "length-superscript": length(b"\xb2"),
        "length-list-different": length(b"5, 6"),
        "length-list-first-empty": length(b",5"),
        "length-list-last-empty": length(b"5,"),
        "length-vertical-tab": length(b"\x0b5"),
        "length-form-feed": length(b"5\x0c"),
        "length-nul": length(b"5\x00"),
        "length-word": length(b"five"),
        "length-two-different": length(b"5\r\nContent-Length: 6"),
        "length-two-different-case": length(b"5\r\ncontent-length: 6"),
        "length-two-one-empty": length(b"5\r\nContent-Length:"),
        "length-two-apart": length(b"0\r\nX-Note: a\r\nContent-Length: 70", SMUGGLED),
        "length-bad-on-get": request(b"Content-Length: +5", body=b"hello"),
        "length-bad-on-unknown-path": target(b"/nowhere").replace(ACCOUNT, b"Content-Length: 5_0"),
        "length-bad-on-1.0": version(b"HTTP/1.0", b"Content-Length: +5"),
    },
)
add(
    "9112 6.3",  # where others may wait for as many bytes
    400,
    {
        "length-19-digits": length(b"9" * 19),
        "length-40-digits": length(b"9" * 40),
        "length-2-to-64-and-5": length(b"18446744073709551621"),
    },
    free="skip",
)
add("9112 6.3", 400, {"length-bad-on-post": length(b"0x5").replace(b"PUT", b"POST")})
add("9112 6.3", 400, {"length-bad-on-head": length(b"x").replace(b"PUT", b"HEAD")}, heads=(0,))
add(
    "9112 6.3",  # which lets a server take equal lengths for one
    400,
    {
        "length-list-equal": length(b"5, 5"),
        "length-two-spelled": length(b"5\r\nContent-Length: 05"),
        "length-19-digits-zeros": length(b"5".zfill(19)),
    },
    free="any",
)
add("9112 6.3", 200, {"length-two-equal": length(b"14\r\nContent-Length: 14", FORM)}, free="any")
add(
    "9112 6.2",
    200,
    {
        "length-spaces-around": length(b"\t14 \t", FORM),
        "length-leading-zeros": length(b"0014", FORM),
        "length-18-digits-zeros": length(b"14".zfill(18), FORM),
    },
)
add("9110 15.5.14", 413, {"length-18-digits": length(b"9" * 18, b"")}, free="skip")

##########################################################################################
# Transfer-Encoding
##########################################################################################

LAST = b"0\r\n\r\n"


def coding(value: bytes, *fields: bytes, body: bytes = LAST) -> bytes:
    """Return a PUT with this Transfer-Encoding."""
    return put(b"Transfer-Encoding: " + value, *fields, body=body)


add(
    "9112 6.1",  # which lets a server answer, but then it must close
    400,
    {
        "coding-and-length": coding(b"chunked", b"Content-Length: 5"),
        "coding-and-length-before": put(
            b"Content-Length: 5", b"Transfer-Encoding: chunked", body=LAST
        ),
        "coding-and-length-0": coding(b"chunked", b"Content-Length: 0"),
        "coding-and-length-smuggle": coding(b"chunked", b"Content-Length: 5", body=LAST + SMUGGLED),
        "coding-and-length-on-get": request(
            b"Transfer-Encoding: chunked", b"Content-Length: 5", body=LAST
        ),
        "coding-unknown-and-length": coding(b"cow", b"Content-Length: 5"),
        "coding-1.0": put(b"Transfer-Encoding: chunked", body=LAST, version=b"HTTP/1.0"),
        "coding-1.0-keep-alive": put(
            b"Transfer-Encoding: chunked", b"Connection: keep-alive", body=LAST, version=b"HTTP/1.0"
        ),
        "coding-1.0-on-get": version(b"HTTP/1.0", b"Transfer-Encoding: chunked", body=LAST),
        "coding-1.0-identity": version(b"HTTP/1.0", b"Transfer-Encoding: identity"),
        "coding-vertical-tab": coding(b"\x0bchunked"),
        "coding-nul": coding(b"chunked\x00"),
    },
    free="status",
)
add(
    "9112 6.1",
    501,
    {
        "coding-gzip": coding(b"gzip"),
        "coding-identity": coding(b"identity"),
        "coding-unknown": coding(b"cow"),
        "coding-prefixed": coding(b"xchunked"),
        "coding-suffixed": coding(b"chunkedx"),
        "coding-shortened": coding(b"chunk"),
        "coding-gzip-chunked": coding(b"gzip, chunked"),
        "coding-chunked-gzip": coding(b"chunked, gzip"),
        "coding-chunked-identity": coding(b"chunked, identity"),
        "coding-two-lines-identity": coding(b"chunked", b"Transfer-Encoding: identity"),
        "coding-empty": coding(b""),
        "coding-comma": coding(b","),
        "coding-twice": coding(b"chunked, chunked"),
        "coding-two-lines": coding(b"chunked", b"Transfer-Encoding: chunked"),
        "coding-kelvin": coding("chun\u212aed".encode()),
        "coding-quoted": coding(b'"chunked"'),
        "coding-space-inside": coding(b"chu nked"),
        "coding-parameter": coding(b"chunked;q=1"),
        "coding-unknown-on-get": request(b"Transfer-Encoding: cow"),
    },
    free="status",
)
add(
    "9112 7",
    200,
    {
        "coding-lower-case-name": put(b"transfer-encoding: chunked", body=LAST),
        "coding-upper-case": coding(b"CHUNKED"),
        "coding-spaces-around": coding(b"\tchunked \t"),
    },
)
add("9112 7", 501, {"coding-list-empty-last": coding(b"chunked,")}, free="any")

##########################################################################################
# Chunked bodies
##########################################################################################

ONE = b"e\r\n" + FORM + b"\r\n"
add(
    "9112 7.1",
    200,
    {
        "chunked-empty": chunked(LAST),
        "chunked-one": chunked(ONE + LAST),
        "chunked-two": chunked(b"7\r\ndisplay\r\n7\r\n_name=x\r\n" + LAST),
        "chunked-single-bytes": chunked(b"".join(b"1\r\n%c\r\n" % c for c in FORM) + LAST),
        "chunked-upper-case": chunked(b"E\r\n" + FORM + b"\r\n" + LAST),
        "chunked-leading-zeros": chunked(b"00e\r\n" + FORM + b"\r\n" + LAST),
        "chunked-last-zeros": chunked(ONE + b"000\r\n\r\n"),
        "chunked-extension-name": chunked(b"e;a\r\n" + FORM + b"\r\n" + LAST),
        "chunked-extension-value": chunked(b"e;a=b;c=d\r\n" + FORM + b"\r\n" + LAST),
        "chunked-extension-quoted": chunked(b'e;a="b;c"\r\n' + FORM + b"\r\n" + LAST),
        "chunked-extension-last": chunked(ONE + b"0;a=b\r\n\r\n"),
        "chunked-trailer": chunked(ONE + b"0\r\nX-Sum: 1\r\n\r\n"),
        "chunked-trailers": chunked(ONE + b"0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n"),
        "chunked-trailer-framing": chunked(ONE + b"0\r\nContent-Length: 9\r\n\r\n"),
        "chunked-line-end-inside": chunked(b"10\r\n" + FORM + b"\r\n\r\n" + LAST),
        "chunked-end-inside": chunked(b"15\r\n" + FORM + b"\r\n" + LAST + b"\r\n" + LAST),
    },
)
add(
    "9112 7.1.1",
    200,
    {"chunked-extension-spaces": chunked(b"e ; a = b\r\n" + FORM + b"\r\n" + LAST)},
    free="any",
)
add(
    "9112 7.1",
    400,
    {
        "chunked-size-missing": chunked(b"\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-0x": chunked(b"0xe\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-plus": chunked(b"+e\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-minus": chunked(b"-e\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-minus-zero": chunked(ONE + b"-0\r\n\r\n"),
        "chunked-size-underscore": chunked(b"0_e\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-space-before": chunked(b" e\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-space-after": chunked(b"e \r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-tab-after": chunked(b"e\t\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-space-inside": chunked(b"0 e\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-not-hex": chunked(b"g\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-fullwidth": chunked("\uff11\r\nx\r\n".encode() + LAST),
        "chunked-size-nul": chunked(b"e\x00\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-decimal": chunked(b"e.0\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-comma": chunked(b"e,a\r\n" + FORM + b"\r\n" + LAST),
        "chunked-size-cr": chunked(b"e\r" + FORM + b"\r\n" + LAST),
        "chunked-size-cr-cr-lf": chunked(b"e\r\r\n" + FORM + b"\r\n" + LAST),
        "chunked-extension-cr": chunked(b"e;a\rb\r\n" + FORM + b"\r\n" + LAST),
        "chunked-extension-nul": chunked(b"e;a\x00\r\n" + FORM + b"\r\n" + LAST),
        "chunked-too-short": chunked(b"d\r\n" + FORM + b"\r\n" + LAST),
        "chunked-too-long": chunked(b"10\r\n" + FORM + b"\r\n" + LAST),
        "chunked-end-missing": chunked(b"e\r\n" + FORM + LAST),
        "chunked-end-cr": chunked(b"e\r\n" + FORM + b"\r" + LAST),
        "chunked-end-other": chunked(b"e\r\n" + FORM + b"xx" + LAST),
        "chunked-end-twice": chunked(b"e\r\n" + FORM + b"\r\n\r\n" + LAST),
        "chunked-last-cr": chunked(ONE + b"0\r\r\n\r\n"),
        "chunked-last-end-missing": chunked(ONE + b"0\r\n" + SMUGGLED),
        "chunked-trailer-no-colon": chunked(ONE + b"0\r\nnonsense\r\n\r\n"),
    },
)
add(
    "9112 7.1",  # LF alone may end these lines too, and trailers may be thrown away unread
    400,
    {
        "chunked-size-lf": chunked(b"e\n" + FORM + b"\r\n" + LAST),
        "chunked-extension-lf": chunked(b"e;a\nb\r\n" + FORM + b"\r\n" + LAST),
        "chunked-end-lf": chunked(b"e\r\n" + FORM + b"\n" + LAST),
        "chunked-last-lf": chunked(ONE + b"0\n\n\r\n\r\n"),
        "chunked-last-end-lf": chunked(ONE + b"0\r\n\n"),
        "chunked-trailer-space-before-colon": chunked(ONE + b"0\r\nX-Sum : 1\r\n\r\n"),
        "chunked-trailer-folded": chunked(ONE + b"0\r\nX-Sum: 1\r\n 2\r\n\r\n"),
        "chunked-trailer-lf": chunked(ONE + b"0\r\nX-Sum: 1\n\r\n\r\n"),
        "chunked-trailer-control": chunked(ONE + b"0\r\nX-Sum: \x01\r\n\r\n"),
    },
    free="any",
)

##########################################################################################
# Bodies that no handler asked for
##########################################################################################

GET_SIZED = request(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED)
GET_CHUNKED = request(
    b"Transfer-Encoding: chunked", body=b"%x\r\n%b\r\n%b" % (len(SMUGGLED), SMUGGLED, LAST)
)
add("9112 6.3", 200, {"body-on-get": GET_SIZED, "body-on-get-chunked": GET_CHUNKED})
add(
    "9112 6.3",
    404,
    {
        "body-on-unknown-path": GET_SIZED.replace(PATH, b"/nowhere", 1),
        "body-on-unknown-path-chunked": GET_CHUNKED.replace(PATH, b"/nowhere", 1),
    },
)
add(
    "9112 6.3",
    405,
    {
        "body-on-405": GET_SIZED.replace(b"GET", b"POST", 1),
        "body-on-405-chunked": GET_CHUNKED.replace(b"GET", b"POST", 1),
    },
    code="405",
)
add("9112 6.3", 204, {"body-on-options": GET_SIZED.replace(b"GET", b"OPTIONS", 1)})
add("9112 6.3", 200, {"body-on-head": GET_SIZED.replace(b"GET", b"HEAD", 1)}, heads=(0,))
add(
    "9112 6.3",
    400,
    {"body-without-account": GET_SIZED.replace(ACCOUNT + b"\r\n", b"")},
    closes=False,
    free="any",
    code="103",
)
add(
    "9112 7.1",
    400,
    {
        "body-on-get-chunked-bad": GET_CHUNKED.replace(b"\r\n\r\n", b"\r\n\r\n0x", 1),
        "body-on-405-chunked-bad": GET_CHUNKED.replace(b"\r\n\r\n", b"\r\n\r\n+", 1).replace(
            b"GET", b"POST", 1
        ),
    },
    free="status",
)
MANY = SMUGGLED * 2000
add(
    "9110 15.5.14",
    413,
    {
        "body-on-get-large": request(b"Content-Length: %d" % len(MANY), body=MANY),
        "body-on-405-large": request(
            b"Content-Length: %d" % len(MANY), line=b"POST /api/images HTTP/1.1", body=MANY
        ),
    },
    free="any",
)

##########################################################################################
# Expect
##########################################################################################

EXPECT = b"Expect: 100-continue"
add(
    "9110 10.1.1",
    200,
    {
        "expect": sized(FORM, EXPECT),
        "expect-upper-case": sized(FORM, b"EXPECT: 100-CONTINUE"),
        "expect-chunked": chunked(ONE + LAST, EXPECT),
    },
    pause=True,
)
add("9110 10.1.1", 200, {"expect-no-body": request(EXPECT)})
add(
    "9110 10.1.1",
    200,
    {"expect-1.0": sized(FORM, EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0")},
    closes=True,
)
add("9110 10.1.1", 417, {"expect-other": sized(FORM, b"Expect: cake")}, free="any")
add(
    "9110 10.1.1",
    400,
    {
        "expect-and-bad-length": length(b"+14", b"").replace(
            b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"
        ),
        "expect-and-bad-host": sized(FORM, EXPECT, b"Host: b"),
    },
)
add("9110 10.1.1", 413, {"expect-too-large": put(EXPECT, b"Content-Length: 999999")}, free="skip")

##########################################################################################
# Connection
##########################################################################################

add(
    "9112 9.6",
    200,
    {
        "connection-close": request(b"Connection: close"),
        "connection-close-case": request(b"connection: CLOSE"),
        "connection-keep-alive-close": request(b"Connection: keep-alive, close"),
        "connection-close-keep-alive": request(b"Connection: close, keep-alive"),
        "connection-close-no-space": request(b"Connection: x,close,y"),
        "connection-close-empty-elements": request(b"Connection: , ,\tclose ,"),
        "connection-close-two-lines": request(b"Connection: keep-alive", b"Connection: close"),
        "connection-1.0": version(b"HTTP/1.0"),
        "connection-1.0-close": version(b"HTTP/1.0", b"Connection: close"),
        "connection-1.0-both": version(b"HTTP/1.0", b"Connection: keep-alive, close"),
        "connection-1.0-other": version(b"HTTP/1.0", b"Connection: x-keep-alive"),
    },
    closes=True,
)
add(
    "9112 9.3",
    200,
    {
        "connection-keep-alive": request(b"Connection: keep-alive"),
        "connection-empty": request(b"Connection:"),
        "connection-other": request(b"Connection: closed, close-later"),
        "connection-1.0-keep-alive": version(b"HTTP/1.0", b"Connection: keep-alive"),
        "connection-1.0-keep-alive-case": version(b"HTTP/1.0", b"Connection: x, Keep-Alive"),
    },
)
add(
    "9112 9.6",
    404,
    {"connection-close-404": target(b"/nowhere").replace(ACCOUNT, b"Connection: close")},
    closes=True,
)
add(
    "9112 9.6",
    200,
    {
        "connection-close-head": target(PATH, b"HEAD").replace(
            ACCOUNT, ACCOUNT + b"\r\nConnection: close"
        )
    },
    closes=True,
    heads=(0,),
)

##########################################################################################
# Several requests at once
##########################################################################################

NOPE = target(PATH + b"/wmi-nope")
add(
    "9112 9.3.2",
    (200, 404, 200),
    {
        "pipeline-three": request() + NOPE + request(),
        "pipeline-after-body": sized(FORM) + NOPE + request(),
        "pipeline-after-chunked": chunked(ONE + LAST) + NOPE + request(),
        "pipeline-after-drained": GET_SIZED + NOPE + request(),
        "pipeline-after-drained-chunked": GET_CHUNKED + NOPE + request(),
        "pipeline-empty-line-after-body": sized(FORM) + b"\r\n" + NOPE + b"\r\n" + request(),
    },
)
add("9112 9.3.2", (404, 200) * 10, {"pipeline-twenty": (NOPE + request()) * 10})
add(
    "9112 9.3.2",
    (200, 404, 200),
    {"pipeline-heads": target(PATH, b"HEAD") + NOPE.replace(b"GET", b"HEAD") + request()},
    heads=(0, 1),
)
add("9112 9.3.2", (200, 405, 200), {"pipeline-405": request() + target(PATH, b"POST") + request()},
    free="any")
add(
    "9112 9.6",
    200,
    {
        "pipeline-after-close": request(b"Connection: close") + NOPE,
        "pipeline-after-1.0": version(b"HTTP/1.0") + NOPE,
        "pipeline-after-close-body": sized(FORM, b"Connection: close") + NOPE,
    },
    closes=True,
)
add(
    "9112 2.2",
    (404, 400),
    {
        "pipeline-refused": NOPE + request(host=None) + request(),
        "pipeline-refused-binary": NOPE + HELLO + request(),
        "pipeline-refused-body": NOPE + length(b"+5") + request(),
        "pipeline-refused-after-short-length": NOPE + b"hello, " + request(),
    },
)
add(
    "9112 2.2",
    (200, 400),
    {"pipeline-body-longer-than-length": length(b"14", FORM + b"xyz(\r\n\r\n")},
)

##########################################################################################
# Limits
##########################################################################################


def long_line(size: int) -> bytes:
    """Return a request whose first line has this many bytes before its CRLF."""
    line = b"GET /api/images?x= HTTP/1.1"
    return request(line=line.replace(b"=", b"=" + b"a" * (size - len(line))))


def long_field(size: int) -> bytes:
    """Return a request with a header line of this many bytes before its CRLF."""
    return request(b"X-Pad: ".ljust(size, b"a"))


def long_head(size: int) -> bytes:
    """Return a request whose head has this many bytes, no line of it too long."""
    fields = [b"X-Pad: ".ljust(7000, b"a")] * 4
    rest = size - len(request(*fields, b""))
    return request(*fields, b"X-Pad: ".ljust(rest, b"a"))


def many_fields(count: int) -> bytes:
    """Return a request with this many header lines."""
    return request(*[b"X-Pad: a"] * (count - 2))


def long_body(size: int) -> bytes:
    """Return a form of this many bytes."""
    return b"display_name=x&pad=".ljust(size, b"a")


def in_chunks(body: bytes, size: int) -> bytes:
    """Return a PUT of the body in chunks of this many bytes."""
    chunks = (body[i : i + size] for i in range(0, len(body), size))
    return chunked(b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + LAST)


for step, name in ((-1, "below"), (0, "at")):
    add(
        "9112 3",
        200,
        {
            f"limit-line-{name}": long_line(LINE_LIMIT + step),
            f"limit-field-{name}": long_field(LINE_LIMIT + step),
            f"limit-head-{name}": long_head(HEAD_LIMIT + step),
            f"limit-fields-{name}": many_fields(FIELD_LIMIT + step),
            f"limit-body-{name}": sized(long_body(BODY_LIMIT + step)),
            f"limit-chunked-{name}": in_chunks(long_body(BODY_LIMIT + step), BODY_LIMIT + step),
            f"limit-chunks-{name}": in_chunks(long_body(BODY_LIMIT + step), 4000),
        },
        free="any",
    )
add(
    "9110 15.5.15",
    414,
    {
        "limit-line-above": long_line(LINE_LIMIT + 1),
        "limit-line-far-above": long_line(2 * HEAD_LIMIT),
    },
    free="any",
)
add("9110 15.5.15", 414, {"limit-line-endless": b"GET /" + b"a" * 2 * LINE_LIMIT}, free="skip")
add(
    "6585 5",
    431,
    {
        "limit-field-above": long_field(LINE_LIMIT + 1),
        "limit-field-far-above": long_field(2 * HEAD_LIMIT),
        "limit-head-above": long_head(HEAD_LIMIT + 1),
        "limit-fields-above": many_fields(FIELD_LIMIT + 1),
        "limit-fields-far-above": many_fields(20 * FIELD_LIMIT),
        "limit-trailer-above": chunked(b"0\r\nX: " + b"a" * 9000 + b"\r\n\r\n"),
        "limit-trailers-above": chunked(b"0\r\n" + b"X: a\r\n" * 65 + b"\r\n"),
    },
    free="any",
)
add(
    "6585 5",
    431,
    {
        "limit-field-endless": request()[:-2] + b"X-Pad: " + b"a" * 2 * HEAD_LIMIT,
        "limit-fields-endless": many_fields(HEAD_LIMIT // 8)[:-2],
    },
    free="skip",
)
add(
    "9110 15.5.14",
    413,
    {
        "limit-body-above": sized(long_body(BODY_LIMIT + 1)),
        "limit-chunked-above": in_chunks(long_body(BODY_LIMIT + 1), BODY_LIMIT + 1),
        "limit-chunks-above": in_chunks(long_body(BODY_LIMIT + 1), 4000),
    },
    free="any",
)
add(
    "9110 15.5.14",
    413,
    {"limit-chunk-size-8-digits": chunked(b"f" * 8 + b"\r\nhello\r\n" + LAST)},
    free="skip",
)
add(
    "9112 7.1",
    400,
    {
        "limit-chunk-size-9-digits": chunked(b"00000000e\r\n" + FORM + b"\r\n" + LAST),
        "limit-chunk-size-16-digits": chunked(b"f" * 16 + b"\r\nhello\r\n" + LAST),
        "limit-chunk-size-17-digits": chunked(b"1" + b"f" * 16 + b"\r\nhello\r\n" + LAST),
    },
    free="skip",
)
add(
    "9112 7.1.1",
    400,
    {
        "limit-chunk-zeros": chunked(b"0" * 9000 + b"e\r\n" + FORM + b"\r\n" + LAST),
        "limit-chunk-extension": chunked(b"e;" + b"a" * 9000 + b"\r\n" + FORM + b"\r\n" + LAST),
    },
    free="any",
)

##########################################################################################
# A client that believes nothing
##########################################################################################

STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9]) [\t -~\x80-\xff]*")
FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")
PIECES = 700  # this many bytes at both ends go one by one; the middle of a long text faster


class Wrong(Exception):
    """What a server did that it must not; the text says so in a few words."""


class Answer(NamedTuple):
    """One answer as it came, and how many 100 Continue came before it."""

    status: int
    fields: dict[str, str]
    body: bytes
    closing: bool
    interims: int


class Peer:
    """The client's end of one connection, with a deadline for all that it does."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        """Connect. Raises OSError."""
        self.ends = time.monotonic() + seconds
        self.socket = socket.create_connection((host, port), timeout=seconds)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.received = bytearray()
        self.ended = ""  # how the server ended the connection

    def close(self) -> None:
        """Hang up, whatever the server may still have to say."""
        self.socket.close()

    def send(self, raw: bytes, size: int = 0) -> None:
        """Send in pieces of `size` bytes, 0 for all at once, reading what comes meanwhile."""
        view = memoryview(raw)
        while view and not self.ended:
            piece = size if min(len(raw) - len(view), len(view)) <= PIECES else 997
            readable, writable, _ = select.select([self.socket], [self.socket], [], self._left())
            if readable:
                self._receive()
            elif writable:
                try:
                    view = view[self.socket.send(view[: piece or 65536]) :]
                except OSError as error:
                    while not self.ended:  # the answer may have come before the reset
                        self._receive(type(error).__name__)

    def half_close(self) -> None:
        """Send no more requests."""
        with contextlib.suppress(OSError):  # the server may have been first
            self.socket.shutdown(socket.SHUT_WR)

    def wait(self) -> bool:
        """Wait for more bytes; False when the server has ended the connection."""
        if not self.ended:
            select.select([self.socket], [], [], self._left())
            self._receive()
        return not self.ended

    def _left(self) -> float:
        seconds = self.ends - time.monotonic()
        if seconds <= 0:
            raise Wrong("silent" if not self.received else "stopped within an answer")
        return seconds

    def _receive(self, ended: str = "") -> None:
        try:
            text = self.socket.recv(65536)
            self.received += text
            self.ended = "" if text else ended or "end"
        except BlockingIOError:
            self.ended = ended
        except OSError as error:
            self.ended = ended or type(error).__name__

    def _take(self, size: int) -> bytes:
        while len(self.received) < size and self.wait():
            pass
        if len(self.received) < size:
            raise Wrong(f"ended ({self.ended}) within an answer")
        taken = bytes(self.received[:size])
        del self.received[:size]
        return taken

    def _take_line(self) -> bytes:
        while (end := self.received.find(b"\n")) < 0 and self.wait():
            pass
        if end < 0 and not self.received:
            raise Wrong(f"ended ({self.ended}) without an answer")
        line = self._take(end + 1 if end >= 0 else len(self.received))
        if line[-2:] != b"\r\n" or line.count(b"\r") > 1:
            raise Wrong(f"not a line of an answer: {line[:60]!r}")
        return line[:-2]

    def answer(self, head: bool = False) -> Answer:
        """Read the next answer, to HEAD or not, and the 100s before it."""
        interims = 0
        while True:
            line = self._take_line()
            match = STATUS.fullmatch(line)
            if not match:
                raise Wrong(f"not a status line: {line[:60]!r}")
            status = int(match[2])
            fields = self._fields()
            if status != 100:
                break
            interims += 1
        old = match[1] == b"0" and fields.get("connection", "").lower() != "keep-alive"
        closing = old or "close" in re.split(r"[ \t,]+", fields.get("connection", "").lower())
        no_body = head or status in (204, 304)
        body = b"" if no_body else self._body(fields, closing)
        return Answer(status, fields, body, closing, interims)

    def _fields(self) -> dict[str, str]:
        fields: dict[str, str] = {}
        while line := self._take_line():
            match = FIELD.fullmatch(line)
            if not match:
                raise Wrong(f"not a header line: {line[:60]!r}")
            name = match[1].decode().lower()
            if name in fields and name in ("content-length", "transfer-encoding", "content-type"):
                raise Wrong(f"two headers {name}")
            fields[name] = match[2].decode("latin-1")
        return fields

    def _body(self, fields: dict[str, str], closing: bool) -> bytes:
        size = fields.get("content-length")
        if "transfer-encoding" in fields:
            if fields["transfer-encoding"] != "chunked" or size is not None:
                raise Wrong("two framings in an answer")
            return self._chunks()
        if size is not None:
            if not re.fullmatch("[0-9]+", size):
                raise Wrong(f"a Content-Length of {size!r}")
            return self._take(int(size))
        if not closing:
            raise Wrong("an answer without framing")
        while self.wait():
            pass
        return self._take(len(self.received))

    def _chunks(self) -> bytes:
        body = b""
        while True:
            line = self._take_line()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", line):
                raise Wrong(f"not a chunk size: {line[:60]!r}")
            chunk = self._take(int(line, 16) + 2)
            if chunk[-2:] != b"\r\n":
                raise Wrong("a chunk without CRLF")
            if len(chunk) == 2:
                return body
            body += chunk[:-2]

    def end(self) -> None:
        """Wait for the server to close; anything more that it sends is wrong."""
        try:
            while not self.received and self.wait():
                pass
        except Wrong:
            raise Wrong("left open") from None
        if self.received:
            raise Wrong(f"more than was owed: {bytes(self.received[:60])!r}")


##########################################################################################
# Playing a case
##########################################################################################


class Server(NamedTuple):
    """Where to send the cases, what to ask for there, and how to judge."""

    host: str
    port: int
    path: bytes = PATH
    host_header: bytes = HOST
    strict: bool = True
    seconds: float = 8.0  # in total, for one case in one mode

    def fit(self, raw: bytes) -> bytes:
        """Return the text as this server needs it."""
        if self.path != PATH:
            raw = raw.replace(IMAGE, self.path).replace(PATH, self.path)
        return raw.replace(HOST, self.host_header)


def play(case: Case, mode: str, server: Server) -> None:
    """Send a case in one mode and raise Wrong unless the server does what it owes."""
    last = server.fit(request(b"Connection: close"))
    with contextlib.closing(Peer(server.host, server.port, server.seconds)) as peer:
        send_case(case, mode, server, peer)
        for number, status in enumerate(case.answers):
            answer = peer.answer(head=number in case.heads)
            final = number == len(case.answers) - 1
            if server.strict:
                judge(answer, status, final, case, waited=mode in ("whole", "after"))
            elif answer.closing:
                break
        closes = case.closes if server.strict else judge_safe(answer, case)
        if not closes:
            if mode != "pipelined":
                peer.send(last)
            judge_good(peer.answer(), server)
        peer.end()
        if server.strict and peer.ended != "end" and case.answers[-1] >= 400:
            raise Wrong(f"ended by {peer.ended}: a client may lose the answer")


def send_case(case: Case, mode: str, server: Server, peer: Peer) -> None:
    """Send a case in one mode, and read the answer to the good request before it."""
    raw, good = server.fit(case.raw), server.fit(request())
    if mode == "pipelined":
        peer.send(good + raw + server.fit(request(b"Connection: close")))
        judge_good(peer.answer(), server)
        return
    if mode == "after":
        peer.send(good)
        judge_good(peer.answer(), server)
    if mode == "bytes":
        peer.send(raw, 1)
        return
    pause = case.pause and raw.index(b"\r\n\r\n") + 4
    if pause:
        peer.send(raw[:pause])
        peer.wait()
    peer.send(raw[pause:])


def judge_good(answer: Answer, server: Server) -> None:
    """Raise Wrong unless this answers a good request."""
    if not (answer.status == 200 or (not server.strict and 200 <= answer.status < 400)):
        raise Wrong(f"a good request beside it got {answer.status}")


def judge(answer: Answer, status: int, final: bool, case: Case, waited: bool) -> None:
    """Raise Wrong unless the answer is ours to the byte."""
    if answer.status != status:
        raise Wrong(f"got {answer.status} for {status}")
    if answer.closing != (final and case.closes):
        raise Wrong("Connection: close was " + ("sent" if answer.closing else "not sent"))
    old = b" HTTP/1.0\r\n" in case.raw and not answer.closing
    if old and answer.fields.get("connection", "").lower() != "keep-alive":
        raise Wrong("HTTP/1.0 was not told keep-alive")
    if answer.interims > 1 or (answer.interims and (case.answers != (200,) or case.closes)):
        raise Wrong("100 Continue, unasked")
    if case.pause and waited and not answer.interims:
        raise Wrong("no 100 Continue")
    if status in (204, 405) and "GET" not in answer.fields.get("allow", ""):
        raise Wrong("no Allow")
    if status >= 400 and answer.body:
        judge_error(answer, case.code if final else "")
    elif status >= 400 and not case.heads:
        raise Wrong("an error without a body")


def judge_error(answer: Answer, code: str) -> None:
    """Raise Wrong unless the answer says what is wrong as our API does."""
    if answer.fields.get("content-type", "").split(";")[0] != "application/json":
        raise Wrong(f"an error in {answer.fields.get('content-type')}")
    try:
        error = json.loads(answer.body)
    except ValueError:
        raise Wrong(f"an error that is not JSON: {answer.body[:60]!r}") from None
    if not isinstance(error, dict) or set(error) != {"error", "message", "code"}:
        raise Wrong(f"not an error of the API: {answer.body[:60]!r}")
    if not all(isinstance(value, str) for value in error.values()):
        raise Wrong("an error whose values are not all text")
    if code and error["code"] != code:
        raise Wrong(f"code {error['code']} for {code}")


def judge_safe(answer: Answer, case: Case) -> bool:
    """Return whether the connection must end now; raise Wrong if the answer is not safe."""
    served = answer.status < 500 and answer.status not in REFUSALS
    if answer.status in (405, 501) and not case.raw.lstrip().startswith(b"GET"):
        served = True  # an answer about the method, which the server read well
    if not case.closes and answer.status == case.answers[-1]:
        served = True  # an error of an API
    should_serve = case.answers[-1] not in REFUSALS
    if case.free == "any":
        return not served or answer.closing
    if should_serve and not served:
        raise Wrong(f"refused with {answer.status}")
    if not should_serve and answer.status < 400 and case.free != "status":
        raise Wrong(f"served with {answer.status}")
    return case.closes or answer.closing


##########################################################################################
# Scoring a server
##########################################################################################


def score(server: Server, cases: list[Case], jobs: int) -> int:
    """Play the cases in every mode, print the failures and return how many passed."""

    def fault(case: Case, mode: str) -> str:
        try:
            play(case, mode, server)
        except (Wrong, OSError) as error:
            return f"{mode}: {error}"
        return ""

    def first_fault(case: Case) -> str:
        return next(filter(None, (fault(case, mode) for mode in MODES)), "")

    with ThreadPoolExecutor(jobs) as pool:
        results = list(zip(cases, pool.map(first_fault, cases)))
    for case, fault in results:
        if fault:
            print(f"{case.name} (RFC {case.rfc}) {fault}")
    return sum(not fault for _, fault in results)


def main() -> int:
    """Score the server that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="where to connect (127.0.0.1)")
    parser.add_argument("--port", type=int, default=9001, help="TCP port (9001)")
    parser.add_argument("--path", default=PATH.decode(), help="a path that GET answers 200")
    parser.add_argument("--host-header", default=HOST.decode(), help="what to send as Host")
    parser.add_argument("--strict", action="store_true", help="demand exactly our answers")
    parser.add_argument("--seconds", type=float, default=3, help="deadline of one case (3)")
    parser.add_argument("--jobs", type=int, default=8, help="connections at a time (8)")
    parser.add_argument("--only", default="", help="play cases whose name has this in it")
    options = parser.parse_args()
    server = Server(
        options.host,
        options.port,
        options.path.encode(),
        options.host_header.encode(),
        options.strict,
        options.seconds,
    )
    cases = [c for c in CASES if options.only in c.name and (server.strict or c.free != "skip")]
    passed = score(server, cases, options.jobs)
    print(f"{passed} of {len(cases)}")
    return 0 if passed == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
