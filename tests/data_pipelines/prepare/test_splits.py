"""Validation shares nothing with training."""

import numpy as np

from data_pipelines.prepare import splits
from tests import fixtures


def _frames(clip):
    name, first, last = clip.clip_id.rsplit("-", 2)
    assert int(last) - int(first) + 1 == len(clip)
    return {(name, number) for number in range(int(first), int(last) + 1)}


def test_time_split_shares_no_frame_and_keeps_the_gap():
    clip = fixtures.make_clip(0, 40, 32)
    train, held = splits.split_in_time(clip, 0.25, 5)
    assert len(train) == 25 and len(held) == 10
    assert _frames(train) | _frames(held) <= _frames(clip)
    assert min(n for _, n in _frames(held)) - max(n for _, n in _frames(train)) == 6
    np.testing.assert_array_equal(held.head_pose, clip.head_pose[30:])
    np.testing.assert_array_equal(held.timestamps, clip.timestamps[30:])
    short, none = splits.split_in_time(fixtures.make_clip(0, 6, 32), 0.25, 5)
    assert len(short) == 6 and none is None


def test_time_split_of_adjoining_clips_keeps_the_gap_between_them():
    whole = fixtures.make_clip(0, 60, 32)
    video = [splits._part(whole, 0, 30), splits._part(whole, 30, 60)]
    made = splits.split([lambda: iter(video)], "time", 0.2, 4)
    train = set().union(*map(_frames, made["train"]()))
    held = set().union(*map(_frames, made["validation"]()))
    distance = min(abs(a - b) for _, a in train for _, b in held)
    assert not train & held and distance == 5
    assert len(list(made["train"]())) == len(list(made["train"]())) == 2  # may be read again


def test_identity_split_is_by_person():
    people = [f"person{number}" for number in range(200)]
    held = splits.held_out(set(people), 0.2)
    assert 25 < len(held) < 55
    assert splits.held_out(set(people[:100]), 0.2) == held & set(people[:100])  # stable
    assert len(splits.held_out({"a", "b"}, 0.01)) == 1
    assert len(splits.held_out({"a", "b"}, 0.99)) == 1
    assert splits.held_out({"a"}, 0.5) == set() == splits.held_out(set(people), 0.0)
    clips = [fixtures.make_clip(n, 4, 32, camera=c) for n in range(4) for c in range(2)]
    made = splits.split([lambda: iter(clips)], "identity", 0.3, 0)
    train = {clip.identity for clip in made["train"]()}
    validation = {clip.identity for clip in made["validation"]()}
    assert not train & validation and train | validation == {c.identity for c in clips}


def test_named_people_are_held_out():
    clips = [fixtures.make_clip(n, 4, 32, camera=c) for n in range(4) for c in range(2)]
    made = splits.split([lambda: iter(clips)], "identity", 0.3, 0, ["drawn1", "drawn3"])
    assert {clip.identity for clip in made["validation"]()} == {"drawn1", "drawn3"}
    assert {clip.identity for clip in made["train"]()} == {"drawn0", "drawn2"}
