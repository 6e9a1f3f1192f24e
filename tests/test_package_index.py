"""The simple API over HTTP on the loopback and from a directory; pip's settings."""

import base64
import hashlib
import http.server
import json
import threading
import time
from pathlib import Path

import pytest

from dexportrait_jax import package_index
from dexportrait_jax.package_index import Unavailable, download, find

CONTENT = b"the contents of a wheel"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHEEL = "fake_thing-1.0-py3-none-any.whl"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        status, kind, body, length = self.server.answers.get(
            self.path, (404, "text/plain", b"", None)
        )
        if callable(body):
            body = body(self)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server whose ``answers`` map a path to (status, type, body, claimed length or None)."""
    monkeypatch.setattr(package_index, "_silent_hosts", set())
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.answers, server.seen = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _json_page(url):
    files = [{"filename": WHEEL, "url": url, "hashes": {"sha256": SHA256}}]
    kind = "application/vnd.pypi.simple.v1+json"
    return 200, kind, json.dumps({"files": files}).encode(), None


def _html_page(url):
    page = f'<html><body><a href="{url}#sha256={SHA256}">{WHEEL}</a></body></html>'
    return 200, "text/html; charset=utf-8", page.encode(), None


@pytest.mark.parametrize("page", [_json_page, _html_page])
@pytest.mark.parametrize("address", ["../../files/", "/files/", "{server}/files/"])
def test_pages_in_both_forms_and_relative_addresses(server, tmp_path, page, address):
    url = address.format(server=server.url) + WHEEL
    server.answers["/simple/fake-thing/"] = page(url)
    server.answers[f"/files/{WHEEL}"] = (200, "application/zip", CONTENT, None)
    entry = find(f"{server.url}/simple", "Fake_Thing", WHEEL)
    assert entry == package_index.PackageFile(WHEEL, f"{server.url}/files/{WHEEL}", SHA256)
    assert download(entry.url, tmp_path / "file", entry.sha256) == SHA256
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert "json" in server.seen[0][1]["Accept"]


def test_html_base(server):
    page = f'<html><head><base href="/elsewhere/"></head><a href="{WHEEL}">x</a></html>'
    server.answers["/simple/fake-thing/"] = (200, "text/html", page.encode(), None)
    entry = find(f"{server.url}/simple", "fake-thing", WHEEL)
    assert entry == package_index.PackageFile(WHEEL, f"{server.url}/elsewhere/{WHEEL}", None)


def test_directory_as_index(tmp_path):
    page = tmp_path / "simple" / "fake-thing"
    page.mkdir(parents=True)
    (page / "index.html").write_bytes(_html_page(f"../../files/{WHEEL}")[2])
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / WHEEL).write_bytes(CONTENT)
    entry = find((tmp_path / "simple").as_uri(), "fake.thing", WHEEL)
    assert download(entry.url, tmp_path / "copy", entry.sha256) == SHA256


def test_a_login_is_sent_to_its_host_and_shown_to_nobody(server, tmp_path):
    server.answers["/simple/fake-thing/"] = _json_page(f"../../files/{WHEEL}")
    server.answers[f"/files/{WHEEL}"] = (200, "application/zip", CONTENT, None)
    index = server.url.replace("http://", "http://me:s%40cret@") + "/simple"
    entry = find(index, "fake-thing", WHEEL)
    download(entry.url, tmp_path / "file")
    expected = "Basic " + base64.b64encode(b"me:s@cret").decode()
    assert [headers["Authorization"] for _, headers in server.seen] == [expected, expected]
    with pytest.raises(Unavailable) as error:
        find(index, "other", WHEEL)
    assert "cret" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "text/plain", b"", None), "404"),
        ((200, "text/html", b"<html>log in first</html>", None), "does not list"),
        ((200, "application/json", b"{]", None), "not a page of a package index"),
    ],
)
def test_pages_that_do_not_help(server, answer, message):
    server.answers["/simple/fake-thing/"] = answer
    with pytest.raises(Unavailable, match=message):
        find(f"{server.url}/simple", "fake-thing", WHEEL)


def test_a_page_cannot_point_at_local_files(server, tmp_path):
    (tmp_path / WHEEL).write_bytes(CONTENT)
    server.answers["/simple/fake-thing/"] = _json_page((tmp_path / WHEEL).as_uri())
    with pytest.raises(Unavailable, match="does not list"):
        find(f"{server.url}/simple", "fake-thing", WHEEL)


def test_broken_off_and_exchanged_files(server, tmp_path):
    server.answers["/short"] = (200, "application/zip", CONTENT, 10 * len(CONTENT))
    server.answers["/other"] = (200, "application/zip", b"something else", None)
    with pytest.raises(package_index.BrokenOff, match="broke off"):
        download(f"{server.url}/short", tmp_path / "file")
    with pytest.raises(Unavailable, match=SHA256):
        download(f"{server.url}/other", tmp_path / "file", SHA256)


def test_silence_is_waited_for_once(server, monkeypatch):
    monkeypatch.setattr(package_index, "CONNECT_SECONDS", 0.2)
    release = threading.Event()
    server.answers["/slow"] = (200, "text/plain", lambda handler: release.wait(5) and b"late", None)
    start = time.monotonic()
    for _ in range(20):
        with pytest.raises(Unavailable, match="did not answer"):
            package_index.open_url(f"{server.url}/slow")
    assert time.monotonic() - start < 2
    release.set()


def test_unknown_kinds_of_addresses_are_refused():
    with pytest.raises(Unavailable, match="not an address"):
        package_index.open_url("data:text/plain,hello")


def test_indexes_come_from_pip(monkeypatch, tmp_path):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    configuration = tmp_path / "pip.conf"
    configuration.write_text(
        "[global]\nindex-url = https://mirror.example/simple/\n"
        "extra-index-url =\n  https://one.example/simple\n  file:///two/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    package_index._pip_configuration.cache_clear()
    try:
        assert package_index.index_urls() == [
            "file:///two/simple",
            "https://mirror.example/simple",
            "https://one.example/simple",
        ]
        monkeypatch.setenv("PIP_INDEX_URL", "https://environment.example/simple")
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
        assert package_index.index_urls() == ["https://environment.example/simple"]
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        assert package_index.index_urls() == []
    finally:
        package_index._pip_configuration.cache_clear()


def test_without_pip_there_is_the_default_index(monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(package_index.sys, "executable", str(Path("/nowhere/python")))
    package_index._pip_configuration.cache_clear()
    try:
        assert package_index.index_urls() == ["https://pypi.org/simple"]
    finally:
        package_index._pip_configuration.cache_clear()
