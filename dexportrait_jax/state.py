"""Networks as pure functions over plain parameter dictionaries.

Flax modules define the layers; everything that is trained, sharded, saved or exported is a nested dict of
arrays with string keys. ``Network`` is the bridge between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

Params = dict[str, Any]
# Options of a program that runs once on a CPU: compiled without optimisation, in less than a quarter of the time.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE",
}


class Keys:
    """The keys that ``nnx.Rngs(key)`` hands out, counted in Python; layers call nothing of it but ``params``.

    Flax counts in an array, and compares each new count's sharding with the last one's. That of a tracer is an error,
    for whose message JAX searches all that was traced so far: in all, the square of a network's size.
    """

    def __init__(self, key: jax.Array):
        self._key = key
        self._drawn = 0

    def params(self) -> jax.Array:
        """The next key."""
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn - 1)


class Network:
    """The static part of a module: how to make its parameters and how to bind them.

    ``constructor`` takes ``rngs`` and returns an ``nnx.Module`` that holds ``nnx.Param`` only.
    """

    def __init__(self, constructor: Callable[[Keys], nnx.Module]):
        self._constructor = constructor
        module = nnx.eval_shape(lambda: constructor(Keys(jax.random.key(0))))
        self._graph, parameters, rest = nnx.split(module, nnx.Param, ...)
        if nnx.to_flat_state(rest):
            kinds = sorted({type(leaf).__name__ for _, leaf in nnx.to_flat_state(rest)})
            raise TypeError(f"{type(module).__name__} holds state other than nnx.Param: {kinds}")
        self._paths = [path for path, _ in nnx.to_flat_state(parameters)]
        self.abstract: Params = _plain(parameters)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: a nested dict with string keys.

        One program that runs once; see QUICK.
        """

        def make(key):
            return _plain(nnx.state(self._constructor(Keys(key)), nnx.Param))

        on_cpu = jax.default_backend() == "cpu"
        return jax.jit(make).lower(key).compile(compiler_options=QUICK if on_cpu else None)(key)

    def bind(self, params: Params) -> nnx.Module:
        """The module with these parameters in it, ready to be called."""
        flat = []
        for path in self._paths:
            leaf = params
            for key in path:
                leaf = leaf[str(key)]
            flat.append((path, nnx.Param(leaf)))
        return nnx.merge(self._graph, nnx.from_flat_state(flat))


def _plain(state: nnx.State) -> Params:
    tree: Params = {}
    for path, leaf in nnx.to_flat_state(state):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = (
            leaf[...] if isinstance(leaf.get_value(), jax.Array) else leaf.get_value()
        )
    return tree


def filled(part: Params, whole: Params) -> Params:
    """``whole`` with the leaves of ``part`` in place of its own; ``part`` has no others."""
    unknown = sorted(set(part) - set(whole))
    if unknown:
        raise ValueError(f"a part has {', '.join(unknown)}, which the whole has not")
    return {
        key: filled(part[key], value)
        if key in part and isinstance(value, dict)
        else part.get(key, value)
        for key, value in whole.items()
    }


def parameter_count(tree: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return int(sum(np.prod(leaf.shape, dtype=np.int64) for leaf in jax.tree.leaves(tree)))
