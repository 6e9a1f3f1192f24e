"""What is said of data before training starts: errors for what cannot be, warnings for what may not be meant."""

import numpy as np
import pytest

from data_pipelines import dataset, dataset_files, loading
from data_pipelines.examples import Examples
from data_pipelines.prepare import builder
from data_pipelines.survey import survey
from dexportrait_jax.errors import UserError
from tests import fixtures


def _data(path, **changes):
    sizes = {"image_size": 32, "pose_size": 24, "expression_size": 16}
    return loading.default_data() | sizes | {"path": str(path), "batch_size": 2} | changes


def _dataset(path, **splits):
    """A dataset of drawn clips: split name -> (person, frames) of each."""
    makers = {
        name: lambda clips=clips: [fixtures.make_clip(*clip, 32) for clip in clips]
        for name, clips in splits.items()
    }
    return builder.write_dataset(makers, path / "data")


def test_nothing_to_say(tmp_path):
    directory = _dataset(tmp_path, train=[(0, 4), (1, 4)], validation=[(2, 4)])
    found = survey(_data(directory), "validation")
    assert found.warnings == () and found.evaluable
    assert not survey(_data(directory)).evaluable


def test_short_clips_are_counted_in_both_splits(tmp_path):
    directory = _dataset(
        tmp_path, train=[(0, 4), (1, 1), (2, 3), (3, 1)], validation=[(4, 4), (5, 1)]
    )
    place = f"of {directory}"
    assert survey(_data(directory), "validation").warnings == (
        f"warning: split 'train' {place}: 2 of 4 clips are left out, because they have fewer than the 2 frames "
        "in a row that are needed",
        f"warning: split 'validation' {place}: 1 of 2 clips are left out, because they have fewer than the 2 "
        "frames in a row that are needed",
    )
    (video,) = survey(_data(directory, mode="video", frames=2, frame_stride=3)).warnings
    assert "3 of 4 clips" in video and "the 4 frames" in video
    # Left out they are: 50 examples never read a clip of one frame.
    examples = Examples(_data(directory))
    assert list(examples.usable) == [0, 2]
    for number in range(50):
        examples(number, np.random.default_rng(number))


@pytest.mark.parametrize("older", [False, True])
def test_calm_windows_are_counted(tmp_path, older):
    clips = [fixtures.flickering(number, 12, 32) for number in range(2)]
    several = [*clips, fixtures.make_clip(2, 2, 32)]  # the last is too short
    directory = builder.write_dataset({"train": lambda: several}, tmp_path / "data")
    motion = np.stack([clip.background_motion for clip in clips])
    windows = np.sort(
        np.concatenate([(motion[:, n + 1] + motion[:, n + 2]) / 2 for n in range(10)])
    )
    if older:
        fixtures.make_older(directory)
    for calm in (0, 1, 2, 12):
        limit = float((windows[calm - 1] + windows[calm]) / 2) if calm else 0.0
        knobs = {"max_difference": limit, "candidates": 8}
        found = survey(_data(directory, mode="video", frames=3, calm=knobs))
        words = f"{calm} of 20 windows of 3 frames have a calm background"
        said = [line for line in (*found.warnings, *found.notes) if words in line]
        assert len(said) == 1 and f"={limit:g}" in said[0]
        assert (said[0] in found.warnings) == (calm < 2)
        assert any("dexportrait measure --data=" in line for line in found.notes) == older
    assert (
        f"half of them have {np.median(windows):.3f} or less"
        in survey(
            _data(directory, mode="video", frames=3, calm={"max_difference": 0.0, "candidates": 8})
        ).warnings[-1]
    )
    assert survey(_data(directory)).notes == ()


