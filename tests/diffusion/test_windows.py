"""Windows over long clips."""

import itertools
import tracemalloc

import numpy as np
import pytest

from dexportrait_jax.diffusion.guidance import GuidanceStep, guidance_plan
from dexportrait_jax.diffusion.sampler import frame_noise, sample
from dexportrait_jax.diffusion.schedule import SCHEDULES
from dexportrait_jax.diffusion.windows import triangular_weights, window_frames, windowed

FULL = GuidanceStep(("full",), (1.0,))
# Every way of cutting a clip into windows.
GRIDS = [
    dict(zip(("offset", "ends", "weights"), chosen, strict=True))
    for chosen in itertools.product(("none", "random"), ("open", "closed"), ("triangular", "equal"))
]
MOVING = [grid for grid in GRIDS if grid["offset"] == "random"]
XNEMO = {"offset": "random", "ends": "closed", "weights": "equal"}


def named(grid):
    return "-".join(map(str, grid.values())) if isinstance(grid, dict) else None


def joined(guided, latents, timesteps, step=FULL):
    """The parts of a prediction, which must follow each other without a gap, as one array."""
    at, parts = 0, []
    for part, prediction in guided(latents, timesteps, step):
        assert part.start == at and len(prediction) == part.stop - at
        at = part.stop
        parts.append(prediction)
    assert at == len(latents)
    return np.concatenate(parts)


def placed(guided, latents, timesteps, step=FULL):
    """The parts of a prediction, which must give every frame once, in any order, as one array."""
    result, times = np.full(latents.shape, np.nan, np.float32), np.zeros(len(latents), int)
    for part, prediction in guided(latents, timesteps, step):
        assert 0 <= part.start < part.stop <= len(latents)
        result[part] = prediction
        times[part] += 1
    assert (times == 1).all()
    return result


