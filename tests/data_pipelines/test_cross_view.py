"""Pairs across cameras: whose frames are shown, at which time, and that nothing changes where there are none."""

import dataclasses
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from configs import animator_image, animator_video, motion
from data_pipelines import augment, cross_view, dataset, loading, network_inputs
from data_pipelines.cross_view import Shown
from data_pipelines.examples import Examples
from data_pipelines.prepare import builder
from dexportrait_jax.errors import UserError
from tests import fixtures
from tests.data_pipelines.batches import assert_same, take

RENDERED = "synthetic:identities=4,frames=6,cameras=3,size=32,holdout=0,fps=2"
SIZES = (32, 24, 16)


def _config(path, **changes):
    sizes = dict(zip(("image_size", "pose_size", "expression_size"), SIZES, strict=True))
    config = loading.default_data() | sizes | {"path": str(path), "batch_size": 4, "targets": 3}
    return config | changes


def _quiet(config, view_change=0.0):
    """No augmentation, so that pictures can be recognised."""
    config["augment"] = augment.default_augment()
    for knobs in config["augment"].values():
        if "probability" in knobs:
            knobs["probability"] = 0.0
    config["augment"]["expression_crop"].update(margin_range=(1.1, 1.1), centre_jitter=0.0)
    config["augment"]["view_change"]["probability"] = view_change
    return config


@pytest.fixture(scope="module")
def clips():
    return dataset.open_clips(RENDERED, "train")


@pytest.fixture(scope="module")
def where(clips):
    """Pose label -> the one frame that has it."""
    return {
        clip.head_pose[frame].tobytes(): Shown(number, frame)
        for number, clip in enumerate(clips[n] for n in range(len(clips)))
        for frame in range(len(clip))
    }


def _shown(batches, where):
    """(source, its targets) of every row."""
    for batch in batches:
        for source, targets in zip(
            batch["source_head_pose"], batch["target_head_pose"], strict=True
        ):
            yield where[source.tobytes()], [where[pose.tobytes()] for pose in targets]


