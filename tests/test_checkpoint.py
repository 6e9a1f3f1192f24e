"""Checkpoints alone, of a State of a few numbers: damage, a full disk, another mesh, parts, versions."""

import errno
import gc
import json
import os
import shutil
import time
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from dexportrait_jax import (
    checkpoint,
    checkpoint_format,
    checkpoint_groups,
    distributed,
    sharding,
)
from dexportrait_jax.checkpoint import Checkpoints
from dexportrait_jax.errors import UserError
from tests.disks import small_disk

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Nobody waits before a checkpoint is read again; gives how long one would have waited."""
    waited = []
    clock = types.SimpleNamespace(sleep=waited.append, monotonic=lambda: sum(waited))
    monkeypatch.setattr(checkpoint, "time", clock)
    return waited


def mesh(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2)


def placed(tree, over, *axes):
    """The tree on a mesh, its arrays spread over `axes` where they have as many."""

    def put(leaf):
        spec = PartitionSpec(*axes) if leaf.ndim == len(axes) else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(over, spec))

    return jax.tree.map(put, tree)


def state_of(step):
    # Noise: what takes less than 1 KiB of a device once it is compressed, Orbax puts into its index.
    kernel = np.random.default_rng(step).random((64, 64), np.float32)
    params = {"encoder": {"kernel": kernel}, "decoder": {"bias": kernel[0]}}
    return {
        "step": np.int32(step),
        "params": params,
        "opt": {"adam": {"mu": kernel / 2}},
        "ema": {"encoder": {"kernel": kernel - 1}},
    }


def shapes(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4, spread over data=4, fsdp=2."""
    workdir = tmp_path_factory.mktemp("checkpoints") / "run"
    checkpoints = Checkpoints(workdir)
    for step in (2, 4):
        checkpoints.save(step, placed(state_of(step), mesh(data=4, fsdp=2), "fsdp", "data"))
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps({"stage": "motion"}))
    return workdir


@pytest.fixture
def run(saved_run, tmp_path):
    return shutil.copytree(saved_run, tmp_path / "run")


ABSTRACT = shapes(jax.tree.map(jnp.asarray, state_of(0)))


def restored(workdir, abstract=ABSTRACT):
    checkpoints = Checkpoints(workdir)
    try:
        found = checkpoints.restore(abstract)
        if found:
            checkpoints.set_aside_after(found[0])
        return found
    finally:
        checkpoints.close()


def cut(name, size):
    """Cuts the files of a checkpoint whose name or place ends so."""

    def damage(place):
        found = [file for file in place.rglob(name) if file.is_file()]
        assert found
        for file in found:
            file.write_bytes(file.read_bytes()[:size])

    return damage


def zeroed(place):
    """Files of the right length with nothing in them, as after a loss of power."""
    for file in place.rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))


def file_of_arrays(place):
    """Where the numbers of a checkpoint are, beside files of their index."""
    file = max(place.rglob("d/*"), key=lambda path: path.stat().st_size)
    assert file.stat().st_size > 32 << 10  # three of 16 KiB, compressed by less than a third
    return file


def flipped(place):
    file = file_of_arrays(place)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(place):
    shutil.rmtree(place)
    place.mkdir()


DAMAGES = {
    "arrays cut": cut("d/*", 100),
    "arrays empty": cut("d/*", 0),
    "arrays zeroed": zeroed,
    "tree cut": cut("_METADATA", 100),
    "index cut": cut("manifest.ocdbt", 10),
    "description cut": cut("_CHECKPOINT_METADATA", 20),
    "description gone": lambda place: (place / "_CHECKPOINT_METADATA").unlink(),
    "arrays gone": lambda place: shutil.rmtree(place / "state" / "d"),
    "state gone": lambda place: shutil.rmtree(place / "state"),
    "nothing left": empty,
}


@pytest.mark.parametrize("damage", [*DAMAGES.values(), flipped], ids=[*DAMAGES, "a bit flipped"])
def test_damage_to_the_newest_costs_no_more_than_the_newest(run, damage, capsys):
    damage(run / "checkpoints" / "4")
    step, state = restored(run)
    assert_equal(state, state_of(step))
    said = capsys.readouterr().err
    if step == 2:
        assert "checkpoint 4 cannot be read: " in said
        assert (run / "unreadable_checkpoint_4").is_dir()
    else:
        assert step == 4 and said == ""
    # What was set aside is out of the way of the same step, saved anew.
    checkpoints = Checkpoints(run)
    checkpoints.save(4, placed(state_of(4), mesh(data=4, fsdp=2), "fsdp"))
    checkpoints.close()
    assert restored(run)[0] == 4


