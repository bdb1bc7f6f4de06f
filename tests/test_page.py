"""The page for people, as text and in a real browser; /health; and the log in JSON."""

import base64
import hashlib
import html
import html.parser
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.parse

import pytest
from browser import PROGRAM, Browser
from serving import SECONDS, parse_answer, raw, read_answer, serving
from support import ACCOUNT, image

import wmi

OTHER = "a-other"
MD5 = "0123456789abcdef" * 2
HTML = "text/html;charset=utf-8"
LONGEST = "wmi-" + "w" * 251
HOSTILE = [
    "</style><script>window.pwned=1</script>",
    "</title></bdi></dd></main><img src=x onerror=window.pwned=1>",
    "\" onmouseover=window.pwned=1 x='",
    "'\"><svg onload=window.pwned=1>",
    "&lt;b&gt; &amp &#x3c; &nosuch; &",
    "{title} {0} %s %(x)s {{}} $x",
    "javascript:window.pwned=1",
    "\u202eright to left\u202d \u2066isolated\u2069 \u200f\u05d0\u05d1",
    "\x00\x01\x1b[31m\x7f\x85\x9f\r\n\t\v\f",
    "\ufeff\u2028\u2029\ufdd0\uffff\U0001f4bf",
    "<!-- --><![CDATA[ ]]> <?php ?>",
    "W" * 4000,
    "\u0301" * 500,
    " \u3000\u200b ",
]


def stored(*records):
    """Return a store with these records."""
    storage = wmi.MemoryStorage()
    storage.add_all(records)
    return storage


def many(count):
    """Return a store with images of two accounts, every third of them private."""
    return stored(*(
        image(f"wmi-n{number}", account_id=OTHER if number % 2 else ACCOUNT, is_public=number % 3 > 0,
              description=f"Image {number} of {count}", arch="x86" if number % 5 else "x86_64", md5sum=MD5)
        for number in range(count)
    ))


def hostile_images():
    """Return images with each hostile text in every field that takes it."""
    for number, text in enumerate(HOSTILE):
        uri = "https://h/" + re.sub("[\x00-\x1f\x7f]", "", text)
        yield image(f"wmi-bad{number}", is_public=True, description=text, display_name=text, root_device=text,
                    instance_model_name=text, source={"uri": uri}, md5sum=MD5)


# ---- a strict reader of HTML ----

VOID = {"meta", "link", "input"}
PLACES = {  # which elements may stand where; every other one is an error
    "html": {"head", "body"}, "head": {"meta", "link", "title", "style"}, "body": {"header", "main"},
    "header": {"a"}, "main": {"h1", "h2", "p", "form", "ol", "nav", "dl", "pre"}, "form": {"label", "button"},
    "label": {"input"}, "ol": {"li"}, "li": {"h2", "p"}, "nav": {"span", "a"}, "span": {"a"}, "dl": {"dt", "dd"},
    "dd": {"bdi"}, "h1": {"bdi"}, "h2": {"a"}, "p": {"a", "span", "small", "bdi"}, "a": {"bdi"}, "small": {"time"},
}
ATTRIBUTES = {
    "lang", "charset", "name", "content", "rel", "href", "role", "action", "type", "value", "class", "tabindex",
    "placeholder", "pattern", "title", "autocapitalize", "autocomplete", "spellcheck",
}


class Strict(html.parser.HTMLParser):
    """A reader that fails for what is not balanced, not escaped, doubled, or not expected in this place."""

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.open, self.texts, self.links, self.attributes = [], {}, [], []
        assert text.startswith("<!DOCTYPE html>\n") and text.endswith("</html>\n")
        assert not re.search("[^\t\n -~\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]", text)
        self.feed(text)
        self.close()
        assert self.open == [] and len(self.texts["title"]) == len(self.texts["h1"]) == len(self.texts["style"]) == 1
        ids = [value for _, name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))

    def handle_decl(self, decl):
        assert (decl, self.open) == ("DOCTYPE html", [])

    def handle_starttag(self, tag, attrs):
        assert tag in PLACES.get(self.open[-1], ()) if self.open else tag == "html", (self.open, tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)) and set(names) <= ATTRIBUTES, names
        for name, value in attrs:
            self.attributes.append((tag, name, value))
            assert value is not None
            if name == "href":
                assert re.match(r"/|https?://|data:,$", value), value
                self.links.append(value)
        assert re.fullmatch("<([^<>&]|&(amp|lt|gt|quot|#x27);)*>", self.get_starttag_text()), self.get_starttag_text()
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        raise AssertionError(f"<{tag}/>")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert not data.strip() or self.open, data
        if self.open[-1:] != ["style"]:
            assert not re.search("[<>&]", data), data
        self._add(data)

    def handle_entityref(self, name):
        assert name in ("amp", "lt", "gt", "quot"), name
        self._add(html.unescape(f"&{name};"))

    def handle_charref(self, name):
        assert name == "x27", name
        self._add("'")

    def handle_comment(self, data):
        raise AssertionError(data)

    handle_pi = unknown_decl = handle_comment

    def _add(self, text):
        for tag in set(self.open):
            self.texts[tag][-1] += text

    def rows(self):
        """Return the fields of a details page."""
        return dict(zip(self.texts["dt"], self.texts["dd"]))

    def ids(self):
        """Return the ids of the images that a list links, in its order."""
        return re.findall("/images/(wmi-[a-z0-9]+)", " ".join(self.links))


