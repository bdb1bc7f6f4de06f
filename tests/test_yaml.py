"""The YAML that is written and the part of it that is read, against texts made by hand.

yaml_with_pyyaml.py compares both with real YAML libraries; here nothing but pytest is needed.
"""

import random
import time

import pytest

import wmi

# ---- written: the exact text of each scalar ----

PLAIN = [  # what no YAML reader takes for anything but this text
    "ubuntu", "Ubuntu 10.04", "ubuntu-lucid-kvm-32.raw local", "a", "x86_64", "wmi-lucid0", "/",
    "/var/lib/o.raw", "file:///var/lib/wakame-vdc/images/o.raw", "http://h:80/a=b~c@d+e",
    "uuid:148bc5df-3fc5-4e93-8a16-7328907cb1c0", "label:root", "a:b", "yes sir", "nothing", "Nullable",
    "truest", "no1", "e1", "a.b", "a--b", "nan", "inf",
]
QUOTED = [  # printable, but something else if it stood there plain
    "", " ", "  ", " a", "a ", "a  b", "a: b", "a:", "a: ", ":a", ":", "::", "a #b", "#a", "#", "a#b", "- a",
    "-", "--", "---", "...", "--- a", "yes", "no", "Yes", "NO", "on", "Off", "y", "N", "true", "False",
    "TRUE", "null", "Null", "NULL", "~", "~a", "1", "0", "-1", "+1", "007", "0x1F", "0o17", "0b1", "1_000",
    "1.5", "1e3", "1,000", ".5", ".inf", "-.inf", ".nan", ".", "..", "190:20:30", "1:20", "2011-11-23",
    "2011-11-23 07:36:00 Z", "2011-11-23T07:36:00Z", "12345678901234567890", "'", "''", "it's", "'a'", '"',
    '"a"', 'a"b', "\\", "\\n", "a\\", "a\\b", "&a", "*a", "!a", "!!str a", "!binary a", "|", ">", "|+", "%a",
    "@a", "`a", "a`", "{", "}", "{}", "[]", "[a, b]", "{a: b}", "a, b", ",", "?", "? a", "<<", "=", "a?",
    "a!", "a*", "a&b", "(a)", "a%20b", "$", "a$", "^", "é", "日本語", "a日", "😀", "\ufffd", "A;", "<a>",
]
ESCAPED = {  # cannot stand in single quotes on one line
    "\n": '"\\n"',
    "a\nb": '"a\\nb"',
    "a\n": '"a\\n"',
    "\t": '"\\t"',
    "a\tb\t": '"a\\tb\\t"',
    "\r\n": '"\\u000d\\n"',
    "\0": '"\\u0000"',
    "\x07\x1b\x7f": '"\\u0007\\u001b\\u007f"',
    "\x80\x84\x85\x86\x9f": '"\\u0080\\u0084\\u0085\\u0086\\u009f"',
    "a\u2028b\u2029c": '"a\\u2028b\\u2029c"',
    "\ufeffa": '"\\ufeffa"',
    "\ufffe\uffff": '"\\ufffe\\uffff"',
    '"\n': '"\\"\\n"',
    "\\\n": '"\\\\\\n"',
    "日\n😀": '"日\\n😀"',
    "uni é日本語 \"dq\" 'sq' a<b>&\\ tab\tend\nline2\n": (
        "\"uni é日本語 \\\"dq\\\" 'sq' a<b>&\\\\ tab\\tend\\nline2\\n\""
    ),
}


@pytest.mark.parametrize("text", PLAIN)
def test_harmless_text_is_written_plain(text):
    """As Ruby's psych writes it, so that a grep of the originals' clients still finds it."""
    assert wmi.to_yaml({"k": text}) == f"---\n:k: {text}\n"


@pytest.mark.parametrize("text", QUOTED)
def test_text_that_means_something_is_quoted(text):
    """Numbers, dates, yes, null and YAML's own signs stay text, by single quotes."""
    doubled = text.replace("'", "''")
    assert wmi.to_yaml({"k": text}) == f"---\n:k: '{doubled}'\n"


@pytest.mark.parametrize("text", ESCAPED)
def test_unprintable_text_is_escaped(text):
    """Line ends of every kind and control characters stand as escapes in double quotes, on one line."""
    assert wmi.to_yaml({"k": text}) == f"---\n:k: {ESCAPED[text]}\n"


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, ":k:"), (True, ":k: true"), (False, ":k: false"), (0, ":k: 0"), (250, ":k: 250"), (-1, ":k: -1"),
     ({}, ":k: {}"), ([], ":k: []")],
)
def test_other_scalars(value, written):
    """Null is empty without a space after the colon, as psych lays it out; nothing is quoted."""
    assert wmi.to_yaml({"k": value}) == f"---\n{written}\n"


