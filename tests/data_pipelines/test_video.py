"""Video in and out, on files these tests write themselves."""

import struct
import zlib
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax.errors import UserError


def _frames(count=6, height=48, width=64):
    rows, columns = np.mgrid[:height, :width]
    frames = []
    for number in range(count):
        red = np.full((height, width), 40 * number)
        frames.append(np.stack([red, rows * 4, columns * 3], -1).astype(np.uint8))
    return frames


def _write(path, frames, fps=25.0, **options):
    with VideoWriter(path, fps, **options) as writer:
        for frame in frames:
            writer.write(frame)


def test_written_video_reads_back(tmp_path):
    path = tmp_path / "a.mp4"
    _write(path, _frames(), 29.97, metadata={"comment": "synthetic; made by a test"}, quality=4)
    read = list(video.read_frames(path))
    assert len(read) == 6
    for frame, expected in zip(read, _frames(), strict=True):
        assert np.abs(frame.image.astype(int) - expected).mean() < 3
    np.testing.assert_allclose([f.time for f in read], np.arange(6) / 29.97, atol=1e-3)
    assert video.probe(path)[:2] == (64, 48)
    assert video.probe(path).fps == pytest.approx(29.97, abs=1e-2)
    with av.open(str(path)) as container:
        assert container.metadata["comment"] == "synthetic; made by a test"
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser can start before it has all
    assert list(tmp_path.iterdir()) == [path]


def test_odd_sizes_are_padded(tmp_path):
    _write(tmp_path / "a.mp4", _frames(2, 33, 47))
    assert video.probe(tmp_path / "a.mp4")[:2] == (48, 34)