def shown(server, target, status=200, fields=None):
    """Return a page, which is valid and has the header fields of one."""
    found, headers, body = server.request("GET", target, fields)
    assert (found, headers["content-type"]) == (status, HTML), body
    assert int(headers["content-length"]) == len(body)
    page = Strict(body.decode())
    digest = base64.b64encode(hashlib.sha256(page.texts["style"][0].encode()).digest()).decode()
    assert headers["content-security-policy"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "private, no-cache"
    assert ("etag" in headers, headers.get("x-content-type-options")) == (
        (True, "nosniff") if status == 200 else (False, None))
    return page


@pytest.mark.parametrize(
    "text",
    ["<p>a", "<p>a</b></p>", "<p>a < b</p>", "<p>a & b</p>", "<p onclick='x'>a</p>", "<script></script>",
     "<p>&bad;</p>", "<p class='a' class='b'>a</p>", "<p><a href='/?a&b'>a</a></p>", "<p><p>a</p></p>",
     "<h1>b</h1>", "<!-- a -->", "<p>\x1b</p>", "<p><a href='javascript:x'>a</a></p>", "<p/>", "<div></div>"],
)
def test_reader_is_strict(text):
    """The checks of this file find what is wrong with a page."""
    head = "<!DOCTYPE html>\n<html><head><title>t</title><style>s</style></head>"
    page = head + "<body><main><h1>h</h1>{}</main></body></html>\n"
    Strict(page.format("<p>&lt;</p>"))
    with pytest.raises((AssertionError, IndexError)):
        Strict(page.format(text))


# ---- list, details, search ----


@pytest.fixture(scope="module")
def server():
    """Serve 45 images, a hostile one for each text, and one of each kind of source."""
    storage = many(45)
    storage.add_all([*hostile_images(), image(LONGEST, account_id="a-" + "w" * 253, is_public=True)])
    with serving(storage) as server:
        yield server


@pytest.mark.parametrize("number", range(len(HOSTILE)), ids=lambda number: f"text{number}")
def test_hostile_text_in_every_field(server, number):
    """Whatever a text holds, each page with it is valid, and shows the text as it is but for what HTML may not hold."""
    text = HOSTILE[number]
    visible = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0\uffff]", "\ufffd", text)
    rows = shown(server, f"/images/wmi-bad{number}").rows()
    assert rows["Name"] == rows["Description"] == rows["Root device"] == rows["Instance model name"] == visible
    page = shown(server, f"/?q=wmi-bad{number}")
    assert f"wmi-bad{number}" in page.ids()
    title = page.texts["h2"][page.ids().index(f"wmi-bad{number}")]
    assert title == (visible[:200] if any(map(str.isalnum, text)) else f"wmi-bad{number}")  # never an empty link
    query = urllib.parse.quote(text, errors="replace")
    if len(query) < 7000:
        shown(server, f"/?q={query}")
        shown(server, f"/?q={query}&start=9")
        shown(server, f"/?account={query}", 400)
        shown(server, f"/images/{query.translate({ord('.'): None, ord('/'): None})}", 400)


def test_text_for_html():
    """Text and other values are escaped, for attributes, too; what HTML may not hold becomes U+FFFD."""
    assert wmi._html("<a b='c' d=\"e\">&\t\n") == "&lt;a b=&#x27;c&#x27; d=&quot;e&quot;&gt;&amp;\t\n"
    assert wmi._html("\0\x1f\x7f\x9f\ud800\udfff\ufdd0\ufdef\ufffe\uffff\r") == "\ufffd" * 11
    assert wmi._html("~\xa0\ud7ff\ue000\ufdcf\ufdf0\U0010fffd") == "~\xa0\ud7ff\ue000\ufdcf\ufdf0\U0010fffd"
    assert (wmi._html(False), wmi._html({"<": None})) == ("false", "{&quot;&lt;&quot;:null}")


