"""Which frames a grid shows, how it is laid out, and which frames a model of clips makes for it."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.records import BLENDSHAPES
from dexportrait_jax.evaluation import grid
from dexportrait_jax.evaluation.runner import Runner
from dexportrait_jax.inference import Sampling
from tests import fixtures
from tests.evaluation.test_protocols import CopyModel


def still_clip(frames, yaws=None, jaws=None):
    """A clip of one pose and expression but for the frames that are named."""
    clip = fixtures.make_clip(0, frames, 32)
    poses = np.repeat(fixtures.head_pose()[None], frames, 0)
    for frame, yaw in (yaws or {}).items():
        poses[frame] = fixtures.head_pose(yaw=yaw)
    blendshapes = np.zeros_like(clip.blendshapes)
    for frame, jaw in (jaws or {}).items():
        blendshapes[frame, BLENDSHAPES.index("jawOpen")] = jaw
    return dataclasses.replace(clip, head_pose=poses, blendshapes=blendshapes)


def test_telling_frames_by_hand():
    """30 degrees count 2, a jaw wide open 1: the turn comes first, then the frame farthest from it, and so on."""
    clip = still_clip(12, yaws={7: 30, 3: -9}, jaws={9: 1.0})
    assert grid.telling_frames(clip, 1).tolist() == [7]
    assert grid.telling_frames(clip, 2).tolist() == [3, 7]  # 39 degrees, 2.6, before (2, 1), 2.24
    assert grid.telling_frames(clip, 3).tolist() == [3, 7, 9]
    assert grid.telling_frames(clip, 99).tolist() == list(range(1, 12))
    assert 0 not in grid.telling_frames(still_clip(5, yaws={0: 60}), 3)  # frame 0 is the portrait


@pytest.mark.parametrize(
    ("frames", "wanted", "run"),
    [
        (40, 20, [16, 18, 20, 22]),  # at the stride of training, about the frame
        (40, 1, [1, 3, 5, 7]),
        (40, 39, [33, 35, 37, 39]),
        (5, 4, [1, 2, 3, 4]),  # no room for the stride
        (7, 3, [1, 2, 3, 4]),  # nor here about frame 3, though frames 0, 2, 4 and 6 would have it
        (3, 1, [0, 1, 2]),
    ],
)
def test_a_model_of_clips_makes_a_run_about_each_frame(frames, wanted, run):
    runner = Runner(CopyModel(clip_length=4), Sampling(), 16)
    ((made, places),) = runner.runs_through(frames, np.array([wanted]))
    assert made.tolist() == run and made[places].tolist() == [wanted]


def test_a_model_of_frames_makes_what_is_shown():
    runner = Runner(CopyModel(), Sampling(), 16)
    ((made, places),) = runner.runs_through(40, np.array([3, 30]))
    assert made.tolist() == [3, 30] and places.tolist() == [0, 1]


class DrivenModel(CopyModel):
    """Paints the latent of the expression and, in the corner, whether the pose is another than the source's."""

    def encode(self, pose_images, expression_images):
        poses, latents = super().encode(pose_images, expression_images)
        poses[:, 0, 3] = pose_images.mean((1, 2, 3)) / 255
        return poses, latents

    def animate(self, source, drive, sampling, report=None):
        for pose, latent in zip(drive.poses, drive.expressions, strict=True):
            made = np.broadcast_to(latent, source.shape).astype(np.uint8).copy()
            made[:8, :8] = 255 * (pose != drive.source_pose).any()
            yield made[None]


@pytest.mark.parametrize("clip_length", [1, 4])
@pytest.mark.parametrize(("pose", "expression"), [(True, True), (False, True), (True, False)])
def test_each_cell_is_its_row_driven_by_its_column(clip_length, pose, expression):
    people = [fixtures.make_clip(number, 12) for number in range(3)]
    runner = Runner(DrivenModel(clip_length), Sampling(), 16)
    made = grid.make_grid(runner, people, pose=pose, expression=expression)
    assert made.source_clips == [clip.clip_id for clip in people]
    assert [clip for clip, _ in made.driver_frames] == [
        clip.clip_id for clip in people for _ in range(2)
    ]
    assert made.own == [[column // 2 == row for column in range(6)] for row in range(3)]
    for row, source in enumerate(people):
        for column, (_, frame) in enumerate(made.driver_frames):
            gives = people[column // 2], frame
            clip, index = gives if expression else (source, 0)
            _, latents = runner.model.encode(*_encoder_inputs(runner, clip, index))
            cell = made.cells[row][column]
            np.testing.assert_array_equal(cell[-1, -1], latents[0].astype(np.uint8))
            assert cell[0, 0, 0] == 255 * pose
    np.testing.assert_array_equal(made.sources[1], runner.pictures(people[1], [0])[0])
    described = made.described()
    assert described["drivers"][3] == {
        "clip": people[1].clip_id,
        "frame": made.driver_frames[3][1],
    }


def _encoder_inputs(runner, clip, index):
    from dexportrait_jax.face_clips import model_inputs

    inputs = model_inputs(runner.model, clip, np.array([index]))
    return inputs["pose_image"], inputs["expression_image"]


def test_the_picture_has_every_part_in_its_place():
    flat = lambda value: np.full((64, 64, 3), value, np.uint8)  # noqa: E731
    made = grid.Grid(
        sources=[flat(10), flat(20)],
        drivers=[flat(30), flat(40), flat(50)],
        cells=[[flat(60), flat(70), flat(80)], [flat(90), flat(100), flat(110)]],
        source_clips=["a", "b"],
        driver_frames=[("a", 1), ("a", 2), ("b", 3)],
        own=[[True, True, False], [False, False, True]],
    )
    picture = grid.draw_grid(made)
    assert picture.shape == (128 + 14 + 2 * 132 - 4, 128 + 14 + 3 * 132 - 4, 3)
    rows, columns = (64, 206, 338), (64, 206, 338, 470)  # middles
    middles = [[int(picture[y, x, 0]) for x in columns] for y in rows]
    assert middles[0][1:] == [30, 40, 50]
    assert middles[1:] == [[10, 60, 70, 80], [20, 90, 100, 110]]
    assert picture[135].min() == picture[:, 135].min() == 255  # white between heads and results
    framed = (picture[206, 143] == grid._OWN).all(), (picture[338, 143] == grid._OWN).all()
    assert framed == (True, False)