def test_targets_come_from_all_cameras_with_their_own_poses(clips, where):
    """Pose, picture and expression are of one frame; person and session are the source's; times differ."""
    config = _quiet(_config(RENDERED, cross_view=0.5))
    batches = take(config, 12)
    away, seen = [], set()
    for source, targets in _shown(batches, where):
        for target in targets:
            assert target.clip // 3 == source.clip // 3 and target.frame != source.frame
            away.append(target.clip != source.clip)
            seen.add(target.clip)
    assert len(seen) == len(clips) and 0.4 < np.mean(away) < 0.6  # of 144
    # A choice of every target's own: rows with both kinds are the rule.
    mixed = [0 < sum(row) < 3 for row in np.reshape(away, (-1, 3))]
    assert np.mean(mixed) > 0.5
    rows = itertools.islice(_shown(batches, where), 8)
    for row, (source, targets) in enumerate(rows):
        batch, row = batches[row // 4], row % 4
        for prefix, shown, at in [
            ("source", source, (row,)),
            *(("target", target, (row, n)) for n, target in enumerate(targets)),
        ]:
            wanted = network_inputs.inference_inputs(
                clips[shown.clip], [shown.frame], *SIZES, config["augment"]
            )
            for name in ("image", "expression_image", "head_pose"):
                np.testing.assert_array_equal(batch[f"{prefix}_{name}"][at], wanted[name][0])


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_never_and_always(where, probability, expected):
    batches = take(_quiet(_config(RENDERED, cross_view=probability)), 3)
    for source, targets in _shown(batches, where):
        assert all((target.clip != source.clip) == expected for target in targets)


def test_view_change_is_relative_to_the_camera_of_the_target(clips, where):
    """E2: the expression picture is another camera's than the target's own, at the target's instant."""
    config = _quiet(_config(RENDERED, cross_view=0.5), view_change=1.0)
    batches = take(config, 2)
    known = {}
    for number in range(len(clips)):
        pictures = network_inputs.inference_inputs(
            clips[number], range(6), *SIZES, config["augment"]
        )["expression_image"]
        known |= {picture.tobytes(): Shown(number, at) for at, picture in enumerate(pictures)}
    pictures = [row for batch in batches for row in batch["target_expression_image"]]
    for (_, targets), row in zip(_shown(batches, where), pictures, strict=True):
        for target, picture in zip(targets, row, strict=True):
            expression = known[picture.tobytes()]
            assert expression.frame == target.frame and expression.clip != target.clip
            assert expression.clip // 3 == target.clip // 3


@pytest.mark.parametrize("cross_view", [0.0, 0.5])
def test_the_first_target_does_not_decide_on_the_view_of_the_others(clips, cross_view):
    """Every target that asks for another camera's expression gets one."""
    examples = Examples(_quiet(_config(RENDERED, cross_view=cross_view), view_change=0.5))
    rng = np.random.default_rng(0)
    targets = [Shown(0, 1), Shown(0, 2), Shown(4, 3)]
    plain = augment.neutral_draw(examples.augment)
    draws = [dataclasses.replace(plain, other_view=view) for view in (False, True, True)]
    others = examples._other_views(targets, draws, [None] * 3, rng)
    assert others[0] is others[1] and others[1].camera != "0"
    assert others[2].session == clips[4].session and others[2].camera != clips[4].camera


def test_in_a_video_the_source_alone_changes_camera(clips, where):
    config = _quiet(_config(RENDERED, mode="video", frames=3, cross_view=0.5))
    away = []
    for source, targets in _shown(take(config, 12), where):
        numbers = [target.clip for target in targets]
        assert len(set(numbers)) == 1 and source.clip // 3 == numbers[0] // 3
        assert [target.frame for target in targets] == list(
            range(targets[0].frame, targets[0].frame + 3)
        )
        assert source.frame not in [target.frame for target in targets]
        away.append(source.clip != numbers[0])
    assert 0.25 < np.mean(away) < 0.75  # of 48


@pytest.mark.parametrize("mode", ["pairs", "video"])
def test_batches_are_the_same_for_any_step_hosts_and_workers(mode):
    config = _config(RENDERED, mode=mode, frames=3, cross_view=0.7)
    whole = take(config, 4)
    assert_same(take(config, 1, step=3)[0], whole[3])
    hosts = [take(config, 1, step=2, process_index=n, process_count=2)[0] for n in range(2)]
    assert_same(
        {name: np.concatenate([host[name] for host in hosts]) for name in hosts[0]}, whole[2]
    )
    if mode == "pairs":
        for one, other in zip(take(config | {"workers": 2}, 2, step=1), whole[1:3], strict=True):
            assert_same(one, other)


def test_with_one_camera_nothing_changes():
    alone = "synthetic:identities=4,frames=6,size=32,holdout=0,fps=2"
    for changes in ({}, {"second_expression": True}, {"mode": "video", "frames": 3}):
        one, other = (
            take(_config(alone, cross_view=share, **changes), 1)[0] for share in (0.0, 0.9)
        )
        assert_same(one, other)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return fixtures.make_dataset(tmp_path_factory.mktemp("cross") / "data", 3, 10, 40, cameras=2)


@pytest.mark.parametrize(
    ("case", "changes"),
    [("second_expression", {"second_expression": True}), ("video", {"mode": "video"})],
)
def test_without_cross_view_batches_are_what_they_were(drawn, case, changes):
    """Row by row the mean of everything in two batches, as the code before there were cross-view pairs made them
    (commit 409a554, two cameras, all augmentation): another random draw anywhere is another mean. One pose picture's
    is lower by .07 since eyes that its border mirrors are hidden."""
    config = _config(drawn, frames=3, cross_view=0.0, **changes)
    batches = take(config, 2, seed=5)
    before = json.loads((Path(__file__).parents[1] / "golden" / "batches.json").read_text())[case]
    assert before.keys() == batches[0].keys()
    for name, wanted in before.items():
        values = np.concatenate([batch[name] for batch in batches])
        found = np.abs(values.astype(np.float64)).reshape(len(values), -1).mean(1)
        rounding = 0.05 if values.dtype == np.uint8 else 2e-4
        np.testing.assert_allclose(found, wanted, rtol=0, atol=rounding, err_msg=name)


def test_far_frames_by_hand():
    distance = np.array([3, 2, 1, 0, 1, 2])
    assert cross_view.far_frames(distance, 2, 2).tolist() == [0, 1, 5]
    assert cross_view.far_frames(distance, 30, 2).tolist() == [0, 1]  # only one is 3 away
    assert cross_view.far_frames(distance, 0, 2).tolist() == [0, 1, 2, 4, 5]
    assert cross_view.far_frames(np.array([0]), 5, 3).tolist() == [0]  # all there is


def test_the_margin_counts_in_time_across_cameras():
    """Another camera's clip that begins later: frame numbers are not instants."""
    early, late = (fixtures.make_clip(0, 10, 32, camera=n, session="one") for n in range(2))
    late = dataclasses.replace(late, timestamps=late.timestamps + 5 / 25)
    pairs = cross_view.CrossView([early, late], {0: [1], 1: [0]}, 1.0, margin=6)
    rng = np.random.default_rng(0)
    shown = {
        target
        for _ in range(60)
        for target in pairs.targets(Shown(0, 4), [Shown(0, 0), Shown(0, 9)], rng)
    }
    assert shown == {Shown(1, frame) for frame in range(5, 10)}  # 6 to 10 frames after the source
    window = [Shown(0, frame) for frame in range(4, 8)]
    sources = {pairs.source(Shown(0, 0), window, rng) for _ in range(60)}
    assert sources == {Shown(1, frame) for frame in range(3, 10)}
    # A quarter of a frame earlier or later is the same instant.
    for offset in (-0.01, 0.01):
        other = dataclasses.replace(early, timestamps=early.timestamps + offset)
        pairs = cross_view.CrossView([early, other], {0: [1]}, 1.0, margin=6)
        sources = {pairs.source(Shown(0, 0), window, rng) for _ in range(60)}
        assert sources == {Shown(1, frame) for frame in (0, 1, 2, 3, 8, 9)}


def test_views_are_other_cameras_of_the_same_person_and_session():
    rng = np.random.default_rng(0)
    people, sessions, cameras = rng.integers((4, 5, 3), size=(200, 3)).T.astype(str).tolist()
    index = {"identity": people, "session": sessions, "camera": cameras}
    views = pickle.loads(pickle.dumps(cross_view.OtherViews(index)))
    for number, mine in enumerate(zip(people, sessions, strict=True)):
        assert views.get(number) == [
            other
            for other, key in enumerate(zip(people, sessions, strict=True))
            if key == mine and cameras[other] != cameras[number]
        ]


def test_views_of_a_long_session_are_small():
    """Half of its 20000 clips are the views of each, and yet they are sent to worker processes in a moment."""
    one, cameras = ["one"] * 20000, ["left", "right"] * 10000
    views = cross_view.OtherViews({"identity": one, "session": one, "camera": cameras})
    assert views.get(7) == list(range(0, 20000, 2))
    assert len(pickle.dumps(views)) < 300_000


def test_views_are_found_only_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr("data_pipelines.examples.OtherViews", lambda index: ["asked for"])
    for changes, view_change in (({}, 0.1), ({"second_expression": True}, 0.0), ({}, 0.0)):
        examples = Examples(_quiet(_config(RENDERED, cross_view=0.0, **changes), view_change))
        assert bool(examples.views) == bool(changes or view_change)
    assert Examples(_quiet(_config(RENDERED, cross_view=0.1))).views


def test_configs_whose_figures_were_measured_without_have_none():
    for variant in ("tiny", "synthetic", "real"):
        assert motion.get_config(variant).data.cross_view == 0.0
    for config in (animator_image, animator_video):
        for variant in ("tiny", "minutes"):
            assert config.get_config(variant).data.cross_view == 0.0
        assert config.get_config("full").data.cross_view == 0.5
    assert motion.get_config("full").data.cross_view == 0.5


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_cannot_be_is_one_line(share):
    with pytest.raises(UserError, match=f"data.cross_view is {share}"):
        Examples(_config(RENDERED, cross_view=share))


@pytest.mark.parametrize("kind", ["frames", "record"])
def test_the_record_of_the_camera_that_is_damaged_is_the_one_that_is_named(tmp_path, capfd, kind):
    """Not that of the clip whose turn it is, though its examples are what cannot be made."""

    def clips():
        for camera in range(3):
            clip = fixtures.make_clip(0, 12, 32, camera=camera, session="rig")
            if camera == 1 and kind == "frames":
                clip = dataclasses.replace(clip, frames=[frame[:99] for frame in clip.frames])
            yield clip
        yield fixtures.make_clip(1, 12, 32)  # what is left to be shown

    directory = builder.write_dataset({"train": clips}, tmp_path / "data")
    if kind == "record":
        fixtures.remove_masks(directory, keep=(0, 2, 3))
    examples = Examples(_config(directory, cross_view=1.0))
    for position in range(12):
        examples(position, np.random.default_rng(position))
    said = capfd.readouterr().err
    assert said.count("is damaged") == 1 and "record 1 is damaged and left out" in said