def test_directions_are_isolated(server):
    """Text of others stands in <bdi>, so that it cannot turn the text around it; what is searched for, too."""
    number = next(number for number, text in enumerate(HOSTILE) if "\u202e" in text)
    for target in (f"/images/wmi-bad{number}", f"/?q=wmi-bad{number}", "/?q=%E2%80%AEnothing", "/images/%E2%80%AEx"):
        body = server.request("GET", target)[2].decode()
        bare = re.sub('<bdi>.*?</bdi>|value="[^"]*"|href="[^"]*"', "", body, flags=re.DOTALL)
        assert "\u202e" in body and "\u202e" not in bare


def test_longest_texts():
    """An image with 150,000 characters is shown in full, and takes a line of a list."""
    text = ("<&'\"" + "x" * 96) * (wmi.MAX_TEXT // 100 - 4)
    records = (image(f"wmi-long{number}", is_public=True, description=text) for number in range(20))
    with serving(stored(*records)) as server:
        assert shown(server, "/images/wmi-long1").rows()["Description"] == text
        assert len(server.request("GET", "/")[2]) < 50_000
        assert shown(server, "/?q=%27").texts["p"][1].startswith("Images 1 to 20 of 20")


def test_paging(server):
    """The links lead through every image once, newest first, and back; an offset past the end leads back, too."""
    target, seen = "/", []
    while target:
        page = shown(server, target)
        seen += page.ids()
        last, links = target, dict(zip(page.texts["a"], page.links[1:]))
        target = links.get("Older →", "")
    assert seen == [record["id"] for record in server.server.service.storage.walk(public=True) if record["is_public"]]
    while target := dict(zip(shown(server, last).texts["a"], shown(server, last).links[1:])).get("← Newer", ""):
        last = target
    assert last == "/" and shown(server, last).ids() == seen[:20]
    page = shown(server, "/?start=999999999999999999")
    assert "There are no more images." in page.texts["p"] and page.links[-1] == f"/?start={len(seen) - 20}"
    for start in ("x", "-1", "1.5", "9" * 19, "%E2%80%AE", "%ff"):
        shown(server, f"/?start={start}", 400)
    shown(server, "/?start[]=1", 400)
    assert shown(server, "/?start=").ids() == seen[:20]


def test_search(server):
    """All words must occur, in any case, in id, account, architecture, name or description; links keep the words."""
    assert shown(server, "/?q=IMAGE+44+").ids() == ["wmi-n44"]
    assert shown(server, "/?q=other+x86_64").ids() == ["wmi-n35", "wmi-n25", "wmi-n5"]
    assert shown(server, "/?q=image+nowhere").ids() == []
    page = shown(server, "/?q=image++of&account=a-shpoolxx")
    assert "Images 1 to 20 of 38" in page.texts["p"]
    older = shown(server, page.links[-1])
    assert len({*page.ids(), *older.ids()}) == 38 and "account=a-shpoolxx" in page.links[-1]
    assert ("input", "value", "image of") in older.attributes
    assert shown(server, "/?q=%ff%ed%a0%80").texts["p"][-1].startswith("Nothing here has")


def test_long_search():
    """Only so many characters are searched for, and each text is read once: many words cost little more than one."""
    reads = []

    class Text(str):
        __slots__ = ()

        def __str__(self):
            reads.append(self)
            return super().__str__()

    record = image("wmi-a", is_public=True, description="a b c")
    assert wmi._has_words(["a", "b", "c"] * 100, {**record, "description": Text("A B C")}) and len(reads) == 1
    with serving(stored(record)) as server:
        page = shown(server, "/?q=" + "+".join(["a"] * 3000 + ["zzz"]))
        assert page.ids() == ["wmi-a"] and ("input", "value", " ".join(["a"] * 100)) in page.attributes


def test_first_visit_and_empty_store():
    """Without an account the page says in one sentence what the field does; an empty store is said to be empty."""
    with serving(wmi.MemoryStorage()) as server:
        page = shown(server, "/")
        assert page.texts["h1"] == ["Public images"]
        assert page.texts["p"] == ["Enter your account to see its private images as well.", "There are no images yet."]
        assert ("input", "name", "account") in page.attributes and "ol" not in page.texts


def test_account_in_the_query(server):
    """?account= shows that account's private images, too, and links keep it; the header of a proxy counts more."""
    page = shown(server, "/?account=a-other")
    assert page.texts["h1"] == ["Images for a-other"]
    assert "wmi-n3" in shown(server, "/?account=a-other&q=wmi-n3").ids()
    assert "wmi-n3" not in shown(server, "/?account=a-shpoolxx&q=wmi-n3").ids() + shown(server, "/?q=wmi-n3").ids()
    assert all("account=a-other" in link for link in page.links[1:])
    assert ("input", "value", "a-other") in page.attributes
    assert shown(server, "/images/wmi-n3?account=a-other").rows()["Visible to"] == "a-other only"
    proxied = shown(server, "/?account=a-shpoolxx", fields={"X-VDC-ACCOUNT-UUID": "a-other"})
    assert proxied.ids() == page.ids() and all("account=a-other" in link for link in proxied.links[1:])
    assert shown(server, "/?account=").ids() == shown(server, "/").ids()


def test_details():
    """A page has what people look for first, under labels for people, then the other fields."""
    record = image("wmi-a", is_public=True, description="A", display_name="N", md5sum=MD5, features={"virtio": True},
                   source={"uri": "file:///images/my%20image.raw"}, created_at="2011-11-23T07:36:00Z")
    volume = image("wmi-b", source={"snapshot_id": "snap-b"}, boot_dev_type=wmi.BOOT_DEV_SAN)
    with serving(stored(record, volume)) as server:
        page = shown(server, "/images/wmi-a")
        assert [*page.rows()][:7] == ["Name", "Description", "ID", "File", "MD5", "Architecture", "System"]
        assert page.rows().items() >= {
            "File": "my_image.raw", "MD5": MD5, "Visible to": "everybody", "Owner": ACCOUNT, "Features": "virtio",
            "Boots from": "a local file", "Registered": "2011-11-23T07:36:00Z", "Is cacheable": "false",
        }.items()
        rows = shown(server, f"/images/wmi-b?account={ACCOUNT}").rows()
        assert (rows["Source"], rows["Boots from"]) == ("snap-b", "a volume")
        assert not {"File", "MD5", "Name", "Features"} & set(rows)


class Failing(wmi.MemoryStorage):
    """A store whose medium fails, by reading or already at its revision."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def __getattribute__(self, name):
        if name in ("names", "__class__") or name not in self.names:
            return super().__getattribute__(name)
        raise OSError("the disk is gone")


def test_errors_are_pages(server):
    """400, 403, 404, 405 are pages with that status, whose link home keeps the account."""
    assert shown(server, "/images/wmi-nope?account=a-x", 404).links[1] == "/?account=a-x"
    assert shown(server, "/images/wmi-n3", 403).texts["h1"] == ["Forbidden"]
    assert shown(server, "/images/nope", 400).texts["h1"] == ["Bad Request"]
    assert "a- and 1 to 253 letters" in shown(server, "/?account=A-X", 400).texts["p"][0]
    for method in ("POST", "PUT", "DELETE", "BREW"):
        for target in ("/", "/images/wmi-n1"):
            status, headers, body = server.request(method, target)
            assert (status, headers["allow"]) == (405, "GET, HEAD, OPTIONS") and Strict(body.decode())
    assert server.request("OPTIONS", "/")[0] == 204
    for target in ("/images", "/images/", "/index.html", "/images/a/b", "/images/wmi-n1.json"):
        assert server.request("GET", target)[1]["content-type"] == "application/json"  # it is no page of ours


@pytest.mark.parametrize("target", ["/", "/?q=x", "/images/wmi-a"])
def test_store_that_fails(target):
    """A store that cannot be read is a page with 503 and Retry-After, and its reason is in the log only."""
    log = []
    with serving(Failing("page", "walk", "get"), log.append) as server:
        _, headers, body = server.request("GET", target)
        assert headers["retry-after"] == "1" and b"disk" not in body
        assert shown(server, target, 503).texts["h1"] == ["Service Unavailable"]
    assert any("the disk is gone" in line for line in log)


def test_too_many_searches(server):
    """A search looks at all images, so only a few are made at once; one more is 503."""
    for _ in range(wmi.MAX_WALKS):
        assert server.server.service._walks.acquire(blocking=False)
    try:
        shown(server, "/?q=x", 503)
        shown(server, "/")
    finally:
        server.server.service._walks.release(wmi.MAX_WALKS)


def test_head_and_304(server):
    """HEAD has the header of GET; a page that is the same is 304; an error has no ETag, and always a length."""
    for target in ("/", "/images/wmi-n1", "/images/wmi-nope", "/?q=image"):
        status, headers, body = server.request("GET", target)
        head = server.request("HEAD", target)
        assert (head[0], head[2]) == (status, b"") and {**head[1], "date": ""} == {**headers, "date": ""}
        if status == 200:
            assert server.request("GET", target, {"If-None-Match": headers["etag"]})[::2] == (304, b"")
            assert server.request("GET", target, {"If-None-Match": '"x"'})[0] == 200
    with socket.create_connection((server.host, server.port), SECONDS) as peer:
        for _ in range(3):  # without a length the client would wait for more
            peer.sendall(b"GET /images/wmi-nope HTTP/1.1\r\nHost: h\r\nIf-None-Match: *\r\n\r\n")
            status, _, body = read_answer(peer)
            assert status == 404 and Strict(body.decode())


def test_size_of_a_page(server):
    """A page costs little: without images under 4 KB, and under 400 bytes for each image of a list."""
    empty = len(server.request("GET", "/?q=nothing-is-called-so")[2])
    full = len(server.request("GET", "/?q=image")[2])
    assert empty < 4000 and full - empty < 20 * 400


# ---- download, and the commands on the page ----


@pytest.fixture
def files(tmp_path):
    """Return a folder with a file, and a store with images of it, of the web, of other schemes, and of no file."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/my image.raw").write_bytes(b"bytes" * 99)
    uri, digest = f"file://{tmp_path}/files/my%20image.raw", hashlib.md5(b"bytes" * 99).hexdigest()
    return str(tmp_path / "files"), stored(
        image("wmi-mine", source={"uri": uri}, md5sum=digest),
        image("wmi-public", source={"uri": uri}, is_public=True),
        image("wmi-gone", source={"uri": f"{uri}x"}, is_public=True),
        image("wmi-web", source={"uri": "https://images.example/a?b=c&d=%3C"}, is_public=True),
        image("wmi-script", source={"uri": "javascript:window.pwned=1//https://x"}, is_public=True),
        image("wmi-data", source={"uri": "data:text/html,<script>alert(1)</script>"}, is_public=True),
        image("wmi-volume", source={"snapshot_id": "snap-a"}, is_public=True),
    )


