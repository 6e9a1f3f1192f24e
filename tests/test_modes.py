"""The five modes of method.md 7.3, from `animate`'s flags through a real animator of the video stage: what its
denoiser is told of every frame, and what stands in the video.
"""

import re

import cv2
import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax import animate, face_clips, provenance
from dexportrait_jax.animator_windows import ClipWindows
from dexportrait_jax.evaluation.report import write_png
from dexportrait_jax.inference import load_model
from tests import fixtures
from tests.test_animate import FRAMES, PEOPLE, DrawnFaces, decoded
from tests.test_inference import SMALLEST, export

TURNED = '{"pitch": 0, "yaw": 20, "roll": 0, "x": 0.1, "y": -0.2, "scale": 1.5}'
TURNING = (
    '[{"frame": 0, "pitch": 0, "yaw": -20, "roll": 0, "x": 0, "y": 0, "scale": 1}, '
    '{"frame": 8, "yaw": 20}]'
)
SIDE = 64  # of a drawn crop, which is the upper left corner of its picture


def turned(yaw, shift=(0.0, 0.0), scale=1.0):
    """P = [sR | t] (3, 4) of a head that is turned about the upright axis alone."""
    c, s = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    turn = scale * np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return np.concatenate([turn, [[shift[0]], [shift[1]], [0]]], 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Four frames a window, two of them shared with the next; random weights."""
    return load_model(export(tmp_path_factory.mktemp("export"), "animator_video", SMALLEST))


@pytest.fixture(scope="module")
def drawn(model):
    """Poses and codes of every person's frames, by the model's own encoders; no two frames have the same."""
    found = {
        name: face_clips.encode_clip(model, fixtures.make_clip(number, FRAMES))
        for name, number in PEOPLE.items()
    }
    for part in range(2):
        rows = np.concatenate([found[name][part].reshape(FRAMES, -1) for name in PEOPLE])
        apart = np.abs(rows[:, None] - rows[None]).max(-1) + np.eye(len(rows))
        assert apart.min() > 1e-3
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A video and a picture of every person; the picture is larger than the crop."""
    folder = tmp_path_factory.mktemp("people")
    for name, number in PEOPLE.items():
        clip = fixtures.make_clip(number, FRAMES)
        frames = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[..., ::-1] for jpeg in clip.frames]
        picture = np.random.default_rng(number).integers(0, 256, (72, 80, 3), dtype=np.uint8)
        picture[:SIDE, :SIDE] = frames[0]
        write_png(folder / f"{name}.png", picture)
        with VideoWriter(folder / f"{name}.mp4", 25) as writer:
            for frame in frames:
                writer.write(frame)
    return folder


class Heard:
    """What goes through the model while a video is made.

    Attributes:
      passes: (numbers of the frames, branch, conditions) of every pass of the denoiser.
      sources: pictures that the reference was made of.
      banks: the reference's features.
      made: the model's frames.
      written: the video's frames, before they are compressed.
    """

    def __init__(self):
        self.passes, self.sources, self.banks, self.made, self.written = [], [], [], [], []

    def told(self, branch, name):
        """What passes of a branch were told, by frame, which must be the same in all of them."""
        found = {}
        for frames, which, conditions in self.passes:
            if which == branch:
                for number, value in zip(frames, getattr(conditions, name), strict=True):
                    value = found.setdefault(int(number), np.asarray(value))
                    np.testing.assert_array_equal(found[int(number)], value)
        assert sorted(found) == list(range(len(found)))
        return np.stack([found[number] for number in sorted(found)])


@pytest.fixture
def heard(model, monkeypatch):
    """The real programs run, with somebody who listens."""
    heard, programs = Heard(), model._denoiser("learned")
    window, source, frames = ClipWindows.predict, model._source, model.animate
    write = VideoWriter.write

    def predict_window(self, latents, timesteps, numbers, branch):
        heard.passes.append((numbers, branch))
        return window(self, latents, timesteps, numbers, branch)

    def predict(params, latents, timesteps, conditions):
        heard.passes[-1] += (conditions,)
        return programs.predict(params, latents, timesteps, conditions)

    def encode_source(params, picture, pose):
        latent, bank, context = source(params, picture, pose)
        heard.sources.append(picture[0])
        heard.banks.append(bank)
        return latent, bank, context

    def made(*arguments):
        for images in frames(*arguments):
            heard.made.extend(images)
            yield images

    def written(self, image, time=None):
        heard.written.append(image)
        write(self, image, time)

    monkeypatch.setattr(ClipWindows, "predict", predict_window)
    monkeypatch.setitem(model._denoisers, False, programs._replace(predict=predict))
    monkeypatch.setattr(model, "_source", encode_source)
    monkeypatch.setattr(model, "animate", made)
    monkeypatch.setattr(VideoWriter, "write", written)
    return heard