def test_a_failing_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 25) as writer:
        writer.write(_frames(1)[0])
        raise RuntimeError("stop")
    with pytest.raises(UserError, match="no frame"), VideoWriter(tmp_path / "a.mp4", 25):
        pass
    assert list(tmp_path.iterdir()) == []
    _write(tmp_path / "a.mp4", _frames(2))
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        VideoWriter(tmp_path / "a.mp4", 25)
    with (
        pytest.raises(RuntimeError),
        VideoWriter(tmp_path / "a.mp4", 25, overwrite=True) as writer,
    ):
        writer.write(_frames(1)[0])
        raise RuntimeError("stop")
    assert (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.parametrize("other", ["a.MP4", "a.mp4"])
def test_two_writers_at_once_do_not_meet(tmp_path, other):
    """Of one stem in one process, or of one file in two containers, whose processes have the same number."""
    frames = _frames(1)[0], 255 - _frames(1)[0]
    with (
        VideoWriter(tmp_path / other, 25, quality=4) as second,
        VideoWriter(tmp_path / "a.mp4", 25, quality=4) as first,
    ):
        for _ in range(100):  # more than the encoder keeps before it writes
            first.write(frames[0])
            second.write(frames[1])
    names = {"a.mp4": 0} | {other: 1}  # the later of one file replaces the other
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    for name, number in names.items():
        read = [frame.image for frame in video.read_frames(tmp_path / name)]
        assert len(read) == 100 and np.abs(read[99].astype(int) - frames[number]).mean() < 3


def test_what_killed_writers_left_is_removed(tmp_path, capsys):
    """And not what a writer that lives is at."""
    abandoned = tmp_path / ".a.mp4.tmp-0123abcd"
    abandoned.write_bytes(b"half of a video")
    others = tmp_path / ".b.mp4.tmp-0123abcd"
    others.touch()
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        assert not abandoned.exists() and others.exists()
        assert "removed .a.mp4.tmp-0123abcd" in capsys.readouterr().err
        writer.write(_frames(1)[0])
        _write(tmp_path / "a.mp4", _frames(3))  # another one meanwhile
        assert capsys.readouterr().err == ""
    assert sorted(tmp_path.iterdir()) == [others, tmp_path / "a.mp4"]


def test_writer_refuses_other_endings_and_bad_folders(tmp_path):
    with pytest.raises(UserError, match="ends in .mp4"):
        VideoWriter(tmp_path / "a.gif", 25)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        _write(tmp_path / "file" / "a.mp4", _frames(1))


def _mux(path, frames, *, pixel_format="yuv420p", times=None, aspect=None, codec="libx264"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24" if image.ndim == 3 else "gray")
            frame = frame.reformat(format=pixel_format)
            frame.pts = times[number] if times else 40 * number
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_variable_rate_keeps_its_times(tmp_path):
    times = [0, 40, 200, 240, 500]
    _mux(tmp_path / "a.mp4", _frames(5), times=times)
    read = [frame.time for frame in video.read_frames(tmp_path / "a.mp4")]
    np.testing.assert_allclose(read, np.array(times) / 1000, atol=2e-3)


def test_grey_and_alpha_become_rgb(tmp_path):
    _mux(tmp_path / "grey.mkv", [f[..., 1] for f in _frames(3)], pixel_format="gray", codec="ffv1")
    frame = next(video.read_frames(tmp_path / "grey.mkv")).image
    assert frame.shape == (48, 64, 3)
    assert np.abs(np.ptp(frame.astype(int), axis=-1)).max() <= 2
    _mux(tmp_path / "alpha.mkv", _frames(3), pixel_format="bgra", codec="ffv1")
    np.testing.assert_array_equal(
        next(video.read_frames(tmp_path / "alpha.mkv")).image, _frames()[0]
    )


def turn_by_metadata(path, turned):
    """A copy that is to be shown turned clockwise by a quarter, as a phone held upright writes it."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 36
    one = 0x10000
    rows = (0, one, 0, -one, 0, 0, 0, 0, 0x40000000)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in rows)
    turned.write_bytes(data)


@pytest.mark.parametrize(
    ("width", "height", "matrix", "tag", "codec", "stored"),
    [
        (1280, 720, "ITU709", 0, "libx264", "yuv420p"),
        (720, 1280, "ITU709", 0, "libx264", "yuv420p"),  # a phone held upright
        (720, 576, "ITU601", 0, "libx264", "yuv420p"),
        (1280, 720, "ITU601", 5, "libx264", "yuv420p"),
        (640, 480, "ITU709", 1, "libx264", "yuv420p"),
        (1280, 720, None, 0, "ffv1", "bgr0"),  # has no matrix at all
    ],
)
def test_colours_of_tagged_and_untagged_video(tmp_path, width, height, matrix, tag, codec, stored):
    """What tells no colour matrix is BT.601 up to PAL's size and BT.709 from there on, as in players."""
    colours = np.array([(200, 60, 60), (60, 160, 60), (60, 60, 200)], np.uint8)
    image = np.repeat(colours, -(-width // 3), axis=0)[None, :width].repeat(height, axis=0)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, stored
        if tag:
            stream.codec_context.colorspace = tag
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        container.mux(stream.encode(frame.reformat(format=stored, dst_colorspace=matrix)))
        container.mux(stream.encode(None))
    found = next(video.read_frames(path)).image[height // 2, [width // 6, width // 2, -width // 6]]
    # A wrong matrix is up to 16 off; limited range and the codec's rounding are up to 2.
    assert np.abs(found.astype(int) - colours).max() <= 3, found


def test_rotation_metadata_is_honoured(tmp_path):
    """A quarter turn written into the display matrix of the track header."""
    path = tmp_path / "a.mp4"
    _write(path, _frames(2), quality=4)
    upright = next(video.read_frames(path)).image
    turn_by_metadata(path, tmp_path / "turned.mp4")
    turned = next(video.read_frames(tmp_path / "turned.mp4")).image
    assert turned.shape == (64, 48, 3)
    np.testing.assert_array_equal(turned, np.rot90(upright, -1))  # clockwise, as players show it
    assert video.probe(tmp_path / "turned.mp4")[:2] == (48, 64)


def test_max_frames_and_damage(tmp_path):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), np.uint8)
    _write(path, list(noise))
    said = []
    assert len(list(video.read_frames(path, on_damage=said.append))) == 40
    assert len(list(video.read_frames(path, max_frames=3, on_damage=said.append))) == 3
    data = path.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) // 2])
    assert len(list(video.read_frames(cut, max_frames=3, on_damage=said.append))) == 3 and not said
    came = len(list(video.read_frames(cut, on_damage=said.append)))
    assert 10 < came < 25
    assert said == [f"the file is cut off after frame {came - 1}: its header tells of 40 frames"]
    said.clear()
    assert len(list(video.read_frames(cut, max_frames=came, on_damage=said.append))) == came
    assert not said  # all that was asked for is there


def fail_after(monkeypatch, packets, name=""):
    """From then on the disk of the videos with ``name`` in their path does not answer."""
    real = av.open

    class Failing:
        def __init__(self, *args, **options):
            self._container, self._path = real(*args, **options), args[0]

        def __getattr__(self, attribute):
            return getattr(self._container, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._container.close()

        def demux(self, stream):
            for number, packet in enumerate(self._container.demux(stream)):
                if number == packets and name in self._path:
                    raise av.error.OSError(5, "Input/output error", self._path)
                yield packet

    monkeypatch.setattr(av, "open", Failing)


@pytest.mark.parametrize("packets", [0, 30])
def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch, packets):
    _write(tmp_path / "a.mp4", _frames(40))
    fail_after(monkeypatch, packets)
    said = []
    with pytest.raises(video.DiskError, match=r"a.mp4 cannot be read \(Input/output error\)"):
        list(video.read_frames(tmp_path / "a.mp4", on_damage=said.append))
    assert not said


def test_a_disk_that_is_gone_makes_no_broken_video(tmp_path, monkeypatch):
    _write(tmp_path / "a.mp4", _frames(4))

    def stale(path, **options):
        raise av.error.OSError(116, "Stale file handle", path)

    monkeypatch.setattr(av, "open", stale)
    for read in (lambda path: next(video.read_frames(path)), video.probe, video.read_image):
        with pytest.raises(video.DiskError, match="Stale file handle"):
            read(tmp_path / "a.mp4")


def _noise_file(path, codec, options, sound):
    """60 frames of noise in groups of 10, and so many seconds of silence; where the bytes of each packet end."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.gop_size = 10
        if sound:
            silence = container.add_stream("aac", rate=16000)
        for image in np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        if sound:
            samples = np.zeros((1, int(16000 * sound)), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(silence.encode(frame))
            container.mux(silence.encode())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return sorted(packet.pos + packet.size for packet in packets)


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


@pytest.mark.parametrize(
    ("name", "codec", "options", "sound", "words"),
    [
        ("a.mkv", "libx264", {}, 0, "2.40 seconds"),
        ("sound.mkv", "libx264", {}, 6, "2.40 seconds"),
        ("a.webm", "libvpx", {}, 0, "2.40 seconds"),
        ("a.mp4", "libx264", FRAGMENTS, 0, "1.44 seconds"),
        ("sound.mp4", "libx264", FRAGMENTS, 6, "1.44 seconds"),
        ("first_counted.mp4", "libx264", {"movflags": "frag_keyframe"}, 0, "1.44 seconds"),
        ("index.mp4", "libx264", {"movflags": "dash+frag_keyframe+global_sidx"}, 0, "2.48 seconds"),
        ("a.flv", "flv1", {}, 0, "2.40 seconds"),
        ("a.avi", "libx264", {}, 0, "60 frames"),
    ],
)
def test_cut_off_where_no_frames_are_counted(tmp_path, name, codec, options, sound, words):
    """In the middle of a frame and behind one: the header's duration tells it, and of a whole file nothing."""
    path, said = tmp_path / name, []
    ends = _noise_file(path, codec, options, sound)
    assert len(list(video.read_frames(path, on_damage=said.append))) == 60 and not said
    data = path.read_bytes()
    for cut in (ends[28] + 100, ends[28]):
        path.write_bytes(data[:cut])
        came = len(list(video.read_frames(path, on_damage=said.append)))
        assert 20 < came < 31
        assert said == [f"the file is cut off after frame {came - 1}: its header tells of {words}"]
        said.clear()


def test_a_last_frame_that_is_not_whole(tmp_path):
    """So near the end that frames which an edit list or a decoder drops would look alike."""
    path, said = tmp_path / "a.mp4", []
    ends = _noise_file(path, "libx264", FRAGMENTS, 0)
    path.write_bytes(path.read_bytes()[: ends[-1] - 300])
    came = len(list(video.read_frames(path, on_damage=said.append)))
    assert said == [f"the file is cut off after frame {came - 1}: its last frame is not whole"]


def test_a_stream_that_tells_no_duration_is_not_taken_for_one_cut_off(tmp_path):
    path, said = tmp_path / "live.mkv", []
    ends = _noise_file(path, "libx264", {"live": "1"}, 0)
    path.write_bytes(path.read_bytes()[: ends[28] + 100])
    assert len(list(video.read_frames(path, on_damage=said.append))) > 20 and not said


@pytest.mark.parametrize("begin", [0, 10])
def test_what_an_edit_list_hides_is_no_damage(tmp_path, begin):
    """Trimmed as phones do it: 40 frames lie in the file, and 20 of them, from ``begin``, are to be shown."""
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), np.uint8)
    _write(path, list(noise))
    data = bytearray(path.read_bytes())
    entry = (
        data.index(b"elst") + 4 + 8
    )  # after its version and the number of edits, of which it has one
    shown, media_time = struct.unpack(">II", data[entry : entry + 8])
    assert shown == 1600  # milliseconds
    media_time += begin * 512  # 12800 a second
    data[entry : entry + 8] = struct.pack(">II", 800, media_time)
    path.write_bytes(data)
    said = []
    assert len(list(video.read_frames(path, on_damage=said.append))) == 20 and not said
    path.write_bytes(data[: len(data) * (begin + 12) // 40])
    assert 0 < len(list(video.read_frames(path, on_damage=said.append))) < 15 and len(said) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.mp4", b"this is not a video\n" * 20, "is not a video that can be read"),
        ("empty.mp4", b"", "it is empty"),
        ("missing.mp4", None, "there is no file"),
        ("folder.mp4", "folder", "is a folder"),
    ],
)
def test_unreadable_files_are_user_errors(tmp_path, name, content, words):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for read in (lambda: next(video.read_frames(path)), lambda: video.probe(path)):
        with pytest.raises(UserError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        video.read_image(path)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(12, 11)])
