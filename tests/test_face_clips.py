"""face_clips.py and animate.py on real people: what is accepted, what is refused, and the paste-
back's seam.
"""

import struct
import tracemalloc

import cv2
import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax import animate, assets, face_clips
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import estimators
from dexportrait_jax.pose_transfer import euler_degrees, split_pose
from tests.data_pipelines.test_video import turn_by_metadata
from tests.test_animate import StubModel


@pytest.fixture(scope="module")
def faces(shared_data):
    path = shared_data / "models" / "face_landmarker.task"
    original = assets.fetch
    assets.fetch = lambda name, say=print: path
    with face_clips.Faces(StubModel()) as opened:
        yield opened
    assets.fetch = original


def test_portrait_and_driver(faces, shared_data):
    clip, picture = faces.portrait(str(shared_data / "stills" / "astronaut.png"))
    assert len(clip) == 1 and picture.shape == (512, 512, 3) and clip.size == 64
    driver = faces.driver(str(shared_data / "clips" / "carphone.mp4"), 5)
    assert len(driver) == 6 and driver.times[-1] == pytest.approx(5 / 30, abs=1e-3)
    source, _ = faces.portrait(str(shared_data / "clips" / "carphone.mp4"), driver)
    assert source.frames[0] == driver.clip.frames[0] and len(source) == 1


@pytest.mark.parametrize("name", ["neg_dog.jpg", "neg_mountain.jpg"])
def test_pictures_without_a_person_are_refused(name, faces, shared_data):
    with pytest.raises(UserError, match=name) as caught:
        faces.portrait(str(shared_data / "negative" / "stills" / name))
    assert "\n" not in str(caught.value)


# Of the second, ten frames may do: in its first seconds the detector loses one of the two people for some frames.
@pytest.mark.parametrize(
    ("name", "max_frames"), [("neg_no_face.mp4", 10), ("neg_two_people.mp4", None)]
)
def test_drivers_without_a_usable_face_are_refused(name, max_frames, faces, shared_data):
    with pytest.raises(UserError, match=name) as caught:
        faces.driver(str(shared_data / "negative" / "clips" / name), max_frames)
    assert "\n" not in str(caught.value)


