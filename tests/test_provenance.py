"""provenance.py: the record survives the container and says what it must."""

import json
from datetime import UTC, datetime

import av
import numpy as np
import pytest

import dexportrait_jax
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax import provenance
from dexportrait_jax.errors import UserError

MODEL = {
    "stage": "animator_video",
    "step": 120,
    "groups": {"pose": {"sha256": "11"}, "denoiser": {"sha256": "22"}},
}


def make_record(**changes):
    settings = {"mode": "disentangled", "seed": 4, "steps": 35, "guidance": 2.5, **changes}
    return provenance.record(MODEL, now=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), **settings)


def test_record_survives_the_container(tmp_path):
    path, record = tmp_path / "out.mp4", make_record()
    with VideoWriter(path, 25, metadata=provenance.container_metadata(record)) as writer:
        for _ in range(3):
            writer.write(np.zeros((32, 32, 3), np.uint8))
    assert provenance.read(path) == record
    with av.open(str(path)) as container:
        comment = container.metadata["comment"]
    for part in (
        "SYNTHETIC",
        dexportrait_jax.__version__,
        record["weights_sha256"],
        "seed 4",
        "35 denoising steps",
        "2026-01-02T03:04:05",
        "disentangled",
    ):
        assert part in comment
    assert record["synthetic"] is True and record["guidance"] == 2.5


def test_digest_depends_on_every_group():
    other = {"groups": {**MODEL["groups"], "denoiser": {"sha256": "23"}}}
    reordered = {"groups": dict(reversed(MODEL["groups"].items()))}
    assert provenance.weights_digest(MODEL) == provenance.weights_digest(reordered)
    assert provenance.weights_digest(MODEL) != provenance.weights_digest(other)


def test_a_model_without_steps_says_none():
    record = make_record(steps=None)
    assert "denoising" not in provenance.sentence(record) and record["steps"] is None


def test_videos_without_a_record(tmp_path):
    path = tmp_path / "plain.mp4"
    with VideoWriter(path, 25, metadata={"description": "holiday"}) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="no provenance"):
        provenance.read(path)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match=r"text\.mp4 cannot be read"):
        provenance.read(tmp_path / "text.mp4")
    with pytest.raises(UserError, match="cannot be read"):
        provenance.read(tmp_path / "missing.mp4")


def test_the_sidecar_is_there_once_its_video_is(tmp_path):
    path, record = tmp_path / "made" / "out.mp4", make_record()
    with provenance.sidecar(path, record):
        assert not provenance.sidecar_path(path).exists()
        assert len(list(path.parent.iterdir())) == 1  # on the disk, under another name
    assert json.loads(provenance.sidecar_path(path).read_text()) == record
    before = provenance.sidecar_path(path).read_bytes()
    with pytest.raises(RuntimeError, match="stop"), provenance.sidecar(path, make_record(seed=5)):
        raise RuntimeError("stop")
    assert provenance.sidecar_path(path).read_bytes() == before
    assert list(path.parent.iterdir()) == [provenance.sidecar_path(path)]
