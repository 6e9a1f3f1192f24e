"""Files of published packages from a package index, without installing or running anything.

Speaks the simple API that pip speaks (PEP 503 HTML and PEP 691 JSON, also as ``file://``
directories), with pip's indexes: ``PIP_INDEX_URL``, ``PIP_EXTRA_INDEX_URL``, pip's configuration
files, else pypi.org. HTTPS is checked against the system's certificates and the ones pip is told to
use; proxies are those of the environment. Needs the standard library alone.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import html.parser
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
_DEFAULT_INDEX = "https://pypi.org/simple"
_ACCEPT = ", ".join(
    (
        "application/vnd.pypi.simple.v1+json",
        "application/vnd.pypi.simple.v1+html;q=0.2",
        "text/html;q=0.1",
    )
)
_BLOCK = 1 << 20

# Hosts that did not answer are not asked again by this process: without a network every asset
# would wait for the same silence.
_silent_hosts: set[str] = set()


class Unavailable(Exception):
    """A source does not have the file, or cannot be reached; the message is one line."""


class BrokenOff(Unavailable):
    """A transfer began and did not end: worth another try."""


@dataclass(frozen=True)
class PackageFile:
    """A file of a project as an index lists it."""

    filename: str
    url: str
    sha256: str | None


def index_urls() -> list[str]:
    """pip's indexes, local directories first; empty when pip is told to use none."""
    settings = _pip_settings()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    urls = [
        settings.get("index-url") or _DEFAULT_INDEX,
        *settings.get("extra-index-url", "").split(),
    ]
    unique = list(dict.fromkeys(url.rstrip("/") for url in urls))
    return sorted(unique, key=lambda url: not url.startswith("file:"))


def find(index: str, project: str, filename: str) -> PackageFile:
    """The entry of one file of a project on an index; raises Unavailable."""
    page = f"{index}/{re.sub(r'[-_.]+', '-', project).lower()}/"
    for entry in _entries(page):
        # A page from the network must not point at files of this machine.
        local = entry.url.startswith("file:") and not index.startswith("file:")
        if entry.filename == filename and not local:
            return entry
    raise Unavailable(f"{redacted(page)} does not list {filename}")


def download(url: str, target: Path, expected_sha256: str | None = None) -> str:
    """Fetch a URL (http, https or file) into ``target`` and return its sha256.

    Raises Unavailable when it cannot be had whole or, with a hash given, is another file. Errors
    of the disk are left as they are.
    """
    digest = hashlib.sha256()
    with open_url(url) as response, target.open("wb") as file:
        length = response.headers.get("Content-Length")
        received = 0
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise BrokenOff(f"{redacted(url)} broke off: {_reason(error)}") from error
            if not block:
                break
            received += len(block)
            digest.update(block)
            file.write(block)
    if length is not None and str(received) != length.strip():
        raise BrokenOff(f"{redacted(url)} broke off after {received} of {length} bytes")
    if expected_sha256 and digest.hexdigest() != expected_sha256:
        raise Unavailable(
            f"{redacted(url)} has sha256 {digest.hexdigest()}, the index says {expected_sha256}"
        )
    return digest.hexdigest()