@pytest.fixture
def run(model, files, tmp_path, monkeypatch):
    """Animates with flags in which "a.png" and "b.mp4" are files of the drawn people."""
    monkeypatch.setattr(animate, "load_model", lambda weights: model)
    monkeypatch.setattr(animate, "Faces", DrawnFaces)

    def make(**flags):
        flags = {
            name: str(files / value) if str(value)[1:] in (".mp4", ".png") else value
            for name, value in flags.items()
        }
        out = tmp_path / "result.mp4"
        animate.run_animate("weights", out=str(out), guidance=2.0, overwrite=True, **flags)
        return out

    return make


def picture_of(files, name):
    return video.read_image(files / f"{name}.png")


# Mode, flags, whose pose and whose expression, or a pose that is typed.
MODES = [
    ("self", {"source": "a.mp4", "driving": "a.mp4"}, "a", "a"),
    ("cross", {"source": "a.png", "driving": "b.mp4"}, "b", "b"),
    ("disentangled", {"source": "a.png", "pose": "b.mp4", "expression": "c.mp4"}, "b", "c"),
    (
        "disentangled",
        {"source": "a.png", "pose": TURNED, "expression": "c.mp4"},
        [turned(20, (0.1, -0.2), 1.5)] * FRAMES,
        "c",
    ),
    ("expression_only", {"source": "a.png", "expression": "c.mp4"}, None, "c"),
    ("pose_only", {"source": "a.png", "pose": "b.mp4"}, "b", None),
    (
        "pose_only",
        {"source": "a.png", "pose": TURNING},
        [turned(yaw) for yaw in range(-20, 25, 5)],
        None,
    ),
]


