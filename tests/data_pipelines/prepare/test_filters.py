"""Verdicts on frames and videos.

Clips hold float32: tolerances on shares are a few of its roundings,
where no other reason is given.
"""

import numpy as np

from data_pipelines.prepare import crop, detect, filters

SETTINGS = crop.Settings(min_frames=5, clip_frames=20)
PICTURE = (640, 480)


def _face(x=200.0, y=150.0, size=100.0):
    points = np.random.default_rng(0).uniform(0, 1, (478, 3))
    points[:2, :2] = [(0, 0), (1, 1)]
    landmarks = (points * size + (x, y, 0)).astype(np.float32)
    return detect.Face(landmarks, np.zeros(52, np.float32), np.eye(4, dtype=np.float32))


def _seen(verdict=filters.GOOD, cut=False, mirror_error=None):
    return filters.Observation(0.0, _face(), verdict, cut, mirror_error, PICTURE)


def test_judging_a_frame():
    def verdict(*faces):
        return filters.judge(list(faces), PICTURE, SETTINGS)[1]

    assert verdict() == filters.NO_FACE
    assert verdict(_face()) == filters.GOOD
    assert verdict(_face(size=30)) == filters.TOO_SMALL
    assert verdict(_face(x=-40)) == filters.OUTSIDE
    assert verdict(_face(x=-4)) == filters.GOOD
    # A face of 100 pixels: 40 of them beyond the right edge, or the lower one; then 4.
    assert verdict(_face(x=580)) == verdict(_face(y=420)) == filters.OUTSIDE
    assert verdict(_face(x=544)) == verdict(_face(y=384)) == filters.GOOD
    assert verdict(_face(), _face(x=400, size=60)) == filters.SEVERAL
    assert verdict(_face(), _face(x=400, size=20)) == filters.GOOD  # a picture on the wall
    # What counts is a share of the first one's size, three tenths.
    assert verdict(_face(size=200), _face(x=450, size=50)) == filters.GOOD
    assert verdict(_face(), _face(x=400, size=35)) == filters.SEVERAL
    assert verdict(_face(), _face(x=210, size=95)) == filters.GOOD  # the same face found twice


def test_cuts():
    before = _seen()._replace(time=1.0)

    def cut(face=None, time=1.04, difference=0.0, picture=PICTURE):
        seen = before._replace(face=face or _face(), time=time, picture=picture)
        return filters.is_cut(before, seen, difference, SETTINGS)

    assert not cut()
    assert not cut(_face(x=230))
    assert cut(_face(x=260))
    assert cut(_face(size=160))
    assert cut(_face(size=60)) and not cut(_face(size=80))
    # Its middle moves by 60 and by 40 pixels of the 100 that it had, whatever its size is now.
    assert cut(_face(x=240, y=130, size=140)) and not cut(_face(x=255, y=165, size=70))
    # Real clips have at most 0.038, two people in the same crop 0.088 and, of all pairs but one, 0.11.
    assert cut(difference=0.11) and not cut(difference=0.08)
    assert cut(time=2.0)
    assert cut(picture=(480, 640))
    # What covers a face for a moment changes the picture, too.
    covered = before._replace(face=None, time=1.04)
    assert [filters.is_cut(before, covered, one, SETTINGS) for one in (0.0, 0.15, 0.21)] == [
        False,
        False,
        True,
    ]


def test_runs_are_split_at_gaps_and_cuts_and_short_ones_dropped():
    frames = [_seen() for _ in range(40)]
    frames[10] = _seen(filters.NO_FACE)
    frames[14] = _seen(filters.TOO_SMALL)
    frames[22] = _seen(cut=True)
    runs, verdict = filters.segments(frames, "a", SETTINGS)
    assert runs == [(0, 10), (15, 22), (22, 40)]
    assert verdict.kept and verdict.kept_frames == 35 and verdict.cuts == 1
    assert verdict.dropped_frames == {
        filters.TOO_SHORT: 3, filters.NO_FACE: 1, filters.TOO_SMALL: 1,
    }  # fmt: skip
    assert "kept 35 of 40 frames in 3 clip(s), 1 cut(s)" in verdict.words()