def downloads(page):
    """Return where the button for a download leads."""
    return [link for text, link in zip(page.texts["a"], page.links[1:]) if text == "Download"]


def test_download(files):
    """The button sends the file of an image to whom the page is shown, under a safe name; a web source is linked."""
    folder, storage = files
    with serving(storage, files=folder) as server:
        (link,) = downloads(shown(server, f"/images/wmi-mine?account={ACCOUNT}"))
        status, headers, body = server.request("GET", link)
        assert (status, body) == (200, b"bytes" * 99)
        assert headers["content-disposition"] == 'attachment; filename="my_image.raw"'
        assert server.request("GET", link, {"Range": "bytes=5-9"})[::2] == (206, b"bytes")
        shown(server, "/images/wmi-mine/file", 403)
        shown(server, "/images/wmi-nope/file", 404)
        shown(server, *downloads(shown(server, "/images/wmi-gone")), 404)
        assert server.request("GET", link, {"Range": "bytes=9999-"})[1]["content-range"] == "bytes */495"
        assert downloads(shown(server, "/images/wmi-web")) == ["https://images.example/a?b=c&d=%3C"]
        assert ("a", "rel", "noreferrer") in shown(server, "/images/wmi-web").attributes
        for id in ("wmi-script", "wmi-data", "wmi-volume"):
            assert downloads(shown(server, f"/images/{id}")) == []
    with serving(storage) as server:
        assert downloads(shown(server, "/images/wmi-public")) == []
        assert server.request("GET", "/images/wmi-public/file")[0] == 404


