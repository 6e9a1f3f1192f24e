"""report.py and curves.py: one file with everything in it, nothing fetched, numbers where they
belong.
"""

import json
import re

import cv2
import numpy as np
import pytest

from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import curves, report


def made_up(tmp_path):
    (tmp_path / "self.mp4").write_bytes(b"not really a video")
    report.write_png(tmp_path / "grid.png", np.full((8, 8, 3), 90, np.uint8))
    steps = list(range(1, 101))
    loss = curves.Curve("loss", steps, [1 / step for step in steps])
    return report.Report(
        title="a run",
        headline="Faces & <figures>",
        facts=[("+4.1 dB", "over repeating the source")],
        videos=[
            report.Video(
                tmp_path / "self.mp4", "Self", "note", ("source", "result"), "dexportrait animate"
            )
        ],
        pictures=[report.Video(tmp_path / "grid.png", "Samples")],
        quality=[
            report.Quality(
                "motion trainer",
                {"psnr": 22.5, "psnr_copy": 18.0, "ssim": 0.7, "lpips": 0.3, "lpips_copy": 0.25},
            )
        ],
        stages=[report.Stage("motion", 75.0, 2.5, "dexportrait train --config='x'", [loss])],
        limits=["small"],
        provenance="All synthetic.",
    )


def test_report_holds_everything_and_fetches_nothing(tmp_path):
    path = report.write_report(tmp_path / "out" / "report.html", made_up(tmp_path))
    text = path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert "data:video/mp4;base64," in text and "data:image/png;base64," in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text) and "<script" not in text
    assert "Faces &amp; &lt;figures&gt;" in text and "--config=&#x27;x&#x27;" in text
    for part in (
        "autoplay muted loop playsinline controls",
        "22.50",
        "+4.50",
        "repeat the source frame",
    ):
        assert part in text
    assert "1 min 15 s" in text and "2.50 GB" in text
    assert (
        'class="good">+4.50' in text and 'class="bad">+0.050' in text
    )  # LPIPS above the copy is worse


def test_empty_parts_are_left_out(tmp_path):
    text = report.write_report(tmp_path / "r.html", report.Report("t", "h")).read_text()
    assert "<section" not in text and "<h1>h</h1>" in text


def test_report_errors_are_one_line(tmp_path):
    existing = tmp_path / "r.html"
    existing.write_text("old")
    with pytest.raises(UserError, match="--overwrite"):
        report.write_report(existing, report.Report("t", "h"), overwrite=False)
    with pytest.raises(UserError, match=r"missing\.mp4"):
        video = report.Video(tmp_path / "missing.mp4", "x")
        report.write_report(existing, report.Report("t", "h", videos=[video]))
    assert existing.read_text() == "old"
    with pytest.raises(UserError, match="folder"):
        report.write_report(existing / "below.html", report.Report("t", "h"))


def test_sample_grid_puts_each_picture_in_its_cell(tmp_path):
    red, blue = (
        np.full((16, 16, 3), (255, 0, 0), np.uint8),
        np.full((64, 64, 3), (0, 0, 255), np.uint8),
    )
    grid = report.sample_grid([[red, blue], [blue]], cell=32, gap=4)
    assert grid.shape == (68, 68, 3)
    assert grid[16, 16].tolist() == [255, 0, 0] and grid[16, 52].tolist() == [0, 0, 255]
    assert grid[52, 16].tolist() == [0, 0, 255] and grid[52, 52].tolist() == [255, 255, 255]
    path = report.write_png(tmp_path / "grid.png", grid)
    assert (cv2.imread(str(path))[..., ::-1] == grid).all()


def test_smoothed_is_an_unbiased_running_mean():
    np.testing.assert_allclose(curves.smoothed([3.0] * 5, 10), [3.0] * 5)
    np.testing.assert_allclose(curves.smoothed([1.0, 5.0, 2.0], 1), [1.0, 5.0, 2.0])
    np.testing.assert_allclose(curves.smoothed([0.0, 1.0], 2), [0.0, 2 / 3])


def test_curve_axis_is_logarithmic_only_over_a_wide_range():
    wide = curves.curve_svg(curves.Curve("loss", range(100), np.geomspace(1, 1e-3, 100)))
    assert all(f">{label}<" in wide for label in ("0.1", "0.01"))
    narrow = curves.curve_svg(curves.Curve("loss", range(100), np.linspace(1.0, 0.5, 100)))
    assert ">0.6<" in narrow and ">0.8<" in narrow
    assert curves.curve_svg(curves.Curve("nothing", [1], [float("nan")])) == ""
    assert "<polyline" in curves.curve_svg(curves.Curve("one", [5], [2.0]))
    assert "<polyline" in curves.curve_svg(curves.Curve("flat", [1, 2, 3], [0.0, 0.0, 0.0]))


def test_read_curves(tmp_path):
    rows = [
        {"step": 1, "loss": 2.0, "steps_per_second": 3.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 1.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 4, "lo')
    (loss,) = curves.read_curves(path)
    assert (loss.name, list(loss.steps), list(loss.values)) == ("loss", [1, 3], [2.0, 1.0])
    assert [c.name for c in curves.read_curves(path, ["absent", "steps_per_second"])] == [
        "steps_per_second"
    ]
