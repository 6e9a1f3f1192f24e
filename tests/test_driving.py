"""driving.py by values: modes, relative and typed poses, smoothing, the clock."""

import json
import tracemalloc

import numpy as np
import pytest

from dexportrait_jax import driving, pose_transfer
from dexportrait_jax.errors import UserError


def pose(pitch=0.0, yaw=0.0, roll=0.0, x=0.0, y=0.0, scale=1.0):
    rotation = pose_transfer.euler_rotation(pitch, yaw, roll)
    return pose_transfer.join_pose(rotation, np.array([x, y, 0.0]), np.array(scale))


@pytest.mark.parametrize(
    ("flags", "mode", "drivers"),
    [
        ({"driving": "a.mp4"}, "self", ("a.mp4", "a.mp4")),
        ({"driving": "b.mp4"}, "cross", ("b.mp4", "b.mp4")),
        ({"pose": "b.mp4", "expression": "b.mp4"}, "cross", ("b.mp4", "b.mp4")),
        ({"pose": "b.mp4", "expression": "c.mp4"}, "disentangled", ("b.mp4", "c.mp4")),
        ({"driving": "b.mp4", "pose": "c.mp4"}, "disentangled", ("c.mp4", "b.mp4")),
        ({"pose": '{"yaw": 3}', "expression": "c.mp4"}, "disentangled", ('{"yaw": 3}', "c.mp4")),
        ({"expression": "c.mp4"}, "expression_only", (None, "c.mp4")),
        ({"pose": "c.mp4"}, "pose_only", ("c.mp4", None)),
        ({"pose": ' {"yaw": 3}'}, "pose_only", (' {"yaw": 3}', None)),
    ],
)
def test_flags_choose_the_mode(flags, mode, drivers):
    chosen = driving.choose_drivers("a.mp4", **flags)
    assert (chosen.mode, (chosen.pose, chosen.expression)) == (mode, drivers)
    assert chosen.mode in driving.MODES


def test_a_source_by_another_path_drives_itself(tmp_path):
    """Through a folder and back, or by a link: a file is known by where it lies."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.mp4").touch()
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    for other in ("folder/../a.mp4", "link.mp4"):
        chosen = driving.choose_drivers(str(tmp_path / "a.mp4"), str(tmp_path / other))
        assert chosen.mode == "self" and chosen.source_drives


def test_no_driver_is_an_error():
    with pytest.raises(UserError, match="--driving"):
        driving.choose_drivers("a.png")


def test_split_and_join_are_inverse():
    p = pose(10, -25, 5, 0.1, -0.2, 1.3)
    rotation, translation, scale = pose_transfer.split_pose(p)
    np.testing.assert_allclose(scale, 1.3, rtol=1e-6)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(pose_transfer.join_pose(rotation, translation, scale), p, atol=1e-6)
    np.testing.assert_allclose(pose_transfer.euler_degrees(rotation), (10, -25, 5), atol=1e-4)


def test_host_poses_agree_with_geometry():
    geometry = pytest.importorskip("dexportrait_jax.geometry")
    rotation = geometry.euler_to_rotation(10.0, -25.0, 5.0)
    np.testing.assert_allclose(rotation, pose_transfer.euler_rotation(10, -25, 5), atol=1e-6)
    p = pose(10, -25, 5, 0.1, -0.2, 1.3)
    for mine, theirs in zip(pose_transfer.split_pose(p), geometry.decompose(p), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_absolute_pose_is_the_driver():
    driver = np.stack([pose(yaw=5), pose(yaw=15, x=0.1, scale=2.0)])
    np.testing.assert_allclose(pose_transfer.transfer_pose(pose(yaw=40), driver), driver, atol=1e-6)


def test_relative_pose_starts_at_the_source_and_moves_by_the_same_amount():
    source = pose(yaw=30, x=0.2, scale=1.5)
    driver = np.stack([pose(yaw=10, x=-0.1, scale=0.8), pose(yaw=25, x=0.1, y=0.3, scale=0.4)])
    moved = pose_transfer.transfer_pose(source, driver, pose_transfer.COMPONENTS)
    np.testing.assert_allclose(moved[0], source, atol=1e-6)
    np.testing.assert_allclose(moved[1], pose(yaw=45, x=0.4, y=0.3, scale=0.75), atol=1e-6)


def test_relative_rotation_turns_about_the_heads_own_axes():
    source, driver = pose(yaw=60), np.stack([pose(yaw=-60), driving_nod()])
    moved = pose_transfer.transfer_pose(source, driver, ("rotation",))
    expected = pose_transfer.euler_rotation(0, 60, 0) @ pose_transfer.euler_rotation(12, 0, 0)
    np.testing.assert_allclose(moved[1, :, :3], expected, atol=1e-6)


def driving_nod():
    rotation = pose_transfer.euler_rotation(0, -60, 0) @ pose_transfer.euler_rotation(12, 0, 0)
    return pose_transfer.join_pose(rotation, np.zeros(3), np.array(1.0))


def test_relative_pose_to_a_resting_pose():
    """Which is another one than the first frame's."""
    source, rest = pose(yaw=30, x=0.2, scale=1.5), pose(yaw=-5, x=0.1, scale=0.5)
    driver = np.stack([pose(yaw=10, x=-0.1, scale=1.0)])
    moved = pose_transfer.transfer_pose(source, driver, pose_transfer.COMPONENTS, rest)
    np.testing.assert_allclose(moved[0], pose(yaw=45, x=0.0, scale=3.0), atol=1e-6)


