"""HDR video comes back as the colours it was made of, by formulas of BT.2100 written here the other way round."""

from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines import high_dynamic_range, video

PQ, HLG = 16, 18
PATCH = 32
# Skin, lips, hair, shirt, wall: what an SDR camera would have stored of them, and four greys.
COLOURS = np.array(
    [(196, 148, 122), (150, 70, 72), (48, 34, 28), (52, 84, 160), (90, 150, 70)]
    + [(level, level, level) for level in (16, 64, 128, 220)],
    np.uint8,
)


def _primaries(red, green, blue, white=(0.3127, 0.3290)):
    """(3, 3), linear RGB of these chromaticities to XYZ."""
    corners = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (red, green, blue)]).T
    x, y = white
    return corners * np.linalg.solve(corners, [x / y, 1, (1 - x - y) / y])


BT709 = _primaries((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
BT2020 = _primaries((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))


def _light(srgb):
    """sRGB codes (..., 3) -> linear light of BT.2020 primaries, in units of SDR white."""
    value = np.asarray(srgb) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.clip(linear @ (np.linalg.inv(BT2020) @ BT709).T, 0, None)


def _signal(light, transfer):
    """Light in units of 203 nits -> the signal in [0, 1] of a camera, or of a grading suite."""
    if transfer == PQ:
        power = (light * 203 / 10000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    display = light * 203 / 1000
    luminance = display @ [0.2627, 0.6780, 0.0593]
    scene = display * np.maximum(luminance, 1e-12)[..., None] ** (1 / 1.2 - 1)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-12)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def _planes(signal):
    """(n, 3) signals -> 10-bit Y, Cb, Cr (n,) of BT.2020, limited range."""
    y = signal @ [0.2627, 0.6780, 0.0593]
    cb, cr = (signal[:, 2] - y) / 1.8814, (signal[:, 0] - y) / 1.4746
    codes = np.stack([64 + 876 * y, 512 + 896 * cb, 512 + 896 * cr], -1)
    return np.round(codes).astype(np.uint16)


def _write(path, codec, planes, transfer, matrix=9, options=None):
    """One frame, a patch a colour, of 10 bits without loss."""
    rows = [np.repeat(plane, PATCH)[None].repeat(PATCH, 0) for plane in planes.T]
    rows[1:] = [plane[::2, ::2] for plane in rows[1:]]
    height, width = rows[0].shape
    packed = np.concatenate([plane.ravel() for plane in rows]).reshape(height * 3 // 2, width)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, 9, matrix
        context.color_range = 1
        frame = av.VideoFrame.from_ndarray(packed, format="yuv420p10le")
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        frame.color_trc, frame.color_primaries = transfer, 9
        frame.colorspace, frame.color_range = matrix, 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _read(path, count):
    image = next(video.read_frames(path)).image
    return image[PATCH // 2, PATCH // 2 :: PATCH][:count].astype(int)


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "ffv1", {}),
        ("a.ts", "libx265", {"x265-params": "lossless=1:log-level=none"}),  # a phone's codec
    ],
)
def test_colours_of_hdr_video(tmp_path, transfer, name, codec, options):
    """Read as SDR they are up to 45 off, dark and washed out."""
    planes = _planes(_signal(_light(COLOURS), transfer))
    _write(tmp_path / name, codec, planes, transfer, options=options)
    found = _read(tmp_path / name, len(COLOURS))
    # Half a step of 10 bits is up to 2 of 255 here.
    assert np.abs(found - COLOURS).max() <= 3, found
    assert np.ptp(found[5:], axis=1).max() <= 1, found  # greys stay grey


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_a_matrix_that_is_not_told_is_that_of_hdr(tmp_path, transfer):
    planes = _planes(_signal(_light(COLOURS), transfer))
    _write(tmp_path / "a.mkv", "ffv1", planes, transfer, matrix=2)
    assert np.abs(_read(tmp_path / "a.mkv", len(COLOURS)) - COLOURS).max() <= 3


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_highlights_are_bent_and_not_cut(tmp_path, transfer):
    """From black to the peak of a display brighter is never darker, and diffuse white is near SDR's."""
    light = np.geomspace(0.01, 1000 / 203, 60)[:, None].repeat(3, 1)
    _write(tmp_path / "a.mkv", "ffv1", _planes(_signal(light, transfer)), transfer)
    found = _read(tmp_path / "a.mkv", 60)
    assert (np.diff(found, axis=0) >= 0).all() and np.ptp(found, axis=1).max() <= 1
    assert found[-1].min() == 255
    white, bright = (found[np.abs(light[:, 0] - level).argmin(), 0] for level in (1.0, 1.3))
    assert 244 <= white <= 250 and white < bright < 255


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_the_whole_range_in_any_number_of_rows(transfer):
    """No step back and no wrapping round at either end, whatever rows are converted together."""
    grey = np.arange(65536, dtype=np.uint16).reshape(1024, 64, 1).repeat(3, 2)
    found = high_dynamic_range.to_srgb(grey, transfer)
    assert found.dtype == np.uint8 and found.shape == grey.shape
    codes = found[..., 1].ravel().astype(int)
    assert codes[0] == 0 and codes[-1] == 255 and np.diff(codes).min() == 0
    assert set(np.diff(codes)) == {0, 1}
    np.testing.assert_array_equal(high_dynamic_range.to_srgb(grey[5:76], transfer), found[5:76])


@pytest.mark.parametrize("transfer", [1, 2, 13, 14])
def test_sdr_of_ten_bits_is_left_as_it_is(tmp_path, transfer):
    planes = _planes(COLOURS / 255)
    _write(tmp_path / "a.mkv", "ffv1", planes, transfer)
    with av.open(str(tmp_path / "a.mkv")) as container:
        plain = next(container.decode(video=0)).to_ndarray(format="rgb24")
    np.testing.assert_array_equal(next(video.read_frames(tmp_path / "a.mkv")).image, plain)