def test_pixels_that_are_not_square(tmp_path, aspect, turned):
    """Widened or narrowed as stored, and turned afterwards: a circle is seen as one either way."""
    rows, columns = np.mgrid[:64, :64] - 31.5
    disc = (rows**2 + (columns * float(aspect)) ** 2 < (24 * min(1, float(aspect))) ** 2) * 255
    path = tmp_path / "a.mp4"
    _mux(path, [np.repeat(disc[..., None], 3, 2).astype(np.uint8)] * 2, aspect=aspect)
    if turned:
        turn_by_metadata(path, tmp_path / "turned.mp4")
        path = tmp_path / "turned.mp4"
    width = round(64 * aspect)
    shape = (width, 64) if turned else (64, width)
    picture = next(video.read_frames(path)).image
    assert picture.shape == (*shape, 3) and video.probe(path)[:2] == shape[::-1]
    rows, columns = np.nonzero(picture[..., 0] > 127)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 3
    np.testing.assert_allclose(np.ptp(rows) + 1, 48 * min(1, float(aspect)), atol=3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("first packet", r"cannot be decoded \(Invalid data found.*\); is it complete\?$"),
        ("decoder", r"cannot be decoded \(Decoder not found\); convert it to H\.264$"),
    ],
)
def test_a_good_header_of_frames_that_cannot_be_decoded(tmp_path, damage, words):
    path = tmp_path / "a.mp4"
    _write(path, list(np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), np.uint8)))
    data = path.read_bytes()
    if damage == "decoder":
        path.write_bytes(data.replace(b"avc1", b"zzz1"))
    else:
        begin = data.index(b"mdat") + 4
        path.write_bytes(data[:begin] + b"\xff" * 3000 + data[begin + 3000 :])
    for read in (lambda: next(video.read_frames(path)), lambda: video.probe(path)):
        with pytest.raises(UserError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_read_image(tmp_path):
    picture = _frames(1)[0]
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    np.testing.assert_array_equal(video.read_image(tmp_path / "a.png"), picture)
    alpha = np.concatenate([picture[..., ::-1], np.zeros((48, 64, 1), np.uint8)], -1)
    alpha[:, 32:, 3] = 255
    cv2.imwrite(str(tmp_path / "b.png"), alpha)
    read = video.read_image(tmp_path / "b.png")
    assert (read[:, :32] == 255).all()
    np.testing.assert_array_equal(read[:, 32:], picture[:, 32:])
    _write(tmp_path / "a.mp4", _frames(2), quality=4)
    assert video.read_image(tmp_path / "a.mp4").shape == (48, 64, 3)


def _png_that_claims(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize("kind", ["picture", "claim", "video"])
def test_pictures_larger_than_can_be_used_are_one_line(tmp_path, kind):
    """MediaPipe ends the process at 32767 pixels a side, x264 writes 16384, OpenCV reads 2^30 in all."""
    path, words = tmp_path / f"a.{'mkv' if kind == 'video' else 'png'}", "is 16386 x 16 pixels"
    if kind == "picture":
        cv2.imwrite(str(path), np.zeros((16, 16386, 3), np.uint8))
    elif kind == "claim":
        path.write_bytes(_png_that_claims(60_000, 60_000))
        words = "cannot be decoded"
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 16386, 16, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16386, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        with pytest.raises(UserError, match=words):
            next(video.read_frames(path))
    with pytest.raises(UserError, match=f"{words}.* at most 16384") as caught:
        video.read_image(path)
    assert "\n" not in str(caught.value)


def test_a_video_larger_than_x264_writes_is_one_line(tmp_path):
    _write(tmp_path / "a.mp4", [np.zeros((16, 16384, 3), np.uint8)])
    with pytest.raises(UserError, match="no video of 16386 x 16 pixels.* smaller picture"):
        _write(tmp_path / "b.mp4", [np.zeros((16, 16385, 3), np.uint8)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_written_at_their_own_times(tmp_path):
    times = [0.0, 0.04, 0.2, 0.24, 0.5]
    with VideoWriter(tmp_path / "a.mp4", 10.0) as writer:
        for image, time in zip(_frames(5), times, strict=True):
            writer.write(image, time)
    read = [frame.time for frame in video.read_frames(tmp_path / "a.mp4")]
    np.testing.assert_allclose(read, times, atol=1e-4)


GREY, COLOUR = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1)), _frames(2)[1][..., ::-1]


@pytest.mark.parametrize(
    ("ending", "deep", "kind"),
    [
        (ending, deep, kind)
        for ending, depths, kinds in (
            ("png", (False, True), ("grey", "colour", "alpha")),
            ("tif", (False, True), ("grey", "colour", "alpha")),
            ("webp", (False,), ("grey", "colour", "alpha")),
            ("jpg", (False,), ("grey", "colour")),
        )
        for deep in depths
        for kind in kinds
    ],
)
def test_every_kind_of_picture(tmp_path, ending, deep, kind):
    """Grey, colour and alpha, of 8 and 16 bits: RGB of 8 bits, and white where nothing covers it."""
    stored = GREY if kind == "grey" else COLOUR
    wanted = np.repeat(GREY[..., None], 3, 2) if kind == "grey" else COLOUR[..., ::-1]
    if kind == "alpha":
        opaque = np.zeros((48, 64, 1), np.uint8)
        opaque[:, 32:] = 255
        stored = np.concatenate([COLOUR, opaque], -1)
        wanted = np.where(opaque > 0, wanted, 255)
    path = tmp_path / f"a.{ending}"
    quality = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_WEBP_QUALITY, 101]
    cv2.imwrite(str(path), stored.astype(np.uint16) * 257 if deep else stored, quality)
    read = video.read_image(path)
    assert read.shape == (48, 64, 3) and read.dtype == np.uint8
    # JPEG smears colours over two pixels each way
    assert np.abs(read.astype(int) - wanted).max() <= (16 if ending == "jpg" else 0)


@pytest.mark.parametrize("channels", [3, 4])
def test_exif_turns_a_picture(tmp_path, channels):
    """Orientation 6, as a phone held upright writes it: to be turned clockwise; with alpha too."""
    stored = np.dstack([COLOUR, np.full((48, 64, 1), 255, np.uint8)])
    stored[:, :32, 3] = 0
    tiff = b"MM\0*\0\0\0\x08" + b"\0\x01" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + b"\0\0\0\0"
    data = cv2.imencode(".png", stored[..., :channels])[1].tobytes()
    chunk = b"eXIf" + tiff
    exif = len(tiff).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    header = 8 + 25  # signature and IHDR
    (tmp_path / "a.png").write_bytes(data[:header] + exif + data[header:])
    wanted = COLOUR[..., ::-1].copy()
    if channels == 4:
        wanted[:, :32] = 255
    np.testing.assert_array_equal(video.read_image(tmp_path / "a.png"), np.rot90(wanted, -1))


def test_a_video_source_is_not_read_whole(tmp_path, monkeypatch):
    _write(tmp_path / "a.mp4", _frames(2), quality=4)
    monkeypatch.setattr(video, "_read", lambda path: pytest.fail("all bytes of a video are read"))
    assert video.read_image(tmp_path / "a.mp4").shape == (48, 64, 3)
