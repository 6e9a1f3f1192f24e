"""Every test runs on a CPU that plays eight devices, and finds real video only where it may be used."""

import logging
import os
from pathlib import Path

from tests.compiling import QUICK_FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {QUICK_FLAGS}"
).strip()
os.environ.setdefault("GLOG_minloglevel", "2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    """What takes longest begins first, and the other worker does the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(scope="session", autouse=True)
def programs_compiled_once(tmp_path_factory):
    """Tests that build the same program again, as a resumed run does, need not compile it again.

    The workers of one pytest share what they have compiled.
    """
    import jax

    session = tmp_path_factory.getbasetemp()
    session = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    jax.config.update("jax_compilation_cache_dir", str(session / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips and models; the test is skipped, with a reason, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs real video in ../shared/data")
    return SHARED


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(dataset of drawn heads, directory of random exports)."""
    from tests import fixtures

    root = tmp_path_factory.mktemp("stages")
    return fixtures.make_dataset(root / "data", clips=5, frames=12, size=64), root / "exports"


@pytest.fixture
def cudnn_stubbed(monkeypatch):
    """JAX's attention by cuDNN can be traced and lowered, though there is no cuDNN here."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.fixture
def programs():
    """Names of the programs that JAX compiles, small ones of single operations too."""
    import jax

    names = []

    class Heard(logging.Handler):
        def emit(self, record):
            text = record.getMessage()
            if text.startswith("Compiling "):
                names.append(text.split()[1])

    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Heard()
    logger.addHandler(handler)
    with jax.log_compiles(True):
        yield names
    logger.removeHandler(handler)


@pytest.fixture
def one_device(monkeypatch):
    """Runs the loop on one of the eight devices, which is quicker where nothing is asked about the mesh."""
    import jax

    from dexportrait_jax import sharding

    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config, rows: make(config, jax.devices()[:1]))
