"""Where the time goes, by a clock that is set, and a report when it goes nowhere."""

import threading
import time

import pytest

from dexportrait_jax import wall_time
from dexportrait_jax.wall_time import WallTime, Watch


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(wall_time.time, "monotonic", lambda: now[0])
    return now


def test_shares_by_hand(clock):
    wall = WallTime()
    clock[0] += 30  # compiling
    with wall.spent("data"):
        clock[0] += 2
    clock[0] += 8  # the first step
    wall.ready()
    assert wall.row(1, 12) == pytest.approx(
        {"time/start_seconds": 38.0, "time/data_seconds": 2.0, "time/goodput": 0.0}
    )
    for _ in range(4):
        with wall.spent("data"):
            clock[0] += 1
        clock[0] += 4
    with wall.spent("save"):
        clock[0] += 5
    row = wall.row(4, 12)
    assert row == pytest.approx(
        {
            "time/data_seconds": 4.0,
            "time/save_seconds": 5.0,
            "time/goodput": 16 / 65,
            "time/step_seconds": 4.0,
            "time/pictures_per_second": 4 * 12 / 25,
        }
    )
    assert wall.summary() == "65 s: start 58%, steps 25%, data 9%, save 8%"


def test_what_stands_still_is_reported_once_with_all_stacks(tmp_path, capsys):
    wall = WallTime()
    wall.ready()
    release = threading.Event()

    def never_answers():
        with wall.spent("data"):
            release.wait(30)

    loader = threading.Thread(target=never_answers)
    loader.start()
    watch = Watch(wall, 0.2, tmp_path)
    time.sleep(1.0)
    release.set()
    loader.join()
    watch.close()
    said = capsys.readouterr().err
    assert said.count("no progress") == 1 and "it is at: data" in said
    written = (tmp_path / "stacks.txt").read_text()
    assert "never_answers" in written and "Thread" in written


def test_what_moves_is_not_reported(tmp_path, capsys):
    wall = WallTime()
    watch = Watch(wall, 0.4, tmp_path)
    for _ in range(12):
        time.sleep(0.1)
        watch.moved()
    watch.close()
    assert capsys.readouterr().err == "" and not (tmp_path / "stacks.txt").exists()