@pytest.mark.parametrize("together", [1, 10, 1000])
def test_calm_windows_are_counted_a_few_clips_at_a_time(tmp_path, monkeypatch, together):
    """Of a million clips their motion alone is more than a gigabyte."""
    monkeypatch.setattr(dataset, "_TOGETHER", together)
    lengths = (5, 2, 9, 3, 12, 4)
    clips = [fixtures.flickering(number, length, 32) for number, length in enumerate(lengths)]
    directory = builder.write_dataset({"train": lambda: clips}, tmp_path / "data")
    windows = [
        float(clip.background_motion[first + 1 : first + 4].mean())
        for clip in clips
        for first in range(len(clip) - 3)
    ]
    parts = list(dataset.ClipDataset(directory, "train").background_motions())
    assert np.concatenate([frames for _, frames in parts]).tolist() == list(lengths)
    assert max(len(of_frames) for of_frames, _ in parts) <= together + max(lengths)
    assert len(parts) > 1 or together == 1000
    knobs = {"max_difference": min(windows), "candidates": 8}
    found = survey(_data(directory, mode="video", frames=4, calm=knobs))
    assert f"1 of {len(windows)} windows of 4 frames have a calm" in found.warnings[-1]
    assert f"half of them have {np.median(windows):.3f} or less" in found.warnings[-1]


@pytest.mark.parametrize("held_out", ["", "validation"])
def test_one_person_is_a_warning(tmp_path, held_out):
    """Without a held-out split there is nothing to evaluate; where there is one, it is evaluated."""
    found = survey(_data(_dataset(tmp_path, train=[(0, 4), (0, 6)])), held_out)
    (warning,) = found.warnings
    assert "shows one person" in warning and not found.evaluable
    assert ("no split 'validation'" in warning) == bool(held_out)
    (tmp_path / "both").mkdir()
    both = _dataset(tmp_path / "both", train=[(0, 4)], validation=[(0, 4)])
    found = survey(_data(both), held_out)
    assert len(found.warnings) == 1 and found.evaluable == bool(held_out)
    assert "no split" not in found.warnings[0]


def test_several_people_without_the_split_to_evaluate_are_an_error(tmp_path):
    directory = _dataset(tmp_path, train=[(0, 4), (1, 4)])
    with pytest.raises(UserError, match="no split 'validation'.*--holdout"):
        survey(_data(directory), "validation")
    assert survey(_data(directory)).warnings == ()


def test_rendered_heads():
    one = _data("synthetic:identities=1,frames=2,size=32")
    found = survey(one, "validation")
    assert len(found.warnings) == 1 and not found.evaluable
    two = survey(one | {"path": "synthetic:identities=3,frames=2,size=32"}, "validation")
    assert two.warnings == () and two.evaluable


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_records_without_masks_are_an_error(tmp_path, kind, index):
    directory = _dataset(tmp_path, train=[(0, 4), (1, 4)])
    fixtures.remove_masks(directory, empty=kind == "empty")
    if not index:
        (directory / dataset_files.index_name("train")).unlink()
    with pytest.raises(UserError, match="no mask polygons of right_eye.*prepare") as caught:
        survey(_data(directory))
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_a_first_shard_that_cannot_be_read_is_not_all(tmp_path, monkeypatch):
    """However many clips it holds."""
    monkeypatch.setattr("data_pipelines.survey._ATTEMPTS", 3)
    monkeypatch.setattr("data_pipelines.shard_reader.PAUSES", ())
    directory = fixtures.make_dataset(tmp_path / "data", 10, 4, 32)
    shard, _ = fixtures.spread(directory, 2)
    shard.write_bytes(shard.read_bytes()[:1000])
    assert survey(_data(directory)).warnings == ()


def test_one_good_record_is_enough(tmp_path, capfd):
    """The others are reported one by one while loading."""
    directory = _dataset(tmp_path, train=[(0, 4), (1, 4), (2, 4)])
    fixtures.remove_masks(directory, keep=(2,))
    assert survey(_data(directory)).warnings == ()
    examples = Examples(_data(directory))
    for number in range(6):
        examples(number, np.random.default_rng(0))
    said = capfd.readouterr().err
    assert said.count("is damaged and left out: not a clip record: no mask polygons") == 2
