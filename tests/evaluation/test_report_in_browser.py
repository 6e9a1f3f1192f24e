"""The report in a real browser: opened from disk, its videos play and nothing reaches for the
network.
"""

import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from data_pipelines.video_writing import VideoWriter
from dexportrait_jax.evaluation import report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PROBE = """<script>onload = () => setInterval(() => {
  const states = [...document.querySelectorAll("video")].map(v => v.readyState + ":" + v.currentTime);
  document.title = "PLAYS " + states.join(" ") + " HOSTS " +
    performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
}, 200)</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_videos_play(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        for number in range(50):
            frame = np.full((64, 128, 3), 220, np.uint8)
            cv2.circle(frame, (2 * number + 10, 32), 9, (180, 60, 40), -1)
            writer.write(frame)
    shown = report.Report("t", "h", videos=[report.Video(tmp_path / "a.mp4", "a dot")])
    page = report.write_report(tmp_path / "report.html", shown)
    # the page has no script of its own; the test adds one that looks at the player
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    command = [CHROMIUM, *flags.split(), "--virtual-time-budget=4000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    ready, time, hosts = re.search(r"PLAYS (\d):([\d.]+) HOSTS (\d+)", seen).groups()
    assert int(ready) >= 3 and float(time) > 0 and hosts == "0"
