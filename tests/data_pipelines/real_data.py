"""Where the real clips of the tests lie, and the mark that skips a test without them."""

from pathlib import Path

import pytest

DATA = Path(__file__).parents[3] / "shared" / "data"
MODEL = DATA / "models" / "face_landmarker.task"

needs_real_data = pytest.mark.skipif(
    not MODEL.is_file(), reason=f"no real clips and landmarker at {DATA}"
)
