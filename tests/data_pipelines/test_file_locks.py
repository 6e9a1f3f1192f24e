"""Which locks of files keep out whom: by the table of what is mounted, and by what is done where they do not."""

import pytest

from data_pipelines import file_locks, files
from data_pipelines.file_locks import file_system, try_lock
from dexportrait_jax.errors import UserError

TABLE = r"""proc /proc proc rw,relatime 0 0
/dev/sda1 / ext4 rw 0 0
runs {top}/bucket fuse.gcsfuse rw 0 0
/dev/sdb1 {top}/bucket/disk xfs rw 0 0
s3 {top}/a\040bucket\134 fuse rw 0 0
/dev/sdc1 {top}/usb fuseblk rw 0 0
old {top}/twice fuse.sshfs rw 0 0
new {top}/twice nfs4 rw 0 0
"""


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """A system that has these mounted below `tmp_path`."""
    table = tmp_path / "mounts"
    table.write_text(TABLE.format(top=tmp_path))
    monkeypatch.setattr(file_locks, "MOUNTS", table)
    for name in ("bucket", "usb"):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("run", "ext4"),
        ("bucket", "fuse.gcsfuse"),
        ("bucket/run/.lock", "fuse.gcsfuse"),
        ("buckets/run", "ext4"),
        ("bucket/disk/run", "xfs"),
        ("bucket/disk/../run", "fuse.gcsfuse"),
        ("a bucket\\/run", "fuse"),
        ("usb/run", "fuseblk"),
        ("twice/run", "nfs4"),
        ("linked/run", "fuse.gcsfuse"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path, mounts, path, kind):
    (tmp_path / "linked").symlink_to(tmp_path / "bucket")
    assert file_system(tmp_path / path) == kind


def test_where_nothing_says_what_is_mounted(tmp_path, monkeypatch):
    monkeypatch.setattr(file_locks, "MOUNTS", tmp_path / "none")
    assert file_system(tmp_path) == ""


def test_here_something_says_it():
    assert file_system(file_locks.MOUNTS) == "proc"


@pytest.mark.parametrize(
    ("place", "why"), [("bucket", "fuse.gcsfuse locks them for this host alone"), ("usb", "")]
)
def test_a_lock_keeps_others_of_this_host_out_everywhere(tmp_path, mounts, place, why):
    path = tmp_path / place / "file"
    with path.open("w") as one, path.open() as other:
        assert try_lock(one, path) == why
        with pytest.raises(BlockingIOError):
            try_lock(other, path)


def test_nothing_of_another_host_is_cleared_up_in_a_bucket(tmp_path, mounts, capsys):
    """It may be at work there, which no lock tells."""
    for place, told in (("usb", ["note: removed .out.incomplete-7"]), ("bucket", ["warning: "])):
        out = tmp_path / place / "out"
        left = out.with_name(".out.incomplete-7")
        left.mkdir()
        with (
            files.alone_at(out),
            pytest.raises(UserError, match="another job is making"),
            files.alone_at(out),
        ):
            pass
        said = capsys.readouterr().err.splitlines()
        assert [line.startswith(words) for line, words in zip(said, told, strict=True)] == [True]
        assert left.exists() == (place == "bucket")
    why = "lies where files cannot be locked (fuse.gcsfuse locks them for this host alone); nothing"
    assert why in said[0]


def test_nor_what_is_written_beside_a_file_in_a_bucket(tmp_path, mounts, capsys):
    for place in ("usb", "bucket"):
        out = tmp_path / place / "out"
        left = out.with_name(".out.tmp-7")
        left.touch()
        with files.temporary_beside(out):
            pass
        assert left.exists() == (place == "bucket")
        assert capsys.readouterr().err.count("removed") == (place == "usb")
