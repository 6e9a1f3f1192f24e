"""What stands beside the checkpoints: config, code, environment and data."""

import dataclasses
import errno
import fcntl
import importlib
import json
import os
import re
import secrets
import socket
import subprocess
import threading
from pathlib import Path

import jax
import pytest

from data_pipelines import file_locks
from dexportrait_jax import code_version, distributed, run_directory
from dexportrait_jax import config as configs
from dexportrait_jax.diffusion.schedule import noise_schedule
from dexportrait_jax.errors import UserError
from dexportrait_jax.run_directory import (
    BEFORE_THE_KEY,
    FREE_KEYS,
    check_nothing_lost,
    check_same_run,
    check_shared,
    claimed,
    compared,
    write_description,
)
from tests.disks import full_disk

ROOT = Path(__file__).resolve().parents[1]


def test_description(tmp_path, capsys):
    config = configs.load_config("configs/autoencoder.py:tiny", [])
    write_description(tmp_path, config, {"train-0": "a", "train-1": "b"})
    write_description(tmp_path, config, {"train-0": "a", "train-1": "b"})
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "config.json").read_text())["stage"] == "autoencoder"
    assert json.loads((tmp_path / "data.json").read_text()) == {"train-0": "a", "train-1": "b"}

    write_description(tmp_path, config, {"train-0": "a", "train-1": "other"})
    said = capsys.readouterr().err
    assert "warning: the data are not those" in said and "(1 shards differ, train-1 first)" in said


def test_every_start_is_kept(tmp_path, capsys, monkeypatch):
    """A start, one after 100 s at step 3, one with other code; then the records are removed, and all begins anew."""
    config, records = configs.load_config("configs/autoencoder.py:tiny", []), "metrics.jsonl"
    monkeypatch.setenv("XLA_FLAGS", "--xla_one")
    assert write_description(tmp_path, config, {}, step=0, began=1000.0) == 0
    (tmp_path / records).write_text('{"step": 1}\n')
    assert write_description(tmp_path, config, {}, step=3, began=1100.5) == 100.5
    assert capsys.readouterr().err == ""
    code = code_version.code_sha256()
    monkeypatch.setattr(code_version, "code_sha256", lambda: "f" * 64)
    assert write_description(tmp_path, config, {}, step=6, began=1200.0) == 200
    (said,) = capsys.readouterr().err.splitlines()
    assert "was started with other code" in said and code[:12] in said and "ffffffffffff" in said

    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 3, 6]
    assert [start["code_sha256"] for start in starts] == [code, code, "f" * 64]
    first = starts[0]
    assert first["started"] == "1970-01-01T00:16:40.000+00:00" and first["XLA_FLAGS"] == "--xla_one"
    assert first["device_kind"] == "cpu" and first["python"].startswith("3.")
    assert first["flax"] and first["optax"] and first["orbax-checkpoint"] and first["jaxlib"]
    assert {"libtpu", "jax", "commit", "devices", "platform", "processes"} <= first.keys()

    (tmp_path / records).unlink()
    assert write_description(tmp_path, config, {}, began=1300.0) == 0
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_the_one_start_that_older_versions_kept(tmp_path):
    config = configs.load_config("configs/autoencoder.py:tiny", [])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {"code_sha256": code_version.code_sha256(), "jax": "0.9"}
    (tmp_path / "environment.json").write_text(json.dumps(before))
    assert write_description(tmp_path, config, {}, step=1, began=1000.0) == 0
    assert write_description(tmp_path, config, {}, step=2, began=1010.0) == 10
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert starts[0] == before and len(starts) == 3


ANIMATOR = "configs/animator_image.py:tiny"


def started_with(tmp_path, config, **changes):
    """A directory with a step of `config`, whose config.json has these keys as well; None takes one away."""
    values = configs.to_json(config)
    for dotted, value in changes.items():
        *groups, key = dotted.split("__")
        node = values
        for group in groups:
            node = node[group]
        node.pop(key, None)
        if value is not None:
            node[key] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')


def test_steps_of_nobody_knows_what_are_told(tmp_path, capsys):
    """Checkpoints that were copied alone are gone on with; whether by what made them cannot be known."""
    config = configs.load_config("configs/autoencoder.py:tiny", [])
    check_same_run(tmp_path, config)
    assert capsys.readouterr().err == ""
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    check_same_run(tmp_path, config)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {tmp_path} holds steps of a run, but no config.json")


