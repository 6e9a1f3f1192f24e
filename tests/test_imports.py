"""What importing loads, seen in fresh processes: the package nothing heavy, training no TensorFlow and no PyTorch."""

import subprocess
import sys

import pytest


def python(program: str) -> list[str]:
    """Words that a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout.split()


def loaded(module: str) -> set[str]:
    """Top-level packages that are loaded once a module is imported."""
    program = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(python(program))


@pytest.mark.parametrize(
    "module", ["dexportrait_jax", "dexportrait_jax.cli", "dexportrait_jax.config"]
)
def test_importing_the_package_loads_no_arrays(module):
    heavy = {"jax", "flax", "cv2", "mediapipe", "torch", "tensorflow", "tensorflow_datasets"}
    if module != "dexportrait_jax.config":  # ConfigDicts know NumPy's numbers
        heavy.add("numpy")
    assert not loaded(module) & heavy


def test_importing_the_package_is_quick():
    program = (
        "import time; start = time.perf_counter(); import dexportrait_jax; "
        "print(time.perf_counter() - start)"
    )
    assert float(python(program)[0]) < 0.5


def test_training_needs_nothing_of_preparing_or_testing():
    forbidden = {"tensorflow", "tensorflow_datasets", "torch", "mediapipe", "diffusers"}
    assert not loaded("dexportrait_jax.train") & forbidden


def test_pipelines_do_not_load_jax():
    """Preparing data is CPU work of many processes; none of them should start an accelerator."""
    modules = "data_pipelines.prepare.job, data_pipelines.prepare.processing, data_pipelines.video"
    modules += ", data_pipelines.synthetic.dataset, data_pipelines.synthetic.render"
    assert "jax" not in loaded(modules)
