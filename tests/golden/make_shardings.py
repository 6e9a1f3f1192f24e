"""Where every weight of the `full` configs goes on the meshes of some slices: `tests/golden/shardings/STAGE.json`.

    python -m tests.golden.make_shardings

Written anew after a change of rules or networks, and looked at: the difference is what the change did.
"""

import json
from pathlib import Path
from typing import Any

import jax

from dexportrait_jax import config as configs
from dexportrait_jax import sharding
from dexportrait_jax.programs import abstract_state
from dexportrait_jax.tasks import make_task

FOLDER = Path(__file__).parent / "shardings"
STAGES = ("motion", "autoencoder", "animator_image", "animator_video")
SLICES = ("v5e:4x4", "v5e:16x16", "v5p:2x4x4")


def state_of(stage: str) -> dict[str, Any]:
    """Shapes of the State of a stage at `full`, which no slice changes."""
    config = configs.load_config(f"configs/{stage}.py:full")
    return abstract_state(make_task(config), config)


def mesh_of(stage: str, where: str) -> jax.sharding.AbstractMesh:
    """The mesh that `full` has on a slice."""
    mesh = configs.load_config(f"configs/{stage}.py:full@{where}").mesh
    return jax.sharding.AbstractMesh(tuple(mesh[axis] for axis in sharding.AXES), sharding.AXES)


def placed(tree: Any, mesh: jax.sharding.AbstractMesh) -> dict[str, str]:
    """Of every leaf, by its path: the axes over which each dimension lies, as ". . fsdp+context tensor"."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = sharding.path_name(path)
        axes = sharding.parameter_spec(name, tuple(leaf.shape), mesh)
        over = ((axis,) if isinstance(axis, str) else axis or () for axis in axes)
        found[name] = " ".join("+".join(each) or "." for each in over)
    return found


def is_whole(spec: str) -> bool:
    """Whether every device has all of it."""
    return set(spec) <= {".", " "}


def shardings(stage: str, state: dict[str, Any]) -> dict[str, Any]:
    """The golden file of a stage: on each slice the mesh, and of the weights those that some slice cuts."""
    meshes = {where: mesh_of(stage, where) for where in SLICES}
    by_slice = {where: placed(state["params"], mesh) for where, mesh in meshes.items()}
    names = list(by_slice[SLICES[0]])
    cut = [name for name in names if not all(is_whole(by_slice[one][name]) for one in SLICES)]
    return {
        "meshes": {where: dict(mesh.shape) for where, mesh in meshes.items()},
        "whole_everywhere": len(names) - len(cut),
        "cut": {name: [by_slice[where][name] for where in SLICES] for name in cut},
    }


def written(found: dict[str, Any]) -> str:
    """JSON with one weight a line."""
    rows = [f"  {json.dumps(name)}: {json.dumps(specs)}" for name, specs in found["cut"].items()]
    head = {key: value for key, value in found.items() if key != "cut"}
    return json.dumps(head)[:-1] + ', "cut": {\n' + ",\n".join(rows) + "\n}}\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for stage in STAGES:
        (FOLDER / f"{stage}.json").write_text(written(shardings(stage, state_of(stage))))