def plainly(denoise, latents, timestep, length, overlap, offset, ends, weights, seed):
    """The scheme of method.md 7.4 with the whole clip in memory, frame by frame."""
    frames, stride = len(latents), length - overlap
    random = np.random.default_rng([seed, timestep, 0, 2])
    if ends == "closed":
        turned = random.integers(length) if offset == "random" else 0
        starts = [turned + stride * window for window in range(-(-frames // stride))]
    elif offset == "none":
        starts = [stride * window for window in range(-(-(frames - length) // stride))]
        starts.append(frames - length)
    else:
        between = -(-(frames - length) // stride)
        moved = random.integers(frames - length)
        starts = [
            int(((window + 1) * (frames - length) - moved) / between) for window in range(between)
        ]
        starts = list(dict.fromkeys([0, *starts, frames - length]))  # of two alike, one
    sums, total = np.zeros(latents.shape, np.float32), np.zeros(frames, np.float32)
    for start in starts:
        chosen = np.array([(start + place) % frames for place in range(length)])
        prediction = denoise(latents[chosen], np.full(length, timestep), chosen, "full")
        for place, frame in enumerate(chosen):
            weight = 1 if weights == "equal" else min(place + 1, length - place)
            sums[frame] += np.float32(weight) * prediction[place]
            total[frame] += weight
    return sums / total.reshape((-1,) + (1,) * (latents.ndim - 1))


def minds_its_place(latents, timesteps, chosen, branch):
    """A prediction that knows where in which window it was made."""
    place = np.arange(len(chosen)).reshape((-1,) + (1,) * (latents.ndim - 1))
    return np.sin(3 * latents + place + chosen[0] + 0.1 * timesteps[0]).astype(np.float32)


@pytest.mark.parametrize(("length", "overlap"), [(24, 4), (24, 0), (5, 3), (4, 3), (7, 2)])
@pytest.mark.parametrize("ends", ["open", "closed"])
@pytest.mark.parametrize("moving", [False, True])
def test_windows_cover_clips_of_any_length(length, overlap, ends, moving):
    for frames in range(1, 101):
        counts, grids = set(), set()
        for seed in range(5 if moving else 1):
            random = np.random.default_rng(seed) if moving else None
            table = window_frames(frames, length, overlap, ends=ends, random=random)
            assert table.shape[1] == length and set(table.ravel()) == set(range(frames))
            counts.add(len(table))
            grids.add(table.tobytes())
            if frames <= length:
                np.testing.assert_array_equal(table, window_frames(frames, length, overlap))
                continue  # the only one there is
            if ends == "open":
                assert (np.diff(table, axis=1) == 1).all()  # nothing goes round the end
                assert table[0, 0] == 0 and table[-1, -1] == frames - 1
            assert (np.diff(table, axis=1) % frames == 1).all()
            steps = np.diff(table[:, 0]) % frames
            assert steps.min() > 0 and steps.max() <= length - overlap  # none twice
            if ends == "closed":
                assert (steps == length - overlap).all()
                assert 0 < (table[0, 0] - table[-1, 0]) % frames <= length - overlap
        # However the grid lies, but that its first or last moved window may fall on the one that stays.
        assert max(counts) - min(counts) <= (moving and ends == "open")
    assert (len(grids) > 1) == moving or (length - overlap == 1 and ends == "open")


@pytest.mark.parametrize("frames", [1, 5, 24, 25, 44, 45, 100])
def test_every_frame_is_in_a_window_of_the_same_length(frames):
    table = window_frames(frames, 24, 4)
    assert table.shape[1] == 24
    assert set(table.ravel()) == set(range(frames))
    if frames >= 24:
        assert (np.diff(table, axis=1) == 1).all()


def test_clamped_table():
    assert window_frames(44, 24, 4)[:, 0].tolist() == [0, 20]
    assert window_frames(50, 24, 4)[:, 0].tolist() == [0, 20, 26]
    assert window_frames(3, 5, 1).tolist() == [[0, 1, 2, 2, 2]]


def test_weights():
    assert triangular_weights(5).tolist() == [1, 2, 3, 2, 1]
    assert triangular_weights(4).tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize(("length", "overlap"), [(8, 3), (8, 0), (8, 6)])
def test_averages_are_those_of_a_plain_statement(grid, length, overlap):
    for frames in (9, 10, 15, 21, 40):
        latents = np.random.default_rng(0).normal(size=(frames, 2)).astype(np.float32)
        guided = windowed(minds_its_place, frames, length=length, overlap=overlap, seed=6, **grid)
        for timestep in (953, 13):
            made = placed(guided, latents, np.full(frames, timestep))
            wanted = plainly(minds_its_place, latents, timestep, length, overlap, **grid, seed=6)
            # Sums across a closed end are added up in another order.
            tolerance = 1e-6 if grid["ends"] == "closed" else 0
            np.testing.assert_allclose(made, wanted, rtol=tolerance, atol=tolerance)


def test_defaults_are_what_they_were_bit_for_bit():
    """Clamped windows, triangular weights, float32 sums in the order of the windows."""
    for frames in range(25, 101):
        latents = np.random.default_rng(frames).normal(size=(frames, 3)).astype(np.float32)
        made = joined(windowed(minds_its_place, frames), latents, np.full(frames, 5))
        before = plainly(minds_its_place, latents, 5, 24, 4, "none", "open", "triangular", seed=0)
        np.testing.assert_array_equal(made, before)


@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("frames", [1, 5, 8])
def test_one_window_is_the_same_whatever_the_grid(frames, grid):
    latents = np.random.default_rng(0).normal(size=(frames, 3)).astype(np.float32)
    timesteps = np.full(frames, 13)
    plain = joined(windowed(minds_its_place, frames, length=8, overlap=3), latents, timesteps)
    guided = windowed(minds_its_place, frames, length=8, overlap=3, seed=2, **grid)
    np.testing.assert_array_equal(joined(guided, latents, timesteps), plain)
    weights = triangular_weights(8)[:frames, None]
    chosen = np.minimum(np.arange(8), frames - 1)
    alone = minds_its_place(latents[chosen], np.full(8, 13), chosen, "full")[:frames]
    np.testing.assert_array_equal(plain, weights * alone / weights)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("equal", [1, 1, 1 / 2, 1 / 2, 3 / 2, 3 / 2]),
        ("triangular", [4 / 3, 2 / 3, 1 / 3, 2 / 3, 4 / 3, 5 / 3]),
    ],
)
def test_a_closed_clip_by_hand(weights, expected):
    """Windows 0123, 2345 and 4501 that predict 0, 1 and 2."""

    def number_of_window(latents, timesteps, chosen, branch):
        return np.full(latents.shape, float(chosen[0] // 2))

    guided = windowed(number_of_window, 6, length=4, overlap=2, ends="closed", weights=weights)
    made = placed(guided, np.zeros((6, 1)), np.zeros(6, int)).ravel()
    np.testing.assert_allclose(made, expected, rtol=1e-6)


@pytest.mark.parametrize("ends", ["open", "closed"])
def test_offsets_are_drawn_from_the_seed_and_differ_from_step_to_step(ends):
    def second_starts(seed):
        """Where the second window begins, in each of 36 steps."""
        seen = {}

        def noted(latents, timesteps, chosen, branch):
            seen.setdefault(int(timesteps[0]), []).append(int(chosen[0]))
            return latents

        guided = windowed(noted, 60, length=24, overlap=4, offset="random", ends=ends, seed=seed)
        for timestep in range(1, 1000, 28):
            placed(guided, np.zeros((60, 1), np.float32), np.full(60, timestep))
        return [starts[1] for starts in seen.values()]

    found = second_starts(3)
    assert found == second_starts(3) != second_starts(4)
    # 18 places of the open clip, 24 of the closed one
    assert len(found) == 36 and len(set(found)) > 10 and max(found) - min(found) > 12


def jumps(grid, overlap, frames=60):
    """Of a clip that is nothing but windows' places: how far it jumps where windows begin by default."""

    def place(latents, timesteps, chosen, branch):
        return np.arange(len(chosen), dtype=np.float32)[:, None] / len(chosen)

    guided = windowed(place, frames, length=8, overlap=overlap, seed=1, **grid)
    start = np.zeros((frames, 1), np.float32)
    made = sample(guided, SCHEDULES["sd15"], guidance_plan(35, scale=1.0), start)
    change = np.abs(np.diff(made.ravel()))
    seams = (
        window_frames(frames, 8, overlap)[1:-1, 0] - 1
    )  # from the frame before to a window's first
    return change[seams].mean() / np.abs(made).max()


@pytest.mark.parametrize("grid", MOVING, ids=named)
@pytest.mark.parametrize("overlap", [0, 2])
def test_moving_windows_take_the_seams_away(grid, overlap):
    still = {**grid, "offset": "none"}
    assert jumps(grid, overlap) < 0.4 * jumps(still, overlap)


@pytest.mark.parametrize("frames", [3, 8, 9, 21])
def test_average_of_predictions(frames):
    latents = np.random.default_rng(0).normal(size=(frames, 2, 2, 1)).astype(np.float32)
    timesteps = np.full(frames, 13, np.int32)
    shapes = set()

    def frame_by_frame(latents, timesteps, chosen, branch):
        shapes.add(latents.shape)
        assert branch == "full"
        return latents * chosen[:, None, None, None] + timesteps[0]

    guided = windowed(frame_by_frame, frames, length=8, overlap=3)
    expected = latents * np.arange(frames)[:, None, None, None] + 13
    np.testing.assert_allclose(joined(guided, latents, timesteps), expected, rtol=1e-5)
    assert shapes == {(8, 2, 2, 1)}


def test_overlaps_blend_by_weight():
    def number_of_window(latents, timesteps, chosen, branch):
        return np.full(latents.shape, float(chosen[0] > 0))

    guided = windowed(number_of_window, 6, length=4, overlap=2)
    result = joined(guided, np.zeros((6, 1, 1, 1)), np.zeros(6, np.int32)).ravel()
    np.testing.assert_allclose(result, [0, 0, 1 / 3, 2 / 3, 1, 1], rtol=1e-6)
    alike = windowed(number_of_window, 6, length=4, overlap=2, weights="equal")
    result = joined(alike, np.zeros((6, 1, 1, 1)), np.zeros(6, np.int32)).ravel()
    np.testing.assert_allclose(result, [0, 0, 1 / 2, 1 / 2, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("overlap", [3, 6])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_latents_renewed_part_by_part_are_those_renewed_at_once(grid, overlap):
    """No window reads what the same step has already made of an earlier one."""
    latents = np.random.default_rng(0).normal(size=(21, 2, 2, 1)).astype(np.float32)
    plan = guidance_plan(4, hold=1)

    def looks_at_its_window(latents, timesteps, chosen, branch):
        return 0.2 * latents + np.tanh(latents.mean()) * (1.0 if branch == "full" else 0.5)

    guided = windowed(looks_at_its_window, 21, length=8, overlap=overlap, seed=3, **grid)

    def at_once(latents, timesteps, step):
        yield slice(0, 21), placed(guided, latents, timesteps, step)

    told = []
    np.testing.assert_array_equal(
        sample(guided, SCHEDULES["sd15"], plan, latents, progress=lambda *done: told.append(done)),
        sample(at_once, SCHEDULES["sd15"], plan, latents),
    )
    # Progress goes up and is whole at the end of every step, in whatever order frames come.
    assert told == sorted(told) and [step for step, done in told if done == 1] == [0, 1, 2, 3]


def test_in_place_is_the_same_and_otherwise_the_start_is_left_alone():
    latents = frame_noise(0, 5, (2, 2, 1))
    start, plan = latents.copy(), guidance_plan(4, hold=1)
    guided = windowed(lambda latents, *_: 0.1 * latents, 5, length=3, overlap=1)
    made = sample(guided, SCHEDULES["sd15"], plan, latents)
    np.testing.assert_array_equal(latents, start)
    assert sample(guided, SCHEDULES["sd15"], plan, latents, in_place=True) is latents
    np.testing.assert_array_equal(latents, made)


@pytest.mark.parametrize("grid", [{}, XNEMO], ids=["default", "xnemo"])
def test_memory_of_a_long_clip_is_its_latents(grid):
    """Of every frame one latent is held; predictions and sums are those of one window."""
    plan, shape = guidance_plan(4, hold=1), (16, 16, 4)

    def peak(frames):
        tracemalloc.start()
        guided = windowed(lambda latents, *_: 0.1 * latents, frames, length=24, overlap=4, **grid)
        sample(guided, SCHEDULES["sd15"], plan, frame_noise(0, frames, shape), in_place=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)
    held = (peak(1100) - peak(100)) / 1000 / (4 * np.prod(shape))
    # 1: the start, over which the result is written; and 8 bytes a window number and a timestep
    assert held < 1.1


def test_what_cannot_be():
    with pytest.raises(ValueError, match="at least one"):
        window_frames(0)
    with pytest.raises(ValueError, match="overlap"):
        window_frames(10, 4, 4)