def test_long_runs_become_several_clips():
    runs, verdict = filters.segments([_seen() for _ in range(50)], "a", SETTINGS)
    assert runs == [(0, 17), (17, 33), (33, 50)] and verdict.clips == 3


def test_whole_videos_are_refused_with_their_reason():
    def reason(frames):
        runs, verdict = filters.segments(frames, "a", SETTINGS)
        assert runs == [] and not verdict.kept
        return verdict.words()

    assert reason([_seen()]) == "dropped: too few frames: 1; at least 5 are needed"
    assert reason([_seen(filters.NO_FACE)] * 9) == "dropped: no face found in 9 of 9 frames"
    several = [_seen(), *[_seen(filters.SEVERAL)] * 2, *[_seen()] * 10]
    assert reason(several) == "dropped: several people in 2 of 13 frames"
    # A tenth may show them, of all frames.
    assert filters.segments([_seen(filters.SEVERAL), *[_seen()] * 9], "a", SETTINGS)[1].kept
    assert "not a human face" in reason([_seen(mirror_error=0.05)] * 9)
    broken = [_seen(cut=True), _seen(), _seen()] * 4
    assert reason(broken) == "dropped: too few good frames in a row: 3; at least 5 are needed"
    assert reason([]).startswith("dropped: too few frames: 0")


def test_faces_that_are_not_human_are_left_out_by_shot():
    def shot(length, error, verdict=filters.GOOD):
        return [_seen(verdict, cut=True, mirror_error=error), *[_seen()] * (length - 1)]

    for dogs in (10, 90):  # whatever most of the video shows
        frames = shot(10, 0.01) + shot(dogs, 0.06) + shot(12, 0.02)
        runs, verdict = filters.segments(frames, "a", SETTINGS)
        assert runs == [(0, 10), (10 + dogs, 22 + dogs)] and verdict.kept
        assert verdict.dropped_frames == {filters.NOT_HUMAN: dogs}
        assert verdict.kept_frames == 22 and verdict.frames == 22 + dogs
    # A run in which nothing was asked is as human as its shot.
    for error, left in ((0.06, [(9, 18)]), (0.01, [(1, 9), (9, 18)])):
        frames = shot(9, error, filters.OUTSIDE) + shot(9, 0.01)
        assert filters.segments(frames, "a", SETTINGS)[0] == left
    # One frame that is unclear costs no run.
    frames = shot(20, 0.01)
    frames[5] = frames[10] = frames[5]._replace(mirror_error=0.03)
    frames[15] = frames[15]._replace(mirror_error=0.2)
    assert filters.segments(frames, "a", SETTINGS)[0] == [(0, 20)]
    none = filters.segments(shot(9, 0.06) + shot(8, 0.05), "a", SETTINGS)[1]
    assert none.words() == "dropped: not a human face, or too unclear in 17 of 17 frames"


def test_mirror_error():
    face = _face()
    mirrored = face.landmarks.copy()
    mirrored[:, 0] = 640 - mirrored[:, 0]
    ours, theirs = filters._MIRROR_PAIRS.T
    swapped = mirrored.copy()
    swapped[ours], swapped[theirs] = mirrored[theirs], mirrored[ours]
    other = face._replace(landmarks=swapped)
    assert filters.mirror_error(face, [other], 640) < 1e-6
    moved = face._replace(landmarks=swapped + np.float32([3, 4, 0]))
    np.testing.assert_allclose(filters.mirror_error(face, [moved], 640), 0.05, rtol=1e-6)
    assert filters.mirror_error(face, [], 640) == 1.0
    assert filters.mirror_error(face, [moved, other], 640) < 1e-6