def test_a_run_goes_on_in_a_version_that_has_more_keys(tmp_path):
    config = configs.load_config("configs/motion.py:tiny", [])
    started_with(tmp_path, config, loss__pose_leak=None, accumulate=None, report__profile=None)
    check_same_run(tmp_path, config)
    other = configs.load_config("configs/motion.py:tiny", ["loss.pose_leak=0.5"])
    with pytest.raises(UserError, match="before there was config.loss.pose_leak") as said:
        check_same_run(tmp_path, other)
    assert "as 0.0, now it is 0.5; give another --workdir, or --config.loss.pose_leak=0.0" in str(
        said.value
    )


@pytest.mark.parametrize("idle", [[], ["loss.adversarial_start=5"], "cosine"])
def test_where_the_decay_of_a_discriminator_ends_stays_as_it_was(tmp_path, idle):
    """A run from before there was the key keeps its rate; one that it means nothing to just goes on."""
    cosine = ["optim.discriminator.decay=cosine"]
    config = configs.load_config("configs/motion.py:tiny", cosine if idle == "cosine" else idle)
    started_with(tmp_path, config, optim__discriminator__decay_ends_with_run=None)
    check_same_run(tmp_path, config)
    late = [*cosine, "loss.adversarial_start=5"]
    config = configs.load_config("configs/motion.py:tiny", late)
    started_with(tmp_path, config, optim__discriminator__decay_ends_with_run=None)
    key = "config.optim.discriminator.decay_ends_with_run"
    with pytest.raises(UserError, match=f"before there was {key}, which is as False, .*--{key}="):
        check_same_run(tmp_path, config)
    as_before = configs.load_config("configs/motion.py:tiny", [*late, key[7:] + "=False"])
    check_same_run(tmp_path, as_before)
    started_with(tmp_path, as_before)
    check_same_run(tmp_path, config)  # a rate that somebody wants to change may change


def test_what_saves_memory_may_change(tmp_path):
    config = configs.load_config("configs/animator_image.py:tiny", [])
    started_with(tmp_path, config)
    less = configs.load_config("configs/animator_image.py:tiny", ["remat=blocks", "accumulate=4"])
    check_same_run(tmp_path, less)


def test_how_an_export_is_sampled_may_change(tmp_path):
    """A run whose config had an overlap that is refused now has to be able to go on."""
    config = configs.load_config("configs/animator_video.py:tiny", [])
    started_with(tmp_path, config, sampling__overlap=8, sampling__window_ends=None)
    check_same_run(tmp_path, config)


def test_a_schedule_is_the_same_by_name_and_by_keys(tmp_path):
    """As runs from before there were presets gave it."""
    config = configs.load_config("configs/animator_image.py:tiny", [])
    keys = dataclasses.asdict(noise_schedule(config.diffusion.to_dict()))
    started_with(tmp_path, config, diffusion=keys)
    check_same_run(tmp_path, config)
    other = configs.load_config("configs/animator_image.py:tiny", ["diffusion.beta_end=0.02"])
    with pytest.raises(UserError, match="config.diffusion.beta_end=0.012, now it is 0.02"):
        check_same_run(tmp_path, other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"ema_decay": None},
            "was started before there was config.ema_decay, now 0.996; .* write into .*config.json",
        ),
        ({"loss__hinge": 2.0}, "was started with config.loss.hinge=2.0, which this version does"),
        ({"loss": None}, r"before there was config.loss.adversarial, now .* \(and \d+ more\)"),
    ],
)
def test_other_keys_are_an_error_that_names_them(tmp_path, changes, words):
    config = configs.load_config("configs/motion.py:tiny", [])
    started_with(tmp_path, config, **changes)
    with pytest.raises(UserError, match=words) as said:
        check_same_run(tmp_path, config)
    assert "\n" not in str(said.value)


