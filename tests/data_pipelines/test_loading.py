"""Loading: the data is a function of (seed, step), and nothing bad stops it."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import (
    augment,
    background,
    dataset,
    dataset_files,
    loading,
    network_inputs,
    records,
    shard_reader,
    transforms,
)
from data_pipelines.cross_view import Shown
from data_pipelines.examples import Examples
from data_pipelines.measure import run_measure
from data_pipelines.prepare import builder
from data_pipelines.survey import survey
from dexportrait_jax.errors import MayPass, UserError
from tests import fixtures
from tests.data_pipelines.batches import assert_same, take


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return fixtures.make_dataset(tmp_path_factory.mktemp("loading") / "data", 5, 24, 48)


@pytest.fixture
def restless(tmp_path):
    """A dataset whose windows all move differently."""
    clips = [fixtures.flickering(number, 24, 48) for number in range(4)]
    return builder.write_dataset({"train": lambda: clips}, tmp_path / "restless")


def _config(directory, **changes):
    sizes = {"image_size": 32, "pose_size": 24, "expression_size": 16}
    config = (
        loading.default_data() | sizes | {"path": str(directory), "batch_size": 4, "targets": 2}
    )
    return config | changes


def _quiet(config):
    """No augmentation at all, so that pictures can be recognised."""
    config["augment"] = augment.default_augment()
    for knobs in config["augment"].values():
        if "probability" in knobs:
            knobs["probability"] = 0.0
    return config


def test_batches_are_as_promised(directory):
    (batch,) = take(_config(directory), 1)
    expected = {
        "source_image": (4, 32, 32, 3),
        "source_pose_image": (4, 24, 24, 3),
        "source_expression_image": (4, 16, 16, 3),
        "source_head_pose": (4, 3, 4),
        "target_image": (4, 2, 32, 32, 3),
        "target_pose_image": (4, 2, 24, 24, 3),
        "target_expression_image": (4, 2, 16, 16, 3),
        "target_component_mask": (4, 2, 32, 32),
        "target_head_pose": (4, 2, 3, 4),
        "target_blendshapes": (4, 2, 52),
        "target_expression_landmarks": (4, 2, 68, 2),
    }
    assert {name: value.shape for name, value in batch.items()} == expected
    for name, value in batch.items():
        floats = name.endswith(("head_pose", "blendshapes", "landmarks"))
        assert value.dtype == (np.float32 if floats else np.uint8), name


@pytest.mark.parametrize(
    "changes", [{}, {"mode": "video", "frames": 5}, {"second_expression": True}]
)
def test_shapes_are_known_before_there_are_data(directory, changes):
    config = _config(directory, **changes)
    (batch,) = take(config, 1)
    found = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
    assert loading.batch_shapes(config | {"path": ""}) == found


@pytest.mark.parametrize("mode", ["pairs", "video"])
def test_start_at_any_step_and_on_any_hosts(directory, mode):
    config = _config(directory, mode=mode, frames=5)
    whole = take(config, 5)
    assert_same(take(config, 1, step=4)[0], whole[4])
    hosts = [take(config, 2, step=3, process_index=host, process_count=2) for host in range(2)]
    for number in range(2):
        joined = {name: np.concatenate([host[number][name] for host in hosts]) for name in whole[0]}
        assert_same(joined, whole[3 + number])
    # Devices of a host need not lie side by side, and hosts may share a source.
    for rows in ([0, 1], [3], [2, 0, 3]):
        host = take(config, 2, step=3, rows=rows)
        for number in range(2):
            part = {name: value[rows] for name, value in whole[3 + number].items()}
            assert_same(host[number], part)
    assert not np.array_equal(whole[0]["target_image"], whole[1]["target_image"])
    other = take(config, 1, seed=1)[0]
    assert not np.array_equal(other["target_image"], whole[0]["target_image"])


def test_worker_processes_change_nothing(directory):
    config = _config(directory)
    expected = take(config, 3, step=2)
    for one, other in zip(take(config | {"workers": 2}, 3, step=2), expected, strict=True):
        assert_same(one, other)


def _workers():
    return [
        child for child in multiprocessing.active_children() if "grain" in child.name.casefold()
    ]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_whole_group_leave_the_workers(directory, sent):
    """Two batches are made ahead by each worker: the eighth is made after the signal."""
    config = _config(directory)
    loader = loading.make_loader(config | {"workers": 2}, seed=0)
    batches = [next(loader)]
    workers = _workers()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, sent)
    batches += [next(loader) for _ in range(7)]
    assert_same(batches[-1], take(config, 1, step=7)[0])
    loader.close()
    assert not _workers()


def test_a_killed_worker_changes_nothing(directory, capfd):
    """The batches after it are those of a run that lost none, from the very one that is due."""
    config = _config(directory)
    loader = loading.make_loader(config | {"workers": 2}, seed=0, step=3)
    batches = []
    for number in range(24):
        if number in (2, 13):  # fewer than eleven are made ahead
            os.kill(_workers()[0].pid, signal.SIGKILL)
        batches.append({name: np.array(value) for name, value in next(loader).items()})
    assert len(_workers()) == 2
    loader.close()
    assert not _workers()
    for one, other in zip(batches, take(config, 24, step=3), strict=True):
        assert_same(one, other)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(lines) == 2
    for line in lines:
        assert "a data worker was killed by SIGKILL (usually because memory was full)" in line


def _dies_at_birth(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_are_killed_again_and_again_end_the_run(directory, monkeypatch, capfd):
    monkeypatch.setattr(loading.workers, "live_with_the_parent", _dies_at_birth)
    loader = loading.make_loader(_config(directory, workers=1), seed=0, step=7)
    with pytest.raises(UserError, match="3 times before batch 7 was made; give the job") as caught:
        next(loader)
    assert "SIGKILL (usually because memory was full)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err.count("all start again at batch 7") == 2
    loader.close()
    assert not _workers()


class _Killed:
    """Batches that are their number, where every attempt but each third ends in `message`."""

    attempts = 0

    def __init__(self, first, message):
        self.number, self.message = first, message

    def __next__(self):
        _Killed.attempts += 1
        if _Killed.attempts % 3:
            raise RuntimeError(self.message)
        self.number += 1
        return self.number - 1

    def close(self):
        pass


@pytest.mark.parametrize(
    ("code", "name"),
    [(-9, "SIGKILL"), (-7, "SIGBUS (usually because /dev/shm was full)"), (-11, "SIGSEGV;")],
)
def test_deaths_are_counted_from_the_last_batch(code, name, monkeypatch, capfd):
    monkeypatch.setattr(_Killed, "attempts", 0)
    message = f"Worker process was terminated unexpectedly with exit code {code}. Search the logs"
    loader = loading.Loader(lambda first: _Killed(first, message), 5)
    assert [next(loader) for _ in range(4)] == [5, 6, 7, 8]
    assert capfd.readouterr().err.count(f"killed by {name}") == 8


def test_other_errors_of_workers_end_the_run(capfd):
    """One that ended by itself would do so again."""
    for message in (
        "Worker process was terminated unexpectedly with exit code 1.",
        "shapes differ",
    ):
        loader = loading.Loader(lambda first, message=message: _Killed(first, message), 5)
        with pytest.raises(RuntimeError, match=message):
            next(loader)
    assert "warning" not in capfd.readouterr().err


PARENT = """
import json, multiprocessing, os, signal, sys, threading, time
from data_pipelines import loading