@pytest.mark.parametrize("component", pose_transfer.COMPONENTS)
def test_each_component_can_be_relative_alone(component):
    source = pose(yaw=30, x=0.2, scale=1.5)
    driver = np.stack([pose(yaw=10, x=-0.1, scale=0.8), pose(yaw=25, x=0.1, scale=0.4)])
    rotation, translation, scale = pose_transfer.split_pose(
        pose_transfer.transfer_pose(source, driver, (component,))[1]
    )
    expected = {"rotation": 45 if component == "rotation" else 25}
    assert pose_transfer.euler_degrees(rotation)[1] == pytest.approx(expected["rotation"], abs=1e-3)
    assert translation[0] == pytest.approx(0.4 if component == "translation" else 0.1, abs=1e-6)
    assert scale == pytest.approx(0.75 if component == "scale" else 0.4, abs=1e-6)


def test_relative_flag():
    assert pose_transfer.relative_components(True) == pose_transfer.COMPONENTS
    assert pose_transfer.relative_components("rotation, scale") == ("rotation", "scale")
    assert (
        pose_transfer.relative_components("none") == pose_transfer.relative_components(False) == ()
    )
    with pytest.raises(UserError, match="zoom"):
        pose_transfer.transfer_pose(pose(), pose()[None], pose_transfer.relative_components("zoom"))


def test_relative_expression():
    source, codes = np.array([1.0, 2.0]), np.array([[5.0, 5.0], [6.0, 4.0]])
    np.testing.assert_array_equal(driving.transfer_expression(source, codes), codes)
    np.testing.assert_array_equal(
        driving.transfer_expression(source, codes, codes[0]), [[1, 2], [2, 1]]
    )


def noisy_turn(frames=60, seed=0):
    random = np.random.default_rng(seed)
    true = np.stack([pose(yaw=30 * np.sin(i / 12), x=0.1 * np.sin(i / 10)) for i in range(frames)])
    noise = [
        pose_transfer.join_pose(
            pose_transfer.split_pose(p)[0]
            @ pose_transfer.rotation_from_vector(random.normal(0, 0.03, 3)),
            p[:, 3] + random.normal(0, 0.02, 3),
            np.exp(random.normal(0, 0.02)),
        )
        for p in true
    ]
    return true, np.stack(noise)


