"""Validation shares nothing with training."""

import json

import numpy as np

from data_pipelines import records
from data_pipelines.prepare import splits
from tests import fixtures


def _frames(clip):
    name, first, last = clip.clip_id.rsplit("-", 2)
    assert int(last) - int(first) + 1 == len(clip)
    return {(name, number) for number in range(int(first), int(last) + 1)}


def _in_time(videos, fraction, gap):
    """The clips of both splits; each video is a list of clips."""
    made = splits.split([fixtures.video_of(clips) for clips in videos], "time", fraction, gap)
    return [list(made[name]()) if name in made else [] for name in ("train", "validation")]


def test_time_split_shares_no_frame_and_keeps_the_gap():
    clip = fixtures.make_clip(0, 40, 32)
    (train,), (held,) = _in_time([[clip]], 0.25, 5)
    assert len(train) == 25 and len(held) == 10
    assert _frames(train) | _frames(held) <= _frames(clip)
    assert min(n for _, n in _frames(held)) - max(n for _, n in _frames(train)) == 6
    np.testing.assert_array_equal(held.head_pose, clip.head_pose[30:])
    np.testing.assert_array_equal(held.timestamps, clip.timestamps[30:])
    (short,), none = _in_time([[fixtures.make_clip(0, 6, 32)]], 0.25, 5)
    assert len(short) == 6 and not none
    # A fifth of six is one frame, which is no clip: nothing is taken away for it.
    (short,), none = _in_time([[fixtures.make_clip(0, 6, 32)]], 0.2, 1)
    assert len(short) == 6 and not none


def test_time_split_of_adjoining_clips_keeps_the_gap_between_them():
    whole = fixtures.make_clip(0, 60, 32)
    video = [splits._part(whole, 0, 30), splits._part(whole, 30, 60)]
    made = splits.split([fixtures.video_of(video)], "time", 0.2, 4)
    train = set().union(*map(_frames, made["train"]()))
    held = set().union(*map(_frames, made["validation"]()))
    distance = min(abs(a - b) for _, a in train for _, b in held)
    assert not train & held and distance == 5
    assert len(list(made["train"]())) == len(list(made["train"]())) == 2  # may be read again


def test_time_split_leaves_out_what_lies_within_the_gap_behind_a_held_out_end():
    whole = fixtures.make_clip(0, 60, 32)
    for short in (2, 5):  # frames: fewer than the gap, and one more than it
        train, held = _in_time(
            [[splits._part(whole, 0, 40), splits._part(whole, 40, 40 + short)]], 0.2, 4
        )
        assert [clip.clip_id[-13:] for clip in train] == ["000000-000027"]
        assert [clip.clip_id[-13:] for clip in held] == ["000032-000039"]


def test_time_split_cuts_all_cameras_of_a_session_at_the_same_times():
    """Though each of them lost the face at other times, and so begins and ends its clips there."""
    runs = {
        0: [(0, 100), (100, 190)],
        1: [(0, 60), (66, 170)],
        2: [(20, 200), (260, 300)],
        3: [(210, 250)],
    }
    videos = []
    for camera, ends in runs.items():
        seen = fixtures.make_clip(0, 300, 16, camera=camera, session="rig")
        videos.append([splits._part(seen, *end) for end in ends])
    for order in (videos, videos[::-1]):
        train, held = _in_time(order, 0.2, 4)
        instants = [
            {number for clip in part for _, number in _frames(clip)} for part in (train, held)
        ]
        assert min(abs(a - b) for a in instants[0] for b in instants[1]) == 5
        # The third camera decides, which has the most frames, and the fourth where it saw nothing.
        assert instants[1] == {*range(164, 200), *range(242, 250), *range(292, 300)}
        assert {clip.camera for clip in held} == {"0", "1", "2", "3"}
        assert {clip.camera for clip in train} == {"0", "1", "2", "3"}
    other = fixtures.make_clip(1, 100, 16, session="rig")  # of somebody else, at a time of his own
    train, held = _in_time([*videos, [other]], 0.2, 4)
    assert [len(clip) for clip in held if clip.identity == "drawn1"] == [20]


