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
SLICES = ("v5e:4x4", "v5e:16x16", "v5p:2x4x4", "4xv5e:16x16")


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
    return _in_words(sharding.state_shardings(tree, mesh))


def placed_in_use(params: Any, mesh: jax.sharding.AbstractMesh) -> dict[str, str]:
    """The same of weights while a step computes with them."""
    return _in_words(sharding.shardings_in_use(params, mesh))


def _in_words(places: Any) -> dict[str, str]:
    found = {}
    for path, place in jax.tree_util.tree_flatten_with_path(places)[0]:
        over = ((axis,) if isinstance(axis, str) else axis or () for axis in place.spec)
        found[sharding.path_name(path)] = " ".join("+".join(each) or "." for each in over)
    return found


def is_whole(spec: str) -> bool:
    """Whether every device has all of it."""
    return set(spec) <= {".", " "}


def shardings(stage: str, state: dict[str, Any]) -> dict[str, Any]:
    """The golden file of a stage: on each slice the mesh, and of the weights those that some slice cuts.

    As they lie between steps, and as a step computes with them.
    """
    meshes = {where: mesh_of(stage, where) for where in SLICES}
    found = {"meshes": {where: dict(mesh.shape) for where, mesh in meshes.items()}}
    for part, places in (("cut", placed), ("cut_in_use", placed_in_use)):
        by_slice = [places(state["params"], mesh) for mesh in meshes.values()]
        specs = {name: [each[name] for each in by_slice] for name in by_slice[0]}
        found[part] = {name: each for name, each in specs.items() if not all(map(is_whole, each))}
        found[f"not_{part}"] = len(specs) - len(found[part])
    return found


def written(found: dict[str, Any]) -> str:
    """JSON with one weight a line."""
    lines = []
    for key, value in found.items():
        text = json.dumps(value)
        if key.startswith("cut"):
            rows = (f"  {json.dumps(name)}: {json.dumps(specs)}" for name, specs in value.items())
            text = "{\n" + ",\n".join(rows) + "\n}"
        lines.append(f"{json.dumps(key)}: {text}")
    return "{" + ",\n".join(lines) + "}\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for stage in STAGES:
        (FOLDER / f"{stage}.json").write_text(written(shardings(stage, state_of(stage))))
