"""Where the time goes, by a clock that is set, and a report when it goes nowhere."""

import re
import threading
import time

import pytest

from dexportrait_jax import wall_time
from dexportrait_jax.wall_time import WallTime, Watch, stacks_file


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
        {
            "time/start_seconds": 38.0,
            "time/data_seconds": 2.0,
            "time/good_seconds": 0.0,
            "time/goodput": 0.0,
        }
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
            "time/good_seconds": 16.0,
            "time/goodput": 16 / 65,
            "time/step_seconds": 4.0,
            "time/pictures_per_second": 4 * 12 / 25,
        }
    )
    assert wall.summary() == "65 s: start 58%, steps 25%, data 9%, save 8%"


def test_goodput_is_that_of_all_starts(clock):
    """100 s until a kill, 80 of them steps, the last 30 after the checkpoint; then 20 s without a process."""
    wall = WallTime()
    wall.goes_on(good_seconds=50.0, seconds_before=120.0)
    clock[0] += 10
    wall.ready()
    clock[0] += 70
    assert wall.waited_for_data() == 0.0
    with wall.spent("data"):
        clock[0] += 2
    assert wall.waited_for_data() == 2.0
    row = wall.row(8, 1)
    assert row["time/good_seconds"] == pytest.approx(50 + 70)
    # Of eight steps the first took its time before it was ready; the pictures are those of all, in all 82 s.
    assert row["time/step_seconds"] == pytest.approx(70 / 7)
    assert row["time/pictures_per_second"] == pytest.approx(8 / 82)
    assert row["time/goodput"] == pytest.approx((50 + 70) / (120 + 82))
    assert (
        wall.summary()
        == "82 s: steps 85%, start 12%, data 2%; of 202 s since its first start, steps 59%"
    )


def test_the_wait_of_another_process_is_no_step(clock):
    """Of 10 s a step, another waited 6 for data while this one waited 1: 4 were left for the step."""
    wall = WallTime()
    with wall.spent("data"):
        clock[0] += 50  # of the start, in all processes
    wall.ready()
    rows = []
    for waited in (6.0, 6.0, 0.5):  # in the last this one waits longest
        with wall.spent("data"):
            clock[0] += 1
        clock[0] += 9
        assert wall.waited_for_data() == 1.0
        wall.slowest_waited(max(waited, 1.0))
        assert wall.waited_for_data() == 0.0
        rows.append(wall.row(1, 1))
    assert [row["time/data_seconds"] for row in rows[1:]] == [6.0, 1.0]
    assert [row["time/step_seconds"] for row in rows[1:]] == [4.0, 9.0]
    assert rows[-1]["time/good_seconds"] == 4 + 4 + 9
    assert rows[-1]["time/goodput"] == pytest.approx(17 / 80)


def test_no_more_is_taken_from_steps_than_there_was(clock):
    """Of a window that has just begun; of all the time it is."""
    wall = WallTime()
    wall.ready()
    clock[0] += 10
    wall.row(1, 1)
    clock[0] += 2
    wall.slowest_waited(5.0)
    row = wall.row(1, 1)
    assert row["time/data_seconds"] == 2.0 and "time/step_seconds" not in row
    assert row["time/good_seconds"] == 7.0


def test_goodput_where_nothing_says_when_the_run_began(clock):
    """`environment.json` is lost, or of a version that did not say: the steps are no more than all of the time."""
    wall = WallTime()
    wall.goes_on(good_seconds=50.0, seconds_before=0.0)
    clock[0] += 10
    wall.ready()
    clock[0] += 40
    assert wall.row(8, 1)["time/goodput"] == pytest.approx((50 + 40) / (50 + 50))


def test_what_stands_still_is_reported_once_with_all_stacks(tmp_path, capsys):
    wall = WallTime()
    wall.ready()
    release = threading.Event()

    def never_answers():
        with wall.spent("data"):
            release.wait(30)

    loader = threading.Thread(target=never_answers)
    loader.start()
    watch = Watch(wall, 0.2, tmp_path / "stacks.txt")
    time.sleep(1.0)
    release.set()
    loader.join()
    watch.close()
    said = capsys.readouterr().err
    assert said.count("no progress") == 1 and "it is at: data" in said
    written = (tmp_path / "stacks.txt").read_text()
    assert "never_answers" in written and "Thread" in written


def test_what_stands_still_again_is_reported_again(tmp_path, capsys):
    """At another step, or at something else in the same one."""
    wall = WallTime()
    wall.ready()
    watch = Watch(wall, 0.2, tmp_path / "stacks.txt")
    time.sleep(0.6)
    watch.moved()
    time.sleep(0.6)
    with wall.spent("save"):
        time.sleep(0.6)
        watch.close()
    said = re.findall(r"after (\d) steps .* it is at: ([a-z ]+);", capsys.readouterr().err)
    assert said == [("0", "a step"), ("1", "a step"), ("1", "save")]


def test_what_moves_is_not_reported(tmp_path, capsys):
    wall = WallTime()
    watch = Watch(wall, 0.4, tmp_path / "stacks.txt")
    for _ in range(12):
        time.sleep(0.1)
        watch.moved()
    watch.close()
    assert capsys.readouterr().err == "" and not (tmp_path / "stacks.txt").exists()


@pytest.mark.parametrize(("doing", "told"), [("save", True), ("compile", False), ("start", False)])
def test_a_start_may_take_longer(tmp_path, capsys, doing, told):
    """0.6 s, with a limit of 0.3 s for what is short and 1.2 s for what is long."""
    wall = WallTime()
    watch = Watch(wall, 0.3, tmp_path / "stacks.txt")
    with wall.spent(doing):
        time.sleep(0.6)
    watch.close()
    assert (f"it is at: {doing}" in capsys.readouterr().err) is told


def test_each_process_has_its_own_stacks(tmp_path):
    assert stacks_file(tmp_path, 0, 1) == tmp_path / "stacks.txt"
    assert [stacks_file(tmp_path, process, 2).name for process in (0, 1)] == [
        "stacks_0.txt",
        "stacks_1.txt",
    ]