def failing_at_first(monkeypatch, times, error):
    """The first reads fail; gives the steps that were asked for."""
    asked, load = [], ocp.load

    def unreliable(place, *arguments, **named):
        asked.append(int(place.name))
        if len(asked) <= times:
            raise error
        return load(place, *arguments, **named)

    monkeypatch.setattr(ocp, "load", unreliable)
    return asked


STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.mark.parametrize("times", [1, 2])
def test_a_read_that_fails_for_a_while_costs_no_checkpoint(run, monkeypatch, pauses, capsys, times):
    asked = failing_at_first(monkeypatch, times, STALE)
    step, state = restored(run)
    assert step == 4 and asked == [4] * (times + 1)
    assert_equal(state, state_of(4))
    said = capsys.readouterr().err.splitlines()
    words = "checkpoint 4 could not be read ([Errno 116] Stale file handle); trying again in "
    assert said == [f"{words}{seconds} s" for seconds in (5, 30)[:times]]
    assert pauses == [5, 30][:times]
    assert (run / "checkpoints" / "4").is_dir() and not list(run.glob("unreadable*"))


def test_a_read_that_fails_three_times_costs_the_newest(run, monkeypatch, capsys):
    assert restored(run)[0] == 4
    asked = failing_at_first(monkeypatch, 3, STALE)
    assert restored(run)[0] == 2 and asked == [4, 4, 4, 2]
    assert "checkpoint 4 cannot be read: [Errno 116] Stale file handle" in capsys.readouterr().err
    assert (run / "unreadable_checkpoint_4").is_dir()


def test_all_that_cannot_be_read_is_set_aside_each_under_its_own_name(run):
    """Also where a checkpoint of that step was set aside before."""
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "6")
    for name in ("unreadable_checkpoint_6", "unreadable_checkpoint_6_2"):
        (run / name).mkdir()
    for step in ("4", "6"):
        cut("d/*", 0)(run / "checkpoints" / step)
    assert restored(run)[0] == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]
    assert (run / "unreadable_checkpoint_4" / "state").is_dir()
    assert (run / "unreadable_checkpoint_6_3" / "state").is_dir()
    assert not list((run / "unreadable_checkpoint_6").iterdir())


@pytest.mark.parametrize(
    "damage", ["arrays cut", "arrays zeroed", "tree cut", "index cut", "flipped"]
)
def test_damage_is_tried_again_but_not_waited_for(run, pauses, damage):
    DAMAGES.get(damage, flipped)(run / "checkpoints" / "4")
    assert restored(run)[0] == 2 and pauses == [5]


@pytest.mark.parametrize(("answers", "step"), [([False, True, True], 4), ([False, True] * 3, 2)])
def test_all_try_again_where_one_cannot_read_its_part(run, monkeypatch, pauses, answers, step):
    """This process can, each time. They agree after each attempt on whether all have it, and whether to go on."""
    left = list(answers)
    monkeypatch.setattr(distributed, "everywhere", lambda holds: left.pop(0) if left else holds)
    checkpoints = Checkpoints(run)
    found, state = checkpoints.restore(ABSTRACT)
    checkpoints.close()
    assert found == step and left == []
    assert_equal(state, state_of(step))
    assert pauses == ([5, 30] if step == 2 else [5])


@pytest.mark.parametrize(("shown_after", "found"), [(0, 4), (60, 4), (600, 2)])
def test_a_checkpoint_that_one_process_sees_later_than_the_main_one(
    run, monkeypatch, pauses, capsys, shown_after, found
):
    """NFS keeps what it knows of a folder for up to a minute: nobody votes against a checkpoint before that."""
    newest, hidden = run / "checkpoints" / "4", run / "hidden"
    newest.rename(hidden)
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [2]
    reload = checkpoints._checkpointer.reload

    def look_again():
        if sum(pauses) >= shown_after and hidden.exists():
            hidden.rename(newest)
        reload()

    monkeypatch.setattr(checkpoints._checkpointer, "reload", look_again)
    monkeypatch.setattr(distributed, "from_main", lambda mine: [2, 4])
    step, _ = checkpoints.restore(ABSTRACT)
    checkpoints.close()
    assert step == found
    said = capsys.readouterr().err
    assert said == "" if found == 4 else "checkpoint 4 cannot be read: " in said
    assert sum(pauses) == (shown_after if found == 4 else checkpoint.SHOWN_WITHIN + 5 + 30)


