"""The benchmarks of the animator that need a face recogniser: what they compute, with a model that is known."""

import json
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from dexportrait_jax.errors import UserError
from tests import mobileface
from tests.benchmarks import _identity, _variants, animator_ablation, profile_identity
from tests.evaluation.test_protocols import CopyModel
from tests.evaluation.test_synthetic import TruthfulModel

DATA = "synthetic:identities=6,frames=4,size=64,holdout=0.5"
YAW = 12  # of a "profile" among so few


def mean_colour(pictures):
    """A recogniser of the colour of skin and hair."""
    found = pictures.astype(float).mean((1, 2))
    found -= 128
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


class OneWhite(CopyModel):
    """The same white picture for everybody."""

    def animate(self, source, drive, sampling, report=None):
        yield np.full((len(drive), *source.shape), 255, np.uint8)


@pytest.fixture(scope="module")
def truthful():
    model = TruthfulModel(DATA, ("validation",))
    # What `minutes` samples with, and a profile is not measured with.
    sampling = {"steps": 8, "guidance": 1.0, "hybrid_steps": 1}
    data = {"data": {"frame_stride": 1}, "sampling": sampling}
    model.config = ml_collections.ConfigDict(data)
    return model


def test_csim_of_the_truth_and_of_nobody(truthful, monkeypatch):
    monkeypatch.setattr(_identity, "MAX_FRAMES", 2)
    truth = _identity.csim_of(truthful, DATA, 3, mean_colour)
    assert set(truth) == {"csim", "csim_truth", "cross_csim", "cross_csim_truth"}
    for name in ("csim", "cross_csim"):
        assert truth[name] == pytest.approx(truth[f"{name}_truth"], abs=0.01)
        assert truth[name] > 0.9
    nobody = _identity.csim_of(OneWhite(), DATA, 3, mean_colour)
    assert nobody["csim"] < 0.5 and nobody["csim_truth"] == truth["csim_truth"]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Runs the ablation without training: what it would run, and figures that say which protocol they are of."""
    trained, evaluated = {}, []

    def train(config, place, overrides):
        trained[place.name] = (config, dict(one.split("=", 1) for one in overrides))
        place.mkdir(parents=True, exist_ok=True)
        return place / "export"

    def evaluate(export, data, protocol, *flags):
        evaluated.append((export.parent.name, protocol, flags))
        values = {"cross": 1.0, "disentangled": 2.0, "synthetic": 3.0}
        return {
            key: values[protocol] for key in ("apd", "aed")[: 2 * (protocol != "synthetic")]
        } | {
            key: values[protocol]
            for key, _ in animator_ablation.COLUMNS.values()
            if not key.endswith(("apd", "aed", "csim", "csim_truth"))
        }

    figures = {name: 0.5 for name in ("csim", "csim_truth", "cross_csim", "cross_csim_truth")}
    monkeypatch.setattr(_variants, "train", train)
    monkeypatch.setattr(_variants, "evaluate", evaluate)
    monkeypatch.setattr(_identity, "csim", lambda *arguments: figures)
    flags = {"data": "heads", "latents": "latents", "autoencoder": "ae"}

    def run(**more):
        given = {**flags, "out": tmp_path / "out", "seeds": 2, **more}
        animator_ablation.main([f"--{name}={value}" for name, value in given.items()])
        return trained, evaluated

    return run


def test_the_ablations_table_is_table_2(commands, capsys):
    trained, evaluated = commands(people=5)
    lines = capsys.readouterr().out.splitlines()
    header = [cell.strip() for cell in lines[0].split("|")][2:8]
    assert header == [
        "cross CSIM",
        "cross AED",
        "cross APD, degrees",
        "dis. CSIM",
        "dis. AED",
        "dis. APD, degrees",
    ]
    full = next(line for line in lines[::-1] if line.startswith("| full"))
    values = [cell.split("±")[0].strip() for cell in full.split("|")][2:8]
    assert values == ["0.500", "1.0000", "1.00", "0.500", "2.0000", "2.00"]
    assert {protocol for _, protocol, _ in evaluated} == {"cross", "disentangled", "synthetic"}
    assert {flags for *_, flags in evaluated} == {("--max_people=5",)}
    starts = {
        name: Path(overrides["init.motion"]).parent.name
        for name, (config, overrides) in trained.items()
        if config == "configs/animator_image.py:synthetic"
    }
    assert len(starts) == 8
    for name, encoders in starts.items():
        apart = name.startswith("without_augmentation")
        assert encoders == ("encoders_neither" if apart else "encoders_full")
        masked = trained[encoders][1].get("data.augment.pose_mask.applied")
        assert masked == trained[name][1].get("data.augment.pose_mask.applied")
        assert masked == ("False" if apart else None)
    pretrained = trained["encoders_full"][1]
    assert pretrained["num_steps"] == pretrained["pretraining.steps"] == "1400"


def test_figures_are_kept(tmp_path):
    assert _variants.kept(tmp_path / "a.json", lambda: {"a": 1.5}) == {"a": 1.5}
    assert _variants.kept(tmp_path / "a.json", lambda: {"a": 2.5}) == {"a": 1.5}
    assert json.loads(Path(tmp_path / "a.json").read_text()) == {"a": 1.5}


def profile(monkeypatch, model, **more):
    monkeypatch.setattr(profile_identity, "load_model", lambda weights: model)
    monkeypatch.setattr(mobileface, "load", lambda folder: mean_colour)
    given = {"weights": "weights", "data": DATA, **more}
    return profile_identity.main([f"--{name}={value}" for name, value in given.items()])


def test_identity_of_profiles(truthful, monkeypatch, capsys):
    """The truth is the same person for every S; whatever the config says, it is sampled as method.md 7.2 says."""
    asked, animate = set(), TruthfulModel.animate

    def noted(self, source, drive, sampling, report=None):
        asked.add((sampling.steps, sampling.guidance, sampling.hybrid_steps))
        return animate(self, source, drive, sampling)

    monkeypatch.setattr(TruthfulModel, "animate", noted)
    monkeypatch.setattr(truthful, "settings", lambda sampling: {}, raising=False)
    profile(monkeypatch, truthful, people=3, yaw=YAW)
    found = json.loads(capsys.readouterr().out)
    assert asked == {(35, 2.5, 0), (35, 2.5, 5)}
    assert (found["steps"], found["guidance"], found["hybrid_steps"]) == (35, 2.5, 5)
    assert 2 <= found["people"] <= 3
    assert found["identity, S = 0"] == found["identity, S = 5"] == pytest.approx(1, abs=0.01)
    assert found["identity of another person"] < 0.99
    assert found["PSNR, S = 0"] > 40


def test_nobody_is_seen_from_the_side(truthful, monkeypatch):
    monkeypatch.setattr(truthful, "settings", lambda sampling: {}, raising=False)
    with pytest.raises(UserError, match=r"0 people .* lower --yaw") as caught:
        profile(monkeypatch, truthful, yaw=170)
    assert "\n" not in str(caught.value)


def test_a_comparison_with_itself(truthful, monkeypatch):
    with pytest.raises(
        UserError, match="^--hybrid_steps=0 is compared with S = 0; give 1 or more$"
    ):
        profile(monkeypatch, truthful, hybrid_steps=0)


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(_variants, "job", lambda *arguments: jobs.append(arguments))
    place = tmp_path / "full-0"
    _variants.train("configs/motion.py:synthetic", place, ["seed=0"])
    assert [job[0] for job in jobs] == ["train", "export"] and "--config.seed=0" in jobs[0]
    (place / "export").mkdir()
    (place / "export" / "model.json").write_text("{}")
    _variants.train("configs/motion.py:synthetic", place, iter(["seed=0"]))
    assert len(jobs) == 2
    with pytest.raises(SystemExit, match="other settings"):
        _variants.train("configs/motion.py:synthetic", place, ["seed=0", "num_steps=9"])