@pytest.mark.parametrize(("kind", "strength"), [("gaussian", 1), ("one_euro", 1), ("kalman", 100)])
def test_smoothing_brings_noise_down_and_keeps_rotations(kind, strength):
    """LivePortrait's variances are of keypoints that move more than they shake: here the observations are worse."""
    true, noisy = noisy_turn()
    smooth = pose_transfer.smooth_poses(noisy, kind, strength=strength)
    rotation, _, _ = pose_transfer.split_pose(smooth)
    np.testing.assert_allclose(
        rotation @ rotation.transpose(0, 2, 1),
        np.broadcast_to(np.eye(3), rotation.shape),
        atol=1e-5,
    )
    jitter = lambda poses: np.abs(np.diff(poses, 2, axis=0)).mean()  # noqa: E731
    assert jitter(smooth) < 0.5 * jitter(noisy)
    if kind != "one_euro":  # which lags behind
        assert np.abs(smooth - true).mean() < 0.7 * np.abs(noisy - true).mean()


@pytest.mark.parametrize("kind", ["gaussian", "one_euro", "kalman"])
def test_more_strength_is_smoother(kind):
    _, noisy = noisy_turn()
    jitter = [
        np.abs(np.diff(pose_transfer.smooth_poses(noisy, kind, strength=strength), 2, 0)).mean()
        for strength in (1e-9, 0.5, 1.0, 2.0, 1e9)
    ]
    assert jitter == sorted(jitter, reverse=True) and len(set(jitter)) == 5
    assert jitter[0] > 0.99 * np.abs(np.diff(noisy, 2, 0)).mean()
    default = pose_transfer.smooth_poses(noisy, kind)
    np.testing.assert_array_equal(default, pose_transfer.smooth_poses(noisy, kind, strength=1.0))


def test_strength_by_hand():
    """A step of 0.1 in t_x: what the first frame takes of it, and the second of one that follows with lag."""
    step = np.stack([pose(), pose(x=0.1), pose(x=0.1)])
    weights = np.exp(-0.5 * (np.arange(3) / 3.0) ** 2)  # sigma of 1.5 frames, twice
    gaussian = pose_transfer.smooth_poses(step, "gaussian", strength=2.0)
    assert gaussian[0, 0, 3] == pytest.approx(0.1 * weights[1:].sum() / weights.sum(), rel=1e-5)

    def share(hertz):
        return 1 / (1 + 25 / (2 * np.pi * hertz))

    speed = share(1.0) * 0.1 * 25
    one_euro = pose_transfer.smooth_poses(step, "one_euro", strength=2.0)
    assert one_euro[1, 0, 3] == pytest.approx(0.1 * share(0.75 + 0.5 * speed), rel=1e-5)


def test_one_euro_goes_by_the_time_between_frames():
    """0.1 in t_x and a turn of 0.1 about y, 0.02 s after the first frame; the same 3 s later is all but reached."""
    turned = pose_transfer.rotation_from_vector(np.array([0, 0.1, 0]))
    moved = pose_transfer.join_pose(turned, np.array([0.1, 0, 0]), np.array(1.0))
    times = np.array([0.0, 0.02, 3.02])
    smooth = pose_transfer.smooth_poses(np.stack([pose(), moved, moved]), "one_euro", times=times)

    def share(hertz, seconds):
        return 1 - 1 / (1 + 2 * np.pi * hertz * seconds)

    speed = share(1.0, 0.02) * 0.1 / 0.02
    first = 0.1 * share(1.5 + 0.5 * speed, 0.02)
    speed -= share(1.0, 3.0) * speed
    then = first + share(1.5 + 0.5 * speed, 3.0) * (0.1 - first)
    rotation, translation, _ = pose_transfer.split_pose(smooth)
    np.testing.assert_allclose(translation[:, 0], [0, first, then], atol=1e-6)
    angles = [pose_transfer.rotation_vector(turn)[1] for turn in rotation]
    np.testing.assert_allclose(angles, [0, first, then], atol=1e-6)
    assert first < 0.04 and then > 0.097


@pytest.mark.parametrize("kind", ["gaussian", "one_euro", "kalman"])
def test_smoothing_is_of_the_scale_too(kind):
    """A frame twice as large as those about it: in logarithms, in which a half of it would be as far away."""
    for size in (2.0, 0.5):
        poses = np.stack([pose(scale=scale) for scale in (1.0, 1.0, size, 1.0, 1.0)])
        smooth = pose_transfer.smooth_poses(poses, kind, strength=1000.0)
        found = np.log(pose_transfer.split_pose(smooth)[2]) / np.log(size)
        assert 0 < found[2] < 0.5 and (found >= 0).all()