def test_an_array_is_read_as_it_was_written_or_not_at_all(run):
    """A bit flipped anywhere in the file of arrays is noticed by whoever reads the array that it is in."""
    file = file_of_arrays(run / "checkpoints" / "4")
    whole, steps = file.read_bytes(), set()
    for position in np.random.default_rng(0).integers(len(whole), size=12):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        file.write_bytes(data)
        for part in ("params", "ema"):
            _, step, groups = checkpoint_groups.load_groups(run, ["encoder"], average=part == "ema")
            assert_equal(groups["encoder"], state_of(step)[part]["encoder"])
            steps.add(step)
    assert steps == {2, 4}


def test_arrays_without_checksums_are_read(tmp_path, monkeypatch):
    """As those that were saved before there were any."""
    make = tensorstore_utils._build_zarr3_metadata
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "arrays_with_checksums", lambda: None)
        patch.setattr(
            tensorstore_utils, "_build_zarr3_metadata", getattr(make, "__wrapped__", make)
        )
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(2, placed(state_of(2), mesh(data=4, fsdp=2), "fsdp", "data"))
        checkpoints.close()
    assert_equal(restored(tmp_path)[1], state_of(2))


def test_a_deleted_newest_leaves_the_one_before(run):
    shutil.rmtree(run / "checkpoints" / "4")
    step, state = restored(run)
    assert step == 2
    assert_equal(state, state_of(2))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_nothing_readable_is_an_error_for_all_who_ask(run, damage):
    shutil.rmtree(run / "checkpoints" / "2")
    damage(run / "checkpoints" / "4")
    try:
        assert restored(run)[0] == 4  # this damage does no harm
    except UserError as error:
        assert "none of the checkpoints in" in str(error) and "\n" not in str(error)
        with pytest.raises(UserError, match="none of the checkpoints"):
            checkpoint_groups.load_groups(run)
    assert (run / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize(
    ("seen", "step", "said"),
    [
        ([2], 2, ""),  # it does not see the newest yet
        ([2, 4, 6], 4, "checkpoint 6 could not be read ("),  # this process does not
        ([], None, ""),
    ],
)
def test_the_main_process_says_which_checkpoints_there_are(
    run, seen, step, said, monkeypatch, capsys
):
    """Or two whose file system shows them different ones would go on from different steps."""
    monkeypatch.setattr(distributed, "from_main", lambda mine: seen if mine == [2, 4] else mine)
    checkpoints = Checkpoints(run)
    found = checkpoints.restore(ABSTRACT)
    checkpoints.close()
    assert (found[0] if found else None) == step
    assert capsys.readouterr().err.startswith(said)
    if found:
        assert_equal(found[1], state_of(step))


def test_what_is_saved_is_told_before_anything_is_asked(tmp_path):
    """Or a run would begin again in silence that loses its only checkpoint before the next save."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, placed(state_of(2), mesh(data=4, fsdp=2), "fsdp", "data"))
    until = time.monotonic() + 60
    while not (told := tmp_path / "last_saved.txt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert told.read_text() == "2\n" and checkpoint_format.newest_step(tmp_path) == 2
    checkpoints.close()


def test_a_save_that_failed_is_not_told(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def refuse(*_, **__):
        raise STALE

    monkeypatch.setattr(checkpoints._checkpointer._manager, "_finalize_checkpoint", refuse)
    checkpoints.save(2, placed(state_of(2), mesh(data=4, fsdp=2), "fsdp", "data"))
    with pytest.raises(UserError, match="Stale file handle"):
        checkpoints.wait()
    time.sleep(0.2)
    assert not (tmp_path / "last_saved.txt").exists()


def test_a_save_that_was_killed_is_no_checkpoint(run):
    half = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "4", half)
    assert restored(run)[0] == 4
    assert not half.exists()


def test_what_a_killed_save_left_and_cannot_be_removed_stops_no_save(run, monkeypatch, capsys):
    """As on NFS, while another host holds a file of it."""
    half = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "4", half)
    held = str(half / "_CHECKPOINT_METADATA")
    remove = os.unlink

    def unlink(path, **named):
        if str(path) not in (held, Path(held).name):
            remove(path, **named)

    monkeypatch.setattr(os, "unlink", unlink)
    checkpoints = Checkpoints(run, keep=9)
    checkpoints.save(8, placed(state_of(8), mesh(data=4, fsdp=2), "fsdp"))
    checkpoints.close()
    assert half.exists()
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {half} is left") and said.count("\n") == 1
    assert checkpoint_format.newest_step(run) == 8


def test_a_save_that_cannot_be_begun_is_tried_again(tmp_path, monkeypatch, capsys):
    checkpoints = Checkpoints(tmp_path)
    state = placed(state_of(2), mesh(data=4, fsdp=2), "fsdp")
    failing_to_begin(checkpoints, monkeypatch, 1)
    checkpoints.save(2, state)
    checkpoints.save(4, state)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: checkpoint 2 was not saved (cannot write ")
    assert said.endswith("trying again at step 4") and checkpoints.steps() == [4]
    failing_to_begin(checkpoints, monkeypatch, 2)
    checkpoints.save(6, state)
    with pytest.raises(UserError, match="Stale file handle"):
        checkpoints.save(8, state)


def test_a_full_disk_keeps_what_was_saved(tmp_path):
    state = placed(state_of(2), mesh(data=4, fsdp=2), "fsdp")
    grown = state | {"opt": jax.device_put(np.random.default_rng(0).random((1024, 1024)))}
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        checkpoints = Checkpoints(disk / "run")
        checkpoints.save(2, state)
        checkpoints.wait()
        with pytest.raises(UserError, match="the disk is full; free some space"):
            checkpoints.save(4, grown)
            checkpoints.wait()
        step, found = restored(disk / "run")
        assert step == 2
        assert_equal(found, state_of(2))
        assert (disk / "run" / "last_saved.txt").read_text() == "2\n"


def test_a_save_that_failed_does_not_stop_the_next(tmp_path, capsys):
    """A disk that is full for a while: what could not be written is a warning once the next save is written."""
    state = placed(state_of(2), mesh(data=4, fsdp=2), "fsdp")
    grown = state | {"opt": jax.device_put(np.random.default_rng(0).random((1024, 1024)))}
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        checkpoints = Checkpoints(disk / "run")
        checkpoints.save(2, grown)
        checkpoints.save(4, state)
        checkpoints.close()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "warning: checkpoint 2 was not saved (cannot write" in said
        assert "the disk is full" in said and "trying again at step 4" in said
        # Nor does what was written of it take room from the next.
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["4"]
        assert restored(disk / "run")[0] == 4


def test_saves_that_failed_leave_no_old_checkpoint_behind(tmp_path):
    """Of two to keep, with every other save on a full disk: each that is written takes the oldest away."""
    state = placed(state_of(2), mesh(data=4, fsdp=2), "fsdp")
    grown = state | {"opt": jax.device_put(np.random.default_rng(0).random((1024, 1024)))}
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        checkpoints = Checkpoints(disk / "run", keep=2)
        checkpoints.save(1, state)
        for step in (2, 4, 6, 8):
            checkpoints.save(step, state)
            checkpoints.save(step + 1, grown)
        checkpoints.save(10, state)
        assert checkpoints.steps() == [8, 10]
        checkpoints.close()
        held = {path.name for path in (disk / "run" / "checkpoints").iterdir()}
        assert held == {"8", "10"}


def test_two_saves_that_fail_in_a_row_are_an_error_at_once(tmp_path, monkeypatch, capsys):
    """With a save that fails behind one's back, as a bucket's does; the second is waited for."""
    checkpoints = Checkpoints(tmp_path)
    state = placed(state_of(2), mesh(data=4, fsdp=2), "fsdp")
    started, answers = (
        [],
        [OSError("no answer"), OSError("none again"), None, OSError("third"), None],
    )

    def wait():
        if error := answers.pop(0):
            raise error

    inner = checkpoints._checkpointer
    monkeypatch.setattr(inner, "wait", wait)

    def save_async(step, *_, **__):
        started.append(step)
        return types.SimpleNamespace(on_complete=lambda told: None)

    monkeypatch.setattr(inner, "save_async", save_async)
    checkpoints.save(1, state)
    with pytest.raises(OSError, match="none again"):
        checkpoints.save(2, state)
    assert started == [1, 2]
    checkpoints.save(3, state)
    checkpoints.save(4, state)  # the third was written
    checkpoints.save(5, state)  # the fourth was not, the fifth is
    assert started == [1, 2, 3, 4, 5] and answers == []
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].endswith("checkpoint 1 was not saved (no answer); trying again at step 2")
    assert said[1].endswith("checkpoint 4 was not saved (third); trying again at step 5")


def failing_to_begin(checkpoints, monkeypatch, times):
    """The first saves cannot be begun."""
    begin, failures = checkpoints._checkpointer.save_async, [STALE] * times

    def save_async(*arguments, **named):
        if failures:
            raise failures.pop()
        return begin(*arguments, **named)

    monkeypatch.setattr(checkpoints._checkpointer, "save_async", save_async)


@pytest.mark.parametrize(("times", "saved"), [(0, 6), (1, 6), (2, 4)])
def test_the_last_save_is_tried_once_more(run, monkeypatch, capsys, times, saved):
    """And where that fails too, an older checkpoint will do for a run that is stopped."""
    checkpoints = Checkpoints(run)
    _, state = checkpoints.restore(ABSTRACT)
    failing_to_begin(checkpoints, monkeypatch, times)
    assert checkpoints.finish(6, state, older_will_do=True) == saved
    assert checkpoint_format.newest_step(run) == saved
    said = capsys.readouterr().err
    assert said.count("warning: checkpoint 6 was not saved (cannot write ") == min(times, 1)
    assert said.count("warning: step 6 could not be saved: cannot write ") == (times == 2)


@pytest.mark.parametrize(("older", "older_will_do"), [(True, False), (False, True)])
def test_a_last_save_that_fails_twice_is_an_error_where_none_older_will_do(
    tmp_path, monkeypatch, older, older_will_do
):
    checkpoints = Checkpoints(tmp_path)
    state = placed(state_of(2), mesh(data=4, fsdp=2), "fsdp")
    if older:
        checkpoints.save(2, state)
        checkpoints.wait()
    failing_to_begin(checkpoints, monkeypatch, 2)
    with pytest.raises(UserError, match="Stale file handle"):
        checkpoints.finish(4, state, older_will_do)
    checkpoints.close()


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [({"data": 8, "fsdp": 1}, ("data",)), ({"context": 2, "tensor": 4}, (None, "tensor"))],
)
def test_onto_another_mesh(saved_run, sizes, axes):
    abstract = shapes(placed(state_of(0), mesh(**sizes), *axes))
    step, state = restored(saved_run, abstract)
    assert step == 4
    assert_equal(state, state_of(4))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, abstract))


def test_averages_and_single_groups_without_the_rest(run, capsys):
    config, step, groups = checkpoint_groups.load_groups(run)
    wanted = state_of(4)
    assert (config["stage"], step) == ("motion", 4)
    assert_equal(
        groups, {"encoder": wanted["ema"]["encoder"], "decoder": wanted["params"]["decoder"]}
    )
    cut("d/*", 100)(run / "checkpoints" / "4")
    _, step, groups = checkpoint_groups.load_groups(run)
    assert step == 2 and "checkpoint 4 cannot be read" in capsys.readouterr().err
    assert_equal(groups["encoder"], state_of(2)["ema"]["encoder"])


@pytest.mark.parametrize(
    ("groups", "average", "read"),
    [
        (None, True, {"ema/encoder/kernel", "params/decoder/bias"}),
        (None, False, {"params/encoder/kernel", "params/decoder/bias"}),
        (["encoder"], True, {"ema/encoder/kernel"}),
        (["encoder"], False, {"params/encoder/kernel"}),
        (["decoder"], True, {"params/decoder/bias"}),
    ],
)
def test_no_more_is_read_than_was_asked_for(saved_run, monkeypatch, groups, average, read):
    asked, load = [], ocp.load

    def noting(place, wanted, **options):
        leaves = jax.tree_util.tree_flatten_with_path(wanted)[0]
        asked.extend(sharding.path_name(path) for path, _ in leaves)
        return load(place, wanted, **options)

    monkeypatch.setattr(ocp, "load", noting)
    gc.collect()  # of arrays that errors of other tests still hold
    on_devices = len(jax.live_arrays())
    _, _, found = checkpoint_groups.load_groups(saved_run, groups, average)
    assert set(asked) == read and len(jax.live_arrays()) == on_devices
    wanted = state_of(4)
    for name in read:
        part, group, leaf = name.split("/")
        assert type(found[group][leaf]) is np.ndarray
        np.testing.assert_array_equal(found[group][leaf], wanted[part][group][leaf])


def test_a_group_that_is_not_there(saved_run):
    with pytest.raises(UserError, match="no group 'encodre'; it has decoder, encoder"):
        checkpoint_groups.load_groups(saved_run, ["encodre"])


def described(run, **changes):
    """Changes what checkpoint 4 says of who wrote it."""
    file = run / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    text = json.loads(file.read_text())
    text["custom_metadata"] = text["custom_metadata"] | changes if changes else {}
    file.write_text(json.dumps(text))


def test_checkpoints_say_which_version_wrote_them(run):
    with ocp.training.Checkpointer(run / "checkpoints") as checkpointer:
        said = checkpointer.metadata(4).custom_metadata
    assert said["schema"] == checkpoint_format.SCHEMA and said["dexportrait_jax"]
    assert len(said["code_sha256"]) == 64
    described(run)  # as before there was a schema
    assert_equal(restored(run)[1], state_of(4))
    assert checkpoint_groups.load_groups(run)[1] == 4


@pytest.mark.parametrize("schema", [0, 7])
@pytest.mark.parametrize("read", [restored, checkpoint_groups.load_groups])
def test_another_schema_names_its_version(run, read, schema):
    described(run, schema=schema, dexportrait_jax="9.8")
    words = rf"was written by dexportrait_jax 9\.8 .* schema {schema}, this is "
    with pytest.raises(UserError, match=words) as said:
        read(run)
    assert "\n" not in str(said.value) and (run / "checkpoints" / "4").is_dir()


@pytest.fixture
def first_run(tmp_path):
    """A run of this project's first version (commit a43e5f5): what it saved after four steps, as it wrote it."""
    with zipfile.ZipFile(GOLDEN / "first_checkpoint.zip") as archive:
        archive.extractall(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"stage": "motion"}))
    kernel = (np.arange(576) * 7919 % 1009 / 1024).reshape(24, 24).astype(np.float32)
    params = {"encoder": {"kernel": kernel}, "decoder": {"bias": kernel[0]}}
    opt, ema = {"adam": {"mu": kernel / 2}}, {"encoder": {"kernel": kernel - 1}}
    return tmp_path / "run", {"step": np.int32(4), "params": params, "opt": opt, "ema": ema}


