"""What a motion trainer starts from: another one's export with all groups, and exports that will not do."""

import json
import zlib

import jax
import numpy as np
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax import programs, sharding
from dexportrait_jax.errors import UserError
from dexportrait_jax.tasks import make_task
from dexportrait_jax.tasks.motion import TRAINED
from dexportrait_jax.weights.exporting import export_groups
from tests.stages import micro

ALL = (*TRAINED, "discriminator", "label_heads")


@pytest.fixture(scope="module")
def weights():
    """Groups of another run: every network of a micro config, from another seed than its own."""
    networks = make_task(micro("motion", "data", "exports")).networks
    return {
        name: jax.tree.map(np.asarray, network.init(jax.random.key(5)))
        for name, network in networks.items()
    }


def export(path, groups, stage="motion"):
    return export_groups(
        path, {"stage": stage, "config": {}, "step": 9, "ema": True, "crop": None}, groups
    )


def first_state(**changes):
    config = micro("motion", "data", "exports", **changes)
    task = make_task(config)
    abstract = programs.abstract_state(task, config)
    mesh = sharding.make_mesh(config.mesh, rows=config.data.batch_size)
    return task, programs.first_state(task, config, sharding.state_shardings(abstract, mesh))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def test_all_groups_go_on_from_another_run(tmp_path, weights):
    _, state = first_state(init__motion=export(tmp_path / "run", weights))
    assert set(state["params"]) == set(ALL)
    for name in ALL:
        assert_same(state["params"][name], weights[name])
    for name in TRAINED:
        assert_same(state["ema"][name], weights[name])
    assert int(state["step"]) == 0


def test_what_an_export_lacks_beside_its_networks_starts_fresh(tmp_path, weights):
    """As it would without it: the discriminator of a run that had none."""
    held = {name: weights[name] for name in (*TRAINED, "label_heads")}
    task, state = first_state(init__motion=export(tmp_path / "run", held), seed=3)
    key = jax.random.fold_in(jax.random.key(3), zlib.crc32(b"discriminator"))
    assert_same(state["params"]["discriminator"], task.networks["discriminator"].init(key))
    assert_same(state["params"]["generator"], weights["generator"])


def start_error(**changes):
    with pytest.raises(UserError) as caught:
        make_task(micro("motion", "data", "exports", **changes)).pretrained()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_exports_that_will_not_do_are_one_line(tmp_path, weights):
    path = export(tmp_path / "whole", weights)
    said = start_error(init__motion=path, model__generator__volume_channels=24)
    assert "group 'generator'" in said and "misshapen" in said and str(path) in said
    said = start_error(init__motion=path, model__expression__latent=32)
    assert "group 'expression'" in said and "misshapen" in said
    said = start_error(init__motion=export(tmp_path / "other", weights, stage="animator_image"))
    assert "stage 'animator_image', needed is 'motion'" in said
    encoders = {name: weights[name] for name in ("pose", "expression")}
    assert "has no appearance, generator" in start_error(
        init__motion=export(tmp_path / "encoders", encoders)
    )
    assert "name one of them" in start_error(init__motion=path, init__pose=path)

    run = tmp_path / "runs"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"stage": "motion"}))
    assert "dexportrait export --workdir=" in start_error(init__motion=run)
    assert "dexportrait export --workdir=" in start_error(init__motion=tmp_path / "nowhere")


def test_rendered_heads_first_real_faces_then():
    """The networks of both configs have the same sizes, so that one can go on from the other."""
    heads, faces = (
        configs.load_config(f"configs/motion.py:{name}") for name in ("synthetic", "real")
    )
    assert heads.model.to_dict() == faces.model.to_dict()
    assert faces.variant == "real" and 0 < faces.pretraining.steps < faces.num_steps