@pytest.mark.parametrize(("mode", "flags", "pose_of", "expression_of"), MODES)
def test_what_the_denoiser_is_told(
    mode, flags, pose_of, expression_of, run, heard, model, drawn, files
):
    out = run(**flags)
    own_pose, own_expression = (part[0] for part in drawn["a"])
    poses = np.repeat(own_pose[None], FRAMES, 0) if pose_of is None else pose_of
    poses = drawn[poses][0] if isinstance(poses, str) else np.array(poses)
    frames = len(poses)
    expressions = np.repeat(own_expression[None], frames, 0)
    if expression_of:
        expressions = drawn[expression_of][1]
    for branch in ("reduced", "full"):
        assert len(heard.told(branch, "driving_pose")) == frames
        np.testing.assert_allclose(heard.told(branch, "driving_pose"), poses, atol=1e-5)
        np.testing.assert_allclose(heard.told(branch, "expression"), expressions, atol=1e-4)
    # Of the first steps the expression is kept out.
    assert np.all(heard.told("full", "keep_expression") == 1)
    assert np.all(heard.told("reduced", "keep_expression") == 0)
    branches = [branch for _, branch, _ in heard.passes]
    assert set(branches[: len(branches) // 2]) == {"null", "reduced"}
    assert set(branches[len(branches) // 2 :]) == {"null", "full"}
    for _, branch, conditions in heard.passes:
        if branch == "null":
            assert np.all(conditions.keep_expression == 0)
            assert conditions.driving_pose is conditions.residuals is conditions.keys_values is None
        else:
            np.testing.assert_allclose(conditions.source_pose, own_pose[None], atol=1e-5)
    (source,) = heard.sources
    whole = picture_of(files, "a")[:SIDE, :SIDE].astype(int)
    assert np.abs(source - whole).max() <= 2  # the first frame, also of the video

    assert decoded(out).shape == (frames, SIDE, SIDE, 3)
    found = provenance.read(out)
    assert (found["mode"], found["frames"], found["steps"]) == (mode, frames, 4)


@pytest.mark.parametrize(
    "components",
    [["rotation"], ["translation"], ["scale"], ["rotation", "scale"], None],
    ids=lambda components: "-".join(components or ["all"]),
)
def test_a_relative_pose_component_by_component(components, run, heard, drawn):
    """R_s R_0^T R_i for column vectors, t_s + t_i - t_0, s_s s_i / s_0; what is not named is the driver's."""
    run(
        source="a.png", driving="b.mp4", relative_pose=",".join(components) if components else "all"
    )
    components = components or ["rotation", "translation", "scale"]

    def parts(pose):
        scale = np.linalg.norm(pose[0, :3])  # a row of sR
        return pose[:, :3] / scale, pose[:, 3], scale

    (r_s, t_s, s_s), (r_0, t_0, s_0) = (parts(drawn[name][0][0]) for name in ("a", "b"))
    given = heard.told("full", "driving_pose")
    for told, pose in zip(given, drawn["b"][0], strict=True):
        r, t, s = parts(pose)
        r = r_s @ r_0.T @ r if "rotation" in components else r
        t = t_s + t - t_0 if "translation" in components else t
        s = s_s * s / s_0 if "scale" in components else s
        np.testing.assert_allclose(told, np.column_stack([s * r, t]), atol=2e-5)
    assert np.abs(given - drawn["b"][0]).max() > 1e-3  # which is something else than without
    np.testing.assert_allclose(heard.told("full", "expression"), drawn["b"][1], atol=1e-4)


def convolved(features, kernel, bias):
    """(h, w, c) by a kernel (3, 3, c, c) with zeros around it."""
    height, width, _ = features.shape
    wide = np.pad(features.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    return bias + sum(
        wide[row : row + height, column : column + width] @ kernel[row, column]
        for row in range(3)
        for column in range(3)
    )


@pytest.mark.parametrize("moves", [False, True])
def test_with_the_expression_alone_nothing_is_warped(moves, run, heard, model):
    """Pose, and so ray map, of the source in every frame, bit for bit; the warp gives its features as they are."""
    driver = {"driving": "c.mp4"} if moves else {"expression": "c.mp4"}
    run(source="a.png", **driver)
    (bank,) = heard.banks
    denoiser = model.networks["denoiser"].bind(model.params["denoiser"])
    passes = [conditions for _, branch, conditions in heard.passes if branch == "full"]
    assert set(passes[0].residuals) == set(denoiser.transformer_paths())
    still, at_rest = [], []
    for conditions in passes:
        still.append(
            np.array_equal(conditions.driving_pose, np.repeat(conditions.source_pose, 4, 0))
        )
        for path, residual in conditions.residuals.items():
            projection = denoiser.transformer_block(path).warp_projection
            kernel, bias = (np.asarray(part[...]) for part in (projection.kernel, projection.bias))
            unmoved = convolved(np.asarray(bank[path])[0], kernel, bias)
            assert unmoved.std() > 0.1
            at_rest.append(np.abs(np.asarray(residual) - unmoved).max() < 1e-3)
    assert set(still) == set(at_rest) == {not moves}


def test_pasted_back_nothing_changes_beside_the_face(run, heard, files):
    """Outside of the face's hull, dilated by 5 % of the crop and feathered by a Gaussian of 3 %, bit for bit."""
    out = run(source="a.png", expression="c.mp4", paste_back=True)
    picture = picture_of(files, "a")
    assert decoded(out).shape == (FRAMES, *picture.shape)
    assert provenance.read(out)["pasted_back"] and len(heard.made) == FRAMES
    points = (fixtures.make_clip(PEOPLE["a"], 1).landmarks[0, :, :2] + 1) * SIDE / 2 - 0.5
    hull = cv2.convexHull(points.astype(np.float32))
    inside = np.array(
        [
            [cv2.pointPolygonTest(hull, (float(x), float(y)), True) for x in range(80)]
            for y in range(72)
        ]
    )
    # OpenCV's Gaussian ends after four deviations.
    untouched = inside < -(0.05 + 4 * 0.03) * SIDE - 1.5
    face = inside > (4 * 0.03 - 0.05) * SIDE + 1.5
    assert untouched[:SIDE, :SIDE].sum() > 300 and face.sum() > 100
    for made, pasted in zip(heard.made, heard.written, strict=True):
        assert (pasted[untouched] == picture[untouched]).all()
        assert (pasted[face] == made[face[:SIDE, :SIDE]].reshape(-1, 3)).all()
    assert all((one != heard.written[0]).any() for one in heard.written[1:])


def test_one_seed_is_one_video(run):
    """To the byte, but for the time that it was made."""

    def made(seed):
        path = run(source="a.png", driving="b.mp4", seed=seed)
        data, times = re.subn(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", b"then", path.read_bytes())
        assert times >= 1
        return data, decoded(path)

    (first, shown), (again, _), (_, others) = made(3), made(3), made(4)
    assert first == again
    assert all((one != other).any() for one, other in zip(shown, others, strict=True))


def test_no_mode_compiles_what_another_has_not(run, programs):
    run(source="a.mp4", driving="a.mp4")
    programs.clear()
    for _, flags, _, _ in MODES[1:]:
        run(**flags)
    run(source="b.png", expression="c.mp4", paste_back=True, seed=1)
    run(source="b.png", driving="c.mp4", relative_pose="all", max_frames=3)
    assert programs == []