@pytest.mark.parametrize("with_tokens", [False, True])
def test_commands_work_as_printed(files, tmp_path, with_tokens):
    """Each command on the page, pasted into a shell, does what stands above it."""
    folder, storage = files
    tokens = tmp_path / "tokens"
    token = wmi.add_token(ACCOUNT, str(tokens))
    (tmp_path / ".wmi-token").write_text(token)
    (tmp_path / ".wmi-token").chmod(0o600)
    (tmp_path / "wmi").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{wmi.__file__}" "$@"\n')
    (tmp_path / "wmi").chmod(0o700)
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login {ACCOUNT} password {token}\n")  # for who would type it
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    with serving(storage, files=folder, tokens=wmi.Tokens(str(tokens)) if with_tokens else None) as server:
        login = {"Authorization": "Basic " + base64.b64encode(f"{ACCOUNT}:{token}".encode()).decode()}
        page = shown(server, f"/images/wmi-mine?account={ACCOUNT}", fields=login)
        fetch, curl = page.texts["pre"]
        assert token not in str(page.texts)
        done = subprocess.run(["sh", "-c", fetch], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "my_image.raw\n", "")
        assert (tmp_path / "my_image.raw").read_bytes() == b"bytes" * 99
        if with_tokens:
            assert f" -u {ACCOUNT} " in curl  # curl asks for the token, which is so in no list of processes
            curl = curl.replace(f"-u {ACCOUNT}", "--netrc")
        if shutil.which("curl"):
            done = subprocess.run(["sh", "-c", curl], env=env, capture_output=True, text=True, timeout=60)
            assert json.loads(done.stdout)["id"] == "wmi-mine", done.stderr


