"""How much a JAX function computes: multiply-adds, counted by walking its jaxpr.

Matrix products and convolutions count; elementwise work, reductions, gathers, FFTs and decompositions do
not, as in published figures. XLA's own ``cost_analysis`` is no substitute: it takes the body of a loop once
and fused kernels for nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from dexportrait_jax.errors import UserError

# What jax.checkpoint calls the part of a backward pass that it computes once more.
_RECOMPUTED = "rematted_computation"
# Kernels whose jaxpr says nothing of the products inside: nought would be a lie.
_OPAQUE = re.compile(r"pallas_call|ffi_call|dot_product_attention|scaled_matmul|cudnn|ragged_dot")

_Scope = tuple[str, bool]  # the innermost of the wanted scopes or "", and whether recomputed


@dataclasses.dataclass(frozen=True)
class Work:
    """What a function computes.

    Attributes:
      macs: multiply-adds of matrix products and convolutions, over all devices.
      recomputed: those among them that ``jax.checkpoint`` repeats to save memory. ``macs`` is what the
        machine has to do; ``macs - recomputed`` is what the model asks, the numerator of an MFU.
      by_scope: the same multiply-adds by ``jax.named_scope``; "" holds what is in none of the scopes.
    """

    macs: int
    recomputed: int
    by_scope: dict[str, int]

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.macs


def count(function: Callable[..., Any], *arguments: Any, scopes: Sequence[str] = ()) -> Work:
    """Work of ``function(*arguments)``, which is traced and not run: shapes will do for arrays.

    Loops count times their length and conditionals by their dearest branch; what no result depends on does
    not count. A derivative is a function like any other: a product of two matrices and its two gradients are
    three products, and so for convolutions.

    Convolutions: the full window at every output position, whether it meets data or padding; or at every
    input position where those are fewer. So a transposed convolution is not charged for the zeros between its
    inputs, as in PyTorch's and fvcore's counters.

    Args:
      scopes: names of ``jax.named_scope`` to tell apart; nested ones go to the innermost.

    Raises:
      UserError: a ``while`` whose length nobody can know holds products, or a kernel hides its work.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    found = _count(jaxpr, ("", False), frozenset(scopes))
    by_scope: collections.Counter[str] = collections.Counter()
    for (scope, _), macs in found.items():
        by_scope[scope] += macs
    recomputed = sum(macs for (_, again), macs in found.items() if again)
    return Work(sum(by_scope.values()), recomputed, dict(by_scope))


def _count(jaxpr: core.Jaxpr, outer: _Scope, wanted: frozenset[str]) -> collections.Counter[_Scope]:
    total: collections.Counter[_Scope] = collections.Counter()
    for equation in _needed(jaxpr):
        kind = equation.primitive.name
        here = _scope(equation, outer, wanted)
        if kind in _PRODUCTS:
            total[here] += _PRODUCTS[kind](equation)
        elif _OPAQUE.match(kind):
            raise UserError(
                f"FLOPs: {kind} does not say what it computes; count with a backend written in plain JAX"
            )
        else:
            parts = [_count(inner, here, wanted) for inner in _inner(equation)]
            total += _combined(kind, equation.params, parts)
    return total


def _needed(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The equations that a result or an effect depends on, the last first; compilers leave out the others."""
    wanted = {value for value in jaxpr.outvars if isinstance(value, core.Var)}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            wanted.update(value for value in equation.invars if isinstance(value, core.Var))
            yield equation


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield getattr(part, "jaxpr", part)


def _scope(equation: core.JaxprEqn, outer: _Scope, wanted: frozenset[str]) -> _Scope:
    """Where an equation stands. Transformations wrap names: transpose(jvp(encoder))/block."""
    name, again = outer
    for part in re.split(r"[/()]", str(equation.source_info.name_stack)):
        if part in wanted:
            name = part
        again = again or part == _RECOMPUTED
    return name, again


def _combined(
    kind: str, params: dict[str, Any], parts: list[collections.Counter[_Scope]]
) -> collections.Counter[_Scope]:
    """Work of an equation from that of the jaxprs in it: calls of every kind run each of theirs once."""
    if kind == "cond":
        return max(parts, key=lambda part: part.total())
    together = sum(parts, collections.Counter())
    if kind == "while" and together:
        raise UserError(
            "FLOPs: a while loop with matrix products in it has no length that could be known; "
            "write it as lax.scan, or as lax.fori_loop with fixed bounds"
        )
    times = 1
    if kind == "scan":
        times = params["length"]
    elif kind == "shard_map":  # its jaxpr is what each device does
        # The axes it spreads over are `manual_axes` in JAX 0.9, `newly_manual_axes` in 0.10.
        axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
        times = math.prod(params["mesh"].shape[axis] for axis in axes)
    return collections.Counter({scope: times * macs for scope, macs in together.items()})


def _matrix_product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    """Products of a convolution or of a gradient of one, which is a convolution again.

    Along every axis, input position, place in the window and output position decide each other: two of
    them are free. A gradient exchanges their parts, so the two with the fewest positions count in all
    three alike. Those are window and output, or window and input where the convolution is transposed.
    """
    numbers = equation.params["dimension_numbers"]
    inputs, kernel = (operand.aval.shape for operand in equation.invars)
    outputs = equation.outvars[0].aval.shape
    free = 1
    for i, k, o in zip(
        numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True
    ):
        fewest, second, _ = sorted((inputs[i], kernel[k], outputs[o]))
        free *= fewest * second
    batch, features = (outputs[axis] for axis in numbers.out_spec[:2])
    return batch * features * kernel[numbers.rhs_spec[1]] * free


_PRODUCTS = {"dot_general": _matrix_product, "conv_general_dilated": _convolution}
