"""The benchmark `pods` refuses what it does not know before its first part, in one line."""

import re

import pytest

from tests.benchmarks import pods


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--parts=planz", "--parts: there is no 'planz', only plans, scaling, unet, sharded, save"),
        ("--remat=typo", "--remat: there is no 'typo', only none, products, blocks"),
        ("--remat=none,block", "there is no 'block', .*; did you mean 'blocks'"),
        ("--stages=motoin", "--stages: there is no 'motoin', .*; did you mean 'motion'"),
        ("--stages=autoencoder", "--stages: there is no 'autoencoder', only motion"),
        ("--topologies=v5x:4x4", "--topologies=v5x:4x4: topology v5x:4x4: the kinds of chips are"),
        ("--topologies=v5e:4x4,v5p:4x4", "a v5p slice is a grid of 3 sides"),
        ("--images=four", "--images=four: 'four' is no whole number from 1"),
        ("--images=4,0", "--images=4,0: '0' is no whole number from 1"),
        ("--effort=much", "--effort: invalid choice: 'much'"),
    ],
)
def test_what_pods_does_not_know_is_one_line(flag, said, tmp_path, capsys, monkeypatch):
    # Parts that are reached here have not been stopped.
    monkeypatch.setattr(pods, "_kept", None)
    monkeypatch.setattr(pods, "_plan", None)
    out = tmp_path / "pods"
    with pytest.raises(SystemExit) as stopped:
        pods.main([flag, f"--out={out}"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("tests.benchmarks pods: ") and line.count("\n") == 1
    assert re.search(said, line)
    assert not out.exists()


def test_the_autoencoder_is_known_where_it_is_run_or_planned(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pods, "save", lambda options: asked.append(options.stages))
    pods.main(["--parts=save", "--stages=autoencoder", f"--out={tmp_path}"])
    assert asked == ["autoencoder"]