def test_every_key_is_known_to_older_runs():
    """A key that is new says in BEFORE_THE_KEY what runs did before it, or their owners cannot update the code."""
    known = set((ROOT / "tests" / "golden" / "config_keys.txt").read_text().split())
    variants = [
        (name, variant)
        for name in ("motion", "autoencoder", "animator_image", "animator_video")
        for variant in importlib.import_module(f"configs.{name}").VARIANTS
    ]
    now = set()
    for name, variant in variants:
        values = configs.to_json(configs.load_config(f"configs/{name}.py:{variant}"))
        now |= {key for key, _, _ in configs.differences({}, compared(values))}
    new = {key for key in now - known if not key.startswith(FREE_KEYS)}
    assert new <= set(BEFORE_THE_KEY), "put them into run_directory.BEFORE_THE_KEY"
    assert set(BEFORE_THE_KEY) <= now


@pytest.mark.parametrize(
    ("left", "lost"),
    [
        ({"records": True, "folder": False, "saved": False}, True),  # removed, or not copied
        ({"records": True, "folder": True, "saved": True}, True),  # emptied
        ({"records": True, "folder": True, "saved": False}, False),  # ended before its first
        ({"records": False, "folder": False, "saved": True}, False),  # begins anew
    ],
)
def test_a_run_does_not_begin_again_in_silence(tmp_path, left, lost):
    if left["records"]:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    if left["folder"]:
        (tmp_path / "checkpoints").mkdir()
    if left["saved"]:
        (tmp_path / "last_saved.txt").write_text("1\n")
    if lost:
        with pytest.raises(UserError, match="records steps, but there is no checkpoint") as said:
            check_nothing_lost(tmp_path)
        assert "give another --workdir, or remove metrics.jsonl" in str(said.value)
        (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    check_nothing_lost(tmp_path)


def test_a_run_in_the_place_of_one_that_was_removed(tmp_path):
    """As the error about lost checkpoints advises; it may be killed before its own first save, too."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "last_saved.txt").write_text("100\n")
    check_nothing_lost(tmp_path)
    write_description(tmp_path, configs.load_config("configs/autoencoder.py:tiny", []), {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    check_nothing_lost(tmp_path)


def test_a_directory_is_for_one_process(tmp_path, monkeypatch):
    """The error says which one, also after several have asked."""
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.0)
    who = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since 2\d\d\d-\d\d-\d\d \S+"
    words = rf"another process is training in {tmp_path} \({who}\); wait for it or end it$"
    with claimed(tmp_path):
        for _ in range(2):
            with pytest.raises(UserError, match=words), claimed(tmp_path):
                pass
    with claimed(tmp_path):
        assert (tmp_path / ".lock").read_text().count("\n") == 1


@pytest.mark.parametrize("left", [b"", b"\xff\x00", b"process 1 on a since then\nmore"])
def test_whoever_holds_the_directory_may_not_say_who_it_is(tmp_path, monkeypatch, left):
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.0)
    (tmp_path / ".lock").write_bytes(left)
    with (tmp_path / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="another process is training") as said,
            claimed(tmp_path),
        ):
            pass
    assert "\n" not in str(said.value) and "more" not in str(said.value)
    assert (tmp_path / ".lock").read_bytes() == left


def test_a_process_that_is_dying_is_waited_for(tmp_path, capsys):
    """As after a preemption on a shared disk; where it takes its file away at its end, too."""
    for taken_away in (False, True):
        lock = (tmp_path / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on lost since then\n")
        lock.flush()

        def end(lock=lock, taken_away=taken_away):
            if taken_away:
                (tmp_path / ".lock").unlink()
            lock.close()

        threading.Timer(0.2, end).start()
        with claimed(tmp_path):
            (said,) = capsys.readouterr().err.splitlines()
            with (tmp_path / ".lock").open() as again, pytest.raises(BlockingIOError):
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        who = "process 7 on lost since then"
        assert said == f"another process holds {tmp_path} ({who}); waiting up to 120 s for its end"


def test_a_directory_on_a_full_disk_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.0)
    with full_disk(tmp_path / "disk") as disk, claimed(disk):
        assert (disk / ".lock").read_text() == ""
        with pytest.raises(UserError, match="another process is training"), claimed(disk):
            pass


def failing(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with claimed(tmp_path):
        (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {tmp_path} lies where files cannot be locked")


def test_a_second_start_in_a_bucket_is_warned_of(tmp_path, monkeypatch, capsys):
    """Its lock is known to this host alone; here it is refused all the same."""
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.0)
    table = tmp_path / "mounts"
    table.write_text(f"runs {tmp_path} fuse.gcsfuse rw 0 0\n")
    monkeypatch.setattr(file_locks, "MOUNTS", table)
    with claimed(tmp_path):
        (said,) = capsys.readouterr().err.splitlines()
        with pytest.raises(UserError, match="another process is training"), claimed(tmp_path):
            pass
    words = (
        f"warning: {tmp_path} lies where files cannot be locked (fuse.gcsfuse locks them for this "
    )
    assert said.startswith(words) and "nothing keeps a second process from training there" in said


def test_a_lock_that_fails_is_not_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    words = r"cannot lock .*/\.lock: Input/output error; look after"
    with pytest.raises(UserError, match=words) as said, claimed(tmp_path / "run"):
        pass
    assert "\n" not in str(said.value)


@pytest.fixture(params=[True, False], ids=["main", "other"])
def host(request, monkeypatch):
    """One of two, the main one or not; the main one's number is 7. Gives what the other one sees."""
    others = [True]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "is_main", lambda: request.param)
    monkeypatch.setattr(secrets, "randbelow", lambda _: 7 if request.param else 8)
    monkeypatch.setattr(distributed, "from_main", lambda mine: [7])
    monkeypatch.setattr(distributed, "everywhere", lambda seen: seen and others[0])
    return request.param, others