def test_nearest_rotation_is_no_mirroring():
    """Of a matrix that mirrors, the axis that it keeps least is turned about."""
    matrix = pose_transfer.euler_rotation(10, -25, 5) @ np.diag([1.0, 0.9, -0.1])
    found = pose_transfer._nearest_rotation(matrix[None])[0]
    np.testing.assert_allclose(found, pose_transfer.euler_rotation(10, -25, 5), atol=1e-6)


def test_kalman_smoother_by_hand():
    """Variances of 1. Forth: gains 1/2, 3/5, 8/13, means 0, 9/5, 9/13; back: gains 3/8, 1/3."""
    smooth = pose_transfer.kalman_smoother(np.array([[0.0], [3.0], [0.0]]), 1.0, 1.0)
    np.testing.assert_allclose(smooth[:, 0], [6 / 13, 18 / 13, 9 / 13], rtol=1e-12)


def most_likely(observed, process, observation):
    """Of the walk: where (z - x)^2 / R + (x_i - x_{i-1})^2 / Q + (x_0 - z_0)^2 is least; equations, not a filter."""
    frames = len(observed)
    steps = np.diff(np.eye(frames), axis=0)
    matrix = np.eye(frames) / observation + steps.T @ steps / process
    matrix[0, 0] += 1
    right = observed / observation
    right[0] += observed[0]
    return np.linalg.solve(matrix, right)


@pytest.mark.parametrize("strength", [1.0, 40.0])
def test_kalman_is_what_is_most_likely(strength):
    """Process 1e-5, observation 3e-7 (method.md 7.3), on every component; rotations stay rotations."""
    _, noisy = noisy_turn(40)
    smooth = pose_transfer.smooth_poses(noisy, "kalman", strength=strength)
    rotation, translation, scale = pose_transfer.split_pose(noisy)
    found, t, s = pose_transfer.split_pose(smooth)
    variances = (1e-5, 3e-7 * strength)
    np.testing.assert_allclose(t[:, :2], most_likely(translation, *variances)[:, :2], atol=1e-6)
    np.testing.assert_allclose(np.log(s), most_likely(np.log(scale), *variances), atol=1e-6)
    mean = most_likely(rotation.reshape(-1, 9), *variances).reshape(-1, 3, 3)
    left, _, right = np.linalg.svd(mean)
    np.testing.assert_allclose(found, left @ right, atol=1e-6)
    assert np.abs(smooth - noisy).max() > 1e-3  # it does something