def test_time_split_cuts_a_clip_of_another_camera_in_the_middle():
    first, second = (fixtures.make_clip(0, 90, 16, camera=c, session="rig") for c in range(2))
    video = [splits._part(first, 0, 40), splits._part(first, 40, 80)]
    train, held = _in_time([video, [splits._part(second, 10, 82)]], 0.25, 3)
    assert [clip.clip_id[-13:] for clip in train if clip.camera == "1"] == [
        "000010-000026",
        "000043-000066",
    ]
    assert [clip.clip_id[-13:] for clip in held if clip.camera == "1"] == [
        "000030-000039",
        "000070-000079",
    ]


def test_identity_split_is_by_person():
    people = [f"person{number}" for number in range(200)]
    held = splits.held_out(set(people), 0.2)
    assert 25 < len(held) < 55
    assert splits.held_out(set(people[:100]), 0.2) == held & set(people[:100])  # stable
    assert len(splits.held_out({"a", "b"}, 0.01)) == 1
    assert len(splits.held_out({"a", "b"}, 0.99)) == 1
    assert splits.held_out({"a"}, 0.5) == set() == splits.held_out(set(people), 0.0)
    clips = [fixtures.make_clip(n, 4, 32, camera=c) for n in range(4) for c in range(2)]
    made = splits.split([fixtures.video_of([clip]) for clip in clips], "identity", 0.3, 0)
    train = {clip.identity for clip in made["train"]()}
    validation = {clip.identity for clip in made["validation"]()}
    assert not train & validation and train | validation == {c.identity for c in clips}


def test_sides_of_people_are_those_of_every_version():
    """Those whose `printf NAME | sha256sum` begins below 0.2, 333...: another rule would mix data old and new."""
    people = {f"person{number}" for number in range(20)}
    assert splits.held_out(people, 0.2) == {"person1", "person2", "person17"}
    assert splits.held_out(people, 0.25) == {
        "person1",
        "person2",
        "person3",
        "person17",
        "person18",
    }


def test_named_people_are_held_out():
    clips = [fixtures.make_clip(n, 4, 32, camera=c) for n in range(4) for c in range(2)]
    made = splits.split(
        [fixtures.video_of([clip]) for clip in clips], "identity", 0.3, 0, ["drawn1", "drawn3"]
    )
    assert {clip.identity for clip in made["validation"]()} == {"drawn1", "drawn3"}
    assert {clip.identity for clip in made["train"]()} == {"drawn0", "drawn2"}


def test_clips_are_read_once_by_person_and_once_a_split_by_time():
    """They may be terabytes, and names and times are known without them."""
    videos = [[fixtures.make_clip(n, 40, 16)] for n in range(4)] + [[fixtures.make_clip(4, 3, 16)]]
    for holdout, times in (("identity", 1), ("time", 2)):
        read = []
        made = splits.split([fixtures.video_of(clips, read) for clips in videos], holdout, 0.25, 2)
        assert not read and made.keys() == {"train", "validation"}
        for clips in made.values():
            list(clips())
        short = 1  # of which nothing can be held out, so that validation does not read it
        assert [read.count(clips[0].clip_id) for clips in videos] == [times] * 4 + [short]


def test_times_are_kept_as_they_are():
    clip = fixtures.make_clip(0, 30, 16)
    clip.fps = 29.97
    kept = splits.Times.of(records.decode(records.encode(clip)))
    again = splits.Times.from_json(json.loads(json.dumps(splits.Times.of(clip).as_json())))
    assert again.fps == kept.fps and again.seconds.dtype == kept.seconds.dtype
    np.testing.assert_array_equal(again.seconds, kept.seconds)