def test_hosts_that_share_the_directory(tmp_path, host):
    if not host[0]:
        threading.Timer(0.3, (tmp_path / ".shared7").touch).start()
    check_shared(tmp_path)
    assert list(tmp_path.glob(".shared*")) == [] or not host[0]


def test_the_name_is_told_once_it_is_there(tmp_path, host, monkeypatch):
    """Whoever looks before remembers for a while, on NFS, that there is nothing."""
    there = []

    def tell(mine):
        there.extend(path.name for path in tmp_path.iterdir())
        (tmp_path / ".shared7").touch()
        return [7]

    monkeypatch.setattr(distributed, "from_main", tell)
    check_shared(tmp_path)
    assert there == ([".shared7"] if host[0] else [])


def test_hosts_that_do_not_share_the_directory(tmp_path, host):
    """All are told, also those that see what they wrote themselves."""
    host[1][:] = [not host[0]]
    with pytest.raises(UserError, match=f"--workdir={tmp_path} is another directory") as said:
        check_shared(tmp_path, seconds=0.2)
    assert "all hosts share" in str(said.value) and "\n" not in str(said.value)
    assert list(tmp_path.iterdir()) == []


def test_a_process_alone_shares_with_itself(tmp_path):
    check_shared(tmp_path, seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_commit_is_gits():
    asked = ("git", "-C", str(ROOT), "rev-parse", "HEAD")
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:  # a copy without its history
        assert code_version.commit() == ""
    else:
        assert code_version.commit().removesuffix("+") == done.stdout.strip()


def test_code_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(code_version, "_ROOT", tmp_path)
    file = tmp_path / "configs" / "a.py"
    file.parent.mkdir()
    found = []
    for text in ("x = 1\n", "x = 2\n", "x = 1\n"):
        file.write_text(text)
        code_version.code_sha256.cache_clear()
        found.append(code_version.code_sha256())
    code_version.code_sha256.cache_clear()
    assert found[0] == found[2] != found[1]


def test_data_and_latents_may_lie_elsewhere(tmp_path):
    """Moved together; whose latents they are is checked where they are opened."""
    config = configs.load_config(ANIMATOR, ["data.latents=/old/latents", "data.path=/old/data"])
    started_with(tmp_path, config)
    moved = ["data.latents=/new/latents", "data.path=/new/data", "data.cache_megabytes=64"]
    check_same_run(tmp_path, configs.load_config(ANIMATOR, moved))
    for before, now in (("/old/latents", ""), ("", "/new/latents")):
        started_with(tmp_path, configs.load_config(ANIMATOR, [f"data.latents={before}"]))
        with pytest.raises(UserError, match="config.data.latents"):
            check_same_run(tmp_path, configs.load_config(ANIMATOR, [f"data.latents={now}"]))
