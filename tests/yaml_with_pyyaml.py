"""Compare our YAML with real YAML libraries: PyYAML, and Ruby's where there is a ruby.

    pytest tests/yaml_with_pyyaml.py

This needs PyYAML, so it has a tox environment of its own and the bare suite does not collect it.
Keys are Ruby symbols, which Python reads as texts with a colon.
"""

import datetime
import json
import random
import shutil
import subprocess

import pytest
import yaml
from serving import serving
from test_golden import comparable, is_json, original_store, recordings
from test_yaml import ALPHABET, ESCAPED, PLAIN, QUOTED, any_text

import wmi

VERSIONS = {"document": "/api/images", "11.12": "/api/11.12/images", "12.03": "/api/12.03/images"}
ME = {"X-VDC-ACCOUNT-UUID": "a-shpoolxx"}
needs_ruby = pytest.mark.skipif(shutil.which("ruby") is None, reason="there is no ruby here")

RUBY = """
require "date"
require "json"
require "yaml"

def plain(value)
  case value
  when Hash then value.map { |key, item| ["#{":" if key.is_a?(Symbol)}#{key}", plain(item)] }.to_h
  when Array then value.map { |item| plain(item) }
  when Time then value.getutc.strftime("time %Y-%m-%dT%H:%M:%SZ")
  when Symbol, Date then "not a text: #{value}"
  else value
  end
end

load = YAML.respond_to?(:unsafe_load) ? :unsafe_load : :load
written, mappings = JSON.parse(STDIN.read)
read = written.map { |text| begin plain(YAML.send(load, text)) rescue "refused: #{$!}" end }
dumped = mappings.map { |mapping| mapping.map { |key, item| [key.to_sym, item] }.to_h.to_yaml }
STDOUT.write(JSON.generate([read, dumped]))
"""


def ruby(written, mappings=()):
    """Return what Ruby reads from our texts, and the texts that it writes for mappings."""
    command = ["ruby", "-E", "UTF-8:UTF-8", "-e", RUBY]
    done = subprocess.run(
        command, input=json.dumps([list(written), list(mappings)]).encode(), capture_output=True, check=True,
        timeout=120
    )
    return json.loads(done.stdout)


def symbols(data):
    """Return data as a YAML library reads it: keys with a colon, times marked as such."""
    if isinstance(data, dict):
        return {f":{name}": symbols(item) for name, item in data.items()}
    if isinstance(data, list):
        return [symbols(item) for item in data]
    return f"time {data}" if isinstance(data, wmi.Timestamp) else data


def marked(data):
    """Return what PyYAML read, times marked as such."""
    if isinstance(data, dict):
        return {name: marked(item) for name, item in data.items()}
    if isinstance(data, list):
        return [marked(item) for item in data]
    if isinstance(data, datetime.datetime):
        return data.astimezone(datetime.timezone.utc).strftime("time %Y-%m-%dT%H:%M:%SZ")
    return data