def test_address_in_the_commands(files):
    """The commands name the host that the visitor asked, https if a proxy says so, and a guest's account."""
    folder, storage = files
    with serving(storage, files=folder) as server:
        fields = {"Host": "images.example", "X-Forwarded-Proto": "https"}
        fetch, curl = shown(server, "/images/wmi-public", fields=fields).texts["pre"]
        assert fetch == "wmi fetch wmi-public --url https://images.example --account a-guest"
        assert curl == "curl -H 'X-VDC-ACCOUNT-UUID: a-guest' https://images.example/api/images/wmi-public"
        assert len(shown(server, "/images/wmi-volume").texts["pre"]) == 1  # there is no file to fetch


def test_page_with_tokens(files, tmp_path):
    """With tokens there is no field for an account, no link names one, and without a token the page says what to do."""
    token = wmi.add_token(ACCOUNT, str(tmp_path / "tokens"))
    with serving(files[1], files=files[0], tokens=wmi.Tokens(str(tmp_path / "tokens"))) as server:
        login = {"Authorization": "Basic " + base64.b64encode(f"{ACCOUNT}:{token}".encode()).decode()}
        page = shown(server, "/", fields=login)
        assert page.texts["h1"] == [f"Images for {ACCOUNT}"] and ("input", "name", "account") not in page.attributes
        assert not any("account" in link for link in page.links)
        assert downloads(shown(server, "/images/wmi-mine", fields=login)) == ["/images/wmi-mine/file"]
        assert server.request("GET", "/images/wmi-mine/file", login)[0] == 200
        page = shown(server, "/", 401)
        assert page.texts["h1"] == ["Unauthorized"] and "Load the page again to sign in" in page.texts["p"][0]
        shown(server, "/images/wmi-mine/file", 401)


# ---- /health ----


def health(server, method="GET"):
    """Return status and content of /health."""
    status, _, body = server.request(method, "/health")
    return status, json.loads(body) if body else {}


def test_health(tmp_path):
    """/health needs no account: 200 with version, backend and a revision that follows the store."""
    wmi.add_token(ACCOUNT, str(tmp_path / "tokens"))
    storage = stored(image("wmi-a"))
    with serving(storage, tokens=wmi.Tokens(str(tmp_path / "tokens"))) as server:
        status, before = health(server)
        assert status == 200 and before == {
            "status": "ok", "version": wmi.__version__, "backend": "MemoryStorage", "revision": storage.revision(),
        }
        storage.add(image("wmi-b"))
        assert health(server)[1]["revision"] == storage.revision() != before["revision"]
        assert health(server, "HEAD") == (200, {})
        assert server.request("PUT", "/health")[0] == 405


def test_health_of_a_store_that_fails():
    """Where the store cannot say its revision, /health is 503, without the reason, which is in the log."""
    log = []
    with serving(Failing("revision"), log.append) as server:
        assert health(server) == (503, {"error": "Dcmgr::Endpoints::DatabaseError", "code": "110",
                                        "message": health(server)[1]["message"]})
        assert "disk" not in health(server)[1]["message"]
        assert server.request("GET", "/health")[1]["retry-after"] == "1"
    assert any("GET /health: " in line and "the disk is gone" in line for line in log)


# ---- the log in JSON ----

NAMES = ["time", "client", "account", "method", "target", "status", "bytes", "ms"]