def test_a_timestamp_is_text_in_json_and_a_time_in_yaml():
    """12.03 shows 2011-11-23 07:36:00.000000000 Z, which YAML libraries read as a time."""
    moment = wmi.Timestamp("2011-11-23T07:36:00Z")
    assert wmi.to_json({"k": moment}) == '{"k":"2011-11-23T07:36:00Z"}'
    assert wmi.to_yaml({"k": moment}) == "---\n:k: 2011-11-23 07:36:00.000000000 Z\n"
    assert wmi.to_yaml({"k": str(moment)}) == "---\n:k: '2011-11-23T07:36:00Z'\n"


def test_the_layout_is_that_of_psych():
    """Lists at their key's own column, dicts two further, the first key beside the dash."""
    value = [{
        "total": 2, "limit": None,
        "results": [
            {"id": "wmi-a", "features": {"virtio": True, "acpi": False}, "labels": [], "none": {}},
            {"id": "wmi-b", "list": ["x", 1, None, ["z"]]},
        ],
    }]
    assert wmi.to_yaml(value) == (
        "---\n"
        "- :total: 2\n"
        "  :limit:\n"
        "  :results:\n"
        "  - :id: wmi-a\n"
        "    :features:\n"
        "      :virtio: true\n"
        "      :acpi: false\n"
        "    :labels: []\n"
        "    :none: {}\n"
        "  - :id: wmi-b\n"
        "    :list:\n"
        "    - x\n"
        "    - 1\n"
        "    -\n"
        "    - - z\n"
    )


@pytest.mark.parametrize(
    ("value", "document"),
    [([], "--- []\n"), ({}, "--- {}\n"), (["wmi-a"], "---\n- wmi-a\n"), ("a", "--- a\n"), ("1", "--- '1'\n")],
)
def test_whole_documents(value, document):
    """An empty list or dict stands beside the dashes; a list of one id is DELETE's answer."""
    assert wmi.to_yaml(value) == document


def test_a_long_line_is_not_folded_and_takes_no_long_time():
    """A megabyte stays on one line and is written and read in well under a second each."""
    began = time.perf_counter()
    for text in ("a" * 1_000_000, "'" * 500_000, "é: " * 300_000, "a\n" * 300_000, '\\"' * 300_000):
        written = wmi.to_yaml({"uri": text})
        assert written.count("\n") == 2
        assert wmi.parse_yaml_mapping(written) == {"uri": text}
    assert time.perf_counter() - began < 10


# ---- read ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("--- \n:uri: file:///var/lib/wakame-vdc/images/o.raw\n",
         {"uri": "file:///var/lib/wakame-vdc/images/o.raw"}),
        ("--- \n:snapshot_id: snap-lucid1\n", {"snapshot_id": "snap-lucid1"}),
        ("--- \n:virtio: true\n", {"virtio": True}),
        ("---\n:virtio: true\n:acpi: false\n", {"virtio": True, "acpi": False}),
        ("--- {}\n\n", {}),
        ("--- {}\n", {}),
        ("--- {}", {}),
        ("---\n:a: \n:b:\n:c: ~\n:d: null\n", {"a": None, "b": None, "c": None, "d": None}),
        ("---\n:a: 12\n:b: -3\n:c: '12'\n:d: \"-3\"\n", {"a": 12, "b": -3, "c": "12", "d": "-3"}),
        ("---\n:a: 1.5\n:b: 2011-11-23\n", {"a": "1.5", "b": "2011-11-23"}),
        ("---\n:a: :local\n", {"a": "local"}),
        ("---\n:a: ''\n:b: \"\"\n", {"a": "", "b": ""}),
        ("---\n:a: 'it''s: #1'\n", {"a": "it's: #1"}),
        ('---\n:a: "x\\ty\\n\\"z\\" \\\\ \\x41\\u65E5\\U0001F600\\0\\e\\_\\N\\L\\P"\n',
         {"a": 'x\ty\n"z" \\ A日😀\0\x1b\xa0\x85\u2028\u2029'}),
        ("---\n:a:   spaced   \n\n", {"a": "spaced"}),
        ("uri: file:///x\n", {"uri": "file:///x"}),
        ("---\n:uri: file:///a b#c\n", {"uri": "file:///a b#c"}),
        ("---\r\n:uri: file:///x\r\n", {"uri": "file:///x"}),
    ],
)
def test_a_flat_mapping_is_read(text, value):
    """What syck and psych wrote for source and features, and what people write by hand."""
    assert wmi.parse_yaml_mapping(text) == value