def test_a_checkpoint_of_the_first_version_is_gone_on_with(first_run):
    """Read on any mesh and for an export, and followed by one of today's."""
    workdir, wanted = first_run
    abstract = shapes(placed(wanted, mesh(data=4, fsdp=2), "fsdp", "data"))
    step, state = restored(workdir, abstract)
    assert step == 4
    assert_equal(state, wanted)
    assert_equal(checkpoint_groups.load_groups(workdir)[2]["encoder"], wanted["ema"]["encoder"])
    checkpoints = Checkpoints(workdir)
    checkpoints.save(6, state | {"step": jnp.int32(6)})
    checkpoints.close()
    assert restored(workdir, abstract)[0] == 6


@pytest.mark.parametrize("read", [restored, checkpoint_groups.load_groups])
def test_a_checkpoint_of_the_first_version_has_the_first_schema(first_run, read, monkeypatch):
    """Which it does not say: once arrays mean something else, it must not be taken for one of today's."""
    monkeypatch.setattr(checkpoint_format, "SCHEMA", checkpoint_format.SCHEMA + 1)
    words = "was written by a version before checkpoints said which under schema 1, this is .* schema 2; "
    with pytest.raises(UserError, match=words) as said:
        read(first_run[0])
    assert "\n" not in str(said.value) and (first_run[0] / "checkpoints" / "4").is_dir()


def test_another_state_is_not_passed_over_for_an_older_checkpoint(run):
    other = ABSTRACT | {"params": {"encoder": {"weight": ABSTRACT["params"]["encoder"]["kernel"]}}}
    with pytest.raises(UserError, match=r"it has no params/encoder/weight \(and 2 more\)"):
        restored(run, other)
    wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype), ABSTRACT)
    with pytest.raises(UserError, match=r"its .* has shape .* not .* \(and \d more\)"):
        restored(run, wider)
    described(run)
    with pytest.raises(UserError, match="by a version before checkpoints said which"):
        restored(run, other)
    assert sorted(Path(run / "checkpoints").iterdir()) == [
        run / "checkpoints" / "2",
        run / "checkpoints" / "4",
    ]