@pytest.mark.parametrize("kind", ["gaussian", "one_euro", "kalman"])
def test_smoothing_a_long_video_takes_memory_by_the_frame(kind):
    """2 KB each at most: a matrix of all frames by all would take 32."""
    frames = 4000
    poses = np.repeat(pose(yaw=3)[None], frames, 0)
    tracemalloc.start()
    smooth = pose_transfer.smooth_poses(poses, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(smooth, poses, atol=1e-6)
    assert peak < 2000 * frames


def test_gaussian_means_by_hand():
    observed = np.random.default_rng(0).random((30, 2))
    apart = np.arange(30)[:, None] - np.arange(30)
    for sigma in (0.4, 1.5, 40.0, 1e300):
        weights = np.exp(-0.5 * (apart / sigma) ** 2)
        wanted = weights @ observed / weights.sum(axis=1, keepdims=True)
        found = pose_transfer.gaussian_smoother(observed, sigma)
        np.testing.assert_allclose(found, wanted, atol=1e-7)


@pytest.mark.parametrize("kind", ["none", "gaussian", "one_euro", "kalman"])
def test_smoothing_leaves_a_still_head_alone(kind):
    still = np.repeat(pose(10, 20, 30, 0.1, 0.2, 1.2)[None], 9, axis=0)
    np.testing.assert_allclose(pose_transfer.smooth_poses(still, kind), still, atol=1e-6)
    with pytest.raises(UserError, match="gaussian"):
        pose_transfer.smooth_poses(still, "median")


def test_rotation_vector_round_trip():
    for vector in ([0, 0, 0], [1e-9, 0, 0], [0.3, -0.2, 1.0], [0, 3.0, 0]):
        matrix = pose_transfer.rotation_from_vector(np.array(vector, float))
        np.testing.assert_allclose(pose_transfer.rotation_vector(matrix), vector, atol=1e-6)


def test_typed_pose_keeps_what_it_does_not_name():
    source = pose(5, -10, 3, 0.1, 0.2, 1.4)
    typed = driving.typed_poses(driving.parse_typed_pose('{"yaw": 20}'), source, 3)
    np.testing.assert_allclose(typed, np.stack([pose(5, 20, 3, 0.1, 0.2, 1.4)] * 3), atol=1e-6)


def test_typed_keyframes_are_interpolated_and_held():
    text = (
        '[{"frame": 1, "yaw": -20, "scale": 1}, {"frame": 3, "yaw": 20}, {"frame": 5, "scale": 4}]'
    )
    typed = driving.typed_poses(driving.parse_typed_pose(text), pose(roll=7), 7)
    yaw = [pose_transfer.euler_degrees(pose_transfer.split_pose(p)[0])[1] for p in typed]
    np.testing.assert_allclose(yaw, [-20, -20, 0, 20, 20, 20, 20], atol=1e-3)
    scale = pose_transfer.split_pose(typed)[2]
    np.testing.assert_allclose(scale, [1, 1, 2**0.5, 2, 2**1.5, 4, 4], rtol=1e-5)


def test_typed_pose_relative():
    keyframes = driving.parse_typed_pose('{"yaw": 20, "scale": 0.5, "x": 0.1}')
    typed = driving.typed_poses(
        keyframes, pose(yaw=10, x=0.2, scale=3), 1, pose_transfer.COMPONENTS
    )
    np.testing.assert_allclose(typed[0], pose(yaw=30, x=0.3, scale=1.5), atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        '{"yaw": }',
        '{"yow": 3}',
        '{"yaw": "left"}',
        '{"yaw": NaN}',
        '{"scale": 0}',
        "[]",
        "[3]",
        "{}",
        '[{"yaw": 1}, {"yaw": 2}]',
        '[{"frame": 4, "yaw": 1}, {"frame": 2, "yaw": 2}]',
        '{"yaw": true}',
        '{"yaw": 1e300}',
        '{"yaw": 1' + 400 * "0" + "}",
        '{"yaw": 1' + 5000 * "0" + "}",
        "[" * 100_000,
        '{"x": 1e39}',
        '{"scale": 1e-30}',
        '[{"frame": -1, "yaw": 1}, {"frame": 2, "yaw": 2}]',
        '[{"frame": 0, "yaw": 1}, {"frame": 1e9, "yaw": 2}]',
    ],
)
def test_wrong_typed_poses_end_in_one_line(text):
    with pytest.raises(UserError) as caught:
        driving.parse_typed_pose(text)
    assert "--pose" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_keyframes_longer_than_a_files_name_are_typed():
    keyframes = [{"frame": frame, "yaw": frame % 7} for frame in range(500)]
    assert driving.is_typed_pose(json.dumps(keyframes))
    assert driving.choose_drivers("a.png", pose=json.dumps(keyframes)).pose_is_typed


def steady(count, rate):
    return np.arange(count) / rate


def test_timeline_shortest_and_hold():
    drivers = {"pose": steady(4, 25.0), "expression": steady(6, 25.0)}
    shortest = driving.timeline(drivers)
    assert shortest.indices["expression"].tolist() == [0, 1, 2, 3] and shortest.frames == 4
    hold = driving.timeline(drivers, length="hold")
    assert hold.indices["pose"].tolist() == [0, 1, 2, 3, 3, 3]
    assert hold.indices["expression"].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(hold.times, steady(6, 25.0))
    first_ends_last = driving.timeline({"pose": steady(6, 25.0), "expression": steady(4, 25.0)})
    assert first_ends_last.frames == 4