def test_a_folded_scalar_is_read():
    """Psych breaks a long text at a space and goes on indented; a backslash keeps what a space would add."""
    assert wmi.parse_yaml_mapping("---\n:uri: file:///a\n  b\n  c\n") == {"uri": "file:///a b c"}
    assert wmi.parse_yaml_mapping("---\n:uri: 'file:///a\n  b'\n:x: 1\n") == {"uri": "file:///a b", "x": 1}
    assert wmi.parse_yaml_mapping('---\n:uri: "a\\n\\\n  b\\\n  \\ c"\n') == {"uri": "a\nb c"}
    assert wmi.parse_yaml_mapping('---\n:uri: "a\\\n  \\u65E5\\\n  \\x41\\\n  \\n"\n') == {"uri": "a日A\n"}


@pytest.mark.parametrize("scalar", ["C:\\a\\\n  b", "'C:\\a\\\n  b'", '"C:\\\\a\\\\\n  b"', "C:\\a\\\r\n  b"])
def test_a_backslash_that_is_text_survives_a_fold(scalar):
    """Psych breaks a plain text after a backslash, too; only in double quotes it means something."""
    assert wmi.parse_yaml_mapping(f"---\n:uri: {scalar}\n:x: 1\n") == {"uri": "C:\\a\\ b", "x": 1}


@pytest.mark.parametrize("text", ["---\n:a:\n  :b: 1\n", "---\n:a:\n  :b:\n", "---\n:a:\n  - 1\n", "---\n:a:\n  -\n"])
def test_what_is_nested_is_refused(text):
    """It is no flat mapping, and is not taken for text."""
    with pytest.raises(ValueError, match="expected"):
        wmi.parse_yaml_mapping(text)


def test_only_spaces_end_a_plain_text():
    """Ruby writes a trailing no-break or ideographic space plain; it belongs to the text."""
    for space in ("\xa0", "\u3000", "\u2003"):
        assert wmi.parse_yaml_mapping(f"---\n:uri: a{space}\n:x: 1\n") == {"uri": f"a{space}", "x": 1}
    assert wmi.parse_yaml_mapping("---\n:uri: a \t\r\n") == {"uri": "a"}


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029"])
def test_raw_line_breaks_of_yaml_are_refused(end):
    """YAML 1.1 folds at these as at a newline; what was meant cannot be told from the text."""
    for text in (f"'a{end}  b'", f'"a{end}  b"', f"a{end}b"):
        with pytest.raises(ValueError, match="expected"):
            wmi.parse_yaml_mapping(f"---\n:uri: {text}\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("--- !binary |\n  aGVsbG8=\n", "'--- !binary |'"),
        ("--- !ruby/object:Gem::Requirement\n:a: b\n", "!ruby/object"),
        ("--- !!python/object/apply:os.system\n- x\n", "!!python"),
        ("---\n:uri: !binary |\n  aGVsbG8=\n", "!binary"),
        ("---\n:uri: !ruby/symbol x\n", "!ruby/symbol x"),
        ("---\n:uri: !!str x\n", "!!str x"),
        ("---\n:uri: &a x\n", "&a x"),
        ("---\n:uri: *a\n", "*a"),
        ("--- &a\n:uri: x\n", "'--- &a'"),
        ("---\n<<: *a\n", "<<: *a"),
        ("---\n:uri: |\n  x\n", "|"),
        ("---\n:uri: |+\n  x\n", "|+"),
        ("---\n:uri: >\n  x\n", ">"),
        ("---\n:uri: {a: b}\n", "{a: b}"),
        ("---\n:uri: [a]\n", "[a]"),
        ("---\n:uri: {}\n", "{}"),
        ("--- {:uri: x}\n", "{:uri: x}"),
        ("--- []\n", "--- []"),
        ("--- x\n", "--- x"),
        ("---\n- x\n", "- x"),
        ("---\n? x\n", "? x"),
        ("---\nx\n", "x"),
        ("---\n:a b: x\n", ":a b: x"),
        ("---\n'a': x\n", "'a'"),
        ("---\n:uri: a: b\n", "a: b"),
        ("---\n:uri: a #b\n", "a #b"),
        ("---\n:uri: 'a\n", "'a"),
        ("---\n:uri: 'a' b\n", "'a' b"),
        ('---\n:uri: "a\n', '"a'),
        ('---\n:uri: "a" b\n', '"a" b'),
        ("---\n:uri: - a\n", "- a"),
        ("---\n:uri: %a\n", "%a"),
        ("---\n:uri: @a\n", "@a"),
        ("---\n:uri: `a\n", "`a"),
        ('---\n:uri: "\\q"\n', "\\q"),
        ("--- {}\n:uri: x\n", "--- {}"),
        ("---\n:uri: x\n---\n:uri: y\n", "---"),
        ("---\n:uri: x\n...\n", "..."),
        ("%YAML 1.1\n---\n:uri: x\n", "%YAML"),
    ],
)
def test_the_rest_of_yaml_is_refused(text, found):
    """Tags, anchors, flow and block styles, lists: a ValueError that quotes what was found."""
    with pytest.raises(ValueError, match=r"expected|unknown escape") as caught:
        wmi.parse_yaml_mapping(text)
    assert found in str(caught.value) or repr(found)[1:-1] in str(caught.value)


