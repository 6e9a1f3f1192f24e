"""What a backward pass keeps of the forward pass, and what it computes again, by names that a config can say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

Remat = Literal["none", "products", "blocks"]

# What attention names in the forward pass, so that its sums need not be repeated: kernels are no products to JAX.
ATTENTION = "attention"


def rematerialised(function: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`function`, whose intermediate results are kept or not.

    "none": everything is kept. "products": what convolutions, projections and attention give is kept; norms,
    activations and attention's weights are computed again, which costs next to nothing and saves most of the memory.
    "blocks": the inputs alone are kept and the function is run again, about a third more work.

    Raises:
      ValueError: another name.
    """
    if remat == "none":
        return function
    if remat == "products":
        policies = jax.checkpoint_policies
        named = policies.save_only_these_names(ATTENTION)
        return jax.checkpoint(function, policy=policies.save_from_both_policies(_product, named))
    if remat == "blocks":
        return jax.checkpoint(function)
    raise ValueError(f"remat={remat!r} is none of {', '.join(get_args(Remat))}")


def _product(primitive: Any, *_: Any, **params: Any) -> bool:
    """Convolutions and products with weights; attention's, which have a batch of matrices on both sides, are not."""
    if primitive.name == "dot_general":
        (_, _), (batched, _) = params["dimension_numbers"]
        return not batched
    return primitive.name == "conv_general_dilated"