def test_timeline_of_a_typed_pose():
    """It gives the length where nothing moves, and is what "hold" goes on to where something does."""
    keyframes = driving.parse_typed_pose('[{"frame": 2, "yaw": 0}, {"frame": 7, "yaw": 9}]')
    typed = driving.keyframed(keyframes)
    assert typed == 8 and driving.keyframed(driving.parse_typed_pose('{"yaw": 3}')) == 0
    assert driving.timeline({}, typed=typed).frames == 8
    assert driving.timeline({"expression": None}, typed=typed, frames=3).frames == 3
    video = {"expression": steady(6, 10.0)}
    assert driving.timeline(video, typed=typed).frames == 6
    hold = driving.timeline(video, typed=typed, length="hold")
    assert hold.indices["expression"].tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    np.testing.assert_allclose(hold.times, steady(8, 10.0))
    assert driving.timeline(video, typed=4, length="hold").frames == 6
    assert driving.timeline(video, typed=typed, length="hold", frames=7).frames == 7


def test_timeline_follows_the_clock_when_rates_differ():
    result = driving.timeline({"pose": steady(6, 30.0), "expression": steady(3, 15.0)})
    assert result.fps == pytest.approx(30.0) and result.steady
    assert result.indices["pose"].tolist() == [0, 1, 2, 3, 4, 5]
    assert result.indices["expression"].tolist() == [0, 0, 1, 1, 2, 2]


def test_timeline_of_a_variable_rate_is_the_drivers():
    times = np.array([0.0, 0.04, 0.2, 0.24, 0.5])
    result = driving.timeline({"pose": times, "expression": steady(13, 25.0)})
    np.testing.assert_array_equal(result.times, times)
    assert result.indices["pose"].tolist() == [0, 1, 2, 3, 4] and not result.steady
    # What the other driver shows at 0, 0.04, 0.2, 0.24 and 0.48 s, the last before 0.5 s.
    assert result.indices["expression"].tolist() == [0, 1, 5, 6, 12]


def test_a_clock_takes_its_own_frames_where_they_come_in_bursts():
    """Five seconds at 60 a second, then a still of a minute: a tenth of the mean step is longer than one of these."""
    times = np.append(np.arange(300) / 60, 65.0)
    other = np.append(0.0, times[1:] - 0.0005)  # the same rate, other rounding
    result = driving.timeline({"pose": times, "expression": times.copy(), "other": other})
    for name in ("pose", "expression", "other"):
        assert result.indices[name].tolist() == list(range(301)), name
    hold = driving.timeline({"pose": times, "expression": steady(700, 10.0)}, length="hold")
    own = hold.indices["pose"].tolist()
    assert own[:301] == list(range(301)) and set(own[301:]) == {300}
    # A burst that another driver ends in is used up to there.
    result = driving.timeline({"pose": times, "expression": steady(40, 10.0)})
    assert result.frames == 240


def test_times_rounded_to_milliseconds_are_steady():
    result = driving.timeline({"pose": np.round(steady(50, 29.97), 3)})
    assert result.steady and result.indices["pose"].tolist() == list(range(50))


def test_timeline_holds_stills_and_obeys_frames():
    result = driving.timeline({"pose": None, "expression": steady(5, 10.0)}, frames=3)
    assert result.indices["pose"].tolist() == [0, 0, 0] and result.fps == pytest.approx(10.0)
    stills = driving.timeline({"pose": None})
    assert stills.frames == 25 and stills.fps == 25.0
    with pytest.raises(UserError, match="shortest"):
        driving.timeline({"pose": None}, length="longest")


def test_span_of_a_clock_that_another_driver_has_to_last():
    times = np.array([0.0, 0.1, 0.2, 0.4, 0.5])
    frame = 0.125  # in the mean
    assert driving.span(times, 3) == pytest.approx(0.2 + frame)
    assert driving.span(times, 5) == pytest.approx(0.5 + frame)
    assert driving.span(times, 7) == pytest.approx(0.5 + 3 * frame)
