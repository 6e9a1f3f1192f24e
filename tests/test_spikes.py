"""Losses that jump, beside their own past."""

import numpy as np

from dexportrait_jax.spikes import Spikes


def row(step, loss):
    return {"step": step, "denoise/loss": loss, "denoise/gradient_norm": 1e9}


def test_a_jump_is_written_down(tmp_path, capsys):
    spikes = Spikes(12.0, tmp_path / "spikes.txt", window=100)
    noise = np.random.default_rng(0).normal(size=300)
    falling = 2.0 - 0.002 * np.arange(300) + 0.05 * noise
    spikes.note([row(step, loss) for step, loss in enumerate(falling, 1)])
    assert capsys.readouterr().err == ""
    spikes.note([row(301, 4.0), row(302, 1.4), row(303, float("nan"))])
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "step 301: denoise/loss 4, where 1.4" in said
    assert (tmp_path / "spikes.txt").read_text() == said.removeprefix("warning: ")


def test_the_beginning_and_no_watch(tmp_path):
    assert Spikes(12.0, tmp_path / "a").find(row(1, 1e6)) == []
    none = Spikes(0.0, tmp_path / "a", window=4)
    assert [none.find(row(step, 10.0**step)) for step in range(9)] == [[]] * 9


def test_what_is_compared_by_hand(tmp_path):
    """Of six steps three have to be there; a loss that was always 1 may be off by a thousandth, 12 times over."""

    def found(*losses):
        spikes = Spikes(12.0, tmp_path / "a", window=6)
        return [bool(spikes.find(row(step, loss))) for step, loss in enumerate(losses, 1)]

    assert found(1.0, 1.0, 9.0) == [False] * 3
    assert found(1.0, 1.0, 1.0, 9.0) == [False] * 3 + [True]
    assert found(1.0, 1.0, 1.0, 1.011, 1.013) == [False] * 4 + [True]
    # What was no number is not of the past, and one jump does not hide the next.
    assert found(1.0, 1.0, 1.0, *[float("nan")] * 6, 9.0) == [False] * 9 + [True]
    assert found(1.0, 1.0, 1.0, 9.0, 9.0) == [False] * 3 + [True, True]