def test_log_in_json():
    """Each line is one JSON object: of a request with eight names, of a failure with two, whatever a client sends."""
    log = []
    with serving(Failing("get"), log.append, log_format="json") as server:
        server.request("GET", '/api/images?"\\{}', {"X-VDC-ACCOUNT-UUID": 'a-x"}\\'})
        server.request("GET", "/api/images/wmi-a", {"X-VDC-ACCOUNT-UUID": "a-x"})
        server.raw(b'GET /"\xff HTTP/1.1\r\n\r\n')
        server.request("M" * 99, "/?" + "a" * 7000)
        server.server.report('"\n\x1b\u202e')
    assert all(line.isascii() and line.isprintable() for line in log)
    rows = [json.loads(line) for line in log]
    answers = [row for row in rows if "error" not in row]
    assert all([*row] == NAMES for row in answers)
    assert [row["status"] for row in answers] == [400, 503, 400, 405]
    assert [type(answers[0][name]) for name in NAMES] == [str, str, str, str, str, int, int, float]
    assert answers[0]["target"] == '/api/images?"\\{}' and answers[0]["account"] == 'a-x"}\\'
    assert answers[2]["method"] == answers[2]["account"] == "-" and len(answers[3]["target"]) == wmi.LOGGED
    assert [[*row] for row in rows if "error" in row] == [["time", "error"]] * 2