def test_text_called_mp4_is_refused(faces, tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    for read in (faces.driver, faces.portrait):
        with pytest.raises(UserError, match=r"text\.mp4"):
            read(str(tmp_path / "text.mp4"))


def test_pasting_a_face_back_shows_no_seam(faces, shared_data):
    """The crop itself, pasted back: the picture changes inside the face alone, by resampling alone."""
    path = str(shared_data / "stills" / "astronaut.png")
    clip, picture = faces.portrait(path)
    box = clip.crop_box
    from data_pipelines.prepare.crop import extract

    plan = animate.Plan("expression_only", 25.0, clip, picture, None)
    side = int(box[2] - box[0])
    pasted = animate._paste(extract(picture, box, side), plan, faces)
    assert pasted.shape == picture.shape
    assert np.abs(pasted.astype(int) - picture).max() <= 1
    black = animate._paste(np.zeros((64, 64, 3), np.uint8), plan, faces)
    changed = np.abs(black.astype(int) - picture).max(-1) > 0
    rows, columns = np.nonzero(changed)
    assert rows.min() > box[1] and rows.max() < box[3] - 1
    assert columns.min() > box[0] and columns.max() < box[2] - 1
    middle = (clip.face_boxes[0].reshape(2, 2).mean(0) + 1) * side / 2 + box[:2]
    assert black[int(middle[1]), int(middle[0])].max() == 0


def test_estimator_reads_pose_and_expression(faces, shared_data):
    clip, _ = faces.portrait(str(shared_data / "stills" / "astronaut.png"))
    picture = face_clips.model_inputs(StubModel(), clip, np.array([0]))["image"][0]
    found = estimators.read_face(faces.landmarker, picture)
    mirrored = estimators.read_face(faces.landmarker, picture[:, ::-1])
    # a mirror turns yaw and roll round and leaves pitch
    np.testing.assert_allclose(mirrored.angles, found.angles * (1, -1, -1), atol=6)
    assert estimators.pose_distance(found, found) == 0
    assert estimators.read_face(faces.landmarker, np.zeros((64, 64, 3), np.uint8)) is None


def test_estimator_reads_the_same_pose_wherever_the_face_is(faces, shared_data):
    """A quarter of the picture to either side MediaPipe's own yaw moves by 3.8 degrees in the mean."""
    moved = []
    for name in ("0-f1-su-ph.jpg", "0-f15-hao-ph.jpg", "hallo_4.jpg"):
        picture = video.read_image(shared_data / "stills" / name)
        picture = cv2.resize(picture, (256, 256), interpolation=cv2.INTER_AREA)
        read = {}
        for place in (0, 128, 256):  # of a square twice as wide
            wide = np.zeros((512, 512, 3), np.uint8)
            wide[128:384, place : place + 256] = picture
            read[place] = estimators.read_face(faces.landmarker, wide).angles
        moved += [read[128] - read[0], read[256] - read[128]]
    assert np.abs(moved).max() < 1.0


def test_video_source_gives_its_first_frame(faces, shared_data):
    path = str(shared_data / "clips" / "carphone.mp4")
    _, picture = faces.portrait(path)
    assert (picture == next(iter(video.read_frames(path))).image).all()


@pytest.mark.parametrize("name", ["grey", "alpha", "deep"])
def test_portraits_of_every_kind(name, faces, shared_data, tmp_path):
    """Grey, alpha and 16 bits give the same face as the plain picture."""
    plain, _ = faces.portrait(str(shared_data / "stills" / "astronaut.png"))
    picture = cv2.imread(str(shared_data / "stills" / "astronaut.png"))
    if name == "grey":
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    elif name == "alpha":
        picture = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
        picture[:40, :40, 3] = 0
    else:
        picture = picture.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    clip, full = faces.portrait(str(tmp_path / "a.png"))
    assert full.shape == (512, 512, 3) and full.dtype == np.uint8
    # Another picture to the detector: mean 0.011 of half a crop in grey, and one lip 0.035. The crop, of
    # whole pixels, may move by one, which is 0.009.
    apart = np.abs(clip.landmarks[0, :, :2] - plain.landmarks[0, :, :2])
    assert apart.mean() < 0.02 and apart.max() < 0.05


def lying_jpeg(upright):
    """A JPEG stored lying on its side, which EXIF (orientation 6) says to turn clockwise, as phones write it."""
    data = cv2.imencode(".jpg", np.rot90(upright)[..., ::-1])[1].tobytes()
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + data[2:]


def test_a_4k_portrait_on_its_side(faces, shared_data, tmp_path):
    """2160 x 3840, stored lying down and turned by metadata: the upright face, one frame in memory at a time."""
    still = video.read_image(shared_data / "stills" / "astronaut.png")
    upright = np.full((3840, 2160, 3), 90, np.uint8)
    face = still[:256, 96:352]
    upright[800:2960] = cv2.resize(face, (2160, 2160), interpolation=cv2.INTER_CUBIC)
    with VideoWriter(tmp_path / "lying.mp4", 25) as writer:
        for number in range(3):
            writer.write(np.rot90(np.roll(upright, 8 * number, axis=0)))
    turn_by_metadata(tmp_path / "lying.mp4", tmp_path / "4k.mp4")
    tracemalloc.start()
    driver = faces.driver(str(tmp_path / "4k.mp4"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert driver.seen.tolist() == [True] * 3 and driver.clip.original_size.tolist() == [2160, 3840]
    pitch, yaw, roll = euler_degrees(split_pose(driver.clip.head_pose[0])[0])
    assert abs(roll) < 20  # on its side it would be 90
    # A frame takes 25 MB; while one is turned upright there are two, and the detector takes a copy.
    assert peak < 4 * 3840 * 2160 * 3

    # As the source, a video and a picture, it is the same person, and what is pasted back is upright too.
    (tmp_path / "4k.jpg").write_bytes(lying_jpeg(upright))
    for name in ("4k.mp4", "4k.jpg"):
        source, picture = faces.portrait(str(tmp_path / name))
        assert picture.shape == (3840, 2160, 3)
        assert np.abs(picture[::40, ::40].astype(int) - upright[::40, ::40]).mean() < 4
        apart = source.landmarks[0, :, :2] - driver.clip.landmarks[0, :, :2]
        assert (
            np.abs(apart - apart.mean(0)).mean() < 0.02
        )  # crops of one frame and of three differ by a shift
    black = animate._paste(
        np.zeros((64, 64, 3), np.uint8), animate.Plan("", None, source, picture, None), faces
    )
    rows, columns = np.nonzero(cv2.absdiff(black, picture)[::8, ::8].max(-1))
    rows = 8 * rows
    assert rows.min() >= 800 and rows.max() < 2960
    assert abs(np.ptp(rows) / np.ptp(8 * columns) - 1.2) < 0.4  # a face is higher than wide
