"""Mutate the corpus, and say what a strict server does with the result.

The verdict comes from a second reading of RFC 9112, written apart from the server's and slowly:
by regular expressions over whole texts. Where the RFC and our own rules leave something open
it says so and the comparison ends there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from corpus import BODY_LIMIT, CASES, FIELD_LIMIT, HEAD_LIMIT, LINE_LIMIT, Peer, Wrong

SERVED = "served"  # answered, and the next request is read
REFUSED = "refused"  # answered with an error, then the end
ENDS = "ends"  # answered in some way, then the end
CUT = "cut"  # the text stops within a request: at most one answer, then the end
OPEN = "open"  # the rules do not say

##########################################################################################
# Mutations
##########################################################################################

SEEDS = [case.raw for case in CASES if len(case.raw) < 1500]
TOKENS = [
    *(bytes([byte]) for byte in b'\x00\x01\t\n\r "#%+,-./0159:;<=?@AZ[\\]_`az{|}~\x7f\x80\xe9\xff'),
    *(b"\r\n", b"\r\n\r\n", b"\n\n", b"\r\r\n", b"\n\r", b" \r\n", b"\r\n ", b"\r\n\t", b"  "),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"content-length:14\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: cow\r\n", b"Connection: close\r\n"),
    *(b"Host: a\r\n", b"Expect: 100-continue\r\n", b"X-Note: a\r\n b\r\n", b"X: a\nY: b\r\n"),
    *(b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"GET ", b"HEAD ", b"PUT ", b"*", b"http://", b"0x"),
    *(b"0\r\n\r\n", b"5\r\nhello\r\n", b"ffffffffffffffff\r\n", b"99999999999999999999"),
]


def mutations(count: int, seed: str) -> Iterator[bytes]:
    """Yield this many texts, the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        text = rng.choice(SEEDS)
        if rng.random() < 0.3:
            text += rng.choice(SEEDS)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
            text = mutate(text, rng)
        yield text


def mutate(text: bytes, rng: random.Random) -> bytes:
    """Return the text with one place changed."""
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.choice((1, 1, 2, 8, 40)))
    kind = rng.randrange(6)
    if kind == 0:  # leave out
        return text[:start] + text[end:]
    if kind == 1:  # repeat
        return text[:end] + text[start:]
    if kind == 2:  # replace
        return text[:start] + rng.choice(TOKENS) + text[end:]
    if kind == 3:  # move a line
        lines = text.split(b"\r\n")
        lines.insert(rng.randrange(len(lines)), lines.pop(rng.randrange(len(lines))))
        return b"\r\n".join(lines)
    if kind == 4:  # join with another
        other = rng.choice(SEEDS)
        return text[:start] + other[rng.randrange(len(other) + 1) :]
    return text[:start] + rng.choice(TOKENS) + text[start:]


##########################################################################################
# The second reading
##########################################################################################

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9])\.([0-9])")
FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*((?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)[ \t]*")
AUTHORITY = re.compile(rb"[A-Za-z0-9._-]+(:[0-9]{1,5})?")
# Neither clearly a host nor clearly not: other legal characters, address literals, odd ports.
PERHAPS = re.compile(
    rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Za-z.:~!$&'()*+,;=%_-]+\])(:[0-9]*)?"
)
SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})([ \t]*;[\t -~\x80-\xff]*)?")
PLAIN = re.compile(rb"(;[A-Za-z0-9]+(=([A-Za-z0-9]+|\"[A-Za-z0-9;]*\"))?)*")


class Verdict(NamedTuple):
    """What one request in a text comes to."""

    outcome: str
    method: bytes = b""
    closing: bool = False  # the request asks for the end of the connection


def verdicts(text: bytes) -> Iterator[Verdict]:
    """Yield what becomes of each request in the text, up to the one that ends it all."""
    while text:
        lines = len(re.match(rb"(\r\n)*", text)[0]) // 2  # type: ignore[index]
        text = text[2 * lines :]
        if lines > 2:
            yield Verdict(OPEN)
            return
        if not text:
            return
        head, end, rest = text.partition(b"\r\n\r\n")
        if not end:
            yield Verdict(CUT, text.partition(b" ")[0])
            return
        verdict, fields = of_head(head)
        if verdict.outcome == SERVED:
            outcome, text = of_body(fields, rest)
            verdict = verdict._replace(outcome=outcome)
        yield verdict
        if verdict.outcome != SERVED or verdict.closing:
            return


def of_head(head: bytes) -> tuple[Verdict, dict[bytes, list[bytes]]]:
    """Return what becomes of a request with this head, its body aside, and its fields."""
    first, *lines = head.split(b"\r\n")
    refused = Verdict(REFUSED, first.partition(b" ")[0])
    fields: dict[bytes, list[bytes]] = {}
    if len(head) > HEAD_LIMIT - 4 or max(map(len, [first, *lines])) > LINE_LIMIT:
        return refused, fields
    match = LINE.fullmatch(first)
    if len(lines) > FIELD_LIMIT or not match or match[3] != b"1":
        return refused, fields
    for line in lines:
        field = FIELD.fullmatch(line)
        if not field:
            return refused, fields
        fields.setdefault(field[1].lower(), []).append(field[2])
    old = match[4] == b"0"
    found = {of_target(match[1], match[2]), of_host(fields.get(b"host", []), old)}
    found.add(of_framing(fields, old))
    if REFUSED in found:
        return refused, fields
    expected = b",".join(fields.get(b"expect", [b"100-continue"]))
    if OPEN in found or expected.lower() != b"100-continue":
        return Verdict(OPEN), fields
    words = b",".join(fields.get(b"connection", [])).lower().split(b",")
    options = [word.strip(b" \t") for word in words]
    closing = b"close" in options or (old and b"keep-alive" not in options)
    return Verdict(SERVED, match[1], closing), fields