def send_to_the_first(sent):
    while not multiprocessing.active_children():
        time.sleep(0.001)
    for child in multiprocessing.active_children():
        os.kill(child.pid, sent)

if __name__ == "__main__":
    sent = signal.Signals[sys.argv[2]]
    threading.Thread(target=send_to_the_first, args=(sent,)).start()
    loader = loading.make_loader(json.loads(sys.argv[1]), seed=0)
    next(loader)
    next(loader)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT"])
def test_workers_outlive_signals_while_they_start_but_not_the_parent(directory, tmp_path, sent):
    (tmp_path / "parent.py").write_text(PARENT)
    config = json.dumps(_config(directory) | {"workers": 2})
    environment = os.environ | {"PYTHONPATH": str(Path(loading.__file__).parents[1])}
    command = [sys.executable, tmp_path / "parent.py", config, sent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"workers {alive} are left"
        time.sleep(0.1)


def test_far_steps_start_at_once(directory):
    started = time.monotonic()
    take(_config(directory), 1, step=10_000_000)
    assert time.monotonic() - started < 5


def test_epochs_show_every_clip_in_new_order(directory):
    config = _quiet(_config(directory, batch_size=5, targets=1))
    orders = []
    for batch in take(config, 4):
        # The background at the lower corner tells the drawn person.
        colours = [tuple(np.round(image[-2, 2] / 24)) for image in batch["source_image"]]
        assert len(set(colours)) == 5
        orders.append(tuple(colours))
    assert len(set(orders)) > 1


def test_targets_keep_their_distance(directory):
    examples = Examples(_config(directory, source_margin=10, targets=3))
    rng = np.random.default_rng(0)
    for _ in range(50):
        source, targets = examples._choose_pairs(0, rng)
        assert (np.abs(targets - source) >= 10).all() and len(set(targets)) == 3
    examples = Examples(_config(directory, source_margin=500, targets=3))
    for _ in range(50):
        source, targets = examples._choose_pairs(0, rng)
        assert source not in targets and len(set(targets)) == 3


def test_video_is_consecutive_and_moves_as_one(directory):
    """One draw a clip: with the frames' own motion taken out, all frames got the same similarity."""
    config = _config(directory, mode="video", frames=6, frame_stride=2)
    (batch,) = take(config, 1)
    assert batch["target_image"].shape[:2] == (4, 6)
    clips = [fixtures.make_clip(number, 24, 48) for number in range(5)]

    def lifted(pose):
        return np.concatenate([pose, np.broadcast_to([[[0, 0, 0, 1.0]]], (len(pose), 1, 4))], 1)

    for row in batch["target_head_pose"]:
        best = min(
            np.abs(np.diff(lifted(row) @ np.linalg.inv(lifted(moved)), axis=0)).max()
            for clip in clips
            for flip in (False, True)
            for start in range(24 - 10)
            for moved in [
                transforms.transform_head_pose(
                    transforms.similarity_matrix(flip=flip), clip.head_pose[start : start + 11 : 2]
                )
            ]
        )
        assert best < 1e-4


def _calm(limit, candidates):
    return {"max_difference": limit, "candidates": candidates}


def test_windows_are_chosen_by_what_is_stored(restless, monkeypatch):
    """The first of the candidates that is calm, or the calmest, and not one picture is decoded for it."""
    monkeypatch.setattr(background, "motion", None)
    config = _config(restless, mode="video", frames=4)
    calmest = Examples(config | {"calm": _calm(0.0, 6)})
    first = Examples(config | {"calm": _calm(1.0, 6)})
    clips = calmest.clips
    motions = [clip.background_motion for clip in clips]
    every = background.all_windows(np.concatenate(motions), clips.frames, 4)
    limit = float(np.quantile(every, 0.3))
    below = Examples(config | {"calm": _calm(limit, 6)})

    def motion(examples, seed):
        clip, source, targets = examples._choose_window(0, np.random.default_rng(seed))
        assert source not in range(targets[0], targets[-1] + 1)
        again = examples._choose_window(0, np.random.default_rng(seed))
        assert again[:2] == (clip, source) and (again[2] == targets).all()
        return clip, clips[clip].background_motion[targets[1:]].mean()

    for seed in range(20):
        assert motion(first, seed)[0] == 0
        assert motion(calmest, seed)[1] <= min(motion(first, seed)[1], motion(below, seed)[1])
    assert np.mean([motion(first, seed)[1] <= limit for seed in range(40)]) < 0.6
    assert np.mean([motion(below, seed)[1] <= limit for seed in range(40)]) > 0.8


def test_windows_are_looked_for_in_the_own_clip_and_in_those_that_follow(restless, monkeypatch):
    """Of six candidates three each, round the end of the data; anywhere in a clip, at its very end too."""
    examples = Examples(_config(restless, mode="video", frames=4, calm=_calm(0.0, 6)))
    looked = []
    monkeypatch.setattr(examples, "window_motion", lambda *place: looked.append(place) or 1.0)
    for seed in range(60):
        chosen = examples._choose_window(1, np.random.default_rng(seed))
        assert [clip for clip, _ in looked[-6:]] == [1, 1, 1, 2, 3, 0] and len(
            looked
        ) == 6 * seed + 6
        assert (chosen[0], chosen[2][0]) == looked[-6]  # of windows that move alike the first
    assert {start for _, start in looked} == set(range(24 - 4 + 1))


def test_the_source_of_a_window_is_the_one_frame_beside_it(directory):
    """Before it or behind it, where the window leaves no other."""
    examples = Examples(_config(directory, mode="video", frames=23, calm=_calm(1.0, 1)))
    found = set()
    for seed in range(12):
        _, source, targets = examples._choose_window(0, np.random.default_rng(seed))
        found.add((source, int(targets[0])))
    assert found == {(23, 0), (0, 1)}


@pytest.mark.parametrize("stride", [1, 2])
def test_an_older_dataset_gives_the_same_batches(restless, stride):
    """Without the stored field the candidates' frames are measured, until `measure` has stored it."""
    config = _config(restless, mode="video", frames=4, frame_stride=stride, calm=_calm(0.05, 4))
    expected = take(config, 3)
    stored = (restless / dataset_files.background_name("train")).read_bytes()
    fixtures.make_older(restless)
    assert dataset.ClipDataset(restless, "train")[0].background_motion is None
    for one, other in zip(take(config, 3), expected, strict=True):
        assert_same(one, other)
    run_measure(restless)
    assert (restless / dataset_files.background_name("train")).read_bytes() == stored
    for one, other in zip(take(config | {"workers": stride - 1}, 3), expected, strict=True):
        assert_same(one, other)


def test_view_change_takes_the_other_camera_at_the_same_instant(tmp_path):
    directory = fixtures.make_dataset(tmp_path / "data", 2, 12, 48, cameras=2)
    config = _quiet(_config(directory, cross_view=0.0))
    config["augment"]["expression_crop"].update(margin_range=(1.1, 1.1), centre_jitter=0.0)
    examples = Examples(config)
    clip, other = examples.clips[0], examples.clips[1]
    assert (clip.identity, clip.session) == (other.identity, other.session)
    draw = dataclasses.replace(augment.neutral_draw(config["augment"]), other_view=True)
    assert examples._same_instant(clip, 7, other, draw) == (other, 7)
    late = dataclasses.replace(other, timestamps=other.timestamps + 100)
    assert examples._same_instant(clip, 7, late, draw) is None
    # Three quarters of a frame late: its first is nearer to the second than half a frame, and not to the first.
    late = dataclasses.replace(other, timestamps=other.timestamps + 0.03)
    assert examples._same_instant(clip, 0, late, draw) is None
    assert examples._same_instant(clip, 1, late, draw) == (late, 0)

    config["augment"]["view_change"]["probability"] = 1.0
    examples = Examples(config)
    place = int(np.flatnonzero(examples.order(0) == 0)[0])
    example = examples(place, np.random.default_rng(3))
    same = network_inputs.inference_inputs(clip, range(12), 32, 24, 16, config["augment"])
    view = network_inputs.inference_inputs(other, range(12), 32, 24, 16, config["augment"])
    for number in range(2):
        at = (
            np.abs(same["image"] - example["target_image"][number].astype(int))
            .sum((1, 2, 3))
            .argmin()
        )
        np.testing.assert_array_equal(example["target_image"][number], same["image"][at])
        np.testing.assert_array_equal(example["target_head_pose"][number], same["head_pose"][at])
        np.testing.assert_array_equal(
            example["target_expression_image"][number], view["expression_image"][at]
        )


def test_view_change_is_as_frequent_in_long_sessions(tmp_path):
    """Eight clips of each camera, one after the other: the one that shows the instant is taken, not any of them."""

    def pieces():
        for camera in (0, 1):
            whole = fixtures.make_clip(0, 64, 32, camera=camera, session="long")
            for first in range(0, 64, 8):
                yield whole.part(first, first + 8, f"{camera}-{first:06d}-{first + 7:06d}")

    directory = builder.write_dataset({"train": pieces}, tmp_path / "data")
    config = _quiet(_config(directory, cross_view=0.0))
    config["augment"]["view_change"]["probability"] = 1.0
    config["augment"]["expression_crop"].update(margin_range=(1.1, 1.1), centre_jitter=0.0)
    examples = Examples(config)
    for position in range(16):
        number = int(examples.order(0)[position])
        clip, other = examples.clips[number], examples.clips[(number + 8) % 16]
        np.testing.assert_array_equal(clip.timestamps, other.timestamps)
        example = examples(position, np.random.default_rng(position))
        view = network_inputs.inference_inputs(other, range(8), 32, 24, 16, config["augment"])
        for pose, shown in zip(
            example["target_head_pose"], example["target_expression_image"], strict=True
        ):
            at = int(np.flatnonzero((clip.head_pose == pose).all((1, 2)))[0])
            np.testing.assert_array_equal(shown, view["expression_image"][at])


def test_clips_of_another_camera_are_taken_while_they_last(tmp_path):
    """From their first frame to their last, with half a frame about them: 12 frames of 0.04 s."""
    examples = Examples(_config(fixtures.make_dataset(tmp_path / "data", 1, 12, 48, cameras=2)))
    rng, index = np.random.default_rng(0), examples.clips.index

    def there(start, frames):
        index["start"][1], index["frames"][1] = start, frames
        return [at for at in range(12) if examples._other_view([Shown(0, at)], rng) is not None]

    assert there(0.0, 12) == list(range(12))
    assert there(0.0, 6) == list(range(6))
    assert there(0.215, 3) == [5, 6, 7]  # begins 0.015 s after frame 5
    assert there(0.225, 3) == [6, 7, 8]


def test_second_expression_is_another_picture_of_the_instant(tmp_path):
    directory = fixtures.make_dataset(tmp_path / "data", 2, 12, 48, cameras=2)
    config = _quiet(_config(directory, cross_view=0.0)) | {"second_expression": True}
    config["augment"]["expression_crop"].update(margin_range=(1.1, 1.1), centre_jitter=0.0)
    examples = Examples(config)
    clip, other = examples.clips[0], examples.clips[1]
    place = int(np.flatnonzero(examples.order(0) == 0)[0])
    example = examples(place, np.random.default_rng(3))
    same = network_inputs.inference_inputs(clip, range(12), 32, 24, 16, config["augment"])
    view = network_inputs.inference_inputs(other, range(12), 32, 24, 16, config["augment"])
    assert example["target_second_expression_image"].shape == (2, 16, 16, 3)
    for first, second in zip(
        example["target_expression_image"], example["target_second_expression_image"], strict=True
    ):
        at = np.abs(same["expression_image"] - first.astype(int)).sum((1, 2, 3)).argmin()
        np.testing.assert_array_equal(first, same["expression_image"][at])
        np.testing.assert_array_equal(second, view["expression_image"][at])
    (batch,) = loading.evaluation_batches(config, "train", 1)
    np.testing.assert_array_equal(
        batch["target_second_expression_image"], batch["target_expression_image"]
    )


def _with_bad_record(tmp_path, kind):
    def clips():
        for number in range(4):
            clip = fixtures.make_clip(number, 12, 32)
            if number == 2 and kind == "jpeg":
                clip = dataclasses.replace(clip, frames=[f[: len(f) // 2] for f in clip.frames])
            yield clip

    return builder.write_dataset({"train": clips}, tmp_path / "data")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_is_reported_once_and_replaced(tmp_path, capfd, workers):
    config = _config(_with_bad_record(tmp_path, "jpeg"), workers=workers)
    one = take(config, 6)
    said = capfd.readouterr().err.count("record 2 is damaged")
    assert said == 1
    for batch, again in zip(one, take(config | {"workers": 0}, 6), strict=True):
        assert_same(batch, again)


def test_flipped_bytes_in_a_shard_are_survived(tmp_path, capfd):
    directory = _with_bad_record(tmp_path, "none")
    (shard,) = directory.glob("*train.array_record*")
    data = bytearray(shard.read_bytes())
    place = len(data) // 3
    data[place : place + 64] = bytes(byte ^ 255 for byte in data[place : place + 64])
    shard.write_bytes(data)
    assert len(take(_config(directory), 4)) == 4
    assert capfd.readouterr().err.count("is damaged") >= 1


def _torn(tmp_path, frames=4):
    """Twelve people's clips in four shards, of which the second cannot be opened; its path, and its clips."""
    directory = fixtures.make_dataset(tmp_path / "data", 12, frames, 32)
    shard = fixtures.spread(directory, 4)[1]
    shard.write_bytes(shard.read_bytes()[:1000])
    return directory, shard, range(3, 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_read_is_said_once_and_its_clips_replaced(tmp_path, capfd, workers):
    """While loading, whoever reads it, and where a run is started; other shards' clips are where they were."""
    directory, shard, left_out = _torn(tmp_path)
    config = _quiet(_config(directory, cross_view=0.0, workers=workers, batch_size=12, targets=1))
    assert survey(config).warnings == ()
    batches = take(config, 3)
    said = capfd.readouterr().err
    assert said.count(f"split train, {shard} cannot be read: ") == said.count("warning") == 1
    clips = [fixtures.make_clip(number, 4, 32, session=f"session{number}") for number in range(12)]
    poses = {
        clip.head_pose[frame].tobytes(): n for n, clip in enumerate(clips) for frame in range(4)
    }
    order = Examples(config).order
    replaced = []
    for epoch, batch in enumerate(batches):
        shown = [poses[pose.tobytes()] for pose in batch["source_head_pose"]]
        for place, number in enumerate(order(epoch)):
            if number in left_out:
                assert shown[place] not in left_out
                replaced.append(shown[place])
            else:
                assert shown[place] == number
    assert len(set(replaced)) > 3  # and not all by the first clip of the next shard


def test_a_shard_may_hold_more_clips_than_may_be_damaged_in_a_row(tmp_path, monkeypatch, capfd):
    """An evaluation goes through it clip by clip."""
    monkeypatch.setattr("data_pipelines.examples._ATTEMPTS", 2)
    monkeypatch.setattr(shard_reader, "PAUSES", (1.0,))
    slept = []
    monkeypatch.setattr(shard_reader.time, "sleep", slept.append)
    directory, shard, _ = _torn(tmp_path)
    batches = list(loading.evaluation_batches(_config(directory), "train", 3))
    for row in (3, 4, 5):
        batch, place = divmod(row, 4)
        np.testing.assert_array_equal(
            batches[batch]["source_image"][place], batches[1]["source_image"][2]
        )
    assert capfd.readouterr().err.count(f"{shard} cannot be read") == 1
    assert slept == [1.0]


def test_nothing_but_bad_records_is_an_error(tmp_path):
    clip = fixtures.make_clip(0, 12, 32)
    clip = dataclasses.replace(clip, frames=[b"no jpeg"] * 12)
    directory = builder.write_dataset({"train": lambda: [clip]}, tmp_path / "data")
    examples = Examples(_config(directory))
    with pytest.raises(UserError, match="damaged"):
        examples(0, np.random.default_rng(0))


@pytest.mark.parametrize("all_away", [True, False])
def test_a_disk_that_is_away_for_long_is_no_damage(tmp_path, monkeypatch, capfd, all_away):
    """The run may be started again, where nothing but the disk is to blame."""
    monkeypatch.setattr(shard_reader, "PAUSES", ())
    directory = fixtures.make_dataset(tmp_path / "data", 4, 4, 32)
    shards = fixtures.spread(directory, 4)
    examples = Examples(_config(directory, targets=1))
    for shard in shards:
        shard.rename(shard.with_suffix(".away"))
    if not all_away:
        shards[2].write_bytes(b"torn")
    with pytest.raises(UserError) as said:
        examples(0, np.random.default_rng(0))
    assert isinstance(said.value, MayPass) == all_away
    words = f"no shard of {directory} can be opened, in 4 attempts" if all_away else "damaged"
    assert words in str(said.value) and "\n" not in str(said.value)


def test_errors_at_the_start(directory, tmp_path):
    def start(**changes):
        return loading.make_loader(_config(directory, **changes), seed=0)

    with pytest.raises(UserError, match="at most 24 frames, but 100 are needed"):
        start(mode="video", frames=100)
    with pytest.raises(UserError, match="no split 'test'"):
        start(split="test")
    with pytest.raises(UserError, match="no dataset at"):
        start(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="'pairs' or 'video'"):
        start(mode="images")
    for calm in (_calm(0.03, 0), _calm(-0.1, 8), _calm(7, 8)):
        with pytest.raises(UserError, match="data.calm is"):
            start(calm=calm)
    with pytest.raises(UserError, match="3 host"):
        loading.make_loader(_config(directory), seed=0, process_count=3)
    still = builder.write_dataset(
        {"train": lambda: [fixtures.make_clip(0, 1, 32)]}, tmp_path / "still"
    )
    with pytest.raises(UserError, match="at most 1 frames, but 2 are needed"):
        start(path=str(still))


def test_evaluation_is_plain_and_even(directory):
    config = _config(directory, batch_size=2, targets=3)
    batches = list(loading.evaluation_batches(config, "train", 3))
    for one, again in zip(batches, loading.evaluation_batches(config, "train", 3), strict=True):
        assert_same(one, again)
    for number in range(5):
        batch, row = batches[number // 2], number % 2
        clip = fixtures.make_clip(number, 24, 48)
        expected = network_inputs.inference_inputs(
            clip, [0, 8, 16, 23], 32, 24, 16, config["augment"]
        )
        np.testing.assert_array_equal(batch["source_image"][row], expected["image"][0])
        np.testing.assert_array_equal(batch["target_image"][row], expected["image"][1:])
        np.testing.assert_array_equal(batch["target_head_pose"][row], expected["head_pose"][1:])
    assert not np.array_equal(batches[2]["target_image"][1], batches[0]["target_image"][0])
    assert batches[0].keys() == take(config, 1)[0].keys()
    (video,) = loading.evaluation_batches(config | {"mode": "video", "frames": 4}, "validation", 1)
    clip = fixtures.make_clip(5, 24, 48)
    np.testing.assert_array_equal(video["target_head_pose"][0], clip.head_pose[1:5])


def test_an_evaluation_of_clips_that_come_again_goes_on_in_them(directory):
    """Of 24 frames, 4 from the second on; then those from 4 and from 8 frames later."""
    examples = Examples(_config(directory, mode="video", frames=4), split="train")
    clip = fixtures.make_clip(2, 24, 48)
    for passes, first in enumerate((1, 5, 9)):
        example = examples.evaluation_example(2 + 5 * passes)
        np.testing.assert_array_equal(example["source_head_pose"], clip.head_pose[0])
        np.testing.assert_array_equal(
            example["target_head_pose"], clip.head_pose[first : first + 4]
        )


def test_configdict_is_understood(directory):
    ml_collections = pytest.importorskip("ml_collections")
    config = ml_collections.ConfigDict(_config(directory))
    assert_same(take(config, 1)[0], take(_config(directory), 1)[0])


@pytest.mark.slow
def test_speed_at_64_pixels(tmp_path):
    directory = fixtures.make_dataset(tmp_path / "data", 4, 60, 64)
    sizes = {"image_size": 64, "pose_size": 64, "expression_size": 64}
    examples = Examples(_config(directory) | sizes)
    rng = np.random.default_rng(0)
    examples(0, rng)
    started = time.process_time()
    for number in range(200):
        examples(number % 4, rng)
    assert 200 / (time.process_time() - started) > 100
    assert isinstance(examples.clips[0], records.Clip)
