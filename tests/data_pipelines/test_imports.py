"""The walls: this package imports neither jax nor TensorFlow, and reading needs no TFDS."""

import pkgutil
import subprocess
import sys

import data_pipelines


def _modules():
    return [
        module.name
        for module in pkgutil.walk_packages(data_pipelines.__path__, "data_pipelines.")
        if "synthetic" not in module.name
    ]


def _loaded_after_importing(names, forbidden):
    code = f"import sys, importlib\nfor n in {names!r}: importlib.import_module(n)\n"
    code += f"print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_nothing_imports_jax_or_tensorflow():
    names = _modules()
    assert {"data_pipelines.loading", "data_pipelines.prepare.job"} <= set(names)
    assert _loaded_after_importing(names, ["jax", "flax", "grain", "torch", "tensorflow"]) == "[]"


def test_reading_needs_neither_tfds_nor_mediapipe():
    names = [name for name in _modules() if not name.endswith((".builder", ".beam"))]
    assert _loaded_after_importing(names, ["tensorflow_datasets", "mediapipe"]) == "[]"