def open_url(url: str, accept: str = "*/*") -> IO[bytes]:
    """Open a URL for reading; raises Unavailable, also when no answer begins in time."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("https", "http", "file"):
        raise Unavailable(f"{redacted(url)} is not an address of http, https or file")
    if parts.netloc in _silent_hosts:
        raise Unavailable(f"{parts.hostname} did not answer")
    request = urllib.request.Request(_without_login(url), headers={"Accept": accept})
    request.add_header("User-Agent", "dexportrait")
    if parts.username:
        login = (
            f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        )
        token = base64.b64encode(login.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(_opener().open(request, timeout=READ_SECONDS))
        except Exception as error:  # handed over to the caller's thread
            answer.append(error)

    # In a thread, because a timeout of sockets holds for one address at a time and not for the
    # name server: a host with many addresses, or none, would keep us waiting for minutes.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not answer:
        _silent_hosts.add(parts.netloc)
        raise Unavailable(f"{parts.hostname} did not answer within {CONNECT_SECONDS:.0f} s")
    error = answer[0]
    if not isinstance(error, Exception):
        return error
    if isinstance(error, urllib.error.HTTPError):
        raise Unavailable(f"{redacted(url)} answered {error.code} {error.reason}") from error
    if isinstance(error, (OSError, http.client.HTTPException, ValueError)):
        if parts.scheme != "file":
            _silent_hosts.add(parts.netloc)
        raise Unavailable(f"{redacted(url)}: {_reason(error)}") from error
    raise error


def redacted(url: str) -> str:
    """A URL fit to be shown: without the login it may hold."""
    return _without_login(url)


def _entries(page: str) -> Iterator[PackageFile]:
    """All files on a project's page."""
    if page.startswith("file:"):
        # A directory has no server to pick a form of the page.
        candidates = [page + "index.json", page + "index.html"]
    else:
        candidates = [page]
    failure: Unavailable | None = None
    for url in candidates:
        try:
            with open_url(url, _ACCEPT) as response:
                text = response.read().decode("utf-8", "replace")
                kind = response.headers.get_content_type()
                base = _with_login_of(page, response.url or url)
        except Unavailable as error:
            failure = error
            continue
        except (OSError, http.client.HTTPException) as error:
            failure = Unavailable(f"{redacted(url)} broke off: {_reason(error)}")
            continue
        try:
            if kind.endswith("json"):
                yield from _json_entries(text, base)
            else:
                yield from _html_entries(text, base)
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"{redacted(url)} is not a page of a package index") from error
        return
    raise failure or Unavailable(f"{redacted(page)} is not there")


def _json_entries(text: str, base: str) -> Iterator[PackageFile]:
    for entry in json.loads(text)["files"]:
        sha256 = entry.get("hashes", {}).get("sha256")
        yield PackageFile(entry["filename"], urllib.parse.urljoin(base, entry["url"]), sha256)


def _html_entries(text: str, base: str) -> Iterator[PackageFile]:
    links = _Links()
    links.feed(text)
    for reference in links.references:
        url, _, fragment = urllib.parse.urljoin(
            urllib.parse.urljoin(base, links.base), reference
        ).partition("#")
        sha256 = fragment[len("sha256=") :] if fragment.startswith("sha256=") else None
        filename = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1])
        yield PackageFile(filename, url, sha256)


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.base = ""
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        reference = dict(attrs).get("href")
        if reference and tag == "a":
            self.references.append(reference)
        elif reference and tag == "base":
            self.base = reference


@functools.cache
def _pip_configuration() -> dict[str, str]:
    """What pip's configuration files say, later sections first; empty where there is no pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        # Configuration files alone: the environment is asked directly, as it can change.
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("PIP_") or key == "PIP_CONFIG_FILE"
        }
        listing = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env=environment
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    settings: dict[str, str] = {}
    for section in ("global", "install"):
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(f"{section}."):
                try:
                    settings[key[len(section) + 1 :]] = str(ast.literal_eval(value))
                except (ValueError, SyntaxError):
                    continue
    return settings


def _pip_settings() -> dict[str, str]:
    settings = dict(_pip_configuration())
    for key in ("index-url", "extra-index-url", "no-index", "cert", "proxy"):
        value = os.environ.get("PIP_" + key.upper().replace("-", "_"))
        if value is not None:
            settings[key] = value
    return settings


def _opener() -> urllib.request.OpenerDirector:
    settings = _pip_settings()
    context = ssl.create_default_context()
    extra = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE")
    if extra and Path(extra).is_file():
        context.load_verify_locations(extra)
    handlers: list[Any] = [urllib.request.HTTPSHandler(context=context)]
    if settings.get("proxy"):
        proxy = settings["proxy"]
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    return urllib.request.build_opener(*handlers)


def _without_login(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _with_login_of(page: str, url: str) -> str:
    """``url`` with the login of ``page`` when both are on one host, as files mostly are."""
    login, _, host = urllib.parse.urlsplit(page).netloc.rpartition("@")
    parts = urllib.parse.urlsplit(url)
    if login and parts.netloc == host:
        return urllib.parse.urlunsplit(parts._replace(netloc=f"{login}@{host}"))
    return url


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    reason = getattr(reason, "strerror", None) or reason
    return " ".join(str(reason).split()) or type(error).__name__