BROKEN = [
    '"\\xZZ"', '"\\u12"', '"\\u12G4"', '"\\U00110000"', '"\\UFFFFFFFF"', '"\\x4"',
    '"\\u+041"', '"\\u 041"', '"\\u0_41"',
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_escape_is_a_value_error(text):
    """Never another exception: the caller turns ValueError into a message."""
    with pytest.raises(ValueError):  # noqa: PT011  # the message is Python's own for some
        wmi.parse_yaml_mapping(f"---\n:uri: {text}\n")


def test_a_refusal_is_one_short_line():
    """However long and strange the text was."""
    for text in ("x" * 100_000, "--- " + "y" * 100_000, "---\n:uri: [" + "z\n" * 100_000):
        with pytest.raises(ValueError, match="expected") as caught:
            wmi.parse_yaml_mapping(text)
        assert len(str(caught.value)) < 150
        assert "\n" not in str(caught.value)


# ---- written and read ----

ALPHABET = [
    *"abcyneoYNTtfu019 -:#'\"\\,.&*!|>%@`{}[]?~=<_+/$^;()\t\n\r\0\x07\x1b\x7f", "\x80", "\x85", "\xa0", "é",
    "日", "\u200b", "\u2028", "\u2029", "\u3000", "\ud7ff", "\ue000", "\ufeff", "\ufffd", "\ufffe", "\uffff",
    "😀", "\U0010ffff", "yes", "no", "null", "true", ": ", " #", "- ", "---", "...", "''", "1e3", "0x1",
    "2011-11-23", "12:30:45", "\n\n", "  ",
]


def any_text(rng):
    """Return a text of up to 12 pieces that YAML has a use for."""
    return "".join(rng.choices(ALPHABET, k=rng.randrange(12)))


def test_whatever_is_written_is_read_back():
    """Twenty thousand generated mappings come back equal, in their order, types included."""
    rng = random.Random(20111123)
    for _ in range(20_000):
        names = rng.sample(["uri", "snapshot_id", "virtio", "acpi", "a_b", "X9"], rng.randrange(4))
        value = {
            name: any_text(rng) if rng.random() < 0.8 else rng.choice([None, True, False, 0, -5, 10**17])
            for name in names
        }
        text = wmi.to_yaml(value)
        read = wmi.parse_yaml_mapping(text)
        assert list(read.items()) == list(value.items()), text
        assert [type(item) for item in read.values()] == [type(item) for item in value.values()], text
        assert text.count("\n") == max(1, 1 + len(value))


def test_every_character_is_read_back():
    """Each one of Unicode's, alone and within text, except the halves of surrogate pairs."""
    rng = random.Random(7)
    points = [*range(0x3100), *range(0xD700, 0xD800), *range(0xE000, 0xE010), *range(0xFE00, 0x10010),
              0x10FFFF]
    points += [point for point in rng.sample(range(0x110000), 3000) if not 0xD800 <= point < 0xE000]
    for point in points:
        for text in (chr(point), f"a{chr(point)}", f"{chr(point)} b"):
            assert wmi.parse_yaml_mapping(wmi.to_yaml({"k": text})) == {"k": text}