def test_a_log_format_that_is_unknown():
    """It is refused like any other value, and the known ones are named."""
    with pytest.raises(wmi.InvalidParameter, match="^log_format: 'xml' is not allowed; expected .*json"):
        wmi.Server(wmi.MemoryStorage(), port=0, log_format="xml")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_line_of_the_log_is_longer_than_a_pipe_takes_in_one_piece(log_format):
    """Otherwise lines of two workers would mix: 2,048 quotation marks took more than 4,096 bytes in JSON."""
    log = []
    with serving(wmi.MemoryStorage(), log.append, log_format=log_format) as server:
        for account in ('"' * 8000, "\xff" * 8000, "\\" * 255):
            server.raw(f'{"M" * 40} /{chr(34) * 7000} HTTP/1.1\r\nHost: a\r\nX-VDC-ACCOUNT-UUID: {account}\r\n'
                       "Connection: close\r\n\r\n".encode("latin-1"))
        server.server.report('"\\\xff\n' * 9000)
    assert len(log) == 4 and max(map(len, log)) < wmi.PIPE_BUF - 100, [*map(len, log)]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_start_line(command, log_format):
    """One line says what is served and where its page is; with --log-format json that line is JSON, too."""
    server = command("--log-format", log_format, store="memory:")
    answer = raw(server.host, server.port, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert parse_answer(answer)[0] == 200
    server.process.terminate()
    assert server.wait() == 0
    first, line = server.said
    text = first[len("wmi: ") :].rstrip() if log_format == "text" else json.loads(first)["message"]
    assert re.fullmatch(r"serving memory: on (http://127\.0\.0\.1:\d+)/api/images \(page: \1/\)", text)
    cells = line.split(" ") if log_format == "text" else [*json.loads(line).values()]
    assert [*map(str, cells)][3:6] == ["GET", "/", "200"]


# ---- in a real browser ----


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a headless Chromium; where there is none, its tests are skipped, or fail if WMI_CI is set."""
    if not PROGRAM:
        message = "no chromium here: `apt-get install chromium` brings it"
        pytest.fail(message) if os.environ.get("WMI_CI") == "1" else pytest.skip(message)
    browser = Browser(str(tmp_path_factory.mktemp("profile")))
    yield browser
    browser.close()


TARGETS = ["/", "/?start=20&q=image&account=a-shpoolxx", "/?q=nothing-is-called-so", "/images/wmi-n1", "/?account=A",
           "/?q=wmi-www", f"/images/{LONGEST}"]


def check_quiet(browser, url):
    """Check that nothing ran and nothing was blocked, missed, or asked for beside the page."""
    assert browser.said("Audits.issueAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled") == []
    assert browser.said("Page.javascriptDialogOpening") == []
    errors = [event["entry"] for event in browser.said("Log.entryAdded")]
    assert [entry for entry in errors if "the server responded with a status of" not in entry["text"]] == []
    asked = {event["request"]["url"] for event in browser.said("Network.requestWillBeSent")}
    assert asked <= {url, "data:,"}
    assert browser.value_of("typeof window.pwned") == "undefined"
    assert browser.value_of("document.scripts.length + document.querySelectorAll('img, svg, iframe').length") == 0


@pytest.mark.parametrize("width", [360, 1280])
def test_browser_shows_every_page(server, browser, width):
    """At 360 and 1280 pixels each page, hostile ones too, fits, runs nothing, and is styled."""
    hostile = [f"/images/wmi-bad{number}" for number in range(len(HOSTILE))] if width == 360 else ["/images/wmi-bad0"]
    for target in [*TARGETS, *hostile]:
        url = server.url + target
        browser.load(url, width)
        check_quiet(browser, url)
        wide = browser.value_of("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        assert wide <= width, target
        assert browser.value_of("getComputedStyle(document.body).fontFamily").startswith("system-ui")  # CSP allows it
        assert browser.value_of("document.querySelector('h1').getClientRects()[0].height") > 20


def test_browser_reads_hostile_text_as_text(server, browser):
    """What the browser shows of a hostile text is that text, as the server has it."""
    for number in (0, 1, 2, 3, 4, 10):
        browser.load(f"{server.url}/images/wmi-bad{number}")
        assert browser.value_of("document.querySelector('dd').textContent") == HOSTILE[number]
        assert browser.value_of("document.title") == f"wmi-bad{number} · Machine images"


CONTRAST = """
(() => {
  const light = (color) => color.match(/[0-9.]+/g).slice(0, 3).map(Number).map((part) => part / 255)
    .map((part) => part <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4)
    .reduce((sum, part, at) => sum + part * [.2126, .7152, .0722][at], 0);
  const below = (node) => { for (; node; node = node.parentElement) {
    const color = getComputedStyle(node).backgroundColor; if (!color.endsWith(', 0)')) return light(color); } };
  return Math.min(...[...document.querySelectorAll('body *')].map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), below(node)];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }));
})()
"""


def test_browser_in_the_dark(server, browser):
    """The page follows the visitor's choice of light or dark, and every text has the contrast that WCAG AA asks for."""
    grounds = []
    for dark in (False, True):
        for target in ("/?account=a-shpoolxx", "/images/wmi-bad0", "/?q=nothing-is-called-so"):
            browser.load(server.url + target, 360, dark)
            assert browser.value_of(CONTRAST) >= 4.5
        grounds.append(browser.value_of("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(18, 18, 18)"]  # Chromium's


FOCUSED = """
(() => { const at = document.activeElement, style = getComputedStyle(at), box = at.getBoundingClientRect();
  return [[...document.querySelectorAll('a[href], button, input, pre')].indexOf(at),
    style.outlineStyle, parseFloat(style.outlineWidth), box.width > 0 && box.bottom > 0 && box.top < innerHeight]; })()
"""


@pytest.mark.parametrize("target", ["/?start=20&account=a-shpoolxx", "/images/wmi-bad0"])
def test_browser_by_keyboard(server, browser, target):
    """Tab reaches every link, field, button and command in the order of the page, each in sight and outlined."""
    browser.load(server.url + target, 360)
    count = browser.value_of("document.querySelectorAll('a[href], button, input, pre').length")
    assert count == (1 + 3 + wmi.PAGE_SIZE + 2 if target.startswith("/?") else 1 + 1 + 2)
    for number in range(count):
        browser.press("Tab", 9)
        assert browser.value_of(FOCUSED) == [number, "solid", 3, True]


def test_browser_searches(server, browser):
    """Words and an account that are typed, and Enter, lead to the images; the browser refuses what is no account."""
    browser.load(server.url)
    for text in ("image 44", ACCOUNT):
        browser.press("Tab", 9)
        browser.press("Tab", 9) if text != ACCOUNT else None
        browser.call("Input.insertText", text=text)
    browser.events.clear()
    browser.call("Input.dispatchKeyEvent", type="char", text="\r")
    browser.wait_for("Page.loadEventFired")
    assert browser.value_of("location.search") == f"?q=image+44&account={ACCOUNT}"
    assert browser.value_of("document.querySelector('ol').innerText").startswith("Image 44 of 45\n")
    browser.value_of("document.querySelector('[name=account]').value = 'A-X'")
    assert browser.value_of("document.querySelector('form').checkValidity()") is False


def test_browser_signs_in(tmp_path, browser):
    """With tokens the browser is asked for account and token once, by Basic, and sends them by itself from then on."""
    token = wmi.add_token(ACCOUNT, str(tmp_path / "tokens"))
    with serving(stored(image("wmi-a", description="mine")), tokens=wmi.Tokens(str(tmp_path / "tokens"))) as server:
        browser.load(server.url, login=("", ""))
        assert browser.said("Fetch.authRequired")[0]["authChallenge"]["scheme"] == "basic"
        assert browser.value_of("document.querySelector('h1').textContent") == "Unauthorized"
        browser.load(server.url, login=(ACCOUNT, token))
        assert browser.value_of("document.querySelector('h1').textContent") == f"Images for {ACCOUNT}"
        browser.events.clear()
        browser.value_of("document.querySelector('li a').click()")
        browser.wait_for("Page.loadEventFired")
        assert browser.value_of("document.querySelector('h1').textContent") == "mine"
        assert browser.value_of("location.href") == f"{server.url}/images/wmi-a"