def timed(data):
    """Return data of a JSON answer with its times as Timestamp, as the YAML answer has them."""
    if isinstance(data, list):
        return [timed(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        name: wmi.Timestamp(item) if name.endswith("_at") and item else timed(item)
        for name, item in data.items()
    }


def strange_texts():
    """Return texts that are hard on YAML: by hand, each character, and generated ones."""
    rng = random.Random(1112)
    texts = [*PLAIN, *QUOTED, *ESCAPED]
    for piece in ALPHABET:
        texts += [piece, f"a{piece}", f"{piece}a", f"a {piece} b", f"a{piece}\n", f"\n{piece}"]
    texts += [chr(point) for point in (*range(0x800), *range(0x2000, 0x2100), 0xD7FF, *range(0xE000, 0xE010))]
    texts += [chr(point) for point in (*range(0xFE00, 0x10010), 0x1F600, 0xE0001, 0x10FFFE, 0x10FFFF)]
    texts += ["x" * length for length in (79, 80, 81, 1023, 1024, 1025, 70_000)]
    texts += ["word " * 500, "word\n" * 500, " ".join("ab:" * 400), "日本 " * 500, "'" * 300, '"\\' * 300]
    return texts + [any_text(rng) for _ in range(8000)]


def strange_image(rng, number, texts):
    """Return a legal image whose texts are strange."""
    uri = "".join(char for char in rng.choice(texts) if char.isprintable())
    return {
        "id": f"wmi-{number}",
        "account_id": "a-shpoolxx",
        "is_public": rng.random() < 0.5,
        "created_at": f"20{rng.randrange(10, 30)}-02-0{rng.randrange(1, 9)}T03:04:05Z",
        "source": rng.choice([{}, {"uri": f"file:///{uri}"}]),
        "features": rng.choice([{}, {"virtio": True}, {"virtio": False, "acpi": True}]),
        "description": rng.choice([None, rng.choice(texts), rng.choice(texts)]),
        "display_name": rng.choice(texts),
        "root_device": rng.choice([None, rng.choice(texts)]),
        "instance_model_name": rng.choice([None, rng.choice(texts)]),
        "md5sum": rng.choice([None, "0" * 32, "1" * 32, f"{10**31}", "1e" + "0" * 30, "a" * 32]),
        **rng.choice([{}, {"state": "deleted", "deleted_at": "2012-01-01T00:00:00Z"}]),
    }


@pytest.fixture(scope="module")
def answers():
    """Pairs of answers, as YAML text and as the data of the JSON one: each version, call and error."""
    rng, texts = random.Random(1203), strange_texts()
    storage = wmi.open_storage("memory:")
    storage.add_all(wmi.image_record(strange_image(rng, number, texts)) for number in range(400))
    storage.add(wmi.image_record({"id": "wmi-theirs", "account_id": "a-otheracc"}))
    pairs = []
    with serving(storage) as server:

        def pair(method, tail, query="", headers=ME, path=""):
            one, two = (
                server.request(method, f"{path}{tail}.{kind}{query}", headers)[2] for kind in ("yml", "json")
            )
            pairs.append((one.decode("utf-8"), timed(json.loads(two.decode("utf-8")))))

        for path in VERSIONS.values():
            for query in ("", "?limit=1", "?start=1000", "?limit=400"):
                pair("GET", "", query, path=path)
            for number in range(0, 400, 4):
                pair("GET", f"/wmi-{number}", path=path)
            for id in ("wmi-nope", "wmi-theirs", "lucid0", "wmi-%E6%97%A5", "%22%27%3A%20%23", "wmi-%00%0A",
                       "wmi-%FF", "wmi-%F0%9F%98%80", "-%20a", "wmi-%C2%85%E2%80%A8",
                       "%EF%BB%BFwmi"):
                pair("GET", f"/{id}", path=path)
            pair("GET", "", "?start=x", path=path)
            pair("GET", "", headers={}, path=path)
            pair("GET", "", headers={"X-VDC-ACCOUNT-UUID": "- 'x\": #é"}, path=path)
            pair("POST", "", path=path)
        for number in range(1, 30):  # 12.03 leaves a tombstone, so that it can be deleted once more
            pair("DELETE", f"/wmi-{number}", path=VERSIONS["12.03"])
    return pairs


# ---- PyYAML ----


def test_pyyaml_reads_every_text_back():
    """As the value of a key, in a list, deep inside, and as the whole document."""
    for text in strange_texts():
        for value in ({"k": text}, [text], {"a": [{"b": text, "c": {"d": text}}], "e": text}, text):
            written = wmi.to_yaml(value)
            assert yaml.safe_load(written) == symbols(value), written


def test_pyyaml_reads_every_answer_back(answers):
    """The data of the JSON answer, times as times, keys in the same order."""
    assert len(answers) > 350
    for text, data in answers:
        read = yaml.safe_load(text)
        assert marked(read) == symbols(data), text
        assert json.dumps(marked(read)) == json.dumps(symbols(data))


def test_texts_within_yaml_are_yaml(answers):
    """source and features of the older versions are documents inside a text; both levels read back."""
    seen = 0
    for text, data in answers:
        if isinstance(data, dict) and isinstance(data.get("source"), str):
            for name in ("source", "features"):
                inner = yaml.safe_load(yaml.safe_load(text)[f":{name}"])
                assert inner == symbols(wmi.parse_yaml_mapping(data[name]))
                seen += 1
    assert seen > 100


LAYOUTS = [{}, {"width": 40}, {"allow_unicode": True}, {"allow_unicode": True, "width": 30}]


@pytest.mark.parametrize("options", LAYOUTS)
def test_what_pyyaml_writes_is_read_or_refused(options):
    """Never taken for other data: what our reader does not know, it refuses.

    A plain text after a colon is a symbol to Ruby and to us, which PyYAML does not know.
    """
    read = 0
    for text in strange_texts():
        for key in (":uri", "uri"):
            written = yaml.safe_dump({key: text}, default_flow_style=False, explicit_start=True, **options)
            try:
                value = wmi.parse_yaml_mapping(written)
            except ValueError:
                continue
            symbol = text.startswith(":") and written == f"---\n{key}: {text}\n"
            assert value == {"uri": text[symbol:]}, written
            read += 1
    assert read > 15_000


# ---- Ruby ----


@needs_ruby
def test_ruby_reads_every_text_back():
    """Keys are symbols, texts are texts: no number, date, time, symbol or null among them."""
    values = [{"k": text, "l": [text]} for text in strange_texts()]
    read, _ = ruby(map(wmi.to_yaml, values))
    for value, back in zip(values, read):
        assert back == symbols(value), wmi.to_yaml(value)


@needs_ruby
def test_ruby_reads_every_answer_back(answers):
    """As PyYAML does; times are times."""
    read, _ = ruby(text for text, _ in answers)
    for (text, data), back in zip(answers, read):
        assert back == symbols(data), text


@needs_ruby
def test_what_ruby_writes_is_read_or_refused():
    """Every URI and path is read; of the rest nothing is taken for other data."""
    texts = strange_texts()
    uris = [f"file:///images/{name}.raw" for name in PLAIN + [text for text in QUOTED if text.isascii()]]
    _, dumped = ruby([], [{"uri": text} for text in texts + uris])
    for text, written in zip(texts, dumped):
        try:
            value = wmi.parse_yaml_mapping(written)
        except ValueError:
            continue
        assert value == {"uri": text}, written
    for text, written in zip(uris, dumped[len(texts) :]):
        assert wmi.parse_yaml_mapping(written) == {"uri": text}, written


# ---- the recorded originals ----


@pytest.mark.parametrize("version", ["11.12", "12.03"])
def test_our_yaml_holds_the_data_of_the_recorded_yaml(version):
    """PyYAML reads the originals' texts, Ruby 1.8's layout too, and ours: the same data."""
    seen = 0
    with serving(original_store(version)) as server:
        for recording in recordings(version):
            if is_json(recording) or recording["method"] != "GET":
                continue
            tail = recording["path"].partition("/images")[2]
            _, _, body = server.request("GET", f"/api/{version}/images{tail}", ME)
            ours, theirs = marked(yaml.safe_load(body)), marked(yaml.safe_load(recording["body"]))
            assert comparable(unsymbolled(ours), ()) == comparable(unsymbolled(theirs), ())
            seen += 1
    assert seen >= 3


def unsymbolled(data):
    """Return data without the colons of symbols; bytes that Ruby 1.8 escaped one by one are put together."""
    if isinstance(data, dict):
        return {name[1:]: unsymbolled(item) for name, item in data.items()}
    if isinstance(data, list):
        return [unsymbolled(item) for item in data]
    if isinstance(data, str) and data.startswith("time "):
        return data[len("time ") :]
    if isinstance(data, str) and any("\x80" <= char <= "\xff" for char in data) and max(data) <= "\xff":
        return data.encode("latin-1").decode("utf-8")
    return data