def of_target(method: bytes, target: bytes) -> str:
    """Judge a request target that is printable ASCII."""
    if b"#" in target or (target == b"*") != (target == b"*" and method == b"OPTIONS"):
        return REFUSED
    if target[:1] == b"/" or target == b"*":
        # Not legal in a URI, but sent by clients; so are stray percent signs.
        return OPEN if re.search(rb"[\"<>\\^`{|}]|%(?![0-9A-Fa-f]{2})", target) else SERVED
    if target[:7].lower() != b"http://":
        return REFUSED
    authority = re.split(rb"[/?]", target[7:])[0]
    return SERVED if AUTHORITY.fullmatch(authority) and b"/" in target[7:] else OPEN


def of_host(hosts: list[bytes], old: bool) -> str:
    """Judge the Host fields of HTTP/1.0 or later."""
    if len(hosts) != 1:
        return SERVED if old and not hosts else REFUSED
    if not hosts[0]:
        return OPEN if old else REFUSED
    if AUTHORITY.fullmatch(hosts[0]):
        return SERVED
    return OPEN if PERHAPS.fullmatch(hosts[0]) else REFUSED


def of_framing(fields: dict[bytes, list[bytes]], old: bool) -> str:
    """Judge Content-Length and Transfer-Encoding."""
    lengths, codings = fields.get(b"content-length", []), fields.get(b"transfer-encoding", [])
    if lengths and (codings or len(set(lengths)) > 1):
        return REFUSED
    if lengths and not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
        return REFUSED
    if lengths and int(lengths[0]) > BODY_LIMIT:
        return REFUSED
    if codings and (old or [c.lower() for c in codings] != [b"chunked"]):
        empty = {part.strip(b" \t") for c in codings for part in c.lower().split(b",")}
        return OPEN if empty == {b"", b"chunked"} and not old else REFUSED
    return SERVED


def of_body(fields: dict[bytes, list[bytes]], rest: bytes) -> tuple[str, bytes]:
    """Return what the body makes of a good request, and the text after it."""
    if b"transfer-encoding" in fields:
        return of_chunks(rest)
    size = int(fields.get(b"content-length", [b"0"])[0])
    return (SERVED if len(rest) >= size else CUT), rest[size:]


def of_chunks(rest: bytes) -> tuple[str, bytes]:
    """Return what a chunked body comes to, and the text after it."""
    total = 0
    while True:
        line, end, rest = rest.partition(b"\n")
        if not end:
            return CUT, b""
        match = SIZE.fullmatch(line[:-1])
        if line[-1:] != b"\r" or not match:
            return ENDS, b""
        if not PLAIN.fullmatch(match[2] or b""):
            return OPEN, b""
        size = int(match[1], 16)
        total += size
        if total > BODY_LIMIT:
            return ENDS, b""
        if not size:
            break
        if rest[size : size + 2] != b"\r\n":
            return (CUT if len(rest) < size + 2 else ENDS), b""
        rest = rest[size + 2 :]
    trailer, end, rest = (b"\r\n" + rest).partition(b"\r\n\r\n")
    if not end:
        return CUT, b""
    lines = trailer.split(b"\r\n")[1:]
    good = len(lines) <= FIELD_LIMIT and all(FIELD.fullmatch(line) for line in lines)
    return (SERVED if good else ENDS), rest


##########################################################################################
# Comparing
##########################################################################################


def compare(text: bytes, peer: Peer) -> None:
    """Send the text, say that nothing follows, and raise Wrong unless the verdicts hold."""
    peer.send(text)
    peer.half_close()
    for verdict in verdicts(text):
        if verdict.outcome == OPEN or (verdict.method == b"HEAD" and verdict.outcome != SERVED):
            drain(peer, may_be_head=b"HEAD" in text)
            return
        if verdict.outcome == CUT and not peer.received and not peer.wait():
            return
        answer = peer.answer(head=verdict.method == b"HEAD")
        judge(answer.status, answer.closing, verdict)
        if answer.closing:
            break
    peer.end()


def judge(status: int, closing: bool, verdict: Verdict) -> None:
    """Raise Wrong unless an answer agrees with the verdict."""
    if status in (500, 502, 504):
        raise Wrong(f"a server error {status}")
    if verdict.outcome == REFUSED and status < 400:
        raise Wrong(f"served with {status}")
    if verdict.outcome == SERVED and status in (408, 413, 414, 417, 431, 501, 505):
        raise Wrong(f"refused with {status}")
    wanted = verdict.closing if verdict.outcome == SERVED else True
    if closing != wanted and verdict.outcome != CUT:
        raise Wrong(f"{verdict.outcome} with {status}, but closing is {closing}")


def drain(peer: Peer, may_be_head: bool) -> None:
    """Read whatever answers come to the end; they must be well-formed."""
    while peer.received or peer.wait():
        if may_be_head:  # the bodies cannot be told
            peer.received.clear()
        elif peer.answer().closing:
            peer.end()
