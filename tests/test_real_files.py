"""`animate` from files to a file, with real people and a real animator of random weights: drivers that real videos
are, and sources of every kind.
"""

import functools
import re

import cv2
import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax import animate, cli, provenance
from dexportrait_jax.inference import load_model
from tests.data_pipelines.prepare.test_driver import write
from tests.data_pipelines.test_video import turn_by_metadata
from tests.test_inference import SMALLEST, export

# Of the carphone: the first 16 frames, 30 a second, a face in each.
FRAMES = 16


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return export(tmp_path_factory.mktemp("export"), "animator_video", SMALLEST)


@pytest.fixture(scope="module")
def loaded():
    """Each export is loaded, and compiled, once."""
    return functools.cache(load_model)


@pytest.fixture
def made(weights, loaded, shared_data, tmp_path, monkeypatch, capfd):
    """Runs the command, which must end well; returns the video and what was said on stderr."""
    monkeypatch.setenv("DEXPORTRAIT_ASSETS", str(shared_data / "models"))
    monkeypatch.setattr(animate, "load_model", loaded)

    def run(*flags):
        out = tmp_path / "result.mp4"
        code = cli.run(["animate", f"--weights={weights}", f"--out={out}", "--steps=2", *flags])
        said = capfd.readouterr().err
        assert code == 0, said
        return out, said

    return run


@pytest.fixture(scope="module")
def still(shared_data):
    return shared_data / "stills" / "astronaut.png"


@pytest.fixture(scope="module")
def frames(shared_data):
    clip = video.read_frames(shared_data / "clips" / "carphone.mp4", max_frames=FRAMES)
    # Its pixels are not square: seen as they are meant to be, it is 193 wide, and H.264 wants it even.
    return [frame.image[:, :192] for frame in clip]


@pytest.fixture(scope="module")
def short(frames, tmp_path_factory):
    """A driver of three frames, where a window has four."""
    return write(tmp_path_factory.mktemp("short") / "short.mp4", frames[:3])


def images_of(path):
    return [frame.image for frame in video.read_frames(path)]


def test_a_face_that_leaves_for_a_while_is_bridged_and_told(made, frames, still, tmp_path):
    """Every frame is made and keeps its time, and a line says how many were not seen, and where."""
    pictures = [image.copy() for image in frames]
    for image in pictures[5:9]:  # nothing but its mean colour is left
        image[:] = image.mean((0, 1))
    driver = write(tmp_path / "away.mp4", pictures)  # 25 a second
    out, said = made(f"--source={still}", f"--driving={driver}")
    assert len(images_of(out)) == FRAMES and video.probe(out).fps == pytest.approx(25)
    assert provenance.read(out)["bridged_frames"] == {"pose": 4, "expression": 4}
    (line,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert line == (
        f"warning: {driver}: 4 of 16 frames show no usable face (no face found), in 1 gap(s), the longest of 0.20 s "
        "from 0.16 s: pose and expression are interpolated there"
    )


def test_frames_that_go_black_are_a_cut_and_told(made, frames, still, tmp_path):
    """Another shot is another place for the crop: the longer one drives, and a line says what is left out."""
    pictures = [
        image if number not in range(5, 9) else 0 * image for number, image in enumerate(frames)
    ]
    driver = write(tmp_path / "black.mp4", pictures)
    out, said = made(f"--source={still}", f"--driving={driver}")
    assert len(images_of(out)) == 7
    assert f"warning: {driver}: 9 frame(s) before the shot are left out\n" in said


def test_a_variable_rate_is_kept(made, frames, still, tmp_path):
    times = [
        0,
        33,
        100,
        133,
        400,
        433,
        1633,
        1667,
    ]  # milliseconds, as a phone or a screen recorder has them
    driver = write(tmp_path / "phone.mp4", frames[:8], times)
    out, said = made(f"--source={still}", f"--driving={driver}")
    shown = [frame.time for frame in video.read_frames(out)]
    np.testing.assert_allclose(shown, np.array(times) / 1000, atol=1e-4)
    np.testing.assert_allclose(
        shown, [frame.time for frame in video.read_frames(driver)], atol=1e-4
    )
    assert "warning" not in said and "note" not in said


def test_a_4k_portrait_on_its_side_comes_out_upright(made, still, tmp_path):
    """2160 x 3840, stored lying down and turned by metadata, as source and as driver of its own expression."""
    upright = np.full((3840, 2160, 3), 90, np.uint8)
    face = video.read_image(still)[:256, 96:352]
    upright[800:2960] = cv2.resize(face, (2160, 2160), interpolation=cv2.INTER_CUBIC)
    pictures = [np.roll(upright, 16 * number, axis=0) for number in range(2)]
    lying = tmp_path / "lying.mp4"
    with VideoWriter(lying, 25) as writer:
        for picture in pictures:
            writer.write(np.rot90(picture))
    turn_by_metadata(lying, tmp_path / "4k.mp4")
    out, said = made(
        f"--source={tmp_path / '4k.mp4'}", f"--expression={tmp_path / '4k.mp4'}", "--paste_back"
    )
    shown = images_of(out)
    assert len(shown) == 2 and all(image.shape == upright.shape for image in shown)
    for image in shown:  # the source's own pixels beside the face, which is in the middle
        change = np.abs(image[::8, ::8].astype(int) - upright[::8, ::8]).max(-1)
        rows, columns = np.nonzero(cv2.blur(change.astype(np.float32), (5, 5)) > 12)
        assert np.median(change) <= 3
        assert rows.min() * 8 > 800 and rows.max() * 8 < 2960
        assert np.ptp(rows) > np.ptp(columns)  # a face is higher than wide
    assert "warning" not in said


@pytest.mark.parametrize("kind", ["grey", "alpha"])
def test_sources_without_colour_or_with_holes(kind, made, still, short, tmp_path):
    """By a driver that fills no window; pasted back, the rest of the picture is what a viewer shows of the source."""
    picture = cv2.imread(str(still))
    if kind == "grey":
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        viewed = np.repeat(picture[..., None], 3, -1)
    else:
        picture = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
        picture[:60, :60, 3] = 0
        picture[60:120, :60, 3] = 128
        share = picture[..., 3:] / 255
        viewed = (picture[..., :3] * share + 255 * (1 - share))[..., ::-1]
    cv2.imwrite(str(tmp_path / "source.png"), picture)
    out, _ = made(f"--source={tmp_path / 'source.png'}", f"--expression={short}", "--paste_back")
    shown = images_of(out)
    assert len(shown) == 3 and provenance.read(out)["frames"] == 3
    for image in shown:
        assert image.shape == viewed.shape
        corner = np.abs(image[:120, :60].astype(float) - viewed[:120, :60])
        rest = np.abs(image[400:].astype(float) - viewed[400:])
        assert corner.mean() < 2 and rest.mean() < 3  # H.264
        assert np.abs(image[60:200, 180:280].astype(float) - viewed[60:200, 180:280]).mean() > 20


def test_a_driver_shorter_than_a_window(made, still, short):
    """Its frames and no more; progress ends at their number."""
    out, said = made(f"--source={still}", f"--driving={short}")
    shown = images_of(out)
    assert len(shown) == 3 and video.probe(out).fps == pytest.approx(25)
    assert all((one != other).any() for one, other in zip(shown, shown[1:], strict=False))
    assert re.findall(r"animate result.mp4: (\S+) frames", said)[-1] == "3/3"
